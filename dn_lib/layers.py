"""Chapter 6: the layers of a language model around the operator.

Every mixer here has one signature, `mixer(x, cache=None, *, cu_seqlens=None) -> y`, with x and y of shape
`[B, L, width]`, and mixes information between positions without looking ahead.

A `LayerCache` starts empty. A call reads what earlier calls left there and replaces it, so that a prompt can be
given whole, in pieces or a token at a time, and the outputs are those of the whole sequence. What a cache holds
is detached: no gradient flows into an earlier call.

    >>> import dn_lib, torch
    >>> from dn_lib.layers import DeltaNet, LayerCache
    >>> layer, x, cache = DeltaNet(width=32, heads=2), torch.randn(1, 10, 32), LayerCache()
    >>> pieces = torch.cat([layer(x[:, :7], cache), layer(x[:, 7:], cache)], dim=1)
    >>> torch.allclose(pieces, layer(x), atol=1e-4)
    True

`cu_seqlens`, N + 1 offsets that rise from 0 to L, says that x `[1, L, width]` holds N documents one after the
other. Each is then computed as if it were alone. With an empty cache, the documents become its N sequences: the
next call continues them, and takes x `[N, L, width]`.

    >>> packed = layer(x, cu_seqlens=torch.tensor([0, 7, 10]))
    >>> torch.allclose(packed[:, 7:], layer(x[:, 7:]), atol=1e-4)
    True
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dn_lib.common import (
    active_transform,
    check_chunk_size,
    check_flag,
    check_integer,
    check_is_tensor,
    check_offsets,
    check_positive,
    check_sequence,
    check_shape,
    check_tensors,
    describe,
    fresh,
    initial_state_or_zeros,
    is_integer,
    is_number,
    scale_or_default,
    working_dtype,
)
from dn_lib.linear_attention import chunkwise_linear_attention
from dn_lib.ops import BACKENDS, delta_rule, l2_normalise


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean of x^2 + eps) * weight along the last dimension, in the dtype of x.

    Models are trained and published with norms in float32 and the rest in bfloat16. Then the wider dtype is computed
    in, and what comes out is rounded to that of x, which the next matrix product needs (fla's norms do the same).

        >>> RMSNorm(4)(torch.ones(2, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "elu1": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}


def l1_norm(x: Tensor) -> Tensor:
    """x / max(|x|_1, 1e-6) along the last dimension, computed in float32 at least."""
    check_tensors(x=x)
    wide = x.to(working_dtype(x))
    return (wide / wide.abs().sum(-1, keepdim=True).clamp(min=1e-6)).to(x.dtype)


def l2_norm(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) along the last dimension, computed in float32 at least."""
    check_tensors(x=x)
    return l2_normalise(x).to(x.dtype)


QK_NORMS = {"l2": l2_norm, "l1": l1_norm, "none": lambda x: x}


def without_autocast(function):
    """Run `function` outside autocast: it chooses its own precision, and a state needs float32."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        first = args[0] if args else next(iter(kwargs.values()), None)
        kind = first.device.type if isinstance(first, Tensor) else "cpu"
        # Tensors on "meta" have no arithmetic that autocast could change, and it does not know them.
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def _choice(name: str, value: str, options) -> str:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
    return value


def _head_dim(width: int, heads: int, head_dim: int | None) -> int:
    check_integer("width", width)
    check_integer("heads", heads)
    if head_dim is not None:
        check_integer("head_dim", head_dim)
    if head_dim is None and width % heads:
        raise ValueError(f"heads must divide width, got heads = {heads} and width = {width}; or set head_dim")
    return width // heads if head_dim is None else head_dim


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, L, heads * d]` -> `[B, L, heads, d]`."""
    return x.unflatten(-1, (heads, -1))


# ------------------------------------------------------------------------- caches and packed documents


