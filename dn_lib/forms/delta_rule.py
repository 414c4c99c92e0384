"""Chapter 2: the delta rule, one token at a time.

Everything here is a loop over time in plain PyTorch: the definition that every faster form of the book is
measured against, and the tools with which chapter 2 looks at it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.forms.common import (
    check_inputs,
    check_one_dtype,
    fresh,
    initial_state_or_zeros,
    scale_or_default,
    working_dtype,
)


def erase_write(k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What a write takes out and what it puts in: v_old = S^T k and v_new = beta v + (1 - beta) v_old.

    k `[..., d_k]`, v `[..., d_v]`, beta `[...]`, state `[..., d_k, d_v]` of one floating dtype; returns
    `(v_old, v_new)`, both `[..., d_v]`.  The state after the write is `state + k (v_new - v_old)^T`.
    Raises ValueError for shapes that do not fit.
    Implements eq-erase-write.  Source: Yang et al. (2024), section 2.2 in our transposed convention.

    >>> k, v, state = torch.tensor([1.0, 0.0]), torch.tensor([4.0]), torch.tensor([[2.0], [3.0]])
    >>> erase_write(k, v, torch.tensor(0.5), state)
    (tensor([2.]), tensor([3.]))
    """
    check_inputs({"k": k}, {"v": v}, {"beta": beta}, {"state": state}, time="", broadcast=True)
    check_one_dtype(k=k, v=v, beta=beta, state=state)
    v_old = (k[..., None, :] @ state)[..., 0, :]
    return v_old, beta[..., None] * v + (1 - beta[..., None]) * v_old


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token: correct what the state returns for k towards v, then read with q.  For decoding.

    S_t = S_{t-1} + beta k (v - S_{t-1}^T k)^T, o = scale S_t^T q.

    q, k `[..., d_k]`, v `[..., d_v]`, beta `[...]`, state `[..., d_k, d_v]`; leading dimensions broadcast.
    Any floating dtypes; the arithmetic and the returned state are float64 if an input is, else float32.
    `scale=None` means `d_k ** -0.5`.  Returns `(o, state)`, o `[..., d_v]` in v's dtype; the given state is
    left as it was.  Raises ValueError, naming the argument, for shapes that do not fit.
    Implements eq-delta-recurrence and eq-delta-output.  Source: Schlag et al. (2021); Yang et al. (2024).

    >>> k, v = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 5.0])
    >>> delta_rule_step(k, k, v, torch.tensor(1.0), torch.ones(2, 2), scale=1.0)[0]  # beta = 1 stores v
    tensor([4., 5.])
    """
    check_inputs({"k": k, "q": q}, {"v": v}, {"beta": beta}, {"state": state}, time="", broadcast=True)
    return gated_step(q, k, v, torch.ones_like(beta), beta, state, scale_or_default(scale, q))


def gated_step(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The step without its checks."""
    dtype, out = working_dtype(q, k, v, alpha, beta, state), v.dtype
    q, k, v, alpha, beta, state = (x.to(dtype) for x in (q, k, v, alpha, beta, state))
    state = alpha[..., None, None] * state
    error = v - (k[..., None, :] @ state)[..., 0, :]
    state = state + k[..., :, None] * (beta[..., None] * error)[..., None, :]
    return (scale * (q[..., None, :] @ state)[..., 0, :]).to(out), state


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L steps of `delta_rule_step`: the definition, in O(L d_k d_v) work and L dependent steps.

    q, k `[..., L, d_k]`, v `[..., L, d_v]`, beta `[..., L]`, initial_state `[..., d_k, d_v]` or None for
    zeros; leading dimensions broadcast, L may be 0.  Any floating dtypes; the arithmetic and the final state
    are float64 if an input is, else float32.  `scale=None` means `d_k ** -0.5`.
    Returns `(o, final_state)`, o `[..., L, d_v]` in v's dtype.
    Raises ValueError, naming the argument, for shapes that do not fit.  Values are not checked: if
    0 <= beta |k|^2 <= 2, a token enlarges no direction of the state, and adds at most beta |k| |v|.
    Implements eq-delta-recurrence and eq-delta-output.  Source: Schlag et al. (2021); Yang et al. (2024).

    >>> q, k, v = torch.eye(3), torch.eye(3), torch.arange(6.0).reshape(3, 2)
    >>> o, state = recurrent_delta_rule(q, k, v, torch.ones(3), scale=1.0)
    >>> torch.equal(o, v) and torch.equal(state, v)
    True
    """
    check_inputs({"k": k, "q": q}, {"v": v}, {"beta": beta}, {"initial_state": initial_state}, broadcast=True)
    return scan_steps(q, k, v, torch.ones_like(beta), beta, scale, initial_state)


def scan_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Steps over the time dimension, inputs already checked."""
    scale, dtype = scale_or_default(scale, q), working_dtype(q, k, v, alpha, beta, initial_state)
    leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], beta.shape[:-1])
    state = initial_state_or_zeros(k, v, initial_state, dtype)
    leading = torch.broadcast_shapes(leading, state.shape[:-2], alpha.shape[:-1])
    state = state.expand(*leading, *state.shape[-2:])
    outputs = []
    # By unbind, not x[..., t, :]: the backward of an index makes a gradient of size L for every token.
    vectors, gates = ([x.to(dtype) for x in group] for group in ((q, k, v), (alpha, beta)))
    for q_t, k_t, v_t, alpha_t, beta_t in zip(
        *(x.unbind(-2) for x in vectors), *(x.unbind(-1) for x in gates), strict=True
    ):
        o, state = gated_step(q_t, k_t, v_t, alpha_t, beta_t, state, scale)
        outputs.append(o)
    if not outputs:  # no tokens: what is handed back must not be the caller's own, nor lose the way to its gradient
        return v.expand(*leading, *v.shape[-2:]).clone(), fresh(state)
    return torch.stack(outputs, dim=-2).to(v.dtype), state


