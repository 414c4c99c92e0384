"""The page of results: what was measured, when, on what, by which command; `{{ results }}` in a page stands for it."""

from __future__ import annotations

import calendar
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx


def runs(value: Any) -> Iterator[dict[str, Any]]:
    """Every provenance in a result file, and those of the runs that were added to it.

    >>> [run["command"] for run in runs({"provenance": {"command": "a", "also": [{"command": "b"}]}})]
    ['a', 'b']
    """
    if isinstance(value, dict):
        own = value.get("provenance")
        if isinstance(own, dict):
            yield own
            yield from own.get("also", [])
        else:
            for part in value.values():
                yield from runs(part)


def summary(run: dict[str, Any]) -> str:
    """One run in a line.

    >>> summary({"device": "NVIDIA H200", "date": "2026-01-02T03:04:05+00:00", "torch": "2.11.0+cu130", "seed": 0})
    'NVIDIA H200, 2 January 2026, torch 2.11.0+cu130, seed 0'
    """
    parts = []
    if device := run.get("device"):
        count = run.get("device_count") or 1
        parts.append(f"{count} × {device}" if count > 1 else str(device))
    if match := re.match(r"(\d{4})-(\d\d)-(\d\d)", str(run.get("date", ""))):
        parts.append(f"{int(match[3])} {calendar.month_name[int(match[2])]} {match[1]}")
    parts += [
        f"{name} {run[name]}"
        for name in ("torch", "triton", "fla", "cuda", "python", "seed")
        if run.get(name) is not None
    ]
    return ", ".join(parts)


def table(folder: Path) -> str:
    """Markdown: for each result file of `folder` its runs, with command and commit, and the file to download."""
    out = []
    for path in sorted(folder.glob("*.json")):
        out += [f"## {path.stem}", ""]
        found = list(runs(json.loads(path.read_text(encoding="utf-8"))))
        for run in found:
            said = [summary(run)]
            said += [f"commit `{str(run['git_commit'])[:10]}`"] if run.get("git_commit") else []
            said += [str(run["remark"])] if run.get("remark") else []
            out += [f"- {'; '.join(said)}"]
            if run.get("command"):
                out += ["", "  ```{code-block} sh", "  :class: dn-command", f"  {run['command']}", "  ```", ""]
        out += [f"{{download}}`{path.name} <{folder.name}/{path.name}>`, {max(1, path.stat().st_size // 1000)} kB", ""]
    return "\n".join(out)


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    if "{{ results }}" in source[0]:
        source[0] = source[0].replace("{{ results }}", table(Path(app.srcdir) / "results"))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
