"""The figures of chapter 2."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from dn_lib.forms.delta_rule import delta_rule_step, recurrent_delta_rule
from dn_lib.forms.linear_attention import linear_attention_step, recurrent_linear_attention
from dn_lib.teaching import plotting
from dn_lib.teaching.figures.ch1 import GREY, capacity_axes
from dn_lib.teaching.plotting import MECHANISMS, OTHERS
from dn_lib.teaching.results import origin
from dn_lib.teaching.tables import Table

NAMES = {"linear": "linear attention", "delta": "delta rule", "gated": "gated delta rule"}

# --- Letters under five keys -----------------------------------------------------------------------------
LETTERS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "G": "01110 10001 10000 10111 10001 10001 01110",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "T": "11111 00100 00100 00100 00100 00100 00100",
}


def word(letters: str) -> Tensor:
    """The letters as pictures of 7 by 5 pixels, ink 1 and paper 0: `[len(letters), 35]`, float64.

    >>> word("LE").shape
    torch.Size([2, 35])
    """
    rows = [LETTERS[c].replace(" ", "") for c in letters]
    return torch.tensor([[float(bit) for bit in row] for row in rows], dtype=torch.float64)


def word_keys(seed: int = 0) -> Tensor:
    """Five random unit keys in 64 dimensions, `[5, 64]`, float64."""
    keys = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return keys / keys.norm(dim=-1, keepdim=True)


def draw_memories(fig: Figure, first: str, second: str, count: int) -> None:
    """What two memories answer for five keys after `count` writes: `first`, then `second` under the same keys.

    Rows: what was last written, the additive memory, the delta memory.  The key just written is framed.
    """
    keys, values = word_keys().repeat(2, 1)[:count], word(first + second)[:count]
    truth = torch.zeros(5, 35, dtype=torch.float64)
    for n in range(count):
        truth[n % 5] = values[n]  # a key that occurs twice keeps the later letter
    additive = recurrent_linear_attention(keys, keys, values)[1]
    delta = recurrent_delta_rule(keys, keys, values, torch.ones(count, dtype=torch.float64))[1]
    pictures = torch.stack([truth, word_keys() @ additive, word_keys() @ delta]).reshape(3, 5, 7, 5)
    ax = fig.add_subplot()
    ax.imshow(pad(pictures, (2, 2, 1, 1)).permute(0, 2, 1, 3).reshape(27, 45), cmap="gray_r", vmin=0, vmax=1.6)
    if count:
        corner = (9 * ((count - 1) % 5), -0.3)
        ax.add_patch(Rectangle(corner, 8, 26.6, fill=False, ec="0.35", lw=2))
    ax.set(xticks=[], yticks=(4, 13, 22))
    labels = ax.set_yticklabels(("written", "adds", "delta rule"))
    labels[1].set_color(MECHANISMS["linear"]["color"])
    labels[2].set_color(MECHANISMS["delta"]["color"])
    ax.grid(False)
    letter = (first + second)[count - 1]
    title = f"write {count}: {letter} under key {(count - 1) % 5 + 1}" if count else "nothing stored"
    ax.set_title(title, fontsize=11)


def memories_animation(first: str = "DELTA", second: str = "GAMMA") -> Any:
    """The memories of `draw_memories` after each of ten writes."""
    frames = [*range(11), 10]
    return plotting.animation(lambda fig, n: draw_memories(fig, first, second, n), frames, fps=1.3, height=3.6)


def memories(first: str = "DELTA", second: str = "GAMMA") -> Figure:
    """The memories of `draw_memories` after all ten writes."""
    fig, ax = plotting.figure(height=3.6)
    ax.remove()
    draw_memories(fig, first, second, 10)
    return fig


# --- One step of descent ---------------------------------------------------------------------------------
def descent(k: Tensor, v: Tensor, paths: Mapping[str, Sequence[Tensor]]) -> Figure:
    """The states of each path, `[2, 1]` for d_k = 2 and d_v = 1, over the loss that its rule descends."""
    a, b = torch.meshgrid(torch.linspace(-1.2, 2.4, 60), torch.linspace(-0.8, 2.0, 60), indexing="xy")
    answer = k[0] * a + k[1] * b
    losses = {"linear": -answer * v, "delta": 0.5 * (answer - v) ** 2}
    formulas = {"linear": r"$-\langle S^\top k, v\rangle$", "delta": r"$|S^\top k - v|^2/2$"}
    fig, axes = plotting.figure(columns=2, height=3.3, sharey=True)
    for ax, (name, path) in zip(axes, paths.items(), strict=True):
        ax.contour(a, b, losses[name], levels=12, cmap="cividis", linewidths=0.8)
        line = torch.linspace(-1.2, 2.4, 2)
        ax.plot(line, (v - k[0] * line) / k[1], color="black", linewidth=1.2, label=r"$S^\top k = v$")
        states = torch.cat(list(path), dim=1)
        ax.plot(states[0], states[1], **MECHANISMS[name], label="states")
        ax.set(title=f"{NAMES[name]}: {formulas[name]}", xlabel="$S_{11}$", xlim=(-1.2, 2.4), ylim=(-0.8, 2.0))
        ax.title.set_fontsize(10.5)
        ax.legend(loc="upper right" if name == "delta" else "lower right", framealpha=0.9, frameon=True, fontsize=9)
    axes[0].set_ylabel("$S_{21}$")
    return fig


# --- The matrix I - beta k k^T ---------------------------------------------------------------------------
def circle_images(k: Tensor, beta: float, count: int = 120) -> tuple[Tensor, Tensor]:
    """Points on the unit circle and where I - beta k k^T takes them, `[count, 2]` each; k `[2]`.

    >>> before, after = circle_images(torch.tensor([0.6, 0.8]), 1.0)
    >>> bool((after @ torch.tensor([0.6, 0.8])).abs().max() < 1e-6)  # nothing is left along k
    True
    """
    angle = torch.linspace(0, 2 * torch.pi, count)
    points = torch.stack([angle.cos(), angle.sin()], dim=1).to(k)
    # Writing the value 0 under k is the matrix; each column of the state is a point.
    zero = torch.zeros(count, dtype=k.dtype)
    return points, delta_rule_step(k, k, zero, torch.tensor(beta, dtype=k.dtype), points.mT)[1].mT


def _draw_circle(ax: Axes, k: Tensor, beta: float, title: str) -> None:
    points, images = circle_images(k, beta)
    ax.plot(*points.mT, color="0.75", linestyle="-", linewidth=1.2)
    mirror = torch.stack([-1.35 * k[1], 1.35 * k[0]])
    ax.plot(*torch.stack([mirror, -mirror]).mT, color="0.6", linestyle="-", linewidth=0.8)
    ax.plot(*images.mT, color=MECHANISMS["delta"]["color"], linestyle="-", linewidth=2)
    for n in range(4, len(points), 15):
        if (images[n] - points[n]).norm() > 0.05:
            style = {"arrowstyle": "->", "color": "0.5", "lw": 0.7}
            (x, y), (from_x, from_y) = images[n].tolist(), points[n].tolist()
            ax.annotate("", (x, y), (from_x, from_y), arrowprops=style)
    x, y = k.tolist()
    ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.4})
    ax.text(1.22 * x, 1.22 * y, "k", ha="center", va="center", fontsize=10)
    ax.set(title=title, xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal", xticks=[], yticks=[])
    ax.title.set_fontsize(10)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def stability(norms: Mapping[str, Sequence[float]]) -> Figure:
    """Above: the unit circle under I - beta k k^T for four values of beta. Below: the state's norm, token by token."""
    fig = plotting.figure(height=5.2)[0]
    fig.clear()
    parts: Any = fig.subfigures(2, 1, height_ratios=[1.1, 1.5])
    top, bottom = parts
    cases = {0.0: "nothing", 0.5: "shrinks", 1.0: "projects", 2.0: "reflects"}
    k = torch.tensor([0.8, 0.6], dtype=torch.float64)
    for ax, (beta, what) in zip(top.subplots(1, 4), cases.items(), strict=True):
        _draw_circle(ax, k, beta, f"$\\beta = {beta:g}$: {what}")
    ax = bottom.subplots()
    styles = [style | {"color": grey} for style, grey in zip(OTHERS, ("0.65", "0.45", "0.0"), strict=True)]
    for style, (name, series) in zip([*styles, MECHANISMS["delta"]], norms.items(), strict=True):
        ax.semilogy(range(1, len(series) + 1), series, **style, markevery=10, label=name)
    ax.set(xlabel="token", ylabel="$\\|S_t\\|$", ylim=(0.5, 1e13))
    ax.legend(fontsize=9, loc="upper left")
    return fig


