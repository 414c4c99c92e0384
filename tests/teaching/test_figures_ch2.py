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
from dn_lib.teaching.figures import ch2, ch2_measured

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
    counts, one = [1, 32, 64, 128], {"added": 1.0, "best": 0.0, 1: 0.6, 5: 0.2, 20: 0.1}
    ax = ch2.capacity_after_sweeps(counts, [one] * 4, 64).axes[0]
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
    assert str(ch2.mqar_table(None)) == "this copy of the book holds no measurement"
    ch2.mqar(None).canvas.draw()
    row = {"model": "DeltaNet", "width": 64, "accuracy": [0.5, 1.0], "steps": [10, 20]}
    record = {
        "provenance": {"device": "a device", "date": "2026-01-02T03:04", "git_commit": "0123456789"},
        "settings": {"paper": {"widths": [64, 128], "accuracy": {"Mamba": [81, 100]}}},
        "results": [row],
    }
    (tmp_path / "book" / "results").mkdir(parents=True)
    (tmp_path / "book" / "results" / "mqar.json").write_text(json.dumps(record))
    found = ch2.mqar_record(tmp_path / "book" / "notebooks")
    assert found == record
    table = ch2.mqar_table(found)
    assert table.rows == [("DeltaNet", "64", "50.0 100.0", "10 20", "")]
    assert table.notes[-1].startswith("mqar: a device, 2026-01-02, commit 0123456")
    curve = {"steps": [50, 70, 80, 100], "accuracy": [0.1, 0.5, 0.6, 0.625]}
    run = {"model": "DeltaNet", "width": 64, "training": {"steps": 100}, "steps_taken": 100, "curve": curve}
    others = [run | {"steps_taken": 90}, run | {"learning_rate": 0.1}, run | {"width": 128}]
    assert [row[-1] for row in ch2.mqar_table(record | {"rows": [run, *others]}).rows] == ["+2.5"]
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


# --- What the figures measure ----------------------------------------------------------------------------
def test_states_grow_exponentially_only_where_beta_times_the_squared_length_is_above_two():
    sizes = list(ch2_measured.state_sizes().values())
    assert [len(series) for series in sizes] == [60] * 4
    # With beta |k|^2 <= 2 a write adds at most beta |k| |v| to the norm, and here |v| is 2 in the mean.
    assert all(series[-1] < 2 * 60 * 2 for series in sizes[:2])
    assert sizes[2][-1] > 1e3 and sizes[3][-1] > 1e9


def test_recall_errors_are_those_of_the_states():
    keys, values = ch2_measured.lists_of_pairs([3, 5], d=8, trials=2)[5]
    assert keys.shape == values.shape == (2, 5, 8)
    assert torch.allclose(keys.norm(dim=-1), torch.ones(2, 5).double())
    found = ch2_measured.recall_errors(keys, values, beta=0.5, sweeps=(1, 2))
    S = torch.zeros(2, 8, 8).double()
    for sweep in (1, 2):
        for t in range(5):
            k, v = keys[:, t], values[:, t]
            S = S + 0.5 * torch.einsum("na,nb->nab", k, v - torch.einsum("na,nab->nb", k, S))
        error = (keys @ S - values).square().sum(-1).mean()
        # Sums of a few dozen numbers of size one: rounding stays near 2^-52.
        assert abs(found[sweep] - error) < 1e-12
    assert abs(found["added"] - (keys @ (keys.mT @ values) - values).square().sum(-1).mean()) < 1e-12
    assert found["best"] < 1e-20  # five independent keys in eight dimensions


def test_sweeps_fall_as_the_eigenvalue_says_and_below_the_bound():
    fixed, random, rate, bound = ch2_measured.sweeps_measured((0.6,))[0.6]
    assert fixed[0] == random[0] == 1 and len(fixed) == len(random) == len(bound) == 31
    # By the tenth sweep the faster parts, at most 0.4^2 a sweep here, are below a thousandth of the slowest.
    assert abs((fixed[20] / fixed[10]) ** 0.1 - rate) < 1e-2
    assert (random[1:6] < bound[1:6]).all() and (bound[1:] < bound[:-1]).all()


