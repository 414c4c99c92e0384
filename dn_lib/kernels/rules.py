"""The rules by which a plan is made: tiles, segments, TMA, and which calls the kernels for Hopper take.

Each is explicit; only `dn_lib.kernels.plan.using` overrides them, through `Call.overrides`.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import NamedTuple

import torch

from dn_lib.kernels.hopper import launch as hopper

# What the kernels take.
MAX_HEAD_DIM = 256
CHUNK_SIZES = (16, 32, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Up to this length, and with no gradient asked for, the operator runs the recurrence itself, one token at a time.
RECURRENT_MAX_LENGTH = 16
SPLITS = (2, 4, 8, 16)
# Heads whose gates one program of `gate_sums` adds up: neighbours in memory, read together.
GATE_HEADS = 8
TMA_MIN_LENGTH = 1024
# Elements of q or v, for inference and in training.  The host takes time to make the descriptors, and in smaller calls
# the GPU waits for it.
TMA_MIN_VALUES = {False: 2**22, True: 2**25}


# --- What a plan is made of ---------------------------------------------------------------------------------------
class Target(NamedTuple):
    """What the rules ask of a device.

    arch: compute capability, 90 for a Hopper GPU; None stands for Triton's interpreter.
    sms: streaming multiprocessors (SMs), 0 on a CPU.
    """

    arch: int | None
    sms: int


class Tiles(NamedTuple):
    """Block sizes and resources of one kernel's programs.

    BK, BV: key and value channels of a tile; 0 where the kernel has no such axis.
    stages: of the loads' software pipeline.  tma: whether TMA may fetch the tiles, where the shape allows it.
    rows: keys and queries for one program, in `inverse_norms`; heads for one program, in `gate_sums`.
    """

    BK: int
    BV: int
    warps: int
    stages: int
    tma: bool = False
    rows: int = 0


class Overrides(NamedTuple):
    """What `using` has set; None leaves the choice to the rules."""

    segments: int | None = None
    fused: bool | None = None
    tma: bool | None = None
    gluon: bool | None = None
    tiles: tuple[tuple[str, Tiles], ...] = ()
    target: Target | None = None


class Call(NamedTuple):
    """All that determines a plan.  A tuple, because every call hashes one.

    offsets: the dtype of cu_seqlens; None where sequences are not packed.
    training: whether a backward may follow.
    chunk: tokens of a chunk; None for the recurrence, one token at a time.
    aligned: whether the tensors that TMA would read start at multiples of 16 bytes.
    precision: of float32 dots, "ieee" or "tf32".
    gate: whether there is a log gate per token.  erase: whether it is the delta rule; else linear attention.
    group: value heads, of which there are H, for each key head.
    """

    B: int
    L: int
    H: int
    K: int
    V: int
    sequences: int
    offsets: torch.dtype | None
    dtype: torch.dtype
    norm: bool
    training: bool
    chunk: int | None
    precision: str
    aligned: bool
    target: Target
    overrides: Overrides
    gate: bool = False
    erase: bool = True
    group: int = 1

    @property
    def key_heads(self) -> int:
        return self.H // self.group

    @property
    def C(self) -> int:
        """The chunk of a call that has chunks."""
        assert self.chunk is not None
        return self.chunk


# Names of launches, with the kernels that they run.
KERNELS = {
    "recurrent": "recurrent",
    "inverse_norms": "inverse_norms",
    "gate_sums": "gate_sums",
    "chunk_inverse": "chunk_inverse",
    "segment_maps_fwd": "chunk_scan_fwd",
    "merge_segments_fwd": "merge_segments",
    "chunk_scan_fwd": "chunk_scan_fwd",
    "segment_maps_bwd": "chunk_scan_bwd",
    "merge_segments_bwd": "merge_segments",
    "chunk_scan_bwd": "chunk_scan_bwd",
    "chunk_bwd_dqk": "chunk_bwd_dqk",
}


# --- From tensors to a plan ---------------------------------------------------------------------------------------
def default_chunk(dtype: torch.dtype) -> int:
    """64, or 32 in float32, whose tiles are twice the size."""
    return 32 if dtype == torch.float32 else 64


# --- The rules ----------------------------------------------------------------------------------------------------
def padded(size: int) -> int:
    """The next power of two, at least 16: the smallest inner size that a tensor-core dot takes."""
    return max(16, 1 << (int(size) - 1).bit_length())


def is_one_wave(programs: int, target: Target) -> bool:
    """Whether all programs run at once, each with an SM to itself."""
    return target.arch is not None and 0 < programs <= target.sms


def choose_segments(call: Call) -> int:
    """Into how many segments to split each sequence: few heads and long sequences leave SMs idle.

    A split costs a first pass, for the affine maps of the segments, and their merge.  Picks the split with the lowest
    estimated cost, in hundredths of one chunk step on an otherwise idle SM.  Two programs that share an SM take longer
    by a factor that grows with the head size.  A step of the first pass counts 0.4, a merged segment 3, a split 8
    (fitted to times on an H200, see README.md).  Integers alone, since torch.compile may hand over symbolic sizes.
    """
    if call.offsets is not None:
        return 1
    if call.overrides.segments is not None:
        return call.overrides.segments
    sms = call.target.sms
    if not sms:
        return 1
    if takes_gluon(call):
        return gluon_segments(call)
    shared = {64: 120, 128: 150, 256: 180}[max(64, padded(call.K), padded(call.V))]
    BV = tiles_for("chunk_scan_fwd", call).BV
    values, keys = -(-call.V // BV), -(-call.K // BV) if call.erase else 0

    def time(programs: int) -> int:
        return 100 if programs <= sms else shared * -(-programs // (2 * sms))

    best, least = 1, -(-call.L // call.C) * time(call.sequences * call.H * values)
    for segments in SPLITS:
        if 8 * call.C * segments > call.L:
            break
        steps = -(-call.L // (call.C * segments))
        first_pass = call.sequences * call.H * ((segments - 1) * values + (segments - 2) * keys)
        cost = steps * time(call.sequences * call.H * segments * values)
        cost += steps * 2 * time(first_pass) // 5 + 100 * (3 * segments + 8)
        if cost < least:
            best, least = segments, cost
    return best


def gluon_segments(call: Call) -> int:
    """Into how many segments to split each sequence for the kernels for Hopper: their programs fill an SM each.

    In training, until every SM has a program, unless about half have one anyway: a split would then save a tenth of
    the GPU's time, and the host has twice as much to launch.  Beyond 8 segments M's and merges cost more than the
    second half of the SMs gives.  Forward alone, half of the SMs keep the memory busy, and only sequences of few heads
    are worth a first pass.  A segment has 16 chunks at least.  From times on an H100, see hopper/README.md.
    """
    heads, sms, segments = call.sequences * call.H, call.target.sms, 1
    if heads > (3 * sms // 8 if call.training else sms // 8):
        return 1
    while segments < SPLITS[-1] and 2 * segments * 16 * call.C <= call.L:
        programs = heads * 2 * segments
        if programs > (sms if call.training and segments < 8 else sms // 2):
            break
        segments *= 2
    return segments


# Launches whose programs go along a sequence: what they wait for decides how far ahead they fetch.
SCANS = ("segment_maps_fwd", "chunk_scan_fwd", "segment_maps_bwd", "chunk_scan_bwd")


def tiles_for(name: str, call: Call, *, one_wave: bool = False) -> Tiles:
    """The tiles of a launch: those that `using` has set, or those of the rule."""
    if call.overrides.tiles:
        set_by_hand = dict(call.overrides.tiles)
        if found := set_by_hand.get(name) or set_by_hand.get(KERNELS[name]):
            return found
    return choose_tiles(
        name, int(call.K), int(call.V), call.dtype, norm=call.norm, gate=call.gate and call.erase, one_wave=one_wave,
        arch=call.target.arch,
    )  # fmt: skip


@functools.cache
def choose_tiles(
    name: str,
    K: int,
    V: int,
    dtype: torch.dtype,
    *,
    norm: bool = False,
    gate: bool = False,
    one_wave: bool = False,
    arch: int | None,
) -> Tiles:
    """The rule's tiles for a launch (see `KERNELS`) on heads of K key and V value channels.

    norm: for its gradient `chunk_bwd_dqk` needs whole rows of keys.
    gate: whether it is the gated delta rule, in which that kernel holds half as many sums again.
    one_wave: see `is_one_wave`.
    arch: as in `Target`.  The interpreter pays for each program rather than for its size, so there the tiles are as
    wide as they can be.

    >>> choose_tiles("chunk_scan_fwd", 128, 128, torch.bfloat16, arch=90)
    Tiles(BK=128, BV=64, warps=4, stages=2, tma=True, rows=0)
    """
    kernel, BK, BV = KERNELS[name], padded(K), padded(V)
    if kernel == "inverse_norms":
        return Tiles(BK, 0, 4, 1, rows=4096 // BK)
    if kernel == "gate_sums":
        return Tiles(1, 0, 1, 1, rows=GATE_HEADS)
    if kernel == "chunk_inverse":
        if arch is None:
            return Tiles(BK, 0, 4, 1)
        # Small dots, each waiting for the one before: many programs of one warp hide that, and need no barriers.
        return Tiles(64, 0, 4 if dtype == torch.float32 else 1, 3)
    if arch is None:
        return Tiles(BK, min(BV, 64) if kernel == "recurrent" else BV, 4, 1)
    if kernel == "recurrent":
        return Tiles(BK, min(BV, max(8, 2048 // BK)), 1, 1)
    if kernel == "merge_segments":
        return Tiles(BK, min(BV, 32), 8 if BK > 128 else 4, 1)
    if dtype == torch.float32 or arch < 90:
        # Conservative: half the shared memory of a Hopper chip, or tiles of twice the size.
        if gate and BK > 64:  # with more to hold, it takes more warps or narrower tiles to keep out of local memory
            if kernel == "chunk_bwd_dqk":
                return Tiles(BK if norm else 128, min(BV, 32), 8, 1)
            return Tiles(BK, min(BV, 16), 4, 1) if dtype == torch.float32 else Tiles(BK, min(BV, 32), 8, 1)
        if kernel == "chunk_bwd_dqk":
            return Tiles(BK if norm else min(BK, 64), min(BV, 32), 4, 1)
        return Tiles(BK, min(BV, 32), 4, 1)
    # Narrower tiles are padded to 64 channels: fewer configurations to prove, and 32-wide ones have been miscompiled.
    BK = max(BK, 64)
    if kernel == "chunk_bwd_dqk":
        if gate and not norm and BK > 64:
            return Tiles(128, 64, 8, 3, tma=True)
        # Rows of 128 keys or more: the fewer programs share a row, the less of do, pseudo and dR is read again.
        return Tiles(BK, 64, 8, 2, tma=True) if norm and BK > 64 else Tiles(min(BK, 128), 64, 4, 2, tma=True)
    # A program that has an SM to itself prefetches deeply.  Two that share one hide each other's latency, as long as
    # both fit: 113 KB of shared memory each.
    stages = {"chunk_scan_fwd": {64: 3, 128: 2, 256: 1}, "chunk_scan_bwd": {64: 2, 128: 2, 256: 1}}[kernel][BK]
    if name == "segment_maps_fwd" and BK == 128:
        stages = 3
    return Tiles(BK, 64, 4, stages + one_wave, tma=True)


def takes_gluon(call: Call) -> bool:
    """Whether the scans are those of `dn_lib.kernels.hopper`: on Hopper, for heads of 128 in bfloat16, whole chunks."""
    c, asked = call, call.overrides
    if (
        c.target.arch is None
        or not c.erase
        or c.offsets is not None
        or asked.tiles
        or False in (asked.gluon, asked.tma)
        or asked.fused
    ):
        return False
    why = hopper.why_not(
        capability=c.target.arch, triton_version=triton_version(), dtype=c.dtype, d_k=c.K, d_v=c.V, tokens=c.B * c.L,
        L=c.L, H=c.H, chunk=c.C,
    )  # fmt: skip
    return why is None and (bool(asked.gluon) or repays_descriptors(c))


@functools.cache
def triton_version() -> str:
    return importlib.metadata.version("triton")


def repays_descriptors(call: Call) -> bool:
    """Whether a call is long enough for the GPU to win by TMA what the host takes to make the descriptors."""
    values = call.B * call.L * call.H * max(call.K, call.V)
    return call.L >= TMA_MIN_LENGTH and values >= TMA_MIN_VALUES[call.training]
