"""The figures of chapter 2: what is drawn is what the package computes, and every drawing can be drawn."""

import contextlib
import json
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from dn_lib.data.recall import multi_query_associative_recall, recall_with_updates
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import ch2

LINEAR, DELTA = (plotting.MECHANISMS[name]["color"].lower() for name in ("linear", "delta"))


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


def test_letters_are_seven_by_five():
    letters = ch2.word("".join(ch2.LETTERS))
    assert letters.shape == (len(ch2.LETTERS), 35) and set(letters.unique().tolist()) == {0.0, 1.0}


def test_memories_show_the_second_word_where_the_delta_rule_wrote():
    board = torch.tensor(ch2.memories("DELTA", "GAMMA").axes[0].images[0].get_array())
    written, _, delta = board.reshape(3, 9, 45)
    newest = slice(36, 45)  # the key written last is answered exactly with beta = 1
    # Both are sums of products of numbers up to 1: rounding stays near 2^-52.
    assert (written - delta)[:, newest].abs().max() < 1e-12
    assert (written - delta).abs().max() > 0.01  # the older ones have ghosts


def test_memories_animation_is_small():
    shown = ch2.memories_animation()
    assert Image.open(BytesIO(shown.data)).is_animated and len(shown.data) < 300_000


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_the_circle_goes_where_the_matrix_takes_it(beta):
    k = torch.tensor([0.8, 0.6], dtype=torch.float64)
    points, images = ch2.circle_images(k, beta)
    assert torch.allclose(images, points @ (torch.eye(2) - beta * torch.outer(k, k)).to(k))
    assert torch.allclose(images @ k, (1 - beta) * (points @ k))


def test_stability_has_four_circles_and_a_curve_for_each_run():
    fig = ch2.stability({name: [1.0, 2.0] for name in "abcd"})
    axes = [ax for part in fig.subfigs for ax in part.axes]
    assert len(axes) == 5 and len(axes[-1].lines) == 4
    assert [ax.get_title() for ax in axes[:4]] == [
        f"$\\beta = {beta}$: {what}"
        for beta, what in (("0", "nothing"), ("0.5", "shrinks"), ("1", "projects"), ("2", "reflects"))
    ]


