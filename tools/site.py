"""`make book`: execute the chapters, appendices and solutions, once, and build the site from the result."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import read_myst_markdown_notebook

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


def fill_cache(sources: Path) -> None:
    """Execute what the cache lacks: the chapters, appendices and solutions in `sources`, two at a time.

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

    for path in [*Book(sources).pages, *sorted((sources / "solutions").glob("*.md"))]:
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
    options = parser.parse_args(arguments)
    sources = options.sources_dir.resolve()
    isolate()
    start = time.perf_counter()
    try:
        fill_cache(sources)
    except ChapterError as error:
        raise SystemExit(str(error)) from None
    out = sources / "_build" / "html"
    print("Building the pages", flush=True)
    # -W: a broken reference is an error; -E: the cache may have changed where the text has not.
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-E", "-a"]
    done = subprocess.run([*command, str(sources), str(out)], check=False)
    if done.returncode:
        raise SystemExit("sphinx found errors in the pages: see above")
    print(f"Built in {time.perf_counter() - start:.0f} s. Open  file://{out / 'index.html'}")


if __name__ == "__main__":
    main()
