"""Notebooks of a course: the book's chapters with nbgrader's metadata, and what a student has written into one.

A chapter's cell with an exercise holds a blank function and its `check`.  Here it becomes two: an answer cell, which
students fill in, and a check cell, which is locked.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

try:
    import jupytext
    import nbformat
    from nbformat import NotebookNode
except ImportError as error:
    raise ImportError(f"a course needs {error.name}: pip install 'dn-lib[course]'") from None

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
HIDDEN, SHOWN = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"
CALL = re.compile(r'^check\("(?P<number>S?\d+\.\d+)", ?(?P<argument>.+)\)$', re.M)
KINDS = ("guarded", "launched")  # how an answer that is a kernel, or launches kernels, is handed to `check`


class NotebookError(ValueError):
    """A notebook that cannot be read, or is not what it should be."""


@dataclass(frozen=True)
class Task:
    """An exercise as it stands in a chapter: its number, the function to write, and how `check` is called.

    kind: "" for a function, "guarded" for a kernel, "launched" for a function that launches kernels.
    """

    number: str
    name: str
    blank: str
    call: str
    kind: str = ""

    @property
    def answer_id(self) -> str:
        return f"answer-{self.number.replace('.', '-')}"

    @property
    def check_id(self) -> str:
        return f"check-{self.number.replace('.', '-')}"


def task_of(source: str) -> Task | None:
    """The exercise in a cell, None if it has none.  Raises NotebookError if `check` gets anything but a name."""
    found = CALL.search(source)
    if found is None:
        return None
    call = ast.parse(found[0]).body[0]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    argument = call.value.args[1]
    kind = ""
    if isinstance(argument, ast.Call) and isinstance(argument.func, ast.Name) and argument.func.id in KINDS:
        kind, argument = argument.func.id, argument.args[-1]
    if not isinstance(argument, ast.Name):
        raise NotebookError(f"the cell of exercise {found['number']} has to call check(number, name)")
    return Task(found["number"], argument.id, source[: found.start()].strip("\n"), found[0], kind)


def read(path: Path) -> NotebookNode:
    """Raises NotebookError if `path` is no notebook."""
    try:
        notebook = nbformat.reads(path.read_text("utf-8"), as_version=4)
        for cell in notebook.cells:
            if not isinstance(cell.source, str) or not isinstance(cell.metadata, dict):
                raise ValueError("a cell without source")
    except Exception as error:  # nbformat raises what the damage happens to cause
        reason = " ".join(str(error).split())[:100]
        raise NotebookError(f"{path.name} is no notebook ({type(error).__name__}: {reason})") from None
    return notebook


# --- Building -----------------------------------------------------------------------------------------------------
def _parsed(source: str) -> list[ast.stmt]:
    """The statements of a cell; none of one that is no Python, once magics are set aside."""
    for text in (source, re.sub(r"(?m)^\s*[%!?].*$", "", source)):
        try:
            return ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return []


def bound(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def _used(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


SETTINGS = {"set_default_dtype", "manual_seed"}
NUMBERS = {"relative_error"}  # of what teaches, what an answer may use: the rest draws, or judges


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1:
            return False
        return ast.unparse(node.func) == "tl.constexpr" and _is_literal(node.args[0])
    return True


def definitions(source: str, *, settings: bool = False) -> list[str]:
    """What a cell defines: imports, functions, classes and plain constants, without what takes time or shows.

    settings: whether to keep calls that set the default dtype or a seed.  What teaches is left out.
    """
    kept = []
    for node in _parsed(source):
        keep = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
        if isinstance(node, ast.Assign):
            keep = _is_literal(node.value)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and settings:
            function = node.value.func
            keep = isinstance(function, ast.Attribute) and function.attr in SETTINGS
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dn_lib.teaching"):
            node.names = [alias for alias in node.names if alias.name in NUMBERS]
            keep = bool(node.names)
        if keep:
            kept.append(ast.unparse(node))
    return kept


def _solutions(page: Path) -> dict[str, tuple[str, str]]:
    """The solution of each exercise, as the name of its function and the text of its cell.

    Imports of the page that it needs come first; its `check` is left out.
    """
    found: dict[str, tuple[str, str]] = {}
    imports: list[tuple[str, str]] = []
    for cell in jupytext.read(page, fmt="md:myst").cells:
        if cell.cell_type != "code":
            continue
        imports += [line for node in _parsed(cell.source) for line in _imports(node)]
        if task := task_of(cell.source):
            used = _used(task.blank)
            needed = [line for name, line in imports if name in used]
            found[task.number] = task.name, "\n".join([*needed, *[""] * 2 * bool(needed), task.blank])
    return found


def _imports(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """Each name that a statement imports, and a statement that imports it alone."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            one = copy.copy(node)
            one.names = [alias]
            yield alias.asname or alias.name.partition(".")[0], ast.unparse(one)


