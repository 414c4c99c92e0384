"""What a call runs: one frozen `Plan`, resolved once from the call's sizes and flags, and cached by them.

    >>> x = torch.empty(1, 8192, 2, 128, dtype=torch.bfloat16, device="meta")
    >>> with using(target=Target(arch=90, sms=132)):  # an H100
    ...     plan = plan_call(x, x, x, training=True, chunk=64)
    >>> plan.layout.segments, plan.launches["chunk_scan_fwd"].programs
    (8, 32)

`print(plan)` says all of it in words.  The launchers take a plan and decide nothing.  There is no autotuning at run
time: the rules (`rules.py`) are explicit, and only `using` overrides them.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dn_lib.forms.common import check_flag, check_integer, describe
from dn_lib.kernels.hopper import launch as hopper
from dn_lib.kernels.rules import (
    KERNELS,
    SCANS,
    TMA_MIN_LENGTH,
    Call,
    Overrides,
    Target,
    Tiles,
    choose_segments,
    is_one_wave,
    padded,
    repays_descriptors,
    takes_gluon,
    tiles_for,
)


class Buffer(NamedTuple):
    """Shape and dtype of a tensor that the forward makes besides its outputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Saved(NamedTuple):
    """What the forward leaves for the backward, besides its inputs.  `Layout.buffers` gives shapes and dtypes.

    n: N of each chunk.  pseudo: Vn = D E, and more in weak rows, see `kept_strength`.  Neither is made without erasure.
    q_norm, k_norm: 1/|q| and 1/|k|, where they are to be normalised.
    states: the state that enters each chunk.  Small heads keep state_end instead, the state that leaves each segment.
    transition: M of each segment, if a sequence has several; without erasure the number in front of I.
    token_offsets, chunk_offsets: of packed sequences, made from cu_seqlens by the functions of these names.
    sums: of log gates since each chunk began, see `gate_sums`.
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
    sums: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How a call is cut up.  Its numbers may be symbolic, where torch.compile asks for shapes.

    fused: the backward of small heads is one kernel, from Hopper on.  A state and its gradient fit in the registers of
    one program, which carries both from right to left.
    segments: into how many each sequence is split, one for each program; 1 is no split.
    segment_length: in tokens, a multiple of the chunk; the last segment may be shorter.
    """

    call: Call
    fused: bool
    segments: int
    segment_length: int

    @property
    def packed(self) -> bool:
        return self.call.offsets is not None

    @property
    def tokens(self) -> int:
        return self.call.B * self.call.L

    @property
    def total_segments(self) -> int:
        return self.call.sequences * self.segments

    @property
    def chunks(self) -> int:
        """Chunks of the whole batch.  An upper bound where lengths vary, since nobody reads them on the host."""
        c = self.call
        return c.L // c.C + c.sequences if self.packed else c.B * -(-c.L // c.C)

    @functools.cached_property
    def buffers(self) -> Mapping[str, Buffer]:
        """What the forward makes besides its outputs, by its name in `Saved`; in training all of it is kept."""
        c, single = self.call, torch.float32
        made: dict[str, Buffer] = {}
        if c.erase:
            made["n"] = Buffer((c.B, c.L, c.H, c.C), c.dtype)
        if c.training and c.erase:
            made["pseudo"] = Buffer((c.B, c.L, c.H, c.V), c.dtype)
        if c.norm:
            made["q_norm"] = made["k_norm"] = Buffer((c.B, c.L, c.key_heads), single)
        if c.gate:
            made["sums"] = Buffer((c.H, c.B, c.L, 2), single)
        if c.training and self.fused:
            made["state_end"] = Buffer((self.total_segments, c.H, c.K, c.V), single)
        elif c.training:
            made["states"] = Buffer((self.chunks, c.H, c.K, c.V), c.dtype)
        if self.segments > 1:
            made["transition"] = Buffer((self.total_segments, c.H, *((c.K, c.K) if c.erase else ())), single)
        if c.offsets is not None:
            made["token_offsets"] = Buffer((c.sequences + 1,), c.offsets)
            made["chunk_offsets"] = Buffer((c.sequences + 1,), torch.int32)
        return MappingProxyType(made)


