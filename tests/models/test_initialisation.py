"""The start of a model: every recurrent layer as `mimetic_` sets it, where the configuration says so."""

from __future__ import annotations

import pytest
import torch

from dn_lib.layers.mimetic import MIMETIC, mimetic_
from dn_lib.models import MIXERS, LanguageModel, ModelConfig, build_mixer, load_model, save_model
from dn_lib.models.config import MIMETIC_MIXERS

SMALL = {"vocab_size": 50, "width": 32, "layers": 2, "heads": 2, "window": 6}


def started(seed=0, **options):
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(**SMALL | options))


def test_the_named_mixers_are_those_that_can_be_set():
    made = [name for name in MIXERS if isinstance(build_mixer(name, ModelConfig(**SMALL)), MIMETIC)]
    assert sorted(made) == sorted(MIMETIC_MIXERS)


@pytest.mark.parametrize("mixer", MIMETIC_MIXERS)
def test_each_recurrent_layer_starts_as_the_layer_alone(mixer):
    """All that `mimetic_` sets is orthonormal or constant, so a second call leaves the products as they are."""
    model = started(mixer=mixer, initialisation="mimetic")
    for block in model.blocks:
        again = build_mixer(mixer, model.config)
        again.load_state_dict(block.mixer.state_dict())
        mimetic_(again, ("convolutions", "gates"))
        for (name, a), b in zip(again.named_parameters(), block.mixer.parameters(), strict=True):
            assert torch.equal(a, b), name
    plain = started(mixer=mixer)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    logits = model(torch.randint(50, (2, 9)))
    assert logits.isfinite().all()


def test_keys_start_as_queries_and_the_values_come_back():
    mixer = started(initialisation="mimetic").blocks[0].mixer
    eye = torch.eye(32)
    torch.testing.assert_close(mixer.query.weight, mixer.key.weight, rtol=0, atol=0)
    torch.testing.assert_close(mixer.query.weight.T @ mixer.key.weight, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixer.output.weight @ mixer.value.weight, eye, atol=1e-5, rtol=0)
    assert (mixer.key_conv.weight[-1] == 1).all() and not mixer.key_conv.weight[:-1].any()


def test_only_recurrent_layers_of_a_hybrid_are_set():
    ours, plain = started(hybrid="window", initialisation="mimetic"), started(hybrid="window")
    assert torch.equal(ours.blocks[0].mixer.query.weight, ours.blocks[0].mixer.key.weight)
    assert not torch.equal(ours.blocks[1].mixer.query.weight, ours.blocks[1].mixer.key.weight)
    assert torch.equal(ours.embedding.weight, plain.embedding.weight)


def test_weights_drawn_anew_start_so_again():
    model = started(initialisation="mimetic")
    before = model.blocks[0].mixer.query.weight.clone()
    model.reset_parameters(std=0.1)
    mixer = model.blocks[0].mixer
    assert not torch.equal(before, mixer.query.weight) and torch.equal(mixer.query.weight, mixer.key.weight)
    assert abs(model.embedding.weight.std() / 0.1 - 1) < 0.1


def test_a_saved_model_keeps_its_field_and_its_weights(tmp_path):
    model = started(initialisation="mimetic")
    torch.nn.init.ones_(model.blocks[0].mixer.query.weight)
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config.initialisation == "mimetic"
    assert (loaded.blocks[0].mixer.query.weight == 1).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"initialisation": "xavier"}, "initialisation must be one of normal, mimetic, got 'xavier'"),
        ({"initialisation": 1}, "initialisation must be of type str, got 1"),
        ({"mixer": "attention"}, "initialisation must be 'normal' for attention, got 'mimetic'"),
        ({"pattern": ("mom", "delta")}, "initialisation must be 'normal' for mom, got 'mimetic'"),
        ({"delta_steps": 2}, "delta_steps must be 1 with initialisation='mimetic', got 2"),
    ],
)
def test_what_cannot_be_started_so_names_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SMALL | {"initialisation": "mimetic"} | options)


def test_steps_that_no_layer_reads_are_not_checked():
    assert ModelConfig(**SMALL | {"mixer": "gla", "delta_steps": 2, "initialisation": "mimetic"}).delta_steps == 2
