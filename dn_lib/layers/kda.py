"""Kimi Delta Attention as a layer (Kimi Team 2025)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_integer, is_number, working_dtype
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import check_choice, head_dim_or_default, split_heads
from dn_lib.layers.decay import log_gates, new_rates, new_step_biases
from dn_lib.layers.documents import Documents, open_documents
from dn_lib.layers.gated_delta_net import gated_delta_rule_in_full_precision
from dn_lib.layers.recurrent import RecurrentMixer, run_operator
from dn_lib.layers.registry import register_mixer
from dn_lib.ops.backend import BACKENDS


class KimiDeltaAttention(RecurrentMixer):
    """Gated DeltaNet with a gate for each key channel: S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} +
    beta_t k_t v_t^T in each head.  The state decays, and then token t erases: here the order matters.

    `[B, L, width]` -> `[B, L, width]`. q, k and v: linear, short convolution (`conv_size`, 0 for none), SiLU; q and k
    with norm 1. beta: `beta_range` * sigmoid(linear), one a head. The gates: log alpha = -A softplus(W_2 W_1 x + bias),
    `[B, L, H, d_k]`, with an inner size of `rank`, head_dim if None. A is one a head and starts uniform in (1, 16]; the
    bias is one a channel, and its softplus starts between 0.001 and 0.1. Output: RMSNorm per head, times
    sigmoid(W_4 W_3 x + bias) with the same inner size, linear.
    `backend` is `dn_lib.gated_delta_rule`'s. Raises ValueError for sizes that do not fit and for unknown options.
    Source: Kimi Team (2025), Kimi Linear; the sizes of the gates as in fla's layer.

        >>> import torch
        >>> KimiDeltaAttention(width=32, heads=2)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        conv_size: int = 4,
        rank: int | None = None,
        beta_range: float = 1.0,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        head_dim = head_dim_or_default(width, heads, head_dim)
        super().__init__(width, heads, head_dim, head_dim, conv_size=conv_size, output_gate=False, norm_eps=norm_eps)
        if not is_number(beta_range) or not 0 < beta_range <= 2:
            raise ValueError(f"beta_range must be in (0, 2], got {beta_range}")
        rank = head_dim if rank is None else rank
        check_integer("rank", rank)
        self.beta_range = beta_range
        self.backend = check_choice("backend", backend, BACKENDS)
        channels = heads * head_dim
        self.beta = nn.Linear(width, heads, bias=False)
        self.step = _low_rank(width, rank, channels, bias=False)
        self.log_rates, self.step_biases = new_rates(heads, 1.0, 16.0), new_step_biases(channels)
        self.sigmoid_gate = _low_rank(width, rank, channels, bias=True)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        q, k, v = (F.silu(t) for t in self._heads_of(x, cache, documents))
        beta = self.beta(x)
        beta = self.beta_range * beta.to(working_dtype(beta)).sigmoid()
        step, biases = split_heads(self.step(x), self.heads), split_heads(self.step_biases, self.heads)
        _, g = log_gates(step, self.log_rates[:, None], biases)
        options: dict[str, Any] = {"qk_l2norm": True, "backend": self.backend}
        o = run_operator(gated_delta_rule_in_full_precision, (q, k, v, beta, g), cache, documents, **options)
        o = self.norm(o.to(self.norm.weight.dtype)).to(x.dtype)
        return self.output(o.flatten(-2) * self.sigmoid_gate(x).sigmoid())

    def state_flops(self, length: int) -> float:
        """As DeltaNet's, and a multiply for the decay."""
        return 7 * self.heads * self.key_dim * self.value_dim


def _low_rank(width: int, rank: int, channels: int, bias: bool) -> nn.Sequential:
    """Two linear layers, width -> rank -> channels; a bias of the second starts at zero."""
    up = nn.Linear(rank, channels, bias=bias)
    if bias:
        nn.init.zeros_(up.bias)
    return nn.Sequential(nn.Linear(width, rank, bias=False), up)


@register_mixer("kda")
def _from_config(config: Any) -> KimiDeltaAttention:
    options = {name: getattr(config, name) for name in ("conv_size", "beta_range", "norm_eps", "backend")}
    return KimiDeltaAttention(config.width, config.heads, config.head_dim, **options)
