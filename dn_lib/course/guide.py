"""The tables of the instructor's guide, made from the registry of exercises."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dn_lib.teaching.registry import Exercise, all_exercises

SPECIAL = re.compile(r"([\\|*_<>$\[\]{}#])")


class Table:
    """A table that notebooks and the site show as one."""

    def __init__(self, head: Sequence[str], rows: Sequence[Sequence[str]]):
        self.head, self.rows = head, rows

    def _repr_markdown_(self) -> str:
        lines = [self.head, [":--"] * len(self.head), *([_plain(cell) for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __repr__(self) -> str:
        return f"a table of {len(self.rows)} rows"


def _plain(text: str) -> str:
    """`text` as Markdown that shows it as it is, in one line; what stands between backticks stays code."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part.replace("|", "\\|") if part.startswith("`") else SPECIAL.sub(r"\\\1", part) for part in parts)


def _of_chapter(chapter: int) -> list[Exercise]:
    found = [e for number, e in all_exercises().items() if number.startswith(f"{chapter}.")]
    return sorted(found, key=lambda exercise: int(exercise.number.partition(".")[2]))


def tested(chapter: int) -> Table:
    """What `check` tries for each exercise of a chapter, and whether it looks at the method.

    >>> tested(6)
    a table of 7 rows
    """
    rows = []
    for e in _of_chapter(chapter):
        edges = "".join(f"; {extreme.name}" for extreme in e.extremes)
        method = "; the method" * bool(e.rules) + "; arguments left as they are" * e.keeps_inputs
        rows.append((e.number, e.title, "★" * e.stars, str(e.minutes), f"{e.tested}{edges}{method}"))
    return Table(("", "exercise", "", "minutes", "what is tried"), rows)


def misunderstandings(chapter: int) -> Table:
    """The mistakes of a chapter's exercises that `check` knows by name, with the hints that it gives."""
    rows = []
    for e in _of_chapter(chapter):
        if e.candidates:
            rows += [(e.number, f"The test lets through: {c.name}.", c.hint) for c in e.candidates if not c.right]
        else:
            rows += [(e.number, mutant.message, mutant.hint) for mutant in e.mutants]
    return Table(("", "what is wrong", "the hint"), rows)
