"""Mixture of Memories against a plain loop over memories; its router, its cache, its balance loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dn_lib.layers import GatedDeltaNet, LayerCache, MixtureOfMemories, balance_loss, balance_losses
from dn_lib.layers.mom import sort_by_memory
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.testing import relative_error

# Sums of a few hundred terms: 1e-12 leaves float64 (eps 2e-16) three digits to lose.
EXACT = 1e-12


def loop_over_memories(layer, x):
    """The paper's layer in the plainest code, for one row `[L, width]`: memory by memory, token by token.

    Each memory has a list of the inputs that its convolutions look back at, and a state per head.
    """
    length, M, H, d = x.shape[0], layer.memories, layer.heads, layer.key_dim
    probabilities = layer.router(x).softmax(-1)
    weights, chosen = probabilities.topk(layer.active, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    o = [torch.zeros(H, layer.value_dim, dtype=x.dtype) for _ in range(length)]
    for m in range(M + 1):
        states = [torch.zeros(d, layer.value_dim, dtype=x.dtype) for _ in range(H)]
        pasts = {"query": [], "key": [], "value": []}
        for t in range(length):
            if m < M and m not in chosen[t]:
                continue
            weight = 1.0 if m == M else weights[t, chosen[t].tolist().index(m)]
            parts = {"query": layer.query(x[t])}
            parts |= {n: getattr(layer, n)(x[t]).chunk(M + 1)[m] for n in ("key", "value", "beta", "step")}
            for name, past in pasts.items():
                convolution, now = getattr(layer, f"{name}_conv"), parts[name]
                past.append(now)
                if convolution is not None:
                    taps = convolution.weight[:, 0].flip(0)
                    now = sum(tap * row for tap, row in zip(taps, reversed(past), strict=False))
                parts[name] = F.silu(now).unflatten(0, (H, -1))
            for h in range(H):
                q, k, v = (parts[name][h] for name in ("query", "key", "value"))
                q, k = (y / (y.square().sum() + 1e-6).sqrt() for y in (q, k))
                beta = layer.beta_range * parts["beta"][h].sigmoid()
                alpha = (-layer.log_rates[h].exp() * F.softplus(parts["step"][h] + layer.step_biases[h])).exp()
                S = alpha * states[h]
                states[h] = S + beta * torch.outer(k, v - S.T @ k)
                row = torch.zeros(H, 1, dtype=x.dtype)
                row[h] = 1
                o[t] = o[t] + weight * row * (states[h].T @ q) / math.sqrt(d)
    o = torch.stack(o)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    if layer.gate is not None:
        o = o * F.silu(layer.gate(x)).unflatten(-1, (H, -1))
    return layer.output(o.flatten(-2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memories": 1, "active": 1},
        {"memories": 5, "active": 1, "conv_size": 2, "expand_v": 0.5, "beta_range": 2.0},
        {"memories": 3, "active": 3, "conv_size": 0, "output_gate": False},
    ],
)
def test_one_packed_call_is_a_loop_over_memories(options):
    torch.manual_seed(0)
    layer = MixtureOfMemories(12, 2, 4, **options).double()
    x = torch.randn(2, 13, 12, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([loop_over_memories(layer, row) for row in x])
    y = layer(x)
    assert relative_error(y, expected) < EXACT
    weights = torch.randn_like(y)
    wanted = [x, *(p for n, p in layer.named_parameters() if n != "router.weight" or layer.active > 1)]
    got, reference = (torch.autograd.grad(o, wanted, weights) for o in (y, expected))
    for a, b in zip(got, reference, strict=True):
        assert (a - b).norm() <= EXACT * (1 + b.norm())


def test_one_token_at_a_time_with_a_state_for_each_memory():
    """Memories that a token does not go to stand still, and so does what their convolutions look back at."""
    torch.manual_seed(1)
    layer = MixtureOfMemories(12, 2, memories=4, active=1).double()
    x, cache = torch.randn(3, 20, 12, dtype=torch.float64), LayerCache()
    with torch.no_grad():
        expected, pieces, moved = layer(x), [], []
        for t in range(20):
            before = cache["state"] if t else torch.zeros(15, 2, 6, 12, dtype=torch.float64)
            taps = cache["key_conv"] if t else torch.zeros(15, 3, 12, dtype=torch.float64)
            pieces.append(layer(x[:, t : t + 1], cache))
            still = (cache["state"] == before).flatten(1).all(1)
            assert torch.equal(still, (cache["key_conv"] == taps).flatten(1).all(1))
            moved.append(~still.view(3, 5))
    assert relative_error(torch.cat(pieces, 1), expected) < EXACT
    assert cache["state"].shape == (15, 2, 6, 12) and cache["key_conv"].shape == (15, 3, 12)
    moved = torch.stack(moved, 1)  # [B, L, M + 1]
    assert moved[..., 4].all() and (moved[..., :4].sum(-1) == 1).all()
    assert torch.equal(moved[..., :4].int().argmax(-1), layer.router(x).argmax(-1))


def test_the_shared_memory_alone_is_gated_deltanet():
    """The routed memories' values at zero: what is left has GatedDeltaNet's weights and its output."""
    torch.manual_seed(2)
    layer, gated = MixtureOfMemories(12, 2).double(), GatedDeltaNet(12, 2).double()
    with torch.no_grad():
        for name in ("key", "value", "beta", "step"):
            weight = getattr(layer, name).weight.view(5, -1, 12)
            weight[4] = getattr(gated, name).weight
        layer.value.weight.view(5, -1, 12)[:4] = 0
    own = {n: p for n, p in gated.state_dict().items() if n.split(".")[0] not in ("key", "value", "beta", "step")}
    layer.load_state_dict(own, strict=False)
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    assert relative_error(layer(x), gated(x)) < EXACT


def test_rows_are_sorted_by_sequence_and_memory_and_keep_their_order():
    torch.manual_seed(3)
    chosen = torch.stack([torch.randperm(6)[:3] for _ in range(40)])
    sequences = torch.arange(40) // 10
    routes = sort_by_memory(chosen, sequences, 6, 5)  # the fifth sequence is empty
    bounds = routes.streams.bounds()
    assert len(bounds) == 30 and bounds[-1] == (120, 120)
    for number, (begin, end) in enumerate(bounds):
        tokens = routes.tokens[begin:end]
        assert (routes.memories[begin:end] == number % 6).all() and (sequences[tokens] == number // 6).all()
        assert (tokens.diff() > 0).all() and (chosen[tokens] == number % 6).any(1).all()
    assert torch.equal(routes.tokens[routes.unsorted].view(40, 3), torch.arange(40)[:, None].expand(40, 3))


# --- The balance loss -----------------------------------------------------------------------------------
def test_the_balance_loss_is_least_where_all_memories_are_used_alike():
    even = torch.full((2, 6, 4), 0.25, dtype=torch.float64)
    assert balance_loss(even, torch.arange(24).view(2, 6, 2) % 4).item() == pytest.approx(1)
    one = F.one_hot(torch.zeros(12, dtype=torch.long), 4).double().requires_grad_()
    assert balance_loss(one, torch.zeros(12, 1, dtype=torch.long)).item() == pytest.approx(4)
    # Its gradient pushes down the memory that got all tokens.
    (gradient,) = torch.autograd.grad(balance_loss(one, torch.zeros(12, 1, dtype=torch.long)), one)
    assert (gradient[:, 0] > 0).all() and not gradient[:, 1:].any()


def test_a_model_collects_one_balance_loss_a_layer_and_spreads_its_tokens():
    torch.manual_seed(4)
    model = LanguageModel(ModelConfig(width=16, layers=2, mixer="mom", memories=4, active_memories=1, mlp_ratio=0))
    tokens = torch.randint(256, (1, 64))
    routers = [block.mixer.router for block in model.blocks]
    with torch.no_grad():
        model.embedding.weight.normal_(mean=1.0)  # what all tokens have in common sends them all to one memory
        for router in routers:
            router.weight.zero_()[0] = 0.5
    optimiser = torch.optim.Adam([router.weight for router in routers], lr=0.05)
    history = []
    for _ in range(12):
        with balance_losses(model) as losses:
            model(tokens)
        history.append([loss.item() for loss in losses])
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        optimiser.step()
    assert all(len(losses) == 2 for losses in history)
    assert min(history[0]) > 3 and max(history[-1]) < 2  # 4: one memory has all; 1: all alike
    model(tokens)
    assert len(losses) == 2  # outside of the context nothing is collected
    with pytest.raises(ValueError, match=r"^model must have a MixtureOfMemories"), balance_losses(torch.nn.ReLU()):
        pass
    with balance_losses(model), pytest.raises(ValueError, match=r"^model: .* already"), balance_losses(model):
        pass
    with balance_losses(model) as losses:  # the refusal left the first one's list in order
        model(tokens)
    assert len(losses) == 2


def test_a_compiled_model_collects_the_same_losses():
    torch.manual_seed(6)
    model = LanguageModel(ModelConfig(width=16, layers=2, mixer="mom", memories=3, active_memories=1, mlp_ratio=0))
    tokens = torch.randint(256, (2, 40))
    compiled = torch.compile(model, backend="aot_eager")  # the PyTorch form reads its offsets, and so breaks the graph
    with balance_losses(model) as plain:
        model(tokens)
    with balance_losses(compiled) as found:
        compiled(tokens)
    compiled(tokens)
    torch.testing.assert_close(torch.stack(found), torch.stack(plain), rtol=1e-6, atol=0)
    expected = torch.autograd.grad(sum(plain), model.blocks[0].mixer.router.weight)
    torch.testing.assert_close(torch.autograd.grad(sum(found), model.blocks[0].mixer.router.weight), expected)


# --- Options --------------------------------------------------------------------------------------------
def test_a_model_builds_it_with_its_options():
    config = ModelConfig(
        width=16, layers=1, mixer="mom", memories=3, active_memories=1, expand_v=1.0, beta_range=2.0, output_gate=False
    )
    layer = LanguageModel(config).blocks[0].mixer
    assert (layer.memories, layer.active, layer.value_dim, layer.beta_range, layer.gate) == (3, 1, 8, 2.0, None)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MixtureOfMemories(8, 2, memories=2, active=3), "active must be at most memories = 2, got 3"),
        (lambda: MixtureOfMemories(8, 2, active=0), "active must be an integer of at least 1, got 0"),
        (lambda: MixtureOfMemories(8, 2, memories=0), "memories must be an integer of at least 1, got 0"),
        (lambda: MixtureOfMemories(8, 2, conv_size=-1), "conv_size must be an integer of at least 0, got -1"),
        (lambda: MixtureOfMemories(8, 2, beta_range=3), r"beta_range must be in \(0, 2\], got 3"),
        (lambda: MixtureOfMemories(8, 3), "heads must divide width, got heads = 3 and width = 8"),
        (lambda: ModelConfig(mixer="mom", active_memories=5), "active_memories must be at most memories = 4, got 5"),
        (lambda: ModelConfig(mixer="mom", memories=0), "memories must be at least 1, got 0"),
        (
            lambda: balance_loss(torch.zeros(3, 4), torch.zeros(4, 1, dtype=torch.long)),
            r"chosen must be \[..., k\] with leading dimensions \[3\] like probabilities, got \[4, 1\]",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
