"""`check("2.3", fn)`: run a learner's function against an exercise's reference, and say what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dn_lib.teaching.registry import Exercise, all_exercises, leaves, relative_error

Status = Literal["right", "not attempted", "misunderstanding", "wrong", "error"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of an exercise: `status`, and the `message` that `check` prints."""

    status: Status
    message: str


def _copy(value: Any) -> Any:
    """A deep copy of the tensors in `value`, so that a function that writes in place harms nobody."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_copy(item) for item in value)
    return value


def _is_blank(value: Any) -> bool:
    """`...` as a body returns None; `return ...` returns Ellipsis; a tuple of blanks is blank."""
    if isinstance(value, (tuple, list)) and len(value) > 0:
        return all(_is_blank(item) for item in value)
    return value is None or value is Ellipsis


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values: " + ", ".join(_describe(item) for item in value)
    return repr(value)


def _structure(value: Any) -> Any:
    return tuple(_structure(v) for v in value) if isinstance(value, (tuple, list)) else None


def _number(value: float) -> str:
    """Whole numbers in full, as counts are; others with six digits."""
    return f"{int(value):,}" if value == value and abs(value) < 1e15 and value == int(value) else f"{value:.6g}"


def _first_difference(answer: Any, reference: Any, tolerance: float, names: tuple[str, ...] = ()) -> str:
    """Where `answer` first departs from `reference`, with both values; `names` are those of the outputs."""
    if _structure(answer) != _structure(reference):
        return f"you returned {_describe(answer)}, expected {_describe(reference)}."
    got, expected = leaves(answer), leaves(reference)
    for n, (a, b) in enumerate(zip(got, expected, strict=True)):
        which = names[n] if n < len(names) else f"output {n}" if len(got) > 1 else "the output"
        if a.shape != b.shape:
            return f"{which} has shape {list(a.shape)}, expected {list(b.shape)}."
        wrong = ~((a - b).abs() <= tolerance * b.abs().max().clamp(min=1e-30))
        if wrong.any():
            index = wrong.nonzero()[0].tolist()
            a_i, b_i = a[tuple(index)].item(), b[tuple(index)].item()
            place = f"at index {index}" if index else "in value"
            return f"{which} first differs {place}: you have {_number(a_i)}, expected {_number(b_i)}."
    return "the relative error is above the tolerance, though no single entry stands out."


def _matches(exercise: Exercise, mutant: Callable[..., Any], cases: list, answers: list) -> bool:
    """Whether `answers` are what `mutant` returns on every case, and wrong on at least one."""
    try:
        return all(
            relative_error(answer, mutant(*_copy(inputs))) <= exercise.tolerance
            for (inputs, _), answer in zip(cases, answers, strict=True)
        )
    except Exception:
        return False


def evaluate(number: str, fn: Callable[..., Any], seed: int = 0) -> Verdict:
    """Judge `fn` as an answer to exercise `number`.

    Raises KeyError if there is no such exercise.
    """
    if number not in all_exercises():
        raise KeyError(f"number must be one of {sorted(all_exercises())}, got {number!r}")
    exercise = all_exercises()[number]
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for _ in range(exercise.trials):
        inputs = exercise.sample(generator)
        cases.append((inputs, exercise.reference(*_copy(inputs))))
    answers = []
    for inputs, _ in cases:
        try:
            answer = fn(*_copy(inputs))
        except NotImplementedError:
            return Verdict("not attempted", f"○ {number} not attempted yet.")
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else "no message"
            return Verdict("error", f"✗ {number} your function raised {type(error).__name__}: {first}")
        if _is_blank(answer):
            return Verdict("not attempted", f"○ {number} not attempted yet.")
        answers.append(answer)
    for (_, reference), answer in zip(cases, answers, strict=True):
        try:
            same = _structure(answer) == _structure(reference)
            error = relative_error(answer, reference) if same else float("inf")
        except Exception:
            message = f"✗ {number} you returned {_describe(answer)}, expected {_describe(reference)}."
            return Verdict("wrong", message)
        if error > exercise.tolerance:
            break
    else:
        return Verdict("right", f"✓ {number} {exercise.title}: right. Tested on {exercise.tested}.")
    for mutant in exercise.mutants:
        if _matches(exercise, mutant.fn, cases, answers):
            message = f"✗ {number} {mutant.message}\n  Hint: {mutant.hint}"
            return Verdict("misunderstanding", message)
    difference = _first_difference(answer, reference, exercise.tolerance, getattr(fn, "names", ()))
    return Verdict("wrong", f"✗ {number} {difference}")


def check(number: str, fn: Callable[..., Any]) -> None:
    """Judge `fn` as an answer to exercise `number` (for example `"2.3"`), and print the verdict."""
    print(evaluate(number, fn).message)
