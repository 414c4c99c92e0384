"""Every labelled equation of the book is checked, and every classic wrong version of it is caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dn_lib.teaching import Equation, all_equations, holds
from tools.lowering import Book, equation_labels

BOOK = Path(__file__).resolve().parents[2] / "book"
CHAPTERS = Book(BOOK).pages

every_equation = pytest.mark.parametrize("equation", all_equations().values(), ids=lambda e: e.label)
every_mutant = pytest.mark.parametrize(
    ("equation", "name"),
    [(equation, name) for equation in all_equations().values() for name in equation.mutants],
    ids=lambda value: value.label if isinstance(value, Equation) else value.replace(" ", "-"),
)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_every_label_has_an_entry(chapter):
    missing = [label for label in equation_labels(chapter.read_text("utf-8")) if label not in all_equations()]
    assert not missing, f"{chapter.name} labels equations that dn_lib/teaching/equations/ lacks"


def test_every_entry_has_a_label():
    labels = [label for chapter in CHAPTERS for label in equation_labels(chapter.read_text("utf-8"))]
    assert not sorted(set(all_equations()) - set(labels)), "these entries belong to no labelled equation"
    assert len(labels) == len(set(labels)), "a label is used twice"


@every_equation
def test_equation_holds(equation):
    assert holds(equation)


@every_equation
def test_equation_has_mutants(equation):
    assert equation.mutants, f"{equation.label} needs at least one wrong version"


@every_mutant
def test_mutant_is_caught(equation, name):
    assert not holds(equation, equation.mutants[name]), f"the check of {equation.label} accepts: {name}"


@every_equation
def test_inputs_are_double_precision_or_the_tolerance_says_so(equation):
    inputs = equation.sample(torch.Generator().manual_seed(1))
    floats = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert equation.tolerance > 1e-7 or all(x.dtype == torch.float64 for x in floats)


# --- the checks themselves: on an equation of our own, right and wrong versions of every kind


def draw(generator):
    return (torch.rand(5, generator=generator, dtype=torch.float64),)


EXAMPLE = Equation("eq-example", "identity", draw, lambda x: (x + 1) ** 2, lambda x: x**2 + 2 * x + 1)


@pytest.mark.parametrize("kind", ["identity", "definition"])
def test_equality_is_two_sided_and_tight(kind):
    equation = replace(EXAMPLE, kind=kind)
    assert holds(equation)
    assert not holds(equation, lambda x: x**2 + 2 * x)
    assert not holds(equation, lambda x: (x**2 + 2 * x + 1) * (1 + 1e-9))
    assert not holds(equation, lambda x: (x + 1).sum())  # another shape
    assert not holds(equation, lambda x: x * float("nan"))


def test_bound_is_one_sided():
    bound = replace(EXAMPLE, kind="bound")
    assert holds(bound, lambda x: (x + 1) ** 2 + 1) and holds(bound)
    assert not holds(bound, lambda x: (x + 1) ** 2 - 1e-6)
    assert not holds(bound, lambda x: torch.full_like(x, float("nan")))


def test_count_is_exact():
    count = Equation("eq-count", "count", lambda g: (7,), lambda n: sum(range(n + 1)), lambda n: n * (n + 1) // 2)
    assert holds(count)
    assert not holds(count, lambda n: n * (n + 1) // 2 + 1)


def test_kind_is_checked():
    with pytest.raises(ValueError, match="kind must be one of"):
        replace(EXAMPLE, kind="guess")
