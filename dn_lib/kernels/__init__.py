"""Chapter 5: the Triton kernels.  README.md in this folder describes them."""

from __future__ import annotations

import importlib.util
import os


def _mend_interpreter() -> None:
    """Let the interpreter of Triton 3.6 run with numpy 2.4 and later.

    It turns arrays of one element into Python integers by a conversion that numpy no longer does; Triton 3.7
    has no need of this, and for it the same value comes out.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _mend_interpreter()
