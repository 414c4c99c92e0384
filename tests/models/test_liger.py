"""Liger: a Transformer's projections with gates from its keys, a window beside; the conversion carries all over."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dn_lib.layers import Attention, Liger
from dn_lib.models import LanguageModel, ModelConfig, generate
from dn_lib.models.liger import to_liger
from dn_lib.testing import relative_error

# Sums of a few hundred terms: 1e-12 leaves float64 (eps 2e-16) three digits to lose.
EXACT = 1e-12


def transformer(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "width": 32, "layers": 3, "heads": 2, "mixer": "attention"}
    model = LanguageModel(ModelConfig(**sizes | options))
    model.reset_parameters(std=0.2)
    return model


@pytest.mark.parametrize("share", [0.5, 0.0, 1.0])
def test_the_layer_is_what_the_paper_writes(share):
    torch.manual_seed(1)
    layer, x = Liger(12, 2, 6, window=4, share=share).double(), torch.randn(1, 11, 12, dtype=torch.float64)
    window = Attention(12, 2, 6, window=4).double()
    window.load_state_dict(layer.state_dict())
    q, k, v = (f(x)[0].unflatten(-1, (2, 6)) for f in (layer.query, layer.key, layer.value))
    o = torch.zeros(11, 2, 6, dtype=torch.float64)
    for h in range(2):
        S = torch.zeros(6, 6, dtype=torch.float64)
        for t in range(11):
            alpha = (1 / (1 + (-k[t, h]).exp())) ** (1 / 16)
            S = torch.diag(alpha) @ S + torch.outer(k[t, h].exp() / k[t, h].exp().sum(), v[t, h])
            o[t, h] = S.T @ (q[t, h].exp() / q[t, h].exp().sum())
    expected = share * layer.output(o.flatten(-2)[None]) + (1 - share) * window(x)
    assert relative_error(layer(x), expected) < EXACT


def test_the_conversion_starts_from_the_transformers_projections():
    model = transformer().double()
    made = to_liger(model, window=8)
    assert made.config.mixers() == ("liger",) * 3 and made.config.window == 8
    old, new = dict(model.named_parameters()), dict(made.named_parameters())
    assert old.keys() == new.keys()
    assert all(torch.equal(old[n], new[n]) and old[n].data_ptr() != new[n].data_ptr() for n in old)
    assert all(p.dtype == torch.float64 and p.requires_grad for p in new.values())
    tokens = torch.randint(50, (2, 30))
    assert made(tokens).shape == (2, 30, 50)
    # With the window alone, the tokens that see all before them in the window get the Transformer's own logits.
    for block in made.blocks:
        block.mixer.share = 0.0
    assert relative_error(made(tokens)[:, :8], model(tokens)[:, :8]) < EXACT
    assert relative_error(made(tokens)[:, 8:], model(tokens)[:, 8:]) > 1e-3


def test_a_converted_model_trains_and_generates():
    """On lines that count in threes: what the Transformer knew is regained in fewer steps than it took to learn."""
    model = transformer(layers=2)
    tokens = (torch.arange(40)[None] * 3 + torch.arange(16)[:, None]) % 50

    def train(model, steps):
        optimiser, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
        for _ in range(steps):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    before = train(model, 40)
    after = train(to_liger(model, window=4), 20)
    assert after[-1] < after[0] < before[0] and after[-1] < 0.1 * math.log(50)
    made = to_liger(model, window=4)
    cache = made.new_cache(2)
    pieces = [made(tokens[:2, a:b], cache) for a, b in ((0, 9), (9, 10), (10, 25), (25, 40))]
    # float32 through two layers, sums in another order.
    assert relative_error(torch.cat(pieces, 1), made(tokens[:2]).double()) < 1e-4
    size = cache.bytes()
    made(tokens[:2], cache)
    assert cache.bytes() == size  # however long the context
    assert generate(made, tokens[:2, :5], 6, temperature=0).shape == (2, 11)


def test_some_layers_may_stay():
    made = to_liger(transformer(layers=4), window=8, keep=(0, 2), backend="chunkwise")
    assert made.config.mixers() == ("attention", "liger", "attention", "liger")
    assert made.blocks[1].mixer.backend == "chunkwise"
    hybrid = to_liger(transformer(layers=4, mixer="delta", hybrid="global", attention_heads=4), window=8)
    assert hybrid.config.mixers() == ("delta", "liger", "liger", "delta")
    assert hybrid.blocks[1].mixer.heads == 4


def test_a_conversion_draws_no_random_numbers():
    model = transformer()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    to_liger(model)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Liger(8, 2, share=2), r"share must be in \[0, 1\], got 2"),
        (lambda: Liger(8, 2, window=0), "window must be an integer of at least 1, got 0"),
        (lambda: Liger(8, 2, backend="cuda"), "backend must be one of auto"),
        (lambda: to_liger(Attention(8, 2)), "model must be a LanguageModel, got Attention"),
        (lambda: to_liger(transformer(), window=0), "window must be an integer of at least 1, got 0"),
        (lambda: to_liger(transformer(), keep=(3,)), "keep must hold numbers of attention layers of .*, got 3"),
        (lambda: to_liger(transformer(), keep=(0, 1, 2)), "model must have attention layers to convert"),
        (lambda: to_liger(transformer(mixer="delta")), "model must have attention layers to convert, got delta"),
        (
            lambda: to_liger(transformer(pattern=("window", "attention", "delta")), window=8),
            "window must be 128 like the model's window layers, got 8",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
