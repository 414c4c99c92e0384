"""KDA and Lightning Attention against what their papers write, token by token; the tables of fixed decays."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dn_lib.layers import GatedDeltaNet, KimiDeltaAttention, LightningAttention, decay_slopes
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.testing import relative_error

# Sums of a few hundred terms: 1e-12 leaves float64 (eps 2e-16) three digits to lose.
EXACT = 1e-12


def convolved(x, convolution):
    """A depthwise causal convolution by PyTorch's own, `[B, L, channels]`."""
    if convolution is None:
        return x
    weight = convolution.weight.permute(2, 1, 0)
    return F.conv1d(F.pad(x.mT, (weight.shape[-1] - 1, 0)), weight, convolution.bias, groups=weight.shape[0]).mT


def projected(layer, x, name, activation=F.silu):
    """q, k or v of one row of x, `[L, H, d]`."""
    y = convolved(getattr(layer, name)(x), getattr(layer, f"{name}_conv"))
    return activation(y)[0].unflatten(-1, (layer.heads, -1))


# --- KDA ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"conv_size": 0, "rank": 3, "beta_range": 2.0}])
def test_kda_is_what_the_paper_writes(options):
    """Channel by channel the state decays, then the token erases and writes; the output gate is a sigmoid."""
    torch.manual_seed(0)
    layer = KimiDeltaAttention(12, 2, 4, **options).double()
    torch.nn.init.normal_(layer.sigmoid_gate[1].bias)
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    q, k, v = (projected(layer, x, name) for name in ("query", "key", "value"))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    beta = options.get("beta_range", 1.0) * layer.beta(x)[0].sigmoid()
    step = F.softplus(layer.step[1](layer.step[0](x)) + layer.step_biases)[0].unflatten(-1, (2, 4))
    o = torch.zeros(9, 2, 4, dtype=torch.float64)
    for h in range(2):
        S, A = torch.zeros(4, 4, dtype=torch.float64), layer.log_rates[h].exp()
        for t in range(9):
            decayed = torch.diag((-A * step[t, h]).exp()) @ S
            key, b = k[t, h], beta[t, h]
            S = (torch.eye(4) - b * torch.outer(key, key)) @ decayed + b * torch.outer(key, v[t, h])
            o[t, h] = S.T @ q[t, h] / math.sqrt(4)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    o = o.flatten(-2)[None] * layer.sigmoid_gate(x).sigmoid()
    assert relative_error(layer(x), layer.output(o)) < EXACT


def test_kda_with_equal_channels_is_gated_deltanet():
    """Gates that agree in all channels of a head are one gate per head; the output gates are taken out."""
    torch.manual_seed(1)
    kda, gated = KimiDeltaAttention(12, 2).double(), GatedDeltaNet(12, 2, expand_v=1.0, output_gate=False).double()
    shared = {name: p for name, p in gated.state_dict().items() if not name.startswith("step")}
    kda.load_state_dict(shared, strict=False)
    with torch.no_grad():
        kda.step[1].weight.zero_()
        gated.step.weight.zero_()
        kda.step_biases.copy_(gated.step_biases.repeat_interleave(6))
        kda.sigmoid_gate[1].weight.zero_()  # its bias is zero: the gate is 1/2 everywhere
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    assert relative_error(2 * kda(x), gated(x)) < EXACT


def test_where_the_gates_of_kda_start():
    torch.manual_seed(2)
    layer = KimiDeltaAttention(8, 2048, 2)
    A, step = layer.log_rates.exp(), F.softplus(layer.step_biases)
    assert 1 < A.min() < 1.1 and 15.9 < A.max() < 16.001
    assert step.min() > 5e-4 and step.max() < 0.2 and step.shape == (4096,)
    assert not layer.sigmoid_gate[1].bias.any()


# --- Lightning Attention --------------------------------------------------------------------------------
@pytest.mark.parametrize("decay", ["lightning", "transnormer", "retnet", "none"])
def test_lightning_is_what_the_paper_writes(decay):
    torch.manual_seed(3)
    layer = LightningAttention(12, 3, decay=decay, depth=0.25, conv_size=2).double()
    torch.nn.init.normal_(layer.norm.weight)
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    q, k = (projected(layer, x, name) for name in ("query", "key"))
    v = projected(layer, x, "value", activation=lambda y: y)
    o = torch.zeros(9, 3, 4, dtype=torch.float64)
    for h in range(3):
        S = torch.zeros(4, 4, dtype=torch.float64)
        for t in range(9):
            S = math.exp(-decay_slopes(3, decay, 0.25)[h].item()) * S + torch.outer(k[t, h], v[t, h])
            o[t, h] = S.T @ q[t, h] / math.sqrt(4)
    o = o.flatten(-2)[None]
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    assert relative_error(layer(x), layer.output(o * layer.linear_gate(x))) < EXACT


def test_the_four_tables_of_decays():
    """As their sources write them; half-lives at eight heads, where they differ by three orders of magnitude."""
    eight = {name: decay_slopes(8, name) for name in ("lightning", "transnormer", "retnet", "none")}
    assert torch.allclose(eight["lightning"], torch.tensor([2.0 ** -(h + 1) for h in range(8)]).double())
    assert eight["transnormer"].tolist() == list(range(8))
    assert torch.allclose(eight["retnet"].neg().exp(), torch.tensor([1 - 2.0 ** (-5 - h) for h in range(8)]).double())
    assert not eight["none"].any()
    lives = {name: (math.log(2) / s[s > 0]).aminmax() for name, s in eight.items() if name != "none"}
    assert [(round(low.item(), 1), round(high.item(), 1)) for low, high in lives.values()] == [
        (1.4, 177.4),
        (0.1, 0.7),
        (21.8, 2838.8),
    ]
    assert torch.equal(decay_slopes(8, "transnormer", depth=0.5), eight["transnormer"] / 2)


# --- Models ---------------------------------------------------------------------------------------------
def test_a_model_builds_them_with_its_options():
    config = ModelConfig(width=16, layers=2, pattern=("kda", "lightning"), beta_range=2.0, conv_size=3, decay="retnet")
    kda, lightning = (block.mixer for block in LanguageModel(config).blocks)
    assert (kda.beta_range, kda.query_conv.weight.shape[0], kda.heads) == (2.0, 3, 2)
    assert (lightning.decay, lightning.key_conv.weight.shape[0], lightning.depth) == ("retnet", 3, 0.0)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: KimiDeltaAttention(10, 3), "heads must divide width, got heads = 3 and width = 10"),
        (lambda: KimiDeltaAttention(8, 2, beta_range=0), r"beta_range must be in \(0, 2\], got 0"),
        (lambda: KimiDeltaAttention(8, 2, rank=0), "rank must be an integer of at least 1, got 0"),
        (lambda: KimiDeltaAttention(8, 2, backend="cuda"), "backend must be one of auto"),
        (lambda: LightningAttention(8, 2, decay="slow"), "decay must be one of lightning, transnormer, retnet, none"),
        (lambda: LightningAttention(8, 2, depth=1.5), r"depth must be in \[0, 1\], got 1.5"),
        (lambda: LightningAttention(8, 2, depth=True), r"depth must be in \[0, 1\], got True"),
        (lambda: decay_slopes(0), "heads must be an integer of at least 1, got 0"),
        (lambda: ModelConfig(mixer="lightning", decay="slow"), "decay must be one of lightning, transnormer"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
