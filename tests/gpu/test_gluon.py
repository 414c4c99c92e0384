"""The operator through the kernels for Hopper, against float64: every way in which a plan may call them."""

from __future__ import annotations

import pytest
import torch

from dn_lib import delta_rule
from dn_lib.kernels import plan, rules
from dn_lib.testing import delta_rule_inputs, delta_rule_reference, forward_and_gradients, leaves, relative_error

pytestmark = pytest.mark.gpu

BOUND = 8e-3  # as in test_gpu.py: bfloat16 is off by at most 2^-8, and some four or five such errors meet in a result


@pytest.fixture(autouse=True)
def gluon():
    """The kernels for Hopper in calls of any length."""
    call = plan.plan_call(*(torch.empty(1, 64, 1, 128, dtype=torch.bfloat16, device="cuda"),) * 3, chunk=64)
    with plan.using(gluon=True):
        if not rules.takes_gluon(call.call._replace(overrides=rules.Overrides(gluon=True))):
            pytest.skip("needs a Hopper GPU, and a Triton with which its kernels were checked")
        yield


def compared(tensors, do, dstate, **options):
    """The largest error of output, state and gradients."""
    norm = options.get("qk_l2norm", False)
    exact = forward_and_gradients(
        delta_rule_reference,
        leaves(*tensors, dtype=torch.float64),
        do.cpu(),
        dstate.cpu(),
        scale=128**-0.5,
        qk_l2norm=norm,
    )
    q, k, v, beta, state = (x.cuda().requires_grad_() for x in tensors)
    o, final = delta_rule(q, k, v, beta, initial_state=state, output_final_state=True, **options)
    grads = torch.autograd.grad((o, final), (q, k, v, beta, state), (do.cuda(), dstate.cuda()))
    return max(relative_error(a.cpu(), b) for a, b in zip((o, final, *grads), exact, strict=True))


def problem(B=2, L=256, H=3, *, unit=True, seed=0):
    *tensors, state = delta_rule_inputs(B, L, H, 128, 128, dtype=torch.bfloat16, state=B, unit=unit, seed=seed)
    g = torch.Generator().manual_seed(seed)
    do = torch.randn(B, L, H, 128, generator=g).bfloat16()
    return (*tensors, state), do, torch.randn(B, H, 128, 128, generator=g)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("segments", [1, 2, 4])
def test_against_float64(norm, segments):
    with plan.using(segments=segments):
        assert compared(*problem(unit=not norm), qk_l2norm=norm) < BOUND


def test_the_plan_says_gluon():
    x = torch.empty(2, 256, 3, 128, dtype=torch.bfloat16, device="cuda")
    made = plan.plan_call(x, x, x, training=True, chunk=64)
    assert [name for name, launch in made.launches.items() if launch.gluon] == ["chunk_scan_fwd", "chunk_scan_bwd"]
    assert "Gluon" in str(made) and "chunk_bwd_dqk" not in made.launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beta_and_state_of_another_dtype(dtype):
    (q, k, v, beta, state), do, dstate = problem(seed=1)
    assert compared((q, k, v, beta.to(dtype), state.to(dtype)), do, dstate) < BOUND


def test_tensors_that_tma_cannot_read():
    (q, k, v, beta, state), *_ = problem(seed=2)
    shifted = []
    for x in (q, k, v):
        room = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
        shifted.append(room[1:].view(x.shape).copy_(x))
        assert shifted[-1].data_ptr() % 16
    got = delta_rule(*shifted, beta.cuda(), initial_state=state.cuda())[0]
    assert torch.equal(got, delta_rule(*(x.cuda() for x in (q, k, v, beta)), initial_state=state.cuda())[0])


def test_inference_and_compiled_calls_are_the_same():
    tensors, do, dstate = problem(seed=3)
    q, k, v, beta, state = (x.cuda() for x in tensors)

    def both(q, k, v, beta, state):
        o, final = delta_rule(q, k, v, beta, initial_state=state, output_final_state=True)
        return (o, final, *torch.autograd.grad((o, final), (q, k, v, beta, state), (do.cuda(), dstate.cuda())))

    eager = both(*(x.requires_grad_() for x in (q, k, v, beta, state)))
    with torch.no_grad():
        o, final = delta_rule(q, k, v, beta, initial_state=state, output_final_state=True)
    assert torch.equal(o, eager[0]) and torch.equal(final, eager[1])
    fast = torch.compile(lambda *x: delta_rule(*x[:4], initial_state=x[4], output_final_state=True), fullgraph=True)
    o, final = fast(q, k, v, beta, state)
    grads = torch.autograd.grad((o, final), (q, k, v, beta, state), (do.cuda(), dstate.cuda()))
    # Its backward runs in another thread, for which nothing is asked: the Triton kernels, in so short a call.
    for a, b in zip((o, final, *grads), eager, strict=True):
        assert relative_error(a, b) < BOUND


@pytest.mark.parametrize("strength", [0.0, 2.0**-45, 2.0**-30, 2.0**-10])
def test_weak_writes_read_by_either_pair_of_kernels(strength):
    """Both pairs keep the same for the backward, so that a backward may run through the other one."""
    (q, k, v, beta, _), do, _ = problem(seed=4)
    beta[:, ::3] = strength
    q, k, v, beta, do = (x.cuda() for x in (q, k, v, beta, do))
    from dn_lib.kernels.delta_rule import launch

    results = []
    for ahead in (True, False):
        for back in (True, False):
            with plan.using(gluon=ahead):
                forward = plan.plan_call(q, k, v, training=True, chunk=64)
            with plan.using(gluon=back):
                backward = plan.plan_call(q, k, v, training=True, chunk=64)
            _, _, saved = launch.forward(plan=forward, q=q, k=k, v=v, beta=beta, scale=0.1)
            results.append(
                launch.backward(
                    plan=backward, q=q, k=k, beta=beta, saved=saved, do=do, dstate=None, scale=0.1, initial_state=False
                )[:4]
            )
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert a.isfinite().all() and relative_error(a, b) < BOUND


def test_repeats_are_equal_bit_for_bit():
    tensors, do, dstate = problem(B=4, L=1024, H=16, seed=5)
    q, k, v, beta, state = (x.cuda().requires_grad_() for x in tensors)
    first = None
    for _ in range(20):
        o, final = delta_rule(q, k, v, beta, initial_state=state, output_final_state=True)
        got = (o, final, *torch.autograd.grad((o, final), (q, k, v, beta, state), (do.cuda(), dstate.cuda())))
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


def test_cuda_graph_and_a_thread_of_its_own():
    import threading

    (q, k, v, beta, _), do, _ = problem(seed=6)
    inputs = [x.cuda().requires_grad_() for x in (q, k, v, beta)]
    expected = torch.autograd.grad(delta_rule(*inputs)[0], inputs, do.cuda())
    found = []

    def work():
        found.extend(torch.autograd.grad(delta_rule(*inputs)[0], inputs, do.cuda()))

    thread = threading.Thread(target=work)  # with the rules' choice: `using` is of the thread that asked
    thread.start()
    thread.join()
    assert all(relative_error(a, b) < BOUND for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        plain = delta_rule(*inputs)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = delta_rule(*inputs)[0]
        graph.replay()
    assert torch.equal(o, plain)
