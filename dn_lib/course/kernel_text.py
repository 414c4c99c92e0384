"""Kernels as text: the judge runs a kernel in a process that it trusts, so it looks first whether it is one.

A kernel is written in Triton's language, which needs no import, no attribute with an underscore and few names of
Python's.  What passes can compute and store, and nothing else, so that its process stays the judge's own.
"""

from __future__ import annotations

import ast
import builtins
import types

BUILTINS = {"range", "min", "max", "abs", "int", "float", "bool", "len", "tuple", "float16", "print", "sum"}
BUILTINS &= set(dir(builtins))
# Of a tensor, a type or a shape.
ATTRIBUTES = {
    *("to", "T", "shape", "dtype", "element_ty", "trans", "permute", "reshape", "view", "cast", "split", "value"),
    *("broadcast_to", "expand_dims", "ravel", "flip", "sum", "max", "min", "argmax", "argmin", "xor_sum", "reduce"),
    *("cumsum", "cumprod", "associative_scan", "sort", "abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sqrt_rn"),
    *("sin", "cos", "sigmoid", "softmax", "erf", "floor", "ceil", "advance", "load", "store", "numel"),
}
STATEMENTS = (
    *(ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.For, ast.While, ast.If, ast.Return, ast.Pass, ast.Assert),
    *(ast.Break, ast.Continue),
)
EXPRESSIONS = (
    *(ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.IfExp, ast.Compare, ast.Call, ast.Constant, ast.Attribute, ast.Subscript),
    *(ast.Name, ast.List, ast.Tuple, ast.Slice, ast.Starred, ast.JoinedStr, ast.FormattedValue),
)
REST = (ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.keyword, ast.arguments, ast.arg)


class KernelRefused(ValueError):
    """Text that is no kernel; the message has no subject: "may not use `open`"."""


def _of_triton(node: ast.Attribute) -> bool:
    """Whether `tl.NAME` or `tl.math.NAME` is a function, a type or a constant, and no module that leads elsewhere."""
    import triton
    import triton.language as tl

    parts = ast.unparse(node).split(".")
    if parts[0] == "triton":
        return parts[1:] in (["cdiv"], ["next_power_of_2"], ["jit"], ["language"])
    if not all(parts) or any(part.startswith("_") for part in parts) or len(parts) > 3:
        return False
    if len(parts) == 3 and parts[1] not in ("math", "dtype"):
        return parts[2] in ATTRIBUTES
    value: object = tl
    for part in parts[1:]:
        value = getattr(value, part, triton)
    return parts[1] != "core" and (not isinstance(value, types.ModuleType) or parts == ["tl", "math"])


def is_kernel(node: ast.stmt) -> bool:
    """Whether `node` is a function under `@triton.jit`."""
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(decorator) in ("triton.jit", "jit") for decorator in node.decorator_list
    )


def _check(kernel: ast.FunctionDef, names: set[str]) -> None:
    arguments = kernel.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    if arguments.vararg or arguments.kwarg:
        raise KernelRefused("may not take a variable number of arguments")
    if any(not isinstance(d, (ast.Constant, type(None))) for d in (*arguments.defaults, *arguments.kw_defaults)):
        raise KernelRefused("may have plain numbers alone as defaults")
    for annotation in (a.annotation for a in given if a.annotation):
        if ast.unparse(annotation) not in ("tl.constexpr", "constexpr"):
            raise KernelRefused(f"may not be annotated with `{ast.unparse(annotation)}`")
    local = {argument.arg for argument in given}
    inner = [node for statement in kernel.body for node in ast.walk(statement)]
    local |= {node.id for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for name in sorted(local):
        if name.startswith("__") or name in ("tl", "triton"):
            raise KernelRefused(f"may not call a variable `{name}`")
    for node in inner:
        if not isinstance(node, (*STATEMENTS, *EXPRESSIONS, *REST)):
            raise KernelRefused(f"may not use `{ast.unparse(node).splitlines()[0][:60]}`")
        if isinstance(node, ast.Name) and node.id not in {*local, *names, *BUILTINS, "tl", "triton"}:
            raise KernelRefused(f"may not use `{node.id}`")
        if isinstance(node, ast.Attribute):
            root = ast.unparse(node).split(".")[0]
            if not (_of_triton(node) if root in ("tl", "triton") else node.attr in ATTRIBUTES):
                raise KernelRefused(f"may not use `{ast.unparse(node)[:60]}`")


def kernel_text(sources: list[str], name: str) -> str:
    """The kernel `name` of the last of `sources`, after the kernels and constants that come before it in all of them.

    Raises KernelRefused if it is not there, is no kernel, or does what no kernel does.
    """
    parts: dict[str, tuple[ast.stmt, str]] = {}
    wanted: ast.FunctionDef | None = None
    for source in sources:
        try:
            statements = ast.parse(source).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in statements:
            if isinstance(node, ast.FunctionDef):
                parts.pop(node.name, None)
                if is_kernel(node):
                    parts[node.name] = node, ast.unparse(node)
                wanted = node if node.name == name else wanted
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                value = node.value
                if isinstance(value, ast.Call) and ast.unparse(value.func) == "tl.constexpr" and len(value.args) == 1:
                    value = value.args[0]
                if isinstance(value, ast.Constant) and isinstance(value.value, (int, float, bool)):
                    parts[node.targets[0].id] = node, ast.unparse(node)
    if wanted is None:
        raise KernelRefused(f"is not there: no cell defines {name}")
    if not is_kernel(wanted):
        raise KernelRefused("is a plain function: is `@triton.jit` missing above it?")
    # Only what it uses, so that another exercise's kernel does it no harm.
    used, open_ = {name}, [name]
    while open_:
        for node in ast.walk(parts[open_.pop()][0]):
            if isinstance(node, ast.Name) and node.id in parts and node.id not in used:
                used.add(node.id)
                open_.append(node.id)
    for node, _ in (parts[n] for n in used):
        if isinstance(node, ast.FunctionDef):
            if len(node.decorator_list) != 1:
                raise KernelRefused("may have `@triton.jit` above it and nothing else")
            _check(node, used)
    order = [n for n in parts if n in used and n != name]
    return "\n\n".join([*(_plain(*parts[n]) for n in order), _plain(*parts[name])]) + "\n"


def _plain(node: ast.stmt, text: str) -> str:
    return text.replace("@jit\n", "@triton.jit\n", 1) if isinstance(node, ast.FunctionDef) else text
