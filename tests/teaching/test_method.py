"""Rules about the method: what is seen of a computation, and what each rule refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dn_lib.forms.linear_attention import elu_feature_map, recurrent_linear_attention
from dn_lib.teaching.judge import method


def inputs(length=12):
    return tuple(torch.ones(length, d, dtype=torch.float64) for d in (3, 3, 5))


def masked(q, k, v):
    return (q @ k.T).tril() @ v


def loop(q, k, v):
    S, o = torch.zeros(3, 5, dtype=v.dtype), []
    for t in range(len(q)):
        S = S + torch.outer(k[t], v[t])
        o.append(q[t] @ S)
    return torch.stack(o)


def by_library(q, k, v):
    return recurrent_linear_attention(elu_feature_map(q), k, v)[0]


def by_gradient(q, k, v):
    x = q.clone().requires_grad_()
    return torch.autograd.grad(x.square().sum(), x)[0]


def by_numpy(q, k, v):
    return torch.from_numpy(np.tril(q.numpy() @ k.numpy().T) @ v.numpy())


def test_operations_their_sizes_and_what_they_read_are_seen():
    record = method.watch(masked, *inputs())
    assert [o.name for o in record.own if o.name in ("mm", "tril")] == ["mm", "tril", "mm"]
    assert [sorted(o.reads) for o in record.own if o.name == "mm"] == [[0, 1], [0, 1, 2]]
    (first, *_), shapes = method.products(record), [(left, right) for _, left, right in method.products(record)]
    assert first[0].outputs[0].shape == (12, 12) and shapes == [((12, 3), (3, 12)), ((12, 12), (12, 5))]


def test_what_is_written_into_a_view_is_seen_in_the_whole():
    def through_a_view(q, k, v):
        o = torch.zeros(2, 5, dtype=v.dtype)
        o[1] = v[0]
        return o.sum()

    assert method.watch(through_a_view, *inputs()).own[-1].reads == {2}


def test_calls_of_the_library_are_seen_and_their_operations_set_apart():
    record = method.watch(by_library, *inputs())
    assert record.calls == ["elu_feature_map", "recurrent_linear_attention"]
    assert not record.own and record.operations


def test_the_profiler_of_the_caller_is_put_back():
    import sys

    before = sys.getprofile()
    with pytest.raises(ZeroDivisionError):
        method.watch(lambda q: 1 / 0, torch.ones(1))
    assert sys.getprofile() is before


@pytest.mark.parametrize(
    ("rule", "keeps", "breaks", "says"),
    [
        (method.no_square(lambda: inputs(40), 40, "L x L", ""), loop, masked, "forms a matrix of L x L: 40 x 40"),
        (
            method.at_most(lambda: inputs(40), 600, "a state for each token", ""),
            loop,
            lambda q, k, v: torch.einsum("td,te->tde", k, v).cumsum(0),
            "holds a state for each token: a tensor of 40 x 3 x 5",
        ),
        (
            method.few_steps(lambda: inputs(12), lambda: inputs(24), "the chunk", ""),
            masked,
            loop,
            "operations become",
        ),
        (method.no_library(inputs, "elu_feature_map"), loop, by_library, "calls the library's `recurrent_linear"),
        (method.through(inputs, "recurrent_linear_attention", ""), None, loop, "never calls `recurrent_linear"),
        (
            method.through(inputs, "recurrent_linear_attention", ""),
            lambda *x: recurrent_linear_attention(*x)[0],
            by_library,
            "calls the library's `elu_feature_map`, not",
        ),
        (
            method.no_operations(inputs, method.SOLVERS, ""),
            loop,
            lambda q, k, v: torch.linalg.inv(torch.eye(3)),
            "uses an inverse (`torch.linalg.inv`)",
        ),
        (
            method.no_operations(inputs, method.SOLVERS, ""),
            loop,
            lambda q, k, v: torch.linalg.solve(torch.eye(3), torch.eye(3)),
            "uses a solver (`torch.linalg.solve`)",
        ),
        (
            method.no_gradients(inputs, ""),
            loop,
            by_gradient,
            "lets autograd differentiate",
        ),
        (
            method.no_division(lambda: (torch.zeros(3, dtype=torch.float64),), "beta", ""),
            lambda beta: (beta + 1) / 2 + beta * torch.inf,  # a quotient that is a number
            lambda beta: 1 / (1 / beta),
            "divides by beta, where it is 0",
        ),
        (method.no_square(lambda: inputs(40), 40, "L x L", ""), loop, by_numpy, "leaves PyTorch (`numpy`)"),
    ],
)
def test_a_rule_refuses_what_breaks_it_and_nothing_else(rule, keeps, breaks, says):
    if keeps is not None:
        assert rule.complaint(keeps) == ""
    complaint = rule.complaint(breaks)
    assert complaint and says in complaint


def test_solvers_are_known_by_the_names_that_pytorch_runs():
    A = torch.eye(3) + torch.ones(3, 3).tril(-1)
    ways = {
        "linalg_inv_ex": (torch.linalg.inv, torch.inverse, lambda A: A.inverse(), lambda A: A**-1 @ A.inverse()),
        "linalg_solve_triangular": (lambda A: torch.linalg.solve_triangular(A, A, upper=False),),
        "_linalg_solve_ex": (lambda A: torch.linalg.solve(A, A),),
        "linalg_lu_factor_ex": (torch.linalg.lu_factor,),
        "linalg_qr": (torch.linalg.qr,),
        "_linalg_svd": (torch.linalg.svd,),
        "linalg_pinv": (torch.linalg.pinv,),
        "linalg_lstsq": (lambda A: torch.linalg.lstsq(A, A).solution,),
    }
    for name, functions in ways.items():
        for function in functions:
            assert name in {o.name for o in method.watch(function, A).own} & set(method.SOLVERS)


def double(x):
    return 2 * x + torch.outer(x[:, 0], x[0])


NO_SECOND = method.no_second_implementation(double, "the answer", "")


@pytest.mark.parametrize(
    ("test", "refused"),
    [
        (lambda f: torch.allclose(f(X), double(X)), True),
        (lambda f: torch.allclose(f(X), X + X + X[:, :1] * X[:1]), True),
        (lambda f: torch.allclose(f(X) - 2 * X, torch.outer(X[:, 0], X[0])), False),  # a property
        (lambda f: torch.allclose(f(X) + 0, 1 * f(X)), False),  # made from what was handed over
        (lambda f: torch.allclose(f(0 * X), torch.zeros_like(X)), False),
    ],
)
def test_a_test_that_computes_the_answer_itself_is_seen(test, refused):
    assert bool(NO_SECOND.complaint(test)) == refused


X = torch.arange(1.0, 13, dtype=torch.float64).reshape(4, 3)
