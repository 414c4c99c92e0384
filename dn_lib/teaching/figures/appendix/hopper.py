"""Drawings and tables of appendix C: a chunk on Hopper."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dn_lib import cost
from dn_lib.teaching import plotting
from dn_lib.teaching.excerpts import resolve
from dn_lib.teaching.figures.appendix.common import SERIES
from dn_lib.teaching.figures.appendix.measuring import grid
from dn_lib.teaching.figures.ch5 import FORMS, Record
from dn_lib.teaching.tables import Table

# --- C. A chunk on Hopper ------------------------------------------------------------------------------------------
CHUNK, HEAD = 64, 128
X = 2 * HEAD  # bytes of a row of q, k, v or o: the unit in which the kernels' log counts


def owner(row: int, column: int) -> tuple[int, int]:
    """Warp and lane that hold an entry of a wgmma accumulator, one warpgroup's 64 rows.

    >>> owner(0, 0), owner(0, 2), owner(1, 0), owner(8, 0), owner(16, 0)
    ((0, 0), (0, 1), (0, 4), (0, 0), (1, 0))
    """
    return row // 16, row % 8 * 4 + column % 8 // 2


def accumulator_layout(rows: int = 16, columns: int = 16) -> Figure:
    """Who holds which entry: a warpgroup's four warps (left), and the lanes of one warp in a corner (right)."""
    fig, (whole, corner) = plotting.figure(columns=2, height=3.2, width_ratios=[1, 1.6])
    colours = [style["color"] for style in SERIES[:4]]
    for row in range(0, 64, 16):
        warp, _ = owner(row, 0)
        whole.add_patch(Rectangle((0, row), 64, 16, fc=colours[warp], alpha=0.6, ec="white"))
        ink = "black" if warp else "white"
        whole.text(32, row + 8, f"warp {warp}", ha="center", va="center", fontsize=9, color=ink)
    whole.set(xlim=(0, 64), ylim=(64, 0), xlabel="64 columns", ylabel="64 rows (tokens)", title="one warpgroup")
    for row in range(rows):
        for column in range(columns):
            warp, lane = owner(row, column)
            shade = 0.85 if lane == 5 else 0.25
            corner.add_patch(Rectangle((column, row), 1, 1, fc=colours[warp], alpha=shade, ec="white"))
            ink = "white" if lane == 5 else "black"
            corner.text(column + 0.5, row + 0.5, str(lane), ha="center", va="center", fontsize=9, color=ink)
    corner.set(xlim=(0, columns), ylim=(rows, 0), title="warp 0: the lane that holds each entry (lane 5 dark)")
    corner.title.set_fontsize(9)
    for ax in (whole, corner):
        ax.grid(False)
        ax.set(xticks=[], yticks=[])
    return fig


@dataclass(frozen=True)
class Event:
    """What one part of an SM does from `start` to `end`, in microseconds, for chunk `chunk`."""

    lane: str
    name: str
    chunk: int
    start: float
    end: float


#: Rates of one SM, an H100's divided by 132: bytes and bfloat16 operations a microsecond; and entries of a tile that
#: its 128 lanes handle in a microsecond, at 1.7 GHz with eight instructions for each.  Assumptions, not measurements.
RATES = {"memory": 3.0e12 / 132 / 1e6, "dots": 6.8e14 / 132 / 1e6, "threads": 128 * 1.7e3 / 8}
LANES = ("TMA, loads", "tensor cores", "threads", "TMA, stores")


def source_lines(kernel: Any, *, gate: bool = False) -> list[str]:
    """The source of a kernel for Hopper, with gates or without."""
    return resolve(inspect.getsource(kernel.fn).splitlines(), {"GATE": gate})


def products_in_source(kernel: Any) -> list[str]:
    """What the products of a kernel for Hopper make, in the order in which its source begins them, without gates.

    >>> from dn_lib.kernels.hopper.scan import chunk_scan_fwd
    >>> products_in_source(chunk_scan_fwd)
    ['read', 'O', 'P', 'E', 'S', 'O']
    """
    lines = source_lines(kernel)
    return [found[1] for line in lines if (found := re.match(r"\s+(\w+) = (?:product|add)\(", line))]


