"""What only gates do: resets, strong decay, shared heads, the bound on N.  Values, options and gradients of every form
are compared with the recurrence in tests/test_operators.py."""

from __future__ import annotations

import math

import pytest
import torch

from dn_lib.forms import gated
from dn_lib.forms.decay import gated_linear_attention, retention
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.gated import decayed_products, gated_scaled_inverse, span_sums
from dn_lib.forms.gated_delta_rule import gated_delta_rule_step
from dn_lib.forms.linear_attention import recurrent_linear_attention
from dn_lib.testing import delta_rule_inputs, gated_inputs, log_gates, relative_error

F32, F64 = torch.float32, torch.float64
# As in tests/test_operators.py: 4500 eps, and 84 eps, for sums of up to some hundred terms.
EXACT, SINGLE = 1e-12, 1e-5
LINEAR = {name: getattr(gated, f"{name}_gated_linear_attention") for name in ("recurrent", "parallel", "chunkwise")}
DELTA = {name: getattr(gated, f"{name}_gated_delta_rule") for name in ("recurrent", "parallel", "chunkwise")}
FORMS = {
    **{f"linear, {n}": (f, False) for n, f in LINEAR.items()},
    **{f"delta, {n}": (f, True) for n, f in DELTA.items()},
}

every_form = pytest.mark.parametrize("form, erase", FORMS.values(), ids=FORMS)
per_what = pytest.mark.parametrize("channels", [False, True], ids=["per token", "per channel"])


def sample(*sizes, erase=True, **options):
    """q, k, v, (beta,) g, state in float64."""
    q, k, v, beta, g, state = gated_inputs(delta_rule_inputs, *sizes, dtype=options.pop("dtype", F64), **options)
    return (q, k, v, beta, g, state) if erase else (q, k, v, g, state)


# --- The convention -----------------------------------------------------------------------------------------------
@every_form
@per_what
def test_gates_of_one_are_no_gates(form, erase, channels):
    *inputs, g, _ = sample(3, 21, 8, 6, erase=erase, channels=channels)
    plain = recurrent_delta_rule if erase else recurrent_linear_attention
    for a, b in zip(form(*inputs, torch.zeros_like(g)), plain(*inputs), strict=True):
        assert relative_error(a, b) < EXACT


def test_the_logarithm_of_chapter_2s_alpha():
    q, k, v, beta, g, state = sample(3, 21, 8, 6, state=(3,))
    o, final = DELTA["recurrent"](q, k, v, beta, g, initial_state=state)
    steps = []
    for t in range(21):
        o_t, state = gated_delta_rule_step(*(x[:, t] for x in (q, k, v, g.exp(), beta)), state)
        steps.append(o_t)
    assert relative_error(o, torch.stack(steps, 1)) < EXACT and relative_error(final, state) < EXACT


def test_per_channel_the_decay_comes_before_the_erasure():
    """With one token on a state: (I - beta k k^T) Diag(alpha) S, and not Diag(alpha) (I - beta k k^T) S."""
    q, k, v, beta, g, state = sample(1, 8, 6, channels=True, state=())
    keep, decay = torch.eye(8, dtype=F64) - beta * k.mT * k, g.exp().mT
    expected, swapped = (x + beta * k.mT @ v for x in (keep @ (decay * state), decay * (keep @ state)))
    for form in DELTA.values():
        last = form(q, k, v, beta, g, initial_state=state)[1]
        assert relative_error(last, expected) < EXACT
        assert relative_error(last, swapped) > 0.01


@every_form
def test_a_fixed_decay_is_one_number_per_head(form, erase):
    *inputs, _, state = sample(2, 3, 21, 8, 6, erase=erase, state=(2, 3))
    fixed = torch.tensor([0.0, -0.3, -math.inf], dtype=F64, requires_grad=True)
    o, last = form(*inputs, fixed, initial_state=state)
    wide = form(*inputs, fixed[:, None].expand(2, 3, 21), initial_state=state)
    assert torch.equal(o, wide[0]) and torch.equal(last, wide[1])
    (grad,) = torch.autograd.grad(o.square().sum(), fixed)
    assert grad.shape == (3,) and grad.isfinite().all() and grad[2] == 0
    alone = form(*(x[0, 1] for x in inputs), torch.tensor(-0.3, dtype=F64), initial_state=state[0, 1])
    assert relative_error(alone[0], o[0, 1].detach()) < EXACT


