"""The times that a chapter states are those of its length: the text's, its code's, its exercises'.

A minute is 200 words of prose, or 100 words of mathematics, where a word is what stands between two spaces of a
formula, as `S_t`, `=` or `k_t^\\top`; or ten lines of code.  Times are stated in steps of five minutes (of one, below
ten).  They may be off by three minutes (by one, below ten): by what rounding can do, and a few sentences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jupytext
import pytest

from tools.lowering import DIRECTIVES, Book, directives, exercise_title, fences

BOOK = Book(Path(__file__).resolve().parents[2] / "book")
TIMED = [*BOOK.chapters[:4], BOOK.chapters[5], *BOOK.studies]  # chapter 5 says in hours how long it takes
WORDS = 2300, 4300  # of a study, exercises left out
PROSE, MATHEMATICS, CODE = 200, 100, 10  # words, words and lines a minute

DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
INLINE = re.compile(r"(?<!\\)\$([^$]+)\$")
LAYOUT = re.compile(r"\\(?:begin|end)\{\w+\}(?:\{\w+\})?|\\[,;:!]|\\q?quad\b|\\\\|&")
CITATION = re.compile(r"\{cite\}`[^`]+`")
ROLE = re.compile(r"\{\w+\}`([^`<]*)(?:<[^>]*>)?`")  # of {ref}`text <label>`, the text is read


@dataclass
class Parts:
    """The text of the main line, what is folded away, and code; exercises and their hints belong to none of them."""

    main: str = ""
    folded: str = ""
    code: str = ""


def split(text: str) -> Parts:
    parts, start, lines = Parts(), 0, text.splitlines()
    found = {directive.first: directive for directive in directives(text)}
    for token in fences(text):
        first, last = token.map
        parts.main += "\n".join(lines[start:first]) + "\n"
        start = last
        directive = found.get(first)
        if directive is None:
            parts.code += token.content  # shown, not run
        elif directive.name == "math":
            parts.main += f"$${directive.body}$$\n"
        elif directive.name in DIRECTIVES - {"exercise"} and directive.argument != "Hint":
            inner = split(directive.body)
            inner.main = f"{directive.argument}\n{inner.main}"
            parts.code += inner.code
            if "dropdown" in directive.options.get("class", ""):
                parts.folded += inner.main + inner.folded
            else:
                parts.main, parts.folded = parts.main + inner.main, parts.folded + inner.folded
    parts.main += "\n".join(lines[start:])
    return parts


def parts_of(chapter: Path) -> Parts:
    parts = Parts()
    for cell in jupytext.read(chapter, fmt="md:myst").cells:
        if cell.cell_type == "markdown":
            found = split(cell.source)
            parts.main, parts.folded = parts.main + found.main + "\n", parts.folded + found.folded
            parts.code += found.code
        elif not re.search(r"(?m)^check\(", cell.source):  # the rest are exercises
            parts.main += cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "") + "\n"
            parts.code += cell.source + "\n"
    return parts


def minutes(text: str) -> float:
    """How long a text takes to read.

    >>> minutes("The state is $S_t = S_{t-1} + k_t v_t^\\\\top$.") == 3 / 200 + 6 / 100
    True
    """
    formulas = DISPLAY.findall(text)
    text = DISPLAY.sub(" ", text)
    formulas += INLINE.findall(text)
    text = ROLE.sub(r" \1 ", CITATION.sub(" source ", INLINE.sub(" ", text)))
    mathematics = [word for formula in formulas for word in LAYOUT.sub(" ", formula).split()]
    prose = re.findall(r"\w[\w’'.,-]*", text)
    return len(prose) / PROSE + len(mathematics) / MATHEMATICS


def lines_of_code(code: str) -> int:
    return sum(bool(line.strip()) for line in code.splitlines())


def opening(chapter: Path) -> str:
    return " ".join(chapter.read_text("utf-8").partition("\n(sec-")[0].split())


def as_stated(measured: float, stated: int) -> bool:
    step, tolerance = (5, 3) if stated >= 10 else (1, 1)
    return stated % step == 0 and abs(measured - stated) <= tolerance


@pytest.mark.parametrize("chapter", TIMED, ids=lambda path: path.stem)
def test_a_chapter_takes_as_long_as_it_says(chapter):
    stated = re.search(
        r"main line takes about (\d+) minutes(?: to read)?, and about (\d+) more with its code; "
        r"(?:what is folded away takes (\d+)|nothing is folded away)",
        opening(chapter),
    )
    assert stated, "the opening says how long its text, its code and its folded parts take"
    parts = parts_of(chapter)
    measured = minutes(parts.main), lines_of_code(parts.code) / CODE, minutes(parts.folded)
    for name, found, said in zip(("text", "code", "folded"), measured, map(int, stated.groups(default=0)), strict=True):
        assert as_stated(found, said), f"{name}: {found:.1f} minutes, stated as {said}"
    most = 45 if chapter in BOOK.studies else 60
    assert measured[0] + measured[1] <= most  # a main line can be read in an hour, its code included
    assert sum(map(int, stated.groups()[:2])) <= most  # and the opening promises no more


@pytest.mark.parametrize("study", BOOK.studies, ids=lambda path: path.stem)
def test_a_study_is_short(study):
    parts = parts_of(study)
    assert WORDS[0] <= len((parts.main + parts.folded).split()) <= WORDS[1]


HOURS = {
    "about an hour": (45, 65),
    "about an hour and a half": (75, 105),
    "a good hour": (60, 75),
    "about two hours": (105, 135),
    "a good two hours": (120, 150),
    "about two and a half hours": (135, 165),
}


@pytest.mark.parametrize("chapter", TIMED, ids=lambda path: path.stem)
def test_exercises_take_as_long_as_it_says(chapter):
    (said,) = re.findall(r"[Tt]he exercises (?:take|are meant for) ([\w ]+?)[.;]", opening(chapter))
    each = [exercise_title(line)[2] for line in re.findall(r"(?m)^`{3,}\{exercise\} (.*)", chapter.read_text("utf-8"))]
    least, most = HOURS[said]
    assert least <= sum(each) <= most, f"{sum(each)} minutes, stated as {said}"


def test_the_measure_counts_words_formulas_and_folds():
    parts = split(
        "One two $a + b$.\n\n```{math}\n:label: x\nc = d\n```\n\n```{admonition} Three\n:class: dropdown\nfour\n```"
    )
    assert minutes(parts.main) == pytest.approx(2 / PROSE + 6 / MATHEMATICS)
    assert minutes(parts.folded) == pytest.approx(2 / PROSE)
    assert minutes("word " * 400) == pytest.approx(2)
    hidden = split(
        "```{exercise} Think (★, 5 min)\nlong text\n```\n\n```{admonition} Hint\n:class: dropdown\nmore\n```"
    )
    assert not hidden.main.strip() and not hidden.folded
    assert not as_stated(26.9, 30) and as_stated(27.6, 30) and not as_stated(28.0, 28)