def schedule(chunks: int = 3, *, save: bool = True) -> list[Event]:
    """One program of `chunk_scan_fwd` for Hopper (128 values), on an SM of its own, by the rates of `RATES`.

    Follows the source: what is begun, and what is waited for.  A model: each part works through what it was given in
    order, loads and stores share the rate of memory, and nothing else is contended for.
    """
    events: list[Event] = []
    free = dict.fromkeys(RATES, 0.0)
    now = 0.0  # where the threads are
    square, tile, state = CHUNK * CHUNK, CHUNK * HEAD, HEAD * HEAD
    work = {  # FLOPs of each product, by what is made of what
        "K S": 2 * CHUNK * HEAD * HEAD, "Q S": 2 * CHUNK * HEAD * HEAD, "Q Kᵀ": 2 * CHUNK * CHUNK * HEAD,
        "N D R": 2 * CHUNK * CHUNK * HEAD, "Kᵀ Vn": 2 * HEAD * CHUNK * HEAD, "P Vn": 2 * CHUNK * CHUNK * HEAD,
    }  # fmt: skip

    def run(lane: str, name: str, chunk: int, amount: float, rate: str) -> float:
        start = max(now, free[rate])
        free[rate] = start + amount / RATES[rate]
        events.append(Event(lane, name, chunk, start, free[rate]))
        return free[rate]

    def threads(name: str, chunk: int, entries: int) -> None:
        nonlocal now
        now = run("threads", name, chunk, entries, "threads")

    def begin(name: str, chunk: int) -> float:
        return run("tensor cores", name, chunk, work[name], "dots")

    loaded = run("TMA, loads", "k v N q", 0, 2 * (3 * tile + square), "memory")
    for i in range(chunks):
        arrived = loaded
        if i + 1 < chunks:
            loaded = run("TMA, loads", "k v N q", i + 1, 2 * (3 * tile + square), "memory")
        if save:
            run("TMA, stores", "S", i, 2 * state, "memory")
        now = max(now, arrived)
        read = begin("K S", i)
        begin("Q S", i)
        scores = begin("Q Kᵀ", i)
        now = max(now, read)
        threads("R", i, tile)
        errors = begin("N D R", i)
        now = max(now, scores)
        threads("P", i, square)
        now = max(now, errors)
        threads("Vn", i, tile * (2 if save else 1))
        begin("Kᵀ Vn", i)
        outputs = begin("P Vn", i)
        if save:
            run("TMA, stores", "Vn", i, 2 * tile, "memory")
        now = max(now, outputs)
        threads("S, o", i, state + tile)
        run("TMA, stores", "o", i, 2 * tile, "memory")
    return events


def timeline(chunks: int = 2, *, save: bool = True) -> Figure:
    """`schedule` drawn: a lane for each part of the SM, a colour for each chunk."""
    fig, ax = plotting.figure(height=4.0)
    colours = [style["color"] for style in plotting.OTHERS]
    outside: dict[str, tuple[float, int]] = {}  # by lane: where the last label beside a box ended, and on which side
    for event in schedule(chunks, save=save):
        y, width = -LANES.index(event.lane), event.end - event.start
        colour = colours[event.chunk % len(colours)]
        ax.add_patch(Rectangle((event.start, y - 0.32), width, 0.64, fc=colour, alpha=0.6, ec="black", lw=0.6))
        middle = event.start + width / 2
        if width < 0.25:  # too narrow for its label: above the box, or below it if a neighbour's is there
            first = -1 if event.lane == "threads" else 1  # the labels of tensor cores may stand right above
            before, side = outside.get(event.lane, (-1.0, first))
            side = -side if before + 0.3 > event.start else first
            outside[event.lane] = event.end, side
            place = {"va": "bottom" if side > 0 else "top"}
            ax.text(middle, y + 0.34 * side, event.name, ha="center", fontsize=9, **place)
        else:
            ax.text(middle, y, event.name, ha="center", va="center", fontsize=9, rotation=90 * (width < 0.5))
    end = max(event.end for event in schedule(chunks, save=save))
    ax.set(xlim=(0, end), ylim=(-len(LANES) + 0.4, 0.6), xlabel="microseconds, by the model")
    ax.set_yticks([-i for i in range(len(LANES))], LANES)
    ax.tick_params(axis="y", length=0)
    ax.grid(False)
    return fig


def busy(lane: str, events: list[Event]) -> float:
    """The share of the time in which a lane works.

    >>> busy("threads", [Event("threads", "a", 0, 0.0, 1.0), Event("threads", "b", 0, 3.0, 4.0)])
    0.5
    """
    return sum(e.end - e.start for e in events if e.lane == lane) / max(e.end for e in events)


