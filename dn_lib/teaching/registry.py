"""What the book claims, in a form that the test suite can check.

An `Equation` belongs to a labelled equation of a chapter; an `Exercise` to an exercise.  Both carry
*mutants*: the classic wrong versions, each of which has to be told apart from the right one.
Entries live in `equations/chN.py` and `exercises/chN.py`, for a study in `sN.py`, as a list named `ENTRIES`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from numbers import Number
from types import ModuleType
from typing import Any, Literal, cast

import numpy as np
import torch

from dn_lib import testing
from dn_lib.teaching.judge.method import Rule

Kind = Literal["identity", "definition", "bound", "count"]
KINDS = ("identity", "definition", "bound", "count")


@dataclass(frozen=True)
class Equation:
    """A labelled equation and how it is checked.

    label: the MyST label, e.g. `"eq-delta-recurrence"`.
    kind: what the check means.
      - identity: `left` and `right` are computed independently of each other and agree.
      - definition: `left` is the library function, `right` the formula as the chapter prints it.
      - bound: `left <= right` on every input that `sample` finds, adversarial ones included.
      - count: `left` is counted (operations, bytes, steps), `right` is the formula; exact.
    sample: draws one set of inputs from a `torch.Generator`; tensors are float64.
    left, right: called with the sampled inputs.  A tensor, a number, or a tuple of them.
    mutants: description -> a wrong version of `right`.  Each must fail the same check.
    tolerance: largest relative error, in float64, for identities and definitions.
    trials: how many inputs are drawn.
    """

    label: str
    kind: Kind
    sample: Callable[[torch.Generator], tuple]
    left: Callable[..., Any]
    right: Callable[..., Any]
    mutants: dict[str, Callable[..., Any]] = field(default_factory=dict)
    tolerance: float = 1e-10
    trials: int = 10

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r} for {self.label}")


@dataclass(frozen=True)
class Mutant:
    """A wrong answer that learners give, and what to tell them.

    fn: the wrong function.  message: names the misunderstanding.  hint: where to look, not the answer.
    """

    fn: Callable[..., Any]
    message: str
    hint: str


@dataclass(frozen=True)
class Extreme:
    """Inputs at the edge of what an exercise allows, which random ones do not meet.

    name: what is extreme, after "for": "beta = 0".  sample: draws one set of such inputs.  hint: where to look.
    """

    name: str
    sample: Callable[[torch.Generator], tuple]
    hint: str


@dataclass(frozen=True)
class Candidate:
    """An implementation that an exercise of the kind "write a test" puts to the learner's test.

    name: what it is, or the bug that it has.  right: whether a test has to accept it.
    hint: what to look at if a test judges it wrongly.
    """

    fn: Callable[..., Any]
    name: str
    hint: str = ""
    right: bool = False


@dataclass(frozen=True)
class Exercise:
    """An exercise that `check` can judge.

    number: chapter or study, and position: `"2.3"`, `"S1.2"`.  stars: 1 to 3.  minutes: for a reader of the page.
    sample: draws one set of inputs.  reference: the right function.
    tested: what a passing answer was tested on, for the message, e.g. "8 random shapes in float64".
    tolerance: largest relative error against the reference.
    extremes: inputs that are tried after the random ones.
    rules: what the exercise asks of the method; looked at once the numbers are right.
    keeps_inputs: whether the task says that arguments are left as they are.
    outputs: names of the outputs, if there is more than one.
    candidates: if there are any, the answer is a test, and these are put to it in place of inputs; `mutants` are
    then tests that are too weak, each with a line that the verdict has to contain.
    """

    number: str
    title: str
    stars: int
    minutes: int
    sample: Callable[[torch.Generator], tuple]
    reference: Callable[..., Any]
    mutants: tuple[Mutant, ...]
    tested: str
    tolerance: float = 1e-8
    trials: int = 8
    extremes: tuple[Extreme, ...] = ()
    rules: tuple[Rule, ...] = ()
    keeps_inputs: bool = False
    outputs: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors in `value`, as float64 (complex128 where they are complex), on the CPU and without a graph.

    `value` is a tensor, a NumPy array, a number, a bool, or a nest of tuples and lists of them.  Raises TypeError for
    anything else: what only behaves like a number, or like a tensor, need not be the numbers that it shows.
    """
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, torch.Tensor):
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_nested
    else:
        plain = type(value) is np.ndarray or isinstance(value, (Number, np.generic))
    if not plain:
        raise TypeError(f"value must hold tensors, arrays and numbers, got {type(value).__name__}")
    is_complex = value.is_complex() if isinstance(value, torch.Tensor) else np.iscomplexobj(cast(Any, value))
    tensor = torch.as_tensor(value, dtype=torch.complex128 if is_complex else torch.float64).detach().cpu()
    return [tensor if tensor.layout is torch.strided else tensor.to_dense()]


def relative_error(value: Any, reference: Any) -> float:
    """Largest |value - ref| / |ref| over the leaves, absolute for a reference of zero; infinite if shapes differ.

    It is that of `dn_lib.testing` for nests of tensors, arrays and numbers: infinite, too, if NaN or infinity appears.
    Raises TypeError for what holds no numbers (see `leaves`).
    """
    a, b = leaves(value), leaves(reference)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return math.inf
    errors = (testing.relative_error(x, y, size=0.0 if y.any() else 1.0) for x, y in zip(a, b, strict=True))
    return max(errors, default=0.0)


def holds(equation: Equation, right: Callable[..., Any] | None = None, seed: int = 0) -> bool:
    """Whether `equation` (or, given `right`, its mutant) passes on `equation.trials` random inputs."""
    right = right or equation.right
    generator = torch.Generator().manual_seed(seed)
    for _ in range(equation.trials):
        inputs = equation.sample(generator)
        a, b = equation.left(*inputs), right(*inputs)
        if equation.kind == "bound":
            ok = all(bool((x - y <= 1e-12 * y.abs()).all()) for x, y in zip(leaves(a), leaves(b), strict=True))
        elif equation.kind == "count":
            ok = relative_error(a, b) == 0.0
        else:
            ok = relative_error(a, b) <= equation.tolerance
        if not ok:
            return False
    return True


def _modules(package: str) -> list[ModuleType]:
    path = importlib.import_module(package).__path__
    return [importlib.import_module(f"{package}.{name}") for name in sorted(i.name for i in pkgutil.iter_modules(path))]


def collect(modules: Iterable[Any], key: str) -> dict[str, Any]:
    """The ENTRIES of `modules` by their field `key`.  Raises ValueError for one that is there twice."""
    found: dict[str, Any] = {}
    for module in modules:
        for entry in module.ENTRIES:
            name = getattr(entry, key)
            if name in found:
                raise ValueError(f"{key} {name!r} is registered twice, the second time in {module.__name__}")
            found[name] = entry
    return found


@cache
def all_equations() -> dict[str, Equation]:
    """All equations of the book, by label."""
    return collect(_modules("dn_lib.teaching.equations"), "label")


@cache
def all_exercises() -> dict[str, Exercise]:
    """All exercises of the book, by number."""
    return collect(_modules("dn_lib.teaching.exercises"), "number")
