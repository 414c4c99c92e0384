"""Copying and recall from two starts: the task, when it counts as learned, what is kept of the cells."""

from __future__ import annotations

import json

import pytest
import torch

from dn_lib.teaching.figures.s2_measured import starts_table
from experiments.studies import expressiveness


def options(*names):
    return expressiveness.EXPERIMENT.arguments(["--out", "x", *names])


@pytest.mark.skipif(torch.cuda.is_available(), reason="--smoke is for machines without a GPU")
def test_smoke_run_is_marked_and_resumed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DN_COMMIT", "one")  # nobody commits between the two runs
    out = tmp_path / "expressiveness.json"
    arguments = ["--smoke", "--mixers", "delta", "--out", str(out)]
    assert expressiveness.EXPERIMENT.start(arguments) == 0
    assert capsys.readouterr().out.rstrip().endswith("NOT MEASURED: smoke run")
    first = json.loads(out.read_text())["rows"]
    assert expressiveness.EXPERIMENT.start(arguments) == 0 and "4 rows kept" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["rows"] == first and all(row["measured"] is False and row["status"] == "ok" for row in first)
    assert [(e["task"], e["start"]) for e in record["results"]] == [
        (task, start) for task in ("copying", "recall") for start in ("normal", "mimetic")
    ]
    assert "DeltaNet" in str(starts_table(record)) and "never" in str(starts_table(record))


def test_what_is_asked_of_a_copy_is_the_next_letter():
    torch.manual_seed(0)
    tokens, asked, right = expressiveness.draw_copies(20, 7, 9, "cpu")
    assert tokens.shape == (20, 14) and (tokens[:, 7] == 0).all() and tokens.min() == 0 and tokens.max() < 9
    assert torch.equal(tokens[:, :7], right) and torch.equal(tokens[:, 8:], right[:, :-1])
    assert asked.tolist() == [list(range(7, 14))] * 20


def test_recall_has_a_pair_for_each_four_tokens():
    tokens, asked, right = expressiveness.drawn("recall", options("--length", "32"), "cpu")
    assert tokens.shape[1] == 32 and asked.shape == right.shape == (64, 8)


def test_copying_is_learned_and_training_ends_then():
    o = options("--length", "4", "--vocab", "4", "--width", "16", "--batch", "32", "--steps", "300", "--warmup", "5")
    row = expressiveness.a_cell("copying", "delta", "mimetic", 1e-2, 0, o, "cpu")
    assert row["steps_taken"] < 300 and row["accuracy"] > 0.99
    assert row["steps_to_learn"] <= row["steps_taken"] and row["curve"][0] < 0.5
    skipped = expressiveness.a_cell("copying", "delta", "normal", 1e-2, 0, o, "cpu", left=lambda: 0.0)
    assert skipped["status"] == "skipped" and "accuracy" not in skipped


def test_starts_differ_in_their_weights_alone():
    o = options("--width", "32")
    normal, mimetic = (
        expressiveness.Start("copying", "delta", start, 1e-2, 0, o, "cpu").model for start in ("normal", "mimetic")
    )
    assert torch.equal(normal.embedding.weight, mimetic.embedding.weight)
    layer = mimetic.blocks[0].mixer
    assert torch.equal(layer.query.weight, layer.key.weight)
    assert not torch.equal(normal.blocks[0].mixer.query.weight, normal.blocks[0].mixer.key.weight)


def test_both_starts_of_a_mixer_come_before_the_next():
    cells = expressiveness.plan(options("--mixers", "delta", "gla", "--tasks", "copying", "--learning-rates", "0.01"))
    assert [cell[1:3] for cell in cells[:4]] == [
        ("delta", "normal"), ("delta", "mimetic"), ("gla", "normal"), ("gla", "mimetic"),
    ]  # fmt: skip
    assert [cell[4] for cell in cells] == [0] * 4 + [1] * 4


def test_the_rate_with_the_fewest_steps_is_kept():
    def row(rate, seed, steps, accuracy=1.0, status="ok"):
        found = {"task": "copying", "mixer": "GLA", "start": "normal", "learning_rate": rate, "seed": seed}
        return found | {"status": status, "steps_to_learn": steps, "accuracy": accuracy, "training": {"steps": 500}}

    rows = [row(1e-3, 0, 300), row(1e-3, 1, None, 0.7), row(1e-2, 1, 200), row(1e-2, 0, 100), row(1e-2, 2, 1, 1, "no")]
    (entry,) = expressiveness.collected(rows)
    assert entry["learning_rate"] == 1e-2 and entry["steps"] == [100, 200] and entry["accuracy"] == [1.0, 1.0]
    (never,) = expressiveness.collected([row(1e-3, 0, None, 0.2), row(1e-2, 0, None, 0.6)])
    assert never["steps"] == [None] and never["accuracy"] == [0.6]
