"""State tracking: tasks whose answer depends on every token so far (chapter 2)."""

from __future__ import annotations

import torch
from torch import Tensor


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
