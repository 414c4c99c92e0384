"""Forward: `chunk_inverse` writes N for every chunk, `chunk_scan_fwd` carries the state through a segment.

In our notation, for one chunk with input state S (the row index is time, D = diag(beta)):

    B = tril(K K^T, -1)           N = -(I + B D)^{-1} B
    R = V - K S                   E = R + N (D R)          the error that each write sees
    O = scale (Q S + tril(Q K^T) D E)
    S' = S + K^T D E              D E is U - W S of the chunkwise form

With GATE, a log gate g per token, gamma_i is the product of the gates since the chunk began, and what token j wrote
counts gamma_i / gamma_j at token i (`ratios` in `gates.py`; * is entry by entry).  The same quantities are then:

    of B: tril(K K^T * ratios, -1)      of R: V - gamma (K S)
    of O: scale (gamma (Q S) + tril(Q K^T * ratios) D E)
    of S': gamma_C S + K^T (gamma_C / gamma) D E

Without ERASE, linear attention, D E is V: no N, no beta, and no step waits for K S.

q and k may have fewer heads than v: value head h reads key head h // GROUP, by index.  beta, the gates, N and the
states belong to value heads, of which there are H.

Keys and queries that are to be normalised are never written: with k_i = r_i x_i, the scalar r_i moves to the
rows of what K is multiplied by or with (K S, D E, O), so that the tiles go to the tensor cores as they were read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.common import (
    chunk_bounds,
    dot,
    kept_strength,
    load_scalars,
    load_tile,
    only_if,
    segment_bounds,
    state_mask,
    state_offsets,
    store_tile,
)
from dn_lib.kernels.delta_rule.gates import decays, key_head, load_sums, ratios
from dn_lib.kernels.inverse import scaled_inverse


@triton.jit(do_not_specialize=["total"])
def inverse_norms(
    q, k, q_norm, k_norm, total, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr
):
    """1 / |q|, 1 / |k| `[tokens, H]` in float32: rsqrt(sum x^2 + eps), for ROWS of the `total` rows of K channels."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keys = tl.arange(0, BK)
    at = rows[:, None] * K + keys[None, :]
    inside = (rows < total)[:, None] & (keys < K)[None, :]
    q_tile = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
    k_tile = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(q_norm + rows, 1.0 / tl.sqrt(tl.sum(q_tile * q_tile, axis=1) + EPS), mask=rows < total)
    tl.store(k_norm + rows, 1.0 / tl.sqrt(tl.sum(k_tile * k_tile, axis=1) + EPS), mask=rows < total)


