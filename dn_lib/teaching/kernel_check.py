"""The judge of kernels that a learner writes.

`guarded("5.2", kernel)` turns a kernel into a function of the exercise's inputs, for `check`.  That function

- runs the kernel in Triton's interpreter in a child process, whatever this machine has, and finds accesses
  outside of the arguments before they happen, elements that two programs race for, and dots that the
  interpreter gets wrong;
- if the numbers are right, compiles the kernel ahead of time for a Hopper GPU (in a second child, without
  the interpreter; no GPU is needed), so that what hardware refuses is found;
- on a GPU, runs it there as well, with guard bands around every argument.

What goes wrong is raised as a `KernelError` of one line, unless it is an exercise's known mistake, which
`check` names.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import os
import pickle
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dn_lib.teaching.registry import all_exercises, relative_error

HOPPER = 90
SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one block of threads may have on sm_90
SECONDS = 60.0
BAND = 4096  # elements of each guard band on a GPU
UNTOUCHED = 1234.0  # what the bands of outputs hold: not NaN, which a stray read may have brought there


class KernelError(Exception):
    """What is wrong with a kernel, in one line."""


@dataclass(frozen=True)
class Plan:
    """How an exercise launches the learner's kernel.

    arguments: tensors and numbers, passed by position; constants: `tl.constexpr` parameters, by name.
    outputs: positions in `arguments` of what the kernel writes; they are handed over full of NaN.
    """

    arguments: tuple[Tensor | int | float, ...]
    outputs: tuple[int, ...]
    grid: tuple[int, ...]
    constants: dict[str, Any] = field(default_factory=dict)


PLANS: dict[str, Callable[..., Plan]] = {}
"""How to launch the kernel of each exercise, by its number: filled by the chapter's exercises."""


@dataclass
class Findings:
    """What one run in the interpreter showed; each list holds a line for each finding (four at most).

    outside: accesses outside of every argument, `outside_count` elements in all.  races: elements that two
    programs share and one writes.  garbled: dots that the interpreter gets wrong.  rounded: dots that a GPU
    would round to TF32.  unwritten: outputs that no program stored, or stored only in part.
    """

    outputs: tuple[Tensor, ...]
    outside: list[str]
    outside_count: int
    races: list[str]
    garbled: list[str]
    rounded: list[str]
    unwritten: list[str]


