"""Where the project lies, here and elsewhere."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def address(root: Path = ROOT) -> str:
    """The project's address without a slash at the end, "" while it has none: `repository` in pyproject.toml.

    >>> address().endswith("/")
    False
    """
    own = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dn-lib"]
    return own["repository"].rstrip("/")
