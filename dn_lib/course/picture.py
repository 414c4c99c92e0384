"""Who is stuck where: a class in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

if TYPE_CHECKING:
    from dn_lib.course.grade import Row

# Colours of Okabe and Ito; the sign says the same to who cannot tell them apart.
LOOKS = {
    "right": ("#009E73", "✓", "right"),
    "method": ("#56B4E9", "m", "right numbers, another method"),
    "misunderstanding": ("#E69F00", "?", "a misunderstanding with a name"),
    "wrong": ("#D55E00", "✗", "wrong"),
    "error": ("#CC79A7", "!", "raised, too slow or too large"),
    "not attempted": ("#F2F2F2", "", "not attempted"),
    "unreadable": ("#7F7F7F", "–", "no notebook, or a damaged one"),
    "missing": ("#7F7F7F", "–", "no notebook, or a damaged one"),
}
STUCK = ("misunderstanding", "wrong", "error", "method")


def draw(rows: Sequence[Row], path: Path) -> None:
    """A square for each student and exercise; above it, how many of the class are right and how many are stuck."""
    exercises = list(dict.fromkeys(row.exercise for row in rows))
    table = {(row.student, row.exercise): row.status for row in rows}
    total: dict[str, float] = {}
    for row in rows:
        total[row.student] = total.get(row.student, 0.0) + row.points
    students = sorted(total, key=lambda student: -total[student])
    kinds = list(LOOKS)
    grid = np.array([[kinds.index(table[student, n]) for n in exercises] for student in students])

    tall, wide = 0.23 * len(students) + 0.4, max(0.34 * len(exercises), 3.6)
    figure = Figure(figsize=(wide + 2.6, tall + 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    bars, squares = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, tall])
    counts = np.array([[table[s, n] in kinds_ for s in students] for n in exercises for kinds_ in (("right",), STUCK)])
    right, stuck = counts.sum(1).reshape(-1, 2).T
    place = np.arange(len(exercises))
    bars.bar(place - 0.2, right, 0.38, color=LOOKS["right"][0], label="right")
    bars.bar(place + 0.2, stuck, 0.38, color=LOOKS["wrong"][0], hatch="///", edgecolor="white", label="stuck")
    bars.set_ylabel("students")
    bars.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), fontsize=8)
    bars.spines[["top", "right"]].set_visible(False)

    squares.imshow(
        grid, cmap=ListedColormap([LOOKS[k][0] for k in kinds]), vmin=-0.5, vmax=len(kinds) - 0.5, aspect="auto"
    )
    for i in range(len(students)):
        for j in range(len(exercises)):
            squares.text(j, i, LOOKS[kinds[grid[i, j]]][1], ha="center", va="center", fontsize=8)
    squares.set_xticks(place, exercises, fontsize=8, rotation=90 if len(exercises) > 20 else 0)
    # Names are no formulas, whatever they hold.
    squares.set_yticks(range(len(students)), [s[:24] for s in students], fontsize=7, parse_math=False)
    squares.set_xticks(place[:-1] + 0.5, minor=True)
    squares.set_yticks(np.arange(len(students) - 1) + 0.5, minor=True)
    squares.grid(which="minor", color="white", linewidth=1)
    squares.tick_params(which="both", length=0)
    squares.spines[:].set_visible(False)
    shown = {LOOKS[k][2]: LOOKS[k] for k in kinds if k in table.values()}
    handles = [Patch(facecolor=colour, label=f"{sign or ' '}  {text}") for text, (colour, sign, _) in shown.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
