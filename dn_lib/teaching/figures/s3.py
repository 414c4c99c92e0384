"""Study 3: what a machine must be told of earlier tokens, bytes, tokens taken back, states in 8 bits.

Every function returns the figure that it drew, or the numbers that one draws.  What is drawn is computed here by
`dn_lib`, never typed in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms.affine import segment_affine
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.serving import (
    dequantise_state,
    draft_delta_rule,
    quantise_state,
    replay,
    roll_back,
    rounding_bound,
    step_back,
)
from dn_lib.parallel.rules import delta_map, linear_map
from dn_lib.parallel.simulated import counted_row_bytes, counted_state_bytes
from dn_lib.parallel.traffic import rows_bytes, state_bytes
from dn_lib.teaching import plotting
from dn_lib.teaching.registry import relative_error

DOUBLE = torch.float64
LINEAR, DELTA, SOFTMAX, GATED = (plotting.MECHANISMS[name] for name in ("linear", "delta", "softmax", "gated"))
HALO, WINDOW, DECAY = plotting.OTHERS


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For products of small matrices, thousands of them: handing each to several threads takes longer than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plain(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


# ---- What must be told ----------------------------------------------------------------------------------
NEEDS = ("short convolution of 4 taps", "recurrence", "attention")


def what_moves(ranks: int = 4, reader: int = 2, tokens: int = 8) -> Figure:
    """Three kinds of layers on one sequence: what machine `reader` has to be told about the stretches before its own.

    >>> len(what_moves(3, 1).axes)
    3
    """
    tops = dict(zip(NEEDS, (2.6, 5.3, 4.0), strict=True))
    fig, axes = plotting.figure(
        rows=3, height=3.9, height_ratios=[tops[NEEDS[0]], tops[NEEDS[1]], tops[NEEDS[2]] + 0.7]
    )
    needed = {NEEDS[0]: 3, NEEDS[2]: reader * tokens}  # rows before its own
    colours = {NEEDS[0]: HALO["color"], NEEDS[1]: DELTA["color"], NEEDS[2]: SOFTMAX["color"]}
    for ax, name in zip(axes, NEEDS, strict=True):
        for r in range(ranks):
            for t in range(tokens):
                x = r * (tokens + 1.5) + t
                back = reader * tokens - (r * tokens + t)  # how many tokens before the reader's first
                wanted = 0 < back <= needed.get(name, 0)
                own = r == reader
                face = colours[name] if wanted else "0.75" if own else "white"
                ax.add_patch(Rectangle((x, 0), 1, 1, fc=face, ec="black", lw=0.6))
            middle = r * (tokens + 1.5) + tokens / 2
            if name == NEEDS[1] and r < reader:
                ax.add_patch(Rectangle((middle - 2.4, 1.3), 2.2, 1.5, fc=colours[name], ec="black", lw=0.8))
                ax.add_patch(Rectangle((middle + 0.2, 1.3), 2.2, 1.5, fc=colours[name], ec="black", lw=0.8))
                for x, letter in ((middle - 1.3, "M"), (middle + 1.3, "X")):
                    ax.text(x, 2.05, f"${letter}_{r}$", ha="center", va="center", fontsize=9, color="white")
            if ax is axes[-1]:
                ax.text(middle, -0.35, f"machine {r}", ha="center", va="top", fontsize=10)
        target = reader * (tokens + 1.5)
        starts = {
            NEEDS[0]: [target - 3.0],
            NEEDS[1]: [r * (tokens + 1.5) + tokens / 2 + 1.3 for r in range(reader)],
            NEEDS[2]: [r * (tokens + 1.5) + tokens / 2 for r in range(reader)],
        }[name]
        for n, start in enumerate(starts):
            low = 2.8 if name == NEEDS[1] else 1.05
            style = {"arrowstyle": "-|>", "mutation_scale": 13, "lw": 1.6, "color": colours[name], "shrinkA": 1}
            bend = f"arc3,rad={-0.22 - 0.06 * (len(starts) - 1 - n)}"
            ax.add_patch(
                FancyArrowPatch((start, low), (target + 1.2 + n, 1.1), connectionstyle=bend, shrinkB=1, **style)
            )
        ax.set_title(name, loc="left", fontsize=11)
        ax.set(xlim=(-0.5, ranks * (tokens + 1.5)), ylim=(-1.1 if ax is axes[-1] else -0.2, tops[name]))
        _plain(ax)
    return fig


# ---- Maps of a stretch ----------------------------------------------------------------------------------
RULES = ("linear attention", "decay", "gates per channel", "delta rule", "gated delta rule")


def family_maps(length: int = 12, d: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """M of one stretch for each rule of the family, `[d, d]`, all of the same keys, beta and gates.

    >>> {name: tuple(M.shape) for name, M in family_maps(2, 3).items()}["delta rule"]
    (3, 3)
    """
    g = torch.Generator().manual_seed(seed)
    k, v = normalize(_normal(g, 1, length, 1, d), dim=-1), _normal(g, 1, length, 1, d)
    beta = torch.rand(1, length, 1, generator=g, dtype=DOUBLE)
    channels = -0.25 * torch.rand(1, length, 1, d, generator=g, dtype=DOUBLE) * torch.linspace(0, 1, d, dtype=DOUBLE)
    token = channels.mean(-1)
    eye = torch.eye(d, dtype=DOUBLE)
    found: dict[str, Tensor] = {RULES[0]: eye}
    for name, gates in zip(RULES[1:3], (token, channels), strict=True):
        A, _ = linear_map(k, v, gates)
        found[name] = eye if A is None else A[0, 0] * eye
    for name, gates in zip(RULES[3:], (None, token), strict=True):
        found[name] = delta_map(k, v, beta, gates)[0][0, 0]
    return found


def draw_maps(maps: Mapping[str, Tensor], sent: Mapping[str, str]) -> Figure:
    """The maps side by side on one colour scale, each with what of it has to be sent.

    >>> len(draw_maps({"one": torch.eye(2), "two": torch.eye(2)}, {"one": "nothing", "two": "all"}).axes)
    3
    """
    fig, axes = plotting.figure(columns=len(maps), height=2.6)
    for ax, (name, M) in zip(axes, maps.items(), strict=True):
        plotting.matrix(ax, M, name.replace(" per ", "\nper ").replace(" attention", "\nattention"), limit=1.0)
        if name.endswith("delta rule"):
            ax.set_title(name.replace(" rule", "\nrule"))
        ax.title.set_fontsize(10)
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel(sent[name], fontsize=9)
    fig.colorbar(axes[0].images[0], ax=axes, shrink=0.7, aspect=18)
    return fig


# ---- Bytes ----------------------------------------------------------------------------------------------
RANKS = (2, 4, 8, 16, 32, 64)
STYLES: dict[str, dict[str, Any]] = {
    "attention (all keys and values)": SOFTMAX,
    "delta rule, with or without gates": DELTA,
    "linear attention": LINEAR,
    "window of 128": WINDOW,
    "convolution of 4 taps": HALO,
}


def _kinds(length: int, heads: int, d: int) -> dict[str, tuple[int, int] | str]:
    """For each line of the figure its rule, or the rows it reaches back and their width."""
    width = heads * d
    settings = ((length, 2 * width), "delta", "linear", (127, 2 * width), (3, width))
    return dict(zip(STYLES, settings, strict=True))


@_one_thread()
def counted_bytes(length: int, heads: int, d: int, ranks: Sequence[int] = RANKS) -> dict[str, list[int]]:
    """Bytes that the last of p processes receives forward, counted by the exchange itself, for each p of `ranks`.

    >>> counted_bytes(64, 1, 4, [2])["convolution of 4 taps"]
    [24]
    """
    found = {}
    for name, kind in _kinds(length, heads, d).items():
        counts = [
            counted_state_bytes(kind, p, heads, d, d) if isinstance(kind, str) else counted_row_bytes(length, p, *kind)
            for p in ranks
        ]
        found[name] = [forward for forward, _ in counts]
    return found


def formula_bytes(length: int, heads: int, d: int, ranks: Sequence[int] = RANKS) -> dict[str, list[int]]:
    """The same from `dn_lib.parallel.traffic`.

    >>> formula_bytes(64, 1, 4, [2]) == counted_bytes(64, 1, 4, [2])
    True
    """
    return {
        name: [
            state_bytes(kind, p, 1, heads, d, d) if isinstance(kind, str) else rows_bytes(length, p, p - 1, *kind)
            for p in ranks
        ]
        for name, kind in _kinds(length, heads, d).items()
    }


def traffic(length: int, heads: int, d: int, counted: Mapping[str, Sequence[int]], ranks: int = 8) -> Figure:
    """Left: bytes by the number of processes, marks counted and lines by formula.  Right: by length, on `ranks`.

    >>> len(traffic(64, 1, 4, counted_bytes(64, 1, 4)).axes)
    2
    """
    fig, (left, right) = plotting.figure(columns=2, height=3.9)
    lengths = [ranks * 2**n * max(1, length // (ranks * 32)) for n in range(10)]
    formula = formula_bytes(length, heads, d)
    by_length = {name: [formula_bytes(n, heads, d, [ranks])[name][0] for n in lengths] for name in STYLES}
    for name, style in STYLES.items():
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        left.loglog(RANKS, [x / 2**20 for x in formula[name]], **line)
        left.loglog(RANKS, [x / 2**20 for x in counted[name]], **style | {"linestyle": ""})
        right.loglog(lengths, [x / 2**20 for x in by_length[name]], **style, label=name)
    left.set(xlabel="processes", ylabel="MiB received, forward", title=f"{length:,} tokens")
    left.set_xticks(RANKS, [str(p) for p in RANKS])
    right.set(xlabel="tokens", title=f"{ranks} processes")
    right.sharey(left)
    for ax in (left, right):
        ax.minorticks_off()
        ax.title.set_fontsize(11)
    fig.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return fig


# ---- Pairs in fewer bits --------------------------------------------------------------------------------
@_one_thread()
def rounded_pairs(
    strongest: float, stretches: int = 32, length: int = 16, d: int = 32, seed: int = 0
) -> dict[str, list[float]]:
    """Relative errors of the states that leave stretches 1, 2, ... where pairs are rounded to bfloat16 when sent.

    The delta rule with beta uniform in (0, `strongest`), in float64; "M and X", "M", "X" say what is rounded.

    >>> errors = rounded_pairs(1.0, 4, 8, 8)
    >>> len(errors["M"]), max(errors["M and X"]) < 2e-2
    (4, True)
    """
    g = torch.Generator().manual_seed(seed)
    k, v = normalize(_normal(g, stretches, length, d), dim=-1), _normal(g, stretches, length, d)
    beta = strongest * torch.rand(stretches, length, generator=g, dtype=DOUBLE)
    M, X = segment_affine(k, v, beta)
    rough_m, rough_x = (x.bfloat16().to(DOUBLE) for x in (M, X))
    pairs = {"M and X": (rough_m, rough_x), "M": (rough_m, X), "X": (M, rough_x)}
    exact = torch.zeros(d, d, dtype=DOUBLE)
    states, errors = dict.fromkeys(pairs, exact), {name: [] for name in pairs}
    for r in range(stretches):
        exact = M[r] @ exact + X[r]
        for name, (one, two) in pairs.items():
            states[name] = one[r] @ states[name] + two[r]
            errors[name].append(relative_error(states[name], exact))
    return errors


# ---- Tokens taken back ----------------------------------------------------------------------------------
STRENGTHS = (0.5, 0.9, 0.99)


def _draft(m: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit keys and values of m tokens, and a state that 4 d writes of the delta rule have made."""
    g = torch.Generator().manual_seed(seed)
    before, k = normalize(_normal(g, 4 * d, d), dim=-1), normalize(_normal(g, m, d), dim=-1)
    beta = torch.full((4 * d,), 0.5, dtype=DOUBLE)
    return k, _normal(g, m, d), recurrent_delta_rule(before, before, _normal(g, 4 * d, d), beta)[1]


