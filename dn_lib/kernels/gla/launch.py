"""Launches what a plan says: `forward`, `backward` and `recurrent` on `[B, L, H, d]` tensors, g `[B, L, H_v, d_k]`.

Everything is decided in `plan.py`; here tensors are allocated and kernels get their arguments.  Nothing reads a value
from a GPU, so a call can be captured in a CUDA graph.  Tokens of a packed row that lie in no sequence get zeros:
outputs and gradients.
"""

# pyright: reportCallIssue=false
# (Triton's own arguments of a launch, such as num_warps, are no parameters of the kernel.)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dn_lib.kernels.arguments import chunk_offsets, on_its_device, readable, token_offsets, writable
from dn_lib.kernels.gla import backward as bwd
from dn_lib.kernels.gla import forward as fwd
from dn_lib.kernels.gla import recurrent as rec
from dn_lib.kernels.gla.plan import SUB, Plan, Saved
from dn_lib.kernels.launcher import launch_kernel


class Gradients(NamedTuple):
    """Of a call: each in its input's dtype, but the initial state's in float32, and None where there was none."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    initial_state: Tensor | None


@on_its_device
def forward(
    *, plan: Plan, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, final_state: bool = False,
) -> tuple[Tensor, Tensor | None, Saved | None]:  # fmt: skip
    """Output `[B, L, H_v, V]`, final state `[N, H_v, K, V]` float32 or None, and in training what the backward needs.

    g: the log gates, in any dtype that the kernels take.
    """
    q, k, v, g, initial_state = readable(q=q, k=k, v=v, g=g, initial_state=initial_state)
    c = plan.call
    cu = token_offsets(cu_seqlens, q)
    made = {name: q.new_empty(b.shape, dtype=b.dtype) for name, b in c.buffers.items() if name in _MADE}
    saved = Saved(**made, token_offsets=cu, chunk_offsets=chunk_offsets(cu, c.C))
    state = q.new_empty((c.sequences, c.H, c.K, c.V), dtype=torch.float32) if final_state else None
    o = _empty_tokens(plan, v)
    sizes = saved.token_offsets, saved.chunk_offsets
    t = plan.launches["chunk_scores"].tiles
    launch_kernel(
        plan, "chunk_scores", fwd.chunk_scores,
        q, k, g, saved.scores, saved.q_decayed, saved.k_decayed, saved.whole, *sizes, c.sequences, c.L, c.H,
        K=c.K, BK=t.BK, C=c.C, SUB=SUB, PRECISION=c.precision, GROUP=c.group, VARLEN=c.packed, num_warps=t.warps,
    )  # fmt: skip
    t = plan.launches["chunk_states"].tiles
    launch_kernel(
        plan, "chunk_states", fwd.chunk_states,
        saved.k_decayed, v, saved.whole, saved.states, initial_state, state, *sizes, c.L, c.H,
        K=c.K, V=c.V, BK=t.BK, BV=t.BV, C=c.C, PRECISION=c.precision, STATE_IN=initial_state is not None,
        STATE_OUT=final_state, VARLEN=c.packed, STAGES=t.stages, num_warps=t.warps,
    )  # fmt: skip
    t = plan.launches["chunk_output"].tiles
    launch_kernel(
        plan, "chunk_output", fwd.chunk_output,
        saved.q_decayed, saved.scores, v, saved.states, o, *sizes, scale, c.sequences, c.L, c.H,
        K=c.K, V=c.V, BK=t.BK, BV=t.BV, C=c.C, PRECISION=c.precision, VARLEN=c.packed, STAGES=t.stages,
        num_warps=t.warps,
    )  # fmt: skip
    return o, state, saved if c.training else None


_MADE = ("scores", "q_decayed", "k_decayed", "whole", "states")


@on_its_device
def backward(
    *, plan: Plan, q: Tensor, k: Tensor, v: Tensor, g: Tensor, saved: Saved, do: Tensor, dstate: Tensor | None,
    scale: float, initial_state: bool,
) -> Gradients:  # fmt: skip
    """The gradients of every input, and of the initial state if there was one."""
    q, k, v, g, do, dstate = readable(q=q, k=k, v=v, g=g, do=do.to(k.dtype), dstate=dstate)
    saved = Saved(*readable(q=q, **saved._asdict())[1:])  # hooks may have kept them elsewhere, and in another layout
    c = plan.call
    # dq and dk of value heads that share a key head are partial sums.
    dq, dk = (_empty_tokens(plan, x) if c.group == 1 else _new_tokens(plan, x) for x in (q, k))
    dv, dg = _empty_tokens(plan, v), _new_tokens(plan, q)  # dg in float32, since it is put together in two steps
    dscores, dstates = torch.empty_like(saved.scores), torch.empty_like(saved.states)
    dq_decayed, dk_decayed = torch.empty_like(saved.q_decayed), torch.empty_like(saved.k_decayed)
    passing = q.new_empty((c.chunks, c.H, c.C // SUB, c.K), dtype=torch.float32)
    dfirst = q.new_empty((c.sequences, c.H, c.K, c.V), dtype=torch.float32) if initial_state else None

    sizes = saved.token_offsets, saved.chunk_offsets
    of_call: dict[str, Any] = {"K": c.K, "V": c.V, "C": c.C, "PRECISION": c.precision, "VARLEN": c.packed}
    t = plan.launches["chunk_states_bwd"].tiles
    launch_kernel(
        plan, "chunk_states_bwd", bwd.chunk_states_bwd,
        saved.q_decayed, do, saved.whole, dstates, dstate, dfirst, *sizes, scale, c.L, c.H,
        **of_call, BK=t.BK, BV=t.BV, DSTATE_OUT=dstate is not None, DSTATE_IN=initial_state, STAGES=t.stages,
        num_warps=t.warps,
    )  # fmt: skip
    t = plan.launches["chunk_bwd_dv"].tiles
    launch_kernel(
        plan, "chunk_bwd_dv", bwd.chunk_bwd_dv,
        saved.k_decayed, v, saved.scores, do, dstates, dv, dscores, *sizes, scale, c.sequences, c.L, c.H,
        **of_call, BK=t.BK, BV=t.BV, num_warps=t.warps,
    )  # fmt: skip
    t = plan.launches["chunk_bwd_decayed"].tiles
    launch_kernel(
        plan, "chunk_bwd_decayed", bwd.chunk_bwd_decayed,
        saved.q_decayed, saved.k_decayed, v, do, saved.states, dstates, saved.whole, dq_decayed, dk_decayed, passing,
        *sizes, scale, c.sequences, c.L, c.H, **of_call, BK=t.BK, BV=t.BV, SUB=SUB, num_warps=t.warps,
    )  # fmt: skip
    t = plan.launches["chunk_bwd_dqkg"].tiles
    launch_kernel(
        plan, "chunk_bwd_dqkg", bwd.chunk_bwd_dqkg,
        q, k, g, dscores, dq_decayed, dk_decayed, passing, dq, dk, dg, *sizes, c.sequences, c.L, c.H,
        K=c.K, BK=t.BK, C=c.C, SUB=SUB, PRECISION=c.precision, GROUP=c.group, VARLEN=c.packed, num_warps=t.warps,
    )  # fmt: skip
    if c.group > 1:
        dq, dk = (x.unflatten(2, (-1, c.group)).sum(3).to(k.dtype) for x in (dq, dk))
    return Gradients(dq, dk, dv, dg.to(g.dtype), dfirst)


@on_its_device
def recurrent(
    *, plan: Plan, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None = None,
    final_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Output of the recurrence; writes into `final_state`, which may be `initial_state` itself."""
    q, k, v, g, initial_state = readable(q=q, k=k, v=v, g=g, initial_state=initial_state)
    if final_state is not None:
        final_state = writable("final_state", final_state, q)
    c, t = plan.call, plan.launches["recurrent"].tiles
    cu, o = token_offsets(cu_seqlens, q), _empty_tokens(plan, v)
    launch_kernel(
        plan, "recurrent", rec.recurrent,
        q, k, v, g, o, initial_state, final_state, cu, scale, c.L, c.H,
        K=c.K, V=c.V, BK=t.BK, BV=t.BV, GROUP=c.group, STATE_IN=initial_state is not None,
        STATE_OUT=final_state is not None, VARLEN=c.packed, num_warps=t.warps,
    )  # fmt: skip
    return o


# --- Memory -------------------------------------------------------------------------------------------------------
def _empty_tokens(plan: Plan, like: Tensor) -> Tensor:
    """For a kernel to write, token by token; a packed row may have tokens of no sequence, which get zeros."""
    return torch.zeros_like(like) if plan.call.packed else torch.empty_like(like)


def _new_tokens(plan: Plan, like: Tensor) -> Tensor:
    """A float32 tensor `[B, L, H_v, K]` for a kernel to write, see `_empty_tokens`."""
    new = like.new_zeros if plan.call.packed else like.new_empty
    return new((plan.call.B, plan.call.L, plan.call.H, plan.call.K), dtype=torch.float32)
