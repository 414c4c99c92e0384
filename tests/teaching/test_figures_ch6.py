"""Tables and figures of chapter 6: from the stored results, from none, and from runs of another text."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from dn_lib.teaching import plotting
from dn_lib.teaching.figures import ch6
from dn_lib.teaching.results import OLDER

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


def training(loss: float, **more) -> dict:
    """A run as `train_hybrid` stores it, of a model whose every loss is `loss`."""
    return {
        "provenance": {"device": "some GPU", "date": "2026-01-02T03:04", "git_commit": "abcdef012"},
        "corpus": {"name": "text", "files": 3, "bytes": 2_000_000, "train_tokens": 1_600_000, "file_list_sha256": "f"},
        "kind": "hybrid",
        "train": {"batch": 4, "length": 128, "steps": 40},
        "training_tokens": 800_000,
        "seconds": 5.0,
        "tokens_per_second": 1234.0,
        "flop_use": None,
        "model": {"parameters": 1000},
        "steps": [{"step": n, "loss": loss} for n in range(1, 41)],
        "evaluations": [{"step": 20, "bits_per_byte": 2.0}, {"step": 40, "bits_per_byte": 1.0}],
        "final": {
            "bits_per_byte": loss / math.log(2),
            "loss_by_position": {"position": [1, 8, 64, 128], "loss": [4 * loss, 2 * loss, loss, loss]},
            "loss_at_names": {"first": 2 * math.log(2), "later": math.log(2)},
        },
        "samples_before": [{"prompt": "def ", "text": "xyz", "parses": False}],
        "samples": [
            {"prompt": "def ", "text": "no", "parses": False},
            {"prompt": "def ", "text": "def f(): pass", "parses": True},
        ],
        "share_that_parses": 0.5,
        "decode": {"points": [{"context": 256, "seconds_per_token": 0.002, "cache_bytes": 2**20}]},
    } | more


RUNS = {"hybrid": training(math.log(2)), "DeltaNet": training(2 * math.log(2)), "Transformer": training(math.log(2))}


def test_runs_of_another_text_or_length_are_left_out():
    other = copy.deepcopy(RUNS["DeltaNet"]) | {"training_tokens": 1}
    assert list(ch6.runs({**RUNS, "DeltaNet": other, "Transformer": None})) == ["hybrid"]
    assert ch6.runs({**RUNS, "hybrid": None}) == {}
    assert list(ch6.runs()) == ["hybrid", "DeltaNet", "Transformer"]  # the stored ones


def test_tables_say_what_the_runs_hold():
    about = " ".join(ch6.about(RUNS).split())
    assert "to repeat:" in about and f"({OLDER})" in about and "--steps 40" in about
    _, hybrid, delta, _ = ch6.table(RUNS).splitlines()
    assert hybrid.split()[1:7] == ["1,000", "1,234", "-", "1.000", "2.00", "1.00"] and " 50% ±35%" in hybrid
    assert delta.split()[4] == "2.000"
    said = ch6.three_questions(RUNS)
    assert "was read 0.5 times" in said and "after 100% of the steps; at the end 1.000" in said
    assert "at positions 2 to 8: 2.000 bits per byte; in the second half: 1.000" in said
    assert said.splitlines()[-1] == "least first: Transformer +0.0%, hybrid +0.0%, DeltaNet +100.0%"
    assert ch6.samples(RUNS["hybrid"]).splitlines()[-1] == "def f(): pass" and "1 of 2 parse" in ch6.samples(
        RUNS["hybrid"]
    )
    assert ch6.decoding(RUNS).splitlines()[0].endswith("context    256:   1.00 MiB of cache, 2.0 ms a token")


def test_the_mean_over_positions_weighs_each_bin_by_its_positions():
    run = training(math.log(2))
    assert ch6.mean_loss(run, 0, 8) == pytest.approx((4 * 1 + 2 * 7) / 8)
    assert ch6.mean_loss(run, 64, 128) == pytest.approx(1)


def test_without_results_tables_say_so_and_figures_draw():
    assert ch6.about({}).count("not measured yet") == 3
    for said in (ch6.table({}), ch6.three_questions({}), ch6.samples(None), ch6.decoding({}), ch6.profile(None)):
        assert said == ch6.MISSING
    assert ch6.decoding_speeds(None) == ch6.MISSING and "not measured yet" in ch6.speeds(None)
    assert ch6.checks(None, None).count("not measured yet") == 2
    for fig in (ch6.training_runs({}), ch6.speed_against_length(None), ch6.ablations(None)):
        fig.canvas.draw()


def test_stored_results_are_shown_whole():
    speed = ch6.stored("throughput", ROOT)
    for said in (ch6.speeds(speed), ch6.profile(speed), ch6.decoding_speeds(speed)):
        assert len(said.splitlines()) > 4 and "nan" not in said
    assert len(ch6.measured_rows(speed)) > 3 and ch6.measured_rows({"not_measured": "smoke", "rows": [{}]}) == []
    said = ch6.checks(ch6.stored("two_gpus", ROOT), ch6.stored("fla_conversion", ROOT))
    assert "ddp" in said and "float32" in said and "limit" in said
    for fig in (ch6.training_runs(ch6.runs()), ch6.speed_against_length(speed)):
        fig.canvas.draw()
        assert all(ax.lines or ax.patches for ax in fig.axes)


def test_a_bar_of_an_ablation_is_the_median_and_every_seed_is_a_mark():
    rows = [
        {"variant": name, "against": against, "accuracy": value, "status": "ok"}
        for name, against, values in (
            ("DeltaNet layer", "DeltaNet layer", (1.0, 0.8, 0.9)),
            ("attention", "DeltaNet layer", (0.5,)),
            ("window of 4", "attention", (0.1,)),
        )
        for value in values
    ]
    summary = {"DeltaNet layer": {"median": 0.9}, "attention": {"median": 0.5}, "window of 4": {"median": 0.1}}
    ax = ch6.ablations({"rows": rows, "summary": summary}).axes[0]
    assert [bar.get_width() for bar in ax.patches] == [0.9, 0.5, 0.1]
    assert [list(line.get_xdata()) for line in ax.lines] == [[1.0, 0.8, 0.9], [0.5], [0.1]]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "DeltaNet layer",
        "attention",
        "\u2514 window of 4",
    ]