# --- Two keys that overlap -------------------------------------------------------------------------------
def two_tokens(k: Tensor, v: Tensor) -> Figure:
    """Two writes by both rules, with all numbers: the states after each, and what they answer for both keys.

    k `[2, d_k]`, v `[2, d_v]`; beta is 1 and the first state empty.
    """
    one = torch.tensor(1.0, dtype=k.dtype)
    steps = {
        "linear": lambda t, S: linear_attention_step(k[t], k[t], v[t], S)[1],
        "delta": lambda t, S: delta_rule_step(k[t], k[t], v[t], one, S)[1],
    }
    limit = 1.3 * float(v.abs().max())
    fig, axes = plotting.figure(rows=2, columns=4, height=3.7, width_ratios=[1, 1, 1, 1])
    for row, (rule, step) in zip(axes, steps.items(), strict=True):
        states = [torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype)]
        for t in range(2):
            states.append(step(t, states[-1]))
        wanted = "answers wanted, $V$"
        panels = {"$S_1$": states[1], "$S_2$": states[2], "answers, $K S_2$": k @ states[2], wanted: v}
        for ax, (name, numbers) in zip(row, panels.items(), strict=True):
            plotting.matrix(ax, numbers.round(decimals=6) + 0.0, values=True, limit=limit)
            ax.set(xticks=[], yticks=[])
            if rule == "linear":
                ax.set_title(name, fontsize=10)
        for ax in row[2:]:
            ax.set_yticks([0, 1], ["$k_1$", "$k_2$"])
        row[0].set_ylabel(NAMES[rule], color=MECHANISMS[rule]["color"])
    return fig


