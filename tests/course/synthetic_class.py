"""A class on chapter 2: blank, right, mistaken and hostile submissions, and the verdicts that they have to get.

`python tests/course/synthetic_class.py FOLDER` writes it, grades it, and says how long that took and what is not as
expected; the suite does so with a part of it.  What a bad answer does not touch has to be right all the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dn_lib.course.build import assignments, book_folder
from dn_lib.course.notebooks import Assignment, id_of

NAME = "02_delta_rule"
NUMBERS = tuple(f"2.{n}" for n in range(1, 9))
TRACE = Path(tempfile.gettempdir()) / "dn_lib_class_was_here"  # what some try to write, and none may
SLEEPER = "import time; time.sleep(4321.5)"  # what some try to leave running


@dataclass
class Student:
    """A submission, and what has to be said of it.

    answers: exercise -> the text of its answer cell; those of other exercises are right, or blank (`base`).
    expected: exercise -> (status, words of the message); all others are `rest`.  For what depends on a bad answer
    before it, the status may be "any" or "not right".
    edit: what else is done to the notebook.  text: what is handed in instead of one.  remark: words of a remark.
    """

    answers: dict[str, str] = field(default_factory=dict)
    expected: dict[str, tuple[str, str]] = field(default_factory=dict)
    rest: str = "right"
    edit: Callable[[NotebookNode], None] = lambda notebook: None
    base: str = "solved"
    file: str = f"{NAME}.ipynb"
    text: str | None = None
    remark: str = ""

    def wanted(self, number: str) -> tuple[str, str]:
        return self.expected.get(number, (self.rest, ""))


def _write(body: str, *, before: str = "") -> str:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return f"{before}\ndef write(k, v, beta, state):\n{lines}\n"


# A right `write` of 2.1, for answers that do something else as well.
RIGHT = "return state + torch.outer(k, beta * (v - k @ state))"


# --- What is done to notebooks ------------------------------------------------------------------------------------
def _without(*starts: str) -> Callable[[NotebookNode], None]:
    def edit(notebook: NotebookNode) -> None:
        notebook.cells = [cell for cell in notebook.cells if not id_of(cell).startswith(starts)]

    return edit


def _edited_checks(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        if id_of(cell).startswith("check-"):
            cell.source = "print('✓ all is right')"


def _no_ids(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        cell.metadata.pop("nbgrader", None)


def _own_cells(notebook: NotebookNode) -> None:
    """A helper in a cell of the student's own, a magic and a cell that raises; the answer uses the helper."""
    at = next(i for i, cell in enumerate(notebook.cells) if id_of(cell) == "answer-2-1")
    texts = ("def correction(k, v, state):\n    return v - k @ state\n\n1 / 0", "%timeit 1 + 1\nx = undefined")
    notebook.cells[at:at] = [nbformat.v4.new_code_cell(text) for text in texts]


def _twice(notebook: NotebookNode) -> None:
    """Jupyter copies a cell with its id: here the copy is empty."""
    at = next(i for i, cell in enumerate(notebook.cells) if id_of(cell) == "answer-2-3")
    copied = nbformat.v4.new_code_cell("# what was I doing here?", metadata=notebook.cells[at].metadata)
    notebook.cells.insert(at + 1, copied)


