"""Figures of study 2: machines made by hand, groups, least squares in one sweep, two starts."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from dn_lib.data.state_tracking import permutation_composition
from dn_lib.layers import DeltaNet
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import s2
from dn_lib.teaching.figures import s2_measured as measured

ERRORS = {1: 0.3, 20: 0.1, "best": 0.0, "recursive": 0.0}
DRAWN = {
    "hexagon": lambda: s2.hexagon({beta: torch.ones(5, 2) for beta in (2.0, 1.8, 1.0)}),
    "reach": lambda: s2.reach(
        {name: {top: torch.ones(150) for top in (2.0, 1.999, 1.99, 1.9)} for name in ("S3", "S5")}, {"S3": 6, "S5": 120}
    ),
    "groups": lambda: s2.steps_of_groups({"S3": [1, 3, 2, 0, 0], "A5, as turns of an icosahedron": [1, 0, 59, 0, 0]}),
    "one pass": lambda: s2.best_in_one_pass([4, 32], [ERRORS, ERRORS], 32),
    "one key": lambda: s2.one_key_again(measured.answers_to_one_key([0.5, 1.8, 2.0], 5)),
    "starts": lambda: s2.starts({name: [[0.5] * 40] * 2 for name in ("drawn", "keys", "all parts")}),
}


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


@pytest.mark.parametrize("degree, steps", [(2, 1), (3, 2), (3, 4), (4, 3), (5, 4)])
def test_machines_make_no_mistake_with_reflections_and_some_without(degree, steps):
    words, labels = permutation_composition(3, 60, degree, generator=torch.Generator().manual_seed(0))
    assert measured.WordMachine(degree, steps=steps).right(words, labels).all()
    assert not measured.WordMachine(degree, steps=steps, top=1.0).right(words, labels).all()
    assert isinstance(measured.WordMachine(degree).layer, DeltaNet)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="steps must be at least 4 for these permutations, got 2"):
        measured.WordMachine(5, steps=2)


def test_the_orbit_stays_on_the_hexagon_with_reflections_alone():
    word, _ = permutation_composition(1, 40, 3, generator=torch.Generator().manual_seed(0))
    corners = measured.orbit(word[0], 2.0)
    torch.testing.assert_close(corners.norm(dim=1), torch.ones(41, dtype=torch.float64))
    assert len({tuple(x) for x in (corners.round(decimals=6) + 0.0).tolist()}) == 6
    inside = measured.orbit(word[0], 1.8).norm(dim=1)
    assert (inside.diff() < 1e-12).all() and inside[-1] < 0.05


def test_a_hexagon_is_drawn_for_each_beta_with_the_path_through_its_points():
    path = measured.orbit(torch.tensor([1, 2]), 2.0)
    axes = s2.hexagon({2.0: path, 1.0: path}).axes
    assert len(axes) == 2
    marked = axes[0].lines[-2].get_xydata()
    torch.testing.assert_close(torch.tensor(marked), path)


def test_groups_have_their_orders_and_are_orthogonal():
    groups = measured.groups()
    assert [len(group) for group in groups.values()] == [6, 24, 24, 60, 60, 120]
    for group in groups.values():
        eye = torch.eye(group.shape[-1], dtype=group.dtype)
        torch.testing.assert_close(group.mT @ group, eye.expand_as(group), atol=1e-9, rtol=0)
    needed = measured.steps_needed(groups)
    assert needed["S5"] == [1, 10, 35, 50, 24] and needed["A5, as turns of an icosahedron"] == [1, 0, 59, 0, 0]
    with pytest.raises(ValueError, match="at most 10 elements"):
        measured.generated(groups["S4"], most=10)


def test_bars_are_as_long_as_their_shares():
    ax = s2.steps_of_groups({"S3": [1, 3, 2, 0, 0]}).axes[0]
    widths = [patch.get_width() for patch in ax.patches if patch.get_width()]
    assert widths == pytest.approx([100 / 6, 50, 100 / 3])


def test_least_squares_is_the_best_state_after_one_sweep():
    keys, values = (
        torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1)
    )
    keys = keys / keys.norm(dim=-1, keepdim=True)
    errors = measured.errors_of_one_pass(keys, values, ridge=1e-9)
    assert errors["recursive"] == pytest.approx(errors["best"], rel=1e-6) and errors[1] > errors["best"]
    lines = s2.best_in_one_pass([4, 8], [errors, errors], 4).axes[0].lines
    assert list(lines[3].get_ydata()) == [errors["recursive"]] * 2


def test_answers_to_one_key():
    curves = measured.answers_to_one_key([0.5, 2.0], 3)
    assert [curve.tolist() for curve in curves.values()] == [
        [1, 0.5, 0.25, 0.125], [1, -1, 1, -1], pytest.approx([1, 1 / 2, 1 / 3, 1 / 4]),
    ]  # fmt: skip


def test_pairs_are_learned_with_the_same_examples_from_every_start():
    options = {"seed": 0, "steps": 2, "learning_rate": 0.0, "width": 8, "pairs": 2, "names": 4, "batch": 3}

    def layer():
        return DeltaNet(8, 1, conv_size=0, backend="chunkwise")

    drawn, keys = (measured.learned(layer, parts, **options) for parts in ((), ("keys",)))
    assert len(drawn) == len(keys) == 2 and all(0 <= a <= 1 for a in drawn + keys)
    assert measured.learned(layer, (), **options) == drawn


def test_questions_ask_for_what_was_stored():
    keys, values, answers = measured.draw_pairs(5, 3, 8, torch.Generator().manual_seed(0))
    for key, value, answer in zip(keys.tolist(), values.tolist(), answers.tolist(), strict=True):
        stored = dict(zip(key[:3], value[:3], strict=True))
        assert [stored[k] for k in key[3:]] == answer and value[3:] == [8, 8, 8]


def test_tables_show_what_was_measured():
    cells = {
        task: {"place": {"task": task, "delta_steps": 2, "beta_range": 2.0}, "best": {"score": [0.99, 0.985]}}
        for task in ("s3", "parity")
    }
    words = str(measured.words_table({"results": {"tracking": {"cells": cells}}}))
    assert "S3" in words and "99.0 98.5" in words and "PARITY" not in words
    row = {"task": "copying", "mixer": "GLA", "start": "mimetic", "learning_rate": 0.01}
    starts = str(measured.starts_table({"results": [row | {"steps": [120, None], "accuracy": [1.0, 0.5]}]}))
    assert "120 never" in starts and "100.0 50.0" in starts
