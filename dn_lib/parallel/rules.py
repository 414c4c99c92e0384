"""The operators on a sequence cut into stretches: what must a state carry from one process to the next?

To the rest of the world a stretch is one affine map of the state, S -> M S + X.  X is the state that it would leave if
it were the first.  M says what it leaves of the state that entered:

- linear attention forgets nothing, M = I: only X is sent;
- with a decay, M is a number (or one for each key channel): X and the product of the gates;
- the delta rule erases, with or without gates, and M is a matrix: the pair (M, X).

One all-gather forward; one back, of the gradients Y_r that the stretches' own outputs give to the states that enter
them, `[d_k, d_v]` for every rule.  With the gradient of the state that leaves, g_{p-1} = 0, g_{r-1} = M_r^T g_r + Y_r,
process r knows all that it needs: dX_r = g_r and dM_r = g_r S_r^T, S_r being the state that enters it.  (These are
eq-entering-state and eq-leaving-gradient of chapter 4, for every rule.)  Local work is that of the public operators, so
on a GPU the Triton kernels do it.

Sources: Sun et al. (2025), LASP-2, for linear attention and decays; flash-linear-attention has had the pair (M, X)
since December 2025.  That both passes need no other local operator than the forward one is worked out here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dn_lib.forms.common import check_flag, check_tensors, l2_normalise, without_autocast, working_dtype
from dn_lib.forms.derivatives import refuse_transforms
from dn_lib.forms.gated import gate_columns, sums_after
from dn_lib.kernels.rules import MAX_HEAD_DIM
from dn_lib.ops.checks import check_arguments
from dn_lib.ops.delta import delta_rule
from dn_lib.ops.gated import gated_delta_rule, linear_attention
from dn_lib.parallel.stretches import Stretches, check_stretches


# The map of a stretch -----------------------------------------------------------------------------------
def linear_map(
    k: Tensor, v: Tensor, g: Tensor | None = None, *, qk_l2norm: bool = False
) -> tuple[Tensor | None, Tensor]:
    """(A, X) of a stretch without erasure, S -> A * S + X: A is None without gates.

    k `[B, L, H, d_k]`, v `[B, L, H, d_v]`, g as `dn_lib.linear_attention` takes it; A `[B, H, 1, 1]` or, for gates per
    channel, `[B, H, d_k, 1]`; X `[B, H, d_k, d_v]`; float32 at least.
    A = exp(g_1 + ... + g_L), X = sum_j exp(g_{j+1} + ... + g_L) * k_j v_j^T: no exponent is above 0.

    >>> A, X = linear_map(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1), torch.full((1, 2, 1), 0.5).log())
    >>> round(A.item(), 4), round(X.item(), 4)
    (0.25, 1.5)
    """
    check_arguments(k, k, v, None, None, None, None, "auto", None, grouped=True)
    dtype = working_dtype(k, v, g)
    k = (l2_normalise(k) if qk_l2norm else k).to(dtype).transpose(1, 2)
    v = v.to(dtype).transpose(1, 2)
    if v.shape[1] != k.shape[1]:
        k = k.repeat_interleave(v.shape[1] // k.shape[1], 1)
    if g is None:
        return None, k.mT @ v
    columns = gate_columns(g.to(dtype) if g.ndim == 1 else g.to(dtype).transpose(1, 2), k)
    return columns.sum(-2, keepdim=True).exp().mT, (k * sums_after(columns).exp()).mT @ v


def delta_map(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    qk_l2norm: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(M, X) of a stretch with erasure, S -> M S + X, by the operator itself.

    Arguments as `dn_lib.gated_delta_rule` takes them; M `[B, H_v, d_k, d_k]`, X `[B, H_v, d_k, d_v]`, float32 at least.
    The map acts on each column of S alone.  So M is what becomes of the columns of I when nothing is written, and X
    what becomes of zeros when v is: states of values (0, V), begun at (I, 0).  eq-chunk-affine, for a whole stretch.

    >>> one = torch.ones(1, 1, 1, 1)
    >>> M, X = delta_map(one, 3 * one, torch.full((1, 1, 1), 0.5))
    >>> M.item(), X.item()
    (0.5, 1.5)
    """
    d_k, d_v, dtype = k.shape[-1], v.shape[-1], working_dtype(k, v, beta, g)
    size = (k.shape[0], v.shape[2], d_k)
    identity = torch.eye(d_k, dtype=dtype, device=k.device).expand(*size, d_k)
    nothing = k.new_zeros(*v.shape[:-1], d_k, dtype=v.dtype)
    zeros = identity.new_zeros(*size, d_v)
    parts = [(nothing, identity), (v, zeros)]
    if d_k + d_v <= MAX_HEAD_DIM or k.device.type != "cuda":
        parts = [(torch.cat([nothing, v], -1), torch.cat([identity, zeros], -1))]  # one pass for both
    options: dict[str, Any] = {"output_final_state": True, "qk_l2norm": qk_l2norm, "backend": backend, "scale": 1.0}
    options["chunk_size"] = chunk_size
    states = []
    for values, start in parts:
        if g is None:
            _, state = delta_rule(k, k, values, beta, initial_state=start, **options)
        else:
            _, state = gated_delta_rule(k, k, values, beta, g, initial_state=start, **options)
        states.append(cast(Tensor, state))
    both = torch.cat(states, -1)
    return both[..., :d_k], both[..., d_k:]


# The exchange -------------------------------------------------------------------------------------------
def _apply(transition: Tensor | None, state: Tensor) -> Tensor:
    """M S for a transition in one of its three forms: None, a number a row, a matrix."""
    if transition is None:
        return state
    return transition * state if transition.shape[-1] == 1 else transition @ state


