"""LoRA: adapters beside frozen weights; they start as nothing, learn, are merged, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dn_lib.models import LanguageModel, ModelConfig, load_model, save_model
from dn_lib.models.liger import to_liger
from dn_lib.models.lora import LoRALinear, add_lora, load_lora, merge_lora, save_lora
from dn_lib.testing import relative_error

# Sums of a few hundred terms: 1e-12 leaves float64 (eps 2e-16) three digits to lose.
EXACT = 1e-12


def small(mixer="attention", **options):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=50, width=32, layers=2, heads=2, mixer=mixer, **options))
    model.reset_parameters(std=0.2)
    return model.double()


def tokens():
    return (torch.arange(30)[None] * 3 + torch.arange(8)[:, None]) % 50


def train(model, steps=10, lr=1e-2):
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    x, losses = tokens(), []
    for _ in range(steps):
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_what_the_paper_writes(bias):
    torch.manual_seed(1)
    linear, x = nn.Linear(7, 5, bias=bias).double(), torch.randn(3, 7, dtype=torch.float64)
    layer = LoRALinear(linear, rank=2, alpha=6.0)
    assert torch.equal(layer(x), linear(x))
    nn.init.normal_(layer.up)
    expected = linear(x) + 3 * x @ layer.down.T @ layer.up.T
    assert relative_error(layer(x), expected) < EXACT
    assert relative_error(layer.merged()(x), expected) < EXACT


@pytest.mark.parametrize("mixer", ["attention", "delta", "mom"])
def test_only_adapters_learn_and_a_merged_model_is_an_ordinary_one(mixer, tmp_path):
    model = small(mixer)
    before = copy.deepcopy(model.state_dict())
    start = model(tokens())
    names = add_lora(model, rank=3)
    assert names == [f"blocks.{i}.mixer.{name}" for i in range(2) for name in ("query", "key", "value")]
    assert torch.equal(model(tokens()), start)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.{part}" for name in names for part in ("down", "up")]
    losses = train(model)
    assert losses[-1] < losses[0]
    now = model.state_dict()
    assert all(torch.equal(now[name], weight) for name, weight in before.items())
    expected = model(tokens())
    assert merge_lora(model) == names
    assert relative_error(model(tokens()), expected) < EXACT
    assert model.state_dict().keys() == before.keys() and all(p.requires_grad for p in model.parameters())
    save_model(tmp_path, model)
    assert torch.equal(load_model(tmp_path)(tokens()), model(tokens()))


def test_adapters_alone_are_saved(tmp_path):
    model, other = (to_liger(small(), window=8) for _ in range(2))
    names = add_lora(model, ("key", "mixer.output"), rank=2, alpha=5.0)
    train(model, steps=3)
    path = tmp_path / "adapters.safetensors"
    save_lora(path, model)
    # Four layers of 32 x 32, rank 2: 4 * 2 * 64 numbers, 8 bytes each; the rest of the file is its header.
    assert 4 * 2 * 64 * 8 < path.stat().st_size < 4 * 2 * 64 * 8 + 2000
    assert sorted(load_lora(path, other)) == sorted(names)  # the file keeps no order
    assert relative_error(other(tokens()), model(tokens())) < EXACT
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_errors_name_the_argument(tmp_path):
    model = small()
    with pytest.raises(ValueError, match="names must be those of linear layers, got 'querry'"):
        add_lora(model, ("querry",))
    with pytest.raises(ValueError, match="names must be those of linear layers, got \\[\\]"):
        add_lora(model, ())
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got 0"):
        add_lora(model, rank=0)
    with pytest.raises(ValueError, match="model must have adapters to save"):
        save_lora(tmp_path / "none", model)
    assert all(p.requires_grad for p in model.parameters()) and type(model.blocks[0].mixer.query) is nn.Linear
    add_lora(model, rank=2)
    with pytest.raises(ValueError, match=r"model must have no adapters yet, it has one at blocks\.0\.mixer\.query"):
        add_lora(model)
    save_lora(tmp_path / "some", model)
    with pytest.raises(ValueError, match="must hold adapters of this model"):
        load_lora(tmp_path / "some", LanguageModel(ModelConfig(width=16, layers=2, mixer="attention")))
