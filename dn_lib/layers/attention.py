"""Causal softmax attention as a layer: to all earlier tokens, or to those in a window."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_integer, check_is_tensor, check_positive, check_shape, check_tensors
from dn_lib.forms.derivatives import active_transform
from dn_lib.layers.cache import LayerCache
from dn_lib.layers.common import check_even, head_dim_or_default, split_heads
from dn_lib.layers.documents import Documents, open_documents, positions_of
from dn_lib.layers.registry import Mixer, register_mixer
from dn_lib.layers.rotary import rotary_embedding


def full_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal attention; q's last row belongs to k's last. q `[B, H, L, d]`, k and v `[B, H, L + past, d]`.

    `documents` `[B, L + past]` (or `[1, L + past]`, the same for all) numbers the document of each key: a row then
    sees the keys of its own alone, through a mask of L (L + past) entries.
    """
    _check_attention(q, k, v, documents)
    return _masked_attention(q, k, v, documents=documents)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> None:
    check_tensors(q=q, k=k, v=v)
    if q.dim() != 4:
        raise ValueError(f"q must be [B, H, L, d], got {list(q.shape)}")
    if k.dim() != 4 or k.shape[2] < q.shape[2]:
        raise ValueError(f"k must be [B, H, L + past, d] with L = {q.shape[2]} to match q, got {list(k.shape)}")
    keys = (*q.shape[:2], k.shape[2], q.shape[3])
    check_shape("k", k, "B, H, L + past, d", keys, "q")
    check_shape("v", v, "B, H, L + past, d_v", (*keys[:3], v.shape[-1] if v.dim() else 1), "k")
    if documents is not None:
        check_is_tensor("documents", documents, "[B or 1, L + past]")
        if documents.device != q.device:
            raise ValueError(f"documents must be on {q.device} like q, got {documents.device}")
        rows = 1 if documents.dim() and documents.shape[0] == 1 else q.shape[0]
        check_shape("documents", documents, "B or 1, L + past", (rows, k.shape[2]), "k")


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Tensor | None = None
) -> Tensor:
    """Every row against every key, through torch's SDPA; what a row may not see is masked."""
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    if window is not None and past + length <= window:
        window = None  # the window holds everything
    if window is None and documents is None:
        # Asked in an `if`, so that a compiler with symbolic lengths decides it: SDPA wants a Python bool.
        if past == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if length == 1:
            return F.scaled_dot_product_attention(q, k, v)
    rows = torch.arange(past, past + length, device=q.device)[:, None]
    columns = torch.arange(past + length, device=q.device)
    mask = columns <= rows
    if window is not None:
        mask = mask & (columns > rows - window)
    if documents is not None:
        mask = mask & (documents[:, None, past:, None] == documents[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None = None) -> Tensor:
    """Row i of q attends to the `window` newest keys up to its own; q's last row belongs to k's last.

    q `[B, H, L, d]`, k and v `[B, H, L + past, d]`; `documents` as in `full_attention`. The rows are cut into blocks
    of `window`: a block sees no key outside itself and the block before, and which of these 2 `window` keys a row
    sees is the same in every block. So all blocks after the first go through torch's SDPA as one batch with one small
    mask: work and memory O(L window). On a GPU in half precision FlashAttention skips what lies outside the window.

        >>> q, k, v = (torch.randn(1, 1, 5, 2) for _ in range(3))
        >>> torch.allclose(window_attention(q, k, v, window=1), v)
        True
    """
    _check_attention(q, k, v, documents)
    check_integer("window", window)
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    if documents is None and length > window and _flash_takes(q, k, v):
        return _flash_attention(q, k, v, window)
    oldest = max(0, past - window + 1)
    if oldest:
        k, v, past = k[:, :, oldest:], v[:, :, oldest:], past - oldest
        documents = None if documents is None else documents[:, oldest:]
    if length <= window:
        return _masked_attention(q, k, v, window, documents)
    # The first block's older keys, if there are any, come from a cache.
    stop = past + window
    seen = None if documents is None else documents[:, :stop]
    first = _masked_attention(q[:, :, :window], k[:, :, :stop], v[:, :, :stop], window, seen)
    own = None if documents is None else documents[:, past:]
    return torch.cat([first, _later_blocks(q[:, :, window:], k[:, :, past:], v[:, :, past:], window, own)], dim=2)


def _later_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
    """Row i of q is the row of key i + `window`: its block and the one before are all that it may see."""
    batch, length = q.shape[0], q.shape[2]
    n = (length + window - 1) // window
    q = _to_blocks(q.transpose(1, 2), n, window)  # [B, n, window, H, d]
    k, v = (_to_blocks(t.transpose(1, 2), n + 1, window) for t in (k, v))
    k, v = (torch.cat([t[:, :-1], t[:, 1:]], dim=2) for t in (k, v))
    q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))  # [B n, H, window or 2 window, d]
    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)
    mask = (column > row) & (column <= row + window)
    if documents is not None:
        blocks = _to_blocks(documents[..., None], n + 1, window).flatten(2)  # [B or 1, n + 1, window]
        pairs = torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2)
        same = blocks[:, 1:, :, None] == pairs[:, :, None, :]
        mask = (mask & same).expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return o.transpose(1, 2).unflatten(0, (batch, n)).flatten(1, 2)[:, :length].transpose(1, 2)


