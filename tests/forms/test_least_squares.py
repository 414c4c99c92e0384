"""Recursive least squares against solving the normal equations, and what the delta rule is of it."""

from __future__ import annotations

import pytest
import torch

from dn_lib.forms.least_squares import mesa, recursive_least_squares
from dn_lib.testing import relative_error

# P is a chain of up to 40 rank-one corrections of matrices whose condition number is below 1e3: float64's 2e-16 times
# both leaves 1e-11.
EXACT = 1e-11


def sample(*leading, d_k=6, d_v=5, seed=0):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(*leading, d, dtype=torch.float64) for d in (d_k, d_k, d_v))
    beta, g = 2 * torch.rand(*leading, dtype=torch.float64), (0.8 + 0.2 * torch.rand(*leading)).double().log()
    return q, k, v, beta, g


def minimisers(k, v, beta, g, ridge):
    """For one sequence: S_t = argmin L_t by `torch.linalg.lstsq` on the weighted rows, the ridge's rows among them."""
    states = []
    for t in range(1, k.shape[0] + 1):
        left = torch.stack([g[j + 1 : t].sum().exp() for j in range(t)]) * beta[:t]
        rest = (ridge * g[:t].sum().exp()).sqrt() * torch.eye(k.shape[1], dtype=k.dtype)
        A = torch.cat([left.sqrt()[:, None] * k[:t], rest])
        B = torch.cat([left.sqrt()[:, None] * v[:t], torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype)])
        states.append(torch.linalg.lstsq(A, B).solution)
    return torch.stack(states)


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("length", [1, 4, 40])
def test_it_is_the_minimiser_at_every_token(forget, length):
    q, k, v, beta, g = sample(length)
    beta[::5] = 0  # a token that is left out
    gates = (beta, g) if forget else (beta,)
    o, (S, P) = recursive_least_squares(q, k, v, *gates, ridge=0.7, scale=1.0)
    states = minimisers(k, v, beta, g if forget else torch.zeros_like(g), torch.tensor(0.7, dtype=torch.float64))
    assert relative_error(o, (q[:, None, :] @ states)[:, 0]) < EXACT
    assert relative_error(S, states[-1]) < EXACT
    assert relative_error(P, P.mT) < EXACT


def test_without_forgetting_mesa_is_the_same():
    q, k, v, beta, _ = sample(2, 3, 30)
    o, (S, P) = recursive_least_squares(q, k, v, beta, ridge=0.5)
    solved, (G, H) = mesa(q, k, v, beta, ridge=0.5)
    assert relative_error(o, solved) < EXACT
    assert relative_error(P, (H + 0.5 * torch.eye(6)).inverse()) < EXACT
    assert relative_error(S, P @ G) < EXACT


def test_mesas_ridge_does_not_decay():
    q, k, v, beta, g = sample(25, seed=1)
    ridge = 0.5 + torch.rand(6, dtype=torch.float64)
    o, _ = mesa(q, k, v, beta, g, ridge=ridge, scale=1.0)
    for t in (0, 9, 24):
        left = torch.stack([g[j + 1 : t + 1].sum().exp() for j in range(t + 1)]) * beta[: t + 1]
        H, G = (k[: t + 1].mT * left @ x[: t + 1] for x in (k, v))
        assert relative_error(o[t], q[t] @ torch.linalg.solve(H + ridge.diag(), G)) < EXACT