class LayerCache:
    """What one layer keeps between calls: tensors by name, and how far the sequences have come.

    Neither a dict nor a dataclass, on purpose. Wrappers that move or cast a module's arguments (DDP, FSDP2 with
    mixed precision) rebuild both kinds, and what a layer wrote into the copy would be lost. They pass an object
    that they don't know as it is.

        >>> cache = LayerCache()
        >>> _ = DeltaNet(width=32, heads=2, conv_size=0)(torch.randn(3, 5, 32), cache)
        >>> cache.batch_size, cache["state"].shape, cache.bytes()
        (3, torch.Size([3, 2, 16, 16]), 6144)
    """

    def __init__(self):
        self.batch_size: int | None = None  # of the first call, which all later ones must have
        self.position = 0  # of the next token, for the layers that rotate
        self._tensors: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self.get(name)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        kept = tensor.detach()
        self._tensors[name] = _outside_graphs(kept) if torch.compiler.is_compiling() else kept

    def get(self, name: str) -> Tensor | None:
        """The tensor called `name`, or None."""
        tensor = self._tensors.get(name)
        if tensor is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return tensor
        # A tensor made in inference mode could neither be saved for a backward pass nor written to outside of it.
        if tensor.is_inference():
            tensor = self._tensors[name] = tensor.clone()
        return tensor

    def bytes(self) -> int:
        """The memory held by its tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors.values())


@torch.library.custom_op("dn_lib::outside_graphs", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _outside_graphs(x: Tensor) -> Tensor:
    """A copy that no CUDA graph owns.

    With mode="reduce-overhead" the results of a compiled model lie in memory that its next call overwrites, and a
    cache is read in the next call. The tag makes the compiler run this operator between its CUDA graphs.
    """
    return x.clone()


@_outside_graphs.register_fake
def _(x):
    return torch.empty_like(x)


class Documents:
    """N documents packed one after the other along a row of L tokens, made once from `cu_seqlens` for all layers.

    `offsets` `[N + 1]` is `cu_seqlens`. Of every token, `numbers` `[L]` says in which document it is, counted from
    0, and `positions` `[L]` its position there. On a CPU the offsets' values are always checked; on
    a GPU where they are read anyway (`bounds`), since reading them waits for the GPU.

        >>> documents = Documents(torch.tensor([0, 3, 5]), torch.zeros(1, 5))
        >>> documents.positions
        tensor([0, 1, 2, 0, 1])
        >>> documents.last_rows(torch.arange(1, 6)[None, :, None], size=3).squeeze(-1)
        tensor([[1, 2, 3],
                [0, 4, 5]])
    """

    def __init__(self, cu_seqlens: Tensor, x: Tensor):
        _check_cu_seqlens(cu_seqlens, x)
        self.offsets, self.length = cu_seqlens, x.shape[1]
        self._bounds: list[tuple[int, int]] | None = None
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            self.bounds()
        self.numbers = document_numbers(cu_seqlens, self.length)
        self.positions = torch.arange(self.length, device=x.device) - cu_seqlens[self.numbers]

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def bounds(self) -> list[tuple[int, int]]:
        """Begin and end of each document. Raises ValueError unless they rise from 0 to L."""
        if self._bounds is None:
            offsets = self.offsets.tolist()
            check_offsets(offsets, self.length)
            self._bounds = list(itertools.pairwise(offsets))
        return self._bounds

    def longest(self) -> int:
        """The tokens of the longest document."""
        return max(end - begin for begin, end in self.bounds())

    def padding(self) -> Tensor:
        """`[N]`: by how many tokens each document is shorter than the longest."""
        return self.longest() - self.offsets.diff()

    def aligned_positions(self) -> Tensor:
        """`[L]`: positions counted so that all documents end at the same one, that of the longest."""
        return self.positions + self.padding()[self.numbers]

    def last_rows(self, x: Tensor, size: int) -> Tensor:
        """The last `size` rows of each document: `[1, L, ...]` -> `[N, size, ...]`, zeros before its first."""
        rows = self.offsets[1:, None] - size + torch.arange(size, device=x.device)
        missing = (rows < self.offsets[:-1, None]).reshape(len(self), size, *[1] * (x.dim() - 2))
        padded = torch.cat([x.new_zeros(size, *x.shape[2:]), x[0]])
        return padded[rows + size].masked_fill(missing, 0)


def document_numbers(cu_seqlens: Tensor, length: int) -> Tensor:
    """Which document each of `length` packed tokens belongs to, counted from 0: `[N + 1]` offsets -> `[length]`.

    >>> document_numbers(torch.tensor([0, 2, 5]), 5)
    tensor([0, 0, 1, 1, 1])
    """
    offsets = cu_seqlens[1:].contiguous()
    return torch.searchsorted(offsets, torch.arange(length, device=offsets.device, dtype=offsets.dtype), right=True)


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        got = list(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens must be a tensor of N + 1 >= 2 offsets, got {got}")
    check_is_tensor("cu_seqlens", cu_seqlens, "of offsets")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device} like the tokens, got {cu_seqlens.device}")
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a batch size of 1 (documents packed along L), got {x.shape[0]}")


def _check_rows(name: str, x: Tensor, width: int, axes: str = "B, L, width") -> None:
    check_tensors(**{name: x})
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"{name} must be [{axes}] with {axes.split(', ')[-1]} = {width}, got {list(x.shape)}")


def _open(x: Tensor, width: int, cache: LayerCache | None, cu_seqlens: Tensor | Documents | None) -> Documents | None:
    """Check a mixer's arguments; returns the documents that x holds, None if its rows are one each."""
    _check_rows("x", x, width)
    documents = cu_seqlens
    if cu_seqlens is not None and not isinstance(cu_seqlens, Documents):
        documents = Documents(cu_seqlens, x)
    if cache is None:
        return documents
    if not isinstance(cache, LayerCache):
        raise TypeError(f"cache must be a LayerCache, got {type(cache).__name__}")
    if documents is not None and cache.batch_size is not None:
        raise ValueError("cache must be empty with cu_seqlens, got one that holds tokens")
    sequences = x.shape[0] if documents is None else len(documents)
    if cache.batch_size not in (None, sequences):
        raise ValueError(f"x must have the cache's batch size {cache.batch_size}, got {list(x.shape)}")
    cache.batch_size = sequences
    return documents


