"""What every kernel shares: how a program finds its piece of the batch, how tiles are read, how dots are taken.

Tensors are read as `[tokens, H, d]`, where `tokens = B * L`: a batch of equal lengths and a packed batch of
variable lengths differ only in where a *segment* begins and ends.  A segment is what one program goes through, chunk
by chunk: a whole sequence or, when one long sequence is split among several programs, a stretch of it that is a
multiple of the chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.interpreter import INTERPRETS

INTERPRETED = tl.constexpr(INTERPRETS)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b, accumulated in float32.

    PRECISION ("ieee", "tf32") matters for float32 operands only.  The interpreter multiplies the bit
    patterns of bfloat16, so there the operands are converted first: same rounding of the operands, and the
    products of two bfloat16 numbers are exact in float32 as they are on the tensor cores.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def negative(x):
    """-x, by way of float32: the interpreter would negate the bit pattern of a bfloat16."""
    return (-x.to(tl.float32)).to(x.dtype)


@triton.jit
def segment_bounds(s, cu_seqlens, chunk_offsets, L, SEGMENT, SEGMENTS, C: tl.constexpr, VARLEN: tl.constexpr):
    """First token, end token (both counted over the whole batch) and first chunk of segment `s`."""
    if VARLEN:
        begin = tl.load(cu_seqlens + s).to(tl.int64)
        end = tl.load(cu_seqlens + s + 1).to(tl.int64)
        first_chunk = tl.load(chunk_offsets + s).to(tl.int64)
    else:
        b = (s // SEGMENTS).to(tl.int64)
        segment = s % SEGMENTS
        begin = b * L + segment * SEGMENT
        end = b * L + tl.minimum(L, (segment + 1) * SEGMENT)
        first_chunk = b * tl.cdiv(L, C) + segment * (SEGMENT // C)
    return begin, end, first_chunk


@triton.jit
def chunk_bounds(c, cu_seqlens, chunk_offsets, n_sequences, L, C: tl.constexpr, VARLEN: tl.constexpr):
    """First token of chunk `c` and how many of its C rows exist (none, past the last chunk).

    Chunks are counted over the whole batch.  With variable lengths the sequence is found by bisection in
    `chunk_offsets`, the running sum of the chunks of each sequence: no host code has to read the lengths.
    """
    if VARLEN:
        low = 0
        high = n_sequences
        while low < high:
            middle = (low + high + 1) // 2
            if tl.load(chunk_offsets + middle) <= c:
                low = middle
            else:
                high = middle - 1
        # Past the last chunk the bisection ends at n_sequences; empty sequences are skipped over.
        n = tl.minimum(low, n_sequences - 1)
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
        token = tl.load(cu_seqlens + n).to(tl.int64) + (c - tl.load(chunk_offsets + n)).to(tl.int64) * C
    else:
        chunks = tl.cdiv(L, C)
        b = (c // chunks).to(tl.int64)
        token = b * L + (c % chunks) * C
        end = (b + 1) * L
    return token, tl.minimum(tl.maximum(end - token, 0), C).to(tl.int32)


@triton.jit
def tile_mask(rows, n_rows, columns, D: tl.constexpr, BD: tl.constexpr):
    """Which entries of a tile exist.  The test on columns is compiled only where D is padded."""
    mask = (rows < n_rows)[:, None]
    if D % BD != 0:
        mask = mask & (columns < D)[None, :]
    return mask


@triton.jit
def load_tile(
    x, token, head, H, rows, n_rows, columns, D: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr = False, start=0
):
    """Rows `token + rows` of head `head` of a `[tokens, H, D]` tensor; zero where they don't exist.

    With TMA, x is a descriptor of the tensor as `[tokens, H D]`, and the copy engine of a Hopper GPU fetches the tile
    from column `start`: no thread computes an address.  The engine knows where the tensor ends but not where a
    sequence ends, so it is used only where every chunk is whole.
    """
    if TMA:
        return x.load([token.to(tl.int32), head * D + start])
    else:
        offsets = rows[:, None] * (H * D) + columns[None, :]
        mask = tile_mask(rows, n_rows, columns, D, BD)
        return tl.load(x + (token * H + head) * D + offsets, mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, value, token, head, H, rows, n_rows, columns, D: tl.constexpr, BD: tl.constexpr):
    """The counterpart of `load_tile`; converts to the tensor's dtype."""
    offsets = rows[:, None] * (H * D) + columns[None, :]
    mask = tile_mask(rows, n_rows, columns, D, BD)
    tl.store(ptr + (token * H + head) * D + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_scalars(ptr, token, head, H, rows, n_rows):
    """One float32 for each row, from a `[tokens, H]` tensor; zero where the row doesn't exist."""
    return tl.load(ptr + token * H + head + rows * H, mask=rows < n_rows, other=0.0).to(tl.float32)


@triton.jit
def kept_strength(strength, DTYPE: tl.constexpr):
    """What E is multiplied by in each row that the forward keeps for the backward: the strength, so that Vn is kept.

    The backward wants E = Vn / strength for dbeta even where nothing is written, so weak rows keep more than Vn.
    bfloat16 has the exponents of float32, and the relative error of a kept row does not depend on its size: rows below
    2^-40 keep 2^-40 E.  float16 has few exponents: rows below 2^-6 keep E, and their Vn is rounded twice.
    """
    if DTYPE == tl.bfloat16:  # noqa: SIM300 (Triton's dtypes are constants only to a linter)
        return tl.where(tl.abs(strength) >= 9.094947017729282e-13, strength, 9.094947017729282e-13)
    else:
        return tl.where(tl.abs(strength) >= 0.015625, strength, 1.0)


@triton.jit
def kept_factors(strength, DTYPE: tl.constexpr):
    """(a, b): Vn = a x and E = b x, where x is what the forward kept."""
    kept = kept_strength(strength, DTYPE)
    return strength / kept, 1.0 / kept


@triton.jit
def state_offsets(index, head, H, keys, values, K: tl.constexpr, V: tl.constexpr):
    """Offsets of a tile of the state `[index, head]` in an `[n, H, K, V]` tensor."""
    return (index * H + head) * K * V + keys[:, None] * V + values[None, :]


@triton.jit
def state_mask(keys, values, K: tl.constexpr, V: tl.constexpr):
    return (keys < K)[:, None] & (values < V)[None, :]


@triton.jit
def only_if(condition, mask):
    """`mask` where the scalar `condition` holds, else nothing.

    Not `mask & condition`: interpreters make int32 of a scalar and a block, which that of Triton 3.9 takes for no mask.
    """
    return tl.where(condition, mask, False)


@triton.jit
def load_state(
    x, index, head, H, keys, values, K: tl.constexpr, V: tl.constexpr, TMA: tl.constexpr = False,
    first_key=0, first_value=0,
):  # fmt: skip
    """A tile of the state `[index, head]` of an `[n, H, K, V]` tensor; with TMA, of a descriptor of `[n H K, V]`."""
    if TMA:
        return x.load([((index * H + head) * K + first_key).to(tl.int32), first_value])
    else:
        at = state_offsets(index, head, H, keys, values, K, V)
        return tl.load(x + at, mask=state_mask(keys, values, K, V), other=0.0)