def _graded(kind: str, grade_id: str, points: int = 0) -> dict[str, Any]:
    """nbgrader's metadata, in its third schema."""
    facts: dict[str, Any] = {"schema_version": 3, "grade_id": grade_id, "task": False, "cell_type": "code"}
    if kind == "check":
        facts |= {"grade": True, "locked": True, "solution": False, "points": points}
    else:
        facts |= {"grade": False, "locked": False, "solution": True}
    return {"nbgrader": facts}


def _wanted(task: Task) -> str:
    """What nbgrader's own grader runs beside `check`, which only prints: it has to raise."""
    argument = ast.unparse(ast.parse(task.call).body[0].value.args[1])  # pyright: ignore[reportAttributeAccessIssue]
    lines = (HIDDEN, "from dn_lib.teaching import evaluate as _judged", "")
    call = f'_verdict = _judged("{task.number}", {argument})'
    return "\n".join((*lines, call, 'assert _verdict.status == "right", _verdict.message', SHOWN))


@dataclass
class Assignment:
    """A chapter as an assignment: the instructor's copy, in `source`, and its exercises."""

    name: str
    source: NotebookNode
    tasks: dict[str, Task] = field(default_factory=dict)

    @classmethod
    def of_book(cls, book: Path, name: str, points: dict[str, int]) -> Assignment:
        """Chapter `name` of the folder `book`, with its solutions; `points` by exercise."""
        chapter = read(book / "notebooks" / f"{name}.ipynb")
        solutions = _solutions(book / "solutions" / f"{name}.md")
        made = cls(name, chapter)
        cells = []
        for cell in chapter.cells:
            if cell.cell_type != "code":
                cells.append(cell)
                continue
            cell |= {"outputs": [], "execution_count": None}
            cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
            task = task_of(cell.source)
            if task is None:
                cells.append(cell)
                continue
            if task.number not in solutions or task.number not in points:
                raise NotebookError(f"exercise {task.number} of {name} has no solution, or is in no registry")
            made.tasks[task.number] = task
            name_there, solution = solutions[task.number]
            alias = f"\n\n\n{task.name} = {name_there}" if name_there != task.name else ""
            # The blank stays above it, so that what is left without the solution is what students get.
            answer = f"{task.blank}\n\n\n{BEGIN}\n{solution}{alias}\n{END}"
            check = f"{task.call}\n{_wanted(task)}"
            cells.append(
                nbformat.v4.new_code_cell(answer, id=f"{cell.id}-answer", metadata=_graded("answer", task.answer_id))
            )
            metadata = _graded("check", task.check_id, points[task.number])
            cells.append(nbformat.v4.new_code_cell(check, id=f"{cell.id}-check", metadata=metadata))
        chapter.cells = cells
        return made

    def release(self) -> NotebookNode:
        """The students' copy: solutions are blanks again, hidden tests are gone."""
        notebook = copy.deepcopy(self.source)
        for cell in notebook.cells:
            for mark in (BEGIN, HIDDEN):
                if id_of(cell) and mark in cell.source:
                    cell.source = cell.source[: cell.source.index(mark)].rstrip("\n")
        return notebook

    @cached_property
    def chapter(self) -> list[tuple[str, str]]:
        """For each exercise in order: its number, and what the chapter has defined since the exercise before."""
        parts, collected = [], []
        numbers = {task.answer_id: number for number, task in self.tasks.items()}
        for cell in self.source.cells:
            if cell.cell_type != "code":
                continue
            if (grade_id := id_of(cell)) in numbers:
                parts.append((numbers[grade_id], "\n".join(collected)))
                collected = []
            elif not grade_id:
                collected += definitions(cell.source, settings=True)
        return parts

    def before(self, number: str) -> str:
        """What the chapter defines before exercise `number`."""
        collected = []
        for other, text in self.chapter:
            collected.append(text)
            if other == number:
                break
        return "\n".join(collected)

    @property
    def imports(self) -> str:
        """The chapter's import statements."""
        nodes = ast.parse("\n".join(text for _, text in self.chapter)).body
        return "\n".join(ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))