def _positions(x: Tensor, cache: LayerCache | None, documents: Documents | None) -> Tensor:
    """The position of each row of x, `[L]`; the cache then stands after them.

    Scores of rotated vectors depend on distances alone. With a cache, documents of different lengths are therefore
    counted so that they all end at one position, and one number serves all sequences of the later calls.
    """
    if documents is not None:
        if cache is None:
            return documents.positions
        cache.position = documents.longest()
        return documents.aligned_positions()
    start = 0 if cache is None else cache.position
    if cache is not None:
        cache.position = start + x.shape[1]
    return torch.arange(start, start + x.shape[1], device=x.device)


# --------------------------------------------------------------------------------------- small parts


class SwiGLU(nn.Module):
    """The feed-forward part: y = W_down (silu(W_gate x) * (W_up x)), `[..., width]` -> `[..., width]`.

    Source: Shazeer 2020, as in LLaMA (Touvron et al. 2023).

        >>> SwiGLU(8, 16)(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        check_integer("width", width)
        check_integer("hidden", hidden)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        check_is_tensor("x", x, "[..., width]")
        if x.dim() == 0 or x.shape[-1] != self.gate.in_features:
            raise ValueError(f"x must be [..., width] with width = {self.gate.in_features}, got {list(x.shape)}")
        return self.output(F.silu(self.gate(x)) * self.up(x))


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
        _check_rows("x", x, channels, "B, L, channels")
        documents = cu_seqlens
        if cu_seqlens is not None and not isinstance(cu_seqlens, Documents):
            documents = Documents(cu_seqlens, x)
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
        wide, weight, y = padded.to(dtype), self.weight.to(dtype), None
        for tap in range(size):
            shifted = wide[:, tap : tap + length]
            if documents is not None:
                shifted = shifted.masked_fill(documents.positions[:, None] < size - 1 - tap, 0)
            y = shifted * weight[tap] if y is None else y + shifted * weight[tap]
        return y if self.bias is None else y + self.bias.to(dtype)


def rotary_embedding(x: Tensor, start: int | Tensor = 0, base: float = 10000.0) -> Tensor:
    """Rotate pairs (x_i, x_{i + d/2}) of `[B, L, H, d]` by the angle position * base^(-2i/d), d even.

    The first row has position `start`, or row t has `start[t]` where it is a tensor `[L]`, so that q_i . k_j
    depends on i - j alone. Raises ValueError for other shapes and for an odd d. Source: Su et al. 2024.

        >>> x = torch.randn(1, 4, 1, 8)
        >>> torch.allclose(rotary_embedding(x)[:, 1:], rotary_embedding(x[:, 1:], start=1), atol=1e-6)
        True
    """
    check_tensors(x=x)
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must be [B, L, H, d] with d even, got {list(x.shape)}")
    check_positive("base", base)
    if not isinstance(start, Tensor):
        if not is_integer(start):
            raise TypeError(f"start must be a whole number or a tensor [L], got {describe(start)}")
        start = torch.arange(start, start + x.shape[1], device=x.device)
    elif start.shape != (x.shape[1],):
        raise ValueError(f"start must be a number or [L] = [{x.shape[1]}], got {list(start.shape)}")
    dtype = working_dtype(x)
    cos, sin = _rotations(start, x.shape[-1], base, dtype)
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@torch.library.custom_op("dn_lib::rotations", mutates_args=())
def _rotations(positions: Tensor, d: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of the positions `[L]`: `[L, 1, d/2]` each, the same for every head.

    An operator of its own, since a compiler would compute them anew for every sequence and head, where they are used.
    """
    frequency = base ** (-torch.arange(0, d, 2, device=positions.device, dtype=dtype) / d)
    angle = (positions.to(dtype)[:, None] * frequency)[:, None, :]
    return angle.cos(), angle.sin()


