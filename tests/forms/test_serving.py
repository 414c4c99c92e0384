"""Tokens that are taken back from a state, and states of 8 bits, against float64."""

from __future__ import annotations

import pytest
import torch

from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.forms.serving import (
    dequantise_state,
    draft_delta_rule,
    quantise_state,
    quantised_delta_rule,
    replay,
    roll_back,
    rounding_bound,
    step_back,
    step_back_growth,
)
from dn_lib.testing import delta_rule_inputs, gated_inputs, relative_error

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def inputs(m=12, d_k=8, d_v=6, seed=0, dtype=torch.float64):
    """k of norm 1, beta in (0, 1), a state that is not zero: q, k, v, beta, state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(2, m, d_k), dim=-1) for _ in range(2))
    tensors = (q, k, normal(2, m, d_v), normal(2, m).sigmoid(), normal(2, d_k, d_v))
    return [x.to(dtype) for x in tensors]


def gates(k, channels, seed=3):
    size = k.shape if channels else k.shape[:-1]
    g = torch.Generator().manual_seed(seed)
    return -torch.rand(size, generator=g, dtype=torch.float64).to(k.dtype)


# --- The draft ------------------------------------------------------------------------------------------
def test_a_draft_is_the_recurrence():
    q, k, v, beta, state = inputs()
    o, last, _ = draft_delta_rule(q, k, v, beta, state)
    want = recurrent_delta_rule(q, k, v, beta, initial_state=state)
    assert relative_error(o, want[0]) < 1e-13 and relative_error(last, want[1]) < 1e-13


@pytest.mark.parametrize("channels", [False, True])
def test_a_gated_draft_is_the_gated_recurrence(channels):
    q, k, v, beta, state = inputs()
    g = gates(k, channels)
    o, last, written = draft_delta_rule(q, k, v, beta, state, g=g)
    want = recurrent_gated_delta_rule(q, k, v, beta, g, initial_state=state)
    assert relative_error(o, want[0]) < 1e-13 and relative_error(last, want[1]) < 1e-13
    assert torch.equal(replay(state, k, written, g=g), last)  # the arithmetic of decoding, to the bit


def test_a_draft_of_the_package_s_own_inputs():
    """With heads before time, gates as the package's sampler draws them."""
    q, k, v, beta, g, _ = (
        x if x is None else x.transpose(1, 2) for x in gated_inputs(delta_rule_inputs, 1, 9, 2, 4, 5)
    )
    o, _, _ = draft_delta_rule(q, k, v, beta, torch.zeros(1, 2, 4, 5, dtype=q.dtype), g=g)
    assert relative_error(o, recurrent_gated_delta_rule(q, k, v, beta, g)[0]) < 1e-13


def test_the_given_state_is_left_alone():
    q, k, v, beta, state = inputs()
    before = state.clone()
    _, last, _ = draft_delta_rule(q[:, :0], k[:, :0], v[:, :0], beta[:, :0], state)
    last += 1
    draft_delta_rule(q, k, v, beta, state)[1].zero_()
    assert torch.equal(state, before)


# --- Back -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("accepted", [0, 5, 11, 12])
def test_taking_back_what_was_written_gives_the_earlier_state(accepted, dtype):
    q, k, v, beta, state = inputs(dtype=dtype)
    _, last, written = draft_delta_rule(q, k, v, beta, state)
    _, want, _ = draft_delta_rule(*(x[:, :accepted] for x in (q, k, v, beta)), state)
    got = roll_back(last, k[:, accepted:], written[:, accepted:])
    # A rounding a step, on the way there and back, of the largest numbers that are met.
    size = max(last.norm().item(), state.norm().item()) + written.norm().item()
    assert (got - want).norm() <= 2 * 13 * EPS[dtype] * size
    if accepted < 12:
        assert relative_error(last, want) > 0.1  # there was something to take back


@pytest.mark.parametrize("beta_value", [0.99, 1.0, 2.0])
def test_taking_back_needs_no_condition_on_beta(beta_value):
    q, k, v, _, state = inputs(dtype=torch.float32)
    beta = torch.full(k.shape[:-1], beta_value)
    _, last, written = draft_delta_rule(q, k, v, beta, state)
    assert relative_error(roll_back(last, k, written), state) < 1e-5


def test_linear_attention_takes_back_its_values():
    _, k, v, _, state = inputs()
    assert relative_error(roll_back(replay(state, k, v), k, v), state) < 1e-14


def test_gates_are_not_taken_back_by_what_was_written():
    """Why `roll_back` refuses gates by having no argument for them: the decay is still in the state."""
    q, k, v, beta, state = inputs()
    g = gates(k, False)
    _, last, written = draft_delta_rule(q, k, v, beta, state, g=g)
    assert relative_error(roll_back(last, k, written), state) > 0.1
    assert relative_error(step_back(last, k, v, beta, g=g), state) < 1e-10


@pytest.mark.parametrize("channels", [None, False, True])
def test_inverting_steps_gives_the_earlier_state(channels):
    q, k, v, beta, state = inputs()
    g = None if channels is None else gates(k, channels)
    _, last, _ = draft_delta_rule(q, k, v, beta, state, g=g)
    assert relative_error(step_back(last, k, v, beta, g=g), state) < 1e-10


@pytest.mark.parametrize("channels", [None, False, True])
def test_an_error_grows_by_at_most_the_bound(channels):
    _, k, v, beta, state = inputs(m=4)
    g = None if channels is None else gates(k, channels)
    error = torch.randn(state.shape, generator=torch.Generator().manual_seed(5), dtype=state.dtype)
    there = step_back(state + error, k, v, beta, g=g) - step_back(state, k, v, beta, g=g)
    growth = step_back_growth(k, beta, g=g)
    assert (there.norm(dim=(-2, -1)) <= growth * error.norm(dim=(-2, -1)) * (1 + 1e-9)).all()


