"""Linear attention as a layer (Katharopoulos et al. 2020)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dn_lib.forms.common import without_autocast
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import QK_NORMS
from dn_lib.layers.documents import Documents, open_documents
from dn_lib.layers.recurrent import MultiStepMixer, multi_step_options, run_operator
from dn_lib.layers.registry import register_mixer
from dn_lib.ops.gated import linear_attention


class LinearAttention(MultiStepMixer):
    """Linear attention in DeltaNet's place: S_t = S_{t-1} + k_t v_t^T, all else equal.

    `[B, L, width]` -> `[B, L, width]`. Options as `DeltaNet`. There is no normaliser: the norm of each head's
    output takes its place (Qin et al. 2022). `backend` is `dn_lib.linear_attention`'s.

        >>> import torch
        >>> LinearAttention(width=32, heads=2)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        q, k, v = self._query_key_value(x, cache, documents)
        q, k = QK_NORMS[self.qk_norm](q), QK_NORMS[self.qk_norm](k)
        options: dict[str, Any] = {"steps": self.steps, "backend": self.backend}
        o = run_operator(linear_attention_in_full_precision, (q, k, v), cache, documents, **options)
        return self._finish(o[:, self.steps - 1 :: self.steps], x)

    def state_flops(self, length: int) -> float:
        """A multiply and an add for the write and for the read, in each step."""
        return 4 * self.steps * self.heads * self.key_dim * self.value_dim


linear_attention_in_full_precision = without_autocast(linear_attention)


@register_mixer("linear")
def _from_config(config: Any) -> LinearAttention:
    return LinearAttention(config.width, config.heads, config.head_dim, **multi_step_options(config))