@_one_thread()
def taken_back(
    lengths: Sequence[int], dtype: torch.dtype, d: int = 64, seed: int = 0
) -> dict[str, dict[float, list[float]]]:
    """Relative errors of the state before a draft of m tokens, for each m of `lengths` and each strength of writing.

    "roll back" subtracts what was written, "step back" inverts the steps, "replay" writes the first half of the draft
    again upon the state before it, and is compared with the state there.  Computed in `dtype`, compared with float64.

    >>> errors = taken_back([4], torch.float64, 8)
    >>> max(errors["roll back"][0.5] + errors["replay"][0.5]) < 1e-14
    True
    """
    found: dict[str, dict[float, list[float]]] = {name: {} for name in ("roll back", "replay", "step back")}
    for strength in STRENGTHS:
        rows: dict[str, list[float]] = {name: [] for name in found}
        for m in lengths:
            k, v, start = _draft(m, d, seed)
            beta = torch.full((m,), strength, dtype=DOUBLE)
            half = m // 2
            _, middle, _ = draft_delta_rule(k[:half], k[:half], v[:half], beta[:half], start)
            rough_k, rough_v, rough_beta, rough_start = (x.to(dtype) for x in (k, v, beta, start))
            _, last, written = draft_delta_rule(rough_k, rough_k, rough_v, rough_beta, rough_start)
            rows["roll back"].append(relative_error(roll_back(last, rough_k, written), start))
            rows["replay"].append(relative_error(replay(rough_start, rough_k[:half], written[:half]), middle))
            rows["step back"].append(relative_error(step_back(last, rough_k, rough_v, rough_beta), start))
        for name, errors in rows.items():
            found[name][strength] = errors
    return found