def sweep_matrix(k: Tensor, beta: Tensor) -> Tensor:
    """What one pass of writes over the keys does to the difference of the state from one that answers every key.

    P = (I - beta_L k_L k_L^T) ... (I - beta_1 k_1 k_1^T), computed as the delta rule that writes zeros into
    the identity.  k `[..., L, d]`, beta `[..., L]`; returns `[..., d, d]`, float32 at least.
    Raises ValueError for shapes that do not fit.  Implements eq-sweep.

    >>> sweep_matrix(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]))
    tensor([[0., 0.],
            [0., 1.]])
    """
    check_inputs({"k": k}, {}, {"beta": beta}, {}, broadcast=True)
    eye = torch.eye(k.shape[-1], dtype=working_dtype(k, beta), device=k.device)
    zeros = torch.zeros(*k.shape[:-1], k.shape[-1], dtype=k.dtype, device=k.device)
    return recurrent_delta_rule(k, k, zeros, beta, initial_state=eye)[1]


def sweep_rate(k: Tensor, beta: Tensor) -> Tensor:
    """The factor by which the error shrinks per pass over the keys, in the long run.

    The largest |eigenvalue| of `sweep_matrix` on the span of the keys, for linearly independent unit keys.
    k `[..., L, d]`, beta `[..., L]` with L <= d; returns `[...]`, float64.
    Raises ValueError if L > d.

    >>> k = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # cosine 0.6, so a pass leaves 0.36 of the error
    >>> round(sweep_rate(k, torch.ones(2)).item(), 6)
    0.36
    """
    check_inputs({"k": k}, {}, {"beta": beta}, {}, broadcast=True)
    if k.shape[-2] > k.shape[-1]:
        raise ValueError(f"k must have at most d = {k.shape[-1]} keys to be independent, got {k.shape[-2]}")
    basis = torch.linalg.qr(k.double().mT).Q
    return torch.linalg.eigvals(basis.mT @ sweep_matrix(k.double(), beta.double()) @ basis).abs().amax(-1)