# --- Convergence -----------------------------------------------------------------------------------------
def convergence(measured: Mapping[float, tuple[Tensor, Tensor, Tensor, Tensor]]) -> Figure:
    """Squared distance to the solution against sweeps: for each cosine (fixed order, random order, rate, bound)."""
    fig, (left, right) = plotting.figure(columns=2, height=3.4, sharey=True)
    for style, (cosine, (fixed, random, rate, bound)) in zip(OTHERS, measured.items(), strict=True):
        x, line, marker = torch.arange(len(fixed)), style | {"marker": ""}, style | {"linestyle": ""}
        left.semilogy(x, fixed[10] * rate ** (x - 10), **line)
        left.semilogy(x[::3], fixed[::3], **marker, label=f"cosine {cosine}")
        right.semilogy(x, bound, **line)
        right.semilogy(x[::3], random[::3], **marker, label=f"cosine {cosine}")
    left.set(xlabel="sweeps", ylabel="$\\|\\Delta\\|^2$, relative", ylim=(1e-7, 50), title="fixed order")
    right.set(xlabel="sweeps' worth of writes", title="random order")
    right.legend(ncols=3, loc="upper center", fontsize=9, handlelength=1, columnspacing=1)
    return fig


def capacity_after_sweeps(counts: Sequence[int], errors: Sequence[Mapping[str | int, float]], d: int) -> Figure:
    """Recall error against stored pairs on the axes of chapter 1, with the delta rule after some numbers of sweeps.

    errors: for each of `counts`, what `ch2_measured.recall_errors` returns, after three numbers of sweeps.
    """
    fig, ax = plotting.figure(height=3.9)
    capacity_axes(ax, d)
    curves = {name: [found[name] for found in errors] for name in errors[0]}
    ax.plot(counts, curves["added"], **MECHANISMS["linear"], label="added up, $S = K^\\top V$")
    swept = {name: curve for name, curve in curves.items() if isinstance(name, int)}
    for width, (sweeps, curve) in zip((2.6, 1.8, 1.1), swept.items(), strict=True):
        name = "one sweep" if sweeps == 1 else f"{sweeps} sweeps"
        ax.plot(counts, curve, **MECHANISMS["delta"] | {"linewidth": width}, label=f"delta rule, {name}")
    ax.plot(counts, curves["best"], **MECHANISMS["ideal"], label="least squares: the best state")
    # Names where there is room for them: at which point of a curve, and where the text stands.
    places = (
        (-3, (1.6 * d, 1.15)),
        (list(counts).index(d), (0.68 * d, 0.24)),
        (list(counts).index(d), (1.3 * d, 0.06)),
    )
    for (sweeps, curve), (point, text) in zip(swept.items(), places, strict=True):
        name = "one sweep" if sweeps == 1 else f"{sweeps} sweeps"
        arrow = {"arrowstyle": "-", "color": "0.5", "lw": 0.8}
        ax.annotate(name, (counts[point], curve[point]), text, fontsize=9, ha="center", arrowprops=arrow)
    ax.legend(loc="upper left", fontsize=9)
    return fig


