"""`dn_lib.models.hf`: transformers saves, loads, generates with and trains our models as we do."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dn_lib.models import CONFIG, WEIGHTS, LanguageModel, ModelConfig, generate, load_model, save_model
from tests.small_models import MODELS, SMALL

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'dn-lib[hf]'")

from transformers import AutoConfig, AutoModelForCausalLM

from dn_lib.models.hf import DnLibConfig, DnLibForCausalLM

GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


STORED = [{}, {"pattern": ("gla", "mamba", "attention", "retnet")}, {"tie_embeddings": True, "mlp_ratio": 0}]


def small(**options):
    torch.manual_seed(0)
    model = DnLibForCausalLM(DnLibConfig(**SMALL | options)).eval()
    model.model.reset_parameters(std=0.2)  # at the usual start every token is followed by nearly the same
    return model


def tokens(batch=3, length=9):
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", STORED, ids=str)
def test_what_transformers_saved_is_loaded_by_both(options, tmp_path):
    model = small(**options)
    model.save_pretrained(tmp_path)
    assert {CONFIG, WEIGHTS} <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / CONFIG).read_text())["model_type"] == "dn_lib"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is DnLibForCausalLM and same_weights(theirs, model)
    ours = load_model(tmp_path)
    assert same_weights(ours, model.model) and ours.config == model.model.config


@pytest.mark.parametrize("options", STORED, ids=str)
def test_what_we_saved_is_loaded_by_transformers(options, tmp_path):
    model = small(**options).model
    save_model(tmp_path, model)
    theirs = DnLibForCausalLM.from_pretrained(tmp_path)
    assert same_weights(theirs.model, model) and theirs.model.config == model.config


def test_dtype_is_kept(tmp_path):
    small().bfloat16().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert load_model(tmp_path).embedding.weight.dtype == torch.bfloat16


def test_weights_in_several_files_are_refused_by_name(tmp_path):
    small().save_pretrained(tmp_path, max_shard_size="10KB")
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS}"):
        load_model(tmp_path)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), small())


def test_configuration_of_both_kinds(tmp_path):
    config = DnLibConfig(**SMALL, hybrid="window")
    assert config.to_model_config() == ModelConfig(**SMALL, hybrid="window")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 4, 2)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_model_config() == config.to_model_config()
    with pytest.raises(ValueError, match="mixer must be one of"):
        DnLibConfig(mixer="none such")


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_generate_gives_what_ours_gives(options):
    model, prompt = small(**options), tokens()
    expected = generate(model.model, prompt, 10, temperature=0)
    # The mask is given, since transformers takes tokens of the padding's number for padding.
    assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY), expected)


@pytest.mark.parametrize("options", [{}, {"hybrid": "window"}, {"mixer": "gla"}], ids=str)
def test_generate_with_padding(options):
    model, prompt, lengths = small(**options), tokens(), [5, 8, 9]
    mask = torch.stack([torch.arange(9) >= 9 - n for n in lengths]).long()
    expected = generate(model.model, prompt, 10, temperature=0, lengths=lengths)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **GREEDY), expected)


def test_state_is_handed_on():
    model, x = small(hybrid="window"), tokens()
    first = model(x[:, :5], use_cache=True)
    second = model(x[:, 5:], state=first.state)
    assert second.state is first.state and first.state.length == 9
    whole = model(x)
    assert whole.state is None
    # float32, of a few dozen operations in another order
    torch.testing.assert_close(second.logits, whole.logits[:, 5:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, whole.logits[:, -2:], rtol=1e-3, atol=1e-3)


def test_padding_on_either_side_changes_no_other_token():
    model, x = small(), tokens(batch=2)
    alone = model(x[:, 2:7]).logits
    mask = torch.zeros_like(x)
    mask[:, 2:7] = 1
    padded = model(x, attention_mask=mask).logits
    torch.testing.assert_close(padded[:, 2:7], alone, rtol=1e-3, atol=1e-3)
    assert not padded[:, :2].any() and not padded[:, 7:].any()
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, L\]"):
        model(x, attention_mask=mask[0])


def test_loss_is_that_of_the_next_token_and_trains():
    model, x = small().train(), tokens()
    labels = x.clone()
    labels[0, :4] = -100
    output = model(x, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="labels want all logits"):
        model(x, labels=x, logits_to_keep=1)


@pytest.mark.parametrize("around", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrap_takes_the_model_itself(around):
    model = LanguageModel(ModelConfig(**SMALL)).bfloat16().eval()
    wrapped = DnLibForCausalLM.wrap(around(model))
    assert wrapped.model is model and not wrapped.training and wrapped.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="must be a LanguageModel"):
        DnLibForCausalLM.wrap(nn.Linear(2, 2))


def test_beams_are_refused_with_a_state_and_right_without():
    model, prompt = small(), tokens()
    options = {"attention_mask": torch.ones_like(prompt), "num_beams": 2, **GREEDY}
    with pytest.raises(ValueError, match="beam search with a cache"):
        model.generate(prompt, **options)
    assert model.generate(prompt, use_cache=False, **options).shape == (3, 19)


def test_vocabulary_is_fixed():
    with pytest.raises(NotImplementedError, match="vocabulary"):
        small().resize_token_embeddings(60)
