"""The cost model, against the sizes of tensors and against what kernels are seen to move and multiply."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import dn_lib
from dn_lib import cost
from dn_lib.kernels import ladder
from dn_lib.teaching.tiles import observe

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
    q, k, v = (normalize(torch.randn(s.B, s.L, s.H, d), dim=-1).to(dtype) for d in (s.d_k, s.d_k, s.d_v))
    return q, k, v, torch.rand(s.B, s.L, s.H).to(dtype)


@given(s=sizes, element=st.sampled_from([2, 4]))
@settings(max_examples=20, deadline=None)
def test_bytes_are_those_of_the_tensors(s, element):
    s = cost.Shape(**{**vars(s), "element": element})
    made = dict(zip(("q", "k", "v", "beta"), tensors(s, {2: torch.bfloat16, 4: torch.float32}[element]), strict=True))
    made["o"] = torch.empty_like(made["v"])
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


@pytest.mark.parametrize("C", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operator_moves_and_multiplies_what_is_predicted(C, dtype):
    """In the interpreter a program takes all value columns; float16 heads of this size are fused."""
    s = cost.Shape(B=1, L=2 * C, H=2, d_k=16, d_v=32, C=C, element=dtype.itemsize)
    _, trace = observe(dn_lib.delta_rule, *tensors(s, dtype), backend="triton", chunk_size=C, output_final_state=True)
    assert_counted(trace, cost.fused(s) if dtype == torch.float16 else cost.two_kernels(s))


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
