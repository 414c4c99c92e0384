"""The reference with one slip in it: a turned sign, a lost factor, steps in another order, an index that is off by one.

A learner's answer that is equal to such a variant on every input has this slip, or one that amounts to it.  Variants
are made from the text of the reference, so that each exercise has its own without a list; they say of which kind the
slip is and which arguments it concerns, and never how the reference is written.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from dn_lib.teaching.judge.compare import same

BOUNDS = {"range", "tril", "triu"}
TRANSPOSES = {"T", "mT"}


class Slip(NamedTuple):
    """What stands in the place of a node, what to say of it, with {} for the arguments in `where`."""

    node: ast.AST
    words: str
    where: ast.expr | None = None


def as_variant(
    reference: Callable[..., Any], names: Sequence[str], cases: list[tuple[tuple, Any]], tolerance: float
) -> str:
    """With which slip in `reference` the answers of `cases` come out, in a sentence; "" if with none that is tried.

    names: what the learner calls the arguments.  cases: inputs and the answers to them; it has to hold for all.
    """

    def holds(variant: Callable[..., Any]) -> bool:
        try:
            return all(
                same(answer, variant(*copy.deepcopy(inputs)), 0.0 if isinstance(answer, int) else tolerance)
                for inputs, answer in cases
            )
        except Exception:  # sizes that do not fit, or an answer that holds no numbers
            return False

    found = next((words for words, variant in variants(reference, names) if holds(variant)), "")
    return f"your answer is what comes out if {found}." if found else ""


def variants(reference: Callable[..., Any], names: Sequence[str] = ()) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Versions of `reference` with one slip each, and what the slip is; none if its text cannot be had."""
    if not isinstance(reference, FunctionType):
        return
    try:
        trees = [ast.parse(textwrap.dedent(inspect.getsource(fn))) for fn in _with_helpers(reference)]
    except (OSError, SyntaxError, ValueError):
        return
    if not all(isinstance(tree.body[0], ast.FunctionDef) for tree in trees):
        return  # a lambda in the middle of something else
    space = {**reference.__globals__, **inspect.getclosurevars(reference).nonlocals}
    parameters = list(inspect.signature(reference).parameters)
    called = dict(zip(parameters, names or parameters, strict=False))
    codes = [_code(tree) for tree in trees]
    for n, tree in enumerate(trees):
        for slip, changed in _with_slips(tree):
            variant = _made([*codes[:n], changed, *codes[n + 1 :]], dict(space), reference.__name__)
            if variant is not None:
                yield _words(slip, called), variant


def _with_helpers(reference: FunctionType) -> list[FunctionType]:
    """The functions of its module that `reference` names, and itself, last."""
    defaults = [*(reference.__defaults__ or ()), *(reference.__kwdefaults__ or {}).values()]
    named = [reference.__globals__.get(name) for name in reference.__code__.co_names] + defaults
    functions = [fn for fn in named if isinstance(fn, FunctionType) and fn.__module__ == reference.__module__]
    helpers = [fn for fn in dict.fromkeys(functions) if fn.__name__ != "<lambda>" and fn is not reference]
    return [*helpers, reference]


def _with_slips(tree: ast.Module) -> Iterator[tuple[Slip, CodeType]]:
    """Each slip that is possible in `tree`, with the code that comes of it; `tree` is afterwards as it was."""
    for parent in list(ast.walk(tree)):
        for name, value in list(ast.iter_fields(parent)):
            nodes = value if isinstance(value, list) else [value]
            for n, node in enumerate(nodes):
                for slip in (slip for kind in SLIPS if (slip := kind(node))):
                    setattr(parent, name, [*nodes[:n], slip.node, *nodes[n + 1 :]] if nodes is value else slip.node)
                    code = _code(tree)
                    setattr(parent, name, value)
                    if code:
                        yield slip, code


def _code(tree: ast.Module) -> CodeType | None:
    try:
        return compile(ast.fix_missing_locations(tree), "<variant>", "exec")
    except (SyntaxError, ValueError, TypeError):
        return None


def _made(codes: list[CodeType | None], space: dict[str, Any], name: str) -> Callable[..., Any] | None:
    try:
        for code in codes:
            exec(code or "", space)
    except Exception:  # a default that cannot be computed any more
        return None
    return space.get(name)


def _words(slip: Slip, called: dict[str, str]) -> str:
    used = [node.id for node in ast.walk(slip.where) if isinstance(node, ast.Name)] if slip.where else []
    names = [f"`{called[name]}`" for name in dict.fromkeys(used) if name in called]
    return slip.words.format(" with " + " and ".join(names) if names else "")


# --- Slips: what may stand in the place of a node ---------------------------------------------------------------------
def _sign(node: ast.AST) -> Slip | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)) and not _counts(node):
        other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        return Slip(ast.BinOp(node.left, other, node.right), "the sign of a term{} is turned", node.right)
    return None


