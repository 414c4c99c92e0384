"""A class: the course that is built, and the verdicts that a part of the synthetic class gets."""

from __future__ import annotations

import ast
import contextlib
import csv
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))  # for the class, which is a program of its own as well
import synthetic_class as synthetic

from dn_lib.__main__ import app
from dn_lib.course import confine, wire
from dn_lib.course.answers import Judge, is_empty, is_unfinished
from dn_lib.course.build import assignments, book_folder, build, points
from dn_lib.course.grade import Row, misunderstandings, write
from dn_lib.course.kernel_text import KernelRefused, is_kernel, kernel_text
from dn_lib.course.notebooks import definitions, id_of, submitted, task_of
from dn_lib.course.rooms import Rooms, can_confine
from dn_lib.teaching import all_exercises
from dn_lib.teaching.exercises import ch5
from dn_lib.teaching.judge import limits
from tools.lowering import Book

BOOK = Book(book_folder())
LINUX = pytest.mark.skipif(not can_confine(), reason="submissions are confined by Landlock, which Linux alone has")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(*arguments) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def chapters():
    return {assignment.name: assignment for assignment in assignments(book_folder())}


# --- The course ---------------------------------------------------------------------------------------------------
def test_build_writes_both_copies(tmp_path):
    out = tmp_path / "course"
    assert run("course", "build", out, "--only", "02").exit_code == 0
    assert run("course", "build", out, "--only", "02").exit_code == 0  # again, into the same folder
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    notebook = "02_delta_rule/02_delta_rule.ipynb"
    assert names == {f"source/{notebook}", f"release/{notebook}", "nbgrader_config.py", "course.json"}
    assert json.loads((out / "course.json").read_text())["assignments"]["02_delta_rule"]["2.1"] == 2
    compile((out / "nbgrader_config.py").read_text(), "nbgrader_config.py", "exec")


def test_every_exercise_of_the_book_is_in_the_course(chapters):
    numbers = [number for assignment in chapters.values() for number in assignment.tasks]
    assert sorted(numbers) == sorted(all_exercises()) == sorted(points())


def test_the_students_copy_has_no_solution_and_locked_checks(chapters):
    for assignment in chapters.values():
        release = {id_of(cell): cell for cell in assignment.release().cells if id_of(cell)}
        source = {id_of(cell): cell for cell in assignment.source.cells if id_of(cell)}
        assert release.keys() == source.keys() and len(release) == 2 * len(assignment.tasks)
        for task in assignment.tasks.values():
            answer, check = release[task.answer_id], release[task.check_id]
            assert answer.source == task.blank and is_unfinished(answer.source, task.name)
            assert check.source == task.call
            assert check.metadata.nbgrader.locked and check.metadata.nbgrader.points == points()[task.number]
            assert "HIDDEN" not in str(release) and "SOLUTION" not in str(release)
            # What is graded is in the instructor's copy, and raises where `check` only prints.
            assert not is_unfinished(source[task.answer_id].source, task.name)
            assert any(isinstance(node, ast.Assert) for node in ast.parse(source[task.check_id].source).body)


def test_the_students_copy_is_the_chapter(chapters):
    """Cell by cell, but that an exercise's cell is cut in two."""
    for name, assignment in chapters.items():
        chapter = nbformat.read(book_folder() / "notebooks" / f"{name}.ipynb", 4)
        squeeze = lambda notebook: "".join("".join(cell.source.split()) for cell in notebook.cells)  # noqa: E731
        assert squeeze(assignment.release()) == squeeze(chapter)
        assert all(not cell.get("outputs") for cell in assignment.release().cells)
        nbformat.validate(assignment.release())


def test_nbgrader_takes_the_metadata(chapters, tmp_path):
    validator = pytest.importorskip("nbgrader.nbgraderformat", reason="nbgrader comes with the extra `course`")
    for assignment in chapters.values():
        validator.reads(nbformat.writes(assignment.source), as_version=4)


