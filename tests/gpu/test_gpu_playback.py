"""Eager calls on a GPU that were made before: played back, they give what the ordinary launch gives, bit for bit."""

from __future__ import annotations

import importlib.util
import threading

import pytest
import torch

import dn_lib
from dn_lib.kernels.delta_rule import launch
from dn_lib.kernels.plan import plan_call, resolve, using
from dn_lib.testing import delta_rule_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def clean():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    resolve.cache_clear()  # plans with what they have recorded
    yield
    torch.set_float32_matmul_precision(before)


CASES = {
    "heads of 128": ((2, 320, 3, 128, 128), BF16, {}),
    "heads of 64, one backward kernel": ((2, 320, 3, 64, 64), BF16, {}),
    "float32, several blocks of values": ((1, 130, 2, 64, 128), F32, {}),
    "float16": ((2, 77, 2, 40, 72), F16, {}),
    "heads of 256": ((1, 128, 2, 256, 256), BF16, {}),
    "TMA": ((1, 1024, 2, 64, 64), BF16, {"tma": True}),
    "segments": ((1, 1024, 2, 64, 64), BF16, {"segments": 4}),
    "segments, heads of 128": ((2, 1024, 2, 128, 128), BF16, {"segments": 3, "gluon": False}),
    "for Hopper": ((1, 1024, 2, 128, 128), BF16, {"gluon": True}),
    "for Hopper, segments": ((1, 2048, 2, 128, 128), BF16, {"gluon": True, "segments": 4}),
}


def ordinary(plan, q, k, v, beta, state, do, dstate, scale):
    """What `launch` gives, without the layer of `eager`."""
    o, last, saved = launch.forward(
        plan=plan, q=q, k=k, v=v, beta=beta, scale=scale, initial_state=state, final_state=dstate is not None
    )
    grads = launch.backward(
        plan=plan, q=q, k=k, beta=beta, saved=saved, do=do, dstate=dstate, scale=scale,
        initial_state=state is not None,
    )  # fmt: skip
    return [x for x in (o, last, *grads) if x is not None]


@pytest.mark.parametrize("states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("case", CASES)
def test_a_call_played_back_equals_the_ordinary_launch(case, norm, states):
    sizes, dtype, options = CASES[case]
    B, _, H, K, V = sizes
    with using(**options):
        for seed in range(3):  # recorded, and played back with other tensors, and another scale
            q, k, v, beta, state = delta_rule_inputs(*sizes, seed=seed, dtype=dtype, device="cuda")
            state = state if states else None
            leaves = [x.requires_grad_() for x in (q, k, v, beta, state) if x is not None]
            do, dstate = torch.randn_like(v), torch.randn(B, H, K, V, device="cuda") if states else None
            o, last = dn_lib.delta_rule(
                q, k, v, beta, scale=0.1 + seed, initial_state=state, output_final_state=states, qk_l2norm=norm
            )
            outputs, upstream = ((o, last), (do, dstate)) if states else ((o,), (do,))
            grads = torch.autograd.grad(outputs, leaves, upstream)
            plan = plan_call(q, k, v, norm=norm, training=True, chunk=64 if dtype != F32 else 32)
            assert sum(x is not None for x in plan.recorded.values()) == 2
            with torch.no_grad():
                expected = ordinary(plan, q, k, v, beta, state, do, dstate, 0.1 + seed)
            found = [x.detach() for x in (*outputs, *grads)]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), case
            again, _ = dn_lib.delta_rule(
                *(x.detach() for x in (q, k, v, beta)), scale=0.1 + seed, qk_l2norm=norm,
                initial_state=None if state is None else state.detach(),
            )  # fmt: skip
            assert torch.allclose(again.float(), o.float(), rtol=0, atol=0.02 * float(o.detach().float().abs().max()))


def call(q, k, v, beta, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, beta)]
    o, _ = dn_lib.delta_rule(*leaves, **options)
    return o, leaves


