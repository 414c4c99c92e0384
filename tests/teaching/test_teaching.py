"""`check` and the registry themselves, on an exercise of our own."""

from __future__ import annotations

import io
import math
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch

from dn_lib.teaching import Exercise, Mutant, checks, registry, relative_error


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

COUNT = Exercise(
    number="9.3",
    title="Count",
    stars=1,
    minutes=5,
    sample=lambda generator: (10**9,),
    reference=lambda n: n + 1,
    tested="one number",
    mutants=(),
)


OURS = {"9.1": EXERCISE, "9.2": PAIR, "9.3": COUNT}
evaluate, check = (partial(function, exercises=OURS) for function in (checks.evaluate, checks.check))


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


def test_an_imaginary_part_counts():
    assert evaluate("9.1", lambda x, factor: x * factor + 0j).status == "right"
    for answer in (lambda x, factor: x * factor + 1j, lambda x, factor: (x * factor).numpy() + 1j):
        verdict = evaluate("9.1", answer)
        assert verdict.status == "wrong" and "+1j, expected" in verdict.message
    assert relative_error(torch.ones(2) + 1j, torch.ones(2)) == pytest.approx(1)
    assert relative_error(1 + 1j, 1.0) == 1


def test_a_whole_number_has_to_be_exact():
    assert evaluate("9.3", lambda n: n + 1).status == "right"
    verdict = evaluate("9.3", lambda n: n)
    assert verdict.message == "✗ 9.3 the output first differs in value: you have 1,000,000,000, expected 1,000,000,001."


def test_values_that_look_alike_are_shown_with_all_their_digits():
    message = evaluate("9.1", lambda x, factor: (x * factor).float()).message
    ours, expected = message.removesuffix(".").split("you have ")[1].split(", expected ")
    assert ours != expected and float(ours) == pytest.approx(float(expected))


class Deceiver:
    """Claims to equal everything, and to be the number one."""

    def __eq__(self, other):
        return True

    def __float__(self):
        return 1.0

    def __repr__(self):
        raise RuntimeError("no")


class Leaver:
    def __repr__(self):
        raise SystemExit


class Breaker(list):
    def __iter__(self):
        raise RuntimeError("no items")

    def __len__(self):
        raise RuntimeError("no length")


