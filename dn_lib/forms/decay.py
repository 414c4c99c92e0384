"""Linear attention whose state decays: retention, gated linear attention, and Mamba's selective scan.

Shapes as in `linear_attention`.  What decays as a whole, or channel by channel, is computed in `gated`.
"""

from __future__ import annotations

import torch
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
    to_chunks,
    without_autocast,
    working_dtype,
)
from dn_lib.forms.gated import chunkwise_gated_linear_attention
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
def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, one log gate g_t <= 0 per token and head.

    `chunkwise_gated_linear_attention` of `dn_lib.forms.gated` for g `[..., L]` alone.  Inside a chunk q_i . k_j is
    multiplied by exp(g_{j+1} + ... + g_i).  Source: RetNet, Sun et al. 2023 (g constant in time).

        >>> q, k, v = (torch.randn(2, 10, 4) for _ in range(3))
        >>> o, state = retention(q, k, v, torch.full((2, 10), -0.1))
        >>> o.shape, state.shape
        (torch.Size([2, 10, 4]), torch.Size([2, 4, 4]))
    """
    check_sequence(q, k, v, initial_state, g=g)
    return chunkwise_gated_linear_attention(
        q, k, v, g, scale=scale, initial_state=initial_state, chunk_size=chunk_size
    )  # fmt: skip


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, a log gate for each key channel.

    As `retention`, with g `[..., L, d_k]`: the decay from j to i differs by channel, so it cannot be taken out of
    q_i . k_j as one factor (see `dn_lib.forms.gated.decayed_products`).  Source: GLA, Yang et al. 2024.

        >>> q, k, v = (torch.randn(2, 10, 4) for _ in range(3))
        >>> o, state = gated_linear_attention(q, k, v, torch.rand(2, 10, 4).log())
        >>> o.shape, state.shape
        (torch.Size([2, 10, 4]), torch.Size([2, 4, 4]))
    """
    check_inputs({"q": q, "k": k, "g": g}, {"v": v}, {}, {"initial_state": initial_state})
    return chunkwise_gated_linear_attention(
        q, k, v, g, scale=scale, initial_state=initial_state, chunk_size=chunk_size
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- selective scan
def _states_before_chunks(decay: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_{n+1} = decay_n * S_n + update_n over chunks, `[..., n, D, N]`: the state before each, and the last.

    (`unbind`, because the gradient of each indexing would be a tensor of zeros of the full size.)
    """
    before = []
    for decay_n, update_n in zip(decay.unbind(-3), update.unbind(-3), strict=True):
        before.append(state)
        state = decay_n * state + update_n
    return torch.stack(before, dim=-3), state


def _scan_segment(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of a stretch: all its chunks step by step at once, then from chunk to chunk."""
    length = x.shape[1]
    x, delta, B, C = (to_chunks(t, min(chunk, length)) for t in (x, delta, B, C))
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