def require_triton() -> None:
    """Raise an ImportError of one line, which names the remedy, where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "chapter 5 needs Triton, which is not installed: `pip install triton` on Linux (a container or "
            "Colab will do elsewhere; no GPU is needed). All other chapters run without it."
        )


def agreement(candidates: dict[str, tuple[Tensor, float]], reference: Tensor) -> str:
    """A table of whether each candidate lies within its bound of the reference, in relative norm.

    >>> print(agreement({"itself": (torch.ones(3), 1e-9)}, torch.ones(3)))
    itself                           error < 1e-09   ✓
    """
    lines = []
    for name, (value, bound) in candidates.items():
        mark = "✓" if relative_error(value, reference) < bound else "✗"
        lines.append(f"{name:32} error < {bound:.0e}   {mark}")
    return "\n".join(lines)


def excerpt(kernel: Any, first: str, last: str, **constants: bool) -> str:
    """The lines of a kernel's source from the one that holds `first` to the next that holds `last`.

    constants: values of compile-time flags; branches on them (`if FLAG:`, `if not FLAG:`) are resolved as
    the compiler does.  Raises ValueError if there are no such lines.
    """
    lines = inspect.getsource(kernel.fn).splitlines()
    lines = resolve(lines, constants)
    for i, line in enumerate(lines):
        if first in line:
            for j in range(i, len(lines)):
                if last in lines[j]:
                    return textwrap.dedent("\n".join(lines[i : j + 1]))
    raise ValueError(f"{kernel.fn.__name__} has no lines from {first!r} to {last!r}")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def resolve(lines: list[str], constants: dict[str, bool]) -> list[str]:
    """`lines` without the branches that `constants` rule out, those that remain moved to the left.

    >>> resolve(["if FLAG:", "    a", "else:", "    b", "c"], {"FLAG": False})
    ['b', 'c']
    """

    def block(start: int, indent: int) -> int:
        """The index after the lines that are indented further than `indent`."""
        while start < len(lines) and (not lines[start].strip() or _indent(lines[start]) > indent):
            start += 1
        return start

    kept, i = [], 0
    while i < len(lines):
        found = re.fullmatch(r"(\s*)if (not )?(\w+):", lines[i])
        if not found or found[3] not in constants:
            kept.append(lines[i])
            i += 1
            continue
        indent = len(found[1])
        end = block(i + 1, indent)
        taken, rest = lines[i + 1 : end], end
        if end < len(lines) and lines[end].strip() == "else:" and _indent(lines[end]) == indent:
            rest = block(end + 1, indent)
        if constants[found[3]] == bool(found[2]):
            taken = lines[end + 1 : rest]
        shift = _indent(taken[0]) - indent if taken else 0
        kept += resolve([line[shift:] for line in taken], constants)
        i = rest
    return kept


# --- A kernel as text -----------------------------------------------------------------------------------

HEADER = "import triton\nimport triton.language as tl\n\n"


def kernel_source(kernel: Any) -> str:
    """The source of `kernel` and of the kernels and numbers of the notebook that it uses.

    What it takes from an importable module is imported, not copied.
    """
    if isinstance(kernel, str):
        return HEADER + textwrap.dedent(kernel)
    parts: dict[str, str] = {}

    def visit(fn: Any) -> None:
        if fn.__name__ in parts:
            return
        parts[fn.__name__] = ""  # marks it as visited, should it call itself
        for name in fn.__code__.co_names:
            value = fn.__globals__.get(name)
            inner = getattr(value, "fn", None)
            if inspect.isfunction(inner):
                visit(inner)
            elif type(value).__name__ == "constexpr":
                parts[name] = f"{name} = tl.constexpr({value.value!r})\n"
        parts.pop(fn.__name__)  # definitions come after what they use
        module = sys.modules.get(fn.__module__)
        if fn.__module__ != "__main__" and getattr(module, "__file__", None):
            parts[fn.__name__] = f"from {fn.__module__} import {fn.__name__}\n"
        else:
            text = textwrap.dedent(inspect.getsource(fn))
            parts[fn.__name__] = "@triton.jit\n" + text[text.index("def ") :] + "\n"

    visit(kernel.fn)
    return HEADER + "\n".join(parts.values())


def kernel_name(kernel: Any) -> str:
    if isinstance(kernel, str):
        return re.findall(r"^\s*def (\w+)", kernel, flags=re.MULTILINE)[-1]
    return kernel.fn.__name__


def _definition(kernel: Any) -> ast.FunctionDef:
    source = textwrap.dedent(kernel if isinstance(kernel, str) else inspect.getsource(kernel.fn))
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)][-1]


def _parameters(kernel: Any) -> list[str]:
    return [argument.arg for argument in _definition(kernel).args.args]


def is_blank(kernel: Any) -> bool:
    """Whether the kernel's body is still `...`."""
    body = _definition(kernel).body
    return all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body)


# --- Child processes ------------------------------------------------------------------------------------


