"""Six kinds of models on the same tokens: which cells there are, that they are resumed, and what a row holds."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dn_lib.models import ModelConfig
from experiments.harness.kinds import COMPARED
from experiments.models import comparison

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="--smoke is for machines without a GPU")


def parsed(*words: str):
    return comparison.EXPERIMENT.arguments(["--plan", *words])


def test_cells_are_the_sweep_then_runs_with_the_seeds_that_the_question_asks_for():
    cells = comparison.cells(parsed())
    sweep = [cell for cell in cells if cell.rate is not None]
    runs = cells[len(sweep) :]
    assert {(c.kind, c.rate) for c in sweep} == {(kind, rate) for kind in COMPARED for rate in comparison.RATES}
    assert cells[: len(sweep)] == sweep and all(cell.rate is None for cell in runs)
    seeds = {kind: sorted(c.seed for c in runs if c.kind == kind) for kind in COMPARED}
    three = {"window hybrid", "DeltaNet", "Transformer", "Transformer, convolutions"}
    assert seeds == {kind: [0, 1, 2] if kind in three else [0] for kind in COMPARED}
    assert len({cell.key for cell in cells}) == len(cells)
    assert {c.key for c in comparison.cells(parsed("--cells", "DeltaNet, seed"))} == {
        f"DeltaNet, seed {i}" for i in range(3)
    }
    assert {c.kind for c in comparison.cells(parsed("--kinds", "Transformer", "--seeds", "1"))} == {"Transformer"}


def test_every_cell_ends_within_minutes(capsys):
    per_step = 64 * 1024
    assert all(cell.seconds(per_step) < 360 for cell in comparison.cells(parsed()))
    assert comparison.EXPERIMENT.start(["--plan", "--out", "nowhere.json"]) == 0
    said = capsys.readouterr().out
    assert "gated DeltaNet, seed 0" in said and "32 of 32 cells" in said


def test_kinds_differ_in_their_mixers_alone():
    shape = {"vocab_size": 256, "width": 64, "layers": 4, "heads": 2}
    fields = {name: ModelConfig(**(shape | kind.fields)).to_dict() for name, kind in COMPARED.items()}
    mixing = {"mixer", "hybrid", "expand_v", "output_gate"}
    for name in COMPARED:
        differ = {key for key in fields[name] if fields[name][key] != fields["DeltaNet"][key]}
        assert differ <= mixing, name
    assert ModelConfig(**(shape | COMPARED["global hybrid"].fields)).mixers() == (
        "delta",
        "attention",
        "attention",
        "delta",
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The file of a smoke run that was stopped by its budget after the sweep of one kind, and then went on."""
    out = tmp_path_factory.mktemp("comparison") / "comparison.json"
    options = ["--smoke", "--out", str(out)]
    assert comparison.EXPERIMENT.start([*options, "--cells", "window hybrid, rate"]) == 0
    first = json.loads(out.read_text())["rows"]
    assert comparison.EXPERIMENT.start(options) == 0
    return first, json.loads(out.read_text())


def test_a_run_goes_on_with_the_cells_that_are_missing(smoke):
    first, record = smoke
    assert [row["key"] for row in first] == ["window hybrid, rate 0.001", "window hybrid, rate 0.002"]
    assert record["rows"][:2] == first and len(record["rows"]) == 2 * 2 + 2 + 1 + 1
    assert all(row["status"] == "ok" and row["measured"] is False for row in record["rows"])


def test_a_row_answers_every_question(smoke):
    _, record = smoke
    rows = {row["key"]: row for row in record["rows"]}
    for row in rows.values():
        assert row["tokens"] == row["steps"] * 4 * 96 and math.isfinite(row["bits_per_byte"]) and row["curve"]
        assert ("recall" in row) == (not row["sweep"])
    run = rows["Transformer, convolutions, seed 1"]
    assert run["edits"] == ["convolutions in attention"] and run["loss_by_position"]["position"][-1] == 4 * 96
    assert [entry["pairs"] for entry in run["recall"]] == [4] and 0 <= run["recall"][0]["digits"] <= 1
    names = run["unseen_names"]
    assert set(names) == {"first", "later", "names", "first_bytes", "later_bytes", "documents"}
    assert names["names"] >= 2 and 0 < names["first"] < 8 and 0 < names["later"] < 8
    assert run["rate"] == comparison.best_rate(record["rows"], run["kind"])


def test_every_kind_and_both_seeds_read_the_same_batches(smoke):
    """The first loss, before any step, differs with the weights, but is that of a model that knows nothing."""
    _, record = smoke
    for row in record["rows"]:
        assert row["curve"][0][1] == pytest.approx(math.log(256), rel=0.05)


def test_the_rate_is_the_sweeps_best_and_missing_sweeps_are_named():
    rows = [
        {"status": "ok", "kind": "DeltaNet", "sweep": True, "rate": rate, "bits_per_byte": bits}
        for rate, bits in ((1e-3, 2.0), (2e-3, 1.5), (4e-3, 1.7))
    ]
    assert comparison.best_rate(rows, "DeltaNet") == 2e-3
    with pytest.raises(ValueError, match="Transformer has no rate yet"):
        comparison.best_rate(rows, "Transformer")


def test_the_summary_gives_the_spread_of_seeds(smoke):
    _, record = smoke
    about = record["summary"]["window hybrid"]
    assert about["bits_per_byte"]["seeds"] == 2 and about["bits_per_byte"]["least"] <= about["bits_per_byte"]["mean"]
    assert set(about["sweep"]) == {"0.001", "0.002"} and set(about["recall"]) == {"4"}
    text = comparison.table(record["summary"])
    assert "window hybrid" in text and "Transformer, convolutions" in text and "(4)" in text


def test_a_cell_does_not_begin_where_it_would_not_end(tmp_path, monkeypatch, capsys):
    """Without --smoke, where seconds are reckoned: nothing is trained."""
    monkeypatch.setattr(comparison, "device_of", lambda smoke: "cpu")
    monkeypatch.setattr(comparison, "load_corpus", lambda spec: comparison.small_text())
    monkeypatch.setattr(comparison, "run_cell", lambda *arguments: pytest.fail("it began"))
    out = tmp_path / "comparison.json"
    assert comparison.EXPERIMENT.start(["--out", str(out), "--budget", "30"]) == 2
    assert "stopped at the budget" in capsys.readouterr().out
