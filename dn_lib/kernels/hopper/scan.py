"""`chunk_scan_fwd` for Hopper: carries the state S through a segment and writes o.

For one chunk, in the letters of dn_lib/kernels/README.md (rows are time, D = diag(beta), the scale is put on O):

    R = V - K S                     E = R + N (D R)                 Vn = D E
    O = Q S + tril(Q K^T) Vn        S' = S + K^T Vn

With GATE, gamma_i the product of the gates since the chunk began and to_end = gamma_C / gamma: K S and Q S are
multiplied by gamma, entry [i, j] of Q K^T by gamma_i / gamma_j, and S' = gamma_C S + K^T (to_end Vn).

A program walks one segment of one head, for VALUES of the 128 value channels: all of them with eight warps (two
warpgroups, one program a streaming multiprocessor, nothing is read twice), or 64 with four warps, which fills the chip
better where heads are few.  Each warpgroup owns 64 columns of every result.

All tiles of a chunk are fetched a chunk ahead, into one of two sets of buffers.  What leaves by the copy engine leaves
from where the tensor cores read it: S, rounded, is both their operand and what is kept for the backward.

Bytes for a token and head, X = 2 * 128: reads 3 X (q, k, v) and 128 (N), of which q, k and N once for each VALUES;
writes X (o), and with SAVE 3 X more: X for Vn and 2 * 128^2 / 64 = 2 X for the states.
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


@gluon.jit(do_not_specialize=["L", "H", "SEGMENT", "SEGMENTS"])
def chunk_scan_fwd(
    q, k, v, n, o, pseudo, states, beta, q_norm, k_norm, sums, state_in, state_out, scale, L, H, SEGMENT, SEGMENTS,
    VALUES: gl.constexpr, NORM: gl.constexpr, GATE: gl.constexpr, GROUP: gl.constexpr, SAVE: gl.constexpr,
    STATE_IN: gl.constexpr, STATE_OUT: gl.constexpr,
):  # fmt: skip
    """Arguments are those of `launch.chunk_scan_fwd`, with descriptors for what the copy engine moves:

    q, k: of `[tokens, H 128]` in tiles `[64, 128]`.  v, o, pseudo: in tiles `[64, VALUES]`.  n: of `[tokens, H 64]` in
    tiles `[64, 64]`.  states: of `[chunks H 128, 128]` in tiles `[128, VALUES]`.  SAVE: writes pseudo and states.
    """
    GROUPS: gl.constexpr = VALUES // 64
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, GROUPS], instr_shape=[16, 64, 16])
    SQUARE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], instr_shape=[16, 64 // GROUPS, 16])

    pid = gl.program_id(0)
    BLOCKS: gl.constexpr = D // VALUES
    value = (pid % BLOCKS) * VALUES
    head = (pid // BLOCKS) % H
    key = head // GROUP
    s = pid // (BLOCKS * H)
    begin, first_chunk, chunks = segment_bounds(s, L, SEGMENT, SEGMENTS)
    tokens = gl.num_programs(0) // (BLOCKS * H * SEGMENTS) * L  # of the batch

    k_tiles = tiles(2, C, D)
    q_tiles = tiles(2, C, D)
    v_tiles = tiles(2, C, VALUES)
    n_tiles = tiles(2, C, C)
    S_tiles = tiles(1, D, VALUES)
    Vn_tiles = tiles(1, C, VALUES)  # D R, then Vn
    P_tiles = tiles(1, C, C)
    o_tiles = tiles(1, C, VALUES)
    kept_tiles = tiles(1, C, VALUES)
    end_tiles = Vn_tiles
    if GATE:
        end_tiles = tiles(1, C, VALUES)  # to_end Vn
    arrived = barriers(2)
    inputs = (k, v, n, q)
    columns = (key * D, head * D + value, head * C, key * D)
    first = (k_tiles.index(0), v_tiles.index(0), n_tiles.index(0), q_tiles.index(0))
    fetch(inputs, columns, first, begin, arrived.index(0))

    rows = gl.arange(0, C, layout=gl.SliceLayout(1, WIDE))
    i_row = gl.arange(0, C, layout=gl.SliceLayout(1, SQUARE))[:, None]
    j_row = gl.arange(0, C, layout=gl.SliceLayout(0, SQUARE))[None, :]
    keys = gl.arange(0, D, layout=gl.SliceLayout(1, WIDE))[:, None]
    values = value + gl.arange(0, VALUES, layout=gl.SliceLayout(0, WIDE))[None, :]
    at_state = (s * H + head).to(gl.int64) * (D * D) + keys * D + values
    S = gl.zeros([D, VALUES], gl.float32, layout=WIDE)
    if STATE_IN:
        S = gl.load(state_in + at_state)
    S_tiles.index(0).store(S.to(LOW))
    meet()
    next_b, next_r_q, next_r_k = row_scalars(beta, q_norm, k_norm, begin, rows, head, H, NORM, GROUP)
    next_high = next_b
    if GATE:
        next_high = log_gates(sums, begin, rows, head, tokens)

    for i in range(chunks):
        zero = i >> 20  # opaque, see common.py
        this = i % 2
        other = (i + 1) % 2
        token = begin + i * C
        k_tile = k_tiles.index(this)
        q_tile = q_tiles.index(this)
        S_tile = S_tiles.index(zero)
        Vn_tile = Vn_tiles.index(zero)
        P_tile = P_tiles.index(zero)
        o_tile = o_tiles.index(zero)
        kept_tile = kept_tiles.index(zero)
        end_tile = end_tiles.index(zero)
        after = begin + gl.minimum(i + 1, chunks - 1) * C
        buffers = (k_tiles.index(other), v_tiles.index(other), n_tiles.index(other), q_tiles.index(other))
        fetch(inputs, columns, buffers, after, arrived.index(other), i + 1 < chunks)
        if SAVE:  # the state that enters this chunk
            tma.async_copy_shared_to_global(states, [((first_chunk + i) * H + head) * D, value], S_tile)
        b = next_b
        r_q = next_r_q
        r_k = next_r_k
        next_b, next_r_q, next_r_k = row_scalars(beta, q_norm, k_norm, after, rows, head, H, NORM, GROUP)
        strength = b * r_k if NORM else b
        if GATE:
            high = next_high
            next_high = log_gates(sums, after, rows, head, tokens)
            last = log_gates(sums, token, C - 1, head, tokens)
            from_start = gl.exp(high)
            to_end = decay(last - high)
            high_i = gl.convert_layout(high, gl.SliceLayout(1, SQUARE))[:, None]
            high_j = gl.convert_layout(high, gl.SliceLayout(0, SQUARE))[None, :]

        # R = V - K S; Q S and Q K^T run on behind it
        mbarrier.wait(arrived.index(this), (i // 2) & 1)
        read = product(k_tile, S_tile, WIDE)
        O = product(q_tile, S_tile, WIDE)
        P = product(q_tile, transposed(k_tile), SQUARE)
        V = v_tiles.index(this).load(WIDE).to(gl.float32)
        read = warpgroup_mma_wait(2, deps=[read])
        if NORM:
            read = read * r_k[:, None]
        if GATE:
            read = read * from_start[:, None]
        R = V - read
        Vn_tile.store((b[:, None] * R).to(LOW))
        meet()
        # E = R + N (D R)
        E = add(R, n_tiles.index(this), Vn_tile)
        if GATE:
            P, O = warpgroup_mma_wait(1, deps=[P, O])
            P = P * decay(high_i - high_j)
            O = O * from_start[:, None]
        else:
            P = warpgroup_mma_wait(1, deps=[P])
        P_tile.store(gl.where(i_row >= j_row, P, 0.0).to(LOW))
        E = warpgroup_mma_wait(0, deps=[E])
        if SAVE:
            tma.store_wait(2)  # what was kept of the chunk before is out; its o and this chunk's state may still go
        meet_only()  # D R has been read
        Vn_tile.store((strength[:, None] * E).to(LOW))
        if GATE:
            end_tile.store(((strength * to_end)[:, None] * E).to(LOW))
        if SAVE:
            kept_tile.store((gl.where(gl.abs(strength) < WEAK, WEAK, strength)[:, None] * E).to(LOW))
        meet()
        # S' = S + K^T Vn,  O = Q S + P Vn
        if GATE:
            S = S * gl.exp(last)
        S = add(S, transposed(k_tile), end_tile)
        O = add(O, P_tile, Vn_tile)
        if SAVE:
            tma.async_copy_shared_to_global(pseudo, [token, head * D + value], kept_tile)
        S, O = warpgroup_mma_wait(0, deps=[S, O])
        tma.store_wait(1 if SAVE else 0)  # this chunk's state and the o before are out; what was kept may still go
        meet_only()
        S_tile.store(S.to(LOW))
        if NORM:
            O = O * r_q[:, None]
        o_tile.store((O * scale).to(LOW))
        meet()
        tma.async_copy_shared_to_global(o, [token, head * D + value], o_tile)

    if STATE_OUT:
        gl.store(state_out + at_state, S)
    tma.store_wait(0)
