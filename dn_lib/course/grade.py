"""`python -m dn_lib course grade SUBMISSIONS --out OUT`: verdicts on a class, as tables and one picture.

A submission is data: its cells are cut out of the notebook and run in rooms (`dn_lib.course.room`), each answer in one
of its own.  What `check` would say is computed in another process, from the instructor's copy.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dn_lib.course.build import assignments, book_folder, check_folder, points
from dn_lib.course.notebooks import Assignment, NotebookError, Submission, id_of, read, submitted

MARK = "grading.json"
LARGEST = 20 << 20  # bytes of a notebook; the largest of the book with all its figures has one
STATUSES = ("right", "method", "misunderstanding", "wrong", "error", "not attempted", "unreadable", "missing")
SHARE = {"right": 1.0, "method": 0.5}  # of the points; the rest have none


@dataclass(frozen=True)
class Row:
    """A student's result in an exercise: the verdict's status and message, and remarks for the instructor."""

    student: str
    exercise: str
    status: str
    points: float
    of: int
    message: str
    remarks: tuple[str, ...] = ()

    @property
    def first_line(self) -> str:
        """What was said, without the mark, the number and the hint."""
        line = self.message.partition("\n")[0]
        return line.partition(f" {self.exercise} ")[2] or line


# --- What was handed in -------------------------------------------------------------------------------------------
def _notebooks(folder: Path) -> list[Path]:
    """The notebooks in a student's folder, as nbgrader or a student arranges them; links that lead out are left."""
    found = []
    for path in sorted(folder.rglob("*.ipynb")):
        inside = folder.resolve() in path.resolve().parents
        if path.is_file() and inside and ".ipynb_checkpoints" not in path.parts:
            found.append(path)
    return found


def _is_named(path: Path, assignment: Assignment) -> bool:
    return assignment.name in (path.stem, path.parent.name)


def _is_of(path: Path, notebook: Any, assignment: Assignment) -> bool:
    """Whether a notebook is an answer to `assignment`: by its name, or by the ids of its cells."""
    ids = {task.answer_id for task in assignment.tasks.values()}
    return _is_named(path, assignment) or any(id_of(cell) in ids for cell in notebook.cells)


def read_student(folder: Path, assignment: Assignment) -> tuple[str, Submission | str]:
    """("", the submission), or a status and the reason why there is none."""
    damaged = ""
    found: list[Submission] = []
    for path in _notebooks(folder):
        try:
            if path.stat().st_size > LARGEST:
                raise NotebookError(f"{path.name} has more than {LARGEST >> 20} MiB: hand it in without outputs")
            notebook = read(path)
        except (NotebookError, OSError) as error:
            of_another = re.match(r"\d\d_", path.stem) and not _is_named(path, assignment)
            damaged = damaged if of_another else str(error)
            continue
        if _is_of(path, notebook, assignment):
            found.append(submitted(notebook, assignment))
    if found:
        return "", max(found, key=lambda one: len(one.answers))
    if damaged:
        return "unreadable", damaged
    return "missing", "no notebook was handed in"


def handed_in(folders: Sequence[Path], assignment: Assignment) -> bool:
    """Whether any of `folders` has a notebook for `assignment`, or a damaged one under its name."""
    if any(_is_named(path, assignment) for folder in folders for path in _notebooks(folder)):
        return True
    return any(read_student(folder, assignment)[0] == "" for folder in folders)


# --- One student, in a process of its own -------------------------------------------------------------------------
class _Grader:
    """What a process keeps between students."""

    judge: Any = None
    given: tuple[Assignment, ...] = ()


