"""Errors that are judged, and result files that are kept."""

from __future__ import annotations

import json

import pytest

from experiments.harness.errors import verdict
from experiments.harness.results import OutOfTime, Results, write_json


def test_wrong_or_worse_than_the_peer_is_refused():
    assert verdict({"o": 4e-3}, {"o": 4e-3}, 8e-3) == []
    assert verdict({"o": 4e-3}, {"o": float("nan")}, 8e-3) == []
    assert len(verdict({"o": 4e-3}, {"o": 3.5e-3}, 8e-3)) == 1
    assert len(verdict({"o": float("nan"), "dq": 1e-2}, None, 8e-3)) == 2


def test_a_row_that_raises_is_kept_and_the_rest_is_resumed(tmp_path):
    out, made = tmp_path / "r.json", []

    def row(name):
        made.append(name)
        if name == "bad":
            raise ValueError("no such tile")
        return {"x": float("inf")}

    for _ in range(2):
        results = Results(out, {}, smoke=True)
        for name in ("good", "bad"):
            results.measure(name, lambda name=name: row(name))
    assert made == ["good", "bad"]
    good, bad = json.loads(out.read_text())["rows"]
    assert good["x"] == "inf" and bad["failure"] == "ValueError: no such tile"
    assert Results(out, {}, smoke=False).rows == []  # what was not measured is not kept by a measurement
    with pytest.raises(OutOfTime):
        Results(out, {}, smoke=True, budget=-1.0).measure("new", lambda: row("new"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "r.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1} and [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_the_exit_code_says_why_a_run_ended(tmp_path, capsys):
    results = Results(tmp_path / "r.json", {}, smoke=True, budget=-1.0)
    code = results.fill(lambda: results.measure("late", dict))
    assert code == 2 and "stopped at the budget" in capsys.readouterr().out
    assert results.finish("table", code) == 2 and results.finish("table", failed=["a"]) == 1
    assert results.finish("table") == 0 and capsys.readouterr().out.endswith("table\nNOT MEASURED: smoke run\n")