class Subclass(torch.Tensor):
    """Turns every difference into zero."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 0 if function.__name__ in {"sub", "__sub__"} else result


@pytest.mark.parametrize(
    "answer",
    [
        Deceiver(),
        torch.zeros(4, 3).as_subclass(Subclass),
        np.ma.masked_array(np.ones((4, 3)), mask=True),
        np.array([[object()]]),
        torch.zeros(4, 3, device="meta"),
        torch.eye(4, 3).to_sparse(),
        torch.empty(0),
        {"a": 1},
        {1.0},
        range(3),
        b"bytes",
        "\ud800",
        "x" * 10_000,
        [1.0] * 10_000,
        (torch.ones(2), ...),
        (),
        iter([1.0]),
        math.inf,
        10**6000,
        (-(10**6000), 1.0),
        Leaver(),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_an_answer_that_is_no_such_tensor_is_wrong_and_gets_a_short_line(answer):
    for number in ("9.1", "9.2"):
        verdict = evaluate(number, lambda *_: answer)
        assert verdict.status == "wrong"
        assert len(verdict.message) < 300 and "\n" not in verdict.message


@pytest.mark.filterwarnings("ignore:.*prototype")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_wrong(layout):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    assert "you returned a " in evaluate("9.1", lambda *_: nested).message


def test_a_second_output_that_is_no_number_is_wrong():
    assert evaluate("9.2", lambda x, factor: (7.0, (x, Deceiver()))).status == "wrong"
    assert evaluate("9.2", lambda x, factor: (x.sum(), (x * factor, "yes"))).status == "wrong"


@pytest.mark.parametrize(
    "form",
    [
        lambda y: y.requires_grad_(),
        torch.nn.Parameter,
        torch.Tensor.numpy,
        torch.Tensor.to_sparse,
        lambda y: y.mT.contiguous().mT,
        lambda y: torch.stack([y, y], -1)[..., 1],
    ],
)
def test_right_in_another_form_is_right(form):
    assert evaluate("9.1", lambda x, factor: form(x * factor)).status == "right"


def test_a_buffer_that_every_call_writes_into_is_read_at_once():
    buffer = torch.empty(4, 3, dtype=torch.float64)
    assert evaluate("9.1", lambda x, factor: torch.mul(x, factor, out=buffer)).status == "right"


def test_an_answer_that_is_blank_on_some_inputs_only_was_attempted():
    calls = []

    def sometimes(x, factor):
        calls.append(x)
        return x * factor if len(calls) < 3 else None

    verdict = evaluate("9.1", sometimes)
    assert verdict.status == "wrong" and "you returned None, expected a tensor" in verdict.message


def test_leaving_and_errors_without_words_are_errors():
    assert "raised SystemExit: 3" in evaluate("9.1", lambda *_: sys.exit(3)).message

    class Wordless(Exception):
        def __str__(self):
            raise RuntimeError

    def wordless(x, factor):
        raise Wordless

    assert evaluate("9.1", wordless).message.endswith("Wordless: no message")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("answer", [scaled, lambda *_: ..., lambda *_: "β \ud800"])
def test_check_speaks_on_every_console(monkeypatch, encoding, answer):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    check("9.1", answer)
    console.flush()
    said = console.buffer.getvalue().decode(encoding)
    assert "9.1" in said and said.endswith("\n")
    if encoding != "utf-8":
        assert said.startswith(("[right] 9.1 Scale: right.", "[ ] 9.1 not attempted", "[wrong] 9.1 you returned"))


def test_nested_outputs():
    assert evaluate("9.2", lambda x, factor: (x.sum(), (x * factor, True))).status == "right"
    assert evaluate("9.2", lambda x, factor: (x.sum(), (x * factor, False))).status == "wrong"


def test_lists_of_a_class_of_their_own_raise_no_traceback():
    class Ring(list):
        pass

    ring = Ring()
    ring.append(ring)
    assert evaluate("9.1", lambda *_: ring).status == "error"
    assert "raised RuntimeError: no items" in evaluate("9.1", lambda *_: Breaker([1.0])).message
    assert evaluate("9.2", lambda x, factor: Ring([x.sum(), (x * factor, True)])).status == "right"


def test_check_prints_the_verdict(capsys):
    assert check("9.1", lambda *inputs: ...) is None
    assert capsys.readouterr().out == "○ 9.1 not attempted yet.\n"


def test_unknown_number_names_those_there_are():
    with pytest.raises(KeyError, match=r"number must be one of \['9.1', '9.2', '9.3'\], got '9.4'"):
        check("9.4", scaled)
    for number in (["9.1"], {}, 9.1, None, np.zeros(2)):
        with pytest.raises(KeyError, match="number must be one of"):
            check(number, scaled)


def test_relative_error():
    ones = torch.ones(3, dtype=torch.float64)
    assert relative_error(ones, ones) == 0
    assert relative_error(1.1 * ones, ones) == pytest.approx(0.1)
    assert relative_error(ones, torch.ones(4)) == float("inf")
    assert relative_error((ones, ones), ones) == float("inf")
    assert relative_error(ones * float("nan"), ones) == float("inf")
    assert relative_error(1e-3 * ones, 0 * ones) > 0  # a reference of zero: absolute
    for size in (1e-300, 1e-160, 1e160, 1e300):  # squares would vanish, or overflow
        assert relative_error(2 * size * ones, size * ones) == pytest.approx(1)
    assert relative_error(ones, math.inf * ones) == math.inf
    with pytest.raises(TypeError, match="value must hold tensors, arrays and numbers, got dict"):
        relative_error({}, ones)


def test_an_entry_registered_twice_is_an_error():
    modules = [types.SimpleNamespace(__name__=name, ENTRIES=[EXERCISE]) for name in ("ch8", "ch9")]
    with pytest.raises(ValueError, match=r"number '9\.1' is registered twice, the second time in ch9"):
        registry.collect(modules, "number")
