"""Chapter 3: one Householder matrix, two tokens by hand, paths of influence, and what rounding does to each method.

Every function returns the figure that it drew.  What is drawn is computed here by `dn_lib`, never typed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyArrowPatch, Rectangle
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms import householder as hh
from dn_lib.teaching import plotting

DELTA = plotting.MECHANISMS["delta"]["color"]  # what the delta rule does to a thing
SOFT = "0.55"  # helping lines
# Ways to compute one matrix are no mechanisms: they take the colours that no mechanism has.
METHODS: dict[str, dict[str, Any]] = dict(
    zip(("substitution", "solve", "blocked", "doubling"), plotting.STYLES[4:8], strict=True)
)
METHODS["merged T"] = {"color": "0.4", "marker": "v", "linestyle": (0, (3, 1, 1, 1))}
NAMES = {"blocked": "merging $N$", "merged T": "merging $T$"}  # a method, as figures call it

Point = tuple[float, float]
Path = tuple[int, ...]  # tokens, counted from 0, in the order of time


# ---- Inputs that several figures and cells share ---------------------------------------------------------
def correlated_keys(length: int, d: int, cosine: float, seed: int = 0) -> Tensor:
    """`length` unit keys `[length, d]` in float64, with this mean cosine between two of them.

    They are a shared direction plus random noise orthogonal to it, so that single pairs lie around the mean; a cosine
    of 1 makes them identical.

    >>> k = correlated_keys(3, 5, 1.0)
    >>> bool((k @ k.mT - 1).abs().max() < 1e-12)
    True
    """
    generator = torch.Generator().manual_seed(seed)
    shared = normalize(torch.randn(1, d, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.randn(length, d, generator=generator, dtype=torch.float64)
    noise = normalize(noise - (noise @ shared.mT) * shared, dim=-1)
    return cosine**0.5 * shared + (1 - cosine) ** 0.5 * noise


def paths(i: int, j: int) -> list[Path]:
    """All ways to go from token j to a later token i, stopping at any of the tokens between; the shortest first.

    >>> paths(3, 1)
    [(1, 3), (1, 2, 3)]
    """
    between = range(j + 1, i)
    return [(j, *stops, i) for count in range(len(between) + 1) for stops in combinations(between, count)]


def weight(path: Path, k: Tensor, beta: Tensor) -> float:
    """The product of -k_i^T k_m over the edges of `path`, and of beta over its inner tokens.

    >>> weight((0, 1, 2), torch.ones(3, 1), torch.tensor([1.0, 0.5, 1.0]))
    0.5
    """
    value = torch.ones((), dtype=k.dtype)
    for a, b in pairwise(path):
        value = value * -(k[b] @ k[a])
    for inner in path[1:-1]:
        value = value * beta[inner]
    return value.item()


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

    >>> fig = every_path(correlated_keys(4, 3, 0.5), torch.ones(4, dtype=torch.float64))
    >>> [text.get_text() for text in fig.axes[0].texts][-1].startswith("sum: $N_{41}$ = ")
    True
    """
    last = len(k) - 1
    rows = paths(last, 0)
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
        ax.text(last + 0.45, y, " · ".join(factors), va="center", fontsize=9, family="DejaVu Sans Mono")
        ax.text(last + 6.0, y, f"{weight(path, k, beta):+.3f}", va="center", ha="right", fontsize=10)
        edges = len(path) - 1
        ax.text(-0.4, y, f"{edges} edge{'s' * (edges > 1)}", va="center", ha="right", fontsize=10)
    N = hh.scaled_inverse(k, beta)
    ax.plot([last + 5.2, last + 6.0], [-len(rows) + 0.5] * 2, color="black", linestyle="-", lw=1)
    total = f"sum: $N_{{{last + 1}1}}$ = {N[last, 0].item():+.3f}"
    ax.text(last + 6.0, -len(rows), total, va="center", ha="right", fontsize=10)
    ax.set(xlim=(-1.4, last + 6.1), ylim=(-len(rows) - 0.4, 0.7))
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


