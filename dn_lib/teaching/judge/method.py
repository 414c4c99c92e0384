"""How an answer was computed: the operations that PyTorch ran, their sizes, and whose functions were called.

A rule of an exercise is a `Rule`: a function that runs an answer on inputs of its own and says how the answer breaks
the rule, and a hint.  Sizes in these inputs are unlike each other, so that a size tells what an axis stands for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import dn_lib

LIBRARY = str(Path(dn_lib.__file__).parent)
TEACHING = str(Path(dn_lib.__file__).parent / "teaching")
GRADIENTS = {"grad", "backward", "vjp", "jacrev", "vjp_fn", "jacobian"}
GROWTH = 1.5  # times as many operations: less are the few that depend on a size by chance, twice as many are a loop


GIVEN = -1  # among what an operation reads: a result of the implementation that a test was handed


def handed_over(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as a test gets it: without its name, and what it calls is no call of the test's own."""

    def implementation(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return implementation


HANDED_OVER = handed_over(print).__code__


@dataclass(frozen=True)
class Operation:
    """One operation of PyTorch.

    name: as ATen has it, such as "mm".  inputs: its tensors.  outputs: its results.  library: whether a function of
    the library ran it.  reads: the arguments of the answer, by position, that its result depends on, and `GIVEN`.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    library: bool
    reads: frozenset[int]


@dataclass
class Record:
    """What was seen of one call: `operations` in their order, and the functions of others that it called itself.

    calls: names of functions of the library.  left: what took tensors out of PyTorch, or a gradient, by name.
    """

    operations: list[Operation] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    result: Any = None

    @property
    def own(self) -> list[Operation]:
        """The operations that the answer ran itself, and not through the library."""
        return [operation for operation in self.operations if not operation.library]


class _Watch(TorchDispatchMode):
    """Notes every operation.  A tensor depends on what its memory was computed from; views share their memory."""

    def __init__(self, record: Record, inputs: tuple):
        super().__init__()
        self.record, self.depth, self.given = record, 0, 0
        self.reads: dict[int, frozenset[int]] = {}
        for position, value in enumerate(inputs):
            for tensor in _tensors(value):
                self.reads[_memory(tensor)] = frozenset([position])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        reads = frozenset[int]().union(*(self.reads.get(_memory(x), frozenset()) for x in inputs))
        old = {_memory(x) for x in inputs}
        for output in outputs:
            # What the implementation makes is its own; a view of what it was handed is not.
            fresh = {GIVEN} if self.given and _memory(output) not in old else frozenset[int]()
            self.reads[_memory(output)] = self.reads.get(_memory(output), frozenset()) | reads | fresh
        if self.given:
            reads |= {GIVEN}
        # Detached copies of the handles keep the memory, so that no address is used twice.
        given, made = (tuple(x.detach() for x in group) for group in (inputs, outputs))
        self.record.operations.append(Operation(func._opname, given, made, self.depth > 0, reads))
        return result

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """Called by Python at every call and return."""
        if event == "c_call":
            owner = getattr(argument, "__self__", None)
            if isinstance(owner, Tensor) and argument.__name__ in {"numpy", "tolist"} and not self.depth:
                self.record.outside.append(argument.__name__)
            return
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code is HANDED_OVER:
            self.given += 1 if event == "call" else -1
            self.depth += 1 if event == "call" else -1
        elif code.co_filename.startswith(LIBRARY) and not code.co_filename.startswith(TEACHING):
            if event == "call":
                if not self.depth and not code.co_name.startswith("<"):
                    # A decorated function's own name; its frame has that of the decorator's.
                    inner = frame.f_locals.get("function") if code.co_name == "wrapped" else None
                    self.record.calls.append(getattr(inner, "__name__", code.co_name))
                self.depth += 1
            else:
                self.depth -= 1
        elif event == "call" and not self.depth and "torch" in code.co_filename:
            if code.co_name == "__array__":
                self.record.outside.append("numpy")
            elif code.co_name in GRADIENTS:
                self.record.gradients.append(code.co_name)


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in tree_flatten(value)[0] if isinstance(x, Tensor))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _profiled(profile: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def watch(answer: Callable[..., Any], *inputs: Any) -> Record:
    """Call `answer(*inputs)` and note how it computes."""
    record = Record()
    with _Watch(record, inputs) as mode, _profiled(mode.profile):
        record.result = answer(*inputs)
    return record


@cache
def prepare() -> None:
    """Let PyTorch import what it needs to watch operations: seconds, which are no part of an answer's time."""
    record = Record()
    with _Watch(record, ()):
        torch.zeros(1)


# --- Rules ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rule:
    """What an exercise asks of the method.

    inputs: makes the inputs to watch an answer on, one tuple or two.  broken: how the records of the runs break the
    rule, in a sentence without its subject ("forms a matrix of ..."), "" if they keep it.  hint: where to look.
    """

    inputs: Callable[[], tuple[tuple, ...]]
    broken: Callable[..., str]
    hint: str

    def complaint(self, answer: Callable[..., Any]) -> str:
        """How `answer` breaks the rule, "" if it does not."""
        records = [watch(answer, *inputs) for inputs in self.inputs()]
        left = next((name for record in records for name in record.outside), "")
        if left:
            return f"leaves PyTorch (`{left}`), where `check` cannot see how it computes"
        return self.broken(*records)


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def no_square(inputs: Callable[[], tuple], size: int, name: str, hint: str) -> Rule:
    """No tensor that the answer makes has two axes of `size`, or as many numbers; `name` is "L x L", say."""

    def broken(record: Record) -> str:
        for operation in record.own:
            for x in operation.outputs:
                if x.shape.count(size) >= 2 or x.numel() >= size * size:
                    return f"forms a matrix of {name}: {_size(x)} on the inputs tried"
        return ""

    return Rule(lambda: (inputs(),), broken, hint)


def at_most(inputs: Callable[[], tuple], numbers: int, name: str, hint: str) -> Rule:
    """No tensor that the answer makes holds `numbers` numbers, which would be `name`: "a state for each token"."""

    def broken(record: Record) -> str:
        for operation in record.own:
            for x in operation.outputs:
                if x.numel() >= numbers:
                    return f"holds {name}: a tensor of {_size(x)} on the inputs tried"
        return ""

    return Rule(lambda: (inputs(),), broken, hint)


def few_steps(short: Callable[[], tuple], long: Callable[[], tuple], what: str, hint: str) -> Rule:
    """The number of operations is the same for `short` and for `long` inputs, in which each `what` is longer."""

    def broken(one: Record, two: Record) -> str:
        a, b = len(one.own), len(two.own)
        if b > GROWTH * a:
            return f"works token by token: {a} operations become {b} when {what} is twice as long"
        return ""

    return Rule(lambda: (short(), long()), broken, hint)


def no_library(inputs: Callable[[], tuple], *allowed: str, hint: str = "The exercise is to write it.") -> Rule:
    """No function of the library is called but those `allowed`."""

    def broken(record: Record) -> str:
        called = next((name for name in record.calls if name not in allowed), "")
        return f"calls the library's `{called}`" if called else ""

    return Rule(lambda: (inputs(),), broken, hint)


def no_second_implementation(right: Callable[..., Any], what: str, hint: str) -> Rule:
    """A test does not compute what it is to test: no operation outside the implementation ends in a result of it.

    right: an implementation that is right.  what: its result, as in "the new state".  Results that are among the
    arguments, that begin from zeros, are diagonal or have fewer than three rows count for nothing, since properties
    speak of these too.
    """
    results: list[Tensor] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        given = _tensors((args, kwargs))
        special = any(_alike(result, x) or (x.dim() > 1 and not x.any()) for x in given)
        if result.dim() == 2 and len(result) > 2 and not _is_diagonal(result) and not special:
            results.append(result.detach().clone())
        return result

    def broken(record: Record) -> str:
        for operation in record.operations:  # the library's too
            if GIVEN in operation.reads:
                continue
            if any(_alike(x, result) for x in operation.outputs for result in results):
                return f"computes {what} itself, to compare with; asked for are properties"
        return ""

    def inputs() -> tuple[tuple, ...]:
        results.clear()
        return ((handed_over(noted),),)

    return Rule(inputs, broken, hint)


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, rtol=1e-9, atol=1e-12)


