"""Which calls the Hopper kernels take, and their launches.  Imports Gluon only when something is launched.

Nothing is decided here but grids: segments, the width of a program and what is saved come from the caller, who also
has made the device of the tensors the current one and, in a thread of autograd's own, its CUDA context.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

CHUNK = 64
HEAD = 128
# Releases of Triton with which the kernels' results were checked on a GPU.  3.7 compiles them as well (the tests do
# it); 3.9 has other names for the copy engine.
TRITON_VERSIONS = ("3.6",)


def why_not(
    *, capability: int, triton_version: str, dtype: torch.dtype, d_k: int, d_v: int, tokens: int, L: int, H: int,
    chunk: int = CHUNK, packed: bool = False,
) -> str | None:  # fmt: skip
    """Why these kernels cannot take a call, in words; None if they can.

    capability: of the GPU, 90 for an H100 or H200.  triton_version: as in `triton.__version__`.  tokens: of the whole
    batch.  L: of one sequence.  packed: sequences of other lengths than L, by cu_seqlens.

    >>> call = dict(capability=90, triton_version="3.6.0", dtype=torch.bfloat16, d_k=128, d_v=128, tokens=4096, H=16)
    >>> why_not(**call, L=2048) is None
    True
    >>> why_not(**call, L=1000)
    'the length must be a positive multiple of 64, got 1000'
    """
    release = ".".join(triton_version.split(".")[:2])
    if capability != 90:
        return f"they are for Hopper (compute capability 9.0), got {capability / 10}"
    if release not in TRITON_VERSIONS:
        return f"they were tried with Triton {', '.join(TRITON_VERSIONS)}, got {triton_version}"
    if dtype != torch.bfloat16:
        return f"they take bfloat16, got {str(dtype).removeprefix('torch.')}"
    if (d_k, d_v) != (HEAD, HEAD):
        return f"they take heads of {HEAD} key and value channels, got {d_k} and {d_v}"
    if chunk != CHUNK:
        return f"they take chunks of {CHUNK}, got {chunk}"
    if packed:
        return "they take sequences of equal lengths, got packed ones"
    if L < 1 or L % CHUNK:
        return f"the length must be a positive multiple of {CHUNK}, got {L}"
    if tokens < 1 or H < 1 or tokens // CHUNK * H * HEAD >= 2**31:
        return f"rows are counted in 32 bits, got {tokens} tokens of {H} heads"
    return None


def values_per_program(programs: int, save: bool) -> int:
    """Value channels that a program of `chunk_scan_fwd` takes, where `programs` (segments x heads) would take all 128.

    From times on an H100: all where that fills most of the 132 streaming multiprocessors and nothing is saved.  (With
    gates all in training too, 0.28 against 0.31 ms on an H200, so the plan passes False there.)
    """
    return HEAD if programs > 100 and not save else HEAD // 2


def chunk_scan_fwd(
    *, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, n: Tensor, o: Tensor, pseudo: Tensor | None = None,
    states: Tensor | None = None, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
    sums: Tensor | None = None, state_in: Tensor | None = None, state_out: Tensor | None = None, scale: float,
    segment: int, segments: int,
    values: int, run: Callable | None = None,
) -> None:  # fmt: skip
    """Writes o `[B, L, H, 128]`, and pseudo, states and state_out where they are given.

    q, k, v, n `[B, L, H, 64]` and beta `[B, L, H]` are inputs, as are q_norm and k_norm (1/|x|, `[B, L, H]` float32)
    of queries and keys that are to be normalised, and with gates their `sums` (`gate_sums`, `[H, B, L, 2]` float32).
    q, k and their norms may have fewer heads, of which H is a multiple.  A sequence is cut in `segments` parts of
    `segment` tokens, the last perhaps shorter; state_in and state_out, `[B segments, H, 128, 128]` float32, are where
    each begins and ends.  For the backward, together: pseudo (like v), and states `[B L / 64, H, 128, 128]` bfloat16,
    what enters each chunk.  A program takes `values` of the value channels, 64 or 128.  run: launches a kernel, given
    it and its arguments, in place of Triton.
    """
    B, L, H, _ = v.shape
    _check(q, L, segment, segments)
    if (pseudo is None) != (states is None):
        raise ValueError("pseudo and states are saved together")
    if values not in (HEAD // 2, HEAD):
        raise ValueError(f"values must be {HEAD // 2} or {HEAD}, got {values}")
    wide, narrow = functools.partial(_rows, columns=values), functools.partial(_rows, columns=HEAD)
    run = run or functools.partial(_launch, B * segments * H * (HEAD // values))
    run(
        _kernels("scan").chunk_scan_fwd,
        narrow(q), narrow(k), wide(v), _rows(n, columns=CHUNK), wide(o), wide(pseudo), _states(states, values),
        beta, q_norm, k_norm, sums, state_in, state_out, scale, L, H, segment, segments,
        VALUES=values, NORM=k_norm is not None, GATE=sums is not None, GROUP=H // q.shape[2], SAVE=pseudo is not None,
        STATE_IN=state_in is not None, STATE_OUT=state_out is not None, num_warps=values // 16,
    )  # fmt: skip


def chunk_scan_bwd(
    *, q: Tensor, k: Tensor, beta: Tensor, n: Tensor, pseudo: Tensor, states: Tensor, do: Tensor, dq: Tensor,
    dk: Tensor, dv: Tensor, dbeta: Tensor, dg: Tensor | None = None, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, sums: Tensor | None = None, dstate_out: Tensor | None = None,
    dstate_in: Tensor | None = None, scale: float, segment: int, segments: int, run: Callable | None = None,
) -> None:  # fmt: skip
    """Writes dq, dk, dv `[B, L, H, 128]`, dbeta `[B, L, H]` and, if given, dg `[B, L, H]` float32 and dstate_in.

    Where q and k have fewer heads, dq and dk are partial sums, one for each value head.  dg goes with `sums`.

    pseudo and states are what `chunk_scan_fwd` left; the number of segments may be another one.  dstate_out and
    dstate_in, `[B segments, H, 128, 128]` float32: the gradient of the state where each segment ends, and begins.
    """
    B, L, H, _ = do.shape
    _check(q, L, segment, segments)
    if (sums is None) != (dg is None):
        raise ValueError("dg is written where sums are given")
    tile = functools.partial(_rows, columns=HEAD)
    run = run or functools.partial(_launch, B * segments * H)
    run(
        _kernels("backward").chunk_scan_bwd,
        tile(q), tile(k), _rows(n, columns=CHUNK), tile(pseudo), tile(do), _states(states, HEAD), tile(dq), tile(dk),
        tile(dv), beta, q_norm, k_norm, sums, dbeta, dg, dstate_out, dstate_in, scale, L, H, segment, segments,
        NORM=k_norm is not None, GATE=sums is not None, GROUP=H // q.shape[2], DSTATE_OUT=dstate_out is not None,
        DSTATE_IN=dstate_in is not None, num_warps=8,
    )  # fmt: skip


def _launch(programs: int, kernel, *arguments, **options) -> None:
    kernel[(programs,)](*arguments, **options)


def _check(q: Tensor, L: int, segment: int, segments: int) -> None:
    """A segment without a chunk would leave fetches under way when its program ends."""
    if q.shape[-1] != HEAD or q.dtype != torch.bfloat16 or L % CHUNK:
        raise ValueError(f"q must be [B, L, H, {HEAD}] in bfloat16, L a multiple of {CHUNK}, got {q.dtype} {q.shape}")
    if segment < 1 or segment % CHUNK or -(-L // segment) != segments:
        raise ValueError(f"{segments} segments of {segment} tokens don't cut {L} tokens in whole chunks, none empty")


@functools.cache
def _kernels(name: str) -> ModuleType:
    import importlib

    return importlib.import_module(f"dn_lib.kernels.hopper.{name}")


def _descriptor(x: Tensor, row: int, tile_rows: int, tile_columns: int):
    """Of the contiguous x as a matrix with rows of so many numbers, in tiles."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    if not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(f"the copy engine needs contiguous tensors aligned to 16 bytes, got {x.shape}, {x.stride()}")
    tile = _kernels("common").TILE.value
    return TensorDescriptor(x, [x.numel() // row, row], [row, 1], [tile_rows, tile_columns], tile)


def _rows(x: Tensor | None, columns: int):
    """Of `[B, L, H, d]` as `[tokens, H d]`, in tiles of a chunk's rows."""
    return None if x is None else _descriptor(x, x.shape[2] * x.shape[3], CHUNK, columns)


def _states(x: Tensor | None, columns: int):
    """Of `[chunks, H, 128, 128]` as `[chunks H 128, 128]`, in tiles of one head's state."""
    return None if x is None else _descriptor(x, HEAD, HEAD, columns)
