"""Configurations, whole models, generation, saving and loading."""

import dataclasses
import json
import math

import pytest
import torch
from small_models import MODELS, SMALL, model_and_tokens
from torch import nn

from dn_lib.models import (
    CONFIG,
    MIXERS,
    WEIGHTS,
    LanguageModel,
    ModelConfig,
    build_mixer,
    generate,
    load_model,
    save_model,
)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_equal_the_full_pass(name):
    model, tokens = model_and_tokens(MODELS[name])
    with torch.no_grad():
        whole = model(tokens)
        assert whole.shape == (2, 24, 50)
        for cut in (1, 2, 11, 23):
            cache = model.new_cache(2)
            pieces = [model(tokens[:, :cut], cache)]
            pieces += [model(tokens[:, t : t + 1], cache) for t in range(cut, 20)]
            pieces += [model(tokens[:, max(cut, 20) :], cache)]
            assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4 * whole.abs().max()
            assert cache.length == 24


@pytest.mark.parametrize("name", MODELS)
def test_later_tokens_do_not_reach_back(name):
    model, tokens = model_and_tokens(MODELS[name])
    model, changed = model.double(), tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 50
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert torch.allclose(a[:, :13], b[:, :13], atol=1e-11)
    assert not torch.allclose(a[:, 14:], b[:, 14:], atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name):
    model, tokens = model_and_tokens(MODELS[name])
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_saving_and_loading_is_exact(name, tmp_path):
    model, tokens = model_and_tokens(MODELS[name])
    save_model(tmp_path / "new" / "folder", model)
    again = load_model(tmp_path / "new" / "folder")
    assert again.config == model.config
    for (a_name, a), (b_name, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert a_name == b_name and torch.equal(a, b)
    assert torch.equal(model(tokens), again(tokens))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, WEIGHTS]


def test_saving_keeps_the_dtype_and_overwrites(tmp_path):
    model, _ = model_and_tokens({})
    save_model(tmp_path, model)
    save_model(tmp_path, model.bfloat16())
    assert load_model(tmp_path).head.weight.dtype == torch.bfloat16


def test_a_failed_save_keeps_the_last_good_one(tmp_path, monkeypatch):
    import safetensors.torch

    model, tokens = model_and_tokens({})
    save_model(tmp_path, model)

    def full_disk(weights, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path, LanguageModel(model.config))
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))
    assert len(list(tmp_path.iterdir())) == 2


def test_loading_says_what_is_wrong(tmp_path):
    model, _ = model_and_tokens({})
    with pytest.raises(FileNotFoundError, match=f"folder must hold {CONFIG}"):
        load_model(tmp_path)
    save_model(tmp_path, model)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(values | {"hidden": 77}))
    with pytest.raises(ValueError, match="come from two different models"):
        load_model(tmp_path)


def test_loading_a_foreign_weight_file_names_the_misfit(tmp_path):
    from safetensors.torch import save_file

    model, _ = model_and_tokens({})
    save_model(tmp_path, model)
    weights = model.state_dict()
    weights["head.weight"] = weights["head.weight"][:-1].clone()
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"does not fit config.json: missing \['head.weight \[50, 32\]'\]"):
        load_model(tmp_path)


