"""Layers and configurations choose the operator's backend."""

import re

import pytest
import torch
from small_models import SMALL, model_and_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from dn_lib.layers import DeltaNet
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.ops import BACKENDS
from dn_lib.ops.backend import choose_backend, using, why_not_auto

SINGLE = 1e-5  # float32, sums of a few hundred terms


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations, and those among them that make a matrix of `length` rows and columns."""

    def __init__(self, length):
        super().__init__()
        self.length, self.count, self.square = length, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.count += 1
        self.square += isinstance(result, torch.Tensor) and result.shape[-2:] == (self.length, self.length)
        return result


@pytest.mark.parametrize("backend", ["auto", "recurrent", "parallel", "chunkwise"])
def test_every_layer_hands_its_backend_to_the_operator(backend):
    """Told by what the operator does: a step for each token, or an L x L matrix, or neither."""
    length = 150  # more than two chunks
    model, _ = model_and_tokens({"hybrid": "window", "backend": backend})
    mixers = [module for module in model.modules() if isinstance(module, DeltaNet)]
    assert len(mixers) == 2
    for mixer in mixers:
        with Operations(length) as seen, torch.no_grad():
            mixer(torch.randn(1, length, SMALL["width"]))
        assert (seen.square > 0) == (backend == "parallel")
        assert (seen.count > 3 * length) == (backend == "recurrent")


def test_the_backend_of_a_layer_is_the_one_that_refuses():
    model, tokens = model_and_tokens({"backend": "triton"})
    with pytest.raises((TypeError, RuntimeError), match="backend 'triton'"):
        model.double()(tokens)


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


@pytest.mark.parametrize(
    "chunk_size, expected", [(8, "chunkwise"), (128, "chunkwise"), (16, "triton"), (None, "triton")]
)
def test_auto_leaves_chunks_that_no_kernel_has_to_the_chunkwise_form(chunk_size, expected):
    q = torch.zeros(1, 20, 1, 16)
    with using(auto="triton"):
        assert choose_backend(q, q, chunk_size, "auto") == expected
    problem = why_not_auto(torch.device("cuda"), q.dtype, 16, chunk_size)
    assert ("chunks of 16, 32 and 64" in (problem or "")) == (expected == "chunkwise")
