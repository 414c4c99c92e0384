"""The cost model, against the sizes of tensors and against what kernels are seen to move and multiply."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dn_lib
from dn_lib import cost
from dn_lib.kernels import ladder
from dn_lib.kernels.plan import using
from dn_lib.kernels.rules import Tiles
from dn_lib.teaching.judge.trace import observe
from dn_lib.testing import delta_rule_inputs

sizes = st.builds(
    cost.Shape,
    B=st.integers(1, 2),
    L=st.sampled_from([16, 32, 48]),
    H=st.integers(1, 2),
    d_k=st.sampled_from([16, 32]),
    d_v=st.sampled_from([16, 32]),
    C=st.just(16),
    element=st.just(4),
    block_v=st.just(16),
)


def tensors(s, dtype=torch.float32):
    return delta_rule_inputs(s.B, s.L, s.H, s.d_k, s.d_v, dtype=dtype, beta_max=1.0)[:4]


@given(s=sizes, element=st.sampled_from([2, 4]))
@settings(max_examples=20, deadline=None)
def test_bytes_are_those_of_the_tensors(s, element):
    s = cost.Shape(**{**vars(s), "element": element})
    made = dict(zip(("q", "k", "v", "beta"), tensors(s, {2: torch.bfloat16, 4: torch.float32}[element]), strict=True))
    made["o"], made["dbeta"] = torch.empty_like(made["v"]), torch.empty_like(made["beta"])
    made["dbeta_partials"] = torch.empty(s.value_blocks, *made["beta"].shape)
    made["final"] = torch.empty(s.B, s.H, s.d_k, s.d_v)
    made["S"] = torch.empty(s.B, s.chunks, s.H, s.d_k, s.d_v)
    for name, tensor in made.items():
        assert s.tensor_bytes(name) == tensor.nbytes, name


@given(s=sizes)
@settings(max_examples=8, deadline=None)
def test_intermediates_have_the_sizes_that_are_counted(s):
    q, k, v, beta = tensors(s)
    (_, _, steps), _ = observe(ladder.delta_rule_in_steps, q, k, v, beta)
    assert {name: s.tensor_bytes(name) for name in steps} == {name: t.nbytes for name, t in steps.items()}


def assert_counted(trace, costs):
    assert len(trace.launches) == len(costs)
    for launch, expected in zip(trace.launches, costs, strict=True):
        assert launch.bytes() == expected.requested, expected.name
        assert launch.bytes("store") == sum(expected.writes.values()), expected.name
        assert sum(dot.flops for dot in launch.dots) == expected.flops, expected.name


@given(s=sizes)
@settings(max_examples=6, deadline=None)
def test_linear_attention_moves_and_multiplies_what_is_predicted(s):
    q, k, v, _ = tensors(s)
    _, trace = observe(ladder.linear_attention, q, k, v, block_v=s.block_v)
    assert_counted(trace, cost.linear_attention(s))


@pytest.mark.parametrize("method", ladder.INVERSES)
@given(s=sizes)
@settings(max_examples=4, deadline=None)
def test_steps_move_and_multiply_what_is_predicted(method, s):
    _, trace = observe(ladder.delta_rule_in_steps, *tensors(s), method=method, block_v=s.block_v)
    assert_counted(trace, cost.delta_rule_in_steps(s, method=method))


@pytest.mark.parametrize("method", ladder.INVERSES)
@given(s=sizes)
@settings(max_examples=4, deadline=None)
def test_one_kernel_moves_and_multiplies_what_is_predicted(method, s):
    _, trace = observe(ladder.delta_rule_in_one, *tensors(s), method=method, block_v=s.block_v)
    assert_counted(trace, cost.fused(s, method=method))


def recursion(dtype):
    """How N is made from inputs of this type, as `cost.inverse_flops` names it."""
    return "halves" if dtype == torch.float16 else "scaled"


@pytest.mark.parametrize("C", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_operator_moves_and_multiplies_what_is_predicted(C, dtype):
    """In the interpreter a program takes all value columns."""
    s = cost.Shape(B=1, L=2 * C, H=2, d_k=16, d_v=32, C=C, element=dtype.itemsize)
    _, trace = observe(dn_lib.delta_rule, *tensors(s, dtype), backend="triton", chunk_size=C, output_final_state=True)
    assert_counted(trace, cost.two_kernels(s, method=recursion(dtype)))


@pytest.mark.parametrize("C", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_training_moves_and_multiplies_what_is_predicted(C, dtype):
    """Small heads in half precision walk back in one kernel; float32 keeps the states and takes two."""
    s = cost.Shape(B=1, L=2 * C, H=2, d_k=16, d_v=32, C=C, element=dtype.itemsize)
    leaves = [x.requires_grad_() for x in tensors(s, dtype)]
    options = dict(backend="triton", chunk_size=C, output_final_state=True)
    (o, _), trace = observe(dn_lib.delta_rule, *leaves, **options)
    small = dtype == torch.float16
    assert_counted(trace, cost.two_kernels(s, method=recursion(dtype), save="Vn" if small else "Vn states"))
    gradients, trace = observe(torch.autograd.grad, o, leaves, torch.randn_like(o))
    assert_counted(trace, cost.fused_backward(s) if small else cost.backward(s))
    names = ("dq", "dk", "dv", "dbeta")
    assert [s.tensor_bytes(name) for name in names] == [x.nbytes for x in gradients]


def test_training_in_blocks_moves_and_multiplies_what_is_predicted():
    """Two blocks of values and two of keys, as the widest heads have them on a GPU: the first block of keys adds up
    the partial sums of dbeta."""
    s = cost.Shape(B=1, L=48, H=2, d_k=32, d_v=32, C=16, element=4, block_v=16, block_k=16)
    by_values, by_keys = (Tiles(BK, BV, warps=4, stages=1) for BK, BV in ((32, 16), (16, 32)))
    tiles = {"chunk_scan_fwd": by_values, "chunk_scan_bwd": by_values, "chunk_bwd_dqk": by_keys}
    leaves = [x.requires_grad_() for x in tensors(s)]
    options = dict(backend="triton", chunk_size=s.C, output_final_state=True)
    with using(tiles=tiles):
        (o, _), trace = observe(dn_lib.delta_rule, *leaves, **options)
    assert_counted(trace, cost.two_kernels(s, save="Vn states"))
    _, trace = observe(torch.autograd.grad, o, leaves, torch.randn_like(o))
    walk, last = cost.backward(s)
    assert_counted(trace, (walk, last))
    assert walk.writes["dbeta_partials"] == last.reads["dbeta_partials"] == 2 * 4 * s.B * s.L * s.H


def test_decoding_moves_what_is_predicted():
    s = cost.Shape(B=3, L=1, H=2, d_k=16, d_v=32, element=4)
    state = torch.randn(s.B, s.H, s.d_k, s.d_v)
    options = dict(backend="triton", initial_state=state, output_final_state=True)
    _, trace = observe(dn_lib.delta_rule, *tensors(s), **options)
    (launch,), (expected,) = trace.launches, cost.decode(s)
    assert launch.bytes() == expected.requested == expected.bytes and not launch.dots
    assert launch.bytes("store") == sum(expected.writes.values())


def test_blocks_of_the_backward_share_out_dots_and_repeat_the_rest():
    """Two blocks of values form tril(Q K^T) twice; two of keys repeat the two C x C products with values in them."""
    whole = cost.Shape(B=2, L=256, H=2, d_k=128, d_v=128)
    walk, last = cost.backward(whole)
    in_two = cost.backward(cost.Shape(**{**vars(whole), "block_v": 64}))
    by_values, rows = in_two[0], whole.B * whole.L * whole.H
    by_keys = cost.backward(cost.Shape(**{**vars(whole), "block_k": 64}))[1]
    scores = 2 * whole.tokens * whole.C * 128
    assert by_values.flops - walk.flops == scores and by_keys.flops - last.flops == 2 * scores
    # Two parts of dbeta in float32 in place of one in half precision, which `chunk_bwd_dqk` reads and makes one.
    assert by_values.bytes - walk.bytes == rows * (2 * 4 - 2) and by_keys.bytes == last.bytes
    assert in_two[1].bytes - last.bytes == rows * (2 * 4 + 2) and in_two[1].flops == last.flops
    repeated = sum(whole.tensor_bytes(name) for name in ("beta", "Vn", "do", "dv"))
    assert by_keys.requested - last.requested == repeated


def test_roofline_takes_the_slower_of_the_two_for_each_kernel():
    memory, work = cost.Cost("a", {"x": 100}, {}, 1), cost.Cost("b", {"x": 1}, {}, 100)
    assert cost.roofline_time([memory, work], bandwidth=10.0, flop_rate=20.0) == 10.0 + 5.0
    assert cost.total_bytes([memory, work]) == 101 and cost.total_flops([memory, work]) == 101


def test_each_step_down_the_ladder_moves_less():
    s = cost.Shape(B=16, L=2048, H=16, d_k=128, d_v=128)
    forms = (cost.delta_rule_in_steps, cost.two_kernels, cost.fused, cost.compulsory)
    moved = [cost.total_bytes(form(s)) for form in forms]
    assert moved == sorted(moved, reverse=True) and len(set(moved)) == 4


def test_repeats_are_requested_but_not_moved():
    one = cost.Shape(B=1, L=64, H=1, d_k=16, d_v=64)
    four = cost.Shape(B=1, L=64, H=1, d_k=16, d_v=64, block_v=16)
    (a,), (b,) = cost.linear_attention(one), cost.linear_attention(four)
    assert a.bytes == a.requested == b.bytes
    assert b.requested - b.bytes == 3 * (one.tensor_bytes("q") + one.tensor_bytes("k"))


def test_backward_adds_the_gradients():
    s = cost.Shape(B=1, L=64, H=1, d_k=16, d_v=16)
    forward, backward = cost.compulsory(s, backward=True)
    assert backward.bytes == 2 * (forward.bytes - s.tensor_bytes("o")) + s.tensor_bytes("o")


def test_recurrent_forms_take_a_step_a_token():
    s = cost.Shape(B=1, L=100, H=1, d_k=16, d_v=16)
    (linear,), (delta,) = cost.recurrent_linear_attention(s), cost.recurrent_delta_rule(s)
    assert linear.steps == delta.steps == 100
    assert delta.flops * 4 == linear.flops * 6


def test_unknown_names_are_refused():
    with pytest.raises(KeyError):
        cost.Shape(B=1, L=1, H=1, d_k=1, d_v=1).tensor_bytes("x")
    with pytest.raises(KeyError):
        cost.inverse_flops(16, "series")
