"""Drawings of study 1.  What is drawn is computed by `dn_lib`, in `measured`; nothing is typed in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

from dn_lib.teaching import plotting
from dn_lib.teaching.figures.s1 import measured

DECAY = plotting.STYLES[6]  # a memory that adds and fades: a colour that no other mechanism has
CLEARED = plotting.STYLES[4]  # one that knows where documents end: the best that a gate could do
STYLES: dict[str, dict[str, Any]] = {
    "additive": plotting.MECHANISMS["linear"],
    "decay": DECAY,
    "delta": plotting.MECHANISMS["delta"],
    "gated delta": plotting.MECHANISMS["gated"],
    "delta, cleared": CLEARED,
}
FORMS = plotting.STYLES[4:8]  # ways to compute one thing
MATRIX, ENTRIES, CUT = "#56B4E9", "#E69F00", "#D55E00"


# --- Two documents -----------------------------------------------------------------------------------------
def two_documents(pairs: int = 8, shared: int = 5) -> Figure:
    """What comes back of each value for each key after two documents, for five memories.

    >>> [ax.get_title() for ax in two_documents(4, 2).axes][:2]
    ['additive', 'decay, 0.93']
    """
    fig, axes = plotting.figure(2, 3, height=4.6)
    for ax, (name, memory) in zip(axes.flat, measured.MEMORIES.items(), strict=False):
        answers = measured.two_documents(memory, pairs, shared)
        plotting.matrix(ax, answers, f"{name}, {memory.gate:g}" if memory.gate < 1 else name, limit=1.0)
        ax.axvline(pairs - 0.5, color="black", lw=1.2, linestyle="-")
        for row in (shared, pairs):
            ax.axhline(row - 0.5, color="black", lw=1.2, linestyle="-")
        ax.set_xticks([(pairs - 1) / 2, 1.5 * pairs - 0.5], ["old values", "new values"])
        rows = [(shared - 1) / 2, (shared + pairs - 1) / 2, pairs + (pairs - shared - 1) / 2]
        ax.set_yticks(rows, ["in both", "new", "old"] if ax in axes[:, 0] else [""] * 3)
    for ax in axes[:, 0]:
        ax.set_ylabel("keys")
    words = axes.flat[-1]
    words.set_axis_off()
    text = "Keys in both documents:\nthe old value is stale.\n\nKeys of the old document:\nnobody wants an answer.\n\n"
    words.text(0.0, 0.95, text + "Red: comes back as it is.", va="top", fontsize=10, transform=words.transAxes)
    return fig


# --- Which part of the product a gate takes ------------------------------------------------------------------
def _square(ax: Axes, x: float, y: float, side: float, colour: str, text: str = "") -> None:
    ax.add_patch(Rectangle((x, y), side, side, fc=colour, ec="black", lw=0.8, alpha=0.75))
    if text:
        ax.text(x + side / 2, y + side / 2, text, ha="center", va="center", fontsize=9)


def tiles(count: int = 4) -> Figure:
    """A chunk of the scores with one gate per channel: which tiles are products, and where a span is cut.

    >>> [ax.get_title() for ax in tiles(3).axes]
    ['one chunk of scores', 'one span, cut in two']
    """
    fig, (grid, span) = plotting.figure(columns=2, height=3.3, width_ratios=[1, 1.35])
    for row in range(count):
        for column in range(row + 1):
            _square(grid, column, row, 1, ENTRIES if row == column else MATRIX)
    grid.add_patch(Rectangle((0, count - 1), count - 1, 1, fill=False, ec="black", lw=2.5))
    grid.set(xlim=(-0.1, count + 0.1), ylim=(count + 0.1, -0.1), aspect="equal", title="one chunk of scores")
    grid.set(xlabel="keys", ylabel="queries", xticks=[], yticks=[])
    span.set(xlim=(0, 10), ylim=(0, 4), title="one span, cut in two", xticks=[], yticks=[])
    cut = 6.5
    box = {"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1.5}
    grid.text((count - 1) / 2, count - 0.5, "one matrix product", ha="center", va="center", fontsize=9, bbox=box)
    grid.text(count - 0.5, count - 0.5, "pair\nby pair", ha="center", va="center", fontsize=9)
    span.axvline(cut, color=CUT, lw=2, linestyle="--", ymin=0.3, ymax=0.9)
    span.text(cut, 3.75, "first row of the tile", ha="center", va="center", fontsize=9, color=CUT)
    for x, name in ((2.0, "token $j$"), (9.0, "token $i$")):
        span.plot([x], [2.4], marker="o", color="black")
        span.text(x, 2.8, name, ha="center", fontsize=10)
    for start, end, words in ((2.0, cut, "goes into $k_j$"), (cut, 9.0, "into $q_i$")):
        style = {"arrowstyle": "|-|", "mutation_scale": 4, "color": "black", "lw": 1.3}
        span.add_patch(FancyArrowPatch((start, 1.7), (end, 1.7), shrinkA=0, shrinkB=0, **style))
        span.text((start + end) / 2, 1.15, words, ha="center", fontsize=10)
    span.text(5.5, 0.5, "both sums of log gates are at most 0", ha="center", fontsize=9)
    for ax in (grid, span):
        ax.grid(False)
        ax.spines[:].set_visible(False)
    return fig


# --- Numbers -------------------------------------------------------------------------------------------------
def ratios(lengths: Sequence[int], gates: Sequence[float]) -> tuple[Figure, dict[float, dict[str, list[float]]]]:
    """Errors of the four ways to a ratio in float32, against the chunk length; a cross where a number is not finite.

    >>> fig, found = ratios([4, 8], [0.5])
    >>> len(fig.axes[0].lines), list(found)
    (4, [0.5])
    """
    fig, axes = plotting.figure(columns=len(gates), height=3.4, sharey=True, squeeze=False)
    found = {gate: measured.ratio_errors(lengths, gate) for gate in gates}
    for ax, (gate, errors) in zip(axes[0], found.items(), strict=True):
        for style, (name, values) in zip(FORMS, errors.items(), strict=True):
            finite = [x if math.isfinite(x) else math.nan for x in values]
            ax.plot(lengths, finite, label=name, **style)
            lost = next((n for n, x in zip(lengths, values, strict=True) if not math.isfinite(x)), None)
            if lost is not None:
                ax.scatter([lost], [1e-5], marker="x", s=60, color=style["color"], zorder=4)
        ax.set(xscale="log", yscale="log", ylim=(1e-9, 3e-5), xlabel="chunk length $C$", title=f"gates around {gate:g}")
        ax.set_xticks(list(lengths), [str(n) for n in lengths])
        ax.minorticks_off()
    axes[0][0].set_ylabel("relative error of the mask")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=10)
    return fig, found


def bound_and_return(gates: Sequence[float], chunks: int = 48) -> tuple[Figure, dict[float, list[float]]]:
    """Left: the largest entries of N against the bound.  Right: errors of states that are walked back to.

    >>> fig, found = bound_and_return([1.0, 0.5], 3)
    >>> len(found[0.5])
    2
    """
    fig, (left, right) = plotting.figure(columns=2, height=3.4)
    found = {}
    for style, gate in zip(FORMS, gates, strict=False):
        N = measured.largest_entries(gate)
        distance = torch.arange(1, len(N) + 1)
        plain = {"color": style["color"], "linestyle": style["linestyle"]}
        left.plot(distance, gate**distance, **plain)
        left.plot(distance[::3], N[::3], marker=style["marker"], linestyle="none", color=style["color"])
        found[gate] = measured.walked_back(gate, chunks)
        shown = [x if x < 1e3 else math.nan for x in found[gate]]
        back = [16 * (n + 1) for n in range(len(shown))]
        right.plot(back, shown, label=f"gates of {gate:g}", markevery=4, **style)
    left.set(xlabel="distance $i - j$", ylabel="largest $|N_{ij}|$", title="N fades with the distance")
    right.set(yscale="log", ylim=(1e-8, 1e2), xlabel="tokens walked back", ylabel="relative error")
    right.set_title("the way back grows errors")
    fig.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10)
    return fig, found


def half_lives(tables: Mapping[str, Tensor]) -> Figure:
    """The half-life of each head, in tokens, for tables of slopes s `[H]`: log 2 / s.

    >>> fig = half_lives({"a": torch.tensor([1.0, 0.1])})
    >>> fig.axes[0].get_ylabel()
    'half-life in tokens'
    """
    fig, ax = plotting.figure(height=3.2)
    for style, (name, slopes) in zip(FORMS, tables.items(), strict=False):
        lives = [math.log(2) / s if s > 0 else math.nan for s in slopes.tolist()]
        ax.plot(range(1, len(lives) + 1), lives, label=name, **style)
    ax.set(yscale="log", xlabel="head", ylabel="half-life in tokens")
    ax.axhline(1, color="0.5", lw=1, linestyle=":")
    ax.legend(fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def noise(decays: Sequence[float], count: int, d: int) -> Figure:
    """Squared error of a fading memory by the age of the pair: measured (marks), and by eq-s1-noise (lines).

    >>> fig = noise([0.9], 8, 4)
    >>> len(fig.axes[0].lines)  # a curve, its marks, and the error of an empty memory
    3
    """
    fig, ax = plotting.figure(height=3.3)
    ages = [round(count ** (i / 8)) - 1 for i in range(9)]
    for style, decay in zip(FORMS, decays, strict=False):
        errors = measured.answers_by_age(decay, count, d)
        plain = {"color": style["color"], "linestyle": style["linestyle"]}
        ax.plot(range(count), measured.expected_by_age(decay, count, d), **plain)
        ax.plot(
            ages, errors[ages], marker=style["marker"], color=style["color"], linestyle="none",
            label=f"decay {decay:g}",
        )  # fmt: skip
    ax.axhline(1, color="0.5", lw=1, linestyle=":")
    ax.set(yscale="log", xlabel="age of the pair that is asked for (newest: 0)", ylabel="squared error")
    ax.set_xscale("symlog", linthresh=1, linscale=0.4)  # logarithmic from 1 on, with room for 0
    ticks = [0, *(2**n for n in range(count.bit_length()) if 2**n < count)]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.legend(fontsize=10)
    return fig


def documents(found: Mapping[str, measured.Recall]) -> Figure:
    """Left: the squared error after each document.  Right: how much of a stale value comes back, by its age.

    >>> one = measured.Recall(torch.ones(6), torch.ones(6), torch.ones(5))
    >>> len(documents({"delta": one}).axes[0].lines)
    1
    """
    fig, (left, right) = plotting.figure(columns=2, height=3.6)
    for name, recall in found.items():
        left.plot(range(1, len(recall.error) + 1), recall.error, label=name, markevery=3, **STYLES[name])
        stale = recall.stale[: len(recall.stale) // 2]
        right.plot(range(1, len(stale) + 1), stale, markevery=2, **STYLES[name])
    left.set(yscale="log", xlabel="document", ylabel="squared error", title="the document's own questions")
    right.set(xlabel="documents since the key was written", ylabel="share of the old value")
    right.set_title("keys that it does not have")
    right.axhline(0, color="0.5", lw=1, linestyle=":")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
    return fig


def speed(lengths: Sequence[int], found: Mapping[str, Sequence[float]], device: str) -> Figure:
    """Tokens per second against the length, for the forms of `measured.speeds`.

    >>> fig = speed([1, 2], {"fixed decay, in chunks": [1.0, 1.0], "softmax attention": [1.0]}, "cpu")
    >>> len(fig.axes[0].lines)
    2
    """
    fig, ax = plotting.figure(height=3.0)
    for style, (name, rates) in zip((DECAY, plotting.MECHANISMS["softmax"]), found.items(), strict=True):
        ax.plot(lengths[: len(rates)], rates, label=name, **style)
    ax.set(
        xscale="log", yscale="log", xlabel="length of the sequence", ylabel="tokens per second", title=f"on {device}"
    )
    ax.set_xticks(list(lengths), [str(n) for n in lengths])
    ax.minorticks_off()
    ax.legend(fontsize=10)
    return fig
