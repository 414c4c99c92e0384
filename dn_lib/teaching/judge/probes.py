"""What a wrong answer depends on, found by changing an input and calling it again: facts, and no guesses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import elu

from dn_lib.teaching.judge.compare import flat, same
from dn_lib.teaching.registry import leaves

UNCHANGED = 1e-9  # relative: less is rounding, and what an input changes is more
CHANGED = 1e-6


def probe(fn: Callable[..., Any], reference: Callable[..., Any], inputs: tuple) -> str:
    """The first of these facts in which `fn` is unlike `reference`, in a sentence; "" if there is none."""
    try:
        before, expected = fn(*_copy(inputs)), reference(*_copy(inputs))
        if [x.shape for x in leaves(before)] != [x.shape for x in leaves(expected)]:
            return ""
        return _ignored(fn, reference, inputs, before, expected) or _in_time(fn, reference, inputs, before, expected)
    except (Exception, SystemExit):  # an answer that holds no numbers, or does not take other inputs
        return ""


# --- As if an input were another ----------------------------------------------------------------------------------
def _normalised(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "replaced by ones": lambda x: x * 0 + 1,
    "replaced by zeros": lambda x: x * 0,
    "squared": lambda x: x * x,
    "replaced by its square root": lambda x: x.sqrt(),
    "replaced by one minus it": lambda x: 1 - x,
    "doubled": lambda x: 2 * x,
    "halved": lambda x: x / 2,
    "negated": lambda x: -x,
    "in reverse order": lambda x: x.flip(0),
    "normalised": _normalised,
    "scaled by d^-1/2": lambda x: x * x.shape[-1] ** -0.5,
    "passed through elu(x) + 1": lambda x: elu(x) + 1,
    "transposed": lambda x: x.transpose(-2, -1),
    "summed up along the sequence": lambda x: x.cumsum(0),
    "multiplied up along the sequence": lambda x: x.cumprod(0),
    "taken from the token before": lambda x: torch.cat([0 * x[:1], x[:-1]]),
    "taken from the token before, with ones for the first": lambda x: torch.cat([0 * x[:1] + 1, x[:-1]]),
    "replaced by that of the first token": lambda x: x[:1].expand_as(x),
    "replaced by that of the last token": lambda x: x[-1:].expand_as(x),
    "replaced by its mean": lambda x: x.mean(0, keepdim=True).expand_as(x),
    "taken from the token after": lambda x: torch.cat([x[1:], 0 * x[:1]]),
    "divided by its squared length": lambda x: x / x.square().sum(-1, keepdim=True),
    "divided by its root mean square": lambda x: x / x.square().mean(-1, keepdim=True).sqrt(),
    "replaced by its reciprocal": lambda x: 1 / x,
    "cut off at one": lambda x: x.clamp(max=1),
    "without its sign": lambda x: x.abs(),
    "rounded to float32": lambda x: x.float().to(x.dtype),
    "passed through relu(x)": lambda x: x.relu(),
}
SHIFTS = {"one larger": 1, "one smaller": -1}


def _replacements(fn: Any, inputs: tuple) -> Iterator[tuple[str, Callable[[tuple], tuple]]]:
    """Ways to change one input of the kind of `inputs`, or to exchange two, with what to say of each."""
    for n, value in enumerate(inputs):
        name = _name(fn, n)
        if isinstance(value, (Tensor, float)):
            for words, change in CHANGES.items():
                yield f"{name} {words}", lambda x, n=n, change=change: _with(x, n, change(torch.as_tensor(x[n])))
        elif isinstance(value, int) and not isinstance(value, bool):
            for words, step in SHIFTS.items():
                yield f"{name} {words}", lambda x, n=n, step=step: _with(x, n, x[n] + step)
        for m in range(n):
            if type(value) is type(inputs[m]) and getattr(value, "shape", ()) == getattr(inputs[m], "shape", ()):
                words = f"{_name(fn, m)} and {name} exchanged"
                yield words, lambda x, n=n, m=m: _with(_with(x, n, x[m]), m, x[n])
                for to, by in ((n, m), (m, n)):
                    words = f"{_name(fn, by)} in the place of {_name(fn, to)}"
                    yield words, lambda x, to=to, by=by: _with(x, to, x[by])


def _with(inputs: tuple, position: int, value: Any) -> tuple:
    if isinstance(inputs[position], float):
        value = float(value)
    return (*inputs[:position], value, *inputs[position + 1 :])


def as_if(fn: Any, reference: Callable[..., Any], cases: list[tuple[tuple, Any]], tolerance: float) -> str:
    """Whether the answers are those of the reference for another input, in a sentence; "" if for none that is tried.

    cases: inputs and the answers to them; it has to hold for all.
    """

    def holds(change: Callable[[tuple], tuple]) -> bool:
        try:
            results = ((answer, reference(*_copy(change(inputs)))) for inputs, answer in cases)
            return all(same(a, r, 0.0 if isinstance(r, int) else tolerance) for a, r in results)
        except Exception:  # no such input, or an answer that holds no numbers
            return False

    found = next((words for words, change in _replacements(fn, cases[0][0]) if holds(change)), "")
    return f"your answer is what is expected for {found}." if found else ""


# --- What it depends on -------------------------------------------------------------------------------------------
def _copy(inputs: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def _moved(value: Any) -> Any:
    """Another input of the same kind; None if there is none that is safe."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        return 0.9 * value + 0.01
    return 0.9 * value if isinstance(value, float) else None


