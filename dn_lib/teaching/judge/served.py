"""What the child processes do: run a kernel in the interpreter and watch it, or compile it for a GPU."""

from __future__ import annotations

import ast
import atexit
import contextlib
import hashlib
import importlib.util
import inspect
import linecache
import os
import pickle
import re
import struct
import sys
import tempfile
import textwrap
import traceback
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dn_lib.teaching.judge.child import send
from dn_lib.teaching.judge.limits import MEMORY, is_out_of_memory, limit_memory, limit_processor_time, out_of_memory
from dn_lib.teaching.judge.source import Plan

HOPPER = 90
FOLDER = "dn_lib_kernel_"  # how the folder of a kernel's text is called
LEAST_INNER = 16  # of a dot; Triton 3.9 takes 8 in float32, earlier releases refuse it
SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one block of threads may have on sm_90


@dataclass
class Findings:
    """What one run in the interpreter showed; each list holds a line for each finding (four at most).

    outside: accesses outside of every argument, `outside_count` elements in all.  races: elements that two
    programs share and one writes.  garbled: dots that the interpreter gets wrong.  rounded: dots that a GPU
    would round to TF32.  small: dots with an inner size below 16.  unwritten: outputs that no program stored, or
    stored only in part.  undefined: masked loads without `other`, whose masked elements were NaN.  overwritten: inputs
    that were stored into.  dots: how many `tl.dot` there were.
    """

    outputs: tuple[Tensor, ...]
    outside: list[str]
    outside_count: int
    races: list[str]
    garbled: list[str]
    rounded: list[str]
    small: list[str]
    unwritten: list[str]
    undefined: list[str]
    overwritten: list[str]
    dots: int


def serve(descriptor: int) -> None:
    """The child's loop: requests from stdin, answers to the pipe `descriptor`."""
    answers = os.fdopen(descriptor, "wb")
    handlers = {"observe": observe_function, "interpret": interpret_kernel, "compile": compile_kernel}
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":  # where kernels run; a compiler needs what it needs
        with contextlib.suppress(ImportError):
            import triton.language  # noqa: F401  # before the limit, so that it is no part of it
        limit_memory(MEMORY)
    while header := sys.stdin.buffer.read(8):
        seconds, kind, *request = pickle.loads(sys.stdin.buffer.read(struct.unpack("<Q", header)[0]))
        answers.write(b"!")
        answers.flush()
        limit_processor_time(seconds)
        try:
            answer = ("answer", handlers[kind](*request))
        except Exception as error:
            memory = f"it {out_of_memory(MEMORY)}"
            answer = ("error", memory if is_out_of_memory(error) else in_one_line(error))
        send(answers, answer)


def in_one_line(error: BaseException) -> str:
    """The root of `error`, with the line of the kernel if its message has one."""
    place = ""
    while True:
        place = _culprit(error) or place
        if error.__cause__ is None:
            break
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    # A compilation error reads "at 7:4:", the source above a caret, and the reason last.
    where = re.match(r"at (\d+):", lines[0]) if lines else None
    culprit = f" in `{lines[-2]}`" if where and len(lines) > 2 else ""
    reason = lines[-1] if lines else "no message"
    reason += next((f" ({advice})" for pattern, advice in ADVICE.items() if re.search(pattern, reason)), "")
    return f"{type(error).__name__}: {reason}{culprit or place}"


ADVICE = {
    "make_shape_compatible": "an axis such as [:, None] may be missing",
    "^'int' object is not iterable$|does not support item assignment": "a block has no indexing and no loop: mask it",
    "^name '.*' is not defined$": "a kernel sees its arguments, tl, tl.constexpr and other kernels by plain names",
    "must be of type tl.constexpr": "a block's length is known when it is compiled: add what varies to the block",
    "PassManager::run failed": "does it return something? a kernel only stores",
}
"""What a reader of the book is told beside Triton's own words, by what those match."""


def _culprit(error: BaseException) -> str:
    """The line of a learner's kernel in which `error` arose, " in `...`"; empty if it arose elsewhere."""
    found = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if Path(name).stem.startswith("kernel_") and Path(name).parent.name.startswith(FOLDER):
            found = linecache.getline(name, number).strip()
    return f", in `{found}`" if found else ""


# --- In the children ------------------------------------------------------------------------------------
def load_kernel(source: str, name: str) -> Any:
    """The kernel `name` of `source`, from a file, since Triton reads the text of what it compiles."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    module_name = f"kernel_{digest}"
    if module_name not in sys.modules:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER))
        path = folder / f"{module_name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None  # as of every file that ends in .py
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[module_name] = module
        atexit.register(lambda: (path.unlink(missing_ok=True), _remove(folder)))
    return getattr(sys.modules[module_name], name)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def named_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Types of Triton and inverses of the ladder travel between processes by name: "tl.float32", "ladder.f"."""
    import triton.language as tl

    from dn_lib.kernels import ladder

    places = {"tl": tl, "ladder": ladder}

    def look_up(value: Any) -> Any:
        place, dot, name = value.partition(".") if isinstance(value, str) else ("", "", "")
        return getattr(places[place], name) if dot and place in places else value

    return {name: look_up(value) for name, value in constants.items()}


def observe_function(module: str, qualname: str, args: tuple, kwargs: dict) -> Any:
    from dn_lib.teaching.judge.trace import observe

    function = reduce(getattr, qualname.split("."), importlib.import_module(module))
    to_cpu = lambda x: x.cpu() if isinstance(x, Tensor) else x  # noqa: E731
    return observe(function, *map(to_cpu, args), **{k: to_cpu(v) for k, v in kwargs.items()})


def interpret_kernel(source: str, name: str, plan: Plan) -> Findings:
    from dn_lib.teaching.judge.trace import record

    kernel = load_kernel(source, name)
    with record() as trace:
        try:
            kernel[plan.grid](*plan.arguments, **named_constants(plan.constants))
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
    inner = min((d.k for d in launch.dots), default=LEAST_INNER)
    small = [f"tl.dot has an inner size of {inner}, and the matrix units take K >= {LEAST_INNER}"] * (
        inner < LEAST_INNER
    )
    outputs: tuple[Any, ...] = tuple(plan.arguments[i] for i in plan.outputs)
    outside = [str(o) for o in launch.outside[:4]]
    count = sum(o.count for o in launch.outside)
    names = [inspect.getfullargspec(kernel.fn).args[i].removesuffix("_ptr") for i in plan.outputs]
    unwritten = [line for name in names if (line := _never_written(launch, name))]
    undefined = [
        f"a masked load without `other` leaves elements undefined on a GPU, in `{x}`" for x in launch.undefined
    ]
    stored = {a.tensor for a in launch.accesses if a.kind != "load"}
    overwritten = [f"it stores into its input {name}" for name in launch.shapes if name in stored - set(names)]
    races = launch.overlaps()[:4]
    lists = (races, garbled, rounded, small, unwritten[:4], undefined[:4], overwritten[:4])
    return Findings(outputs, outside, count, *lists, len(launch.dots))


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


def triton_type(value: Any) -> str:
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
        return "*" + names.get(value.dtype, str(value.dtype).removeprefix("torch.").replace("int", "i"))
    return "fp32" if isinstance(value, float) else "i32"


def compile_kernel(source: str, name: str, types: tuple[str, ...], constants: dict[str, Any], arch: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = load_kernel(source, name)
    constants = named_constants(constants)
    runtime = [n for n in kernel.arg_names if n not in constants]
    signature = dict(zip(runtime, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    ordered = {n: signature[n] for n in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, ordered, constants), target=GPUTarget("cuda", arch, 32))
    return {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
