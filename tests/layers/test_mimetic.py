"""Mimetic initialisation does what it is defined to do: part by part, and as a layer that copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import LAYERS

from dn_lib.layers import Attention, DeltaNet, GatedDeltaNet, LinearAttention, Mamba, Mamba2, MixtureOfMemories
from dn_lib.layers.decay import log_gates
from dn_lib.layers.mimetic import MIMETIC, PARTS, mimetic_
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.models.mimetic import mimetic_initialisation

# Orthogonal matrices are made by a QR decomposition in float32: 1e-5 leaves its eps of 1e-7 two digits.
SINGLE = 1e-5
TAKEN = [name for name in LAYERS if isinstance(LAYERS[name](), MIMETIC) and getattr(LAYERS[name](), "steps", 1) == 1]


def query_and_key(layer):
    if isinstance(layer, Mamba):
        n = layer.state_size
        return layer.select.weight[-n:], layer.select.weight[-2 * n : -n]
    if isinstance(layer, Mamba2):
        n, rest = layer.state_size, layer.input.weight[: -layer.heads]
        return rest[-n:], rest[-2 * n : -n]
    return layer.query.weight, layer.key.weight


def value_and_output(layer):
    if isinstance(layer, Mamba):
        return layer.input.weight[: layer.channels], layer.output.weight
    if isinstance(layer, Mamba2):
        return layer.input.weight[layer.channels : 2 * layer.channels], layer.output.weight
    return layer.value.weight, layer.output.weight


def is_projection(product, rank):
    """Symmetric, its own square, of that rank: the identity where the rank is its size."""
    assert (product - product.T).norm() < SINGLE and (product @ product - product).norm() < SINGLE * product.norm()
    return round(product.trace().item(), 3) == rank


@pytest.mark.parametrize("name", TAKEN)
def test_each_part_is_what_it_is_defined_to_be(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    assert mimetic_(layer) is layer
    query, key = query_and_key(layer)
    assert torch.equal(query, key) and is_projection(query.T @ key, min(query.shape))
    value, output = value_and_output(layer)
    assert torch.equal(output, value.T) and is_projection(output @ value, min(value.shape))
    for module in layer.modules():
        if type(module).__name__ == "ShortConvolution":
            x = torch.randn(1, 9, module.weight.shape[2])
            assert torch.equal(module(x), x)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_leaves_the_others_alone(name, part):
    torch.manual_seed(1)
    layer = LAYERS[name]()
    before = copy.deepcopy(layer.state_dict())
    mimetic_(layer, (part,))
    changed = {n.split(".")[0] for n, p in layer.state_dict().items() if not torch.equal(p, before[n])}
    mamba = isinstance(layer, Mamba | Mamba2)
    allowed = {
        "keys": {"select", "input"} if mamba else {"query", "key"},
        "values": {"input", "output"} if mamba else {"value", "output"},
        "convolutions": {"conv", "query_conv", "key_conv", "value_conv"},
        "gates": {"decay", "log_rates", "step_biases", "step", "input", "log_A", "delta"},
    }
    assert changed <= allowed[part]
    assert changed or (part in ("convolutions", "gates"))


def log_alphas(layer, x):
    if isinstance(layer, Mamba):
        delta = F.softplus(layer.delta(torch.randn(*x.shape[:-1], layer.rank)))
        return -delta[..., None] * layer.log_A.exp()
    if hasattr(layer, "log_rates"):
        step = layer.input(x)[..., -layer.heads :] if isinstance(layer, Mamba2) else layer.step(x)
        if step.shape[-1] != layer.log_rates.shape[0]:  # one for each channel
            return log_gates(step, layer.log_rates.repeat_interleave(layer.key_dim), layer.step_biases)[1]
        return log_gates(step, layer.log_rates, layer.step_biases)[1]
    return F.logsigmoid(layer.decay(x)) / 16


@pytest.mark.parametrize("name", [n for n in TAKEN if n.split(",")[0].split(" ")[0] in ("gated", "gla", "kda")])
def test_gates_start_open_and_blind(name):
    check_gates(LAYERS[name]())


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_gates_of_mamba_start_open_and_blind(name):
    check_gates(LAYERS[name]())


def check_gates(layer):
    torch.manual_seed(2)
    x = torch.randn(3, 7, 24)
    assert log_alphas(layer, x).exp().min() < 0.98
    mimetic_(layer, ("gates",))
    g = log_alphas(layer, x)
    assert g.exp().min() > 0.9996 and g.exp().max() < 0.9999
    assert (g == g.flatten(0, 1)[0]).all()  # the same for every token


@pytest.mark.parametrize("make", [LinearAttention, DeltaNet, GatedDeltaNet], ids=["linear", "delta", "gated delta"])
def test_a_layer_finds_an_input_that_comes_again(make):
    """A marked input, then others, then the mark again: what is read resembles what was there, more than before."""
    torch.manual_seed(3)
    x = F.normalize(torch.randn(8, 20, 64), dim=-1) * 8
    x[:, -1] = x[:, 4]
    resemblance = []
    for start in (lambda layer: layer, mimetic_):
        torch.manual_seed(4)
        layer = start(make(64, 1, output_gate=False))
        with torch.no_grad():
            y = layer(x)[:, -1]
        resemblance.append(F.cosine_similarity(y, x[:, 4], dim=-1).mean().item())
    assert abs(resemblance[0]) < 0.2 and resemblance[1] > 0.5


# --- Models ---------------------------------------------------------------------------------------------
def test_a_model_is_set_where_it_is_recurrent():
    torch.manual_seed(5)
    names = ("delta", "mamba", "window", "gla", "kda", "lightning", "mamba2", "attention", "mom")
    model = LanguageModel(ModelConfig(width=32, layers=len(names), pattern=names))
    before = copy.deepcopy(model.state_dict())
    assert mimetic_initialisation(model, ("keys", "values")) == 6
    changed = {n.split(".")[1] for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == {"0", "1", "3", "4", "5", "6"}
    assert all(".mixer." in n for n, p in model.state_dict().items() if not torch.equal(p, before[n]))
    tokens = torch.randint(256, (2, 12))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mimetic_(Attention(8, 2)), "mixer must be a recurrent layer that can be set, got Attention"),
        (lambda: mimetic_(MixtureOfMemories(8, 2)), "mixer must be a recurrent layer that can be set, got MixtureOf"),
        (lambda: mimetic_(DeltaNet(8, 2, steps=2)), "mixer must take one step per token, got 2"),
        (lambda: mimetic_(DeltaNet(8, 2), ("key",)), "parts must be some of keys, values, convolutions, gates, got"),
        (lambda: mimetic_(DeltaNet(8, 2), "keys"), "parts must be some of keys, values, convolutions, gates, got"),
        (lambda: mimetic_initialisation(DeltaNet(8, 2)), "model must be a LanguageModel, got DeltaNet"),
        (
            lambda: mimetic_initialisation(LanguageModel(ModelConfig(width=16, layers=1, mixer="attention"))),
            "model must have a recurrent layer that can be set, got attention",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
