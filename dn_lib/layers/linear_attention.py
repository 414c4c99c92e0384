"""Linear attention as a layer (Katharopoulos et al. 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dn_lib.forms.common import without_autocast
from dn_lib.forms.linear_attention import chunkwise_linear_attention
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import ACTIVATIONS, QK_NORMS, check_choice, head_dim_or_default, split_heads
from dn_lib.layers.documents import Documents, open_documents
from dn_lib.layers.recurrent import RecurrentMixer, run_recurrence


class LinearAttention(RecurrentMixer):
    """Linear attention in DeltaNet's place: S_t = S_{t-1} + k_t v_t^T, all else equal.

    `[B, L, width]` -> `[B, L, width]`. Options as `DeltaNet`. There is no normaliser: the norm of each head's
    output takes its place (Qin et al. 2022).

        >>> import torch
        >>> LinearAttention(width=32, heads=2)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        activation: str = "silu",
        qk_norm: str = "l2",
        conv_size: int = 4,
        output_gate: bool = False,
        norm_eps: float = 1e-5,
        steps: int = 1,
    ):
        head_dim = head_dim_or_default(width, heads, head_dim)
        options = {"conv_size": conv_size, "output_gate": output_gate, "norm_eps": norm_eps, "steps": steps}
        super().__init__(width, heads, head_dim, head_dim, **options)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.qk_norm = check_choice("qk_norm", qk_norm, QK_NORMS)

    def _query_key_value(
        self, x: Tensor, cache: LayerCache | None, documents: Documents | None = None
    ) -> tuple[Tensor, ...]:
        """q, k, v `[B, steps L, H, d]`, a token's steps one after the other; q, k not normalised."""
        activation = ACTIVATIONS[self.activation]
        q, k, v = (self._project(name, x, cache, documents) for name in ("query", "key", "value"))
        # Only a token's last step is read, so what the earlier ones are asked does not matter.
        q = activation(split_heads(q, self.heads)).repeat_interleave(self.steps, dim=1)
        return q, self._split_steps(activation(k)), self._split_steps(F.silu(v))

    def _split_steps(self, x: Tensor) -> Tensor:
        """`[B, L, steps H d]` -> `[B, steps L, H, d]`."""
        return x.unflatten(-1, (self.steps, self.heads, -1)).flatten(1, 2)

    def forward(self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        q, k, v = self._query_key_value(x, cache, documents)
        q, k = QK_NORMS[self.qk_norm](q), QK_NORMS[self.qk_norm](k)
        o = run_recurrence(_linear_attention, (q, k, v), cache, documents, self.steps)
        return self._finish(o[:, self.steps - 1 :: self.steps], x)


@without_autocast
def _linear_attention(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`[B, L, H, d]` through chapter 1's function; a chunk of one token is one step of the recurrence."""
    o, state = chunkwise_linear_attention(*(t.transpose(1, 2) for t in (q, k, v)), initial_state=state)
    return o.transpose(1, 2), state