def _prepare(given: tuple[Assignment, ...], seed: int, confined: bool, scratch: str) -> None:
    os.environ |= {"TMPDIR": scratch, "TRITON_CACHE_DIR": str(Path(scratch) / "triton"), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    tempfile.tempdir = None  # to be read anew
    torch.set_num_threads(1)
    from dn_lib.course.answers import Judge
    from dn_lib.course.rooms import Rooms

    rooms = Rooms(confined=confined, imports="\n".join(dict.fromkeys("\n".join(a.imports for a in given).split("\n"))))
    _Grader.judge, _Grader.given = Judge(rooms, seed=seed), given


def _grade_student(folder: Path) -> list[Row]:
    rows, worth = [], points()
    for assignment in _Grader.given:
        status, submission = read_student(folder, assignment)
        for number, task in assignment.tasks.items():
            if isinstance(submission, str):
                said = f"○ {number} {submission}."
                rows.append(Row(folder.name, number, status, 0.0, worth[number], said))
                continue
            verdict = _Grader.judge.judge(task, submission, assignment)
            share = SHARE.get(verdict.status, 0.0) * worth[number]
            remarks = tuple(submission.remarks.get(number, ()))
            rows.append(Row(folder.name, number, verdict.status, share, worth[number], verdict.message, remarks))
    return rows


def _ended(folder: Path, given: Sequence[Assignment]) -> list[Row]:
    """For a submission that took the judge's process with it, which is not meant to be possible."""
    said = "the process that judged it was ended: look at the notebook yourself"
    worth = points()
    return [Row(folder.name, n, "error", 0.0, worth[n], f"✗ {n} {said}.") for a in given for n in a.tasks]


# --- The class ----------------------------------------------------------------------------------------------------
def judge_class(
    folders: Sequence[Path],
    given: Sequence[Assignment],
    *,
    scratch: Path,
    seed: int = 1,
    confined: bool = True,
    workers: int = 2,
    report: Callable[[str], None] | None = None,
) -> list[Row]:
    """The results of all students in `folders`, in their order; `report` is told of each that is done."""
    done: dict[Path, list[Row]] = {}

    def run(some: Sequence[Path], workers: int) -> None:
        settings = (tuple(given), seed, confined, str(scratch))
        with ProcessPoolExecutor(workers, get_context("spawn"), _prepare, settings) as pool:
            jobs: dict[Future[list[Row]], Path] = {pool.submit(_grade_student, folder): folder for folder in some}
            try:
                for job in as_completed(jobs):
                    done[jobs[job]] = job.result()
                    if report is not None:
                        right = sum(row.status == "right" for row in done[jobs[job]])
                        report(f"[{len(done)}/{len(folders)}] {jobs[job].name}: {right} right")
            except BrokenProcessPool:
                return
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    run(folders, min(workers, len(folders)))
    for folder in folders:  # those that were left when a process ended; one at a time shows which of them did it
        if folder not in done:
            run([folder], 1)
            done.setdefault(folder, _ended(folder, given))
    return [row for folder in folders for row in done[folder]]


def grade(
    submissions: Path,
    out: Path,
    *,
    book: Path | None = None,
    only: str = "",
    seed: int = 1,
    confined: bool = True,
    workers: int = 2,
    report: Callable[[str], None] | None = None,
) -> list[Row]:
    """Grade `submissions` (a folder for each student), and write tables, a picture and feedback into `out`.

    only: how the names of the chapters begin that are graded; all for which anybody has handed in something if "".
    seed: of the inputs that answers are tried on.  confined: whether answers are kept from files and the network.
    Raises ValueError for folders that cannot be used, and where this machine cannot confine answers but should.
    """
    from dn_lib.course.rooms import can_confine

    if not submissions.is_dir():
        raise ValueError(f"{submissions} must be a folder that holds a folder for each student")
    check_folder(out, MARK)
    one, two = submissions.resolve(), out.resolve()
    if one == two or one in two.parents or two in one.parents:
        raise ValueError("--out must lie outside of the submissions, and they outside of it")
    if confined and not can_confine():
        raise ValueError(
            "this machine cannot keep submissions from its files (it needs Linux with Landlock, 5.13 or later): grade "
            "in a container or a virtual machine that holds nothing else, with --unconfined"
        )
    folders = sorted(path for path in submissions.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"{submissions} holds no folder of a student")
    given = assignments(book_folder(book), only)
    if not only:
        given = [assignment for assignment in given if handed_in(folders, assignment)] or given
    begun = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("{}\n", "utf-8")  # so that a run that is stopped can be begun again
    scratch = out / ".work"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        rows = judge_class(
            folders, given, scratch=scratch.resolve(), seed=seed, confined=confined, workers=workers, report=report
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write(rows, out)
    facts = {"seed": seed, "confined": confined, "assignments": [a.name for a in given], "students": len(folders)}
    facts["seconds"] = round(time.monotonic() - begun, 1)
    (out / MARK).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    return rows


# --- What is written ----------------------------------------------------------------------------------------------
def _cell(value: Any) -> Any:
    """A value of a table; text that a spreadsheet would take for a formula is quoted."""
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _write_table(path: Path, head: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerows([head, *([_cell(value) for value in line] for line in lines)])


def misunderstandings(rows: Sequence[Row]) -> list[tuple[str, str, list[str]]]:
    """(exercise, what was said, who), most frequent first, of answers whose mistake has a name."""
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.status in ("misunderstanding", "method"):
            found[row.exercise, row.first_line].append(row.student)
    return sorted(((n, said, who) for (n, said), who in found.items()), key=lambda entry: -len(entry[2]))


def write(rows: Sequence[Row], out: Path) -> None:
    """The tables `scores.csv`, `verdicts.csv` and `misunderstandings.csv`, the picture `stuck.png`, and `feedback/`."""
    from dn_lib.course.picture import draw

    students = list(dict.fromkeys(row.student for row in rows))
    exercises = list(dict.fromkeys(row.exercise for row in rows))
    table = {(row.student, row.exercise): row for row in rows}
    of = {row.exercise: row.of for row in rows}
    scores = [
        [student, *(table[student, n].points for n in exercises), sum(table[student, n].points for n in exercises)]
        for student in students
    ]
    head = ["student", *exercises, "total"]
    _write_table(out / "scores.csv", head, [*scores, ["(possible)", *of.values(), sum(of.values())]])
    columns = ("student", "exercise", "status", "points", "of", "message", "remarks")
    lines = [(r.student, r.exercise, r.status, r.points, r.of, r.message, "; ".join(r.remarks)) for r in rows]
    _write_table(out / "verdicts.csv", columns, lines)
    named = [(n, said, len(who), ", ".join(who)) for n, said, who in misunderstandings(rows)]
    _write_table(out / "misunderstandings.csv", ("exercise", "what was said", "students", "who"), named)
    folder = out / "feedback"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for student in students:
        said = [table[student, n] for n in exercises]
        text = "\n".join(f"{r.message}\n  {r.points:g} of {r.of} points\n" for r in said)
        (folder / f"{student}.txt").write_text(text, "utf-8", "backslashreplace")
    draw(rows, out / "stuck.png")


def summary(rows: Sequence[Row]) -> str:
    """One line for each status that occurs, and the exercise on which most are stuck."""
    counts = Counter(row.status for row in rows)
    stuck = Counter(row.exercise for row in rows if row.status in ("misunderstanding", "wrong", "error", "method"))
    said = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    if stuck:
        number, many = stuck.most_common(1)[0]
        said += f"; most are stuck on {number} ({many})"
    return said
