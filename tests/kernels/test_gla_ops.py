"""`linear_attention` with a gate for each key channel and backend "triton": what the operator adds to the kernels."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from dn_lib import checked, chunk_gla, linear_attention, ops
from dn_lib.layers import GatedLinearAttention
from dn_lib.ops.backend import using
from dn_lib.teaching.judge.trace import observe
from dn_lib.testing import (
    forward_and_gradients,
    gated_inputs,
    gated_linear_attention_reference,
    leaves,
    linear_attention_inputs,
    offsets,
    relative_error,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(ops.triton_problem(DEVICE) is not None, reason="needs Triton")
interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter traces kernels, and there is a GPU")
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SINGLE = 1e-5  # 84 eps of float32, for sums of some hundred terms, each rounded a few times
CHUNKS = ["chunk_scores", "chunk_states", "chunk_output"]
BACK = ["chunk_states_bwd", "chunk_bwd_dv", "chunk_bwd_decayed", "chunk_bwd_dqkg"]
triton = functools.partial(linear_attention, output_final_state=True, backend="triton")


def sample(B=1, L=20, H=1, d_k=5, d_v=16, *, group=1, dtype=F32, state=None, **options):
    """q, k, v, g and a state: H heads of q and k, group H of all else."""
    inputs = functools.partial(linear_attention_inputs, unit=True)
    q, k, v, g, first = gated_inputs(
        inputs, B, L, H * group, d_k, d_v, channels=True, dtype=dtype, state=state, device=DEVICE, **options
    )
    return [q[:, :, ::group], k[:, :, ::group], v, g, first]


def reference(q, k, v, g, **options):
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    return gated_linear_attention_reference(q, k, v, g, **options)


def test_every_option():
    """Value heads that share key heads, a scale, both states, packed sequences, the norm; and every gradient."""
    cu = offsets([0, 17, 1, 6], torch.int32, DEVICE)
    tensors = sample(1, 24, 1, 6, 9, group=2, state=4)
    tensors[1] = 3 * tensors[1]
    do, dstate = torch.randn_like(tensors[2]), torch.randn_like(tensors[4])
    options = {"scale": 0.7, "cu_seqlens": cu, "qk_l2norm": True}
    exact = forward_and_gradients(reference, leaves(*tensors, dtype=F64), do.double(), dstate.double(), **options)
    got = forward_and_gradients(functools.partial(triton, chunk_size=32), leaves(*tensors), do, dstate, **options)
    for a, b in zip(got, exact, strict=True):
        assert relative_error(a, b) < SINGLE


@interpreted
def test_which_kernels_run():
    """The recurrence for short calls that want no gradient."""
    *inputs, first = sample(L=9, state=1)
    (o, state), trace = observe(triton, *inputs, initial_state=first)
    assert [launch.kernel for launch in trace.launches] == ["recurrent"]
    exact, last, _ = reference(*inputs, initial_state=first)
    assert relative_error(o, exact) < SINGLE and relative_error(state, last) < SINGLE
    x = leaves(*inputs)
    (o, _), trace = observe(triton, *x)
    assert [launch.kernel for launch in trace.launches] == CHUNKS
    _, trace = observe(torch.autograd.grad, o, x, torch.ones_like(o))
    assert [launch.kernel for launch in trace.launches] == BACK
    *inputs, _ = sample(L=17)
    _, trace = observe(linear_attention, *inputs, backend="triton")
    assert [launch.kernel for launch in trace.launches] == CHUNKS


@interpreted
def test_auto_and_fla_s_signature_take_them():
    """Where auto takes the kernels at all: with no more channels than they hold; with erasure there are none."""
    *inputs, first = sample(L=17, state=1)
    short = [x[:, :3] for x in inputs]
    with using(auto="triton"):
        for function, (tensors, launches) in itertools.product(
            (linear_attention, chunk_gla), ((inputs, CHUNKS), (short, ["recurrent"]))
        ):
            (o, state), trace = observe(function, *tensors, initial_state=first, output_final_state=True)
            assert [launch.kernel for launch in trace.launches] == launches
            exact, last, _ = reference(*tensors, initial_state=first)
            assert relative_error(o, exact) < SINGLE and relative_error(state, last) < SINGLE
        q, k, v, g = inputs
        _, trace = observe(ops.gated_delta_rule, q, k, v, torch.ones_like(v[..., 0]), g)
        assert not trace.launches
    _, trace = observe(linear_attention, *inputs)
    assert not trace.launches  # a CPU takes PyTorch


def test_dtypes_are_kept():
    """o in v's dtype, the state in float32, every gradient in the dtype of its tensor."""
    q, k, v, g, first = sample(dtype=BF16, state=1)
    x = [*leaves(q, k, v), *leaves(g, dtype=F64), *leaves(first, dtype=torch.float16)]
    o, last = triton(*x[:4], initial_state=x[4])
    assert o.dtype == BF16 and last.dtype == F32
    gradients = torch.autograd.grad(o.float().sum() + last.sum(), x)
    assert [dx.dtype for dx in gradients] == [BF16, BF16, BF16, F64, torch.float16]