def kept_bytes(lengths: Sequence[int], d: int = 128) -> dict[str, list[int]]:
    """Bytes that a draft of m tokens keeps per head, in float32, so that it can be taken back.

    >>> kept_bytes([1, 8], 128)
    {'copies': [65536, 524288], 'keys and writes': [1024, 8192], 'with the first state': [66560, 73728]}
    """
    state = torch.empty(d, d, dtype=torch.float32).nbytes
    pairs = [torch.empty(2, m, d, dtype=torch.float32).nbytes for m in lengths]
    return {
        "copies": [m * state for m in lengths],
        "keys and writes": pairs,
        "with the first state": [state + pair for pair in pairs],
    }


def draw_taken_back(lengths: Sequence[int], errors: Mapping[str, Mapping[float, Sequence[float]]]) -> Figure:
    """Left: the errors of `taken_back`.  Right: the bytes of `kept_bytes`.

    >>> len(draw_taken_back([2, 4], taken_back([2, 4], torch.float32, 8)).axes)
    2
    """
    fig, (left, right) = plotting.figure(columns=2, height=4.2)
    inverses, copies = (plotting.STYLES[4], plotting.STYLES[5], plotting.STYLES[7]), plotting.STYLES[6]
    left.loglog(lengths, errors["roll back"][0.99], **DELTA, label="subtract what was written")
    left.loglog(lengths, errors["replay"][0.99], **GATED, label="write again")
    for strength, style in zip(STRENGTHS, inverses, strict=True):
        left.loglog(lengths, errors["step back"][strength], **style, label=rf"invert steps, $\beta$ = {strength}")
    left.set(xlabel="tokens of the draft", ylabel="relative error of the state", ylim=(1e-8, 1e2))
    left.legend(fontsize=9, loc="lower left", bbox_to_anchor=(-0.05, 1.0))
    series = zip(kept_bytes(lengths).items(), (copies, DELTA, GATED), strict=True)
    for (name, values), style in series:
        right.loglog(lengths, [x / 2**10 for x in values], **style, label=name)
    right.set(xlabel="tokens of the draft", ylabel="KiB per head, $d$ = 128")
    right.legend(fontsize=9, loc="lower left", bbox_to_anchor=(-0.05, 1.0))
    for ax in (left, right):
        ax.set_xticks(list(lengths), [str(m) for m in lengths])
        ax.minorticks_off()
    return fig