# --- Trained models --------------------------------------------------------------------------------------
def recall(histories: Mapping[tuple[str, str], Sequence[float]], mistakes: Mapping[str, Tensor]) -> Figure:
    """Left: accuracy against step for each (task, rule). Right: for each rule, mistakes by position of the pair."""
    fig, (left, right) = plotting.figure(columns=2, height=3.4)
    lines: dict[str, Any] = {"MQAR": "-", "updates": ":"}
    for (task, rule), history in histories.items():
        curve = torch.tensor(history).reshape(-1, 10).mean(1)
        style = MECHANISMS[rule] | {"linestyle": lines[task]}
        left.plot(torch.arange(10, 10 * len(curve) + 1, 10), curve, **style, markevery=5)
    for rule, wrong in mistakes.items():
        right.plot(range(1, len(wrong) + 1), 100 * wrong, **MECHANISMS[rule], label=NAMES[rule])
    left.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.03))
    # Colours and markers are the rules', as on the right; here only the lines of the tasks need a name.
    left.legend([Line2D([], [], color="0.3", linestyle=line) for line in lines.values()], lines, loc="lower right")
    right.set(xlabel="position of the pair", ylabel="wrong answers (%)", ylim=(0, 16), xticks=(1, 4, 8, 12))
    right.legend(loc="upper right")
    return fig


def mqar_record(folder: Path | None = None) -> dict[str, Any] | None:
    """The stored measurement of multi-query associative recall, or None where this copy has none.

    folder: where to look for `book/results/mqar.json`, upwards; by default the working directory, then this file's.
    """
    starts = [start.resolve() for start in ([folder] if folder else [Path.cwd(), Path(__file__).parent])]
    places = [place / "book/results/mqar.json" for start in starts for place in (start, *start.parents)]
    return next((json.loads(place.read_text("utf-8")) for place in places if place.exists()), None)


def mqar_table(record: dict[str, Any] | None) -> Table:
    """The measurement: accuracy and steps of every cell, what long runs gained last, and where it was measured.

    >>> mqar_table(None)
    this copy of the book holds no measurement
    """
    head = ("model", "width", "accuracy of each seed (%)", "steps taken", "gain in the last quarter")
    if record is None:
        return Table(head, [], empty="this copy of the book holds no measurement")
    rows = []
    for row in record["results"]:
        gained = [
            _gained_last(run)
            for run in record.get("rows", [])
            if all(run.get(key) == row.get(key) for key in ("model", "width", "learning_rate"))
        ]
        accuracy = " ".join(f"{100 * a:.1f}" for a in row["accuracy"])
        steps = " ".join(str(n) for n in row["steps"])
        rows.append((row["model"], str(row["width"]), accuracy, steps, " ".join(filter(None, gained))))
    meaning = "gain: of accuracy while training, in per cent, of the runs that took all their steps"
    return Table(head, rows, notes=[meaning, origin(mqar=record)])