@pytest.mark.parametrize("B, L", [(1, 0), (0, 5), (1, 1)])
def test_little_or_nothing(B, L):
    *inputs, first = leaves(*sample(B, L, state=B))
    o, last = triton(*inputs, initial_state=first)
    assert o.shape == (B, L, 1, 16) and last.shape == (B, 1, 5, 16)
    (gradient,) = torch.autograd.grad(o.sum() + last.sum(), first)
    if L == 0:
        assert torch.equal(last, first) and torch.equal(gradient, torch.ones_like(first))


def test_token_by_token_equals_the_whole():
    q, k, v, g, first = sample(2, 20, 1, group=2, state=2)
    exact, last, _ = reference(q, k, v, g, initial_state=first)
    outputs, state = [], first
    for a, b in ((0, 17), (17, 18), (18, 20)):
        o, state = triton(*(x[:, a:b] for x in (q, k, v, g)), initial_state=state)
        outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), exact) < SINGLE and relative_error(state, last) < SINGLE


def test_double_backward_and_transforms_are_refused():
    x = leaves(*sample(L=17)[:-1])
    (first, *_) = torch.autograd.grad(triton(*x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention with backend 'triton' has no second derivative"):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(RuntimeError, match="backend 'triton' does not support"):
        torch.func.grad(lambda g: triton(*(y.detach() for y in x[:3]), g)[0].sum())(x[3].detach())


@pytest.mark.parametrize("state, save", [(True, True), (False, True), (True, False)])
def test_opcheck_forward(state, save):
    given = sample(state=1 if state else None)
    q, k, v, g, first = leaves(*given) if save else given
    torch.library.opcheck(torch.ops.dn_lib.gla, (q, k, v, g, first, None, 0.3, 16, save))


def test_opcheck_backward():
    q, k, v, g, first = sample(group=2, state=1)
    o, last, *saved = torch.ops.dn_lib.gla(q, k, v, g, first, None, 0.3, 16, True)
    do = torch.randn_like(o).transpose(1, 2).contiguous().transpose(1, 2)  # strides of a gradient may be any
    arguments = (q, k, v, g, first, None, saved, do, torch.randn_like(last), 0.3, 16)
    torch.library.opcheck(torch.ops.dn_lib.gla_backward, arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_equals_eager(packed):
    torch._dynamo.reset()
    cu = offsets([9, 0, 15], torch.int32, DEVICE) if packed else None
    x = sample(1, 24, 1, group=2, state=3 if packed else 1)

    def run(q, k, v, g, first):
        return triton(q, k, v, g, initial_state=first, qk_l2norm=True, cu_seqlens=cu)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y = leaves(*x)
        o, state = function(*y)
        results.append([o, state, *torch.autograd.grad(o.sin().sum() + state.sum(), y)])
    for a, b in zip(*results, strict=True):
        # The kernels get the same operands, but a compiler may reorder the sums of the norm.
        assert relative_error(a, b.double()) < SINGLE


def test_bad_input_is_named():
    q, k, v, g, _ = sample(1, 4, 1, 5, 6)
    for change, message in (
        ({"g": g[..., :4]}, r"g must be \[B, L, H_v, d_k\] = \[1, 4, 1, 5\], got \[1, 4, 1, 4\]"),
        ({"chunk_size": 8}, "chunk_size must be 16, 32, 64 or None for backend 'triton', got 8"),
        ({"scale": 1e-60}, "scale must be finite and not 0 in float32 for backend 'triton'"),
        ({"g": g.double().abs() + 1}, "g must be at most 0, the logarithm of a gate"),
    ):
        with checked(), pytest.raises(ValueError, match=message):
            linear_attention(**{"q": q, "k": k, "v": v, "g": g, "backend": "triton"} | change)
    with pytest.raises(TypeError, match="q must be float32, bfloat16 or float16 for backend 'triton'"):
        linear_attention(*(x.double() for x in (q, k, v, g)), backend="triton")
    with pytest.raises(ValueError, match=r"g must be \[B, L, H_v\] or \[H_v\] for backend 'triton', got one for each"):
        ops.gated_delta_rule(q, k, v, torch.ones_like(v[..., 0]), g, backend="triton")


def test_the_layer_runs_on_the_kernels():
    """Forward and backward, packed documents among them."""
    torch.manual_seed(5)
    plain, fast = (GatedLinearAttention(16, 2, backend=backend).to(DEVICE) for backend in ("chunkwise", "triton"))
    fast.load_state_dict(plain.state_dict())
    x, cu = torch.randn(1, 20, 16, device=DEVICE), torch.tensor([0, 13, 20], device=DEVICE)
    results = []
    for layer in (plain, fast):
        y = layer(x, cu_seqlens=cu)
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        # Through the norm per head, which divides by what may be small: ten times a sum's own error.
        assert relative_error(b, a.double()) < 10 * SINGLE
