"""`make notebooks`: execute every chapter, study and appendix; store each, with outputs, as a notebook of Markdown."""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from tools.isolation import PATIENCE, isolate
from tools.lowering import Book, lower

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 900  # seconds for one cell; a chapter takes about a minute


class ChapterError(RuntimeError):
    """A chapter that cannot be executed as it stands."""


def execute(notebook: NotebookNode, folder: Path) -> float:
    """Run `notebook` in place, in a fresh kernel whose working directory is `folder`; returns the seconds.

    Personal settings are kept out of it (see `tools.isolation`).
    Raises ChapterError if a cell raises, shows something that cannot be shown, or writes to standard error
    (a warning, a progress bar).
    """
    isolate()
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        startup_timeout=PATIENCE,
        iopub_timeout=PATIENCE,
        raise_on_iopub_timeout=True,  # or what has not come by then is left out in silence
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=40"],  # what the kernel itself says belongs to no chapter
        resources={"metadata": {"path": str(folder)}},
    )
    start = time.perf_counter()
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise ChapterError(str(error)) from None
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        for output in cell.outputs:
            if output.output_type == "error":  # from showing a result, a figure for instance: nothing was raised
                raise ChapterError(f"code cell {number}: {output.ename}: {output.evalue}\n\nThe cell:\n{cell.source}")
            if output.output_type == "stream" and output.name == "stderr":
                raise ChapterError(
                    f"code cell {number} writes to standard error:\n{output.text}\n\nThe cell:\n{cell.source}"
                )
            if "image/png" in output.get("data", {}) and "alt" in cell.metadata:
                output.metadata.setdefault("image/png", {})["alt"] = cell.metadata["alt"]
    notebook.metadata["language_info"] = {"name": "python"}  # not the version it happened to run on
    return time.perf_counter() - start


def execute_all(jobs: Sequence[tuple[str, Callable[[], float]]], workers: int = 2) -> None:
    """Run the named jobs, `workers` at a time, and say on each line what has begun and what is done.

    Raises SystemExit, after all have run, if any raised ChapterError.
    """
    failed = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console that has no tick ends no run
    # One thread for each of two kernels: chapters are small, and two fit the cores of any laptop.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def timed(name: str, job: Callable[[], float]) -> float:
        print(f"  … {name}\n", end="", flush=True)  # one write, so that lines stay whole
        return job()

    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(timed, name, job): name for name, job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            name = futures[future]
            try:
                print(f"  ✓ {name}  {future.result():.0f} s  [{done}/{len(futures)}]", flush=True)
            except ChapterError as error:
                failed.append(name)
                print(f"  ✗ {name}  [{done}/{len(futures)}]\n{error}", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(sorted(failed))}")


# The figure that README.md opens with: which notebook, how its caption begins, and where it is kept.
PICTURE = ("02_delta_rule", "*Figure 2.4.", "_static/delta_memory.png")


def picture(folder: Path) -> bytes:
    """The PNG of the README's figure, from the executed notebook in `folder`: the output above its caption."""
    cells = nbformat.read(folder / f"{PICTURE[0]}.ipynb", as_version=4).cells
    caption = next(i for i, cell in enumerate(cells) if cell.source.startswith(PICTURE[1]))
    return next(
        base64.b64decode(output.data["image/png"])
        for output in cells[caption - 1].outputs
        if "image/png" in output.get("data", {})
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__)
    parser.add_argument("--sources-dir", type=Path, default=ROOT / "book", help="where the chapters are")
    parser.add_argument("--out-dir", type=Path, help="where the notebooks go [SOURCES_DIR/notebooks]")
    parser.add_argument("--only", default="", help="make only pages whose name begins so, e.g. 03, S1 or A")
    options = parser.parse_args(arguments)
    out = options.out_dir or options.sources_dir / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    book = Book(options.sources_dir)
    chosen = [path for path in book.pages if path.name.startswith(options.only)]
    if not chosen:
        raise SystemExit(f"--only must begin the name of a chapter, got {options.only!r}")

    def job(path: Path) -> Callable[[], float]:
        def run() -> float:
            try:
                notebook = lower(path, book)
            except ValueError as error:
                raise ChapterError(str(error)) from None
            seconds = execute(notebook, out)
            nbformat.write(notebook, out / f"{path.stem}.ipynb")
            return seconds

        return run

    print(f"Executing {len(chosen)} chapters into {os.path.relpath(out)}", flush=True)
    execute_all([(path.stem, job(path)) for path in chosen])
    if out == ROOT / "book" / "notebooks" and any(path.stem == PICTURE[0] for path in chosen):
        (ROOT / "book" / PICTURE[2]).write_bytes(picture(out))


if __name__ == "__main__":
    main()
