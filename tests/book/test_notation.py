"""One letter, one meaning: what the kernels and chapters call by a letter is what the notation page says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "book" / "notation.md").read_text()
KERNELS = sorted((ROOT / "dn_lib" / "kernels").rglob("*.py"))
PAGES = sorted((ROOT / "book").glob("*.md"))
CHAPTERS = sorted((ROOT / "book").glob("0*.md"))
DEFINED = "BNREZG"  # the letters of a chunk that a short equation defines
DEFINITION = re.compile(rf"(?:^|\s{{2,}})([{DEFINED}])\s+= (.+?)(?=\s{{2,}}|$)")


def plain(text: str) -> str:
    """A product without spaces, LaTeX, or brackets around factors: N (D R) and N D R are one."""
    for latex, ascii in (("\\tilde V", "Vn"), ("\\top", "T"), ("\\operatorname{tril}", "tril"), ("\\,", "")):
        text = text.replace(latex, ascii)
    text = re.sub(r"(?<!tril)\(([A-Z]\w* ?[A-Za-z]\w*)\)", r"\1", text)
    return re.sub(r"[\s{}$`]", "", text)


def defined() -> dict[str, set[str]]:
    """The formulas by which the page's table of a chunk explains each letter."""
    section = PAGE[PAGE.index("(sec-chunk-letters)=") : PAGE.index("(sec-papers)=")]
    cells = [line.split(" | ") for line in section.splitlines() if line.startswith("| $")]
    return {
        letter: {plain(formula) for formula in re.findall(r"\$[^$]+\$|`[^`]+`", " ".join(c[1:]))}
        for c in cells
        for letter in re.findall(r"(?<![\\A-Za-z])[A-Z]\b", c[0].lstrip("| "))
    }


def definitions(path: Path) -> list[tuple[str, str]]:
    """From the lines of docstrings that are set apart: letter and right side."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Module, ast.FunctionDef))]
    lines = [line for n in nodes for line in (ast.get_docstring(n) or "").splitlines() if line.startswith("    ")]
    return [found for line in lines for found in DEFINITION.findall(line)]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_kernels_define_letters_as_the_page_does(path):
    for letter, right in definitions(path):
        assert plain(right) in defined()[letter], f"{letter} = {right}"


def test_the_kernels_define_each_letter():
    assert {letter for path in KERNELS for letter, _ in definitions(path)} == set(DEFINED)


@pytest.mark.parametrize(
    "wrong", ["R = V - S K", "N = (I + B D)^{-1} B", "G = -tril(Vn dR^T, -1)", "B = tril(K K^T)", "E = R + N D"]
)
def test_another_meaning_is_found(wrong):
    ((letter, right),) = DEFINITION.findall(wrong)
    assert plain(right) not in defined()[letter]


@pytest.mark.parametrize("path", [*CHAPTERS, *KERNELS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_l_is_the_length_alone(path):
    """The overlaps of the keys, tril(K K^T, -1), are B."""
    assert not re.search(r"\bL ?= ?(\\mathrm\{tril\}|tril)\b|\(I \+ (D ?L|L ?D)\)|\bL_\{?21", path.read_text())


def test_no_page_says_a_thing_twice():
    """Each target and each heading of a page stands once: a repeated section would be one link to two places."""
    targets = [label for path in PAGES for label in re.findall(r"^\(([\w-]+)\)=$", path.read_text(), re.M)]
    assert sorted(targets) == sorted(set(targets))
    for path in PAGES:
        prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
        headings = re.findall(r"^#+ .*", prose, re.M)
        assert sorted(headings) == sorted(set(headings)), path.name
