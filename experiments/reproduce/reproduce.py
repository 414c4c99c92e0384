"""The paper's small experiments: associative recall, the six tasks of MAD, regular languages, state tracking.

    python -m experiments reproduce mqar --dry-run                 which cells, how long each would take at most
    python -m experiments reproduce mqar --budget 500              measure what is missing; the same command goes on
    python -m experiments reproduce mqar tracking --cells '*delta*'    only cells with such names
    python -m experiments reproduce --plot figures                 a figure for each table, next to the paper's numbers

Settings are in experiments/reproduce/TABLE.toml, one file per table, with what the paper did and what differs here.
A cell is one model on one task.  All its seeds, learning rates and weight decays are trained as one job: their weights
are stacked, and what has no weights is called once for all of them.  On a GPU the whole step of all runs is one CUDA
graph, with the examples on the device.  tests/experiments/test_stacked_runs.py holds each run against the same run
alone in plain PyTorch.

A finished cell is a file in experiments/reproduce/cells, or with --out FILE.json in the folder FILE; --out itself, by
default book/results/reproduce.json, gathers the best of each.  A file is kept as long as the settings are the same; one
in experiments/reproduce/cells counts wherever --out lies.  When the budget ends within a cell, its weights go to
--partial, and the same command goes on from there.  Training ends early once all seeds of one point of the grid do
better in a test than `enough`.  The score of a cell is that of the point of its grid with the best mean over its seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from experiments.harness.cli import Experiment, device_of
from experiments.harness.problems import matmul_precision
from experiments.harness.provenance import RESULTS, ROOT
from experiments.harness.results import SMOKE_RUN, first_line
from experiments.reproduce.parts import tasks
from experiments.reproduce.parts.draw import save
from experiments.reproduce.parts.estimate import Estimate, calibrated, estimate
from experiments.reproduce.parts.job import Job
from experiments.reproduce.parts.store import Store, record_of
from experiments.reproduce.parts.tables import DATA_SEED, FOLDER, TABLES, Cell, Table, read, select

CELLS = FOLDER / "cells"


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tables", nargs="*", metavar="table", help=f"{', '.join(TABLES)}; all of them by default")
    add("--cells", nargs="+", metavar="NAME", help="only cells of these names, * for anything")
    add("--dry-run", action="store_true", help="list the cells and how long they would take; nothing is written")
    add("--plot", type=Path, metavar="FOLDER", help="draw what --out has gathered; nothing is measured")
    add("--partial", type=Path, default=ROOT / "runs" / "reproduce", help="where cells that ran out of time wait")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--eager", action="store_true", help="no CUDA graph")


def chosen(o: argparse.Namespace) -> dict[str, Table]:
    """The tables asked for, whole.  Exits with a word for a name that there is not."""
    if unknown := [name for name in o.tables if name not in TABLES]:
        raise SystemExit(f"there is no table {unknown[0]}, but {', '.join(TABLES)}")
    return {name: read(name, o.smoke) for name in o.tables or TABLES}


def wanted(o: argparse.Namespace, tables: dict[str, Table]) -> list[Cell]:
    """Their cells that --cells names.  Exits with a word for a name that none has."""
    cells = [cell for table in tables.values() for cell in table.cells]
    try:
        return cells if o.cells is None else select(cells, o.cells)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def store_of(o: argparse.Namespace, out: Path) -> Store:
    if o.smoke:
        return Store(out, out.with_suffix("") / "partial", smoke=True)
    whole = out.resolve() == (RESULTS / EXPERIMENT.writes[0]).resolve()
    return Store(out, o.partial, folder=CELLS if whole else None, known=CELLS)


def estimates(store: Store, tables: dict[str, Table], cells: list[Cell]) -> dict[str, Estimate]:
    done = {name: list(store.done(table).values()) for name, table in tables.items()}
    return {f"{cell.table} {cell.name}": calibrated(cell, [] if store.smoke else done[cell.table]) for cell in cells}


def listing(store: Store, cells: list[Cell], expected: dict[str, Estimate]) -> str:
    """The cells with their estimates; what is done is not counted."""
    lines = [f"{'cell':56} {'runs':>4} {'steps':>6} {'ms/step':>8} {'minutes':>8}"]
    missing: list[Estimate] = []
    for cell in cells:
        name, record = f"{cell.table} {cell.name}", store.find(cell)
        found = expected[name]
        row = f"{name:56} {len(cell.runs):4d} {cell.steps:6d} {found.ms_per_step:8.2f} {found.seconds / 60:8.1f}"
        if record is None:
            missing.append(found)
        else:
            row += f"  done: {100 * record['best']['mean']:.1f}, took {record['seconds'] / 60:.1f}"
        lines.append(row)
    minutes, flops = sum(e.seconds for e in missing) / 60, sum(e.flops for e in missing)
    most = f"at most {minutes:.1f} minutes on an H200 and {flops:.1e} FLOPs of matrix products"
    lines.append(f"{len(missing)} cells to measure, {most}; less where a task is learned early")
    return "\n".join(lines)


def measure(cell: Cell, store: Store, o: argparse.Namespace, device: str, left: Callable[[], float]) -> bool:
    """Trains a cell and writes its file: True.  False if time ran out: the rest waits in --partial."""
    options = {name: value for name, value in cell.task.items() if name != "kind"}
    task = tasks.make(cell.task["kind"], seed=DATA_SEED, device=device, **options)
    with matmul_precision("highest" if cell.training.precision == "float32" else "high"):
        config = cell.config(task.vocab)
        job = Job(task, config, list(cell.runs), cell.training, device=device, eager=o.eager)
        if half := store.half(cell):
            job.restore(half)
            print(f"    goes on after step {job.done}", flush=True)
        ended = job.train(left, say=lambda text: print(f"    {text}", flush=True))
    if not ended:
        store.keep_half(cell, job)
        print(f"    stopped at the budget after step {job.done} of {job.steps}", flush=True)
        return False
    record = record_of(cell, job, estimate(cell).ms_per_step, o.smoke, task.classes)
    store.add(cell, record)
    best = record["best"]
    seeds = ", ".join(f"{100 * score:.1f}" for score in best["score"])
    score = f"{100 * best['mean']:.1f} ({seeds}) at rate {best['learning_rate']:g}"
    took = f"{record['seconds']:.0f} s, {record['ms_per_step']:.2f} ms a step by {record['steps_by']}"
    print(f"    {record['ended']}, step {job.done}: {score}, {took}", flush=True)
    return True


def run(o: argparse.Namespace) -> int:
    """0; 1 if a cell failed; 2 if the budget ran out."""
    tables = chosen(o)
    cells = wanted(o, tables)
    out = o.out or RESULTS / EXPERIMENT.writes[0]
    store = store_of(o, out)
    if o.plot is not None:
        results = json.loads(out.read_text())["results"] if out.exists() else {}
        paths = save({name: results[name] for name in tables if name in results}, o.plot)
        print("\n".join(map(str, paths)) or f"nothing to draw in {out}")
        return 0 if paths else 1
    print(listing(store, cells, estimates(store, tables, cells)), flush=True)
    if o.dry_run:
        return 0
    device = "cpu" if o.device == "cpu" and not o.smoke else device_of(o.smoke)
    begun, code = time.monotonic(), 0

    def left() -> float:
        return float("inf") if o.budget is None else o.budget - (time.monotonic() - begun)

    missing = [cell for cell in cells if store.find(cell) is None]
    for i, cell in enumerate(missing):
        if left() <= 0:
            print(f"stopped at the budget, {len(missing) - i} cells missing; the same command goes on", flush=True)
            code = 2
            break
        print(f"[{time.monotonic() - begun:6.1f} s] {i + 1} of {len(missing)}: {cell.table} {cell.name}", flush=True)
        try:
            if not measure(cell, store, o, device, left):
                code = 2
                break
        except Exception as error:
            print(f"    failed: {first_line(error)}", flush=True)
            code = 1
        if device == "cuda":
            torch.cuda.empty_cache()
    store.gather({name: read(name, o.smoke) for name in TABLES})
    if o.smoke:
        print(SMOKE_RUN)
    return code


EXPERIMENT = Experiment(
    question="Do the paper's findings on recall, synthetic tasks, languages and state tracking show again in small?",
    writes=("reproduce.json",),
    minutes=120,
    gpu="H200, in pieces",
    run=run,
    options=options,
    shared=("budget", "smoke"),
    measured=False,
    dry=("dry_run", "plot"),
)
