"""Equations of study 2, in its order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms.delta_product import permutation_steps, recurrent_delta_product, swaps_of, token_matrix
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.least_squares import recursive_least_squares
from dn_lib.teaching.registry import Equation

DOUBLE = torch.float64


# Inputs ------------------------------------------------------------------------------------------------
def _randint(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=DOUBLE)


def _unit(generator: torch.Generator, *shape: int) -> Tensor:
    return normalize(_randn(generator, *shape), dim=-1)


def _eye(d: int) -> Tensor:
    return torch.eye(d, dtype=DOUBLE)


def _householder(k: Tensor, beta: Tensor | float) -> Tensor:
    return _eye(len(k)) - beta * torch.outer(k, k)


# Several steps per token -------------------------------------------------------------------------------
def _steps(generator: torch.Generator) -> tuple:
    length, steps, d_k, d_v = (_randint(generator, low, high) for low, high in ((2, 6), (2, 4), (2, 5), (2, 4)))
    k, v = _unit(generator, length, steps, d_k), _randn(generator, length, steps, d_v)
    return _randn(generator, length, d_k), k, v, 2 * _rand(generator, length, steps), _randn(generator, d_k, d_v)


def _written_out(q, k, v, beta, S, *, order=1, read="last", keep=True):
    outputs = []
    for t in range(len(q)):
        o = q[t] @ S
        for j in list(range(k.shape[1]))[::order]:
            S = (_householder(k[t, j], beta[t, j]) if keep else _eye(k.shape[2])) @ S
            S = S + beta[t, j] * torch.outer(k[t, j], v[t, j])
            o = q[t] @ S if read == "last" or (read == "first" and j == 0) else o
        outputs.append(o)
    return torch.stack(outputs), S


delta_product = Equation(
    label="eq-delta-product",
    kind="definition",
    sample=_steps,
    left=lambda q, k, v, beta, S: recurrent_delta_product(q, k, v, beta, scale=1.0, initial_state=S),
    right=_written_out,
    mutants={
        "steps of a token in the reverse order": lambda *x: _written_out(*x, order=-1),
        "read after the first step": lambda *x: _written_out(*x, read="first"),
        "read before the token": lambda *x: _written_out(*x, read="before"),
        "nothing erased": lambda *x: _written_out(*x, keep=False),
    },
)


def _two_places(generator: torch.Generator) -> tuple:
    d = _randint(generator, 2, 6)
    places = torch.randperm(d, generator=generator)[:2].tolist()
    return d, *places


def _swap_key(d: int, i: int, j: int, sign: float = -1.0, size: float = 0.5**0.5) -> Tensor:
    k = torch.zeros(d, dtype=DOUBLE)
    k[i], k[j] = size, sign * size
    return k


def _rows_swapped(d: int, i: int, j: int) -> Tensor:
    order = list(range(d))
    order[i], order[j] = j, i
    return _eye(d)[order]


swap = Equation(
    label="eq-swap",
    kind="identity",
    sample=_two_places,
    left=_rows_swapped,
    right=lambda d, i, j: _householder(_swap_key(d, i, j), 2.0),
    mutants={
        "the sum of the two axes": lambda d, i, j: _householder(_swap_key(d, i, j, sign=1.0), 2.0),
        "beta of 1": lambda d, i, j: _householder(_swap_key(d, i, j), 1.0),
        "key not of length 1": lambda d, i, j: _householder(_swap_key(d, i, j, size=1.0), 2.0),
        "one axis alone": lambda d, i, j: _householder(_eye(d)[i], 2.0),
    },
)


def _permutation(generator: torch.Generator) -> tuple:
    return (torch.randperm(_randint(generator, 2, 7), generator=generator).tolist(),)


def _cycles(permutation: list[int], fixed: bool = True) -> int:
    seen, found = set[int](), 0
    for start in range(len(permutation)):
        if start not in seen and (fixed or permutation[start] != start):
            found += 1
        while start not in seen:
            seen.add(start)
            start = permutation[start]
    return found


def _count_of_steps(permutation: list[int]) -> tuple[int, int]:
    """By the swaps that the library makes, and by the rank of what the permutation changes."""
    k, beta = permutation_steps(torch.tensor(permutation))
    M = token_matrix(k, beta)
    return len(swaps_of(permutation)), int(torch.linalg.matrix_rank(M - _eye(len(permutation))))


def _twice(count: Callable[[list[int]], int]) -> Callable[[list[int]], tuple[int, int]]:
    return lambda permutation: (count(permutation), count(permutation))


fewest_steps = Equation(
    label="eq-fewest-steps",
    kind="count",
    sample=_permutation,
    left=_count_of_steps,
    right=_twice(lambda p: len(p) - _cycles(p)),
    mutants={
        "as many as entries move": _twice(lambda p: sum(i != x for i, x in enumerate(p))),
        "cycles of length 1 not counted": _twice(lambda p: len(p) - _cycles(p, fixed=False)),
        "always d - 1": _twice(lambda p: len(p) - 1),
        "as many as cycles": _twice(lambda p: _cycles(p, fixed=False)),
    },
    trials=20,
)


def _product(generator: torch.Generator) -> tuple:
    """Up to as many steps as dimensions; some repeat a key or a beta of 0, so that the rank is smaller."""
    d = _randint(generator, 2, 7)
    steps = _randint(generator, 1, d)
    k, beta = _unit(generator, steps, d), 2 * _rand(generator, steps)
    if _randint(generator, 0, 3) == 0:
        beta[-1] = 0
    return k, torch.where(_rand(generator, steps) < 0.3, 2.0, beta)


rank_of_steps = Equation(
    label="eq-rank-of-steps",
    kind="bound",
    sample=_product,
    left=lambda k, beta: int(torch.linalg.matrix_rank(token_matrix(k, beta) - _eye(k.shape[1]), atol=1e-9)),
    right=lambda k, beta: len(k),
    mutants={
        "one fewer": lambda k, beta: len(k) - 1,
        "one, however many steps": lambda k, beta: 1,
        "half the dimension": lambda k, beta: k.shape[1] / 2,
    },
    trials=40,
)


# What an open range loses ------------------------------------------------------------------------------
def _states(generator: torch.Generator) -> tuple:
    count, d_k, d_v = _randint(generator, 2, 6), _randint(generator, 2, 5), _randint(generator, 1, 4)
    return (
        _randn(generator, count, d_k, d_v),
        _unit(generator, d_k),
        _randn(generator, d_v),
        2 * _rand(generator, 1)[0],
    )


def _spread(S: Tensor) -> Tensor:
    """The sum of |S_a - S_b|^2 over all pairs."""
    return (S[:, None] - S).square().sum() / 2


def _after(S: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    one = k[None].expand(len(S), 1, -1)
    v, beta = v[None].expand(len(S), 1, -1), beta[None].expand(len(S), 1)
    return _spread(recurrent_delta_rule(one, one, v, beta, initial_state=S)[1])


def _lost(S: Tensor, k: Tensor, beta: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    answers = k @ S
    return _spread(S) - factor(beta) * (answers[:, None] - answers).square().sum() / 2


spread_lost = Equation(
    label="eq-spread-lost",
    kind="identity",
    sample=_states,
    left=_after,
    right=lambda S, k, v, beta: _lost(S, k, beta, lambda b: b * (2 - b)),
    mutants={
        "nothing is lost": lambda S, k, v, beta: _spread(S),
        "beta in the place of beta (2 - beta)": lambda S, k, v, beta: _lost(S, k, beta, lambda b: b),
        "beta (1 - beta)": lambda S, k, v, beta: _lost(S, k, beta, lambda b: b * (1 - b)),
        "the value counts, too": lambda S, k, v, beta: _lost(S, k, beta, lambda b: b * (2 - b)) + v.square().sum(),
    },
)

reach = Equation(
    label="eq-reach",
    kind="identity",
    sample=lambda generator: (2 * _randn(generator, 1)[0], _randint(generator, 1, 9)),
    # A memory of one number that is reflected n times by a layer's beta.
    left=lambda z, n: recurrent_delta_rule(
        torch.ones(n, 1, dtype=DOUBLE),
        torch.ones(n, 1, dtype=DOUBLE),
        torch.zeros(n, 1, dtype=DOUBLE),
        (2 * z.sigmoid()).expand(n),
        initial_state=torch.ones(1, 1, dtype=DOUBLE),
    )[1][0, 0],
    right=lambda z, n: (-(z / 2).tanh()) ** n,
    mutants={
        "tanh of z": lambda z, n: (-z.tanh()) ** n,
        "sign forgotten": lambda z, n: (z / 2).tanh() ** n if n % 2 else -((z / 2).tanh() ** n),
        "one step, however many tokens": lambda z, n: -(z / 2).tanh() * torch.ones(()) if n > 1 else z,
        "sigmoid": lambda z, n: z.sigmoid() ** n,
    },
    trials=20,
)


# RWKV-7 ------------------------------------------------------------------------------------------------
def _erasing(generator: torch.Generator) -> tuple:
    d = _randint(generator, 2, 5)
    return 0.3 + 0.7 * _rand(generator, d), _rand(generator, d), _unit(generator, d)


rwkv_determinant = Equation(
    label="eq-rwkv-determinant",
    kind="identity",
    sample=_erasing,
    left=lambda w, a, kappa: torch.linalg.det(torch.diag(w) - torch.outer(a * kappa, kappa)),
    right=lambda w, a, kappa: w.prod() * (1 - (a * kappa**2 / w).sum()),
    mutants={
        "not divided by the decay": lambda w, a, kappa: w.prod() * (1 - (a * kappa**2).sum()),
        "the decay left out": lambda w, a, kappa: 1 - (a * kappa**2 / w).sum(),
        "kappa not squared": lambda w, a, kappa: w.prod() * (1 - (a * kappa / w).sum()),
    },
)


# Least squares -----------------------------------------------------------------------------------------
def _pairs(generator: torch.Generator) -> tuple:
    length, d_k, d_v = _randint(generator, 2, 9), _randint(generator, 2, 5), _randint(generator, 1, 4)
    k, v = _randn(generator, length, d_k), _randn(generator, length, d_v)
    return k, v, 0.1 + _rand(generator, length), 0.2 + _rand(generator, 1)[0]


def _minimiser(k: Tensor, v: Tensor, beta: Tensor, ridge: Tensor) -> Tensor:
    weighted = beta[:, None] * k
    return torch.linalg.solve(k.mT @ weighted + ridge * _eye(k.shape[1]), weighted.mT @ v)


def _recursion(k, v, beta, ridge, *, follow=True, start="ridge", weigh=True, old=False):
    S, P = torch.zeros(k.shape[1], v.shape[1], dtype=DOUBLE), _eye(k.shape[1]) / (ridge if start == "ridge" else 1)
    for k_t, v_t, b in zip(k, v, beta, strict=True):
        new = P - torch.outer(P @ k_t, P @ k_t) / (1 / b + k_t @ P @ k_t)
        gain = (b if weigh else 1) * (P if old else new) @ k_t
        S = S + torch.outer(gain, v_t - S.mT @ k_t)
        P = new if follow else P
    return S


recursive = Equation(
    label="eq-recursive-least-squares",
    kind="identity",
    sample=_pairs,
    left=_minimiser,
    right=_recursion,
    mutants={
        "P never changes: the delta rule": lambda *x: _recursion(*x, follow=False, old=True),
        "the old P in the gain": lambda *x: _recursion(*x, old=True),
        "beta dropped from the gain": lambda *x: _recursion(*x, weigh=False),
        "P starts at the identity": lambda *x: _recursion(*x, start="identity"),
    },
    tolerance=1e-9,
)


def _erased(k: Tensor, v: Tensor, beta: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of I - h k^T in the library's recursion, at its last write: the smallest, then the largest."""
    one = k[None, :-1], v[None, :-1], beta[None, :-1]
    _, (_, P) = recursive_least_squares(one[0], *one, ridge=float(ridge))
    return P[0], k[-1]


