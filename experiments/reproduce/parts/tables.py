"""The settings files: which cells a table has, and what each of them is.

A file has defaults (`task`, `training`, `grid`, `model`), the `models` and, if there are several, the `tasks` by name,
and `cells`: all combinations of their tasks, models, and the lists in their `model` and `task`.  What a later of these
says goes before what an earlier one says; `smoke` goes before all.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dn_lib.models import ModelConfig
from experiments.reproduce.parts.job import Run, Training

FOLDER = Path(__file__).resolve().parents[1]
TABLES = ("mqar", "mad", "regbench", "tracking")
DATA_SEED = 20_240_606  # of the examples, which are the same for all cells of a task


@dataclass(frozen=True)
class Cell:
    """One entry of a table: a task, a model, and the runs of which the best is kept.

    task: the options of `tasks.make`, with `kind`, `train` and `test`.  model: fields of `ModelConfig` but the
    vocabulary, which the task has.
    """

    table: str
    name: str
    place: dict[str, Any]
    task: dict[str, Any]
    model: dict[str, Any]
    training: Training
    runs: tuple[Run, ...]

    def settings(self) -> dict[str, Any]:
        """What makes two cells the same measurement."""
        training = asdict(self.training)
        return {"task": self.task, "model": self.model, "training": training, "runs": [asdict(r) for r in self.runs]}

    def config(self, vocab: int) -> ModelConfig:
        return ModelConfig(vocab_size=vocab, **self.model)

    @property
    def steps(self) -> int:
        return self.training.steps(self.task["train"])


@dataclass(frozen=True)
class Table:
    """A settings file: its cells in the order of their worth, what is measured, and the paper's numbers."""

    name: str
    title: str
    measure: str
    across: str
    cells: tuple[Cell, ...]
    paper: dict[str, Any]


def read(name: str, smoke: bool = False, path: Path | None = None) -> Table:
    """The table `name`, or with `smoke` the few tiny cells that run on a CPU.

    Raises ValueError for a setting that nothing reads, and for two cells of one name.
    """
    said = tomllib.loads((path or FOLDER / f"{name}.toml").read_text())
    small = said.get("smoke", {}) if smoke else {}
    cells: list[Cell] = []
    for group in said["cells"]:
        _check(group, "cells", ("models", "tasks", "model", "task", "training", "grid"))
        fixed = {field: small.get(field, {}) for field in ("task", "model", "training", "grid")}
        for task in group.get("tasks", [None]):
            for model in group["models"]:
                for varied in _combinations(group):
                    cells.append(_cell(name, said, group, task, model, varied, fixed))
    names = [cell.name for cell in cells]
    if doubled := {x for x in names if names.count(x) > 1}:
        raise ValueError(f"cells must have names of their own, got {', '.join(sorted(doubled))} twice")
    if smoke:
        cells = select(cells, small["cells"])
    return Table(name, said["title"], said["measure"], said["across"], tuple(cells), said.get("paper", {}))


def select(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Cells whose names fit one of the patterns ("*" for anything), in the order of `cells`.

    Raises ValueError for a pattern that fits none.
    """
    for pattern in patterns:
        if not any(fnmatch(cell.name, pattern) for cell in cells):
            raise ValueError(f"cells must fit {pattern!r}, got only {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if any(fnmatch(cell.name, pattern) for pattern in patterns)]


def _combinations(group: dict) -> list[dict[tuple[str, str], Any]]:
    """All choices out of the lists in `model` and `task`, as {(model or task, field): value}."""
    lists = {(part, field): values for part in ("task", "model") for field, values in group.get(part, {}).items()}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _cell(
    table: str, said: dict, group: dict, task: str | None, model: str, varied: dict[tuple[str, str], Any], fixed: dict
) -> Cell:
    place: dict[str, Any] = {"model": model} if task is None else {"task": task, "model": model}
    place |= {field: value for (_, field), value in varied.items()}
    chosen = {part: {f: value for (p, f), value in varied.items() if p == part} for part in ("task", "model")}
    kind = {} if task is None else {"kind": task} | said["tasks"][task]
    in_task = said["task"] | kind | chosen["task"] | _only(fixed["task"], said["task"] | kind)
    in_model = said["model"] | said["models"][model] | chosen["model"] | fixed["model"]
    training = said["training"] | group.get("training", {}) | fixed["training"]
    _check(training, "training", [field.name for field in fields(Training)])
    _check(in_model, "model", [field.name for field in fields(ModelConfig)])
    grid = said["grid"] | group.get("grid", {}) | fixed["grid"]
    _check(grid, "grid", ("learning_rates", "weight_decays", "seeds"))
    runs = itertools.product(grid["seeds"], grid["learning_rates"], grid["weight_decays"])
    name = "-".join(str(x) if f in ("task", "model") else f"{f}={x}" for f, x in place.items())
    return Cell(table, name, place, in_task, in_model, Training(**training), tuple(Run(*run) for run in runs))


def _only(options: dict, known: dict) -> dict:
    return {name: value for name, value in options.items() if name in known}


def _check(given: dict, where: str, known: Sequence[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{where} must hold {', '.join(known)}, got {unknown[0]!r}")
