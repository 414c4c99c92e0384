"""Study 4: tokens sorted by memory, one state in blocks, recall at equal bytes, what a borrowed model keeps.

Every function returns the figure that it drew, or the numbers for one.  What is drawn is computed here by `dn_lib`,
never typed in.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dn_lib.data import Corpus, split_text, stdlib_documents
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.layers.liger import TEMPERATURE, Liger
from dn_lib.layers.mom import Routes, sort_by_memory
from dn_lib.models import LanguageModel, to_liger
from dn_lib.models.lora import add_lora
from dn_lib.teaching import plotting
from dn_lib.training import TrainConfig, evaluate, train

# Memories are no mechanisms: a paler set, told apart by a hatch as well, the shared one white.
FILLS = (("#9ECAE1", ""), ("#FDD0A2", "///"), ("#A1D99B", "..."), ("#DADAEB", "xxx"))
SHARED = ("white", "")
SOFTMAX, GATED = plotting.MECHANISMS["softmax"], plotting.MECHANISMS["gated"]
# Three ways to spend the same bytes; what routes to memories is a mixture of delta rules.
SPENT: dict[str, dict[str, Any]] = {
    "one wider head": plotting.OTHERS[0],
    "one head, wide keys": plotting.OTHERS[1],
    "mixture of memories": plotting.MECHANISMS["delta"],
}


def _plain(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


# --- Sorting --------------------------------------------------------------------------------------------------
def _square(ax: Axes, x: float, y: float, memory: int, memories: int, text: str) -> None:
    colour, hatch = SHARED if memory == memories else FILLS[memory % len(FILLS)]
    ax.add_patch(Rectangle((x, y), 0.92, 0.92, fc=colour, ec="0.25", lw=0.8, hatch=hatch))
    box = {"fc": colour, "ec": "none", "pad": 0.8}
    ax.text(x + 0.46, y + 0.46, text, ha="center", va="center", fontsize=9, bbox=box)


def sorted_rows(chosen: Tensor, memories: int) -> tuple[Figure, Routes]:
    """Tokens in time, and below them the rows of the packed call, sorted by memory, with their offsets.

    chosen: `[L]`, the memory of each token, from 0 to `memories` - 1; the shared memory gets all tokens besides.

    >>> fig, routes = sorted_rows(torch.tensor([1, 0, 1]), 2)
    >>> routes.streams.offsets.tolist()
    [0, 1, 3, 6]
    """
    length = len(chosen)
    both = torch.stack([chosen, torch.full_like(chosen, memories)], 1)
    routes = sort_by_memory(both, torch.zeros(length, dtype=torch.long), memories + 1, 1)
    fig, ax = plotting.figure(height=3.0)
    shift = length / 2
    for t, m in enumerate(chosen.tolist()):
        _square(ax, t + shift, 3, m, memories, str(t + 1))
    for row, (t, m) in enumerate(zip(routes.tokens.tolist(), routes.memories.tolist(), strict=True)):
        _square(ax, row, 0, m, memories, str(t + 1))
        if m < memories:
            ax.annotate(
                "",
                (row + 0.46, 0.95),
                (t + shift + 0.46, 2.97),
                arrowprops={"arrowstyle": "-|>", "lw": 0.8, "color": "0.4"},
            )
    offsets = routes.streams.offsets.tolist()
    for m, (a, b) in enumerate(pairwise(offsets)):
        ax.plot([a, a], [-0.75, 0], color="black", lw=1.2, linestyle="-")
        ax.text(a, -0.85, str(a), ha="center", va="top", fontsize=9)
        name = "shared" if m == memories else f"memory {m + 1}"
        ax.text((a + b) / 2, -0.4, name if b - a > 2 else str(m + 1), ha="center", va="center", fontsize=9)
    ax.plot([offsets[-1]] * 2, [-0.75, 0], color="black", lw=1.2, linestyle="-")
    ax.text(offsets[-1], -0.85, str(offsets[-1]), ha="center", va="top", fontsize=9)
    ax.text(shift - 0.3, 3.46, "tokens", ha="right", va="center", fontsize=10)
    ax.text(offsets[-1] / 2, -1.75, "offsets (cu_seqlens)", ha="center", va="top", fontsize=10)
    ax.set(xlim=(-0.6, 2 * length + 0.6), ylim=(-2.6, 4.2))
    _plain(ax)
    return fig, routes


# --- One state in blocks --------------------------------------------------------------------------------------
def wide(x: Tensor, chosen: Tensor, memories: int) -> Tensor:
    """Each row of x `[L, d]` in the block of its memory, zeros in the others: `[L, M d]` (eq-s4-wide-key).

    >>> wide(torch.tensor([[1.0, 2.0]]), torch.tensor([1]), 2)
    tensor([[0., 0., 1., 2.]])
    """
    return (F.one_hot(chosen, memories).to(x)[..., None] * x[..., None, :]).flatten(-2)


def block_state(keys: Tensor, state: Tensor, memories: int) -> Figure:
    """The wide keys `[L, M d]`, most of them zero, and the state `[M d, d_v]` that they write, cut in blocks.

    >>> [ax.get_title() for ax in block_state(torch.eye(4), torch.eye(4), 2).axes]
    ['wide keys', 'the state']
    """
    d = keys.shape[1] // memories
    fig, (left, right) = plotting.figure(columns=2, height=3.4, width_ratios=[1.7, 1])
    plotting.matrix(left, keys, "wide keys")
    plotting.matrix(right, state, "the state")
    for edge in range(d, memories * d, d):
        left.axvline(edge - 0.5, color="black", lw=1.2, linestyle="-")
        right.axhline(edge - 0.5, color="black", lw=1.2, linestyle="-")
    middle = [d * m + (d - 1) / 2 for m in range(memories)]
    names = [f"memory {m + 1}" for m in range(memories)]
    left.set_xticks(middle, names)
    right.set_yticks(middle, names, rotation=90, va="center")
    left.set_ylabel("token")
    right.set_xlabel("value channel")
    return fig


# --- Recall at equal bytes ------------------------------------------------------------------------------------
def _draw(draws: int, n: int, d: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(draws, n, d, generator=generator, dtype=torch.float64), dim=-1)


def _answers(keys: Tensor, queries: Tensor, values: Tensor) -> tuple[Tensor, float]:
    """What one pass of the delta rule (beta = 1) answers, and the share of the values that the best state returns."""
    ones = torch.ones(keys.shape[:-1], dtype=keys.dtype)
    _, S = recurrent_delta_rule(keys, keys, values, ones)
    best = queries @ torch.linalg.pinv(keys) @ values
    return queries @ S, 1 - float((best - values).square().sum() / values.square().sum())


def _right(answers: Tensor, values: Tensor) -> float:
    """The share of answers to which the right value is the nearest."""
    nearest = torch.cdist(answers, values).argmin(-1)
    return float((nearest == torch.arange(values.shape[-2])).double().mean())


class _Drawn(NamedTuple):
    """`draws` lists of pairs for each state: unit keys and values; the memory of each of the mixture's keys."""

    keys: dict[str, Tensor]
    values: dict[str, Tensor]
    chosen: Tensor