# ---- What the matrices look like, and how large they are -------------------------------------------------
def three_key_sets(length: int = 16, d: int = 16) -> Figure:
    """DB, its eighth power, T, N and W for keys from independent to identical, on one colour scale.

    The largest absolute value stands under each picture.

    >>> fig = three_key_sets()
    >>> len(fig.axes), fig.axes[10].get_xlabel()
    (16, 'max 2')
    """
    cases = {"independent\nbeta 1": (0.0, 1.0), "mean cosine 0.6\nbeta 1": (0.6, 1.0), "identical\nbeta 2": (1.0, 2.0)}
    fig, axes = plotting.figure(rows=3, columns=5, height=5.0)
    for row, (name, (cosine, strength)) in zip(axes, cases.items(), strict=True):
        k, beta = correlated_keys(length, d, cosine), torch.full((length,), strength, dtype=torch.float64)
        DB, T = strength * (k @ k.mT).tril(-1), hh.ut_transform(k, beta)
        power = torch.linalg.matrix_power(DB, 8)
        shown = {"DB": DB, "(DB)^8": power, "T": T, "N": hh.scaled_inverse(k, beta), "W": T @ k}
        for ax, (title, picture) in zip(row, shown.items(), strict=True):
            image = plotting.matrix(ax, picture, f"${title}$" if ax in axes[0] else "")
            image.set_clim(-4, 4)
            largest = picture.abs().max().item()
            text = f"{largest:.2g}" if largest < 1000 else f"{largest:,.0f}"
            ax.set(xticks=[], yticks=[], xlabel=f"max {text}")
            ax.xaxis.label.set_fontsize(9)
        row[0].set_ylabel(name, fontsize=10)
    fig.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.6, ticks=[-4, 0, 4], extend="both")
    return fig


def largest_numbers(k: Tensor, beta: Tensor, method: str) -> list[float]:
    """The largest absolute value that each matrix product of `ut_transform(k, beta, method=method)` returns.

    >>> largest_numbers(torch.ones(4, 1), torch.ones(4), "doubling")
    [2.0, 1.0]
    """
    seen = []

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        seen.append(product.abs().max().item())
        return product

    hh.ut_transform(k, beta, method=method, matmul=matmul)
    return seen


def numbers_on_the_way(k: Tensor, beta: Tensor) -> Figure:
    """The largest number that each product of doubling and of merging returns; zeros are left out.

    >>> len(numbers_on_the_way(correlated_keys(8, 4, 1.0), torch.full((8,), 2.0, dtype=torch.float64)).axes)
    1
    """
    fig, ax = plotting.figure(height=3.1)
    for method in ("doubling", "blocked"):
        seen = {n: size for n, size in enumerate(largest_numbers(k, beta, method), 1) if size > 0}
        ax.semilogy(list(seen), list(seen.values()), **METHODS[method])
        ax.text(
            max(seen) + 0.15,
            list(seen.values())[-1],
            NAMES.get(method, method),
            va="center",
            color=METHODS[method]["color"],
        )
    limit = torch.finfo(torch.float16).max
    ax.axhline(limit, color=SOFT, linestyle=":")
    ax.text(12.9, limit * 2, "largest number in float16", ha="right", va="bottom", fontsize=10, color="0.35")
    ax.set(xlabel="matrix product number", ylabel="largest number in the result", xlim=(0.5, 13))
    return fig


