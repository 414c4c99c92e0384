"""Allocates, chooses tiles and launches: `forward`, `backward` and `recurrent` on `[B, L, H, d]` tensors.

Nothing here reads a value from a GPU, so a call can be captured in a CUDA graph.  Tokens of a packed row that lie in
no sequence, such as those behind the last offset of a padded buffer, get zeros: outputs and gradients.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dn_lib.kernels import plan as configs
from dn_lib.kernels.arguments import chunk_offsets, readable, token_offsets, writable
from dn_lib.kernels.common import INTERPRETED
from dn_lib.kernels.delta_rule import backward as bwd
from dn_lib.kernels.delta_rule import forward as fwd
from dn_lib.kernels.delta_rule import recurrent as rec

NORM_EPS = 1e-6
TMA_MIN_LENGTH = 1024
TMA_MIN_VALUES = 2**25  # of q or v, in training: below, the GPU is faster than the host that makes the descriptors
_INVERSE = {torch.bfloat16: "half", torch.float16: "halves"}  # how the recursion on N rounds; float32: as all dots
_INTERPRETED = bool(INTERPRETED.value)


@dataclass(frozen=True)
class Shape:
    """Sizes of a call and its plan.  With `cu_seqlens` the batch is one packed row."""

    B: int
    L: int
    H: int
    K: int
    V: int
    sequences: int
    plan: configs.Plan
    varlen: bool
    training: bool = False

    @property
    def tokens(self) -> int:
        return self.B * self.L

    @property
    def total_segments(self) -> int:
        return self.sequences * self.plan.segments

    @property
    def chunks(self) -> int:
        """Chunks over the whole batch; an upper bound if lengths vary, since nobody reads them here."""
        if self.varlen:
            return self.L // self.plan.chunk + self.sequences
        return self.B * -(-self.L // self.plan.chunk)

    @property
    def copies(self) -> bool:
        """Whether the copy engine may fetch tiles: of whole chunks, in calls long enough to repay the descriptors."""
        whole = not self.varlen and self.L % self.plan.chunk == 0 and self.L >= TMA_MIN_LENGTH
        values = self.tokens * self.H * max(self.K, self.V)
        return whole and (not self.training or values >= TMA_MIN_VALUES)


def shape_of(
    k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int, segments: int | None = None, training: bool = False
) -> Shape:
    """The layout of a call; `segments` overrides the rule's choice (the tests use it)."""
    B, L, H, K = k.shape
    varlen = cu_seqlens is not None
    sequences = cu_seqlens.numel() - 1 if varlen else B
    if segments is None:
        can_split = k.is_cuda and not varlen
        segments = configs.segments(sequences, L, H, K, v.shape[-1], chunk, k.device.index or 0) if can_split else 1
    plan = configs.plan(L, K, v.shape[-1], k.dtype, chunk, segments)
    return Shape(B, L, H, K, v.shape[-1], sequences, plan, varlen, training)


def _filled(s: Shape) -> Callable[[Tensor], Tensor]:
    """What allocates a tensor of tokens for kernels to write: in a packed row there may be tokens of no sequence."""
    return torch.zeros_like if s.varlen else torch.empty_like


def _tiles(kernel: str, s: Shape, k: Tensor, norm: bool, variant: str = "", programs: int = 0) -> configs.Tiles:
    """The tiles of a kernel; for one that walks, `programs` says how many of it there will be."""
    device = None if _INTERPRETED else k.device.index or 0
    alone = device is not None and programs > 0 and configs.alone(programs, device)
    return configs.tiles(kernel, s.K, s.V, k.dtype, norm, variant, alone, device)


def _descriptors(s: Shape, t: configs.Tiles, *tensors: tuple[Tensor | None, int]) -> tuple[bool, list]:
    """Whether the copy engine can fetch the tiles of these `[B, L, H, d]` tensors, and what the kernel is given.

    Each tensor comes with the columns of its tile, which have to divide the heads.
    """
    given = [x for x, _ in tensors]
    aligned = all(x is None or (x.shape[-1] % columns == 0 and x.data_ptr() % 16 == 0) for x, columns in tensors)
    if not (t.tma and aligned and s.copies):
        return False, given
    _bind_context(given[0].device)
    return True, [None if x is None else _descriptor(x, s.tokens, s.plan.chunk, columns) for x, columns in tensors]


def _descriptor(x: Tensor, rows: int, tile_rows: int, tile_columns: int) -> TensorDescriptor:
    """Of the contiguous x as a matrix of so many rows, in tiles."""
    columns = x.numel() // rows
    return TensorDescriptor(x, [rows, columns], [columns, 1], [tile_rows, tile_columns])


_bound = threading.local()


