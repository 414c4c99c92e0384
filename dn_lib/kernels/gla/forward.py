"""Forward: `chunk_scores` makes what does not need the state, `chunk_states` carries it, `chunk_output` joins both.

In our notation, for one chunk of C tokens with input state S (the row index is time, * is entry by entry, and a vector
of K channels multiplies the rows of a state):

    gamma_i = exp(g_1 + ... + g_i)       to_end_i = exp(g_{i+1} + ... + g_C)       whole = gamma_C
    A_ij = sum_d q_id k_jd exp(g_{j+1,d} + ... + g_{i,d})  for j <= i, else 0
    S' = whole * S + (K * to_end)^T V
    O = scale ((Q * gamma) S + A V)

The decay is another in each channel, so it cannot be put on a C x C matrix after the product Q K^T, as a gate per token
is.  A is made in squares of SUB x SUB.  In a square below the diagonal the span from j to i is cut where the rows of i
begin; one part goes into Q, the other into K, and a dot does the rest.  On the diagonal there is no such border: these
squares are sums of SUB products per entry, in float32.  Source: Yang et al. (2024), GLA, section 4.3 (secondary
chunking); that no sum is subtracted and the diagonal multiplies gates is ours.

q and k may have fewer heads than v: value head h reads key head h // GROUP.  g and states belong to value heads.
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
    segment_bounds,
    state_mask,
    state_offsets,
    store_tile,
)
from dn_lib.kernels.delta_rule.gates import key_head
from dn_lib.kernels.gla.common import gate_total, load_row, load_scores, load_whole, till_end


@triton.jit
def diagonal_scores(
    q_tile, k, g, token, head, H, key, KEY_HEADS, rows, left, keys,
    K: tl.constexpr, BK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """A of SUB rows and the same columns `[SUB, SUB]`, and their q with its decay inside these rows `[SUB, BK]`.

    Goes through the columns j from the last.  Then row i > j of q has been multiplied by the gates of j+1, ..., i: one
    more than for column j + 1.  Rows of k and g come from the first-level cache.
    """
    A = tl.zeros([SUB, SUB], dtype=tl.float32)
    for step in tl.range(0, SUB, num_stages=1):
        j = SUB - 1 - step
        k_row = load_row(k, token + j, key, KEY_HEADS, j < left, keys, K)
        gate = tl.exp(load_row(g, token + j + 1, head, H, j + 1 < left, keys, K))
        q_tile = tl.where(rows[:, None] > j, q_tile * gate[None, :], q_tile)
        column = tl.sum(q_tile * k_row[None, :], axis=1)
        A = tl.where((rows[None, :] == j) & (rows[:, None] >= j), column[:, None], A)
    gate = tl.exp(load_row(g, token, head, H, left > 0, keys, K))
    return A, q_tile * gate[None, :]


@triton.jit(do_not_specialize=["n_sequences", "L", "H"])
def chunk_scores(
    q, k, g, scores, q_decayed, k_decayed, whole, cu_seqlens, chunk_offsets, n_sequences, L, H,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Writes A `[tokens, H, C]`, Q * gamma and K * to_end `[tokens, H, K]` in q's dtype, and whole `[chunks, H, K]`.

    One program for each chunk and head, which goes through its sub-chunks from the last to the first.  Entries of A
    above the diagonal are not all written: who reads A leaves them out.  In half precision with float32 gates it reads
    8 K bytes and writes 4 K + 2 C per token and head; what it reads again lies in the first-level cache.
    """
    pid = tl.program_id(0)
    head = pid % H
    c = pid // H
    key, KEY_HEADS = key_head(head, H, GROUP)
    token, left = chunk_bounds(c, cu_seqlens, chunk_offsets, n_sequences, L, C, VARLEN)
    if left <= 0:
        return
    rows = tl.arange(0, SUB)
    back = SUB - 1 - rows  # rows of k are read from the last to the first, see `till_end`
    keys = tl.arange(0, BK)
    DTYPE: tl.constexpr = q.dtype.element_ty
    subs = tl.cdiv(left, SUB)
    behind = tl.zeros([BK], dtype=tl.float32)  # the sum of the gates of later sub-chunks
    for step in tl.range(0, subs, num_stages=1):
        n = subs - 1 - step
        first = token + n * SUB
        here = tl.minimum(left - n * SUB, SUB)
        k_tile = load_tile(k, first, key, KEY_HEADS, back, here, keys, K, BK).to(tl.float32)
        k_tile = k_tile * tl.exp(till_end(g, first, head, H, back, here, keys, K, BK) + behind[None, :])
        store_tile(k_decayed, k_tile, first, head, H, back, here, keys, K, BK)
        behind += gate_total(g, first, head, H, rows, here, keys, K, BK)
        q_tile = load_tile(q, first, key, KEY_HEADS, rows, here, keys, K, BK).to(tl.float32)
        A, q_tile = diagonal_scores(q_tile, k, g, first, head, H, key, KEY_HEADS, rows, here, keys, K, BK, SUB)
        store_tile(scores + n * SUB, A, first, head, H, rows, here, rows, C, C)
        # Squares to the left: q decays from its sub-chunk's beginning, k until there.
        q_low = q_tile.to(DTYPE)
        between = tl.zeros([BK], dtype=tl.float32)  # the sum of the gates of the sub-chunks from m + 1 to n - 1
        for earlier in tl.range(0, n, num_stages=1):
            m = n - 1 - earlier
            at = token + m * SUB
            decay = tl.exp(till_end(g, at, head, H, back, SUB, keys, K, BK) + between[None, :])
            k_low = (load_tile(k, at, key, KEY_HEADS, back, SUB, keys, K, BK).to(tl.float32) * decay).to(DTYPE)
            A = dot(q_low, tl.trans(k_low), PRECISION)
            store_tile(scores + m * SUB, A, first, head, H, rows, here, back, C, C)
            between += gate_total(g, at, head, H, rows, SUB, keys, K, BK)
        store_tile(q_decayed, q_tile * tl.exp(between)[None, :], first, head, H, rows, here, keys, K, BK)
    tl.store(whole + (c.to(tl.int64) * H + head) * K + keys, tl.exp(behind), mask=keys < K)