def _lost_right(node: ast.AST) -> Slip | None:
    if not isinstance(node, ast.BinOp) or _counts(node):
        return None
    if isinstance(node.op, (ast.Add, ast.Sub)):
        return Slip(node.left, "a term{} is missing in a sum", node.right)
    if isinstance(node.op, (ast.Mult, ast.MatMult)):
        return Slip(node.left, "a factor{} is missing", node.right)
    return Slip(node.left, "a division{} is missing", node.right) if isinstance(node.op, ast.Div) else None


def _lost_left(node: ast.AST) -> Slip | None:
    if not isinstance(node, ast.BinOp) or _counts(node):
        return None
    if isinstance(node.op, ast.Add):
        return Slip(node.right, "a term{} is missing in a sum", node.left)
    if isinstance(node.op, (ast.Mult, ast.MatMult)):
        return Slip(node.right, "a factor{} is missing", node.left)
    return None


def _twice_left(node: ast.AST) -> Slip | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return Slip(ast.BinOp(node.left, ast.Mult(), node), "a factor{} comes in twice", node.left)
    return None


def _twice_right(node: ast.AST) -> Slip | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return Slip(ast.BinOp(node, ast.Mult(), node.right), "a factor{} comes in twice", node.right)
    return None


def _other_order(node: ast.AST) -> Slip | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        swapped = ast.BinOp(node.right, node.op, node.left)
        return Slip(swapped, "the two factors of a product{} are in the other order", node)
    return None


def _not_transposed(node: ast.AST) -> Slip | None:
    if isinstance(node, ast.Attribute) and node.attr in TRANSPOSES:
        return Slip(node.value, "a matrix{} is not transposed that should be", node.value)
    return None


def _transposed_left(node: ast.AST) -> Slip | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        turned = ast.BinOp(ast.Attribute(node.left, "mT", ast.Load()), node.op, node.right)
        return Slip(turned, "a matrix{} is transposed that should not be", node.left)
    return None


def _transposed_right(node: ast.AST) -> Slip | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        turned = ast.BinOp(node.left, node.op, ast.Attribute(node.right, "mT", ast.Load()))
        return Slip(turned, "a matrix{} is transposed that should not be", node.right)
    return None


def _steps(first: int) -> Callable[[ast.AST], Slip | None]:
    def slip(node: ast.AST) -> Slip | None:
        if not isinstance(node, ast.For) or len(node.body) < first + 2:
            return None
        body = [*node.body[:first], node.body[first + 1], node.body[first], *node.body[first + 2 :]]
        return Slip(
            ast.For(node.target, node.iter, body, node.orelse),
            "two steps of the loop are taken in the other order",
        )

    return slip


def _index(build: Callable[[ast.expr], ast.expr], words: str) -> Callable[[ast.AST], Slip | None]:
    def slip(node: ast.AST) -> Slip | None:
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name) and isinstance(node.ctx, ast.Load):
            return Slip(ast.Subscript(node.value, build(node.slice), node.ctx), words, node.value)
        return None

    return slip


def _bound(step: int, which: int) -> Callable[[ast.AST], Slip | None]:
    """A bound of a range, or the diagonal of a triangle, off by one."""

    def slip(node: ast.AST) -> Slip | None:
        if not isinstance(node, ast.Call):
            return None
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name not in BOUNDS or which >= max(1, len(node.args)):
            return None
        given = list(node.args) or [ast.Constant(0)]
        given[which] = ast.BinOp(given[which], ast.Add(), ast.Constant(step))
        what = "a loop begins or ends one step" if name == "range" else "a triangle is cut one diagonal"
        where = ("late" if step > 0 else "early") if name == "range" else ("high" if step > 0 else "low")
        return Slip(ast.Call(node.func, given, node.keywords), f"{what} too {where}")

    return slip


def _counts(node: ast.BinOp) -> bool:
    """Whether it is a sum or product with a whole number that is written out, as an index is."""
    sides = (node.left, node.right)
    whole = any(isinstance(side, ast.Constant) and type(side.value) is int for side in sides)
    return whole and not any(isinstance(part, ast.MatMult) for part in ast.walk(node))


SLIPS: tuple[Callable[[ast.AST], Slip | None], ...] = (
    _sign,
    _lost_right,
    _lost_left,
    _twice_left,
    _twice_right,
    _not_transposed,
    _transposed_left,
    _transposed_right,
    _other_order,
    *(_steps(first) for first in range(4)),
    _index(lambda t: ast.BinOp(t, ast.Sub(), ast.Constant(1)), "something{} is taken from the token before"),
    _index(lambda t: ast.Constant(0), "something{} is that of the first token for all"),
    _index(lambda t: ast.Constant(-1), "something{} is that of the last token for all"),
    *(_bound(step, which) for which in (0, 1) for step in (1, -1)),
)
