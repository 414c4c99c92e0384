"""The kernels with a gate, without erasure, with shared key heads: against the recurrence in float64.

They are launched as an operator would launch them, through `plan_call` and `launch`.
"""

from __future__ import annotations

import math

import pytest
import torch

from dn_lib import cost, ops
from dn_lib.teaching.judge.trace import observe
from dn_lib.testing import (
    delta_rule_inputs,
    delta_rule_reference,
    forward_and_gradients,
    gated_delta_rule_reference,
    gated_inputs,
    gated_linear_attention_reference,
    leaves,
    linear_attention_reference,
    offsets,
    relative_error,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(ops.triton_problem(DEVICE) is not None, reason="needs Triton")

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# As in tests/test_operators.py.  float32: 84 eps, for sums of some hundred terms, each rounded a few times.  Half
# precision: every operand of a dot is rounded, at most 8 times one after the other from an input to a result; the
# interpreter cuts bfloat16 where a GPU rounds.
BOUND = {F32: 1e-5, F16: 8 * 2**-11, BF16: 8 * 2**-8}
REFERENCES = {
    (True, True): gated_delta_rule_reference,
    (True, False): gated_linear_attention_reference,
    (False, True): delta_rule_reference,
    (False, False): linear_attention_reference,
}
SWITCHES = {
    "gated delta rule": (True, True),
    "gated linear attention": (True, False),
    "linear attention": (False, False),
}
every_kind = pytest.mark.parametrize("gate, erase", SWITCHES.values(), ids=SWITCHES)


def sample(B, L, H, d_k, d_v, *, gate=True, erase=True, group=1, state=None, **options):
    """q, k of H heads, v, (beta,) (g,) and the state of H group heads."""
    q, k, v, beta, g, first = gated_inputs(
        delta_rule_inputs, B, L, H * group, d_k, d_v, state=state, device=DEVICE, **options
    )
    gates = ([beta] if erase else []) + ([g] if gate else [])
    return [q[:, :, ::group], k[:, :, ::group], v, *gates, first]


def reference(gate, erase, group):
    """The recurrence, with each key head repeated for its value heads."""

    def run(q, k, v, *gates, **options):
        q, k = (x.repeat_interleave(group, 2) for x in (q, k))
        return REFERENCES[gate, erase](q, k, v, *gates, **options)

    return run


class _Kernels(torch.autograd.Function):
    """Forward and backward as launched; o and the final state are differentiable in every input."""

    @staticmethod
    def forward(ctx, plan, scale, cu, erase, q, k, v, beta, g, first):
        from dn_lib.kernels.delta_rule import launch

        o, state, saved = launch.forward(
            plan=plan, q=q, k=k, v=v, beta=beta, g=g, scale=scale, initial_state=first, cu_seqlens=cu, final_state=True
        )
        ctx.save_for_backward(q, k, v, beta)
        ctx.rest = plan, scale, saved, first
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    def backward(ctx, do, dstate):
        from dn_lib.kernels.delta_rule import launch

        plan, scale, saved, first = ctx.rest
        q, k, v, beta = ctx.saved_tensors
        found = launch.gradients(
            plan=plan, q=q, k=k, v=None if plan.call.erase else v, beta=beta, saved=saved, do=do, dstate=dstate,
            scale=scale, initial_state=first is not None,
        )  # fmt: skip
        if found.g is not None:
            assert found.g.dtype == F32
        return None, None, None, None, *found


def kernels(gate, erase, *, chunk=16, **overrides):
    """A function with the signature of the reference, by the kernels."""
    from dn_lib.kernels.plan import plan_call, using

    def run(q, k, v, *gates, scale=None, initial_state=None, cu_seqlens=None, qk_l2norm=False):
        given = list(gates)
        beta = given.pop(0) if erase else None
        g = given.pop(0) if gate else None
        with using(**overrides):
            plan = plan_call(
                q, k, v, cu_seqlens=cu_seqlens, norm=qk_l2norm, training=True, chunk=chunk, gate=gate, erase=erase
            )
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return _Kernels.apply(plan, scale, cu_seqlens, erase, q, k, v, beta, g, initial_state)

    return run


def recurrent_kernel(gate, erase):
    from dn_lib.kernels.delta_rule import launch
    from dn_lib.kernels.plan import plan_call

    def run(q, k, v, *gates, scale=None, initial_state=None, cu_seqlens=None, qk_l2norm=False):
        given = list(gates)
        beta = given.pop(0) if erase else None
        g = given.pop(0) if gate else None
        plan = plan_call(q, k, v, cu_seqlens=cu_seqlens, norm=qk_l2norm, chunk=None, gate=gate, erase=erase)
        c = plan.call
        state = q.new_empty(c.sequences, c.H, c.K, c.V, dtype=F32)
        o = launch.recurrent(
            plan=plan, q=q, k=k, v=v, beta=beta, g=g, scale=q.shape[-1] ** -0.5 if scale is None else scale,
            initial_state=initial_state, final_state=state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return o, state

    return run


def assert_close(run, gate, erase, tensors, *, group=1, dtype, **options):
    """o, the final state and every gradient; tensors end with the initial state."""
    outputs = torch.Generator().manual_seed(7)
    v, states = tensors[2], options["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in options else tensors[2].shape[0]
    do = torch.randn(v.shape, generator=outputs, dtype=F64).to(v.device, dtype)
    shape = states, v.shape[2], tensors[0].shape[3], v.shape[3]
    dstate = torch.randn(shape, generator=outputs, dtype=F64).to(v.device, F32)
    exact = forward_and_gradients(
        reference(gate, erase, group), leaves(*tensors, dtype=F64), do.double(), dstate.double(), **options
    )
    got = forward_and_gradients(run, leaves(*tensors), do, dstate, **options)
    names = ["o", "state", "dq", "dk", "dv", *["dbeta"] * erase, *["dg"] * gate, "dinitial"]
    for name, a, b in zip(names, got, exact, strict=False):
        assert a.isfinite().all(), name
        error = relative_error(a, b)
        assert error < BOUND[dtype], f"{name}: {error:.1e}"


# --- Forward and backward -----------------------------------------------------------------------------------------
@every_kind
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_values_and_gradients(gate, erase, dtype):
    """At a length that no chunk divides, with states in and out."""
    tensors = sample(2, 37, 2, 20, 24, gate=gate, erase=erase, state=2, dtype=dtype)
    assert_close(kernels(gate, erase), gate, erase, tensors, dtype=dtype, scale=0.7)


@every_kind
@pytest.mark.parametrize("chunk", [32, 64])
def test_larger_chunks(gate, erase, chunk):
    tensors = sample(1, 70, 1, 16, 16, gate=gate, erase=erase, dtype=F32)
    assert_close(kernels(gate, erase, chunk=chunk), gate, erase, tensors, dtype=F32)


@every_kind
def test_norms(gate, erase):
    tensors = sample(1, 37, 2, 20, 24, gate=gate, erase=erase, state=1, dtype=F32, unit=False)
    assert_close(kernels(gate, erase), gate, erase, tensors, dtype=F32, qk_l2norm=True)


@every_kind
def test_packed_sequences(gate, erase):
    lengths = [0, 17, 1, 0, 22]
    tensors = sample(1, 40, 2, 20, 24, gate=gate, erase=erase, state=5, dtype=F32)
    cu = offsets(lengths, torch.int32, DEVICE)
    assert_close(kernels(gate, erase), gate, erase, tensors, dtype=F32, cu_seqlens=cu)


@every_kind
@pytest.mark.parametrize("state", [None, 2])
def test_split_sequences(gate, erase, state):
    """M of a segment is the product of its gates, too.  (Few gates of zero: over one nothing would pass.)"""
    tensors = sample(2, 90, 1, 20, 24, gate=gate, erase=erase, state=state, dtype=F32)
    if gate:
        tensors[-2] = tensors[-2].clamp_min(-0.3)
    assert_close(kernels(gate, erase, segments=3), gate, erase, tensors, dtype=F32)


@every_kind
@pytest.mark.parametrize("group, norm", [(2, False), (3, True)])
def test_value_heads_share_key_heads(gate, erase, group, norm):
    tensors = sample(1, 37, 2, 20, 24, gate=gate, erase=erase, group=group, state=1, dtype=F32)
    run = kernels(gate, erase)
    assert_close(run, gate, erase, tensors, group=group, dtype=F32, qk_l2norm=norm)
    with torch.no_grad():
        exact = reference(gate, erase, group)(*tensors[:-1], initial_state=tensors[-1])
        got = recurrent_kernel(gate, erase)(*tensors[:-1], initial_state=tensors[-1])
    for a, b in zip(got, exact, strict=False):
        assert relative_error(a, b) < BOUND[F32]


def test_the_ungated_rule_shares_key_heads_too():
    """By two kernels, and by the one that goes back for small heads."""
    for fused in (False, True):
        tensors = sample(1, 37, 2, 20, 24, gate=False, group=2, state=1, dtype=F32)
        assert_close(kernels(False, True, fused=fused), False, True, tensors, group=2, dtype=F32)


@pytest.mark.parametrize("tiles", [(16, 16), (32, 16)])
def test_narrow_tiles(tiles):
    """Several blocks of values or keys: dbeta and dg come in partial sums."""
    from dn_lib.kernels.rules import Tiles

    narrow = {name: Tiles(32, tiles[1], 4, 1) for name in ("chunk_scan_fwd", "chunk_scan_bwd")}
    narrow["chunk_bwd_dqk"] = Tiles(*tiles, 4, 1)
    for gate, erase in SWITCHES.values():
        tensors = sample(1, 37, 1, 32, 40, gate=gate, erase=erase, state=1, dtype=F32)
        assert_close(kernels(gate, erase, tiles=narrow), gate, erase, tensors, dtype=F32)


@every_kind
@pytest.mark.parametrize("norm", [False, True])
def test_one_token_at_a_time(gate, erase, norm):
    *inputs, first = sample(2, 9, 2, 20, 24, gate=gate, erase=erase, state=2, dtype=F32)
    exact = reference(gate, erase, 1)(*inputs, initial_state=first, qk_l2norm=norm, scale=0.7)
    got = recurrent_kernel(gate, erase)(*inputs, initial_state=first, qk_l2norm=norm, scale=0.7)
    for a, b in zip(got, exact, strict=False):
        assert relative_error(a, b) < BOUND[F32]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter traces kernels, and there is a GPU")
@every_kind
@pytest.mark.parametrize("blocks", [1, 2])
def test_bytes_are_those_that_the_kernels_touch(gate, erase, blocks):
    from dn_lib.kernels.rules import Tiles

    shape = cost.Shape(B=2, L=48, H=2, d_k=16 * blocks, d_v=32, C=16, element=4, block_k=16, block_v=32 // blocks)
    tensors = sample(2, 48, 2, shape.d_k, 32, gate=gate, erase=erase, state=2, dtype=F32)[:-1]
    wide, narrow = Tiles(shape.d_k, shape.block_v, 4, 1), Tiles(16, 32, 4, 1)
    tiles = {"chunk_scan_fwd": wide, "chunk_scan_bwd": wide, "chunk_bwd_dqk": narrow}
    (o, _), trace = observe(kernels(gate, erase, tiles=tiles), *leaves(*tensors))
    forward = cost.gated(shape, gate=gate, erase=erase, save=True)
    given = leaves(*tensors)
    o, _ = kernels(gate, erase, tiles=tiles)(*given)
    _, back = observe(torch.autograd.grad, o, given, torch.ones_like(o))
    for traced, costs in ((trace, forward), (back, cost.gated_backward(shape, gate=gate, erase=erase))):
        assert [launch.kernel for launch in traced.launches] == [c.name.replace("N", "chunk_inverse") for c in costs]
        for launch, expected in zip(traced.launches, costs, strict=True):
            assert launch.bytes() == expected.requested, expected.name
            assert launch.bytes("store") == sum(expected.writes.values()), expected.name


def test_a_gate_of_nan_is_seen():
    tensors = sample(1, 20, 1, 16, 16, dtype=F32)
    tensors[-2][0, 3] = math.nan
    o, _ = kernels(True, True)(*tensors[:-1])
    assert o[:, 3:].isnan().all()


# --- Extremes of the gate -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("erase", [True, False])
def test_gates_of_exactly_zero_and_one(erase):
    tensors = sample(2, 37, 2, 20, 24, erase=erase, state=2, dtype=F32, edges=True)
    gates = tensors[-2]
    assert gates.eq(0).any() and gates.isneginf().any()
    assert_close(kernels(True, erase), True, erase, tensors, dtype=F32)


@pytest.mark.parametrize("erase", [True, False])
def test_over_a_gate_of_zero_nothing_passes(erase):
    """Its own gradient is exactly zero, and so is that of all that lies before it in what lies behind."""
    tensors = sample(1, 40, 1, 16, 16, erase=erase, state=1, dtype=F32)
    g = tensors[-2].clamp_min(-1.0)
    g[:, 21] = -math.inf
    given = leaves(*tensors[:-2], g, tensors[-1])
    o, state = kernels(True, erase)(*given[:-1], initial_state=given[-1])
    after, last = kernels(True, erase)(*(x[:, 21:] for x in given[:-1]))
    assert relative_error(o[:, 21:], after) < BOUND[F32] and relative_error(state, last) < BOUND[F32]
    *grads, dstate = torch.autograd.grad(o[:, 21:].square().sum() + state.square().sum(), given)
    for x in grads:
        assert x.isfinite().all() and x[:, :21].eq(0).all()
    assert grads[-1][:, 21].eq(0).all() and dstate.eq(0).all()


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("g", [-math.inf, -1e38, -200.0, -30.0, -1e-4])
def test_strong_decay(erase, g):
    """All gates alike, in the longest chunks; over none of them does anything overflow or become NaN."""
    tensors = sample(1, 70, 1, 16, 16, erase=erase, state=1, dtype=F32)
    tensors[-2] = torch.full_like(tensors[-2], g)
    given = leaves(*tensors)
    o, state = kernels(True, erase, chunk=64)(*given[:-1], initial_state=given[-1])
    exact = reference(True, erase, 1)(*tensors[:-1], initial_state=tensors[-1])
    assert relative_error(o, exact[0]) < BOUND[F32] and relative_error(state, exact[1]) < BOUND[F32]
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum() + state.sum(), given))


def test_a_reset_costs_later_tokens_no_digits():
    """Sums near -128 times the number of resets: in one float32 the later ratios would be off by 2^-14."""
    tensors = sample(1, 64, 1, 16, 16, state=1, dtype=F32)
    g = torch.full_like(tensors[-2], -1e-3)
    g[:, :32] = -math.inf
    tensors[-2] = g
    exact = reference(True, True, 1)(*tensors[:-1], initial_state=tensors[-1])
    o, state = kernels(True, True, chunk=64)(*tensors[:-1], initial_state=tensors[-1])
    assert relative_error(o[:, 32:], exact[0][:, 32:]) < BOUND[F32] / 5
    assert relative_error(state, exact[1]) < BOUND[F32] / 5


def test_gates_of_one_give_the_ungated_kernels_results():
    tensors = sample(2, 37, 2, 20, 24, gate=False, state=2, dtype=F32)
    zeros = torch.zeros_like(tensors[3])
    with torch.no_grad():
        plain = kernels(False, True)(*tensors[:-1], initial_state=tensors[-1])
        gated = kernels(True, True)(*tensors[:-1], zeros, initial_state=tensors[-1])
    for a, b in zip(gated, plain, strict=True):
        assert relative_error(a, b) < 2**-22  # a rounding of float32, or none


# --- The equations of the backward --------------------------------------------------------------------------------
@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_the_backward_of_one_chunk_as_the_kernels_docstring_has_it(erase, reset):
    """In float64, in the letters of dn_lib/kernels/delta_rule/backward.py."""
    from dn_lib.forms.gated import recurrent_gated_delta_rule, recurrent_gated_linear_attention, span_sums, sums_after

    q, k, v, beta, g, S = gated_inputs(delta_rule_inputs, 13, 8, 6, state=(), dtype=F64)
    g = g.clamp_min(-2.0)
    if reset:
        g[5] = -math.inf
    dO, dS = (torch.randn(n, 6, dtype=F64, generator=torch.Generator().manual_seed(n)) for n in (13, 8))

    columns = g[:, None]
    ratios = span_sums(columns)[..., 0].exp().tril()
    gamma, to_end = columns.cumsum(0).exp(), sums_after(columns).exp()
    whole, D = gamma[-1], beta[:, None]
    B = (k @ k.T * ratios).tril(-1)
    N = -torch.linalg.solve(torch.eye(13, dtype=F64) + B * beta, B)
    R = v - gamma * (k @ S)
    E = R + N @ (D * R)
    Vn = D * E if erase else v
    dVn = (q @ k.T * ratios).T @ dO + to_end * (k @ dS)
    Z = dVn + N.T @ (D * dVn)
    dR = D * Z if erase else torch.zeros_like(v)
    G, dP = (-(dR @ Vn.T) * ratios).tril(-1), dO @ Vn.T * ratios
    dQ_in, dK_out, dK_in = gamma * (dO @ S.T), to_end * (Vn @ dS.T), -gamma * (dR @ S.T)
    dQ = dQ_in + dP @ k
    dK = dP.T @ q + dK_out + dK_in + (G + G.T) @ k
    c, d = (q * dQ_in + k * dK_in).sum(-1), (k * dK_out).sum(-1)
    M = dP * (q @ k.T) + G * (k @ k.T)
    through = (whole * (S * dS).sum())[0]
    dg = [c[m:].sum() + d[:m].sum() + M[m:, :m].sum() + through for m in range(13)]
    dS_in = whole * dS + (gamma * q).T @ dO - (gamma * k).T @ dR
    by_hand = [dQ, dK, dR if erase else dVn, *[(Z * E).sum(-1)] * erase, torch.stack(dg), dS_in]

    given = leaves(q, k, v, *[beta] * erase, g, S)
    form = recurrent_gated_delta_rule if erase else recurrent_gated_linear_attention
    o, last = form(*given[:-1], scale=1.0, initial_state=given[-1])
    for a, b in zip(by_hand, torch.autograd.grad((o, last), given, (dO, dS)), strict=True):
        assert relative_error(a, b) < 1e-13
    if reset:
        assert by_hand[-2][5] == 0
