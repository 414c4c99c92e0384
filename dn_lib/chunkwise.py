"""Chapter 4: the delta rule a chunk at a time.

In the chapter's order: one chunk (`chunk_wy`, `chunk_states`), the whole sequence
(`chunkwise_delta_rule`), the attention matrix (`delta_attention_matrix`, `parallel_delta_rule`),
sequences of several lengths (`varlen_delta_rule`), what a form costs (`multiply_adds`, `saved_bytes`),
the backward pass by hand (`chunk_backward`, `chunkwise_delta_rule_backward`,
`reversible_chunkwise_delta_rule`) and chunks as affine maps (`chunk_affine`, `compose_affine`,
`segment_affine`).

Everywhere q, k are `[..., L, d_k]`, v is `[..., L, d_v]`, beta is `[..., L]` and a state is
`[..., d_k, d_v]`, with any leading batch dimensions.  Arithmetic and states are float64 if any input
is, and float32 otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.common import (
    check_channels,
    check_chunk_size,
    check_function,
    check_is_tensor,
    check_one_dtype,
    check_sequence,
    check_shape,
    check_tensors,
    differentiable_once,
    fresh,
    initial_state_or_zeros,
    refuse_transforms,
    scale_or_default,
    working_dtype,
)
from dn_lib.householder import scaled_inverse, ut_transform


def _check(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor | None = None, chunk_size: int = 1
) -> None:
    """Raise an error that names the argument whose type, shape, device or value is wrong."""
    check_sequence(q, k, v, initial_state)
    check_tensors(q=q, beta=beta)
    check_shape("beta", beta, "..., L", k.shape[:-1], "k")
    check_chunk_size(chunk_size)


def _check_chunks(k: Tensor, v: Tensor, beta: Tensor, time: str = "C") -> None:
    """As `_check`, for tokens that are cut into chunks already (or not: `time` is "L"), and without queries."""
    check_tensors(k=k, v=v, beta=beta)
    if k.ndim < 2:
        raise ValueError(f"k must be [..., {time}, d_k], got {list(k.shape)}")
    check_shape("v", v, f"..., {time}, d_v", (*k.shape[:-1], v.shape[-1] if v.ndim else 1), "k")
    check_channels(k=k, v=v)
    check_shape("beta", beta, f"..., {time}", k.shape[:-1], "k")


def _check_state(name: str, state: Tensor, k: Tensor, v: Tensor, rank: int = 2) -> None:
    """Raise unless `state` is `[..., d_k, d_v]`, with leading dimensions that broadcast to those of k.

    rank: how many of k's dimensions are no leading ones, 3 where they are cut into chunks.
    """
    check_tensors(k=k, **{name: state})
    if tuple(state.shape[-2:]) != (k.shape[-1], v.shape[-1]):
        raise ValueError(
            f"{name} must be [..., d_k, d_v] = [..., {k.shape[-1]}, {v.shape[-1]}], got {list(state.shape)}"
        )
    wanted, given = tuple(k.shape[:-rank]), tuple(state.shape[:-2])
    fits = len(given) <= len(wanted) and all(
        a in (1, b) for a, b in zip(reversed(given), reversed(wanted), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must have leading dimensions {list(wanted)} to match k, got {list(state.shape)}")


# One chunk, and all chunks -----------------------------------------------------------------------------
def to_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """Cut `[..., L, d]` into chunks `[..., n, C, d]`, n = ceil(L / C); the last one is filled with zeros.

    A row with k = 0 and beta = 0 neither erases nor writes, so the filling changes nothing.

    >>> to_chunks(torch.ones(5, 3), 2).shape
    torch.Size([3, 2, 3])
    """
    check_tensors(x=x)
    if x.ndim < 2:
        raise ValueError(f"x must be [..., L, d], got {list(x.shape)}")
    check_chunk_size(chunk_size)
    count = math.ceil(x.shape[-2] / chunk_size)
    # Padding by nothing keeps the strides, which a compiled graph made for another length does not expect.
    x = F.pad(x.contiguous(), (0, 0, 0, count * chunk_size - x.shape[-2]))
    return x.unflatten(-2, (count, chunk_size))


def chunk_wy(k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """W = T K `[..., C, d_k]` and U = T V `[..., C, d_v]` of one chunk (or of many, batched in front).

    T is the UT matrix of chapter 3, T = (I + tril(diag(beta) K K^T, -1))^{-1} diag(beta).

    >>> w, u = chunk_wy(torch.eye(2), torch.ones(2, 3), torch.tensor([0.5, 1.0]))
    >>> u[:, 0].tolist()
    [0.5, 1.0]
    """
    _check_chunks(k, v, beta)
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
    _check_chunks(k, v, beta)
    if k.ndim < 3:
        raise ValueError(f"k must be [..., n, C, d_k], got {list(k.shape)}")
    _check_state("state", state, k, v, rank=3)
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
    _check(q, k, v, beta, initial_state, chunk_size)
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
    _check(q, k, k, beta)
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
    _check(q, k, v, beta, initial_state)
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
    Raises ValueError if the offsets do not run from 0 to L without going back.

    >>> q, k, v = (torch.randn(5, 4) for _ in range(3))
    >>> varlen_delta_rule(q, k / 2, v, torch.rand(5), torch.tensor([0, 2, 5]))[1].shape
    torch.Size([2, 4, 4])
    """
    _check(q, k, v, beta)
    check_function("form", form)
    check_is_tensor("cu_seqlens", cu_seqlens, "of N + 1 offsets")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.is_meta:
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [N + 1] with values, got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != q.shape[-2] or min(lengths) < 0:
        raise ValueError(f"cu_seqlens must run from 0 to L = {q.shape[-2]} without going back, got {offsets[:8]}")
    if initial_state is not None:
        check_tensors(q=q, initial_state=initial_state)
        expected = (*k.shape[:-2], len(lengths), k.shape[-1], v.shape[-1])
        check_shape("initial_state", initial_state, "..., N, d_k, d_v", expected, "k, v and cu_seqlens")
    parts = zip(*(x.split(lengths, dim=-2) for x in (q, k, v)), beta.split(lengths, dim=-1), strict=True)
    starts = [None] * len(lengths) if initial_state is None else initial_state.unbind(-3)
    results = [form(*part, initial_state=start, **options) for part, start in zip(parts, starts, strict=True)]
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, dim=-2), torch.stack(states, dim=-3)


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


