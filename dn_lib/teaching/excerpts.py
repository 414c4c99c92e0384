"""What a chapter shows of a kernel: lines of its source, and whether numbers agree."""

from __future__ import annotations

import importlib.util
import inspect
import re
import textwrap
from typing import Any

from torch import Tensor

from dn_lib.teaching.registry import relative_error


def require_triton() -> None:
    """Raise an ImportError of one line, which names the remedy, where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "chapter 5 needs Triton, which is not installed: `pip install triton` on Linux (a container or "
            "Colab will do elsewhere; no GPU is needed). All other chapters run without it."
        )


def agreement(candidates: dict[str, tuple[Tensor, float]], reference: Tensor) -> str:
    """A table of whether each candidate lies within its bound of the reference, in relative norm.

    >>> import torch
    >>> print(agreement({"itself": (torch.ones(3), 1e-9)}, torch.ones(3)))
    itself                           error < 1e-09   ✓
    """
    lines = []
    for name, (value, bound) in candidates.items():
        mark = "✓" if relative_error(value, reference) < bound else "✗"
        lines.append(f"{name:32} error < {bound:.0e}   {mark}")
    return "\n".join(lines)


def excerpt(kernel: Any, first: str, last: str, **constants: bool) -> str:
    """The lines of a kernel's source from the one that holds `first` to the next that holds `last`.

    constants: values of compile-time flags; branches on them (`if FLAG:`, `if not FLAG:`) are resolved as
    the compiler does.  Raises ValueError if there are no such lines.
    """
    lines = inspect.getsource(kernel.fn).splitlines()
    lines = resolve(lines, constants)
    for i, line in enumerate(lines):
        if first in line:
            for j in range(i, len(lines)):
                if last in lines[j]:
                    return textwrap.dedent("\n".join(lines[i : j + 1]))
    raise ValueError(f"{kernel.fn.__name__} has no lines from {first!r} to {last!r}")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def resolve(lines: list[str], constants: dict[str, bool]) -> list[str]:
    """`lines` without the branches that `constants` rule out, those that remain moved to the left.

    >>> resolve(["if FLAG:", "    a", "else:", "    b", "c"], {"FLAG": False})
    ['b', 'c']
    """

    def block(start: int, indent: int) -> int:
        """The index after the lines that are indented further than `indent`."""
        while start < len(lines) and (not lines[start].strip() or _indent(lines[start]) > indent):
            start += 1
        return start

    kept, i = [], 0
    while i < len(lines):
        found = re.fullmatch(r"(\s*)if (not )?(\w+):", lines[i])
        if not found or found[3] not in constants:
            kept.append(lines[i])
            i += 1
            continue
        indent = len(found[1])
        end = block(i + 1, indent)
        taken, rest = lines[i + 1 : end], end
        if end < len(lines) and lines[end].strip() == "else:" and _indent(lines[end]) == indent:
            rest = block(end + 1, indent)
        if constants[found[3]] == bool(found[2]):
            taken = lines[end + 1 : rest]
        shift = _indent(taken[0]) - indent if taken else 0
        kept += resolve([line[shift:] for line in taken], constants)
        i = rest
    return kept