def _bind_context(device: torch.device) -> None:
    """Once a thread: the driver encodes descriptors only in a thread that has a CUDA context, as a launch would make.

    Autograd's own thread may come here before it has launched anything.  Asking for free memory binds the context,
    and can be done while a CUDA graph is captured.
    """
    if not _INTERPRETED and device.type == "cuda" and not getattr(_bound, "done", False):
        torch.cuda.mem_get_info(device)
        _bound.done = True


def _walk(
    s, q, k, v, beta, n, norms, scale, precision, *, o=None, pseudo=None, states=None, state_in=None, state_out=None,
    transition=None, cu=None, offsets=None,
):  # fmt: skip
    first_pass, norm = transition is not None, norms[0] is not None
    programs = configs.walk_programs(s.sequences, s.H, s.K, s.V, s.plan.segments, first_pass)
    t = _tiles("chunk_scan_fwd", s, k, norm, "transition" if first_pass else "", programs)
    pairs = (k, t.BK), (v, t.BV), (n, s.plan.chunk), (None if first_pass else q, t.BK)
    tma, (k, v, n, q) = _descriptors(s, t, *pairs)
    blocks, parts = triton.cdiv(s.V, t.BV), s.total_segments
    if first_pass:
        blocks, parts = blocks + triton.cdiv(s.K, t.BV), parts - s.sequences
    fwd.chunk_scan_fwd[(blocks * s.H * parts,)](
        q, k, v, beta, n, *norms, o, pseudo, states, state_in, state_out, transition, cu, offsets,
        scale, s.L, s.H, s.plan.segment, s.plan.segments,
        K=s.K, V=s.V, BK=t.BK, BV=t.BV, C=s.plan.chunk, PRECISION=precision, NORM=norm,
        OUTPUT=o is not None, SAVE=pseudo is not None, STATES=states is not None, TRANSITION=first_pass,
        STATE_IN=state_in is not None, STATE_OUT=state_out is not None, VARLEN=s.varlen, STAGES=t.stages, TMA=tma,
        num_warps=t.warps,
    )  # fmt: skip


def _merge(s, transition, local, first, reverse, exact):
    """The state (or, reversed, its gradient) that enters each segment, `[segments, H, K, V]`."""
    states = torch.empty_like(local)
    t = _tiles("merge_segments", s, local, False)
    fwd.merge_segments[(triton.cdiv(s.V, t.BV) * s.H * s.sequences,)](
        transition, local, states, first, s.H, s.plan.segments,
        K=s.K, V=s.V, BK=t.BK, BV=t.BV, BLOCK=min(t.BK, 64), REVERSE=reverse, FIRST=first is not None,
        PRECISION="ieee" if exact else "tf32",
        num_warps=t.warps,
    )  # fmt: skip
    return states


@dataclass
class Saved:
    """What the forward leaves for the backward, besides its inputs.

    n: `[B, L, H, C]`.  pseudo: like v.  q_norm, k_norm: `[B, L, H]` or None.  states: what enters each chunk,
    `[chunks, H, K, V]`, or, where the backward walks the state back, state_end: where each segment ends.
    transition: each segment's M, if a sequence has several.  token_offsets, chunk_offsets: of packed sequences,
    each made from cu_seqlens by the function of that name.
    """

    n: Tensor
    pseudo: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    states: Tensor | None
    state_end: Tensor | None
    transition: Tensor | None
    token_offsets: Tensor | None
    chunk_offsets: Tensor | None


def _on_its_device(run: Callable) -> Callable:
    """Makes the GPU of the first argument the current one, as Triton expects, for the time of the call."""

    @functools.wraps(run)
    def launch(q: Tensor, *arguments, **options):
        if q.is_cuda and q.device.index != torch.cuda.current_device():
            with torch.cuda.device(q.device):
                return run(q, *arguments, **options)
        return run(q, *arguments, **options)

    return launch


