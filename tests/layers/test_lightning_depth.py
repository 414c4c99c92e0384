"""TransNormer's factor of depth: a layer that a model places decays more slowly the higher it lies."""

from __future__ import annotations

import pytest
import torch

from dn_lib.layers import LightningAttention, decay_slopes
from dn_lib.models import LanguageModel, ModelConfig, load_model, save_model


@pytest.mark.parametrize("decay", ["transnormer", "lightning"])
def test_a_placed_layer_is_one_of_that_depth(decay):
    torch.manual_seed(0)
    placed = LightningAttention(12, 3, decay=decay, by_depth=True).double()
    given = LightningAttention(12, 3, decay=decay, depth=0.75).double()
    given.load_state_dict(placed.state_dict())
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    lowest = placed(x)
    placed.place(3, 4)
    assert placed.depth == 0.75 and torch.equal(placed(x), given(x)) and not torch.equal(placed(x), lowest)
    # Its slopes are a quarter of the lowest layer's, so that half-lives are four times as long.
    assert torch.equal(4 * decay_slopes(3, decay, placed.depth), decay_slopes(3, decay))


def test_a_layer_with_a_depth_of_its_own_keeps_it():
    layer = LightningAttention(12, 3, depth=0.5)
    layer.place(1, 4)
    assert layer.depth == 0.5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LightningAttention(8, 2, depth=0.5, by_depth=True), r"depth must be 0 where a model sets it"),
        (lambda: LightningAttention(8, 2, by_depth=1), "by_depth must be"),
        (lambda: LightningAttention(8, 2).place(4, 4), "layer must be below layers = 4, got 4"),
        (lambda: LightningAttention(8, 2).place(-1, 4), "layer must be an integer of at least 0, got -1"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_model_tells_each_layer_its_depth(tmp_path):
    sizes = {"width": 16, "heads": 2, "layers": 4, "mixer": "lightning"}
    model = LanguageModel(ModelConfig(**sizes, decay_by_depth=True))
    save_model(tmp_path / "model", model)
    for one in (model, load_model(tmp_path / "model")):
        assert [block.mixer.depth for block in one.blocks] == [0, 0.25, 0.5, 0.75]
    assert {block.mixer.depth for block in LanguageModel(ModelConfig(**sizes)).blocks} == {0}
