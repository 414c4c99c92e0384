"""One step of the gated delta rule: S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T.

alpha_t in [0, 1] forgets of the whole state before a token is written; alpha_t = 1 is the delta rule.  The step takes
alpha itself, as chapter 2 writes it.  The forms for sequences, in `dn_lib.forms.gated`, take its logarithm,
g = log alpha, behind beta: `recurrent_gated_delta_rule` is L of these steps.
Source: Yang, Kautz and Hatamizadeh (2025), Gated DeltaNet.
"""

from __future__ import annotations

from torch import Tensor

from dn_lib.forms.common import check_inputs, scale_or_default
from dn_lib.forms.delta_rule import gated_step


def gated_delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of the gated delta rule: `delta_rule_step` on a state that is first multiplied by alpha.

    S_t = alpha (I - beta k k^T) S_{t-1} + beta k v^T, o = scale S_t^T q.

    alpha `[...]`, usually in (0, 1]; all else as for `delta_rule_step`, which is this with alpha = 1.
    Implements eq-gated-delta.  Source: Yang et al. (2025), Gated DeltaNet.

    >>> import torch
    >>> k, v, zero = torch.tensor([1.0, 0.0]), torch.zeros(1), torch.tensor(0.0)
    >>> gated_delta_rule_step(k, k, v, torch.tensor(0.5), zero, torch.ones(2, 1))[1].tolist()
    [[0.5], [0.5]]
    """
    gates = {"alpha": alpha, "beta": beta}
    check_inputs({"k": k, "q": q}, {"v": v}, gates, {"state": state}, time="", broadcast=True)
    return gated_step(q, k, v, alpha, beta, state, scale_or_default(scale, q))
