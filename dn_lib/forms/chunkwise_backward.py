"""Chapter 4, the backward pass by hand: of one chunk, of the whole sequence, and one that keeps no states.

Shapes and dtypes as in `chunkwise`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dn_lib.forms.common import (
    check_chunk_size,
    check_inputs,
    check_one_dtype,
    check_sequence,
    check_state,
    chunk_slices,
    fresh,
    initial_state_or_zeros,
    scale_or_default,
    working_dtype,
)
from dn_lib.forms.derivatives import differentiable_once, refuse_transforms
from dn_lib.forms.householder import scaled_inverse


# The backward pass by hand -----------------------------------------------------------------------------
def chunk_errors(k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """E = R + N (beta R), R = V - K S: the error that each write of a chunk sees, `[..., C, d_v]`.

    beta E is the pseudo-value U - W S.  Nothing is divided by beta.  Implements eq-chunk-error.

    >>> chunk_errors(torch.eye(2), torch.ones(2, 2), torch.ones(2), torch.eye(2)).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    check_inputs({"k": k}, {"v": v}, {"beta": beta}, {}, time="C")
    check_state("state", state, k, v)
    dtype = working_dtype(k, v, beta, state)
    k, v, beta, state = (x.to(dtype) for x in (k, v, beta, state))
    R = v - k @ state
    return R + scaled_inverse(k, beta, method="solve") @ (beta[..., None] * R)


def check_backward(q: Tensor, k: Tensor, beta: Tensor, values: dict[str, Tensor], **states: Tensor) -> None:
    """Check the arguments of a backward pass by hand, which computes in one dtype.

    values: do, and before it errors where the caller was given them, under their names.
    """
    check_inputs({"q": q, "k": k}, values, {"beta": beta}, {})
    for name, state in states.items():
        check_state(name, state, k, next(iter(values.values())))
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
    check_backward(q, k, beta, {"errors": errors, "do": do}, state=state, dstate=dstate)
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


def chunkwise_forward_with_errors(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, *, chunk_size: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass in the form that the backward pass wants: o, the errors E, and the final state.

    q: scaled.  All tensors in one dtype.  Same output as `chunkwise_delta_rule`.

    >>> x = torch.eye(2)
    >>> chunkwise_forward_with_errors(x, x, x, torch.ones(2), torch.zeros(2, 2))[2].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    check_sequence(q, k, v, beta=beta)
    check_chunk_size(chunk_size)
    check_state("state", state, k, v)
    check_one_dtype(q=q, k=k, v=v, beta=beta, state=state)
    o, errors = torch.empty_like(v), torch.empty_like(v)
    for c in chunk_slices(q.shape[-2], chunk_size):
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
    check_backward(q, k, beta, {"errors": errors, "do": do}, final_state=final_state, dstate=dstate)
    check_chunk_size(chunk_size)
    scale, state = scale_or_default(scale, q), final_state
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dv, dbeta = torch.empty_like(errors), torch.empty_like(beta)
    for c in reversed(list(chunk_slices(q.shape[-2], chunk_size))):
        qc, kc, bc, E = scale * q[..., c, :], k[..., c, :], beta[..., c], errors[..., c, :]
        state = state - kc.mT @ (bc[..., None] * E)  # eq-reversible-state
        grads = chunk_backward(qc, kc, bc, E, state, do[..., c, :], dstate)
        dq[..., c, :], dk[..., c, :], dv[..., c, :], dbeta[..., c], dstate = grads
    return scale * dq, dk, dv, dbeta, dstate


class ReversibleDeltaRule(torch.autograd.Function):
    """`chunkwise_delta_rule` with the backward pass of `chunkwise_delta_rule_backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        scale: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = working_dtype(q, k, v, beta, initial_state)
        state = initial_state_or_zeros(k, v, initial_state, dtype)
        q_wide, k_wide, v_wide, beta_wide = (x.to(dtype) for x in (q, k, v, beta))
        o, errors, final_state = chunkwise_forward_with_errors(
            q_wide * scale, k_wide, v_wide, beta_wide, state, chunk_size=chunk_size
        )
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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        do, dstate = gradients
        refuse_transforms("reversible_chunkwise_delta_rule", "use chunkwise_delta_rule", do, dstate)
        q, k, beta, errors, final_state = ctx.saved_tensors
        with torch.no_grad():
            q_wide, k_wide, beta_wide, do_wide = (x.to(errors.dtype) for x in (q, k, beta, do))
            grads = chunkwise_delta_rule_backward(
                q_wide, k_wide, beta_wide, errors, final_state, do_wide, dstate, **ctx.options
            )
            typed = [None if t is None else g.to(t) for g, t in zip(grads, ctx.dtypes, strict=True)]
        message = (
            "reversible_chunkwise_delta_rule can be differentiated once (once_differentiable), not twice: "
            "use chunkwise_delta_rule"
        )
        return *differentiable_once(message, typed, (q, k, beta, do, dstate)), None, None


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
    check_sequence(q, k, v, initial_state, beta=beta)
    check_chunk_size(chunk_size)
    remedy = "use chunkwise_delta_rule, which PyTorch differentiates"
    refuse_transforms("reversible_chunkwise_delta_rule", remedy, q, k, v, beta, initial_state)
    return ReversibleDeltaRule.apply(q, k, v, beta, initial_state, scale_or_default(scale, q), chunk_size)
