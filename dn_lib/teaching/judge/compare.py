"""An answer beside what was expected: whether they agree, and if not, in what words to say how they differ."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dn_lib.teaching.registry import leaves, relative_error

NEAR = 1e-2  # a relative difference below which two numbers look alike
SINGLE = 1e-5  # a relative error that float32 can make in a short computation, and float64 does not
HIDDEN = 1e-6  # the same where the type no longer shows it


def describe(value: Any) -> str:
    """`value` in a few words, whatever it is."""
    if type(value) in (Tensor, torch.nn.Parameter) and not value.is_nested:
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__}"
    if isinstance(value, (tuple, list)):
        more = ", …" if len(value) > 4 else ""
        kind = "a list of " if isinstance(value, list) else ""
        return f"{kind}{len(value)} values: " + ", ".join(describe(item) for item in value[:4]) + more
    try:
        return reprlib.repr(value)
    except (Exception, SystemExit):  # as of a whole number with more digits than Python writes
        return f"{type(value).__name__} that cannot be shown"


def arguments(fn: Callable[..., Any], inputs: tuple) -> list[str]:
    """The names of what `fn` was called with; empty if they have none."""
    try:
        names = list(inspect.signature(fn).bind(*inputs).arguments)
    except (TypeError, ValueError):
        return []
    return names if len(names) == len(inputs) else []


def describe_inputs(fn: Callable[..., Any], inputs: tuple) -> str:
    """What `fn` was called with, as in "q [11, 3], chunk_size = 4"; empty if its arguments have no names."""
    names = arguments(fn, inputs)
    if not names:
        return ""
    words = []
    for name, value in zip(names, inputs, strict=True):
        if isinstance(value, Tensor) and value.dim():
            words.append(f"{name} {list(value.shape)}")
        elif isinstance(value, (Tensor, int, float)):
            words.append(f"{name} = {number(value.item() if isinstance(value, Tensor) else value, 3)}")
    return ", ".join(words)


def structure(value: Any) -> Any:
    """The nest of tuples and lists in `value`, without what they hold."""
    return tuple(structure(v) for v in value) if isinstance(value, (tuple, list)) else None


def flat(value: Any) -> list:
    """What the nest of tuples and lists in `value` holds."""
    return [leaf for item in value for leaf in flat(item)] if isinstance(value, (tuple, list)) else [value]


def number(value: complex, digits: int = 6) -> str:
    """Whole numbers in full, as counts are; others with `digits` digits."""
    if isinstance(value, (int, float)) and abs(value) < 1e15 and value == int(value):
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() and not value.is_complex()
    return isinstance(value, (int, np.integer))


def tolerances(reference: Any, tolerance: float) -> list[float]:
    """What each leaf of `reference` allows: whole numbers, which are counts and verdicts, have to be exact."""
    return [0.0 if _is_whole(leaf) else tolerance for leaf in flat(reference)]


def near(answer: Any, reference: Any, tolerance: float) -> bool:
    """Whether two leaves agree; False, too, for what holds no numbers."""
    try:
        return relative_error(answer, reference) <= tolerance
    except Exception:
        return False


def agrees(answer: Any, reference: Any, tolerance: float) -> bool:
    """Whether `answer` has the structure of `reference` and its numbers, whole ones as whole numbers."""
    if structure(answer) != structure(reference):
        return False
    allowed = tolerances(reference, tolerance)
    return all(
        near(a, r, limit) and not is_float_for_int(a, r)
        for a, r, limit in zip(flat(answer), flat(reference), allowed, strict=True)
    )


def is_float_for_int(answer: Any, reference: Any) -> bool:
    """Whether an int was asked for, and what came has a fraction, if only .0."""
    return type(reference) is int and not _is_whole(answer)


def same(answer: Any, other: Any, tolerance: float) -> bool:
    """Whether two answers agree, where NaN and infinity agree with themselves."""
    a, b = leaves(answer), leaves(other)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return False
    for x, y in zip(a, b, strict=True):
        finite = x.isfinite()
        if not torch.equal(finite, y.isfinite()):
            return False
        if relative_error(x.where(finite, 0), y.where(finite, 0)) > tolerance:
            return False
    return True


# --- The first difference -----------------------------------------------------------------------------------------
def first_difference(
    answer: Any, reference: Any, tolerance: float, names: tuple[str, ...] = (), inputs: str = ""
) -> str:
    """Where `answer` first departs from `reference`, with both values.

    names: those of the outputs.  inputs: what the function was called with, in words.
    """
    on = f", on {inputs}" if inputs else ""
    expected_but_got = f"you returned {describe(answer)}, expected {describe(reference)}{on}."
    if structure(answer) != structure(reference):
        return expected_but_got
    try:
        got, expected = leaves(answer), leaves(reference)
    except Exception:  # no numbers, or none that can be read
        return expected_but_got
    right: list[str] = []
    originals = zip(flat(answer), flat(reference), strict=True)
    compared = zip(got, expected, tolerances(reference, tolerance), originals, strict=True)
    for n, (a, b, allowed, (given, wanted)) in enumerate(compared):
        which = names[n] if n < len(names) else f"output {n}" if len(got) > 1 else "the output"
        if a.shape != b.shape:
            return f"{which} has shape {list(a.shape)}, expected {list(b.shape)}{on}."
        wrong = ~((a - b).abs() <= allowed * b.abs().max().clamp(min=1e-30)) if b.numel() else torch.zeros(0)
        if wrong.any():
            before = f"{' and '.join(right)} {'is' if len(right) == 1 else 'are'} right; " if right else ""
            return before + which + _at_first(a, b, wrong, given, wanted) + on + "."
        right.append(which)
    return "the relative error is above the tolerance, though no single entry stands out."


def _at_first(a: Tensor, b: Tensor, wrong: Tensor, given: Any, wanted: Any) -> str:
    """The first place that is wrong, both values, and what tells them apart if they look alike."""
    index = wrong.nonzero()[0].tolist()
    x, y = a[tuple(index)].item(), b[tuple(index)].item()
    place = f"at index {index}" if index else "in value"
    digits = 6 if number(x) != number(y) else 17  # enough to see that they differ
    words = f" first differs {place}: you have {number(x, digits)}, expected {number(y, digits)}"
    if not _is_whole(wanted) and math.isfinite(abs(x)) and abs(x - y) <= NEAR * abs(y):
        words += f" (a difference of {abs(x - y):.1e}; the tolerance is for rounding alone)"
    if index and index[0]:
        words += f" (the {index[0]} rows before it are right)" if index[0] > 1 else " (the row before it is right)"
    kinds = [str(v.dtype).removeprefix("torch.") for v in (given, wanted) if isinstance(v, Tensor)]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        words += f"; yours is {kinds[0]}, expected {kinds[1]}"
    return words


# --- In what relation an answer stands to the right one -------------------------------------------------------------
Cases = Sequence[tuple[tuple, Any]]


def relation(
    answers: Sequence[Any],
    cases: Cases,
    tolerance: float,
    names: tuple[str, ...] = (),
    arguments: Sequence[str] = (),
) -> str:
    """What all of `answers` have in common beside the references of `cases`, in a sentence; "" if nothing is seen.

    A relation has to hold on every case.  It is a fact of the numbers, not a guess at what was meant.
    names: those of the outputs.  arguments: those of the inputs.
    """
    try:
        found = _of_containers(answers, cases, tolerance, names)
        return found or _of_tensors(answers, cases, tolerance, names, arguments)
    except Exception:  # an answer that holds no numbers
        return ""


def _of_containers(answers: Sequence[Any], cases: Cases, tolerance: float, names: tuple[str, ...]) -> str:
    references = [reference for _, reference in cases]

    def everywhere(build: Callable[[Any], Any]) -> bool:
        try:
            return all(agrees(build(a), r, tolerance) for a, r in zip(answers, references, strict=True))
        except Exception:
            return False

    first, reference = answers[0], references[0]
    if all(a is None for a in answers):
        return "your function returns None: it ends without a `return`."
    if isinstance(reference, (tuple, list)):
        count = len(reference)
        for n in range(count):
            which = names[n] if n < len(names) else f"output {n}"
            if not isinstance(first, (tuple, list)) and all(
                near(a, r[n], tolerance) for a, r in zip(answers, references, strict=True)
            ):
                all_of_them = f": {' and '.join(names)}" if len(names) == count else ""
                return f"you returned one value, which is right: {which}. Asked for are {count}{all_of_them}."
        if isinstance(first, (tuple, list)) and len(first) == count > 1 and everywhere(lambda a: tuple(a)[::-1]):
            return f"the {count} values are right, but they are returned in the wrong order."
        if everywhere(lambda a: tuple(torch.stack(list(x)) if isinstance(x, (tuple, list)) else x for x in a)):
            return "the values are right, but some come as a list; `torch.stack` makes one tensor of them."
        if isinstance(first, (tuple, list)) and len(first) > count and everywhere(lambda a: tuple(a)[:count]):
            return f"you returned {len(first)} values. The first {count} are right; the others were not asked for."
        return ""
    if isinstance(first, (tuple, list)) and isinstance(reference, Tensor):
        for name, build in (
            ("stack", torch.stack),
            ("cat", torch.cat),
            ("tensor", torch.as_tensor),
            ("block_diag", _blocks),
        ):
            if everywhere(lambda a, build=build: build(list(a)).to(reference.dtype)):
                return f"the values are right, but they come as a list; `torch.{name}` makes one tensor of them."
        for n in range(len(first)):
            if everywhere(lambda a, n=n: a[n]):
                return f"you returned {len(first)} values. Number {n}, counted from 0, is the answer; return it alone."
    if all(is_float_for_int(a, r) for a, r in zip(answers, references, strict=True)):
        if all(near(a, r, 0.0) for a, r in zip(answers, references, strict=True)):
            return "the value is right, but it is a float; asked for is an int (in Python `//` divides whole numbers)."
        if all(near(math.floor(a) + 1, r, 0.0) for a, r in zip(answers, references, strict=True)):
            return "your value is a fraction; asked for is the next whole number above it."
        if any(a != math.floor(a) for a in answers) and all(
            math.floor(a) == r for a, r in zip(answers, references, strict=True)
        ):
            return "your value is a fraction; asked for is a whole number, and yours is less than one above it."
    return ""


def _blocks(parts: list[Tensor]) -> Tensor:
    return torch.block_diag(*parts)


def _of_tensors(
    answers: Sequence[Any], cases: Cases, tolerance: float, names: tuple[str, ...], arguments: Sequence[str]
) -> str:
    if any(structure(a) != structure(r) for a, (_, r) in zip(answers, cases, strict=True)):
        return ""
    rows = [list(zip(flat(a), flat(r), strict=True)) for a, (_, r) in zip(answers, cases, strict=True)]
    found: list[str] = []
    inputs = [dict(zip(arguments or map(str, range(len(i))), i, strict=False)) for i, _ in cases]
    for n in range(len(rows[0])):
        pairs = [row[n] for row in rows]
        if all(near(a, r, 0.0 if _is_whole(r) else tolerance) for a, r in pairs):
            continue
        which = names[n] if n < len(names) else f"output {n}" if len(rows[0]) > 1 else "the output"
        sentence = next((s for kind in RELATIONS if (s := kind(pairs, inputs, tolerance))), "")
        if not sentence:
            return ""
        found.append(f"{which} {sentence}")
    return "; ".join(found) + "." if found else ""


Pairs = list[tuple[Any, Any]]
Inputs = list[dict[str, Any]]


def _precision(pairs: Pairs, inputs: Inputs, tolerance: float) -> str:
    if not all(near(a, r, SINGLE) for a, r in pairs) or not isinstance(pairs[0][1], (Tensor, float)):
        return ""
    kinds = {str(a.dtype).removeprefix("torch.") for a, _ in pairs if isinstance(a, Tensor)}
    if kinds and kinds <= {"float32", "float16", "bfloat16"}:
        return (
            f"is {kinds.pop()} and right to its precision, but the inputs are float64: give new tensors the dtype of "
            "the inputs, as in `torch.zeros(3, 5, dtype=q.dtype)`"
        )
    values = _float_pairs(pairs)
    if all(near(a, r, HIDDEN) and (a != r).double().mean() > 0.5 for a, r in values):  # not one entry that is wrong
        return "agrees to a few digits only, as if something on the way were computed in float32"
    return ""


def _float_pairs(pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
    return [(leaves(a)[0], leaves(r)[0]) for a, r in pairs]


def _transposed(pairs: Pairs, inputs: Inputs, tolerance: float) -> str:
    values = _float_pairs(pairs)
    if all(a.dim() >= 2 and near(a.mT, r, tolerance) for a, r in values):
        return "is transposed"
    return ""


def _reshaped(pairs: Pairs, inputs: Inputs, tolerance: float) -> str:
    values = _float_pairs(pairs)
    if all(a.numel() == r.numel() and near(a.flatten(), r.flatten(), tolerance) for a, r in values):
        a, r = values[0]
        return f"has the right values in the wrong shape: {list(a.shape)}, expected {list(r.shape)}"
    return ""


def _factors(values: list[tuple[Tensor, Tensor]], tolerance: float) -> list[float] | None:
    """The number that each answer is of its reference, if it is a multiple."""
    found = []
    for a, r in values:
        if a.shape != r.shape or not r.any() or not a.isfinite().all() or a.is_complex():
            return None
        c = float((a * r).sum() / (r * r).sum())
        if not c or not near(a, c * r, tolerance):
            return None
        found.append(c)
    return found


def _multiple(pairs: Pairs, inputs: Inputs, tolerance: float) -> str:
    values = _float_pairs(pairs)
    factors = _factors(values, tolerance)
    if factors is None or len(factors) < 3:
        return ""
    c = factors[0]
    if all(math.isclose(f, c, rel_tol=1e-6) for f in factors):
        return (
            "has the wrong sign everywhere" if math.isclose(c, -1) else f"is everywhere {c:.6g} times what is expected"
        )
    firsts = [next(iter(i.values()), None) for i in inputs]
    widths = [x.shape[-1] for x in firsts if isinstance(x, Tensor) and x.dim()]
    if len(widths) == len(factors):
        if all(math.isclose(f, w**-0.5, rel_tol=1e-6) for f, w in zip(factors, widths, strict=True)):
            return "is scaled by d_k^-1/2, which was not asked for"
        if all(math.isclose(f, w**0.5, rel_tol=1e-6) for f, w in zip(factors, widths, strict=True)):
            return "lacks the scale d_k^-1/2"
    if by := _quantity(factors, inputs):
        return f"is {by} times what is expected"
    if all(r.numel() >= 3 for _, r in values):
        return f"is a multiple of what is expected, {c:.4g} times on the first input"
    return ""


def _quantity(factors: list[float], inputs: Inputs) -> str:
    """A size or a number of the inputs that is each of `factors`, or its root, or one divided by it."""
    for quantity in _quantities(inputs[0]):
        numbers = [_quantities(i).get(quantity, 0.0) for i in inputs]
        if len({*numbers}) < 2 or min(numbers) <= 0:
            continue
        for words, build in (
            (quantity, lambda x: x),
            (f"1 / ({quantity})", lambda x: 1 / x),
            (f"the square root of ({quantity})", lambda x: x**0.5),
            (f"the square of ({quantity})", lambda x: x * x),
            (f"1 / the square root of ({quantity})", lambda x: x**-0.5),
        ):
            if all(math.isclose(f, build(x), rel_tol=1e-6) for f, x in zip(factors, numbers, strict=True)):
                return words
    return ""


def _quantities(inputs: dict[str, Any]) -> dict[str, float]:
    """Numbers and sizes of one set of inputs, by what to call them."""
    found: dict[str, float] = {}
    for name, value in inputs.items():
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and not value.dim()):
            x = float(value)
            found |= {name: x, f"{name} - 1": x - 1, f"{name} + 1": x + 1, f"1 - {name}": 1 - x}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.dim():
            found.setdefault(f"the length of {name}", float(len(value)))
            found.setdefault(f"the norm of {name}", float(value.norm()) if value.dim() == 1 else 0.0)
    return found


def _inverted(pairs: Pairs, inputs: Inputs, tolerance: float) -> str:
    values = _float_pairs(pairs)
    if len(values) < 3 or any(a.shape != r.shape or not r.all() for a, r in values):
        return ""
    for sentence, build in (
        ("is upside down: one divided by what is expected", lambda r: 1 / r),
        ("is the square root of what is expected", lambda r: r.abs().sqrt()),
        ("is the square of what is expected", lambda r: r * r),
        ("is the upside down root of what is expected", lambda r: 1 / r.abs().sqrt()),
    ):
        if all(near(a, build(r), tolerance) for a, r in values):
            return sentence
    return ""


def _off(pairs: Pairs, inputs: Inputs, tolerance: float) -> str:
    if not all(_is_whole(r) and not isinstance(r, (bool, Tensor)) for _, r in pairs) or len(pairs) < 3:
        return ""
    gaps = {a - r for a, r in pairs}
    if len(gaps) == 1 and (gap := gaps.pop()):
        return f"is always {number(abs(gap))} too {'large' if gap > 0 else 'small'}"
    return ""


def _shifted(pairs: Pairs, inputs: Inputs, tolerance: float) -> str:
    values = [(a, r) for a, r in _float_pairs(pairs) if r.dim() and len(r) >= 3]
    if not values or any(a.shape != r.shape for a, r in values):
        return ""
    if all(near(a[1:], r[:-1], tolerance) for a, r in values):
        return "is late by one: row t holds what belongs to row t - 1"
    if all(near(a[:-1], r[1:], tolerance) for a, r in values):
        return "is early by one: row t holds what belongs to row t + 1"
    if all(near(a.flip(0), r, tolerance) for a, r in values):
        return "is reversed: its first row is what belongs to the last"
    return ""


def _differs_by(pairs: Pairs, inputs: Inputs, tolerance: float) -> str:
    """An input, or a size of the inputs, that is all that is added or missing."""
    values = _float_pairs(pairs)
    if any(a.shape != r.shape for a, r in values):
        return ""
    for name in inputs[0]:
        given = [x for i in inputs if isinstance(x := i.get(name), Tensor)]
        if len(given) == len(values) and all(x.shape == r.shape for x, (_, r) in zip(given, values, strict=True)):
            for sign, words in ((-1, f"is right but for `{name}`, which is missing"), (1, f"has `{name}` added to it")):
                if all(near(a, r + sign * x, tolerance) for (a, r), x in zip(values, given, strict=True)):
                    return words
    if len(values) < 3 or any(r.numel() != 1 for _, r in values):
        return ""
    gaps = [float(a - r) for a, r in values]
    for quantity in _quantities(inputs[0]):
        sizes = [_quantities(i).get(quantity, 0.0) for i in inputs]
        equal = all(math.isclose(abs(g), x, rel_tol=1e-9) for g, x in zip(gaps, sizes, strict=True))
        if len({*sizes}) > 1 and equal and len({g > 0 for g in gaps}) == 1:
            return f"is too {'large' if gaps[0] > 0 else 'small'} by {quantity}"
    return ""


def _around_identity(pairs: Pairs, inputs: Inputs, tolerance: float) -> str:
    values = _float_pairs(pairs)
    if any(r.dim() != 2 or r.shape[0] != r.shape[1] or a.shape != r.shape for a, r in values):
        return ""
    moved = [(a - torch.eye(len(a)).to(a), r - torch.eye(len(r)).to(r)) for a, r in values]
    factors = _factors(moved, tolerance)
    if factors is None or len(factors) < 3 or any(not math.isclose(f, factors[0], rel_tol=1e-6) for f in factors):
        return ""
    c = factors[0]
    much = "has the wrong sign" if math.isclose(c, -1) else f"is {c:.4g} times what it should be"
    return f"differs from the identity by a matrix that {much}"


RELATIONS = (_off, _precision, _transposed, _reshaped, _multiple, _around_identity, _differs_by, _inverted, _shifted)


def parts(value: Any) -> Iterator[Tensor]:
    """The tensors in `value`, an input."""
    for leaf in flat(value):
        if isinstance(leaf, Tensor):
            yield leaf
