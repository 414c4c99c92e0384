"""Result files: written anew and atomically after each row, so that a run may be stopped and started again."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dn_lib.teaching.results import changed
from experiments.harness.provenance import provenance

NOT_MEASURED = "smoke run: each time is a stub of 1 ms, no error was measured on a GPU; nothing here is a result"

SMOKE_RUN = "NOT MEASURED: smoke run"  # the last line that such a run prints


def first_line(error: BaseException) -> str:
    """The exception's type and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def plain(x: Any) -> Any:
    """As JSON can hold it: numbers that are not finite become strings, floats keep six digits."""
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else str(x)
    if isinstance(x, torch.dtype):
        return str(x).removeprefix("torch.")
    return str(x) if isinstance(x, Path) else x


def write_json(path: Path, record: dict) -> None:
    """Writes the whole file or, where the process is ended meanwhile, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def geometric_mean(x: Sequence[float]) -> float | None:
    return math.exp(statistics.fmean(map(math.log, x))) if x else None


def same_settings(before: dict, now: dict) -> bool:
    """Whether two runs measured the same, however long they might take and whatever they wrote down beside it."""
    return all(before.get(name) == plain(x) for name, x in now.items() if name not in ("budget", "workers", "retry"))


def common(now: dict[str, str], before: dict[str, str] | None) -> dict[str, str]:
    """Digests of sources for rows of which some were measured `before`: "several" where the two differ.

    >>> common({"a.py": "1", "b.py": "2"}, {"a.py": "1", "b.py": "3"})
    {'a.py': '1', 'b.py': 'several'}
    """
    before = before or {}
    return {name: now[name] if now.get(name) == before.get(name) else "several" for name in sorted({*now, *before})}


class OutOfTime(Exception):
    """The budget is spent; what is done is written."""


class DeviceLost(Exception):
    """A kernel has brought the GPU's context down; what is done is written, and a rerun goes on after it."""


class Results:
    """A result file {provenance, settings, ceilings, rows, summary}.

    Rows of an existing file are kept if they come from the same device, and either from the same commit, or from one in
    which the code that the file describes was the same and that had the same settings.  any_commit keeps those of other
    commits too: each row says which it is from, and a source that is not the same for all has the digest "several".
    """

    not_measured = NOT_MEASURED

    def __init__(
        self, path: Path, settings: dict, *, budget: float | None = None, smoke: bool = False, seed: int = 0,
        any_commit: bool = False,
    ):  # fmt: skip
        self.path, self.smoke, self.started = path, smoke, time.monotonic()
        self.budget = budget
        self.summary: dict[str, Any] = {}
        self.settings = settings
        self.provenance = provenance(seed=seed)
        self.origin = {name: self.provenance[name] for name in ("git_commit", "device")}
        self.ceilings, self.rows = {}, []
        if path.exists():
            before = json.loads(path.read_text())
            as_now = changed(path.stem, before) == [] and same_settings(before["settings"], settings)
            same = ("device",) if any_commit or as_now else tuple(self.origin)
            self.rows = [row for row in before["rows"] if all(row.get(n) == self.origin[n] for n in same)]
            self.rows = [row for row in self.rows if row["measured"] != smoke]
            if dropped := len(before["rows"]) - len(self.rows):
                print(f"{path}: {dropped} rows of another commit or device will be replaced", flush=True)
            if self.rows:
                print(f"{path}: {len(self.rows)} rows kept", flush=True)
                self.provenance["sources"] = common(self.provenance["sources"], before["provenance"].get("sources"))
                self.provenance["begun"] = before["provenance"].get("begun", before["provenance"]["date"])

    def find(self, key: str) -> dict | None:
        return next((row for row in self.rows if row["key"] == key), None)

    @property
    def done(self) -> list[dict]:
        return [row for row in self.rows if row["status"] == "ok"]

    @property
    def not_done(self) -> list[str]:
        """Keys of the rows that failed, were refused or skipped."""
        return [row["key"] for row in self.rows if row["status"] != "ok"]

    def add(self, row: dict) -> None:
        self.rows = [old for old in self.rows if old["key"] != row["key"]] + [plain(self.marked(row))]
        self.write()

    def marked(self, row: dict) -> dict:
        """A row with its origin."""
        return {**row, **self.origin, "measured": not self.smoke}

    def record(self) -> dict:
        """What the file holds besides `not_measured`, in its order."""
        names = ("provenance", "settings", "ceilings", "rows", "summary")
        return {name: getattr(self, name) for name in names}

    def write(self) -> None:
        said = {"not_measured": self.not_measured} if self.smoke else {}
        write_json(self.path, plain({**said, **self.record()}))

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def measure(self, key: str, run: Callable[[], dict], *, again: Callable[[dict], bool] = lambda row: False) -> None:
        """Adds the row `run` makes, unless it is there; an exception becomes a row with status "failed".

        Raises OutOfTime before it begins a row after the budget, DeviceLost if the GPU answers no more.
        """
        if (row := self.find(key)) is not None and not again(row):
            return
        if self.budget is not None and self.elapsed() > self.budget:
            raise OutOfTime
        begun = time.monotonic()
        try:
            made: dict[str, Any] = {"key": key, "status": "ok", **run()}
        except Exception as error:
            made = {"key": key, "status": "failed", "failure": first_line(error)}
        made["seconds"] = time.monotonic() - begun
        self.add(made)
        say = made["status"] if made["status"] == "ok" else f"{made['status']}: {made.get('failure')}"
        print(f"[{self.elapsed():6.1f} s] {key}: {say}", flush=True)
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                raise DeviceLost(f"{key}: {first_line(error)}") from error

    def fill(self, body: Callable[[], None]) -> int:
        """Runs `body`, which measures the rows: 0; 2 if the budget ran out; 3 if the GPU was lost."""
        try:
            body()
        except OutOfTime:
            print(f"stopped at the budget, {self.elapsed():.0f} s; the same command goes on", flush=True)
            return 2
        except DeviceLost as error:
            print(f"GPU lost at {error}; the same command goes on after it", flush=True)
            return 3
        return 0

    def finish(self, text: str, code: int = 0, *, failed: object = ()) -> int:
        """Writes the file and prints the table; the exit code is `code`, or 1 if anything `failed`."""
        self.write()
        print(text)
        if self.smoke:
            print(SMOKE_RUN)
        return code or int(bool(failed))