def _gained_last(run: dict[str, Any]) -> str:
    """The accuracy gained in the last quarter of a run's steps, in per cent; nothing for a run that was ended early."""
    steps, curve = run["training"]["steps"], run["curve"]
    if run["steps_taken"] < steps:
        return ""
    then = next(n for n, step in enumerate(curve["steps"]) if step >= 0.75 * steps)
    return f"{100 * (curve['accuracy'][-1] - curve['accuracy'][then]):+.1f}"


MODEL_STYLES = {
    "DeltaNet": MECHANISMS["delta"],
    "linear attention": MECHANISMS["linear"],
    "softmax attention": MECHANISMS["softmax"],
    "GLA": OTHERS[0],
    "RetNet": OTHERS[1],
    "Mamba": OTHERS[2],
}


def mqar(record: dict[str, Any] | None) -> Figure:
    """Accuracy against width: our measurement (left), and what the paper's figure shows (right)."""
    fig, (left, right) = plotting.figure(columns=2, height=3.6, sharey=True)
    paper = record["settings"]["paper"] if record else {"widths": [], "accuracy": {}}
    if record is None:
        left.text(0.5, 0.5, "no measurement in this copy", ha="center", transform=left.transAxes)
    for name, style in MODEL_STYLES.items():
        rows = [row for row in record["results"] if row["model"] == name] if record else []
        if rows:
            means = [100 * sum(row["accuracy"]) / len(row["accuracy"]) for row in rows]
            left.plot([row["width"] for row in rows], means, **style, label=name)
        if name in paper["accuracy"]:
            right.plot(paper["widths"], paper["accuracy"][name], **style, label="" if rows else name)
    widths = [64, 128, 256, 512]
    for ax, title in ((left, "measured here"), (right, "read off the paper's figure")):
        ax.set_xscale("log", base=2)
        ax.set(xlabel="width", xticks=widths, xticklabels=widths, xlim=(56, 585), ylim=(-3, 104), title=title)
    left.set_ylabel("accuracy (%)")
    if record:
        fig.legend(ncols=3, fontsize=9, loc="outside lower center")
    return fig


def parity(curves: Mapping[float, Tensor], trained_on: int, others: Sequence[Tensor] = ()) -> Figure:
    """Accuracy by position (mean of 8 neighbours) for each largest beta; a line marks the length of training.

    others: the same for other seeds, with beta up to 2.
    """
    fig, ax = plotting.figure(height=3.0)
    styles = {2.0: MECHANISMS["delta"], 1.0: OTHERS[2]}
    for n, curve in enumerate(others):
        thin = MECHANISMS["delta"] | {"marker": "", "linewidth": 0.9, "linestyle": "-"}
        label = "" if n else "$\\beta$ in (0, 2), other seeds"
        ax.plot(range(4, len(curve), 8), curve.reshape(-1, 8).mean(1), **thin, label=label, zorder=1)
    for top, curve in curves.items():
        means = curve.reshape(-1, 8).mean(1)
        name = f"$\\beta$ in (0, {top:.0f})"
        ax.plot(range(4, len(curve), 8), means, **styles[top], markevery=3, label=name)
    ax.axvline(trained_on, color="black", linewidth=1)
    for level, left, text in ((0.75, 165, "right in 3 of 4 cases"), (0.5, trained_on + 8, "chance")):
        ax.axhline(level, **GREY)
        ax.text(left, level - 0.03, text, fontsize=9.5, color="0.35", va="top")
    ax.set(xlabel="position in the string", ylabel="accuracy", ylim=(0.4, 1.03))
    ax.legend(loc="upper left", bbox_to_anchor=(0.56, 0.5), fontsize=10)  # between the lines of chance and of 3 in 4
    return fig


