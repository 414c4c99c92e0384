"""A cache survives what wraps a model, inference mode, and training in pieces."""

import copy
import dataclasses
import itertools

import pytest
import torch
from small_models import LAYERS, MODELS, model_and_tokens
from torch import nn
from torch.utils._pytree import tree_map

from dn_lib.layers import Attention, DeltaNet, LayerCache
from dn_lib.models import generate
from dn_lib.parallel.affine import run_on_processes
from dn_lib.testing import relative_error

# Pieces are summed in another order than the whole: some hundred roundings, amplified by four layers. A lost
# cache changes logits by a good part of their size.
SINGLE, EXACT = 1e-4, 1e-11
CUTS = [0, 7, 8, 9, 16, 24]
EVERY_KIND_OF_CACHE = {"pattern": ("delta", "window", "attention", "retnet")}


@torch.no_grad()
def in_pieces(module, tokens, cache):
    return torch.cat([module(tokens[:, a:b], cache) for a, b in itertools.pairwise(CUTS)], dim=1)


def shard(model, dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=True)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp in float32": lambda model: shard(model, torch.float32),
    "fsdp in bfloat16": lambda model: shard(model, torch.bfloat16),
}


def pieces_and_whole():
    """In each process: the relative difference between pieces and whole under every wrapper."""
    found = {}
    for kind, wrap in WRAPPERS.items():
        model, tokens = model_and_tokens(EVERY_KIND_OF_CACHE)
        wrapped = wrap(model)
        with torch.no_grad():
            whole = wrapped(tokens).float()
        found[kind] = torch.tensor(relative_error(in_pieces(wrapped, tokens, model.new_cache(2)).float(), whole))
    return found


def test_pieces_equal_the_whole_on_two_processes_under_ddp_and_fsdp():
    for found in run_on_processes(pieces_and_whole, 2):
        for kind, error in found.items():
            # bfloat16 rounds every activation by 2^-9; four layers of some ten operations amplify it.
            assert error < (0.1 if "bfloat16" in kind else SINGLE), kind


def test_pieces_equal_the_whole_when_compiled():
    """Two layers only: each piece of another shape is traced anew, which takes most of the time."""
    model, tokens = model_and_tokens({"pattern": ("retnet", "attention"), "layers": 2, "mlp_ratio": 0})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = model.new_cache(2)
    with torch.no_grad():
        pieces = [compiled(tokens[:, a:b], cache) for a, b in ((0, 7), (7, 8), (8, 9))]
        assert relative_error(torch.cat(pieces, dim=1), model(tokens[:, :9])) < SINGLE


def test_what_maps_over_arguments_passes_a_cache_on():
    """What FSDP2, DDP and others do to arguments: rebuild the containers that they know."""
    from torch.distributed.utils import _apply_to_tensors

    model, tokens = model_and_tokens({})
    cache = model.new_cache(2)
    for mapped in (tree_map(lambda x: x, (tokens, cache)), _apply_to_tensors(lambda x: x, (tokens, cache))):
        assert mapped[1] is cache
    for part in (cache, cache.layers[0]):
        assert not isinstance(part, dict | list | tuple) and not dataclasses.is_dataclass(part)


def test_a_copied_cache_goes_its_own_way():
    model, tokens = model_and_tokens({"hybrid": "global"})
    cache = model.new_cache(2)
    with torch.no_grad():
        model(tokens[:, :9], cache)
        other = copy.deepcopy(cache)
        model(tokens[:, 3:9], cache)
        assert relative_error(model(tokens[:, 9:], other), model(tokens)[:, 9:]) < SINGLE


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_after_it_has_generated(name):
    """Nothing that inference mode made is kept by the model, or by the modules that it uses."""
    model, tokens = model_and_tokens(MODELS[name])
    generate(model, tokens, 3)
    generate(model, tokens, 3, lengths=[3, 24])
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    model(tokens).square().mean().backward()
    fresh, _ = model_and_tokens(MODELS[name])
    fresh(tokens).square().mean().backward()
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_filled_in_inference_mode_can_be_trained_from(name):
    model, tokens = model_and_tokens(MODELS[name])
    gradients = []
    for context in (torch.inference_mode(), torch.no_grad()):
        cache = model.new_cache(2)
        with context:
            model(tokens[:, :10], cache)
        losses = [model(part, cache).square().mean() for part in tokens[:, 10:].split(7, dim=1)]
        gradients.append(torch.autograd.grad(sum(losses), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_cache_of_packed_prompts_can_be_trained_from():
    model, tokens = model_and_tokens({"hybrid": "global"}, length=12, batch=1)
    cache = model.new_cache(2)
    with torch.inference_mode():
        model(tokens, cache, cu_seqlens=torch.tensor([0, 4, 12]))
    model(tokens.view(2, 6), cache).square().mean().backward()
    assert model.head.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_a_later_piece_has_the_gradient_of_its_own_keys_and_values(name):
    """Against finite differences; what is cached from the piece before counts as a constant."""
    torch.manual_seed(5)
    layer = LAYERS[name]().double()
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    before = LayerCache()
    layer(x[:, :6], before)
    weights = torch.randn(1, 3, 24, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda y: (layer(y, copy.deepcopy(before)) * weights).sum(), x[:, 6:].clone().requires_grad_()
    )


def test_pieces_can_be_trained_on_together():
    """Full attention keeps its keys in one buffer: a later piece must not overwrite what an earlier one's needs."""
    torch.manual_seed(6)
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    gradients = []
    for window in (None, 64):  # a window longer than the text is full attention, with a cache that is never written to
        torch.manual_seed(7)
        layer, cache = Attention(24, 2, window=window).double(), LayerCache()
        loss = sum(layer(part, cache).square().sum() for part in x.split(5, dim=1))
        gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert all(relative_error(a, b) < EXACT for a, b in zip(*gradients, strict=True))


def test_a_recomputed_block_sees_the_cache_that_it_saw():
    """Activation checkpointing passes the cache on too; without one, packed rows are recomputed the same."""
    torch.manual_seed(8)
    layer, x = DeltaNet(24, 2).double(), torch.randn(1, 9, 24, dtype=torch.float64)
    cu_seqlens, gradients = torch.tensor([0, 4, 9]), []
    for run in (layer, lambda *a, **o: torch.utils.checkpoint.checkpoint(layer, *a, use_reentrant=False, **o)):
        y = run(x, cu_seqlens=cu_seqlens)
        gradients.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.gpu
def test_pieces_equal_the_whole_under_ddp_and_fsdp_on_a_gpu():
    """With device ids DDP moves its arguments, with a rebuilt container for each that it knows."""
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrappers = WRAPPERS | {"ddp": lambda model: nn.parallel.DistributedDataParallel(model, device_ids=[0])}
        for kind, wrap in wrappers.items():
            model, tokens = model_and_tokens(EVERY_KIND_OF_CACHE)
            wrapped, tokens = wrap(model.cuda()), tokens.cuda()
            with torch.no_grad():
                whole = wrapped(tokens).float()
            error = relative_error(in_pieces(wrapped, tokens, model.new_cache(2)).float(), whole)
            assert error < (0.1 if "bfloat16" in kind else SINGLE), kind
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_after_it_has_generated_on_a_gpu(name):
    model, tokens = model_and_tokens(MODELS[name] | {"width": 64})
    model, tokens = model.cuda(), tokens.cuda()
    generate(model, tokens, 3)
    model(tokens).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