# --- The class ----------------------------------------------------------------------------------------------------
BLANKS = {
    "blank": Student(base="blank", rest="not attempted"),
    "blank_in_other_words": Student(
        {"2.1": _write("raise NotImplementedError"), "2.2": "def sequence(q, k, v, beta, state):\n    pass\n"},
        base="blank",
        rest="not attempted",
    ),
    "nothing_handed_in": Student(text="", file="notes.txt", rest="missing"),
}
RIGHT_ONES = {
    "right": Student(),
    "right_with_own_cells": Student(
        {"2.1": _write("return state + torch.outer(k, beta * correction(k, v, state))")}, edit=_own_cells
    ),
    "right_without_ids": Student(edit=_no_ids, remark="found by its name"),
    "right_under_another_name": Student(edit=_twice, file="homework/my work (1).ipynb", remark="2 cells are marked"),
}
MISTAKEN = {
    "adds": Student(
        {"2.1": _write("return state + beta * torch.outer(k, v)")},
        {
            "2.1": ("misunderstanding", "That is linear attention's write"),
            "2.2": ("misunderstanding", ""),
            "2.5": ("misunderstanding", ""),
            "2.7": ("misunderstanding", ""),
        },
    ),
    "late": Student(
        {"2.1": _write("new = state + beta * torch.outer(k, v)\nreturn new - beta * torch.outer(k, k @ new)")},
        {"2.1": ("misunderstanding", "The error is taken after the write")}
        | dict.fromkeys(("2.2", "2.5", "2.7"), ("any", "")),
    ),
    "no_square": Student(
        {"2.3": "def exact_beta(k):\n    return 1 / k.norm()\n"}, {"2.3": ("misunderstanding", "You divided by |k|")}
    ),
    "reads_before": Student(
        {
            "2.2": "def sequence(q, k, v, beta, state):\n    out = []\n    for t in range(len(q)):\n"
            "        out.append(q[t] @ state)\n        state = write(k[t], v[t], beta[t], state)\n"
            "    return torch.stack(out), state\n"
        },
        {"2.2": ("misunderstanding", "You read before the write")},
    ),
    "writes_into_the_state": Student(
        {"2.1": _write("state += torch.outer(k, beta * (v - k @ state))\nreturn state")},
        {"2.1": ("method", "writes into its argument `state`")} | dict.fromkeys(("2.2", "2.5", "2.7"), ("any", "")),
    ),
    "forms_a_matrix": Student(
        {
            "2.1": _write(
                "H = torch.eye(len(k)) - beta * torch.outer(k, k)\nreturn H @ state + beta * torch.outer(k, v)"
            )
        },
        {"2.1": ("method", "d_k x d_k")} | dict.fromkeys(("2.2", "2.7"), ("any", "")),
    ),
    "weak_test": Student(
        {"2.4": "def is_delta_rule(step):\n    return True\n"}, {"2.4": ("misunderstanding", "accepts everything")}
    ),
    "raises": Student({"2.6": "def parity_states(bits):\n    return no_such_name\n"}, {"2.6": ("error", "NameError")}),
}
LEAVES = f"""
import subprocess, sys, os
for start in (True, False):
    try:
        subprocess.Popen([sys.executable, "-c", {SLEEPER!r}], start_new_session=start)
    except Exception:
        pass
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            import time
            time.sleep(4321.5)
        os._exit(0)
except OSError:
    pass
"""
TOUCHES = f"""
import os, pathlib, shutil, socket, sys
def attempt(what, *arguments):
    try:
        what(*arguments)
    except Exception:
        pass
attempt(pathlib.Path({str(TRACE)!r}).write_text, "here")
attempt(os.mkdir, {str(TRACE)!r})
attempt(lambda: torch.save(torch.zeros(1), {str(TRACE)!r}))
attempt(os.remove, {str(TRACE) + ".kept"!r})
attempt(os.truncate, {str(TRACE) + ".kept"!r}, 0)
attempt(os.kill, os.getppid(), 9)
attempt(socket.create_connection, ("127.0.0.1", 9), 1)
"""
FORGES = """
import os, json, struct
_head = json.dumps({"kind": "answer", "facts": None, "values": {"answer": True, "after": None}}).encode()
for _fd in range(3, 64):
    try:
        os.write(_fd, struct.pack("<QQ", len(_head), len(_head)) + _head)
        os.write(_fd, b"\\x80\\x05cos\\nsystem\\n" * 9)
    except OSError:
        pass
"""
FLOODS = """
import gc, socket
from dn_lib.course import wire
_frame = wire.pack("running", facts="x")
for _line in [x for x in gc.get_objects() if isinstance(x, socket.socket) and x.fileno() > 0]:
    while True:
        _line.sendall(_frame)
"""
READS = """
def write(k, v, beta, state):
    from dn_lib.teaching import all_exercises
    return all_exercises()["2.1"].reference(k, v, beta, state)
"""
AGREES = """
class Agreeable(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return True
def write(k, v, beta, state):
    return torch.zeros(3).as_subclass(Agreeable)
"""
PATCHES = """
import dn_lib.teaching.checks as _c
import dn_lib.teaching.judge.compare as _compare
_compare.agrees = _compare.same = lambda *a, **k: True
_c.evaluate = lambda *a, **k: _c.Verdict("right", "right")
torch.allclose = torch.equal = lambda *a, **k: True
check = evaluate = lambda *a, **k: print("right")
"""
LATE = "did not finish within 10 seconds"
LARGE = "took more than 2 GiB of memory"
HOSTILE = {
    "endless_loop": Student(
        {"2.8": "def gated_by_rescaling(*_):\n    while True:\n        pass\n"}, {"2.8": ("error", LATE)}
    ),
    "endless_cell": Student(
        {"2.7": "def gated_delta_rule(*_):\n    return 0\nwhile True:\n    pass\n"}, {"2.7": ("error", LATE)}
    ),
    "sleeps": Student({"2.3": "import time\ndef exact_beta(k):\n    time.sleep(10**6)\n"}, {"2.3": ("error", LATE)}),
    "stops_itself": Student(
        {"2.6": "import os\ndef parity_states(bits):\n    os.kill(os.getpid(), 19)\n"},
        {"2.6": ("error", "PermissionError")},
    ),
    "forks_without_end": Student(
        {"2.5": "import os\ndef sweeps_over(*_):\n    while True:\n        os.fork()\n"},
        {"2.5": ("error", "PermissionError")},
    ),
    "exits": Student(
        {"2.5": "import os\ndef sweeps_over(*_):\n    os._exit(0)\n"}, {"2.5": ("error", "ended the process")}
    ),
    "exits_at_once": Student(
        {"2.3": "import os\nexact_beta = 3\nos._exit(0)\n"}, {"2.3": ("error", "ended the process")}
    ),
    "prints_gigabytes": Student(
        {"2.8": "def gated_by_rescaling(*_):\n    while True:\n        print('x' * 10**6)\n"}, {"2.8": ("error", LATE)}
    ),
    "takes_gigabytes": Student(
        {"2.7": "def gated_delta_rule(*_):\n    x = []\n    while True:\n        x.append(torch.ones(10**7))\n"},
        {"2.7": ("error", LARGE)},
    ),
    "returns_terabytes": Student(
        {"2.1": _write("return torch.zeros(()).expand(10**6, 10**6)")},
        {"2.1": ("error", "too large")} | dict.fromkeys(("2.2", "2.5", "2.7"), ("not right", "")),
    ),
    "redefines_check": Student(
        {"2.1": _write("return 0 * state", before=PATCHES)},
        {"2.1": ("wrong", "")} | dict.fromkeys(("2.2", "2.4", "2.5", "2.7"), ("not right", "")),
        remark="redefines check",
    ),
    "edits_checks": Student(
        {"2.3": "def exact_beta(k):\n    return 7.0\n"},
        {"2.3": ("wrong", "")},
        edit=_edited_checks,
        remark="was edited",
    ),
    "deletes_cells": Student(
        expected={"2.6": ("not attempted", "no cell defines parity_states")},
        edit=_without("check-", "answer-2-6"),
        remark="was deleted",
    ),
    "no_json": Student(text='{"cells": [', rest="unreadable"),
    "leaves_processes": Student({"2.1": _write(RIGHT, before=LEAVES)}),
    "touches_files": Student({"2.1": _write(RIGHT, before=TOUCHES)}, {"2.1": ("any", "")}),
    "forges": Student(
        {"2.1": _write("return 0 * state", before=FORGES)},
        {"2.1": ("error", "")} | dict.fromkeys(NUMBERS[1:], ("not right", "")),
    ),
    "floods": Student({"2.8": FLOODS}, {"2.8": ("error", LATE)}),
    "reads_answers": Student(
        {"2.1": READS},
        {"2.1": ("error", "")} | dict.fromkeys(("2.2", "2.5", "2.7"), ("not right", "")),
        remark="",
    ),
    "agrees": Student(
        {"2.1": AGREES}, {"2.1": ("wrong", "")} | dict.fromkeys(("2.2", "2.5", "2.7"), ("not right", ""))
    ),
}
CLASS = BLANKS | RIGHT_ONES | MISTAKEN | HOSTILE


