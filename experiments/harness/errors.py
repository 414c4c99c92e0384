"""Errors: distances from float64, and which of them are too large for a time to be worth anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dn_lib.operators import Operator
from dn_lib.testing import relative_error
from experiments.harness.problems import Form, Problem, forward_backward, forward_results

RECURRENCE = 64  # tokens of all sequences together, up to which the recurrence itself is differentiated
MEANING = (
    "relative Frobenius norm against float64 of the same rounded inputs: up to "
    f"{RECURRENCE} tokens by the registry's reference, the recurrence (o: against the size of its terms, where that is "
    "larger), beyond by its chunkwise form in PyTorch"
)


def exact_form(operator: Operator) -> Form | None:
    """The registered form that stands in for the reference in long calls; None if there is none with chunks.

    The first in plain PyTorch with chunks, gradients and float64: the suite holds it to 1e-12 of the reference.
    """
    for form in operator.forms.values():
        if form.differentiable and "chunk_size" in form.takes and torch.float64 in form.dtypes:
            return lambda p: form(*a_head_each(p.inputs), **p.options)
    return None


def a_head_each(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs with a head of q and k for each head of v: value head h gets key head h // (H_v / H)."""
    q, k, v, *gates = inputs
    group = v.shape[2] // max(q.shape[2], 1)
    return [*((x.repeat_interleave(group, 2) for x in (q, k)) if group > 1 else (q, k)), v, *gates]


def reference_of(p: Problem, *, gradients: bool = True) -> tuple[dict[str, Tensor], float]:
    """Output and gradients in float64 of the inputs as they were rounded, and the size of the output's terms.

    With many tokens the recurrence would keep a state for each of them, so another form takes its place; the size is
    0 then.  Without gradients there is the final state instead, always.
    """
    sizes = [0.0]

    def recurrence(p: Problem) -> tuple[Tensor, Tensor | None]:
        o, state, size = p.operator.reference(*a_head_each(p.inputs), **p.options)
        sizes.append(size)
        return o, state

    short = p.q.shape[0] * p.q.shape[1] <= RECURRENCE
    form = recurrence if short else exact_form(p.operator) or recurrence
    run = forward_backward if gradients else forward_results
    return run(form, p.double()), sizes[-1]


def exact_results(p: Problem) -> dict[str, Tensor]:
    """The results alone of `reference_of`."""
    return reference_of(p)[0]


def errors_of(got: dict[str, Tensor], exact: dict[str, Tensor], size: float = 0.0) -> dict[str, float]:
    """Relative errors by name; `size` is that of the terms of o."""
    return {name: relative_error(x, exact[name], size if name == "o" else 0.0) for name, x in got.items()}


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