@triton.jit(do_not_specialize=["n_sequences", "L", "H", "tokens"])
def chunk_inverse(
    k, beta, n, k_norm, sums, cu_seqlens, chunk_offsets, n_sequences, L, H, tokens,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, GROUP: tl.constexpr, VARLEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes N `[tokens, H, C]`: row i of a chunk's matrix at its token i.

    One program for each chunk and head.  In half precision it reads 2 K bytes and writes 2 C bytes per token and head.
    INVERSE: the precision of the recursion on N, see `inverse.py`.
    """
    pid = tl.program_id(0)
    head = pid % H
    token, rows_left = chunk_bounds(pid // H, cu_seqlens, chunk_offsets, n_sequences, L, C, VARLEN)
    if rows_left <= 0:
        return
    key, KEY_HEADS = key_head(head, H, GROUP)
    rows = tl.arange(0, C)
    b = load_scalars(beta, token, head, H, rows, rows_left)
    gram = tl.zeros([C, C], dtype=tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k_tile = load_tile(k, token, key, KEY_HEADS, rows, rows_left, start + tl.arange(0, BK), K, BK)
        gram += dot(k_tile, tl.trans(k_tile), PRECISION)
    if NORM:
        k_scale = load_scalars(k_norm, token, key, KEY_HEADS, rows, rows_left)
        gram = gram * k_scale[:, None] * k_scale[None, :]
    if GATE:
        high, low, _, _ = load_sums(sums, token, head, tokens, rows, rows_left)
        gram = gram * ratios(high, low, rows, k.dtype.element_ty, False)
    # B = tril(K K^T, -1);  N = -(I + B D)^{-1} B
    N = scaled_inverse(tl.where(rows[:, None] > rows[None, :], gram, 0.0), b, C, INVERSE)
    store_tile(n, N, token, head, H, rows, rows_left, rows, C, C)


@triton.jit(do_not_specialize=["L", "H", "SEGMENT", "SEGMENTS", "tokens"])
def chunk_scan_fwd(
    q, k, v, beta, n, q_norm, k_norm, sums, o, pseudo, states, state_in, state_out, transition,
    cu_seqlens, chunk_offsets, scale, L, H, SEGMENT, SEGMENTS, tokens,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr, GROUP: tl.constexpr,
    OUTPUT: tl.constexpr, SAVE: tl.constexpr, STATES: tl.constexpr, TRANSITION: tl.constexpr,
    STATE_IN: tl.constexpr, STATE_OUT: tl.constexpr, VARLEN: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Carries the state through a segment, chunk by chunk, for one head and BV value channels.

    state_in, state_out: `[segments, H, K, V]` float32.  OUTPUT: writes o.
    SAVE: writes Vn for the backward, and more in weak rows, see `kept_strength`.
    STATES: writes the state that enters each chunk.
    TRANSITION: the first pass over a split sequence, without its last segment.  The first segment starts from
    the true state.  For each of the others further programs carry the identity in place of a state, with values of
    zero.  They end with M = prod (I - K^T W), the matrix by which the segment multiplies its input state (with gates,
    prod (gamma_C I - K^T (gamma_C / gamma) W)).  Without erasure M is a number times I, and only that is written.
    In half precision 2 (2 K + 2 V + C) bytes move per token and head; q, k and N are read once per block of values.
    """
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    KEY_BLOCKS: tl.constexpr = (K + BV - 1) // BV
    COLUMNS: tl.constexpr = TRANSITION and ERASE  # whether there are programs for M
    COLUMN_BLOCKS: tl.constexpr = VALUE_BLOCKS + KEY_BLOCKS if COLUMNS else VALUE_BLOCKS
    # Q S comes right after K S: then S's copy in shared memory is free for later tiles.  With 256 key channels
    # registers are scarcer than shared memory, and Q S waits.
    EARLY: tl.constexpr = OUTPUT and BK <= 128
    pid = tl.program_id(0)
    block = pid % COLUMN_BLOCKS
    head = (pid // COLUMN_BLOCKS) % H
    key, KEY_HEADS = key_head(head, H, GROUP)
    s = pid // (COLUMN_BLOCKS * H)
    from_state = s
    is_first = False
    if TRANSITION:
        from_state = s // (SEGMENTS - 1)
        segment = s % (SEGMENTS - 1)
        s = from_state * SEGMENTS + segment
        is_first = segment == 0
    if COLUMNS:
        is_transition = block >= VALUE_BLOCKS
        if is_transition & is_first:
            return
    begin, end, first_chunk = segment_bounds(s, cu_seqlens, chunk_offsets, L, SEGMENT, SEGMENTS, C, VARLEN)

    rows = tl.arange(0, C)
    keys = tl.arange(0, BK)
    values = block * BV + tl.arange(0, BV)
    causal = rows[:, None] >= rows[None, :]
    inside = state_mask(keys, values, K, V)
    S = tl.zeros([BK, BV], dtype=tl.float32)
    if STATE_IN:
        at = state_offsets(from_state.to(tl.int64), head, H, keys, values, K, V)
        known = only_if(is_first, inside) if TRANSITION else inside
        S = tl.load(state_in + at, mask=known, other=0.0).to(tl.float32)
    if COLUMNS:
        columns = values - VALUE_BLOCKS * BV
        if is_transition:
            S = tl.where(keys[:, None] == columns[None, :], 1.0, 0.0)

    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    factor = tl.full([], 1.0, dtype=tl.float32)
    if STATES:
        at_chunk = states + state_offsets(first_chunk, head, H, keys, values, K, V)
        tl.store(at_chunk, S.to(states.dtype.element_ty), mask=only_if(chunks > 0, inside))
    if GATE:  # fetched one chunk ahead
        ahead = tl.minimum(tl.maximum(end - begin, 0), C).to(tl.int32)
        high, low, last_high, last_low = load_sums(sums, begin, head, tokens, rows, ahead)
    for i in tl.range(0, chunks, num_stages=STAGES):
        token = begin + i * C
        left = tl.minimum(end - token, C).to(tl.int32)
        k_tile = load_tile(k, token, key, KEY_HEADS, rows, left, keys, K, BK, TMA)
        if COLUMNS:
            there, first_value = tl.where(is_transition, 0, left), tl.where(is_transition, 0, block * BV)
            v_tile = load_tile(v, token, head, H, rows, there, values, V, BV, TMA, first_value)
            v_tile = tl.where(is_transition, 0.0, v_tile).to(k_tile.dtype)
        else:
            v_tile = load_tile(v, token, head, H, rows, left, values, V, BV, TMA, block * BV)
        if ERASE:
            b = load_scalars(beta, token, head, H, rows, left)
            N = load_tile(n, token, head, H, rows, left, rows, C, C, TMA)
        if NORM:
            k_scale = load_scalars(k_norm, token, key, KEY_HEADS, rows, left)
        if GATE:
            gamma, to_end, whole = decays(high, low, last_high, last_low)
        S_low = S.to(k_tile.dtype)
        if ERASE:
            read = dot(k_tile, S_low, PRECISION)
        if EARLY:
            q_tile = load_tile(q, token, key, KEY_HEADS, rows, left, keys, K, BK, TMA)
            O = dot(q_tile, S_low, PRECISION)
            if GATE:
                O = O * gamma[:, None]
        if ERASE:
            # R = V - K S, with a gate V - gamma (K S);  E = R + N D R
            if NORM:
                read = read * k_scale[:, None]
            if GATE:
                read = read * gamma[:, None]
            R = v_tile.to(tl.float32) - read
            E = R + dot(N, (b[:, None] * R).to(k_tile.dtype), PRECISION)
            strength = b * k_scale if NORM else b
            written = strength[:, None] * E
            Vn = written.to(k_tile.dtype)
            if SAVE:
                kept = kept_strength(strength, k_tile.dtype)[:, None] * E
                store_tile(pseudo, kept.to(k_tile.dtype), token, head, H, rows, left, values, V, BV)
        else:
            written = k_scale[:, None] * v_tile.to(tl.float32) if NORM else v_tile.to(tl.float32)
            Vn = written.to(k_tile.dtype)
        if OUTPUT:
            # O = scale (Q S + tril(Q K^T) D E), each with its gates
            if not EARLY:
                q_tile = load_tile(q, token, key, KEY_HEADS, rows, left, keys, K, BK, TMA)
            P = dot(q_tile, tl.trans(k_tile), PRECISION)
            if GATE:
                P = (P * ratios(high, low, rows, k_tile.dtype, False)).to(k_tile.dtype)
                if not EARLY:
                    O = dot(q_tile, S_low, PRECISION) * gamma[:, None]
                O += dot(P, Vn, PRECISION)
            else:
                P = tl.where(causal, P, 0.0).to(k_tile.dtype)
                if EARLY:
                    O += dot(P, Vn, PRECISION)
                else:
                    O = dot(q_tile, S_low, PRECISION) + dot(P, Vn, PRECISION)
            if NORM:
                O = O * load_scalars(q_norm, token, key, KEY_HEADS, rows, left)[:, None]
            store_tile(o, O * scale, token, head, H, rows, left, values, V, BV)
        # S' = S + K^T D E, each with its gates
        if GATE:
            Vn = (to_end[:, None] * written).to(k_tile.dtype)
            S = S * whole
            if TRANSITION and not ERASE:
                factor *= whole
            after = tl.minimum(tl.maximum(end - token - C, 0), C).to(tl.int32)
            high, low, last_high, last_low = load_sums(sums, token + C, head, tokens, rows, after)
        S += dot(tl.trans(k_tile), Vn, PRECISION)

        if STATES:  # the state that enters the next chunk
            at_chunk = states + state_offsets(first_chunk + i + 1, head, H, keys, values, K, V)
            tl.store(at_chunk, S.to(k_tile.dtype), mask=only_if(i + 1 < chunks, inside))

    if STATE_OUT:
        tl.store(state_out + state_offsets(s.to(tl.int64), head, H, keys, values, K, V), S, mask=inside)
    if COLUMNS:
        if is_transition:
            at_key = state_offsets(s.to(tl.int64), head, H, keys, columns, K, K)
            tl.store(transition + at_key, S, mask=state_mask(keys, columns, K, K))
    if TRANSITION and not ERASE:
        if block == 0:
            tl.store(transition + s * H + head, factor)


@triton.jit(do_not_specialize=["H", "SEGMENTS"])
def merge_segments(
    transition, local, states, first, H, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chains the affine maps of a sequence's segments: states[s+1] = M_s states[s] + X_s, in float32.

    transition (M): `[B * SEGMENTS, H, K, K]`, or `[B * SEGMENTS, H]` without erasure; local (X) and states:
    `[B * SEGMENTS, H, K, V]`; first: the state (or gradient) that enters, `[B, H, K, V]`.  REVERSE: from the last
    segment to the first, with M^T.
    The X of the first segment already holds what enters, and nothing follows the last segment: neither M is needed.
    One program for each sequence, head and BV value channels.
    """
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    values = (pid % VALUE_BLOCKS) * BV + tl.arange(0, BV)
    head = (pid // VALUE_BLOCKS) % H
    b = (pid // (VALUE_BLOCKS * H)).to(tl.int64)
    keys = tl.arange(0, BK)
    inside = state_mask(keys, values, K, V)
    S = tl.zeros([BK, BV], dtype=tl.float32)
    if FIRST:
        S = tl.load(first + state_offsets(b, head, H, keys, values, K, V), mask=inside, other=0.0).to(tl.float32)
    for step in range(SEGMENTS):
        segment = SEGMENTS - 1 - step if REVERSE else step
        index = b * SEGMENTS + segment
        at = state_offsets(index, head, H, keys, values, K, V)
        tl.store(states + at, S, mask=inside)
        if step < SEGMENTS - 1:
            if ERASE:
                tl.debug_barrier()  # the rows written above are read back below by other threads of this program
            S_in = S
            S = tl.load(local + at, mask=inside, other=0.0)
            if step > 0 and not ERASE:
                S += tl.load(transition + index * H + head) * S_in
            if step > 0 and ERASE:
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
