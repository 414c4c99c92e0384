"""Gated DeltaNet as a layer (Yang, Kautz and Hatamizadeh 2025)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_positive, is_number, without_autocast, working_dtype
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import check_choice, head_dim_or_default
from dn_lib.layers.decay import log_gates, new_rates, new_step_biases
from dn_lib.layers.documents import Documents, open_documents
from dn_lib.layers.recurrent import RecurrentMixer, run_operator
from dn_lib.layers.registry import register_mixer
from dn_lib.ops.backend import BACKENDS
from dn_lib.ops.gated import gated_delta_rule


class GatedDeltaNet(RecurrentMixer):
    """The layer of Yang et al. 2025: S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T in each head.

    `[B, L, width]` -> `[B, L, width]`. q, k and v: linear, short convolution (`conv_size`, 0 for none), SiLU; q and k
    with norm 1. beta: `beta_range` * sigmoid(linear). The gate: log alpha = -A softplus(linear + bias), one A and one
    bias a head, which start as in Mamba-2: A uniform in (0, 16], the softplus of the bias between 0.001 and 0.1.
    Both have one dimension, so that no weight decay pulls on them (`dn_lib.training`). Output: RMSNorm per head,
    times silu(linear) if `output_gate`, linear.
    Values have `value_heads` heads (a multiple of `heads`, which is the default) of `expand_v` * head_dim channels.
    alpha and beta are one per value head. `backend` is `dn_lib.gated_delta_rule`'s.
    Raises ValueError for sizes that do not fit and for unknown options.

        >>> import torch
        >>> GatedDeltaNet(width=32, heads=2, value_heads=4)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        value_heads: int | None = None,
        expand_v: float = 2.0,
        conv_size: int = 4,
        output_gate: bool = True,
        beta_range: float = 1.0,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        head_dim = head_dim_or_default(width, heads, head_dim)
        super().__init__(
            width,
            heads,
            head_dim,
            value_size(head_dim, expand_v),
            conv_size=conv_size,
            output_gate=output_gate,
            norm_eps=norm_eps,
            value_heads=value_heads,
        )
        if not is_number(beta_range) or not 0 < beta_range <= 2:
            raise ValueError(f"beta_range must be in (0, 2], got {beta_range}")
        self.beta_range = beta_range
        self.backend = check_choice("backend", backend, BACKENDS)
        self.beta = nn.Linear(width, self.value_heads, bias=False)
        self.step = nn.Linear(width, self.value_heads, bias=False)
        self.log_rates, self.step_biases = new_rates(self.value_heads, 0.0, 16.0), new_step_biases(self.value_heads)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        q, k, v = (F.silu(t) for t in self._heads_of(x, cache, documents))
        beta = self.beta(x)
        beta = self.beta_range * beta.to(working_dtype(beta)).sigmoid()
        _, g = log_gates(self.step(x), self.log_rates, self.step_biases)
        options: dict[str, Any] = {"qk_l2norm": True, "backend": self.backend}
        o = run_operator(gated_delta_rule_in_full_precision, (q, k, v, beta, g), cache, documents, **options)
        return self._finish(o, x)

    def state_flops(self, length: int) -> float:
        """As DeltaNet's, and a multiply for the decay."""
        return 7 * self.value_heads * self.key_dim * self.value_dim


gated_delta_rule_in_full_precision = without_autocast(gated_delta_rule)


def value_size(head_dim: int, expand_v: float) -> int:
    """expand_v * head_dim.  Raises ValueError unless that is a whole number of at least 1.

    >>> value_size(12, 1.5)
    18
    """
    check_positive("expand_v", expand_v)
    size = round(expand_v * head_dim)
    if size < 1 or abs(size - expand_v * head_dim) > 1e-6 * size:
        raise ValueError(f"expand_v must make a whole number of channels from head_dim = {head_dim}, got {expand_v}")
    return size


@register_mixer("gated_delta")
def _from_config(config: Any) -> GatedDeltaNet:
    names = ("value_heads", "expand_v", "conv_size", "beta_range", "norm_eps", "backend")
    options = {name: getattr(config, name) for name in names}
    gate = True if config.output_gate is None else config.output_gate
    return GatedDeltaNet(config.width, config.heads, config.head_dim, output_gate=gate, **options)
