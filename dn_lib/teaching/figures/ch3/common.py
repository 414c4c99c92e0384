"""Inputs that several figures and cells of chapter 3 share."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.teaching import plotting

DELTA = plotting.MECHANISMS["delta"]["color"]  # what the delta rule does to a thing
SOFT = "0.55"  # helping lines
# Ways to compute one matrix are no mechanisms: they take the colours that no mechanism has.
METHODS: dict[str, dict[str, Any]] = dict(
    zip(("substitution", "solve", "blocked", "doubling"), plotting.STYLES[4:8], strict=True)
)
METHODS["merged T"] = {"color": "0.4", "marker": "v", "linestyle": (0, (3, 1, 1, 1))}
NAMES = {"blocked": "merging $N$", "merged T": "merging $T$"}  # a method, as figures call it

Point = tuple[float, float]
Path = tuple[int, ...]  # tokens, counted from 0, in the order of time


# ---- Inputs that several figures and cells share ---------------------------------------------------------
def correlated_keys(length: int, d: int, cosine: float, seed: int = 0) -> Tensor:
    """`length` unit keys `[length, d]` in float64, with this mean cosine between two of them.

    They are a shared direction plus random noise orthogonal to it, so that single pairs lie around the mean; a cosine
    of 1 makes them identical.

    >>> k = correlated_keys(3, 5, 1.0)
    >>> bool((k @ k.mT - 1).abs().max() < 1e-12)
    True
    """
    generator = torch.Generator().manual_seed(seed)
    shared = normalize(torch.randn(1, d, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.randn(length, d, generator=generator, dtype=torch.float64)
    noise = normalize(noise - (noise @ shared.mT) * shared, dim=-1)
    return cosine**0.5 * shared + (1 - cosine) ** 0.5 * noise


def paths(i: int, j: int) -> list[Path]:
    """All ways to go from token j to a later token i, stopping at any of the tokens between; the shortest first.

    >>> paths(3, 1)
    [(1, 3), (1, 2, 3)]
    """
    between = range(j + 1, i)
    return [(j, *stops, i) for count in range(len(between) + 1) for stops in combinations(between, count)]


def weight(path: Path, k: Tensor, beta: Tensor) -> float:
    """The product of -k_i^T k_m over the edges of `path`, and of beta over its inner tokens.

    >>> weight((0, 1, 2), torch.ones(3, 1), torch.tensor([1.0, 0.5, 1.0]))
    0.5
    """
    value = torch.ones((), dtype=k.dtype)
    for a, b in pairwise(path):
        value = value * -(k[b] @ k[a])
    for inner in path[1:-1]:
        value = value * beta[inner]
    return value.item()
