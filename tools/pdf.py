"""`make pdf`: the whole book on paper, from the same pages and the same executed chapters as the site.

LaTeX comes from Debian's packages; where it is missing, the command says what to install.  What LaTeX complains about
is an error here: a line that stands out of the page, a character that no font has, a reference to nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.isolation import isolate
from tools.notebooks import ROOT, ChapterError
from tools.site import fill_cache, fill_cache_from_pairs

# What is needed, each as a program or a file that kpsewhich or fontconfig finds -> Debian's package.
PROGRAMS = {"latexmk": "latexmk", "xelatex": "texlive-xetex", "kpsewhich": "texlive-binaries", "fc-match": "fontconfig"}
FILES = {
    "fontspec.sty": "texlive-latex-recommended",
    "tabulary.sty": "texlive-latex-extra",
    "newunicodechar.sty": "texlive-latex-extra",
    "lmroman10-regular.otf": "lmodern",
}
FONTS = {"DejaVuSans.ttf": "fonts-dejavu-core", "DejaVuSansMono-Oblique.ttf": "fonts-dejavu-extra"}
PACKAGES = "latexmk texlive-xetex texlive-latex-extra lmodern fonts-dejavu"
ALLOWED = 5.0  # points that a line may stand out of its column: less than the width of two letters


def missing() -> list[str]:
    """What of LaTeX is not here, as "what (Debian's package)"; nothing if all is."""
    found = [f"{name} ({package})" for name, package in PROGRAMS.items() if shutil.which(name) is None]
    if found:
        return found

    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    found += [f"{name} ({package})" for name, package in FILES.items() if not run("kpsewhich", name).strip()]
    for name, package in FONTS.items():
        if not run("fc-list", "-f", "%{file}\n").count(f"/{name}\n"):
            found.append(f"{name} ({package})")
    return found


def date() -> str:
    """The seconds that the file gives as its date, so that one commit makes one file: those of the commit."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    try:
        stamp = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        stamp = ""
    return os.environ.get("SOURCE_DATE_EPOCH") or stamp or "0"


def complaints(log: str) -> list[str]:
    """What in LaTeX's `log` means that the page is not as it should be.

    >>> complaints(r"Overfull \\hbox (5.2pt too wide) in paragraph at lines 3--4")
    ['Overfull \\\\hbox (5.2pt too wide) in paragraph at lines 3--4']
    >>> complaints(r"Overfull \\hbox (4.9pt too wide) in paragraph at lines 3--4")
    []
    """
    found = []
    for line in log.splitlines():
        wide = re.match(r"Overfull \\[hv]box \(([\d.]+)pt too (?:wide|high)\)", line)
        if (wide and float(wide[1]) > ALLOWED) or re.match(
            r"Missing character: |LaTeX Warning: (Reference|Hyper reference|Citation) .* undefined|"
            r"LaTeX Warning: (Label .* multiply defined|There were undefined)|"
            r"LaTeX Font Warning: .* undefined|! ",
            line,
        ):
            found.append(line)
    return list(dict.fromkeys(found))


def tex(sources: Path, out: Path, cache: Path | None = None) -> None:
    """The book in `sources` as LaTeX, in `out`; `cache` has its executed pages, by default that of the site.

    Raises SystemExit if a page has an error.
    """
    # -W: a broken reference is an error; -E: the cache may have changed where the text has not.
    command = [sys.executable, "-m", "sphinx", "-b", "latex", "-t", "print", "-q", "-W", "--keep-going", "-E"]
    command += ["-d", str(out / "doctrees"), "-D", f"nb_execution_cache_path={cache or sources / '.jupyter_cache'}"]
    done = subprocess.run([*command, str(sources), str(out)], check=False)
    if done.returncode:
        raise SystemExit("sphinx found errors in the pages: see above")


def typeset(out: Path) -> Path:
    """The PDF of `out`/book.tex.  Raises SystemExit with what LaTeX complains about."""
    command = ["latexmk", "-xelatex", "-interaction=nonstopmode", "-halt-on-error", "-file-line-error", "book.tex"]
    # SOURCE_DATE_EPOCH: dates and identifiers of the file; max_print_line: what a line of the log holds.
    environment = os.environ | {"SOURCE_DATE_EPOCH": date(), "FORCE_SOURCE_DATE": "1", "max_print_line": "1000"}
    with open(out / "latexmk.out", "w", encoding="utf-8") as output:
        done = subprocess.run(command, cwd=out, env=environment, stdout=output, stderr=output, check=False)
    log = (out / "book.log").read_text(encoding="utf-8", errors="replace") if (out / "book.log").exists() else ""
    if done.returncode:
        error = [line for line in log.splitlines() if re.match(r"! |.*\.\w+:\d+: ", line)]
        raise SystemExit("\n".join(["LaTeX stopped:", *error[:10], f"see {out / 'book.log'}"]))
    if found := complaints(log):
        raise SystemExit("\n".join([f"LaTeX complains {len(found)} times:", *found, f"see {out / 'book.log'}"]))
    return out / "book.pdf"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.pdf", description=__doc__)
    parser.add_argument("--sources-dir", type=Path, default=ROOT / "book", help="where the chapters are")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "build" / "pdf", help="where the PDF goes")
    parser.add_argument("--stored", action="store_true", help="execute nothing: print what book/notebooks holds")
    options = parser.parse_args(arguments)
    if lacking := missing():
        raise SystemExit(
            f"the PDF needs LaTeX; missing here: {', '.join(lacking)}\nOn Debian or Ubuntu:  apt-get install {PACKAGES}"
        )
    sources, out = options.sources_dir.resolve(), options.out_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    isolate()
    start = time.perf_counter()
    cache = sources / ".jupyter_cache"
    if options.stored:
        cache = out / "cache"
        fill_cache_from_pairs(sources, cache)
    else:
        try:
            fill_cache(sources)
        except ChapterError as error:
            raise SystemExit(str(error)) from None
    print("Writing the pages for LaTeX", flush=True)
    tex(sources, out, cache)
    print("Typesetting them, three times over", flush=True)
    pdf = typeset(out)
    pages = re.search(r"Output written on book\.\w+ \((\d+) pages", (out / "book.log").read_text("utf-8", "replace"))
    print(f"{pages[1] if pages else '?'} pages in {time.perf_counter() - start:.0f} s. Open  file://{pdf}")


if __name__ == "__main__":
    main()