def id_of(cell: NotebookNode) -> str:
    """The `grade_id` of a cell, "" if it has none."""
    facts = cell.metadata.get("nbgrader")
    grade_id = facts.get("grade_id") if isinstance(facts, dict) else None
    return grade_id if isinstance(grade_id, str) else ""


# --- Reading a submission -----------------------------------------------------------------------------------------
@dataclass
class Submission:
    """What a student wrote: the source of the answer to each exercise, and definitions of their own before it.

    answers: number -> source, for the exercises that have one.  before: number -> (label, source) of cells to run
    first.  remarks: number -> what an instructor may want to know.
    """

    answers: dict[str, str] = field(default_factory=dict)
    before: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)


def _defines(source: str, name: str) -> bool:
    return any(name in bound(node) for node in _parsed(source))


def submitted(notebook: NotebookNode, assignment: Assignment) -> Submission:
    """The answers in `notebook`, found by their ids, or by the names that they define where ids are lost."""
    release = assignment.release()
    given = {cell.source.strip() for cell in release.cells}
    checks = {task.check_id: task for task in assignment.tasks.values()}
    handed_out = {id_of(cell): cell.source for cell in release.cells if id_of(cell)}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    own = [cell for cell in code if id_of(cell) not in checks]
    seen = [id_of(cell) for cell in code]

    found = Submission()
    places: dict[str, int] = {}
    for number, task in assignment.tasks.items():
        remarks = found.remarks.setdefault(number, [])
        by_id = [i for i, cell in enumerate(own) if id_of(cell) == task.answer_id]
        by_name = [i for i, cell in enumerate(own) if not id_of(cell) and _defines(cell.source, task.name)]
        chosen = [i for i in by_id if _defines(own[i].source, task.name)] or by_name or by_id
        if chosen:
            places[number] = chosen[-1]
            found.answers[number] = own[chosen[-1]].source
            if len(by_id) > 1:
                remarks.append(f"{len(by_id)} cells are marked as the answer: the last that defines {task.name} counts")
            if not by_id:
                remarks.append("found by its name: the answer cell is gone")
        if task.check_id in seen:
            source = code[seen.index(task.check_id)].source
            if source.strip() != handed_out[task.check_id].strip():
                remarks.append("the check cell was edited, which changes nothing")
        elif any(seen):
            remarks.append("the check cell was deleted, which changes nothing")
        if number in found.answers:
            remarks += _suspicious(found.answers[number])

    for number, place in places.items():
        cells: list[tuple[str, str]] = []
        for i, cell in enumerate(own[:place]):
            if i in places.values():
                other = next(n for n, p in places.items() if p == i)
                cells.append((f"answer to {other}", runnable(cell.source)))
            elif cell.source.strip() not in given and (lines := definitions(cell.source)):
                cells.append((f"own cell {i + 1}", "\n".join(lines)))
        found.before[number] = cells
    return found


def _suspicious(source: str) -> list[str]:
    """What an answer has no reason to do, by its text alone: for a person to look at, it decides nothing."""
    remarks = []
    for node in _parsed(source):
        for name in sorted(bound(node) & {"check", "evaluate", "guarded", "launched"}):
            remarks.append(f"redefines {name}, which changes nothing")
    if re.search(r"dn_lib\.teaching\.|\bsys\.modules\b|\bgc\.get_|\b__subclasses__\b", source):
        remarks.append("reaches for the judge")
    return remarks


def runnable(source: str) -> str:
    """`source` without the magics of a notebook."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.sub(r"(?m)^\s*[%!?].*$", "", source)
    return source
