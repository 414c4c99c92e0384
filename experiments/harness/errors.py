"""Errors: distances from float64, and which of them are too large for a time to be worth anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dn_lib.testing import relative_error
from experiments.harness.problems import Problem, forward_backward, pytorch_form

MEANING = "relative Frobenius norm against float64 (PyTorch chunkwise form) of the same rounded inputs"


def exact_results(p: Problem) -> dict[str, Tensor]:
    """Output and gradients in float64, by the PyTorch chunkwise form, of the inputs as they were rounded."""
    return forward_backward(pytorch_form, p.double())


def errors_of(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(x, exact[name]) for name, x in got.items()}


def limit_of(dtype: torch.dtype, precision: str = "ieee", device: str = "cuda") -> float:
    """The error above which nothing is timed: about one rounding of the dtype (bfloat16: 8e-3).

    The interpreter truncates where a GPU rounds to bfloat16, so there the limit is wider.
    """
    if dtype == torch.float32:
        return 1e-5 if precision == "ieee" else 2e-3
    if dtype == torch.float16:
        return 1e-3
    return 8e-3 if device == "cuda" else 3e-2


def verdict(ours: dict[str, float], theirs: dict[str, float] | None, limit: float) -> list[str]:
    """What is wrong with `ours`: above the limit, or above 1.1 times the peer's; empty if nothing is."""
    wrong = [f"{n}: {e:.3g} is not below {limit:g}" for n, e in ours.items() if not e <= limit]
    for n, e in ours.items():
        if theirs is not None and e > 1.1 * theirs.get(n, math.inf):  # not where theirs is NaN
            wrong.append(f"{n}: {e:.3g} is above 1.1 times fla's {theirs[n]:.3g}")
    return wrong


def refused(wrong: list[str]) -> dict[str, str]:
    """What a row says of itself whose form is wrong: it has no times."""
    return {"status": "refused", "failure": "; ".join(wrong)}
