"""What a gate adds to the kernels: its sums within each chunk, and the ratios that they make.

Token i of a chunk has the log gate g_i <= 0, and b_i = g_1 + ... + g_i is the sum since the chunk began.  With
gamma_i = exp(b_i), what token j wrote has decayed by i to gamma_i / gamma_j = exp(b_i - b_j).

A gate of exactly zero, g = -inf, must give ratios of exactly zero and no NaN, as -inf minus -inf would.  So each g is
first raised to FLOOR = -128.  That changes no float32 result: exp(-128) is less than half of the smallest float32, so a
ratio whose span holds one such token is exp of at most -128, which is 0, as it should be; all others do not hold it.
(A floor under the *sum* would be wrong: after a reset in mid-chunk the later tokens' ratios to each other would be 1.)

A difference of sums loses digits where they are large: after a reset, b is near -128, and its float32 off by 2^-18.
So the sum is taken in float64 and kept as two float32, a high and a low part.  The difference of the high parts is
exact where it matters, and the low parts bring what they lack: exp(b_i - b_j) is right to a few units of float32 for
any gates.  That is 8 bytes per token and head.  In half precision the high parts do: 64 resets in one chunk make an
error of 2^-12, half of what float16 rounds off.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.common import chunk_bounds

FLOOR = tl.constexpr(-128.0)


@triton.jit(do_not_specialize=["n_sequences", "L", "H", "tokens"])
def gate_sums(
    g, sums, cu_seqlens, chunk_offsets, n_sequences, L, H, tokens,
    C: tl.constexpr, HEADS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """b of every token, `[H, tokens, 2]` float32, from g `[tokens, H]`; one program for each chunk and HEADS heads.

    Time is the inner axis, since the others read one head's tokens.
    """
    blocks = tl.cdiv(H, HEADS)
    pid = tl.program_id(0)
    token, left = chunk_bounds(pid // blocks, cu_seqlens, chunk_offsets, n_sequences, L, C, VARLEN)
    if left <= 0:
        return
    rows = tl.arange(0, C)
    heads = (pid % blocks) * HEADS + tl.arange(0, HEADS)
    inside = (rows < left)[:, None] & (heads < H)[None, :]
    at = (token + rows)[:, None] * H + heads[None, :]
    x = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x < FLOOR, FLOOR, x)  # which leaves NaN as it is
    b = tl.cumsum(x.to(tl.float64), 0)
    high = b.to(tl.float32)
    at = heads.to(tl.int64)[None, :] * tokens + (token + rows)[:, None]
    tl.store(sums + 2 * at, high, mask=inside)
    tl.store(sums + 2 * at + 1, (b - high.to(tl.float64)).to(tl.float32), mask=inside)


@triton.jit
def load_sums(sums, token, head, tokens, rows, left):
    """b of a chunk's tokens and of its last one, each as a high and a low part; zero where the row doesn't exist."""
    at = sums + 2 * (head.to(tl.int64) * tokens + token)
    there = rows < left
    high = tl.load(at + 2 * rows, mask=there, other=0.0)
    low = tl.load(at + 2 * rows + 1, mask=there, other=0.0)
    # As a block of one, since interpreters pass over the `other` of a scalar.
    one = tl.arange(0, 1)
    last = at + 2 * (left - 1 + one)
    last_high = tl.sum(tl.load(last, mask=one < left, other=0.0), axis=0)
    return high, low, last_high, tl.sum(tl.load(last + 1, mask=one < left, other=0.0), axis=0)


@triton.jit
def decays(high, low, last_high, last_low):
    """gamma_i, gamma_C / gamma_i and gamma_C: from the chunk's start, till its end, and over all of it."""
    # Rows that don't exist have b = 0 and no values; no exponent is above 0.
    to_end = tl.exp(tl.minimum((last_high - high) + (last_low - low), 0.0))
    return tl.exp(high), to_end, tl.exp(last_high)


@triton.jit
def ratios(high, low, rows, DTYPE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """gamma_i / gamma_j at [i, j] for j <= i, else 0: `[C]` -> `[C, C]`.  TRANSPOSED: at [j, i].  DTYPE: of q, k, v."""
    span = high[:, None] - high[None, :]
    if DTYPE == tl.float32:  # noqa: SIM300 (Triton's dtypes are constants only to a linter)
        span += low[:, None] - low[None, :]
    there = rows[:, None] >= rows[None, :]
    if TRANSPOSED:
        span = -span
        there = rows[:, None] <= rows[None, :]
    return tl.where(there, tl.exp(tl.minimum(span, 0.0)), 0.0)


@triton.jit
def key_head(head, H, GROUP: tl.constexpr):
    """The key head that value head `head` reads, and how many key heads there are: one for GROUP value heads."""
    if GROUP > 1:
        return head // GROUP, H // GROUP
    else:
        return head, H
