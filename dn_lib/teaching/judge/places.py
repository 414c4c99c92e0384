"""What of a wrong answer is right, and which properties of the right one it lacks: facts, and no guesses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dn_lib.teaching.judge.compare import Cases, agrees, describe_inputs, flat, number, structure
from dn_lib.teaching.registry import leaves

SMALL = 6  # whole numbers that a learner can check by hand
SYMMETRY = 1e-9  # relative to the largest entry


def pattern(
    answers: Sequence[Any],
    cases: Cases,
    tolerance: float,
    names: tuple[str, ...] = (),
    arguments: Sequence[str] = (),
) -> str:
    """Where the first wrong output of `answers` is right, or what it lacks, in a sentence; "" if nothing is seen."""
    try:
        references = [reference for _, reference in cases]
        if any(structure(a) != structure(r) for a, r in zip(answers, references, strict=True)):
            return ""
        rows = [list(zip(leaves(a), leaves(r), strict=True)) for a, r in zip(answers, references, strict=True)]
    except Exception:  # an answer that holds no numbers
        return ""
    for n in range(len(rows[0])):
        pairs = [row[n] for row in rows]
        if any(a.shape != r.shape or not a.isfinite().all() or a.is_complex() for a, r in pairs):
            return ""
        masks = [(a - r).abs() > tolerance * r.abs().max() if r.numel() else r.bool() for a, r in pairs]
        if not any(mask.any() for mask in masks):
            continue
        which = names[n] if n < len(names) else f"output {n}" if len(rows[0]) > 1 else "your output"
        whole = [(a, r, mask) for (a, r), mask in zip(pairs, masks, strict=True) if mask.any()]
        found = next((words for words, holds in FACTS if all(holds(*each) for each in whole)), "")
        found = found or _by_parts([inputs for inputs, _ in cases], arguments, masks)
        lacks = next((words for words, has in PROPERTIES if _lacks(pairs, has)), "")
        empty = "has a row of zeros where there should be none" if all(_empty_row(*each) for each in whole) else ""
        facts = " and ".join(fact for fact in (found or empty, lacks) if fact)
        return f"{which} {facts}." if facts else ""
    return ""


# --- Where it is wrong --------------------------------------------------------------------------------------------
def _only(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], bool]:
    """Whether all that is wrong lies in a part of the tensor, and there is more of it than that part."""

    def holds(a: Tensor, r: Tensor, wrong: Tensor) -> bool:
        inside = part(torch.ones_like(wrong))
        return bool(inside.any() and not inside.all() and not (wrong & ~inside).any())

    return holds


def _square(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], bool]:
    """The same for square matrices, of which the part has to have something that is not zero by rule."""
    only = _only(part)

    def holds(a: Tensor, r: Tensor, wrong: Tensor) -> bool:
        return wrong.dim() == 2 and wrong.shape[0] == wrong.shape[1] > 2 and only(a, r, wrong)

    return holds


def _rows(keep: slice) -> Callable[[Tensor], Tensor]:
    def part(ones: Tensor) -> Tensor:
        inside = torch.zeros_like(ones)
        if ones.dim() and len(ones) > 2:
            inside[keep] = True
        return inside

    return part


def _empty_row(a: Tensor, r: Tensor, wrong: Tensor) -> bool:
    return a.dim() > 1 and bool((~a.flatten(1).any(1) & r.flatten(1).any(1)).any())


def _all_but(row: int) -> Callable[[Tensor, Tensor, Tensor], bool]:
    """Whether one row is right and every other has something wrong."""

    def holds(a: Tensor, r: Tensor, wrong: Tensor) -> bool:
        if wrong.dim() < 1 or len(wrong) < 3:
            return False
        rows = _wrong_rows(wrong)
        return int(rows.sum()) == len(rows) - 1 and not rows[row]

    return holds


def _wrong_rows(wrong: Tensor) -> Tensor:
    return wrong.flatten(1).any(1) if wrong.dim() > 1 else wrong


def _by_parts(cases: list[tuple], arguments: Sequence[str], masks: list[Tensor]) -> str:
    """What a whole number among the inputs, the size of a part, has to do with the rows that are right."""
    if not all(mask.dim() and len(mask) for mask in masks):
        return ""
    rows = [_wrong_rows(mask) for mask in masks]
    for n, name in enumerate(arguments):
        sizes = [inputs[n] for inputs in cases]
        if any(type(size) is not int or size < 1 for size in sizes):
            continue
        for each, first, parts in (
            (f"each stretch of `{name}` rows", f"the first `{name}` rows", sizes),
            (
                f"each of `{name}` equal stretches",
                f"the first of `{name}` equal stretches",
                [len(row) // size for row, size in zip(rows, sizes, strict=True)],
            ),
        ):
            both = [(row, torch.arange(len(row)), part) for row, part in zip(rows, parts, strict=True)]
            if min(parts) < 1 or not any(1 < part < len(row) for row, _, part in both):
                continue
            if all(torch.equal(row, place % part > 0) for row, place, part in both):
                return f"is right in the first row of {each}, and in no other"
            if all(torch.equal(row, place >= part) for row, place, part in both):
                return f"is right in {first}, and in no other"
            if not any(row[:part].any() for row, _, part in both):
                return f"is right in {first}"
    return ""


FACTS: tuple[tuple[str, Callable[[Tensor, Tensor, Tensor], bool]], ...] = (
    ("is zero everywhere", lambda a, r, wrong: not a.any()),
    ("is right but for its diagonal", _square(lambda x: x.diagonal().diag_embed())),
    ("is right but for what is above its diagonal", _square(lambda x: x.triu(1))),
    ("is right on its diagonal and above, and wrong below", _square(lambda x: x.tril(-1))),
    ("is right but for its first row", _only(_rows(slice(0, 1)))),
    ("is right but for its last row", _only(_rows(slice(-1, None)))),
    ("is right in its first row and in no other", _all_but(0)),
    ("is right in its last row and in no other", _all_but(-1)),
    (
        "is zero in places where it should not be, and right elsewhere",
        lambda a, r, wrong: bool((a[wrong] == 0).all() and a.any()),
    ),
    (
        "has other numbers where zeros belong, and is right elsewhere",
        lambda a, r, wrong: bool((r[wrong] == 0).all() and r.any()),
    ),
)


# --- What it lacks ------------------------------------------------------------------------------------------------
def _symmetric(x: Tensor) -> bool:
    return bool((x - x.mT).abs().max() <= SYMMETRY * x.abs().max())


def _orthogonal(x: Tensor) -> bool:
    return bool((x @ x.mT - torch.eye(len(x), dtype=x.dtype)).abs().max() <= SYMMETRY)


def _lower(x: Tensor) -> bool:
    return not x.triu(1).any()


PROPERTIES: tuple[tuple[str, Callable[[Tensor], bool]], ...] = (
    ("is not symmetric, as it should be", _symmetric),
    ("is not orthogonal, as it should be (it changes lengths)", _orthogonal),
    ("has entries above the diagonal, where there should be zeros", _lower),
)


def _lacks(pairs: list[tuple[Tensor, Tensor]], has: Callable[[Tensor], bool]) -> bool:
    """Whether every right answer has a property, and none of those given."""
    if any(r.dim() != 2 or r.shape[0] != r.shape[1] or len(r) < 2 for _, r in pairs):
        return False
    return all(has(r) for _, r in pairs) and not any(has(a) for a, _ in pairs)


# --- Sizes --------------------------------------------------------------------------------------------------------
def _axes(names: Sequence[str], inputs: tuple) -> Iterator[tuple[str, int]]:
    """Sizes that the inputs have, with what to call them."""
    for name, value in zip(names, inputs, strict=True):
        if isinstance(value, Tensor) and value.dim():
            yield f"the length of {name}", value.shape[0]
        if isinstance(value, Tensor) and value.dim() > 1:
            yield f"the width of {name}", value.shape[-1]
    for name, value in zip(names, inputs, strict=True):
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def shapes(names: Sequence[str], answers: Sequence[Any], cases: Cases) -> str:
    """Of what sizes the axes of an answer are, and of what sizes they should be, if this is the same in all cases."""
    try:
        given = [flat(answer) for answer in answers]
        wanted = [flat(reference) for _, reference in cases]
        tables = [dict(_axes(names, inputs)) for inputs, _ in cases]
        if len({len(leaf) for leaf in (*given, *wanted)}) != 1:
            return ""
        for n in range(len(wanted[0])):
            pairs = [(a[n].shape, r[n].shape) for a, r in zip(given, wanted, strict=True)]
            if all(a == r for a, r in pairs):
                continue
            sides = [_called([pair[side] for pair in pairs], tables) for side in (0, 1)]
            return f"its axes are {sides[0]}; asked for are {sides[1]}" if all(sides) and sides[0] != sides[1] else ""
    except Exception:  # no tensors
        pass
    return ""


def _called(shapes: list[torch.Size], tables: list[dict[str, int]]) -> str:
    """The axes of all `shapes` by their names in `tables`; "" if one has none, or more than one is possible."""
    if not shapes[0] or len({len(shape) for shape in shapes}) != 1:
        return ""
    words = []
    for axis in range(len(shapes[0])):
        fits = [w for w in tables[0] if all(t.get(w) == s[axis] for t, s in zip(tables, shapes, strict=True))]
        if not fits:
            return ""
        words.append(fits[0])
    return " by ".join(words)


# --- The smallest numbers -----------------------------------------------------------------------------------------
def smallest(fn: Callable[..., Any], reference: Callable[..., Any], inputs: tuple) -> str:
    """The smallest whole numbers for which `fn` is wrong, with both values; "" if inputs are not whole numbers."""
    if not inputs or any(type(x) is not int for x in inputs):
        return ""
    for small in sorted(itertools.product(range(1, SMALL + 1), repeat=len(inputs)), key=lambda x: (sum(x), x)):
        try:
            expected, got = reference(*small), fn(*small)
        except (Exception, SystemExit):  # not every size is allowed
            continue
        if not agrees(got, expected, 0.0):
            on = describe_inputs(fn, small)
            return f"by hand: for {on} it should be {number(expected)}, and you have {number(got)}" if on else ""
    return ""
