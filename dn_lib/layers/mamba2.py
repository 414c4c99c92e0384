"""Mamba-2's recurrence as a layer (Dao and Gu 2024)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_integer, check_positive
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import RMSNorm, check_choice, split_heads
from dn_lib.layers.decay import log_gates, new_rates, new_step_biases
from dn_lib.layers.documents import Documents, open_documents
from dn_lib.layers.linear_attention import linear_attention_in_full_precision
from dn_lib.layers.recurrent import run_operator
from dn_lib.layers.registry import Mixer, register_mixer
from dn_lib.layers.short_convolution import ShortConvolution
from dn_lib.ops.backend import BACKENDS


class Mamba2(Mixer):
    """The state space of Dao and Gu 2024: linear attention whose state decays by one number per head and token.

    `[B, L, width]` -> `[B, L, width]`. z, (x, B, C), Delta are linear in the input; x, B, C go through one short
    convolution with a bias (`conv_size`, 0 for none) and SiLU; Delta = softplus(linear + bias). In each head
    S_t = exp(-A Delta_t) S_{t-1} + B_t (Delta_t x_t)^T and y_t = S_t^T C_t + D x_t: `dn_lib.linear_attention` with C
    for q, B for k and Delta x for v. B and C, of `state_size` channels, serve all heads. Output:
    RMSNorm(y * silu(z)) over all channels, linear.
    There are `heads` heads of `head_dim` channels, expand * width // heads if None. A starts uniform in (1, 16], the
    softplus of Delta's bias between 0.001 and 0.1, D at one; all three have one dimension, so that no weight decay
    pulls on them (`dn_lib.training`). `backend` is `dn_lib.linear_attention`'s.
    Raises ValueError for sizes that do not fit and for unknown options.

        >>> Mamba2(width=16, heads=2, state_size=8)(torch.randn(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        expand: int = 2,
        state_size: int = 128,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        sizes = {"width": width, "heads": heads, "expand": expand, "state_size": state_size}
        for name, value in sizes.items():
            check_integer(name, value)
        check_integer("conv_size", conv_size, least=0)
        check_positive("norm_eps", norm_eps)
        if head_dim is None and expand * width % heads:
            raise ValueError(f"heads must divide expand * width = {expand * width}, got {heads}; or set head_dim")
        head_dim = expand * width // heads if head_dim is None else head_dim
        check_integer("head_dim", head_dim)
        self.width, self.heads, self.head_dim, self.state_size = width, heads, head_dim, state_size
        self.channels = heads * head_dim
        mixed = self.channels + 2 * state_size
        self.input = nn.Linear(width, self.channels + mixed + heads, bias=False)
        self.conv = ShortConvolution(mixed, conv_size, bias=True) if conv_size else None
        self.log_rates, self.step_biases = new_rates(heads, 1.0, 16.0), new_step_biases(heads)
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(self.channels, eps=norm_eps)
        self.output = nn.Linear(self.channels, width, bias=False)
        self.backend = check_choice("backend", backend, BACKENDS)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        mixed = self.channels + 2 * self.state_size
        z, mixed, step = self.input(x).split([self.channels, mixed, self.heads], dim=-1)
        mixed = F.silu(mixed if self.conv is None else self.conv(mixed, cache, cu_seqlens=documents))
        x, B, C = mixed.split([self.channels, self.state_size, self.state_size], dim=-1)
        x, B, C = split_heads(x, self.heads), B.unsqueeze(2), C.unsqueeze(2)  # one head of B and C for all of x
        step, g = log_gates(step, self.log_rates, self.step_biases)
        v = (step[..., None] * x).to(x.dtype)
        options: dict[str, Any] = {"scale": 1.0, "backend": self.backend}
        y = run_operator(linear_attention_in_full_precision, (C, B, v, g), cache, documents, **options)
        y = (y + self.D.to(x.dtype)[:, None] * x).flatten(-2) * F.silu(z)
        return self.output(self.norm(y))

    def state_flops(self, length: int) -> float:
        """As linear attention's, and a multiply for the decay."""
        return 5 * self.channels * self.state_size


@register_mixer("mamba2")
def _from_config(config: Any) -> Mamba2:
    options = {name: getattr(config, name) for name in ("conv_size", "norm_eps", "backend")}
    sizes = {"expand": config.mamba_expand, "state_size": config.mamba_state}
    return Mamba2(config.width, config.heads, config.head_dim, **sizes, **options)
