"""The default corpus: the Python standard library's own source, which every machine with Python has."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
"""Folders left out.  Installed packages are not the standard library; its tests are left out because
several Linux distributions package Python without them, and because they are mostly tables of cases."""


def stdlib_documents(root: str | Path | None = None) -> Iterator[tuple[str, bytes]]:
    """(path relative to the library's root, content) of every `.py` file, in the order of the paths.

    root: another folder to read in the same way; by default `sysconfig.get_path("stdlib")`.
    Generated build settings (`_sysconfigdata...`) are left out: they differ from machine to machine.

    >>> names = [name for name, _ in stdlib_documents()]
    >>> "textwrap.py" in names, any(name.startswith("test/") for name in names)
    (True, False)
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            found.append(relative.as_posix())
    for name in sorted(found):
        yield name, (root / name).read_bytes()
