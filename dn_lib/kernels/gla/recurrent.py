"""The recurrence itself with a gate for each key channel, a token at a time: short prompts and decoding."""

# pyright: reportGeneralTypeIssues=false
# (Bodies of kernels are Triton's language in Python's syntax, which no type checker of Python knows.)

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.common import segment_bounds, state_mask, state_offsets
from dn_lib.kernels.delta_rule.gates import key_head
from dn_lib.kernels.gla.common import load_row


@triton.jit(do_not_specialize=["L", "H"])
def recurrent(
    q, k, v, g, o, state_in, state_out, cu_seqlens, scale, L, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr,
    STATE_IN: tl.constexpr, STATE_OUT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """S_t = exp(g_t) * S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, in float32 throughout.

    One program for each sequence, head and BV value channels.  state_out may be state_in: every program reads its tile
    before it writes it.  A single token moves the state twice, 8 K V bytes a head, and little else.
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
        q_t = load_row(q, token, key, KEY_HEADS, True, keys, K)
        k_t = load_row(k, token, key, KEY_HEADS, True, keys, K)
        v_t = load_row(v, token, head, H, True, values, V)
        gate = tl.exp(load_row(g, token, head, H, True, keys, K))
        S = S * gate[:, None] + k_t[:, None] * v_t[None, :]
        o_t = scale * tl.sum(q_t[:, None] * S, axis=0)
        tl.store(o + (token * H + head) * V + values, o_t.to(o.dtype.element_ty), mask=values < V)
    if STATE_OUT:
        tl.store(state_out + at, S, mask=inside)
