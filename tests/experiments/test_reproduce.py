"""The paper's small experiments: their settings, files, estimates and figures, and a smoke run of every table."""

from __future__ import annotations

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from dn_lib.models import ModelConfig
from experiments.harness.provenance import RESULTS, ROOT
from experiments.harness.results import plain
from experiments.reproduce import reproduce
from experiments.reproduce.parts import draw, tasks
from experiments.reproduce.parts.estimate import SETUP, calibrated, estimate, sizes
from experiments.reproduce.parts.job import Job
from experiments.reproduce.parts.store import Store, best_point, oldest, record_of, thinned
from experiments.reproduce.parts.tables import DATA_SEED, TABLES, read, select

SMOKE = pytest.mark.skipif(torch.cuda.is_available(), reason="--smoke is for machines without a GPU")


@pytest.fixture(scope="module")
def tables():
    return {name: read(name) for name in TABLES}


def start(*words):
    return reproduce.EXPERIMENT.start([str(word) for word in words])


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_tables_hold_the_cells_of_the_issue(tables):
    mqar = {(c.place["model"], c.place["width"]) for c in tables["mqar"].cells}
    every = ("delta", "gated_delta", "linear", "retnet", "gla", "attention")
    assert mqar == {(m, w) for m in every for w in (64, 128)} | {
        (m, w) for m in ("delta", "linear") for w in (256, 512)
    }
    for cell in tables["mqar"].cells:
        assert (cell.model["layers"], cell.model["heads"], cell.model["conv_size"]) == (2, 2, 0)
        assert cell.config(8192).mlp_width() == 0 and cell.task["length"] == 512 and cell.task["pairs"] == 64
        assert len({run.learning_rate for run in cell.runs}) == 4 and len({run.seed for run in cell.runs}) == 2
    baseline = {(c.place["task"], c.place["model"]) for c in tables["mad"].cells if len(c.place) == 2}
    assert len(baseline) == 6 * 6
    tracked = [(c.place["task"], c.model["beta_range"], c.model["delta_steps"]) for c in tables["tracking"].cells[6:]]
    assert tracked == [(t, b, s) for t in ("s3", "s5") for b in (2.0, 1.0) for s in (1, 2, 3, 4)]
    assert all(c.model["layers"] == 1 for c in tables["tracking"].cells[6:])
    assert [c.name for c in tables["regbench"].cells][:3] == ["delta_conv", "delta", "attention"]


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_can_be_built(name, tables):
    """Small examples of each task of each cell, and the model's configuration; smoke cells are cells of the table."""
    seen = set()
    for cell in tables[name].cells:
        config = cell.config(cell.task.get("vocab", 128))
        assert isinstance(config, ModelConfig) and cell.steps > 100
        options = {k: v for k, v in cell.task.items() if k not in ("kind", "train", "test")}
        if (key := (cell.task["kind"], str(sorted(options.items())))) not in seen:
            seen.add(key)
            task = tasks.make(cell.task["kind"], train=2, test=2, seed=0, **options)
            length, asked = sizes(cell)
            assert task.train.tokens.shape == (2, length)
            assert task.train.labels.shape[1] == asked or name == "mad" or name == "regbench" or "arithmetic" in key
            assert task.train.labels.shape[1] <= asked and task.test.scored.any()
    assert {c.name for c in read(name, smoke=True).cells} <= {c.name for c in tables[name].cells}