# --- What is found in a notebook ----------------------------------------------------------------------------------
def test_task_of_a_cell():
    task = task_of('def f(x):\n    ...\n\n\ncheck("2.1", f)')
    assert (task.number, task.name, task.blank, task.kind) == ("2.1", "f", "def f(x):\n    ...", "")
    kernel = task_of('@triton.jit\ndef f(x):\n    ...\n\n\ncheck("5.1", guarded("5.1", f))')
    assert (kernel.name, kernel.kind) == ("f", "guarded")
    assert task_of("x = 1") is None


@pytest.mark.parametrize(
    ("body", "empty", "unfinished"),
    [
        ('"""Text."""\n    ...', True, True),
        ("pass", True, True),
        ("return ...", True, True),
        ("y = x\n    ...", False, True),
        ("return 7", False, False),
        ("return x", False, False),
    ],
)
def test_blanks(body, empty, unfinished):
    source = f"def f(x):\n    {body}\n"
    assert (is_empty(source, "f"), is_unfinished(source, "f")) == (empty, unfinished)


def test_definitions_leave_out_what_takes_time_or_judges():
    source = "import torch\nfrom dn_lib.teaching import check, relative_error\nn = 3\nx = torch.randn(3)\n"
    source += "torch.set_default_dtype(torch.float64)\nfor i in range(9):\n    pass\ndef f():\n    return n"
    kept = definitions(source, settings=True)
    assert [line.split("\n")[0] for line in kept] == [
        "import torch",
        "from dn_lib.teaching import relative_error",
        "n = 3",
        "torch.set_default_dtype(torch.float64)",
        "def f():",
    ]
    assert definitions("%%bash\nls 'x") == [] and definitions("%matplotlib inline\nimport os") == ["import os"]


def test_answers_are_found_by_id_or_by_name(chapters, tmp_path):
    assignment = chapters["02_delta_rule"]
    students = {name: synthetic.CLASS[name] for name in ("right_without_ids", "deletes_cells", "edits_checks")}
    synthetic.hand_in(tmp_path, students, assignment)
    found = {
        name: submitted(nbformat.read(tmp_path / name / student.file, 4), assignment)
        for name, student in students.items()
    }
    assert found["right_without_ids"].answers.keys() == assignment.tasks.keys()
    assert found["deletes_cells"].answers.keys() == assignment.tasks.keys() - {"2.6"}
    assert "the check cell was edited, which changes nothing" in found["edits_checks"].remarks["2.1"]


# --- Numbers between processes ------------------------------------------------------------------------------------
def there_and_back(value):
    data = wire.pack("answer", value=value)
    size, head = wire.SIZES.unpack(data[:16])
    assert size == len(data) - 16
    return wire.unpack(head, data[16:])[2]["value"]