class Child:
    """A Python process that answers one request at a time, and is started anew after it died."""

    def __init__(self, *, interpret: bool):
        self.environment = {"TRITON_INTERPRET": "1" if interpret else "0", "CUDA_VISIBLE_DEVICES": ""}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        # Answers have a pipe of their own: start-up files of the user's may print before `serve` begins.
        self.answers, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from dn_lib.teaching.kernel_check import serve; serve({writing})"],
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writing,),
        )
        os.close(writing)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with contextlib.suppress(BrokenPipeError):  # of a request that was never read
                self.process.stdin.close()
            os.close(self.answers)
            self.process = None

    def ask(self, *request: Any, seconds: float = SECONDS) -> Any:
        """The child's answer.  Raises KernelError if it raised, died, or took longer than `seconds`."""
        self.start()
        deadline = time.monotonic() + seconds
        try:
            _send(self.process.stdin, request)
            size = struct.unpack("<Q", self._read(8, deadline))[0]
            kind, value = pickle.loads(self._read(size, deadline))
        except TimeoutError:
            self.stop()
            raise KernelError(f"it did not finish in {seconds:.0f} seconds") from None
        except (EOFError, BrokenPipeError):
            code = self.process.wait()
            self.stop()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise KernelError(f"it ended the process that ran it ({how})") from None
        if kind == "error":
            raise KernelError(value)
        return value

    def _read(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            piece = os.read(self.answers, size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


@cache
def child(interpret: bool) -> Child:
    """This process's interpreter (`interpret=True`) or compiler child."""
    made = Child(interpret=interpret)
    atexit.register(made.stop)
    return made


def call_in_child(*request: Any) -> Any:
    return child(True).ask(*request)


def _send(stream: Any, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def serve(descriptor: int) -> None:
    """The child's loop: requests from stdin, answers to the pipe `descriptor`."""
    answers = os.fdopen(descriptor, "wb")
    handlers = {"observe": _observe, "interpret": _interpret, "compile": _compile}
    torch.set_num_threads(1)
    while header := sys.stdin.buffer.read(8):
        kind, *request = pickle.loads(sys.stdin.buffer.read(struct.unpack("<Q", header)[0]))
        try:
            answer = ("answer", handlers[kind](*request))
        except Exception as error:
            answer = ("error", _in_one_line(error))
        _send(answers, answer)


def _in_one_line(error: BaseException) -> str:
    """The root of `error`, with the line of the kernel if its message has one."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    # A compilation error reads "at 7:4:", the source above a caret, and the reason last.
    where = re.match(r"at (\d+):", lines[0]) if lines else None
    culprit = f" in `{lines[-2]}`" if where and len(lines) > 2 else ""
    reason = lines[-1] if lines else "no message"
    if "make_shape_compatible" in reason:
        reason += " (an axis such as [:, None] may be missing)"
    return f"{type(error).__name__}: {reason}{culprit}"


# --- In the children ------------------------------------------------------------------------------------


def _load_kernel(source: str, name: str) -> Any:
    """The kernel `name` of `source`, from a file, since Triton reads the text of what it compiles."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    module_name = f"kernel_{digest}"
    if module_name not in sys.modules:
        folder = Path(tempfile.mkdtemp(prefix="dn_lib_kernel_"))
        path = folder / f"{module_name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[module_name] = module
        atexit.register(lambda: (path.unlink(missing_ok=True), _remove(folder)))
    return getattr(sys.modules[module_name], name)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Types of Triton and inverses of the ladder travel between processes by name: "tl.float32", "ladder.f"."""
    import triton.language as tl

    from dn_lib.kernels import ladder

    places = {"tl": tl, "ladder": ladder}

    def look_up(value: Any) -> Any:
        place, dot, name = value.partition(".") if isinstance(value, str) else ("", "", "")
        return getattr(places[place], name) if dot and place in places else value

    return {name: look_up(value) for name, value in constants.items()}


def _observe(module: str, qualname: str, args: tuple, kwargs: dict) -> Any:
    from dn_lib.teaching.tiles import observe

    function = reduce(getattr, qualname.split("."), importlib.import_module(module))
    to_cpu = lambda x: x.cpu() if isinstance(x, Tensor) else x  # noqa: E731
    return observe(function, *map(to_cpu, args), **{k: to_cpu(v) for k, v in kwargs.items()})


def _interpret(source: str, name: str, plan: Plan) -> Findings:
    from dn_lib.teaching.tiles import record

    kernel = _load_kernel(source, name)
    with record() as trace:
        try:
            kernel[plan.grid](*plan.arguments, **_constants(plan.constants))
        except Exception:
            if indexed := _indexed_pointer(kernel, plan):
                message = "A pointer cannot be indexed: add the offsets to it and use tl.load"
                raise TypeError(f"{message}, in `{indexed}`") from None
            raise
    (launch,) = trace.launches
    mixed = sorted({d.types for d in launch.dots if "bf16" in d.types})
    garbled = [f"tl.dot of {a} and {b}: the interpreter multiplies their bit patterns" for a, b in mixed]
    to_tf32 = any(d.types == ("fp32", "fp32") and d.precision == "tf32" for d in launch.dots)
    rounded = ['tl.dot of float32 rounds to TF32 on a GPU: ask for input_precision="ieee"'] * to_tf32
    outputs = tuple(plan.arguments[i] for i in plan.outputs)
    outside = [str(o) for o in launch.outside[:4]]
    count = sum(o.count for o in launch.outside)
    names = [inspect.getfullargspec(kernel.fn).args[i].removesuffix("_ptr") for i in plan.outputs]
    unwritten = [line for name in names if (line := _never_written(launch, name))]
    return Findings(outputs, outside, count, launch.overlaps()[:4], garbled, rounded, unwritten[:4])


def _never_written(launch: Any, name: str) -> str:
    """A line on the elements of the tensor `name` that no program stored; empty if there are none."""
    shape = launch.shapes[name]
    missing = torch.ones(shape, dtype=torch.bool).flatten()
    for access in launch.accesses:
        if access.tensor == name and access.kind != "load":
            missing[torch.as_tensor(access.elements, dtype=torch.long)] = False
    count = int(missing.sum())
    if count in (0, missing.numel()):
        return f"{name} was never written" if count else ""
    index = missing.view(shape).nonzero()[0].tolist()
    return f"{name}{index} was never written ({count} such elements)"


def _indexed_pointer(kernel: Any, plan: Plan) -> str | None:
    """The first place in `kernel` where the parameter of a tensor is indexed, such as `x_ptr[i]`."""
    names = inspect.getfullargspec(kernel.fn).args
    pointers = {name for name, value in zip(names, plan.arguments, strict=False) if isinstance(value, Tensor)}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in pointers:
            return ast.unparse(node)
    return None


def _triton_type(value: Any) -> str:
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
        return "*" + names.get(value.dtype, str(value.dtype).removeprefix("torch.").replace("int", "i"))
    return "fp32" if isinstance(value, float) else "i32"


def _compile(source: str, name: str, types: tuple[str, ...], constants: dict[str, Any], arch: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _load_kernel(source, name)
    constants = _constants(constants)
    runtime = [n for n in kernel.arg_names if n not in constants]
    signature = dict(zip(runtime, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    ordered = {n: signature[n] for n in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, ordered, constants), target=GPUTarget("cuda", arch, 32))
    return {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}


# --- The judge ------------------------------------------------------------------------------------------


def interpret(kernel: Any, plan: Plan) -> Findings:
    """Run `kernel` (or its source) as `plan` says, in the interpreter child.  Raises KernelError."""
    arguments = tuple(
        torch.full_like(a, float("nan")).cpu() if i in plan.outputs else a.cpu() if isinstance(a, Tensor) else a
        for i, a in enumerate(plan.arguments)
    )
    cpu = Plan(arguments, plan.outputs, plan.grid, plan.constants)
    return child(True).ask("interpret", kernel_source(kernel), kernel_name(kernel), cpu)


_compiled: dict[tuple, str | dict] = {}


def compile_ahead(kernel: Any, plan: Plan, *, arch: int = HOPPER) -> dict[str, int]:
    """Compile for a GPU that need not be there: bytes of shared memory, and warps.

    Raises KernelError with what the compiler says, or if a block of threads would need more shared memory
    than it can have.
    """
    types = tuple(_triton_type(a) for a in plan.arguments)
    source = kernel_source(kernel)
    key = (source, types, tuple(sorted(plan.constants.items())), arch)
    if key not in _compiled:
        try:
            request = ("compile", source, kernel_name(kernel), types, plan.constants, arch)
            _compiled[key] = child(False).ask(*request)
        except KernelError as error:
            _compiled[key] = str(error)
    found = _compiled[key]
    if isinstance(found, str):
        raise KernelError(f"does not compile for sm_{arch}: {found}")
    if found["shared"] > SHARED_LIMIT:
        raise KernelError(f"needs {found['shared']} bytes of shared memory, sm_{arch} has {SHARED_LIMIT}")
    return found


def run_banded(kernel: Any, plan: Plan, device: str = "cuda") -> tuple[Tensor, ...]:
    """Run the compiled `kernel` on a GPU, each argument between guard bands; returns the outputs.

    The bands of inputs hold NaN, which a read outside brings into the numbers.  A write into any band is
    found and raised as a KernelError.
    """
    buffers: dict[int, Tensor] = {}
    arguments = list(plan.arguments)
    for i, a in enumerate(plan.arguments):
        if isinstance(a, Tensor) and a.is_floating_point():
            filler = UNTOUCHED if i in plan.outputs else float("nan")
            buffers[i] = torch.full((a.numel() + 2 * BAND,), filler, dtype=a.dtype, device=device)
            arguments[i] = buffers[i][BAND : BAND + a.numel()].view(a.shape)
            arguments[i].copy_(torch.full_like(a, float("nan")) if i in plan.outputs else a)
        elif isinstance(a, Tensor):
            arguments[i] = a.to(device)
    kernel[plan.grid](*arguments, **_constants(plan.constants))
    for i, buffer in buffers.items():
        touched = ~(buffer == UNTOUCHED) if i in plan.outputs else ~buffer.isnan()
        touched[BAND:-BAND] = False
        if touched.any():
            element = int(touched.nonzero()[0]) - BAND
            raise KernelError(f"on {device} it wrote outside of argument {i}, at element {element}")
    return tuple(arguments[i].cpu() for i in plan.outputs)


def guarded(number: str, kernel: Any, *, strict: bool = True) -> Callable[..., Any]:
    """`kernel` as a function of the inputs of exercise `number`, for `check`; see the module's first lines.

    The function returns the kernel's outputs and a vector of four counts, zero for a right answer: accesses
    outside of the arguments, races, dots whose numbers would differ between interpreter and GPU, and 1 if
    the hardware refuses the kernel.  With `strict`, a count that belongs to no known mistake of the exercise
    is raised as a KernelError instead.  Raises KeyError if the exercise asks for no kernel.
    """
    if number not in PLANS:
        all_exercises()
    if number not in PLANS:
        raise KeyError(f"number must be one of {sorted(PLANS)}, got {number!r}")

    def answer(*inputs: Any) -> Any:
        if is_blank(kernel):
            return None
        exercise = all_exercises()[number]
        plan = PLANS[number](*inputs)
        parameters = _parameters(kernel)
        answer.names = tuple(parameters[i].removesuffix("_ptr") for i in plan.outputs)  # for `check` to say
        found = interpret(kernel, plan)
        outputs, complaint, counts = found.outputs, "", torch.zeros(4)
        if found.outside:
            # What such a read would have brought is unknown: the numbers mean nothing.
            outputs, complaint = tuple(map(torch.zeros_like, outputs)), found.outside[0]
            counts[0] = found.outside_count
        elif found.races:
            complaint, counts[1] = found.races[0], len(found.races)
        elif found.unwritten:  # NaN, which no count need tell of
            complaint = found.unwritten[0]
        elif found.garbled:
            complaint, counts[2] = found.garbled[0], len(found.garbled)
        elif relative_error(outputs, exercise.reference(*inputs)[:-1]) <= exercise.tolerance:
            if found.rounded:
                complaint, counts[2] = found.rounded[0], 1
            else:
                try:
                    compile_ahead(kernel, plan)
                except KernelError as error:
                    complaint, counts[3] = str(error), 1
        result = (*outputs, counts)
        if not complaint:
            if strict and torch.cuda.is_available() and not isinstance(kernel, str):
                return (*run_banded(kernel, plan), counts)
            return result
        if strict and not any(_same(result, mutant.fn, inputs) for mutant in exercise.mutants):
            raise KernelError(complaint)
        return result

    return answer


def _same(result: tuple, mutant: Callable[..., Any], inputs: tuple) -> bool:
    try:
        return relative_error(result, mutant(*inputs)) <= 1e-6
    except KernelError:
        return False
