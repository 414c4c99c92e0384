"""The judge of kernels: every kind of mistake is found, named in one line, and survived."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
import torch

from dn_lib.kernels import ladder
from dn_lib.teaching import evaluate, excerpts
from dn_lib.teaching.exercises import ch5
from dn_lib.teaching.judge import child as processes
from dn_lib.teaching.judge import kernels as kc
from dn_lib.teaching.judge import source as sources

tl, jit = ladder.tl, ladder.triton.jit  # imported by dn_lib, which switches the interpreter on

ADD = """
@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    y = tl.load(y_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x + y, mask=i < n)
"""
SQUARE = """
@triton.jit
def square(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x))
"""
HALF = tl.constexpr(0.5)


@jit
def helper(x):
    return x * HALF


@jit
def uses_helper(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, helper(tl.load(x_ptr + i, mask=i < n)), mask=i < n)


@jit
def blank(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Nothing yet."""
    ...


def vector_plan(n=100, programs=2, block=64):
    x = torch.arange(float(n))
    return sources.Plan((x, x, torch.empty(n), n), (2,), (programs,), {"BLOCK": block})


def square_plan(n, dtype=torch.float32):
    return sources.Plan((torch.ones(n, n, dtype=dtype), torch.empty(n, n)), (1,), (1,), {"N": n})


# --- the interpreter child


def test_a_right_kernel_has_no_findings():
    found = kc.interpret(ADD, vector_plan())
    assert torch.equal(found.outputs[0], 2 * torch.arange(100.0))
    assert not (found.outside or found.races or found.garbled or found.rounded or found.unwritten)


def test_outputs_are_poisoned():
    found = kc.interpret(ADD, vector_plan(programs=1))
    assert found.outputs[0][:64].isfinite().all() and found.outputs[0][64:].isnan().all()
    assert found.unwritten == ["out[64] was never written (36 such elements)"]


def test_a_nan_that_was_computed_is_not_called_unwritten():
    found = kc.interpret(ADD.replace("x + y", "x + y + float('nan')"), vector_plan())
    assert found.outputs[0].isnan().all() and found.unwritten == []


def test_a_forgotten_mask_is_named_by_index():
    found = kc.interpret(ADD.replace("x_ptr + i, mask=i < n, other=0.0", "x_ptr + i"), vector_plan())
    (line,) = found.outside
    assert found.outside_count == 28
    assert line.startswith("program (1, 0, 0) would load x[100], but x is [100] (28 such elements)")
    assert line.endswith("in `x = tl.load(x_ptr + i)`")


def test_a_far_access_would_end_the_interpreter_and_is_caught():
    found = kc.interpret(ADD.replace("tl.store(out_ptr + i", "tl.store(out_ptr + i + 1_000_000_000"), vector_plan())
    assert "would store out[" in found.outside[0]


def test_a_near_access_names_its_tensor():
    found = kc.interpret(ADD.replace("tl.store(out_ptr + i", "tl.store(out_ptr + i + 100"), vector_plan())
    assert "would store out[" in found.outside[0]


def test_races_are_reported():
    found = kc.interpret(ADD.replace("tl.program_id(0) * BLOCK", "tl.program_id(0) * 8"), vector_plan())
    assert found.races[0] == "programs 0 and 1: out[8] is stored by 0, and 1 stores it"


def test_dots_that_differ_on_a_gpu_are_reported():
    found = kc.interpret(SQUARE, square_plan(16, torch.bfloat16))
    assert found.outputs[0][0, 0] != 16 and "bit patterns" in found.garbled[0]
    found = kc.interpret(SQUARE, square_plan(16))
    assert found.outputs[0][0, 0] == 16 and "TF32" in found.rounded[0] and not found.garbled


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("x + y", "x + z", "NameError: name 'z' is not defined"),
        ("x + y", "tl.dot(x, y)", "in `"),
        ("tl.arange(0, BLOCK)", "tl.arange(0, BLOCK - 1)", "power of 2"),
        ("x + y", "x + tl.zeros([32], tl.float32)", "(an axis such as [:, None] may be missing)"),
        ("x + y", "x[3]", "a block has no indexing and no loop: mask it), in `tl.store(out_ptr + i, x[3]"),
        ("x + y", "torch.relu(x)", "a kernel sees its arguments, tl, tl.constexpr and other kernels by plain names"),
        ("tl.arange(0, BLOCK)", "tl.arange(0, n)", "add what varies to the block), in `i = tl.program_id(0)"),
        (
            "tl.load(x_ptr + i, mask=i < n, other=0.0)",
            "x_ptr[i]",
            "A pointer cannot be indexed: add the offsets to it and use tl.load, in `x_ptr[i]`",
        ),
    ],
)
def test_errors_come_back_in_one_line(old, new, message):
    with pytest.raises(processes.KernelError) as raised:
        kc.interpret(ADD.replace(old, new), vector_plan())
    assert "\n" not in str(raised.value)
    if message != "in `":
        assert message in str(raised.value)


