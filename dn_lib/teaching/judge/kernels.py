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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dn_lib.teaching.judge.child import COMPILING, KernelError, child
from dn_lib.teaching.judge.served import HOPPER, SHARED_LIMIT, Findings, named_constants, triton_type
from dn_lib.teaching.judge.source import PLANS, Plan, is_blank, kernel_name, kernel_parameters, kernel_source
from dn_lib.teaching.registry import all_exercises, relative_error

BAND = 4096  # elements of each guard band on a GPU
UNTOUCHED = 1234.0  # what the bands of outputs hold: not NaN, which a stray read may have brought there


# --- The judge ------------------------------------------------------------------------------------------
def interpret(kernel: Any, plan: Plan) -> Findings:
    """Run `kernel` (or its source) as `plan` says, in the interpreter child.  Raises KernelError."""
    arguments: list[Any] = list(plan.arguments)
    for i, a in enumerate(plan.arguments):
        if isinstance(a, Tensor):
            arguments[i] = torch.full_like(a, float("nan")).cpu() if i in plan.outputs else a.cpu()
    cpu = Plan(tuple(arguments), plan.outputs, plan.grid, plan.constants)
    return child(True).ask("interpret", kernel_source(kernel), kernel_name(kernel), cpu)


_compiled: dict[tuple, str | dict] = {}


def compile_ahead(kernel: Any, plan: Plan, *, arch: int = HOPPER) -> dict[str, int]:
    """Compile for a GPU that need not be there: bytes of shared memory, and warps.

    Raises KernelError with what the compiler says, or if a block of threads would need more shared memory
    than it can have.
    """
    types = tuple(triton_type(a) for a in plan.arguments)
    source = kernel_source(kernel)
    key = (source, types, tuple(sorted(plan.constants.items())), arch)
    if key not in _compiled:
        try:
            request = ("compile", source, kernel_name(kernel), types, plan.constants, arch)
            _compiled[key] = child(False).ask(*request, seconds=COMPILING)
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
    arguments: list[Any] = list(plan.arguments)
    for i, a in enumerate(plan.arguments):
        if isinstance(a, Tensor) and a.is_floating_point():
            filler = UNTOUCHED if i in plan.outputs else float("nan")
            buffers[i] = torch.full((a.numel() + 2 * BAND,), filler, dtype=a.dtype, device=device)
            arguments[i] = buffers[i][BAND : BAND + a.numel()].view(a.shape)
            arguments[i].copy_(torch.full_like(a, float("nan")) if i in plan.outputs else a)
        elif isinstance(a, Tensor):
            arguments[i] = a.to(device)
    kernel[plan.grid](*arguments, **named_constants(plan.constants))
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
    is raised as a KernelError instead.  Raises KeyError if the exercise asks for no kernel, TypeError for what is none.
    """
    if number not in PLANS:
        all_exercises()
    if number not in PLANS:
        raise KeyError(f"number must be one of {sorted(PLANS)}, got {number!r}")
    if not isinstance(kernel, str) and not hasattr(kernel, "fn"):
        raise TypeError("kernel must be a kernel, got a plain function: is `@triton.jit` missing above it?")

    def answer(*inputs: Any) -> Any:
        if is_blank(kernel):
            return ...
        exercise = all_exercises()[number]
        plan = PLANS[number](*inputs)
        parameters = kernel_parameters(kernel)
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
        elif found.overwritten:
            complaint, counts[1] = found.overwritten[0], len(found.overwritten)
        elif found.undefined and any(x.isnan().any() for x in outputs):
            complaint = found.undefined[0]
        elif found.garbled:
            complaint, counts[2] = found.garbled[0], len(found.garbled)
        elif relative_error(outputs, exercise.reference(*inputs)[:-1]) <= exercise.tolerance:
            if found.rounded:
                complaint, counts[2] = found.rounded[0], 1
            elif plan.dots and not found.dots:
                complaint, counts[3] = "the numbers are right, but there is no tl.dot, which this exercise asks for", 1
            elif found.small:
                complaint, counts[3] = f"does not compile for sm_{HOPPER}: {found.small[0]}", 1
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

    answer.limited = True  # what the learner wrote runs in processes of its own already
    return answer


def _same(result: tuple, mutant: Callable[..., Any], inputs: tuple) -> bool:
    try:
        return relative_error(result, mutant(*inputs)) <= 1e-6
    except KernelError:
        return False