def test_the_bound_on_growth_is_reached_along_a_key():
    k, beta = torch.eye(3, dtype=torch.float64)[:1], torch.tensor([0.99], dtype=torch.float64)
    zero, v = torch.zeros(3, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    error = k.mT @ torch.ones(1, 2, dtype=torch.float64)
    moved = step_back(zero + error, k, v, beta) - step_back(zero, k, v, beta)
    assert relative_error(moved, step_back_growth(k, beta) * error) < 1e-12


def test_inverting_loses_digits_that_taking_back_keeps():
    q, k, v, _, state = inputs(m=8, dtype=torch.float32)
    beta = torch.full(k.shape[:-1], 0.99)
    _, last, written = draft_delta_rule(q, k, v, beta, state)
    inverted = relative_error(step_back(last, k, v, beta), state)
    taken_back = relative_error(roll_back(last, k, written), state)
    assert inverted > 1e3 * taken_back


def test_steps_without_an_inverse_are_named():
    _, k, v, beta, state = inputs(m=3)
    k = torch.eye(8, dtype=torch.float64)[:3].expand(2, 3, 8)
    beta[1, 2] = 1.0
    with pytest.raises(ValueError, match=r"^beta must not .* at token 2"):
        step_back(state, k, v, beta)
    g = gates(k, True)
    g[0, 1, 4] = float("-inf")
    with pytest.raises(ValueError, match=r"^g must not .* at token 1"):
        step_back(state, k, v, beta * 0.5, g=g)


# --- 8 bits ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_one_rounding_is_off_by_at_most_half_a_scale(size):
    state = size * inputs()[-1]
    codes, scales = quantise_state(state)
    assert codes.dtype == torch.int8 and scales.shape == (2, 8, 1)
    off = (dequantise_state(codes, scales) - state).abs()
    assert (off <= scales * (0.5 + 1e-12)).all()
    assert (off.norm(dim=(-2, -1)) <= rounding_bound(scales, 6) * (1 + 1e-12)).all()
    assert relative_error(dequantise_state(codes, scales), state) > 1e-4  # it did round


def test_random_rounding_is_right_on_average():
    state = torch.tensor([[127.0, 0.3, -0.3]], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([dequantise_state(*quantise_state(state, generator=g)) for _ in range(4000)])
    assert set(draws[:, 0, 1].tolist()) == {0.0, 1.0}
    # Four standard errors of a coin of 0.3.
    assert (draws.mean(0) - state).abs().max() < 4 * (0.3 * 0.7 / 4000) ** 0.5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("every", [1, 7])
def test_the_drift_stays_below_the_sum_of_its_roundings(gated, every):
    q, k, v, beta, _ = inputs(m=60)
    g = gates(k, False) * 0.1 if gated else None
    bound = torch.zeros(2, dtype=torch.float64)
    for length in range(every, 61, every):
        part = [x[:, :length] for x in (q, k, v, beta)]
        g_part = None if g is None else g[:, :length]
        _, codes, scales = quantised_delta_rule(*part, g=g_part, every=every)
        _, want, _ = draft_delta_rule(*part, torch.zeros(2, 8, 6, dtype=torch.float64), g=g_part)
        bound += rounding_bound(scales, 6)
        drift = (dequantise_state(codes, scales) - want).norm(dim=(-2, -1))
        assert (drift <= bound * (1 + 1e-9)).all()
        assert drift.min() > 0


def test_outputs_of_states_in_8_bits_are_close_and_not_equal():
    q, k, v, beta, _ = inputs(m=40)
    o, codes, scales = quantised_delta_rule(q, k, v, beta)
    want, _ = recurrent_delta_rule(q, k, v, beta)
    assert 1e-4 < relative_error(o, want) < 0.1
    assert o.shape == want.shape and codes.shape == (2, 8, 6) and scales.shape == (2, 8, 1)
    once, *_ = quantised_delta_rule(q, k, v, beta, every=40)  # never stored in between
    assert relative_error(once, want) < 1e-12


# --- Arguments ------------------------------------------------------------------------------------------
def test_wrong_arguments_are_named():
    q, k, v, beta, state = inputs()
    with pytest.raises(ValueError, match=r"^initial_state must be|^state must be"):
        draft_delta_rule(q, k, v, beta, state.mT)
    with pytest.raises(ValueError, match=r"^beta must be"):
        draft_delta_rule(q, k, v, beta[:, 1:], state)
    with pytest.raises(ValueError, match=r"^written must be"):
        roll_back(state, k, v[:, 1:])
    with pytest.raises(ValueError, match=r"^state must be"):
        replay(state.mT, k, v)
    with pytest.raises(ValueError, match=r"^g must be"):
        replay(state, k, v, g=beta[:, 1:])
    with pytest.raises(ValueError, match=r"^state must be"):
        quantise_state(torch.zeros(3))
    codes, scales = quantise_state(state)
    with pytest.raises(ValueError, match=r"^codes must be int8"):
        dequantise_state(codes.float(), scales)
    with pytest.raises(ValueError, match=r"^scales must be"):
        dequantise_state(codes, scales[:, 1:])
    with pytest.raises(ValueError, match=r"^every must be"):
        quantised_delta_rule(q, k, v, beta, every=0)
    with pytest.raises(ValueError, match=r"^d_v must be"):
        rounding_bound(scales, 0)