def test_the_delta_rule_is_its_first_step():
    """From P = I the gain is beta k / (1 + beta |k|^2): the delta rule's step of strength 1/2 for a unit key, beta 1.

    With P held at I it would be the delta rule for ever; what differs from the second token on is P.
    """
    q, k, v, *_ = sample(2, seed=2)
    k = torch.nn.functional.normalize(k, dim=-1)
    state = torch.randn(6, 5, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    _, (S, P) = recursive_least_squares(q[:1], k[:1], v[:1], torch.ones(1).double(), initial_state=state)
    delta = state[0] + 0.5 * torch.outer(k[0], v[0] - state[0].T @ k[0])
    assert relative_error(S, delta) < EXACT
    assert relative_error(P, torch.eye(6) - 0.5 * torch.outer(k[0], k[0])) < EXACT


def test_more_pairs_than_the_delta_rule_can_hold_apart():
    """Keys that overlap: after one pass least squares returns every value, the delta rule only the last ones."""
    from dn_lib.forms.delta_rule import recurrent_delta_rule

    torch.manual_seed(3)
    k = torch.nn.functional.normalize(torch.randn(6, 6, dtype=torch.float64) + 1, dim=-1)
    v, one = torch.randn(6, 5, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    _, (S, _) = recursive_least_squares(k, k, v, one, ridge=1e-8)
    _, delta = recurrent_delta_rule(k, k, v, one)
    assert relative_error(k @ S, v) < 1e-4  # the ridge's own share: 1e-8 over the least eigenvalue of k^T k, above 1e-3
    assert relative_error(k @ delta, v) > 0.1
    assert relative_error(k[-1] @ delta, v[-1]) < EXACT


def test_pieces_and_gradients():
    inputs = [x.requires_grad_() for x in sample(2, 20, seed=4)]
    o, (S, P) = recursive_least_squares(*inputs)
    first, pair = recursive_least_squares(*(x[:, :7] for x in inputs))
    second, (S_2, P_2) = recursive_least_squares(*(x[:, 7:] for x in inputs), initial_state=pair)
    for a, b in ((torch.cat([first, second], 1), o), (S_2, S), (P_2, P)):
        assert relative_error(a, b) < EXACT
    small = [x[:1, :4].detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: recursive_least_squares(*x)[0], small)
    assert torch.autograd.gradcheck(lambda *x: mesa(*x)[0], small)


def test_without_tokens_and_in_float32():
    q, k, v, beta, g = sample(2, 0)
    o, (S, P) = recursive_least_squares(q, k, v, beta, g, ridge=2.0)
    assert o.shape == (2, 0, 5) and not S.any() and torch.equal(P, torch.eye(6).double().expand(2, 6, 6) / 2)
    *inputs, beta, g = sample(2, 20)
    exact = recursive_least_squares(*inputs, beta, g)[0]
    o, (S, _) = recursive_least_squares(*(x.bfloat16() for x in inputs), beta, g)
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float64
    o, _ = recursive_least_squares(*(x.float() for x in (*inputs, beta, g)))
    assert o.dtype == torch.float32 and relative_error(o, exact) < 1e-4  # eps 1e-7, times the condition number above


X = torch.zeros(2, 7, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: recursive_least_squares(X, X, X, X),
            r"beta must be \[..., L\] = \[2, 7\] to match k, got \[2, 7, 4\]",
        ),
        (lambda: recursive_least_squares(X, X, X, X[..., 0], X[:1, :, 0]), r"g must be \[..., L\] = \[2, 7\] to match"),
        (lambda: recursive_least_squares(X, X, X, X[..., 0], ridge=0), "ridge must be a finite number above 0, got 0"),
        (
            lambda: recursive_least_squares(X, X, X, X[..., 0], initial_state=X),
            r"initial_state must be a pair \(S, P\) or None, got Tensor",
        ),
        (
            lambda: recursive_least_squares(X, X, X, X[..., 0], initial_state=(X[:, :4], X)),
            r"initial_state\[1\] must be \[..., d_k, d_k\] = \[2, 4, 4\] to match k, got \[2, 7, 4\]",
        ),
        (lambda: mesa(X, X, X, X[..., 0], ridge=X), r"ridge must be \[d_k\] = \[4\] to match k, got \[2, 7, 4\]"),
        (lambda: mesa(X, X, X, X[..., 0], ridge=-1), "ridge must be a finite number above 0, got -1"),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
