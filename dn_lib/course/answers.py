"""The verdict on one answer: computed here, while the answer itself runs in a room."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from dn_lib.course import wire
from dn_lib.course.kernel_text import KernelRefused, kernel_text
from dn_lib.course.notebooks import Assignment, Submission, Task, bound, runnable
from dn_lib.course.rooms import Room, Rooms, Stopped
from dn_lib.teaching.checks import Verdict, evaluate
from dn_lib.teaching.judge import compare, limits
from dn_lib.teaching.judge.method import Operation, Record, Rule
from dn_lib.teaching.registry import Exercise, all_exercises

BACKSTOP = limits.PATIENCE * limits.SECONDS  # for the judge itself: the room's own clock ends an answer long before


# --- An answer that is elsewhere ----------------------------------------------------------------------------------
def _error(facts: dict[str, Any]) -> Exception:
    """What an answer raised, as an error of the same name and message, and of no other content."""
    name, said = str(facts.get("name", "Exception"))[:80], str(facts.get("said", ""))[:500]
    if facts.get("memory"):
        return MemoryError(said)
    if name == "NotImplementedError":
        return NotImplementedError(said)
    return type(name, (Exception,), {})(said)


def _function(source: str, name: str) -> ast.FunctionDef | None:
    """The definition of `name` in `source`, None if there is none or it is something else in the end."""
    try:
        nodes = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    last = next((node for node in reversed(nodes) if name in bound(node)), None)
    return last if isinstance(last, ast.FunctionDef) else None


def _is_dots(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is Ellipsis


def _does_nothing(node: ast.stmt) -> bool:
    """A docstring, `...`, `pass`, or the return of nothing or of dots."""
    if isinstance(node, ast.Return):
        return node.value is None or (isinstance(node.value, ast.Constant) and node.value.value in (None, Ellipsis))
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def is_empty(source: str, name: str) -> bool:
    """Whether function `name` of `source` has no body yet."""
    function = _function(source, name)
    return function is not None and all(map(_does_nothing, function.body))


def is_unfinished(source: str, name: str) -> bool:
    """Whether it has no body yet, or still has the line `...` somewhere in it."""
    function = _function(source, name)
    return function is not None and (is_empty(source, name) or any(map(_is_dots, ast.walk(function))))


class Answer:
    """A function that is called in a room.

    blank: whether it returns None because nothing has been written yet.
    """

    def __init__(self, room: Room, source: str, name: str, complain: Callable[[Any, Any], None] | None = None):
        self.room, self.blank, self.complain = room, is_unfinished(source, name), complain
        if function := _function(source, name):
            given = function.args
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            names = dict.fromkeys(a.arg for a in (*given.posonlyargs, *given.args))
            self.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])

    def _ask(self, kind: str, inputs: tuple) -> tuple[Any, dict[str, Any]]:
        kind, facts, values = self.room.ask(kind, args=inputs)
        if kind == "raised":
            raise _error(facts if isinstance(facts, dict) else {})
        return facts, values

    def __call__(self, *inputs: Any) -> Any:
        report, values = self._ask("call", inputs)
        answer, after = values.get("answer"), values.get("after")
        if answer is None and self.blank:
            raise NotImplementedError
        if isinstance(after, list):  # it has written into its arguments: the judge shall see that
            for mine, its in zip(compare.parts(inputs), after, strict=False):
                if isinstance(its, torch.Tensor) and its.dtype == mine.dtype:
                    mine.set_(its)  # pyright: ignore[reportArgumentType]
        if self.complain is not None:
            self.complain(report, answer)
        return answer

    def watch(self, *inputs: Any) -> Record:
        """How it computes, as the room saw it."""
        facts, values = self._ask("watch", inputs)
        try:
            kept = iter(values["tensors"])
            operations = [
                Operation(
                    str(op["name"]),
                    tuple(_seen(x, kept) for x in op["inputs"]),
                    tuple(_seen(x, kept) for x in op["outputs"]),
                    bool(op["library"]),
                    frozenset(map(int, op["reads"])),
                )
                for op in facts["operations"]
            ]
            lists = (list(map(str, facts[name])) for name in ("calls", "outside", "gradients"))
            return Record(operations, *lists)
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError):
            raise Stopped("wrote into the judge's line, which no answer needs") from None


def _seen(x: dict[str, Any], kept: Any) -> torch.Tensor:
    """A tensor on the way: with its numbers if it is small, else its size alone."""
    if x["kept"]:
        return next(kept)
    nothing = torch.full((), float("nan")) if x["dtype"].startswith("float") else torch.zeros(())
    return nothing.to(wire.DTYPES.get(x["dtype"], torch.float64)).expand([int(n) for n in x["shape"]])


@dataclasses.dataclass(frozen=True)
class RemoteRule(Rule):
    """A rule for an answer in a room: what it did is noted there, and judged here."""

    def complaint(self, answer: Any) -> str:
        records = [answer.watch(*inputs) for inputs in self.inputs()]
        left = next((name for record in records for name in record.outside), "")
        if left:
            return f"leaves PyTorch (`{left}`), where `check` cannot see how it computes"
        return self.broken(*records)


# --- Kinds of answers ---------------------------------------------------------------------------------------------
def _complain_of_launches(report: Any, found: Any) -> None:
    """What the judge of launches says (exercise 5.13), of what the room has seen of them."""
    from types import SimpleNamespace

    from dn_lib.teaching.exercises import ch5

    if not isinstance(found, tuple) or not all(isinstance(x, torch.Tensor) for x in found):
        return
    try:
        races = list(map(str, report["races"]))
        launches = [SimpleNamespace(kernel=str(name), overlaps=lambda: []) for name in report["kernels"]]
        if launches and races:
            launches[0].overlaps = lambda: races
        trace = SimpleNamespace(launches=launches, outside=list(map(str, report["outside"])))
    except (TypeError, KeyError):
        raise Stopped("wrote into the judge's line, which no answer needs") from None
    ch5._complain(trace, found)


def _verdict(number: str, said: str) -> Verdict:
    return Verdict("error", f"✗ {number} your function {said}")


def _judge_kernel(task: Task, submission: Submission, assignment: Assignment, seed: int) -> Verdict:
    from dn_lib.teaching.judge.kernels import guarded

    number = task.number
    before = [source for _, source in submission.before[number]]
    sources = [assignment.before(number), *before, runnable(submission.answers[number])]
    try:
        text = kernel_text(sources, task.name)
    except KernelRefused as refused:
        said = str(refused)
        return _verdict(number, said if said.startswith("is ") else f"is no kernel: it {said}.")
    return evaluate(number, guarded(number, text), seed)


class Judge:
    """Judges the answers of one submission after the other.

    seed: of the inputs; another than that of `check` (0), so that no answer is a table of what `check` expects.
    """

    def __init__(self, rooms: Rooms, *, seed: int = 1):
        self.rooms, self.seed = rooms, seed
        self.bad: list[tuple[Submission, str]] = []  # cells that end or hold up whoever runs them

    def _cells(self, submission: Submission, number: str) -> list[tuple[Submission, str]]:
        """The cells that are run before the answer to `number`, by their labels."""
        cells = [(submission, label) for label, _ in submission.before[number]]
        return [cell for cell in cells if cell not in self.bad]

    def judge(self, task: Task, submission: Submission, assignment: Assignment) -> Verdict:
        """The verdict on exercise `task` of `submission`."""
        number = task.number
        if number not in submission.answers:
            return Verdict("not attempted", f"○ {number} not attempted yet: no cell defines {task.name}.")
        source = runnable(submission.answers[number])
        if task.kind == "guarded":
            return _judge_kernel(task, submission, assignment, self.seed)
        if is_empty(source, task.name):
            return Verdict("not attempted", f"○ {number} not attempted yet.")
        while True:
            with self.rooms.open() as room:
                try:
                    return self._judge_in(room, task, source, submission, assignment)
                except Stopped as stopped:
                    if (submission, room.running) not in self._cells(submission, number):
                        return _verdict(number, f"{stopped}.")
                    # Another cell than the one asked for: it is judged by itself, and does this one no harm.
                    self.bad.append((submission, room.running))

    def _judge_in(self, room: Room, task: Task, source: str, submission: Submission, assignment: Assignment) -> Verdict:
        labels = [label for _, label in self._cells(submission, task.number)]
        before = [(label, text) for label, text in submission.before[task.number] if label in labels]
        facts = {
            "chapter": assignment.before(task.number),
            "cells": [*before, ("answer", source)],
            "name": task.name,
            "launches": task.kind == "launched",
        }
        kind, said, _ = room.ask("define", facts=facts)
        if kind == "raised":
            error = _error(said if isinstance(said, dict) else {})
            line = next(iter(str(error).splitlines()), "") or "no message"
            if isinstance(error, MemoryError):
                return _verdict(task.number, f"{limits.out_of_memory(limits.MEMORY)}.")
            return Verdict("error", f"✗ {task.number} your cell raised {type(error).__name__}: {line}")
        room.running = ""
        complain = _complain_of_launches if task.kind == "launched" else None
        answer = Answer(room, source, task.name, complain)
        exercise: Exercise = all_exercises()[task.number]
        rules = tuple(RemoteRule(rule.inputs, rule.broken, rule.hint) for rule in exercise.rules)
        exercises = {task.number: dataclasses.replace(exercise, rules=rules)}
        verdict = evaluate(task.number, answer, self.seed, exercises=exercises, seconds=BACKSTOP)
        return Verdict(verdict.status, verdict.message.replace("raised Stopped: ", ""))
