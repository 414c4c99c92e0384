"""What `make gpu` runs under compute-sanitizer; here in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

sanitizer = pytest.importorskip("experiments.operators.sanitizer")


def test_every_kernel_is_exercised():
    from dn_lib.kernels import rules
    from dn_lib.kernels.common import INTERPRETED
    from experiments.harness.launches import launches

    if not INTERPRETED.value:
        pytest.skip("counts launches in the interpreter")
    short = [((16, 16, "float32"), (40, *rest)) for _, *rest in sanitizer.REGIMES]
    with launches() as seen:
        calls = sum(sanitizer.exercise(case, "cpu") for case in short)
    assert calls == sanitizer.CALLS * len(sanitizer.REGIMES)
    # Only a GPU chooses the recurrent kernel by itself.
    assert {launch.name for launch in seen} == set(rules.KERNELS.values()) - {"recurrent"}


def test_without_the_tool_the_remedy_is_named(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "experiments", "sanitizer", "--out", str(tmp_path / "sanitizer.json")],
        env={"PATH": str(tmp_path)},
        cwd=sanitizer.ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "install the CUDA toolkit" in run.stderr
