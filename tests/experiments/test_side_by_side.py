"""What is made of the times of the operator and of fla."""

from __future__ import annotations

import pytest


def test_summary_and_table():
    side_by_side = pytest.importorskip("experiments.operators.side_by_side")

    def times(ours, fla):
        found = {"ours_ms": ours, "fla_ms": fla, "ratio": fla / ours, "of_compulsory_time": 2.0}
        return found | {"ours_peak_extra_bytes": 50, "fla_peak_extra_bytes": 100}

    rows = [
        {"key": f"grid {i}", "status": "ok", "forward": times(1.0, r), "forward_backward": times(2.0, 2.0 * r)}
        for i, r in enumerate((2.0, 8.0))
    ]
    rows.append({"key": "odd", "status": "refused", "failure": "o: 1 is not below 0.008"})
    found = side_by_side.summary(rows)
    assert found["forward"]["geometric_mean_ratio"] == pytest.approx(4.0)
    assert (found["forward"]["least_ratio"], found["forward"]["least_ratio_at"]) == (2.0, "grid 0")
    assert found["forward_backward"]["most_memory_of_fla"] == 0.5
    assert found["refused_or_failed"] == ["odd"]
    text = side_by_side.table(rows)
    assert "refused: o: 1 is not below" in text and len(text.splitlines()) == 5
