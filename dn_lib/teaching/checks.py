"""`check("2.3", fn)`: run a learner's function against an exercise's reference, and say what was found."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from dn_lib.teaching.registry import Exercise, all_exercises, leaves, relative_error

Status = Literal["right", "not attempted", "misunderstanding", "wrong", "error"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of an exercise: `status`, and the `message` that `check` prints."""

    status: Status
    message: str


def _copy(value: Any) -> Any:
    """A deep copy of the tensors and arrays in `value`: who writes into the one does not change the other."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (tuple, list):
        return type(value)(_copy(item) for item in value)
    return value


def _received(value: Any) -> Any:
    """A copy of an answer, in which tuples and lists of every class are plain: one of their own may say anything."""
    if isinstance(value, (tuple, list)):
        return (tuple if isinstance(value, tuple) else list)(_received(item) for item in value)
    return _copy(value)


def _is_blank(value: Any) -> bool:
    """`...` as a body returns None; `return ...` returns Ellipsis; a tuple of blanks is blank."""
    if isinstance(value, (tuple, list)) and len(value) > 0:
        return all(_is_blank(item) for item in value)
    return value is None or value is Ellipsis


def _describe(value: Any) -> str:
    """`value` in a few words, whatever it is."""
    if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_nested:
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"a {type(value).__name__}"
    if isinstance(value, (tuple, list)):
        more = ", …" if len(value) > 4 else ""
        return f"{len(value)} values: " + ", ".join(_describe(item) for item in value[:4]) + more
    try:
        return reprlib.repr(value)
    except (Exception, SystemExit):  # as of a whole number with more digits than Python writes
        return f"{type(value).__name__} that cannot be shown"


def _structure(value: Any) -> Any:
    return tuple(_structure(v) for v in value) if isinstance(value, (tuple, list)) else None


def _number(value: complex, digits: int = 6) -> str:
    """Whole numbers in full, as counts are; others with `digits` digits."""
    if isinstance(value, float) and abs(value) < 1e15 and value == int(value):
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def _first_difference(answer: Any, reference: Any, tolerance: float, names: tuple[str, ...] = ()) -> str:
    """Where `answer` first departs from `reference`, with both values; `names` are those of the outputs."""
    if _structure(answer) != _structure(reference):
        return f"you returned {_describe(answer)}, expected {_describe(reference)}."
    try:
        got, expected = leaves(answer), leaves(reference)
    except Exception:  # no numbers, or none that can be read
        return f"you returned {_describe(answer)}, expected {_describe(reference)}."
    for n, (a, b, allowed) in enumerate(zip(got, expected, _tolerances(reference, tolerance), strict=True)):
        which = names[n] if n < len(names) else f"output {n}" if len(got) > 1 else "the output"
        if a.shape != b.shape:
            return f"{which} has shape {list(a.shape)}, expected {list(b.shape)}."
        if not b.numel():
            continue
        wrong = ~((a - b).abs() <= allowed * b.abs().max().clamp(min=1e-30))
        if wrong.any():
            index = wrong.nonzero()[0].tolist()
            a_i, b_i = a[tuple(index)].item(), b[tuple(index)].item()
            place = f"at index {index}" if index else "in value"
            digits = 6 if _number(a_i) != _number(b_i) else 17  # enough to see that they differ
            return f"{which} first differs {place}: you have {_number(a_i, digits)}, expected {_number(b_i, digits)}."
    return "the relative error is above the tolerance, though no single entry stands out."


def _is_whole(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() and not value.is_complex()
    return isinstance(value, int)


def _flat(value: Any) -> list:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, (tuple, list)) else [value]


def _tolerances(reference: Any, tolerance: float) -> list[float]:
    """What each leaf of `reference` allows: whole numbers, which are counts and verdicts, have to be exact."""
    return [0.0 if _is_whole(leaf) else tolerance for leaf in _flat(reference)]


def _agrees(answer: Any, reference: Any, tolerance: float) -> bool:
    """Whether `answer` has the structure of `reference` and its numbers."""
    if _structure(answer) != _structure(reference):
        return False
    allowed = _tolerances(reference, tolerance)
    return all(
        relative_error(a, r) <= limit for a, r, limit in zip(_flat(answer), _flat(reference), allowed, strict=True)
    )


def _matches(exercise: Exercise, mutant: Callable[..., Any], cases: list, answers: list) -> bool:
    """Whether `answers` are what `mutant` returns on every case, and wrong on at least one."""
    try:
        return all(
            relative_error(answer, mutant(*_copy(inputs))) <= exercise.tolerance
            for (inputs, _), answer in zip(cases, answers, strict=True)
        )
    except Exception:
        return False


def _first_line(error: BaseException) -> str:
    try:
        return next(iter(str(error).splitlines()), "") or "no message"
    except Exception:
        return "no message"


def evaluate(
    number: str, fn: Callable[..., Any], seed: int = 0, *, exercises: Mapping[str, Exercise] | None = None
) -> Verdict:
    """Judge `fn` as an answer to exercise `number` of the book, or of `exercises`.

    Raises KeyError if there is no such exercise.
    """
    exercises = all_exercises() if exercises is None else exercises
    if not isinstance(number, str) or number not in exercises:
        raise KeyError(f"number must be one of {sorted(exercises)}, got {_describe(number)}")
    exercise = exercises[number]
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for _ in range(exercise.trials):
        inputs = exercise.sample(generator)
        cases.append((inputs, exercise.reference(*_copy(inputs))))
    answers: list[Any] = []
    for inputs, _ in cases:
        try:
            # Copied at once: it may be a buffer that the next call writes into.
            answer = _received(fn(*_copy(inputs)))
        except NotImplementedError:
            return Verdict("not attempted", f"○ {number} not attempted yet.")
        except (Exception, SystemExit) as error:
            return Verdict("error", f"✗ {number} your function raised {type(error).__name__}: {_first_line(error)}")
        if _is_blank(answer) and not answers:
            return Verdict("not attempted", f"○ {number} not attempted yet.")
        answers.append(answer)
    for (_, reference), answer in zip(cases, answers, strict=True):
        try:
            right = _agrees(answer, reference, exercise.tolerance)
        except Exception:
            right = False
        if not right:
            break
    else:
        return Verdict("right", f"✓ {number} {exercise.title}: right. Tested on {exercise.tested}.")
    for mutant in exercise.mutants:
        if _matches(exercise, mutant.fn, cases, answers):
            message = f"✗ {number} {mutant.message}\n  Hint: {mutant.hint}"
            return Verdict("misunderstanding", message)
    difference = _first_difference(answer, reference, exercise.tolerance, getattr(fn, "names", ()))
    return Verdict("wrong", f"✗ {number} {difference}")


# For consoles with an old character set, such as a Windows terminal's.
_PLAIN = str.maketrans({"✓": "[right]", "✗": "[wrong]", "○": "[ ]", "…": "..."})


def printable(text: str, encoding: str | None) -> str:
    """`text`, or the nearest to it that a console of this encoding can show.

    >>> printable("✓ 2.3 Rotation by β: right.", "ascii")
    '[right] 2.3 Rotation by \\\\u03b2: right.'
    >>> printable("✓ 2.3", "utf-8")
    '✓ 2.3'
    """
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")
    return text


def check(number: str, fn: Callable[..., Any], *, exercises: Mapping[str, Exercise] | None = None) -> None:
    """Judge `fn` as an answer to exercise `number` (for example `"2.3"`), and print the verdict.

    exercises: to look in, those of the book if None.  Raises KeyError if there is no such exercise.
    """
    print(printable(evaluate(number, fn, exercises=exercises).message, getattr(sys.stdout, "encoding", None)))