# ---- Eight bits -----------------------------------------------------------------------------------------
KINDS = ("linear attention", "delta rule", "gated delta rule")


@_one_thread()
def drift(
    lengths: Sequence[int],
    *,
    every: int = 1,
    random: bool = False,
    strongest: float = 1.0,
    d: int = 32,
    heads: int = 2,
    seed: int = 0,
) -> dict[str, list[tuple[float, float]]]:
    """How far a state that is stored in 8 bits drifts: (relative error, relative bound) at each length, by rule.

    lengths: rising, multiples of `every`.  The state is stored after each `every` tokens, rounded to the nearest, or
    at random.  Unit keys, beta uniform in (0, `strongest`), gates between 0.98 and 1.  The error is that of the states
    of all `heads` together.  Everything else is float64.  The bound is the sum of the largest possible roundings.

    >>> {name: len(rows) for name, rows in drift([4, 8], d=4, heads=1).items()}
    {'linear attention': 2, 'delta rule': 2, 'gated delta rule': 2}
    """
    g, longest = torch.Generator().manual_seed(seed), max(lengths)
    k, v = normalize(_normal(g, heads, longest, d), dim=-1), _normal(g, heads, longest, d)
    beta = strongest * torch.rand(heads, longest, generator=g, dtype=DOUBLE)
    gates = torch.stack(
        [torch.zeros_like(beta), (1 - 0.02 * torch.rand(heads, longest, generator=g, dtype=DOUBLE)).log()]
    )
    noise = torch.Generator().manual_seed(seed) if random else None
    exact = torch.zeros(3, heads, d, d, dtype=DOUBLE)
    kept, bounds, reached = exact, torch.zeros(3, heads, dtype=DOUBLE), 0

    def advance(S: Tensor, begin: int, end: int) -> Tensor:
        return _advance(S, k[:, begin:end], v[:, begin:end], beta[:, begin:end], gates[:, :, begin:end])

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    for end in range(every, longest + 1, every):
        codes, scales = quantise_state(advance(kept, end - every, end), generator=noise)
        kept = dequantise_state(codes, scales)
        bounds = bounds + rounding_bound(scales, d) * (1 if noise is None else 2)
        if end in lengths:
            exact, reached = advance(exact, reached, end), end
            size = exact.flatten(1).norm(dim=1)
            off, most = (kept - exact).flatten(1).norm(dim=1) / size, bounds.norm(dim=1) / size
            for name, row in zip(KINDS, zip(off.tolist(), most.tolist(), strict=True), strict=True):
                found[name].append(row)
    return found


