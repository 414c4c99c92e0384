"""The book as it is stored: sources in the allowed MyST, executed pairs that match them, nbval that bites."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from tools.isolation import PATIENCE
from tools.lowering import DIRECTIVES, ROLES, Book, directives, lower, page_number, prose, roles
from tools.notebooks import execute
from tools.notebooks import main as make_notebooks

ROOT = Path(__file__).resolve().parents[2]
BOOK = Book(ROOT / "book")
PAIRS = BOOK.folder / "notebooks"
SOLUTIONS = BOOK.folder / "solutions"

every_chapter = pytest.mark.parametrize("chapter", BOOK.chapters, ids=lambda path: path.stem)
every_pair = pytest.mark.parametrize("chapter", BOOK.pages, ids=lambda path: path.stem)
PAGES = [*BOOK.pages, *sorted(SOLUTIONS.glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(BOOK.folder)))


def stored(chapter: Path) -> nbformat.NotebookNode:
    pair = PAIRS / f"{chapter.stem}.ipynb"
    assert pair.exists(), f"{pair.name} is missing: run make notebooks"
    return nbformat.read(pair, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# --- the executed pairs


def test_every_pair_has_a_chapter():
    assert {path.stem for path in PAIRS.glob("*.ipynb")} == {path.stem for path in BOOK.pages}


@every_pair
def test_guard_every_cell_was_executed_without_error(chapter):
    """nbval passes over a cell without an execution count, whatever it prints: so there must be none."""
    notebook = stored(chapter)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run make notebooks"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@every_pair
def test_pair_is_in_step_with_its_source(chapter):
    def parts(notebook):
        return [(cell.cell_type, cell.source, cell.id, dict(cell.metadata)) for cell in notebook.cells]

    assert parts(stored(chapter)) == parts(lower(chapter, BOOK)), f"{chapter.name} has changed: run make notebooks"


@every_pair
def test_pair_is_plain_markdown(chapter):
    for cell in stored(chapter).cells:
        if cell.cell_type == "markdown":
            text = prose(cell.source)
            assert not roles(cell.source), cell.source
            assert not directives(cell.source), cell.source
            assert not re.search(r"(?m)^\([\w-]+\)=|^:::|^% |^\+\+\+", text), cell.source
        assert "mystnb" not in cell.metadata


@every_pair
def test_tags_switch_off_nothing_in_silence(chapter):
    for cell in code_cells(stored(chapter)):
        tags = set(cell.metadata.get("tags", []))
        assert tags <= {"nbval-ignore-output"}, f"{tags} in: {cell.source}"
        if tags:
            assert re.search(r"(?m)^\s*#.*\w", cell.source), f"say in a comment why its output varies:\n{cell.source}"


@every_pair
def test_outputs_are_of_kinds_that_are_stable(chapter):
    """nbval compares SVG, GIF and HTML, in which ids and dates vary; PNG it leaves alone."""
    for cell in code_cells(stored(chapter)):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        if "nbval-ignore-output" not in cell.metadata.get("tags", []):
            assert kinds <= {"text/plain", "text/markdown", "text/latex", "image/png"}, cell.source
        texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs]
        assert not re.search(r" at 0x[0-9a-f]{6,}", "".join(texts)), f"an address in the output of:\n{cell.source}"


@every_pair
def test_every_figure_has_a_caption_and_alt_text(chapter):
    notebook, number = stored(chapter), 0
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        pictures = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        if not pictures:
            continue
        number += 1
        assert len(cell.metadata.get("alt", "")) > 20, f"no alt text:\n{cell.source}"
        assert all(picture.metadata["image/png"]["alt"] == cell.metadata["alt"] for picture in pictures)
        expected = f"*Figure {page_number(chapter)}.{number}.* "
        assert after is not None and after.source.startswith(expected), f"no caption {expected}:\n{cell.source}"


@every_pair
def test_pair_is_small(chapter):
    assert (PAIRS / f"{chapter.stem}.ipynb").stat().st_size < 2_000_000


# --- nbval itself


def nbval(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "-p", "no:xdist", path.name]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)


def test_canary_nbval_fails_on_a_corrupted_output(tmp_path):
    """A notebook cut from a real pair, up to its first printed line, passes; with another line it fails."""
    notebook = stored(BOOK.chapters[0])
    cells = []
    for cell in code_cells(notebook):
        cells.append(cell)
        printed = [output for output in cell.outputs if output.get("name") == "stdout"]
        if printed and not cell.metadata.get("tags"):
            break
    else:
        pytest.fail("the first chapter prints nothing that nbval compares")
    good = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    bad = copy.deepcopy(good)
    bad_output = next(output for output in bad.cells[-1].outputs if output.get("name") == "stdout")
    bad_output.text = "corrupted " + bad_output.text
    for name, version, code in (("good", good, 0), ("bad", bad, 1)):
        nbformat.write(version, tmp_path / f"{name}.ipynb")
        done = nbval(tmp_path / f"{name}.ipynb")
        assert done.returncode == code, done.stdout + done.stderr
    assert "mismatch" in done.stdout and "corrupted" in done.stdout


def test_pytest_at_the_root_collects_just_the_pairs():
    command = [sys.executable, "-m", "pytest", "--nbval", "--collect-only", "-p", "no:xdist", "."]
    command += ["--ignore=tests", "--ignore=dn_lib"]  # modules, slow to import
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    files = set(re.findall(r"(\S+\.ipynb)::", done.stdout))
    assert files == {f"book/notebooks/{chapter.stem}.ipynb" for chapter in BOOK.pages}, done.stdout + done.stderr


# --- the sources


@every_page
def test_source_uses_only_the_allowed_myst(page):
    text = "\n".join(cell.source for cell in jupytext.read(page, fmt="md:myst").cells if cell.cell_type == "markdown")
    unknown = {name for name, _ in roles(text)} - ROLES
    found = directives(text)
    for directive in found:  # nested ones join the end of the list
        found += directives(directive.body)
        unknown |= {name for name, _ in roles(directive.body)} - ROLES
    unknown |= {directive.name for directive in found} - DIRECTIVES
    assert not unknown
    for directive in found:
        assert set(directive.options) <= {"label", "class"}, directive
        assert directive.options.get("class", "dropdown") == "dropdown", directive
    # A directive that is indented, as in a list, would not be lowered.
    assert not re.search(r"(?m)^[ >]+(```+|:::+)\{", text) and not re.search(r"(?m)^:::", text)


@every_page
def test_every_citation_is_in_the_bibliography(page):
    keys = {key.strip() for name, body in roles(page.read_text("utf-8")) if name == "cite" for key in body.split(",")}
    assert keys <= set(BOOK.sources)


def test_the_longest_chapter_can_be_read_in_an_afternoon():
    """What a first reading of chapter 5 can skip is in the appendices: words of all text, code cells apart."""
    cells = jupytext.read(BOOK.folder / "05_triton_kernel.md", fmt="md:myst").cells
    assert sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown") <= 11_000


@every_page
def test_no_code_cell_is_too_long_to_read(page):
    for cell in jupytext.read(page, fmt="md:myst").cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 30, cell.source


@every_chapter
def test_chapter_has_solutions_and_a_line_in_the_readme(chapter):
    assert (SOLUTIONS / chapter.name).exists()
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.search(rf"(?m)^\|.*{re.escape(chapter.stem)}", readme), f"{chapter.stem} is not in README's table"


@pytest.mark.parametrize("study", BOOK.studies, ids=lambda path: path.stem)
def test_study_has_solutions_and_is_named_in_the_readme_and_the_index(study):
    assert (SOLUTIONS / study.name).exists()
    assert f"book/notebooks/{study.stem}.ipynb" in (ROOT / "README.md").read_text("utf-8")
    assert f"beyond/{study.stem}>`" in (BOOK.folder / "index.md").read_text("utf-8")


@pytest.mark.parametrize("chapter", BOOK.chapters, ids=lambda path: path.stem)
def test_no_chapter_needs_a_study(chapter):
    """It may name one where it ends; its code imports nothing that is a study's, and its text refers to no equation."""
    text = chapter.read_text("utf-8")
    assert not re.search(
        r"teaching\.figures import .*\bs\d\b|teaching\.figures\.s\d|\{ref\}`[^`]*ex-S|[Ee]quation S\d", text
    )
    labels = {label for label, number in BOOK.equations.items() if number.startswith("S")}
    assert not labels & {body for name, body in roles(text) if name == "eq"}