# The backward pass by hand -----------------------------------------------------------------------------
def chunk_errors(k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """E = R + N (beta R), R = V - K S: the error that each write of a chunk sees, `[..., C, d_v]`.

    beta E is the pseudo-value U - W S.  Nothing is divided by beta.  Implements eq-chunk-error.

    >>> chunk_errors(torch.eye(2), torch.ones(2, 2), torch.ones(2), torch.eye(2)).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    _check_chunks(k, v, beta)
    _check_state("state", state, k, v)
    dtype = working_dtype(k, v, beta, state)
    k, v, beta, state = (x.to(dtype) for x in (k, v, beta, state))
    R = v - k @ state
    return R + scaled_inverse(k, beta, method="solve") @ (beta[..., None] * R)


def _check_backward(q: Tensor, k: Tensor, beta: Tensor, values: dict[str, Tensor], **states: Tensor) -> None:
    """Check the arguments of a backward pass by hand, which computes in one dtype.

    values: do, and before it errors where the caller was given them, under their names.
    """
    check_tensors(q=q, k=k, beta=beta, **values)
    for name, x in (("q", q), ("k", k), *values.items()):
        if x.ndim < 2:
            raise ValueError(f"{name} must be [..., L, d], got {list(x.shape)}")
    check_shape("k", k, "..., L, d_k", q.shape, "q")
    check_shape("beta", beta, "..., L", k.shape[:-1], "k")
    first, reference = next(iter(values.items()))
    check_shape(first, reference, "..., L, d_v", (*k.shape[:-1], reference.shape[-1]), "k")
    for name, x in values.items():
        check_shape(name, x, "..., L, d_v", reference.shape, first)
    for name, state in states.items():
        _check_state(name, state, k, reference)
    check_one_dtype(q=q, k=k, beta=beta, **values, **states)


def chunk_backward(
    q: Tensor, k: Tensor, beta: Tensor, errors: Tensor, state: Tensor, do: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one chunk: dq, dk, dv, dbeta, and dS of the state that enters it.

    q (scaled), k `[..., C, d_k]`; errors E and do `[..., C, d_v]`; state: the state that enters the chunk,
    dstate: the gradient of the one that leaves it, `[..., d_k, d_v]`.
    Implements eq-backward-pseudo, eq-backward-t, eq-backward-state and eq-backward-inputs.

    >>> x, s = torch.eye(2), torch.zeros(2, 2)
    >>> chunk_backward(x, x, torch.ones(2), x, s, x, s)[3].tolist()
    [1.0, 1.0]
    """
    _check_backward(q, k, beta, {"errors": errors, "do": do}, state=state, dstate=dstate)
    N, b = scaled_inverse(k, beta, method="solve"), beta[..., None]
    pseudo = b * errors
    P, dP = (q @ k.mT).tril(), (do @ pseudo.mT).tril()
    dpseudo = P.mT @ do + k @ dstate  # eq-backward-pseudo
    Z = dpseudo + N.mT @ (b * dpseudo)  # eq-backward-t: Z, dR, dbeta, dB
    dR = b * Z
    dbeta = (Z * errors).sum(-1)
    dB = -(dR @ pseudo.mT).tril(-1)
    dq = do @ state.mT + dP @ k  # eq-backward-inputs
    dk = dP.mT @ q + pseudo @ dstate.mT - dR @ state.mT + (dB + dB.mT) @ k
    return dq, dk, dR, dbeta, dstate + q.mT @ do - k.mT @ dR  # eq-backward-state


def _chunks(length: int, chunk_size: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size))