@_rotations.register_fake
def _(positions, d, base, dtype):
    return tuple(positions.new_empty(positions.shape[0], 1, (d + 1) // 2, dtype=dtype) for _ in range(2))


# ------------------------------------------------------------------------------- recurrences with decay


def _to_chunks(x: Tensor, chunk: int) -> Tensor:
    """`[..., L, d]` -> `[..., n, chunk, d]`; zeros fill the last: k = v = log-decay = 0 change no state."""
    # Padding by nothing keeps the strides, which a compiled graph made for another length does not expect.
    return F.pad(x.contiguous(), (0, 0, 0, -x.shape[-2] % chunk)).unflatten(-2, (-1, chunk))


def _states_before_chunks(decay: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_{n+1} = decay_n * S_n + update_n over chunks: the state before each, and the last.

    update `[..., n, d_k, d_v]`, decay the same or with ones, state `[..., d_k, d_v]`. (`unbind`, because the
    gradient of each indexing would be a tensor of zeros of the full size.)
    """
    before = []
    for decay_n, update_n in zip(decay.unbind(-3), update.unbind(-3), strict=True):
        before.append(state)
        state = decay_n * state + update_n
    return torch.stack(before, dim=-3), state


def _in_chunks(q, k, v, log_decay, scores, *, scale, initial_state, chunk_size):
    """The body that both decays share; `scores(q, k, b)` are the decayed q_i . k_j inside a chunk."""
    check_chunk_size(chunk_size)
    dtype, length = working_dtype(q, k, v, log_decay, initial_state), v.shape[-2]
    scale = scale_or_default(scale, q)
    state = initial_state_or_zeros(k, v, initial_state, dtype)
    if length == 0:
        return v.clone(), fresh(state)
    chunk = min(chunk_size, length)
    q, k, values, b = (_to_chunks(x.to(dtype), chunk) for x in (scale * q, k, v, log_decay))
    b = b.cumsum(-2)  # log of the decay from the chunk's start to each row, this row's own included
    last = b[..., -1:, :]
    # Every exponent below is a log-decay over a span of time, so at most 0: nothing overflows.
    update = (k * (last - b).exp()).mT @ values
    before, state = _states_before_chunks(last.exp().mT, update, state)
    o = (q * b.exp()) @ before + scores(q, k, b) @ values
    return o.flatten(-3, -2)[..., :length, :].to(v.dtype), state


def _span(b: Tensor) -> Tensor:
    """exp(b_i - b_j) for i >= j, else 0, `[..., C, d]` -> `[..., C, C, d]`: masked before exp overflows."""
    rows = torch.arange(b.shape[-2], device=b.device)
    future = (rows[:, None] < rows).unsqueeze(-1)
    return (b.unsqueeze(-2) - b.unsqueeze(-3)).masked_fill(future, float("-inf")).exp()


def _scores_scalar(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    return (q @ k.mT) * _span(b).squeeze(-1)


def _scores_per_channel(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    return (q.unsqueeze(-2) * k.unsqueeze(-3) * _span(b)).sum(-1)


@without_autocast
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale=None,
    initial_state=None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """S_t = gamma_t S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, one decay gamma_t in (0, 1] a token and head.

    q, k `[..., L, d_k]`, v `[..., L, d_v]`, log_decay = log gamma `[..., L]` -> o `[..., L, d_v]` in v's
    dtype and the last state `[..., d_k, d_v]`, float32 at least. Any length. Inside a chunk q_i . k_j is
    multiplied by gamma_{j+1} ... gamma_i. Source: RetNet, Sun et al. 2023 (gamma constant in time).

        >>> q, k, v = (torch.randn(2, 10, 4) for _ in range(3))
        >>> o, state = retention(q, k, v, torch.full((2, 10), -0.1))
        >>> o.shape, state.shape
        (torch.Size([2, 10, 4]), torch.Size([2, 4, 4]))
    """
    check_sequence(q, k, v, initial_state)
    check_tensors(q=q, log_decay=log_decay)
    check_shape("log_decay", log_decay, "..., L", q.shape[:-1], "q")
    options = {"scale": scale, "initial_state": initial_state, "chunk_size": chunk_size}
    return _in_chunks(q, k, v, log_decay.unsqueeze(-1), _scores_scalar, **options)


@without_autocast
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale=None,
    initial_state=None,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, a decay alpha_t for each key channel.

    As `retention`, with log_decay = log alpha `[..., L, d_k]`. The decay from j to i differs by channel, so
    it cannot be taken out of q_i . k_j as one factor, and moving it into q and k as exp(b_i) and exp(-b_j)
    overflows. We form it by differences, `[C, C, d_k]` a chunk, which is why the chunk is small. Source:
    GLA, Yang et al. 2024 (their kernel does this for the diagonal tiles only).

        >>> q, k, v = (torch.randn(2, 10, 4) for _ in range(3))
        >>> o, state = gated_linear_attention(q, k, v, torch.rand(2, 10, 4).log())
        >>> o.shape, state.shape
        (torch.Size([2, 10, 4]), torch.Size([2, 4, 4]))
    """
    check_sequence(q, k, v, initial_state)
    check_tensors(q=q, log_decay=log_decay)
    check_shape("log_decay", log_decay, "..., L, d_k", q.shape, "q")
    options = {"scale": scale, "initial_state": initial_state, "chunk_size": chunk_size}
    return _in_chunks(q, k, v, log_decay, _scores_per_channel, **options)


def _scan_segment(x, delta, A, B, C, state, chunk: int) -> tuple[Tensor, Tensor]:
    """`selective_scan` of a stretch: all its chunks step by step at once, then from chunk to chunk."""
    length = x.shape[1]
    x, delta, B, C = (_to_chunks(t, min(chunk, length)) for t in (x, delta, B, C))
    a = (delta.unsqueeze(-1) * A).exp()  # [batch, n, chunk, channels, N], each in (0, 1]
    b = (delta * x).unsqueeze(-1) * B.unsqueeze(-2)
    inside = []  # h as if every chunk began at zero
    for a_t, b_t in zip(a.unbind(2), b.unbind(2), strict=True):
        inside.append(a_t * inside[-1] + b_t if inside else b_t)
    decay = (delta.cumsum(2).unsqueeze(-1) * A).exp()  # from the chunk's start
    before, state = _states_before_chunks(decay[:, :, -1], inside[-1], state)
    h = torch.stack(inside, dim=2) + decay * before.unsqueeze(2)
    return (h * C.unsqueeze(-2)).sum(-1).flatten(1, 2)[:, :length], state


def _check_scan(x, delta, A, B, C, initial_state) -> None:
    check_tensors(x=x, delta=delta, A=A, B=B, C=C, initial_state=initial_state)
    if x.dim() != 3:
        raise ValueError(f"x must be [B, L, D], got {list(x.shape)}")
    if A.dim() != 2 or A.shape[0] != x.shape[2]:
        raise ValueError(f"A must be [D, N] with D = {x.shape[2]} to match x, got {list(A.shape)}")
    check_shape("delta", delta, "B, L, D", x.shape, "x")
    for name, tensor in (("B", B), ("C", C)):
        check_shape(name, tensor, "B, L, N", (*x.shape[:2], A.shape[1]), "x and A")
    if initial_state is not None:
        check_shape("initial_state", initial_state, "B, D, N", (x.shape[0], *A.shape), "x and A")


@without_autocast
def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state=None, chunk_size=32
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T, y_t = h_t C_t: N states for each of D channels.

    x, delta `[B, L, D]` with delta >= 0; A `[D, N]` negative; B, C `[B, L, N]` -> y `[B, L, D]` in x's dtype
    and the last state `[B, D, N]`, float32 at least. The states h of all tokens are N times as large as x, so
    we go by stretches of 32 chunks, and where gradients are needed keep only the state between stretches and
    compute the rest again. Source: Mamba, Gu and Dao 2024.

        >>> x, B, C = torch.randn(1, 9, 3), torch.randn(1, 9, 2), torch.randn(1, 9, 2)
        >>> y, state = selective_scan(x, x.exp(), -torch.rand(3, 2), B, C)
        >>> y.shape, state.shape
        (torch.Size([1, 9, 3]), torch.Size([1, 3, 2]))
    """
    _check_scan(x, delta, A, B, C, initial_state)
    check_chunk_size(chunk_size)
    dtype = working_dtype(x, delta, A, B, C, initial_state)
    wide = [t.to(dtype) for t in (x, delta, B, C)]
    A = A.to(dtype)
    zeros = x.new_zeros(x.shape[0], *A.shape, dtype=dtype)
    state = zeros if initial_state is None else initial_state.to(dtype)
    if x.shape[1] == 0:
        return x.clone(), fresh(state)
    outputs = []
    for stretch in zip(*(t.split(32 * chunk_size, dim=1) for t in wide), strict=True):
        x_s, delta_s, B_s, C_s = stretch
        arguments = (x_s, delta_s, A, B_s, C_s, state, chunk_size)
        if torch.is_grad_enabled():
            y, state = checkpoint(_scan_segment, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_segment(*arguments)
        outputs.append(y)
    return torch.cat(outputs, dim=1).to(x.dtype), state


# ------------------------------------------------------------------------------------ recurrent mixers


class _RecurrentMixer(nn.Module):
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
        return [_split_heads(self._project(name, x, cache, documents), self.heads) for name in names]

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        """o `[B, L, H, d_v]` -> `[B, L, width]`."""
        o = self.norm(o.to(self.norm.weight.dtype)).to(x.dtype)
        if self.gate is not None:
            o = o * F.silu(_split_heads(self.gate(x), self.heads))
        return self.output(o.flatten(-2))

    def state_flops(self, length: int) -> float:
        """Forward operations a token on the states: a multiply and an add for the write and for the read."""
        return 4 * self.steps * self.heads * self.key_dim * self.value_dim


def _run(recurrence, sequences, cache: LayerCache | None, documents: Documents | None, steps: int = 1) -> Tensor:
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


class LinearAttention(_RecurrentMixer):
    """Linear attention in DeltaNet's place: S_t = S_{t-1} + k_t v_t^T, all else equal.

    `[B, L, width]` -> `[B, L, width]`. Options as `DeltaNet`. There is no normaliser: the norm of each head's
    output takes its place (Qin et al. 2022).

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
        head_dim = _head_dim(width, heads, head_dim)
        options = {"conv_size": conv_size, "output_gate": output_gate, "norm_eps": norm_eps, "steps": steps}
        super().__init__(width, heads, head_dim, head_dim, **options)
        self.activation = _choice("activation", activation, ACTIVATIONS)
        self.qk_norm = _choice("qk_norm", qk_norm, QK_NORMS)

    def _query_key_value(
        self, x: Tensor, cache: LayerCache | None, documents: Documents | None = None
    ) -> tuple[Tensor, ...]:
        """q, k, v `[B, steps L, H, d]`, a token's steps one after the other; q, k not normalised."""
        activation = ACTIVATIONS[self.activation]
        q, k, v = (self._project(name, x, cache, documents) for name in ("query", "key", "value"))
        # Only a token's last step is read, so what the earlier ones are asked does not matter.
        q = activation(_split_heads(q, self.heads)).repeat_interleave(self.steps, dim=1)
        return q, self._split_steps(activation(k)), self._split_steps(F.silu(v))

    def _split_steps(self, x: Tensor) -> Tensor:
        """`[B, L, steps H d]` -> `[B, steps L, H, d]`."""
        return x.unflatten(-1, (self.steps, self.heads, -1)).flatten(1, 2)

    def forward(self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        documents = _open(x, self.width, cache, cu_seqlens)
        q, k, v = self._query_key_value(x, cache, documents)
        q, k = QK_NORMS[self.qk_norm](q), QK_NORMS[self.qk_norm](k)
        o = _run(_linear_attention, (q, k, v), cache, documents, self.steps)
        return self._finish(o[:, self.steps - 1 :: self.steps], x)


@without_autocast
def _linear_attention(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`[B, L, H, d]` through chapter 1's function; a chunk of one token is one step of the recurrence."""
    o, state = chunkwise_linear_attention(*(t.transpose(1, 2) for t in (q, k, v)), initial_state=state)
    return o.transpose(1, 2), state


class DeltaNet(LinearAttention):
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
        backend: str = "auto",
        **options,
    ):
        super().__init__(width, heads, head_dim, **options)
        if not is_number(beta_range) or not 0 < beta_range <= 2:
            raise ValueError(f"beta_range must be in (0, 2], got {beta_range}")
        self.beta_range = beta_range
        self.backend = _choice("backend", backend, BACKENDS)
        self.beta = nn.Linear(width, self.steps * heads, bias=False)

    def forward(self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        documents = _open(x, self.width, cache, cu_seqlens)
        q, k, v = self._query_key_value(x, cache, documents)
        beta = self._split_steps(self.beta(x)).squeeze(-1)
        beta = self.beta_range * beta.to(working_dtype(beta)).sigmoid()
        if self.qk_norm == "l1":
            q, k = l1_norm(q), l1_norm(k)
        # For a single token the operator takes one step of the recurrence, whatever the backend.
        o, state = _delta_rule(
            q,
            k,
            v,
            beta,
            qk_l2norm=self.qk_norm == "l2",
            initial_state=None if cache is None else cache.get("state"),
            output_final_state=cache is not None,
            cu_seqlens=None if documents is None else documents.offsets * self.steps,
            backend=self.backend,
        )
        if cache is not None:
            cache["state"] = state
        return self._finish(o[:, self.steps - 1 :: self.steps], x)

    def state_flops(self, length: int) -> float:
        """As linear attention's, and a third product for what the state already returns for k."""
        return 6 * self.steps * self.heads * self.key_dim * self.value_dim


_delta_rule = without_autocast(delta_rule)


def _heads_first(function):
    """`function(q, k, v, log_decay)`, which takes `[B, H, L, ...]`, for tensors `[B, L, H, ...]` and a state."""

    def wrapped(*sequences_and_state):
        *sequences, state = sequences_and_state
        o, state = function(*(t.transpose(1, 2) for t in sequences), initial_state=state)
        return o.transpose(1, 2), state

    return wrapped


_retention, _gated_linear_attention = _heads_first(retention), _heads_first(gated_linear_attention)


class RetNet(_RecurrentMixer):
    """Retention (Sun et al. 2023): rotated q and k, a fixed decay 1 - 2^(-5-h) in head h, an output gate.

    `[B, L, width]` -> `[B, L, width]`. Keys and values have the same size here; the original doubles values.

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
    ):
        head_dim = _even(_head_dim(width, heads, head_dim))
        super().__init__(width, heads, head_dim, head_dim, conv_size=conv_size, output_gate=True, norm_eps=norm_eps)
        check_positive("rope_base", rope_base)
        self.rope_base = rope_base

    def forward(self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        documents = _open(x, self.width, cache, cu_seqlens)
        q, k, v = self._heads_of(x, cache, documents)
        positions = _positions(x, cache, documents)
        q, k = (rotary_embedding(t, positions, self.rope_base) for t in (q, k))
        head = torch.arange(self.heads, device=x.device, dtype=working_dtype(x))
        log_decay = torch.log1p(-(2.0 ** (-5 - head))).expand(x.shape[0], x.shape[1], -1)
        return self._finish(_run(_retention, (q, k, v, log_decay), cache, documents), x)

    def state_flops(self, length: int) -> float:
        """As linear attention's, and a multiply for the decay."""
        return 5 * self.heads * self.key_dim * self.value_dim


class GatedLinearAttention(_RecurrentMixer):
    """GLA (Yang et al. 2024): a decay for each key channel, computed from the token; an output gate.

    alpha = sigmoid(W_2 W_1 x + b)^(1/16) with an inner size of `rank`. Keys have half the size of values, as
    in the paper. `[B, L, width]` -> `[B, L, width]`.

        >>> GatedLinearAttention(width=32, heads=2)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        *,
        conv_size: int = 0,
        rank: int = 16,
        norm_eps: float = 1e-5,
    ):
        head_dim = _even(_head_dim(width, heads, head_dim))
        check_integer("rank", rank)
        super().__init__(
            width, heads, head_dim // 2, head_dim, conv_size=conv_size, output_gate=True, norm_eps=norm_eps
        )
        self.decay = nn.Sequential(
            nn.Linear(width, rank, bias=False), nn.Linear(rank, heads * (head_dim // 2), bias=True)
        )
        nn.init.zeros_(self.decay[1].bias)

    def forward(self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        documents = _open(x, self.width, cache, cu_seqlens)
        q, k, v = self._heads_of(x, cache, documents)
        z = _split_heads(self.decay(x), self.heads)
        log_decay = F.logsigmoid(z.to(working_dtype(z))) / 16
        return self._finish(_run(_gated_linear_attention, (q, k, v, log_decay), cache, documents), x)

    def state_flops(self, length: int) -> float:
        """As linear attention's, and a multiply for the decay."""
        return 5 * self.heads * self.key_dim * self.value_dim


class Mamba(nn.Module):
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

    def forward(self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        documents = _open(x, self.width, cache, cu_seqlens)
        x, z = self.input(x).chunk(2, dim=-1)
        x = F.silu(x if self.conv is None else self.conv(x, cache, cu_seqlens=documents))
        delta, B, C = self.select(x).split([self.rank, self.state_size, self.state_size], dim=-1)
        delta = self.delta(delta)
        delta = F.softplus(delta.to(working_dtype(delta)))
        A = -self.log_A.to(delta.dtype).exp()

        def scan(x, delta, B, C, state):
            return selective_scan(x, delta, A, B, C, initial_state=state)

        y = _run(scan, (x, delta, B, C), cache, documents)
        return self.output((y + self.D.to(x.dtype) * x) * F.silu(z))

    def state_flops(self, length: int) -> float:
        """A multiply by the decay, two multiplies and an add to write, a multiply and an add to read."""
        return 6 * self.channels * self.state_size


# ------------------------------------------------------------------------------------------ attention


def _even(head_dim: int) -> int:
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for this mixer, got {head_dim}")
    return head_dim


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


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents=None) -> Tensor:
    """Every row against every key, through torch's SDPA; what a row may not see is masked."""
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    everything = window is None or past + length <= window
    if everything and documents is None:
        # Asked in an `if`, so that a compiler with symbolic lengths decides it: SDPA wants a Python bool.
        if past == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if length == 1:
            return F.scaled_dot_product_attention(q, k, v)
    rows = torch.arange(past, past + length, device=q.device)[:, None]
    columns = torch.arange(past + length, device=q.device)
    mask = columns <= rows
    if not everything:
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
    rows = [t.transpose(1, 2).reshape(batch * length, *t.shape[1::2]) for t in (q, k, v)]
    size = (-1 if window is None else window - 1, 0)
    o = varlen_attn(*rows, offsets, offsets, length, length, window_size=size)
    return o.unflatten(0, (batch, length)).transpose(1, 2)


class Attention(nn.Module):
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
        self.head_dim = _even(_head_dim(width, heads, head_dim))
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(width, heads * self.head_dim, bias=False))
        self.output = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(self, x: Tensor, cache: LayerCache | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        documents = _open(x, self.width, cache, cu_seqlens)
        q, k, v = (_split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        positions = _positions(x, cache, documents)
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
