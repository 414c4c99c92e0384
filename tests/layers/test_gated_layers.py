"""Gated DeltaNet and Mamba-2 against what their papers write, where their gates start, and who computes them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import LAYERS

from dn_lib import ops
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.layers import GatedDeltaNet, LinearAttention, Mamba2, RetNet
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.ops.backend import using
from dn_lib.teaching.judge.trace import observe
from dn_lib.testing import relative_error
from dn_lib.training.config import TrainConfig
from dn_lib.training.optimiser import make_optimiser

# Sums of a few hundred terms: 1e-12 leaves float64 (eps 2e-16) three digits to lose, 1e-5 float32 two.
EXACT, SINGLE = 1e-12, 1e-5
needs_triton = pytest.mark.skipif(ops.triton_problem(torch.device("cpu")) is not None, reason="needs the interpreter")


def convolved(x, convolution):
    """A depthwise causal convolution by PyTorch's own, `[B, L, channels]`."""
    weight = convolution.weight.permute(2, 1, 0)
    return F.conv1d(F.pad(x.mT, (weight.shape[-1] - 1, 0)), weight, convolution.bias, groups=weight.shape[0]).mT


@pytest.mark.parametrize("gate", [True, False])
def test_gated_deltanet_is_what_the_paper_writes(gate):
    """Three value heads for each key head, values twice as wide as keys, beta up to 2."""
    torch.manual_seed(0)
    layer = GatedDeltaNet(12, 2, 4, value_heads=6, beta_range=2.0, output_gate=gate).double()
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    q, k, v = (
        F.silu(convolved(getattr(layer, n)(x), getattr(layer, f"{n}_conv"))).unflatten(-1, (heads, -1)).transpose(1, 2)
        for n, heads in (("query", 2), ("key", 2), ("value", 6))
    )
    assert v.shape == (1, 6, 9, 8)
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    q, k = (t[:, [0, 0, 0, 1, 1, 1]] for t in (q, k))
    g = (-layer.log_rates.exp() * F.softplus(layer.step(x) + layer.step_biases)).mT
    o, _ = recurrent_gated_delta_rule(q, k, v, 2 * layer.beta(x).sigmoid().mT, g)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    o = o.transpose(1, 2).flatten(-2)
    if gate:
        o = o * F.silu(layer.gate(x))
    assert relative_error(layer(x), layer.output(o)) < EXACT


def test_mamba2_is_what_the_paper_writes():
    """S_t = exp(-A Delta_t) S_{t-1} + B_t (Delta_t x_t)^T, y_t = S_t^T C_t + D x_t, token by token, head by head."""
    torch.manual_seed(1)
    layer, x = Mamba2(12, 3, state_size=5).double(), torch.randn(1, 9, 12, dtype=torch.float64)
    for p in (layer.D, layer.conv.bias):
        torch.nn.init.normal_(p)
    z, mixed, step = layer.input(x)[0].split([24, 34, 3], dim=-1)
    u, B, C = F.silu(convolved(mixed[None], layer.conv)[0]).split([24, 5, 5], dim=-1)
    delta, A = F.softplus(step + layer.step_biases), layer.log_rates.exp()
    y = torch.zeros(9, 24, dtype=torch.float64)
    for h in range(3):
        S, own = torch.zeros(5, 8, dtype=torch.float64), slice(8 * h, 8 * h + 8)
        for t in range(9):
            S = (-A[h] * delta[t, h]).exp() * S + torch.outer(B[t], delta[t, h] * u[t, own])
            y[t, own] = C[t] @ S + layer.D[h] * u[t, own]
    y = y * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert relative_error(layer(x), layer.output(y)[None]) < EXACT


def test_where_the_gates_start():
    """A uniform in (0, 16] or (1, 16], the softplus of the bias log-uniform in [0.001, 0.1]: as the authors have it."""
    torch.manual_seed(2)
    for layer, low in ((GatedDeltaNet(64, 4096, 1), 0.0), (Mamba2(64, 4096, 1, state_size=1), 1.0)):
        A, step = layer.log_rates.exp(), F.softplus(layer.step_biases)
        assert low < A.min() < low + 0.1 and 15.9 < A.max() < 16.001
        # The mean of 4096 draws scatters by 15 / sqrt(12 * 4096) = 0.07 and log(100) / sqrt(12 * 4096) = 0.021.
        assert abs(A.mean() - (low + 16) / 2) < 0.4
        assert step.min() > 5e-4 and step.max() < 0.2
        assert abs(step.log().mean() - (math.log(0.001) + math.log(0.1)) / 2) < 0.12
    assert torch.equal(layer.D, torch.ones(4096))


def test_no_weight_decay_pulls_on_the_gates():
    model = LanguageModel(ModelConfig(width=16, layers=2, pattern=("gated_delta", "mamba2")))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {
        names[id(p)].rsplit(".", 1)[-1]
        for group in make_optimiser(model, TrainConfig()).param_groups
        for p in group["params"]
        if group["weight_decay"]
    }
    assert decayed == {"weight"}
    kept = {"log_rates", "step_biases", "D"}
    assert kept <= {name.rsplit(".", 1)[-1] for name in names.values()}


