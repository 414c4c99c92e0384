"""How long each chapter runs, one after the other on an otherwise idle machine.

    python benchmarks/chapter_times.py --out book/results/chapter_times.json

README.md's table shows these times.  Results are kept by device, so that a run on a GPU adds a column.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from provenance import provenance

from tools.lowering import Book, lower
from tools.notebooks import ROOT, execute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    book = Book(ROOT / "book")
    seconds = {}
    for chapter in book.chapters:
        notebook = lower(chapter, book)
        with tempfile.TemporaryDirectory() as folder:
            # The chapters look for results beside the folder that they run in.
            (Path(folder) / "notebooks").mkdir()
            (Path(folder) / "results").symlink_to(ROOT / "book" / "results")
            seconds[chapter.stem] = round(execute(notebook, Path(folder) / "notebooks"), 1)
        print(f"{chapter.stem}  {seconds[chapter.stem]:.0f} s", flush=True)
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    known["gpu" if torch.cuda.is_available() else "cpu"] = {"provenance": provenance(), "seconds": seconds}
    options.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
