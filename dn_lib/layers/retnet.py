"""RetNet's retention as a layer (Sun et al. 2023)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dn_lib.forms.common import check_positive, working_dtype
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import check_choice, check_even, head_dim_or_default
from dn_lib.layers.documents import Documents, open_documents, positions_of
from dn_lib.layers.linear_attention import linear_attention_in_full_precision
from dn_lib.layers.recurrent import RecurrentMixer, run_operator
from dn_lib.layers.registry import register_mixer
from dn_lib.layers.rotary import rotary_embedding
from dn_lib.ops.backend import BACKENDS
from dn_lib.ops.gated import retention_gates


class RetNet(RecurrentMixer):
    """Retention (Sun et al. 2023): rotated q and k, a fixed decay 1 - 2^(-5-h) in head h, an output gate.

    `[B, L, width]` -> `[B, L, width]`. Keys and values have the same size here; the original doubles values.
    `backend` is `dn_lib.linear_attention`'s.

        >>> import torch
        >>> RetNet(width=32, heads=2)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        conv_size: int = 0,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        head_dim = check_even(head_dim_or_default(width, heads, head_dim))
        super().__init__(width, heads, head_dim, head_dim, conv_size=conv_size, output_gate=True, norm_eps=norm_eps)
        check_positive("rope_base", rope_base)
        self.rope_base = rope_base
        self.backend = check_choice("backend", backend, BACKENDS)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        q, k, v = self._heads_of(x, cache, documents)
        positions = positions_of(x, cache, documents)
        q, k = (rotary_embedding(t, positions, self.rope_base) for t in (q, k))
        g = retention_gates(self.heads, x.device, working_dtype(x))
        o = run_operator(linear_attention_in_full_precision, (q, k, v, g), cache, documents, backend=self.backend)
        return self._finish(o, x)

    def state_flops(self, length: int) -> float:
        """As linear attention's, and a multiply for the decay."""
        return 5 * self.heads * self.key_dim * self.value_dim


@register_mixer("retnet", even=True)
def _from_config(config: Any) -> RetNet:
    options = {name: getattr(config, name) for name in ("conv_size", "rope_base", "norm_eps", "backend")}
    return RetNet(config.width, config.heads, config.head_dim, **options)
