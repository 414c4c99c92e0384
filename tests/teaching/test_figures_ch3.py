"""Figures of chapter 3: they draw what `dn_lib` computes, and the text reads off them what they show."""

from __future__ import annotations

from math import comb, degrees

import matplotlib.pyplot as plt
import pytest
import torch
from torch.nn.functional import normalize

from dn_lib.forms import householder as hh
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import ch3


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


def texts(fig):
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def random_keys(length, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = normalize(torch.randn(length, d, generator=generator, dtype=torch.float64), dim=-1)
    return k, 2 * torch.rand(length, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9, 1.0])
def test_correlated_keys_are_unit_vectors_at_about_the_cosine(cosine):
    k = ch3.correlated_keys(200, 64, cosine)
    assert (k.norm(dim=-1) - 1).abs().max() < 1e-12
    off = (k @ k.mT)[torch.ones(200, 200).tril(-1).bool()]
    assert abs(off.mean() - cosine) < 0.02


@pytest.mark.parametrize("gap", [1, 2, 5, 8])
def test_paths_are_counted_by_binomials(gap):
    found = ch3.paths(gap + 3, 3)
    assert len(set(found)) == len(found) == 2 ** (gap - 1)
    for edges in range(1, gap + 1):
        assert sum(len(path) == edges + 1 for path in found) == comb(gap - 1, edges - 1)


def test_weights_of_all_paths_sum_to_n():
    k, beta = random_keys(7)
    N = hh.scaled_inverse(k, beta)
    for i in range(7):
        for j in range(i):
            total = sum(ch3.weight(path, k, beta) for path in ch3.paths(i, j))
            assert abs(total - N[i, j]) < 1e-12


def test_every_path_has_a_row_and_its_sum_is_the_entry_of_n():
    k, beta = random_keys(4)
    fig = ch3.every_path(k, beta)
    written = texts(fig)
    for path in ch3.paths(3, 0):
        assert f"{ch3.weight(path, k, beta):+.3f}" in written
    assert written[-1].endswith(f"{hh.scaled_inverse(k, beta)[3, 0]:+.3f}")


def test_images_stand_where_the_matrix_sends_the_vector():
    k, x = torch.tensor([0.6, 0.8]), torch.tensor([1.0, -0.5])
    fig = ch3.images_of_a_vector(k, x, [0.0, 1.0, 2.0])
    points = [line.get_xydata()[0].tolist() for line in fig.axes[0].lines if len(line.get_xydata()) == 1]
    expected = torch.stack([hh.householder_matrix(k, beta) @ x for beta in (0.0, 1.0, 2.0)])
    assert torch.allclose(torch.tensor(points), expected)


@pytest.mark.parametrize("angle", [0.2, 0.5, 1.0])
def test_two_reflections_turn_by_twice_the_angle(angle):
    titles = [ax.get_title() for ax in ch3.two_reflections(angle).axes]
    assert titles[1].endswith(f"turned by {degrees(2 * angle):.0f}°")
    assert titles[2].endswith(f"turned by {-degrees(2 * angle):.0f}°")


def test_squeezed_plane_at_one_is_flat():
    fig = plt.figure()
    ch3.draw_squeezed_plane(fig, torch.tensor([0.8, 0.6]), 1.0)
    circle = torch.tensor(fig.axes[0].lines[-1].get_xydata())
    assert (circle @ torch.tensor([0.8, 0.6], dtype=circle.dtype)).abs().max() < 1e-6