def _advance(S: Tensor, k: Tensor, v: Tensor, beta: Tensor, gates: Tensor) -> Tensor:
    """States `[3, heads, d, d]` of the rules of `KINDS` after a few tokens."""
    twice = [x.expand(2, *x.shape) for x in (k, v, beta)]
    _, erased, _ = draft_delta_rule(twice[0], twice[0], twice[1], twice[2], S[1:], g=gates)
    return torch.cat([(S[0] + k.mT @ v)[None], erased])


def draw_drift(
    lengths: Sequence[int],
    nearest: Mapping[str, Sequence[tuple[float, float]]],
    others: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
) -> Figure:
    """Left: drift with a store after each token, by rule, and the delta rule's bound.  Right: the delta rule's ways.

    others: drifts by the name of how states are stored, at the last of the lengths, or at all.

    >>> one = drift([4, 8], d=4, heads=1)
    >>> len(draw_drift([4, 8], one, {"random": one}).axes)
    2
    """
    fig, (left, right) = plotting.figure(columns=2, height=3.6, sharey=True)
    for name, style in zip(KINDS, (LINEAR, DELTA, GATED), strict=True):
        left.loglog(lengths, [off for off, _ in nearest[name]], **style, label=name)
    left.loglog(
        lengths, [most for _, most in nearest[KINDS[1]]], color="0.4", linestyle="-", lw=1, label="delta rule, bound"
    )
    left.set(xlabel="tokens", ylabel="relative error of the state", title="by rule", ylim=(1e-3, 1e3))
    right.loglog(lengths, [off for off, _ in nearest[KINDS[1]]], **DELTA, label="nearest, each token")
    for (name, rows), style in zip(others.items(), plotting.STYLES[4:], strict=False):
        own = lengths[-len(rows[KINDS[1]]) :]
        right.loglog(own, [off for off, _ in rows[KINDS[1]]], **style, label=name)
    right.set(xlabel="tokens", title="the delta rule, by how it is stored")
    for ax in (left, right):
        ax.title.set_fontsize(11)
        ax.legend(fontsize=9, loc="upper left")
    return fig
