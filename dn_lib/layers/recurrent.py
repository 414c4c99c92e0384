"""What mixers with a state of fixed size share: projections, convolutions, the cached state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_flag, check_integer, check_positive
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import RMSNorm, split_heads
from dn_lib.layers.documents import Documents
from dn_lib.layers.short_convolution import ShortConvolution


class RecurrentMixer(nn.Module):
    """What DeltaNet, linear attention, RetNet and GLA share: projections and convolutions before the
    recurrence; a norm per head, an optional gate and the output projection after it."""

    def __init__(self, width, heads, key_dim, value_dim, *, conv_size, output_gate, norm_eps, steps=1):
        super().__init__()
        check_integer("conv_size", conv_size, least=0)
        check_integer("steps", steps)
        check_flag("output_gate", output_gate)
        check_positive("norm_eps", norm_eps)
        self.width, self.heads, self.steps = width, heads, steps
        self.key_dim, self.value_dim = key_dim, value_dim
        sizes = {"query": heads * key_dim, "key": steps * heads * key_dim, "value": steps * heads * value_dim}
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(width, size, bias=False))
            setattr(self, f"{name}_conv", ShortConvolution(size, conv_size) if conv_size else None)
        self.gate = nn.Linear(width, heads * value_dim, bias=False) if output_gate else None
        self.norm = RMSNorm(value_dim, eps=norm_eps)
        self.output = nn.Linear(heads * value_dim, width, bias=False)

    def _project(self, name: str, x: Tensor, cache: LayerCache | None, documents: Documents | None) -> Tensor:
        y, convolution = getattr(self, name)(x), getattr(self, f"{name}_conv")
        return y if convolution is None else convolution(y, cache, f"{name}_conv", cu_seqlens=documents)

    def _heads_of(self, x: Tensor, cache: LayerCache | None, documents: Documents | None) -> list[Tensor]:
        """q, k, v `[B, L, H, d]`."""
        names = ("query", "key", "value")
        return [split_heads(self._project(name, x, cache, documents), self.heads) for name in names]

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        """o `[B, L, H, d_v]` -> `[B, L, width]`."""
        o = self.norm(o.to(self.norm.weight.dtype)).to(x.dtype)
        if self.gate is not None:
            o = o * F.silu(split_heads(self.gate(x), self.heads))
        return self.output(o.flatten(-2))

    def state_flops(self, length: int) -> float:
        """Forward operations a token on the states: a multiply and an add for the write and for the read."""
        return 4 * self.steps * self.heads * self.key_dim * self.value_dim


def run_recurrence(
    recurrence, sequences, cache: LayerCache | None, documents: Documents | None, steps: int = 1
) -> Tensor:
    """The outputs of `recurrence(*sequences, state) -> (o, state)`, between reading the cache and writing it.

    Time is axis 1 of all sequences and of o. Packed documents go through one by one, each from an empty state.
    """
    if documents is None:
        o, state = recurrence(*sequences, None if cache is None else cache.get("state"))
    else:
        parts = [
            recurrence(*(t[:, begin * steps : end * steps] for t in sequences), None)
            for begin, end in documents.bounds()
        ]
        o, state = (torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (1, 0), strict=True))
    if cache is not None:
        cache["state"] = state
    return o
