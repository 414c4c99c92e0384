"""A learner's kernel as text: what it needs to be compiled elsewhere."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """How an exercise launches the learner's kernel.

    arguments: tensors and numbers, passed by position; constants: `tl.constexpr` parameters, by name.
    outputs: positions in `arguments` of what the kernel writes; they are handed over full of NaN.
    dots: whether the exercise asks for `tl.dot`.
    """

    arguments: tuple[Tensor | int | float, ...]
    outputs: tuple[int, ...]
    grid: tuple[int, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    dots: bool = False


PLANS: dict[str, Callable[..., Plan]] = {}
"""How to launch the kernel of each exercise, by its number: filled by the chapter's exercises."""


# --- A kernel as text -----------------------------------------------------------------------------------
HEADER = "import triton\nimport triton.language as tl\n\n"


def kernel_source(kernel: Any) -> str:
    """The source of `kernel` and of the kernels and numbers of the notebook that it uses.

    What it takes from an importable module is imported, not copied.
    """
    if isinstance(kernel, str):
        return HEADER + textwrap.dedent(kernel)
    parts: dict[str, str] = {}

    def visit(fn: Any) -> None:
        if fn.__name__ in parts:
            return
        parts[fn.__name__] = ""  # marks it as visited, should it call itself
        for name in fn.__code__.co_names:
            value = fn.__globals__.get(name)
            inner = getattr(value, "fn", None)
            if inspect.isfunction(inner):
                visit(inner)
            elif type(value).__name__ == "constexpr":
                parts[name] = f"{name} = tl.constexpr({value.value!r})\n"
        parts.pop(fn.__name__)  # definitions come after what they use
        module = sys.modules.get(fn.__module__)
        if fn.__module__ != "__main__" and getattr(module, "__file__", None):
            parts[fn.__name__] = f"from {fn.__module__} import {fn.__name__}\n"
        else:
            text = textwrap.dedent(inspect.getsource(fn))
            parts[fn.__name__] = "@triton.jit\n" + text[text.index("def ") :] + "\n"

    visit(kernel.fn)
    return HEADER + "\n".join(parts.values())


def kernel_name(kernel: Any) -> str:
    if isinstance(kernel, str):
        return re.findall(r"^\s*def (\w+)", kernel, flags=re.MULTILINE)[-1]
    return kernel.fn.__name__


def _definition(kernel: Any) -> ast.FunctionDef:
    source = textwrap.dedent(kernel if isinstance(kernel, str) else inspect.getsource(kernel.fn))
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)][-1]


def kernel_parameters(kernel: Any) -> list[str]:
    return [argument.arg for argument in _definition(kernel).args.args]


def is_blank(kernel: Any) -> bool:
    """Whether the kernel's body is still `...`."""
    body = _definition(kernel).body
    return all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body)
