"""`check` and the registry themselves, on an exercise of our own."""

from __future__ import annotations

import dataclasses
import io
import math
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch

from dn_lib.teaching import Exercise, Extreme, Mutant, checks, registry, relative_error
from dn_lib.teaching.judge import places
from dn_lib.teaching.judge.probes import probe
from dn_lib.teaching.judge.variants import as_variant, variants


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
    assert "one value, which is right: output 0. Asked for are 2." in evaluate("9.2", lambda x, factor: x.sum()).message
    assert "expected 2 values" in evaluate("9.2", lambda x, factor: x).message
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
    assert verdict.message == "✗ 9.3 the output is always 1 too small."
    assert "a float; asked for is an int" in evaluate("9.3", lambda n: n + 1.0).message


def test_float32_is_told_as_such():
    for answer in (lambda x, factor: (x * factor).float(), lambda x, factor: x.float() * factor):
        verdict = evaluate("9.1", answer)
        assert verdict.status == "wrong" and "the output is float32 and right to its precision" in verdict.message
    message = evaluate("9.1", lambda x, factor: (x.float() * factor).double()).message
    assert "agrees to a few digits only, as if something on the way were computed in float32" in message


def test_a_mixture_of_types_gets_a_remedy():
    message = evaluate("9.1", lambda x, factor: x @ torch.ones(3, 3)).message
    assert "same dtype" in message and "a tensor that you made is float32" in message


def test_values_that_look_alike_are_shown_with_their_difference():
    def nearly(x, factor):
        y = x * factor
        y[1, 2] *= 1 + 1e-7
        return y

    message = evaluate("9.1", nearly).message
    ours, expected = message.split("you have ")[1].split(" (")[0].split(", expected ")
    assert ours != expected and float(ours) == pytest.approx(float(expected))
    assert "(a difference of " in message


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda x, factor: (x * factor).T.contiguous(), "You transposed."),  # a mutant comes first
        (lambda x, factor: (x * factor).flatten(), "the right values in the wrong shape: [12], expected [4, 3]"),
        (lambda x, factor: (x * factor)[None], "the right values in the wrong shape: [1, 4, 3], expected [4, 3]"),
        (lambda x, factor: list(x * factor), "they come as a list; `torch.stack` makes one tensor"),
        (lambda x, factor: [x[:2] * factor, x[2:] * factor], "they come as a list; `torch.cat` makes one tensor"),
        (lambda x, factor: (x * factor, x), "you returned 2 values. Number 0, counted from 0, is the answer"),
        (lambda x, factor: -x * factor, "the output has the wrong sign everywhere"),
        (lambda x, factor: 3 * x * factor, "the output is everywhere 3 times what is expected"),
        (lambda x, factor: x * factor * 3**-0.5, "the output is everywhere 0.57735 times what is expected"),
        (lambda x, factor: (x * factor).roll(1, 0), "the output is late by one: row t holds what belongs to row t - 1"),
        (lambda x, factor: (x * factor).flip(0), "the output is reversed"),
        (lambda x, factor: x * float("nan"), "you have nan"),
    ],
)
def test_what_is_nearly_right_is_told_as_such(answer, says):
    verdict = evaluate("9.1", answer)
    assert verdict.status in ("wrong", "misunderstanding") and says in verdict.message


def test_containers_that_are_nearly_right():
    swapped = evaluate("9.2", lambda x, factor: ((x * factor, True), x.sum()))
    assert "the 2 values are right, but they are returned in the wrong order" in swapped.message
    more = evaluate("9.2", lambda x, factor: (x.sum(), (x * factor, True), x))
    assert "you returned 3 values. The first 2 are right" in more.message
    second = evaluate("9.2", lambda x, factor: (x.sum(), (x + 7, True)))
    assert "output 0 is right; output 1 first differs at index [0, 0]" in second.message


def test_a_forgotten_return_is_told_as_such():
    def forgot(x, factor):
        y = x * factor
        y.sum()

    def unfinished(x, factor):
        print(x * factor)
        ...

    assert "your function returns None: it ends without a `return`" in evaluate("9.1", forgot).message
    assert evaluate("9.1", unfinished).status == "not attempted"


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
    assert not calls, "an answer runs in a copy of this process"


def test_leaving_and_errors_without_words_are_errors():
    assert "raised SystemExit: 3" in evaluate("9.1", lambda *_: sys.exit(3)).message

    class Wordless(Exception):
        def __str__(self):
            raise RuntimeError

    def wordless(x, factor):
        raise Wordless

    assert evaluate("9.1", wordless).message.endswith("Wordless: no message, in `raise Wordless`")


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


