"""`check` and the registry themselves, on an exercise of our own."""

from __future__ import annotations

import types

import pytest
import torch

from dn_lib.teaching import Exercise, Mutant, check, checks, evaluate, registry, relative_error


def draw(generator):
    return torch.randn(4, 3, generator=generator, dtype=torch.float64), 2.0


def scaled(x, factor):
    return x * factor


EXERCISE = Exercise(
    number="9.1",
    title="Scale",
    stars=1,
    minutes=5,
    sample=draw,
    reference=scaled,
    tested="8 random matrices",
    mutants=(
        Mutant(lambda x, factor: x / factor, "You divided.", "Read the sign of the exponent."),
        Mutant(lambda x, factor: x.T * factor, "You transposed.", "Look at the shape."),
        Mutant(lambda x, factor: 1 / 0, "Never reached.", ""),
    ),
)
PAIR = Exercise(
    number="9.2",
    title="Two outputs",
    stars=2,
    minutes=5,
    sample=draw,
    reference=lambda x, factor: (x.sum(), (x * factor, True)),
    tested="8 random matrices",
    mutants=(),
)


@pytest.fixture(autouse=True)
def two_exercises(monkeypatch):
    monkeypatch.setattr(checks, "all_exercises", lambda: {"9.1": EXERCISE, "9.2": PAIR})


def test_right():
    verdict = evaluate("9.1", lambda x, factor: factor * x)
    assert verdict.status == "right"
    assert verdict.message == "✓ 9.1 Scale: right. Tested on 8 random matrices."


def test_right_in_single_precision_is_not_right_in_double():
    assert evaluate("9.1", lambda x, factor: (x.float() * 0.1 * factor * 10).double()).status == "wrong"


@pytest.mark.parametrize("blank", [lambda *a: None, lambda *a: ..., lambda *a: (None, None)])
def test_not_attempted(blank):
    assert evaluate("9.1", blank).status == "not attempted"
    assert evaluate("9.2", blank).status == "not attempted"


def test_misunderstanding_names_it_and_hints():
    verdict = evaluate("9.1", lambda x, factor: x / factor)
    assert verdict.status == "misunderstanding"
    assert verdict.message == "✗ 9.1 You divided.\n  Hint: Read the sign of the exponent."
    assert "transposed" in evaluate("9.1", lambda x, factor: x.T * factor).message


def test_wrong_names_the_first_index_with_both_values():
    def wrong(x, factor):
        y = x * factor
        y[1, 2] = 7.0
        return y

    x, factor = draw(torch.Generator().manual_seed(0))
    verdict = evaluate("9.1", wrong)
    assert verdict.status == "wrong"
    assert f"first differs at index [1, 2]: you have 7, expected {factor * x[1, 2]:.6g}" in verdict.message


def test_wrong_shape_type_and_number_of_outputs():
    assert "has shape [4, 2], expected [4, 3]" in evaluate("9.1", lambda x, factor: x[:, :2]).message
    assert "you returned 'text', expected a tensor" in evaluate("9.1", lambda x, factor: "text").message
    assert "expected 2 values" in evaluate("9.2", lambda x, factor: x.sum()).message
    assert "NaN" not in evaluate("9.1", lambda x, factor: x * factor).message
    assert evaluate("9.1", lambda x, factor: x * float("nan")).status == "wrong"


def test_error_is_one_line_without_a_traceback():
    verdict = evaluate("9.1", lambda x, factor: x @ x)
    assert verdict.status == "error"
    assert verdict.message.startswith("✗ 9.1 your function raised RuntimeError: ")
    assert "\n" not in verdict.message
    assert evaluate("9.1", lambda x: x).status == "error"  # a wrong signature


def test_inputs_changed_in_place_harm_nobody():
    def in_place(x, factor):
        x *= factor
        return x

    assert evaluate("9.1", in_place).status == "right"


def test_nested_outputs():
    assert evaluate("9.2", lambda x, factor: (x.sum(), (x * factor, True))).status == "right"
    assert evaluate("9.2", lambda x, factor: (x.sum(), (x * factor, False))).status == "wrong"


def test_check_prints_the_verdict(capsys):
    assert check("9.1", lambda *inputs: ...) is None
    assert capsys.readouterr().out == "○ 9.1 not attempted yet.\n"


def test_unknown_number_names_those_there_are():
    with pytest.raises(KeyError, match=r"number must be one of \['9.1', '9.2'\], got '9.3'"):
        check("9.3", scaled)


def test_relative_error():
    ones = torch.ones(3, dtype=torch.float64)
    assert relative_error(ones, ones) == 0
    assert relative_error(1.1 * ones, ones) == pytest.approx(0.1)
    assert relative_error(ones, torch.ones(4)) == float("inf")
    assert relative_error((ones, ones), ones) == float("inf")
    assert relative_error(ones * float("nan"), ones) == float("inf")
    assert relative_error(1e-3 * ones, 0 * ones) > 0  # a reference of zero: absolute


def test_an_entry_registered_twice_is_an_error(monkeypatch):
    modules = [types.SimpleNamespace(__name__=name, ENTRIES=[EXERCISE]) for name in ("ch8", "ch9")]
    monkeypatch.setattr(registry, "_modules", lambda package: modules)
    with pytest.raises(ValueError, match=r"number '9\.1' is registered twice, the second time in ch9"):
        registry._collect("any", "number")
