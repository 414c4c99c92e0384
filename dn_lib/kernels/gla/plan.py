"""What a call of linear attention with a gate per channel runs: one frozen `Plan`, resolved once from sizes and flags.

    >>> x = torch.empty(1, 8192, 2, 128, dtype=torch.bfloat16, device="meta")
    >>> plan = plan_call(x, x, x, training=True, chunk=64, target=Target(arch=90, sms=132))
    >>> [(name, launch.programs) for name, launch in plan.launches.items()][:3]
    [('chunk_scores', 256), ('chunk_states', 8), ('chunk_output', 512)]

`print(plan)` lists the launches.  The launchers take a plan and decide nothing.  Nothing here imports Triton.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dn_lib.forms.common import describe
from dn_lib.kernels.plan import Buffer, Launch, target_in_use, target_of
from dn_lib.kernels.rules import Target, Tiles, padded

SUB = 16  # rows of a sub-chunk: the smallest side of a tensor-core dot

# Kernels, each launched once under its own name, and what it is for.
KERNELS = {
    "recurrent": "the recurrence, one token at a time",
    "chunk_scores": "A of each chunk, and q and k with their decays",
    "chunk_states": "the state along the chunks",
    "chunk_output": "o",
    "chunk_states_bwd": "the gradient of the state, right to left",
    "chunk_bwd_dv": "dv and dA",
    "chunk_bwd_decayed": "the gradients of q and k with their decays",
    "chunk_bwd_dqkg": "dq, dk and dg",
}


class Call(NamedTuple):
    """All that determines a plan.

    H: heads of v, of which `group` read one head of q and k.  offsets: the dtype of cu_seqlens; None where sequences
    are not packed.  training: whether a backward may follow.  chunk: None for the recurrence.  precision: of float32
    dots.  tiles: what `using` has set, by the name of a kernel.
    """

    B: int
    L: int
    H: int
    K: int
    V: int
    group: int
    sequences: int
    offsets: torch.dtype | None
    dtype: torch.dtype
    training: bool
    chunk: int | None
    precision: str
    target: Target
    tiles: tuple[tuple[str, Tiles], ...] = ()

    @property
    def C(self) -> int:
        """The chunk of a call that has chunks."""
        assert self.chunk is not None
        return self.chunk

    @property
    def packed(self) -> bool:
        return self.offsets is not None

    @property
    def chunks(self) -> int:
        """Chunks of the whole batch.  An upper bound where lengths vary, since nobody reads them on the host."""
        return self.L // self.C + self.sequences if self.packed else self.B * -(-self.L // self.C)

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        """What the forward makes besides its outputs, by its name in `Saved`; in training all of it is kept."""
        made = {
            "scores": Buffer((self.B, self.L, self.H, self.C), self.dtype),
            "q_decayed": Buffer((self.B, self.L, self.H, self.K), self.dtype),
            "k_decayed": Buffer((self.B, self.L, self.H, self.K), self.dtype),
            "whole": Buffer((self.chunks, self.H, self.K), torch.float32),
            "states": Buffer((self.chunks, self.H, self.K, self.V), self.dtype),
        }
        if self.offsets is not None:
            made["token_offsets"] = Buffer((self.sequences + 1,), self.offsets)
            made["chunk_offsets"] = Buffer((self.sequences + 1,), torch.int32)
        return MappingProxyType(made)


class Saved(NamedTuple):
    """What the forward leaves for the backward, besides its inputs.  `Call.buffers` gives shapes and dtypes.

    scores: A of each chunk.  q_decayed, k_decayed: Q * gamma and K * to_end.  whole: the decay over each chunk.
    states: the state that enters each chunk.  token_offsets, chunk_offsets: of packed sequences.
    """

    scores: Tensor
    q_decayed: Tensor
    k_decayed: Tensor
    whole: Tensor
    states: Tensor
    token_offsets: Tensor | None
    chunk_offsets: Tensor | None


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs for a call.  launches: in their order, by name.

    compiled: what `dn_lib.kernels.launcher` keeps of earlier calls; it decides nothing.
    """

    call: Call
    launches: Mapping[str, Launch]
    compiled: dict = field(default_factory=dict, repr=False)

    def for_backward(self, precision: str) -> Plan:
        """This plan, unless float32 dots have another precision now."""
        return self if precision == self.call.precision else resolve(self.call._replace(precision=precision))

    def __str__(self) -> str:
        c = self.call
        sequences = f"{c.sequences} packed sequences" if c.packed else f"{c.B} x {c.L:,} tokens"
        lines = [f"{sequences}, {c.H} heads of {c.K} key and {c.V} value channels, a gate per key channel"]
        for number, (name, launch) in enumerate(self.launches.items(), 1):
            t = launch.tiles
            sizes = f"tiles of {t.BK} keys" + f" x {t.BV} values" * (t.BV > 0)
            lines.append(
                f"{number}. {name} ({launch.does}): {launch.programs:,} programs, {sizes}, {t.warps} "
                f"warp{'s' * (t.warps > 1)}, {t.stages} stage{'s' * (t.stages > 1)}"
            )
        return "\n".join(lines)


