"""Mamba's selective scan as a layer (Gu and Dao 2023)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_integer, working_dtype
from dn_lib.forms.decay import selective_scan
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.documents import Documents, open_documents
from dn_lib.layers.recurrent import run_recurrence
from dn_lib.layers.registry import Mixer, register_mixer
from dn_lib.layers.short_convolution import ShortConvolution


class Mamba(Mixer):
    """The selective state space of Gu and Dao 2024: `expand` * width channels of `state_size` states each.

    `[B, L, width]` -> `[B, L, width]`. x, z = linear(x); x = silu(conv(x)); delta, B, C are linear in x;
    y = (scan(x) + D x) * silu(z); out = linear(y). There are no heads.

        >>> Mamba(width=16)(torch.randn(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    def __init__(self, width: int, *, expand: int = 2, state_size: int = 16, conv_size: int = 4):
        super().__init__()
        for name, value in (("width", width), ("expand", expand), ("state_size", state_size)):
            check_integer(name, value)
        check_integer("conv_size", conv_size, least=0)
        self.width, self.channels = width, expand * width
        self.state_size, self.rank = state_size, math.ceil(width / 16)
        self.input = nn.Linear(width, 2 * self.channels, bias=False)
        self.conv = ShortConvolution(self.channels, conv_size, bias=True) if conv_size else None
        self.select = nn.Linear(self.channels, self.rank + 2 * state_size, bias=False)
        self.delta = nn.Linear(self.rank, self.channels, bias=True)
        self.log_A = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(self.channels, 1))
        self.D = nn.Parameter(torch.ones(self.channels))
        self.output = nn.Linear(self.channels, width, bias=False)
        self.reset_time_scale()

    @torch.no_grad()
    def reset_time_scale(self, low: float = 1e-3, high: float = 0.1) -> None:
        """Start delta between `low` and `high`, even in the logarithm: softplus(bias) is the value drawn."""
        nn.init.uniform_(self.delta.weight, -(self.rank**-0.5), self.rank**-0.5)
        delta = torch.empty_like(self.delta.bias).uniform_(math.log(low), math.log(high)).exp()
        self.delta.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def reset_own_parameters(self) -> None:
        self.reset_time_scale()

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        x, z = self.input(x).chunk(2, dim=-1)
        x = F.silu(x if self.conv is None else self.conv(x, cache, cu_seqlens=documents))
        delta, B, C = self.select(x).split([self.rank, self.state_size, self.state_size], dim=-1)
        delta = self.delta(delta)
        delta = F.softplus(delta.to(working_dtype(delta)))
        A = -self.log_A.to(delta.dtype).exp()

        def scan(x: Tensor, delta: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return selective_scan(x, delta, A, B, C, initial_state=state)

        y = run_recurrence(scan, (x, delta, B, C), cache, documents)
        return self.output((y + self.D.to(x.dtype) * x) * F.silu(z))

    def state_flops(self, length: int) -> float:
        """A multiply by the decay, two multiplies and an add to write, a multiply and an add to read."""
        return 6 * self.channels * self.state_size


@register_mixer("mamba", heads=())
def _from_config(config: Any) -> Mamba:
    sizes = {"expand": config.mamba_expand, "state_size": config.mamba_state}
    return Mamba(config.width, conv_size=config.conv_size, **sizes)