def test_what_an_answer_prints_is_passed_on(capsys):
    check("9.1", lambda x, factor: print("here") or x * factor)
    assert capsys.readouterr().out.startswith("here\n" * 8 + "✓ 9.1 ")


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


# --- Extremes, inputs that are kept, and what an answer depends on


def sums(x, gain):
    return gain * x.cumsum(0)


SUMS = Exercise(
    number="9.4",
    title="Running sums",
    stars=1,
    minutes=5,
    sample=lambda generator: (torch.randn(5, 3, generator=generator, dtype=torch.float64), 0.5),
    reference=sums,
    tested="8 random matrices",
    mutants=(
        Mutant(lambda x, gain: x, "You return x.", "Add the rows up."),
        Mutant(lambda x, gain: sums(x / gain, gain) * gain, "You divide by the gain.", "What if it is zero?"),
    ),
    extremes=(
        Extreme("no gain", lambda generator: (torch.ones(2, 3, dtype=torch.float64), 0.0), "Do not divide by it."),
        Extreme("one row", lambda generator: (torch.ones(1, 3, dtype=torch.float64), 1.0), "There is nothing to add."),
    ),
    keeps_inputs=True,
)
WITH_SUMS = {"9.4": SUMS}


def says(answer):
    return checks.evaluate("9.4", answer, exercises=WITH_SUMS).message


def test_extremes_are_tried_and_named():
    assert says(sums) == "✓ 9.4 Running sums: right. Tested on 8 random matrices, and for no gain and one row."
    message = says(lambda x, gain: gain * x.cumsum(0) if len(x) > 1 else x[0])
    assert message.startswith("✗ 9.4 right on 8 random inputs, but not for one row: the output has shape [3], expected")
    assert message.endswith("\n  Hint: There is nothing to add.")
    assert "but not for no gain: your function raised ZeroDivisionError" in says(
        lambda x, gain: sums(x, 1 / (1 / gain))
    )


def test_a_mistake_that_shows_at_an_extreme_only_can_be_a_mutant():
    """NaN agrees with NaN there."""
    assert "You divide by the gain." in says(lambda x, gain: (x / torch.tensor(gain)).cumsum(0) * gain * gain)


def test_inputs_that_are_to_be_kept_are_compared_afterwards():
    def in_place(x, gain):
        x *= gain
        return x.cumsum(0)

    assert "your function writes into its argument `x`, which should be left as it is" in says(in_place)


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        (lambda x, gain: x.cumsum(0) * 0.3 + 1, "your answer does not depend on `gain`."),
        (lambda x, gain: gain * x.flip(0).cumsum(0) + 1, "earlier rows of your output change when `x` of the last"),
        (lambda x, gain: gain * gain * x.cumsum(0) + x, ""),
    ],
)
def test_what_an_answer_depends_on_is_told(answer, fact):
    x = torch.randn(5, 3, dtype=torch.float64)

    def with_two_sequences(x, gain, y):
        return answer(x, gain) + y

    said = probe(with_two_sequences, lambda x, gain, y: sums(x, gain) + y, (x, 0.5, x + 1))
    assert said.startswith(fact) and bool(said) == bool(fact)


def test_a_row_that_does_not_see_itself_is_told():
    def late(q, k):
        return q * torch.cat([0 * k[:1], k.cumsum(0)[:-1]])

    q, k = torch.randn(2, 5, 3, dtype=torch.float64)
    assert "the last row of your output does not change when `k` of its own" in probe(
        late, lambda q, k: q * k.cumsum(0), (q, k)
    )


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda x, gain: sums(x, gain**2), ""),  # a multiple, which is told before
        (lambda x, gain: sums(x.flip(0), gain), "for `x` in reverse order."),
        (lambda x, gain: sums(x * x, gain), "for `x` squared."),
        (lambda x, gain: gain * x, ""),
    ],
)
def test_the_right_answer_to_another_input_is_told(answer, found):
    said = says(answer)
    assert found in said and ("your answer is what is expected" in said) == bool(found)


# --- Slips, places, sizes, and two mistakes at once


def running(x, gain):
    S = 0 * x[0]
    rows = []
    for t in range(len(x)):
        S = S + gain * x[t]
        rows.append(S * x[t])
    return torch.stack(rows)


