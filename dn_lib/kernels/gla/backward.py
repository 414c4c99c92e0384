"""Backward: `chunk_states_bwd` carries the gradient of the state from right to left, the others take all
chunks at once.

With dO the gradient of the output, dS that of a chunk's output state, and the names of `forward.py`:

    dS_in = whole * dS + scale (Q * gamma)^T dO
    dV = scale A^T dO + (K * to_end) dS                 dA = scale tril(dO V^T)
    d(Q * gamma) = scale dO S^T                         d(K * to_end) = V dS^T
    dQ_id = gamma_id d(Q * gamma)_id + sum_{j <= i} dA_ij k_jd exp(g_{j+1,d} + ... + g_{i,d})
    dK_jd = to_end_jd d(K * to_end)_jd + sum_{i >= j} dA_ij q_id exp(g_{j+1,d} + ... + g_{i,d})

The sums over j and i go by squares of SUB x SUB, as A does: dots off the diagonal, a loop on it.

**The gates.**  The gradient of g_m is a sum over all that passes over token m, since that alone carries exp(g_m):

    dg_m = whole * (S : dS) + sum_{i >= m} c_i + sum_{j < m} d_j + sum_{j < m <= i} M_ij      (channel by channel)
    c = (Q * gamma) * d(Q * gamma)      d = (K * to_end) * d(K * to_end)
    M_ij = dA_ij q_i k_j exp(g_{j+1} + ... + g_i)

The usual short cut, q_i * dq_i - k_i * dk_i summed over i >= m, is the same in exact arithmetic: what lies behind m
altogether enters it twice, with both signs, and each time with other operands rounded.  We take it inside the squares
on the diagonal alone, where every product is in float32.  A square off the diagonal has rows i in one sub-chunk and
columns j in an earlier one.  It passes over what is behind j in the earlier one, over all sub-chunks between, and over
what is up to i in the later one: each is added where it belongs.
"""

# pyright: reportGeneralTypeIssues=false
# (Bodies of kernels are Triton's language in Python's syntax, which no type checker of Python knows.)

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.common import (
    chunk_bounds,
    dot,
    load_state,
    load_tile,
    only_if,
    segment_bounds,
    state_mask,
    state_offsets,
    store_tile,
)
from dn_lib.kernels.delta_rule.gates import key_head
from dn_lib.kernels.gla.common import from_start, gate_total, load_row, load_scores, load_whole, till_end


