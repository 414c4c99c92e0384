"""The recurrence itself, a token at a time: short prompts, decoding, and the paper's baseline."""

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.common import segment_bounds, state_mask, state_offsets
from dn_lib.kernels.delta_rule.gates import key_head


@triton.jit(do_not_specialize=["L", "H"])
def recurrent(
    q, k, v, beta, g, o, state_in, state_out, cu_seqlens, scale, L, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, GROUP: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, STATE_IN: tl.constexpr, STATE_OUT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, o_t = scale S_t^T q_t, in float32 throughout.

    One program for each sequence, head and BV value channels, which never need each other.  state_out may be
    state_in: every program reads its tile before it writes it.  A single token moves the state twice
    (8 K V bytes a head) and little else: decoding is bound by that.
    GATE: the state is first multiplied by exp(g_t).  Without ERASE k_t v_t^T is added to it, whatever it holds.
    GROUP: value heads that read one key head; H counts value heads.
    """
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    values = (pid % VALUE_BLOCKS) * BV + tl.arange(0, BV)
    head = (pid // VALUE_BLOCKS) % H
    key, KEY_HEADS = key_head(head, H, GROUP)
    s = pid // (VALUE_BLOCKS * H)
    begin, end, _ = segment_bounds(s, cu_seqlens, cu_seqlens, L, L, 1, 1, VARLEN)
    keys = tl.arange(0, BK)
    inside = state_mask(keys, values, K, V)
    at = state_offsets(s.to(tl.int64), head, H, keys, values, K, V)
    S = tl.zeros([BK, BV], dtype=tl.float32)
    if STATE_IN:
        S = tl.load(state_in + at, mask=inside, other=0.0).to(tl.float32)
    for i in range(tl.cdiv(end - begin, 1).to(tl.int32)):
        token = begin + i
        row_k = (token * KEY_HEADS + key) * K + keys
        row_v = (token * H + head) * V + values
        k_t = tl.load(k + row_k, mask=keys < K, other=0.0).to(tl.float32)
        q_t = tl.load(q + row_k, mask=keys < K, other=0.0).to(tl.float32)
        v_t = tl.load(v + row_v, mask=values < V, other=0.0).to(tl.float32)
        if ERASE:
            b = tl.load(beta + token * H + head).to(tl.float32)
        if NORM:
            k_t = k_t / tl.sqrt(tl.sum(k_t * k_t) + EPS)
            q_t = q_t / tl.sqrt(tl.sum(q_t * q_t) + EPS)
        if GATE:
            S = S * tl.exp(tl.load(g + token * H + head).to(tl.float32))
        if ERASE:
            error = v_t - tl.sum(k_t[:, None] * S, axis=0)
            S += k_t[:, None] * (b * error)[None, :]
        else:
            S += k_t[:, None] * v_t[None, :]
        o_t = scale * tl.sum(q_t[:, None] * S, axis=0)
        tl.store(o + row_v, o_t.to(o.dtype.element_ty), mask=values < V)
    if STATE_OUT:
        tl.store(state_out + at, S, mask=inside)