class Lookup(torch.nn.Module):
    """Logits of a token that depend on that token alone."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(8, 8)

    def forward(self, tokens, asked):
        return self.table(tokens[asked])


def test_training_learns_a_lookup_and_looks_only_where_it_is_asked():
    torch.manual_seed(0)

    def draw():
        tokens = torch.randint(8, (16, 4))
        labels = (tokens + 1) % 8
        labels[:, 0] = -100
        return tokens, labels

    history = ch2_measured.train(Lookup(), draw, steps=60, lr=0.3)
    assert len(history) == 60 and history[0] < 0.5 and history[-1] == 1.0


class Bits:
    """A model of parity that says `always` after a last bit 1, and is right after a 0."""

    def __init__(self, labels, always):
        self.labels, self.always = labels, always

    def embed(self, tokens):
        return tokens[..., None].double()

    def beta(self, x):
        return 2 * x[..., 0], x

    def k(self, pair):
        return torch.cat([pair, 1 - pair], dim=-1)

    def __call__(self, tokens, asked):
        said = torch.where(tokens == 1, self.always, self.labels)
        return torch.nn.functional.one_hot(said[asked], 2).float()


def test_parity_is_told_by_last_bit_and_parity():
    bits = torch.randint(2, (50, 20), generator=torch.Generator().manual_seed(0))
    tokens = torch.nn.functional.pad(bits, (1, 0), value=2)
    labels = torch.nn.functional.pad(bits.cumsum(1) % 2, (1, 0), value=-100)
    model = Bits(labels, always=0)
    right = ch2_measured.right_answers(model, tokens, labels)
    assert right.shape == (50, 20) and torch.equal(right == 0, (bits == 1) & (labels[:, 1:] == 1))
    table = ch2_measured.parity_table(model, tokens, labels, [(5, 10), (11, 20)])
    assert table.notes == ["beta of a 0: 0.000, of a 1: 2.000; |cosine| of their keys 0.00"]
    assert table.rows == [(bits, "1.00", "1.00", "1.00", "0.00") for bits in ("5 to 10", "11 to 20")]


def test_recall_table_says_what_each_model_answers():
    g = torch.Generator().manual_seed(0)
    tokens, labels = recall_with_updates(50, 4, vocab=64, generator=g)
    right = labels[labels >= 0]

    class Model(Writer):
        def __call__(self, seen, asked):
            return torch.nn.functional.one_hot(right, 64).float()

    models = {("updates", rule): Model() for rule in ("linear", "delta")}
    tables = ch2_measured.recall_table(models, {("updates", "delta"): 0.5}, (tokens, labels, 4)).parts
    scores, answers, writing = [table.rows for table in tables]
    assert scores == [("updates", "delta rule", "0.500")]
    assert answers == [("linear attention", "100%", "0%"), ("delta rule", "100%", "0%")]
    assert writing == [
        ("delta rule", "beta", "0.25", "0.75", "0.25"),
        ("linear attention", "|v|", "0.00", "5.00", "0.00"),
        ("linear attention", "|cosine| of q, k", "0.00", "1.00", "0.00"),
    ]


def test_directions_wear_out_as_the_formula_says():
    worn = ch2_measured.worn_directions([(16, 1.0), (16, 0.0)], later=10, runs=2000)
    # The mean of 2000 runs of numbers in [0, 1] is within 0.04 of the expectation (Hoeffding: 2 exp(-6.4) = 0.3%).
    for m in (1, 10):
        assert abs(worn[16, 1.0][m] - (1 - 1 / 16) ** m) < 0.04
    assert torch.allclose(worn[16, 0.0], torch.ones(11).double())


def test_a_gate_clears_what_the_delta_rule_has_to_wear_out():
    crowded = ch2_measured.crowded_memories((0, 256))
    linear, delta, gated = crowded["linear"], crowded["delta"], crowded["gated"]
    assert linear[1] > 30 * linear[0]
    assert 1.5 < delta[1] / delta[0] < 2.5  # to first order twice
    assert abs(gated[1] / gated[0] - 1) < 0.2 and abs(gated[0] - delta[0]) < 1e-12
