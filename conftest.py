"""Settings for every test, doctest and notebook of the suite."""

import collections
import importlib.util
import os
import signal

from tools.isolation import PATIENCE, isolate

isolate()  # before anything reads personal settings; kernels of notebooks find dn_lib also where it is not installed

import matplotlib  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from dn_lib.kernels.interpreter import INTERPRETS  # noqa: E402 - tests define kernels: interpreted without a GPU

# `nohup` and shells' background jobs ignore signals, and what a test starts inherits that, but for its own handlers.
for name in ("SIGHUP", "SIGINT", "SIGQUIT"):
    number = getattr(signal, name, None)
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

INTERPRET = os.environ.get("TRITON_INTERPRET")  # as the user has set it
# The files whose tests take longest, by far. `make test` hands out whole files, in order, to two processes: begun
# last, one of these would keep a single process busy when all else is done.
DEAREST = (
    "tests/book/test_pages.py",
    "tests/kernels/test_aot.py",
    "tests/test_operators.py",
    "tests/course/test_course.py",
    "tests/book/test_site.py",
    "tests/experiments/test_smoke.py",
    "tests/training/test_training.py",
    "book/notebooks/06_training.ipynb",
    "book/notebooks/02_delta_rule.ipynb",
    "tests/book/test_isolation.py",
    "tests/teaching/test_exercises.py",
)
matplotlib.use("agg")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism

# Compiles for GPUs that are not there, and so turns the interpreter off for its process when imported; it has tests
# of its own, in a process of their own.
collect_ignore_glob = ["dn_lib/kernels/aot.py", "dn_lib/kernels/gla/aot.py", "dn_lib/kernels/hopper/aot.py"]
if INTERPRETS:
    # Gluon has no interpreter.
    collect_ignore_glob += ["dn_lib/kernels/hopper/*.py"]
if importlib.util.find_spec("transformers") is None:
    # The extra `hf`: without it the wrapper cannot be imported, and its tests are skipped by name.
    collect_ignore_glob += ["dn_lib/models/hf.py"]
if importlib.util.find_spec("triton") is None:
    # Without Triton the rest of the suite still runs; chapter 5 says itself what is missing.
    collect_ignore_glob += ["dn_lib/kernels/*.py", "book/notebooks/05_*.ipynb"]

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    # Times vary between machines, so there is no deadline; the same examples every time, so no surprises.
    settings.register_profile("book", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("book")


def pytest_configure(config):
    if hasattr(config.option, "nbval_kernel_startup_timeout"):
        config.option.nbval_kernel_startup_timeout = PATIENCE


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") != INTERPRET:
        raise pytest.UsageError("importing a test module has changed TRITON_INTERPRET, for every test after it")
    rank = {name: place for place, name in enumerate(DEAREST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
    for item in items:
        if hasattr(item, "output_timeout"):  # nbval's, of 5 seconds
            item.output_timeout = PATIENCE
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU (make gpu)")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def part_of(nodeid):
    """The part of the suite that a test belongs to: a folder of `tests`, the notebooks, or doctests by their package.

    >>> part_of("tests/book/test_site.py::test_a"), part_of("dn_lib/ops/delta.py::dn_lib.ops.delta")
    ('tests/book', 'doctests')
    """
    folders = nodeid.partition("::")[0].split("/")[:-1]
    return "/".join(folders[:2]) if folders[:1] in (["tests"], ["book"]) else "doctests"


def pytest_terminal_summary(terminalreporter):
    """A line for each part: how many tests it has and how long they took, all processes together."""
    seconds, tests = collections.Counter(), collections.defaultdict(set)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if hasattr(report, "duration") and hasattr(report, "nodeid"):
            seconds[part_of(report.nodeid)] += report.duration
            tests[part_of(report.nodeid)].add(report.nodeid)
    if len(seconds) > 1:
        terminalreporter.section("seconds of each part")
        for part, total in seconds.most_common():
            terminalreporter.line(f"{total:7.0f} s  {len(tests[part]):6,} tests  {part}")