class _Entering(torch.autograd.Function):
    """From the maps of all stretches to the state that enters this one: see the head of this file."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor | None, X: Tensor, stretches: Stretches) -> Tensor:
        parts = [X] if transition is None else [transition, X]
        lead = X.shape[:-2]
        sent = torch.cat([x.reshape(*lead, -1) for x in parts], dim=-1)
        state, later = torch.zeros_like(X), []
        for r, both in enumerate(stretches.gather(sent, "states")):
            M = None
            if transition is not None:
                size = transition.shape[-2] * transition.shape[-1]
                M = both[..., :size].reshape(transition.shape)
                both = both[..., size:]
            if r < stretches.rank:
                state = _apply(M, state) + both.reshape(X.shape)
            elif r > stretches.rank and M is not None:
                later.append(M.clone())  # a copy, so as not to keep X alive
        ctx.save_for_backward(state, *later)
        ctx.stretches, ctx.shape = stretches, None if transition is None else transition.shape
        return state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (Y,), stretches = grads, ctx.stretches
        refuse_transforms("a rule on stretches", "differentiate once, by backward()", Y)
        state, *later = ctx.saved_tensors
        rank = stretches.rank
        all_Y = stretches.gather(Y, "states, backward")
        g = torch.zeros_like(Y)
        for r in reversed(range(rank + 1, stretches.ranks)):
            M = later[r - rank - 1] if later else None
            g = _apply(M if M is None or M.shape[-1] == 1 else M.mT, g) + all_Y[r]
        if ctx.shape is None:
            return None, g, None
        if ctx.shape[-1] != 1:
            return g @ state.mT, g, None
        dM = (g * state).sum(-1, keepdim=True)
        return dM.sum(-2, keepdim=True) if ctx.shape[-2] == 1 else dM, g, None


def entering(transition: Tensor | None, X: Tensor, stretches: Stretches) -> Tensor:
    """The state that enters this process's stretch, from the maps S -> M S + X of all; the first begins at zero.

    transition: None (M = I), `[..., 1, 1]` or `[..., d_k, 1]` (a factor for the state or for each of its rows), or the
    matrix `[..., d_k, d_k]`.  X `[..., d_k, d_v]`.  All processes give one shape and dtype.
    Differentiable once, by all processes together.  Implements eq-entering-state and eq-leaving-gradient.
    Raises ValueError or TypeError, naming the argument.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> entering(None, torch.ones(2, 3), Stretches([7])).shape
    torch.Size([2, 3])
    >>> dist.destroy_process_group()
    """
    check_stretches(stretches)
    check_tensors(X=X)
    if X.ndim < 2:
        raise ValueError(f"X must be [..., d_k, d_v], got {list(X.shape)}")
    if transition is not None:
        check_tensors(transition=transition, X=X)
        d_k = X.shape[-2]
        sizes = [(1, 1), (d_k, 1), (d_k, d_k)]
        if transition.shape[:-2] != X.shape[:-2] or tuple(transition.shape[-2:]) not in sizes:
            wanted = " or ".join(str([*X.shape[:-2], *size]) for size in sizes)
            raise ValueError(f"transition must be {wanted} to match X, got {list(transition.shape)}")
        if transition.dtype != X.dtype:
            raise ValueError(f"transition must have the dtype of X, {X.dtype}, got {transition.dtype}")
    refuse_transforms("a rule on stretches", "gather the sequence on one process", transition, X)
    return cast(Tensor, _Entering.apply(transition, X, stretches))


# The rules ----------------------------------------------------------------------------------------------
@without_autocast
def stretched_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    *,
    stretches: Stretches,
    scale: float | None = None,
    qk_l2norm: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A rule of the family on this process's stretch of a longer sequence, which begins at a state of zeros.

    q, k `[B, L_r, H, d_k]`, v `[B, L_r, H_v, d_v]`; beta `[B, L_r, H_v]`, None for linear attention; g, None without
    gates, as in `dn_lib.gated_delta_rule`; every other argument as there.  L_r may differ between processes.
    Returns o `[B, L_r, H_v, d_v]` in v's dtype and the state that leaves this stretch, `[B, H_v, d_k, d_v]`, float32 at
    least: on the last process, the final state of the sequence.
    Differentiable once, by all processes together.  Raises errors as the operator does.
    Each process sends its map once forward (see the head of this file) and `[B, H_v, d_k, d_v]` once back.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> x = torch.eye(3)[None, :, None]
    >>> o, _ = stretched_rule(x, x, x, torch.ones(1, 3, 1), stretches=Stretches([3]), scale=1.0)
    >>> torch.equal(o, x)
    True
    >>> dist.destroy_process_group()
    """
    check_stretches(stretches)
    check_flag("qk_l2norm", qk_l2norm)
    gates = g if isinstance(g, Tensor) and g.ndim == 3 else None
    check_arguments(q, k, v, beta, None, None, chunk_size, backend, gates, grouped=beta is None or g is not None)
    options: dict[str, Any] = {"qk_l2norm": qk_l2norm, "chunk_size": chunk_size, "backend": backend}
    last: dict[str, Any] = {"scale": scale, "output_final_state": True}
    if beta is None:
        last["initial_state"] = entering(*linear_map(k, v, g, qk_l2norm=qk_l2norm), stretches)
        o, state = linear_attention(q, k, v, g, **options, **last)
    else:
        last["initial_state"] = entering(*delta_map(k, v, beta, g, **options), stretches)
        if g is None:
            o, state = delta_rule(q, k, v, beta, **options, **last)
        else:
            o, state = gated_delta_rule(q, k, v, beta, g, **options, **last)
    return o, cast(Tensor, state)
