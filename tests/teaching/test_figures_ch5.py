"""Figures and tables of chapter 5: computed by `dn_lib` or read from results, with and without a result."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from dn_lib import cost
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import ch5
from dn_lib.teaching.results import OLDER

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


def kernel(name, ms, predicted, **more):
    known = {
        "kernel": name,
        "name": name,
        "ms": ms,
        "predicted_ms": predicted,
        "ratio": ms / predicted,
        "bound": "bytes",
    }
    return known | {"flops": 10**9, "bytes": 10**7} | more


def stage(name, *kernels, d=128):
    total = {key: sum(k[key] for k in kernels) for key in ("ms", "predicted_ms")}
    sizes = {"B": 16, "L": 2048, "H": 16, "d": d}
    return {"stage": name, "status": "ok", "kernels": list(kernels), "ratio": 1.0, "bound": "bytes"} | sizes | total


LADDER = {
    "ceilings": {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 7e14},
    "rows": [
        stage("two kernels", kernel("chunk_inverse", 0.1, 0.05), kernel("walk", 0.2, 0.1)),
        stage("four kernels", *(kernel(n, ms, 0.1) for n, ms in (("ut_kernel", 9), ("a", 1), ("b", 2), ("c", 3)))),
    ],
}


def test_results_are_found_upwards_and_say_where_they_come_from(tmp_path):
    folder = tmp_path / "book" / "results"
    folder.mkdir(parents=True)
    where = {
        "device": "some GPU",
        "date": "2026-01-02T03:04",
        "git_commit": "abcdef012",
        "torch": "2.0",
        "triton": "3.0",
    }
    (folder / "one.json").write_text(json.dumps({"provenance": where}))
    (tmp_path / "book" / "appendix").mkdir()
    found = ch5.stored("one", tmp_path / "book" / "appendix")
    assert ch5.stored("two", tmp_path) is None
    said = " ".join(ch5.origin(one=found).split())
    assert said == f"one: some GPU, 2026-01-02, commit abcdef0, torch 2.0, triton 3.0 ({OLDER})"


def test_a_rung_names_kernels_as_they_are_called_today_and_leaves_the_result_alone():
    before = json.dumps(LADDER)
    total, *kernels = ch5.rung(LADDER, "two kernels").rows
    assert [row[0] for row in kernels] == ["`chunk_inverse`", "`chunk_scan_fwd`"]
    assert total[:4] == ("two kernels", "16 x 2048 x 16 x 128", "0.150", "0.300") and json.dumps(LADDER) == before


def test_of_an_older_result_the_fair_ladder_exchanges_nothing_but_the_inverse():
    table = ch5.fair_ladder(LADDER)
    four, two = table.rows
    assert four[-2] == "6.100" and two[-2] == "0.300"  # 0.1 + 1 + 2 + 3, and 0.1 + 0.2
    (note,) = table.notes
    assert note.startswith("An older result")


def test_the_fair_ladder_shows_every_rung_where_all_have_one_inverse():
    rungs = [
        stage(name, kernel("a", ms, ms / 2)) | {"inverse": "blocks"}
        for name, ms in zip(ch5.RUNGS, (4, 3, 2, 1), strict=True)
    ]
    record = {**LADDER, "rows": [*rungs, LADDER["rows"][0]]}
    table = ch5.fair_ladder(record)
    assert table.head[0].startswith("the same inverse on all") and not table.notes
    assert [row[0] for row in table.rows] == [*ch5.RUNGS, "two kernels, the operator"]
    assert [row[-2] for row in table.rows] == ["4.000", "3.000", "2.000", "1.000", "0.300"]
    mixed = [rungs[0] | {"inverse": "merging"}, *rungs[1:]]
    assert str(ch5.fair_ladder({**LADDER, "rows": mixed})) == "not measured yet"


@pytest.mark.parametrize(
    ("stride", "itemsize", "count"), [(4, 4, 4), (8, 4, 8), (32, 4, 32), (64, 4, 32), (2, 2, 2), (1, 1, 1)]
)
def test_sectors_of_a_warp(stride, itemsize, count):
    assert len(ch5.sectors([stride * thread for thread in range(32)], itemsize)) == count


def test_a_number_across_two_sectors_touches_both():
    assert ch5.sectors([30], 4).tolist() == [0, 1]


def test_a_hundred_floats_are_thirteen_sectors():
    assert len(ch5.sectors([4 * i for i in range(100)], 4)) == 13  # as the chapter says


def test_a_drawing_of_sectors_colours_those_that_move():
    fig = ch5.coalescing()
    white = plt.matplotlib.colors.to_rgba("0.93")
    coloured = [sum(p.get_facecolor() not in (white, (0, 0, 0, 1)) for p in ax.patches) for ax in fig.axes]
    assert coloured == [4, 8, 32]


def test_the_tile_of_a_head_holds_its_places_in_memory():
    flat, tile = ch5.tensor_of_heads(L=3, H=2, d=2, head=1, rows=2).axes
    assert [t.get_text() for t in tile.texts] == ["2", "3", "6", "7"]
    assert sorted(int(t.get_text()) for t in flat.texts) == list(range(12))


def test_no_measured_point_lies_above_its_roof():
    """That of the committed result: work over time by its own counts and rates."""
    ladder = ch5.stored("ladder", ROOT)
    fig = ch5.roofline(ladder)
    roof, *points = fig.axes[0].lines
    bandwidth, rate = ch5.ceilings(ladder)
    assert points
    for line in points:
        for intensity, reached in line.get_xydata():
            assert reached <= 1.05 * min(intensity * bandwidth, rate) / 1e12  # a copy's rate is itself a measurement
    assert len(roof.get_xydata()) == 100


def test_bars_are_as_long_as_the_bytes():
    shape = cost.Shape(**ch5.LARGE)
    ax = ch5.bytes_of_forms(None).axes[0]
    ends = [
        max(p.get_x() + p.get_width() for p in ax.patches if round(p.get_y() + p.get_height() / 2) == y)
        for y in range(4)
    ]
    forms = (cost.delta_rule_in_steps(shape), cost.two_kernels(shape), cost.fused(shape), cost.compulsory(shape))
    assert ends == pytest.approx([cost.total_bytes(f) / (16 * 2048 * 16) for f in forms])


def test_methods_that_agree_are_drawn_in_marks_of_different_size():
    ax = ch5.inverse_errors(
        [0.0, 1.0], {"substitution": [1e-7, 1e-7], "doubling": [1, 2], "merging": [1e-7, 1e-7]}
    ).axes[0]
    sizes = {line.get_label(): line.get_markersize() for line in ax.lines if not line.get_label().startswith("_")}
    assert len(set(sizes.values())) == 3


def test_each_baseline_of_softmax_attention_is_named():
    rows = [
        {"others": {"softmax_attention.forward": {}, "softmax_attention_cudnn.forward": {}, "recurrent.forward": {}}}
    ]
    assert list(ch5.baselines(rows)) == [
        "softmax attention (FlashAttention), measured",
        "softmax attention (cudnn), measured",
    ]


def test_which_form_draws_predictions_alone_where_nothing_is_measured():
    ax = ch5.which_form(None, None).axes[0]
    assert [line.get_label().rsplit(", ", 1)[1] for line in ax.lines] == ["predicted"] * 3
    labels = [line.get_label() for line in ch5.which_form(ch5.stored("operator", ROOT), LADDER).axes[0].lines]
    assert "four kernels, float32 inverse, measured" in labels and "delta rule, the operator, measured" in labels
