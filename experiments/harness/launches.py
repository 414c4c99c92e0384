"""Which Triton kernels a call launches, with what, and each of them alone once more."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dn_lib.kernels import ladder


@dataclass
class Launch:
    """One launch of a Triton kernel, as it can be repeated; `compiled` is None in the interpreter."""

    kernel: Any
    arguments: tuple
    options: dict
    compiled: Any

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def again(self) -> None:
        self.kernel.run(*self.arguments, **self.options)

    def facts(self) -> dict:
        """Programs, and what each of them occupies; `spills` as Triton counts them."""
        metadata = getattr(self.compiled, "metadata", None)
        return {
            "programs": math.prod(self.options["grid"]),
            "warps": getattr(metadata, "num_warps", None),
            "registers": getattr(self.compiled, "n_regs", None),
            "spills": getattr(self.compiled, "n_spills", None),
            "shared_bytes": getattr(metadata, "shared", None),
        }


# Here a class of Triton's is given another method, because none of its hooks would do (read in 3.6, 3.7 and 3.9):
# - `knobs.runtime.launch_enter_hook` sees a kernel's name, handle and stream.  Its grid and arguments come only to
#   kernels declared with `launch_metadata`, and nothing comes of the interpreter, which does not call it.
# - `knobs.runtime.jit_post_compile_hook` is called once for each kernel compiled, not for each launch.
# - `add_pre_run_hook` of a kernel is called in both, with the arguments but without the grid; it cannot be taken back,
#   and it cannot keep a kernel from being launched, which `tune` needs.
@contextlib.contextmanager
def through(launch: Callable) -> Iterator[None]:
    """Within it a kernel's launch is `launch(plain, kernel, arguments, options)`, where `plain` would launch it.

    It sees what is launched by `kernel[grid](...)`.  A plan that has been launched before keeps its compiled kernels
    and launches these by themselves (`dn_lib.kernels.launcher`): on a GPU, ask for a new plan.
    """
    kind: Any = type(ladder.scaled_add_kernel)
    plain = kind.run
    kind.run = lambda kernel, *arguments, **options: launch(plain, kernel, arguments, options)
    try:
        yield
    finally:
        kind.run = plain


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """Collects the Triton kernels that are launched within it."""
    seen = []

    def launch(plain, kernel, arguments: tuple, options: dict):
        compiled = plain(kernel, *arguments, **options)
        seen.append(Launch(kernel, arguments, options, compiled))
        return compiled

    with through(launch):
        yield seen