@triton.jit(do_not_specialize=["L", "H"])
def chunk_states_bwd(
    q_decayed, do, whole, dstates, dstate_out, dstate_in, cu_seqlens, chunk_offsets, scale, L, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    DSTATE_OUT: tl.constexpr, DSTATE_IN: tl.constexpr, VARLEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dS_in = whole * dS + scale (Q * gamma)^T dO, right to left: writes dS at each chunk's end, in do's dtype.

    One program for BK keys and BV values of a sequence and head.  Carries dS divided by the scale.  In half precision
    it reads 2 (K + V) bytes per token and head and writes 2 K V / C.
    """
    KEY_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    values = (pid % VALUE_BLOCKS) * BV + tl.arange(0, BV)
    keys = (pid // VALUE_BLOCKS % KEY_BLOCKS) * BK + tl.arange(0, BK)
    head = (pid // (VALUE_BLOCKS * KEY_BLOCKS)) % H
    s = pid // (VALUE_BLOCKS * KEY_BLOCKS * H)
    begin, end, first_chunk = segment_bounds(s, cu_seqlens, chunk_offsets, L, L, 1, C, VARLEN)
    rows = tl.arange(0, C)
    inside = state_mask(keys, values, K, V)
    at = state_offsets(s.to(tl.int64), head, H, keys, values, K, V)
    dS = tl.zeros([BK, BV], dtype=tl.float32)
    if DSTATE_OUT:
        dS = tl.load(dstate_out + at, mask=inside, other=0.0).to(tl.float32) / scale
    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        i = chunks - 1 - step
        token = begin + i * C
        left = tl.minimum(end - token, C).to(tl.int32)
        chunk = first_chunk + i
        at_chunk = dstates + state_offsets(chunk, head, H, keys, values, K, V)
        tl.store(at_chunk, (dS * scale).to(dstates.dtype.element_ty), mask=inside)
        q_tile = load_tile(q_decayed, token, head, H, rows, left, keys, K, BK)
        do_tile = load_tile(do, token, head, H, rows, left, values, V, BV)
        dS = dS * load_whole(whole, chunk, head, H, keys, K)[:, None]
        dS += dot(tl.trans(q_tile), do_tile, PRECISION)
    if DSTATE_IN:
        tl.store(dstate_in + at, dS * scale, mask=inside)


@triton.jit(do_not_specialize=["n_sequences", "L", "H"])
def chunk_bwd_dv(
    k_decayed, v, scores, do, dstates, dv, dscores, cu_seqlens, chunk_offsets, scale, n_sequences, L, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """dV = scale A^T dO + (K * to_end) dS and dA = scale tril(dO V^T), of one chunk and head.

    In half precision it reads 2 (K + C + 2 V + K V / C) bytes per token and head and writes 2 (V + C).
    """
    pid = tl.program_id(0)
    head = pid % H
    c = pid // H
    token, left = chunk_bounds(c, cu_seqlens, chunk_offsets, n_sequences, L, C, VARLEN)
    if left <= 0:
        return
    rows = tl.arange(0, C)
    A = load_scores(scores, token, head, H, rows, left, C)
    dA = tl.zeros([C, C], dtype=tl.float32)
    for start in tl.range(0, V, BV, num_stages=1):
        values = start + tl.arange(0, BV)
        do_tile = load_tile(do, token, head, H, rows, left, values, V, BV)
        v_tile = load_tile(v, token, head, H, rows, left, values, V, BV)
        dA += dot(do_tile, tl.trans(v_tile), PRECISION)
        dV = dot(tl.trans(A), do_tile, PRECISION) * scale
        for first_key in tl.range(0, K, BK, num_stages=1):
            keys = first_key + tl.arange(0, BK)
            k_tile = load_tile(k_decayed, token, head, H, rows, left, keys, K, BK)
            dS = load_state(dstates, c.to(tl.int64), head, H, keys, values, K, V)
            dV += dot(k_tile, dS, PRECISION)
        store_tile(dv, dV, token, head, H, rows, left, values, V, BV)
    dA = tl.where(rows[:, None] >= rows[None, :], dA * scale, 0.0)
    store_tile(dscores, dA, token, head, H, rows, left, rows, C, C)


@triton.jit(do_not_specialize=["n_sequences", "L", "H"])
def chunk_bwd_decayed(
    q_decayed, k_decayed, v, do, states, dstates, whole, dq_decayed, dk_decayed, passing,
    cu_seqlens, chunk_offsets, scale, n_sequences, L, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr,
    PRECISION: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """d(Q * gamma) = scale dO S^T and d(K * to_end) = V dS^T of one chunk and head, BK key channels.

    passing `[chunks, H, C / SUB, K]`: of dg, what passes over all of a sub-chunk and begins or ends outside the chunk:
    whole * (S : dS), the c of later sub-chunks and the d of earlier ones.  S and dS are both operands of dots and
    multiplied entry by entry, so this loop is not pipelined.
    In half precision it reads 2 (2 K + 2 V + 2 K V / C) bytes per token and head and writes 4 K.
    """
    KEY_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    SUBS: tl.constexpr = C // SUB
    pid = tl.program_id(0)
    keys = (pid % KEY_BLOCKS) * BK + tl.arange(0, BK)
    head = (pid // KEY_BLOCKS) % H
    c = pid // (KEY_BLOCKS * H)
    token, left = chunk_bounds(c, cu_seqlens, chunk_offsets, n_sequences, L, C, VARLEN)
    if left <= 0:
        return
    chunk = c.to(tl.int64)
    rows = tl.arange(0, C)
    dQ = tl.zeros([C, BK], dtype=tl.float32)
    dK = tl.zeros([C, BK], dtype=tl.float32)
    through = tl.zeros([BK], dtype=tl.float32)
    for start in tl.range(0, V, BV, num_stages=1):
        values = start + tl.arange(0, BV)
        do_tile = load_tile(do, token, head, H, rows, left, values, V, BV)
        v_tile = load_tile(v, token, head, H, rows, left, values, V, BV)
        S = load_state(states, chunk, head, H, keys, values, K, V)
        dS = load_state(dstates, chunk, head, H, keys, values, K, V)
        dQ += dot(do_tile, tl.trans(S), PRECISION)
        dK += dot(v_tile, tl.trans(dS), PRECISION)
        through += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
    dQ = dQ * scale
    store_tile(dq_decayed, dQ, token, head, H, rows, left, keys, K, BK)
    store_tile(dk_decayed, dK, token, head, H, rows, left, keys, K, BK)
    c_all = load_tile(q_decayed, token, head, H, rows, left, keys, K, BK).to(tl.float32) * dQ
    d_all = load_tile(k_decayed, token, head, H, rows, left, keys, K, BK).to(tl.float32) * dK
    through = through * load_whole(whole, chunk, head, H, keys, K)
    for n in tl.static_range(SUBS):
        outside = tl.where((rows >= (n + 1) * SUB)[:, None], c_all, 0.0)
        outside += tl.where((rows < n * SUB)[:, None], d_all, 0.0)
        at = passing + ((chunk * H + head) * SUBS + n) * K + keys
        tl.store(at, through + tl.sum(outside, axis=0), mask=keys < K)


@triton.jit
def diagonal_dq(
    dscores, k, g, token, head, H, key, KEY_HEADS, rows, left, keys, first_column,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """sum_{j < i} dA_ij k_j (the gates of j+1, ..., i) within a sub-chunk, as a recurrence over j (Horner's rule)."""
    dQ = tl.zeros([SUB, BK], dtype=tl.float32)
    for j in tl.range(0, SUB - 1, num_stages=1):
        at = dscores + ((token + rows) * H + head) * C + first_column + j
        column = tl.load(at, mask=(rows > j) & (rows < left), other=0.0).to(tl.float32)
        k_row = load_row(k, token + j, key, KEY_HEADS, j < left, keys, K)
        gate = tl.exp(load_row(g, token + j + 1, head, H, j + 1 < left, keys, K))
        dQ = tl.where(rows[:, None] > j, (dQ + column[:, None] * k_row[None, :]) * gate[None, :], dQ)
    return dQ


@triton.jit
def diagonal_dk(
    dscores, q, g, token, head, H, key, KEY_HEADS, rows, left, keys, first_column,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """sum_{i > j} dA_ij q_i (the gates of j+1, ..., i) within a sub-chunk, as a recurrence over i from the last."""
    dK = tl.zeros([SUB, BK], dtype=tl.float32)
    for step in tl.range(0, SUB - 1, num_stages=1):
        i = SUB - 1 - step
        at = dscores + ((token + i) * H + head) * C + first_column + rows
        row = tl.load(at, mask=only_if(i < left, rows < i), other=0.0).to(tl.float32)
        q_row = load_row(q, token + i, key, KEY_HEADS, i < left, keys, K)
        gate = tl.exp(load_row(g, token + i, head, H, i < left, keys, K))
        dK = tl.where(rows[:, None] < i, (dK + row[:, None] * q_row[None, :]) * gate[None, :], dK)
    return dK


@triton.jit
def load_square(dscores, token, head, H, rows, left, columns, C: tl.constexpr):
    """dA of the rows `token + rows` and the columns `columns`: `[SUB, SUB]`."""
    at = dscores + (token * H + head) * C + rows[:, None] * (H * C) + columns[None, :]
    return tl.load(at, mask=(rows < left)[:, None] & (columns < C)[None, :], other=0.0)


@triton.jit
def load_diagonal(dscores, token, head, H, rows, left, first_column, C: tl.constexpr):
    """dA_ii of the rows `token + rows`, in float32."""
    at = dscores + ((token + rows) * H + head) * C + first_column + rows
    return tl.load(at, mask=rows < left, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_sequences", "L", "H"])
def chunk_bwd_dqkg(
    q, k, g, dscores, dq_decayed, dk_decayed, passing, dq, dk, dg, cu_seqlens, chunk_offsets, n_sequences, L, H,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg `[tokens, H, K]` of one chunk and value head, BK key channels; dg is float32.

    Goes through the sub-chunks twice, for dq with what of dg ends in each row, and for dk with the rest: both at once
    take more registers than there are.
    dq and dk have a head for each value head: with GROUP > 1 they are partial sums.
    In half precision with float32 gates it reads 12 K + 2 C bytes per token and head and writes 8 K; what it reads
    again lies in the caches.
    """
    KEY_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    SUBS: tl.constexpr = C // SUB
    pid = tl.program_id(0)
    keys = (pid % KEY_BLOCKS) * BK + tl.arange(0, BK)
    head = (pid // KEY_BLOCKS) % H
    c = pid // (KEY_BLOCKS * H)
    key, KEY_HEADS = key_head(head, H, GROUP)
    token, left = chunk_bounds(c, cu_seqlens, chunk_offsets, n_sequences, L, C, VARLEN)
    if left <= 0:
        return
    DTYPE: tl.constexpr = q.dtype.element_ty
    rows = tl.arange(0, SUB)
    back = SUB - 1 - rows  # rows of k are read from the last to the first, see `till_end`
    subs = tl.cdiv(left, SUB)
    # For each sub-chunk: what passes over all of it from an earlier one of the chunk to a later one.
    every = tl.arange(0, SUBS)
    across = tl.zeros([SUBS, BK], dtype=tl.float32)
    for n in tl.range(0, subs, num_stages=1):
        first = token + n * SUB
        here = tl.minimum(left - n * SUB, SUB)
        inner = diagonal_dq(dscores, k, g, first, head, H, key, KEY_HEADS, rows, here, keys, n * SUB, K, BK, C, SUB)
        # From columns of earlier sub-chunks: k decays until this one begins.
        dQ = tl.zeros([SUB, BK], dtype=tl.float32)
        between = tl.zeros([BK], dtype=tl.float32)
        q_tile = load_tile(q, first, key, KEY_HEADS, rows, here, keys, K, BK).to(tl.float32)
        gamma = tl.exp(from_start(g, first, head, H, rows, here, keys, K, BK))
        for earlier in tl.range(0, n, num_stages=1):
            m = n - 1 - earlier
            at = token + m * SUB
            decay = tl.exp(till_end(g, at, head, H, back, SUB, keys, K, BK) + between[None, :])
            k_low = (load_tile(k, at, key, KEY_HEADS, back, SUB, keys, K, BK).to(tl.float32) * decay).to(DTYPE)
            part = gamma * dot(load_square(dscores, first, head, H, rows, here, m * SUB + back, C), k_low, PRECISION)
            passed = tl.sum(q_tile * part, axis=0)
            across += tl.where(((every > m) & (every < n))[:, None], passed[None, :], 0.0)
            dQ += part
            between += gate_total(g, at, head, H, rows, SUB, keys, K, BK)
        outer = load_tile(dq_decayed, first, head, H, rows, here, keys, K, BK).to(tl.float32)
        dQ += inner + gamma * tl.exp(between)[None, :] * outer
        store_tile(dg, tl.cumsum(q_tile * dQ, 0, reverse=True), first, head, H, rows, here, keys, K, BK)
        # The entry i = j passes over nothing.
        k_tile = load_tile(k, first, key, KEY_HEADS, rows, here, keys, K, BK).to(tl.float32)
        own = load_diagonal(dscores, first, head, H, rows, here, n * SUB, C)
        store_tile(dq, dQ + own[:, None] * k_tile, first, head, H, rows, here, keys, K, BK)
    tl.debug_barrier()  # the rows of dg written above are read back below by other threads of this program
    behind = tl.zeros([BK], dtype=tl.float32)  # the sum of the gates of later sub-chunks
    for step in tl.range(0, subs, num_stages=1):
        n = subs - 1 - step
        first = token + n * SUB
        here = tl.minimum(left - n * SUB, SUB)
        inner = diagonal_dk(dscores, q, g, first, head, H, key, KEY_HEADS, back, here, keys, n * SUB, K, BK, C, SUB)
        # From rows of later sub-chunks: q decays from where this one ends.
        dK = tl.zeros([SUB, BK], dtype=tl.float32)
        between = tl.zeros([BK], dtype=tl.float32)
        for later in tl.range(n + 1, subs, num_stages=1):
            at = token + later * SUB
            there = tl.minimum(left - later * SUB, SUB)
            decay = tl.exp(from_start(g, at, head, H, rows, there, keys, K, BK) + between[None, :])
            q_low = (load_tile(q, at, key, KEY_HEADS, rows, there, keys, K, BK).to(tl.float32) * decay).to(DTYPE)
            square = load_square(dscores, at, head, H, rows, there, n * SUB + back, C)
            dK += dot(tl.trans(square), q_low, PRECISION)
            between += gate_total(g, at, head, H, rows, there, keys, K, BK)
        rest = tl.exp(till_end(g, first, head, H, back, here, keys, K, BK))
        outer = load_tile(dk_decayed, first, head, H, back, here, keys, K, BK).to(tl.float32)
        dK = rest * (dK + tl.exp(behind)[None, :] * outer)
        behind += gate_total(g, first, head, H, back, here, keys, K, BK)
        k_tile = load_tile(k, first, key, KEY_HEADS, back, here, keys, K, BK).to(tl.float32)
        d = k_tile * dK
        d_gate = tl.cumsum(d, 0, reverse=True) - d - tl.cumsum(k_tile * inner, 0)
        over_all = tl.sum(tl.where((every == n)[:, None], across, 0.0), axis=0)
        over_all += tl.load(passing + ((c.to(tl.int64) * H + head) * SUBS + n) * K + keys, mask=keys < K, other=0.0)
        d_gate += load_tile(dg, first, head, H, back, here, keys, K, BK) + over_all[None, :]
        store_tile(dg, d_gate, first, head, H, back, here, keys, K, BK)
        q_tile = load_tile(q, first, key, KEY_HEADS, back, here, keys, K, BK).to(tl.float32)
        own = load_diagonal(dscores, first, head, H, back, here, n * SUB, C)
        store_tile(dk, dK + inner + own[:, None] * q_tile, first, head, H, back, here, keys, K, BK)