def test_a_kernel_that_ends_its_process_is_survived():
    deadly = ADD.replace("    i = ", "    import os; os.kill(os.getpid(), 11)\n    i = ", 1)
    with pytest.raises(processes.KernelError, match=r"it ended the process that ran it \(SIGSEGV\)"):
        kc.interpret(deadly, vector_plan())
    assert kc.interpret(ADD, vector_plan()).outside == []  # a new child answers


def test_what_start_up_files_and_kernels_print_is_no_answer(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('hello ' * 100, flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    child = processes.Child(interpret=True)
    talkative = ADD.replace("    i = ", "    print('hello')\n    i = ", 1)
    try:
        request = ("interpret", sources.kernel_source(talkative), "add", vector_plan())
        assert child.ask(*request).outside == []
    finally:
        child.stop()


def test_a_kernel_that_never_ends_is_stopped():
    endless = ADD.replace("    i = ", "    while n > 0:\n        n = n + 0\n    i = ", 1)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(processes.KernelError, match="it did not finish within 5 seconds"):
        processes.child(True).ask("interpret", sources.kernel_source(endless), "add", vector_plan(), seconds=5)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30  # of processor time, with its start
    assert kc.interpret(ADD, vector_plan()).outside == []


def test_a_kernel_that_sleeps_is_stopped():
    sleeping = "import time\n\n\n" + ADD.replace("    i = ", "    time.sleep(600)\n    i = ", 1).lstrip()
    kc.interpret(ADD, vector_plan())  # the child has begun
    request = ("interpret", sources.kernel_source(sleeping), "add", vector_plan())
    with pytest.raises(processes.KernelError, match="it did not finish within 1 seconds"):
        processes.child(True).ask(*request, seconds=1)
    assert kc.interpret(ADD, vector_plan()).outside == []


def test_a_kernel_that_waits_for_a_processor_is_not_stopped():
    """The limit is one of processor time: on a busy machine a right answer takes longer, and stays right."""
    kc.interpret(ADD, vector_plan())
    process = processes.child(True).process
    process.send_signal(signal.SIGSTOP)
    waking = threading.Timer(4, process.send_signal, [signal.SIGCONT])
    waking.start()
    try:
        found = processes.child(True).ask("interpret", sources.kernel_source(ADD), "add", vector_plan(), seconds=2)
    finally:
        waking.join()
    assert found.outside == [] and processes.child(True).process is process


# --- kernels as text


def test_a_kernel_travels_with_what_it_uses():
    source = sources.kernel_source(uses_helper)
    assert "from test_kernel_check import uses_helper" in source or "from tests.test_kernel_check" in source


def test_a_kernel_of_a_notebook_travels_as_text():
    """There `__module__` is `__main__`, which a child cannot import."""
    for kernel in (helper, uses_helper):
        kernel.fn.__module__ = "__main__"
    try:
        source = sources.kernel_source(uses_helper)
        x = torch.arange(4.0)
        found = kc.interpret(uses_helper, sources.Plan((x, torch.empty(4), 4), (1,), (1,), {"BLOCK": 16}))
    finally:
        for kernel in (helper, uses_helper):
            kernel.fn.__module__ = __name__
    assert "HALF = tl.constexpr(0.5)" in source and source.index("def helper") < source.index("def uses_helper")
    assert torch.equal(found.outputs[0], x / 2)


def test_blanks_are_recognised():
    assert sources.is_blank(blank) and sources.is_blank(ADD[: ADD.index(":\n    i")] + ":\n    ...\n")
    assert not sources.is_blank(uses_helper) and not sources.is_blank(ADD)
    assert sources.kernel_name(ADD) == "add" and sources.kernel_name(blank) == "blank"


def test_excerpt_resolves_flags():
    source = excerpts.excerpt(ladder.state_kernel, "for start", "S += ")
    assert source.startswith("for start in range(0, L, C):") and source.splitlines()[-1].strip().startswith("S += ")
    with pytest.raises(ValueError, match="state_kernel has no lines from 'nothing' to 'here'"):
        excerpts.excerpt(ladder.state_kernel, "nothing", "here")
    lines = ["if A:", "    x", "    if not B:", "        y", "    else:", "        z", "w"]
    assert excerpts.resolve(lines, {"A": True, "B": True}) == ["x", "z", "w"]
    assert excerpts.resolve(lines, {"A": True, "B": False}) == ["x", "y", "w"]
    assert excerpts.resolve(lines, {"A": False}) == ["w"]
    assert excerpts.resolve(lines, {}) == lines


def test_agreement_marks_what_is_not_near():
    table = excerpts.agreement({"near": (torch.ones(2), 1e-3), "far": (torch.zeros(2), 1e-3)}, torch.ones(2))
    assert [line[-1] for line in table.splitlines()] == ["✓", "✗"]


def test_exercises_and_the_judge_load_without_triton():
    """The registry of all chapters must work where Triton cannot be installed."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import dn_lib\n"
        "from dn_lib.teaching import all_equations, all_exercises\n"
        "from dn_lib.teaching import excerpts\n"
        "from dn_lib.teaching.judge import kernels\n"
        "assert '5.1' in all_exercises() and 'eq-roofline' in all_equations()\n"
        "excerpts.require_triton()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ImportError: chapter 5 needs Triton")


def test_without_triton_one_line_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install triton") as raised:
        excerpts.require_triton()
    assert "\n" not in str(raised.value)


# --- ahead of time


def test_hardware_refuses_small_dots_that_the_interpreter_takes():
    found = kc.interpret(SQUARE, square_plan(8, torch.float16))
    assert found.outputs[0][0, 0] == 8 and "K >= 16" in found.small[0]
    with pytest.raises(processes.KernelError, match=r"does not compile for sm_90: .*K >= 16"):
        kc.compile_ahead(SQUARE, square_plan(8, torch.float16))
    assert kc.compile_ahead(SQUARE, square_plan(16, torch.float16))["shared"] > 0


def test_a_kernel_that_returns_something_is_asked_about_it():
    with pytest.raises(processes.KernelError, match="does it return something"):
        kc.compile_ahead(ADD + "    return x\n", vector_plan())


def test_a_compilation_error_names_the_line():
    with pytest.raises(processes.KernelError, match="does not compile") as raised:
        kc.compile_ahead(ADD.replace("x + y", "x + undefined"), vector_plan())
    assert "undefined" in str(raised.value) and "\n" not in str(raised.value)


# --- guard bands


def helper_plan(n=4):
    return sources.Plan((torch.arange(4.0), torch.empty(4), n), (1,), (1,), {"BLOCK": 16})


def guard_bands(device):
    assert torch.equal(kc.run_banded(uses_helper, helper_plan(), device)[0], torch.arange(4.0) / 2)
    with pytest.raises(processes.KernelError, match=f"on {device} it wrote outside of argument 1, at element 4"):
        kc.run_banded(uses_helper, helper_plan(n=5), device)


@pytest.mark.skipif(not ladder.interpreted(), reason="kernels are compiled here")
def test_guard_bands_catch_a_stray_write():
    guard_bands("cpu")


@pytest.mark.gpu
def test_guard_bands_catch_a_stray_write_on_a_gpu():
    guard_bands("cuda")


# --- through `check`


def test_a_chunk_kernel_without_a_dot_is_told():
    pair = ('tl.dot(q, tl.trans(k), input_precision="ieee")', "tl.sum(q[:, None, :] * k[None, :, :], axis=2)")
    message = evaluate("5.5", kc.guarded("5.5", ch5.exchange(ch5.SCORES, pair))).message
    assert "there is no tl.dot" in message


ANSWERS = {
    "5.1": ch5.COPY,
    "5.2": ch5.SCALE_ROWS,
    "5.3": ch5.HEADS_FIRST,
    "5.4": ch5.RUNNING_SUM,
    "5.5": ch5.SCORES,
    "5.7": ch5.RETENTION,
    "5.8": ch5.JOIN,
    "5.9": ch5.ERRORS,
    "5.11": ch5.ALL_INVERSES,
    "5.12": ch5.SCAN,
    "5.14": ch5.VALUE_GRADIENT,
    "5.15": ch5.DECODE,
}


@pytest.mark.parametrize("number", ANSWERS)
def test_answers_are_right_and_blanks_not_attempted(number):
    source = ANSWERS[number]
    assert evaluate(number, kc.guarded(number, source)).status == "right"
    signature = source[: source.index("):\n") + 3]
    assert evaluate(number, kc.guarded(number, signature + "    ...\n")).status == "not attempted"


def test_an_unknown_mistake_is_an_error_of_one_line():
    wrong = ch5.exchange(ch5.SCALE_ROWS, ("tl.store(out_ptr + at", "tl.store(out_ptr + at + 3"))
    verdict = evaluate("5.2", kc.guarded("5.2", wrong))
    assert verdict.status == "error" and "would store out[" in verdict.message and "\n" not in verdict.message


def test_an_output_that_is_never_written_is_named():
    lines = [line for line in ch5.RETENTION.splitlines(keepends=True) if "tl.store(state_ptr" not in line]
    verdict = evaluate("5.7", kc.guarded("5.7", "".join(lines)))
    assert verdict.status == "error" and verdict.message.endswith("KernelError: state was never written")


def test_wrong_numbers_are_shown_with_their_index():
    wrong = ch5.exchange(ch5.SCALE_ROWS, ("s[:, None] * x", "s[:, None] * x + 1"))
    verdict = evaluate("5.2", kc.guarded("5.2", wrong))
    assert verdict.status == "wrong" and "out first differs at index [0, 0]" in verdict.message


def test_wrong_counts_are_shown_in_full():
    verdict = evaluate("5.6", lambda *shape: 1_900_544)
    assert verdict.status == "wrong" and "you have 1,900,544, expected " in verdict.message
    assert "e+" not in verdict.message


def test_masked_loads_without_other_bring_nan():
    """The interpreter would bring zeros; a GPU brings what it likes."""
    open_load = ADD.replace("y_ptr + i, mask=i < n, other=0.0", "y_ptr + i, mask=i < n")
    found = kc.interpret(open_load, vector_plan())  # stored under the same mask: harmless
    assert torch.equal(found.outputs[0], 2 * torch.arange(100.0)) and "in `y = tl.load(" in found.undefined[0]
    used = ch5.exchange(
        ch5.SCALE_ROWS,
        ("mask=inside, other=0.0)", "mask=inside)"),
        ("s[:, None] * x", "s[:, None] * x + 0 * tl.sum(x, 1)[:, None]"),
    )
    verdict = evaluate("5.2", kc.guarded("5.2", used))
    assert "a masked load without `other` leaves elements undefined on a GPU, in `x = tl.load(" in verdict.message


def test_an_input_that_is_stored_into_is_named():
    spoils = ch5.exchange(
        ch5.SCALE_ROWS,
        ("    tl.store(out_ptr", "    tl.store(x_ptr + at, x, mask=inside)\n    tl.store(out_ptr"),
    )
    assert evaluate("5.2", kc.guarded("5.2", spoils)).message.endswith("KernelError: it stores into its input x")


def test_a_kernel_has_limits_of_memory():
    greedy = ADD.replace("    i = ", "    held = [bytearray(1 << 27) for _ in range(100)]\n    i = ", 1)
    with pytest.raises(processes.KernelError, match="it took more than 2 GiB of memory"):
        kc.interpret(greedy, vector_plan())


def test_what_is_no_kernel_and_a_kernel_that_is_handed_over_bare_are_named():
    with pytest.raises(TypeError, match=r"is `@triton\.jit` missing above it"):
        kc.guarded("5.2", lambda x: x)
    with pytest.raises(TypeError, match=r'check\("5.2", guarded\("5.2", kernel\)\)'):
        evaluate("5.2", uses_helper)


def test_an_exercise_without_a_kernel_is_refused():
    with pytest.raises(KeyError, match=r"number must be one of .*'5.1'.*, got '5.6'"):
        kc.guarded("5.6", ADD)
