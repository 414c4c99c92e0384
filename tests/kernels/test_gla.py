"""The kernels with a gate for each key channel: against the recurrence in float64.

They are launched as an operator would launch them, through `plan_call` and `launch`.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dn_lib import linear_attention, ops
from dn_lib.cost import Shape, gated_by_channel, gated_by_channel_backward
from dn_lib.kernels.gla.plan import KERNELS, plan_call, using
from dn_lib.kernels.rules import Target, Tiles
from dn_lib.teaching.judge.trace import observe
from dn_lib.testing import (
    forward_and_gradients,
    gated_inputs,
    gated_linear_attention_reference,
    leaves,
    linear_attention_inputs,
    offsets,
    output_gradients,
    poisoned,
    relative_error,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(ops.triton_problem(DEVICE) is not None, reason="needs Triton")

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# As in tests/test_operators.py.  float32: 84 eps, for sums of some hundred terms, each rounded a few times.  Half
# precision: every operand of a dot is rounded, at most 8 times one after the other from an input to a result; the
# interpreter cuts bfloat16 where a GPU rounds.
BOUND = {F32: 1e-5, F16: 8 * 2**-11, BF16: 8 * 2**-8}
inputs_of = functools.partial(gated_inputs, functools.partial(linear_attention_inputs, unit=True), channels=True)


def sample(B, L, H, d_k, d_v, *, group=1, state=None, **options):
    """q, k of H heads; v, g `[B, L, group H, d_k]` and the state of group H heads."""
    q, k, v, g, first = inputs_of(B, L, H * group, d_k, d_v, state=state, device=DEVICE, **options)
    return [q[:, :, ::group], k[:, :, ::group], v, g, first]


def reference(q, k, v, g, **options):
    """The recurrence, with each key head repeated for its value heads."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    return gated_linear_attention_reference(q, k, v, g, **options)


class _Kernels(torch.autograd.Function):
    """Forward and backward as launched; o and the final state are differentiable in every input."""

    @staticmethod
    def forward(ctx, plan, scale, cu, q, k, v, g, first):
        from dn_lib.kernels.gla import launch

        o, state, saved = launch.forward(
            plan=plan, q=q, k=k, v=v, g=g, scale=scale, initial_state=first, cu_seqlens=cu, final_state=True
        )
        ctx.save_for_backward(q, k, v, g)
        ctx.rest = plan, scale, saved, first
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    def backward(ctx, do, dstate):
        from dn_lib.kernels.gla import launch

        plan, scale, saved, first = ctx.rest
        q, k, v, g = ctx.saved_tensors
        found = launch.backward(
            plan=plan, q=q, k=k, v=v, g=g, saved=saved, do=do, dstate=dstate, scale=scale,
            initial_state=first is not None,
        )  # fmt: skip
        return None, None, None, *found


def kernels(*, chunk=16, tiles=None):
    """A function with the signature of the reference, by the kernels."""

    def run(q, k, v, g, *, scale=None, initial_state=None, cu_seqlens=None):
        with using(tiles or {}):
            plan = plan_call(q, k, v, cu_seqlens=cu_seqlens, training=True, chunk=chunk)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return _Kernels.apply(plan, scale, cu_seqlens, q, k, v, g, initial_state)

    return run


