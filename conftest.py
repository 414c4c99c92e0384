"""Settings for every test, doctest and notebook of the suite."""

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
    for item in items:
        if hasattr(item, "output_timeout"):  # nbval's, of 5 seconds
            item.output_timeout = PATIENCE
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU (make gpu)")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
