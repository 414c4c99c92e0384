"""The decay that Gated DeltaNet and Mamba-2 share: one per head and token, from a rate and a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dn_lib.forms.common import working_dtype


def new_rates(heads: int, low: float, high: float) -> nn.Parameter:
    """log A, with A uniform between `low`, which is left out, and `high`, `[H]`.

    >>> A = new_rates(1000, 0.0, 16.0).exp()
    >>> bool(A.min() > 0), bool(A.max() <= 16.001)
    (True, True)
    """
    return nn.Parameter((high - (high - low) * torch.rand(heads)).log())


def new_step_biases(heads: int, low: float = 1e-3, high: float = 0.1) -> nn.Parameter:
    """Biases `[H]` for which softplus(bias) lies between `low` and `high`, even in the logarithm.

    >>> steps = nn.functional.softplus(new_step_biases(1000))
    >>> bool(steps.min() > 0.0009), bool(steps.max() < 0.11)
    (True, True)
    """
    step = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp()
    return nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def log_gates(x: Tensor, log_rates: Tensor, step_biases: Tensor) -> tuple[Tensor, Tensor]:
    """The step Delta = softplus(x + bias) and the log gate -A Delta, both `[B, L, H]` for x `[B, L, H]`.

    In float32 at least.  A Delta is a time: the state decays to e^-(A Delta) of what it was.

    >>> step, g = log_gates(torch.zeros(1, 1, 1), torch.zeros(1), torch.zeros(1))
    >>> round(step.item(), 4), round(g.item(), 4)
    (0.6931, -0.6931)
    """
    dtype = working_dtype(x, log_rates, step_biases)
    z = x.to(dtype) + step_biases.to(dtype)
    # softplus, whose own backward has other strides than compilers are told where the gradient's are not z's.
    step = torch.logaddexp(z, z.new_zeros(()))
    return step, -log_rates.to(dtype).exp() * step