class Launch(NamedTuple):
    """One kernel of a plan.

    programs: of the launch's grid.  blocks: how many of them share the value channels of one state.
    tma: whether TMA fetches the tiles; else threads compute addresses.
    does: what it is for, in words.
    one_wave: whether all programs that have work run at once, each with an SM to itself.
    gluon: whether it is the kernel of that name in `dn_lib.kernels.hopper`.
    """

    kernel: str
    programs: int
    blocks: int
    tiles: Tiles
    tma: bool
    does: str
    one_wave: bool = False
    gluon: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs for a call.  launches: in their order, by name; a kernel that runs twice has two names.

    compiled, recorded: what `launcher` and `playback` keep of earlier calls; they decide nothing.
    """

    layout: Layout
    launches: Mapping[str, Launch]
    compiled: dict = field(default_factory=dict, repr=False)
    recorded: dict = field(default_factory=dict, repr=False)

    @property
    def call(self) -> Call:
        return self.layout.call

    def for_backward(self, *tensors: Tensor | None, precision: str) -> Plan:
        """This plan, unless the backward reads tensors that TMA cannot, or float32 dots have another precision now."""
        call = self.call._replace(precision=precision)
        if call.aligned and not are_aligned(*tensors):
            call = call._replace(aligned=False)
        return self if call == self.call else resolve(call)

    def __str__(self) -> str:
        from dn_lib.kernels.words import sentences

        return "\n".join(sentences(self))


# --- Overriding the rules -----------------------------------------------------------------------------------------
_NONE = Overrides()
_overrides: contextvars.ContextVar[Overrides] = contextvars.ContextVar("dn_lib_plan", default=_NONE)


@contextlib.contextmanager
def using(
    *,
    segments: int | None = None,
    fused: bool | None = None,
    tma: bool | None = None,
    gluon: bool | None = None,
    tiles: Mapping[str, Tiles] | None = None,
    target: Target | None = None,
) -> Iterator[None]:
    """Within it, calls of this thread are planned so, whatever the rules say; None changes nothing.

    segments: into how many to split each sequence; packed ones are never split.
    fused: whether the backward is one kernel.
    tma: False for pointers everywhere; True for TMA in small batches too, of at least TMA_MIN_LENGTH tokens in a
        sequence, wherever tiles, heads and chunks allow it.
    gluon: False for the Triton kernels everywhere; True for those for Hopper (`dn_lib.kernels.hopper`) in short calls
        too, wherever they can be run.
    tiles: by the name of a kernel, for all its launches, or of a launch (`KERNELS` lists both).
    target: plan for this device in place of the tensors' own.
    A backward follows the plan of its forward, wherever it runs.  Blocks may be nested: the inner one adds to the
    outer.  Raises ValueError or TypeError, naming the argument.

    >>> with using(segments=0):
    ...     ...
    Traceback (most recent call last):
    ValueError: segments must be an integer of at least 1, got 0
    """
    if segments is not None:
        check_integer("segments", segments)
    for name, flag in (("fused", fused), ("tma", tma), ("gluon", gluon)):
        if flag is not None:
            check_flag(name, flag)
    for name, chosen in (tiles or {}).items():
        _check_tiles(name, chosen)
    if target is not None and not isinstance(target, Target):
        raise TypeError(f"target must be a Target(arch, sms), got {describe(target)}")
    outer = _overrides.get()
    merged = {**dict(outer.tiles), **(tiles or {})}
    token = _overrides.set(
        Overrides(
            segments=outer.segments if segments is None else int(segments),
            fused=outer.fused if fused is None else bool(fused),
            tma=outer.tma if tma is None else bool(tma),
            gluon=outer.gluon if gluon is None else bool(gluon),
            tiles=tuple(sorted(merged.items())),
            target=outer.target if target is None else target,
        )
    )
    try:
        yield
    finally:
        _overrides.reset(token)


def _check_tiles(name: str, tiles: Tiles) -> None:
    if name not in KERNELS and name not in KERNELS.values():
        known = ", ".join(sorted({*KERNELS, *KERNELS.values()}))
        raise ValueError(f"tiles must be for one of {known}, got {describe(name)}")
    if not isinstance(tiles, Tiles):
        raise TypeError(f"tiles of {name} must be Tiles(BK, BV, warps, stages, ...), got {describe(tiles)}")
    for axis in ("BK", "BV", "warps", "rows"):
        size = getattr(tiles, axis)
        if size < 0 or size & (size - 1):
            raise ValueError(f"tiles of {name} must have a power of two for {axis}, got {size}")
    if min(tiles.BK, tiles.warps, tiles.stages) < 1:
        raise ValueError(f"tiles of {name} must have BK, warps and stages of at least 1, got {tiles}")


@functools.cache
def target_of(device: torch.device) -> Target:
    """The rules' view of a device, looked up once."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type != "cuda":
        return Target(None, 0)
    about = torch.cuda.get_device_properties(device)
    return Target(None if interpreted else 10 * about.major + about.minor, about.multi_processor_count)


