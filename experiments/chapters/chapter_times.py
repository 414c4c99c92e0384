"""How long each chapter runs, one after the other on an otherwise idle machine, and whether it runs to its end.

    python -m experiments chapter_times --out book/results/chapter_times.json

README.md's table shows these times.  Results are kept by device, so that a run on a GPU adds a column; `different`
holds the cells whose text is not the stored one (figures, times and devices left out).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from experiments.harness.cli import Experiment
from experiments.harness.provenance import ROOT, provenance
from experiments.harness.results import write_json


def shown(cell) -> str:
    """The text that a cell shows, printed or as its result."""
    parts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.get("outputs", [])]
    return "".join(parts).strip()


def differences(notebook, stored) -> list[dict]:
    """Cells whose text is not the stored one, but for those that may differ from machine to machine."""
    found = []
    for number, (cell, other) in enumerate(zip(notebook.cells, stored.cells, strict=True), 1):
        ignored = "nbval-ignore-output" in cell.metadata.get("tags", [])
        if cell.cell_type == "code" and not ignored and shown(cell) != shown(other):
            found.append({"cell": number, "shown": shown(cell)[-2000:], "stored": shown(other)[-2000:]})
    return found


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=[], metavar="NN", help="these chapters alone")


def run(options: argparse.Namespace) -> int:
    import nbformat  # the chapters' tools come with the extra `book`

    from tools.lowering import Book, lower
    from tools.notebooks import execute

    book = Book(ROOT / "book")
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    place = "gpu" if torch.cuda.is_available() else "cpu"
    seconds = dict(known.get(place, {}).get("seconds", {})) if options.only else {}
    different = dict(known.get(place, {}).get("different", {})) if options.only else {}
    failed = 0
    for chapter in book.chapters:
        if options.only and chapter.stem[:2] not in options.only:
            continue
        notebook = lower(chapter, book)
        with tempfile.TemporaryDirectory() as folder:
            # The chapters look for results beside the folder that they run in.
            (Path(folder) / "notebooks").mkdir()
            (Path(folder) / "results").symlink_to(ROOT / "book" / "results")
            try:
                seconds[chapter.stem] = round(execute(notebook, Path(folder) / "notebooks"), 1)
                stored = nbformat.read(ROOT / "book" / "notebooks" / f"{chapter.stem}.ipynb", as_version=4)
                different[chapter.stem] = differences(notebook, stored)
                print(f"{chapter.stem}  {seconds[chapter.stem]:.0f} s", *different[chapter.stem], sep="\n", flush=True)
            except Exception as error:
                failed += 1
                seconds.pop(chapter.stem, None)
                print(f"{chapter.stem}  FAILED\n{error}", flush=True)
        known[place] = {"provenance": provenance(), "seconds": seconds, "different": different}
        write_json(options.out, known)
    return int(failed > 0)


EXPERIMENT = Experiment(
    question="How long does each chapter run, and does it show what is stored?",
    writes=("chapter_times.json",),
    minutes=4,
    gpu="H200; 3 on a CPU",
    run=run,
    options=options,
)