def test_later_settings_go_before_earlier_ones(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(
        """
title, measure, across = "", "", ""
[task]
train = 100
test = 7
[tasks]
s3 = { length = 4 }
[training]
batch = 10
epochs = 3
[grid]
learning_rates = [0.1, 0.2]
weight_decays = [0.0]
seeds = [5]
[model]
width = 8
heads = 1
[models]
a = { mixer = "delta", width = 16 }
[[cells]]
tasks = ["s3"]
models = ["a"]
model.width = [32]
task.length = [5, 6]
training.epochs = 4
[smoke]
cells = ["*6"]
training = { batch = 50 }
model = { width = 4 }
""".replace('title, measure, across = "", "", ""', 'title = ""\nmeasure = ""\nacross = ""')
    )
    one, two = read("t", path=path).cells
    assert (one.name, two.name) == ("s3-a-length=5-width=32", "s3-a-length=6-width=32")
    assert one.task == {"train": 100, "test": 7, "kind": "s3", "length": 5} and one.model["width"] == 32
    assert one.steps == 40 and [run.learning_rate for run in one.runs] == [0.1, 0.2]
    path.write_text(path.read_text().replace('"*6"', '"*6-width=32"'))
    (small,) = read("t", smoke=True, path=path).cells
    assert small.name == two.name and small.model["width"] == 4 and small.steps == 8
    for old, new, message in (
        ("epochs = 3", "epoch = 3", "training must hold .* got 'epoch'"),
        ("heads = 1", "head = 1", "model must hold .* got 'head'"),
        ("seeds = [5]", "seed = [5]", "grid must hold .* got 'seed'"),
        ("task.length = [5, 6]", "tasc.length = [5]", "cells must hold .* got 'tasc'"),
        ("task.length = [5, 6]", "task.length = [5, 5]", "length=5-width=32 twice"),
    ):
        wrong = tmp_path / "wrong.toml"
        wrong.write_text(path.read_text().replace(old, new))
        with pytest.raises(ValueError, match=message):
            read("t", path=wrong)


def test_cells_are_chosen_by_their_names(tables):
    cells = tables["mqar"].cells
    assert [c.name for c in select(cells, ["*512", "linear*"])] == [
        "linear-width=64", "linear-width=128", "delta-width=512", "linear-width=256", "linear-width=512"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"^cells must fit 'rwkv\*'"):
        select(cells, ["delta*", "rwkv*"])


# --- Estimates --------------------------------------------------------------------------------------------------------


def test_the_estimate_is_near_what_an_h200_took(tables):
    """Of DeltaNet with a convolution of two taps, one run, in book/results/mqar.json, where the fit comes from."""
    rows = json.loads((ROOT / "book" / "results" / "mqar.json").read_text())["rows"]
    rows = [row for row in rows if row["mixer"] == "delta" and row["status"] == "ok"]
    assert len(rows) == 3
    (cell,) = select(tables["mqar"].cells, ["delta-width=64"])
    for row in rows:
        model = cell.model | {"width": row["width"], "conv_size": 2}
        same = replace(cell, model=model, runs=cell.runs[:1], training=replace(cell.training, batch=64))
        assert 0.5 < estimate(same).ms_per_step / row["lessons"][-1]["ms_per_step"] < 2


def test_the_estimate_grows_with_the_work_and_learns_from_what_was_measured(tables):
    cell = tables["tracking"].cells[6]
    base = estimate(cell)
    assert base.seconds > SETUP + cell.steps * base.ms_per_step / 1e3 and base.flops > 0
    for more in (
        replace(cell, runs=cell.runs * 2),
        replace(cell, model=cell.model | {"width": 256}),
        replace(cell, model=cell.model | {"delta_steps": 3}),
        replace(cell, model=cell.model | {"conv_size": 4}),
        replace(cell, task=cell.task | {"length": 80}),
    ):
        assert estimate(more).ms_per_step > base.ms_per_step and estimate(more).seconds > base.seconds

    def measured(mixer, ratio):
        return {"settings": {"model": {"mixer": mixer}}, "ms_per_step": ratio * 2.0, "estimated_ms_per_step": 2.0}

    assert calibrated(cell, []) == base
    assert calibrated(cell, [measured("gla", 3.0)]).ms_per_step == pytest.approx(3 * base.ms_per_step)
    both = calibrated(cell, [measured("gla", 3.0), measured("delta", 0.5)])
    assert both.seconds == pytest.approx(SETUP + (base.seconds - SETUP) / 2)


def test_a_dry_run_lists_every_cell_and_writes_nothing(tmp_path, capsys, tables):
    assert start("mqar", "tracking", "--dry-run", "--out", tmp_path / "r.json") == 0
    said = capsys.readouterr().out
    for name in ("mqar", "tracking"):
        assert all(f"{name} {cell.name} " in said for cell in tables[name].cells)
    assert "38 cells to measure, at most" in said and not list(tmp_path.iterdir())
    for words, message in ((["chess"], "no table chess"), (["mqar", "--cells", "rwkv"], "cells must fit 'rwkv'")):
        with pytest.raises(SystemExit, match=message):
            start(*words, "--dry-run")


# --- Files ------------------------------------------------------------------------------------------------------------


@SMOKE
@pytest.mark.parametrize("name", TABLES)
def test_smoke_run_is_marked_and_resumed(name, tmp_path, capsys):
    out = tmp_path / "reproduce.json"
    assert start(name, "--smoke", "--out", out) == 0
    assert capsys.readouterr().out.rstrip().endswith("NOT MEASURED: smoke run")
    record = json.loads(out.read_text())
    assert set(record) == {"not_measured", "provenance", "results"} and set(record["results"]) == {name}
    cells = [cell.name for cell in read(name, smoke=True).cells]
    found = record["results"][name]["cells"]
    assert list(found) == cells and not any(cell["measured"] for cell in found.values())
    files = {path.stem: path.read_text() for path in (tmp_path / "reproduce" / name).iterdir()}
    assert set(files) == set(cells) and not any("NaN" in text for text in files.values())
    one = json.loads(files[cells[0]])
    assert one["steps_by"] == "eager" and one["ended"] == "at the last step" and one["steps_taken"] == one["steps"]
    assert len(one["runs"]) == len(one["settings"]["runs"]) == len(one["curves"]["loss"])
    assert one["provenance"]["command"] and one["provenance"]["torch"] == torch.__version__
    # Again: all is there, and stays as it was.
    assert start(name, "--smoke", "--out", out) == 0
    assert "0 cells to measure" in capsys.readouterr().out
    assert all((tmp_path / "reproduce" / name / f"{k}.json").read_text() == text for k, text in files.items())


def finished(cell, classes=None, job=None):
    if job is None:
        options = {k: v for k, v in cell.task.items() if k != "kind"}
        task = tasks.make(cell.task["kind"], seed=DATA_SEED, **options)
        job = Job(task, cell.config(task.vocab), list(cell.runs), cell.training)
        job.train()
    return record_of(cell, job, 1.0, True, classes), job


@pytest.fixture(scope="module")
def parity():
    cell = read("tracking", smoke=True).cells[0]
    return cell, *finished(cell, 2)


def test_a_cell_of_other_settings_is_not_taken_for_done(parity, tmp_path):
    cell, record, _ = parity
    store = Store(tmp_path / "r.json", tmp_path / "partial", smoke=True)
    assert store.find(cell) is None
    store.add(cell, record)
    assert store.find(cell)["best"]["seeds"] == [0, 1]
    assert store.find(replace(cell, training=replace(cell.training, epochs=9))) is None
    assert store.find(replace(cell, runs=cell.runs[:1])) is None
    assert store.find(replace(cell, task=cell.task | {"train": 5})) is None
    assert Store(tmp_path / "r.json", tmp_path / "partial", smoke=False).find(cell) is None  # not measured
    elsewhere = Store(tmp_path / "new.json", tmp_path / "partial", smoke=True, known=tmp_path / "r")
    assert elsewhere.find(cell) == store.find(cell) and elsewhere.find(read("mqar").cells[0]) is None


def test_measured_cells_lie_beside_the_settings_or_where_they_are_asked_for(tmp_path):
    o = reproduce.EXPERIMENT.arguments(["--out", str(tmp_path / "r.json"), "--partial", str(tmp_path / "half")])
    elsewhere, here = reproduce.store_of(o, o.out), reproduce.store_of(o, RESULTS / "reproduce.json")
    cells = ROOT / "experiments" / "reproduce" / "cells"
    assert elsewhere.folder == tmp_path / "r" and elsewhere.known == here.folder == cells
    assert here.partial == tmp_path / "half"


def test_the_gathered_file_holds_the_cells_that_are_done(parity, tmp_path):
    cell, record, _ = parity
    store = Store(tmp_path / "r.json", tmp_path / "partial", smoke=True)
    small = {name: read(name, smoke=True) for name in TABLES}
    first = small["mqar"].cells[0]
    for one in (cell, first):
        store.add(one, record | {"settings": one.settings(), "place": one.place})
    store.gather(small)
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert list(results) == ["mqar", "tracking"] and list(results["tracking"]["cells"]) == [cell.name]
    assert results["tracking"]["all_cells"] == len(small["tracking"].cells)
    found = results["mqar"]["cells"][first.name]
    assert found["place"] == first.place and found["best"]["seeds"] == [0, 1] and found["device"]


def test_the_gathered_file_is_as_old_as_its_oldest_cell(parity, tmp_path):
    cell, record, _ = parity
    today = record["provenance"]["sources"]
    assert oldest([today, today]) == today and today["ops/delta.py"]
    older = record | {"provenance": record["provenance"] | {"sources": today | {"ops/delta.py": "another"}}}
    store = Store(tmp_path / "r.json", tmp_path / "partial", smoke=True)
    store.add(cell, older)
    store.gather({"tracking": read("tracking", smoke=True)})
    assert json.loads((tmp_path / "r.json").read_text())["provenance"]["sources"] == today | {"ops/delta.py": "another"}


def test_the_best_point_of_the_grid_is_that_of_all_its_seeds(parity):
    cell, _, job = parity
    assert [run.point for run in cell.runs] == [(1e-3, 0.01), (4e-3, 0.01)] * 2
    nan = float("nan")
    job.tests = [{"accuracy": [0.5, 0.9, 0.7, nan], "by_place": [], "step": 1, "examples": 1}]
    best = best_point(job, 2)
    assert (best["learning_rate"], best["seeds"]) == (1e-3, [0, 1]) and best["accuracy"] == [0.5, 0.7]
    assert best["score"] == pytest.approx([0.0, 0.4]) and best["mean"] == pytest.approx(0.2)
    assert best["spread"] == pytest.approx(0.4)
    job.tests[0]["accuracy"] = [0.5, 0.9, 0.7, 0.6]
    assert best_point(job, None)["score"] == [0.9, 0.6]


def test_accuracies_by_place_are_averaged_over_stretches():
    rows = [[None, 0.0, 1.0, 0.5], [None, 1.0, 1.0, 0.0]]
    assert thinned(rows, points=2) == {"last_of_stretch": [2, 3], "accuracy": [[0.5, 0.5], [1.0, 0.0]]}


def test_a_cell_that_runs_out_of_time_goes_on(tmp_path, capsys):
    """The same numbers as without a break; with other settings it begins anew."""
    o = reproduce.EXPERIMENT.arguments(["tracking", "--smoke", "--out", str(tmp_path / "r.json")])
    cell = read("tracking", smoke=True).cells[0]
    cell = replace(cell, task=cell.task | {"train": 480})
    store = Store(tmp_path / "r.json", tmp_path / "partial", smoke=True)
    assert not reproduce.measure(cell, store, o, "cpu", lambda: 0.0)
    assert store.find(cell) is None and store.partial_path(cell).exists()
    assert store.half(replace(cell, training=replace(cell.training, init=0.1))) is None
    assert reproduce.measure(cell, store, o, "cpu", lambda: 1.0)
    assert "goes on after step 50" in capsys.readouterr().out and not store.partial_path(cell).exists()
    whole, _ = finished(cell, 2)
    ours = store.find(cell)
    for name in ("best", "curves", "by_place", "steps_taken"):
        assert json.dumps(ours[name]) == json.dumps(plain(whole[name])), name


@SMOKE
def test_a_failure_is_told_and_the_budget_ends_a_run(tmp_path, capsys, monkeypatch):
    out = tmp_path / "r.json"
    assert start("regbench", "--smoke", "--out", out, "--budget", "0") == 2
    assert "stopped at the budget, 2 cells missing" in capsys.readouterr().out

    def broken(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(reproduce, "measure", broken)
    assert start("regbench", "--smoke", "--out", out) == 1
    assert capsys.readouterr().out.count("failed: RuntimeError: no memory") == 2


# --- Figures ----------------------------------------------------------------------------------------------------------


def made_up(table, score=0.5):
    """A gathered table in which every cell has a score."""
    best = {"mean": score, "score": [score - 0.1, score + 0.1], "seeds": [0, 1]}
    cells = {cell.name: {"place": cell.place, "best": best} for cell in table.cells}
    shown = {"title": table.title, "measure": table.measure, "across": table.across, "paper": table.paper}
    return {**shown, "all_cells": len(table.cells), "cells": cells}


@pytest.mark.parametrize("name", TABLES)
def test_each_table_is_drawn_next_to_the_papers(name, tables):
    table = made_up(tables[name])
    fig = draw.draw(table)
    lines = [line for ax in fig.axes for line in ax.get_lines()]
    drawn = [line.get_label() for line in lines]
    if name == "mqar":
        assert {"DeltaNet, paper", "GLA, paper", "RetNet, paper"} <= set(drawn)
        paper = lines[drawn.index("GLA, paper")]
        assert list(paper.get_ydata()) == [22, 95, 100, 100] and list(paper.get_xdata()) == [64, 128, 256, 512]
    else:
        crosses = [line.get_xdata()[0] for line in lines if line.get_label() == "paper"]
        bars = sum(len(ax.patches) for ax in fig.axes)
        assert (bars, len(crosses)) == {"mad": (36, 18), "regbench": (6, 4), "tracking": (22, 6)}[name]
        if name == "tracking":
            assert crosses == pytest.approx([100, 1.7, 97.1, 31.4, 97.1, 31.4])
    assert f"{len(tables[name].cells)} of {len(tables[name].cells)} cells; seeds: 2" in fig.get_supxlabel()
    plt.close(fig)


def test_changes_of_one_setting_have_a_figure_of_their_own(tables, tmp_path):
    table = made_up(tables["mad"])
    fig = draw.draw(table, changes=True)
    assert sum(len(ax.patches) for ax in fig.axes) == len(tables["mad"].cells) - 36
    labels = [label.get_text() for ax in fig.axes for label in ax.get_yticklabels()]
    assert {"vocab 32", "length 1024", "train 800", "p 0.4", "copied 96"} <= set(labels)
    plt.close(fig)
    paths = draw.save({"mad": table, "mqar": made_up(tables["mqar"]), "regbench": table | {"cells": {}}}, tmp_path)
    assert [path.name for path in paths] == ["mad.png", "mad_changes.png", "mqar.png"]


def test_what_was_gathered_is_plotted(parity, tmp_path, capsys):
    cell, record, _ = parity
    store = Store(tmp_path / "r.json", tmp_path / "partial", smoke=True)
    assert start("--plot", tmp_path / "figures", "--out", tmp_path / "r.json") == 1
    assert "nothing to draw" in capsys.readouterr().out
    store.add(cell, record)
    store.gather({"tracking": read("tracking", smoke=True)})
    assert start("--plot", tmp_path / "figures", "--out", tmp_path / "r.json") == 0
    (png,) = (tmp_path / "figures").iterdir()
    assert png.name == "tracking.png" and png.read_bytes()[:4] == b"\x89PNG"


def test_names_and_colours_are_there_for_every_model(tables):
    for table in tables.values():
        for cell in table.cells:
            assert draw.NAMES[cell.place["model"]] and "color" in draw.style_of(draw._family(cell.place["model"]))
