"""What the kernels of this folder share: sub-chunks of SUB rows, and the sums of log gates that decays are made of.

Token i has the log gates g_i `[K]`, one for each key channel, all at most 0 and -inf allowed.  What token j wrote has
decayed by i to exp(g_{j+1} + ... + g_i), channel by channel.  Such a span is cut at the borders of sub-chunks, and each
piece is a *sum* of gates: of a row and those before it in its sub-chunk (`from_start`), of the rows behind it
(`till_end`), or of whole sub-chunks.  Nothing is subtracted.  So no exponent is above 0, a gate of zero makes factors
of exactly 0 and no NaN, and strong decay costs no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.common import load_tile, only_if


@triton.jit
def load_row(x, token, head, H, there, columns, D: tl.constexpr):
    """One row of a `[tokens, H, D]` tensor in float32; zero unless `there` and where a column doesn't exist."""
    at = x + (token * H + head) * D + columns
    return tl.load(at, mask=only_if(there, columns < D), other=0.0).to(tl.float32)


@triton.jit
def gate_total(g, token, head, H, rows, left, columns, K: tl.constexpr, BK: tl.constexpr):
    """The sum of the log gates of rows `token + rows`, of which `left` exist."""
    return tl.sum(load_tile(g, token, head, H, rows, left, columns, K, BK).to(tl.float32), axis=0)


@triton.jit
def from_start(g, token, head, H, rows, left, columns, K: tl.constexpr, BK: tl.constexpr):
    """Sums of the log gates over each of the rows `token + rows` and those before it."""
    return tl.cumsum(load_tile(g, token, head, H, rows, left, columns, K, BK).to(tl.float32), 0)


@triton.jit
def till_end(g, token, head, H, back, left, columns, K: tl.constexpr, BK: tl.constexpr):
    """Sums of the log gates over the rows behind each of `token + back`, of which `left` exist.

    back: row numbers from the last to the first, since a scan from the end takes far more shuffles than one from the
    beginning.
    """
    return tl.cumsum(load_tile(g, token + 1, head, H, back, left - 1, columns, K, BK).to(tl.float32), 0)


@triton.jit
def load_whole(whole, chunk, head, H, columns, K: tl.constexpr):
    """The decay over a whole chunk: a row of a `[chunks, H, K]` tensor of float32."""
    return tl.load(whole + (chunk * H + head) * K + columns, mask=columns < K, other=0.0)


@triton.jit
def load_scores(scores, token, head, H, rows, left, C: tl.constexpr):
    """A of a chunk `[C, C]`: what lies above the diagonal is not read."""
    there = (rows < left)[:, None] & (rows[:, None] >= rows[None, :])
    at = scores + (token * H + head) * C + rows[:, None] * (H * C) + rows[None, :]
    return tl.load(at, mask=there, other=0.0)