def test_layouts():
    assert ModelConfig(layers=3).mixers() == ("delta",) * 3
    assert ModelConfig(layers=5, hybrid="window").mixers() == ("delta", "window", "delta", "window", "delta")
    layers = ModelConfig(layers=24, heads=2, hybrid="global", mixer="linear").mixers()
    # The paper counts from 1: layers 2 and 24/2 + 1 = 13.
    assert [i + 1 for i, name in enumerate(layers) if name == "attention"] == [2, 13]
    assert set(layers) == {"linear", "attention"}
    assert ModelConfig(layers=2, pattern=["gla", "delta"]).mixers() == ("gla", "delta")


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_configurations_survive_json(options):
    config = ModelConfig(**SMALL | options)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 3}, "heads must divide width, got heads = 3 and width = 32"),
        ({"heads": 3, "mixer": "attention"}, "heads must divide width"),
        ({"hybrid": "window", "attention_heads": 5}, "attention_heads must divide width"),
        ({"mixer": "gla", "heads": 32}, "head_dim must be even for gla, got 1"),
        ({"mixer": "rwkv"}, "mixer must be one of delta, linear, .*, got 'rwkv'"),
        ({"hybrid": "some"}, "hybrid must be one of none, window, global, got 'some'"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"qk_norm": "l3"}, "qk_norm must be one of l2, l1, none, got 'l3'"),
        ({"beta_range": 2.5}, r"beta_range must be in \(0, 2\], got 2.5"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        *[({name: 10**20}, f"{name} must be at most ") for name in ("vocab_size", "width", "hidden", "window")],
        ({"layers": 3, "hybrid": "global"}, "layers must be at least 4 with hybrid='global', got 3"),
        ({"layers": 2, "pattern": ("delta",)}, "pattern must name 2 mixers"),
        ({"pattern": ("delta", "x", "delta", "delta")}, "pattern must name 4 mixers"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"delta_steps": 0}, "delta_steps must be at least 1, got 0"),
        ({"conv_size": -1}, "conv_size must be 0"),
        ({"mlp_ratio": -1.0}, "mlp_ratio must be 0"),
        ({"hidden": 0}, "hidden must be positive and finite, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive and finite, got 0.0"),
        ({"rope_base": math.inf}, "rope_base must be positive and finite, got inf"),
        ({"pattern": 5}, "pattern must be a list of mixers or None, got 5"),
        ({"pattern": "delta"}, "pattern must be a list of mixers or None, got 'delta'"),
        ({"width": 32.0}, "width must be of type int, got 32.0"),
        ({"width": True}, "width must be of type int, got True"),
        ({"tie_embeddings": 1}, "tie_embeddings must be of type bool, got 1"),
        ({"head_dim": "8"}, "head_dim must be of type int, got '8'"),
    ],
)
def test_wrong_configurations_name_the_field(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig(**SMALL | options)
    assert "\n" not in str(error.value)


def test_unknown_field():
    with pytest.raises(ValueError, match="has no field 'widht'; it has vocab_size, width"):
        ModelConfig.from_dict({"widht": 3})


def test_heads_that_no_layer_uses_are_not_checked():
    assert ModelConfig(**SMALL | {"mixer": "mamba", "heads": 3}).heads == 3


def test_initial_scales():
    model = LanguageModel(ModelConfig(width=256, layers=8, heads=2))
    assert abs(model.blocks[0].mixer.query.weight.std() / 0.02 - 1) < 0.05
    assert abs(model.blocks[3].mixer.output.weight.std() / (0.02 / 4) - 1) < 0.05
    assert abs(model.blocks[3].mlp.output.weight.std() / (0.02 / 4) - 1) < 0.05
    delta = nn.functional.softplus(LanguageModel(ModelConfig(mixer="mamba")).blocks[0].mixer.delta.bias)
    assert delta.min() > 0.9e-3 and delta.max() < 0.11


def test_parameter_and_flop_counts():
    config = ModelConfig(vocab_size=11, width=64, layers=1, heads=2, conv_size=4)
    model = LanguageModel(config)
    hidden = 192  # 8/3 of 64, rounded up to a multiple of 64
    linear = 4 * 64 * 64 + 64 * 2 + 3 * 64 * hidden + 64 * 11
    assert model.num_parameters() == linear + 3 * 64 * 4 + 32 + 3 * 64 + 11 * 64
    assert model.num_parameters(embeddings=False) == model.num_parameters() - 11 * 64
    state = 6 * 2 * 32 * 32
    assert model.flops_per_token(1000) == 3 * (2 * (linear + 3 * 64 * 4) + state)
    tied = LanguageModel(dataclasses.replace(config, tie_embeddings=True))
    assert tied.flops_per_token(1000) == model.flops_per_token(1000)


@pytest.mark.parametrize("length, window", [(1, 4), (4, 4), (9, 4), (100, 7)])
def test_attention_flops_count_the_keys_seen(length, window):
    def mixing(mixer):
        model = LanguageModel(ModelConfig(**SMALL | {"mixer": mixer, "layers": 1, "window": window}))
        return model.blocks[0].mixer.state_flops(length) / (4 * 32)

    assert mixing("attention") == pytest.approx(sum(range(1, length + 1)) / length)
    assert mixing("window") == pytest.approx(sum(min(t, window) for t in range(1, length + 1)) / length)


@pytest.mark.parametrize("name", ["delta", "hybrid window", "hybrid global", "mamba"])
def test_greedy_generation_equals_full_passes(name):
    model, tokens = model_and_tokens(MODELS[name], length=7)
    made = generate(model, tokens, 9, temperature=0)
    assert made.shape == (2, 16) and torch.equal(made[:, :7], tokens)
    with torch.no_grad():
        expected = model(made).argmax(-1)[:, 6:-1]
    assert torch.equal(made[:, 7:], expected)


def test_sampling():
    model, tokens = model_and_tokens({"layers": 1}, length=3)

    def draw(seed, **options):
        return generate(model, tokens, 20, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), generate(model, tokens, 20, temperature=0))
    for smallest in (1e-30, 1e-300):
        assert torch.equal(draw(1, temperature=smallest), generate(model, tokens, 20, temperature=0))
    made = draw(3, top_k=3)
    with torch.no_grad():
        best = model(made).topk(3).indices[:, 2:-1]
    assert (best == made[:, 3:, None]).any(-1).all()
    assert generate(model, tokens, 0).shape == (2, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((torch.zeros(1, 0, dtype=torch.long), 3), {}, "prompt must be"),
        ((torch.zeros(3, dtype=torch.long), 3), {}, "prompt must be"),
        ((torch.tensor([[0, 50]]), 3), {}, "prompt must hold tokens from 0 to 49, got 0 to 50"),
        ((torch.zeros(1, 1, dtype=torch.long), -1), {}, "new_tokens must be 0 or more, got -1"),
        ((torch.zeros(1, 1, dtype=torch.long), 10**400), {}, "new_tokens must be at most 2147483646 after this prompt"),
        ((torch.zeros(1, 1, dtype=torch.long), 3), {"temperature": -1}, "temperature must be 0"),
        ((torch.zeros(1, 1, dtype=torch.long), 3), {"top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
def test_generation_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        generate(LanguageModel(ModelConfig(**SMALL)), *arguments, **options)


ONE = torch.zeros(1, 1, dtype=torch.long)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: generate(None, ONE, 3), "model must be a LanguageModel, compiled or not, got None"),
        (lambda model: generate(model, ONE.to_sparse(), 3), "prompt must be a dense tensor"),
        (lambda model: generate(model, ONE, 2.5), "new_tokens must be a whole number of 0 or more, got 2.5"),
        (lambda model: generate(model, ONE, "3"), "new_tokens must be a whole number of 0 or more, got '3'"),
        (lambda model: generate(model, ONE, True), "new_tokens must be a whole number of 0 or more, got True"),
        (lambda model: generate(model, ONE, 3, temperature=None), "temperature must be a number, .* got None"),
        (lambda model: generate(model, ONE, 3, temperature=torch.ones(())), "temperature must be a number"),
        (lambda model: generate(model, ONE, 3, top_k=2.0), "top_k must be a whole number of at least 1 or None"),
        (lambda model: model.new_cache(-1), "batch_size must be an integer of at least 0, got -1"),
        (lambda model: model.flops_per_token(0), "length must be an integer of at least 1, got 0"),
        (lambda model: LanguageModel({"width": 8}), "config must be a ModelConfig, got dict"),
        (lambda model: build_mixer("gla", None), "config must be a ModelConfig, got None"),
        (lambda model: build_mixer(["gla"], model.config), "name must be one of delta, .*, got list"),
        (lambda model: ModelConfig.from_dict(None), "values must be a dict, got None"),
        (lambda model: save_model(5, model), "folder must be a path, got int"),
        (lambda model: save_model("never-made", model, 5), "state_dict must be a dict of tensors or None, got 5"),
        (
            lambda model: save_model("never-made", model, {"norm.weight": 1}),
            "state_dict must hold tensors, norm.weight",
        ),
        (lambda model: load_model(None), "folder must be a path, got NoneType"),
    ],
)
def test_arguments_of_another_kind_are_named(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call(LanguageModel(ModelConfig(**SMALL)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["gpu", 0.5, -1, {}, float("nan"), [0]])
def test_what_is_no_device_is_named(tmp_path, device):
    save_model(tmp_path, LanguageModel(ModelConfig(**SMALL)))
    with pytest.raises((TypeError, ValueError), match=r"^device must be "):
        load_model(tmp_path, device)


def test_of_equal_logits_no_more_than_top_k_are_drawn_from():
    model = LanguageModel(ModelConfig(**SMALL))
    torch.nn.init.zeros_(model.head.weight)
    made = generate(model, ONE.expand(40, 1), 3, top_k=2)
    assert made[:, 1:].unique().numel() == 2


def test_tokens_of_a_wrong_shape():
    model, tokens = model_and_tokens({})
    with pytest.raises(ValueError, match=r"tokens must be \[B, L\], got shape \(24,\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match="cache's batch size 3, got shape"):
        model(tokens, model.new_cache(3))


def test_memory_of_a_cache():
    """Constant for recurrent layers and windows once full; growing for full attention."""

    def sizes(options):
        model, tokens = model_and_tokens(options, length=300, batch=1)
        cache, measured = model.new_cache(1), []
        with torch.no_grad():
            for part in tokens.split(100, dim=1):
                model(part, cache)
                measured.append(cache.bytes())
        return measured

    for options in ({}, {"hybrid": "window"}, {"mixer": "mamba"}, {"mixer": "gla"}, {"mixer": "retnet"}):
        a, b, c = sizes(options)
        assert a == b == c > 0, options
    a, b, c = sizes({"mixer": "attention"})
    assert a < b < c and c >= 2 * 4 * 32 * 300 * 4


def test_bfloat16_decoding_chooses_the_same_tokens():
    """A model that has learned something (untrained, its best logits are ties), with every mixer in it."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SMALL | {"layers": len(MIXERS), "pattern": MIXERS}))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = [torch.randint(0, 50, (8, 1))]
    for _ in range(39):
        tokens.append((3 * tokens[-1] + 7) % 50)
    tokens = torch.cat(tokens, dim=1)
    for _ in range(15):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimiser.step()
    model.bfloat16()
    with torch.no_grad():
        whole, cache = model(tokens), model.new_cache(8)
        pieces = [model(tokens[:, :10], cache)]
        pieces += [model(tokens[:, t : t + 1], cache) for t in range(10, 40)]
    assert loss < 2  # untrained: log 50 = 3.9
    assert (torch.cat(pieces, 1).argmax(-1) == whole.argmax(-1)).float().mean() >= 0.99


def test_compiled_model_agrees(tmp_path):
    """Traced whole, without a break; the compiler's own code generation is left to the GPU runs."""
    model, tokens = model_and_tokens({"hybrid": "window", "layers": 2})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens), model(tokens))
    save_model(tmp_path, compiled)
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))