def chunkwise_forward_with_errors(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, *, chunk_size: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass in the form that the backward pass wants: o, the errors E, and the final state.

    q: scaled.  All tensors in one dtype.  Same output as `chunkwise_delta_rule`.

    >>> x = torch.eye(2)
    >>> chunkwise_forward_with_errors(x, x, x, torch.ones(2), torch.zeros(2, 2))[2].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    _check(q, k, v, beta, None, chunk_size)
    _check_state("state", state, k, v)
    check_one_dtype(q=q, k=k, v=v, beta=beta, state=state)
    o, errors = torch.empty_like(v), torch.empty_like(v)
    for c in _chunks(q.shape[-2], chunk_size):
        qc, kc, vc, bc = q[..., c, :], k[..., c, :], v[..., c, :], beta[..., c]
        E = chunk_errors(kc, vc, bc, state)
        pseudo = bc[..., None] * E
        o[..., c, :] = qc @ state + (qc @ kc.mT).tril() @ pseudo
        errors[..., c, :] = E
        state = state + kc.mT @ pseudo
    return o, errors, state if q.shape[-2] else fresh(state)


def chunkwise_delta_rule_backward(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    errors: Tensor,
    final_state: Tensor,
    do: Tensor,
    dstate: Tensor,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The whole backward pass, written by hand: dq, dk, dv, dbeta and d(initial_state).

    errors: E `[..., L, d_v]` from `chunkwise_forward_with_errors`, which also gave final_state;
    do: gradient of the output `[..., L, d_v]`; dstate: gradient of the final state.
    No state is stored: going back over the chunks each is recovered from the next by S = S' - K^T (beta E)
    (eq-reversible-state).  Neither v nor the initial state is needed.

    >>> x, z = torch.eye(2), torch.zeros(2, 2)
    >>> o, errors, state = chunkwise_forward_with_errors(x, x, x, torch.ones(2), z)
    >>> chunkwise_delta_rule_backward(x, x, torch.ones(2), errors, state, x, z, scale=1.0)[2].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    _check_backward(q, k, beta, {"errors": errors, "do": do}, final_state=final_state, dstate=dstate)
    check_chunk_size(chunk_size)
    scale, state = scale_or_default(scale, q), final_state
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dv, dbeta = torch.empty_like(errors), torch.empty_like(beta)
    for c in reversed(list(_chunks(q.shape[-2], chunk_size))):
        qc, kc, bc, E = scale * q[..., c, :], k[..., c, :], beta[..., c], errors[..., c, :]
        state = state - kc.mT @ (bc[..., None] * E)  # eq-reversible-state
        grads = chunk_backward(qc, kc, bc, E, state, do[..., c, :], dstate)
        dq[..., c, :], dk[..., c, :], dv[..., c, :], dbeta[..., c], dstate = grads
    return scale * dq, dk, dv, dbeta, dstate


class ReversibleDeltaRule(torch.autograd.Function):
    """`chunkwise_delta_rule` with the backward pass of `chunkwise_delta_rule_backward`."""

    @staticmethod
    def forward(ctx, q, k, v, beta, initial_state, scale, chunk_size):
        dtype = working_dtype(q, k, v, beta, initial_state)
        state = initial_state_or_zeros(k, v, initial_state, dtype)
        qs, *kvbeta = (x.to(dtype) for x in (q, k, v, beta))
        o, errors, final_state = chunkwise_forward_with_errors(qs * scale, *kvbeta, state, chunk_size=chunk_size)
        ctx.save_for_backward(q, k, beta, errors, final_state)
        ctx.options = {"scale": scale, "chunk_size": chunk_size}
        ctx.dtypes = [
            q.dtype,
            k.dtype,
            v.dtype,
            beta.dtype,
            None if initial_state is None else initial_state.dtype,
        ]
        return o.to(v.dtype), final_state

    @staticmethod
    def backward(ctx, do, dstate):
        refuse_transforms("reversible_chunkwise_delta_rule", "use chunkwise_delta_rule", do, dstate)
        *qkbeta, errors, final_state = ctx.saved_tensors
        with torch.no_grad():
            wide = (x.to(errors.dtype) for x in qkbeta)
            do_wide = do.to(errors.dtype)
            grads = chunkwise_delta_rule_backward(*wide, errors, final_state, do_wide, dstate, **ctx.options)
            typed = [None if t is None else g.to(t) for g, t in zip(grads, ctx.dtypes, strict=True)]
        message = (
            "reversible_chunkwise_delta_rule can be differentiated once (once_differentiable), not twice: "
            "use chunkwise_delta_rule"
        )
        return *differentiable_once(message, typed, (*qkbeta, do, dstate)), None, None


def reversible_chunkwise_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """`chunkwise_delta_rule` with the hand-written backward: it keeps (2 d_k + d_v + 1) L + d_k d_v numbers.

    Arguments, results and errors as for `chunkwise_delta_rule`.  Differentiable once.
    Implements eq-saved-bytes.

    >>> q, k, v = (torch.randn(100, 8) for _ in range(3))
    >>> reversible_chunkwise_delta_rule(q, k / k.norm(dim=-1, keepdim=True), v, torch.rand(100))[0].shape
    torch.Size([100, 8])
    """
    _check(q, k, v, beta, initial_state, chunk_size)
    remedy = "use chunkwise_delta_rule, which PyTorch differentiates"
    refuse_transforms("reversible_chunkwise_delta_rule", remedy, q, k, v, beta, initial_state)
    return ReversibleDeltaRule.apply(q, k, v, beta, initial_state, scale_or_default(scale, q), chunk_size)


# Chunks as affine maps ---------------------------------------------------------------------------------
def chunk_affine(k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk as a map of states, S -> M S + X: M = I - K^T W `[..., d_k, d_k]`, X = K^T U `[..., d_k, d_v]`.

    Implements eq-chunk-affine.

    >>> M, X = chunk_affine(torch.eye(2)[:1], torch.tensor([[3.0]]), torch.ones(1))
    >>> M.tolist(), X.tolist()
    ([[0.0, 0.0], [0.0, 1.0]], [[3.0], [0.0]])
    """
    _check_chunks(k, v, beta)
    k = k.to(working_dtype(k, v, beta))
    w, u = chunk_wy(k, v, beta)
    return torch.eye(k.shape[-1], dtype=w.dtype, device=w.device) - k.mT @ w, k.mT @ u


def check_affine(name: str, pair: tuple[Tensor, Tensor]) -> None:
    """Raise unless `pair` is the map S -> M S + X of a state: M `[..., d_k, d_k]`, X `[..., d_k, d_v]`.

    >>> check_affine("first", (torch.zeros(2, 2), torch.zeros(3, 1)))
    Traceback (most recent call last):
    ValueError: first must be a pair M [..., d_k, d_k], X [..., d_k, d_v], got [2, 2] and [3, 1]
    """
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (M, X) of tensors, got {type(pair).__name__}")
    M, X = pair
    check_tensors(**{f"{name}[0]": M, f"{name}[1]": X})
    if M.ndim < 2 or X.ndim < 2 or M.shape[-1] != M.shape[-2] or X.shape[-2] != M.shape[-1]:
        raise ValueError(
            f"{name} must be a pair M [..., d_k, d_k], X [..., d_k, d_v], got {list(M.shape)} and {list(X.shape)}"
        )
    check_one_dtype(**{f"{name}[0]": M, f"{name}[1]": X})


def compose_affine(second: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`first`, then `second`: (M2, X2) o (M1, X1) = (M2 M1, M2 X1 + X2).  Implements eq-affine-composition.

    >>> a, b = (torch.tensor([[2.0]]), torch.tensor([[1.0]])), (torch.tensor([[3.0]]), torch.tensor([[5.0]]))
    >>> compose_affine(b, a)
    (tensor([[6.]]), tensor([[8.]]))
    """
    check_affine("second", second)
    check_affine("first", first)
    (M2, X2), (M1, X1) = second, first
    if M1.shape[-1] != M2.shape[-1] or X1.shape[-1] != X2.shape[-1]:
        raise ValueError(
            f"first must be a map of states [{M2.shape[-1]}, {X2.shape[-1]}] like second, "
            f"got one of [{M1.shape[-1]}, {X1.shape[-1]}]"
        )
    check_one_dtype(second=M2, first=M1)
    try:
        torch.broadcast_shapes(*(x.shape[:-2] for x in (M2, X2, M1, X1)))
    except RuntimeError:
        raise ValueError(
            f"first must have leading dimensions that fit second's {list(M2.shape[:-2])}, got {list(M1.shape[:-2])}"
        ) from None
    return M2 @ M1, M2 @ X1 + X2


def segment_affine(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """(M, X) of a long stretch of tokens: the state of a delta rule on values (0, V), begun at (I, X_0).

    The map S -> M S + X acts on each column of S alone, so M is what becomes of the columns of I when nothing
    is written, and X what becomes of `initial_state` (zeros if None): one pass gives both.

    >>> M, X = segment_affine(torch.eye(3), torch.ones(3, 2), torch.ones(3), chunk_size=2)
    >>> M.abs().max().item(), X.tolist()
    (0.0, [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    """
    _check_chunks(k, v, beta, "L")
    check_chunk_size(chunk_size)
    if initial_state is not None:
        check_tensors(k=k, initial_state=initial_state)
        expected = (*k.shape[:-2], k.shape[-1], v.shape[-1])
        check_shape("initial_state", initial_state, "..., d_k, d_v", expected, "k and v")
    dtype, d_k = working_dtype(k, v, beta, initial_state), k.shape[-1]
    X = initial_state_or_zeros(k, v, initial_state, dtype)
    eye = torch.eye(d_k, dtype=dtype, device=k.device).expand(*k.shape[:-2], d_k, d_k)
    values = torch.cat([torch.zeros_like(k, dtype=dtype), v.to(dtype)], dim=-1)
    C = min(chunk_size, max(k.shape[-2], 1))
    kc, vc, bc = (to_chunks(x, C) for x in (k.to(dtype), values, beta[..., None].to(dtype)))
    _, _, state = chunk_states(kc, vc, bc[..., 0], torch.cat([eye, X], dim=-1))
    return state[..., :d_k], state[..., d_k:]


def segment_state_gradient(
    q: Tensor, k: Tensor, beta: Tensor, do: Tensor, dstate: Tensor, *, chunk_size: int = 64
) -> Tensor:
    """The gradient of the state that enters a stretch, from those of its outputs and of its last state.

    q (scaled), k, beta, do as in `chunkwise_delta_rule_backward`; dstate `[..., d_k, d_v]`; all in one dtype.
    It is M^T dstate + Y, with Y from the outputs alone; values and states play no part: eq-backward-affine.

    >>> x, z = torch.eye(2), torch.zeros(2, 2)
    >>> segment_state_gradient(x, x, torch.ones(2), x, z).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    _check_backward(q, k, beta, {"do": do}, dstate=dstate)
    check_chunk_size(chunk_size)
    for c in reversed(list(_chunks(q.shape[-2], chunk_size))):
        qc, kc, dc = q[..., c, :], k[..., c, :], do[..., c, :]
        dpseudo = (qc @ kc.mT).tril().mT @ dc + kc @ dstate
        dR = ut_transform(kc, beta[..., c]).mT @ dpseudo
        dstate = dstate + qc.mT @ dc - kc.mT @ dR
    return dstate