@pytest.mark.parametrize("dtype", wire.DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)], ids=str)
def test_tensors_arrive_bit_for_bit(dtype, shape):
    x = (100 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    for sent in (x, x.mT if x.dim() == 2 else x, x.conj()):
        back = there_and_back(sent)
        assert back.dtype == dtype and back.shape == sent.shape and torch.equal(back, sent)


def test_other_values_arrive_or_only_their_name_does():
    for value in (None, True, ..., -(2**70), 0.1, float("inf"), 1 + 2j, "text", (1, [2.0, (None,)]), ()):
        assert there_and_back(value) == value and type(there_and_back(value)) is type(value)
    assert np.array_equal(there_and_back(np.arange(6.0).reshape(2, 3)), np.arange(6.0).reshape(2, 3))

    class Agreeable(torch.Tensor):
        def __eq__(self, other):
            return True

    for value in (Agreeable(), {1: 2}, object(), print):
        assert isinstance(there_and_back(value), wire.Other) and type(value).__name__ in repr(there_and_back(value))


def test_what_is_too_large_is_not_sent():
    with pytest.raises(wire.WireError, match="too large"):
        wire.pack("answer", value=torch.zeros(()).expand(10**6, 10**6))
    nested = []
    nested.append(nested)
    with pytest.raises(wire.WireError, match="deep"):
        wire.pack("answer", value=nested)


@given(strategies.binary(max_size=60), strategies.integers(0, 80))
def test_bytes_that_are_no_frame_are_refused(body, head):
    with pytest.raises(wire.WireError):
        wire.unpack(head, body)


@pytest.mark.parametrize(
    "value",
    [
        '{"tensor": "float64", "shape": [1000000, 1000000]}',
        '{"tensor": "float64", "shape": [-1, -1]}',
        '{"tensor": "object", "shape": [1]}',
        '{"call": 0}',
        '{"pickle": "x"}',
        "[" * 5000 + "]" * 5000,
    ],
)
def test_frames_that_lie_are_refused(value):
    body = f'{{"kind": "answer", "facts": null, "values": {{"answer": {value}}}}}'.encode()
    with pytest.raises(wire.WireError):
        wire.unpack(len(body), body + struct.pack("<d", 1.0))


# --- Kernels ------------------------------------------------------------------------------------------------------
def kernels_of_chapter_5() -> list[tuple[str, str]]:
    """(name, text) of every kernel that the exercises of chapter 5 hold as text."""
    texts = [
        node.value for node in ast.walk(ast.parse(Path(ch5.__file__).read_text())) if isinstance(node, ast.Constant)
    ]
    found = []
    for text in texts:
        if isinstance(text, str) and "@triton.jit" in text:
            found += [(node.name, text) for node in ast.parse(text).body if is_kernel(node)]
    return found


def test_kernels_of_the_exercises_are_kernels():
    found = kernels_of_chapter_5()
    assert len(found) > 8
    for name, text in found:
        assert f"def {name}(" in kernel_text([text], name)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import os", "import os"),
        ("open('x', 'w')", "`open`"),
        ("__import__('os')", "`__import__`"),
        ("tl.core.os.system('x')", "tl.core"),
        ("triton.runtime.cache", "triton.runtime"),
        ("x_ptr.__class__", "__class__"),
        ("tl.load(x_ptr).handle.data.tofile('x')", "tofile"),
        ("[i for i in range(3)]", "for i in range"),
        ("(lambda: 1)()", "lambda"),
        ("tl = 3", "a variable `tl`"),
    ],
)
def test_what_is_no_kernel_is_refused(line, words):
    source = f"@triton.jit\ndef f(x_ptr, n, BLOCK: tl.constexpr):\n    {line}\n"
    with pytest.raises(KernelRefused, match=re.escape(words)):
        kernel_text([source], "f")


@pytest.mark.parametrize("head", ["def f(x=print('here')):", "def f(x: print('here')):", "def f(*x):"])
def test_the_head_of_a_kernel_runs_nothing(head):
    with pytest.raises(KernelRefused):
        kernel_text([f"@triton.jit\n{head}\n    pass\n"], "f")


def test_a_plain_function_is_no_kernel():
    with pytest.raises(KernelRefused, match="missing above it"):
        kernel_text(["def f(x):\n    pass\n"], "f")


# --- Verdicts -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rooms(chapters):
    if not can_confine():
        pytest.skip("submissions are confined by Landlock, which Linux alone has")
    with Rooms(imports="\n".join(assignment.imports for assignment in chapters.values())) as made:
        yield made


# Every exercise but most kernels, which are compiled as well: a few of them stand for the others.
@pytest.mark.parametrize("name", [page.stem for page in (*BOOK.chapters, *BOOK.studies)])
def test_the_instructors_copy_is_right(name, chapters, rooms):
    (assignment,) = (a for a in chapters.values() if a.name == name)
    judge, submission = Judge(rooms), submitted(assignment.source, assignment)
    chosen = ("5.1", "5.6", "5.13") if name == "05_triton_kernel" else assignment.tasks
    verdicts = {number: judge.judge(assignment.tasks[number], submission, assignment) for number in chosen}
    assert {number: v.message for number, v in verdicts.items() if v.status != "right"} == {}


