"""Backward: `chunk_scan_bwd` carries the gradient of the state from right to left.

`chunk_bwd_dqk` then makes dq and dk, all chunks at once.

With dO the gradient of the output, dS that of a chunk's output state, the scale folded into Q and P = tril(Q K^T),
G = -tril(dR Vn^T, -1), Vn = D E (the derivation is in chapter 4 and in this folder's README):

    dVn = P^T dO + K dS           Z = dVn + N^T (D dVn)       dR = D Z = dV       dbeta = rowsum(Z * E)
    dS_in = dS + Q^T dO - K^T dR
    dQ = dO S^T + tril(dO Vn^T) K
    dK = tril(dO Vn^T)^T Q + Vn dS^T - dR S^T + (G + G^T) K

The forward saves N, Vn (for weak writes more, see `kept_strength`) and the state that enters each chunk.  For small
heads it saves the final states alone, from which the others are recovered right to left.  v is not needed again.

With keys and queries normalised, k_i = r_i x_i: the rows of Vn and dR that meet K, and those of dO that meet Q,
carry the r of their token; the same formulas on the raw tiles then give r times the gradient of r x, and `tangent`
the gradient of x.

**Gates.**  gamma_i is the product of the gates since the chunk began; to_end = gamma_C / gamma; * is entry by entry;
`ratios` (in `gates.py`) has gamma_i / gamma_j at [i, j] for j <= i, else 0:

    dVn = (P * ratios)^T dO + to_end (K dS)       dS_in = gamma_C dS + (gamma Q)^T dO - (gamma K)^T dR
    dQ = gamma (dO S^T) + (dO Vn^T * ratios) K
    dK = (dO Vn^T * ratios)^T Q + to_end (Vn dS^T) - gamma (dR S^T) + (G * ratios + (G * ratios)^T) K

The gradient of g_m is a sum over all that passes over token m, since that alone carries exp(g_m): from the chunk's
start to a token i >= m; from a token j < m to the chunk's end; from j < m to i >= m; and the whole chunk.

    dg_m = sum_{i >= m} c_i + sum_{j < m} d_j + sum_{j < m <= i} M_ij + gamma_C (S : dS)
    c_i = q_i . (gamma dO S^T)_i - k_i . (gamma dR S^T)_i           d_j = k_j . (to_end Vn dS^T)_j
    M = dO Vn^T * ratios * Q K^T + G * ratios * K K^T

The usual short cut is a sum over i >= m of q_i . dq_i - k_i . dk_i and such, which is the same: what lies behind m
altogether enters it twice, with both signs, and each time rounded.  We leave it out instead of subtracting it.  Then
a gate of zero, over which nothing passes, has a gradient of exactly zero, and small gradients keep their digits.

**Without erasure** Vn is V, and dR, G and dbeta are gone; dV is dVn.

Everything is linear in dO and dS, so `chunk_scan_bwd` works on gradients divided by the scale: dO then goes to the
tensor cores as it was read, and the scale is put back where something is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.common import (
    chunk_bounds,
    dot,
    kept_factors,
    load_scalars,
    load_state,
    load_tile,
    negative,
    only_if,
    segment_bounds,
    state_mask,
    state_offsets,
    store_tile,
)
from dn_lib.kernels.delta_rule.gates import decays, key_head, load_sums, ratios


@triton.jit
def tangent(dx, x, r):
    """From r times the gradient of r x, rows, to the gradient of x, where r = 1/|x|: dx - x r^2 (x . dx)."""
    x = x.to(tl.float32)
    return dx - x * (r * r * tl.sum(x * dx, axis=1))[:, None]


@triton.jit(do_not_specialize=["L", "H", "SEGMENT", "SEGMENTS", "tokens"])
def chunk_scan_bwd(
    q, k, beta, n, pseudo, q_norm, k_norm, sums, do, dv, dbeta, dq, dk, dstate_out, dstate_in, dstates, state_end,
    cu_seqlens, chunk_offsets, scale, L, H, SEGMENT, SEGMENTS, tokens,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr, GROUP: tl.constexpr,
    FUSED: tl.constexpr, LOCAL: tl.constexpr, DSTATE_OUT: tl.constexpr, DSTATE_IN: tl.constexpr,
    VARLEN: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Carries dS through a segment from right to left, for one head and BV value channels.

    Writes dv, dbeta (a partial sum for each value block, `[V / BV, tokens, H]`, which `chunk_bwd_dqk` adds up) and dS
    at each chunk's end (`dstates`, `[chunks, H, K, V]`, in the dtype of k), from which `chunk_bwd_dqk` makes dq and dk.
    LOCAL: the first pass over a split sequence, without its first segment.  The last segment starts from the true
    gradient.  Writes only the gradient at each segment's beginning, which is X of the reversed affine map.
    FUSED (one block of values): also recovers each earlier state, S = S' - K^T Vn, and writes all gradients itself.
    Not with gates, since it would divide by them.  dq and dk then have a head for each value head.
    """
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    DSTATES: tl.constexpr = not (FUSED or LOCAL)
    pid = tl.program_id(0)
    block = pid % VALUE_BLOCKS
    head = (pid // VALUE_BLOCKS) % H
    key, KEY_HEADS = key_head(head, H, GROUP)
    s = pid // (VALUE_BLOCKS * H)
    from_state = s
    is_last = True
    if LOCAL:
        from_state = s // (SEGMENTS - 1)
        segment = s % (SEGMENTS - 1) + 1
        s = from_state * SEGMENTS + segment
        is_last = segment == SEGMENTS - 1
    begin, end, first_chunk = segment_bounds(s, cu_seqlens, chunk_offsets, L, SEGMENT, SEGMENTS, C, VARLEN)

    rows = tl.arange(0, C)
    keys = tl.arange(0, BK)
    values = block * BV + tl.arange(0, BV)
    inside = state_mask(keys, values, K, V)
    dS = tl.zeros([BK, BV], dtype=tl.float32)
    if DSTATE_OUT:
        at = state_offsets(from_state.to(tl.int64), head, H, keys, values, K, V)
        known = only_if(is_last, inside) if LOCAL else inside
        dS = tl.load(dstate_out + at, mask=known, other=0.0).to(tl.float32) / scale
    at = state_offsets(s.to(tl.int64), head, H, keys, values, K, V)
    if FUSED:
        S = tl.load(state_end + at, mask=inside, other=0.0)

    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    if DSTATES:
        at_chunk = dstates + state_offsets(first_chunk + chunks - 1, head, H, keys, values, K, V)
        tl.store(at_chunk, (dS * scale).to(dstates.dtype.element_ty), mask=only_if(chunks > 0, inside))
        if ERASE:
            # Vn is wanted for dbeta alone: fetched one chunk ahead into registers, it takes no shared memory.
            last = begin + (chunks - 1) * C
            left = tl.where(chunks > 0, end - last, 0).to(tl.int32)
            next_kept = load_tile(pseudo, last, head, H, rows, left, values, V, BV)
    if GATE:  # fetched one chunk ahead
        at_last = begin + (chunks - 1) * C
        ahead = tl.where(chunks > 0, end - at_last, 0).to(tl.int32)
        high, low, last_high, last_low = load_sums(sums, at_last, head, tokens, rows, ahead)
    for step in tl.range(0, chunks, num_stages=STAGES):
        i = chunks - 1 - step
        token = begin + i * C
        left = tl.minimum(end - token, C).to(tl.int32)
        q_tile = load_tile(q, token, key, KEY_HEADS, rows, left, keys, K, BK, TMA)
        k_tile = load_tile(k, token, key, KEY_HEADS, rows, left, keys, K, BK, TMA)
        do_tile = load_tile(do, token, head, H, rows, left, values, V, BV, TMA, block * BV)
        if ERASE:
            N = load_tile(n, token, head, H, rows, left, rows, C, C, TMA)
            b = load_scalars(beta, token, head, H, rows, left)
        if NORM:
            q_scale = load_scalars(q_norm, token, key, KEY_HEADS, rows, left)
            k_scale = load_scalars(k_norm, token, key, KEY_HEADS, rows, left)
            do_tile = (q_scale[:, None] * do_tile.to(tl.float32)).to(k_tile.dtype)
        if GATE:
            gamma, to_end, whole = decays(high, low, last_high, last_low)
        dS_low = dS.to(k_tile.dtype)
        # dVn = (P * ratios)^T dO + to_end (K dS)
        P_T = dot(k_tile, tl.trans(q_tile), PRECISION)
        if GATE:
            P_T = P_T * ratios(high, low, rows, k_tile.dtype, True)
        else:
            P_T = tl.where(rows[:, None] <= rows[None, :], P_T, 0.0)
        dVn = dot(k_tile, dS_low, PRECISION)
        if GATE:
            dVn = dVn * to_end[:, None]
        dVn += dot(P_T.to(k_tile.dtype), do_tile, PRECISION)
        if NORM:
            dVn = dVn * k_scale[:, None]
        if ERASE:
            # Z = dVn + N^T D dVn;  dR = D Z
            Z = dVn + dot(tl.trans(N), (b[:, None] * dVn).to(k_tile.dtype), PRECISION)
            dR = b[:, None] * Z
            minus_dR = -dR * k_scale[:, None] if NORM else -dR
            if GATE:
                minus_dR = minus_dR * gamma[:, None]
            minus_dR = minus_dR.to(k_tile.dtype)
        else:
            dR = dVn
        if not LOCAL:
            store_tile(dv, dR * scale, token, head, H, rows, left, values, V, BV)
            if ERASE:
                to_Vn, to_E = kept_factors(b * k_scale if NORM else b, k_tile.dtype)
                if FUSED:
                    kept = load_tile(pseudo, token, head, H, rows, left, values, V, BV, TMA, block * BV)
                else:
                    kept = next_kept
                    next_kept = load_tile(pseudo, token - C, head, H, rows, tl.where(i > 0, C, 0), values, V, BV)
                db = tl.sum(Z * kept.to(tl.float32), axis=1) * (scale * to_E)
                at_row = (block * tokens + token) * H + head + rows * H
                tl.store(dbeta + at_row, db.to(dbeta.dtype.element_ty), mask=rows < left)
        if FUSED:
            Vn = (to_Vn[:, None] * kept.to(tl.float32)).to(k_tile.dtype)
            S += dot(tl.trans(k_tile), negative(Vn), PRECISION)
            S_low = S.to(k_tile.dtype)
            dP = dot(do_tile, tl.trans(Vn), PRECISION) * scale
            dP = tl.where(rows[:, None] >= rows[None, :], dP, 0.0)
            dQ = dot(do_tile, tl.trans(S_low), PRECISION) * scale
            write_dq(
                dq, dQ, dP, q_tile, k_tile, q_norm, token, head, H, key, KEY_HEADS, rows, left, keys,
                K, BK, PRECISION, NORM,
            )  # fmt: skip
            dK = (dot(Vn, tl.trans(dS_low), PRECISION) + dot(minus_dR, tl.trans(S_low), PRECISION)) * scale
            minus_G = dot(minus_dR, tl.trans(Vn), PRECISION) * scale
            write_dk(
                dk, dK, dP, minus_G, q_tile, k_tile, k_norm, token, head, H, key, KEY_HEADS, rows, left, keys,
                K, BK, PRECISION, NORM, True,
            )  # fmt: skip
        # dS_in = gamma_C dS + (gamma Q)^T dO - (gamma K)^T dR; two sums, so that each dot accumulates in dS's registers
        if GATE:
            do_tile = (gamma[:, None] * do_tile.to(tl.float32)).to(k_tile.dtype)
            dS = dS * whole
            before = tl.where(i > 0, C, 0)
            high, low, last_high, last_low = load_sums(sums, token - C, head, tokens, rows, before)
        dS += dot(tl.trans(q_tile), do_tile, PRECISION)
        if ERASE:
            dS += dot(tl.trans(k_tile), minus_dR, PRECISION)
        if DSTATES:  # at the end of the chunk before this one
            at_chunk = dstates + state_offsets(first_chunk + i - 1, head, H, keys, values, K, V)
            tl.store(at_chunk, (dS * scale).to(k_tile.dtype), mask=only_if(i > 0, inside))

    if DSTATE_IN:
        tl.store(dstate_in + at, dS * scale, mask=inside)


@triton.jit
def write_dq(
    dq, dQ, dP, q_tile, k_tile, q_norm, token, head, H, key, KEY_HEADS, rows, left, keys,
    K: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """dQ = scale (dO S^T + tril(dO Vn^T) K): adds the second term to the first.  dP is already masked and scaled."""
    dQ += dot(dP.to(k_tile.dtype), k_tile, PRECISION)
    if NORM:
        dQ = tangent(dQ, q_tile, load_scalars(q_norm, token, key, KEY_HEADS, rows, left))
    store_tile(dq, dQ, token, head, H, rows, left, keys, K, BK)


@triton.jit
def write_dk(
    dk, dK, dP, minus_G, q_tile, k_tile, k_norm, token, head, H, key, KEY_HEADS, rows, left, keys,
    K: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """dK = Vn dS^T - dR S^T + tril(dO Vn^T)^T Q + (G + G^T) K: adds the last two terms to the first two."""
    DTYPE: tl.constexpr = k_tile.dtype
    if ERASE:
        G = tl.where(rows[:, None] > rows[None, :], minus_G, 0.0)
        G = G + tl.trans(G)
    dK += dot(tl.trans(dP).to(DTYPE), q_tile, PRECISION)
    if ERASE:
        dK += dot(G.to(DTYPE), k_tile, PRECISION)
    if NORM:
        dK = tangent(dK, k_tile, load_scalars(k_norm, token, key, KEY_HEADS, rows, left))
    store_tile(dk, dK, token, head, H, rows, left, keys, K, BK)


@triton.jit
def gate_gradient(c, d, M, through, rows, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """dg of a chunk's rows: sums over what passes over each, see the top.  through: gamma_C (S : dS).

    M may hold anything on its diagonal.  In half precision the sum over j < m <= i is taken as the sums of the rows
    from m on less those of the columns from m on: what is left out of it enters with both signs, in float32, and
    cancels but for some 2^-22 of it.
    """
    behind = rows[None, :] >= rows[:, None]
    if DTYPE == tl.float32:  # noqa: SIM300 (Triton's dtypes are constants only to a linter)
        M = tl.where(behind, 0.0, M)
        passing = dot(tl.where(behind, 1.0, 0.0), M, PRECISION)  # of j, over m: the sum over i >= m
        return through + tl.sum(tl.where(behind, c[None, :], passing + d[None, :]), axis=1)
    else:
        from_here = c + tl.sum(M, axis=1) - tl.sum(M, axis=0)
        return through + tl.sum(tl.where(behind, from_here[None, :], d[None, :]), axis=1)


@triton.jit(do_not_specialize=["n_sequences", "L", "H", "tokens"])
def chunk_bwd_dqk(
    q, k, beta, pseudo, q_norm, k_norm, sums, do, dv, states, dstates, dbeta_partials, dbeta, dg, dq, dk,
    cu_seqlens, chunk_offsets, scale, n_sequences, L, H, tokens,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PARTIALS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq and dk of one chunk and value head, from the state at its beginning and dS at its end; with GATE also dg.

    Also adds up the PARTIALS partial sums of dbeta, one from each value block of `chunk_scan_bwd`.
    pseudo is v without ERASE.  DTYPE: of q, k and v.  dq and dk have a head for each value head: with GROUP > 1 they
    are partial sums.

    Without NORM a program may take BK of the K key channels; with NORM it needs whole rows (BK >= K).  Each block of
    keys leaves a partial sum of dg, `[K / BK, tokens, H]`.
    """
    KEY_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    first_key = (pid % KEY_BLOCKS) * BK
    keys = first_key + tl.arange(0, BK)
    head = (pid // KEY_BLOCKS) % H
    key, KEY_HEADS = key_head(head, H, GROUP)
    c = pid // (KEY_BLOCKS * H)
    token, left = chunk_bounds(c, cu_seqlens, chunk_offsets, n_sequences, L, C, VARLEN)
    if left <= 0:
        return
    rows = tl.arange(0, C)
    if PARTIALS > 1:
        if first_key == 0:
            db = tl.zeros([C], dtype=tl.float32)
            for block in tl.static_range(PARTIALS):
                db += load_scalars(dbeta_partials, block * tokens + token, head, H, rows, left)
            at_row = token * H + head + rows * H
            tl.store(dbeta + at_row, db.to(dbeta.dtype.element_ty), mask=rows < left)
    if ERASE:
        b = load_scalars(beta, token, head, H, rows, left)
    if NORM:
        q_scale = load_scalars(q_norm, token, key, KEY_HEADS, rows, left)
        k_scale = load_scalars(k_norm, token, key, KEY_HEADS, rows, left)
        if ERASE:
            b = b * k_scale
    if ERASE:
        to_Vn, _ = kept_factors(b, DTYPE)
    if GATE:
        high, low, last_high, last_low = load_sums(sums, token, head, tokens, rows, left)
        gamma, to_end, whole = decays(high, low, last_high, last_low)
        through = tl.zeros([BK], dtype=tl.float32)
    dQ = tl.zeros([C, BK], dtype=tl.float32)
    dK = tl.zeros([C, BK], dtype=tl.float32)
    dP = tl.zeros([C, C], dtype=tl.float32)
    minus_G = tl.zeros([C, C], dtype=tl.float32)
    if GATE and ERASE:
        dK_read = tl.zeros([C, BK], dtype=tl.float32)  # the part of dK that comes from K S
    for start in tl.range(0, V, BV, num_stages=STAGES):
        values = start + tl.arange(0, BV)
        do_tile = load_tile(do, token, head, H, rows, left, values, V, BV, TMA, start)
        kept = load_tile(pseudo, token, head, H, rows, left, values, V, BV, TMA, start)
        if ERASE:
            dR = load_tile(dv, token, head, H, rows, left, values, V, BV, TMA, start)
        if NORM:
            do_tile = (q_scale[:, None] * do_tile.to(tl.float32)).to(kept.dtype)
            if ERASE:
                dR = (k_scale[:, None] * dR.to(tl.float32)).to(kept.dtype)
        if ERASE:
            minus_dR = negative(dR)
        S = load_state(states, c.to(tl.int64), head, H, keys, values, K, V, TMA, first_key, start)
        dS = load_state(dstates, c.to(tl.int64), head, H, keys, values, K, V, TMA, first_key, start)
        if ERASE:
            written = to_Vn[:, None] * kept.to(tl.float32)
        else:
            written = k_scale[:, None] * kept.to(tl.float32) if NORM else kept.to(tl.float32)
        Vn = written.to(kept.dtype)
        if not GATE:
            dP += dot(do_tile, tl.trans(Vn), PRECISION)
            if ERASE:
                minus_G += dot(minus_dR, tl.trans(Vn), PRECISION)
        dQ += dot(do_tile, tl.trans(S), PRECISION)
        if GATE:
            through += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
            dK += dot((to_end[:, None] * written).to(kept.dtype), tl.trans(dS), PRECISION)
        else:
            dK += dot(Vn, tl.trans(dS), PRECISION)
        if ERASE:
            if GATE:
                dK_read += dot(minus_dR, tl.trans(S), PRECISION)
            else:
                dK += dot(minus_dR, tl.trans(S), PRECISION)
        if GATE:
            # S and dS are also read entry by entry, so the next copy may overtake the dots that read them (`races.py`).
            # A product that is used at once, the last one, makes the loop wait for all of them.
            if ERASE:
                minus_G += dot(minus_dR, tl.trans(Vn), PRECISION)
            dP += dot(do_tile, tl.trans(Vn), PRECISION) * scale
    if GATE:
        ratio = ratios(high, low, rows, DTYPE, False)
        dP = dP * ratio
        minus_G = minus_G * ratio
    else:
        dP = tl.where(rows[:, None] >= rows[None, :], dP * scale, 0.0)
    q_tile = load_tile(q, token, key, KEY_HEADS, rows, left, keys, K, BK, TMA, first_key)
    k_tile = load_tile(k, token, key, KEY_HEADS, rows, left, keys, K, BK, TMA, first_key)
    dQ = dQ * scale
    if GATE:
        dQ = dQ * gamma[:, None]
        from_start = tl.sum(q_tile.to(tl.float32) * dQ, axis=1)
        till_end = tl.sum(k_tile.to(tl.float32) * dK, axis=1)
        M = dP * dot(q_tile, tl.trans(k_tile), PRECISION)
        if ERASE:
            dK_read = dK_read * gamma[:, None]
            from_start += tl.sum(k_tile.to(tl.float32) * dK_read, axis=1)
            dK += dK_read
            M += minus_G * dot(k_tile, tl.trans(k_tile), PRECISION)
        d_gate = gate_gradient(from_start, till_end, M, whole * tl.sum(through), rows, DTYPE, PRECISION)
        tl.store(dg + ((pid % KEY_BLOCKS) * tokens + token) * H + head + rows * H, d_gate, mask=rows < left)
    write_dq(
        dq, dQ, dP, q_tile, k_tile, q_norm, token, head, H, key, KEY_HEADS, rows, left, keys, K, BK, PRECISION, NORM
    )  # fmt: skip
    write_dk(
        dk, dK, dP, minus_G, q_tile, k_tile, k_norm, token, head, H, key, KEY_HEADS, rows, left, keys,
        K, BK, PRECISION, NORM, ERASE,
    )  # fmt: skip
