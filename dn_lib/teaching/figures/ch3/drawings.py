"""Drawings of chapter 3: one matrix, two tokens, paths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyArrowPatch, Rectangle
from torch import Tensor

from dn_lib.forms import householder as hh
from dn_lib.teaching import plotting
from dn_lib.teaching.figures.ch3.common import DELTA, SOFT, Point, paths, weight


# ---- Small helpers ---------------------------------------------------------------------------------------
def _arrow(ax: Axes, end: Point, start: Point = (0.0, 0.0), **style: Any) -> None:
    options = {"arrowstyle": "-|>", "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0, "lw": 1.8, "color": "black"}
    ax.add_patch(FancyArrowPatch(start, end, **(options | style)))


def _plain(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _pair(vector: Tensor) -> tuple[float, float]:
    x, y = vector.tolist()
    return x, y


# ---- One matrix ------------------------------------------------------------------------------------------
def images_of_a_vector(k: Tensor, x: Tensor, betas: Sequence[float]) -> Figure:
    """The images of x under I - beta k k^T in the plane, one for each beta, with k and the mirror.

    k: a unit vector `[2]`.  x: `[2]`.

    >>> fig = images_of_a_vector(torch.tensor([0.8, 0.6]), torch.tensor([1.5, 0.25]), [0.0, 1.0, 2.0])
    >>> [text.get_text() for text in fig.axes[0].texts][-2]
    '$\\\\beta = 2$'
    """
    fig, ax = plotting.figure(height=3.6)
    mirror = torch.stack([-k[1], k[0]])
    ax.axline(_pair(x), slope=(k[1] / k[0]).item(), color="0.8", linestyle="-", lw=1)
    ax.axline((0, 0), _pair(mirror), color=SOFT, linestyle=":")
    ax.text(*_pair(1.15 * mirror - torch.tensor([0.12, 0])), "mirror", color="0.35", ha="right", va="top", fontsize=11)
    _arrow(ax, _pair(k), lw=2.5)
    ax.text(*_pair(k + torch.tensor([-0.08, 0.08])), "$k$", fontsize=13, ha="right")
    for beta in betas:
        image = hh.householder_matrix(k, beta) @ x
        _arrow(ax, _pair(image), color=DELTA, alpha=0.45, lw=1.4)
        ax.plot(*_pair(image), color=DELTA, marker="s", linestyle="")
        ax.text(*_pair(image + torch.tensor([0.09, -0.03])), rf"$\beta = {beta:g}$", va="center", fontsize=11)
    ax.text(*_pair(x + torch.tensor([0.09, 0.16])), "$x$", fontsize=13)
    ax.set(aspect="equal", xlim=(-1.7, 2.3), ylim=(-1.75, 1.2), xlabel="first coordinate", ylabel="second coordinate")
    return fig


def letter_f() -> Tensor:
    """The outline of a letter F, `[11, 2]`: it shows whether a map turns the plane over."""
    corners = [[0, 0], [0, 5], [3, 5], [3, 4], [1, 4], [1, 3], [2, 3], [2, 2], [1, 2], [1, 0], [0, 0]]
    return torch.tensor(corners) / 4 + torch.tensor([0.9, -0.5])


def _squeezed_plane(ax: Axes, k: Tensor, beta: float, trail: bool = True) -> None:
    mirror, angles = torch.stack([-k[1], k[0]]), torch.linspace(0, 2 * torch.pi, 80)
    circle, letter = torch.stack([angles.cos(), angles.sin()], dim=-1), letter_f()
    ax.axline((0, 0), _pair(mirror), color=SOFT, linestyle=":")
    for earlier in torch.arange(0, beta, 0.2) if trail else ():
        ax.plot(*(letter @ hh.householder_matrix(k, earlier.item())).T, color="0.8", linestyle="-", lw=0.8)
    H = hh.householder_matrix(k, beta)
    ax.plot(*(circle @ H).T, color="black", linestyle="-")
    ax.fill(*(letter @ H).T, color=DELTA, alpha=0.8)
    _arrow(ax, _pair(k), lw=2)
    ax.text(*_pair(1.1 * k), "$k$", fontsize=13)
    ax.set(aspect="equal", xlim=(-2.4, 2.4), ylim=(-1.8, 1.8))


def draw_squeezed_plane(fig: Figure, k: Tensor, beta: float) -> None:
    """The unit circle and a letter F under I - beta k k^T; smaller betas are left behind in grey.

    >>> fig = Figure()
    >>> draw_squeezed_plane(fig, torch.tensor([0.8, 0.6]), 1.0)
    >>> fig.axes[0].get_title()
    'beta = 1.0: what lies along $k$ is multiplied by +0.0'
    """
    ax = fig.add_subplot()
    _squeezed_plane(ax, k, beta)
    ax.set_title(f"beta = {beta:.1f}: what lies along $k$ is multiplied by {1 - beta:+.1f}")


def draw_squeezed_strip(fig: Figure, k: Tensor, betas: Sequence[float]) -> None:
    """The same as a strip of stills, one for each beta, which is what print gets.

    >>> fig = Figure()
    >>> draw_squeezed_strip(fig, torch.tensor([0.8, 0.6]), [0.0, 2.0])
    >>> [ax.get_title() for ax in fig.axes]
    ['beta = 0', 'beta = 2']
    """
    axes = fig.subplots(1, len(betas))
    for ax, beta in zip(axes, betas, strict=True):
        _squeezed_plane(ax, k, beta, trail=False)
        ax.set(xlim=(-1.45, 1.75), ylim=(-1.55, 1.35))
        _plain(ax)
        ax.set_title(f"beta = {beta:g}", fontsize=11)


def two_reflections(angle: float = 0.4) -> Figure:
    """A letter reflected once, twice, and twice in the other order, with keys, mirrors and the angle turned.

    angle: between the two keys, in radians; the products turn by twice as much.

    >>> [ax.get_title() for ax in two_reflections().axes]
    ['$H_1$: turned over', '$H_2 H_1$: turned by 46°', '$H_1 H_2$: turned by -46°']
    """
    directions = torch.tensor([0.0, angle])
    keys = torch.stack([directions.cos(), directions.sin()], dim=-1)
    H1, H2 = (hh.householder_matrix(k, 2.0) for k in keys)
    panels = {"$H_1$": (H1, keys[:1]), "$H_2 H_1$": (H2 @ H1, keys), "$H_1 H_2$": (H1 @ H2, keys)}
    fig, axes = plotting.figure(columns=3, height=2.9, sharey=True)
    for ax, (name, (H, shown)) in zip(axes, panels.items(), strict=True):
        ax.plot(*letter_f().T, color="0.6", linestyle="-", lw=1)
        ax.fill(*(letter_f() @ H.T).T, color=DELTA, alpha=0.8)
        for number, k in enumerate(shown, 1):
            ax.axline((0, 0), _pair(torch.stack([-k[1], k[0]])), color=SOFT, linestyle=(":", "--")[number - 1], lw=1.4)
            _arrow(ax, _pair(k), mutation_scale=9, lw=1.4)
            side = torch.stack([-k[1], k[0]]) * (0.14 if number == 2 else -0.16)
            ax.text(*_pair(0.75 * k + side), f"$k_{number}$", fontsize=10, ha="center", va="center")
        turned = torch.rad2deg(torch.atan2(H[1, 0], H[0, 0])).item()
        if len(shown) == 2:
            ax.add_patch(Arc((0, 0), 1.1, 1.1, theta1=min(0, turned), theta2=max(0, turned), color="black", lw=1.4))
        ax.set_title(f"{name}: turned by {turned:.0f}°" if len(shown) == 2 else f"{name}: turned over", fontsize=11)
        ax.set(aspect="equal", xlim=(-1.9, 1.9), ylim=(-1.9, 1.9))
        _plain(ax)
    return fig


# ---- Two tokens by hand ----------------------------------------------------------------------------------
def two_tokens(k: Tensor, v: Tensor, beta: Tensor) -> Figure:
    """The second step of the recursions for w and u as arrows: keys on the left, values on the right.

    k, v: `[2, 2]`.  beta: `[2]`.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> len(two_tokens(eye, eye, torch.ones(2, dtype=torch.float64)).axes)
    2
    """
    fig, axes = plotting.figure(columns=2, height=3.3)
    overlap = (k[1] @ k[0]).item()
    names = (("k", "w", hh.wy_recursion(k, beta)), ("v", "u", hh.pseudo_values(k, v, beta)))
    for ax, x, (old, new, made) in zip(axes, (k, v), names, strict=True):
        seen = overlap * made[0]
        rest = x[1] - seen
        size = torch.cat([x, made]).abs().max().item()
        _arrow(ax, _pair(x[0]))
        _arrow(ax, _pair(x[1]))
        _arrow(ax, _pair(rest), _pair(torch.zeros(2)), color=SOFT, linestyle="--", lw=1.4)
        _arrow(ax, _pair(rest), _pair(x[1]), color=SOFT, linestyle=":", lw=1.4)
        _arrow(ax, _pair(made[1]), color=DELTA, lw=3)
        same = f" = {new}_1" if torch.allclose(made[0], x[0]) else ""
        ax.text(*_pair(x[0] - torch.tensor([0.0, 0.09 * size])), f"${old}_1{same}$", fontsize=12, ha="right", va="top")
        ax.text(*_pair(x[1] + 0.03 * size), f"${old}_2$", fontsize=12)
        middle = (x[1] + rest) / 2 + torch.tensor([0.0, 0.05 * size])
        ax.text(*_pair(middle), f"$-{overlap:g}\\,{new}_1$", color="0.35", fontsize=11, ha="center", va="bottom")
        ax.text(*_pair(made[1] - torch.tensor([0.05 * size, 0])), f"${new}_2$", color=DELTA, fontsize=13, ha="right")
        ax.set(aspect="equal", xlim=(-0.3 * size, 1.25 * size), ylim=(-0.3 * size, 1.25 * size))
    axes[0].set_title("keys: from $k_2$ to $w_2$")
    axes[1].set_title("values: from $v_2$ to $u_2$")
    return fig


def wy_product(k: Tensor, beta: Tensor) -> Figure:
    """H_C ... H_1 = I - K^T W as pictures of the four matrices, all on one colour scale.

    k: `[C, d]`.  beta: `[C]`.

    >>> from dn_lib.teaching.figures.ch3 import correlated_keys
    >>> len(wy_product(correlated_keys(3, 8, 0.0), torch.ones(3, dtype=torch.float64)).axes)
    8
    """
    count, d = k.shape
    W = hh.wy_recursion(k, beta)
    parts = {
        f"$H_{count} \\cdots H_1$": hh.householder_product(k, beta),
        "$I$": torch.eye(d, dtype=k.dtype),
        "$K^\\top$": k.mT,
        "$W$": W,
    }
    ratios = [d, 4, d, 4, max(count, 7), 4, d]
    fig, axes = plotting.figure(columns=7, height=2.2, width_ratios=ratios)
    for ax, (title, part) in zip(axes[::2], parts.items(), strict=True):
        plotting.matrix(ax, part, title).set_clim(-1, 1)
        ax.set(xticks=[], yticks=[])
    for ax, sign in zip(axes[1::2], ("=", "−", "·"), strict=True):
        _plain(ax)
        ax.text(0.5, 0.5, sign, fontsize=18, ha="center", va="center", transform=ax.transAxes)
    fig.colorbar(axes[0].images[0], ax=axes, shrink=0.8, ticks=[-1, 0, 1])
    return fig


# ---- Paths -----------------------------------------------------------------------------------------------
def _nodes(
    ax: Axes, count: int, y: float, filled: Sequence[int] = (), faint: Sequence[int] = (), r: float = 12
) -> None:
    for t in range(count):
        face, ink = (DELTA, "white") if t in filled else ("white", "black")
        edge = "0.75" if t in faint else "black"
        ax.plot(t, y, "o", markersize=2 * r / 1.4, mfc=face, mec=edge, mew=1.4, zorder=3)
        ax.text(t, y, str(t + 1), ha="center", va="center", fontsize=10, zorder=4, color="0.6" if t in faint else ink)


def _edge(ax: Axes, a: int, b: int, y: float, bend: float | None = None, gap: float = 10, **style: Any) -> None:
    """An arrow from token a to token b, bent upwards the more the further apart they are."""
    rad = -0.12 - 0.13 * (b - a - 1) if bend is None else bend
    options = {"connectionstyle": f"arc3,rad={rad}", "shrinkA": gap, "shrinkB": gap, "mutation_scale": 11}
    _arrow(ax, (b, y), (a, y), **(options | style))


def every_path(k: Tensor, beta: Tensor) -> Figure:
    """All paths from the first token to the last, one a row, with their weights; the sum is an entry of N.

    k: `[C, d]`.  beta: `[C]`.  Inner tokens, where a beta counts, are filled.

    >>> from dn_lib.teaching.figures.ch3 import correlated_keys
    >>> fig = every_path(correlated_keys(4, 3, 0.5), torch.ones(4, dtype=torch.float64))
    >>> [text.get_text() for text in fig.axes[0].texts][-1].startswith("sum: $N_{41}$ = ")
    True
    """
    last = len(k) - 1
    rows, right = paths(last, 0), last + 6.9  # where the column of weights ends
    fig, ax = plotting.figure(height=0.62 * len(rows) + 0.9)
    for number, path in enumerate(rows):
        y = -number
        _nodes(ax, len(k), y, filled=path[1:-1], faint=[t for t in range(len(k)) if t not in path])
        factors = []
        for a, b in pairwise(path):
            _edge(ax, a, b, y, color=DELTA)
            factors.append(f"({-(k[b] @ k[a]).item():+.2f})")
            if b != last:
                factors.append(f"{beta[b]:.2f}")
        ax.text(last + 0.45, y, " · ".join(factors), va="center", fontsize=10, family="DejaVu Sans Mono")
        ax.text(right, y, f"{weight(path, k, beta):+.3f}", va="center", ha="right", fontsize=10)
        edges = len(path) - 1
        ax.text(-0.4, y, f"{edges} edge{'s' * (edges > 1)}", va="center", ha="right", fontsize=10)
    N = hh.scaled_inverse(k, beta)
    ax.plot([right - 0.8, right], [-len(rows) + 0.5] * 2, color="black", linestyle="-", lw=1)
    total = f"sum: $N_{{{last + 1}1}}$ = {N[last, 0].item():+.3f}"
    ax.text(right, -len(rows), total, va="center", ha="right", fontsize=10)
    ax.set(xlim=(-1.4, right + 0.1), ylim=(-len(rows) - 0.4, 0.7))
    _plain(ax)
    return fig


def path_diagram(count: int = 5) -> Figure:
    """Tokens in a row and an edge from each to every later one; one path is drawn out, with what it is worth.

    >>> len(path_diagram().axes)
    1
    """
    fig, ax = plotting.figure(height=2.5)
    chosen = [(0, 2), (2, 3), (3, count - 1)]
    for a in range(count):
        for b in range(a + 1, count):
            if (a, b) not in chosen:
                _edge(ax, a, b, 0, color="0.82", lw=1, gap=12)
    for a, b in chosen:
        _edge(ax, a, b, 0, color=DELTA, lw=2.4, gap=12)
        height = -0.2 if b == a + 1 else 0.42
        name = f"$-k_{b + 1}^\\top k_{a + 1}$"
        ax.text(
            (a + b) / 2,
            height,
            name,
            color=DELTA,
            ha="center",
            fontsize=11,
            bbox={"fc": "white", "ec": "none", "pad": 1},
        )
    _nodes(ax, count, 0, filled=[2, 3], r=14)
    for inner in (2, 3):
        ax.text(inner, -0.34, rf"$\beta_{inner + 1}$", ha="center", va="top", fontsize=12, color=DELTA)
    ax.text(0, -0.34, "written here", ha="center", va="top", fontsize=10)
    ax.text(count - 1, -0.34, "read here", ha="center", va="top", fontsize=10)
    ax.set(xlim=(-0.5, count - 0.5), ylim=(-0.75, 1.25))
    _plain(ax)
    return fig


def merge_of_paths(k: Tensor, beta: Tensor) -> Figure:
    """A path that crosses from the first half to the second, and N as the merges fill it, level by level.

    k: `[8, d]`, beta: `[8]`.  Blocks that a level has just filled have a thick frame.

    >>> from dn_lib.teaching.figures.ch3 import correlated_keys
    >>> fig = merge_of_paths(correlated_keys(8, 4, 0.5), torch.ones(8, dtype=torch.float64))
    >>> [ax.get_title() for ax in fig.axes][:3]
    ['blocks of 2', 'blocks of 4', 'blocks of 8']
    """
    count, half = len(k), len(k) // 2
    fig, rows = plotting.figure(rows=2, columns=3, height=4.7, height_ratios=[1, 1.15])
    grid = rows[0, 0].get_gridspec()
    for unused in rows[0]:
        unused.remove()
    ax = fig.add_subplot(grid[0, :])
    steps = [(0, 2, "$N_{11}$"), (2, 5, "$-B_{21}$"), (5, 7, "$N_{22}$")]
    for a, b, name in steps:
        crossing = a < half <= b
        style = {"color": DELTA, "lw": 2.4} if crossing else {"color": "black", "linestyle": (0, (5, 2)), "lw": 1.8}
        _edge(ax, a, b, 0, bend=-0.3, gap=13, **style)
        box = {"fc": "white", "ec": "none", "pad": 1}
        ink = DELTA if crossing else "black"
        ax.text((a + b) / 2, 0.2 + 0.15 * (b - a), name, ha="center", fontsize=12, color=ink, bbox=box)
    _nodes(ax, count, 0, filled=[2, 5], r=13)
    for inner, name in ((2, "$D_1$"), (5, "$D_2$")):
        ax.text(inner, -0.3, name, ha="center", va="top", color=DELTA, fontsize=12)
    ax.axvline(half - 0.5, color=SOFT, linestyle=":")
    ax.text(half - 0.55, -0.75, "first half ", ha="right", color="0.35")
    ax.text(half - 0.45, -0.75, " second half", ha="left", color="0.35")
    ax.set(xlim=(-0.6, count - 0.4), ylim=(-0.95, 1.0))
    _plain(ax)
    N = hh.scaled_inverse(k, beta)
    token, size = torch.arange(count), 1
    axes = rows[1]
    for below in axes:
        size *= 2
        image = plotting.matrix(below, N * (token[:, None] // size == token // size), f"blocks of {size}")
        image.set_clim(-1, 1)
        for start in range(0, count, size):
            corner = (start - 0.5, start + size / 2 - 0.5)
            below.add_patch(Rectangle(corner, size / 2, size / 2, fill=False, lw=2.2, ec="black"))
    fig.colorbar(axes[0].images[0], ax=list(axes), shrink=0.85, ticks=[-1, 0, 1])
    return fig
