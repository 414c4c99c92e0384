"""Chapter 3: products of Householder matrices, the WY representation and the UT transform."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from math import ceil, comb, log2

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms.householder import (
    householder_matrix,
    householder_product,
    pseudo_values,
    scaled_inverse,
    ut_transform,
    wy_recursion,
)
from dn_lib.teaching.registry import Equation

# ---- Inputs ----------------------------------------------------------------------------------------------


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _one(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A key of any length, and beta in (0, 2)."""
    return _randn(generator, _integer(generator, 2, 6)), 2 * _rand(generator)


def _one_and_x(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    k, beta = _one(generator)
    return k, beta, _randn(generator, len(k))


def _keys(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Between 3 and 9 keys, about as long as unit keys but not normalised, and beta in (0.1, 2)."""
    length, d = _integer(generator, 3, 9), _integer(generator, 2, 6)
    return _randn(generator, length, d) / d**0.5, 0.1 + 1.9 * _rand(generator, length)


def _keys_with_zeros(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    k, beta = _keys(generator)
    return k, beta * (torch.arange(len(beta)) % 3 > 0)


def _with_values(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, beta and an initial state."""
    k, beta = _keys(generator)
    d_v = _integer(generator, 2, 4)
    return k, _randn(generator, len(k), d_v), beta, _randn(generator, k.shape[-1], d_v)


def _unit_keys(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit keys, from independent to nearly equal, and beta in [0, 2], its ends included."""
    length, d = _integer(generator, 2, 24), _integer(generator, 2, 8)
    shared = _randn(generator, d) * 10 ** (2 * _rand(generator) - 1)
    k = normalize(_randn(generator, length, d) + shared, dim=-1)
    return k, (2.5 * _rand(generator, length) - 0.25).clamp(0, 2)


# ---- What several equations share ------------------------------------------------------------------------


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def _below(k: Tensor) -> Tensor:
    return (k @ k.mT).tril(-1)


def _ut(k: Tensor, beta: Tensor) -> Tensor:
    """T as eq-ut prints it."""
    return torch.linalg.inv(_eye(len(k)) + (torch.diag(beta) @ k @ k.mT).tril(-1)) @ torch.diag(beta)


def _n(k: Tensor, beta: Tensor) -> Tensor:
    """N as eq-scaled-inverse prints it."""
    B, D = _below(k), torch.diag(beta)
    return -torch.linalg.inv(_eye(len(k)) + B @ D) @ B


def _recursion(k: Tensor, x: Tensor, beta: Tensor, seen: Callable = lambda t, u, x, k: u[t]) -> Tensor:
    """u_t = beta_t (x_t - sum_{i<t} (k_t^T k_i) u_i); mutants sum something else than u_i."""
    u: list[Tensor] = []
    for t in range(len(k)):
        total = sum((torch.dot(k[t], k[i]) * seen(i, u, x, k) for i in range(t)), torch.zeros_like(x[t]))
        u.append(beta[t] * (x[t] - total))
    return torch.stack(u)


def _delta_state(k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    for t in range(len(k)):
        state = state - beta[t] * torch.outer(k[t], k[t] @ state) + beta[t] * torch.outer(k[t], v[t])
    return state


def _identity_minus(a: Tensor, b: Tensor) -> Tensor:
    """I - A^T B."""
    return _eye(a.shape[-1]) - a.mT @ b


def _multiplications(run: Callable[[Callable], object]) -> int:
    """How many scalar multiplications `run` asks of the matrix product that it is given."""
    counted = 0

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        nonlocal counted
        product = a @ b
        counted += product.numel() * a.shape[-1]
        return product

    run(matmul)
    return counted


def _count_ut(method: str) -> Callable[[Tensor, Tensor], int]:
    return lambda k, beta: _multiplications(lambda mm: ut_transform(k, beta, method=method, matmul=mm))


def _sized(*lengths: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Keys of one of the given lengths."""

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        length = lengths[_integer(generator, 0, len(lengths) - 1)]
        return _randn(generator, length, 4) / 4, _rand(generator, length)

    return sample


# ---- One matrix ------------------------------------------------------------------------------------------

HOUSEHOLDER = Equation(
    label="eq-householder-matrix",
    kind="definition",
    sample=_one,
    left=householder_matrix,
    right=lambda k, beta: _eye(len(k)) - beta * torch.outer(k, k),
    mutants={
        "adds instead of removing": lambda k, beta: _eye(len(k)) + beta * torch.outer(k, k),
        "beta dropped": lambda k, beta: _eye(len(k)) - torch.outer(k, k),
        "inner product for outer product": lambda k, beta: _eye(len(k)) * (1 - beta * k @ k),
        "beta squared": lambda k, beta: _eye(len(k)) - beta**2 * torch.outer(k, k),
    },
)


def _across(k: Tensor, x: Tensor) -> Tensor:
    """The part of x that is orthogonal to k."""
    return x - k * (k @ x) / (k @ k)


SPECTRUM = Equation(
    label="eq-householder-spectrum",
    kind="identity",
    sample=_one_and_x,
    left=lambda k, beta, x: (
        householder_matrix(k, beta) @ k,
        householder_matrix(k, beta) @ _across(k, x),
        torch.linalg.eigvalsh(householder_matrix(k, beta)),
    ),
    right=lambda k, beta, x, factor=None: (
        (1 - beta * k @ k if factor is None else factor) * k,
        _across(k, x),
        torch.tensor([1 - beta * k @ k if factor is None else factor] + [1.0] * (len(k) - 1), dtype=torch.float64)
        .sort()
        .values,
    ),
    mutants={
        "|k| for |k|^2, as printed in some sources": lambda k, beta, x: SPECTRUM.right(k, beta, x, 1 - beta * k.norm()),
        "|k| left out": lambda k, beta, x: SPECTRUM.right(k, beta, x, 1 - beta),
        "the eigenvalue of the part removed": lambda k, beta, x: SPECTRUM.right(k, beta, x, beta * k @ k),
        "always a reflection": lambda k, beta, x: SPECTRUM.right(k, beta, x, -1.0),
    },
)

LENGTH_LOST = Equation(
    label="eq-length-lost",
    kind="identity",
    sample=_one_and_x,
    left=lambda k, beta, x: (x - beta * k * (k @ x)).square().sum(),
    right=lambda k, beta, x: x @ x - beta * (2 - beta * k @ k) * (k @ x) ** 2,
    mutants={
        "the square of the difference without its middle term": lambda k, beta, x: (
            x @ x - beta**2 * (k @ k) * (k @ x) ** 2
        ),
        "unit key assumed": lambda k, beta, x: x @ x - beta * (2 - beta) * (k @ x) ** 2,
        "k^T x not squared": lambda k, beta, x: x @ x - beta * (2 - beta * k @ k) * (k @ x),
        "1 for 2": lambda k, beta, x: x @ x - beta * (1 - beta * k @ k) * (k @ x) ** 2,
    },
)


def _unit_keys_and_x(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    k, beta = _unit_keys(generator)
    return k, beta, _randn(generator, k.shape[-1])


CONTRACTION = Equation(
    label="eq-contraction",
    kind="bound",
    sample=_unit_keys_and_x,
    left=lambda k, beta, x: (householder_product(k, beta) @ x).norm(),
    right=lambda k, beta, x: x.norm(),
    mutants={
        "each step shrinks by |1 - beta| everywhere": lambda k, beta, x: x.norm() * (1 - beta).abs().prod(),
        "the last step alone": lambda k, beta, x: x.norm() * (1 - beta[-1]).abs(),
        "every product halves": lambda k, beta, x: x.norm() * 0.5,
        "by the sum of the betas": lambda k, beta, x: x.norm() / (1 + beta.sum()),
    },
    trials=30,
)

# ---- Products --------------------------------------------------------------------------------------------


def _one_and_state(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    k, beta = _one(generator)
    return k, beta, _randn(generator, len(k), len(k))


APPLY = Equation(
    label="eq-householder-apply",
    kind="identity",
    sample=_one_and_state,
    left=lambda k, beta, S: (_eye(len(k)) - beta * torch.outer(k, k)) @ S,
    right=lambda k, beta, S: S - beta * torch.outer(k, k @ S),
    mutants={
        "acts on the columns: S H": lambda k, beta, S: S - beta * torch.outer(S @ k, k),
        "S read with the wrong side": lambda k, beta, S: S - beta * torch.outer(k, S @ k),
        "beta dropped": lambda k, beta, S: S - torch.outer(k, k @ S),
        "adds": lambda k, beta, S: S + beta * torch.outer(k, k @ S),
    },
)


def _w_by_products(k: Tensor, beta: Tensor) -> Tensor:
    """Rows beta_t P_{t-1}^T k_t, each from a product multiplied out."""
    return torch.stack([beta[t] * householder_product(k[:t], beta[:t]).mT @ k[t] for t in range(len(k))])


WY_VECTORS = Equation(
    label="eq-wy-vectors",
    kind="identity",
    sample=_keys,
    left=_w_by_products,
    right=lambda k, beta: _recursion(k, k, beta),
    mutants={
        "sums keys, not w": lambda k, beta: _recursion(k, k, beta, lambda i, u, x, k: k[i]),
        "sums beta k, not w": lambda k, beta: _recursion(k, k, beta, lambda i, u, x, k: beta[i] * k[i]),
        "beta on the first term only": lambda k, beta: _recursion(k, beta[:, None] * k, torch.ones_like(beta)),
        "beta dropped": lambda k, beta: _recursion(k, k, torch.ones_like(beta)),
        "no correction: w = beta k": lambda k, beta: beta[:, None] * k,
        "correction added": lambda k, beta: _recursion(k, k, beta, lambda i, u, x, k: -u[i]),
    },
)

WY = Equation(
    label="eq-wy",
    kind="identity",
    sample=_keys,
    left=householder_product,
    right=lambda k, beta: _identity_minus(k, _recursion(k, k, beta)),
    mutants={
        "order reversed: I - W^T K": lambda k, beta: _identity_minus(_recursion(k, k, beta), k),
        "plus for minus": lambda k, beta: _eye(k.shape[-1]) + k.mT @ _recursion(k, k, beta),
        "keys used twice: I - K^T diag(beta) K": lambda k, beta: _identity_minus(k, beta[:, None] * k),
        "W for K and W: I - W^T W": lambda k, beta: _identity_minus(*[_recursion(k, k, beta)] * 2),
        "beta dropped from W": lambda k, beta: _identity_minus(k, _recursion(k, k, torch.ones_like(beta))),
        "time runs backwards": lambda k, beta: _identity_minus(k.flip(0), _recursion(k.flip(0), k.flip(0), beta)),
    },
)

WY_OTHER_ORDER = Equation(
    label="eq-wy-other-order",
    kind="identity",
    sample=_keys,
    left=lambda k, beta: torch.linalg.multi_dot([householder_matrix(a, b) for a, b in zip(k, beta, strict=True)]),
    right=lambda k, beta: _identity_minus(_recursion(k, k, beta), k),
    mutants={
        "order reversed: I - K^T W": lambda k, beta: _identity_minus(k, _recursion(k, k, beta)),
        "plus for minus": lambda k, beta: _eye(k.shape[-1]) + _recursion(k, k, beta).mT @ k,
        "W without correction": lambda k, beta: _identity_minus(beta[:, None] * k, k),
        "W of the reversed sequence": lambda k, beta: _identity_minus(
            _recursion(k.flip(0), k.flip(0), beta.flip(0)), k.flip(0)
        ),
    },
)


def _two_pieces(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    k, beta = _keys(generator)
    return k, beta, _integer(generator, 1, len(k) - 1)


def _merged_w(k: Tensor, beta: Tensor, m: int, second: Callable[..., Tensor]) -> Tensor:
    W1, W2 = wy_recursion(k[:m], beta[:m]), wy_recursion(k[m:], beta[m:])
    return torch.cat([W1, second(W1, W2, k[:m], k[m:])])


WY_MERGE = Equation(
    label="eq-wy-merge",
    kind="identity",
    sample=_two_pieces,
    left=lambda k, beta, m: wy_recursion(k, beta),
    right=lambda k, beta, m: _merged_w(k, beta, m, lambda W1, W2, K1, K2: W2 - W2 @ K1.mT @ W1),
    mutants={
        "pieces laid side by side": lambda k, beta, m: _merged_w(k, beta, m, lambda W1, W2, K1, K2: W2),
        "keys for W_2": lambda k, beta, m: _merged_w(k, beta, m, lambda W1, W2, K1, K2: W2 - K2 @ K1.mT @ W1),
        "W_1 and K_1 swapped": lambda k, beta, m: _merged_w(k, beta, m, lambda W1, W2, K1, K2: W2 - W2 @ W1.mT @ K1),
        "added": lambda k, beta, m: _merged_w(k, beta, m, lambda W1, W2, K1, K2: W2 + W2 @ K1.mT @ W1),
    },
)


def _state_from(k: Tensor, v: Tensor, beta: Tensor, S: Tensor, U: Tensor) -> Tensor:
    return householder_product(k, beta) @ S + k.mT @ U


PSEUDO_VALUES = Equation(
    label="eq-pseudo-values",
    kind="identity",
    sample=_with_values,
    left=_delta_state,
    right=lambda k, v, beta, S: _state_from(k, v, beta, S, _recursion(k, v, beta)),
    mutants={
        "values for pseudo-values": lambda k, v, beta, S: _state_from(k, v, beta, S, v),
        "values times beta": lambda k, v, beta, S: _state_from(k, v, beta, S, beta[:, None] * v),
        "sums values, not u": lambda k, v, beta, S: _state_from(
            k, v, beta, S, _recursion(k, v, beta, lambda i, u, x, k: v[i])
        ),
        "beta on the value only": lambda k, v, beta, S: _state_from(
            k, v, beta, S, _recursion(k, beta[:, None] * v, torch.ones_like(beta))
        ),
        "correction added": lambda k, v, beta, S: _state_from(
            k, v, beta, S, _recursion(k, v, beta, lambda i, u, x, k: -u[i])
        ),
        "initial state not transported": lambda k, v, beta, S: S + k.mT @ _recursion(k, v, beta),
        "initial state dropped": lambda k, v, beta, S: k.mT @ _recursion(k, v, beta),
    },
)

# ---- The UT transform ------------------------------------------------------------------------------------


def _w_and_u(T: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return T @ k, T @ v


UT = Equation(
    label="eq-ut",
    kind="identity",
    sample=_with_values,
    left=lambda k, v, beta, S: (wy_recursion(k, beta), pseudo_values(k, v, beta)),
    right=lambda k, v, beta, S: _w_and_u(_ut(k, beta), k, v),
    mutants={
        "last factor diag(beta) left out": lambda k, v, beta, S: _w_and_u(
            torch.linalg.inv(_eye(len(k)) + (beta[:, None] * k @ k.mT).tril(-1)), k, v
        ),
        "beta scales columns": lambda k, v, beta, S: _w_and_u(
            torch.linalg.inv(_eye(len(k)) + (k @ k.mT * beta).tril(-1)) @ torch.diag(beta), k, v
        ),
        "diagonal included": lambda k, v, beta, S: _w_and_u(
            torch.linalg.inv(_eye(len(k)) + (beta[:, None] * k @ k.mT).tril()) @ torch.diag(beta), k, v
        ),
        "upper triangle": lambda k, v, beta, S: _w_and_u(
            torch.linalg.inv(_eye(len(k)) + (beta[:, None] * k @ k.mT).triu(1)) @ torch.diag(beta), k, v
        ),
        "minus for plus": lambda k, v, beta, S: _w_and_u(
            torch.linalg.inv(_eye(len(k)) - (beta[:, None] * k @ k.mT).tril(-1)) @ torch.diag(beta), k, v
        ),
        "first order only: (I - A) diag(beta)": lambda k, v, beta, S: _w_and_u(
            (_eye(len(k)) - (beta[:, None] * k @ k.mT).tril(-1)) @ torch.diag(beta), k, v
        ),
        "not inverted": lambda k, v, beta, S: _w_and_u(
            (_eye(len(k)) + (beta[:, None] * k @ k.mT).tril(-1)) @ torch.diag(beta), k, v
        ),
    },
)


def _rows(k: Tensor, beta: Tensor, before: Callable[..., Tensor], first: Callable[..., Tensor]) -> Tensor:
    """Rows T_i = first(i) - beta_i sum_{j<i} (k_i^T k_j) before(j)."""
    rows: list[Tensor] = []
    for i in range(len(k)):
        row = first(i).clone()
        for j in range(i):
            row = row - beta[i] * (k[i] @ k[j]) * before(j, rows)
        rows.append(row)
    return torch.stack(rows)


UT_ROW = Equation(
    label="eq-ut-row",
    kind="identity",
    sample=_keys,
    left=_ut,
    right=lambda k, beta: _rows(k, beta, lambda j, T: T[j], lambda i: beta[i] * _eye(len(k))[i]),
    mutants={
        "identity's row j for row j of T: first order only": lambda k, beta: _rows(
            k, beta, lambda j, T: _eye(len(k))[j], lambda i: beta[i] * _eye(len(k))[i]
        ),
        "identity's row not scaled": lambda k, beta: _rows(k, beta, lambda j, T: T[j], lambda i: _eye(len(k))[i]),
        "beta_j twice": lambda k, beta: _rows(
            k, beta, lambda j, T: beta[j] * T[j], lambda i: beta[i] * _eye(len(k))[i]
        ),
        "added": lambda k, beta: _rows(k, beta, lambda j, T: -T[j], lambda i: beta[i] * _eye(len(k))[i]),
    },
)

UT_PUSH = Equation(
    label="eq-ut-push",
    kind="identity",
    sample=_keys_with_zeros,
    left=_ut,
    right=lambda k, beta: torch.diag(beta) @ torch.linalg.inv(_eye(len(k)) + _below(k) @ torch.diag(beta)),
    mutants={
        "D not moved inside": lambda k, beta: (
            torch.diag(beta) @ torch.linalg.inv(_eye(len(k)) + torch.diag(beta) @ _below(k))
        ),
        "D on the right of it": lambda k, beta: (
            torch.linalg.inv(_eye(len(k)) + _below(k) @ torch.diag(beta)) @ torch.diag(beta)
        ),
        "D dropped inside": lambda k, beta: torch.diag(beta) @ torch.linalg.inv(_eye(len(k)) + _below(k)),
        "transposed": lambda k, beta: UT_PUSH.right(k, beta).mT,
    },
)

COMPACT = Equation(
    label="eq-compact",
    kind="identity",
    sample=_keys,
    left=lambda k, beta: torch.linalg.inv(_ut(k, beta)),
    right=lambda k, beta: torch.diag(1 / beta) + _below(k),
    mutants={
        "beta for 1/beta": lambda k, beta: torch.diag(beta) + _below(k),
        "identity for diag(1/beta)": lambda k, beta: _eye(len(k)) + _below(k),
        "beta left on the rows": lambda k, beta: torch.diag(1 / beta) + beta[:, None] * _below(k),
        "diagonal included": lambda k, beta: torch.diag(1 / beta) + (k @ k.mT).tril(),
        "upper triangle": lambda k, beta: torch.diag(1 / beta) + _below(k).mT,
    },
)

SUBSTITUTION_COST = Equation(
    label="eq-substitution-cost",
    kind="count",
    sample=_sized(1, 2, 3, 5, 8, 16, 33),
    left=_count_ut("substitution"),
    right=lambda k, beta: len(k) * (len(k) - 1) * (2 * len(k) - 1) // 6,
    mutants={
        "quadratic: the cost of one right-hand side": lambda k, beta: len(k) * (len(k) - 1) // 2,
        "a full product": lambda k, beta: len(k) ** 3,
        "squares up to C^2, not (C-1)^2": lambda k, beta: len(k) * (len(k) + 1) * (2 * len(k) + 1) // 6,
    },
)

# ---- Doubling --------------------------------------------------------------------------------------------


def _doubled(k: Tensor, beta: Tensor, sign: int = -1, factors: int | None = None, step: int = 2) -> Tensor:
    """The product of I + (sign A)^(step^m) over m < factors."""
    B = sign * (beta[:, None] * _below(k))
    factors = ceil(log2(len(k))) if factors is None else factors
    total = _eye(len(k))
    for m in range(factors):
        total = total @ (_eye(len(k)) + torch.linalg.matrix_power(B, step**m))
    return total


DOUBLING = Equation(
    label="eq-doubling",
    kind="identity",
    sample=_keys,
    left=lambda k, beta: torch.linalg.inv(_eye(len(k)) + beta[:, None] * _below(k)),
    right=_doubled,
    mutants={
        "every sign plus": lambda k, beta: _doubled(k, beta, sign=1),
        "one factor short": lambda k, beta: _doubled(k, beta, factors=ceil(log2(len(k))) - 1),
        "a minus in every factor": lambda k, beta: torch.linalg.multi_dot(
            [
                _eye(len(k)) - torch.linalg.matrix_power(beta[:, None] * _below(k), 2**m)
                for m in range(ceil(log2(len(k))))
            ]
        ),
        "exponents 1, 3, 9": lambda k, beta: _doubled(k, beta, step=3),
    },
)

DOUBLING_COST = Equation(
    label="eq-doubling-cost",
    kind="count",
    sample=_sized(2, 3, 4, 7, 8, 9, 16, 31, 32),
    left=_count_ut("doubling"),
    right=lambda k, beta: 2 * (ceil(log2(len(k))) - 1) * len(k) ** 3,
    mutants={
        "squarings only": lambda k, beta: (ceil(log2(len(k))) - 1) * len(k) ** 3,
        "one product a power: a Neumann series": lambda k, beta: (len(k) - 2) * len(k) ** 3,
        "the first factor counted too": lambda k, beta: 2 * ceil(log2(len(k))) * len(k) ** 3,
    },
)


def _identical(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    length = _integer(generator, 3, 12)
    k = normalize(_randn(generator, 1, 5), dim=-1).expand(length, 5)
    return k, 2 * _rand(generator), _integer(generator, 1, length - 1)


def _binomials(length: int, entry: Callable[[int], float]) -> Tensor:
    """A Toeplitz matrix with entry(i - j) below the diagonal."""
    return torch.tensor(
        [[entry(i - j) if i > j else 0.0 for j in range(length)] for i in range(length)], dtype=torch.float64
    )


POWERS = Equation(
    label="eq-powers",
    kind="identity",
    sample=_identical,
    left=lambda k, beta, n: torch.linalg.matrix_power(beta * _below(k), n),
    right=lambda k, beta, n: beta**n * _binomials(len(k), lambda gap: comb(gap - 1, n - 1)),
    mutants={
        "binomial of n, not n - 1": lambda k, beta, n: beta**n * _binomials(len(k), lambda gap: comb(gap - 1, n)),
        "end points may repeat": lambda k, beta, n: beta**n * _binomials(len(k), lambda gap: comb(gap, n - 1)),
        "beta once": lambda k, beta, n: beta * _binomials(len(k), lambda gap: comb(gap - 1, n - 1)),
        "one path only": lambda k, beta, n: beta**n * _binomials(len(k), lambda gap: float(gap >= n)),
    },
)

# ---- N ---------------------------------------------------------------------------------------------------


def _d_plus_dnd(N: Tensor, beta: Tensor) -> Tensor:
    return torch.diag(beta) + torch.diag(beta) @ N @ torch.diag(beta)


def _n_pushed(k: Tensor, beta: Tensor) -> Tensor:
    """N by the second form of eq-scaled-inverse."""
    return -_below(k) @ torch.linalg.inv(_eye(len(k)) + torch.diag(beta) @ _below(k))


SCALED_INVERSE = Equation(
    label="eq-scaled-inverse",
    kind="identity",
    sample=_keys_with_zeros,
    # Left: T from its definition, and N as it falls out of the derivation, -B + B T B, once for each form.
    left=lambda k, beta: (_ut(k, beta), *[_below(k) @ _ut(k, beta) @ _below(k) - _below(k)] * 2),
    right=lambda k, beta: (_d_plus_dnd(_n(k, beta), beta), _n(k, beta), _n_pushed(k, beta)),
    mutants={
        "D on the wrong side, first form": lambda k, beta: (
            _d_plus_dnd(-torch.linalg.inv(_eye(len(k)) + torch.diag(beta) @ _below(k)) @ _below(k), beta),
            -torch.linalg.inv(_eye(len(k)) + torch.diag(beta) @ _below(k)) @ _below(k),
            _n_pushed(k, beta),
        ),
        "D on the wrong side, second form": lambda k, beta: (
            *SCALED_INVERSE.right(k, beta)[:2],
            -_below(k) @ torch.linalg.inv(_eye(len(k)) + _below(k) @ torch.diag(beta)),
        ),
        "sign of N": lambda k, beta: (
            _d_plus_dnd(-_n(k, beta), beta),
            -_n(k, beta),
            -_n_pushed(k, beta),
        ),
        "N = -B, the first order": lambda k, beta: (_d_plus_dnd(-_below(k), beta), -_below(k), -_below(k)),
        "D once": lambda k, beta: (
            torch.diag(beta) @ (_eye(len(k)) + _n(k, beta)),
            *SCALED_INVERSE.right(k, beta)[1:],
        ),
        "identity for the first D": lambda k, beta: (
            _d_plus_dnd(_n(k, beta), beta) - torch.diag(beta) + _eye(len(k)),
            *SCALED_INVERSE.right(k, beta)[1:],
        ),
    },
)


def _path_sum(
    k: Tensor, beta: Tensor, inner: Tensor, end: float = 0.0, sign: int = -1, longest: int | None = None
) -> Tensor:
    """N by eq-paths: every path from j to i, edges `sign` k^T k, `inner` betas at stops and beta**end at both ends."""
    N = torch.zeros(len(k), len(k), dtype=torch.float64)
    for i in range(len(k)):
        for j in range(i):
            for count in range(i - j if longest is None else min(longest, i - j)):
                for stops in combinations(range(j + 1, i), count):
                    value = (beta[i] * beta[j]) ** end * inner[list(stops)].prod()
                    for a, b in pairwise((j, *stops, i)):
                        value = value * sign * torch.dot(k[b], k[a])
                    N[i, j] += value
    return N


def _few_keys(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Up to 7 keys, since the number of paths doubles with each; beta in (0.1, 2)."""
    k, beta = _keys(generator)
    return k[:7], beta[:7]


PATHS = Equation(
    label="eq-paths",
    kind="identity",
    sample=_few_keys,
    # Left: T as eq-ut prints it, off the diagonal and without the betas of its ends.
    left=lambda k, beta: _ut(k, beta).tril(-1) / beta[:, None] / beta,
    right=lambda k, beta: _path_sum(k, beta, beta),
    mutants={
        "betas of the ends counted": lambda k, beta: _path_sum(k, beta, beta, end=1.0),
        "betas of the stops left out": lambda k, beta: _path_sum(k, beta, torch.ones_like(beta)),
        "edges without their minus": lambda k, beta: _path_sum(k, beta, beta, sign=1),
        "direct edges only": lambda k, beta: _path_sum(k, beta, beta, longest=1),
        "at most one stop": lambda k, beta: _path_sum(k, beta, beta, longest=2),
    },
)


def _n_by_entries(k: Tensor, beta: Tensor, first: int, last: int, sign: int = -1, back: bool = False) -> Tensor:
    """Entry (i, j) is sign k_i^T (product of the H_t with j + first <= t < i + last) k_j."""
    N = torch.zeros(len(k), len(k), dtype=torch.float64)
    for i in range(len(k)):
        for j in range(i):
            between = slice(j + first, i + last)
            product = householder_product(k[between], beta[between])
            N[i, j] = sign * k[i] @ (product.mT if back else product) @ k[j]
    return N


N_ENTRIES = Equation(
    label="eq-n-entries",
    kind="identity",
    sample=_keys_with_zeros,
    left=_n,
    right=lambda k, beta: _n_by_entries(k, beta, 1, 0),
    mutants={
        "the write's own H_j included": lambda k, beta: _n_by_entries(k, beta, 0, 0),
        "the reader's own H_i included": lambda k, beta: _n_by_entries(k, beta, 1, 1),
        "product ascending": lambda k, beta: _n_by_entries(k, beta, 1, 0, back=True),
        "sign": lambda k, beta: _n_by_entries(k, beta, 1, 0, sign=1),
        "no product: -k_i^T k_j": lambda k, beta: -_below(k),
    },
)


def _ones_below(k: Tensor) -> Tensor:
    return torch.ones(len(k), len(k), dtype=torch.float64).tril(-1)


def _lengths_between(k: Tensor, beta: Tensor, first: int = 1) -> Tensor:
    """Entry (i, j) is |k_i| |H_{i-1} ... H_{j+first} k_j|, below the diagonal."""
    lengths = torch.zeros(len(k), len(k), dtype=torch.float64)
    for j in range(len(k)):
        x = k[j]
        for i in range(j + first, len(k)):
            if i > j:
                lengths[i, j] = k[i].norm() * x.norm()
            x = x - beta[i] * k[i] * (k[i] @ x)
    return lengths


N_BOUND = Equation(
    label="eq-n-bound",
    kind="bound",
    sample=_unit_keys,
    left=lambda k, beta: (scaled_inverse(k, beta).abs(), _lengths_between(k, beta)),
    right=lambda k, beta: (_lengths_between(k, beta), _ones_below(k)),
    mutants={
        "by the cosine of the two keys": lambda k, beta: (_below(k).abs(), _ones_below(k)),
        "by a half": lambda k, beta: (_lengths_between(k, beta), 0.5 * _ones_below(k)),
        "by the reader's beta": lambda k, beta: (_lengths_between(k, beta), beta[:, None] * _ones_below(k)),
        "by the writer's beta": lambda k, beta: (_lengths_between(k, beta), beta[None, :] * _ones_below(k)),
        "by the length after the write's own step too": lambda k, beta: (
            _lengths_between(k, beta, 0),
            _ones_below(k),
        ),
    },
    trials=40,
)


def _errors_seen(k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """Row t is v_t - S_{t-1}^T k_t, from the recurrence."""
    errors = []
    for t in range(len(k)):
        errors.append(v[t] - k[t] @ state)
        state = state + beta[t] * torch.outer(k[t], errors[-1])
    return torch.stack(errors)


def _sample_errors(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v, beta, S = _with_values(generator)
    return k, v, beta * (torch.arange(len(beta)) % 3 > 0), S


N_ERROR = Equation(
    label="eq-n-error",
    kind="identity",
    sample=_sample_errors,
    left=_errors_seen,
    right=lambda k, v, beta, S: (v - k @ S) + _n(k, beta) @ (beta[:, None] * (v - k @ S)),
    mutants={
        "initial state forgotten": lambda k, v, beta, S: v + _n(k, beta) @ (beta[:, None] * v),
        "the error before any write": lambda k, v, beta, S: v - k @ S,
        "beta forgotten": lambda k, v, beta, S: (v - k @ S) + _n(k, beta) @ (v - k @ S),
        "beta on the reader's side": lambda k, v, beta, S: (v - k @ S) + beta[:, None] * (_n(k, beta) @ (v - k @ S)),
        "the pseudo-value, not the error": lambda k, v, beta, S: beta[:, None] * N_ERROR.right(k, v, beta, S),
    },
)


def _corner(k: Tensor, beta: Tensor, m: int, formula: Callable[..., Tensor]) -> Tensor:
    """`formula(N11, N22, B21, D1, D2)` on the two halves."""
    N11, N22 = _n(k[:m], beta[:m]), _n(k[m:], beta[m:])
    return formula(N11, N22, k[m:] @ k[:m].mT, torch.diag(beta[:m]), torch.diag(beta[m:]))


def _merge_formula(N11: Tensor, N22: Tensor, B21: Tensor, D1: Tensor, D2: Tensor) -> Tensor:
    return -(_eye(len(D2)) + N22 @ D2) @ B21 @ (_eye(len(D1)) + D1 @ N11)


N_BLOCKED = Equation(
    label="eq-n-blocked",
    kind="identity",
    sample=_two_pieces,
    left=lambda k, beta, m: _n(k, beta)[m:, :m],
    right=lambda k, beta, m: _corner(k, beta, m, _merge_formula),
    mutants={
        "D on the outer sides": lambda k, beta, m: _corner(
            k,
            beta,
            m,
            lambda N11, N22, B21, D1, D2: -(_eye(len(D2)) + D2 @ N22) @ B21 @ (_eye(len(D1)) + N11 @ D1),
        ),
        "identities left out": lambda k, beta, m: _corner(
            k, beta, m, lambda N11, N22, B21, D1, D2: -N22 @ D2 @ B21 @ D1 @ N11
        ),
        "D left out": lambda k, beta, m: _corner(
            k,
            beta,
            m,
            lambda N11, N22, B21, D1, D2: _merge_formula(N11, N22, B21, _eye(len(D1)), _eye(len(D2))),
        ),
        "sign": lambda k, beta, m: -N_BLOCKED.right(k, beta, m),
        "inverse blocks subtracted": lambda k, beta, m: _corner(
            k, beta, m, lambda N11, N22, B21, D1, D2: _merge_formula(-N11, -N22, B21, D1, D2)
        ),
        "only the sum of first orders": lambda k, beta, m: _corner(
            k, beta, m, lambda N11, N22, B21, D1, D2: -(B21 + N22 @ D2 @ B21 + B21 @ D1 @ N11)
        ),
    },
)


def _by_levels(k: Tensor, beta: Tensor, level: Callable[..., Tensor], mask: Callable[..., Tensor]) -> Tensor:
    """N from zero, through the levels s = 1, 2, 4, ..."""
    N, D, index, s = (
        torch.zeros(len(k), len(k), dtype=torch.float64),
        torch.diag(beta),
        torch.arange(len(k)),
        1,
    )
    while s < len(k):
        block = index // s
        N, s = level(N, _below(k) * mask(block[:, None], block[None, :]), D, _eye(len(k))), 2 * s
    return N


def _level(N: Tensor, B_s: Tensor, D: Tensor, eye: Tensor) -> Tensor:
    return N - (eye + N @ D) @ B_s @ (eye + D @ N)


def _lower_left(i: Tensor, j: Tensor) -> Tensor:
    return (i % 2 == 1) & (i == j + 1)


N_LEVEL = Equation(
    label="eq-n-level",
    kind="identity",
    sample=_keys_with_zeros,
    left=_n,
    right=lambda k, beta: _by_levels(k, beta, _level, _lower_left),
    mutants={
        "every neighbouring pair of blocks": lambda k, beta: _by_levels(k, beta, _level, lambda i, j: i == j + 1),
        "all that lies below the blocks": lambda k, beta: _by_levels(k, beta, _level, lambda i, j: i > j),
        "added": lambda k, beta: _by_levels(
            k, beta, lambda N, B_s, D, eye: N + (eye + N @ D) @ B_s @ (eye + D @ N), _lower_left
        ),
        "D on the outer sides": lambda k, beta: _by_levels(
            k, beta, lambda N, B_s, D, eye: N - (eye + D @ N) @ B_s @ (eye + N @ D), _lower_left
        ),
        "old blocks thrown away": lambda k, beta: _by_levels(
            k, beta, lambda N, B_s, D, eye: -(eye + N @ D) @ B_s @ (eye + D @ N), _lower_left
        ),
    },
)

BLOCKED_COST = Equation(
    label="eq-blocked-cost",
    kind="count",
    sample=_sized(1, 2, 4, 8, 16, 32),
    left=_count_ut("blocked"),
    right=lambda k, beta: len(k) * (len(k) ** 2 - 1) // 3,
    mutants={
        "whole matrices at every level": lambda k, beta: 2 * len(k) ** 3 * ceil(log2(len(k))),
        "the last merge only": lambda k, beta: len(k) ** 3 // 4,
        "one product a merge": lambda k, beta: len(k) * (len(k) ** 2 - 1) // 6,
    },
)

ENTRIES = [
    HOUSEHOLDER,
    SPECTRUM,
    LENGTH_LOST,
    CONTRACTION,
    APPLY,
    WY_VECTORS,
    WY,
    WY_OTHER_ORDER,
    PSEUDO_VALUES,
    WY_MERGE,
    UT,
    UT_PUSH,
    COMPACT,
    PATHS,
    UT_ROW,
    SUBSTITUTION_COST,
    DOUBLING,
    DOUBLING_COST,
    POWERS,
    SCALED_INVERSE,
    N_ENTRIES,
    N_BOUND,
    N_ERROR,
    N_BLOCKED,
    N_LEVEL,
    BLOCKED_COST,
]
