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


@contextlib.contextmanager
def through(launch: Callable) -> Iterator[None]:
    """Within it a kernel's launch is `launch(plain, kernel, arguments, options)`, where `plain` would launch it.

    Triton's own hooks see neither the grid nor, before a launch, what was compiled; so its class of kernels is given
    another `run`, and that is taken back in the end.
    """
    kind = type(ladder.scaled_add_kernel)
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
