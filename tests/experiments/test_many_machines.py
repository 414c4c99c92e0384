"""The experiments on shared sequences and on serving, in parts: what needs no GPU."""

from __future__ import annotations

import json

import pytest

from experiments.harness import cli
from experiments.operators import context_parallel, serving


def test_bytes_are_counted_and_compared_with_their_formulas():
    few, many = (context_parallel.layer_bytes(ranks, 2048, 2, 8) for ranks in (2, 64))
    for row in (few, many):
        assert set(row["layers"]) == {
            "linear", "decay", "channels", "delta", "convolution of 4", "window of 128", "attention"
        }  # fmt: skip
        assert all(layer["counted"] == layer["formula"] for layer in row["layers"].values())
        assert all(min(layer["counted"]) > 0 for layer in row["layers"].values())
    # States: p - 1 of them.  Keys: nearly all, whatever p is.
    assert many["layers"]["delta"]["counted"] == [63 * x for x in few["layers"]["delta"]["counted"]]
    assert many["layers"]["attention"]["counted"][0] < 2 * few["layers"]["attention"]["counted"][0]


def test_a_count_that_is_off_is_refused(monkeypatch):
    monkeypatch.setattr(context_parallel, "state_bytes", lambda *args, **options: 1)
    with pytest.raises(ValueError, match="not those of the formulas"):
        context_parallel.layer_bytes(2, 256, 1, 4)


def test_two_processes_are_judged(monkeypatch):
    found = {"worst": 1e-6, "counted": {"states": 4}, "formula": {"states": 4}, "two_ms": 5.0, "one_ms": 8.0}

    def judged(**changes):
        def started(words, **_):
            out = words[words.index("--worker") + 1]
            with open(out, "w") as file:
                json.dump([found, {**found, **changes}], file)
            return context_parallel.subprocess.CompletedProcess(words, 0, "", "")

        monkeypatch.setattr(context_parallel.subprocess, "run", started)
        return context_parallel.two_processes(True, 256, 1.0)

    assert judged()["speedup"] == 1.6
    for changes in ({"worst": 2e-5}, {"worst": float("nan")}):
        with pytest.raises(ValueError, match="gradients on process 1"):
            judged(**changes)
    with pytest.raises(ValueError, match="bytes on process 1"):
        judged(counted={"states": 5})


def test_serving_runs_in_small(tmp_path, capsys):
    path = tmp_path / "serving.json"
    assert serving.EXPERIMENT.start(["--smoke", "--out", str(path)]) == 0
    assert "NOT MEASURED: smoke run" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 7 and {row["status"] for row in rows} == {"ok"}
    errors = rows[0]["errors"]["beta 0.99"]
    assert max(errors["roll_back"], errors["replay"]) < 1e-5 and errors["step_back"] > 10 * errors["roll_back"]
    assert all(d["state"] > 0 for row in rows[1:] for d in row["drift"])


def test_both_are_in_the_catalogue():
    assert {"context_parallel", "serving"} <= {e.name for e in cli.catalogue()}
