"""The kernels compile for GPUs that are not there, within the shared memory that those have."""

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

from dn_lib.kernels.gla.plan import KERNELS as GLA_KERNELS

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "inverse_norms",
    "gate_sums",
    "chunk_inverse",
    "chunk_scan_fwd",
    "merge_segments",
    "chunk_scan_bwd",
    "chunk_bwd_dqk",
    "recurrent",
}
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
    """The rows for one architecture and family of kernels, compiled once."""
    cache = tmp_path_factory.mktemp("triton")

    @functools.cache
    def rows(arch: int, module: str = "dn_lib.kernels.aot") -> list[dict]:
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)  # as from a user's shell: the module turns the interpreter off
        command = [sys.executable, "-m", module, "--json", "--arch", str(arch)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return rows


@pytest.mark.parametrize("arch", SHARED)
def test_every_kernel_compiles_and_fits(compiled, arch):
    rows = compiled(arch)
    assert {row["arch"] for row in rows} == {arch}
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["shared"] <= SHARED[arch], row
        assert 0 < row["registers"] <= 255 and row["stack"] >= 0, row
        assert row["overtaken"] == 0, row


@pytest.mark.parametrize("arch", SHARED)
def test_gla_s_kernels_compile_and_fit(compiled, arch):
    """Without local memory on Hopper, with little before."""
    rows = compiled(arch, "dn_lib.kernels.gla.aot")
    assert {row["kernel"] for row in rows} == set(GLA_KERNELS)
    for row in rows:
        assert row["arch"] == arch and row["shared"] <= SHARED[arch], row
        assert 0 < row["registers"] <= 255, row
        assert row["overtaken"] == 0, row
        assert row["stack"] <= (16 if arch == 90 else 128), row


def test_both_regimes_and_options_are_among_them(compiled):
    """Fused and not, split, packed, normalised, in half precision and float32: forward and backward."""
    rows = compiled(90)
    for name in ("chunk_scan_fwd", "chunk_scan_bwd"):
        mine = [row for row in rows if row["kernel"] == name]
        assert {"bfloat16", "float32"} <= {row["dtype"] for row in mine}
        assert any(row["K"] <= 64 and row["dtype"] == "bfloat16" for row in mine)
        for option in ("norm", "varlen"):
            assert {row[option] for row in mine} == {True, False}
        assert {row["segments"] for row in mine} >= {1, 2}
        assert {(row["gate"], row["erase"], row["group"]) for row in mine} >= {(0, 1, 1), (1, 1, 2), (1, 0, 1)}
        assert {row["tma"] for row in mine} == {True, False}


def test_importing_the_package_leaves_triton_and_the_compiler_alone():
    """Both take more than a second to import, and Triton asks for its interpreter once, when it is imported."""
    code = "import sys, dn_lib; print([name for name in ('triton', 'torch._dynamo') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
