"""Which kernels run with which tiles: a small explicit rule, no autotuning at run time.

`plan` chooses the regime from the shape; `tiles` the block sizes, warps and pipeline stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

MAX_HEAD_DIM = 256
CHUNK_SIZES = (16, 32, 64)


@dataclass(frozen=True)
class Tiles:
    """Block sizes and resources of one kernel: BK key and BV value channels, warps, pipeline stages.

    tma: whether Hopper's copy engine fetches the tiles, where the shape allows it.
    """

    BK: int
    BV: int
    warps: int
    stages: int
    tma: bool = False


@dataclass(frozen=True)
class Plan:
    """How one call is laid out.

    chunk: rows of a chunk.
    fused: small heads, where a state and its gradient fit in the registers of one program: the backward is one
        kernel, which walks the state back beside its gradient.
    segments: into how many parts each sequence is split (1: none), each of `segment` tokens.
    """

    chunk: int
    fused: bool
    segment: int
    segments: int


def padded(size: int) -> int:
    """The next power of two, at least 16: the smallest inner size that a tensor-core dot takes."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def multiprocessors(device_index: int) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def default_chunk(dtype: torch.dtype) -> int:
    """64, or 32 in float32, whose tiles are twice the size."""
    return 32 if dtype == torch.float32 else 64


def alone(programs: int, device_index: int) -> bool:
    """Whether no two of so many programs have to share a multiprocessor."""
    return programs <= multiprocessors(device_index)


def walk_programs(sequences: int, H: int, K: int, V: int, parts: int, first_pass: bool) -> int:
    """Programs of a walk over sequences in `parts` segments each: one for each segment, head and 64 values.

    first_pass: the walk that makes the affine maps of all segments but the last; it also carries the columns of
    M, which the first segment does not need.
    """
    values, keys = -(-padded(V) // 64), -(-padded(K) // 64)
    return sequences * H * ((parts - 1) * values + (parts - 2) * keys if first_pass else parts * values)


def segments(sequences: int, L: int, H: int, K: int, V: int, chunk: int, device_index: int) -> int:
    """Into how many parts to split each sequence: few heads and long sequences leave multiprocessors idle.

    A split costs a first walk, for the affine maps of the parts, and their merge.  The choice is the least of a
    count of steps, each a chunk of one program that has a multiprocessor to itself, in hundredths.  Two programs that
    share one take longer by a factor that grows with the head size; a step of the first walk counts 0.4, a merged
    part 3, a split 8 (fitted to times on an H200, see README.md).  Integers alone, since torch.compile may hand over
    symbolic sizes.
    """
    shared = {64: 120, 128: 150, 256: 180}[max(64, padded(K), padded(V))]

    def time(programs: int) -> int:
        return 100 if alone(programs, device_index) else shared * -(-programs // (2 * multiprocessors(device_index)))

    best, least = 1, -(-L // chunk) * time(walk_programs(sequences, H, K, V, 1, False))
    for parts in (2, 4, 8, 16):
        if 8 * chunk * parts > L:
            break
        steps = -(-L // (chunk * parts))
        cost = steps * time(walk_programs(sequences, H, K, V, parts, False))
        cost += steps * 2 * time(walk_programs(sequences, H, K, V, parts, True)) // 5 + 100 * (3 * parts + 8)
        if cost < least:
            best, least = parts, cost
    return best


def plan(L: int, K: int, V: int, dtype: torch.dtype, chunk: int, segments: int) -> Plan:
    """The layout for sequences of length `L` (the longest one), each in at most `segments` parts."""
    fused = max(padded(K), padded(V)) <= 64 and dtype != torch.float32
    segment = max(1, -(-L // (chunk * segments))) * chunk
    return Plan(chunk, fused, segment, max(1, -(-L // segment)))


@cache
def capability(device_index: int) -> int:
    """Compute capability of a GPU, 90 for a Hopper chip."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@cache
def tiles(
    kernel: str, K: int, V: int, dtype: torch.dtype, norm: bool, variant: str, alone: bool, device: int | None
) -> Tiles:
    """The tiles of `kernel` for head sizes K and V.

    variant: "fused" or "transition" where the kernel has such a form, else "".
    alone: no two programs of the launch share a multiprocessor.
    device: index of the GPU; None is the interpreter, which pays for each program rather than for its size, so
    there the tiles are as wide as they can be.
    """
    BK, BV = padded(K), padded(V)
    if kernel == "inverse_norms":
        return Tiles(BK, 4096 // BK, 4, 1)
    if device is None:
        return Tiles(BK, min(BV, 64) if kernel == "recurrent" else BV, 4, 1)
    if kernel == "chunk_inverse":
        # Small dots, each waiting for the one before: many programs of one warp hide that, and need no barriers.
        return Tiles(64, BV, 4 if dtype == torch.float32 else 1, 3)
    if kernel == "recurrent":
        return Tiles(BK, min(BV, max(8, 2048 // BK)), 1, 1)
    if kernel == "merge_segments":
        return Tiles(BK, min(BV, 32), 8 if BK > 128 else 4, 1)
    whole = kernel != "chunk_bwd_dqk" or norm
    if dtype == torch.float32 or capability(device) < 90:
        # Conservative: half the shared memory of a Hopper chip, or tiles of twice the size.
        return Tiles(BK if whole else min(BK, 64), min(BV, 32), 4, 1)
    # Narrower tiles are padded to 64 channels: fewer configurations to prove, and 32-wide ones have been miscompiled.
    BK = max(BK, 64)
    # A program that has a multiprocessor to itself prefetches deeply; two that share one hide each other's latency,
    # so long as both fit: 113 KB of shared memory each.
    if kernel == "chunk_scan_fwd":
        stages = {64: 3, 128: 2 if variant != "transition" else 3, 256: 1}[BK]
        return Tiles(BK, 64, 4, stages + 1 if alone else stages, tma=True)
    if kernel == "chunk_scan_bwd":
        return Tiles(BK, 64, 4, {64: 2, 128: 2, 256: 1}[BK] + alone, tma=True)
    if kernel == "chunk_bwd_dqk":
        # Rows of 128 keys or more: the fewer programs share a row, the less of do, E and dR is read again.
        return Tiles(BK, 64, 8, 2, tma=True) if norm and BK > 64 else Tiles(min(BK, 128), 64, 4, 2, tma=True)
    raise KeyError(f"kernel must be one that configs.tiles knows, got {kernel!r}")