def test_a_model_keeps_where_the_gates_start():
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig(width=16, layers=2, pattern=("gated_delta", "mamba2")))
    before = {n: p.clone() for n, p in model.named_parameters() if "step_biases" in n or "log_rates" in n}
    model.reset_parameters()
    assert len(before) == 4
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


WITH_BACKEND = [name for name in LAYERS if name.split(",")[0].split(" ")[0] not in ("mamba", "attention", "window")]


@pytest.mark.parametrize("name", WITH_BACKEND)
@pytest.mark.parametrize("backend", ["recurrent", "parallel"])
def test_layers_hand_their_backend_on(name, backend):
    torch.manual_seed(4)
    x, (plain, other) = torch.randn(1, 13, 24), (LAYERS[name](), LAYERS[name](backend=backend))
    other.load_state_dict(plain.state_dict())
    # Float32, the same sums in another order, through a norm and a projection.
    assert relative_error(other(x), plain(x).double()) < 10 * SINGLE
    with pytest.raises(ValueError, match="backend must be one of auto, recurrent, parallel, chunkwise, triton, got"):
        LAYERS[name](backend="cuda")


KERNELS = {
    "gated delta": lambda **o: GatedDeltaNet(16, 1, value_heads=2, conv_size=0, **o),
    "linear": lambda **o: LinearAttention(16, 1, conv_size=0, **o),
    "retnet": lambda **o: RetNet(16, 1, **o),
    "mamba2": lambda **o: Mamba2(16, 2, 8, state_size=8, conv_size=0, **o),
}


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_layers_run_on_the_kernels(name):
    """Forward and backward, packed documents among them; on a GPU "auto" takes them."""
    torch.manual_seed(5)
    plain, fast = KERNELS[name](), KERNELS[name]()
    fast.load_state_dict(plain.state_dict())
    x, cu = torch.randn(1, 20, 16), torch.tensor([0, 13, 20])
    with using(auto="triton"):
        y, trace = observe(fast, x, cu_seqlens=cu)
        gradients = torch.autograd.grad(y.sin().sum(), list(fast.parameters()))
    assert any(launch.kernel.startswith("chunk_scan") for launch in trace.launches)
    expected = plain(x, cu_seqlens=cu)
    assert relative_error(y, expected.double()) < 10 * SINGLE
    for a, b in zip(gradients, torch.autograd.grad(expected.sin().sum(), list(plain.parameters())), strict=True):
        # Through the norm per head, which divides by what may be small: ten times a sum's own error.
        assert relative_error(a, b.double()) < 10 * SINGLE


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GatedDeltaNet(10, 3), "heads must divide width, got heads = 3 and width = 10"),
        (lambda: GatedDeltaNet(8, 2, value_heads=3), "value_heads must be a multiple of heads = 2, got 3"),
        (lambda: GatedDeltaNet(8, 2, value_heads=0), "value_heads must be an integer of at least 1, got 0"),
        (lambda: GatedDeltaNet(8, 2, expand_v=1.1), "expand_v must make a whole number of channels from head_dim = 4"),
        (lambda: GatedDeltaNet(8, 2, expand_v=0), "expand_v must be a finite number above 0, got 0"),
        (lambda: GatedDeltaNet(8, 2, beta_range=2.5), r"beta_range must be in \(0, 2\], got 2.5"),
        (lambda: GatedDeltaNet(8, 2, output_gate=None), "output_gate must be True or False, got None"),
        (lambda: Mamba2(7, 4), "heads must divide expand \\* width = 14, got 4; or set head_dim"),
        (lambda: Mamba2(8, 2, 0), "head_dim must be an integer of at least 1, got 0"),
        (lambda: Mamba2(8, 2, state_size=0), "state_size must be an integer of at least 1, got 0"),
        (lambda: Mamba2(8, 2, norm_eps=0), "norm_eps must be a finite number above 0, got 0"),
        (lambda: Mamba2(8, 2, backend="cuda"), "backend must be one of auto"),
        (lambda: ModelConfig(mixer="gated_delta", value_heads=3), "value_heads must be a multiple of heads = 2, got 3"),
        (lambda: ModelConfig(mixer="gated_delta", expand_v=0.001), "expand_v must make a whole number of channels"),
        (lambda: ModelConfig(value_heads=1.5), "value_heads must be of type int, got 1.5"),
        (lambda: ModelConfig(output_gate=1), "output_gate must be of type bool, got 1"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_what_a_configuration_means_by_an_output_gate():
    for mixer, default in (("delta", False), ("linear", False), ("gated_delta", True)):
        for said, expected in ((None, default), (True, True), (False, False)):
            config = ModelConfig(width=16, layers=1, mixer=mixer, output_gate=said)
            assert (LanguageModel(config).blocks[0].mixer.gate is not None) == expected
            assert ModelConfig.from_dict(config.to_dict()) == config