WITH_KERNELS = {"delta", "attention", "window"}  # the mixers that a GPU runs in kernels of their own


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name):
    """The CPU's numbers, a cache's and a compiled model's: Triton and fused attention in the PyTorch forms' place.

    Code is generated for the models whose mixers all have kernels, each of which is one node of the graph. The
    other recurrences are PyTorch forms that go from chunk to chunk, or token to token, and are unrolled: up to 3,890
    nodes in the backward's graph, against at most 1,522. Generating code for them takes minutes (one CPU core: over
    100 s for linear attention and Mamba) and tests the generator rather than us, so their graphs, traced without a
    break and with their gradients, are run as they are.
    """
    options = MODELS[name] | {"width": 64, "window": 200}
    model, tokens = model_and_tokens(options, length=515)
    with torch.no_grad():
        reference = model(tokens)
        model, tokens = model.cuda(), tokens.cuda()
        whole, cache = model(tokens), model.new_cache(2)
        pieces = [model(tokens[:, :300], cache), model(tokens[:, 300:505], cache)]
        pieces += [model(tokens[:, t : t + 1], cache) for t in range(505, 515)]
    scale = reference.norm()
    # Where float32 products are TF32: a relative rounding of 2^-11 each.
    assert (whole.cpu() - reference).norm() < 2e-3 * scale
    assert (torch.cat(pieces, 1) - whole).norm() < 2e-3 * scale
    backend = "inductor" if set(model.config.mixers()) <= WITH_KERNELS else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(compiled(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    expected = nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss - expected) < 0.05 * expected
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, parameter_name