@every_form
@per_what
def test_more_value_heads_than_key_heads(form, erase, channels):
    """Value head h reads key head h // 2, and gradients of q and k sum over the two."""
    q, k, v, *gates, state = sample(2, 4, 21, 8, 6, erase=erase, channels=channels, state=(2, 4))
    few = [x[:, ::2].clone().requires_grad_() for x in (q, k)]
    many = [x.detach()[:, [0, 0, 1, 1]].clone().requires_grad_() for x in few]
    weights = torch.randn(2, 4, 21, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    results = []
    for pair in (few, many):
        o, last = form(*pair, v, *gates, initial_state=state)
        results.append((o, last, *torch.autograd.grad((o * weights).sum(), pair)))
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results[0][2:], results[1][2:], strict=True):
        assert relative_error(a, b.unflatten(1, (2, 2)).sum(2)) < EXACT


# --- Gates of zero, and strong decay ------------------------------------------------------------------------------
@every_form
@per_what
def test_a_gate_of_zero_starts_anew(form, erase, channels):
    """In mid-chunk: what comes after is the sequence from there, and no gradient passes; none is NaN."""
    *inputs, g, state = sample(40, 8, 6, erase=erase, channels=channels, state=())
    g = g.clamp_min(-3.0)
    g[21] = -math.inf
    leaves = [x.clone().requires_grad_() for x in (*inputs, g, state)]
    o, last = form(*leaves[:-1], initial_state=leaves[-1])
    after = form(*(x[21:] for x in inputs), g[21:])
    assert relative_error(o[21:].detach(), after[0]) < EXACT
    assert relative_error(last.detach(), after[1]) < EXACT
    *grads, dg, dstate = torch.autograd.grad(o[21:].square().sum() + last.square().sum(), leaves)
    assert dg[21].eq(0).all() and dstate.eq(0).all()
    for x in (*grads, dg):
        assert x.isfinite().all() and x[:21].eq(0).all()


@every_form
@per_what
@pytest.mark.parametrize("g", [-math.inf, -1e38, -1e4, -30.0, -1e-4])
def test_strong_decay_in_long_chunks(form, erase, channels, g):
    """float32, 200 tokens in one chunk; -1e38 overflows float32 when it is summed."""
    *inputs, gates, _ = sample(200, 8, 6, erase=erase, channels=channels)
    exact = (LINEAR, DELTA)[erase]["recurrent"](*inputs, torch.full_like(gates, g))
    narrow = [x.float().requires_grad_() for x in (*inputs, torch.full_like(gates, g))]
    o, last = form(*narrow, **({"chunk_size": 200} if "chunkwise" in form.__name__ else {}))
    assert relative_error(o, exact[0]) < SINGLE and relative_error(last, exact[1]) < SINGLE
    grads = torch.autograd.grad(o.square().sum() + last.square().sum(), narrow)
    assert all(x.isfinite().all() for x in grads)


@per_what
def test_a_strong_decay_costs_later_tokens_no_digits(channels):
    *inputs, gates, _ = sample(200, 8, 6, channels=channels)
    early = (torch.arange(200) < 100).reshape(200, *[1] * channels)
    gates = torch.where(early, -80.0, -1e-3).expand_as(gates).float()
    exact = DELTA["recurrent"](*inputs, gates.double())
    o, last = DELTA["chunkwise"](*(x.float() for x in inputs), gates, chunk_size=200)
    assert relative_error(o[100:], exact[0][100:]) < SINGLE
    assert relative_error(last, exact[1]) < SINGLE


def test_differences_of_running_sums_would_lose_digits():
    """Near -8,000 float32 has steps of 2^-11, and the running sum is off by half of one at each token."""
    g = torch.where(torch.arange(200) < 100, -80.0, -1e-3)[:, None]
    exact, running = span_sums(g.double())[100:, 100:, 0].exp().tril(), g.cumsum(0)[100:, 0]
    assert relative_error((running[:, None] - running).exp().tril(), exact) > SINGLE
    assert relative_error(span_sums(g)[100:, 100:, 0].exp().tril(), exact) < SINGLE / 20


@pytest.mark.parametrize("sub_chunk", [1, 3, 16, 64])
def test_secondary_chunks_change_nothing(sub_chunk):
    x, y = torch.randn(2, 2, 37, 5, dtype=F64, generator=torch.Generator().manual_seed(0)).unbind(0)
    g = log_gates(2, 37, 5)
    entries = x.unsqueeze(-2) * y.unsqueeze(-3) * span_sums(g).exp()
    assert relative_error(decayed_products(x, y, g, sub_chunk), entries.sum(-1).tril()) < EXACT


