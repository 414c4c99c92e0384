"""Liger's layer (Lan et al. 2025): gated linear attention and a window of attention on one set of projections."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dn_lib.forms.common import is_number, working_dtype
from dn_lib.layers.attention import Attention
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import check_choice, split_heads
from dn_lib.layers.documents import Documents, as_documents
from dn_lib.layers.linear_attention import linear_attention_in_full_precision
from dn_lib.layers.recurrent import run_operator
from dn_lib.layers.registry import register_mixer
from dn_lib.ops.backend import BACKENDS

TEMPERATURE = 16  # alpha = sigmoid(k)^(1/16), as in GLA


class Liger(Attention):
    """Half a gated linear attention, half an attention to the newest `window` tokens, of the same q, k and v.

    `[B, L, width]` -> `[B, L, width]`. It has the parameters of `Attention` and no others, so that the weights of a
    trained Transformer fit. The gates are made from the keys: in each head

        S_t = Diag(alpha_t) S_{t-1} + phi(k_t) v_t^T,      alpha_t = sigmoid(k_t)^(1/16),      phi = softmax over d,
        o_t = share S_t^T phi(q_t)  +  (1 - share) attention_t,

    where the attention has rotary positions and the linear part none. share: 1/2 in the paper; 1 is the linear part
    alone and 0 the window alone, both for comparison.
    `backend` is `dn_lib.linear_attention`'s. Raises ValueError for sizes that do not fit and for unknown options.
    Source: Lan et al. (2025), Liger, whose pooling of keys is here the identity, as in its authors' code.

        >>> import torch
        >>> Liger(width=32, heads=2, window=3)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        window: int = 64,
        share: float = 0.5,
        rope_base: float = 10000.0,
        backend: str = "auto",
    ):
        super().__init__(width, heads, head_dim, window=window, rope_base=rope_base)
        if not is_number(share) or not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        self.share = share
        self.backend = check_choice("backend", backend, BACKENDS)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = as_documents(cu_seqlens, x) if x.dim() == 3 else None
        # The output projection is linear, so the two halves may go through it one by one.
        attention = super().forward(x, cache, cu_seqlens=cu_seqlens if documents is None else documents)
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        wide = working_dtype(x)
        g = F.logsigmoid(k.to(wide)) / TEMPERATURE
        q, k = (t.to(wide).softmax(-1).to(v.dtype) for t in (q, k))
        options: dict[str, Any] = {"scale": 1.0, "backend": self.backend}
        o = run_operator(linear_attention_in_full_precision, (q, k, v, g), cache, documents, **options)
        return self.share * self.output(o.flatten(-2)) + (1 - self.share) * attention

    def state_flops(self, length: int) -> float:
        """The window's, and those of linear attention with a decay."""
        return super().state_flops(length) + 5 * self.heads * self.head_dim**2


@register_mixer("liger", heads=("attention_heads", "heads"), even=True)
def _from_config(config: Any) -> Liger:
    own = config.attention_heads
    heads, head_dim = (own, None) if own else (config.heads, config.head_dim)
    options = {name: getattr(config, name) for name in ("window", "rope_base", "backend")}
    return Liger(config.width, heads, head_dim, **options)
