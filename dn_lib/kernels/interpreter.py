"""Triton's interpreter, which runs kernels on a machine without a GPU: when it is on, and for whom.

Triton decides once, where a kernel is defined, whether the kernel is compiled or interpreted, and asks the variable
TRITON_INTERPRET of the environment. `import dn_lib` leaves that variable alone, since every program that is started
later would inherit it, on machines with a GPU too. `prepare` flips Triton's own switch instead, in this process only.
It is called where kernels have to be interpreted: by the modules that hold ours (on a CPU, imported only for
`backend="triton"`) and by `dn_lib.teaching`, whose readers write kernels. With TRITON_INTERPRET=0 or a GPU it does
nothing; with TRITON_INTERPRET=1 Triton interprets everything, as it does without this package.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch


def prepare() -> bool:
    """Turn Triton's interpreter on in this process if there is no GPU; returns whether it is on.

    Kernels that are defined later are interpreted, whoever defines them; those defined before stay what they are.
    Nothing is done where TRITON_INTERPRET is set, to whatever value, or Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    if "TRITON_INTERPRET" not in os.environ and not knobs.runtime.interpret and not _has_gpu():
        told, knobs.propagate_env = knobs.propagate_env, False  # else Triton writes the variable too
        try:
            knobs.runtime.interpret = True
        finally:
            knobs.propagate_env = told
        _interpret_library()
    if knobs.runtime.interpret:
        _mend()
    return knobs.runtime.interpret


def _has_gpu() -> bool:
    """Whether there is a GPU that Triton may compile for, Intel's included."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def _interpret_library() -> None:
    """Interpret the functions of `triton.language` that are written in Triton themselves (`tl.sum`, `tl.cdiv`, ...).

    They were defined when Triton was imported, perhaps before the interpreter was on.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted = functools.cache(InterpretedFunction)
    for module in [m for name, m in sys.modules.items() if f"{name}.".startswith("triton.language.")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, interpreted(value.fn))
    for name, value in list(vars(tl.tensor).items()):  # the same functions as methods: x.sum(axis=0)
        if isinstance(value, JITFunction):
            setattr(tl.tensor, name, _as_method(interpreted(value.fn)))


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one that Python binds to the object that it is looked up on."""
    return lambda *args, **kwargs: function(*args, **kwargs)


@functools.cache
def _mend() -> None:
    """Let the interpreter of Triton 3.6 run with numpy 2.4 and later.

    That interpreter turns arrays of one element into Python integers by a conversion that numpy no longer does.
    Triton 3.7 has no need of this, and gets the same value from it.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


INTERPRETS = prepare()