@triton.jit(do_not_specialize=["L", "H"])
def chunk_states(
    k_decayed, v, whole, states, state_in, state_out, cu_seqlens, chunk_offsets, L, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    STATE_IN: tl.constexpr, STATE_OUT: tl.constexpr, VARLEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S' = whole * S + (K * to_end)^T V along a sequence: writes the state that enters each chunk, in v's dtype.

    Without erasure no entry of S needs another, so a program takes BK keys and BV values of one sequence and head.
    Each tile that is read goes into a dot and nowhere else.  In half precision it reads 2 (K + V) bytes per token and
    head and writes 2 K V / C.
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
    S = tl.zeros([BK, BV], dtype=tl.float32)
    if STATE_IN:
        S = tl.load(state_in + at, mask=inside, other=0.0).to(tl.float32)
    for i in tl.range(0, tl.cdiv(end - begin, C).to(tl.int32), num_stages=STAGES):
        token = begin + i * C
        left = tl.minimum(end - token, C).to(tl.int32)
        chunk = first_chunk + i
        at_chunk = states + state_offsets(chunk, head, H, keys, values, K, V)
        tl.store(at_chunk, S.to(states.dtype.element_ty), mask=inside)
        k_tile = load_tile(k_decayed, token, head, H, rows, left, keys, K, BK)
        v_tile = load_tile(v, token, head, H, rows, left, values, V, BV)
        S = S * load_whole(whole, chunk, head, H, keys, K)[:, None]
        S += dot(tl.trans(k_tile), v_tile, PRECISION)
    if STATE_OUT:
        tl.store(state_out + at, S, mask=inside)


@triton.jit(do_not_specialize=["n_sequences", "L", "H"])
def chunk_output(
    q_decayed, scores, v, states, o, cu_seqlens, chunk_offsets, scale, n_sequences, L, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    VARLEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """O = scale ((Q * gamma) S + A V) of one chunk and head, BV value channels.

    In half precision it reads 2 (K + C + V + K V / C) bytes per token and head and writes 2 V.
    """
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    values = (pid % VALUE_BLOCKS) * BV + tl.arange(0, BV)
    head = (pid // VALUE_BLOCKS) % H
    c = pid // (VALUE_BLOCKS * H)
    token, left = chunk_bounds(c, cu_seqlens, chunk_offsets, n_sequences, L, C, VARLEN)
    if left <= 0:
        return
    rows = tl.arange(0, C)
    O = tl.zeros([C, BV], dtype=tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        keys = start + tl.arange(0, BK)
        q_tile = load_tile(q_decayed, token, head, H, rows, left, keys, K, BK)
        S = load_state(states, c.to(tl.int64), head, H, keys, values, K, V)
        O += dot(q_tile, S, PRECISION)
    A = load_scores(scores, token, head, H, rows, left, C)
    v_tile = load_tile(v, token, head, H, rows, left, values, V, BV)
    O += dot(A, v_tile, PRECISION)
    store_tile(o, O * scale, token, head, H, rows, left, values, V, BV)
