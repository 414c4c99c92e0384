"""`python -m dn_lib course build OUT`: the book's chapters as a course in nbgrader's layout."""

from __future__ import annotations

import json
from pathlib import Path

import dn_lib
from dn_lib.course.notebooks import Assignment, nbformat
from dn_lib.teaching.registry import all_exercises

MARK = "course.json"
CONFIG = '''"""nbgrader's settings for this course."""

c = get_config()  # noqa: F821 - nbgrader defines it
c.CourseDirectory.course_id = "deltanet"
# Above each solution stands the blank function that students get.
c.ClearSolutions.code_stub = {"python": ""}
c.ExecutePreprocessor.timeout = 900
'''


def book_folder(given: Path | None = None) -> Path:
    """The book beside the package, or the one given.  Raises ValueError if its chapters are not there."""
    book = given or Path(dn_lib.__file__).resolve().parents[1] / "book"
    if not list(book.glob("notebooks/[0-9][0-9]_*.ipynb")):
        hint = "the package comes without them; name the folder `book` of a clone of the repository with --book"
        raise ValueError(f"there are no chapters in {book / 'notebooks'}: {hint}")
    return book


def points() -> dict[str, int]:
    """What each exercise is worth: two points for each of its stars, so that half of them is a whole number."""
    return {number: 2 * exercise.stars for number, exercise in all_exercises().items()}


def assignments(book: Path, only: str = "") -> list[Assignment]:
    """The chapters and studies of `book` whose names begin with `only`, with their solutions; ValueError for none."""
    pairs = book / "notebooks"
    names = [path.stem for kind in ("[0-9][0-9]", "S[0-9]") for path in sorted(pairs.glob(f"{kind}_*.ipynb"))]
    chosen = [name for name in names if name.startswith(only)]
    if not chosen:
        raise ValueError(f"--only must begin the name of a chapter ({', '.join(names)}), got {only!r}")
    worth = points()
    return [Assignment.of_book(book, name, worth) for name in chosen]


def check_folder(out: Path, mark: str) -> None:
    """Raises ValueError unless `out` is new, empty, or holds the file `mark`, as what was made here before does."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"the output must be a folder, {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / mark).exists():
        raise ValueError(f"{out} holds files that were not made by this command: give a new or an empty folder")


def build(out: Path, *, book: Path | None = None, only: str = "") -> list[Assignment]:
    """Write `source/`, the instructor's copies, and `release/`, the students', and nbgrader's settings into `out`."""
    made = assignments(book_folder(book), only)
    check_folder(out, MARK)
    for assignment in made:
        for folder, notebook in (("source", assignment.source), ("release", assignment.release())):
            place = out / folder / assignment.name
            place.mkdir(parents=True, exist_ok=True)
            nbformat.validate(notebook)
            nbformat.write(notebook, place / f"{assignment.name}.ipynb")
    (out / "nbgrader_config.py").write_text(CONFIG, "utf-8")
    worth = points()
    facts = {a.name: {number: worth[number] for number in a.tasks} for a in made}
    (out / MARK).write_text(json.dumps({"assignments": facts}, indent=1) + "\n", "utf-8")
    return made