@every_pair
def test_chapter_has_one_title_which_carries_no_number(chapter):
    titles = re.findall(r"(?m)^# .*$", prose(chapter.read_text("utf-8")))
    assert len(titles) == 1 and not re.match(r"# (Chapter|\d)", titles[0]), "the site numbers the chapters"


# --- what git tracks


def test_no_file_is_large(tracked):
    assert not [path for path in tracked if path.stat().st_size >= 30_000_000]
    assert sum(path.stat().st_size for path in tracked) < 30_000_000


def test_no_path_of_one_machine(tracked):
    personal = "|".join(
        (re.escape(str(ROOT)), "/" + r"home/\w", "/" + r"Users/\w", "/" + "root/", "/tmp/" + "ipykernel")
    )
    for path in tracked:
        if path.suffix in {".md", ".py", ".ipynb", ".json", ".toml", ".txt", ".cff", ".bib", ".css", ""}:
            found = re.search(rf"(?<![\w.])(?:{personal})", path.read_text("utf-8"))
            assert not found, f"{path.relative_to(ROOT)} holds {found[0]}"


# --- making pairs, on a chapter of our own

CHAPTER = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# Tiny

```{code-cell} ipython3
print(6 * 7)
```
"""


def test_notebooks_are_executed_and_the_same_twice(tmp_path):
    (tmp_path / "01_tiny.md").write_text(CHAPTER)
    made = []
    for out in (tmp_path / "a", tmp_path / "b"):
        make_notebooks(["--sources-dir", str(tmp_path), "--out-dir", str(out)])
        made.append((out / "01_tiny.ipynb").read_bytes())
    assert made[0] == made[1]
    install, cell = code_cells(nbformat.reads(made[0].decode(), as_version=4))
    assert (install.execution_count, install.outputs) == (1, [])  # the package is there
    assert (cell.execution_count, cell.outputs[0].text) == (2, "42\n")


UNSHOWABLE = """class Unshowable:
    def _repr_html_(self):
        raise ValueError("cannot be shown")

