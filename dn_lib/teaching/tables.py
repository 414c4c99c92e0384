"""Tables that a cell shows: real ones in a notebook, on the site and in print, aligned text in a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

NOTHING = "not measured yet"
SPECIAL = re.compile(r"([\\|*_<>$\[\]{}#~])")
SIZES = re.compile(r"(?<=\d) x (?=\d)")  # between the sizes of a shape
MINUS = re.compile(r"(?<![^\de])-(?=\d)")  # of a number or its exponent
NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?[%A-Za-zµ/]{1,3})?|-")


def as_markdown(text: str) -> str:
    """`text` in one line of Markdown that shows it as it is; what stands between backticks stays code.

    >>> print(as_markdown("a_b of `a_b`"))
    a\\_b of `a_b`
    """
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part.replace("|", "\\|") if part.startswith("`") else SPECIAL.sub(r"\\\1", part) for part in parts)


def _unbroken(cell: str) -> str:
    """A cell as Markdown, where neither a shape nor a number with an exponent is broken over two lines."""
    if NUMBER.fullmatch(cell):
        cell = MINUS.sub("\u2212", cell)
    return SIZES.sub("\u00a0x\u00a0", as_markdown(cell))


@dataclass(frozen=True, repr=False)
class Table:
    """A table, to be the last expression of a cell; `str` is the same as aligned text.

    head: the columns' titles.  rows: of as many cells each, as text; what stands between backticks is code.  notes:
    lines below the table.  empty: what stands in place of a table without rows.  A column that holds only numbers is
    aligned to the right.  Raises ValueError for a row with another number of cells than `head`.

    >>> print(Table(("kernel", "ms"), [("`scan`", "0.5"), ("`inverse`", "12.0")]))
    kernel     ms
    scan      0.5
    inverse  12.0
    >>> Table(("kernel", "ms"), [])
    not measured yet
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    empty: str = NOTHING

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.head):
                raise ValueError(f"rows must have {len(self.head)} cells as head has, got {len(row)} in row {number}")

    def _numbers(self) -> list[bool]:
        columns = [[cell for cell in column if cell] for column in zip(*self.rows, strict=True)]
        return [bool(column) and all(NUMBER.fullmatch(cell) for cell in column) for column in columns]

    def _repr_markdown_(self) -> str:
        if not self.rows:
            return as_markdown(self.empty)
        rule = ["--:" if number else ":--" for number in self._numbers()]
        lines = [[as_markdown(cell) for cell in self.head], rule]
        lines += [[_unbroken(cell) for cell in row] for row in self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([table, *map(as_markdown, self.notes)])

    def __repr__(self) -> str:
        if not self.rows:
            return self.empty
        lines = [[cell.replace("`", "") for cell in line] for line in (self.head, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        kinds = list(zip(widths, self._numbers(), strict=True))
        text = [
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for cell, (width, number) in zip(line, kinds, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*text, *(note.replace("`", "") for note in self.notes)])


class Tables:
    """Tables and sentences one below the other, to be the last expression of a cell.

    >>> print(Tables(Table(("n",), [("1",)]), "A sentence."))
    n
    1
    <BLANKLINE>
    A sentence.
    """

    def __init__(self, *parts: Table | str):
        self.parts = parts

    def _repr_markdown_(self) -> str:
        return "\n\n".join(as_markdown(p) if isinstance(p, str) else p._repr_markdown_() for p in self.parts)

    def __repr__(self) -> str:
        return "\n\n".join(str(part).replace("`", "") for part in self.parts)