def _to_blocks(x: Tensor, n: int, size: int) -> Tensor:
    """`[B, L, ...]` of four or three dimensions -> `[B, n, size, ...]`; zeros fill the last block."""
    pad = [0, 0] * (x.dim() - 2) + [0, n * size - x.shape[1]]
    # Padding by nothing keeps the strides, which a compiled graph made for another length does not expect.
    return F.pad(x.contiguous(), pad).unflatten(1, (n, size))


def _flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether FlashAttention computes these without a cache: on a GPU, in half precision, once differentiable.

    Its backward adds in any order, so it is not taken where deterministic algorithms are asked for.
    """
    return (
        q.device.type == "cuda"
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape == k.shape == v.shape
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and q.numel() > 0
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and not torch.are_deterministic_algorithms_enabled()
        and active_transform(q, k, v) is None
    )


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Causal attention within a window and within documents, through torch's FlashAttention: `[B, H, L, d]`.

    Skips every block of keys that a row does not see. The kernel reads what the offsets say, so they are made to rise
    from 0 to L here, at no wait for the GPU.
    """
    from torch.nn.attention.varlen import varlen_attn  # here: it brings the compiler along

    batch, _, length, _ = q.shape
    if cu_seqlens is None:
        offsets = torch.arange(0, batch * length + 1, length, device=q.device, dtype=torch.int32)
    else:
        offsets = cu_seqlens.to(torch.int32).clamp(0, length).cummax(0).values.clone()
        offsets[0], offsets[-1] = 0, length
    q, k, v = (t.transpose(1, 2).reshape(batch * length, *t.shape[1::2]) for t in (q, k, v))
    size = (-1 if window is None else window - 1, 0)
    o = varlen_attn(q, k, v, offsets, offsets, length, length, window_size=size)  # a tuple if it is asked for more
    return cast(Tensor, o).unflatten(0, (batch, length)).transpose(1, 2)