def _is_diagonal(x: Tensor) -> bool:
    return x.shape[0] == x.shape[1] and not (x - x.diagonal().diag_embed()).any()


def through(inputs: Callable[[], tuple], name: str, hint: str) -> Rule:
    """The library's function `name` is called, once, and no other; what comes from elsewhere was not asked for."""

    def broken(record: Record) -> str:
        calls = [call for call in record.calls if call != "check_tensors"]
        if calls.count(name) > 1:
            return f"calls `{name}` {calls.count(name)} times; asked for is one call"
        if other := next((call for call in calls if call != name), ""):
            return f"calls the library's `{other}`, not `{name}`"
        if name not in calls:
            return f"never calls `{name}`"
        return ""

    return Rule(lambda: (inputs(),), broken, hint)


SOLVERS = {
    "linalg_inv_ex": "an inverse (`torch.linalg.inv`)",
    "linalg_pinv": "an inverse (`torch.linalg.pinv`)",
    "linalg_solve_triangular": "a solver (`torch.linalg.solve_triangular`)",
    "triangular_solve": "a solver (`torch.triangular_solve`)",
    "_linalg_solve_ex": "a solver (`torch.linalg.solve`)",
    "linalg_lu_factor_ex": "a factorisation (`torch.linalg.lu_factor`)",
    "linalg_lu": "a factorisation (`torch.linalg.lu`)",
    "linalg_qr": "a factorisation (`torch.linalg.qr`)",
    "_linalg_svd": "a factorisation (`torch.linalg.svd`)",
    "linalg_lstsq": "a solver (`torch.linalg.lstsq`)",
    "linalg_matrix_exp": "`torch.linalg.matrix_exp`",
}


