"""Which tiles are tried, and what is said of them."""

from __future__ import annotations

import argparse

import pytest

tune = pytest.importorskip("experiments.operators.tune")


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
