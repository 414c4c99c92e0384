"""Every exercise: the blank is not attempted, the solution passes, each mistake gets its own message."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
import pytest

from dn_lib.teaching import all_exercises, evaluate
from tools.lowering import Book, directives, exercise_title, page_number
from tools.notebooks import execute

BOOK = Path(__file__).resolve().parents[2] / "book"
CHAPTERS = [*Book(BOOK).chapters, *Book(BOOK).studies]


def place(number: str) -> tuple[str, int]:
    """Chapters first, then studies, each in the order of its exercises."""
    page, _, position = number.partition(".")
    return page, int(position)


NUMBERS = sorted(all_exercises(), key=place)

every_exercise = pytest.mark.parametrize("number", NUMBERS)
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
every_mutant = pytest.mark.parametrize(
    ("number", "index"),
    [(number, index) for number in NUMBERS for index in range(len(all_exercises()[number].mutants))],
)


def of_chapter(chapter: Path) -> list[str]:
    """The numbers of the registered exercises of a chapter."""
    return [number for number in NUMBERS if number.split(".")[0] == page_number(chapter)]


def raises_not_implemented(*inputs):
    raise NotImplementedError


def body_is_dots(*inputs): ...


@every_exercise
@pytest.mark.parametrize(
    "blank", [body_is_dots, lambda *inputs: ..., lambda *inputs: (..., ...), raises_not_implemented]
)
def test_blank_is_not_attempted(number, blank):
    verdict = evaluate(number, blank)
    assert (verdict.status, verdict.message) == ("not attempted", f"○ {number} not attempted yet.")


@every_exercise
def test_reference_passes(number):
    """In its numbers: the plainest form is the reference, and where another is asked for, it breaks the rule."""
    exercise = all_exercises()[number]
    verdict = evaluate(number, exercise.reference)
    assert verdict.status == "right" or (verdict.status == "method" and exercise.rules), verdict.message


@every_mutant
def test_mutant_gets_its_own_message(number, index):
    exercise = all_exercises()[number]
    mutant = exercise.mutants[index]
    verdict = evaluate(number, mutant.fn)
    assert verdict.status == "misunderstanding", verdict.message
    assert mutant.message in verdict.message and mutant.hint in verdict.message
    others = [m.message for m in exercise.mutants if m is not mutant]
    assert mutant.message not in others


@every_exercise
def test_entry_is_complete(number):
    exercise = all_exercises()[number]
    assert len(exercise.mutants) >= 3
    assert exercise.stars in (1, 2, 3) and exercise.minutes > 0 and exercise.title and exercise.tested


@every_chapter
def test_chapter_asks_every_exercise(chapter):
    """The directive, with the stars and minutes of the entry, and below it a blank that calls `check`."""
    numbers = of_chapter(chapter)
    text = chapter.read_text(encoding="utf-8")
    asked = {d.options.get("label"): d.argument for d in directives(text) if d.name == "exercise"}
    assert list(asked) == [f"ex-{number.replace('.', '-')}" for number in numbers]
    cells = [cell.source for cell in jupytext.reads(text, fmt="md:myst").cells if cell.cell_type == "code"]
    for number in numbers:
        exercise = all_exercises()[number]
        title, stars, minutes = exercise_title(asked[f"ex-{number.replace('.', '-')}"])
        assert (title, stars, minutes) == (exercise.title, exercise.stars, exercise.minutes)
        assert sum(f'check("{number}", ' in cell for cell in cells) == 1, f"{number} is checked in one cell"


@every_chapter
def test_stored_blanks_say_not_attempted(chapter):
    pair = BOOK / "notebooks" / f"{chapter.stem}.ipynb"
    assert pair.exists(), "run make notebooks"
    outputs = {}
    for cell in nbformat.read(pair, as_version=4).cells:
        for number in re.findall(r'^check\("(S?\d+\.\d+)", ', cell.source, re.MULTILINE):
            outputs[number] = "".join(output.get("text", "") for output in cell.outputs)
    assert list(outputs) == of_chapter(chapter)
    for number, text in outputs.items():
        assert f"○ {number} not attempted yet." in text


@every_chapter
def test_solutions_pass(chapter):
    """The page of solutions runs on its own and ticks off every exercise of its chapter."""
    solutions = BOOK / "solutions" / chapter.name
    assert solutions.exists(), f"{chapter.name} has no solutions"
    page = jupytext.read(solutions, fmt="md:myst")
    execute(page, solutions.parent)
    outputs = [output for cell in page.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    verdicts = {number: mark for mark, number in re.findall(r"(?m)^([✓○✗]) (S?\d+\.\d+) ", printed)}
    assert verdicts == dict.fromkeys(of_chapter(chapter), "✓"), printed