def test_two_tokens_draw_w_and_u():
    k, v = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[2.0, 0.0], [2.0, 2.0]]], dtype=torch.float64)
    fig = ch3.two_tokens(k, v, torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert {"$w_2$", "$u_2$", "$k_1 = w_1$", "$v_1 = u_1$", "$-0.6\\,w_1$", "$-0.6\\,u_1$"} <= set(texts(fig))


def test_pictures_of_the_product_are_its_parts():
    k, beta = random_keys(6, 24)
    pictures = [torch.tensor(ax.images[0].get_array()) for ax in ch3.wy_product(k, beta).axes if ax.images]
    product, eye, keys, W = pictures
    assert torch.allclose(product, eye - keys @ W, atol=1e-12)
    assert len({tuple(ax.images[0].get_clim()) for ax in ch3.wy_product(k, beta).axes if ax.images}) == 1


def test_merge_shows_n_level_by_level():
    k, beta = random_keys(8)
    N = hh.scaled_inverse(k, beta)
    fig = ch3.merge_of_paths(k, beta)
    levels = [torch.tensor(ax.images[0].get_array()) for ax in fig.axes if ax.images]
    assert [int((level != 0).sum()) for level in levels] == [4, 12, 28]
    assert torch.equal(levels[-1], N)
    frames = [[patch.get_bbox().bounds for patch in ax.patches] for ax in fig.axes if ax.images]
    assert frames[-1] == [(-0.5, 3.5, 4.0, 4.0)]  # x, y, width, height: rows 5 to 8, columns 1 to 4


def test_key_sets_share_one_scale_and_say_their_largest_entry():
    axes = [ax for ax in ch3.three_key_sets().axes if ax.get_xlabel().startswith("max")]
    assert len(axes) == 15 and {ax.images[0].get_clim() for ax in axes} == {(-4, 4)}
    assert axes[11].get_xlabel() == f"max {2**8 * comb(14, 7):,}"  # eight edges, identical keys, beta 2


def test_the_merge_returns_no_number_above_two():
    for cosine in (0.3, 0.9, 1.0):
        k = ch3.correlated_keys(64, 16, cosine)
        beta = torch.full((64,), 2.0, dtype=torch.float64)
        assert max(ch3.largest_numbers(k, beta, "blocked")) <= 2 + 1e-9
    assert max(ch3.largest_numbers(k, beta, "doubling")) > 1e20


def test_methods_take_no_colour_of_a_mechanism():
    taken = {style["color"] for style in plotting.MECHANISMS.values() if style["color"] != "#000000"}
    assert not taken & {style["color"] for style in ch3.METHODS.values()}


@pytest.mark.parametrize("length", [1, 2, 8, 64])
def test_merging_t_gives_t(length):
    k, beta = random_keys(length)
    beta[0] = 0.0
    assert (ch3.merged_t(k, beta) - hh.ut_transform(k, beta)).abs().max() < 1e-10
    stacked = ch3.merged_t(torch.stack([k, -k]), torch.stack([beta, beta / 2]))
    assert (stacked[1] - hh.ut_transform(k, beta / 2)).abs().max() < 1e-10


def test_merging_t_needs_a_power_of_two():
    with pytest.raises(ValueError, match="power of two, got 6"):
        ch3.merged_t(*random_keys(6))


def test_the_error_of_several_chunks_is_the_largest():
    k = torch.stack([ch3.correlated_keys(16, 8, cosine) for cosine in (0.2, 0.99)])
    beta, rounded = torch.full((2, 16), 1.9), hh.rounded_matmul(torch.float16)
    single = [ch3.rounding_error(k[n], beta[n], "blocked", rounded) for n in range(2)]
    assert ch3.rounding_error(k, beta, "blocked", rounded) == pytest.approx(max(single), rel=1e-2)


# What chapter 3 says of rounding. Each limit leaves a factor of two.
@pytest.mark.parametrize(
    ("top", "dtype", "length", "limit"),
    [
        (1, torch.float16, 64, 0.003), (1, torch.float16, 256, 0.005), (1, torch.bfloat16, 64, 0.02),
        (1, torch.bfloat16, 256, 0.04), (2, torch.float16, 16, 0.01), (2, torch.float16, 64, 0.06),
        (2, torch.float32, 256, 1e-4),
    ],
)  # fmt: skip
def test_the_worst_error_of_merging(top, dtype, length, limit):
    strengths = ch3.STRENGTHS[f"beta up to {top}"]
    assert ch3.worst_error(length, "blocked", dtype, strengths, ch3.COSINES) < limit


def test_half_precision_has_a_limit_near_beta_two():
    strengths = ch3.STRENGTHS["beta up to 2"]
    assert ch3.worst_error(256, "blocked", torch.float16, strengths, ch3.COSINES) > 0.03
    assert ch3.worst_error(64, "blocked", torch.bfloat16, strengths, ch3.COSINES) > 0.2
    for dtype, factor in ((torch.float16, 2), (torch.bfloat16, 10)):  # measured: 4 and 36
        n, t = (ch3.worst_error(256, name, dtype, strengths, ch3.COSINES) for name in ("blocked", "merged T"))
        assert n > factor * t


def test_the_table_says_safe_where_the_error_leaves_a_factor_of_two_and_fails_where_it_is_twice_the_limit():
    table = ch3.safety_table(64)
    methods = dict(zip(table.head[2:], ("substitution", "solve", "doubling", "merged T", "blocked"), strict=True))
    assert list(methods)[-2:] == ["merging T", "merging N"] and len(table.rows) == len(ch3.SAFE)
    for (_, allowed, *verdicts), ((top, dtype), limit) in zip(table.rows, ch3.SAFE.items(), strict=True):
        assert float(allowed.strip("%")) / (100 if "%" in allowed else 1) == pytest.approx(limit)
        for method, verdict in zip(methods.values(), verdicts, strict=True):
            error = ch3.worst_error(64, method, dtype, ch3.STRENGTHS[top], ch3.COSINES)
            if method == "solve" and dtype != torch.float32:
                assert verdict == "-"
            else:
                assert verdict == ("safe" if error < limit / 2 else "fails")
                assert not limit / 2 <= error <= 2 * limit
    assert [row[-1] for row in table.rows] == 5 * ["safe"] + ["fails"]


def test_up_to_beta_one_the_merges_are_about_equally_good():
    strengths = ch3.STRENGTHS["beta up to 1"]
    n, t = (ch3.worst_error(64, name, torch.float16, strengths, ch3.COSINES) for name in ("blocked", "merged T"))
    assert n / 2 < t < 2 * n


@pytest.mark.parametrize(("cosine", "strength", "limit"), [(0.5, 1.0, 4e-6), (1.0, 2.0, 2e-2)])
def test_doubling_holds_on_sixteen_tokens(cosine, strength, limit):
    k, beta = ch3.correlated_keys(16, 64, cosine), torch.full((16,), strength)
    assert ch3.rounding_error(k, beta, "doubling", torch.matmul) < limit


def test_errors_are_drawn_on_one_scale():
    for fig in (ch3.errors_against_cosine(length=16), ch3.errors_against_length(sizes=(4, 8))):
        left, right = fig.axes
        assert left.get_ylim() == right.get_ylim()


def test_multiplications_are_those_of_the_formulas():
    k, beta = ch3.correlated_keys(16, 8, cosine=0.5), torch.rand(16, dtype=torch.float64)
    assert ch3.multiplications(k, beta, "substitution") == 16 * 15 * 31 // 6
    assert ch3.multiplications(k, beta, "doubling") == 2 * 3 * 16**3
    assert ch3.multiplications(k, beta, "blocked") == 16 * (16**2 - 1) // 3
