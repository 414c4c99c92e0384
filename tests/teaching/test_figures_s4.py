"""Figures of study 4: they draw what `dn_lib` computes, and the text reads off them what they show."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from dn_lib.layers import Liger
from dn_lib.models import LanguageModel, ModelConfig, to_liger
from dn_lib.teaching import plotting
from dn_lib.teaching.figures import s4
from dn_lib.testing import relative_error


@pytest.fixture(autouse=True)
def own_style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


CHOSEN = torch.tensor([1, 0, 1, 2, 2, 1])
CURVES = {name: [(0, 3.0), (10, 2.0)] for name in s4.BORROWED}


def distances() -> torch.Tensor:
    return torch.tensor([1, 3, 5])


DRAWN = {
    "sorted rows": lambda: s4.sorted_rows(CHOSEN, 3)[0],
    "block state": lambda: s4.block_state(torch.eye(6), torch.eye(6), 3),
    "equal bytes": lambda: s4.equal_bytes([4, 8], s4.recall_at_equal_bytes([4, 8], d=4, draws=1)),
    "agreement": lambda: s4.agreement([0, 1], s4.recall_by_agreement([0, 1], pairs=4, d=4, draws=1)),
    "needle": lambda: s4.needle_picture(distances(), s4.needle(distances(), d=8, window=4, trials=2), 4),
    "borrowed": lambda: s4.borrowed(CURVES, 1.5, {"Liger": [2.0, 1.0], "window alone": [1.5, 1.0]}),
}


def test_rows_are_drawn_as_the_library_sorts_them():
    fig, routes = s4.sorted_rows(CHOSEN, 3)
    words = [text.get_text() for text in fig.axes[0].texts if text.get_text()]
    assert words[6:18] == [str(t + 1) for t in routes.tokens.tolist()] == list("213645123456")
    assert routes.streams.offsets.tolist() == [0, 1, 4, 6, 12]
    assert all(str(offset) in words for offset in (0, 1, 4, 6, 12)) and "shared" in words


def test_a_wide_row_stands_in_its_block():
    x = torch.arange(1.0, 13).view(6, 2)
    rows = s4.wide(x, CHOSEN, 3).unflatten(1, (3, 2))
    for row, given, memory in zip(rows, x, CHOSEN, strict=True):
        assert torch.equal(row[memory], given) and row.count_nonzero() == 2


def test_the_best_state_returns_what_the_ranks_allow():
    """(S4.6): 32 rows of a wider head, 64 of wide keys; the mixture's as its keys fall."""
    found = s4.recall_at_equal_bytes([16, 64, 128], draws=10)
    head, keys, mixture = (found[name]["returned"] for name in s4.SPENT)
    # 1024 or more values are projected: the share has a spread of about 1 / sqrt(1024 * 10 draws).
    assert head == pytest.approx([1, 0.5, 0.25], abs=0.02)
    assert keys == pytest.approx([1, 1, 0.5], abs=0.02)
    assert 0.8 < mixture[1] < 0.98 < mixture[0] and mixture[2] == pytest.approx(0.5, abs=0.02)


def test_what_the_text_says_of_recall():
    found = s4.recall_at_equal_bytes([8, 16, 24, 32, 48, 64])
    head, keys, mixture = (found[name]["right"] for name in s4.SPENT)
    assert all(m < min(h, k) and h - m < 0.03 for h, m, k in zip(head[:2], mixture, keys, strict=False))  # few pairs
    assert head[2] == pytest.approx(mixture[2], abs=0.02)  # level at 24
    assert all(h < m < k for h, m, k in list(zip(head, mixture, keys, strict=True))[3:])
    assert 0.7 < head[5] / mixture[5] < 0.8  # three in four at 64
    by_share = s4.recall_by_agreement([0, 0.5, 1])
    assert [by_share[name][-1] for name in s4.SPENT] == [head[4], keys[4], mixture[4]]  # the same draws
    none, half, full = by_share["mixture of memories"]
    assert none < 0.05 and half == pytest.approx(full / 2, abs=0.05)
    assert 0.75 < by_share["one wider head"][0] / full < 0.9  # the break-even


def test_the_needle_is_weighed_as_the_layer_weighs_it():
    """On values that mark the match, a layer's own recurrent half gives the weight before it is normalised."""
    torch.manual_seed(0)
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    layer = Liger(8, 1, window=4, share=1.0, backend="recurrent").double()
    for name in ("query", "key", "value", "output"):
        getattr(layer, name).weight.data.copy_(torch.eye(8))
    at = 3
    x[:, -1] = x[:, at]  # the last token asks for token 3 (and its own key is the same)
    layer.value.weight.data.zero_()
    logs = torch.nn.functional.logsigmoid(x[0]) / s4.TEMPERATURE
    phi = x[0].softmax(-1)
    weights = torch.stack([(phi[i] * logs[i + 1 :].sum(0).exp() * phi[-1]).sum() for i in range(9)])
    layer.value.weight.data.copy_(torch.eye(8))
    assert relative_error(layer(x)[0, -1], weights @ x[0]) < 1e-12
    shares = s4.needle(torch.tensor([1, 60, 70]), window=64, trials=20)
    assert shares["window"][2] == 0 and shares["window"][1] > 0.5 and shares["full attention"][2] > 0.5
    half = shares["recurrent half"]
    assert 0.05 < half[0] < 0.2 and half[1] < 0.01 and half[2] < half[1]  # what the text reads off


def test_a_conversion_is_measured_from_the_same_batches():
    torch.manual_seed(0)
    corpus = s4.small_corpus(100_000)
    model = LanguageModel(ModelConfig(width=16, layers=2, heads=2, mixer="attention"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    curves = s4.borrow(model, corpus, steps=3, window=4, rank=2)
    kept = s4.kept_layers(model, corpus, window=4)
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters())
    assert [[tokens for tokens, _ in points] for points in curves.values()] == [[0, 768, 1536, 2304]] * 4
    assert (
        curves["Liger, LoRA"][0][1] == kept["Liger"][0]
        and curves["window alone, LoRA"][0][1] == kept["window alone"][0]
    )
    assert curves["Transformer, LoRA"][0][1] == kept["Liger"][-1]
    assert kept["Liger"][-1] == kept["window alone"][-1] == s4.loss_of(model, corpus)
    assert curves["Liger, from scratch"][-1][1] < curves["Liger, from scratch"][0][1]
    assert {block.mixer.share for block in s4.with_share(to_liger(model, window=4), 0.25).blocks} == {0.25}
