"""Study 2: what one layer can carry, how many steps a letter takes, the best memory, two starts of one layer.

Every function returns the figure that it drew.  What is drawn comes from `s2_measured`, never typed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from torch import Tensor

from dn_lib.teaching import plotting

DELTA, IDEAL = plotting.MECHANISMS["delta"], plotting.MECHANISMS["ideal"]
RANGES = plotting.STYLES[4:8]  # ranges of beta are no mechanisms: they take the colours that none has
STEPS = ("#D9D9D9", "#FDD0A2", "#FD8D3C", "#D94801", "#7F2704")  # from no step to four: darker and darker
HATCHES = ("", "", "//", "", "xx")


def hexagon(paths: Mapping[float, Tensor]) -> Figure:
    """The state of a machine for S3 in its plane: a panel for each largest beta, with the path that one word takes.

    paths: `[L + 1, 2]` by beta.

    >>> [ax.get_title() for ax in hexagon({2.0: torch.zeros(3, 2)}).axes]
    ['$\\\\beta = 2$']
    """
    fig, axes = plotting.figure(columns=len(paths), height=2.9, squeeze=False)
    corners = torch.arange(6) * torch.pi / 3
    hexagon = torch.stack([corners.cos(), corners.sin()], 1)
    for ax, (beta, path) in zip(axes[0], paths.items(), strict=True):
        for angle in (torch.pi / 6, torch.pi / 2, 5 * torch.pi / 6):  # the mirrors
            x, y = 1.25 * float(torch.cos(torch.tensor(angle))), 1.25 * float(torch.sin(torch.tensor(angle)))
            ax.plot([-x, x], [-y, y], color="0.75", lw=1, linestyle=":", marker="")
        ax.add_patch(Polygon(hexagon.tolist(), fill=False, ec="0.6", lw=1))
        ax.plot(*hexagon.T.tolist(), "o", color="white", mec="0.4", ms=9, linestyle="")
        shades = torch.linspace(0.25, 1, max(len(path) - 1, 1)).tolist()
        for (a, b), alpha in zip(pairwise(path.tolist()), shades, strict=False):
            ax.plot([a[0], b[0]], [a[1], b[1]], color=DELTA["color"], lw=1.1, alpha=alpha, marker="", linestyle="-")
        ax.plot(*path.T.tolist(), color=DELTA["color"], marker="o", ms=3.5, linestyle="")
        ax.plot(*path[-1:].T.tolist(), color="black", marker="s", ms=7, linestyle="")
        ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), title=f"$\\beta = {beta:g}$")
        ax.grid(False)
        ax.spines[:].set_visible(False)
    return fig


def _positions(ax: Axes, curves: Mapping[float, Tensor], classes: int, title: str) -> None:
    for (top, curve), style in zip(curves.items(), RANGES, strict=False):
        places = torch.arange(1, len(curve) + 1)
        at = torch.unique(torch.logspace(0, float(torch.tensor(len(curve)).log10()), 25).round().long()) - 1
        ax.plot(places[at].tolist(), (100 * curve[at]).tolist(), **style, label=f"to {top:g}")
    ax.axhline(100 / classes, color="0.4", lw=1, linestyle=":")
    ax.set(xscale="log", xlabel="letters of the word", ylim=(-3, 104), title=title)


def reach(found: Mapping[str, Mapping[float, Tensor]], classes: Mapping[str, int]) -> Figure:
    """Right answers of machines made by hand against the position in the word, for several ranges of beta.

    found: by the group's name, by the largest beta, the share of right answers `[L]`.  classes: elements of each group.

    >>> [ax.get_title() for ax in reach({"S3": {2.0: torch.ones(20)}}, {"S3": 6}).axes]
    ['S3']
    """
    fig, axes = plotting.figure(columns=len(found), height=3.3, sharey=True, squeeze=False)
    for ax, (name, curves) in zip(axes[0], found.items(), strict=True):
        _positions(ax, curves, classes[name], name)
    axes[0][0].set_ylabel("right answers (%)")
    axes[0][-1].legend(title="$\\beta$ from 0", title_fontsize=9, fontsize=9)
    return fig


def steps_of_groups(counts: Mapping[str, Sequence[int]]) -> Figure:
    """For each group, which share of its elements needs 0, 1, 2, 3 or 4 steps: one bar for each.

    >>> [t.get_text() for t in steps_of_groups({"S3": [1, 3, 2, 0, 0]}).axes[0].get_yticklabels()]
    ['S3']
    """
    fig, ax = plotting.figure(height=0.9 + 0.42 * len(counts))
    names = list(counts)
    for row, name in enumerate(names):
        left, whole = 0.0, sum(counts[name])
        for n, count in enumerate(counts[name]):
            width = 100 * count / whole
            if not count:
                continue
            ax.barh(row, width, left=left, color=STEPS[n], hatch=HATCHES[n], ec="black", lw=0.6, height=0.7)
            if width > 6:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
                ax.text(left + width / 2, row, str(count), ha="center", va="center", fontsize=9, bbox=box)
            left += width
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="elements of the group (%)")
    ax.grid(False)
    for n, (colour, hatch) in enumerate(zip(STEPS, HATCHES, strict=True)):
        ax.barh([0], [0], color=colour, hatch=hatch, ec="black", lw=0.6, label=str(n))
    fig.legend(title="steps", ncols=5, fontsize=9, title_fontsize=9, loc="outside upper center")
    return fig


def best_in_one_pass(counts: Sequence[int], errors: Sequence[Mapping[str | int, float]], d: int) -> Figure:
    """Squared recall error against stored pairs: the delta rule after 1 and 20 sweeps, least squares after one.

    errors: for each of `counts`, as `s2_measured.errors_of_one_pass` returns them.

    >>> found = {1: 0.3, 20: 0.1, "best": 0.0, "recursive": 0.0}
    >>> len(best_in_one_pass([4, 8], [found, found], 8).axes[0].lines)
    5
    """
    fig, ax = plotting.figure(height=3.3)
    twenty = DELTA | {"linestyle": ":", "fillstyle": "none"}
    best = {"color": "0.6", "lw": 5, "linestyle": "-", "marker": ""}
    ax.plot(counts, [e["best"] for e in errors], **best, label="the best state there is")
    ax.plot(counts, [e[1] for e in errors], **DELTA, label="delta rule, one sweep")
    ax.plot(counts, [e[20] for e in errors], **twenty, label="delta rule, 20 sweeps")
    ax.plot(counts, [e["recursive"] for e in errors], **IDEAL, label="recursive least squares, one sweep")
    ax.axvline(d, color="0.4", lw=1, linestyle=":")
    ax.set(xlabel="stored pairs", ylabel="squared error", ylim=(-0.03, 1.05))
    ax.legend(fontsize=9)
    return fig


def one_key_again(curves: Mapping[str, Tensor]) -> Figure:
    """The error for one key after each of many writes of one value, as a share of the first, by several memories.

    >>> len(one_key_again({"least squares": torch.ones(4)}).axes[0].lines)
    2
    """
    fig, ax = plotting.figure(height=3.0)
    styles = [DELTA, DELTA | {"marker": "D", "linestyle": "-."}, DELTA | {"marker": "^", "linestyle": ":"}]
    ax.axhline(0, color="0.4", lw=1, linestyle="-")
    for (name, curve), style in zip(curves.items(), [*styles[: len(curves) - 1], IDEAL], strict=True):
        ax.plot(range(len(curve)), curve.tolist(), **style, label=name)
    ax.set(xlabel="writes", ylabel="share of the first error", ylim=(-1.15, 1.15))
    fig.legend(ncols=2, fontsize=9, loc="outside upper center")
    return fig


def starts(histories: Mapping[str, Sequence[Sequence[float]]], over: int = 5) -> Figure:
    """Accuracy against steps of training, from several starts: one line for each seed, means of `over` steps.

    >>> len(starts({"drawn": [[0.0] * 20, [1.0] * 20]}).axes[0].lines)
    2
    """
    fig, ax = plotting.figure(height=3.2)
    for (name, runs), style in zip(histories.items(), (RANGES[0], RANGES[2], RANGES[1], DELTA), strict=False):
        for seed, history in enumerate(runs):
            means = torch.tensor(history).unfold(0, over, over).mean(1)
            steps = [over * (n + 1) for n in range(len(means))]
            ax.plot(steps, (100 * means).tolist(), **style, markevery=2, label="" if seed else name)
    ax.set(xlabel="step", ylabel="accuracy (%)", ylim=(0, 103))
    ax.legend()
    return fig
