"""Lets the interpreter of Triton 3.6 run with numpy 2.4 and later; importing this module does it.

That interpreter turns arrays of one element into Python integers by a conversion that numpy no longer does.  Triton
3.7 has no need of this, and gets the same value from it.
"""

from __future__ import annotations

import os


def _mend() -> None:
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


if os.environ.get("TRITON_INTERPRET") == "1":
    _mend()