def test_a_kernel_that_is_none_is_refused_and_a_wrong_one_is_judged(chapters, rooms):
    assignment = chapters["05_triton_kernel"]
    judge, submission = Judge(rooms), submitted(assignment.release(), assignment)
    task = assignment.tasks["5.1"]
    assert judge.judge(task, submission, assignment).status == "not attempted"
    submission.answers["5.1"] = task.blank.replace("...", "open('x', 'w')")
    assert "is no kernel: it may not use `open`" in judge.judge(task, submission, assignment).message
    body = "i = tl.arange(0, BLOCK)\n    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)"
    submission.answers["5.1"] = task.blank.replace("...", body)
    assert judge.judge(task, submission, assignment).status in ("misunderstanding", "wrong", "error")


SOLUTIONS = book_folder() / "solutions" / "02_delta_rule.md"
ATTEMPTS = {
    "write": lambda folder: (folder / "new").write_text("x"),
    "make a folder": lambda folder: (folder / "sub").mkdir(),
    "remove": lambda folder: (folder / "kept").unlink(),
    "empty": lambda folder: os.truncate(folder / "kept", 0),
    "rename": lambda folder: (folder / "kept").rename(folder / "other"),
    "link": lambda folder: os.link(folder / "kept", folder / "link"),
    "change permissions": lambda folder: (folder / "kept").chmod(0),
    "change times": lambda folder: os.utime(folder / "kept"),
    "read": lambda folder: (folder / "kept").read_text(),
    "list": lambda folder: list(folder.iterdir()),
    "read a solution": lambda folder: Path(ch5.__file__).read_text(),
    "read the book": lambda folder: SOLUTIONS.read_text(),
    "read what the judge knows": lambda folder: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
    "fork": lambda folder: os.fork(),
    "start a program": lambda folder: subprocess.run(["true"], check=False),
    "signal": lambda folder: os.kill(os.getppid(), 0),
    "limit another": lambda folder: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (10**6, 10**6)),
    "leave the group": lambda folder: os.setsid(),
    "open a socket": lambda folder: socket.socket(),
    "set the clock": lambda folder: time.clock_settime(time.CLOCK_REALTIME, time.time()),
}