def test_two_tokens_by_hand():
    k = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    v = torch.tensor([[5.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    axes = ch2.two_tokens(k, v).axes
    shown = [[text.get_text() for text in ax.texts] for ax in axes]
    assert shown[0] == shown[4] == ["5", "0", "0", "0"]
    assert shown[1:4] == [["5", "6", "0", "8"], ["5", "6", "3", "10"], ["5", "0", "0", "10"]]  # linear attention
    assert shown[5:7] == [["3.2", "6", "-2.4", "8"], ["3.2", "6", "0", "10"]]  # the delta rule


def test_paths_are_in_the_mechanisms_colours():
    path = [torch.zeros(2, 1), torch.ones(2, 1)]
    axes = ch2.descent(torch.tensor([0.8, 0.6]), torch.tensor([1.0]), {"linear": path, "delta": path}).axes
    assert [to_hex(ax.lines[-1].get_color()) for ax in axes] == [LINEAR, DELTA]


def test_capacity_after_sweeps_is_on_the_axes_of_chapter_1():
    counts, swept = [1, 32, 64, 128], {1: [0.0, 0.3, 0.6, 1.1], 5: [0.0, 0.0, 0.2, 1.0], 20: [0.0, 0.0, 0.1, 1.0]}
    ax = ch2.capacity_after_sweeps(counts, [0.0, 0.5, 1.0, 2.0], swept, [0.0, 0.0, 0.0, 0.5], 64).axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("stored pairs n", "squared error")
    assert [to_hex(line.get_color()) for line in ax.lines][1:5] == [LINEAR, DELTA, DELTA, DELTA]


def oracle(tokens, values):
    """A model that answers `values`, in the order of the questions."""
    return lambda seen, asked: torch.nn.functional.one_hot(values, 64).float()


def test_by_position_sorts_answers_by_the_place_of_the_pair():
    g = torch.Generator().manual_seed(0)
    tokens, labels = multi_query_associative_recall(50, 24, 6, vocab=64, generator=g)
    asked = labels >= 0
    right = labels[asked]
    assert ch2.by_position(oracle(tokens, right), tokens, labels, 6).tolist() == [1.0] * 6
    first = tokens[asked] == tokens[:, :1].expand_as(tokens)[asked]  # questions for the pair that came first
    wrong_there = torch.where(first, 0, right)
    assert ch2.by_position(oracle(tokens, wrong_there), tokens, labels, 6).tolist() == [0.0] + [1.0] * 5


class Writer:
    """A model whose values, keys and queries are known: value tokens (32 and above) are written as (3, 4), others as 0.

    A value's key and query agree; for other tokens they are orthogonal.
    """

    def embed(self, tokens):
        return (tokens >= 32).double()[..., None]

    def beta(self, x):
        return 0.25 + 0.5 * x[..., 0], x

    def v(self, x):
        return torch.cat([3 * x, 4 * x], dim=-1)

    def q(self, x):
        return torch.cat([torch.ones_like(x), torch.zeros_like(x)], dim=-1)

    def k(self, pair):
        return torch.cat([-2 * pair, 1 - pair], dim=-1)


def test_writes_are_told_apart_by_the_kind_of_token():
    tokens, labels = recall_with_updates(20, 4, vocab=64, generator=torch.Generator().manual_seed(0))
    means = ch2.writes(Writer(), tokens, labels, 4)
    assert means == {"beta": [0.25, 0.75, 0.25], "|v|": [0.0, 5.0, 0.0], "|cosine| of q, k": [0.0, 1.0, 0.0]}


def test_newer_or_older():
    g = torch.Generator().manual_seed(0)
    tokens, labels = recall_with_updates(50, 4, vocab=64, generator=g)
    asked = labels >= 0
    older = []
    for row, column in asked.nonzero().tolist():
        at = tokens[row, :8:2].tolist().index(int(tokens[row, column]))
        older.append(int(tokens[row, 2 * at + 1]))
    answers = torch.tensor(older)
    assert ch2.newer_or_older(oracle(tokens, labels[asked]), tokens, labels, 4) == (1.0, 0.0)
    assert ch2.newer_or_older(oracle(tokens, answers), tokens, labels, 4) == (0.0, 1.0)
    assert ch2.newer_or_older(oracle(tokens, torch.zeros_like(answers)), tokens, labels, 4) == (0.0, 0.0)


def test_the_measurement_is_found_above_the_working_directory_or_said_to_be_missing(tmp_path):
    assert ch2.mqar_record(tmp_path / "nowhere") is None
    stored = Path(ch2.__file__).parents[3] / "book" / "results" / "mqar.json"
    with contextlib.chdir(tmp_path):  # outside the book: what lies beside the package
        assert ch2.mqar_record() == (json.loads(stored.read_text("utf-8")) if stored.exists() else None)
    assert ch2.mqar_table(None) == "this copy of the book holds no measurement"
    ch2.mqar(None).canvas.draw()
    row = {"model": "DeltaNet", "width": 64, "accuracy": [0.5, 1.0], "steps": [10, 20]}
    record = {
        "provenance": {"device": "a device", "date": "2026-01-02T03:04"},
        "settings": {"paper": {"widths": [64, 128], "accuracy": {"Mamba": [81, 100]}}},
        "results": [row],
    }
    (tmp_path / "book" / "results").mkdir(parents=True)
    (tmp_path / "book" / "results" / "mqar.json").write_text(json.dumps(record))
    found = ch2.mqar_record(tmp_path / "book" / "notebooks")
    assert found == record
    assert "a device at 2026-01-02" in ch2.mqar_table(found) and " 50.0 100.0  after 10 20" in ch2.mqar_table(found)
    curve = {"steps": [50, 70, 80, 100], "accuracy": [0.1, 0.5, 0.6, 0.625]}
    run = {"model": "DeltaNet", "width": 64, "training": {"steps": 100}, "steps_taken": 100, "curve": curve}
    lines = ch2.mqar_table(record | {"rows": [run, run | {"steps_taken": 90}]}).splitlines()
    assert len(lines) == 4 and "+2.5 in the last quarter" in lines[-1]
    left, right = ch2.mqar(found).axes
    assert list(left.lines[0].get_ydata()) == [75.0] and list(right.lines[0].get_ydata()) == [81, 100]


def test_the_other_figures_can_be_drawn():
    keys = torch.eye(3).double()
    S = recurrent_delta_rule(keys, keys, keys, torch.ones(3).double())[1]
    assert torch.equal(S, keys)
    curve = torch.linspace(1, 0.1, 31)
    ch2.convergence({c: (curve, curve, torch.tensor(0.5), curve) for c in (0.2, 0.6, 0.9)})
    histories = {(task, rule): [0.1] * 20 for task in ("MQAR", "updates") for rule in ("linear", "delta")}
    ch2.recall(histories, {"linear": torch.rand(12), "delta": torch.rand(12)})
    curves = {2.0: torch.rand(80), 1.0: torch.rand(80)}
    assert len(ch2.parity(curves, 40, others=[torch.rand(80)] * 2).axes[0].lines) == 2 + 2 + 1 + 2
    worn = {key: torch.linspace(1, 0.1, 301) for key in ((16, 1.0), (64, 1.0), (64, 0.3))}
    fig = ch2.wearing_out(worn, (0, 8, 16), {"linear": [1.0] * 3, "delta": [1.0] * 3, "gated": [1.0] * 3})
    assert [label.get_text() for label in fig.axes[1].get_xticklabels()] == ["none", "8", "16"]
    fig.canvas.draw()
