"""Linear attention whose state decays: retention, gated linear attention, and Mamba's selective scan.

Shapes as in `linear_attention`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dn_lib.forms.common import (
    check_chunk_size,
    check_inputs,
    check_sequence,
    check_shape,
    check_tensors,
    fresh,
    initial_state_or_zeros,
    over_time,
    scale_or_default,
    without_autocast,
    working_dtype,
)
from dn_lib.forms.linear_attention import stacked, write_and_read


# --- Signpost: decay ------------------------------------------------------------------------------------
def recurrent_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention whose state fades: S_t = Diag(decay_t) S_{t-1} + k_t v_t^T.

    Implements eq-gated-decay; with one constant in every entry of `decay`, eq-fixed-decay.  decay is
    `[..., L, d_k]`, in [0, 1]; the rest as `recurrent_linear_attention`.

    >>> o, state = recurrent_decay_attention(*torch.randn(3, 10, 4).unbind(0), torch.full((10, 4), 0.9))
    >>> o.shape, state.shape
    (torch.Size([10, 4]), torch.Size([4, 4]))
    """
    check_inputs({"q": q, "k": k, "decay": decay}, {"v": v}, {}, {"initial_state": initial_state})
    dtype = working_dtype(q, k, v, decay, initial_state)
    state = initial_state_or_zeros(k, v, initial_state, dtype)
    scale, outputs = scale_or_default(scale, q), []
    for q_t, k_t, v_t, alpha_t in over_time(*(x.to(dtype) for x in (q, k, v, decay))):
        o, state = write_and_read(q_t, k_t, v_t, alpha_t[..., :, None] * state, scale)
        outputs.append(o)
    return stacked(outputs, v, state)


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


def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scores: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    scale: float | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
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
    scale: float | None = None,
    initial_state: Tensor | None = None,
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
    check_sequence(q, k, v, initial_state, log_decay=log_decay)
    decay = log_decay.unsqueeze(-1)
    return _in_chunks(q, k, v, decay, _scores_scalar, scale=scale, initial_state=initial_state, chunk_size=chunk_size)


@without_autocast
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
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
    check_inputs({"q": q, "k": k, "log_decay": log_decay}, {"v": v}, {}, {"initial_state": initial_state})
    return _in_chunks(
        q, k, v, log_decay, _scores_per_channel, scale=scale, initial_state=initial_state, chunk_size=chunk_size
    )


def _scan_segment(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
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


def _check_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None) -> None:
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
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 32,
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
