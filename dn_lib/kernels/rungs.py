"""The rungs of chapter 5's ladder between four kernels and one: each keeps one more thing on chip than the one before.

    four kernels    T, then W and U, then the states, then the output       `dn_lib.kernels.ladder.delta_rule_in_steps`
    three kernels   T, then W and U, then one walk: S and U - WS stay       `delta_rule_in_three`
    two kernels     T, then one walk: W and U stay, too                     `delta_rule_in_two`
    one kernel      all in the walk: T stays, too                           `dn_lib.kernels.ladder.delta_rule_in_one`

They share the loads, the dots and the inverse, so that a difference in time is the price of what goes through memory,
less that of what can no longer be done in parallel. Arguments and errors are those of `delta_rule_in_steps`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dn_lib.forms.common import scale_or_default
from dn_lib.kernels.ladder import (
    block_width,
    dot_type,
    load_tile,
    prepared,
    store_tile,
    ut_transform,
    value_block,
    wu_kernel,
)


@triton.jit
def walk_wu_kernel(
    q_ptr, k_ptr, W_ptr, U_ptr, o_ptr, final_ptr, scale, L, H, d_k, d_v,
    DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Steps 3 and 4, a program a head and a block of values: S' = S + K^T (U - W S), and O from both."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    head = b * L * H + h
    S = tl.zeros([BK, BV], tl.float32)
    for start in range(0, L, C):
        W = load_tile(W_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
        U = load_tile(U_ptr + head * d_v, start + rows, values, H * d_v, L, d_v)
        new = (U - tl.dot(W, S.to(DOT), input_precision="ieee")).to(DOT)
        q = load_tile(q_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
        k = load_tile(k_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
        P = tl.where(rows[:, None] >= rows[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
        o = tl.dot(q, S.to(DOT), input_precision="ieee") + tl.dot(P.to(DOT), new, input_precision="ieee")
        store_tile(o_ptr + head * d_v, scale * o, start + rows, values, H * d_v, L, d_v)
        S += tl.dot(tl.trans(k), new, input_precision="ieee")
    store_tile(final_ptr + tl.program_id(0).to(tl.int64) * d_k * d_v, S, keys, values, d_v, d_k, d_v)


@triton.jit
def walk_kernel(
    q_ptr, k_ptr, v_ptr, T_ptr, o_ptr, final_ptr, scale, L, H, d_k, d_v,
    DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Steps 2 to 4, a program a head and a block of values; U - W S is T (V - K S)."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    head = b * L * H + h
    S = tl.zeros([BK, BV], tl.float32)
    for start in range(0, L, C):
        k = load_tile(k_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
        T = load_tile(T_ptr + head * C, start + rows, rows, H * C, L, C).to(DOT)
        v = load_tile(v_ptr + head * d_v, start + rows, values, H * d_v, L, d_v)
        R = v - tl.dot(k, S.to(DOT), input_precision="ieee")
        new = tl.dot(T, R.to(DOT), input_precision="ieee").to(DOT)
        q = load_tile(q_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
        P = tl.where(rows[:, None] >= rows[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
        o = tl.dot(q, S.to(DOT), input_precision="ieee") + tl.dot(P.to(DOT), new, input_precision="ieee")
        store_tile(o_ptr + head * d_v, scale * o, start + rows, values, H * d_v, L, d_v)
        S += tl.dot(tl.trans(k), new, input_precision="ieee")
    store_tile(final_ptr + tl.program_id(0).to(tl.int64) * d_k * d_v, S, keys, values, d_v, d_k, d_v)


def delta_rule_in_three(q, k, v, beta, *, scale=None, chunk_size=16, method="merging", block_v=None):
    """The delta rule as three kernels: T, W and U are written to memory; the states are not.

    Shapes, and the two results, as in `dn_lib.kernels.ladder.delta_rule_in_one`.

    >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 1, 40, 2, 16), dim=-1).unbind(0)
    >>> [list(x.shape) for x in delta_rule_in_three(q, k, v, torch.rand(1, 40, 2))]
    [[1, 40, 2, 16], [1, 2, 16, 16]]
    """
    q, k, v, beta = prepared(q=q, k=k, v=v, beta=beta)
    scale = scale_or_default(scale, q)
    (B, L, H, d_k), d_v = q.shape, v.shape[-1]
    narrow = value_block(chunk_size, block_v, d_v)
    sizes: dict[str, Any] = dict(DOT=dot_type(q), C=chunk_size, BK=block_width(d_k), BV=narrow)
    T = ut_transform(k, beta, method=method, chunk_size=chunk_size)
    W, U, o = torch.empty_like(k), torch.empty_like(v), torch.empty_like(v)
    final = torch.empty(B, H, d_k, d_v, dtype=torch.float32, device=q.device)
    wu_kernel[(triton.cdiv(L, chunk_size), B * H)](T, k, v, W, U, L, H, d_k, d_v, **{**sizes, "BV": block_width(d_v)})
    walk_wu_kernel[(B * H, triton.cdiv(d_v, narrow))](q, k, W, U, o, final, scale, L, H, d_k, d_v, **sizes)
    return o, final


def delta_rule_in_two(q, k, v, beta, *, scale=None, chunk_size=16, method="merging", block_v=None):
    """The delta rule as two kernels: T alone is written to memory. The operator's two kernels have the same division of
    work, and a better walk.

    Shapes, and the two results, as in `dn_lib.kernels.ladder.delta_rule_in_one`.

    >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 1, 40, 2, 16), dim=-1).unbind(0)
    >>> [list(x.shape) for x in delta_rule_in_two(q, k, v, torch.rand(1, 40, 2))]
    [[1, 40, 2, 16], [1, 2, 16, 16]]
    """
    q, k, v, beta = prepared(q=q, k=k, v=v, beta=beta)
    scale = scale_or_default(scale, q)
    (B, L, H, d_k), d_v = q.shape, v.shape[-1]
    narrow = value_block(chunk_size, block_v, d_v)
    sizes: dict[str, Any] = dict(DOT=dot_type(q), C=chunk_size, BK=block_width(d_k), BV=narrow)
    T = ut_transform(k, beta, method=method, chunk_size=chunk_size)
    o, final = torch.empty_like(v), torch.empty(B, H, d_k, d_v, dtype=torch.float32, device=q.device)
    walk_kernel[(B * H, triton.cdiv(d_v, narrow))](q, k, v, T, o, final, scale, L, H, d_k, d_v, **sizes)
    return o, final
