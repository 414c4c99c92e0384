"""What the other tests rest on: the error metric, the samplers, and the recurrence that is their reference."""

from __future__ import annotations

import math

import pytest
import torch

from dn_lib.testing import (
    LAYOUTS,
    delta_rule_inputs,
    delta_rule_reference,
    laid_out,
    linear_attention_inputs,
    linear_attention_reference,
    mixed_lengths,
    offsets,
    output_gradients,
    poisoned,
    relative_error,
)

ONES = torch.ones(3)


def test_errors_are_relative_norms_in_float64():
    assert relative_error(ONES, ONES) == 0.0
    assert relative_error(1.1 * ONES.double(), ONES) == pytest.approx(0.1)
    # float32 could not tell these apart.
    assert relative_error(ONES.double() + 2.0**-40, ONES) == pytest.approx(2.0**-40)
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
    assert relative_error(ONES.bfloat16().requires_grad_(), ONES.double()) == 0.0


def test_a_size_divides_where_it_is_larger():
    assert relative_error(ONES + 1, ONES, size=100.0) == pytest.approx(3**0.5 / 100)
    assert relative_error(ONES + 1, ONES, size=0.01) == pytest.approx(1.0)
    assert relative_error(ONES, 0 * ONES, size=1.0) == pytest.approx(3**0.5)


def test_a_reference_of_zero_asks_for_zeros():
    assert relative_error(0 * ONES, 0 * ONES) == 0.0
    assert relative_error(1e-300 * ONES.double(), 0 * ONES) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_far(bad):
    spoilt = torch.tensor([1.0, bad, 1.0])
    assert relative_error(spoilt, ONES) == relative_error(ONES, spoilt) == relative_error(spoilt, spoilt) == math.inf


def test_complex_numbers_keep_their_imaginary_parts():
    assert relative_error(ONES + 1j, ONES) == pytest.approx(1.0)
    assert relative_error(ONES, ONES * 1j) == pytest.approx(2**0.5)


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_squares_that_overflow_or_vanish(unit):
    x = unit * ONES.double()
    assert relative_error(2 * x, x) == pytest.approx(1.0) and relative_error(x, x) == 0.0
    assert relative_error(x, x, size=4 * unit) == 0.0 and relative_error(2 * x, x, size=4 * unit) < 0.5


@pytest.mark.parametrize("shape", [(1,), (3, 1), (4,), ()])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"x must have the shape of the reference, \[3\], got"):
        relative_error(torch.ones(shape), ONES)
    with pytest.raises(TypeError, match="reference must be a tensor, got float"):
        relative_error(ONES, 1.0)


@pytest.mark.parametrize("sampler", [linear_attention_inputs, delta_rule_inputs])
def test_samplers_draw_the_same_numbers_in_every_dtype(sampler):
    exact = sampler(2, 7, 3, 4, 5, state=2, seed=3, dtype=torch.float64)
    rounded = sampler(2, 7, 3, 4, 5, state=2, seed=3, dtype=torch.bfloat16)
    *inputs, state = rounded
    assert all(torch.equal(x.bfloat16(), y) for x, y in zip(exact, inputs, strict=False))
    assert state.dtype == torch.float32 and torch.equal(exact[-1].float(), state)
    assert not torch.equal(sampler(2, 7, 3, 4, 5, seed=4, dtype=torch.float64)[0], exact[0])
    assert sampler(7, 4, 5, state=())[-1].shape == (4, 5) and sampler(2, 7, 4, 5)[-1] is None


def test_kinds_of_keys():
    plain, near, equal = (delta_rule_inputs(1, 20, 2, 8, 4, **o) for o in ({}, {"bias": 5.0}, {"equal": True}))
    for _, k, _, beta, _ in (plain, near, equal):
        assert torch.allclose(k.norm(dim=-1), torch.ones(())) and beta.min() >= 0 and beta.max() <= 2
    cosines = [(k[0, :, 0] @ k[0, :, 0].T).min().item() for _, k, *_ in (plain, near, equal)]
    assert cosines[0] < 0 < 0.8 < cosines[1] < 1 - 1e-3 < cosines[2]
    assert (equal[3] == 2).all()


def test_betas_at_their_edges():
    plain, edges = (delta_rule_inputs(1, 500, 2, 4, 4, seed=5, edges=e)[3] for e in (False, True))
    shares = [(edges == x).double().mean().item() for x in (0.0, 2.0)]
    # Each a third of 1,000: five standard deviations are 0.075.
    assert all(abs(share - 1 / 3) < 0.08 for share in shares)
    between = (edges > 0) & (edges < 2)
    assert torch.equal(edges[between], plain[between]) and ((plain > 0) & (plain < 2)).all()


def test_gradients_of_the_outputs_are_numbers_of_their_own():
    do, dstate = output_gradients(2, 7, 3, 4, 5, seed=3, state=2, dtype=torch.bfloat16)
    assert do.shape == (2, 7, 3, 5) and dstate.shape == (2, 3, 4, 5)
    assert do.dtype == torch.bfloat16 and dstate.dtype == torch.float32
    exact = output_gradients(2, 7, 3, 4, 5, seed=3, state=2)
    assert torch.equal(exact[0].bfloat16(), do) and torch.equal(exact[1].float(), dstate)
    assert output_gradients(7, 4, 5)[1] is None
    drawn = linear_attention_inputs(2, 7, 3, 4, 5, seed=3, state=2)
    assert not set(exact[0].flatten().tolist()) & {x for tensor in drawn for x in tensor.flatten().tolist()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 4), (1, 0, 2, 4)], ids=str)
def test_layouts_hold_the_same_numbers(layout, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = laid_out(x, layout)
    assert torch.equal(x, y) and not y.requires_grad
    assert y.is_contiguous() == (layout == "contiguous" or not x.numel())
    if layout == "rows apart" and x.numel():
        assert y.as_strided(y.shape, y.stride(), shape[-1]).isnan().all()


def test_an_unknown_layout_is_named():
    with pytest.raises(ValueError, match=r"layout must be one of contiguous, heads first, rows apart, got rows"):
        laid_out(ONES, "rows")


@pytest.mark.parametrize("seed", range(3))
def test_mixed_lengths_are_unequal_and_sum(seed):
    lengths = mixed_lengths(12, 1000, seed)
    assert len(lengths) == 12 and sum(lengths) == 1000 and min(lengths) >= 1
    assert max(lengths) > 4 * min(lengths) and offsets(lengths)[-1] == 1000


def test_the_recurrence_by_hand():
    """Two tokens with the same key: the second write replaces the first where beta is 1, and linear attention adds."""
    k = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, :, None]
    v = torch.tensor([[3.0], [5.0]])[None, :, None]
    o, state, size = delta_rule_reference(k, k, v, torch.ones(1, 2, 1), scale=1.0)
    assert o.flatten().tolist() == [3.0, 5.0] and state.flatten().tolist() == [5.0, 0.0]
    assert size == pytest.approx(34**0.5)
    o, state, _ = linear_attention_reference(k, k, v, scale=1.0)
    assert o.flatten().tolist() == [3.0, 8.0] and state.flatten().tolist() == [8.0, 0.0]


def test_memory_is_poisoned_within_and_not_after():
    with poisoned():
        assert torch.empty(64).isnan().all() and torch.empty_like(ONES).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