def hand_in(folder: Path, students: dict[str, Student], assignment: Assignment) -> None:
    """Write the submissions of `students` into `folder`."""
    solved, blank = assignment.source, assignment.release()
    for name, student in students.items():
        path = folder / name / student.file
        path.parent.mkdir(parents=True)
        if student.text is not None:
            path.write_text(student.text)
            continue
        notebook = nbformat.from_dict(json.loads(nbformat.writes(solved if student.base == "solved" else blank)))
        handed_out = {id_of(cell): cell.source for cell in blank.cells if id_of(cell).startswith("check-")}
        for cell in notebook.cells:
            number = id_of(cell).removeprefix("answer-").replace("-", ".")
            cell.source = handed_out.get(id_of(cell), student.answers.get(number, cell.source))
        student.edit(notebook)
        nbformat.write(notebook, path)


def wrong_verdicts(rows, students: dict[str, Student]) -> list[str]:
    """What is not as it has to be, a line for each verdict."""
    found = []
    for row in rows:
        status, words = students[row.student].wanted(row.exercise)
        if status == "any" or (status == "not right" and row.status != "right"):
            continue
        if row.status != status or words not in row.message:
            found.append(f"{row.student} {row.exercise}: {row.status}, not {status} with {words!r}: {row.message}")
    for name, student in students.items():
        remarks = [remark for row in rows if row.student == name for remark in row.remarks]
        if student.remark and not any(student.remark in remark for remark in remarks):
            found.append(f"{name}: no remark with {student.remark!r} in {remarks}")
    return found


def assignment_of_class() -> Assignment:
    (assignment,) = assignments(book_folder(), NAME)
    return assignment


if __name__ == "__main__":
    from dn_lib.course.grade import grade, summary

    place = Path(sys.argv[1])
    hand_in(place / "submitted", CLASS, assignment_of_class())
    start = time.monotonic()
    results = grade(place / "submitted", place / "graded", only=NAME, report=lambda text: print(text, flush=True))
    print(f"{len(CLASS)} students in {time.monotonic() - start:.0f} s: {summary(results)}")
    print("\n".join(wrong_verdicts(results, CLASS)) or "every verdict is the one that was expected")
