"""Layers and configurations choose the operator's backend."""

import re

import pytest
import torch
from small_models import SMALL, model_and_tokens

from dn_lib import layers
from dn_lib.layers import DeltaNet
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.ops import BACKENDS

SINGLE = 1e-5  # float32, sums of a few hundred terms


def test_every_layer_hands_its_backend_to_the_operator(monkeypatch):
    seen = []

    def recorded(*arguments, backend, **options):
        seen.append(backend)
        return layers.delta_rule(*arguments, backend=backend, **options)

    monkeypatch.setattr(layers, "delta_rule_in_full_precision", recorded)
    for backend in ("auto", "recurrent", "parallel", "chunkwise"):
        model, tokens = model_and_tokens({"hybrid": "window", "backend": backend})
        model(tokens)
    assert seen == [name for name in ("auto", "recurrent", "parallel", "chunkwise") for _ in range(2)]


@pytest.mark.parametrize("backend", ["recurrent", "parallel", "chunkwise"])
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 7, 24])])
def test_the_backend_changes_no_number(backend, cu_seqlens):
    model, tokens = model_and_tokens({}, batch=1)
    other = LanguageModel(ModelConfig(**SMALL | {"backend": backend}))
    other.load_state_dict(model.state_dict())
    a, b = (m(tokens, cu_seqlens=cu_seqlens) for m in (model, other))
    # The four layers amplify what the first one rounds; ten times the rounding of one is room for that.
    assert (a - b).norm() < 10 * SINGLE * a.norm()


def test_second_derivatives_of_a_model():
    """A Hessian-vector product by two backward passes, against a difference of gradients."""
    model, tokens = model_and_tokens({"layers": 2, "backend": "chunkwise"}, length=9)
    model.double()
    weights = list(model.parameters())

    def gradient(create_graph):
        return torch.autograd.grad(model(tokens).square().mean(), weights, create_graph=create_graph)

    direction = [torch.randn_like(w) for w in weights]
    inner = sum((g * d).sum() for g, d in zip(gradient(True), direction, strict=True))
    product = torch.cat([p.flatten() for p in torch.autograd.grad(inner, weights)])
    step, ends = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w.add_(d, alpha=sign * step)
        ends.append(torch.cat([g.flatten() for g in gradient(False)]))
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w.sub_(d, alpha=sign * step)
    difference = (ends[0] - ends[1]) / (2 * step)
    # Rounding eps / step = 2e-10, and a third derivative times step^2; both far below 1e-5.
    assert (product - difference).norm() < 1e-5 * difference.norm()


def test_an_unknown_backend_is_named():
    message = re.escape(f"backend must be one of {', '.join(BACKENDS)}, got 'cuda'")
    with pytest.raises(ValueError, match=message):
        DeltaNet(8, 2, backend="cuda")
    with pytest.raises(ValueError, match=message):
        ModelConfig(backend="cuda")


def test_a_configuration_from_before_the_field_still_loads():
    values = ModelConfig(width=64).to_dict()
    del values["backend"]
    assert ModelConfig.from_dict(values) == ModelConfig(width=64)