def backward_kernels() -> dict[str, tuple[cost.Cost, ...]]:
    """The two backward passes for heads of 128: Triton's two kernels, and the one for Hopper."""
    shape = cost.Shape(B=16, L=2048, H=16, d_k=HEAD, d_v=HEAD)
    reads, writes = ("q", "k", "beta", "N", "Vn", "do", "states"), ("dq", "dk", "dv", "dbeta")
    size = shape.tensor_bytes
    C, d, tokens = CHUNK, HEAD, shape.tokens
    flops = tokens * (12 * d * d + 18 * C * d)  # six products with a state in them, nine without
    hopper = cost.Cost(
        "chunk_scan_bwd, Hopper", {n: size(n) for n in reads}, {n: size(n) for n in writes}, flops, steps=shape.chunks
    )
    return {"two kernels": cost.backward(shape), "one kernel": (hopper,)}


def backward_table() -> Table:
    """Bytes of each tensor that the two backward passes read and write, in X for a token and head.

    What has one number a row (beta and its gradient) is left out of the columns.
    """
    per = 16 * 2048 * 16
    names = ("q", "k", "N", "Vn", "do", "dv", "states", "dstates", "dq", "dk")
    rows = []
    for title, kernels in backward_kernels().items():
        total = 0.0
        for kernel in kernels:
            moved = [(kernel.reads.get(n, 0) + kernel.writes.get(n, 0)) / per / X for n in names]
            total += sum(moved)
            rows.append((f"`{kernel.name}`", *(f"{x:.1f}" if x else "" for x in moved), f"{sum(moved):.1f}"))
        rows.append((f"{title} in all", *("" for _ in names), f"{total:.1f}"))
    return Table(("bytes in X", *names, "sum"), rows)


def weak_rows(strengths: Tensor, dtype: torch.dtype, rule: str) -> Tensor:
    """Relative error of E, got back from what the forward kept in `dtype` for a row of each strength.

    rule: "Vn" keeps beta E; "bfloat16" beta E, and 2^-40 E below 2^-40; "float16" beta E, and E below 2^-6.
    """
    g = torch.Generator().manual_seed(0)
    E = torch.randn(len(strengths), 256, generator=g, dtype=torch.float64)
    factor = {
        "Vn": strengths,
        "bfloat16": strengths.clamp(min=2.0**-40),
        "float16": torch.where(strengths < 2.0**-6, 1.0, strengths),
    }[rule][:, None]
    back = (factor * E).to(dtype).double() / factor
    return (back - E).norm(dim=1) / E.norm(dim=1)


def weak_rows_figure() -> Figure:
    """`weak_rows` for three rules, by the strength of a row."""
    exponents = torch.arange(-60, 2, 2, dtype=torch.float64)
    strengths = torch.exp2(exponents)
    fig, ax = plotting.figure(height=3.0)
    cases = (
        ("float16, Vn kept", torch.float16, "Vn"),
        ("float16, E kept below $2^{-6}$", torch.float16, "float16"),
        ("bfloat16, $2^{-40} E$ kept below $2^{-40}$", torch.bfloat16, "bfloat16"),
    )
    for style, (label, dtype, rule) in zip(FORMS, cases, strict=False):
        ax.plot(exponents, weak_rows(strengths, dtype, rule), **style, label=label)
    ax.set(xlabel=r"$\log_2 \beta$", ylabel="error of E, got back", yscale="log", ylim=(1e-4, 3))
    ax.legend(fontsize=9)
    return fig


def shared_memory(values: int = HEAD) -> dict[str, int]:
    """Kilobytes of shared memory of each buffer of `chunk_scan_fwd` for Hopper, read off its source.

    >>> sum(shared_memory(128).values()), sum(shared_memory(64).values())
    (200, 144)
    """
    from dn_lib.kernels.hopper import scan

    sizes = {"C": CHUNK, "D": HEAD, "VALUES": values}
    source = "\n".join(source_lines(scan.chunk_scan_fwd))
    found = re.findall(r"(\w+)_tiles = tiles\((\d), (\w+), (\w+)\)", source)
    return {name: 2 * int(count) * sizes[rows] * sizes[columns] // 1024 for name, count, rows, columns in found}


def hopper_gain(operator: Record) -> Table:
    """Rows of the operator's result that say that they ran the kernels for Hopper; a sentence if there are none."""
    rows = []
    for row in grid(operator):
        if row.get("gluon") or "hopper" in str(row.get("plan", "")).lower():
            name = f"{row['B']} x {row['L']} x {row['H']} x {row['d_k']}"
            rows.append((name, f"{row['forward']['ours_ms']:.3f}", f"{row['forward_backward']['ours_ms']:.3f}"))
    none = "no stored row was measured with the kernels for Hopper: their gain is not measured yet"
    return Table(("times in ms: B x L x H x d", "forward", "with backward"), rows, empty=none)
