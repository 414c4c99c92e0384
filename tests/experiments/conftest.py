"""What the tests of experiments share: smoke runs in processes of their own, and stubs of the work of processes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(name: str, *options: str) -> subprocess.Popen:
    """`python -m experiments NAME`, begun."""
    command = [sys.executable, "-m", "experiments", name, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="session")
def begin():
    return start


STUBS = '''
import os, time

def rows_of(unit):
    """Units that are begun first are ready last; one ends its process."""
    if unit == ("killed", "a"):
        os._exit(7)
    time.sleep(0.2 if unit[1] == "a" else 0)
    return [{"variant": unit[0], "sort": unit[1], "shape": [2, length]} for length in (7, 300)]

def compiling(worker, options, length, batch):
    if options.budget is not None:
        time.sleep(600)
    return f"{length} x {batch}"
'''


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    """A module of stubs that other processes can import as well."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "stubs_of_experiments.py").write_text(STUBS)
    yield importlib.import_module("stubs_of_experiments")
    del sys.modules["stubs_of_experiments"]