def test_gradients_pass_gradcheck_with_a_gate_of_zero():
    for channels in (False, True):
        inputs = sample(2, 7, 3, 2, channels=channels, state=(2,))
        g = inputs[4].clamp_min(-2.0)
        for form, leading in ((LINEAR["chunkwise"], inputs[:3]), (DELTA["chunkwise"], inputs[:4])):
            leaves = [x.clone().requires_grad_() for x in (*leading, g, inputs[5])]
            assert torch.autograd.gradcheck(
                lambda *t, form=form: form(*t[:-1], initial_state=t[-1], chunk_size=3), leaves
            )


# --- The bound ----------------------------------------------------------------------------------------------------
@per_what
@pytest.mark.parametrize("equal", [False, True])
def test_entries_of_n_are_at_most_one(channels, equal):
    """|N_ij| <= 1, and the product of matrices that the proof starts from is what N holds."""
    for seed in range(20):
        _, k, _, beta, g, _ = sample(5, 32, 4, 2, channels=channels, equal=equal, seed=seed, bias=2.0 * (seed % 2))
        if seed % 4 == 0:
            g = 0.01 * g.clamp_min(-5.0)  # gates near 1, where the bound is nearly reached
        N = gated_scaled_inverse(k, beta, g)
        # Rounding: some 32 products of vectors of norm 1.
        assert N.abs().max() <= 1 + 1e-13
        if not channels:
            assert (N.abs() <= span_sums(g[..., None])[..., 0].exp() + 1e-13).all()
    H = torch.eye(4, dtype=F64) - beta[..., None, None] * k[..., :, None] * k[..., None, :]
    A = torch.diag_embed((g if channels else g[..., None].expand_as(k)).exp())
    j, i = 3, 11
    product = A[:, j + 1]
    for m in range(j + 1, i):
        product = A[:, m + 1] @ H[:, m] @ product
    expected = -(k[:, i, None, :] @ product @ k[:, j, :, None])[..., 0, 0]
    assert relative_error(N[:, i, j], expected, 1.0) < EXACT


def test_a_gate_above_one_breaks_the_bound():
    """So the bound is no accident of what is drawn."""
    _, k, _, beta, _, _ = sample(5, 32, 4, 2, equal=True)
    assert gated_scaled_inverse(k, beta, torch.full((5, 32), 0.1, dtype=F64)).abs().max() > 2


# --- Arguments ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change, message",
    [
        ({"g": torch.zeros(2, 3, 4)}, r"g must be \[..., L\] = \[2, 3, 5\] to match k, got \[2, 3, 4\]"),
        ({"g": torch.zeros(2, 3, 5, 3)}, r"g must be \[..., L, d_k\] = \[2, 3, 5, 4\] to match k, got \[2, 3, 5, 3\]"),
        ({"g": torch.zeros(2)}, r"g must be \[H\] = \[3\] to match k, got \[2\]"),
        ({"g": torch.zeros(2, 3, 5, dtype=torch.long)}, "g must be a floating-point tensor, got torch.int64"),
        ({"g": None}, "g must be a tensor, got NoneType"),
        ({"v": torch.zeros(2, 4, 5, 2)}, "v must have a multiple of the H = 3 heads of k, got 4"),
        ({"k": torch.zeros(2, 3, 6, 4)}, r"k must be \[..., L, d_k\] = \[2, 3, 5, 4\] to match q"),
        ({"beta": torch.zeros(2, 3)}, r"beta must be \[..., L\] = \[2, 3, 5\] to match q, got \[2, 3\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    q, k, v = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 2)
    good = {"q": q, "k": k, "v": v, "beta": torch.zeros(2, 3, 5), "g": torch.zeros(2, 3, 5)}
    for form in DELTA.values():
        with pytest.raises((ValueError, TypeError), match=message):
            form(**{**good, **change})


def test_the_names_of_the_layers_are_the_same_forms():
    q, k, v, g, _ = sample(2, 3, 21, 8, 6, erase=False)
    assert torch.equal(retention(q, k, v, g)[0], LINEAR["chunkwise"](q, k, v, g)[0])
    wide = log_gates(2, 3, 21, 8)
    assert torch.equal(gated_linear_attention(q, k, v, wide)[0], LINEAR["chunkwise"](q, k, v, wide)[0])
