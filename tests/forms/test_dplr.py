"""The generalised delta rule: RWKV-7's rule, the delta rule and KDA as its cases, chunks against the recurrence."""

from __future__ import annotations

import math

import pytest
import torch

from dn_lib.forms.common import on_heads
from dn_lib.forms.dplr import chunkwise_dplr, recurrent_dplr, rwkv7_inputs
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.testing import offsets, relative_error

# Sums of a few hundred terms: 1e-12 leaves float64 (eps 2e-16) three digits to lose, 1e-5 float32 two.
EXACT, SINGLE = 1e-12, 1e-5
FORMS = {"recurrent": recurrent_dplr, "chunkwise": chunkwise_dplr}


def sample(*leading, d_k=6, d_v=5, seed=0, shape="channels"):
    """q, k, v, a, b, g and a state, with |b| |a| small enough that the state does not grow."""
    torch.manual_seed(seed)
    outer = leading[:-1]
    q, k, v = (torch.randn(*leading, d, dtype=torch.float64) for d in (d_k, d_k, d_v))
    a, b = (torch.nn.functional.normalize(torch.randn(*leading, d_k, dtype=torch.float64), dim=-1) for _ in range(2))
    size = {"channels": (*leading, d_k), "token": leading, "head": outer[-1:]}[shape]
    g = torch.rand(*size, dtype=torch.float64).log()
    return q, k, v, a, 0.5 * b, g, torch.randn(*outer, d_k, d_v, dtype=torch.float64)


def reference(q, k, v, a, b, g, state, scale=None):
    """The whole matrix of each token written out, in float64, row by row of the leading dimensions."""
    outer, (length, d) = q.shape[:-2], q.shape[-2:]
    if g.ndim == 1:
        g = g[:, None].expand(q.shape[:-1])
    g = g if g.ndim == q.ndim else g[..., None].expand(q.shape)
    flat = [x.reshape(math.prod(outer), *x.shape[len(outer) :]) for x in (q, k, v, a, b, g, state)]
    outputs, states = [], []
    for q_n, k_n, v_n, a_n, b_n, g_n, S in zip(*flat, strict=True):
        rows = []
        for t in range(length):
            S = (torch.diag(g_n[t].exp()) + torch.outer(b_n[t], a_n[t])) @ S + torch.outer(k_n[t], v_n[t])
            rows.append((d**-0.5 if scale is None else scale) * S.T @ q_n[t])
        outputs.append(torch.stack(rows))
        states.append(S)
    return torch.stack(outputs).unflatten(0, outer), torch.stack(states).unflatten(0, outer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 70])
@pytest.mark.parametrize("shape", ["channels", "token", "head"])
def test_forms_equal_the_matrices_written_out(form, length, shape):
    *inputs, state = sample(2, 3, length, shape=shape)
    expected = reference(*inputs, state)
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        got = FORMS[form](*(x.to(dtype) for x in inputs), initial_state=state.to(dtype))
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == dtype and relative_error(x, y) < tolerance
    o, _ = FORMS[form](*inputs, scale=2.0, initial_state=state)
    assert relative_error(o, reference(*inputs, state, scale=2.0)[0]) < EXACT


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 40, 64])
def test_chunks_of_any_size_have_the_same_numbers_and_gradients(chunk_size):
    inputs = [x.requires_grad_() for x in sample(2, 37)]
    *tensors, state = inputs
    results = [
        form(*tensors, initial_state=state, **options)
        for form, options in ((recurrent_dplr, {}), (chunkwise_dplr, {"chunk_size": chunk_size}))
    ]
    weights = [torch.randn_like(x) for x in results[0]]
    gradients = [torch.autograd.grad(result, inputs, weights) for result in results]
    for a, b in zip((*results[1], *gradients[1]), (*results[0], *gradients[0]), strict=True):
        assert relative_error(a, b) < 10 * EXACT  # a gradient goes through the solve twice


@pytest.mark.parametrize("form", FORMS)
def test_gates_of_zero_and_strong_decay_stay_exact(form):
    *inputs, state = sample(2, 40)
    inputs[5][:, ::7] = -torch.inf
    inputs[5][:, 3::7] = -200.0
    o, last = FORMS[form](*inputs, initial_state=state)
    expected, final = reference(*inputs, state)
    assert relative_error(o, expected) < EXACT and relative_error(last, final) < EXACT


