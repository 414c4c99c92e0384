"""Gated linear attention as a layer (Yang et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_integer, working_dtype
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import check_choice, check_even, head_dim_or_default, split_heads
from dn_lib.layers.documents import Documents, open_documents
from dn_lib.layers.linear_attention import linear_attention_in_full_precision
from dn_lib.layers.recurrent import RecurrentMixer, run_operator
from dn_lib.layers.registry import register_mixer
from dn_lib.ops.backend import BACKENDS


class GatedLinearAttention(RecurrentMixer):
    """GLA (Yang et al. 2024): a decay for each key channel, computed from the token; an output gate.

    alpha = sigmoid(W_2 W_1 x + b)^(1/16) with an inner size of `rank`. Keys have half the size of values, as
    in the paper. `[B, L, width]` -> `[B, L, width]`. `backend` is `dn_lib.linear_attention`'s.

        >>> import torch
        >>> GatedLinearAttention(width=32, heads=2)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        conv_size: int = 0,
        rank: int = 16,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        head_dim = check_even(head_dim_or_default(width, heads, head_dim))
        check_integer("rank", rank)
        super().__init__(
            width, heads, head_dim // 2, head_dim, conv_size=conv_size, output_gate=True, norm_eps=norm_eps
        )
        down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, heads * (head_dim // 2), bias=True)
        nn.init.zeros_(up.bias)
        self.decay = nn.Sequential(down, up)
        self.backend = check_choice("backend", backend, BACKENDS)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        q, k, v = self._heads_of(x, cache, documents)
        z = split_heads(self.decay(x), self.heads)
        g = F.logsigmoid(z.to(working_dtype(z))) / 16
        o = run_operator(linear_attention_in_full_precision, (q, k, v, g), cache, documents, backend=self.backend)
        return self._finish(o, x)

    def state_flops(self, length: int) -> float:
        """As linear attention's, and a multiply for the decay."""
        return 5 * self.heads * self.key_dim * self.value_dim


@register_mixer("gla", even=True)
def _from_config(config: Any) -> GatedLinearAttention:
    options = {name: getattr(config, name) for name in ("conv_size", "norm_eps", "backend")}
    return GatedLinearAttention(config.width, config.heads, config.head_dim, **options)
