"""Associative recall: store pairs, be asked for them later (chapter 2).

`multi_query_associative_recall` draws the task of Arora et al. (2024, "Zoology"), on which the DeltaNet
paper compares memories; `correlated_keys` draws keys that interfere by a known amount.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not scored (the value that `torch.nn.functional.cross_entropy` skips)."""


def multi_query_associative_recall(
    n: int,
    length: int,
    pairs: int,
    *,
    vocab: int = 8192,
    power: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw `n` examples of multi-query associative recall (MQAR).

    An example starts with `k1 v1 k2 v2 ...`: keys drawn without replacement from `{1, ..., vocab/2 - 1}`,
    values from `{vocab/2, ..., vocab - 1}`.  Then every key is asked for once, at position
    `2 pairs + 2 gap`, with gaps drawn without replacement from `{0, ..., space - 1}`, where
    `space = (length - 2 pairs) // 2` and gap g - 1 has probability proportional to `power * g**(power - 1)`:
    most queries come early.  The label there is the key's value.  Every other label is -100, and the
    filler between queries is token 0.

    Returns `(tokens, labels)`, both int64 of shape `[n, length]`, on the generator's device (the CPU for None).
    Raises ValueError unless `4 pairs <= length`, `vocab` is even and has `pairs` keys, and `power` is positive.
    Source: Arora et al. (2024), as facts of the generator that they publish.

    >>> tokens, labels = multi_query_associative_recall(2, 16, 4, vocab=32)
    >>> tokens.shape, int((labels != -100).sum())
    (torch.Size([2, 16]), 8)
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if pairs < 1 or 4 * pairs > length:
        raise ValueError(f"length must be at least 4 * pairs = {4 * pairs} with pairs >= 1, got {length}")
    if vocab % 2 or vocab // 2 - 1 < pairs:
        raise ValueError(f"vocab must be even and at least 2 * (pairs + 1) = {2 * pairs + 2}, got {vocab}")
    if not 0 < power < float("inf"):
        raise ValueError(f"power must be positive and finite, got {power}")
    half, space = vocab // 2, (length - 2 * pairs) // 2
    device = "cpu" if generator is None else generator.device
    # The positions of the largest of i.i.d. uniforms are a draw without replacement.
    keys = 1 + torch.rand(n, half - 1, generator=generator, device=device).topk(pairs, dim=1).indices
    values = half + torch.rand(n, half, generator=generator, device=device).topk(pairs, dim=1).indices
    weights = power * torch.arange(1, space + 1, dtype=torch.float64, device=device) ** (power - 1)
    gaps = torch.multinomial(weights.expand(max(n, 1), -1), pairs, generator=generator)[:n]

    tokens = torch.zeros(n, length, dtype=torch.long, device=device)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    labels = torch.full_like(tokens, IGNORE)
    tokens.scatter_(1, 2 * pairs + 2 * gaps, keys)
    labels.scatter_(1, 2 * pairs + 2 * gaps, values)
    return tokens, labels


def recall_with_updates(
    n: int, pairs: int, *, vocab: int = 64, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw `n` examples of recall in which every key is written twice and only the newest value counts.

    Tokens are those of `multi_query_associative_recall`.  An example is `pairs` key-value pairs, then the
    same keys in another order with new values, then all keys in a third order: 6 * pairs tokens.  The label
    at a query is the key's second value; every other label is -100.
    Returns `(tokens, labels)`, both int64 of shape `[n, 6 * pairs]`, on the CPU.
    Raises ValueError unless `vocab` is even and has `pairs` keys and `2 * pairs` values.

    >>> tokens, labels = recall_with_updates(2, 4, vocab=32)
    >>> tokens.shape, int((labels != -100).sum())
    (torch.Size([2, 24]), 8)
    """
    if n < 0 or pairs < 1:
        raise ValueError(f"n must be at least 0 and pairs at least 1, got n={n}, pairs={pairs}")
    if vocab % 2 or vocab // 2 < 2 * pairs:
        raise ValueError(f"vocab must be even and at least 4 * pairs = {4 * pairs}, got {vocab}")
    half = vocab // 2
    keys = 1 + torch.rand(n, half - 1, generator=generator).topk(pairs, dim=1).indices
    values = half + torch.rand(n, half, generator=generator).topk(2 * pairs, dim=1).indices
    second, third = (torch.rand(n, pairs, generator=generator).argsort(1) for _ in range(2))
    newest = torch.empty_like(keys).scatter_(1, second, values[:, pairs:])

    tokens = torch.zeros(n, 6 * pairs, dtype=torch.long)
    tokens[:, 0 : 4 * pairs : 2] = torch.cat([keys, keys.gather(1, second)], dim=1)
    tokens[:, 1 : 4 * pairs : 2] = values
    tokens[:, 4 * pairs :: 2] = keys.gather(1, third)
    labels = torch.full_like(tokens, IGNORE)
    labels[:, 4 * pairs :: 2] = newest.gather(1, third)
    return tokens, labels


def correlated_keys(
    n: int,
    d: int,
    cosine: float,
    *,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`n` unit keys `[n, d]`, any two of which have inner product `cosine`, in a random position.

    k_i = sqrt(c) u + sqrt(1 - c) e_i for orthonormal u, e_1, ..., e_n.
    Raises ValueError unless `0 <= cosine <= 1` and `n < d`.

    >>> K = correlated_keys(3, 8, 0.5, dtype=torch.float64)
    >>> bool(((K @ K.T) - (0.5 + 0.5 * torch.eye(3))).abs().max() < 1e-12)
    True
    """
    if not 0 <= cosine <= 1:
        raise ValueError(f"cosine must be in [0, 1], got {cosine}")
    if not 0 < n < d:
        raise ValueError(f"n must be positive and below d = {d} (n + 1 orthonormal vectors), got {n}")
    basis = torch.linalg.qr(torch.randn(d, n + 1, dtype=torch.float64, generator=generator)).Q.mT
    return (cosine**0.5 * basis[:1] + (1 - cosine) ** 0.5 * basis[1:]).to(dtype)