def target_in_use() -> Target | None:
    """The target that `using` has set, if any."""
    return _overrides.get().target


def are_aligned(*tensors: Tensor | None) -> bool:
    """Whether TMA can read all of them: it takes addresses that are multiples of 16 bytes."""
    return not any(x is not None and x.data_ptr() % 16 for x in tensors)


def call_of(
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    norm: bool = False,
    training: bool = False,
    chunk: int | None,
    precision: str = "ieee",
    aligned: bool = True,
    gate: bool = False,
    erase: bool = True,
) -> Call:
    """What determines the plan of a call on k `[B, L, H, K]` and v `[B, L, H_v, V]`; sizes may be symbolic.

    H_v is a multiple of H.  See `Call`, whose H is H_v.
    """
    B, L, key_heads, K = k.shape
    H = v.shape[2]
    group = 1 if key_heads == H else H // key_heads
    overrides = _overrides.get()
    target = overrides.target or target_of(k.device)
    sequences, offsets = (B, None) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, cu_seqlens.dtype)
    return Call(
        B,
        L,
        H,
        K,
        v.shape[3],
        sequences,
        offsets,
        k.dtype,
        norm,
        training,
        chunk,
        precision,
        aligned,
        target,
        overrides,
        gate,
        erase,
        group,
    )


