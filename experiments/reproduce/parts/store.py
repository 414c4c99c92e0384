"""What is kept: a small file for each cell, written once it is done, and one that gathers them."""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from experiments.harness.provenance import provenance
from experiments.harness.results import plain, write_json
from experiments.reproduce.parts.job import Job
from experiments.reproduce.parts.tables import Cell, Table

NOT_MEASURED = "smoke run: a few steps of tiny models on a CPU; no score here is a result"


class Store:
    """Cells lie in a folder, by default named as the file `out` without its ending: folder/TABLE/CELL.json.

    A cell counts as done if its settings are those of today and it was measured, or not, as asked for now.  It says
    which commit and device it comes from, and need not be of the present ones: the cells of a table are independent.
    known: another such folder, whose cells count as well.  partial: a folder for what a cell that ran out of time needs
    to go on.
    """

    def __init__(
        self, out: Path, partial: Path, smoke: bool = False, folder: Path | None = None, known: Path | None = None
    ):
        self.out, self.partial, self.smoke = out, partial, smoke
        self.folder, self.known = out.with_suffix("") if folder is None else folder, known

    def path(self, cell: Cell) -> Path:
        return self.folder / cell.table / f"{cell.name}.json"

    def find(self, cell: Cell) -> dict[str, Any] | None:
        for folder in (self.folder, self.known):
            path = None if folder is None else folder / cell.table / f"{cell.name}.json"
            if path is not None and path.exists():
                record = json.loads(path.read_text())
                if record["settings"] == plain(cell.settings()) and record["measured"] is not self.smoke:
                    return record
        return None

    def add(self, cell: Cell, record: dict[str, Any]) -> None:
        write_json(self.path(cell), plain(record))
        self.partial_path(cell).unlink(missing_ok=True)

    # --- Halves of cells ------------------------------------------------------------------------------------------

    def partial_path(self, cell: Cell) -> Path:
        """Named by the settings as well, so that other settings never go on with it."""
        said = json.dumps(plain(cell.settings()), sort_keys=True)
        return self.partial / cell.table / f"{cell.name}.{hashlib.sha256(said.encode()).hexdigest()[:12]}.pt"

    def keep_half(self, cell: Cell, job: Job) -> None:
        path = self.partial_path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        torch.save(job.saved(), part)
        part.replace(path)

    def half(self, cell: Cell) -> dict[str, Any] | None:
        path = self.partial_path(cell)
        return torch.load(path) if path.exists() else None

    # --- All together ---------------------------------------------------------------------------------------------

    def done(self, table: Table) -> dict[str, dict[str, Any]]:
        """The cells of a table that are done, in its order."""
        found = ((cell.name, self.find(cell)) for cell in table.cells)
        return {name: record for name, record in found if record is not None}

    def gather(self, tables: dict[str, Table]) -> None:
        """Writes `out`: of every cell that is done the best point of its grid, and where it was measured."""
        results, records = {}, []
        for name, table in tables.items():
            if done := self.done(table):
                records += done.values()
                cells = {cell: in_short(record) for cell, record in done.items()}
                of = {"title": table.title, "measure": table.measure, "across": table.across, "paper": table.paper}
                results[name] = {**of, "all_cells": len(table.cells), "cells": cells}
        said = {"not_measured": NOT_MEASURED} if self.smoke else {}
        here = provenance(seed=None)
        here["sources"] = oldest([here["sources"], *(record["provenance"]["sources"] for record in records)])
        write_json(self.out, plain({**said, "provenance": here, "results": results}))


def record_of(cell: Cell, job: Job, estimated_ms: float, smoke: bool, classes: int | None) -> dict[str, Any]:
    """A finished cell as it is kept."""
    test = job.tests[-1]
    best = best_point(job, classes)
    return {
        "table": cell.table,
        "cell": cell.name,
        "place": cell.place,
        "measured": not smoke,
        "settings": cell.settings(),
        "provenance": provenance(seed=sorted({run.seed for run in cell.runs})),
        "best": best,
        "runs": [
            {
                "seed": run.seed,
                "learning_rate": run.learning_rate,
                "weight_decay": run.weight_decay,
                "accuracy": accuracy,
            }
            for run, accuracy in zip(cell.runs, test["accuracy"], strict=True)
        ],
        "parameters": sum(p[0].numel() for p in job.model.parameters()),
        "steps": job.steps,
        "steps_taken": job.done,
        "ended": "learned" if job.done < job.steps else "at the last step",
        "seconds": 1.0 if smoke else job.seconds,
        "ms_per_step": 1.0 if smoke else 1e3 * job.step_seconds / job.done,
        "estimated_ms_per_step": estimated_ms,
        "steps_by": job.steps_by,
        "tests": [{"step": t["step"], "examples": t["examples"], "accuracy": t["accuracy"]} for t in job.tests],
        "by_place": thinned(test["by_place"]),
        "curves": job.curves(),
    }


def best_point(job: Job, classes: int | None) -> dict[str, Any]:
    """The point of the grid with the best mean accuracy in the last test, and what each of its seeds has.

    With `classes` the scores are scaled, 0 for a guess and 1 for no mistake.
    """
    points = {point: [x if x == x else 0.0 for x in values] for point, values in job.by_point().items()}
    (rate, decay), accuracy = max(points.items(), key=lambda item: statistics.fmean(item[1]))
    chance = 0.0 if classes is None else 1 / classes
    score = [(x - chance) / (1 - chance) for x in accuracy]
    runs = [run for run in job.runs if run.point == (rate, decay)]
    return {
        "learning_rate": rate,
        "weight_decay": decay,
        "seeds": [run.seed for run in runs],
        "accuracy": accuracy,
        "score": score,
        "mean": statistics.fmean(score),
        "spread": max(score) - min(score),
    }


def thinned(by_place: list[list[float | None]], points: int = 32) -> dict[str, Any]:
    """Accuracies by place of every run, averaged over stretches of places where something is scored."""
    places = [i for i, x in enumerate(by_place[0]) if x is not None]
    every = max(1, -(-len(places) // points))
    stretches = [places[i : i + every] for i in range(0, len(places), every)]
    means = [[statistics.fmean(row[i] or 0.0 for i in stretch) for stretch in stretches] for row in by_place]
    return {"last_of_stretch": [stretch[-1] for stretch in stretches], "accuracy": means}


def oldest(sources: list[dict[str, str]]) -> dict[str, str]:
    """Digests of source files, the first of today: where a cell was measured with another, that other one.

    So the whole is called older than the code as soon as one of its cells is.
    """
    found = dict(sources[0])
    for before in sources[1:]:
        found |= {path: digest for path, digest in before.items() if sources[0].get(path) != digest}
    return found


def in_short(record: dict[str, Any]) -> dict[str, Any]:
    """What a reader of a table wants of a cell."""
    names = ("place", "best", "steps_taken", "steps", "ended", "seconds", "measured")
    where = {name: record["provenance"][name] for name in ("git_commit", "device", "date")}
    return {name: record[name] for name in names} | where
