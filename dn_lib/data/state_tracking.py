"""State tracking: tasks whose answer depends on every token so far (chapter 2).

`parity` and `modular_arithmetic` are two of the tasks of Grazzi et al. (2025), `permutation_composition` is the word
problem of the symmetric groups, on which Siems et al. (2025) ask how many delta steps a token needs.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dn_lib.data.recall import IGNORE


def parity(n: int, length: int, *, p: float = 0.5, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw `n` sequences of bits and their running parities.

    Bits are 1 with probability `p`.  The label at position t is the sum of the bits up to and including t,
    modulo 2.
    Returns `(bits, labels)`, both int64 of shape `[n, length]`, on the CPU.
    Raises ValueError if `n` or `length` is negative or `p` is no probability.

    >>> bits, labels = parity(1, 5, p=1.0)
    >>> bits.tolist(), labels.tolist()
    ([[1, 1, 1, 1, 1]], [[1, 0, 1, 0, 1]])
    """
    if n < 0 or length < 0:
        raise ValueError(f"n and length must be at least 0, got n={n}, length={length}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    bits = (torch.rand(n, length, generator=generator) < p).long()
    return bits, bits.cumsum(1) % 2


def modular_arithmetic(
    n: int, length: int, *, modulus: int = 5, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw `n` expressions without brackets, and the value of each of their beginnings.

    An expression is `number operator number operator ...`.  Numbers are the tokens 0 to `modulus` - 1; the operators
    +, - and * are the tokens `modulus`, `modulus` + 1 and `modulus` + 2; all are drawn uniformly.  A product binds
    closer than a sum.  The label at a number is the value, modulo `modulus`, of the expression that ends there; the
    label at an operator is -100.
    Returns `(tokens, labels)`, both int64 of shape `[n, length]`, on the CPU.
    Raises ValueError if `n` or `length` is negative or `modulus` is below 2.

    >>> tokens, labels = modular_arithmetic(3, 7)
    >>> tokens.shape, labels[:, 1::2].unique().tolist()
    (torch.Size([3, 7]), [-100])
    """
    if n < 0 or length < 0:
        raise ValueError(f"n and length must be at least 0, got n={n}, length={length}")
    if modulus < 2:
        raise ValueError(f"modulus must be at least 2, got {modulus}")
    numbers = torch.randint(modulus, (n, (length + 1) // 2), generator=generator)
    operators = torch.randint(3, (n, length // 2), generator=generator)
    tokens = torch.empty(n, length, dtype=torch.long)
    tokens[:, 0::2], tokens[:, 1::2] = numbers, modulus + operators

    labels = torch.full_like(tokens, IGNORE)
    total, term = torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.long)
    for i, number in enumerate(numbers.unbind(1)):
        # The running product belongs to the sum only once the next operator is no product.
        plus_minus_times = operators[:, i - 1] if i else torch.zeros(n, dtype=torch.long)
        times = plus_minus_times == 2
        total = torch.where(times, total, (total + term) % modulus) if i else total
        sign = torch.where(plus_minus_times == 1, -1, 1)
        term = torch.where(times, term * number, sign * number) % modulus
        labels[:, 2 * i] = (total + term) % modulus
    return tokens, labels


def permutations_of(degree: int) -> Tensor:
    """All permutations of 0, ..., degree - 1 in the order of the dictionary: int64 `[degree!, degree]`.

    Row g has the images: g maps i to `permutations_of(degree)[g, i]`.  Row 0 is the identity.
    Raises ValueError unless 2 <= degree <= 6.

    >>> permutations_of(3).tolist()
    [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    """
    if not 2 <= degree <= 6:
        raise ValueError(f"degree must be from 2 to 6, got {degree}")
    return torch.tensor(list(itertools.permutations(range(degree))))


def composition_table(degree: int) -> Tensor:
    """Which row of `permutations_of` is g after h (first h, then g): int64 `[degree!, degree!]` at [g, h].

    >>> composition_table(3)[1, 2].item()  # first swap 0 and 1, then 1 and 2: 0 -> 1 -> 2, 1 -> 0, 2 -> 1
    4
    """
    images = permutations_of(degree)
    products = images[:, images]  # [g, h, i] = g(h(i))
    place = degree ** torch.arange(degree - 1, -1, -1)
    row_of = torch.full((degree**degree,), -1)
    row_of[(images * place).sum(1)] = torch.arange(math.factorial(degree))
    return row_of[(products * place).sum(2)]


def permutation_composition(
    n: int, length: int, degree: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw `n` sequences of permutations and the product so far: the word problem of the symmetric group S_degree.

    Tokens are rows of `permutations_of(degree)`, drawn uniformly.  The label at position t is the row of
    g_t g_(t-1) ... g_1, g_1 applied first.
    Returns `(tokens, labels)`, both int64 of shape `[n, length]`, on the CPU.
    Raises ValueError if `n` or `length` is negative or `degree` is not from 2 to 6.

    >>> tokens, labels = permutation_composition(2, 5, 3)
    >>> bool((labels[:, 0] == tokens[:, 0]).all()), int(labels.max()) < 6
    (True, True)
    """
    if n < 0 or length < 0:
        raise ValueError(f"n and length must be at least 0, got n={n}, length={length}")
    table = composition_table(degree)
    tokens = torch.randint(len(table), (n, length), generator=generator)
    labels, product = torch.empty_like(tokens), torch.zeros(n, dtype=torch.long)
    for t in range(length):
        product = table[tokens[:, t], product]
        labels[:, t] = product
    return tokens, labels
