"""`make book`: execute the pages that hold code, once, and build the site from the result.

`python -m tools.site --stored` executes nothing: chapters, studies and appendices show what their notebooks in
`book/notebooks` hold, and all other code stands without results.  It takes seconds, and is for a look at a page, and
for tests.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import read_myst_markdown_notebook
from nbformat import NotebookNode

from tools.isolation import isolate
from tools.lowering import Book
from tools.notebooks import ROOT, ChapterError, execute, execute_all


def fingerprint(folders: Sequence[Path]) -> str:
    """A hash of the code and results that chapters use: when it changes, all are executed again."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in {".py", ".json"}):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def pages_with_code(sources: Path) -> list[Path]:
    """Every page that is executed: those with a pair first, then solutions and whatever else holds code."""
    first = Book(sources).pages
    folders = (".", "beyond", "appendix", "solutions")
    rest = {path for folder in folders for path in (sources / folder).glob("*.md")} - set(first)
    with_code = (path for path in rest if "\n```{code-cell}" in path.read_text(encoding="utf-8"))
    return [*first, *sorted(with_code)]


def with_stored_results(path: Path, pair: Path) -> NotebookNode:
    """The notebook of a page, not executed, each cell with the results that the page's pair holds for it, if any."""
    notebook = read_myst_markdown_notebook(path.read_text(encoding="utf-8"))
    stored: list[NotebookNode] = nbformat.read(pair, as_version=4).cells if pair.exists() else []
    left = [cell for cell in stored if cell.cell_type == "code"]
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        while left and left[0].source != cell.source and any(other.source == cell.source for other in left):
            left.pop(0)
        if left and left[0].source == cell.source:
            found = left.pop(0)
            cell.outputs, cell.execution_count = found.outputs, found.execution_count
    return notebook


def fill_cache_from_pairs(sources: Path, folder: Path) -> None:
    """A cache in `folder`, made anew, of every page with the results of its pair, without executing anything."""
    shutil.rmtree(folder, ignore_errors=True)
    cache = get_cache(folder)
    pairs = set(Book(sources).pages)
    for path in pages_with_code(sources):
        pair = (
            sources / ("notebooks" if path in pairs else "none") / f"{path.stem}.ipynb"
        )  # a solution has its chapter's name
        notebook = with_stored_results(path, pair)
        cache.cache_notebook_bundle(CacheBundleIn(notebook, str(path)), check_validity=False, overwrite=True)


def fill_cache(sources: Path) -> None:
    """Execute what the cache lacks: the pages with code in `sources`, two at a time.

    Raises SystemExit if one fails.
    """
    cache = get_cache(sources / ".jupyter_cache")
    stamp = sources / ".jupyter_cache" / "fingerprint"
    current = fingerprint([ROOT / "dn_lib", sources / "results"])
    if not stamp.exists() or stamp.read_text() != current:
        cache.clear_cache()
        get_cache(sources / ".jupyter_cache").db  # noqa: B018 - makes the database anew
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(current)

    jobs, executed = [], {}

    def job(name: str, path: Path) -> Callable[[], float]:
        def run() -> float:
            notebook = read_myst_markdown_notebook(path.read_text(encoding="utf-8"))
            seconds = execute(notebook, path.parent)
            executed[name] = (notebook, path, seconds)
            return seconds

        return run

    for path in pages_with_code(sources):
        try:
            cache.match_cache_notebook(read_myst_markdown_notebook(path.read_text(encoding="utf-8")))
        except KeyError:
            name = path.relative_to(sources).with_suffix("").as_posix()
            jobs.append((name, job(name, path)))
    if not jobs:
        print("No chapter has changed since it was last executed.", flush=True)
    try:
        if jobs:
            print(f"Executing {len(jobs)} pages", flush=True)
            execute_all(jobs)
    finally:
        for notebook, path, seconds in executed.values():
            bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.site", description=__doc__)
    parser.add_argument("--sources-dir", type=Path, default=ROOT / "book", help="where the chapters are")
    parser.add_argument("--stored", action="store_true", help="execute nothing: show what book/notebooks holds")
    parser.add_argument("--out-dir", type=Path, help="where the site goes [SOURCES_DIR/_build/html]")
    options = parser.parse_args(arguments)
    sources = options.sources_dir.resolve()
    out = options.out_dir.resolve() if options.out_dir else sources / "_build" / "html"
    isolate()
    start = time.perf_counter()
    cache = sources / ".jupyter_cache"
    if options.stored:
        cache = out.parent / f"{out.name}_cache"
        fill_cache_from_pairs(sources, cache)
    else:
        try:
            fill_cache(sources)
        except ChapterError as error:
            raise SystemExit(str(error)) from None
    print("Building the pages", flush=True)
    # -W: a broken reference is an error; -E: the cache may have changed where the text has not.
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-E", "-a"]
    command += ["-d", str(out.parent / "doctrees"), "-D", f"nb_execution_cache_path={cache}"]
    done = subprocess.run([*command, str(sources), str(out)], check=False)
    if done.returncode:
        raise SystemExit("sphinx found errors in the pages: see above")
    print(f"Built in {time.perf_counter() - start:.0f} s. Open  file://{out / 'index.html'}")


if __name__ == "__main__":
    main()