def no_operations(inputs: Callable[[], tuple], names: dict[str, str], hint: str) -> Rule:
    """None of the operations `names` (as ATen has them, with what to call them) is run by the answer itself."""

    def broken(record: Record) -> str:
        found = next((names[operation.name] for operation in record.own if operation.name in names), "")
        return f"uses {found}" if found else ""

    return Rule(lambda: (inputs(),), broken, hint)


DIVISIONS = ("div", "reciprocal", "pow")


def no_division(inputs: Callable[[], tuple], what: str, hint: str) -> Rule:
    """The answer does not divide by `what`, which is 0 in these inputs: its own quotients are all finite."""

    def broken(record: Record) -> str:
        for operation in record.own:
            quotients = operation.outputs if operation.name.rstrip("_") in DIVISIONS else ()
            if any(x.is_floating_point() and not x.isfinite().all() for x in quotients):
                return f"divides by {what}, where it is 0"
        return ""

    return Rule(lambda: (inputs(),), broken, hint)


def no_gradients(inputs: Callable[[], tuple], hint: str) -> Rule:
    """The answer does not let PyTorch differentiate."""

    def broken(record: Record) -> str:
        return "lets autograd differentiate" if record.gradients else ""

    return Rule(lambda: (inputs(),), broken, hint)


PRODUCTS = ("mm", "bmm", "baddbmm", "addmm")


def products(record: Record) -> Iterator[tuple[Operation, tuple[int, ...], tuple[int, ...]]]:
    """The products of matrices that the answer computed, with the shapes of their two factors."""
    for operation in record.own:
        if operation.name in PRODUCTS:
            left, right = operation.inputs[-2:]
            yield operation, tuple(left.shape[-2:]), tuple(right.shape[-2:])