# --- Overriding the rules -----------------------------------------------------------------------------------------
_tiles: contextvars.ContextVar[tuple[tuple[str, Tiles], ...]] = contextvars.ContextVar("dn_lib_gla_tiles", default=())


@contextlib.contextmanager
def using(tiles: Mapping[str, Tiles]) -> Iterator[None]:
    """Within it, calls of this thread are planned with these tiles, by the name of a kernel.  Blocks may be nested.

    A backward follows the plan of its forward.  Raises ValueError for an unknown name or what is no `Tiles`.

    >>> with using({"chunk_inverse": Tiles(64, 0, 1, 1)}):
    ...     ...
    Traceback (most recent call last):
    ValueError: tiles must be for one of recurrent, chunk_scores, ... got 'chunk_inverse'
    """
    for name, chosen in tiles.items():
        if name not in KERNELS:
            raise ValueError(f"tiles must be for one of {', '.join(KERNELS)}, got {describe(name)}")
        if not isinstance(chosen, Tiles):
            raise ValueError(f"tiles of {name} must be Tiles(BK, BV, warps, stages), got {describe(chosen)}")
    token = _tiles.set(tuple(sorted((dict(_tiles.get()) | dict(tiles)).items())))
    try:
        yield
    finally:
        _tiles.reset(token)


# --- From tensors to a plan ---------------------------------------------------------------------------------------
def call_of(
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    training: bool = False,
    chunk: int | None,
    precision: str = "ieee",
    target: Target | None = None,
) -> Call:
    """What determines the plan of a call on k `[B, L, H, K]` and v `[B, L, H_v, V]`; sizes may be symbolic."""
    B, L, key_heads, K = k.shape
    H = v.shape[2]
    group = 1 if key_heads == H else H // key_heads
    sequences, offsets = (B, None) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, cu_seqlens.dtype)
    where = target or target_in_use() or target_of(k.device)
    return Call(
        B, L, H, K, v.shape[3], group, sequences, offsets, k.dtype, training, chunk, precision, where, _tiles.get()
    )  # fmt: skip


def plan_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    training: bool = False,
    chunk: int | None,
    precision: str = "ieee",
    target: Target | None = None,
) -> Plan:
    """The plan for a call on tensors `[B, L, H, d]`; chunk None is for the recurrence.  See `Call`."""
    del q  # whose shape is k's
    return resolve(
        call_of(k, v, cu_seqlens=cu_seqlens, training=training, chunk=chunk, precision=precision, target=target)
    )


@functools.lru_cache(maxsize=4096)
def resolve(call: Call) -> Plan:
    """The plan for a call: the one place where everything is decided."""
    c, launches = call, {}

    def add(name: str, of: int, *, keys: int = 0, values: int = 0) -> None:
        """A launch of `of` programs for each head and, if these are given, block of key and of value channels."""
        tiles = dict(c.tiles).get(name) or choose_tiles(name, c.K, c.V, c.dtype, arch=c.target.arch)
        blocks = -(-values // tiles.BV) if values else 1
        programs = of * c.H * blocks * (-(-keys // tiles.BK) if keys else 1)
        launches[name] = Launch(name, programs, blocks, tiles, False, KERNELS[name])

    if c.chunk is None:
        add("recurrent", c.sequences, values=c.V)
        return Plan(c, MappingProxyType(launches))
    add("chunk_scores", c.chunks)
    add("chunk_states", c.sequences, keys=c.K, values=c.V)
    add("chunk_output", c.chunks, values=c.V)
    if c.training:
        add("chunk_states_bwd", c.sequences, keys=c.K, values=c.V)
        add("chunk_bwd_dv", c.chunks)
        add("chunk_bwd_decayed", c.chunks, keys=c.K)
        add("chunk_bwd_dqkg", c.chunks, keys=c.K)
    return Plan(c, MappingProxyType(launches))


@functools.cache
def choose_tiles(name: str, K: int, V: int, dtype: torch.dtype, *, arch: int | None) -> Tiles:
    """The tiles of a kernel on heads of K key and V value channels.  arch: as in `Target`.

    The interpreter pays for each program rather than for its size, so there the tiles are as wide as they can be.

    >>> choose_tiles("chunk_states", 128, 128, torch.bfloat16, arch=90)
    Tiles(BK=64, BV=64, warps=4, stages=3, tma=False, rows=0)
    """
    BK, BV = padded(K), padded(V)
    if name == "chunk_scores":  # whole rows, 16 numbers of a tile in each thread
        return Tiles(BK, 0, max(1, BK // 32), 1)
    if name == "recurrent":
        return Tiles(BK, min(BV, 64 if arch is None else max(8, 2048 // BK)), 1, 1)
    if arch is None:
        return Tiles(BK, 0 if name == "chunk_bwd_dqkg" else BV, 4, 1)
    if name == "chunk_bwd_dqkg":
        return Tiles(min(BK, 64), 0, max(1, min(BK, 64) // 32), 1)
    BK, BV = min(BK, 64), min(BV, 64)
    # Only these two loop over tiles that go into dots alone, and may be fetched ahead.
    stages = {"chunk_states": 3, "chunk_states_bwd": 3, "chunk_output": 2}.get(name, 1)
    return Tiles(BK, BV, 4, min(stages, 2) if dtype == torch.float32 else stages)
