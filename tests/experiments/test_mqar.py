"""Associative recall: its examples, its lessons, and what is kept of its cells."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.models import mqar


@pytest.mark.skipif(torch.cuda.is_available(), reason="--smoke is for machines without a GPU")
def test_recall_smoke_run_is_marked_and_resumed(begin, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DN_COMMIT", "one")  # nobody commits between the two runs
    out = tmp_path / "mqar.json"
    run = begin("mqar", "--smoke", "--out", str(out))
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    assert printed.rstrip().endswith("NOT MEASURED: smoke run")
    first = json.loads(out.read_text())["rows"]
    assert mqar.EXPERIMENT.start(["--smoke", "--out", str(out)]) == 0 and "4 rows kept" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == first
    record = json.loads(out.read_text())
    assert {"provenance", "settings", "results", "rows", "not_measured"} == set(record)
    assert all(row["measured"] is False and row["status"] == "ok" for row in record["rows"])
    assert [(r["model"], r["width"], len(r["accuracy"])) for r in record["results"]] == [
        ("DeltaNet", 16, 2),
        ("RetNet", 16, 2),
    ]


def test_recall_examples_are_those_of_the_library():
    torch.manual_seed(0)
    tokens, asked, right = mqar.draw(50, 40, 8, 64, "cpu")
    keys, values = tokens[:, 0:16:2], tokens[:, 1:16:2]
    assert keys.min() >= 1 and keys.max() < 32 <= values.min() and values.max() < 64
    assert all(len(set(row.tolist())) == 8 for x in (keys, values, asked) for row in x)
    assert torch.equal(tokens.gather(1, asked), keys) and torch.equal(right, values)
    assert asked.min() == 16 and asked.max() == 38 and (asked % 2 == 0).all()
    assert ((tokens != 0).sum(1) == 24).all()
    # The first of two gaps drawn without replacement, and both together, against the library's generator.
    _, asked, _ = mqar.draw(40_000, 24, 2, 16, "cpu", power=0.5)
    _, labels = mqar.multi_query_associative_recall(40_000, 24, 2, vocab=16, power=0.5)
    ours = torch.zeros(40_000, 24).scatter(1, asked, 1.0).mean(0)
    torch.testing.assert_close(ours, (labels >= 0).float().mean(0), atol=0.015, rtol=0)


def test_recall_is_learned_and_training_ends_then():
    names = "--out x --length 16 --pairs 2 --vocab 32 --batch 64 --steps 400 --warmup 20 --test 200"
    o = mqar.EXPERIMENT.arguments([*names.split(), "--layers", "1", "--heads", "1"])
    row = mqar.a_cell("delta", 32, 1e-2, 0, o, "cpu")
    assert row["accuracy"] > 0.98 and row["steps_taken"] < 400
    assert row["curve"]["accuracy"][0] < 0.2 < 0.9 < row["curve"]["accuracy"][-1]
    skipped = mqar.a_cell("delta", 32, 1e-2, 0, o, "cpu", left=lambda: 0.0)
    assert skipped["status"] == "skipped" and "accuracy" not in skipped


def test_recall_is_taught_from_short_lists_to_long_ones():
    o = mqar.EXPERIMENT.arguments(["--out", "x", "--batch", "32"])
    assert mqar.lessons(o) == [(256, 64, 8), (128, 128, 16), (64, 256, 32), (32, 512, 64)]
    assert mqar.lessons(mqar.EXPERIMENT.arguments(["--out", "x", "--batch", "32", "--lessons", "1"])) == [(32, 512, 64)]
    names = "--out x --length 24 --pairs 6 --vocab 32 --batch 2 --steps 20 --warmup 2 --test 3"
    o = mqar.EXPERIMENT.arguments(names.split())
    assert mqar.lessons(o) == [(2, 24, 6)]  # half of 6 would be too short a list
    o.length, o.pairs = 32, 8
    training = mqar.Training("linear", 16, 1e-2, o, "cpu")
    found = training.run()["lessons"]
    assert [(x["batch"], x["length"], x["pairs"], x["steps"]) for x in found] == [(4, 16, 4, 2), (2, 32, 8, 18)]


def test_recall_cells_are_trained_in_the_order_of_their_worth():
    o = mqar.EXPERIMENT.arguments(["--out", "x", "--models", "delta", "linear", "gla", "--widths", "64", "128"])
    cells = [f"{mixer} {width} {seed}" for mixer, width, _, seed in mqar.plan(o)]
    first = ["delta 64 0", "linear 64 0", "delta 128 0", "linear 128 0", "gla 64 0", "gla 128 0"]
    assert cells == first + [cell[:-1] + "1" for cell in first]


def test_recall_keeps_the_best_learning_rate_and_forgets_failures():
    def row(rate, seed, accuracy, status="ok"):
        found = {"model": "GLA", "width": 64, "length": 512, "pairs": 64, "learning_rate": rate, "seed": seed}
        return found | {"accuracy": accuracy, "steps_taken": 9, "status": status}

    rows = [row(1e-2, 1, 0.9), row(1e-2, 0, 0.5), row(1e-3, 0, 0.6), {"key": "x", "status": "failed"}]
    (entry,) = mqar.collected(rows)
    assert entry["accuracy"] == [0.5, 0.9] and entry["learning_rate"] == 1e-2 and entry["steps"] == [9, 9]
