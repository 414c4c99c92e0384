"""Figures of chapter 4: they draw what `dn_lib` computes, and the text reads off them what they show."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch.nn.functional import normalize

from dn_lib.forms import chunkwise as cw
from dn_lib.forms import chunkwise_backward as bw
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import scaled_inverse
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import ch4, ch4_measured

RESULTS = Path(__file__).resolve().parents[2] / "book" / "results"


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


def texts(ax):
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("count", [2, 4])
def test_schedule_has_three_boxes_for_each_chunk(count):
    grid, time = ch4.chunk_schedule(count).axes
    for label in ("$T, W, U, P$", r"$\tilde V,\ S'$", "$O$"):
        assert texts(time).count(label) == count
    assert sum(type(patch).__name__ == "FancyArrowPatch" for patch in time.patches) == count - 1
    assert len(grid.patches) == 2 * count


def test_a_chunk_is_drawn_with_its_state_and_without_the_future():
    A, states = torch.rand(12, 12).tril(), torch.randn(3, 2, 5)
    fig = plt.figure()
    ch4.draw_chunk(fig, A, states, 4, 1)
    left, right = (torch.tensor(ax.images[0].get_array()) for ax in fig.axes)
    assert torch.equal(left[:8].float(), A[:8]) and not left[8:].any()
    assert torch.equal(right.float(), states[1])


def test_maps_share_one_scale():
    fig = ch4.three_maps({"a": torch.eye(3), "b": 0.1 * torch.eye(3)}, "abc", "cab")
    assert {ax.images[0].get_clim() for ax in fig.axes if ax.images} == {(-1, 1)}


def test_row_sums_spread_as_the_text_says():
    maps = ch4.random_maps(200)
    spread = {name: A.sum(-1).std(0) for name, A in maps.items()}
    assert spread["softmax"].max() < 1e-12
    # 200 draws of a standard deviation are good to 5%; 20% is four of those, and the last 16 rows are averaged
    assert abs(spread["linear"][-16:].mean() - (56 / 16) ** 0.5) < 0.2 * (56 / 16) ** 0.5
    assert abs(spread["delta"][-16:].mean() - 0.8) < 0.16 and spread["delta"][:2].max() < 0.45


def test_the_spread_is_what_the_text_derives():
    """200 draws of a standard deviation are good to 5%; the largest of 64 deviations stays below four of those."""
    maps, expected = ch4.random_maps(200), ch4.expected_spread(64, 16, 0.8)
    for name, spread in expected.items():
        assert (maps[name].sum(-1).std(0) / spread - 1).abs().max() < 0.2
    limit = (0.8 / (2 - 0.8)) ** 0.5
    assert abs(ch4.expected_spread(1000, 16, 0.8)["delta"][-1] - limit) < 1e-9


def test_mechanisms_have_their_colours():
    left = ch4.row_sums(ch4.random_maps(3, length=16)).axes[0]
    for line, name in zip(left.lines, ("softmax", "linear", "delta"), strict=True):
        assert line.get_color() == plotting.MECHANISMS[name]["color"]


def test_recovered_states_are_right_to_rounding_if_values_have_one_size():
    fig, worst = ch4.recovered_states()
    one_size, growing, inverted = (line.get_ydata() for line in fig.axes[0].lines)
    assert max(one_size) == worst["values of one size"] < 1e-5
    assert max(growing) == worst["second half 1,000 times larger"] and 2e-5 < max(growing) < 2e-3
    assert max(growing[:31]) < 1e-5  # as long as the large values are undone
    assert max(inverted) > 1


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_undoing_is_exact_to_rounding_for_every_beta(strength):
    k, v = torch.randn(2, 512, 16, generator=torch.Generator().manual_seed(1))
    tokens, errors = ch4.undone((normalize(k, dim=-1), v, torch.full((512,), strength)), 32)
    assert tokens[0] == 32 and tokens[-1] == 480 and max(errors) < 1e-5


def test_gradients_suffer_where_later_values_are_much_larger():
    """The loss is on the first of two chunks, and the second grows: autograd keeps the state, the walk loses it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 128, 32, generator=generator)
    inputs = q, normalize(k, dim=-1), torch.cat([v[:64], 1e5 * v[64:]]), torch.rand(128, generator=generator)

    def gradient(form, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        o, _ = form(*leaves, chunk_size=64)
        return torch.autograd.grad(o[:64].square().sum(), leaves[0])[0][:64].double()

    exact = gradient(cw.chunkwise_delta_rule, torch.float64)
    kept, walked = (
        ((gradient(form, torch.float32) - exact).norm() / exact.norm()).item()
        for form in (cw.chunkwise_delta_rule, bw.reversible_chunkwise_delta_rule)
    )
    assert kept < 2e-6 and 1e-4 < walked < 2e-2  # measured: 3e-7 and 2e-3


def test_kept_bytes_follow_the_formula():
    forms = {"chunkwise": cw.chunkwise_delta_rule, "by hand": bw.reversible_chunkwise_delta_rule}
    _, kept = ch4.kept_bytes(forms, [64, 128], d=16)
    assert kept["by hand"] == [4 * (n * (3 * 16 + 1) + 16**2) for n in (64, 128)]
    assert kept["chunkwise"][1] > kept["by hand"][1]


def test_mirror_turns_every_arrow_and_transposes_its_matrix():
    """The graph is a program: run it in both directions, and compare with the recurrence and with autograd."""
    generator = torch.Generator().manual_seed(0)
    C, d_k, d_v = 7, 4, 3

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v, S = draw(C, d_k), normalize(draw(C, d_k), dim=-1), draw(C, d_v), draw(d_k, d_v)
    beta = 2 * torch.rand(C, generator=generator, dtype=torch.float64)
    N, D, P = scaled_inverse(k, beta), torch.diag(beta), (q @ k.mT).tril()
    eye = torch.eye(C, dtype=torch.float64)
    factors = {
        "$-K$": -k, r"$-K^\top$": -k.mT, "$I$": None, "$I + ND$": eye + N @ D, r"$I + DN^\top$": eye + D @ N.mT,
        "$D$": D, "$P$": P, r"$P^\top$": P.mT, r"$K^\top$": k.mT, "$K$": k, "$Q$": q, r"$Q^\top$": q.mT,
    }  # fmt: skip

    def run(values, order, turned):
        for node in order:
            total = 0
            for a, b, forward, backward, *_ in ch4.EDGES:
                start, end = (b, a) if turned else (a, b)
                if end == node:
                    factor = factors[backward if turned else forward]
                    total = total + (values[start] if factor is None else factor @ values[start])
            values[node] = total
        return values

    for _, _, there, back, *_ in ch4.EDGES:
        assert (factors[there] is None and factors[back] is None) or torch.equal(factors[there].mT, factors[back])
    forward = run({"S": S, "V": v}, ["R", "E", "pseudo", "O", "S'"], turned=False)
    leaves = [x.clone().requires_grad_() for x in (v, S)]
    o, state = recurrent_delta_rule(q, k, leaves[0], beta, scale=1.0, initial_state=leaves[1])
    assert torch.allclose(forward["O"], o) and torch.allclose(forward["S'"], state)
    do, dstate = draw(C, d_v), draw(d_k, d_v)
    backward = run({"O": do, "S'": dstate}, ["pseudo", "E", "R", "V", "S"], turned=True)
    dv, dS = torch.autograd.grad((o, state), leaves, (do, dstate))
    assert torch.allclose(backward["V"], dv) and torch.allclose(backward["S"], dS)
    assert torch.allclose(backward["E"], D @ backward["pseudo"])  # the node that is called D F


def test_boxes_of_the_timeline_are_as_wide_as_the_work():
    costs = {"affine": 3, "forward": 2, "gradient": 4, "backward": 6}
    ax = ch4.two_processes(costs).axes[0]
    boxes = [patch for patch in ax.patches if type(patch).__name__ == "FancyBboxPatch"]
    widths = [box.get_width() for box in boxes[::2]]
    assert [width / widths[0] * 3 for width in widths] == pytest.approx([3, 2, 4, 6])
    assert [box.get_width() for box in boxes[1::2]] == pytest.approx(widths)


def test_two_fifths_of_the_work_are_for_the_exchange():
    costs = ch4.segment_costs()
    assert abs((costs["affine"] + costs["gradient"]) / sum(costs.values()) - 0.4) < 0.01


def test_the_exchange_on_two_gpus_was_as_exact_as_the_text_says():
    stored = json.loads((RESULTS / "two_gpus.json").read_text())
    assert stored["backend"] == "nccl" and "H200" in stored["provenance"]["device"]
    assert stored["checks"]["sequence"]["float32"]["worst"] < 1e-6


def test_the_animation_of_chunks_is_small():
    shown = ch4.chunk_animation(length=12, chunk_size=4)
    assert len(shown.data) < 300_000


def test_letters_are_answered_as_each_mechanism_would():
    maps = ch4.letter_maps("aab", "aab", beta=1.0, d=64)
    assert all(torch.equal(picture, picture.tril()) for picture in maps.values())
    assert torch.allclose(maps["linear"][1, :2], torch.ones(2).double())  # both times that a was stored
    # Written again with beta = 1, the later value replaces the earlier one.
    assert torch.allclose(maps["delta rule"][1, :2], torch.tensor([0.0, 1.0]).double(), atol=1e-12)
    assert torch.allclose(maps["softmax"].sum(1), torch.ones(3).double())


def test_reads_through_the_errors_are_exact_where_the_product_with_the_state_is():
    errors = ch4_measured.rounded_reads(torch.float16)
    for through_r, through_u in errors.values():
        assert through_r < through_u
    # One rounding of a small number to float16, against the rounding of numbers that are a thousand times larger.
    assert errors["exact"][0] < 2**-11 and errors["exact"][1] > 0.1
    exact = ch4_measured.rounded_reads(torch.float64)
    assert max(max(pair) for pair in exact.values()) < 1e-10  # without rounding both ways give one number


def test_times_are_measured_for_each_size_and_form():
    times = ch4_measured.chunk_times([8, 16], length=32, d=4, device="cpu", seconds=0.001)
    assert len(times) == 2 and min(times) > 0
    forms = {"chunkwise": cw.chunkwise_delta_rule}
    took = ch4_measured.training_times(forms, length=32, d=4, device="cpu", seconds=0.001)
    assert list(took) == ["chunkwise"] and took["chunkwise"] > 0


def test_states_may_be_composed_and_those_of_linear_attention_summed():
    errors = ch4_measured.summed_states([1, 32], d=16, heads=2)
    assert max(errors["delta rule, composed"] + errors["linear attention, summed"]) < 1e-12
    first, second = errors["delta rule, summed"]
    assert 1e-3 < first < 0.2 and second > 0.3


def test_errors_of_an_exchange_are_zero_for_one_process_and_seen_where_there_are_some():
    job = ch4_measured.exchange_job([5, 8], batch=1, d_k=4, d_v=3)
    assert job["q"].shape == job["k"].shape == (1, 13, 4) and job["v"].shape == job["do"].shape == (1, 13, 3)
    leaves = [job[name].clone().requires_grad_() for name in ("q", "k", "v", "beta", "initial_state")]
    o, state = recurrent_delta_rule(*leaves[:4], initial_state=leaves[4])
    names = ("dq", "dk", "dv", "dbeta", "dinitial_state")
    gradients = torch.autograd.grad((o, state), leaves, (job["do"], job["dstate"]))
    whole = {"o": o.detach(), "state": state.detach()} | dict(zip(names, gradients, strict=True))
    parts = [{name: x[:, cut] for name, x in whole.items()} for cut in (slice(5), slice(5, None))]
    for part in parts:
        part |= {"state": whole["state"], "dinitial_state": whole["dinitial_state"]}
    errors = ch4_measured.exchange_errors(job, parts)
    assert set(errors) == set(whole) and max(errors.values()) < 1e-12
    parts[1]["dk"] = -parts[1]["dk"]
    errors = ch4_measured.exchange_errors(job, parts)
    assert errors.pop("dk") > 0.1 and max(errors.values()) < 1e-12


def test_packed_gradients_are_those_of_each_document():
    job, lengths = ch4_measured.exchange_job([5, 8], batch=1, d_k=4, d_v=3), [5, 8]
    q, k, v, beta, dO = (job[name][0] for name in ("q", "k", "v", "beta", "do"))
    starts, dS = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    packed = ch4_measured.packed_gradients(
        recurrent_delta_rule, (q, k, v, beta), starts, dO, dS, torch.tensor([0, 5, 13])
    )
    for n, parts in enumerate(zip(*(x.split(lengths) for x in (q, k, v, beta, dO)), strict=True)):
        leaves = [x.clone().requires_grad_() for x in (*parts[:4], starts[n])]
        outputs = recurrent_delta_rule(*leaves[:4], initial_state=leaves[4])
        alone = torch.autograd.grad(outputs, leaves, (parts[4], dS[n]))
        for whole, wanted in zip(packed[:4], alone[:4], strict=True):
            assert torch.allclose(whole.split(lengths)[n], wanted, atol=1e-12)
        assert torch.allclose(packed[4][n], alone[4], atol=1e-12)


def test_the_stored_exchange_says_what_it_found_and_where():
    record = json.loads((RESULTS / "two_gpus.json").read_text("utf-8"))
    found, where = ch4_measured.exchange_on_gpus(record).split("\n", 1)
    errors = record["checks"]["sequence"]["float32"]["errors"]
    assert found.endswith(f"{max(max(process.values()) for process in errors):.0e}") and "nccl" in found
    assert record["provenance"]["device"] in where
