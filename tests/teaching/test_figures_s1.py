"""Figures and numbers of study 1, forgetting on purpose."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pytest
import torch

from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import s1
from dn_lib.teaching.figures.s1 import measured

DRAWN = {
    "two documents": lambda: s1.two_documents(),
    "tiles": lambda: s1.tiles(),
    "ratios": lambda: s1.ratios([4, 8], [0.9, 0.5])[0],
    "bound": lambda: s1.bound_and_return([1.0, 0.9], 4)[0],
    "half-lives": lambda: s1.half_lives({"a table": torch.tensor([1.0, 0.1]), "another": torch.tensor([0.0, 0.5])}),
    "noise": lambda: s1.noise([0.9], 16, 8),
    "documents": lambda: s1.documents({name: RECALL for name in s1.MEMORIES}),
    "speed": lambda: s1.speed([512, 1024], {"fixed decay, in chunks": [1e5, 1e5], "softmax attention": [1e4]}, "cpu"),
}
RECALL = measured.Recall(torch.ones(6), torch.ones(6), torch.ones(5))


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


@pytest.mark.parametrize("name", DRAWN)
def test_every_letter_can_be_read(name):
    assert plotting.smallest_type(DRAWN[name]()) >= plotting.SMALLEST


# --- Ratios


def test_every_way_is_right_in_float64():
    g = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log() / 4
    exact = measured.WAYS["exp of the span's sum"](g)
    for way in measured.WAYS.values():
        assert torch.allclose(way(g), exact, rtol=1e-12, atol=0)
    assert exact[3, 1] == pytest.approx(float((g[2] + g[3]).exp()))


def test_ways_that_form_a_running_product_fail_where_it_underflows():
    errors = measured.ratio_errors([8, 64], 0.1)
    assert all(math.isfinite(found[0]) for found in errors.values())
    lost = {name for name, found in errors.items() if not math.isfinite(found[1])}
    assert lost == {"quotient of products", "exp(b_i) exp(-b_j)"}


# --- N and the way back


@pytest.mark.parametrize("gate", [1.0, 0.9])
def test_the_bound_is_pressed_and_holds(gate):
    found = measured.largest_entries(gate, chunk=12)
    bound = gate ** torch.arange(1, 12, dtype=torch.float64)
    assert bool((found <= bound * (1 + 1e-9)).all()) and bool((found > 0.95 * bound).all())


def test_errors_on_the_way_back_grow_by_the_gates():
    """From chunk to chunk by about the product of its gates, once the first roundings are behind."""
    errors = measured.walked_back(0.95, 12)
    growth = (errors[9] / errors[3]) ** (1 / 6)
    assert 0.5 * 0.95**-16 < growth < 2 * 0.95**-16
    assert measured.walked_back(1.0, 12)[9] < 100 * torch.finfo(torch.float32).eps


def test_what_is_walked_back_is_of_float32_whatever_the_default():
    before = measured.walked_back(0.95, 8)
    torch.set_default_dtype(torch.float64)
    try:
        assert measured.walked_back(0.95, 8) == before
    finally:
        torch.set_default_dtype(torch.float32)


# --- Documents


def test_two_documents_by_hand():
    """The map is what the recurrence leaves, read with each key: the first keys stand in both documents."""
    memory = s1.Memory(erase=True, gate=0.9)
    answers = measured.two_documents(memory, pairs=4, shared=2, d=8)
    g = torch.Generator().manual_seed(2)
    k = torch.nn.functional.normalize(torch.randn(8, 8, generator=g, dtype=torch.float64), dim=-1)
    k[4:6] = k[:2]
    ones = torch.ones(8, dtype=torch.float64)
    values = torch.eye(8, dtype=torch.float64)
    _, state = recurrent_gated_delta_rule(k, k, values, ones, 0.9 * ones.log() + torch.tensor(0.9).double().log())
    assert torch.allclose(answers, torch.cat([k[4:], k[2:4]]) @ state)


def test_a_memory_that_is_cleared_keeps_nothing_of_earlier_documents():
    assert measured.two_documents(s1.MEMORIES["delta, cleared"])[:, :8].abs().max() == 0
    found = s1.recall_in_documents(s1.MEMORIES["delta, cleared"], documents=6, pairs=4, pool=16, d=64, streams=4)
    assert found.stale[:3].abs().max() < 0.2 and found.accuracy.min() > 0.9


def test_the_first_document_knows_no_earlier_one():
    """There, clearing changes nothing, and a constant gate makes answers worse."""
    options = {"documents": 2, "streams": 4}
    plain, cleared, gated = (
        s1.recall_in_documents(memory, **options)
        for memory in (s1.Memory(True), s1.Memory(True, clears=True), s1.Memory(True, 0.9))
    )
    assert plain.error[0] == cleared.error[0] < gated.error[0] and plain.error[1] > cleared.error[1]


def test_what_the_page_says_of_the_five_memories():
    late = {
        name: (recall.accuracy[12:].mean(), recall.error[12:].mean(), recall.stale[0])
        for name, recall in ((n, s1.recall_in_documents(m)) for n, m in s1.MEMORIES.items())
    }
    assert late["additive"][0] < 0.3 and late["additive"][1] > 10
    assert all(late[name][0] > 0.9 for name in s1.MEMORIES if name != "additive")
    assert late["gated delta"][0] <= late["delta"][0]  # no more questions answered ...
    assert 0.75 < late["gated delta"][1] / late["delta"][1] < 0.9  # ... though the error falls by a sixth
    assert late["delta, cleared"][1] < late["gated delta"][1]
    assert 0.4 < late["delta"][2] < 0.6 and late["gated delta"][2] < 0.75 * late["delta"][2]


def test_measured_noise_is_the_expected_one():
    errors = measured.answers_by_age(0.9, 16, 8, draws=4000)
    expected = [(1 - 0.9**a) ** 2 + sum(0.9 ** (2 * m) for m in range(16) if m != a) / 8 for a in range(16)]
    # 4,000 draws: a mean of squares is off by a few percent.
    assert torch.allclose(errors, torch.tensor(expected, dtype=torch.float64), rtol=0.08)


def test_speeds_stop_softmax_early():
    rates = s1.speeds([32, 64], "cpu", longest_softmax=32, heads=1, d=8)
    assert [len(found) for found in rates.values()] == [2, 1] and all(r > 0 for found in rates.values() for r in found)
