"""Figures and tables of the appendices."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from dn_lib import cost
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import appendix, ch5

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


@pytest.fixture(scope="module")
def results():
    names = ("operator", "ladder", "paper_figure", "errors", "sanitizer", "chapter_times", "error_microscope")
    return {name: ch5.stored(name, ROOT) for name in names}


# --- with and without a result


def test_tables_say_that_nothing_is_measured():
    for table in (
        appendix.errors_by_keys, appendix.how_measured, appendix.forward_table, appendix.host_table,
        appendix.lead_table, appendix.paper_table, appendix.occupancy_table, appendix.inverse_table,
        appendix.units_table, appendix.inverses_table,
    ):  # fmt: skip
        assert str(table(None)) == appendix.NOTHING
    assert "none" in str(appendix.errors_table(None, None, None))


def test_figures_are_drawn_without_a_result():
    for figure in (
        appendix.lead, appendix.measured_against_predicted, appendix.operator_sweeps, appendix.each_output,
        appendix.inverses,
    ):  # fmt: skip
        assert figure(None).axes


def test_every_row_of_the_committed_results_is_in_its_table(results):
    operator, ladder = results["operator"], results["ladder"]
    assert len(appendix.forward_table(operator).rows) == len(appendix.grid(operator))
    kernels = appendix.kernels_of(ladder)
    plain = [k for row, k in kernels if k["kernel"] not in appendix.INVERTING and row["stage"] != "one token"]
    assert len(appendix.occupancy_table(ladder).rows) == len(plain)
    assert {name for names in appendix.KINDS.values() for name in names} >= {k["kernel"] for _, k in kernels}


def test_a_row_with_other_blocks_is_refused(results):
    row, kernel = appendix.kernels_of(results["ladder"])[0]
    with pytest.raises(ValueError, match="measured with other blocks"):
        appendix.requested(row, kernel | {"bytes": 1}, results["ladder"])


def test_float32_dots_are_predicted_by_their_own_rate(results):
    """In the drawing no kernel lies below its prediction by more than the band."""
    for line in appendix.measured_against_predicted(results["ladder"]).axes[0].lines[1:]:
        assert all(measured > 0.6 * predicted for predicted, measured in line.get_xydata())


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "fits"), [(255, 0, 4, 2), (32, 113_000, 4, 2), (32, 0, 32, 2)]
)
def test_programs_that_fit_on_one_sm(registers, shared, warps, fits):
    assert appendix.at_once({"registers": registers, "shared_bytes": shared, "warps": warps}) == fits


# --- a chunk on Hopper


def test_every_lane_holds_the_same_number_of_entries():
    owners = [appendix.owner(row, column) for row in range(64) for column in range(64)]
    assert {owners.count(o) for o in set(owners)} == {32} and len(set(owners)) == 128


def test_the_model_begins_products_in_the_order_of_the_source():
    from dn_lib.kernels.hopper import backward, scan

    made = {"K S": "read", "Q S": "O", "Q Kᵀ": "P", "N D R": "E", "Kᵀ Vn": "S", "P Vn": "O"}
    begun = [made[e.name] for e in appendix.schedule(1) if e.lane == "tensor cores"]
    assert begun == appendix.products_in_source(scan.chunk_scan_fwd)
    assert len(appendix.products_in_source(backward.chunk_scan_bwd)) == 15


@pytest.mark.parametrize("save", [False, True])
def test_nothing_in_the_model_begins_before_what_it_needs(save):
    events = {(e.lane, e.name, e.chunk): e for e in appendix.schedule(3, save=save)}
    needs = (  # in one chunk: what has to end before what begins
        ("TMA, loads", "k v N q", "tensor cores", "K S"),
        ("tensor cores", "K S", "threads", "R"),
        ("threads", "R", "tensor cores", "N D R"),
        ("tensor cores", "Q Kᵀ", "threads", "P"),
        ("tensor cores", "N D R", "threads", "Vn"),
        ("threads", "Vn", "tensor cores", "P Vn"),
        ("tensor cores", "P Vn", "threads", "S, o"),
        ("threads", "S, o", "TMA, stores", "o"),
    )
    for chunk in range(3):
        for lane, earlier, other, later in needs:
            assert events[lane, earlier, chunk].end <= events[other, later, chunk].start + 1e-9
    for lane in appendix.LANES:
        own = sorted((e for e in appendix.schedule(3, save=save) if e.lane == lane), key=lambda e: e.start)
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(own))


def test_work_of_the_model_is_that_of_the_count():
    shape = cost.Shape(B=1, L=64 * 5, H=1, d_k=128, d_v=128)
    lanes = {lane: [e for e in appendix.schedule(5, save=False) if e.lane == lane] for lane in appendix.LANES}
    flops = sum(e.end - e.start for e in lanes["tensor cores"]) * appendix.RATES["dots"]
    assert flops == pytest.approx(cost.two_kernels(shape)[1].flops)
    moved = (
        sum(e.end - e.start for lane in ("TMA, loads", "TMA, stores") for e in lanes[lane]) * appendix.RATES["memory"]
    )
    without = shape.tensor_bytes("beta") + shape.tensor_bytes("final")  # threads read the one, the end writes the other
    assert moved == pytest.approx(cost.two_kernels(shape)[1].bytes - without)


def test_bytes_of_the_backward_are_eighteen_and_a_half_and_nine_and_a_half():
    totals = [row[-1] for row in appendix.backward_table().rows if row[0].endswith("in all")]
    assert totals == ["18.5", "9.5"]


def test_flops_of_the_hopper_backward_are_those_of_its_products():
    """Six of the fifteen have a state in them: 2 C d d, the others 2 C C d."""
    (kernel,) = appendix.backward_kernels()["one kernel"]
    chunks = 16 * 16 * 2048 // 64
    assert kernel.flops == chunks * (6 * 2 * 64 * 128 * 128 + 9 * 2 * 64 * 64 * 128)


def test_shared_memory_fits_one_program():
    assert 113 < sum(appendix.shared_memory(64).values()) < sum(appendix.shared_memory(128).values()) <= 227


@pytest.mark.parametrize(
    ("dtype", "rule", "u"), [(torch.bfloat16, "bfloat16", 2**-8), (torch.float16, "float16", 2**-11)]
)
def test_errors_are_got_back_whatever_the_strength(dtype, rule, u):
    strengths = torch.tensor([2.0**-100, 2.0**-41, 2.0**-20, 2.0**-6, 1.0, 2.0], dtype=torch.float64)
    assert (appendix.weak_rows(strengths, dtype, rule) < u).all()


def test_float16_cannot_keep_pseudo_values_of_weak_rows():
    assert appendix.weak_rows(torch.tensor([2.0**-30], dtype=torch.float64), torch.float16, "Vn") > 0.5


def test_a_result_that_names_the_kernels_is_shown():
    row = {"key": "grid x", "status": "ok", "B": 1, "L": 2, "H": 3, "d_k": 128, "plan": "the kernels for Hopper"}
    times = {"forward": {"ours_ms": 1.0}, "forward_backward": {"ours_ms": 2.0}}
    assert appendix.hopper_gain({"rows": [row | times]}).rows == [("1 x 2 x 3 x 128", "1.000", "2.000")]
    assert "not measured yet" in str(appendix.hopper_gain({"rows": [row | times | {"plan": "Triton"}]}))