@_on_its_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, scale: float, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, norm: bool, chunk: int, precision: str, save: bool, final_state: bool,
    segments: int | None = None,
) -> tuple[Tensor, Tensor | None, Saved]:  # fmt: skip
    """Output `[B, L, H, V]`, final state `[N, H, K, V]` float32 or None, and what the backward needs."""
    q, k, v, beta, initial_state = readable(q=q, k=k, v=v, beta=beta, initial_state=initial_state)
    s = shape_of(k, v, cu_seqlens, chunk, segments, training=save)
    C, split = s.plan.chunk, s.plan.segments > 1
    cu = token_offsets(cu_seqlens, q)
    offsets = chunk_offsets(cu, C)
    o, pseudo = _filled(s)(v), torch.empty_like(v) if save else None
    state = torch.empty(s.total_segments, s.H, s.K, s.V, dtype=torch.float32, device=k.device)
    q_norm = k_norm = transition = states = None
    n = torch.empty(s.B, s.L, s.H, C, dtype=k.dtype, device=k.device)
    if norm:
        q_norm, k_norm = (torch.empty(s.B, s.L, s.H, dtype=torch.float32, device=k.device) for _ in range(2))
    if s.chunks * s.H > 0:
        if norm:
            t, rows = _tiles("inverse_norms", s, k, norm), s.tokens * s.H
            fwd.inverse_norms[(triton.cdiv(rows, t.BV),)](
                q, k, q_norm, k_norm, rows, K=s.K, BK=t.BK, ROWS=t.BV, EPS=NORM_EPS, num_warps=t.warps
            )
        t = _tiles("chunk_inverse", s, k, norm)
        fwd.chunk_inverse[(s.chunks * s.H,)](
            k, beta, n, k_norm, cu, offsets, s.sequences, s.L, s.H,
            K=s.K, BK=t.BK, C=C, PRECISION=precision, INVERSE=_INVERSE.get(k.dtype, precision), NORM=norm,
            VARLEN=s.varlen, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
    if s.total_segments * s.H > 0:
        inputs, state_in = (s, q, k, v, beta, n, (q_norm, k_norm), scale, precision), initial_state
        if split:
            transition = torch.empty(s.total_segments, s.H, s.K, s.K, dtype=torch.float32, device=k.device)
            local = torch.empty_like(state)
            _walk(*inputs, state_in=initial_state, state_out=local, transition=transition)
            state_in = _merge(s, transition, local, initial_state, False, k.dtype == torch.float32)
        if save and not s.plan.fused:
            states = torch.empty(s.chunks, s.H, s.K, s.V, dtype=k.dtype, device=k.device)
        out = state if final_state or (save and s.plan.fused) else None
        _walk(*inputs, o=o, pseudo=pseudo, states=states, state_in=state_in, state_out=out, cu=cu, offsets=offsets)
    last = state if final_state else None
    if final_state and split:
        # A copy even of one row: the outputs of an operator must not share memory.
        last = state[s.plan.segments - 1 :: s.plan.segments].clone(memory_format=torch.contiguous_format)
    state_end, transition = (state if save and s.plan.fused else None), (transition if save else None)
    return o, last, Saved(n, pseudo, q_norm, k_norm, states, state_end, transition, cu, offsets)


def _walk_back(s, q, k, beta, saved, do, dv, dbeta, dq, dk, d_out, d_in, dstates, cu, offsets, scale, precision):
    norm = saved.q_norm is not None
    fused, local = dq is not None, dv is None
    programs = configs.walk_programs(s.sequences, s.H, s.K, s.V, s.plan.segments - local, False)
    t = _tiles("chunk_scan_bwd", s, k, norm, "fused" if fused else "", programs)
    pairs = (q, t.BK), (k, t.BK), (saved.n, s.plan.chunk), (do, t.BV), (saved.pseudo if fused else None, t.BV)
    tma, (q_given, k_given, n, do, pseudo) = _descriptors(s, t, *pairs)
    parts = s.total_segments - s.sequences if local else s.total_segments
    bwd.chunk_scan_bwd[(triton.cdiv(s.V, t.BV) * s.H * parts,)](
        q_given, k_given, beta, n, pseudo if fused else saved.pseudo, saved.q_norm, saved.k_norm, do, dv, dbeta, dq, dk,
        d_out, d_in, dstates, saved.state_end, cu, offsets, scale, s.L, s.H, s.plan.segment, s.plan.segments, s.tokens,
        K=s.K, V=s.V, BK=t.BK, BV=t.BV, C=s.plan.chunk, PRECISION=precision, NORM=norm,
        FUSED=fused, LOCAL=local, DSTATE_OUT=d_out is not None, DSTATE_IN=d_in is not None,
        VARLEN=s.varlen, STAGES=t.stages, TMA=tma, num_warps=t.warps,
    )  # fmt: skip


@_on_its_device
def backward(
    q: Tensor, k: Tensor, v_like: Tensor, beta: Tensor, saved: Saved, do: Tensor, dstate: Tensor | None, *,
    scale: float, cu_seqlens: Tensor | None, chunk: int, precision: str, initial_state: bool,
    segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dbeta, each in its input's dtype, and, if `initial_state`, its gradient (float32)."""
    q, k, beta, do, dstate = readable(q=q, k=k, beta=beta, do=do.to(k.dtype), dstate=dstate)
    saved = Saved(*readable(q=q, **vars(saved))[1:])  # hooks may have kept them elsewhere, and in another layout
    s = shape_of(k, v_like, cu_seqlens, chunk, segments, training=True)
    norm, split, device = saved.q_norm is not None, s.plan.segments > 1, k.device
    dq, dk, dv, dbeta = (_filled(s)(x) for x in (q, k, do, beta))
    blocks = 1 if s.plan.fused else triton.cdiv(s.V, _tiles("chunk_scan_bwd", s, k, norm).BV)
    parts = dbeta
    if blocks > 1:
        parts = torch.empty(blocks, s.B, s.L, s.H, dtype=torch.float32, device=device)
    cu, offsets = saved.token_offsets, saved.chunk_offsets
    d_in = d_first = None
    if initial_state:
        d_first = torch.empty(s.sequences, s.H, s.K, s.V, dtype=torch.float32, device=device)
        d_in = d_first
    if s.total_segments * s.H == 0:
        return dq, dk, dv, dbeta, d_first
    d_out = dstate
    if split:
        local = torch.empty(s.total_segments, s.H, s.K, s.V, dtype=torch.float32, device=device)
        _walk_back(s, q, k, beta, saved, do, None, None, None, None, dstate, local, None, cu, offsets,
                   scale, precision)  # fmt: skip
        d_out = _merge(s, saved.transition, local, dstate, True, k.dtype == torch.float32)
        d_in = torch.empty_like(local) if initial_state else None
    if s.plan.fused:
        _walk_back(s, q, k, beta, saved, do, dv, parts, dq, dk, d_out, d_in, None, cu, offsets, scale,
                   precision)  # fmt: skip
    else:
        dstates = torch.empty_like(saved.states)
        _walk_back(s, q, k, beta, saved, do, dv, parts, None, None, d_out, d_in, dstates, cu, offsets, scale,
                   precision)  # fmt: skip
        _gradients(s, q, k, beta, saved, do, dv, dstates, parts, dbeta, dq, dk, cu, offsets, scale, precision)
    if split and initial_state:
        d_first = d_in[:: s.plan.segments].contiguous()
    return dq, dk, dv, dbeta, d_first


def _gradients(s, q, k, beta, saved, do, dv, dstates, parts, dbeta, dq, dk, cu, offsets, scale, precision):
    norm, states = saved.q_norm is not None, saved.states
    t = _tiles("chunk_bwd_dqk", s, k, norm)
    pairs = (q, t.BK), (k, t.BK), (saved.pseudo, t.BV), (do, t.BV), (dv, t.BV)
    tma, (q, k, pseudo, do, dv) = _descriptors(s, t, *pairs)
    if tma:
        states, dstates = (_descriptor(x, s.chunks * s.H * s.K, t.BK, t.BV) for x in (states, dstates))
    if s.chunks > 0:
        bwd.chunk_bwd_dqk[(triton.cdiv(s.K, t.BK) * s.H * s.chunks,)](
            q, k, beta, pseudo, saved.q_norm, saved.k_norm, do, dv, states, dstates, parts, dbeta, dq, dk,
            cu, offsets, scale, s.sequences, s.L, s.H, s.tokens,
            K=s.K, V=s.V, BK=t.BK, BV=t.BV, C=s.plan.chunk, PARTIALS=1 if parts is dbeta else parts.shape[0],
            PRECISION=precision, NORM=norm,
            VARLEN=s.varlen, STAGES=t.stages, TMA=tma, num_warps=t.warps,
        )  # fmt: skip


@_on_its_device
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, scale: float, initial_state: Tensor | None,
    final_state: Tensor | None, cu_seqlens: Tensor | None, norm: bool,
) -> Tensor:  # fmt: skip
    """The recurrent kernel; writes into `final_state`, which may be `initial_state` itself."""
    q, k, v, beta, initial_state = readable(q=q, k=k, v=v, beta=beta, initial_state=initial_state)
    if final_state is not None:
        final_state = writable("final_state", final_state, q)
    B, L, H, K = k.shape
    V = v.shape[-1]
    cu = token_offsets(cu_seqlens, q)
    o = torch.empty_like(v) if cu is None else torch.zeros_like(v)
    sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
    t = configs.tiles("recurrent", K, V, k.dtype, norm, "", False, None if _INTERPRETED else k.device.index or 0)
    if sequences * H:
        rec.recurrent[(triton.cdiv(V, t.BV) * H * sequences,)](
            q, k, v, beta, o, initial_state, final_state, cu, scale, L, H,
            K=K, V=V, BK=t.BK, BV=t.BV, NORM=norm, EPS=NORM_EPS, STATE_IN=initial_state is not None,
            STATE_OUT=final_state is not None, VARLEN=cu_seqlens is not None, num_warps=t.warps,
        )  # fmt: skip
    return o
