"""A kernel's accesses as pictures: the tiles that each program reads and writes, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dn_lib.teaching.judge.trace import Access, Dot, Launch

PROGRAM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
# --- Pictures -------------------------------------------------------------------------------------------
Step = list[Access | Dot]


def _plane(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as rows and columns for a picture."""
    columns = shape[-1] if len(shape) > 1 else (shape[0] if shape else 1)
    return (int(np.prod(shape)) if shape else 1) // max(columns, 1), columns


def steps(launch: Launch) -> list[Step]:
    """What happens when, if all programs run in step: a list of events for each step.

    A program's step is a run of loads, or a run of stores, with the dots that follow it.

    >>> import torch
    >>> from dn_lib.teaching.judge.trace import record
    >>> from dn_lib.kernels.ladder import scaled_add
    >>> with record() as trace:
    ...     out = scaled_add(torch.ones(100), torch.ones(100), 2.0, block=64)
    >>> [sorted({event.kind for event in step}) for step in steps(trace.launches[0])]
    [['load'], ['store']]
    """
    by_program: dict[int, list[Step]] = {}
    last: dict[int, str] = {}
    for event in launch.events:
        own = by_program.setdefault(event.program, [])
        kind = event.kind if isinstance(event, Access) else "dot"
        if not own or (kind != "dot" and kind != last[event.program]):
            own.append([])
        own[-1].append(event)
        last[event.program] = kind
    longest = max(map(len, by_program.values()), default=0)
    return [[e for own in by_program.values() if n < len(own) for e in own[n]] for n in range(longest)]


def _paint(picture: np.ndarray, elements: np.ndarray, columns: int, program: int, now: bool, fresh: np.ndarray) -> None:
    """Colour `elements`; what two programs touch in one step is chequered in both colours."""
    from matplotlib.colors import to_rgb

    colour = np.array(to_rgb(PROGRAM_COLOURS[program % len(PROGRAM_COLOURS)]))
    chequer = (elements // columns + elements % columns) // 2 % 2 == program % 2
    chosen = elements[fresh[elements] | chequer]
    picture[chosen] = 1 - (1.0 if now else 0.25) * (1 - colour)
    fresh[elements] = False


def _paint_until(ax: Any, launch: Launch, events: list[Step], name: str, n: int) -> set[str]:
    """What programs touched of one tensor up to step `n`, in full colour what they touch in it; returns how they do."""
    rows, columns = _plane(launch.shapes[name])
    picture = np.ones((rows * columns, 3))
    for number, step in enumerate(events[: n + 1]):
        fresh = np.ones(rows * columns, bool)
        for event in step:
            if isinstance(event, Access) and event.tensor == name:
                _paint(picture, event.elements, columns, event.program, number == n, fresh)
    kinds = {e.kind for e in events[n] if isinstance(e, Access) and e.tensor == name}
    ax.imshow(picture.reshape(rows, columns, 3), interpolation="nearest", aspect="auto")
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set(visible=True, linewidth=3.0 if kinds - {"load"} else 0.8)
    return kinds


def _widths(launch: Launch, tensors: list[str]) -> list[int]:
    return [max(_plane(launch.shapes[name])[1], 12) for name in tensors]


def draw_step(fig: Any, launch: Launch, tensors: list[str], n: int) -> None:
    """Draw step `n` of `launch` on `fig`: full colour is touched now, pale was touched before.

    Each program has a colour.  A tensor that is being stored has a thick frame.
    """
    events = steps(launch)
    axes = np.atleast_1d(fig.subplots(1, len(tensors), width_ratios=_widths(launch, tensors)))
    for ax, name in zip(axes, tensors, strict=True):
        kinds = _paint_until(ax, launch, events, name, n)
        ax.set_title(" ".join([name, *(f"({kind})" for kind in sorted(kinds))]), fontsize=9)
    dots = [f"[{e.m}, {e.k}] x [{e.k}, {e.n}]" for e in events[n] if isinstance(e, Dot) and e.program == 0]
    count = f"{len(dots)} dot" if len(dots) == 1 else f"{len(dots)} dots"
    then = f", then {count}: {', '.join(dict.fromkeys(dots))}" if dots else ""
    fig.suptitle(f"{launch.kernel}, step {n + 1} of {len(events)}{then}", fontsize=10)


def stages(count: int) -> list[int]:
    """The steps of `count` that stand for an animation where nothing moves: at most three, the last among them.

    >>> stages(2), stages(9)
    ([0, 1], [0, 4, 8])
    """
    return sorted({0, count // 2, count - 1})


def draw_strip(fig: Any, launch: Launch, tensors: list[str], shown: Sequence[int]) -> None:
    """The steps `shown` of `launch` one below the other, a column for each tensor, which is what print gets."""
    events = steps(launch)
    axes = fig.subplots(len(shown), len(tensors), width_ratios=_widths(launch, tensors), squeeze=False)
    for row, n in zip(axes, shown, strict=True):
        for ax, name in zip(row, tensors, strict=True):
            _paint_until(ax, launch, events, name, n)
        row[0].set_ylabel(f"step {n + 1}", fontsize=9)
    for ax, name in zip(axes[0], tensors, strict=True):
        ax.set_title(name, fontsize=9)
    named = ", ".join(str(n + 1) for n in shown)
    fig.suptitle(f"{launch.kernel}, steps {named} of {len(events)}; full colour is touched now", fontsize=10)


def animate(launch: Launch, tensors: list[str] | None = None, *, limit: int = 24, height: float = 3.0) -> Any:
    """An animated figure of `launch`, at most `limit` steps of it, as the last expression of a cell.

    tensors: names of those to draw, in order; all by default.  Where nothing moves, three steps stand one below the
    other.
    """
    from dn_lib.teaching import plotting

    names = tensors or list(launch.shapes)
    shown = range(min(len(steps(launch)), limit))
    return plotting.animation(
        lambda fig, n: draw_step(fig, launch, names, n),
        shown,
        fps=2,
        height=height,
        still=lambda fig: draw_strip(fig, launch, names, stages(len(shown))),
    )