def _pairs(n: int, d: int, memories: int, draws: int, seed: int) -> _Drawn:
    """n random pairs for each of the three states; the same for the same arguments."""
    g = torch.Generator().manual_seed(seed + n)
    side = round(d * memories**0.5)
    k, router = _draw(draws, n, d, g), _draw(draws, memories, d, g)
    chosen = (k @ router.mT).argmax(-1)
    keys = {
        "one wider head": _draw(draws, n, side, g),
        "one head, wide keys": _draw(draws, n, memories * d, g),
        "mixture of memories": wide(k, chosen, memories),
    }
    values = {name: _draw(draws, n, side if name == "one wider head" else d, g) for name in keys}
    return _Drawn(keys, values, chosen)


def recall_at_equal_bytes(
    pairs: Sequence[int], *, d: int = 16, memories: int = 4, draws: int = 100, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Random pairs in three states of `memories` d^2 numbers, each asked for once.

    "one wider head": d sqrt(memories) key and value channels.  "one head, wide keys": `memories` d key channels, d
    value channels.  "mixture of memories": `memories` states of d x d; the key decides on the memory, by its largest
    product with `memories` random directions, so that a query meets the state that holds its answer.
    Returns for each "returned", the share of the values' squares that the best linear state gives back, and "right",
    the share of queries of which the right value is nearest to the answer after one pass of the delta rule.

    >>> sorted(recall_at_equal_bytes([4], d=4, draws=1))
    ['mixture of memories', 'one head, wide keys', 'one wider head']
    """
    found: dict[str, dict[str, list[float]]] = {name: {"returned": [], "right": []} for name in SPENT}
    for n in pairs:
        drawn = _pairs(n, d, memories, draws, seed)
        for name, key in drawn.keys.items():
            answers, returned = _answers(key, key, drawn.values[name])
            found[name]["returned"].append(returned)
            found[name]["right"].append(_right(answers, drawn.values[name]))
    return found


def equal_bytes(pairs: Sequence[int], found: dict[str, dict[str, list[float]]]) -> Figure:
    """Two panels: what the best state returns, and how many answers are right after one pass.

    >>> len(equal_bytes([4, 8], recall_at_equal_bytes([4, 8], d=4, draws=1)).axes)
    2
    """
    fig, axes = plotting.figure(columns=2, height=3.3)
    titles = {"returned": "the best state", "right": "one pass of the delta rule"}
    for ax, (what, title) in zip(axes, titles.items(), strict=True):
        for name, numbers in found.items():
            ax.plot(pairs, [100 * x for x in numbers[what]], **SPENT[name], label=name)
        ax.set(xlabel="pairs", title=title, ylim=(0, 105), xscale="log")
        ax.set_xticks(pairs, [str(n) for n in pairs])
        ax.minorticks_off()
    axes[0].set_ylabel("returned, %")
    axes[1].set_ylabel("right value nearest, %")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return fig


def recall_by_agreement(
    shares: Sequence[float], *, pairs: int = 48, d: int = 16, memories: int = 4, draws: int = 100, seed: int = 0
) -> dict[str, list[float]]:
    """The share of right answers where the query reaches the memory of its key with each probability of `shares`.

    All else, the draws too, as in `recall_at_equal_bytes`; the two single states don't depend on it.

    >>> recall_by_agreement([0.0, 1.0], pairs=4, d=4, draws=1)["mixture of memories"][0] <= 1
    True
    """
    drawn = _pairs(pairs, d, memories, draws, seed)
    g = torch.Generator().manual_seed(seed)
    luck = torch.rand(draws, pairs, generator=g)
    moved = torch.randint(1, memories, drawn.chosen.shape, generator=g)
    found: dict[str, list[float]] = {}
    for name, keys in drawn.keys.items():
        values = drawn.values[name]
        if name != "mixture of memories":
            found[name] = [_right(_answers(keys, keys, values)[0], values)] * len(shares)
            continue
        k = keys.unflatten(-1, (memories, d)).sum(-2)  # all but one of the blocks are zero
        reached = (torch.where(luck < a, drawn.chosen, (drawn.chosen + moved) % memories) for a in shares)
        found[name] = [_right(_answers(keys, wide(k, m, memories), values)[0], values) for m in reached]
    return found


def agreement(shares: Sequence[float], found: dict[str, list[float]]) -> Figure:
    """How much of its recall a mixture keeps where the router sends some queries astray.

    >>> len(agreement([0, 1], recall_by_agreement([0.0, 1.0], pairs=4, d=4, draws=1)).axes)
    1
    """
    fig, ax = plotting.figure(height=3.0)
    for name, numbers in found.items():
        ax.plot([100 * a for a in shares], [100 * x for x in numbers], **SPENT[name], label=name)
    ax.set(xlabel="queries that reach the memory of their key, %", ylabel="right value nearest, %", ylim=(0, 105))
    ax.legend(fontsize=9)
    return fig


# --- Liger ----------------------------------------------------------------------------------------------------
def needle(distances: Tensor, *, d: int = 64, window: int = 64, trials: int = 100) -> dict[str, Tensor]:
    """The share of all weight that falls on one matching key at each distance, in the mean over `trials`.

    All other keys are random, of standard normal entries, and the query is the key that it looks for.  "full attention"
    and "window" are softmax with the scale d^-1/2, without positions; "recurrent half" has the gates and features of
    `Liger` (eq-s4-liger-step), its weights divided by their sum to be compared.  There is one key more than the
    largest distance, the last one at distance 0, in all three (a window sees its own part of them).

    >>> sorted(needle(torch.tensor([1, 4]), d=8, window=2, trials=2))
    ['full attention', 'recurrent half', 'window']
    """
    g = torch.Generator().manual_seed(0)
    longest = int(distances.max()) + 1
    keys = torch.randn(trials, longest, d, generator=g, dtype=torch.float64)
    logs = F.logsigmoid(keys) / TEMPERATURE
    kept = (logs.flip(1).cumsum(1).flip(1) - logs).exp()  # of what token i wrote, by the gates of the tokens after it
    features = kept * keys.softmax(-1)
    shares = {name: [] for name in ("full attention", "window", "recurrent half")}
    for n in distances.tolist():
        at = longest - 1 - n
        query = keys[:, at, :, None]
        scores = d**-0.5 * (keys @ query)[..., 0]
        shares["full attention"].append(scores.softmax(-1)[:, at].mean())
        seen = scores[:, -window:].softmax(-1)
        shares["window"].append(seen[:, at - longest].mean() if n < window else torch.zeros(()))
        weights = (features @ query.softmax(-2))[..., 0]
        shares["recurrent half"].append((weights[:, at] / weights.sum(-1)).mean())
    return {name: torch.stack([x.double() for x in share]) for name, share in shares.items()}


def needle_picture(distances: Tensor, shares: dict[str, Tensor], window: int) -> Figure:
    """Share against distance on logarithmic axes; a dotted line where the window ends.

    >>> distances = torch.tensor([1, 4])
    >>> len(needle_picture(distances, needle(distances, d=8, window=2, trials=2), 2).axes)
    1
    """
    styles = {"full attention": SOFTMAX, "window": plotting.OTHERS[0], "recurrent half": GATED}
    fig, ax = plotting.figure(height=3.0)
    for name, share in shares.items():
        shown = share > 0
        ax.loglog(distances[shown], share[shown], **styles[name], label=name)
    ax.axvline(window, color="0.4", lw=1, linestyle=":")
    ax.text(window * 1.06, 0.3, "end of the window", fontsize=9, va="top")
    ax.set(xlabel="distance of the matching key, tokens", ylabel="its share of the weight")
    ax.legend(fontsize=9)
    return fig


def small_corpus(limit: int = 1_000_000) -> Corpus:
    """About `limit` bytes of the standard library, for training of a few seconds: the last tenth held out.

    >>> len(small_corpus(20_000).train) > 10_000
    True
    """
    text, size = [], 0
    for _, content in stdlib_documents():
        if b"\0" not in content:
            text.append(content)
            size += len(content)
        if size >= limit:
            break
    return split_text(b"\n".join(text)[:limit], name="part of stdlib")


def settings(steps: int, rate: float, **options: Any) -> TrainConfig:
    """Short runs of 768 tokens a step on the CPU, where a model this small loses nothing.

    >>> settings(10, 1e-3).tokens_per_step
    768
    """
    common: dict[str, Any] = {
        "batch": 8,
        "length": 96,
        "warmup": max(1, steps // 10),
        "evaluate_every": 0,
        "evaluation_tokens": 6144,
    }
    rates = {"learning_rate": rate, "min_learning_rate": rate / 10}
    return TrainConfig(**(common | {"steps": steps, "device": "cpu", **rates} | options))


def loss_of(model: LanguageModel, corpus: Corpus) -> float:
    """Bits per byte on held-out text, in the length of `settings`."""
    return evaluate(model, corpus, length=96, limit=6144, batch=32)["bits_per_byte"]


def with_share(model: LanguageModel, share: float) -> LanguageModel:
    """The same model, its Liger layers with another share of the recurrent half: 0 is the window alone."""
    for layer in model.modules():
        if isinstance(layer, Liger):
            layer.share = share
    return model


BORROWED: dict[str, dict[str, Any]] = {
    "Liger, LoRA": GATED,
    "window alone, LoRA": plotting.OTHERS[0],
    "Transformer, LoRA": SOFTMAX,
    "Liger, from scratch": plotting.STYLES[7],
}


def borrow(
    transformer: LanguageModel, corpus: Corpus, *, steps: int, window: int, rank: int = 8, seed: int = 1
) -> dict[str, list[tuple[int, float]]]:
    """Bits per byte against tokens of training, from the same batches: the converted model with LoRA, its window half
    with LoRA, the Transformer itself with LoRA, and a model of the converted layers from scratch."""
    found = {}
    for name in BORROWED:
        model = to_liger(transformer, window=window)
        if name.startswith("Transformer"):
            model = copy.deepcopy(transformer)
            add_lora(model, rank=rank)
        elif name.endswith("scratch"):
            torch.manual_seed(seed)
            model = LanguageModel(model.config)
        else:
            with_share(model, 0.0 if name.startswith("window") else 0.5)
            add_lora(model, rank=rank)
        config = settings(steps, 3e-3, seed=seed, evaluate_every=max(1, steps // 3))
        start = (0, loss_of(model, corpus))
        history = train(model, corpus, config)
        points = [(r["step"] * config.tokens_per_step, r["bits_per_byte"]) for r in history.evaluations if r["step"]]
        found[name] = [start, *((int(tokens), bits) for tokens, bits in points)]
    return found


def kept_layers(transformer: LanguageModel, corpus: Corpus, window: int) -> dict[str, list[float]]:
    """Bits per byte right after the conversion, with 0, 1, ... of the first attention layers left as they were.

    "Liger": half and half in the layers that are converted.  "window alone": without the recurrent half.
    """
    layers = transformer.config.layers
    found: dict[str, list[float]] = {"Liger": [], "window alone": []}
    for kept in range(layers):
        for name, share in (("Liger", 0.5), ("window alone", 0.0)):
            model = with_share(to_liger(transformer, window=window, keep=range(kept)), share)
            found[name].append(loss_of(model, corpus))
    whole = loss_of(transformer, corpus)
    return {name: [*numbers, whole] for name, numbers in found.items()}


def borrowed(curves: dict[str, list[tuple[int, float]]], teacher: float, kept: dict[str, list[float]]) -> Figure:
    """Left: loss against tokens of training.  Right: loss against attention layers kept, before any training.

    >>> curves = {name: [(0, 3.0), (10, 2.0)] for name in BORROWED}
    >>> len(borrowed(curves, 1.0, {"Liger": [2.0, 1.0], "window alone": [1.5, 1.0]}).axes)
    2
    """
    fig, (left, right) = plotting.figure(columns=2, height=3.4)
    for name, points in curves.items():
        left.plot(*zip(*points, strict=True), **BORROWED[name], label=name)
    left.axhline(teacher, color="0.4", linestyle=":", lw=1.5, label="the Transformer as it was")
    left.set(xlabel="tokens of training", ylabel="bits per byte", title="after the conversion")
    left.legend(fontsize=9)
    styles = {"Liger": GATED, "window alone": plotting.OTHERS[0]}
    for name, numbers in kept.items():
        right.plot(range(len(numbers)), numbers, **styles[name], label=name)
    right.set(xlabel="attention layers kept", title="before any training", xticks=range(len(next(iter(kept.values())))))
    right.legend(fontsize=9)
    return fig
