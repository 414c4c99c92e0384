"""Figures of study 3: they draw what `dn_lib` computes, and the text reads off them what they show."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pytest
import torch

from dn_lib.forms.serving import dequantise_state, quantise_state
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import s3

DRAWN = {
    "s3.what_moves": s3.what_moves,
    "s3.draw_maps": lambda: s3.draw_maps(s3.family_maps(3, 4), dict.fromkeys(s3.RULES, "16 numbers")),
    "s3.traffic": lambda: s3.traffic(64, 1, 4, s3.counted_bytes(64, 1, 4)),
    "s3.draw_taken_back": lambda: s3.draw_taken_back([1, 2], s3.taken_back([1, 2], torch.float32, d=4)),
    "s3.draw_drift": lambda: s3.draw_drift([4, 8], s3.drift([4, 8], d=4, heads=1), {}),
}


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


def large_enough(fig):
    return plotting.smallest_type(fig) >= plotting.SMALLEST


@pytest.mark.parametrize(("ranks", "reader"), [(4, 2), (3, 1)])
def test_what_is_coloured_is_what_is_needed(ranks, reader):
    tokens = 8
    fig = s3.what_moves(ranks, reader, tokens)
    assert large_enough(fig)
    for ax, wanted in zip(fig.axes, (3, 0, reader * tokens), strict=True):
        cells = [patch for patch in ax.patches if getattr(patch, "get_width", int)() == 1]
        assert len(cells) == ranks * tokens
        face = [tuple(cell.get_facecolor()[:3]) for cell in cells]
        assert sum(f != (1, 1, 1) and f != (0.75,) * 3 for f in face) == wanted
    boxes = [text.get_text() for text in fig.axes[1].texts]
    assert boxes == [f"${letter}_{r}$" for r in range(reader) for letter in "MX"]


def test_maps_are_diagonal_unless_something_is_erased():
    maps = s3.family_maps(12, 8)
    assert list(maps) == list(s3.RULES)
    for name, M in maps.items():
        off = (M - M.diagonal().diag()).abs().max()
        assert (off > 0.01) == name.endswith("delta rule"), name
    assert torch.equal(maps["linear attention"], torch.eye(8, dtype=torch.float64))
    assert torch.unique(maps["decay"].diagonal()).numel() == 1 and len(torch.unique(maps["gates per channel"])) == 9
    # A gate commutes: the gated map is the plain one, faded.
    assert torch.allclose(maps["gated delta rule"], maps["decay"][0, 0] * maps["delta rule"], atol=1e-12)
    assert large_enough(s3.draw_maps(maps, dict.fromkeys(maps, "64 numbers")))


def test_bytes_are_counted_and_lie_on_their_lines():
    counted = s3.counted_bytes(512, 1, 8)
    assert counted == s3.formula_bytes(512, 1, 8)
    assert counted["delta rule, with or without gates"] == [2 * x for x in counted["linear attention"]]
    fig = s3.traffic(512, 1, 8, counted)
    assert large_enough(fig)
    left, right = fig.axes
    assert len(left.lines) == 2 * len(counted) and len(right.lines) == len(counted)


def test_the_text_on_bytes_reads_off_the_figure():
    formula = s3.formula_bytes(4096, 2, 64)
    pair, keys = formula["delta rule, with or without gates"], formula["attention (all keys and values)"]
    assert [a < b for a, b in zip(pair, keys, strict=True)] == [True] * 4 + [False] * 2
    assert pair[4] == keys[4]  # at 32 processes, 128 tokens each
    by_length = [s3.formula_bytes(n, 2, 64, [8]) for n in (512, 1024, 2048)]
    less = [x["delta rule, with or without gates"] < x["attention (all keys and values)"] for x in by_length]
    assert less == [False, False, True]


def test_rounded_maps_add_up_where_little_is_erased():
    strong, weak = s3.rounded_pairs(1.0), s3.rounded_pairs(0.01)
    unit = 2**-8  # twice bfloat16's unit of rounding
    for errors in (strong, weak):
        assert errors["M"][0] == 0  # the first stretch begins at zero
        assert max(errors["X"]) < unit
        assert errors["M"][-1] > 1.5 * errors["M"][1]
        assert max(errors["M and X"]) < 1e-2
    assert weak["M"][-1] > 1.5 * strong["M"][-1]


def test_what_was_written_is_taken_back_and_inverses_lose_digits():
    exact = s3.taken_back([1, 8], torch.float64, d=16)
    rough = s3.taken_back([1, 8], torch.float32, d=16)
    for strength in s3.STRENGTHS:
        assert max(exact["roll back"][strength] + exact["replay"][strength]) < 1e-14
        assert max(rough["roll back"][strength] + rough["replay"][strength]) < 1e-6
    one, eight = rough["step back"][0.99]
    assert 1e-7 < one < 1e-4 and eight > 1e-2
    assert large_enough(s3.draw_taken_back([1, 8], rough))


def test_a_draft_keeps_a_64th_of_what_copies_keep():
    kept = s3.kept_bytes([1, 8, 32], 128)
    assert [a // b for a, b in zip(kept["copies"], kept["keys and writes"], strict=True)] == [64] * 3


def test_drift_stops_where_something_is_erased():
    lengths = [32, 64, 128, 256, 512]
    nearest = s3.drift(lengths, d=16, heads=2)
    for rows in nearest.values():
        assert all(0 < off <= most for off, most in rows)
    linear, delta, gated = ([off for off, _ in nearest[name]] for name in s3.KINDS)
    assert linear[-1] > 1.7 * linear[1]  # the root of 8 in the sum; the state's own growth is another matter
    assert delta[-1] < 1.3 * delta[1] and gated[-1] < 1.3 * gated[1]
    random = s3.drift(lengths, random=True, d=16, heads=2)
    ratio = random["delta rule"][-1][0] / nearest["delta rule"][-1][0]
    assert abs(ratio / math.sqrt(2) - 1) < 0.2
    seldom = s3.drift(lengths[1:], every=64, d=16, heads=2)
    assert seldom["delta rule"][-1][0] < delta[-1] / 3
    assert large_enough(s3.draw_drift(lengths, nearest, {"random": random, "every 64": seldom}))


def test_small_writes_are_lost_to_the_nearest_and_not_at_random():
    found = {}
    for name, noise in {"nearest": None, "random": torch.Generator().manual_seed(0)}.items():
        S = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        for _ in range(300):
            S = S + torch.tensor([[0.0, 0.003]], dtype=torch.float64)
            S = dequantise_state(*quantise_state(S, generator=noise))
        found[name] = S[0, 1].item()
    assert found["nearest"] == 0 and 0.6 < found["random"] < 1.2