def slip_of(answer):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return as_variant(running, ("x", "gain"), [((x, 0.5), answer(x, 0.5))], 1e-9)


def reads_first(x, gain):
    return torch.cat([0 * x[:1], gain * x.cumsum(0)[:-1]]) * x


@pytest.mark.parametrize(
    ("answer", "slip"),
    [
        (reads_first, "two steps of the loop are taken in the other order"),
        (lambda x, gain: -running(x, gain), "the sign of a term with `gain` and `x` is turned"),
        (lambda x, gain: x.cumsum(0) * x, "a factor with `gain` is missing"),
        (lambda x, gain: gain * running(x, gain), "a factor with `gain` comes in twice"),
        (lambda x, gain: gain * x.cumsum(0) * x[0], "something with `x` is that of the first token for all"),
        (lambda x, gain: x**3, ""),
    ],
)
def test_a_slip_in_the_reference_is_told(answer, slip):
    said = slip_of(answer)
    assert slip in said and bool(said) == bool(slip)


def test_a_reference_without_a_text_of_its_own_has_no_variants():
    assert list(variants(lambda x: x + 1)) == [] and list(variants(max)) == []


I5 = torch.eye(5, dtype=torch.float64)
FULL = 1 + torch.arange(25.0, dtype=torch.float64).reshape(5, 5)


@pytest.mark.parametrize(
    ("answer", "reference", "fact"),
    [
        (0 * FULL, FULL, "your output is zero everywhere."),
        (FULL + I5, FULL, "your output is right but for its diagonal."),
        (FULL + FULL.triu(1), FULL, "your output is right but for what is above its diagonal."),
        (FULL, FULL.tril(), "is right but for what is above its diagonal and has entries above the diagonal"),
        (FULL.tril(), FULL.triu().T + FULL.triu(1), "is not symmetric, as it should be"),
        (FULL + FULL.T, I5, "is not orthogonal"),
        (torch.cat([2 * FULL[:1], FULL[1:]]), FULL, "your output is right but for its first row."),
        (torch.cat([FULL[:1], 2 * FULL[1:]]), FULL, "your output is right in its first row and in no other."),
        (torch.cat([0 * FULL[:2], FULL[2:]]), FULL, "is zero in places where it should not be, and right elsewhere."),
        (torch.cat([FULL[:2], 0 * FULL[2:3], 2 * FULL[3:]]), FULL, "your output has a row of zeros"),
        (FULL + torch.randn(5, 5, dtype=torch.float64), FULL, ""),
    ],
)
def test_where_an_answer_is_right_is_told(answer, reference, fact):
    said = places.pattern([answer], [((), reference)], 1e-9)
    assert fact in said and bool(said) == bool(fact)


def test_what_a_size_of_parts_has_to_do_with_right_rows_is_told():
    reference = FULL.repeat(2, 1)[:9]
    for wrong, says in (
        (torch.arange(9) % 4 > 0, "is right in the first row of each stretch of `chunk` rows, and in no other."),
        (torch.arange(9) >= 4, "is right in the first `chunk` rows, and in no other."),
        (torch.arange(9) == 5, "is right in the first `chunk` rows."),
    ):
        said = places.pattern([reference + wrong[:, None]], [((FULL, 4), reference)], 1e-9, (), ("x", "chunk"))
        assert said.endswith(says)


def test_axes_are_called_by_the_inputs_that_have_their_size():
    k = torch.zeros(7, 5)
    said = places.shapes(("k",), [torch.zeros(7, 7)], [((k,), torch.zeros(5, 5))])
    assert said == "its axes are the length of k by the length of k; asked for are the width of k by the width of k"


def test_the_smallest_wrong_whole_number_is_told():
    assert places.smallest(lambda n: n * n, lambda n: n * n + n // 2, (9,)) == (
        "by hand: for n = 2 it should be 5, and you have 4"
    )


def test_two_mistakes_at_once_are_told_as_two():
    def base(x, gain, *, sign=1, offset=0):
        return sign * gain * x.cumsum(0) + offset

    mutants = (
        Mutant(partial(base, sign=-1), "The sign.", "Which sign?"),
        Mutant(partial(base, offset=1), "An offset.", "What is added?"),
    )
    exercise = dataclasses.replace(SUMS, mutants=mutants)
    message = checks.evaluate("9.4", lambda x, gain: 1 - sums(x, gain), exercises={"9.4": exercise}).message
    assert "Two things at once. The sign. And: An offset." in message
