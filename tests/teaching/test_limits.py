"""Learner's code under limits: whatever it does ends in a message, and this process goes on."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from dn_lib.teaching import Candidate, Exercise, Mutant, evaluate
from dn_lib.teaching.judge import limits
from tools.notebooks import execute

pytestmark = pytest.mark.skipif(not limits.FORKS, reason="limits need a process that can be forked")

DOUBLE = Exercise(
    number="9.1",
    title="Double",
    stars=1,
    minutes=1,
    sample=lambda generator: (torch.randn(3, generator=generator, dtype=torch.float64),),
    reference=lambda x: 2 * x,
    tested="8 vectors",
    mutants=(Mutant(lambda x: x, "You did nothing.", "Twice."),),
)
TEST = Exercise(
    number="9.2",
    title="A test",
    stars=1,
    minutes=1,
    sample=lambda generator: (),
    reference=lambda implementation: implementation(2) == 4,
    tested="3 implementations",
    mutants=(),
    candidates=(
        Candidate(lambda x: x * x, "the square", "2 + 2 is 4 as well.", right=True),
        Candidate(lambda x: x * x * x, "the cube", "Try a number larger than 1."),
        Candidate(lambda x: x + x, "the double", "Try a number that is not 2."),
    ),
)
OURS = {"9.1": DOUBLE, "9.2": TEST}


def endless(x):
    for _ in itertools.count():
        pass


def swallows_everything(x):
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            continue


def prints_for_ever(x):
    while True:
        print("x" * 1000)


def takes_a_list(x):
    held = []
    while True:
        held.append(bytearray(1 << 26))


def starts_another(x):
    if not os.fork():
        time.sleep(60)
    return 2 * x


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (endless, "did not finish within 1 seconds.\n  Hint: Is there a loop that never ends?"),
        (lambda x: time.sleep(60), "did not finish within 1 seconds"),
        (swallows_everything, "did not finish within 1 seconds"),
        (prints_for_ever, "did not finish within 1 seconds"),
        (lambda x: os._exit(0), "ended the process that ran it (exit code 0)"),
        (lambda x: os.kill(os.getpid(), signal.SIGSEGV), "ended the process that ran it (SIGSEGV)"),
        (lambda x: os.abort(), "ended the process that ran it (SIGABRT)"),
        (takes_a_list, "took more than 2 GiB of memory"),
        (lambda x: torch.ones(1 << 40), "took more than 2 GiB of memory"),
        (lambda x: np.ones(1 << 40), "took more than 2 GiB of memory"),
        (lambda x: input("?"), "nobody can answer"),
        (lambda x: breakpoint(), "nobody can answer"),
        (lambda x: sys.exit(2), "raised SystemExit"),
    ],
)
def test_no_answer_takes_this_process_with_it(answer, says):
    begun = time.monotonic()
    seconds = 5 if "memory" in says else 1  # it takes a while to fill
    verdict = evaluate("9.1", answer, exercises=OURS, seconds=seconds)
    assert verdict.status == "error" and says in verdict.message
    assert len(verdict.printed) <= limits.PRINTED
    assert time.monotonic() - begun < 60
    assert evaluate("9.1", lambda x: x + x, exercises=OURS).status == "right"


def test_the_limit_of_every_exercise_is_below_fifteen_seconds():
    from dn_lib.teaching.judge import child

    assert limits.SECONDS + 2 < 15 and child.SECONDS + 2 < 15


def test_what_an_answer_starts_ends_with_it():
    assert evaluate("9.1", starts_another, exercises=OURS).status == "right"


def test_an_answer_changes_nothing_here():
    held: list[int] = []
    torch.manual_seed(0)
    before = torch.get_rng_state()

    def meddles(x):
        held.append(1)
        torch.manual_seed(7)
        torch.set_default_dtype(torch.float16)
        os.environ["MEDDLED"] = "1"
        return 2 * x

    assert evaluate("9.1", meddles, exercises=OURS).status == "right"
    assert not held and "MEDDLED" not in os.environ and torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_work_in_the_copy_after_they_were_used_here():
    def by_gradient(x):
        y = x.clone().requires_grad_()
        (y * y).sum().backward()
        return y.grad

    by_gradient(torch.ones(3))
    assert evaluate("9.1", by_gradient, exercises=OURS).status == "right"


def test_time_spent_waiting_for_a_processor_is_not_counted():
    """The limit is one of work and sleep: on a busy machine a right answer takes longer, and stays right."""

    def stops_itself(report):
        threading.Thread(target=lambda: None).start()
        parent = os.getpid()
        if not os.fork():
            time.sleep(3)
            os.kill(parent, signal.SIGCONT)
            os._exit(0)
        os.kill(parent, signal.SIGSTOP)
        return "done"

    assert limits.run(stops_itself, seconds=1).value == "done"


def test_an_error_of_the_judge_is_not_blamed_on_the_answer():
    with pytest.raises(RuntimeError, match="the judge itself failed"):
        limits.run(lambda report: 1 / 0)


def test_without_a_fork_python_s_own_loops_still_end():
    """As on Windows and macOS: a limit of time, in this process."""
    late = limits.run(lambda report: endless(0), seconds=1, fork=False)
    assert late.ended == "did not finish within 1 seconds"
    assert limits.run(lambda report: report() or 3, fork=False) == limits.Outcome(3, "", "", 1)


# --- Tests as answers


def test_each_bug_that_gets_through_has_a_line():
    message = evaluate("9.2", lambda implementation: implementation(2) == 4, exercises=OURS).message
    assert message == "✗ 9.2 Your test lets 1 of 2 bugs through:\n  - gets through: the double\n  Hint: " + (
        "Try a number that is not 2."
    )
    message = evaluate("9.2", lambda implementation: implementation(2) == 8, exercises=OURS).message
    assert "lets 1 of 2 bugs through and rejects 1 of 1 right implementations" in message
    assert "\n  - gets through: the cube\n  - rejected though right: the square\n" in message
    assert evaluate("9.2", lambda implementation: implementation(3) == 9, exercises=OURS).status == "right"


def test_a_test_cannot_go_by_names_or_by_the_number_of_its_calls():
    calls = itertools.count()
    by_count = [evaluate("9.2", lambda _: next(calls) == 0, exercises=OURS).status for _ in range(20)]
    assert "misunderstanding" in by_count  # right for one order in three
    names: set[str] = set()

    def by_name(implementation):
        names.add(implementation.__name__)
        return len(names) > 1

    assert "rejects everything" in evaluate("9.2", by_name, exercises=OURS).message


def test_a_test_has_a_budget_of_time():
    verdict = evaluate("9.2", lambda implementation: time.sleep(0.7) or True, exercises=OURS, seconds=0.1)
    assert "your test did not finish within 0 seconds: 1 of 3 implementations were tested by then" in verdict.message


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda implementation: torch.ones(3) > 0, "asked for is True or False: are all of them right?"),
        (lambda implementation: "yes", "your test returns 'yes', asked for is True or False"),
        (lambda implementation: print("yes"), "your test returns None: it ends without a `return`"),
        (lambda implementation: implementation(1, 2, 3), "raised TypeError"),
    ],
)
def test_a_test_that_says_neither_true_nor_false_is_told_so(answer, says):
    assert says in evaluate("9.2", answer, exercises=OURS).message


def test_a_truth_of_another_kind_is_a_truth():
    for kind in (bool, np.bool_, torch.tensor, lambda x: torch.tensor([x]), int):
        verdict = evaluate("9.2", lambda implementation, kind=kind: kind(implementation(3) == 9), exercises=OURS)
        assert verdict.status == "right"


# --- In a notebook

CELLS = (
    "import os\nimport torch\nfrom dn_lib.teaching import evaluate\nheld = torch.ones(300, 300) @ torch.ones(300, 300)",
    "def endless(k):\n    print('here')\n    while True:\n        pass",
    "verdict = evaluate('2.3', endless, seconds=1)\nprint(verdict.message, verdict.printed)",
    "print(evaluate('2.3', lambda k: os._exit(0)).message)",
    "print(evaluate('2.3', lambda k: torch.ones(1 << 40)).message)",
    "print(evaluate('2.3', lambda k: 1 / (k @ k) + 0 * (held @ held).sum().double()).message)",
)


def test_the_notebook_lives():
    """In the process of a Jupyter kernel, which has threads and sockets of its own."""
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    execute(page, Path(__file__).parents[2] / "book")
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in page.cells]
    assert said[2].startswith("✗ 2.3 your function did not finish within 1 seconds") and "here\n" in said[2]
    assert "ended the process that ran it (exit code 0)" in said[3]
    assert "took more than 2 GiB of memory" in said[4]
    assert said[5].startswith("✓ 2.3 ")
