"""A hybrid model trained on a sequence that two or three processes share is the one that a single process trains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.models.context_parallel import (
    context_parallel_features,
    context_parallel_loss,
    shared_step,
    sum_gradients,
)
from dn_lib.parallel.affine import run_on_processes
from dn_lib.parallel.stretches import Stretches
from dn_lib.parallel.traffic import state_bytes
from dn_lib.testing import relative_error

SMALL = {"vocab_size": 31, "width": 16, "heads": 2, "window": 6, "mlp_ratio": 1.0}
MODELS = {
    "hybrid": {"pattern": ("delta", "window", "gated_delta", "attention", "linear"), "layers": 5},
    "decays": {"pattern": ("retnet", "gla", "gated_delta", "mamba2"), "layers": 4, "value_heads": 4, "expand_v": 0.5},
    "channels and fixed decays": {"pattern": ("kda", "lightning", "liger"), "layers": 3, "decay": "retnet"},
    "two steps, no convolution": {"layers": 2, "pattern": ("delta", "linear"), "delta_steps": 2, "conv_size": 0},
    "l1, tied": {"layers": 1, "qk_norm": "l1", "activation": "elu1", "tie_embeddings": True, "beta_range": 2.0},
}
# Stretches shorter than the window and than the convolution's halo, so that rows come from more than one process.
LENGTHS = {3: ([10, 2, 13], [1, 1, 8]), 2: ([12, 9],)}
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
# At the usual start of 0.02 the mixers hardly speak.  At 0.2 one process alone, in float32, is 2e-5 from float64.
STARTS = {torch.float64: 0.2, torch.float32: 0.05}


def made(name: str, dtype: torch.dtype) -> LanguageModel:
    torch.manual_seed(7)
    model = LanguageModel(ModelConfig(**SMALL | MODELS[name]))
    model.reset_parameters(std=STARTS[dtype])
    return model.to(dtype)


def text(lengths: list[int]) -> torch.Tensor:
    return torch.randint(0, 31, (2, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))


def one_process(name: str, lengths: list[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model, tokens = made(name, dtype), text(lengths)
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


def shared(name: str, lengths: list[int], dtype: torch.dtype, group) -> dict[str, torch.Tensor]:
    """In each process: the loss, and the summed gradients of every parameter."""
    model = made(name, dtype)
    stretches = Stretches(lengths, group)
    tokens = stretches.mine(text(lengths))
    loss = context_parallel_loss(model, tokens, stretches)
    loss.backward()
    sum_gradients(model, stretches)
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


def training(steps: int, dtype: torch.dtype, stretches: Stretches | None) -> list[torch.Tensor]:
    """Losses of some steps of AdamW on fresh tokens each, and the parameters at the end."""
    model, losses = made("hybrid", dtype), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        tokens = torch.randint(0, 31, (2, 21), generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        if stretches is None:
            loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
        else:
            loss = context_parallel_loss(model, stretches.mine(tokens), stretches)
            loss.backward()
            sum_gradients(model, stretches)
        optimiser.step()
        losses.append(loss.detach())
    return [torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])]


def counted_bytes() -> dict[str, int]:
    """What one forward and backward of the hybrid receives here."""
    stretches = Stretches.of([5, 9, 7][dist.get_rank()])
    model = made("hybrid", torch.float32)
    context_parallel_loss(model, stretches.mine(text(stretches.lengths)), stretches).backward()
    sum_gradients(model, stretches)
    return dict(stretches.received)


def work() -> dict:
    """All that the processes do, in one go: starting them takes longer."""
    pair = dist.new_group([1, 2])  # ranks within a group are not those of the world
    found: dict = {}
    for dtype in LIMITS:
        for name in MODELS:
            for lengths in LENGTHS[3]:
                found[f"{name} {lengths} {dtype}"] = shared(name, lengths, dtype, None)
        if dist.get_rank() > 0:
            for lengths in LENGTHS[2]:
                found[f"hybrid {lengths} {dtype}"] = shared("hybrid", lengths, dtype, pair)
    found["training"] = training(4, torch.float64, Stretches([8, 6, 7]))
    found["bytes"] = counted_bytes()
    return found


@pytest.fixture(scope="module")
def by_rank():
    return run_on_processes(work, 3)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_parameter_are_those_of_one_process(by_rank, name, dtype):
    lengths_of = LENGTHS[3] + (LENGTHS[2] if name == "hybrid" else ())
    for lengths in lengths_of:
        want = one_process(name, lengths, dtype)
        for found in by_rank[3 - len(lengths) :]:
            got = found[f"{name} {lengths} {dtype}"]
            assert got.keys() == want.keys()
            for parameter, grad in want.items():
                assert relative_error(got[parameter], grad) < LIMITS[dtype], parameter


@pytest.mark.parametrize("name", MODELS)
def test_a_stretch_alone_is_another_model(name):
    """What is compared above is not the same anyway: without the exchange the features are far off."""
    lengths = LENGTHS[3][0]
    model, tokens = made(name, torch.float64), text(lengths)
    alone, whole = model.features(tokens[:, -lengths[-1] :]), model.features(tokens)[:, -lengths[-1] :]
    assert relative_error(alone, whole) > 0.05


def test_a_training_run_is_that_of_one_process(by_rank):
    losses, parameters = training(4, torch.float64, None)
    assert losses[0] != losses[-1]
    for found in by_rank:
        assert relative_error(found["training"][0], losses) < 1e-10
        assert relative_error(found["training"][1], parameters) < 1e-8  # AdamW divides by the root of a square


def test_the_bytes_that_were_counted_are_those_of_the_formulas(by_rank):
    lengths, B, width, d, H, size = [5, 9, 7], 2, 16, 8, 2, 4
    states = {
        "states": sum(
            state_bytes(rule, 3, B, H, d, dv) for rule, dv in (("delta", d), ("delta", 2 * d), ("linear", d))
        ),
        "states, backward": sum(state_bytes("linear", 3, B, H, d, dv, backward=True) for dv in (d, 2 * d, d)),
    }
    total = sum(lengths)
    for rank, found in enumerate(by_rank):
        got, start = found["bytes"], sum(lengths[:rank])
        assert {name: got[name] for name in states} == states
        assert got["halo"] == 3 * B * min(3, start) * width * size  # three layers with convolutions of four taps
        pairs = B * 2 * H * d * size
        assert got["keys and values"] == pairs * (min(5, start) + start)
        borrowed = [
            sum(max(0, min(start + lengths[rank], at) - max(start, at - rows)) for at in (5, 14) if at > start)
            for rows in (3, 5, total)
        ]
        assert got["halo, backward"] == 3 * B * borrowed[0] * width * size
        assert got["keys and values, backward"] == pairs * (borrowed[1] + borrowed[2])
        assert got["labels"] == (B * 8 if rank < 2 else 0)
        parameters = sum(p.numel() for p in made("hybrid", torch.float32).parameters())
        assert got["gradients"] == -(-2 * 2 * 4 * parameters // 3) and got["loss"] == -(-2 * 2 * 16 // 3)


def test_one_process_of_one_is_the_model_itself():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, tokens = made("hybrid", torch.float64), text([11])
        got = context_parallel_features(model, tokens, Stretches([11]))
        assert relative_error(got, model.features(tokens)) < 1e-12
        other = copy.deepcopy(model)
        context_parallel_loss(model, tokens, Stretches([11]), labels=tokens).backward()
        F.cross_entropy(other(tokens).flatten(0, 1), tokens.flatten()).backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert relative_error(p.grad, q.grad) < 1e-10
        job = {"config": model.config.to_dict(), "weights": other.state_dict(), "tokens": tokens, "lengths": [11]}
        found, want = shared_step(job), one_process("hybrid", [11], torch.float64)
        assert set(found["grads"]) == set(want) - {"loss"}
        assert all(relative_error((found | found["grads"])[name], x) < 1e-10 for name, x in want.items())
        with pytest.raises(ValueError, match=r"^labels must have at least one token whose loss counts"):
            context_parallel_loss(model, tokens, Stretches([11]), labels=torch.full_like(tokens, -100))
        with pytest.raises(ValueError, match=r"^labels must be"):
            context_parallel_loss(model, tokens, Stretches([11]), labels=tokens[:, 1:])
        with pytest.raises(ValueError, match=r"^tokens must be"):
            context_parallel_loss(model, tokens[:, 1:], Stretches([11]))
        with pytest.raises(TypeError, match=r"^stretches must be"):
            context_parallel_features(model, tokens, [11])
        with pytest.raises(TypeError, match=r"^model must be"):
            context_parallel_features(torch.nn.Linear(2, 2), tokens, Stretches([11]))
        for mixer, kind in (("mamba", "Mamba"), ("mom", "MixtureOfMemories")):
            other = LanguageModel(ModelConfig(**SMALL | {"layers": 2, "pattern": ("delta", mixer)}))
            with pytest.raises(ValueError, match=rf"^model must have layers of .*, got {kind} in layer 2"):
                context_parallel_features(other, tokens, Stretches([11]))
        with pytest.raises(TypeError, match=r"^model must be a module"):
            sum_gradients([], Stretches([11]))
    finally:
        dist.destroy_process_group()
