"""ARCHITECTURE.md and CONTRIBUTING.md name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md")
FILE = r"[\w./-]+\.(?:py|md|toml|json|txt|yaml)"


def names(page: str) -> list[str]:
    """Everything in backticks that looks like a folder or a file."""
    quoted = re.findall(r"`([^`\n]+)`", (ROOT / page).read_text("utf-8"))
    found = [name for name in quoted if re.fullmatch(rf"{FILE}|[\w./-]+/[\w.-]*", name)]
    return [name for name in found if not re.search(r"\bchN\b|sN\b|\b[NS]N_|\bNAME\b", name)]  # stand for any


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page):
    assert len(names(page)) > 10
    modules = {path.name for path in (ROOT / "dn_lib").rglob("*.py")}
    missing = [name for name in names(page) if not (ROOT / name).exists() and name not in modules]
    assert not missing


def test_every_module_of_the_path_defines_what_is_named_beside_it():
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    pairs = re.findall(r"`(dn_lib/[\w/]+\.py)`[,.] `(\w+)`", text)
    assert len(pairs) >= 4
    for module, name in pairs:
        assert re.search(rf"^def {name}\(", (ROOT / module).read_text("utf-8"), re.M), (module, name)


def test_the_picture_shows_every_part_of_the_package():
    picture = (ROOT / "ARCHITECTURE.md").read_text("utf-8").split("```")[1]
    own = [p for p in (ROOT / "dn_lib").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    parts = {f"{p.name}/" if p.is_dir() else p.name for p in own} - {"__init__.py"}
    assert sorted(part for part in parts if part not in picture) == []
