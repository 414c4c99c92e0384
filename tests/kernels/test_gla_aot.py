"""The kernels with a gate per channel compile for GPUs that are not there, within what those have."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Bytes of shared memory that a block may have: the CUDA C programming guide, compute capabilities 8.0 and 9.0.
SHARED = {80: 163 * 1024, 90: 227 * 1024}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton's ptxas is for Linux on x86-64"
    ),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The rows for one architecture, compiled once."""
    cache = tmp_path_factory.mktemp("triton")

    @functools.cache
    def rows(arch: int) -> list[dict]:
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)  # as from a user's shell: the module turns the interpreter off
        command = [sys.executable, "-m", "dn_lib.kernels.gla.aot", "--json", "--arch", str(arch)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return rows


@pytest.mark.parametrize("arch", SHARED)
def test_every_kernel_compiles_and_fits(compiled, arch):
    """Without local memory on Hopper, with little before; and no copy may overtake a dot."""
    from dn_lib.kernels.gla.plan import KERNELS

    rows = compiled(arch)
    assert {row["kernel"] for row in rows} == set(KERNELS)
    for row in rows:
        assert row["arch"] == arch and row["shared"] <= SHARED[arch], row
        assert 0 < row["registers"] <= 255, row
        assert row["overtaken"] == 0, row
        assert row["stack"] <= (16 if arch == 90 else 128), row