# --- Weaknesses ------------------------------------------------------------------------------------------
def wearing_out(
    worn: Mapping[tuple[int, float], Tensor], old: Sequence[int], crowded: Mapping[str, Sequence[float]]
) -> Figure:
    """Left: what later writes leave of a direction, for each (d, beta). Right: error on new pairs after old ones."""
    fig, (left, right) = plotting.figure(columns=2, height=3.4)
    m = torch.arange(0, 301, 25)
    for style, ((d, beta), lengths) in zip(OTHERS, worn.items(), strict=True):
        left.semilogy(m, (1 - beta * (2 - beta) / d) ** m, **style | {"marker": ""})
        left.semilogy(m, lengths[m], **style | {"linestyle": ""}, label=f"d = {d}, $\\beta$ = {beta}")
    left.set(xlabel="later writes", ylabel="what is left, squared", ylim=(1e-5, 200), title="wearing out")
    left.legend(fontsize=9, loc="upper right")
    places = range(len(old))  # evenly spaced: 0 has no place on a logarithmic axis
    for name, series in crowded.items():
        right.semilogy(places, series, **MECHANISMS[name], label=NAMES[name] + (", cleared" if name == "gated" else ""))
    right.set_xticks(places, ["none" if n == 0 else str(n) for n in old], fontsize=9)
    right.set(xlabel="old pairs", ylabel="squared error", title="new pairs after old ones", ylim=(0.01, 30))
    right.legend(fontsize=9)
    return fig


# --- What the figures measure ----------------------------------------------------------------------------
Model = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def by_position(model: Model, tokens: Tensor, labels: Tensor, pairs: int) -> Tensor:
    """Accuracy `[pairs]` by the position of a pair among the last `pairs` that were written.

    model: (tokens `[n, L]`, where it is asked `[n, L]`) -> logits, one row for each question, in order.
    tokens and labels: of `dn_lib.data.recall`.
    """
    first = int((labels >= 0).any(0).nonzero()[0])  # where the questions begin
    written = tokens[:, first - 2 * pairs : first : 2]  # the keys of the last pairs before them
    row, column = (labels >= 0).nonzero(as_tuple=True)
    place = (tokens[row, column][:, None] == written[row]).long().argmax(1)
    right = (model(tokens, labels >= 0).argmax(-1) == labels[row, column]).float()
    return torch.stack([right[place == j].mean() for j in range(pairs)])


@torch.no_grad()
def writes(model: Any, tokens: Tensor, labels: Tensor, pairs: int) -> dict[str, list[float]]:
    """Means at keys, at values and at questions of `recall_with_updates`, for the chapter's small model.

    "beta": the writing strength; "|v|": the length of the value that is written; "|cosine| of q, k": how far the
    token's own query overlaps with the key that it writes under.
    """
    x = model.embed(tokens)
    beta, pair = model.beta(x)
    q, k, v = model.q(x), model.k(pair), model.v(x)
    means = {"beta": beta, "|v|": v.norm(dim=-1), "|cosine| of q, k": cosine_similarity(q, k, dim=-1).abs()}
    end = 4 * pairs  # every key is written twice
    return {name: [m.mean().item() for m in (a[:, :end:2], a[:, 1:end:2], a[labels >= 0])] for name, a in means.items()}


@torch.no_grad()
def newer_or_older(model: Model, tokens: Tensor, labels: Tensor, pairs: int) -> tuple[float, float]:
    """The shares of answers that are a key's newer value, and its older one; for `recall_with_updates`."""
    row, column = (labels >= 0).nonzero(as_tuple=True)
    keys, values = tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]  # the first writing
    place = (tokens[row, column][:, None] == keys[row]).long().argmax(1)
    said = model(tokens, labels >= 0).argmax(-1)
    newer, older = said == labels[row, column], said == values[row, place]
    return newer.float().mean().item(), older.float().mean().item()
