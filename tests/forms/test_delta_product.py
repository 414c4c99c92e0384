"""Several delta steps per token: forms agree, permutations and rotations are made, in as few steps as there can be."""

from __future__ import annotations

import pytest
import torch

from dn_lib.data.state_tracking import permutations_of
from dn_lib.forms.delta_product import (
    chunkwise_delta_product,
    fewest_steps,
    one_step_per_token,
    permutation_steps,
    recurrent_delta_product,
    reflections_of,
    swaps_of,
    token_matrix,
)
from dn_lib.testing import relative_error

EXACT, SINGLE = 1e-12, 1e-5  # sums of some hundred terms leave float64 three digits to lose, float32 two


def sample(*leading, steps=3, d_k=5, d_v=4, dtype=torch.float64):
    torch.manual_seed(0)
    q, v = torch.randn(*leading, d_k, dtype=dtype), torch.randn(*leading, steps, d_v, dtype=dtype)
    k = torch.nn.functional.normalize(torch.randn(*leading, steps, d_k, dtype=dtype), dim=-1)
    return q, k, v, 2 * torch.rand(*leading, steps, dtype=dtype), torch.randn(*leading[:-1], d_k, d_v, dtype=dtype)


def written_out(q, k, v, beta, S):
    """One sequence, step by step, with the matrices written out."""
    outputs = []
    for t in range(len(q)):
        for j in range(k.shape[1]):
            H = torch.eye(k.shape[2], dtype=k.dtype) - beta[t, j] * torch.outer(k[t, j], k[t, j])
            S = H @ S + beta[t, j] * torch.outer(k[t, j], v[t, j])
        outputs.append(q[t] @ S)
    return torch.stack(outputs), S


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_forms_equal_the_steps_written_out(steps):
    *inputs, state = sample(2, 23, steps=steps)
    expected = [torch.stack(x) for x in zip(*(written_out(*x) for x in zip(*inputs, state, strict=True)), strict=True)]
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        given = [x.to(dtype) for x in inputs]
        options = {"scale": 1.0, "initial_state": state.to(dtype)}
        for got in (
            recurrent_delta_product(*given, **options),
            chunkwise_delta_product(*given, **options, chunk_size=8),
        ):
            for x, y in zip(got, expected, strict=True):
                assert x.dtype == dtype and relative_error(x, y) < tolerance


def test_no_tokens_leave_the_state():
    *inputs, state = sample(2, 0)
    o, S = recurrent_delta_product(*inputs, initial_state=state)
    assert o.shape == (2, 0, 4) and torch.equal(S, state)


@pytest.mark.parametrize("degree", [2, 3, 4, 5])
def test_every_permutation_is_made_in_as_few_steps_as_there_can_be(degree):
    letters = permutations_of(degree)
    k, beta = permutation_steps(letters)
    M, x = token_matrix(k, beta), torch.arange(degree, dtype=torch.float64)
    for row, matrix in zip(letters, M, strict=True):
        assert torch.allclose((matrix @ x)[row], x)
        assert len(swaps_of(row.tolist())) == int(fewest_steps(matrix))
    assert torch.equal((beta > 0).sum(-1), fewest_steps(M))


@pytest.mark.parametrize("d", [1, 2, 3, 6])
def test_orthogonal_matrices_are_products_of_as_few_reflections(d):
    torch.manual_seed(d)
    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    eye = torch.eye(d, dtype=torch.float64)
    for M in (Q, Q @ Q, eye, -eye):
        keys = reflections_of(M)
        assert len(keys) == int(fewest_steps(M)) == int(torch.linalg.matrix_rank(M - eye, atol=1e-9))
        product = token_matrix(keys, torch.full((len(keys),), 2.0, dtype=torch.float64)) if len(keys) else eye
        torch.testing.assert_close(product, M)


def test_unused_steps_do_nothing():
    k, beta = permutation_steps(torch.tensor([[1, 0, 2], [0, 1, 2]]), 4, dtype=torch.float32)
    assert k.shape == (2, 4, 3) and k.dtype == torch.float32
    assert beta.tolist() == [[2, 0, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 4))


X = torch.zeros(7, 2, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: one_step_per_token(X[:, 0], X[0], X, X[..., 0]), r"k must be \[..., L, n, d_k\], got \[2, 5\]"),
        (lambda: one_step_per_token(X[:6, 0], X, X, X[..., 0]), r"q must be \[..., L, d_k\] = \[7, 5\] to match k"),
        (lambda: one_step_per_token(X[:, 0], X, X, X[:, 0]), r"beta must be \[..., L, n\] = \[7, 2\] to match k"),
        (lambda: one_step_per_token(X[:, 0], X, X[:, 0], X[..., 0]), r"v must be \[..., L, n, d_v\] = \[7, 2, 5\]"),
        (lambda: chunkwise_delta_product(X[:, 0], X, X, X[..., 0], chunk_size=0), "chunk_size must be an integer"),
        (lambda: swaps_of([0, 2]), r"permutation must hold 0 to 1, each once, got \[0, 2\]"),
        (
            lambda: permutation_steps(torch.tensor([1, 2, 0]), 1),
            "steps must be at least 2 for these permutations",
        ),
        (lambda: permutation_steps(torch.tensor([1.0, 0.0])), "permutations must be integers"),
        (lambda: fewest_steps(X), r"M must be \[..., d, d\], got \[7, 2, 5\]"),
        (lambda: reflections_of(2 * torch.eye(3)), r"M must be orthogonal, but an entry of M\^T M - I is 3.0e\+00"),
        (lambda: reflections_of(torch.zeros(3, 2)), r"M must be \[d, d\], got \[3, 2\]"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
