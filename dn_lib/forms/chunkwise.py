"""Chapter 4: the delta rule a chunk at a time.

In the chapter's order: one chunk (`chunk_wy`, `chunk_states`), the whole sequence
(`chunkwise_delta_rule`), the attention matrix (`delta_attention_matrix`, `parallel_delta_rule`),
sequences of several lengths (`varlen_delta_rule`) and what a form costs (`multiply_adds`, `saved_bytes`).
The backward pass by hand is in `chunkwise_backward`, chunks as affine maps are in `affine`.

Everywhere q, k are `[..., L, d_k]`, v is `[..., L, d_v]`, beta is `[..., L]` and a state is
`[..., d_k, d_v]`, with any leading batch dimensions.  Arithmetic and states are float64 if any input
is, and float32 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dn_lib.forms.common import (
    check_chunk_size,
    check_cu_seqlens,
    check_function,
    check_inputs,
    check_sequence,
    check_shape,
    check_state,
    check_tensors,
    fresh,
    initial_state_or_zeros,
    over_sequences,
    scale_or_default,
    to_chunks,
    working_dtype,
)
from dn_lib.forms.householder import ut_transform


def chunk_wy(k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """W = T K `[..., C, d_k]` and U = T V `[..., C, d_v]` of one chunk (or of many, batched in front).

    T is the UT matrix of chapter 3, T = (I + tril(diag(beta) K K^T, -1))^{-1} diag(beta).

    >>> w, u = chunk_wy(torch.eye(2), torch.ones(2, 3), torch.tensor([0.5, 1.0]))
    >>> u[:, 0].tolist()
    [0.5, 1.0]
    """
    check_inputs({"k": k}, {"v": v}, {"beta": beta}, {}, time="C")
    dtype = working_dtype(k, v, beta)
    k, v = k.to(dtype), v.to(dtype)
    T = ut_transform(k, beta)
    return T @ k, T @ v


def chunk_states(k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Carry the state over n chunks: the only part of the algorithm that must wait for what came before.

    k, v, beta: cut into chunks, `[..., n, C, d_k]`, `[..., n, C, d_v]`, `[..., n, C]`.
    state: `[..., d_k, d_v]`.  Returns the state that enters each chunk `[..., n, d_k, d_v]`, the
    pseudo-values U - W S `[..., n, C, d_v]`, and the state after the last chunk.
    Implements eq-chunk-state.  Source: Yang et al. 2024.

    >>> k, v = torch.eye(2)[None], torch.ones(1, 2, 2)
    >>> chunk_states(k, v, torch.ones(1, 2), torch.zeros(2, 2))[2].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    check_inputs({"k": k}, {"v": v}, {"beta": beta}, {}, time="C")
    if k.ndim < 3:
        raise ValueError(f"k must be [..., n, C, d_k], got {list(k.shape)}")
    check_state("state", state, k, v, rank=3)
    dtype = working_dtype(k, v, beta, state)
    k, v = k.to(dtype), v.to(dtype)
    state = state.to(dtype).expand(*k.shape[:-3], *state.shape[-2:])
    w, u = chunk_wy(k, v, beta)  # every chunk at once: nothing here needs a state
    states, pseudo = [], []
    for w_i, u_i, k_i in zip(w.unbind(-3), u.unbind(-3), k.unbind(-3), strict=True):
        states.append(state)
        pseudo.append(u_i - w_i @ state)
        state = state + k_i.mT @ pseudo[-1]
    if not states:  # an empty sequence
        return state.new_zeros(*k.shape[:-2], *state.shape[-2:]), u, fresh(state)
    return torch.stack(states, dim=-3), torch.stack(pseudo, dim=-3), state


def chunkwise_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The delta rule in ceil(L / C) sequential steps: eq-chunk-state and eq-chunk-output.

    q, k: `[..., L, d_k]`, v: `[..., L, d_v]`, beta: `[..., L]`; any float dtype.
    initial_state: `[..., d_k, d_v]`, or None for zeros.  scale: multiplies the queries, d_k**-0.5 if None.
    chunk_size: C, any integer of at least 1.
    Returns o `[..., L, d_v]` in v's dtype and the final state, float32 or float64.
    Raises ValueError, naming the argument, if shapes do not match or chunk_size < 1.
    Source: Yang et al. 2024.

    >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 100, 8), dim=-1)
    >>> [tuple(x.shape) for x in chunkwise_delta_rule(q, k, v, torch.rand(100))]
    [(100, 8), (8, 8)]
    """
    check_sequence(q, k, v, initial_state, beta=beta)
    check_chunk_size(chunk_size)
    dtype, length = working_dtype(q, k, v, beta, initial_state), q.shape[-2]
    state = initial_state_or_zeros(k, v, initial_state, dtype)
    C = min(chunk_size, max(length, 1))
    qc, kc, vc, bc = (to_chunks(x.to(dtype), C) for x in (q, k, v, beta[..., None]))
    qc = qc * scale_or_default(scale, q)
    states, pseudo, state = chunk_states(kc, vc, bc[..., 0], state)
    o = qc @ states + (qc @ kc.mT).tril() @ pseudo
    return o.flatten(-3, -2)[..., :length, :].to(v.dtype), state