# ---- Rounding --------------------------------------------------------------------------------------------
def merged_t(k: Tensor, beta: Tensor, matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
    """T, `[..., L, L]`, merged from the T of its halves: T_21 = -T_22 B_21 T_11.  L is a power of two.

    k: `[..., L, d]`.  beta: `[..., L]`.  The comparison for `scaled_inverse`, which merges N in the same way.

    >>> merged_t(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([1.0, 0.5])).tolist()
    [[1.0, 0.0], [-0.25, 0.5]]
    """
    length = beta.shape[-1]
    if length & (length - 1):
        raise ValueError(f"the number of tokens must be a power of two, got {length}")
    T, size = beta[..., None, None], 1  # a stack of diagonal blocks
    while size < length:
        halves = k.unflatten(-2, (-1, 2, size))
        first, second = T[..., 0::2, :, :], T[..., 1::2, :, :]
        across = -matmul(matmul(second, halves[..., 1, :, :] @ halves[..., 0, :, :].mT), first)
        above = torch.cat([first, torch.zeros_like(first)], dim=-1)
        T, size = torch.cat([above, torch.cat([across, second], dim=-1)], dim=-2), 2 * size
    return T[..., 0, :, :]


def rounding_error(k: Tensor, beta: Tensor, method: str, matmul: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The relative error of T for float32 inputs, against a triangular solve in float64 on the same numbers.

    k: `[..., L, d]`, beta: `[..., L]`; of several chunks, the largest error.  method: one of `ut_transform`, or
    "merged T".

    >>> k, beta = correlated_keys(4, 4, 0.0), torch.ones(4)
    >>> rounding_error(k, beta, "blocked", torch.matmul) < 1e-6
    True
    """
    k, beta = k.float(), beta.float()
    exact = hh.ut_transform(k.double(), beta.double(), method="solve")
    found = (
        merged_t(k, beta, matmul) if method == "merged T" else hh.ut_transform(k, beta, method=method, matmul=matmul)
    )
    difference = torch.linalg.matrix_norm(found.double() - exact)
    return (difference / torch.linalg.matrix_norm(exact)).max().item()


def errors_against_cosine(length: int = 64, strength: float = 1.9) -> Figure:
    """The relative error of T by four methods, in float32 and with operands rounded to float16.

    >>> len(errors_against_cosine(length=8).axes)
    2
    """
    cosines, beta = torch.linspace(0, 1, 11).tolist(), torch.full((length,), strength)
    fig, axes = plotting.figure(columns=2, height=3.4, sharey=True)
    for ax, dtype, title in zip(axes, (torch.float32, torch.float16), ("float32", "float16 operands"), strict=True):
        for method in hh.UT_METHODS:
            style = METHODS[method]
            if method == "solve" and dtype == torch.float16:
                continue  # a library call: there is nothing for us to round
            matmul = hh.rounded_matmul(dtype)
            found = [rounding_error(correlated_keys(length, length, c), beta, method, matmul) for c in cosines]
            finite = [(c, e) for c, e in zip(cosines, found, strict=True) if 0 < e < float("inf")]
            ax.semilogy(*zip(*finite, strict=True), **style, label=NAMES.get(method, method))
        ax.set(title=title, xlabel="mean cosine between keys")
    axes[0].set_ylabel("relative error of $T$")
    axes[0].legend(fontsize=9)
    return fig


def worst_error(
    length: int, method: str, dtype: torch.dtype, strengths: Sequence[float], cosines: Sequence[float]
) -> float:
    """The largest relative error of T over all these betas and cosines, operands rounded to `dtype`.

    >>> 0 < worst_error(8, "blocked", torch.float16, [1.9], [1.0]) < 0.1
    True
    """
    return _worst_error(length, method, dtype, tuple(strengths), tuple(cosines))


@lru_cache  # the figure and the cell below it ask for the same
def _worst_error(
    length: int, method: str, dtype: torch.dtype, strengths: tuple[float, ...], cosines: tuple[float, ...]
) -> float:
    keys = torch.stack([correlated_keys(length, 64, cosine) for cosine in cosines for _ in strengths])
    betas = torch.tensor(strengths * len(cosines))[:, None].expand(-1, length)
    return rounding_error(keys, betas, method, hh.rounded_matmul(dtype))


#: The betas and cosines that `errors_against_length` tries; the worst of them counts.
STRENGTHS = {"beta up to 1": (0.5, 0.8, 0.9, 0.95, 0.99, 1.0), "beta up to 2": (1.5, 1.8, 1.9, 1.95, 1.98, 1.99, 2.0)}
COSINES = (0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)


def errors_against_length(sizes: Sequence[int] = (16, 32, 64, 128, 256)) -> Figure:
    """The worst relative error of T over the betas and cosines above, against the length of the chunk.

    Float16 has filled markers, bfloat16 open ones.

    >>> len(errors_against_length(sizes=(4, 8)).axes)
    2
    """
    fig, axes = plotting.figure(columns=2, height=3.4, sharey=True)
    for ax, (title, strengths) in zip(axes, STRENGTHS.items(), strict=True):
        for dtype, fill in ((torch.bfloat16, "none"), (torch.float16, "full")):
            for method in ("blocked", "merged T", "substitution"):
                found = [worst_error(C, method, dtype, strengths, COSINES) for C in sizes]
                label = NAMES.get(method, method) if fill == "full" else None
                ax.loglog(sizes, found, **METHODS[method], fillstyle=fill, label=label)
        ax.axhline(0.01, color=SOFT, linestyle=":", lw=1)
        ax.set(title=title, xlabel="tokens in a chunk")
        ax.set_xticks(list(sizes), [str(size) for size in sizes], minor=False)
        ax.set_xticks([], minor=True)
    axes[0].set_ylabel("worst relative error of $T$")
    axes[1].text(sizes[-1], 0.0093, "one per cent", fontsize=9, color="0.35", va="top", ha="right")
    axes[0].legend(fontsize=9, loc="upper left")
    return fig