@LINUX
def test_what_a_room_may_not_do(tmp_path):
    (tmp_path / "kept").write_text("kept")
    before = (tmp_path / "kept").stat()

    def confined(report):
        confine.confine(confine.readable())
        went = []
        for name, attempt in ATTEMPTS.items():
            try:
                attempt(tmp_path)
            except OSError:
                continue
            went.append(name)
        return went, (Path(wire.__file__).read_text() != "", torch.ones(3).sum().item())

    assert limits.run(confined).value == ([], (True, 3.0))
    after = (tmp_path / "kept").stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (before.st_mode, before.st_mtime_ns, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def running_with(mark: str) -> list[bytes]:
    """The command lines of all processes whose environment holds `mark`, but for this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                found.append((process / "cmdline").read_bytes())
    return found


@LINUX
def test_nothing_is_left_of_a_room_that_could_start_processes(tmp_path, monkeypatch):
    """Where rooms are not confined, what they start (in other sessions, too) ends with them."""
    code = synthetic.LEAVES + "\nf = len\n"
    facts = {"chapter": "", "name": "f", "launches": False, "cells": [["answer", code]]}
    monkeypatch.setenv("DN_LIB_CLASS", str(tmp_path))
    with Rooms(confined=False) as unconfined, unconfined.open() as room:
        room.ask("define", facts=facts)
        # The process that makes rooms and the room; root alone may add others to a room that is not confined.
        assert (len(running_with(str(tmp_path))) > 2) == (os.geteuid() == 0)
    assert running_with(str(tmp_path)) == []


PART = (
    *("blank", "right_with_own_cells", "right_under_another_name", "adds", "endless_loop", "exits_at_once"),
    *("takes_gigabytes", "redefines_check", "deletes_cells", "no_json", "leaves_processes"),
)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@LINUX
def test_a_class(tmp_path, chapters):
    """Every verdict is right, nothing is left running, and nothing changes but the output."""
    students = {name: synthetic.CLASS[name] for name in PART}
    kept = synthetic.TRACE.with_name(f"{synthetic.TRACE.name}.kept")
    kept.write_text("kept")
    synthetic.hand_in(tmp_path / "submitted", students, chapters["02_delta_rule"])
    before = contents(tmp_path)
    command = [sys.executable, "-m", "dn_lib", "course", "grade", "submitted", "--out", "graded"]
    environment = os.environ | {"DN_LIB_TRACEBACK": "1", "DN_LIB_CLASS": str(tmp_path)}
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert f"[{len(PART)}/{len(PART)}]" in done.stdout and "most are stuck on" in done.stdout
        after = contents(tmp_path)
        assert {path: data for path, data in after.items() if path in before} == before
        assert {path.relative_to(tmp_path).parts[0] for path in after.keys() - before.keys()} == {"graded"}
        assert not synthetic.TRACE.exists() and kept.read_text() == "kept"
    finally:
        kept.unlink()
    assert running_with(str(tmp_path)) == []

    out = tmp_path / "graded"
    written = {"scores.csv", "verdicts.csv", "misunderstandings.csv", "stuck.png", "feedback", "grading.json"}
    assert {path.name for path in out.iterdir()} == written
    with (out / "verdicts.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    rows = [
        Row(
            line["student"],
            line["exercise"],
            line["status"],
            0.0,
            0,
            line["message"],
            tuple(line["remarks"].split("; ")),
        )
        for line in table
    ]
    assert len(rows) == len(PART) * len(synthetic.NUMBERS)
    assert synthetic.wrong_verdicts(rows, students) == []
    with (out / "scores.csv").open(newline="") as file:
        scores = {line["student"]: line for line in csv.DictReader(file)}
    assert scores["right_with_own_cells"]["total"] == scores["(possible)"]["total"] and scores["blank"]["total"] == "0"
    assert "linear attention's write" in (out / "misunderstandings.csv").read_text()
    assert "2.1" in (out / "feedback" / "adds.txt").read_text()
    assert (out / "stuck.png").read_bytes().startswith(b"\x89PNG")


# --- Tables -------------------------------------------------------------------------------------------------------
def test_tables_hold_no_formulas_and_names_no_mathematics(tmp_path):
    rows = [
        Row("=cmd()", "2.1", "misunderstanding", 0.0, 2, "✗ 2.1 Nothing is erased.\n  Hint: x"),
        Row("$\\frac{", "2.1", "misunderstanding", 0.0, 2, "✗ 2.1 Nothing is erased.\n  Hint: x"),
        Row("b", "2.1", "method", 1.0, 2, "✗ 2.1 =1+1"),
    ]
    write(rows, tmp_path)
    assert "\n'=cmd()" in (tmp_path / "scores.csv").read_text()
    assert ",'=1+1" in (tmp_path / "misunderstandings.csv").read_text()
    assert misunderstandings(rows)[0] == ("2.1", "Nothing is erased.", ["=cmd()", "$\\frac{"])


# --- Command lines that cannot work -------------------------------------------------------------------------------
def test_errors_are_one_line(tmp_path):
    (tmp_path / "class" / "anna").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    assert "not made by this command" in error_of("course", "build", tmp_path / "mine")
    assert "--only must begin" in error_of("course", "build", tmp_path / "c", "--only", "9")
    assert "name the folder `book` of a clone" in error_of("course", "build", tmp_path / "c", "--book", tmp_path)
    assert "must be a folder" in error_of("course", "grade", tmp_path / "none", "--out", tmp_path / "o")
    assert "not made by this command" in error_of("course", "grade", tmp_path / "class", "--out", tmp_path / "mine")
    assert "no folder of a student" in error_of("course", "grade", tmp_path / "class" / "anna", "--out", tmp_path / "o")
    inside = error_of("course", "grade", tmp_path / "class", "--out", tmp_path / "class" / "o")
    assert "must lie outside" in inside
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "c").exists() and not (tmp_path / "o").exists()


def test_build_function_says_what_it_made(tmp_path):
    assert [assignment.name for assignment in build(tmp_path / "course", only="01")] == ["01_linear_attention"]
