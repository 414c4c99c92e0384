"""Launches what a plan says: `forward`, `backward` and `recurrent` on `[B, L, H, d]` tensors.

Everything is decided in `dn_lib.kernels.plan`; here tensors are allocated and kernels get their arguments.  Nothing
reads a value from a GPU, so a call can be captured in a CUDA graph.  Tokens of a packed row that lie in no sequence,
such as those behind the last offset of a padded buffer, get zeros: outputs and gradients.
"""

# pyright: reportCallIssue=false
# (Triton's own arguments of a launch, such as num_warps, are no parameters of the kernel.)

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dn_lib.forms.common import NORM_EPS
from dn_lib.kernels.arguments import chunk_offsets, on_its_device, readable, token_offsets, writable
from dn_lib.kernels.delta_rule import backward as bwd
from dn_lib.kernels.delta_rule import forward as fwd
from dn_lib.kernels.delta_rule import gates
from dn_lib.kernels.delta_rule import recurrent as rec
from dn_lib.kernels.hopper import launch as hopper
from dn_lib.kernels.launcher import launch_kernel
from dn_lib.kernels.plan import Plan, Saved
from dn_lib.kernels.playback import bind_context, made

# How the recursion on N rounds its operands (see `inverse.py`); float32 inputs: as all their dots.
_INVERSE = {torch.bfloat16: "half", torch.float16: "halves"}
_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@on_its_device
def forward(
    *, plan: Plan, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, scale: float,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, final_state: bool = False,
    kept: Mapping[str, Tensor] | None = None, g: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Saved | None]:  # fmt: skip
    """Output `[B, L, H, V]`, final state `[N, H, K, V]` float32 or None, and in training what the backward needs.

    beta: None without erasure.  g: the log gates `[B, L, H]`, if the plan has a gate.  The heads H are those of v;
    q and k may have fewer.
    kept: tensors to write what the backward needs into, by their names in `Saved`; what is missing is allocated.
    """
    q, k, v, beta, g, initial_state = readable(q=q, k=k, v=v, beta=beta, g=g, initial_state=initial_state)
    layout, buffers, call = plan.layout, plan.layout.buffers, plan.call
    cu = token_offsets(cu_seqlens, q)
    found: dict[str, Any] = {"token_offsets": cu, "chunk_offsets": chunk_offsets(cu, call.C)}
    kept = kept or {}
    for name in ("n", "pseudo", "q_norm", "k_norm", "states", "transition", "sums"):
        found[name] = None
        if name in buffers:
            found[name] = kept[name] if name in kept else made(name, _empty(buffers[name], k))
    state = kept.get("state_end")
    if state is None and (final_state or "state_end" in buffers):
        state = made("state", k.new_empty(per_segment(plan), dtype=torch.float32))
    saved = Saved(**found, state_end=state if "state_end" in buffers else None)
    o = made("o", _empty_tokens(layout, v))

    if call.norm:
        _inverse_norms(plan=plan, q=q, k=k, saved=saved)
    if call.gate:
        _gate_sums(plan=plan, g=g, saved=saved)
    if call.erase:
        _chunk_inverse(plan=plan, k=k, beta=beta, saved=saved)
    state_in = initial_state
    inputs = {"plan": plan, "q": q, "k": k, "v": v, "beta": beta, "scale": scale, "saved": saved}
    if layout.segments > 1:
        local = made("local", k.new_empty(per_segment(plan), dtype=torch.float32))
        _chunk_scan_fwd("segment_maps_fwd", **inputs, state_in=initial_state, state_out=local)
        state_in = made("state_in", torch.empty_like(local))
        _merge_segments("merge_segments_fwd", plan=plan, saved=saved, local=local, first=initial_state, states=state_in)
    scan = (
        _hopper_scan_fwd
        if plan.launches["chunk_scan_fwd"].gluon
        else functools.partial(_chunk_scan_fwd, "chunk_scan_fwd")
    )
    scan(**inputs, o=o, state_in=state_in, state_out=state)

    last = last_of(plan, state) if final_state and state is not None else None
    return o, last, saved if call.training else None


class Gradients(NamedTuple):
    """Of a call: each in its input's dtype, but g's and the initial state's in float32; None for what was not given."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    g: Tensor | None
    initial_state: Tensor | None


def backward(
    *, plan: Plan, q: Tensor, k: Tensor, beta: Tensor, saved: Saved, do: Tensor, dstate: Tensor | None, scale: float,
    initial_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dbeta, each in its input's dtype, and, if there was an `initial_state`, its gradient in float32."""
    found = gradients(
        plan=plan, q=q, k=k, v=None, beta=beta, saved=saved, do=do, dstate=dstate, scale=scale,
        initial_state=initial_state,
    )  # fmt: skip
    return found.q, found.k, found.v, cast(Tensor, found.beta), found.initial_state


