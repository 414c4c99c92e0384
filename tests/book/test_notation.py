"""Every letter of the kernels' equations and of the chapters stands in the notation page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "dn_lib" / "kernels").rglob("*.py"))
CHAPTERS = sorted((ROOT / "book").glob("0*.md"))
LETTER = re.compile(r"(?<![A-Za-z_`\\])(d?[A-Z]|Vn)(?![A-Za-z_`])")


def listed() -> set[str]:
    """The capital letters in the first columns of the page's first two tables, those of chapters 1 and 6, and Vn."""
    page = (ROOT / "book" / "notation.md").read_text()
    begin, end = page.index("(sec-symbols)="), page.index("(sec-papers)=")
    section = page[begin:end]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    local = section[section.index("Chapter 1 writes") :]
    text = re.sub(r"\\[A-Za-z]+", " ", " ".join(cells) + local)
    return set(re.findall(r"(?<![A-Za-z])[A-Z](?![a-z])", text)) | {"Vn", "I"}


def equations(path: Path) -> list[str]:
    """The indented lines of a module's docstrings that hold an equation."""
    tree = ast.parse(path.read_text())
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef))]
    lines = [line for n in nodes for line in (ast.get_docstring(n) or "").splitlines()]
    return [line for line in lines if line.startswith("    ") and " = " in line and ">>>" not in line]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_letters_of_the_kernels(path):
    unknown = {}
    for line in equations(path):
        for letter in LETTER.findall(line):
            if letter.removeprefix("d") not in listed() and letter != "Vn":
                unknown[letter] = line.strip()
    assert not unknown


def test_the_kernels_have_equations():
    assert sum(len(equations(path)) for path in KERNELS) > 10


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_letters_of_the_chapters(path):
    """Capitals in formulas; a blackboard or calligraphic letter is a name of its own."""
    text = re.sub(r"```\{code-cell\}.*?\n```", "", path.read_text(), flags=re.S)
    formulas = re.findall(r"```\{math\}(.*?)```", text, re.S) + re.findall(r"(?<![\\$])\$+([^$]+)\$", text)
    unknown = {}
    for formula in formulas:
        formula = re.sub(r":label:.*", "", formula)
        formula = re.sub(r"\\(text|mathrm|operatorname|mathbb|mathcal|mathbf)\{[^}]*\}", " ", formula)
        formula = re.sub(r"\\[A-Za-z]+|_\{?\\?[A-Za-z]+\}?|O\([^)]*\)", " ", formula)
        for letter in re.findall(r"(?<![A-Za-z])[A-Z](?![a-z])", formula):
            if letter not in listed():
                unknown[letter] = formula.strip()
    assert not unknown


@pytest.mark.parametrize("path", [*CHAPTERS, *KERNELS], ids=lambda path: path.stem)
def test_l_is_the_length_alone(path):
    """The overlaps of the keys, tril(K K^T, -1), are B."""
    assert not re.search(r"\bL ?= ?(\\mathrm\{tril\}|tril)\b|\(I \+ (D ?L|L ?D)\)|L_\{?21", path.read_text())