def test_what_cannot_be_played_back_goes_the_ordinary_way():
    """One tensor in two places, gradients that are expanded or lie off 16 bytes, views, saved tensors kept on a CPU."""
    q, k, v, beta, _ = delta_rule_inputs(2, 192, 2, 64, 64, dtype=BF16, device="cuda")
    do = torch.randn_like(v)
    o, leaves = call(q, k, v, beta)
    first = torch.autograd.grad(o, leaves, do)
    for _ in range(2):
        o, leaves = call(q, k, v, beta)
        assert all(map(torch.equal, first, torch.autograd.grad(o, leaves, do)))
    shifted = torch.empty(do.numel() + 1, dtype=BF16, device="cuda")[1:].view_as(do).copy_(do)
    o, leaves = call(q, k, v, beta)
    assert all(map(torch.equal, first, torch.autograd.grad(o, leaves, shifted)))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, beta)]
    o, leaves = call(*views)
    assert all(map(torch.equal, first, torch.autograd.grad(o, leaves, do)))
    with torch.autograd.graph.save_on_cpu():
        o, leaves = call(q, k, v, beta)
        kept = torch.autograd.grad(o, leaves, do)
    assert all(map(torch.equal, first, kept))
    o, leaves = call(q, k, v, beta)
    (sums,) = torch.autograd.grad(o.sum(), leaves[2:3])
    o, leaves = call(q, k, v, beta)
    assert torch.equal(sums, torch.autograd.grad(o, leaves[2], torch.ones_like(o))[0])
    same, _ = dn_lib.delta_rule(k, k, v, beta)
    assert torch.equal(same, dn_lib.delta_rule(k.clone(), k, v, beta)[0])
    assert torch.equal(dn_lib.delta_rule(torch._neg_view(q), k, v, beta)[0], dn_lib.delta_rule(-q, k, v, beta)[0])


def test_precision_asked_for_between_forward_and_backward_is_the_backwards():
    q, k, v, beta, _ = delta_rule_inputs(1, 128, 2, 64, 64, dtype=F32, device="cuda")
    do, found = torch.randn_like(v), {}
    for precision in ("highest", "high", "highest", "high"):
        torch.set_float32_matmul_precision("highest")
        o, leaves = call(q, k, v, beta)
        torch.set_float32_matmul_precision(precision)
        grads = torch.autograd.grad(o, leaves, do)
        assert all(map(torch.equal, grads, found.setdefault(precision, grads)))
    assert not torch.equal(found["highest"][0], found["high"][0])


def test_streams_graphs_and_threads():
    q, k, v, beta, _ = delta_rule_inputs(2, 1024, 2, 64, 64, dtype=BF16, device="cuda")
    with torch.no_grad():
        expected = [dn_lib.delta_rule(q, k, v, beta)[0] for _ in range(2)][1]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # what runs on another stream would be ready before it
            inputs = [x.clone() for x in (q, k, v, beta)]
            o, _ = dn_lib.delta_rule(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(o, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = dn_lib.delta_rule(q, k, v, beta)
        o.fill_(float("nan"))
        graph.replay()
        assert torch.equal(o, expected)
    results = []

    def run():
        x, leaves = call(q, k, v, beta)
        results.append((x.detach(), *torch.autograd.grad(x, leaves, torch.ones_like(x))))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(all(map(torch.equal, results[0], other)) for other in results)


def test_activation_checkpointing_over_the_first_call_and_the_second():
    q, k, v, beta, _ = delta_rule_inputs(1, 192, 2, 64, 64, dtype=BF16, device="cuda")
    v.requires_grad_()

    def layer(v):
        return dn_lib.delta_rule(q, k, v, beta)[0]

    o = torch.utils.checkpoint.checkpoint(layer, v, use_reentrant=False)
    (dv,) = torch.autograd.grad(o, v, torch.ones_like(o))
    assert torch.equal(dv, torch.autograd.grad(layer(v), v, torch.ones_like(o))[0])


def test_a_profiler_that_asks_for_launches_sees_them():
    from triton import knobs

    q, k, v, beta, _ = delta_rule_inputs(1, 192, 2, 64, 64, dtype=BF16, device="cuda")
    seen = []
    with torch.no_grad():
        for _ in range(2):
            expected, _ = dn_lib.delta_rule(q, k, v, beta)
        hooks = knobs.runtime.launch_enter_hook
        note = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
        if hooks is None:
            knobs.runtime.launch_enter_hook = note
        else:
            hooks.add(note)
        try:
            o, _ = dn_lib.delta_rule(q, k, v, beta)
        finally:
            if hooks is None:
                knobs.runtime.launch_enter_hook = None
            else:
                hooks.remove(note)
    assert seen == ["chunk_inverse", "chunk_scan_fwd"] and torch.equal(o, expected)