def plan_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    norm: bool = False,
    training: bool = False,
    chunk: int | None,
    precision: str = "ieee",
    gate: bool = False,
    erase: bool = True,
) -> Plan:
    """The plan for a call on tensors `[B, L, H, d]`; chunk None is for the recurrence.  See `Call`.

    gate: whether there is a log gate `[B, L, H_v]`.  erase: the delta rule, or linear attention, without beta.
    """
    aligned = chunk is None or are_aligned(q, k, v)
    return resolve(
        call_of(
            k, v, cu_seqlens=cu_seqlens, norm=norm, training=training, chunk=chunk, precision=precision,
            aligned=aligned, gate=gate, erase=erase,
        )
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def resolve(call: Call) -> Plan:
    """The plan for a call: the one place where everything is decided."""
    layout = lay_out(call)
    launches = _recurrent(call) if call.chunk is None else _chunkwise(layout)
    return Plan(layout, MappingProxyType(launches))


def lay_out(call: Call) -> Layout:
    """The part of a plan that shapes depend on; sizes may be symbolic."""
    if call.chunk is None:
        return Layout(call, False, 1, call.L)
    fused = call.overrides.fused
    if fused is None:
        # Before Hopper the one kernel spills 11 KB a thread to memory; two kernels spill next to nothing.
        hopper = call.target.arch is None or call.target.arch >= 90
        fused = hopper and max(padded(call.K), padded(call.V)) <= 64 and call.dtype != torch.float32
    # A state cannot be walked back through a gate, which may be zero; without erasure there is nothing to save by it.
    fused = fused and call.erase and not call.gate
    wanted = choose_segments(call)
    length = max(1, -(-call.L // (call.chunk * wanted))) * call.chunk
    return Layout(call, fused, max(1, -(-call.L // length)), length)


def _recurrent(call: Call) -> dict[str, Launch]:
    tiles = tiles_for("recurrent", call)
    blocks = -(-call.V // tiles.BV)
    programs = blocks * call.H * call.sequences
    return {"recurrent": Launch("recurrent", programs, blocks, tiles, False, "the recurrence, one token at a time")}


def _chunkwise(layout: Layout) -> dict[str, Launch]:
    c, s, total = layout.call, layout.segments, layout.total_segments
    launches: dict[str, Launch] = {}

    def add(name: str, does: str, *, of: int, idle: int = 0, values: int = 0, keys: int = 0) -> None:
        """A launch with `of` programs for each block of `values` columns, or of `keys` channels, that they share.

        idle: programs of the grid that return at once, for each head.
        """
        one = tiles_for(name, c, one_wave=False)  # the regime changes the stages alone
        blocks = -(-values // one.BV) if values else 1
        programs = of * blocks * (-(-keys // one.BK) if keys else 1) * c.H
        alone = is_one_wave(programs - idle * c.H, c.target)
        tiles = tiles_for(name, c, one_wave=alone) if name in SCANS else one
        launches[name] = Launch(KERNELS[name], programs, blocks, tiles, _uses_tma(layout, name, tiles), does, alone)

    def add_gluon(name: str, does: str, tiles: Tiles) -> None:
        blocks = hopper.HEAD // tiles.BV
        programs = total * c.H * blocks
        wave = is_one_wave(programs, c.target)
        launches[name] = Launch(name, programs, blocks, tiles, True, does, one_wave=wave, gluon=True)

    if c.norm:
        tiles = tiles_for("inverse_norms", c)
        programs = -(-layout.tokens * c.key_heads // tiles.rows)
        launches["inverse_norms"] = Launch("inverse_norms", programs, 1, tiles, False, "1/|q| and 1/|k|")
    if c.gate:
        tiles = tiles_for("gate_sums", c)
        programs = layout.chunks * -(-c.H // tiles.rows)
        launches["gate_sums"] = Launch("gate_sums", programs, 1, tiles, False, "the log gates' sums in each chunk")
    if c.erase:
        add("chunk_inverse", "N of each chunk", of=layout.chunks)
    if s > 1:
        # M is carried by programs of their own, which take BV of its K columns.  The first segment needs no M.
        BV = tiles_for("segment_maps_fwd", c).BV
        key_blocks = -(-c.K // BV) if c.erase else 0
        idle = c.sequences * key_blocks
        columns = BV * (-(-c.V // BV) + key_blocks)
        add("segment_maps_fwd", "the affine map of each segment but the last", of=total - c.sequences, idle=idle,
            values=columns)  # fmt: skip
        add("merge_segments_fwd", "the state that enters each segment", of=c.sequences, values=c.V)
    gluon = takes_gluon(c)
    if gluon:
        BV = hopper.values_per_program(total * c.H, c.training and not c.gate)
        add_gluon("chunk_scan_fwd", "the state along the chunks, and o", Tiles(hopper.HEAD, BV, BV // 16, 2, tma=True))
    else:
        add("chunk_scan_fwd", "the state along the chunks, and o", of=total, values=c.V)
    if not c.training:
        return launches
    if s > 1:
        add("segment_maps_bwd", "the same maps, reversed, for the gradient of the state", of=total - c.sequences,
            values=c.V)  # fmt: skip
        add("merge_segments_bwd", "the gradient of the state that leaves each segment", of=c.sequences, values=c.V)
    if gluon:
        tiles = Tiles(hopper.HEAD, hopper.HEAD, 8, 2, tma=True)
        add_gluon("chunk_scan_bwd", "the gradient of the state, right to left, and all gradients", tiles)
    elif layout.fused:
        add("chunk_scan_bwd", "the state and its gradient, right to left, and all gradients", of=total, values=c.V)
        if launches["chunk_scan_bwd"].blocks > 1:
            raise ValueError(f"fused must be False where d_v = {c.V} is more than one program's tile of values")
    else:
        add("chunk_scan_bwd", "the gradient of the state, right to left, dv and dbeta", of=total, values=c.V)
        add("chunk_bwd_dqk", "dq and dk, all chunks at once", of=layout.chunks, keys=c.K)
    return launches


def _uses_tma(layout: Layout, name: str, tiles: Tiles) -> bool:
    """Whether TMA fetches a launch's tiles.

    It knows where a tensor ends, not where a sequence or a head does: chunks must be whole, and tiles divide heads.
    """
    c = layout.call
    possible = tiles.tma and (name in SCANS or name == "chunk_bwd_dqk")
    possible = possible and c.aligned and not layout.packed and c.L % c.C == 0
    if not possible or c.K % tiles.BK or c.V % tiles.BV or c.overrides.tma is False:
        return False
    return c.L >= TMA_MIN_LENGTH and (bool(c.overrides.tma) or repays_descriptors(c))