def _eigenvalues(k, v, beta, ridge):
    P, key = _erased(k, v, beta, ridge)
    after = torch.linalg.inv(torch.linalg.inv(P) + beta[-1] * torch.outer(key, key))
    values = torch.linalg.eigvals(_eye(len(key)) - beta[-1] * torch.outer(after @ key, key))
    return values.real.min(), values.real.max(), values.imag.abs().max()


def _shrinks(form: Callable[[Tensor, Tensor], Tensor], k: Tensor, v: Tensor, beta: Tensor, ridge: Tensor):
    P, key = _erased(k, v, beta, ridge)
    return form(beta[-1], key @ P @ key), torch.ones((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)


gain_eigenvalue = Equation(
    label="eq-gain-eigenvalue",
    kind="identity",
    sample=_pairs,
    left=_eigenvalues,
    right=lambda *x: _shrinks(lambda b, p: 1 / (1 + b * p), *x),
    mutants={
        "that of the delta rule with P for I": lambda *x: _shrinks(lambda b, p: 1 - b * p, *x),
        "beta left out": lambda *x: _shrinks(lambda b, p: 1 / (1 + p), *x),
        "the other part": lambda *x: _shrinks(lambda b, p: b * p / (1 + b * p), *x),
    },
    tolerance=1e-7,  # eigenvalues of a matrix that is not symmetric, of which all but one are equal
)


def _again(generator: torch.Generator) -> tuple:
    d_k, d_v = _randint(generator, 2, 5), _randint(generator, 1, 4)
    numbers = _rand(generator, 2)
    return _unit(generator, d_k), _randn(generator, d_v), numbers[0], 0.2 + numbers[1], _randint(generator, 1, 9)


def _answer_by(rule: str, k: Tensor, v: Tensor, beta: Tensor, ridge: Tensor, n: int) -> Tensor:
    keys, values, betas = k.expand(n, -1), v.expand(n, -1), beta.expand(n)
    if rule == "delta":
        return recurrent_delta_rule(keys, keys, values, betas)[1].mT @ k
    return recursive_least_squares(keys, keys, values, betas, ridge=float(ridge))[1][0].mT @ k


repeated_key = Equation(
    label="eq-repeated-key",
    kind="identity",
    sample=_again,
    left=lambda *x: (_answer_by("delta", *x), _answer_by("squares", *x)),
    right=lambda k, v, beta, ridge, n: ((1 - (1 - beta) ** n) * v, (1 - ridge / (ridge + n * beta)) * v),
    mutants={
        "both fall by powers": lambda k, v, beta, ridge, n: (
            (1 - (1 - beta) ** n) * v,
            (1 - (ridge / (ridge + beta)) ** (n + 1)) * v,
        ),
        "the number of writes left out": lambda k, v, beta, ridge, n: (
            (1 - (1 - beta)) * v / n,
            (1 - ridge / (ridge + beta)) * v,
        ),
        "the ridge left out": lambda k, v, beta, ridge, n: ((1 - (1 - beta) ** n) * v, v),
    },
)

ENTRIES = [
    delta_product,
    spread_lost,
    reach,
    swap,
    fewest_steps,
    rank_of_steps,
    rwkv_determinant,
    recursive,
    gain_eigenvalue,
    repeated_key,
]
