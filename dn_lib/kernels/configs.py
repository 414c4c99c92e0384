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
    fused: small heads, where a state and its gradient fit in the registers of one program: inference is one
        kernel, which computes N as it walks, and so is the backward.
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


def segments(sequences: int, L: int, H: int, V: int, device_index: int) -> int:
    """Into how many parts to split each sequence: few heads and long sequences leave processors idle.

    A split costs a first walk that makes each part's affine map, about as much as the walk it saves, so it pays only
    while the parts still find multiprocessors that nothing else keeps busy.
    """
    parts = 1
    programs = sequences * H * -(-padded(V) // 64)
    while parts < 8 and 2 * parts * programs <= multiprocessors(device_index) and 2048 * 2 * parts <= L:
        parts *= 2
    return parts


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
def tiles(kernel: str, K: int, V: int, dtype: torch.dtype, norm: bool, variant: str, device: int | None) -> Tiles:
    """The tiles of `kernel` for head sizes K and V.

    variant: "fused" or "save" where the kernel has such a form, else "".
    device: index of the GPU; None is the interpreter, which pays for each program rather than for its size, so
    there the tiles are as wide as they can be.
    """
    BK, BV = padded(K), padded(V)
    if device is None:
        return Tiles(BK, min(BV, 64) if kernel == "recurrent" else BV, 4, 1)
    if kernel == "chunk_inverse":
        return Tiles(max(BK, 64), BV, 4, 1)
    if kernel == "recurrent":
        return Tiles(BK, min(BV, max(8, 2048 // BK)), 1, 1)
    if kernel == "merge":
        return Tiles(BK, min(BV, 32), 4, 1)
    whole = {"gradients": norm, "recompute_states": False}.get(kernel, True)
    if dtype == torch.float32 or capability(device) < 90:
        # Conservative: half the shared memory of a Hopper chip, or tiles of twice the size.
        return Tiles(BK if whole else min(BK, 64), min(BV, 32), 4, 1)
    # Narrower tiles are padded to 64 channels: fewer configurations to prove, and 32-wide ones have been miscompiled.
    BK = max(BK, 64)
    if kernel == "walk":
        return Tiles(BK, 64, 4, 1 if BK == 256 else 3, tma=True)
    if kernel == "walk_back":
        return Tiles(BK, 64, 4, 3 if BK == 128 else 2, tma=True)
    if kernel == "recompute_states":
        return Tiles(min(BK, 128), 128 if BV >= 128 else 64, 4, 3, tma=True)
    if kernel == "gradients":
        return Tiles(BK, 64, 8, 2, tma=True) if norm and BK > 64 else Tiles(64, 64, 4, 2, tma=True)
    raise KeyError(f"kernel must be one that configs.tiles knows, got {kernel!r}")
