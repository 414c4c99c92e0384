"""A causal convolution over a few tokens, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_lib.forms.common import check_flag, check_integer, describe, working_dtype
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.documents import Documents, as_documents, check_rows


class ShortConvolution(nn.Module):
    """Depthwise causal convolution: y_t = sum_j w_j * x_{t - size + 1 + j}, one filter of `size` a channel.

    `[B, L, channels]` -> the same. The last tap multiplies the present token; positions before the first
    count as zero. `cache[name]` keeps the last `size - 1` inputs, `[B, size - 1, channels]`. With `cu_seqlens`
    no sum reaches into the document before. Sums are taken in float32 at least and returned in x's dtype. `weight`
    is `[size, 1, channels]`, the transpose of PyTorch's Conv1d: the channels of one tap lie side by side, as those
    of x do.

        >>> conv, x = ShortConvolution(4, 3), torch.randn(1, 5, 4)
        >>> torch.allclose(conv(x)[:, 0], conv.weight[-1] * x[:, 0])
        True
    """

    def __init__(self, channels: int, size: int, bias: bool = False):
        super().__init__()
        check_integer("channels", channels)
        check_integer("size", size)
        check_flag("bias", bias)
        bound = size**-0.5
        weight = torch.empty(channels, 1, size).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight.permute(2, 1, 0).contiguous())
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        name: str = "conv",
        *,
        cu_seqlens: Tensor | Documents | None = None,
    ) -> Tensor:
        size, channels = self.weight.shape[0], self.weight.shape[2]
        check_rows("x", x, channels, "B, L, channels")
        documents = as_documents(cu_seqlens, x)
        if cache is not None and not isinstance(cache, LayerCache):
            raise TypeError(f"cache must be a LayerCache, got {describe(cache)}")
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {describe(name)}")
        past = None if cache is None else cache.get(name)
        if past is not None and past.shape[0] != x.shape[0]:
            raise ValueError(f"x must have the cache's batch size {past.shape[0]}, got {list(x.shape)}")
        past = x.new_zeros(x.shape[0], size - 1, channels) if past is None else past.to(x.dtype)
        padded = torch.cat([past, x], dim=1)
        if cache is not None:
            last = padded[:, x.shape[1] :] if documents is None else documents.last_rows(x, size - 1)
            cache[name] = last.clone()
        return self._sum_of_taps(padded, x.shape[1], documents).to(x.dtype)

    def _sum_of_taps(self, padded: Tensor, length: int, documents: Documents | None) -> Tensor:
        """`[B, size - 1 + L, channels]` -> `[B, L, channels]` in float32 at least.

        A sum of shifted products needs no transpose to [B, channels, L], and a compiler fuses it.
        """
        dtype, size = working_dtype(padded), self.weight.shape[0]
        wide, weight = padded.to(dtype), self.weight.to(dtype)

        def product(tap: int) -> Tensor:
            shifted = wide[:, tap : tap + length]
            if documents is not None:
                shifted = shifted.masked_fill(documents.positions[:, None] < size - 1 - tap, 0)
            return shifted * weight[tap]

        y = product(0)
        for tap in range(1, size):
            y = y + product(tap)
        return y if self.bias is None else y + self.bias.to(dtype)