Unshowable()"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings; warnings.warn('careful')", "writes to standard error"),
        (UNSHOWABLE, "cannot be shown"),
    ],
)
def test_a_cell_that_fails_or_warns_makes_no_notebook(tmp_path, capsys, line, message):
    (tmp_path / "01_tiny.md").write_text(CHAPTER.replace("print(6 * 7)", line))
    with pytest.raises(SystemExit, match="failed: 01_tiny"):
        make_notebooks(["--sources-dir", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "notebooks" / "01_tiny.ipynb").exists()


# The thread that sends outputs comes to nothing for a while, as on a busy machine, and the cell does not wait for it.
BUSY = """import sys, time
sys.stdout.flush_timeout = sys.stderr.flush_timeout = 0.1
get_ipython().kernel.iopub_thread.schedule(lambda: time.sleep(6))
'late'"""


def test_outputs_that_come_late_are_waited_for(tmp_path):
    sources = ("import sys; print(sys.stdout.flush_timeout, sys.stderr.flush_timeout)", BUSY, "print('next')")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    execute(notebook, tmp_path)
    patience, late, after = [cell.outputs[0] if cell.outputs else None for cell in notebook.cells]
    assert late is not None and late.data["text/plain"] == "'late'" and after.text == "next\n"
    assert patience.text == f"{PATIENCE} {PATIENCE}\n"  # what is printed is lost if a cell ends before it is sent
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3]


def test_only_must_name_a_chapter(tmp_path):
    (tmp_path / "01_tiny.md").write_text(CHAPTER)
    with pytest.raises(SystemExit, match="--only must begin the name of a chapter, got '07'"):
        make_notebooks(["--sources-dir", str(tmp_path), "--only", "07"])