class Attention(Mixer):
    """Causal softmax attention with rotary positions, to all earlier tokens or to the newest `window`.

    `[B, L, width]` -> `[B, L, width]`. With window w, token t attends to t - w + 1 ... t. All through torch's
    SDPA. The cache of full attention grows with the context, that of a window stops at w - 1 tokens.

        >>> Attention(width=32, heads=2, window=3)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    block = 128  # tokens by which the cache of full attention grows

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        window: int | None = None,
        rope_base: float = 10000.0,
    ):
        super().__init__()
        if window is not None:
            check_integer("window", window)
        check_positive("rope_base", rope_base)
        self.width, self.heads, self.window, self.rope_base = width, heads, window, rope_base
        self.head_dim = check_even(head_dim_or_default(width, heads, head_dim))
        self.query = nn.Linear(width, heads * self.head_dim, bias=False)
        self.key = nn.Linear(width, heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, heads * self.head_dim, bias=False)
        self.output = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | Documents | None = None
    ) -> Tensor:
        documents = open_documents(x, self.width, cache, cu_seqlens)
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        positions = positions_of(x, cache, documents)
        q, k = (rotary_embedding(t, positions, self.rope_base) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        numbers = None
        if documents is not None:
            numbers = documents.numbers[None]
            if cache is not None:
                self._remember_documents(cache, k, v, documents)
        elif cache is not None:
            k, v = (self._remember(cache, name, t) for name, t in (("k", k), ("v", v)))
            numbers = self._padding_as_document(cache, k)
        if documents is not None and _flash_takes(q, k, v):
            o = _flash_attention(q, k, v, self.window, documents.offsets)
        else:
            o = self._attend(q, k, v, numbers)
        return self.output(o.transpose(1, 2).flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        if self.window is None:
            return full_attention(q, k, v, documents)
        return window_attention(q, k, v, self.window, documents)

    def _remember(self, cache: LayerCache, name: str, new: Tensor) -> Tensor:
        """Add `new` `[B, H, L, d]`, the last rows up to the cache's position; returns all that they may attend to."""
        past, stop = cache.get(name), cache.position
        start = stop - new.shape[2]
        if self.window is not None:
            both = new if past is None else torch.cat([past.to(new.dtype), new], dim=2)
            cache[name] = both[:, :, max(0, both.shape[2] - self.window + 1) :].clone()
            return both
        if past is None or past.shape[2] < stop:
            grown = new.new_empty(*new.shape[:2], -(-stop // self.block) * self.block, new.shape[3])
            if past is not None:
                grown[:, :, :start] = past[:, :, :start]
            grown[:, :, start:stop] = new.detach()
            cache[name] = past = grown  # written first: a compiled model keeps a copy
        else:
            past[:, :, start:stop] = new.detach()
        if start == 0:
            return new
        if torch.is_grad_enabled():
            # What the buffer holds has no gradient, and the next call overwrites it: not so what is returned here.
            return torch.cat([past[:, :, :start].to(new.dtype), new], dim=2)
        return past[:, :, :stop].to(new.dtype)

    def _remember_documents(self, cache: LayerCache, k: Tensor, v: Tensor, documents: Documents) -> None:
        """Make the empty cache that of N sequences which end together; the shorter ones begin with padding."""
        size = documents.longest() if self.window is None else min(documents.longest(), self.window - 1)
        for name, rows in (("k", k), ("v", v)):
            cache[name] = documents.last_rows(rows.transpose(1, 2), size).transpose(1, 2).contiguous()
        cache["padding"] = documents.padding()

    def _padding_as_document(self, cache: LayerCache, k: Tensor) -> Tensor | None:
        """1 for each key `[N, keys]`, 0 for padding: two documents, of which no token is in the padding's."""
        padding = cache.get("padding")
        if padding is None:
            return None
        positions = torch.arange(cache.position - k.shape[2], cache.position, device=k.device)
        return (positions >= padding[:, None]).int()

    def state_flops(self, length: int) -> float:
        """A multiply and an add for q . k and for the sum over v, times the mean number of keys seen."""
        window = length if self.window is None else min(self.window, length)
        keys = window - window * (window - 1) / (2 * length)
        return 4 * keys * self.heads * self.head_dim


@register_mixer("attention", heads=("attention_heads", "heads"), even=True)
def _full_from_config(config: Any) -> Attention:
    return _from_config(config, window=None)


@register_mixer("window", heads=("attention_heads", "heads"), even=True)
def _window_from_config(config: Any) -> Attention:
    return _from_config(config, window=config.window)


def _from_config(config: Any, window: int | None) -> Attention:
    own = config.attention_heads
    heads, head_dim = (own, None) if own else (config.heads, config.head_dim)
    return Attention(config.width, heads, head_dim, window=window, rope_base=config.rope_base)
