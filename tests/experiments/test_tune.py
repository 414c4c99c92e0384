"""Which tiles are tried, and what is said of them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys

import pytest

tune = pytest.importorskip("experiments.operators.tune")
from experiments.harness.provenance import ROOT  # noqa: E402 - needs what the line above asks for


def test_tuning_tries_what_the_rule_has_chosen_and_marks_the_fastest():
    options = argparse.Namespace(norm=False, only=["chunk_scan_fwd"], tma=True)
    found = tune.wanted(options, 128)
    assert len(set(found)) == len(found) and {c.variant for c in found} == {"", "transition"}
    assert found[0].tiles == found[0].rule(False) and all(c.tiles.tma for c in found[2:])
    assert {c.kernel for c in tune.candidates(64, False)} == {"chunk_scan_fwd", "chunk_scan_bwd", "chunk_inverse"}
    norm = [c.tiles.BK for c in tune.candidates(256, True) if c.kernel == "chunk_bwd_dqk"]
    assert set(norm) == {256}  # whole rows
    rows = [
        {**c.about(), "key": c.key, "status": "ok", "ms": {"shared": {"training": ms}}}
        for c, ms in ((found[0], 2.0), (found[-1], 1.0))
    ]
    rows[1]["variant"] = ""
    (best,) = tune.summary(rows)["best"]
    assert (best["fastest_ms"], best["chosen_ms"]) == (1.0, 2.0) and best["fastest"] == rows[1]["tiles"]


@pytest.mark.parametrize("d", [64, 128])
def test_a_candidate_sets_the_tiles_of_its_own_launch(d):
    """Of each form of a kernel, in the plan that `chosen` makes."""
    import torch

    from dn_lib.kernels import plan, rules

    x = torch.empty(1, 4096, 2, d, dtype=torch.bfloat16, device="meta")
    for c in tune.candidates(d, False):
        with tune.chosen(c, 2 if c.split else 1), plan.using(target=rules.Target(90, 132)):
            launches = plan.plan_call(x, x, x, training=True, chunk=64).launches
        assert launches[c.launch].kernel == c.kernel and launches[c.launch].tiles == c.tiles
        assert launches[c.launch].tma == (c.tiles.tma and c.kernel != "chunk_inverse")


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton's ptxas is for Linux on x86-64"
)
def test_a_candidate_is_compiled_ahead(tmp_path):
    """In a process of its own, without the interpreter, as on a GPU's machine; an error would be a text."""
    code = (
        "import json\n"
        "from experiments.operators import tune\n"
        "found = next(c for c in tune.candidates(64, False) if c.kernel == 'chunk_inverse')\n"
        "print(json.dumps(tune.compile_one(found, 90)))\n"
    )
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict), found
    assert 0 < found["registers"] <= 255 and found["shared"] > 0 and found["stack"] >= 0