def recurrent_kernel(q, k, v, g, *, scale=None, initial_state=None, cu_seqlens=None, final_state=None):
    from dn_lib.kernels.gla import launch

    plan = plan_call(q, k, v, cu_seqlens=cu_seqlens, chunk=None)
    c = plan.call
    state = q.new_empty(c.sequences, c.H, c.K, c.V, dtype=F32) if final_state is None else final_state
    o = launch.recurrent(
        plan=plan, q=q, k=k, v=v, g=g, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state, final_state=state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return o, state


def assert_close(run, tensors, *, dtype, faint=False, **options):
    """o, the final state and every gradient; tensors end with the initial state.

    faint: what passes from token to token may be too small for float32.  The gradients of g and of the initial state
    hold nothing else, so their errors are measured against what they are sums of, the size of q * dq and of dq.
    """
    q, _, v, *_ = tensors
    states = options["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in options else v.shape[0]
    do, dstate = output_gradients(*v.shape[:3], q.shape[3], v.shape[3], state=states, seed=7, device=DEVICE)
    do, dstate = do.to(dtype), dstate.float()
    exact = forward_and_gradients(reference, leaves(*tensors, dtype=F64), do.double(), dstate.double(), **options)
    with poisoned():
        got = forward_and_gradients(run, leaves(*tensors), do, dstate, **options)
    for name, a, b in zip(("o", "state", "dq", "dk", "dv", "dg", "dinitial"), got, exact, strict=False):
        assert a.isfinite().all(), name
        size = exact[2].norm().item() if faint and name in ("dg", "dinitial") else 0.0
        error = relative_error(a, b, size)
        assert error < BOUND[dtype], f"{name}: {error:.1e}"


# --- Forward and backward -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "dtype, chunk", [(F32, 16), (F32, 32), (F32, 64), (F16, 32), (BF16, 64)], ids=lambda x: str(x).split(".")[-1]
)
def test_values_and_gradients(dtype, chunk):
    """At a length that no chunk divides, with states in and out; in chunks of one to four sub-chunks."""
    tensors = sample(1, chunk + 37, 2, 20, 24, state=1, dtype=dtype)
    assert_close(kernels(chunk=chunk), tensors, dtype=dtype, scale=0.7)


def test_gates_in_half_precision():
    """They may have another dtype than q; their gradient comes in it."""
    tensors = sample(1, 37, 1, 20, 24, dtype=F16)
    given = leaves(*tensors[:3], tensors[3].float())
    o, state = kernels(chunk=32)(*given)
    gradients = torch.autograd.grad(o.sum() + state.sum(), given)
    assert [x.dtype for x in gradients] == [F16, F16, F16, F32]
    assert_close(kernels(chunk=32), tensors, dtype=F16)


@pytest.mark.parametrize("group", [1, 2])
def test_packed_sequences(group):
    """Some of them empty; value heads may share key heads."""
    lengths = [0, 17, 1, 0, 36]
    tensors = sample(1, sum(lengths), 1, 20, 24, group=group, state=5, dtype=F32)
    cu = offsets(lengths, torch.int32, DEVICE)
    assert_close(kernels(chunk=32), tensors, dtype=F32, cu_seqlens=cu)
    with torch.no_grad():
        exact = reference(*tensors[:-1], initial_state=tensors[-1], cu_seqlens=cu)
        got = recurrent_kernel(*tensors[:-1], initial_state=tensors[-1], cu_seqlens=cu)
    for a, b in zip(got, exact, strict=False):
        assert relative_error(a, b) < BOUND[F32]


def test_tokens_of_no_sequence_get_zeros():
    tensors = sample(1, 24, 1, 16, 16, dtype=F32)[:-1]
    x = leaves(*tensors)
    o, _ = kernels()(*x, cu_seqlens=offsets([7, 10], device=DEVICE))
    assert o[:, 17:].eq(0).all() and not o[:, :17].eq(0).all()
    for gradient in torch.autograd.grad(o.square().sum(), x):
        assert gradient[:, 17:].eq(0).all() and not gradient[:, :17].eq(0).all()


def test_narrow_tiles():
    """Several blocks of keys and of values in every kernel that has them."""
    names = [name for name in KERNELS if name not in ("recurrent", "chunk_scores", "chunk_bwd_dqkg")]
    tiles = {name: Tiles(16, 16, 4, 1) for name in names} | {"chunk_bwd_dqkg": Tiles(16, 0, 1, 1)}
    tensors = sample(1, 37, 1, 40, 40, state=1, dtype=F32)
    assert_close(kernels(chunk=32, tiles=tiles), tensors, dtype=F32)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    d_k=st.integers(1, 40),
    d_v=st.integers(1, 40),
    chunk=st.sampled_from([16, 32, 64]),
    edges=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(lengths, d_k, d_v, chunk, edges, seed):
    tensors = sample(1, sum(lengths), 1, d_k, d_v, state=len(lengths), dtype=F32, edges=edges, seed=seed)
    cu = offsets(lengths, device=DEVICE)
    if sum(lengths):
        assert_close(kernels(chunk=chunk), tensors, dtype=F32, cu_seqlens=cu)
    else:
        _, state = kernels(chunk=chunk)(*tensors[:-1], initial_state=tensors[-1], cu_seqlens=cu)
        assert torch.equal(state, tensors[-1])


# --- One token at a time ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=lambda x: str(x).split(".")[-1])
def test_one_token_at_a_time(dtype):
    *inputs, first = sample(2, 9, 1, 20, 24, group=2, state=2, dtype=dtype)
    exact = reference(*inputs, initial_state=first, scale=0.7)
    got = recurrent_kernel(*inputs, initial_state=first, scale=0.7)
    for a, b in zip(got, exact, strict=False):
        # Only o is rounded, once.
        assert relative_error(a, b) < max(BOUND[F32], 2 * torch.finfo(a.dtype).eps)
    state = first.clone()
    o, same = recurrent_kernel(*inputs, initial_state=state, final_state=state, scale=0.7)
    assert same is state and torch.equal(state, got[1]) and torch.equal(o, got[0])


# --- Extremes of the gate -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [16, 64])
def test_gates_of_exactly_zero_and_one(chunk):
    tensors = sample(1, 70, 1, 20, 24, state=1, dtype=F32, edges=True)
    assert tensors[3].eq(0).any() and tensors[3].isneginf().any()
    assert_close(kernels(chunk=chunk), tensors, dtype=F32)


@pytest.mark.parametrize("at", [21, 32])
def test_over_a_gate_of_zero_nothing_passes(at):
    """Neither a value nor a gradient, wherever in a chunk it stands; other channels go on."""
    *inputs, first = sample(1, 40, 1, 16, 16, state=1, dtype=F32)
    inputs[3] = inputs[3].clamp_min(-1.0)
    inputs[3][:, at] = -math.inf
    x = leaves(*inputs, first)
    o, state = kernels(chunk=32)(*x[:-1], initial_state=x[-1])
    after, last = kernels(chunk=32)(*(y[:, at:] for y in x[:-1]))
    assert relative_error(o[:, at:], after) < BOUND[F32] and relative_error(state, last) < BOUND[F32]
    *grads, dfirst = torch.autograd.grad(o[:, at:].square().sum() + state.square().sum(), x)
    for name, y in zip("qkvg", grads, strict=True):
        # In a square on the diagonal dg is a difference of equal sums in float32.
        small = 0.0 if name != "g" else 2**-22 * y.abs().max().item()
        assert y.isfinite().all() and y[:, :at].abs().max() <= small, name
    assert grads[3][:, at].abs().max() <= 2**-22 * grads[3].abs().max() and dfirst.eq(0).all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("g", [-math.inf, -1e38, -200.0, -30.0, -1e-4, 0.0])
def test_strong_decay(g):
    """All gates alike, in the longest chunks; nothing becomes NaN, though a sum of gates may overflow to -inf."""
    tensors = sample(1, 70, 1, 16, 16, state=1, dtype=F32)
    tensors[3] = torch.full_like(tensors[3], g)
    assert_close(kernels(chunk=64), tensors, dtype=F32, faint=True)


def test_a_reset_costs_later_tokens_no_digits():
    """As nothing is subtracted, what is left of the sums before a reset does not matter behind it."""
    tensors = sample(1, 64, 1, 16, 16, state=1, dtype=F32)
    tensors[3] = torch.full_like(tensors[3], -1e-3)
    tensors[3][:, :32] = -1e30
    exact = reference(*tensors[:-1], initial_state=tensors[-1])
    o, state = kernels(chunk=64)(*tensors[:-1], initial_state=tensors[-1])
    assert relative_error(o[:, 32:], exact[0][:, 32:]) < BOUND[F32] / 5
    assert relative_error(state, exact[1]) < BOUND[F32] / 5


def test_a_gate_of_nan_is_seen():
    """In its channel, from its token on."""
    tensors = sample(1, 20, 1, 16, 16, dtype=F32)[:-1]
    tensors[3][0, 3, 0, 5] = math.nan
    o, state = kernels()(*tensors)
    assert o[:, 3:].isnan().all() and o[:, :3].isfinite().all()
    assert state[0, 0, 5].isnan().all() and state[0, 0, :5].isfinite().all()


# --- The plan -----------------------------------------------------------------------------------------------------
def test_a_plan_says_what_runs():
    x = torch.empty(2, 100, 4, 128, dtype=BF16, device="meta")
    plan = plan_call(x, x, x, training=True, chunk=64, target=Target(90, 132))
    assert list(plan.launches) == [name for name in KERNELS if name != "recurrent"]
    assert plan.launches["chunk_scores"].programs == 2 * 2 * 4
    assert plan.launches["chunk_states"].programs == 2 * 4 * 2 * 2
    assert "4 heads of 128 key and 128 value channels, a gate per key channel" in str(plan)
    assert plan is plan_call(x, x, x, training=True, chunk=64, target=Target(90, 132))
    assert list(plan_call(x, x, x, chunk=None).launches) == ["recurrent"]


def test_tiles_for_an_unknown_kernel_are_refused():
    with pytest.raises(ValueError, match=r"tiles must be for one of recurrent, .*, got 'chunk_inverse'"):
        using({"chunk_inverse": Tiles(64, 0, 1, 1)}).__enter__()
    with pytest.raises(ValueError, match="tiles of chunk_output must be Tiles"):
        using({"chunk_output": (64, 64)}).__enter__()


# --- Costs --------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter traces kernels, and there is a GPU")
@pytest.mark.parametrize("C, side", [(64, 32), (32, 16)], ids=["one block", "two blocks of keys and of values"])
def test_the_costs_count_squares_and_blocks(C, side):
    """tests/test_operators.py has them for chunks of 16, which have one square and nothing off the diagonal."""
    shape = Shape(B=1, L=64, H=1, d_k=32, d_v=32, C=C, element=4, block_v=side, block_k=side)
    blocks = ("chunk_states", "chunk_output", "chunk_states_bwd", "chunk_bwd_dv", "chunk_bwd_decayed")
    tiles = {name: Tiles(side, side, 1, 1) for name in blocks} | {"chunk_bwd_dqkg": Tiles(side, 0, 1, 1)}
    x = leaves(*sample(1, 64, 1, 32, 32, dtype=F32)[:-1])
    with using(tiles):
        call = functools.partial(linear_attention, backend="triton", chunk_size=C, output_final_state=True)
        (o, _), forward = observe(call, *x)
        _, backward = observe(torch.autograd.grad, o, x, torch.ones_like(o))
    costs = (*gated_by_channel(shape), *gated_by_channel_backward(shape))
    for launch, expected in zip((*forward.launches, *backward.launches), costs, strict=True):
        assert launch.kernel == expected.name
        assert launch.bytes() == expected.requested, expected.name
        assert launch.bytes("store") == sum(expected.writes.values()), expected.name
        assert sum(dot.flops for dot in launch.dots) == expected.flops, expected.name
