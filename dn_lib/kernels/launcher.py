"""Launches a kernel of a plan.  The compiled kernel is kept with the plan, so that Triton need not look for it again.

Triton's own launch binds the arguments by name, makes a key of their types and alignments and looks the compiled kernel
up: some 30 microseconds of host time, and with seven TMA descriptors 100.  A plan determines most of that key.  What is
left, `_varies`, is cheap to ask.  Called by itself, the compiled kernel takes the same arguments in order, constants
included.  Triton 3.6, 3.7 and 3.9 have this interface alike: run with 3.6, read in the sources of the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dn_lib.kernels.common import INTERPRETED
from dn_lib.kernels.playback import Launched, recorder


def launch_kernel(plan, name: str, kernel, *arguments: Any, num_warps: int, **constants: Any) -> None:
    """Run `kernel` on the current device as the plan's launch `name`; nothing where that has no programs.

    arguments: tensors, TMA descriptors, None and numbers, in the kernel's order.  constants: its compile-time arguments
    by name, which must follow from the plan and from which arguments are None.  So must descriptors' tiles.
    """
    grid = (plan.launches[name].programs, 1, 1)
    if not grid[0]:
        return
    if INTERPRETED.value or not torch.cuda.is_initialized():  # without a GPU kernels are interpreted or only compiled
        kernel[grid](*arguments, **constants, num_warps=num_warps)
        return
    key = (name, torch.cuda.current_device(), *map(_varies, arguments))
    found = plan.compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants, num_warps=num_warps)
        values = tuple(constants[n] for n in kernel.arg_names[len(arguments) :])
        plan.compiled[key] = compiled, values
    else:
        compiled, values = found
        compiled[grid](*arguments, *values)
    if (active := recorder()) is not None:
        active.launched.append(Launched(compiled, grid, arguments, values))


def _varies(x: Any) -> Any:
    """What Triton compiles for of an argument: dtype and 16-byte alignment of a tensor, an integer, any other type."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return x if x is None or isinstance(x, int) else type(x)
