"""DeltaNet as a layer (Yang et al. 2024)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dn_lib.forms.common import is_number, without_autocast, working_dtype
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import l1_norm
from dn_lib.layers.documents import Documents, open_documents
from dn_lib.layers.recurrent import MultiStepMixer, multi_step_options, run_operator
from dn_lib.layers.registry import register_mixer
from dn_lib.ops.delta import delta_rule


class DeltaNet(MultiStepMixer):
    """The layer of Yang et al. 2024: S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T in each head.

    `[B, L, width]` -> `[B, L, width]`. q and k: linear, short convolution (`conv_size`, 0 for none),
    `activation` ("silu", "relu", "elu1", "identity"), `qk_norm` ("l2", "l1", "none"). v: linear, short
    convolution, SiLU. beta: `beta_range` * sigmoid(linear), one a head; 2 admits eigenvalues down to -1
    (Grazzi et al. 2025). Output: RMSNorm per head, times silu(linear) if `output_gate`, linear.
    `steps` > 1 takes that many delta steps a token, each with its own k, v and beta: the operator runs on a
    sequence `steps` times as long and every `steps`-th output is kept (DeltaProduct, Siems et al. 2025).
    With "none" nothing bounds beta |k|^2, and the state can grow without limit.
    `backend` is `dn_lib.delta_rule`'s; "chunkwise" has second derivatives, which "triton" lacks.
    Raises ValueError for a head count that does not divide width and for unknown options.

        >>> import torch
        >>> DeltaNet(width=32, heads=2, beta_range=2.0, steps=2)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        beta_range: float = 1.0,
        **options: Any,
    ):
        super().__init__(width, heads, head_dim, **options)
        if not is_number(beta_range) or not 0 < beta_range <= 2:
            raise ValueError(f"beta_range must be in (0, 2], got {beta_range}")
        self.beta_range = beta_range
        self.beta = nn.Linear(width, self.steps * heads, bias=False)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        q, k, v = self._query_key_value(x, cache, documents)
        beta = self._split_steps(self.beta(x)).squeeze(-1)
        beta = self.beta_range * beta.to(working_dtype(beta)).sigmoid()
        if self.qk_norm == "l1":
            q, k = l1_norm(q), l1_norm(k)
        # For a single token the operator takes one step of the recurrence, whatever the backend.
        options: dict[str, Any] = {"qk_l2norm": self.qk_norm == "l2", "backend": self.backend}
        o = run_operator(delta_rule_in_full_precision, (q, k, v, beta), cache, documents, steps=self.steps, **options)
        return self._finish(o[:, self.steps - 1 :: self.steps], x)

    def state_flops(self, length: int) -> float:
        """Per step a multiply and an add for the write, for the read, and for what the state already returns for k."""
        return 6 * self.steps * self.heads * self.key_dim * self.value_dim


delta_rule_in_full_precision = without_autocast(delta_rule)


@register_mixer("delta")
def _from_config(config: Any) -> DeltaNet:
    options = multi_step_options(config)
    return DeltaNet(config.width, config.heads, config.head_dim, beta_range=config.beta_range, **options)
