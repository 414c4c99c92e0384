"""The benchmark scripts without a GPU: they run on tiny shapes, mark what they write as not measured, and resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="--smoke is for machines without a GPU")
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = {
    "operator": ["--only", "grid", "decode", "--shapes", "16,1,1,40"],
    "errors": ["--variants", "1", "--calls", "3"],
    "paper_figure": [],
}


def start(script: str, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--smoke", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=FOLDER.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
    """Exit code, what was printed and the file written, of each script; they run side by side."""
    folder = tmp_path_factory.mktemp("benchmarks")
    runs = {name: start(name, folder / f"{name}.json", *options) for name, options in SCRIPTS.items()}
    return {name: (run.communicate()[0], run.returncode, folder / f"{name}.json") for name, run in runs.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke_run_writes_a_whole_file_and_says_it_is_no_result(smoke, script):
    printed, code, path = smoke[script]
    assert code == 0, printed
    assert printed.rstrip().endswith("NOT MEASURED: smoke run")
    record = json.loads(path.read_text())
    assert {"provenance", "settings", "ceilings", "rows", "summary", "not_measured"} == set(record)
    assert record["provenance"]["command"].startswith(f"python benchmarks/{script}.py --smoke")
    assert record["provenance"]["git_commit"] and record["provenance"]["torch"] == torch.__version__
    assert record["rows"] and all(row["measured"] is False for row in record["rows"])
    assert not path.with_name(path.name + ".part").exists()


def test_operator_rows(smoke):
    record = json.loads(smoke["operator"][2].read_text())
    grid, decode = record["rows"]
    assert grid["status"] == decode["status"] == "ok"
    assert set(grid["errors"]["ours"]) == {"o", "dq", "dk", "dv", "dbeta", "o (no gradient)"}
    assert all(0 < error < 0.03 for error in grid["errors"]["ours"].values())  # interpreter: bfloat16 is truncated
    # One head of 40 tokens and 16 channels: (4 d + 1) numbers of 2 bytes, and (7 d + 2) more with the backward.
    assert grid["forward"]["compulsory_bytes"] == 40 * 65 * 2
    assert grid["forward_backward"]["compulsory_bytes"] == 40 * (65 + 114) * 2
    assert decode["forward"]["state_bytes"] == 2 * 2 * 16 * 16 * 4
    assert set(grid["others"]) >= {"recurrent.forward", "pytorch_chunkwise.forward_backward"}


def test_errors_are_those_of_float32_and_half_precision(smoke):
    errors = json.loads(smoke["errors"][2].read_text())["summary"]["errors"]
    assert all(0 < e["worst"] < 0.06 for outputs in errors.values() for e in outputs.values())
    assert list(errors) == ["bfloat16", "float16", "float32"]
    assert max(e["worst"] for e in errors["float32"].values()) < 1e-5


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import errors
    import measure
    import side_by_side

    return measure, side_by_side, errors


@pytest.mark.parametrize("folder", [str(FOLDER), "benchmarks", "./benchmarks/"])
def test_the_standard_operator_is_found_from_this_folder(folder):
    """`benchmarks/operator.py` must not hide it from scripts that start in the folder."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); sys.modules.pop('operator', None); import operator; "
    code += "from operator import itemgetter; print(operator.add(1, 2), sys.path[0] == sys.argv[1])"
    command = [sys.executable, "-S", "-c", code, folder]
    run = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["3", "True"]


def test_wrong_or_worse_than_the_peer_is_refused(modules):
    measure, *_ = modules
    assert measure.verdict({"o": 4e-3}, {"o": 4e-3}, 8e-3) == []
    assert measure.verdict({"o": 4e-3}, {"o": float("nan")}, 8e-3) == []
    assert len(measure.verdict({"o": 4e-3}, {"o": 3.5e-3}, 8e-3)) == 1
    assert len(measure.verdict({"o": float("nan"), "dq": 1e-2}, None, 8e-3)) == 2


def test_a_row_that_raises_is_kept_and_the_rest_is_resumed(modules, tmp_path):
    measure, *_ = modules
    out, made = tmp_path / "r.json", []

    def row(name):
        made.append(name)
        if name == "bad":
            raise ValueError("no such tile")
        return {"x": float("inf")}

    for _ in range(2):
        results = measure.Results(out, {}, smoke=True)
        for name in ("good", "bad"):
            results.measure(name, lambda name=name: row(name))
    assert made == ["good", "bad"]
    good, bad = json.loads(out.read_text())["rows"]
    assert good["x"] == "inf" and bad["failure"] == "ValueError: no such tile"
    assert measure.Results(out, {}, smoke=False).rows == []  # what was not measured is not kept by a measurement
    with pytest.raises(measure.OutOfTime):
        measure.Results(out, {}, smoke=True, budget=-1.0).measure("new", lambda: row("new"))


def test_summary_and_table(modules):
    _, side_by_side, _ = modules

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


def test_calls_are_reproducible_and_cover_the_options(modules):
    measure, _, errors = modules
    configs = errors.configurations(4, seed=0)
    assert configs == errors.configurations(4, seed=0) and len(configs) == 96
    calls = [errors.a_call(n, configs, seed=0) for n in range(400)]
    assert calls[7] == errors.a_call(7, configs, seed=0)
    for name in ("norm", "state", "dstate", "varlen"):
        assert {c[name] for c in calls} == {False, True}
    assert {c["segments"] for c in calls} == {None, 2, 3, 5} and {c["chunk"] for c in calls} == {16, 32, 64}
    assert all(sum(c["lengths"]) == c["L"] and c["B"] == 1 for c in calls if c["varlen"])
    assert any(errors.fla_takes(c) for c in calls)
    assert sum(measure.mixed_lengths(64, 32768)) == 32768


def test_a_failure_is_seen(modules):
    *_, errors = modules
    c = errors.a_call(2, errors.configurations(1, seed=0), seed=0) | {"dtype": "float32"}
    tally = errors.Tally()
    for error in (1e-7, 2e-5, float("nan")):
        tally.add(c, {"ours": {"o": error}, "norms": {"o": 1.0}, "fla": {"o": 1e-3}})
    assert len(tally.failures) == 2
    assert tally.summary()["errors"]["float32"]["o"]["not_finite"] == 1
