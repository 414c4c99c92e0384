"""The tables of the instructor's guide, made from the registry of exercises."""

from __future__ import annotations

from dn_lib.teaching.registry import Exercise, all_exercises
from dn_lib.teaching.tables import Table


def _of_chapter(chapter: int | str) -> list[Exercise]:
    found = [e for number, e in all_exercises().items() if number.startswith(f"{chapter}.")]
    return sorted(found, key=lambda exercise: int(exercise.number.partition(".")[2]))


def tested(chapter: int | str) -> Table:
    """What `check` tries for each exercise of a chapter, or of a study ("S1"), and whether it looks at the method.

    >>> tested(6).head[-1], tested(6).rows[0][:4]
    ('what is tried', ('6.1', 'Bits per byte', '★', '5'))
    """
    rows = []
    for e in _of_chapter(chapter):
        edges = "".join(f"; {extreme.name}" for extreme in e.extremes)
        method = "; the method" * bool(e.rules) + "; arguments left as they are" * e.keeps_inputs
        rows.append((e.number, e.title, "★" * e.stars, str(e.minutes), f"{e.tested}{edges}{method}"))
    return Table(("", "exercise", "", "minutes", "what is tried"), rows)


def misunderstandings(chapter: int | str) -> Table:
    """The mistakes of a chapter's exercises that `check` knows by name, with the hints that it gives."""
    rows = []
    for e in _of_chapter(chapter):
        if e.candidates:
            rows += [(e.number, f"The test lets through: {c.name}.", c.hint) for c in e.candidates if not c.right]
        else:
            rows += [(e.number, mutant.message, mutant.hint) for mutant in e.mutants]
    return Table(("", "what is wrong", "the hint"), rows)
