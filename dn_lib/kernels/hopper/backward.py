"""`chunk_scan_bwd` for Hopper: the whole backward of a segment, in one kernel.

It reads the state S that enters each chunk and the pseudo-values Vn, both kept by the forward, and carries dS from
right to left in registers; dS goes to memory only where a segment begins.  For one chunk, in the letters of
dn_lib/kernels/README.md (D = diag(beta), P = tril(Q K^T), N as there; dS' enters from the right, dS leaves):

    dVn = P^T dO + K dS'            Z  = dVn + N^T (D dVn)          dV = dR = D Z
    dS  = dS' + Q^T dO - K^T dR     dP = tril(dO Vn^T)              G  = -tril(dR Vn^T, -1)
    dQ  = dO S^T + dP K             dK = Vn dS'^T - dR S^T + dP^T Q + (G + G^T) K
    dbeta_i = Z_i . E_i = (dR Vn^T)_ii / beta_i^2

All of it is linear in dO and dS', so both are taken divided by the scale, and the scale is put back where something is
written.

A program walks one segment of one head with eight warps: two warpgroups, each of which owns half of the columns of
every result, so that they meet only where a result becomes an operand.  One program takes a streaming multiprocessor's
shared memory.  q and k are fetched a chunk ahead into two buffers each, the other tiles as soon as their last reader
is done.  Bytes for a token and head, X = 2 * 128: reads 4 X + 128 (q, k, dO, Vn, N) and 2 X of states, writes 3 X.

Weak rows.  dbeta needs E where beta is nearly zero, too.  Where |strength| < 2^-40 the forward kept 2^-40 E in place of
Vn, and here 2^-40 Z takes the place of dR.  Beside the other rows of an operand either is nothing, as Vn and dR
themselves would be, but their product still gives Z . E.  dv is made with the true beta, and a weak row of dK, all
of whose terms are proportional to its Vn or dR, is multiplied by strength / 2^-40 when it is written.

GATE.  gamma_i is the product of the gates since the chunk began, to_end = gamma_C / gamma, and entry [i, j] of P, dP
and G is multiplied by gamma_i / gamma_j.  Then dVn = P^T dO + to_end (K dS'), and behind dP and G, for which they are
needed as they are, dO and dR take gamma and Vn takes to_end, in their tiles:

    dS = gamma_C dS' + Q^T (gamma dO) - K^T (gamma dR)
    dQ = (gamma dO) S^T + dP K        dK = (to_end Vn) dS'^T - (gamma dR) S^T + dP^T Q + (G + G^T) K

The gradient of a log gate is the sum over all that passes over its token, as `dn_lib/kernels/delta_rule/backward.py`
derives: `leaving` from the chunk's start to a token behind it (q . dO S^T, k . dR S^T), `arriving` from a token before
it to the chunk's end, `crossing` from a token before it to one behind it, and `through` the whole chunk.  `crossing` is
made of sums of rows and columns of all pairs i > j: a pair with i >= m and j >= m is in both.  What is lost there is
float32's last digits: a gate of exactly zero gets a gradient of some 1e-7 of its neighbours' in place of zero.
Tried, and slower (0.84 against 0.78 ms for 16 x 2048, 16 heads): all of dg from q . dq and k . dk, as other kernels
make it, with one product less; two more waits between products cost more than that.

NORM: q and k are raw, with r = 1/|x| in q_norm and k_norm.  The rows of dO carry the query's r, those of dR the key's;
the strength is beta r, and one projection makes the gradient of x of that of r x (`_tangent`).

The next thing to try: dbeta with one rounding less.  Its error is 5 to 11% above that of the Triton kernels, which
multiply Z and E before Z is rounded.  With the row sum of Z (in registers) times the pseudo tile (in shared memory),
divided by `kept`, right after Z is awaited, it is the Triton kernels' again (3.95e-3 -> 3.62e-3, theirs 3.61e-3).  That
costs 0.009 ms of 0.457, but 0.035 of 0.53 with NORM, where it spills 72 to 88 bytes.  README.md has the lines.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from dn_lib.kernels.hopper.common import (
    LOW,
    WEAK,
    C,
    D,
    add,
    barriers,
    decay,
    fetch,
    log_gates,
    meet,
    meet_only,
    product,
    row_scalars,
    segment_bounds,
    tiles,
    transposed,
)

WIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 2], instr_shape=[16, 64, 16]))  # 128 columns
SQUARE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16]))  # C x C


@gluon.jit
def _tangent(dx, tile, r):
    """From r times the gradient of r x, rows, to the gradient of x, where r = 1/|x|: dx - x r^2 (x . dx)."""
    x = tile.load(WIDE).to(gl.float32)
    return dx - x * (r * r * gl.sum(x * dx, axis=1))[:, None]


@gluon.jit(do_not_specialize=["L", "H", "SEGMENT", "SEGMENTS"])
def chunk_scan_bwd(
    q, k, n, pseudo, do, states, dq, dk, dv, beta, q_norm, k_norm, sums, dbeta, dg, dstate_out, dstate_in,
    scale, L, H, SEGMENT, SEGMENTS,
    NORM: gl.constexpr, GATE: gl.constexpr, GROUP: gl.constexpr, DSTATE_OUT: gl.constexpr, DSTATE_IN: gl.constexpr,
):  # fmt: skip
    """Arguments are those of `launch.chunk_scan_bwd`, with descriptors for what the copy engine moves:

    q, k, pseudo, do, dq, dk, dv: of `[tokens, H 128]` in tiles `[64, 128]`.  n: of `[tokens, H 64]` in tiles
    `[64, 64]`.  states: of `[chunks H 128, 128]` in tiles `[128, 128]`.
    """
    pid = gl.program_id(0)
    head = pid % H
    s = pid // H
    begin, first_chunk, chunks = segment_bounds(s, L, SEGMENT, SEGMENTS)
    tokens = gl.num_programs(0) // (H * SEGMENTS) * L  # of the batch
    column = head * D
    key_column = (head // GROUP) * D

    k_tiles = tiles(2, C, D)
    q_tiles = tiles(2, C, D)
    do_tiles = tiles(1, C, D)
    Vn_tiles = tiles(1, C, D)
    S_tiles = tiles(1, D, D)
    n_tiles = tiles(1, C, C)
    dS_tiles = tiles(1, D, D)
    dR_tiles = tiles(1, C, D)  # D dVn, then -dR
    P_tiles = tiles(1, C, C)  # P^T, then G
    dP_tiles = tiles(1, C, C)
    out_tiles = tiles(1, C, D)  # dv, dq and dk on their way out
    arrived = barriers(6)
    do_arrived = arrived.index(2)
    Vn_arrived = arrived.index(3)
    n_arrived = arrived.index(4)
    S_arrived = arrived.index(5)

    last = chunks - 1
    token = begin + last * C
    this = last % 2
    columns = (key_column, key_column)
    fetch((k, q), columns, (k_tiles.index(this), q_tiles.index(this)), token, arrived.index(this))
    fetch((do,), (column,), (do_tiles.index(0),), token, do_arrived)
    fetch((n,), (head * C,), (n_tiles.index(0),), token, n_arrived)
    fetch((pseudo,), (column,), (Vn_tiles.index(0),), token, Vn_arrived)
    fetch((states,), (0,), (S_tiles.index(0),), ((first_chunk + last) * H + head) * D, S_arrived)

    rows = gl.arange(0, C, layout=gl.SliceLayout(1, WIDE))
    rows_square = gl.arange(0, C, layout=gl.SliceLayout(1, SQUARE))
    i_row = rows_square[:, None]
    j_row = gl.arange(0, C, layout=gl.SliceLayout(0, SQUARE))[None, :]
    keys = gl.arange(0, D, layout=gl.SliceLayout(1, WIDE))[:, None]
    values = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))[None, :]
    at_state = (s * H + head).to(gl.int64) * (D * D) + keys * D + values
    dS = gl.zeros([D, D], gl.float32, layout=WIDE)
    if DSTATE_OUT:
        dS = gl.load(dstate_out + at_state) / scale
    next_b, next_r_q, next_r_k = row_scalars(beta, q_norm, k_norm, token, rows, head, H, NORM, GROUP)
    next_high = next_b
    if GATE:
        next_high = log_gates(sums, token, rows, head, tokens)

    for step in range(chunks):
        i = last - step
        zero = step >> 20  # opaque, see common.py
        this = i % 2
        other = (i + 1) % 2
        token = begin + i * C
        more = i > 0
        before = gl.maximum(token - C, begin)
        k_tile = k_tiles.index(this)
        q_tile = q_tiles.index(this)
        do_tile = do_tiles.index(zero)
        Vn_tile = Vn_tiles.index(zero)
        S_tile = S_tiles.index(zero)
        n_tile = n_tiles.index(zero)
        dS_tile = dS_tiles.index(zero)
        dR_tile = dR_tiles.index(zero)
        P_tile = P_tiles.index(zero)
        dP_tile = dP_tiles.index(zero)
        out_tile = out_tiles.index(zero)
        b = next_b
        r_q = next_r_q
        r_k = next_r_k
        next_b, next_r_q, next_r_k = row_scalars(beta, q_norm, k_norm, before, rows, head, H, NORM, GROUP)
        strength = b * r_k if NORM else b
        if GATE:
            high = next_high
            next_high = log_gates(sums, before, rows, head, tokens)
            last_high = log_gates(sums, token, C - 1, head, tokens)
            whole = gl.exp(last_high)
            from_start = gl.exp(high)
            to_end = decay(last_high - high)
            high_i = gl.convert_layout(high, gl.SliceLayout(1, SQUARE))[:, None]
            high_j = gl.convert_layout(high, gl.SliceLayout(0, SQUARE))[None, :]
        buffers = (k_tiles.index(other), q_tiles.index(other))
        fetch((k, q), columns, buffers, before, arrived.index(other), more)

        # dVn = P^T dO + K dS'
        dS_tile.store(dS.to(LOW))
        meet()
        mbarrier.wait(arrived.index(this), (step // 2) & 1)
        P_T = product(k_tile, transposed(q_tile), SQUARE)
        dVn = product(k_tile, dS_tile, WIDE)
        P_T = warpgroup_mma_wait(1, deps=[P_T])
        if GATE:
            P_T = P_T * decay(high_j - high_i)
        P_tile.store(gl.where(i_row <= j_row, P_T, 0.0).to(LOW))
        mbarrier.wait(do_arrived, step & 1)
        if NORM:  # the rows of dO carry the query's r from here on
            do_tile.store((r_q[:, None] * do_tile.load(WIDE).to(gl.float32)).to(LOW))
        meet()
        if GATE:
            dVn = warpgroup_mma_wait(0, deps=[dVn])
            dVn = dVn * to_end[:, None]
        dVn = add(dVn, P_tile, do_tile)
        dVn = warpgroup_mma_wait(0, deps=[dVn])
        if NORM:
            dVn = dVn * r_k[:, None]
        dR_tile.store((b[:, None] * dVn).to(LOW))
        meet()

        # Z = dVn + N^T (D dVn),  dR = D Z;  dP and dS' + Q^T dO run on behind it
        mbarrier.wait(n_arrived, step & 1)
        mbarrier.wait(Vn_arrived, step & 1)
        Z = add(dVn, transposed(n_tile), dR_tile)
        dP = product(do_tile, transposed(Vn_tile), SQUARE)
        if not GATE:
            dS = add(dS, transposed(q_tile), do_tile)
        Z = warpgroup_mma_wait(1 if GATE else 2, deps=[Z])
        tma.store_wait(0)
        meet_only()  # N and D dVn have been read, the last dk is out
        weak = gl.abs(strength) < WEAK
        kept = gl.where(weak, WEAK, strength)
        out_tile.store(((b * scale)[:, None] * Z).to(LOW))
        dR_tile.store((-kept[:, None] * Z).to(LOW))
        dP = warpgroup_mma_wait(0 if GATE else 1, deps=[dP])
        if GATE:
            M = dP * transposed(P_tile).load(SQUARE).to(gl.float32)
            dP = dP * decay(high_i - high_j)
        dP_tile.store(gl.where(i_row >= j_row, dP, 0.0).to(LOW))
        meet()
        tma.async_copy_shared_to_global(dv, [token, column], out_tile)
        fetch((n,), (head * C,), (n_tile,), before, n_arrived, more)

        kept_square = gl.convert_layout(kept, gl.SliceLayout(1, SQUARE))
        at_row = (token.to(gl.int64) + rows_square) * H + head
        if GATE:
            # G and K K^T first: then dO and dR take gamma, and Vn takes to_end, as everything after them needs
            G = product(dR_tile, transposed(Vn_tile), SQUARE)
            overlaps = product(k_tile, transposed(k_tile), SQUARE)
            G, overlaps = warpgroup_mma_wait(0, deps=[G, overlaps])
            db = G * (-scale / (kept_square * kept_square))[:, None]
            G = gl.where(i_row > j_row, G * decay(high_i - high_j), 0.0)
            M = gl.where(i_row > j_row, M + G * overlaps, 0.0)
            P_tile.store(G.to(LOW))
            crossing = gl.sum(M, axis=1) - gl.convert_layout(gl.sum(M, axis=0), gl.SliceLayout(1, SQUARE))
            meet_only()  # dO, dR and Vn have been read
            do_tile.store((from_start[:, None] * do_tile.load(WIDE).to(gl.float32)).to(LOW))
            dR_tile.store((from_start[:, None] * dR_tile.load(WIDE).to(gl.float32)).to(LOW))
            Vn_tile.store((to_end[:, None] * Vn_tile.load(WIDE).to(gl.float32)).to(LOW))
            mbarrier.wait(S_arrived, step & 1)
            through = whole * gl.sum(gl.sum(S_tile.load(WIDE).to(gl.float32) * dS, axis=1), axis=0)
            dS = dS * whole
            meet()
            dS = add(dS, transposed(q_tile), do_tile)
            dS = add(dS, transposed(k_tile), dR_tile)
            dQ = product(do_tile, transposed(S_tile), WIDE)
            dK = product(dR_tile, transposed(S_tile), WIDE)
            dS, dQ = warpgroup_mma_wait(1, deps=[dS, dQ])
            leaving = gl.sum(q_tile.load(WIDE).to(gl.float32) * dQ, axis=1)
            dQ = add(dQ, dP_tile, k_tile)
            dK = warpgroup_mma_wait(1, deps=[dK])
            read = gl.sum(k_tile.load(WIDE).to(gl.float32) * dK, axis=1)
            dK = add(dK, Vn_tile, transposed(dS_tile))
            dQ, dK = warpgroup_mma_wait(0, deps=[dQ, dK])
            arriving = gl.sum(k_tile.load(WIDE).to(gl.float32) * dK, axis=1) - read
            from_here = gl.convert_layout(leaving + read, gl.SliceLayout(0, SQUARE))
            from_here += gl.convert_layout(crossing, gl.SliceLayout(0, SQUARE))
            till_here = gl.convert_layout(arriving, gl.SliceLayout(0, SQUARE))
            passing = gl.where(j_row >= i_row, from_here[None, :], till_here[None, :])
            gl.store(dg + at_row, scale * (through + gl.sum(passing, axis=1)))
            dK = add(dK, transposed(dP_tile), q_tile)
            dK = add(dK, P_tile, k_tile)
            dK = add(dK, transposed(P_tile), k_tile)
            gl.store(dbeta + at_row[:, None] + j_row * 0, db.to(dbeta.dtype.element_ty), mask=i_row == j_row)
        else:
            # dS = dS' + Q^T dO - K^T dR  (dS' is still in its tile);  G and, on its diagonal, -beta^2 dbeta
            dS = add(dS, transposed(k_tile), dR_tile)
            G = product(dR_tile, transposed(Vn_tile), SQUARE)
            dS, G = warpgroup_mma_wait(0, deps=[dS, G])
            # Five products begun, of which the first two make dQ
            mbarrier.wait(S_arrived, step & 1)
            dQ = product(do_tile, transposed(S_tile), WIDE)
            dQ = add(dQ, dP_tile, k_tile)
            dK = product(dR_tile, transposed(S_tile), WIDE)
            dK = add(dK, Vn_tile, transposed(dS_tile))
            dK = add(dK, transposed(dP_tile), q_tile)
            db = G * (-scale / (kept_square * kept_square))[:, None]
            gl.store(dbeta + at_row[:, None] + j_row * 0, db.to(dbeta.dtype.element_ty), mask=i_row == j_row)
            P_tile.store(gl.where(i_row > j_row, G, 0.0).to(LOW))
            meet()
            dK = add(dK, P_tile, k_tile)
            dK = add(dK, transposed(P_tile), k_tile)

        # What is done leaves, and its tile is filled anew, while the rest of dK runs
        if not GATE:
            dQ = warpgroup_mma_wait(5, deps=[dQ])
        tma.store_wait(0)
        meet_only()  # dO has been read, dv is out
        fetch((do,), (column,), (do_tile,), before, do_arrived, more)
        if NORM:
            dQ = _tangent(dQ, q_tile, r_q)
        out_tile.store((dQ * scale).to(LOW))
        meet()
        tma.async_copy_shared_to_global(dq, [token, column], out_tile)
        dK = warpgroup_mma_wait(0, deps=[dK])
        tma.store_wait(0)
        meet_only()  # every tile has been read, dq is out
        fetch((states,), (0,), (S_tile,), ((first_chunk + i - 1) * H + head) * D, S_arrived, more)
        fetch((pseudo,), (column,), (Vn_tile,), before, Vn_arrived, more)
        if NORM:
            dK = _tangent(dK, k_tile, r_k)
        out_tile.store((gl.where(weak, strength * (scale / WEAK), scale)[:, None] * dK).to(LOW))
        meet()
        tma.async_copy_shared_to_global(dk, [token, column], out_tile)

    if DSTATE_IN:
        gl.store(dstate_in + at_state, dS * scale)
    tma.store_wait(0)
