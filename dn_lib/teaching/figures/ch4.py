"""Chapter 4: chunks in time and in the attention map, the backward pass as a mirror, two processes.

Every function returns the figure that it drew, or draws on the one it is given.  What is drawn is computed here by
`dn_lib`, never typed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms import affine
from dn_lib.forms import chunkwise as cw
from dn_lib.forms import chunkwise_backward as bw
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.linear_attention import softmax_attention
from dn_lib.teaching import plotting
from dn_lib.teaching.registry import relative_error

DELTA = plotting.MECHANISMS["delta"]["color"]
WAITS, AT_ONCE, READS = DELTA, "#56B4E9", "#E69F00"  # what waits for an earlier chunk, and what does not
Point = tuple[float, float]
FORMS = plotting.STYLES[4:8]  # ways to compute one thing are no mechanisms: they take the colours that none has


def _plain(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _arrow(ax: Axes, start: Point, end: Point, **style: Any) -> None:
    options = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0, "lw": 1.5, "color": "black"}
    ax.add_patch(FancyArrowPatch(start, end, **(options | style)))


def _box(
    ax: Axes, x: float, y: float, width: float, text: str, colour: str, height: float = 0.62, size: int = 9
) -> None:
    options = {"boxstyle": "round,pad=0.0,rounding_size=0.08", "fc": colour, "ec": "black", "lw": 0.8, "zorder": 2}
    ax.add_patch(FancyBboxPatch((x, y - height / 2), width, height, **options))
    ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=size, zorder=3)


# ---- Chunks in time --------------------------------------------------------------------------------------
def chunk_schedule(count: int = 4) -> Figure:
    """Left: which pairs of tokens meet inside a chunk, and which through the state.  Right: what waits for what.

    >>> [ax.get_title() for ax in chunk_schedule(3).axes]
    ['who meets whom', 'what runs at once, and what waits']
    """
    fig, (grid, time) = plotting.figure(columns=2, height=3.3, width_ratios=[1, 1.75])
    for c in range(count):
        grid.add_patch(Rectangle((0, c), c, 1, fc=WAITS, alpha=0.3, ec="black", lw=0.8))
        grid.add_patch(Polygon([(c, c), (c, c + 1), (c + 1, c + 1)], fc=AT_ONCE, ec="black", lw=0.8))
        if c > 1:
            words = "through\nthe state" if c < 3 else "through the state"  # as wide as the strip allows
            grid.text(c / 2, c + 0.5, words, ha="center", va="center", fontsize=9)
    grid.set(xlim=(0, count), ylim=(count, 0), aspect="equal", xlabel="keys", ylabel="queries", title="who meets whom")
    ticks = [c + 0.5 for c in range(count)]
    grid.set_xticks(ticks, [f"chunk {c + 1}" for c in range(count)], fontsize=9)
    grid.set_yticks(ticks, [f"chunk {c + 1}" for c in range(count)], fontsize=9, rotation=90, va="center")
    grid.tick_params(length=0)
    for c in range(count):
        y, start = -c, 1.75 + 1.15 * c
        _box(time, 0, y, 1.5, "$T, W, U, P$", AT_ONCE)
        _box(time, start, y, 0.95, r"$\tilde V,\ S'$", WAITS)
        _box(time, 1.75 + 1.15 * count, y, 0.9, "$O$", READS)
        if c:
            _arrow(time, (start - 0.35, y + 0.62), (start + 0.1, y + 0.33))
    time.text(0.75, -count + 0.2, "all chunks\nat once", ha="center", va="top", fontsize=9)
    time.text(1.75 + 0.575 * count, -count + 0.2, "one after another", ha="center", va="top", fontsize=9)
    time.text(2.2 + 1.15 * count, -count + 0.2, "all chunks\nat once", ha="center", va="top", fontsize=9)
    time.set(xlim=(-0.1, 2.85 + 1.15 * count), ylim=(-count - 0.5, 0.6), title="what runs at once, and what waits")
    _plain(time)
    return fig


def _chunk_in_map(ax: Axes, A: Tensor, count: int, width: int, chunk: int) -> float:
    """The map up to this chunk, its square framed and the strip to its left shaded; returns where its rows begin."""
    seen = A.clone()
    seen[(chunk + 1) * width :] = 0
    plotting.matrix(ax, seen, f"chunk {chunk + 1} of {count}").set_clim(-1, 1)
    for edge in range(width, len(A), width):
        ax.axhline(edge - 0.5, color="0.6", lw=0.6, linestyle="-")
        ax.axvline(edge - 0.5, color="0.6", lw=0.6, linestyle="-")
    low = chunk * width - 0.5
    ax.add_patch(Rectangle((-0.5, low), chunk * width, width, fc=WAITS, alpha=0.25, ec=WAITS, lw=2))
    ax.add_patch(Rectangle((low, low), width, width, fill=False, lw=2.5, ec="black"))
    return low


def draw_chunk(fig: Figure, A: Tensor, states: Tensor, width: int, chunk: int) -> None:
    """Chunk number `chunk` (from 0) in the attention map A, and the state that brings it all that came before.

    A: `[L, L]`.  states: the state that enters each chunk, `[n, d_k, d_v]`.

    >>> fig = Figure()
    >>> draw_chunk(fig, torch.eye(6), torch.zeros(3, 2, 2), 2, 1)
    >>> [ax.get_title() for ax in fig.axes]
    ['chunk 2 of 3', 'the state $S$ that enters']
    """
    left, right = fig.subplots(1, 2, width_ratios=[1.25, 1])
    low = _chunk_in_map(left, A, len(states), width, chunk)
    left.set(xlabel="key $j$", ylabel="query $i$")
    plotting.matrix(right, states[chunk], "the state $S$ that enters").set_clim(-3, 3)
    right.set(xlabel="value channel", ylabel="key channel")
    right.yaxis.set_label_position("right")
    if chunk:
        middle = (chunk * width - 0.5, low + width / 2)
        style = {"arrowstyle": "-|>", "mutation_scale": 16, "lw": 2, "color": WAITS, "zorder": 5}
        bend = {"connectionstyle": "arc3,rad=-0.15", "shrinkB": 4}
        ends = {"xyA": (middle[0] / 2, middle[1]), "xyB": (-0.5, (states.shape[1] - 1) / 2)}
        fig.add_artist(
            ConnectionPatch(coordsA="data", coordsB="data", axesA=left, axesB=right, **ends, **style, **bend)
        )


def draw_chunk_strip(fig: Figure, A: Tensor, states: Tensor, width: int, chunks: Sequence[int]) -> None:
    """The same as a strip of stills, which is what print gets: map above, state below, one column for each chunk.

    >>> fig = Figure()
    >>> draw_chunk_strip(fig, torch.eye(6), torch.zeros(3, 2, 2), 2, [0, 2])
    >>> [ax.get_title() for ax in fig.axes]
    ['chunk 1 of 3', 'chunk 3 of 3', 'enters chunk 1', 'enters chunk 3']
    """
    maps, below = fig.subplots(2, len(chunks), height_ratios=[1.6, 1])
    for ax, state, chunk in zip(maps, below, chunks, strict=True):
        _chunk_in_map(ax, A, len(states), width, chunk)
        plotting.matrix(state, states[chunk], f"enters chunk {chunk + 1}").set_clim(-3, 3)
        for one in (ax, state):
            one.set(xticks=[], yticks=[])
            one.title.set_fontsize(10)


# ---- Attention maps --------------------------------------------------------------------------------------
def chunk_animation(length: int = 48, chunk_size: int = 8, seed: int = 0) -> Any:
    """The chunks of a random sequence one after the other, with the state that enters each; d = `chunk_size`.

    Where nothing moves, three of the steps stand side by side.
    """
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, length, chunk_size, generator=g, dtype=torch.float64)
    k, beta = normalize(k + 0.5, dim=-1), torch.rand(length, generator=g, dtype=torch.float64)
    A = cw.delta_attention_matrix(k.roll(1, 0), k, beta, scale=1.0)
    count = length // chunk_size
    k, v, beta = (x.unflatten(0, (count, chunk_size)) for x in (k, v, beta))
    states, _, _ = cw.chunk_states(k, v, beta, torch.zeros(chunk_size, chunk_size, dtype=torch.float64))
    shown = sorted({min(1, count - 1), count // 2, count - 1})
    return plotting.animation(
        lambda fig, i: draw_chunk(fig, A, states, chunk_size, i),
        range(count),
        fps=1.5,
        height=3.6,
        still=lambda fig: draw_chunk_strip(fig, A, states, chunk_size, shown),
    )


def letter_maps(stored: str, asked: str, beta: float, d: int = 32, seed: int = 3) -> dict[str, Tensor]:
    """The maps of softmax, linear attention and the delta rule, `[L, L]`, where token t stores and asks for a letter.

    Each letter has a random unit key of d entries.  The scale is 8 for softmax, so that it tells letters apart, else 1.
    """
    g = torch.Generator().manual_seed(seed)
    letters = {name: normalize(torch.randn(d, generator=g, dtype=torch.float64), dim=0) for name in sorted({*stored})}
    k, q = (torch.stack([letters[name] for name in word]) for word in (stored, asked))
    L = len(stored)
    eye, strength = torch.eye(L, dtype=torch.float64), torch.full((L,), beta, dtype=torch.float64)
    return {
        "softmax": softmax_attention(q, k, eye, scale=8.0),
        "linear": (q @ k.T).tril(),
        "delta rule": cw.delta_attention_matrix(q, k, strength, scale=1.0),
    }


def three_maps(maps: dict[str, Tensor], stored: str, asked: str) -> Figure:
    """Attention maps side by side, on one colour scale, with a letter for each key and each query.

    >>> len(three_maps({"one": torch.eye(2), "two": torch.eye(2)}, "ab", "ab").axes)
    3
    """
    fig, axes = plotting.figure(columns=len(maps), height=3.6)
    for ax, (name, picture) in zip(axes, maps.items(), strict=True):
        plotting.matrix(ax, picture, name).set_clim(-1, 1)
        ax.set_xticks(range(len(stored)), stored, fontsize=9)
        ax.set_yticks(range(len(asked)), asked if ax is axes[0] else [""] * len(asked), fontsize=9)
        ax.set_xlabel("stored")
    axes[0].set_ylabel("asked for")
    # Below, so that the letters have room on either side.
    fig.colorbar(axes[0].images[0], ax=axes, location="bottom", shrink=0.4, aspect=30)
    return fig


def random_maps(draws: int, length: int = 64, d: int = 16, beta: float = 0.8) -> dict[str, Tensor]:
    """Maps `[draws, length, length]` of the three mechanisms on random unit queries and keys.

    >>> {name: tuple(A.shape) for name, A in random_maps(2, length=4).items()}
    {'softmax': (2, 4, 4), 'linear': (2, 4, 4), 'delta': (2, 4, 4)}
    """
    generator = torch.Generator().manual_seed(0)
    q, k = normalize(torch.randn(2, draws, length, d, generator=generator, dtype=torch.float64), dim=-1)
    values = torch.eye(length, dtype=torch.float64).expand(draws, -1, -1)
    betas = torch.full((draws, length), beta, dtype=torch.float64)
    return {
        "softmax": softmax_attention(q, k, values, scale=d**0.5),
        "linear": (q @ k.mT).tril(),
        "delta": cw.delta_attention_matrix(q, k, betas, scale=1.0),
    }


def expected_spread(length: int, d: int, beta: float) -> dict[str, Tensor]:
    """The standard deviation of each row sum for random unit queries and keys, as the chapter derives it, `[length]`.

    With all values 1 the state is one column s.  The query is independent of it, so the variance of a row sum is
    E |s|^2 / d; a write multiplies E |s|^2 by 1 - beta (2 - beta) / d, and adds beta^2.

    >>> {name: round(spread[-1].item(), 2) for name, spread in expected_spread(64, 16, 0.8).items()}
    {'linear': 2.0, 'delta': 0.81}
    """
    rows, left = torch.arange(1, length + 1, dtype=torch.float64), 1 - beta * (2 - beta) / d
    return {"linear": (rows / d).sqrt(), "delta": (beta**2 * (1 - left**rows) / (1 - left) / d).sqrt()}


def row_sums(maps: dict[str, Tensor], expected: dict[str, Tensor] | None = None) -> Figure:
    """How far row sums spread over the draws, and a histogram of the entries below the diagonal.

    expected: curves of the spread for comparison, drawn thin and grey.

    >>> len(row_sums(random_maps(3, length=8)).axes)
    2
    """
    fig, (left, right) = plotting.figure(columns=2, height=3.1)
    for name, A in maps.items():
        style, length = plotting.MECHANISMS[name], A.shape[-1]
        left.plot(range(1, length + 1), A.sum(-1).std(0), **style, markevery=length // 8, label=name)
        rows, columns = torch.tril_indices(length, length, -1)
        below, line = A[:, rows, columns].flatten(), {"color": style["color"], "linestyle": style["linestyle"]}
        options = {"bins": 60, "range": (-1.0, 1.0), "density": True, "histtype": "step", "lw": 1.8}
        right.hist(below.numpy(), **options, **line)
    for spread in (expected or {}).values():
        left.plot(range(1, len(spread) + 1), spread, color="0.35", linestyle="-", lw=0.9, zorder=1)
    left.set(xlabel="row $i$", ylabel="spread of the row sum")
    right.set(xlabel="entry below the diagonal", ylabel="density", yscale="log")
    left.legend(fontsize=9)
    return fig


# ---- Costs -----------------------------------------------------------------------------------------------
def work_steps_time(
    sizes: Sequence[int], work: Sequence[float], steps: Sequence[float], times: Sequence[float], device: str
) -> Figure:
    """Three panels against the chunk size: multiply-adds per token, sequential steps, and measured milliseconds.

    >>> len(work_steps_time([2, 4], [1, 2], [2, 1], [3.0, 2.0], "cpu").axes)
    3
    """
    fig, axes = plotting.figure(columns=3, height=2.9)
    panels = {"multiply-adds per token": work, "steps in a row": steps, f"milliseconds ({device})": times}
    for ax, style, (title, values) in zip(axes, FORMS, panels.items(), strict=False):
        ax.loglog(sizes, values, **style)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("chunk size $C$")
        ax.set_xticks(list(sizes[::2]), [str(size) for size in sizes[::2]], minor=False)
        ax.set_xticks([], minor=True)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    return fig


def undone(inputs: tuple[Tensor, Tensor, Tensor], chunk_size: int) -> tuple[list[int], list[float]]:
    """Go through k, v, beta in chunks from the state zero, then walk the state back by subtracting what was written.

    k, v: `[L, d]`, beta: `[L]`.  Returns how many tokens were undone at each chunk, and the relative error of the state
    that was recovered there.

    >>> k, v = torch.eye(4), torch.ones(4, 2)
    >>> undone((k, v, torch.ones(4)), 2)
    ([2], [0.0])
    """
    k, v, beta = (x.unflatten(0, (-1, chunk_size)) for x in inputs)
    states, pseudo, back = cw.chunk_states(k, v, beta, k.new_zeros(k.shape[-1], v.shape[-1]))
    tokens, errors = [], []
    for i in reversed(range(1, len(k))):
        back = back - k[i].mT @ pseudo[i]  # eq-reversible-state
        tokens.append((len(k) - i) * chunk_size)
        errors.append(relative_error(back, states[i]))
    return tokens, errors


def inverted(inputs: tuple[Tensor, Tensor, Tensor], count: int) -> tuple[list[int], list[float]]:
    """The same by inverting H_t for the last `count` tokens, read off every four tokens."""
    k, v, beta = inputs
    length, tokens, errors = len(k), [], []
    start = recurrent_delta_rule(*(x[: length - count] for x in (k, k, v, beta)))[1]
    back = recurrent_delta_rule(*(x[length - count :] for x in (k, k, v, beta)), initial_state=start)[1]
    for t in reversed(range(length - count, length)):
        back = back - beta[t] * torch.outer(k[t], v[t])
        back = back + beta[t] / (1 - beta[t]) * torch.outer(k[t], k[t] @ back)  # the inverse of H_t
        if t % 4 == 0:
            before = (x[length - count : t] for x in (k, k, v, beta))
            tokens.append(length - t)
            errors.append(relative_error(back, recurrent_delta_rule(*before, initial_state=start)[1]))
    return tokens, errors


def recovered_states(
    length: int = 4096, d: int = 32, chunk_size: int = 64, growth: float = 1e3
) -> tuple[Figure, dict[str, float]]:
    """Earlier states recovered in float32, by subtracting what was written and by inverting each H.

    The subtraction is shown for values of one size, and where the second half of the values is `growth` times larger.
    Returns the figure, and the largest relative error of each of the two.

    >>> recovered_states(512, 8, 16)[1]["values of one size"] < 1e-5
    True
    """
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, length, d, generator=generator, dtype=torch.float32)
    k, beta = normalize(k, dim=-1), 2 * torch.rand(length, generator=generator, dtype=torch.float32)
    later = torch.cat([v[: length // 2], growth * v[length // 2 :]])
    fig, ax = plotting.figure(height=3.0)
    curves = {
        "values of one size": undone((k, v, beta), chunk_size),
        f"second half {growth:,.0f} times larger": undone((k, later, beta), chunk_size),
    }
    for (name, (tokens, errors)), style in zip(curves.items(), (FORMS[0], FORMS[2]), strict=True):
        ax.loglog(tokens, errors, **style, markevery=4, label=f"subtract: {name}")
    ax.loglog(*inverted((k, v, beta), 128), **FORMS[1], markevery=4, label="invert $H_t$")
    ax.set(xlabel="tokens undone", ylabel="relative error of the state", ylim=(1e-8, 1e2))
    ax.legend(fontsize=9, loc="upper right")
    return fig, {name: max(errors) for name, (_, errors) in curves.items()}


def kept_bytes(forms: dict[str, Callable[..., Any]], lengths: Sequence[int], d: int = 64) -> tuple[Figure, dict]:
    """What autograd keeps for the backward pass of each form; returns the figure and {name: bytes for each length}.

    >>> fig, kept = kept_bytes({"recurrence": recurrent_delta_rule}, [8, 16], d=4)
    >>> kept["recurrence"][0] < kept["recurrence"][1]
    True
    """
    kept: dict[str, list[int]] = {name: [] for name in forms}
    for n in lengths:
        shapes = ((n, d), (n, d), (n, d), (n,))
        x = [torch.rand(*shape, dtype=torch.float32).div(8).requires_grad_() for shape in shapes]
        for name, form in forms.items():
            kept[name].append(cw.saved_bytes(form, *x))
    fig, ax = plotting.figure(height=3.2)
    for (name, values), style in zip(kept.items(), FORMS, strict=False):
        ax.loglog(lengths, [value / 2**20 for value in values], **style, label=name)
    ax.set(xlabel="sequence length $L$", ylabel="MiB kept")
    ax.set_xticks(list(lengths), [str(n) for n in lengths], minor=False)
    ax.set_xticks([], minor=True)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig, kept


# ---- Forward and backward as one drawing -----------------------------------------------------------------
PLACES = {
    "S": (0.0, 0.0), "V": (0.0, 1.25), "R": (1.5, 1.25), "E": (3.0, 1.25), "pseudo": (4.5, 1.25), "S'": (6.2, 0.0),
    "O": (6.2, 1.25),
}  # fmt: skip
FORWARD = {
    "S": "$S$", "V": "$V$", "R": "$R$", "E": "$E$", "pseudo": r"$\tilde V$", "S'": "$S'$", "O": "$O$"
}  # fmt: skip
BACKWARD = {
    "S": "$dS$", "V": "$dV$", "R": "$dR$", "E": "$D F$", "pseudo": "$F$", "S'": "$dS'$", "O": "$dO$"
}  # fmt: skip
# from, to, factor forward, factor backward, bend of the arrow, where the label stands along it
EDGES = [
    ("S", "R", "$-K$", r"$-K^\top$", 0.0, 0.5),
    ("V", "R", "$I$", "$I$", 0.0, 0.5),
    ("R", "E", "$I + ND$", r"$I + DN^\top$", 0.0, 0.5),
    ("E", "pseudo", "$D$", "$D$", 0.0, 0.5),
    ("pseudo", "O", "$P$", r"$P^\top$", 0.0, 0.5),
    ("pseudo", "S'", r"$K^\top$", "$K$", 0.0, 0.5),
    ("S", "S'", "$I$", "$I$", 0.0, 0.5),
    ("S", "O", "$Q$", r"$Q^\top$", 0.38, 0.0),
]


def mirror() -> Figure:
    """One chunk forward, and below it the same drawing with every arrow turned: the backward pass.

    >>> [ax.get_title(loc="left") for ax in mirror().axes]
    ['forward: each node is the sum of what its arrows bring', 'backward: arrows turned, matrices transposed']
    """
    fig, axes = plotting.figure(rows=2, height=5.2)
    titles = ("forward: each node is the sum of what its arrows bring", "backward: arrows turned, matrices transposed")
    for ax, names, turned, title in zip(axes, (FORWARD, BACKWARD), (False, True), titles, strict=True):
        colour = plotting.COLOURS[7] if turned else DELTA
        for a, b, forward, backward, bend, place in EDGES:
            start, end = (PLACES[b], PLACES[a]) if turned else (PLACES[a], PLACES[b])
            style = {"connectionstyle": f"arc3,rad={-bend if turned else bend}", "shrinkA": 15, "shrinkB": 15}
            _arrow(ax, start, end, color="black" if turned else colour, **style)
            middle = [PLACES[a][i] + 0.5 * (PLACES[b][i] - PLACES[a][i]) for i in (0, 1)]
            box = {"fc": "white", "ec": "none", "pad": 1.5} if place else None
            middle = middle if place else [3.1, -0.5]
            ax.text(*middle, backward if turned else forward, ha="center", va="center", fontsize=10, bbox=box)
        given = {"O", "S'"} if turned else {"S", "V"}
        for key, (x, y) in PLACES.items():
            ax.plot(x, y, "o", markersize=25, mfc="0.88" if key in given else "white", mec="black", zorder=3)
            ax.text(x, y, names[key], ha="center", va="center", fontsize=11, zorder=4)
        ax.set_title(title, loc="left", fontsize=11)
        ax.set(xlim=(-0.5, 6.7), ylim=(-0.95, 1.7))
        _plain(ax)
    return fig


# ---- Two processes ---------------------------------------------------------------------------------------
def segment_costs(length: int = 1024, d: int = 64, chunk_size: int = 64) -> dict[str, int]:
    """Multiply-adds of the four walks over a stretch of `length` tokens, counted while they run.

    >>> costs = segment_costs(64, 8, 16)
    >>> costs["affine"] < costs["backward"]
    True
    """
    q, k, v, do = torch.randn(4, length, d, generator=torch.Generator().manual_seed(0))
    k, beta, S = normalize(k, dim=-1), torch.full((length,), 0.5), torch.zeros(d, d)
    C = {"chunk_size": chunk_size}
    return {
        "affine": cw.multiply_adds(affine.segment_affine, k, v, beta, **C),
        "forward": cw.multiply_adds(bw.chunkwise_forward_with_errors, q, k, v, beta, S, **C),
        "gradient": cw.multiply_adds(affine.segment_state_gradient, q, k, beta, do, S, **C),
        "backward": cw.multiply_adds(bw.chunkwise_delta_rule_backward, q, k, beta, v, S, do, S, **C),
    }


def two_processes(costs: dict[str, int]) -> Figure:
    """The exchange between two processes as a timeline; boxes are as wide as the work that `costs` counts.

    >>> len(two_processes(segment_costs(64, 8, 16)).axes)
    1
    """
    fig, ax = plotting.figure(height=2.9)
    unit = 10.0 / sum(costs.values())
    gather, gap = 0.95, 0.12
    spans, x = {}, 0.0
    for name in ("affine", "forward", "gradient", "backward"):
        spans[name] = (x, costs[name] * unit)
        x += costs[name] * unit + gap + (gather if name in ("affine", "gradient") else 0.45)
    texts = {
        "affine": ("$M_0, S_1$\n(from $S_0$)", "$M_1, X_1$"),
        "forward": ("$O_0$ from $S_0$", "$O_1$ from $S_1$"),
        "gradient": ("$Y_0$", "$dS'_0$\n(from $dS'_1$)"),
        "backward": ("gradients from $dS'_0$", "gradients from $dS'_1$"),
    }
    colours = {"affine": WAITS, "forward": AT_ONCE, "gradient": WAITS, "backward": AT_ONCE}
    for name, (start, width) in spans.items():
        for process in (0, 1):
            _box(ax, start, -process, width, texts[name][process], colours[name], height=0.66, size=9)
    for before, label in (("affine", "$S_1$"), ("gradient", "$dS'_0$")):
        start = sum(spans[before]) + gap / 2
        ax.add_patch(Rectangle((start, -1.42), gather, 1.82, fc="0.9", ec="0.5", lw=0.8))
        ax.text(start + gather / 2, -1.36, "all-\ngather", ha="center", va="bottom", fontsize=9)
        down = before == "affine"
        a, b = (0, -1) if down else (-1, 0)
        _arrow(ax, (start, 0.7 * a), (start + gather, 0.7 * b), color=DELTA, lw=2)
        ax.text(start + gather / 2, 0.5, label, ha="center", va="bottom", fontsize=9, color=DELTA)
    loss = sum(spans["forward"]) + gap / 2 + 0.22
    ax.plot([loss, loss], [-1.5, 0.75], color="0.55", linestyle=":")
    ax.text(loss, 0.85, "loss", ha="center", fontsize=9)
    for process in (0, 1):
        ax.text(-0.15, -process, f"process {process}", ha="right", va="center", fontsize=9)
    _arrow(ax, (0, -1.75), (x, -1.75), lw=1)
    ax.text(x / 2, -1.82, "time, if it is proportional to the work counted", ha="center", va="top", fontsize=9)
    ax.set(xlim=(-1.4, x + 0.1), ylim=(-2.2, 1.1))
    _plain(ax)
    return fig
