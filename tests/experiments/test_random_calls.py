"""The random calls whose errors are judged (experiments.operators.errors)."""

from __future__ import annotations

import pytest

from dn_lib.testing import mixed_lengths

errors = pytest.importorskip("experiments.operators.errors")


def test_calls_are_reproducible_and_cover_the_options():
    configs = errors.configurations(4, seed=0)
    assert configs == errors.configurations(4, seed=0) and len(configs) == 96
    calls = [errors.a_call(n, configs, seed=0) for n in range(400)]
    assert calls[7] == errors.a_call(7, configs, seed=0)
    for name in ("norm", "state", "dstate", "varlen"):
        assert {c[name] for c in calls} == {False, True}
    assert {c["segments"] for c in calls} == {None, 2, 3, 5} and {c["chunk"] for c in calls} == {16, 32, 64}
    assert all(sum(c["lengths"]) == c["L"] and c["B"] == 1 for c in calls if c["varlen"])
    assert any(errors.fla_takes(c) for c in calls)
    assert sum(mixed_lengths(64, 32768)) == 32768


def test_a_failure_is_seen():
    c = errors.a_call(2, errors.configurations(1, seed=0), seed=0) | {"dtype": "float32"}
    tally = errors.Tally()
    for error in (1e-7, 2e-5, float("nan")):
        tally.add(c, {"ours": {"o": error}, "norms": {"o": 1.0}, "fla": {"o": 1e-3}})
    assert len(tally.failures) == 2
    assert tally.summary()["errors"]["float32"]["o"]["not_finite"] == 1


def test_errors_are_judged_by_the_mean_ratio_of_each_configuration():
    tally, configs = errors.Tally(), errors.configurations(2, 0)
    one = {name: 1e-3 for name in ("o", "dq", "dk", "dv", "dbeta")}
    calls = [errors.a_call(n, configs, 0) for n in range(1500)]
    first, *_ = chosen = [c for c in calls if errors.fla_takes(c)]
    same = [c for c in chosen if all(c[o] == first[o] for o in errors.OPTIONS)]
    for c in chosen:
        worse = c in same
        ours = {**one, "dk": 1e-3 * (1.3 if worse else 0.9)}
        tally.add(c, {"ours": ours, "fla": one, "fla again": {**one, "o": 2e-3}, "norms": one})
    rows = tally.by_configuration()
    assert [row["above"] for row in rows if row["above"]] == [["dk"]] and len(rows) > 5
    judged = next(row for row in rows if row["above"])
    assert judged["calls"] == len(same) and judged["ratios"]["dk"] == pytest.approx(1.3)
    keys = tally.by_keys()
    assert all(row["scatter"]["max"] == pytest.approx(2.0) for row in keys) and len(keys) > 10
    assert "ABOVE 1.1 ['dk']" in errors.table(tally.summary())


@pytest.mark.parametrize("one_wave", [False, True])
def test_a_call_is_planned_as_it_says(one_wave):
    """With the tiles of programs that have an SM to themselves, or that share it, and in so many segments."""
    import torch

    from dn_lib.kernels import plan, rules

    c = {"segments": 3, "alone": one_wave, "whole": True}
    x = torch.empty(1, 1152, 2, 128, dtype=torch.bfloat16)
    with errors.planned(c, "cpu"):
        made = plan.plan_call(x, x, x, training=True, chunk=64)
    assert made.layout.segments == 3 and made.call.overrides.tma is True
    target = made.call.target._replace(arch=90)  # as on a GPU
    assert rules.is_one_wave(made.launches["chunk_scan_fwd"].programs, target) is one_wave