@pytest.mark.parametrize("form", FORMS)
def test_the_delta_rule_with_a_gate_per_channel_is_a_case(form):
    """(I - beta k k^T) Diag(alpha) = Diag(alpha) - beta k (alpha k)^T, with a write of beta k v^T."""
    q, k, v, _, _, g, state = sample(2, 50, seed=1)
    k, beta = torch.nn.functional.normalize(k, dim=-1), 2 * torch.rand(2, 50, dtype=torch.float64)
    strong = beta[..., None] * k
    o, last = FORMS[form](q, strong, v, -g.exp() * k, strong, g, initial_state=state)
    expected = recurrent_gated_delta_rule(q, k, v, beta, g, initial_state=state)
    assert relative_error(o, expected[0]) < EXACT and relative_error(last, expected[1]) < EXACT


@pytest.mark.parametrize("form", FORMS)
def test_rwkv7s_rule(form):
    """S_t = (Diag(w) - (a * kappa) kappa^T) S + k~ v^T, with both keys and their weights as the paper has them."""
    r, k, v, *_, state = sample(30, seed=2)
    w = torch.exp(-math.exp(-0.5) * torch.randn(30, 6, dtype=torch.float64).sigmoid())
    a = torch.randn(30, 6, dtype=torch.float64).sigmoid()
    k_k, k_a = torch.rand(2, 6, dtype=torch.float64).unbind(0)
    S, rows = state, []
    for t in range(30):
        kappa = k[t] * k_k / ((k[t] * k_k).square().sum() + 1e-6).sqrt()
        written = k[t] * (1 + (a[t] - 1) * k_a)
        S = (torch.diag(w[t]) - torch.outer(a[t] * kappa, kappa)) @ S + torch.outer(written, v[t])
        rows.append(S.T @ r[t])
    k_t, *rest = rwkv7_inputs(k, w, a, k_k, k_a)
    o, last = FORMS[form](r, k_t, v, *rest, scale=1.0, initial_state=state)
    assert relative_error(o, torch.stack(rows)) < EXACT and relative_error(last, S) < EXACT


@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_and_pieces(form):
    """As an operator on `[B, L, H, d]`; in pieces, one token at a time among them; with an empty sequence."""
    *inputs, state = (x.transpose(0, 1)[None] for x in sample(3, 32, seed=3))
    lengths, starts = [5, 1, 0, 26], torch.randn(4, 3, 6, 5, dtype=torch.float64)
    o, states = on_heads(FORMS[form], *inputs, initial_state=starts, cu_seqlens=offsets(lengths))
    parts = zip(*(x.split(lengths, 1) for x in inputs), strict=True)
    for part, rows, begin, end in zip(parts, o.split(lengths, 1), starts, states, strict=True):
        expected, last = on_heads(FORMS[form], *part, initial_state=begin[None])
        assert (rows - expected).norm() <= EXACT * expected.norm()
        assert relative_error(end[None], last) < EXACT
    whole, _ = on_heads(FORMS[form], *inputs)
    state, pieces = None, []
    for a, b in ((0, 9), (9, 10), (10, 11), (11, 32)):
        piece, state = on_heads(FORMS[form], *(x[:, a:b] for x in inputs), initial_state=state)
        pieces.append(piece)
    assert relative_error(torch.cat(pieces, 1), whole) < EXACT


def test_without_tokens_the_state_is_a_copy():
    *inputs, state = sample(2, 3, 0)
    for form in FORMS.values():
        o, last = form(*inputs, initial_state=state)
        assert o.shape == (2, 3, 0, 5) and torch.equal(last, state) and last.data_ptr() != state.data_ptr()


X = torch.zeros(2, 7, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X, X, X, X[..., :3], X, X), r"a must be \[..., L, d_k\] = \[2, 7, 4\] to match k, got \[2, 7, 3\]"),
        ((X, X, X, X, X[:, :6], X), r"b must be \[..., L, d_k\] = \[2, 7, 4\] to match k, got \[2, 6, 4\]"),
        ((X, X, X[:, :5], X, X, X), r"v must be \[..., L, d_v\] = \[2, 7, 4\] to match k, got \[2, 5, 4\]"),
        ((X, X, X, X, X, X[..., 0][:, :6]), r"g must be \[..., L\] = \[2, 7\] to match k, got \[2, 6\]"),
        ((X, X, X, X, X.long(), X), "b must be a floating-point tensor, got torch.int64"),
    ],
)
def test_bad_inputs_are_named(arguments, message):
    for form in FORMS.values():
        with pytest.raises((ValueError, TypeError), match=message):
            form(*arguments)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1, got 0"):
        chunkwise_dplr(X, X, X, X, X, X, chunk_size=0)
    with pytest.raises(ValueError, match=r"k_a must be \[d_k\] = \[4\] to match k, got \[3\]"):
        rwkv7_inputs(X, X, X, X[0, 0], X[0, 0, :3])
    with pytest.raises(ValueError, match=r"w must be \[..., L, d_k\] = \[2, 7, 4\] to match k, got \[2, 7, 3\]"):
        rwkv7_inputs(X, X[..., :3], X, X[0, 0], X[0, 0])