# The fully parallel form -------------------------------------------------------------------------------
def delta_attention_matrix(q: Tensor, k: Tensor, beta: Tensor, *, scale: float | None = None) -> Tensor:
    """A = tril(Q K^T) T `[..., L, L]`, so that O = A V: the attention map of DeltaNet.

    Entries may be negative and rows need not sum to one.  O(L^3) work: for looking at, not for training.
    Implements eq-parallel-form.  Raises ValueError if shapes do not match.
    Source: Yang et al. 2024.

    >>> k = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> delta_attention_matrix(k, k, torch.ones(2), scale=1.0).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    check_sequence(q, k, k, beta=beta)
    dtype = working_dtype(q, k, beta)
    qs, ks = q.to(dtype) * scale_or_default(scale, q), k.to(dtype)
    return (qs @ ks.mT).tril() @ ut_transform(ks, beta.to(dtype))


def parallel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule with no loop over time: O = A V + (Q - A K) S, in O(L^3 + L^2 d) work.

    Arguments, results and errors as for `chunkwise_delta_rule`.  Implements eq-parallel-initial-state.

    >>> q, k, v = (torch.randn(6, 4) for _ in range(3))
    >>> parallel_delta_rule(q, k / k.norm(dim=-1, keepdim=True), v, torch.rand(6))[0].shape
    torch.Size([6, 4])
    """
    check_sequence(q, k, v, initial_state, beta=beta)
    dtype = working_dtype(q, k, v, beta, initial_state)
    state = initial_state_or_zeros(k, v, initial_state, dtype)
    qs, ks, vs, bs = (x.to(dtype) for x in (q, k, v, beta))
    qs = qs * scale_or_default(scale, q)
    T = ut_transform(ks, bs)
    A = (qs @ ks.mT).tril() @ T
    o = A @ vs + (qs - A @ ks) @ state
    return o.to(v.dtype), state + ks.mT @ (T @ (vs - ks @ state))


# Sequences of several lengths --------------------------------------------------------------------------
def varlen_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    *,
    form: Callable[..., tuple[Tensor, Tensor]] = chunkwise_delta_rule,
    initial_state: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Several sequences laid end to end in one row of L tokens; the state starts anew at each offset.

    cu_seqlens: integers `[N + 1]`, 0 = c_0 <= c_1 <= ... <= c_N = L; sequence n is tokens c_n to c_{n+1} - 1.
    initial_state: `[..., N, d_k, d_v]` or None.  form: any function with the signature of
    `chunkwise_delta_rule`, which gets `options`.
    Returns o `[..., L, d_v]` and the N final states `[..., N, d_k, d_v]`.
    Raises ValueError unless the offsets rise from 0 to L.

    >>> q, k, v = (torch.randn(5, 4) for _ in range(3))
    >>> varlen_delta_rule(q, k / 2, v, torch.rand(5), torch.tensor([0, 2, 5]))[1].shape
    torch.Size([2, 4, 4])
    """
    check_sequence(q, k, v, beta=beta)
    check_function("form", form)
    check_cu_seqlens(cu_seqlens, q)
    if cu_seqlens.is_meta:
        raise ValueError("cu_seqlens must have values, got a tensor on meta")
    if initial_state is not None:
        check_tensors(q=q, initial_state=initial_state)
        expected = (*k.shape[:-2], cu_seqlens.shape[0] - 1, k.shape[-1], v.shape[-1])
        check_shape("initial_state", initial_state, "..., N, d_k, d_v", expected, "k, v and cu_seqlens")
    return over_sequences(form, (q, k, v, beta), cu_seqlens, initial_state=initial_state, **options)


# What a form costs -------------------------------------------------------------------------------------
def _triangular_solve_flops(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Twice the multiply-adds of substitution with a unit triangle: m (m - 1) / 2 for each column."""
    (*_, m), columns = a, b[-1]
    return math.prod(b[:-2]) * m * (m - 1) * columns


def multiply_adds(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """How many multiply-adds the matrix products and triangular solves of `fn(*args, **kwargs)` take.

    A product of m x n by n x p counts m n p; substitution in a unit triangle of m rows for p columns counts
    p m (m - 1) / 2.  Element-wise work is not counted.

    >>> multiply_adds(torch.matmul, torch.ones(2, 3), torch.ones(3, 5))
    30
    """
    check_function("fn", fn)
    from torch.utils.flop_counter import FlopCounterMode  # here, since it takes half a second to import

    mapping = {torch.ops.aten.linalg_solve_triangular: _triangular_solve_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        fn(*args, **kwargs)
    return counter.get_total_flops() // 2


def saved_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes of memory that autograd keeps for the backward pass of `fn(*args, **kwargs)`.

    A piece of memory that several saved tensors share counts once; inputs count if they are saved.

    >>> x = torch.ones(10, requires_grad=True)
    >>> saved_bytes(torch.exp, x), saved_bytes(torch.neg, x)
    (40, 0)
    """
    check_function("fn", fn)
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = fn(*args, **kwargs)
    total = sum(x.untyped_storage().nbytes() for x in kept.values())
    del result  # until here, so that no address in `kept` was used twice
    return total
