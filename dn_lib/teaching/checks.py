"""`check("2.3", fn)`: run a learner's function against an exercise's reference, and say what was found."""

from __future__ import annotations

import ast
import dis
import inspect
import itertools
import linecache
import random
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dn_lib.teaching.judge import compare, limits, method, places
from dn_lib.teaching.judge.probes import as_if, probe
from dn_lib.teaching.judge.variants import as_variant
from dn_lib.teaching.registry import Exercise, Extreme, Mutant, all_exercises

Status = Literal["right", "not attempted", "misunderstanding", "method", "wrong", "error"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of an exercise: `status`, and the `message` that `check` prints.

    printed: what the function wrote to the console while it was judged.
    """

    status: Status
    message: str
    printed: str = ""


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


# --- Blanks -------------------------------------------------------------------------------------------------------
def _is_dots(value: Any) -> bool:
    """`return ...` returns Ellipsis; a tuple of blanks is blank."""
    if isinstance(value, (tuple, list)) and len(value) > 0:
        return all(_is_dots(item) for item in value)
    return value is Ellipsis


def _is_none(value: Any) -> bool:
    if isinstance(value, (tuple, list)) and len(value) > 0:
        return all(_is_none(item) for item in value)
    return value is None


_NOTHING = {"RESUME", "RETURN_CONST", "RETURN_VALUE", "LOAD_CONST", "POP_TOP", "NOP", "BUILD_TUPLE", "CACHE"}


def _does_nothing(fn: Callable[..., Any]) -> bool:
    """Whether the body of `fn` is empty: constants, and perhaps a `return` of them."""
    code = getattr(fn, "__code__", None)
    return code is not None and all(step.opname in _NOTHING for step in dis.get_instructions(code))


def _has_dots(fn: Callable[..., Any]) -> bool:
    """Whether there is still a line `...` in the body of `fn`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    lines = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return any(isinstance(line, ast.Constant) and line.value is Ellipsis for line in lines)


def _blank(exercise: Exercise) -> tuple[Status, str]:
    return "not attempted", f"○ {exercise.number} not attempted yet."


_PACKAGE = str(Path(__file__).resolve().parent.parent)


# --- Judging ------------------------------------------------------------------------------------------------------
def _first_line(error: BaseException) -> str:
    try:
        return next(iter(str(error).splitlines()), "") or "no message"
    except Exception:
        return "no message"


def _line_of(error: BaseException, fn: Callable[..., Any]) -> str:
    """The last line of the learner's own that an error came through, as text; "" if it cannot be seen.

    What `guarded` makes of a kernel is a function of this package: its lines are not the learner's.
    """
    file, step, text = getattr(getattr(fn, "__code__", None), "co_filename", ""), error.__traceback__, ""
    if file.startswith(_PACKAGE):
        return ""
    while step is not None:
        if file and step.tb_frame.f_code.co_filename == file:
            text = linecache.getline(file, step.tb_lineno).strip()
        step = step.tb_next
    return text if len(text) <= 100 else text[:97] + "..."


def _raised(error: BaseException, fn: Callable[..., Any]) -> str:
    """What to say of an error, in one line."""
    if limits.is_out_of_memory(error):
        return f"your function {limits.out_of_memory(limits.MEMORY)}"
    line = _first_line(error)
    if "dtype" in line and {"float", "double"} <= set(line.lower().replace("!=", " ").replace(",", " ").split()):
        line += " (the inputs are float64; a tensor that you made is float32: give it their dtype)"
    at = _line_of(error, fn)
    return f"your function raised {type(error).__name__}: {line}" + (f", in `{at}`" if at else "")


@dataclass(frozen=True)
class _Case:
    """One set of inputs, and what is expected for it; `extreme` if it is at the edge."""

    inputs: tuple
    expected: Any
    extreme: Extreme | None = None


def _cases(exercise: Exercise, seed: int) -> list[_Case]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[tuple[tuple, Extreme | None]] = [(exercise.sample(generator), None) for _ in range(exercise.trials)]
    drawn += [(extreme.sample(generator), extreme) for extreme in exercise.extremes]
    return [_Case(inputs, exercise.reference(*_copy(inputs)), extreme) for inputs, extreme in drawn]


def _matches(exercise: Exercise, mutant: Callable[..., Any], cases: list[_Case], answers: list) -> bool:
    """Whether `answers` are what `mutant` returns on all of `cases`."""
    try:
        return all(
            compare.same(answer, mutant(*_copy(case.inputs)), exercise.tolerance)
            for case, answer in zip(cases, answers, strict=True)
        )
    except Exception:
        return False


def _changed(given: tuple, inputs: tuple) -> int | None:
    """The position of the first argument that was written into."""
    for position, (a, b) in enumerate(zip(given, inputs, strict=True)):
        if any(not torch.equal(x, y) for x, y in zip(compare.parts(a), compare.parts(b), strict=True)):
            return position
    return None


def _name_of(fn: Callable[..., Any], position: int) -> str:
    try:
        return f"`{list(inspect.signature(fn).parameters)[position]}`"
    except (TypeError, ValueError, IndexError):
        return f"number {position}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def _judge(exercise: Exercise, fn: Callable[..., Any], seed: int, report: Callable[[], None]) -> tuple[Status, str]:
    """The status and the message for `fn`, which runs here and now."""
    number, blank = exercise.number, _blank(exercise)
    cases = _cases(exercise, seed)
    answers: list[Any] = []
    changed: int | None = None
    wrong: _Case | None = None
    for case in cases:
        if case.extreme and wrong:
            break
        given = _copy(case.inputs)
        try:
            # Copied at once: it may be a buffer that the next call writes into.
            answer = _received(fn(*given))
        except NotImplementedError:
            return blank
        except (Exception, SystemExit) as error:
            if case.extreme:
                return "wrong", _at_the_edge(exercise, case.extreme, _raised(error, fn) + ".")
            return "error", f"✗ {number} {_raised(error, fn)}"
        if not answers and (_is_dots(answer) or (_is_none(answer) and (_does_nothing(fn) or _has_dots(fn)))):
            return blank
        answers.append(answer)
        changed = _changed(given, case.inputs) if changed is None else changed
        if wrong is None and not compare.agrees(answer, case.expected, exercise.tolerance):
            wrong = case
        report()
    if wrong is None:
        return _judge_method(exercise, fn, changed)
    return _explain(exercise, fn, cases[: len(answers)], answers, wrong)


def _at_the_edge(exercise: Exercise, extreme: Extreme, difference: str) -> str:
    right = f"right on {exercise.trials} random inputs, but not for {extreme.name}: "
    return f"✗ {exercise.number} {right}{difference}\n  Hint: {extreme.hint}"


def _explain(
    exercise: Exercise, fn: Callable[..., Any], cases: list[_Case], answers: list, wrong: _Case
) -> tuple[Status, str]:
    """What to say of wrong numbers, of which `wrong` is the first case."""
    names = getattr(fn, "names", exercise.outputs)
    if not wrong.extreme:  # later cases are not needed, and at the edge a mistake may look different
        cases, answers = cases[: exercise.trials], answers[: exercise.trials]
    for mutant in exercise.mutants:
        if getattr(mutant.fn, "limited", False) and not getattr(fn, "limited", False):
            continue  # a kernel, which only the answer of a kernel can be
        if _matches(exercise, mutant.fn, cases, answers):
            return "misunderstanding", f"✗ {exercise.number} {mutant.message}\n  Hint: {mutant.hint}"
    answer = next(a for case, a in zip(cases, answers, strict=True) if case is wrong)
    inputs = compare.describe_inputs(fn, wrong.inputs)
    difference = compare.first_difference(answer, wrong.expected, exercise.tolerance, names, inputs)
    if wrong.extreme:
        return "wrong", _at_the_edge(exercise, wrong.extreme, difference)
    pairs = [(case.inputs, case.expected) for case in cases]
    arguments = compare.arguments(fn, wrong.inputs)
    related = compare.relation(answers, pairs, exercise.tolerance, names, arguments)
    if related:
        return "wrong", f"✗ {exercise.number} {related}"
    if getattr(fn, "limited", False):
        return "wrong", f"✗ {exercise.number} {difference}"
    return _explain_further(exercise, fn, cases, answers, wrong, difference)


def _explain_further(
    exercise: Exercise, fn: Callable[..., Any], cases: list[_Case], answers: list, wrong: _Case, difference: str
) -> tuple[Status, str]:
    """What to say where no mutant is met and no relation holds: what can be found by trying, then facts."""
    names, arguments = exercise.outputs, compare.arguments(fn, wrong.inputs)
    pairs = [(case.inputs, case.expected) for case in cases]
    for mutant in _doubles(exercise.mutants):
        if _matches(exercise, mutant.fn, cases, answers):
            return "misunderstanding", f"✗ {exercise.number} {mutant.message}\n  Hint: {mutant.hint}"
    tried = [(case.inputs, a) for case, a in zip(cases, answers, strict=True)]
    if related := as_if(fn, exercise.reference, tried, exercise.tolerance):
        return "wrong", f"✗ {exercise.number} {related}"
    fact = probe(fn, exercise.reference, wrong.inputs)
    if related := as_variant(exercise.reference, arguments, tried, exercise.tolerance):
        return "wrong", f"✗ {exercise.number} {'; '.join([related[:-1], fact]) if fact else related}"
    for n, name in enumerate(names):
        if found := _in_one_output(exercise, cases, answers, n, name):
            return found
    facts = [
        places.smallest(fn, exercise.reference, wrong.inputs),
        places.pattern(answers, pairs, exercise.tolerance, names, arguments),
        places.shapes(arguments, answers, pairs),
        fact,
    ]
    told = "; ".join([each.removesuffix(".") for each in facts if each] + [difference])
    return "wrong", f"✗ {exercise.number} {told}{_right_at(exercise, fn)}"


def _in_one_output(
    exercise: Exercise, cases: list[_Case], answers: list, n: int, name: str
) -> tuple[Status, str] | None:
    """What to say if output `n` is wrong and is that of a mutant, while others are wrong in another way."""
    try:
        parts, expected = [answer[n] for answer in answers], [case.expected[n] for case in cases]
    except (TypeError, IndexError):
        return None
    if all(compare.agrees(part, r, exercise.tolerance) for part, r in zip(parts, expected, strict=True)):
        return None
    for mutant in exercise.mutants:
        if not _matches(exercise, lambda *inputs, fn=mutant.fn: fn(*inputs)[n], cases, parts):
            continue
        outputs = list(zip(mutant.fn(*_copy(cases[0].inputs)), cases[0].expected, strict=True))
        if all(compare.agrees(a, r, exercise.tolerance) for m, (a, r) in enumerate(outputs) if m != n):
            said = f"{mutant.message}\n  (This is what your {name} shows; another output differs in another way.)"
            return "misunderstanding", f"✗ {exercise.number} {said}\n  Hint: {mutant.hint}"
    return None


def _doubles(mutants: tuple[Mutant, ...]) -> Iterator[Mutant]:
    """Two of `mutants` at once, where both are one function with keyword arguments of its own."""
    for one, two in itertools.combinations(mutants, 2):
        a, b = one.fn, two.fn
        if not (isinstance(a, partial) and isinstance(b, partial) and a.func is b.func):
            continue
        if not a.args and not b.args and not a.keywords.keys() & b.keywords.keys():
            both = partial(a.func, **a.keywords, **b.keywords)
            yield Mutant(both, f"Two things at once. {one.message} And: {two.message}", f"{one.hint} {two.hint}")


def _right_at(exercise: Exercise, fn: Callable[..., Any]) -> str:
    """The extremes for which a wrong answer is right: they say where the mistake is not."""
    right: list[str] = []
    for case in _cases(exercise, 0)[exercise.trials :]:
        try:
            if case.extreme and compare.agrees(_received(fn(*_copy(case.inputs))), case.expected, exercise.tolerance):
                right.append(case.extreme.name)
        except (Exception, SystemExit):
            continue
    return f"\n  Your function is right for {_listed(right)}." if right else ""


def _judge_method(exercise: Exercise, fn: Callable[..., Any], changed: int | None) -> tuple[Status, str]:
    """The numbers are right; is the method the one that was asked for?"""
    number, note = exercise.number, ""
    if changed is not None:
        writes = f"writes into its argument {_name_of(fn, changed)}"
        if exercise.keeps_inputs:
            hint = "A function such as `x += y` changes x itself, and whoever called you still holds it."
            said = f"The numbers are right, but your function {writes}, which should be left as it is."
            return "method", f"✗ {number} {said}\n  Hint: {hint}"
        note = f"\n  Note: your function {writes}; a caller may not expect that."
    for rule in exercise.rules:
        try:
            complaint = rule.complaint(fn)
        except (Exception, SystemExit) as error:
            return "error", f"✗ {number} {_raised(error, fn)} (on the larger inputs with which the method is looked at)"
        if complaint:
            right = "All verdicts of your test are right" if exercise.candidates else "The numbers are right"
            said = f"{right}, but the method is not the one asked for: it {complaint}."
            return "method", f"✗ {number} {said}\n  Hint: {rule.hint}"
    edges = f", and for {_listed([extreme.name for extreme in exercise.extremes])}" if exercise.extremes else ""
    looked = " The method was looked at as well." if exercise.rules else ""
    said = f"✓ {number} {exercise.title}: right. Tested on {exercise.tested}{edges}.{looked}{note}"
    return "right", said


# --- Tests as answers ---------------------------------------------------------------------------------------------
def _anonymous(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` without its name: a test is to look at what an implementation computes."""
    return method.handed_over(fn)


def _judge_test(exercise: Exercise, fn: Callable[..., Any], report: Callable[[], None]) -> tuple[Status, str]:
    """The status and the message for a test that a learner wrote: which implementations it judges wrongly."""
    number, blank = exercise.number, _blank(exercise)
    accepted: dict[int, bool] = {}
    order = list(range(len(exercise.candidates)))
    random.Random().shuffle(order)  # so that a test cannot count its calls; what is said does not hang on the order
    for n in order:
        candidate = exercise.candidates[n]
        try:
            answer = _received(fn(_anonymous(candidate.fn)))
        except NotImplementedError:
            return blank
        except (Exception, SystemExit) as error:
            what = "a right implementation" if candidate.right else f"one in which {candidate.name}"
            return "error", f"✗ {number} {_raised(error, fn)}, on {what}"
        if not accepted and (_is_dots(answer) or (_is_none(answer) and (_does_nothing(fn) or _has_dots(fn)))):
            return blank
        if answer is None:
            return "wrong", f"✗ {number} your test returns None: it ends without a `return` of True or False."
        if isinstance(answer, (torch.Tensor, np.ndarray)) and np.prod(answer.shape) != 1:
            many = f"your test returns {compare.describe(answer)}, asked for is True or False"
            return "wrong", f"✗ {number} {many}: are all of them right? (`.all()`)"
        if not isinstance(answer, (bool, np.bool_, torch.Tensor, np.ndarray)) and answer not in (0, 1):
            return "wrong", f"✗ {number} your test returns {compare.describe(answer)}, asked for is True or False."
        accepted[n] = bool(answer)
        report()
    status, said = _judge_verdicts(exercise, accepted)
    return _judge_method(exercise, fn, None) if status == "right" and exercise.rules else (status, said)


def _judge_verdicts(exercise: Exercise, accepted: dict[int, bool]) -> tuple[Status, str]:
    number, candidates = exercise.number, exercise.candidates
    passed = [c for n, c in enumerate(candidates) if accepted[n] and not c.right]
    refused = [c for n, c in enumerate(candidates) if not accepted[n] and c.right]
    bugs, right = sum(not c.right for c in candidates), sum(c.right for c in candidates)
    if not passed and not refused:
        return "right", f"✓ {number} {exercise.title}: right. Tested on {exercise.tested}."
    if len(refused) == right and not passed:
        said = f"Your test rejects everything that it was shown, the {right} right implementations too."
    elif len(passed) == bugs and not refused:
        said = f"Your test accepts everything that it was shown; all {bugs} bugs get through:"
    else:
        parts = [f"lets {len(passed)} of {bugs} bugs through"] * bool(passed)
        parts += [f"rejects {len(refused)} of {right} right implementations"] * bool(refused)
        said = f"Your test {' and '.join(parts)}:"
    lines = [f"\n  - gets through: {c.name}" for c in passed] + [
        f"\n  - rejected though right: {c.name}" for c in refused
    ]
    hint = next((c.hint for c in (*refused, *passed) if c.hint), "")
    if len(refused) == right > 1:
        hint += " If it is not that, what you compare with is not what the task describes: scale, state or sizes?"
    return "misunderstanding", f"✗ {number} {said}{''.join(lines)}\n  Hint: {hint}"


# --- The two functions of this module -----------------------------------------------------------------------------
def evaluate(
    number: str,
    fn: Callable[..., Any],
    seed: int = 0,
    *,
    exercises: Mapping[str, Exercise] | None = None,
    seconds: float = limits.SECONDS,
) -> Verdict:
    """Judge `fn` as an answer to exercise `number` of the book, or of `exercises`.

    seconds: how long it may work, over all inputs.  Raises KeyError if there is no such exercise,
    TypeError for a kernel, which has to come as `guarded(number, kernel)`.
    """
    exercises = all_exercises() if exercises is None else exercises
    if not isinstance(number, str) or number not in exercises:
        raise KeyError(f"number must be one of {sorted(exercises)}, got {compare.describe(number)}")
    exercise = exercises[number]

    if hasattr(fn, "fn") and hasattr(fn, "__getitem__"):
        raise TypeError(f'a kernel is launched by the judge: check("{number}", guarded("{number}", kernel))')

    def task(report: Callable[[], None]) -> tuple[Status, str]:
        if exercise.candidates:
            return _judge_test(exercise, fn, report)
        return _judge(exercise, fn, seed, report)

    if getattr(fn, "limited", False) or _does_nothing(fn):
        status, message = task(lambda: None)
        return Verdict(status, message)
    if exercise.rules:
        method.prepare()
    outcome = limits.run(task, seconds=seconds)
    if not outcome.ended:
        status, message = outcome.value
        return Verdict(status, message, outcome.printed)
    if outcome.ended == limits.too_late(seconds) and exercise.candidates:
        tried = f"{outcome.steps} of {len(exercise.candidates)} implementations were tested by then"
        said = f"your test {outcome.ended}: {tried}.\n  Hint: Shorter sequences and fewer of them show the same bugs."
    elif outcome.ended == limits.too_late(seconds):
        said = f"your function {outcome.ended}.\n  Hint: Is there a loop that never ends?"
    else:
        said = f"your function {outcome.ended}."
    return Verdict("error", f"✗ {number} {said}", outcome.printed)


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
    verdict = evaluate(number, fn, exercises=exercises)
    encoding = getattr(sys.stdout, "encoding", None)
    if verdict.printed:
        print(printable(verdict.printed, encoding), end="" if verdict.printed.endswith("\n") else "\n")
    print(printable(verdict.message, encoding))
