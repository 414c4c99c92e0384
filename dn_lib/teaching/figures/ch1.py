"""The figures of chapter 1."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.benchmark import Timer

from dn_lib.forms.linear_attention import linear_attention_step
from dn_lib.teaching import plotting
from dn_lib.teaching.plotting import MECHANISMS, OTHERS

GREY: dict[str, Any] = {"color": "0.45", "linestyle": ":", "linewidth": 1.5}

# --- A state, written and read ---------------------------------------------------------------------------
STORY_KEYS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.0, 0.8]], dtype=torch.float64)
STORY_VALUES = torch.tensor([[3.0, -1.0, 0.0, 2.0], [-2.0, 2.0, 1.0, 0.0], [1.0, 3.0, -2.0, -1.0]], dtype=torch.float64)
STORY_TITLES = (
    "an empty state",
    r"write $k_1 v_1^\top$",
    r"read with $k_1$: exactly $v_1$",
    r"write $k_2 v_2^\top$",
    r"write $k_3 v_3^\top$, where $k_3$ overlaps with $k_1$",
    r"read with $k_2$: exactly $v_2$",
    r"read with $k_1$: $v_1 + 0.6\, v_3$, not $v_1$",
)


def state_story(keys: Tensor = STORY_KEYS, values: Tensor = STORY_VALUES) -> list[dict[str, Any]]:
    """The frames of `state_animation`: the state, the key that is used, and the value written or read.

    keys `[3, d_k]`, values `[3, d_v]`.  Each frame has "state" `[d_k, d_v]`, "key", "value" (None where
    there is none) and "reads", which says whether the value came out of the state.

    >>> frames = state_story()
    >>> frames[-1]["value"].tolist()  # v_1 + 0.6 v_3
    [3.6, 0.8, -1.2, 1.4]
    """
    keys, values = keys.double(), values.double()
    state = torch.zeros(keys.shape[1], values.shape[1], dtype=torch.float64)
    frames: list[dict[str, Any]] = [{"state": state, "key": None, "value": None, "reads": False}]
    for reads, n in ((False, 0), (True, 0), (False, 1), (False, 2), (True, 1), (True, 0)):
        if reads:
            value = (keys[n] @ state).round(decimals=10)
        else:
            value, state = values[n], linear_attention_step(keys[n], keys[n], values[n], state)[1]
        frames.append({"state": state, "key": keys[n], "value": value, "reads": reads})
    return frames


# Where each part stands, as (left, bottom, width, height): nothing may move from frame to frame.
STATE_PLACES = {
    "key": (0.08, 0.27, 0.11, 0.42),
    "state": (0.36, 0.27, 0.6, 0.42),
    "written": (0.36, 0.74, 0.6, 0.14),
    "read": (0.36, 0.08, 0.6, 0.14),
}


def _draw_state(fig: Figure | SubFigure, frame: dict[str, Any]) -> None:
    """Key on the left, state in the middle; a value that is written stands above, one that is read below."""
    shown = {"state": ("$S$", frame["state"])}
    if frame["key"] is not None:
        shown["key"] = ("$k$", frame["key"][:, None])
        if frame["reads"]:
            shown["read"] = ("$S^\\top k$", frame["value"][None, :])
        else:
            shown["written"] = ("$v$", frame["value"][None, :])
    for place, (name, numbers) in shown.items():
        ax = fig.add_axes(STATE_PLACES[place])
        plotting.matrix(ax, numbers, values=True, limit=4.0)
        ax.set(aspect="auto", xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")


def state_animation() -> Any:
    """A state of 3 by 4 numbers while three pairs are written into it and read from it.

    Keys 1 and 3 overlap by 0.6, so that the last read returns a mixture.  In print: four states side by side.
    """
    frames = state_story()

    def draw(fig: Figure, n: int) -> None:
        fig.set_layout_engine("none")
        fig.suptitle(STORY_TITLES[n], fontsize=12)
        _draw_state(fig, frames[n])

    def strip(fig: Figure) -> None:
        fig.set_layout_engine("none")
        parts: Any = fig.subfigures(2, 2)
        for part, n in zip(parts.flat, (1, 3, 4, 6), strict=True):
            part.suptitle(STORY_TITLES[n], fontsize=9)
            _draw_state(part, frames[n])

    return plotting.animation(draw, [*range(len(frames)), len(frames) - 1], fps=0.7, height=4.2, still=strip)


# --- Features of the exponential -------------------------------------------------------------------------
def taylor_features(errors: Sequence[float], sizes: Sequence[int], merged: Sequence[int], tokens: int) -> Figure:
    """Error (left) and number of features (right) against the degree of the Taylor polynomial, from 0.

    tokens: how many keys a cache of the same sequence holds, a grey line.
    """
    degrees = range(len(errors))
    fig, (left, right) = plotting.figure(columns=2)
    left.semilogy(degrees, errors, **MECHANISMS["linear"])
    left.axhline(0.1, **GREY)
    left.set(xlabel="degree p", ylabel="relative error of the output", xticks=degrees, yticks=[0.1, 0.2, 0.5])
    left.set_yticklabels(["10%", "20%", "50%"])
    left.minorticks_off()
    right.semilogy(degrees, sizes, **OTHERS[0], label=r"features, $d_\phi$")
    right.semilogy(degrees, merged, **OTHERS[1], label="equal ones merged")
    right.axhline(tokens, **GREY)
    right.text(-0.1, 1.12 * tokens, f"cache of {tokens} tokens", fontsize=9, color="0.35", va="bottom")
    right.set(xlabel="degree p", ylabel="rows of the memory", xticks=degrees, ylim=(0.5, 3e5))
    right.legend(loc="upper left", fontsize=9)
    return fig


# --- Three forms -----------------------------------------------------------------------------------------
STATE_COLOUR, SCORE_COLOUR = "#56B4E9", "#0072B2"


def form_steps(length: int, chunk: int) -> dict[str, tuple[Tensor, Tensor]]:
    """For each form, the step that deals with each pair and whether it is a score: two `[length, length]` tensors.

    The step is 0 for pairs of the future, which no form looks at.

    >>> steps, scores = form_steps(4, 2)["chunkwise"]
    >>> steps.tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [2, 2, 2, 0], [2, 2, 2, 2]]
    >>> scores.long().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    t, i = torch.arange(length)[:, None], torch.arange(length)[None, :]
    past, same = i <= t, i // chunk == t // chunk
    return {
        "recurrent": ((t + 1) * past, torch.zeros_like(past)),
        "parallel": (past.long(), past),
        "chunkwise": ((t // chunk + 1) * past, past & same),
    }


def three_forms_animation(length: int = 12, chunk: int = 4) -> Any:
    """Which query-key pairs each form deals with at each step; every pair carries the number of its step."""
    from matplotlib.colors import to_rgb

    forms = form_steps(length, chunk)
    names = {"recurrent": "recurrent", "parallel": "parallel", "chunkwise": f"chunkwise, C = {chunk}"}

    def draw(fig: Figure, step: int) -> None:
        axes = fig.subplots(1, 3)
        for ax, (name, (steps, scores)) in zip(axes, forms.items(), strict=True):
            last, picture = int(steps.max()), torch.ones(length, length, 3)
            now = min(step, last)
            for colour, chosen in ((SCORE_COLOUR, scores), (STATE_COLOUR, ~scores)):
                done = chosen & (steps > 0) & (steps <= now)
                strength = torch.where(steps == now, 1.0, 0.55)[..., None]
                picture = torch.where(done[..., None], 1 - strength * (1 - torch.tensor(to_rgb(colour))), picture)
            ax.imshow(picture, interpolation="nearest")
            for t in range(length):
                for i in range(t + 1):
                    if steps[t, i] <= now:
                        ink = "white" if scores[t, i] else "black"
                        ax.text(i, t, str(int(steps[t, i])), ha="center", va="center", fontsize=9, color=ink)
            ax.set_title(names[name], fontsize=11)
            ax.set(xlabel=f"key i\nstep {now} of {last}", xticks=[], yticks=[])
            ax.grid(False)
        axes[0].set_ylabel("query t")
        colours = {"computed as a score": SCORE_COLOUR, "read from the state": STATE_COLOUR}
        patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
        fig.legend(handles=patches, loc="outside lower center", ncols=2, fontsize=9)

    return plotting.animation(draw, range(1, length + 1), fps=2, height=3.5)


def _powers_of_two(ax: Axes, numbers: Sequence[int]) -> None:
    ax.set_xticks(numbers, [str(n) for n in numbers], minor=False)
    ax.minorticks_off()


def times(lengths: Sequence[int], seconds: Mapping[str, Sequence[float]], equal_work: int) -> Figure:
    """Time of each form against the length; a line marks where two of them do the same work."""
    fig, ax = plotting.figure(height=3.6)
    for style, (name, measured) in zip(OTHERS, seconds.items(), strict=True):
        ax.loglog(lengths, [1e3 * t for t in measured], **style, label=name)
    ax.axvline(equal_work, **GREY)
    ax.set(xlabel="length L", ylabel="milliseconds")
    _powers_of_two(ax, lengths)
    ax.legend()
    return fig


def valley(sizes: Sequence[int], measured: Tensor, fitted: Tensor) -> Figure:
    """Seconds of the chunkwise form against the chunk size, with the fitted model of steps plus work."""
    fig, ax = plotting.figure(height=3.4)
    ax.loglog(sizes, 1e3 * measured, **OTHERS[2], label="measured")
    ax.loglog(sizes, 1e3 * fitted, **GREY, label="steps and work, fitted")
    ax.set(xlabel="chunk size C", ylabel="milliseconds")
    _powers_of_two(ax, sizes)
    ax.legend()
    return fig


# --- The state as a memory -------------------------------------------------------------------------------
def letter(character: str, size: int = 14) -> Tensor:
    """A picture of a character as a vector of `size`**2 numbers, +1 for ink and -1 for paper, float64.

    >>> letter("M").shape
    torch.Size([196])
    """
    page = Image.new("L", (size, size), 0)
    font = ImageFont.load_default(size=14)
    ImageDraw.Draw(page).text((size / 2, size / 2), character, font=font, anchor="mm", fill=255)
    return torch.tensor(list(page.tobytes()), dtype=torch.float64) / 127.5 - 1


def letter_pictures(count: int) -> Tensor:
    """`count` pictures `[count, 196]`: MEMORY, then all letters and digits, then all of that again.

    >>> letter_pictures(100).unique(dim=0).shape  # 62 different characters
    torch.Size([62, 196])
    """
    alphabet = "MEMORY" + string.ascii_letters + string.digits
    return torch.stack([letter(alphabet[i % len(alphabet)]) for i in range(count)])


def recall_animation(counts: Sequence[int], recalled: Sequence[Tensor], errors: Sequence[float], d: int) -> Any:
    """Six pictures as they are recalled while more pairs are stored, and the error of all pairs below.

    recalled: for each of `counts`, the pictures `[6, 196]`; errors: the relative squared error.
    """

    def show(part: SubFigure, n: int) -> None:
        for ax, picture in zip(part.subplots(1, 6), recalled[n], strict=True):
            ax.imshow(picture.view(14, 14), cmap="gray", vmin=-1.2, vmax=0.7)
            ax.axis("off")

    def curve(part: SubFigure, n: int) -> None:
        ax = part.subplots()
        ax.plot(counts, [(m - 1) / d for m in counts], **GREY, label="predicted")
        points: dict[str, Any] = {**MECHANISMS["linear"], "linestyle": "", "label": "measured"}
        ax.plot(counts[: n + 1], errors[: n + 1], **points)
        ax.set(xlabel=f"pairs stored: {counts[n]}", ylabel="squared error", xlim=(0, 520), ylim=(0, 8.5))
        ax.legend(loc="upper left")

    def draw(fig: Figure, n: int) -> None:
        parts: Any = fig.subfigures(2, 1, height_ratios=[1, 1.6])
        top, bottom = parts
        show(top, n)
        curve(bottom, n)

    def strip(fig: Figure) -> None:
        chosen = [n for n, m in enumerate(counts) if m in (6, 64, 512)]
        parts: Any = fig.subfigures(len(chosen) + 1, 1, height_ratios=[1] * len(chosen) + [2.6])
        *rows, bottom = parts
        for row, n in zip(rows, chosen, strict=True):
            show(row, n)
            row.supylabel(f"{counts[n]:3d}", rotation=0, fontsize=9)
        curve(bottom, len(counts) - 1)
        bottom.axes[0].set_xlabel("pairs stored")

    return plotting.animation(draw, range(len(counts)), fps=1.5, height=4.4, still=strip)


def capacity_axes(ax: Axes, d: int, top: float = 2.2) -> None:
    """The axes on which memories are compared: squared error against stored pairs, with a mark at n = d."""
    ax.axvline(d, color="0.7", linewidth=1)
    ax.text(d, 0.6 * top, "n = d ", fontsize=9, color="0.35", ha="right")
    ax.set(xlabel="stored pairs n", ylabel="squared error", ylim=(-0.06, top))


def capacity(counts: Sequence[int], additive: Mapping[int, Sequence[float]], best: Sequence[float], d: int) -> Figure:
    """Left: the additive memory's error for several widths. Right: for width d, against the best keys and state."""
    fig, (left, right) = plotting.figure(columns=2, height=3.6)
    for style, (width, curve) in zip(OTHERS, additive.items(), strict=True):
        left.plot(counts, [(n - 1) / width for n in counts], color="0.6", linewidth=1, zorder=1)
        left.plot(counts, curve, **{**style, "linestyle": ""}, label=f"d = {width}")
    left.set(xlabel="stored pairs n", ylabel="squared error", ylim=(-0.1, 4))
    left.legend()
    capacity_axes(right, d, top=2.9)
    right.plot(counts, additive[d], **MECHANISMS["linear"], label=r"random keys, $S = K^\top V$")
    right.plot(counts, [max(0, n / d - 1) for n in counts], **GREY, label=r"best keys, $S = K^\top V$")
    right.plot(counts, best, **MECHANISMS["ideal"], label="random keys, least squares")
    right.set(ylabel="")
    right.legend(loc="upper left", fontsize=9)
    return fig


# --- Without a normaliser, and with decay ----------------------------------------------------------------
def normaliser(totals: Tensor, outputs: Mapping[str, Tensor]) -> Figure:
    """Left: the sum of the weights along a sequence. Right: the norm of three kinds of output."""
    position = range(1, len(totals) + 1)
    fig, (left, right) = plotting.figure(columns=2, height=3.5)
    left.axhline(0, color="0.6", linewidth=0.8)
    left.plot(position, totals, color=OTHERS[0]["color"], linewidth=1.2)
    left.set(xlabel="position t", ylabel="sum of the weights", title="what is divided by")
    for style, (name, curve) in zip(OTHERS, outputs.items(), strict=True):
        right.semilogy(position, curve, **style, markevery=40, linewidth=1.2, label=name)
    right.set(xlabel="position t", ylabel="norm", ylim=(0.5, 1e5), title="the output")
    right.legend(loc="upper left", fontsize=9.5)
    return fig


def decoding(tokens: Sequence[int], held: Sequence[Sequence[int]], took: Sequence[Sequence[float]]) -> Figure:
    """Bytes held (left) and seconds per token (right), for the cache and the state, against tokens so far."""
    fig, (left, right) = plotting.figure(columns=2, height=3.4)
    for column, (name, style) in enumerate((("softmax, cache", "softmax"), ("linear, state", "linear"))):
        left.loglog(tokens, [h[column] / 1024 for h in held], **MECHANISMS[style], label=name)
        right.loglog(tokens, [1e6 * s[column] for s in took], **MECHANISMS[style], label=name)
    left.axvline(next(n for n, h in zip(tokens, held, strict=True) if h[0] >= h[1]), color="0.6", linewidth=1)
    left.set(xlabel="tokens so far", ylabel="kilobytes")
    right.set(xlabel="tokens so far", ylabel="microseconds per token")
    left.legend()
    return fig


def decay_factors(factors: Mapping[str, Tensor]) -> Figure:
    """The factor that decay puts on each pair of query (row) and key (column), one panel for each decay."""
    fig, axes = plotting.figure(columns=len(factors), height=3.1)
    for ax, (name, factor) in zip(axes, factors.items(), strict=True):
        past = torch.ones_like(factor).tril().bool()
        image = plotting.matrix(ax, torch.where(past, factor, torch.nan), name, cmap="sequential", limit=1.0)
        ax.set_xlabel("key i")
    axes[0].set_ylabel("query t")
    fig.colorbar(image, ax=list(axes), label="factor", shrink=0.75, aspect=14)
    return fig


# --- What the figures measure ----------------------------------------------------------------------------
def seconds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """The time of one call on one thread: the shortest of several, since other programs only make a call longer.

    >>> seconds(sum, [1, 2]) > 0
    True
    """
    call = Timer("function(*args, **kwargs)", globals=locals())  # waits for a GPU
    return min(call.blocked_autorange(min_run_time=0.04).times)


def kept_for_backward(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> int:
    """How many numbers autograd holds between the forward and the backward pass of a call, inputs included.

    >>> x = torch.ones(3, requires_grad=True)
    >>> kept_for_backward(lambda x: x * x, x)
    3
    """
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*inputs, **options)
    del result
    return sum(t.untyped_storage().nbytes() // t.element_size() for t in storages.values())
