"""What `make gpu` runs under compute-sanitizer; here in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tools import sanitize

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def test_every_kernel_is_exercised(monkeypatch):
    from dn_lib.kernels.common import INTERPRETED
    from dn_lib.kernels.delta_rule import backward, forward

    if not INTERPRETED.value:
        pytest.skip("counts launches in the interpreter")
    launched = set()
    # Only a GPU splits sequences (`merge`) and chooses the recurrent kernel by itself.
    kernels = {forward: ("inverse_norms", "chunk_inverse", "walk"), backward: ("walk_back", "gradients")}
    for module, names in kernels.items():
        for name in names:
            kernel = getattr(module, name)

            class Watched:
                def __getitem__(self, grid, kernel=kernel, name=name):
                    launched.add(name)
                    return kernel[grid]

            monkeypatch.setattr(module, name, Watched())
    short = [((16, 16, "float32"), (40, *rest)) for _, *rest in sanitize.REGIMES]
    calls = sum(sanitize.exercise(case, "cpu") for case in short)
    assert calls == 5 * len(sanitize.REGIMES)
    assert launched == {name for names in kernels.values() for name in names}


def test_without_the_tool_the_remedy_is_named(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "tools.sanitize"],
        env={"PATH": str(tmp_path)},
        cwd=sanitize.ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "install the CUDA toolkit" in run.stderr