@on_its_device
def gradients(
    *, plan: Plan, q: Tensor, k: Tensor, v: Tensor | None, beta: Tensor | None, saved: Saved, do: Tensor,
    dstate: Tensor | None, scale: float, initial_state: bool,
) -> Gradients:  # fmt: skip
    """Of every input, for any plan.  v is read where nothing is erased, and beta where something is."""
    q, k, v, beta, do, dstate = readable(q=q, k=k, v=v, beta=beta, do=do.to(k.dtype), dstate=dstate)
    saved = Saved(*readable(q=q, **saved._asdict())[1:])  # hooks may have kept them elsewhere, and in another layout
    layout, call, scan = plan.layout, plan.call, plan.launches["chunk_scan_bwd"]
    if not call.erase:
        saved = saved._replace(pseudo=v)
    written = to_write(plan, q=q, k=k, do=do, beta=beta, initial_state=initial_state)
    dq, dk, dv, dbeta, dg, d_in = (written.get(name) for name in WRITTEN)
    # With one block of values its sum is dbeta.  With several, each leaves a partial sum.
    partials = dbeta
    if dbeta is not None and scan.blocks > 1:
        partials = made("partials", k.new_empty(scan.blocks, call.B, call.L, call.H, dtype=torch.float32))

    d_out = dstate
    inputs = {"plan": plan, "q": q, "k": k, "beta": beta, "do": do, "saved": saved, "scale": scale}
    if layout.segments > 1:
        local = made("local", k.new_empty(per_segment(plan), dtype=torch.float32))
        _chunk_scan_bwd("segment_maps_bwd", **inputs, d_out=dstate, d_in=local)
        d_out = made("d_out", torch.empty_like(local))
        _merge_segments("merge_segments_bwd", plan=plan, saved=saved, local=local, first=dstate, states=d_out)
    ends = {"d_out": d_out, "d_in": d_in}
    if scan.gluon:
        _hopper_scan_bwd(**inputs, **ends, dv=dv, dbeta=dbeta, dq=dq, dk=dk, dg=dg)
    elif layout.fused:
        _chunk_scan_bwd("chunk_scan_bwd", **inputs, **ends, dv=dv, dbeta=partials, dq=dq, dk=dk)
    else:
        assert saved.states is not None  # where the backward is two kernels
        dstates = made("dstates", torch.empty_like(saved.states))
        _chunk_scan_bwd("chunk_scan_bwd", **inputs, **ends, dv=dv, dbeta=partials, dstates=dstates)
        _chunk_bwd_dqk(**inputs, dv=dv, dstates=dstates, partials=partials, dbeta=dbeta, dq=dq, dk=dk, dg=dg)
    return finished(plan, k.dtype, **written)