def _ignored(fn: Any, reference: Any, inputs: tuple, before: Any, expected: Any) -> str:
    """An input that the reference depends on, and the answer does not."""
    for position, value in enumerate(inputs):
        other = _moved(value)
        if other is None:
            continue
        changed = (*inputs[:position], other, *inputs[position + 1 :])
        if same(fn(*_copy(changed)), before, UNCHANGED) and not same(reference(*_copy(changed)), expected, CHANGED):
            return f"your answer does not depend on {_name(fn, position)}."
    return ""


def _in_time(fn: Any, reference: Any, inputs: tuple, before: Any, expected: Any) -> str:
    """Whether a token is seen by earlier ones, or not by itself."""
    rows = flat(expected)[0]
    if not isinstance(rows, Tensor) or not rows.dim() or (length := len(rows)) < 3:
        return ""
    if not isinstance(flat(before)[0], Tensor) or flat(before)[0].shape != rows.shape:
        return ""
    sequences = [
        n for n, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point() and len(x) == length
    ]
    if len(sequences) < 2:
        return ""

    def with_another_end(positions: list[int]) -> tuple:
        changed = list(_copy(inputs))
        for n in positions:
            changed[n][-1] = 0.7 * changed[n][-1]
        return tuple(changed)

    def output(function: Any, changed: tuple) -> Tensor:
        return flat(function(*changed))[0]

    changed = with_another_end(sequences)
    if same(output(reference, changed)[:-1], rows[:-1], UNCHANGED):
        if not same(output(fn, changed)[:-1], flat(before)[0][:-1], UNCHANGED):
            rows = flat(before)[0][:-1]
            seen = [n for n in sequences if not same(output(fn, with_another_end([n]))[:-1], rows, UNCHANGED)]
            names = f"{_listed([_name(fn, n) for n in seen])} of " if seen else ""
            return f"earlier rows of your output change when {names}the last token is changed: they see the future."
        written = sequences[1:]  # all but the query
        ours, theirs = output(fn, with_another_end(written)), output(reference, with_another_end(written))
        if same(ours, flat(before)[0], UNCHANGED) and not same(theirs, rows, CHANGED):
            names = " and ".join(_name(fn, n) for n in written)
            return f"the last row of your output does not change when {names} of its own token do."
    return ""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else "".join(names)


def _name(fn: Any, position: int) -> str:
    try:
        return f"`{list(inspect.signature(fn).parameters)[position]}`"
    except (TypeError, ValueError, IndexError):
        return f"argument {position}, counted from 0"
