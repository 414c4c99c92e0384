"""Forward: `chunk_inverse` writes N for every chunk, `walk` carries the state through a segment.

In our notation, for one chunk with input state S (the row index is time, D = diag(beta)):

    L = tril(K K^T, -1)           N = -(I + L D)^{-1} L
    R = V - K S                   E = R + N (D R)          the error that each write sees
    O = scale (Q S + tril(Q K^T) D E)
    S' = S + K^T D E              D E is U - W S of the chunkwise form

Keys and queries that are to be normalised are never written: with k_i = r_i x_i, the scalar r_i moves to the
rows of whatever multiplies K, so that the tiles go to the tensor cores as they were read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.common import (
    chunk_bounds,
    dot,
    load_scalars,
    load_tile,
    segment_bounds,
    state_mask,
    state_offsets,
    store_tile,
)
from dn_lib.kernels.inverse import scaled_inverse


@triton.jit
def inverse_norm(x, EPS: tl.constexpr):
    """1 / |x_i| for each row, in float32: rsqrt(sum x^2 + eps)."""
    x = x.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(x * x, axis=1) + EPS)


@triton.jit
def chunk_N(k, beta, k_norm, C: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr):
    """N of a chunk from its keys `[C, BK]`, beta `[C]` and, if NORM, 1/|k| `[C]`."""
    gram = dot(k, tl.trans(k), PRECISION)
    if NORM:
        gram = gram * k_norm[:, None] * k_norm[None, :]
    i = tl.arange(0, C)
    L = tl.where(i[:, None] > i[None, :], gram, 0.0)
    return scaled_inverse(L, beta, C, PRECISION, HALF)


@triton.jit(do_not_specialize=["n_sequences", "L", "H"])
def chunk_inverse(
    q, k, beta, n, q_norm, k_norm, cu_seqlens, chunk_offsets, n_sequences, L, H,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Writes N `[tokens, H, C]` (row i of a chunk's matrix at its token i); if NORM also 1/|q|, 1/|k| `[tokens, H]`.

    One program for each chunk and head.  Reads 2 K bytes a token and head in half precision, writes 2 C.
    """
    pid = tl.program_id(0)
    head = pid % H
    token, rows_left = chunk_bounds(pid // H, cu_seqlens, chunk_offsets, n_sequences, L, C, VARLEN)
    if rows_left <= 0:
        return
    rows = tl.arange(0, C)
    keys = tl.arange(0, BK)
    k_tile = load_tile(k, token, head, H, rows, rows_left, keys, K, BK)
    b = load_scalars(beta, token, head, H, rows, rows_left)
    k_scale = b
    if NORM:
        k_scale = inverse_norm(k_tile, EPS)
        q_tile = load_tile(q, token, head, H, rows, rows_left, keys, K, BK)
        at = token * H + head + rows * H
        tl.store(k_norm + at, k_scale, mask=rows < rows_left)
        tl.store(q_norm + at, inverse_norm(q_tile, EPS), mask=rows < rows_left)
    N = chunk_N(k_tile, b, k_scale, C, PRECISION, HALF, NORM)
    store_tile(n, N, token, head, H, rows, rows_left, rows, C, C)


@triton.jit(do_not_specialize=["L", "H", "SEGMENT", "SEGMENTS"])
def walk(
    q, k, v, beta, n, q_norm, k_norm, o, e, state_in, state_out, transition, cu_seqlens, chunk_offsets,
    scale, L, H, SEGMENT, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    FUSED: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr, TRANSITION: tl.constexpr,
    STATE_IN: tl.constexpr, STATE_OUT: tl.constexpr, VARLEN: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Carries the state through a segment, chunk by chunk, for one head and BV value channels.

    state_in, state_out: `[segments, H, K, V]` float32.  OUTPUT: writes o.  SAVE: writes E for the backward.
    FUSED: computes N here instead of reading what `chunk_inverse` wrote, where nobody will ask for it again.
    TRANSITION: further programs carry the identity in place of a state, with values zero; where they end is
    M = prod (I - K^T W), the matrix by which the segment multiplies its input state.
    A token and head moves 2 (2 K + 2 V) bytes and, unless FUSED, 2 C for N, in half precision; q, k and N once
    for every V / BV.
    """
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    KEY_BLOCKS: tl.constexpr = (K + BV - 1) // BV
    COLUMN_BLOCKS: tl.constexpr = VALUE_BLOCKS + KEY_BLOCKS if TRANSITION else VALUE_BLOCKS
    pid = tl.program_id(0)
    block = pid % COLUMN_BLOCKS
    head = (pid // COLUMN_BLOCKS) % H
    s = pid // (COLUMN_BLOCKS * H)
    begin, end, _ = segment_bounds(s, cu_seqlens, chunk_offsets, L, SEGMENT, SEGMENTS, C, VARLEN)

    rows = tl.arange(0, C)
    keys = tl.arange(0, BK)
    values = block * BV + tl.arange(0, BV)
    causal = rows[:, None] >= rows[None, :]
    is_transition = block >= VALUE_BLOCKS
    S = tl.zeros([BK, BV], dtype=tl.float32)
    if TRANSITION:
        columns = values - VALUE_BLOCKS * BV
        if is_transition:
            S = tl.where(keys[:, None] == columns[None, :], 1.0, 0.0)
    at = state_offsets(s.to(tl.int64), head, H, keys, values, K, V)
    inside = state_mask(keys, values, K, V)
    if STATE_IN:
        S = tl.load(state_in + at, mask=inside, other=0.0).to(tl.float32)

    for i in tl.range(0, tl.cdiv(end - begin, C).to(tl.int32), num_stages=STAGES):
        token = begin + i * C
        left = tl.minimum(end - token, C).to(tl.int32)
        k_tile = load_tile(k, token, head, H, rows, left, keys, K, BK, TMA)
        if TRANSITION:
            there, first_value = tl.where(is_transition, 0, left), tl.where(is_transition, 0, block * BV)
            v_tile = load_tile(v, token, head, H, rows, there, values, V, BV, TMA, first_value)
            v_tile = tl.where(is_transition, 0.0, v_tile).to(k_tile.dtype)
        else:
            v_tile = load_tile(v, token, head, H, rows, left, values, V, BV, TMA, block * BV)
        b = load_scalars(beta, token, head, H, rows, left)
        k_scale = b
        if NORM:
            if FUSED:
                k_scale = inverse_norm(k_tile, EPS)
            else:
                k_scale = load_scalars(k_norm, token, head, H, rows, left)
        if FUSED:
            N = chunk_N(k_tile, b, k_scale, C, PRECISION, HALF, NORM).to(k_tile.dtype)
        else:
            N = load_tile(n, token, head, H, rows, left, rows, C, C, TMA)
        S_low = S.to(k_tile.dtype)
        # R = V - K S;  E = R + N D R
        read = dot(k_tile, S_low, PRECISION)
        if NORM:
            read = read * k_scale[:, None]
        R = v_tile.to(tl.float32) - read
        E = (R + dot(N, (b[:, None] * R).to(k_tile.dtype), PRECISION)).to(k_tile.dtype)
        Vn = (b[:, None] * E.to(tl.float32)).to(k_tile.dtype)
        if SAVE:
            store_tile(e, E, token, head, H, rows, left, values, V, BV)
        if OUTPUT:
            # O = scale (Q S + tril(Q K^T) D E)
            q_tile = load_tile(q, token, head, H, rows, left, keys, K, BK, TMA)
            P = dot(q_tile, tl.trans(k_tile), PRECISION)
            if NORM:
                P = P * k_scale[None, :]
            P = tl.where(causal, P, 0.0)
            O = dot(q_tile, S_low, PRECISION) + dot(P.to(k_tile.dtype), Vn, PRECISION)
            if NORM:
                if FUSED:
                    q_scale = inverse_norm(q_tile, EPS)
                else:
                    q_scale = load_scalars(q_norm, token, head, H, rows, left)
                O = O * q_scale[:, None]
            store_tile(o, O * scale, token, head, H, rows, left, values, V, BV)
        # S' = S + K^T D E
        if NORM:
            S += dot(tl.trans(k_tile), (k_scale[:, None] * Vn.to(tl.float32)).to(k_tile.dtype), PRECISION)
        else:
            S += dot(tl.trans(k_tile), Vn, PRECISION)

    if STATE_OUT:
        tl.store(state_out + at, S, mask=inside)
    if TRANSITION:
        if is_transition:
            at_key = state_offsets(s.to(tl.int64), head, H, keys, columns, K, K)
            tl.store(transition + at_key, S, mask=state_mask(keys, columns, K, K))


@triton.jit(do_not_specialize=["H", "SEGMENTS"])
def merge(
    transition, local, states, first, H, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chains the affine maps of a sequence's segments: states[s+1] = M_s states[s] + X_s, in float32.

    transition (M): `[B * SEGMENTS, H, K, K]`; local (X) and states: `[B * SEGMENTS, H, K, V]`; first: the
    state (or gradient) that enters, `[B, H, K, V]`.  REVERSE: from the last segment to the first, with M^T.
    One program for each sequence, head and BV value channels.
    """
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    values = (pid % VALUE_BLOCKS) * BV + tl.arange(0, BV)
    head = (pid // VALUE_BLOCKS) % H
    b = (pid // (VALUE_BLOCKS * H)).to(tl.int64)
    keys = tl.arange(0, BK)
    S = tl.zeros([BK, BV], dtype=tl.float32)
    if FIRST:
        at = state_offsets(b, head, H, keys, values, K, V)
        S = tl.load(first + at, mask=state_mask(keys, values, K, V), other=0.0).to(tl.float32)
    for step in range(SEGMENTS):
        part = SEGMENTS - 1 - step if REVERSE else step
        index = b * SEGMENTS + part
        at = state_offsets(index, head, H, keys, values, K, V)
        inside = state_mask(keys, values, K, V)
        tl.store(states + at, S, mask=inside)
        tl.debug_barrier()  # the rows written above are read back below by other threads of this program
        S = tl.load(local + at, mask=inside, other=0.0)
        for start in tl.static_range(0, BK, BLOCK):
            inner = start + tl.arange(0, BLOCK)
            if REVERSE:
                at_M = state_offsets(index, head, H, inner, keys, K, K)
                M = tl.trans(tl.load(transition + at_M, mask=state_mask(inner, keys, K, K), other=0.0))
            else:
                at_M = state_offsets(index, head, H, keys, inner, K, K)
                M = tl.load(transition + at_M, mask=state_mask(keys, inner, K, K), other=0.0)
            at_S = state_offsets(index, head, H, inner, values, K, V)
            piece = tl.load(states + at_S, mask=state_mask(inner, values, K, V), other=0.0)
            S += dot(M, piece, PRECISION)