@on_its_device
def recurrent(
    *, plan: Plan, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, scale: float,
    initial_state: Tensor | None = None, final_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
    g: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Output of the recurrence; writes into `final_state`, which may be `initial_state` itself.

    beta, g and heads as in `forward`.
    """
    q, k, v, beta, g, initial_state = readable(q=q, k=k, v=v, beta=beta, g=g, initial_state=initial_state)
    if final_state is not None:
        final_state = writable("final_state", final_state, q)
    c, step = plan.call, plan.launches["recurrent"]
    cu, o = token_offsets(cu_seqlens, q), _empty_tokens(plan.layout, v)
    launch_kernel(
        plan, "recurrent", rec.recurrent,
        q, k, v, beta, g, o, initial_state, final_state, cu, scale, c.L, c.H,
        K=c.K, V=c.V, BK=step.tiles.BK, BV=step.tiles.BV, **_switches(c), NORM=c.norm, EPS=NORM_EPS,
        STATE_IN=initial_state is not None, STATE_OUT=final_state is not None, VARLEN=cu is not None,
        num_warps=step.tiles.warps,
    )  # fmt: skip
    return o


def _switches(call) -> dict[str, Any]:
    """Of the kernels of a family: is there a gate, is there an erasure, how many value heads share a key head."""
    return {"GATE": call.gate, "ERASE": call.erase, "GROUP": call.group}


# --- One function for each kernel, in the order in which they run ---------------------------------------------------
def _inverse_norms(*, plan, q, k, saved):
    c, step = plan.call, plan.launches["inverse_norms"]
    launch_kernel(
        plan, "inverse_norms", fwd.inverse_norms,
        q, k, saved.q_norm, saved.k_norm, plan.layout.tokens * c.key_heads,
        K=c.K, BK=step.tiles.BK, ROWS=step.tiles.rows, EPS=NORM_EPS, num_warps=step.tiles.warps,
    )  # fmt: skip


def _gate_sums(*, plan, g, saved):
    c, step = plan.call, plan.launches["gate_sums"]
    launch_kernel(
        plan, "gate_sums", gates.gate_sums,
        g, saved.sums, saved.token_offsets, saved.chunk_offsets, c.sequences, c.L, c.H, plan.layout.tokens,
        C=c.chunk, HEADS=step.tiles.rows, VARLEN=plan.layout.packed, num_warps=step.tiles.warps,
    )  # fmt: skip


def _chunk_inverse(*, plan, k, beta, saved):
    c, step = plan.call, plan.launches["chunk_inverse"]
    launch_kernel(
        plan, "chunk_inverse", fwd.chunk_inverse,
        k, beta, saved.n, saved.k_norm, saved.sums, saved.token_offsets, saved.chunk_offsets, c.sequences, c.L, c.H,
        plan.layout.tokens if c.gate else None,
        K=c.K, BK=step.tiles.BK, C=c.chunk, PRECISION=c.precision, INVERSE=_INVERSE.get(c.dtype, c.precision),
        NORM=c.norm, GATE=c.gate, GROUP=c.group, VARLEN=plan.layout.packed, STAGES=step.tiles.stages,
        num_warps=step.tiles.warps,
    )  # fmt: skip


def _chunk_scan_fwd(name, *, plan, q, k, v, beta, scale, saved, state_in, state_out, o=None):
    """As "segment_maps_fwd", the first pass over split sequences: it writes where segments end and M, and no o."""
    c, layout, step = plan.call, plan.layout, plan.launches[name]
    t, first_pass = step.tiles, name == "segment_maps_fwd"
    pseudo, states = (None, None) if first_pass else (saved.pseudo, saved.states)
    q, k, v, n = _tiles_of(plan, step, (None if first_pass else q, t.BK), (k, t.BK), (v, t.BV), (saved.n, c.chunk))
    launch_kernel(
        plan, name, fwd.chunk_scan_fwd,
        q, k, v, beta, n, saved.q_norm, saved.k_norm, saved.sums, o, pseudo, states, state_in, state_out,
        saved.transition if first_pass else None, saved.token_offsets, saved.chunk_offsets,
        scale, c.L, c.H, layout.segment_length, layout.segments, layout.tokens if c.gate else None,
        K=c.K, V=c.V, BK=t.BK, BV=t.BV, C=c.chunk, PRECISION=c.precision, NORM=c.norm, **_switches(c),
        OUTPUT=o is not None, SAVE=pseudo is not None, STATES=states is not None, TRANSITION=first_pass,
        STATE_IN=state_in is not None, STATE_OUT=state_out is not None, VARLEN=layout.packed, STAGES=t.stages,
        TMA=step.tma, num_warps=t.warps,
    )  # fmt: skip


def _merge_segments(name, *, plan, saved, local, first, states):
    """Writes the state that enters each segment or, as "merge_segments_bwd", the gradient of the one that leaves it."""
    c, step = plan.call, plan.launches[name]
    launch_kernel(
        plan, name, fwd.merge_segments,
        saved.transition, local, states, first, c.H, plan.layout.segments,
        K=c.K, V=c.V, BK=step.tiles.BK, BV=step.tiles.BV, BLOCK=min(step.tiles.BK, 64),
        REVERSE=name == "merge_segments_bwd", FIRST=first is not None, ERASE=c.erase,
        PRECISION="ieee" if c.dtype == torch.float32 else "tf32", num_warps=step.tiles.warps,
    )  # fmt: skip


def _chunk_scan_bwd(
    name, *, plan, q, k, beta, do, saved, scale, d_out, d_in, dv=None, dbeta=None, dq=None, dk=None, dstates=None
):
    """As "segment_maps_bwd", the first pass over split sequences: it writes d_in alone."""
    c, layout, step = plan.call, plan.layout, plan.launches[name]
    t, first_pass = step.tiles, name == "segment_maps_bwd"
    fused, pseudo = layout.fused and not first_pass, saved.pseudo
    q, k, n, do = _tiles_of(plan, step, (q, t.BK), (k, t.BK), (saved.n, c.chunk), (do, t.BV))
    if fused:  # else it is fetched by threads
        (pseudo,) = _tiles_of(plan, step, (pseudo, t.BV))
    launch_kernel(
        plan, name, bwd.chunk_scan_bwd,
        q, k, beta, n, pseudo, saved.q_norm, saved.k_norm, saved.sums, do, dv, dbeta, dq, dk, d_out, d_in, dstates,
        saved.state_end, saved.token_offsets, saved.chunk_offsets,
        scale, c.L, c.H, layout.segment_length, layout.segments, layout.tokens,
        K=c.K, V=c.V, BK=t.BK, BV=t.BV, C=c.chunk, PRECISION=c.precision, NORM=c.norm, **_switches(c),
        FUSED=fused, LOCAL=first_pass, DSTATE_OUT=d_out is not None, DSTATE_IN=d_in is not None,
        VARLEN=layout.packed, STAGES=t.stages, TMA=step.tma, num_warps=t.warps,
    )  # fmt: skip


def _chunk_bwd_dqk(*, plan, q, k, beta, do, saved, scale, dv, dstates, partials, dbeta, dq, dk, dg=None):
    c, layout, step = plan.call, plan.layout, plan.launches["chunk_bwd_dqk"]
    t, rows = step.tiles, layout.chunks * c.H * c.K
    q, k, pseudo, do, dv = _tiles_of(plan, step, (q, t.BK), (k, t.BK), (saved.pseudo, t.BV), (do, t.BV), (dv, t.BV))
    states = saved.states
    if step.tma:
        states, dstates = (TensorDescriptor(x, [rows, c.V], [c.V, 1], [t.BK, t.BV]) for x in (states, dstates))
    launch_kernel(
        plan, "chunk_bwd_dqk", bwd.chunk_bwd_dqk,
        q, k, beta, pseudo, saved.q_norm, saved.k_norm, saved.sums, do, dv, states, dstates, partials, dbeta, dg,
        dq, dk,
        saved.token_offsets, saved.chunk_offsets, scale, c.sequences, c.L, c.H, layout.tokens,
        K=c.K, V=c.V, BK=t.BK, BV=t.BV, C=c.chunk,
        PARTIALS=plan.launches["chunk_scan_bwd"].blocks if c.erase else 1, DTYPE=_TRITON[c.dtype],
        PRECISION=c.precision, NORM=c.norm, **_switches(c), VARLEN=layout.packed, STAGES=t.stages, TMA=step.tma,
        num_warps=t.warps,
    )  # fmt: skip


def _hopper_scan_fwd(*, plan, q, k, v, beta, scale, saved, o, state_in, state_out):
    layout, step = plan.layout, plan.launches["chunk_scan_fwd"]
    q, k, v = map(_aligned, (q, k, v))
    state_in = None if state_in is None else state_in.float()
    if step.programs:
        bind_context(q.device)
        hopper.chunk_scan_fwd(
            run=functools.partial(launch_kernel, plan, "chunk_scan_fwd"),
            q=q, k=k, v=v, beta=beta, n=saved.n, o=o, pseudo=saved.pseudo, states=saved.states, q_norm=saved.q_norm,
            k_norm=saved.k_norm, sums=saved.sums, state_in=state_in, state_out=state_out, scale=scale,
            segment=layout.segment_length, segments=layout.segments, values=step.tiles.BV,
        )  # fmt: skip


def _hopper_scan_bwd(*, plan, q, k, beta, do, saved, scale, d_out, d_in, dv, dbeta, dq, dk, dg):
    layout = plan.layout
    q, k, do, n, pseudo, states = map(_aligned, (q, k, do, saved.n, saved.pseudo, saved.states))
    if plan.launches["chunk_scan_bwd"].programs:
        bind_context(q.device)
        hopper.chunk_scan_bwd(
            run=functools.partial(launch_kernel, plan, "chunk_scan_bwd"),
            q=q, k=k, beta=beta, n=n, pseudo=pseudo, states=states, do=do, dq=dq, dk=dk, dv=dv, dbeta=dbeta,
            dg=None if dg is None else dg[0], q_norm=saved.q_norm, k_norm=saved.k_norm, sums=saved.sums,
            dstate_out=d_out, dstate_in=d_in, scale=scale,
            segment=layout.segment_length, segments=layout.segments,
        )  # fmt: skip


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where it does not begin at a multiple of 16 bytes, as TMA needs."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


# --- Memory -------------------------------------------------------------------------------------------------------
def per_segment(plan: Plan) -> tuple[int, int, int, int]:
    """The shape of a state for each segment."""
    return plan.layout.total_segments, plan.call.H, plan.call.K, plan.call.V


def last_of(plan: Plan, states: Tensor) -> Tensor:
    """Of the states where segments end, those of each sequence's last; a copy, since outputs must not share memory."""
    segments = plan.layout.segments
    if segments == 1:
        return states
    return states[segments - 1 :: segments].clone(memory_format=torch.contiguous_format)


def first_of(plan: Plan, gradients: Tensor | None) -> Tensor | None:
    """Of the gradients of states that enter segments, those of each sequence's first."""
    segments = plan.layout.segments
    return gradients if gradients is None or segments == 1 else gradients[::segments].contiguous()


def _empty(buffer, like: Tensor) -> Tensor:
    return like.new_empty(buffer.shape, dtype=buffer.dtype)


def _empty_tokens(layout, like: Tensor) -> Tensor:
    """For a kernel to write, token by token; a packed row may have tokens of no sequence, which get zeros."""
    return torch.zeros_like(like) if layout.packed else torch.empty_like(like)


# What the backward's kernels write for the caller, in order; not all of it in every call.
WRITTEN = ("dq", "dk", "dv", "dbeta", "dg", "d_in")


def to_write(
    plan: Plan, *, q: Tensor, k: Tensor, do: Tensor, beta: Tensor | None, initial_state: bool
) -> dict[str, Tensor]:
    """Tensors for the kernels to write, by the names of `WRITTEN` in its order; `finished` makes gradients of them."""
    layout, call = plan.layout, plan.call
    new = {"dq": _for_value_heads(plan, q), "dk": _for_value_heads(plan, k), "dv": _empty_tokens(layout, do)}
    if beta is not None:
        new["dbeta"] = _empty_tokens(layout, beta)
    if call.gate:
        by_dqk = plan.launches.get("chunk_bwd_dqk")  # each of its programs takes BK of the keys
        new["dg"] = _new_tokens(plan, k, call.H, blocks=1 if by_dqk is None else -(-call.K // by_dqk.tiles.BK))
    if initial_state:
        new["d_in"] = k.new_empty(per_segment(plan), dtype=torch.float32)
    return {name: made(name, x) for name, x in new.items()}


def finished(
    plan: Plan, dtype: torch.dtype, *, dq: Tensor, dk: Tensor, dv: Tensor, dbeta: Tensor | None = None,
    dg: Tensor | None = None, d_in: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """The gradients, of what the kernels wrote: partial sums added up, in the dtype of q."""
    group = plan.call.group
    if group > 1:
        dq, dk = (x.unflatten(2, (-1, group)).sum(3, dtype=torch.float32).to(dtype) for x in (dq, dk))
    if dg is not None:
        dg = dg[0] if dg.shape[0] == 1 else dg.sum(0)
    return Gradients(dq, dk, dv, dbeta, dg, first_of(plan, d_in))


def _for_value_heads(plan: Plan, like: Tensor) -> Tensor:
    """For the gradient of q or k; where several value heads share one of its heads, each has a partial sum."""
    if plan.call.group == 1:
        return _empty_tokens(plan.layout, like)
    if plan.launches["chunk_scan_bwd"].gluon:  # whose copy engine writes them in bfloat16
        return like.new_empty((plan.call.B, plan.call.L, plan.call.H, like.shape[3]))
    return _new_tokens(plan, like, plan.call.H, like.shape[3])[0]


def _new_tokens(plan: Plan, like: Tensor, *sizes: int, blocks: int = 1) -> Tensor:
    """A float32 tensor `[blocks, B, L, *sizes]` for a kernel to write, see `_empty_tokens`."""
    new = like.new_zeros if plan.layout.packed else like.new_empty
    return new((blocks, plan.call.B, plan.call.L, *sizes), dtype=torch.float32)


def _tiles_of(plan: Plan, step, *tensors: tuple[Tensor | None, int]) -> list:
    """What the kernel is given to read `[B, L, H, d]` tensors by: with TMA descriptors, else the tensors themselves.

    Each comes with the columns of its tile.  A descriptor sees it as a matrix with a row for each token.
    """
    if not step.tma:
        return [x for x, _ in tensors]
    tokens, rows = plan.layout.tokens, plan.call.C
    bind_context(next(x for x, _ in tensors if x is not None).device)
    given = []
    for x, columns in tensors:
        width = 0 if x is None else x.shape[2] * x.shape[3]
        given.append(None if x is None else TensorDescriptor(x, [tokens, width], [width, 1], [rows, columns]))
    return given
