"""Lightning Attention-2 in TransNormer's layer (Qin et al. 2023, 2024), and the fixed decays that share its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_flag, check_integer, is_number, working_dtype
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import RMSNorm, check_choice, head_dim_or_default
from dn_lib.layers.documents import Documents, open_documents
from dn_lib.layers.linear_attention import linear_attention_in_full_precision
from dn_lib.layers.recurrent import RecurrentMixer, run_operator
from dn_lib.layers.registry import register_mixer
from dn_lib.ops.backend import BACKENDS

# -log lambda of each head, h = 0 ... H - 1, from h `[H]` in float64 and H.
DECAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "lightning": lambda h, heads: 2.0 ** (-8 * (h + 1) / heads),
    "transnormer": lambda h, heads: 8 * h / heads,
    "retnet": lambda h, heads: -torch.log1p(-(2.0 ** (-5 - h))),
    "none": lambda h, heads: torch.zeros_like(h),
}


def decay_slopes(heads: int, decay: str = "lightning", depth: float = 0.0) -> Tensor:
    """s_h >= 0 `[H]` in float64, so that head h decays by lambda_h = exp(-s_h) per token.

    Papers and implementations that are named alike use four different tables, for h = 0 ... H - 1:

    - "lightning": s_h = 2^(-8 (h + 1) / H), the slopes of the authors' Lightning Attention-2 code;
    - "transnormer": s_h = 8 h / H, of the TransNormerLLM paper (and fla's `lightning_attn`): head 0 never forgets;
    - "retnet": lambda_h = 1 - 2^(-5 - h), of RetNet;
    - "none": s_h = 0, linear attention without decay.

    depth: the share l / L of the model's layers that lie below this one, in [0, 1].  TransNormerLLM multiplies the
    slopes by 1 - l / L, so that higher layers forget more slowly; 0 leaves them as they are.
    Raises ValueError for an unknown table or a depth outside [0, 1].

    >>> [round(s, 3) for s in decay_slopes(4).tolist()]
    [0.25, 0.062, 0.016, 0.004]
    >>> decay_slopes(4, "transnormer", depth=0.5).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    check_integer("heads", heads)
    check_choice("decay", decay, DECAYS)
    if not is_number(depth) or not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    return DECAYS[decay](torch.arange(heads, dtype=torch.float64), heads) * (1 - depth)


class LightningAttention(RecurrentMixer):
    """Linear attention with a fixed decay per head: S_t = lambda_h S_{t-1} + k_t v_t^T (Qin et al. 2023, 2024).

    `[B, L, width]` -> `[B, L, width]`. q, k: linear, SiLU; v: linear; a short convolution before each if `conv_size`
    is not 0. There is no normaliser: TransNormer's NormAttention replaces it by a norm of the output. Output:
    RMSNorm over all heads' channels together, times a linear map of x, linear. (TransNormer's norm has no weights; this
    one has, which start at 1.) Lightning Attention-2 is the tiling, not the layer: its blocks are the chunks of
    `dn_lib.linear_attention`, whose `backend` this is.
    The decays are `decay_slopes(heads, decay, depth)`; they have no parameters. by_depth: a model that holds the layer
    sets its depth, by `place`: l / L for layer l of L, counted from 0, as TransNormerLLM does; `depth` must be 0 then.
    Raises ValueError for sizes that do not fit and for unknown options.

        >>> LightningAttention(width=32, heads=2, decay="retnet")(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        decay: str = "lightning",
        depth: float = 0.0,
        by_depth: bool = False,
        conv_size: int = 0,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        head_dim = head_dim_or_default(width, heads, head_dim)
        super().__init__(width, heads, head_dim, head_dim, conv_size=conv_size, output_gate=False, norm_eps=norm_eps)
        decay_slopes(heads, decay, depth)  # checks them
        check_flag("by_depth", by_depth)
        if by_depth and depth:
            raise ValueError(f"depth must be 0 where a model sets it (by_depth), got {depth}")
        self.decay, self.depth, self.by_depth = decay, depth, by_depth
        self.linear_gate = nn.Linear(width, heads * head_dim, bias=False)
        self.norm = RMSNorm(heads * head_dim, eps=norm_eps)
        self.backend = check_choice("backend", backend, BACKENDS)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        q, k, v = self._heads_of(x, cache, documents)
        g = -decay_slopes(self.heads, self.decay, self.depth).to(x.device, working_dtype(x))
        tensors = F.silu(q), F.silu(k), v, g
        o = run_operator(linear_attention_in_full_precision, tensors, cache, documents, backend=self.backend)
        o = self.norm(o.flatten(-2).to(self.norm.weight.dtype)).to(x.dtype)
        return self.output(o * self.linear_gate(x))

    def place(self, layer: int, layers: int) -> None:
        """This is layer `layer` of the `layers` of a model, counted from 0: its depth, where that counts (`by_depth`).

        Raises ValueError for a layer that the model has not.

            >>> top = LightningAttention(width=32, heads=2, decay="transnormer", by_depth=True)
            >>> top.place(3, 4)
            >>> top.depth
            0.75
        """
        check_integer("layers", layers)
        check_integer("layer", layer, least=0)
        if layer >= layers:
            raise ValueError(f"layer must be below layers = {layers}, got {layer}")
        if self.by_depth:
            self.depth = layer / layers

    def state_flops(self, length: int) -> float:
        """As linear attention's, and a multiply for the decay."""
        return 5 * self.heads * self.key_dim * self.value_dim


@register_mixer("lightning")
def _from_config(config: Any) -> LightningAttention:
    options = {name: getattr(config, name) for name in ("conv_size", "norm_eps", "backend")}
    options |= {"decay": config.decay, "by_depth": config.decay_by_depth}
    return LightningAttention(config.width, config.heads, config.head_dim, **options)
