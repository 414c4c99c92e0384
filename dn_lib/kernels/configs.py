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
    """Block sizes and resources of one kernel: BK key and BV value channels, warps, pipeline stages."""

    BK: int
    BV: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """How one call is laid out.

    chunk: rows of a chunk.  fused: N is computed in the walk, and the backward is one kernel.
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

    A split costs a first walk that makes each part's affine map, so it has to double the programs in flight.
    """
    parts = 1
    programs = sequences * H * -(-padded(V) // 64)
    while parts < 8 and 2 * parts * programs <= 2 * multiprocessors(device_index) and 2048 * 2 * parts <= L:
        parts *= 2
    return parts


def plan(L: int, K: int, V: int, dtype: torch.dtype, chunk: int, segments: int) -> Plan:
    """The layout for sequences of length `L` (the longest one), each in at most `segments` parts."""
    fused = max(padded(K), padded(V)) <= 64 and dtype != torch.float32
    segment = max(1, -(-L // (chunk * segments))) * chunk
    return Plan(chunk, fused, segment, max(1, -(-L // segment)))


@cache
def tiles(kernel: str, K: int, V: int, dtype: torch.dtype, norm: bool, fused: bool, interpreted: bool) -> Tiles:
    """The tiles of `kernel` for head sizes K, V.

    The interpreter pays for each program rather than for its size, so there the tiles are as wide as they can be.
    """
    BK, BV = padded(K), padded(V)
    single = dtype == torch.float32
    if interpreted:
        narrow = BV if kernel != "recurrent" else min(BV, 64)
        return Tiles(BK, narrow, 4, 1)
    if kernel == "chunk_inverse":
        return Tiles(BK, BV, 4, 1)
    if kernel == "recurrent":
        return Tiles(BK, min(BV, max(8, 2048 // BK)), 1, 1)
    if single:
        return Tiles(BK if kernel != "recompute_states" else min(BK, 64), min(BV, 32), 4, 1)
    if kernel == "walk":
        return Tiles(BK, min(BV, 64), 4, 1 if fused else 2)
    if kernel == "walk_back":
        return Tiles(BK, min(BV, 64), 4, 1 if fused else 2)
    if kernel == "recompute_states":
        return Tiles(min(BK, 64), min(BV, 64), 4, 3)
    if kernel == "gradients":
        return Tiles(BK if norm else min(BK, 64), min(BV, 64), 8 if norm and BK > 64 else 4, 2)
    if kernel == "merge":
        return Tiles(BK, min(BV, 32), 4, 1)
    raise KeyError(f"kernel must be one that configs.tiles knows, got {kernel!r}")
