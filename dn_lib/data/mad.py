"""The six synthetic tasks of MAD (Poli et al. 2024), with which the DeltaNet paper compares layers.

Each function draws `n` examples and returns `Examples`.  Sizes have the defaults of the benchmark's baseline; the
benchmark changes one at a time.  Where the public description leaves something open (which token is the blank, say),
the docstring says what is done here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dn_lib.data.recall import IGNORE


class Examples(NamedTuple):
    """Sequences and what is asked about them.

    tokens: int64 `[n, L]`.
    labels: int64, what is to be predicted: `[n, L]` at the position of the same index (`[n, L - 1]`, every token
        but the last from the last position alone, in `compression`); -100 where nothing is learned.
    scored: bool, shaped as `labels`: which labels count for the accuracy.  The others are learned from only.
    """

    tokens: Tensor
    labels: Tensor
    scored: Tensor


def in_context_recall(
    n: int, length: int = 128, vocab: int = 16, *, generator: torch.Generator | None = None
) -> Examples:
    """Pairs `key value key value ...` under one map per sequence: what did this key stand for?

    Keys are drawn from {0, ..., vocab/2 - 1}, with replacement.  Each sequence has a map of its own from keys to values
    in {vocab/2, ..., vocab - 1}.  Labels are the next tokens; scored are the values of keys that have come before.
    Raises ValueError unless `length` and `vocab` are even and at least 2.  Source: Poli et al. (2024).

    >>> x = in_context_recall(2, 8, 4)
    >>> bool((x.labels[:, :-1] == x.tokens[:, 1:]).all()), x.scored[:, 1::2].any().item()
    (True, False)
    """
    return noisy_recall(n, length, vocab, noise_tokens=0, p=0.0, generator=generator)


def noisy_recall(
    n: int,
    length: int = 128,
    vocab: int = 32,
    *,
    noise_tokens: int = 16,
    p: float = 0.2,
    generator: torch.Generator | None = None,
) -> Examples:
    """In-context recall in which a pair is, with probability `p`, replaced by two tokens of noise.

    The last `noise_tokens` tokens of `vocab` are noise; of the others, the lower half are keys.  Labels are the next
    tokens; scored are the values of keys that have come before.
    Raises ValueError unless `length` and `vocab - noise_tokens` are even and at least 2, and `p` is a probability
    (0 without noise tokens).  Source: Poli et al. (2024).

    >>> x = noisy_recall(2, 8)
    >>> x.tokens.shape, x.labels[:, -1].tolist()
    (torch.Size([2, 8]), [-100, -100])
    """
    _check_count(n)
    _check_even("length", length)
    words = vocab - noise_tokens
    _check_even("vocab - noise_tokens", words)
    if not 0 <= p <= 1 or (noise_tokens < 1 and p > 0):
        raise ValueError(f"p must be in [0, 1], and 0 without noise tokens, got {p}")
    half, pairs = words // 2, length // 2
    keys = torch.randint(half, (n, pairs), generator=generator)
    values = torch.randint(half, words, (n, half), generator=generator).gather(1, keys)
    quiet = torch.ones(n, pairs, dtype=torch.bool)
    if noise_tokens:
        noise = torch.randint(words, vocab, (2, n, pairs), generator=generator)
        quiet = torch.rand(n, pairs, generator=generator) >= p
        keys, values = torch.where(quiet, keys, noise[0]), torch.where(quiet, values, noise[1])
    tokens = torch.stack([keys, values], dim=2).flatten(1)
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    scored[:, 0::2] = quiet & ~_first_of_its_kind(keys)
    return Examples(tokens, _next_tokens(tokens), scored)


def fuzzy_recall(
    n: int,
    length: int = 128,
    vocab: int = 16,
    *,
    motif: int = 3,
    shortest_key: int = 1,
    generator: torch.Generator | None = None,
) -> Examples:
    """In-context recall whose keys and values are motifs of several tokens.

    A motif has `shortest_key` (keys) or 1 (values) to `motif` tokens, its length drawn uniformly, its tokens without
    replacement.  Token `vocab - 1` is padding, the lower half of the others are for keys.  Pairs are drawn one after
    another until no more fit; the last repeats the key of one before it, drawn uniformly (the probe).  Padding fills
    the left.  Labels are the next tokens; scored are all tokens of the values of keys that have come before.
    The test of the benchmark has keys of full length: `shortest_key = motif`.
    Raises ValueError unless 1 <= shortest_key <= motif <= 3, vocab gives `motif` tokens to either kind, and two pairs
    of 2 * `motif` tokens fit into `length`.  Source: Poli et al. (2024).

    >>> x = fuzzy_recall(2, 24)
    >>> x.tokens.shape, bool(x.scored.any(1).all())
    (torch.Size([2, 24]), True)
    """
    _check_count(n)
    if not 1 <= shortest_key <= motif <= 3:
        raise ValueError(f"motif must be at most 3, and shortest_key from 1 to motif, got {motif} and {shortest_key}")
    if (vocab - 1) // 2 < motif:
        raise ValueError(f"vocab must be at least {2 * motif + 1}, got {vocab}")
    if length < 4 * motif:
        raise ValueError(f"length must be at least 4 * motif = {4 * motif}, got {length}")
    half, slots = (vocab - 1) // 2, length // (1 + shortest_key)
    keys, key_sizes = _motifs(n, slots, 0, half, shortest_key, motif, generator)
    values, value_sizes = _motifs(n, slots, half, vocab - 1, 1, motif, generator)
    # Equal keys of a sequence share the value of the first of them.
    place = (half + 1) ** torch.arange(3)
    codes = (keys.masked_fill(torch.arange(3) >= key_sizes[..., None], -1) + 1) @ place
    kind = _first_index_of_kind(codes)
    values, value_sizes = values.gather(1, kind[..., None].expand_as(values)), value_sizes.gather(1, kind)

    # Slot 0 stands next to the probe, slot 1 to its left, and so on.
    ends = (key_sizes + value_sizes).cumsum(1)
    surely = (ends <= length - 2 * motif).sum(1)  # so many fit however long the probe is
    source = (torch.rand(n, generator=generator, dtype=torch.float64) * surely).long()[:, None]
    with_probe = [
        torch.cat([x.gather(1, source.view(n, 1, *[1] * (x.ndim - 2)).expand(n, 1, *x.shape[2:])), x], dim=1)
        for x in (keys, key_sizes, values, value_sizes, codes)
    ]
    keys, key_sizes, values, value_sizes, codes = with_probe
    begins = length - (key_sizes + value_sizes).cumsum(1)
    fits = begins >= 0
    # In reading order the last slot comes first: a key is new where no later slot that fits has it.
    codes = torch.where(fits, codes, -1 - torch.arange(slots + 1))
    repeated = fits & ~_first_of_its_kind(codes.flip(1)).flip(1)

    tokens = torch.full((n, length + 1), vocab - 1)
    scored = torch.zeros(n, length + 1, dtype=torch.bool)
    for i in range(motif):
        in_key, in_value = fits & (i < key_sizes), fits & (i < value_sizes)
        tokens.scatter_(1, torch.where(in_key, begins + i, length), keys[..., i])
        at = torch.where(in_value, begins + key_sizes + i, length)
        tokens.scatter_(1, at, values[..., i])
        scored.scatter_(1, torch.where(in_value & repeated, at - 1, length), True)
    tokens, scored = tokens[:, :length], scored[:, :length]
    return Examples(tokens, _next_tokens(tokens).masked_fill(tokens == vocab - 1, IGNORE), scored)


def selective_copying(
    n: int, length: int = 256, vocab: int = 16, *, copied: int = 16, generator: torch.Generator | None = None
) -> Examples:
    """Tokens scattered among blanks, a token that asks for them, and as many blanks, to be filled in their order.

    Token `vocab - 1` asks, `vocab - 2` is the blank, the others are copied; their places are drawn without replacement
    from the first `length - copied - 1` positions.  The label of the i-th of the last blanks is the i-th token.
    Raises ValueError unless vocab >= 3, copied >= 1 and length >= 2 copied + 1.  Source: Poli et al. (2024).

    >>> x = selective_copying(1, 9, 4, copied=2)
    >>> x.tokens[0, 6:].tolist(), int((x.labels != -100).sum())
    ([3, 2, 2], 2)
    """
    _check_count(n)
    if vocab < 3:
        raise ValueError(f"vocab must be at least 3, got {vocab}")
    if copied < 1 or length < 2 * copied + 1:
        raise ValueError(f"length must be at least 2 * copied + 1 with copied >= 1, got {length} and {copied}")
    room = length - copied - 1
    content = torch.randint(vocab - 2, (n, copied), generator=generator)
    places = torch.rand(n, room, generator=generator).topk(copied, dim=1).indices.sort(1).values
    tokens = torch.full((n, length), vocab - 2)
    tokens.scatter_(1, places, content)
    tokens[:, room] = vocab - 1
    labels = torch.full_like(tokens, IGNORE)
    labels[:, room + 1 :] = content
    return Examples(tokens, labels, labels != IGNORE)


def compression(n: int, length: int = 32, vocab: int = 16, *, generator: torch.Generator | None = None) -> Examples:
    """Random tokens, then one that asks to have them all packed into the vector at its position.

    Token `vocab - 1` asks, the `length` tokens before it are drawn uniformly from the others.  tokens is
    `[n, length + 1]`, labels `[n, length]`: the tokens again, each to be decoded from the last vector and its place.
    Raises ValueError unless length >= 1 and vocab >= 2.  Source: Poli et al. (2024).

    >>> x = compression(2, 4)
    >>> bool((x.labels == x.tokens[:, :-1]).all()), x.tokens[:, -1].tolist()
    (True, [15, 15])
    """
    _check_count(n)
    if length < 1 or vocab < 2:
        raise ValueError(f"length must be at least 1 and vocab at least 2, got {length} and {vocab}")
    content = torch.randint(vocab - 1, (n, length), generator=generator)
    asked = torch.full((n, 1), vocab - 1)
    return Examples(torch.cat([content, asked], dim=1), content, torch.ones(n, length, dtype=torch.bool))


def facts_to_memorise(vocab: int = 256, *, generator: torch.Generator | None = None) -> Tensor:
    """The value of each key, drawn once for all examples: int64 `[(vocab - 1) // 2]`, see `memorisation`.

    Raises ValueError unless vocab >= 3.

    >>> facts_to_memorise(8).shape
    torch.Size([3])
    """
    if vocab < 3:
        raise ValueError(f"vocab must be at least 3, got {vocab}")
    keys = (vocab - 1) // 2
    return torch.randint(keys, vocab - 1, (keys,), generator=generator)


def memorisation(
    n: int, facts: Tensor, length: int = 32, vocab: int = 256, *, generator: torch.Generator | None = None
) -> Examples:
    """Keys whose values are the same in all examples, and never shown: they have to be learned by heart.

    A sequence is `key ? key ? ...`, where ? is the token `vocab - 1` and keys are drawn uniformly from
    {0, ..., (vocab - 1) // 2 - 1}.  The label at a ? is `facts[key]`, all others are -100.
    Raises ValueError unless `length` is even and at least 2 and `facts` is `[(vocab - 1) // 2]`.
    Source: Poli et al. (2024).

    >>> x = memorisation(2, facts_to_memorise(8), 4, 8)
    >>> x.tokens[:, 1::2].tolist(), x.scored[0].tolist()
    ([[7, 7], [7, 7]], [False, True, False, True])
    """
    _check_count(n)
    _check_even("length", length)
    if facts.shape != ((vocab - 1) // 2,):
        raise ValueError(f"facts must be [(vocab - 1) // 2] = [{(vocab - 1) // 2}], got {list(facts.shape)}")
    keys = torch.randint(len(facts), (n, length // 2), generator=generator)
    tokens = torch.full((n, length), vocab - 1)
    tokens[:, 0::2] = keys
    labels = torch.full_like(tokens, IGNORE)
    labels[:, 1::2] = facts[keys]
    return Examples(tokens, labels, labels != IGNORE)


# --- Parts ------------------------------------------------------------------------------------------------------------


def _check_count(n: int) -> None:
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")


def _check_even(name: str, value: int) -> None:
    if value < 2 or value % 2:
        raise ValueError(f"{name} must be even and at least 2, got {value}")


def _next_tokens(tokens: Tensor) -> Tensor:
    """Labels: the token after each, -100 after the last."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], dim=1)


def _first_index_of_kind(x: Tensor) -> Tensor:
    """`[n, m]` -> the first index in its row at which the same value stands, `[n, m]`."""
    values, order = x.sort(dim=1, stable=True)
    new = torch.ones_like(values, dtype=torch.bool)
    new[:, 1:] = values[:, 1:] != values[:, :-1]
    start = torch.where(new, torch.arange(x.shape[1]), 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, start))


def _first_of_its_kind(x: Tensor) -> Tensor:
    """Whether no equal value stands before in the row, `[n, m]`."""
    return _first_index_of_kind(x) == torch.arange(x.shape[1])


def _motifs(
    n: int, slots: int, low: int, high: int, shortest: int, longest: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Three different tokens of {low, ..., high - 1} each, `[n, slots, 3]`, and how many of them count `[n, slots]`.

    Where there are two tokens to choose from, the third is none; it is not counted either.
    """
    count = high - low
    sizes = torch.randint(shortest, longest + 1, (n, slots), generator=generator)
    a, b, c = (torch.randint(max(count - i, 1), (n, slots), generator=generator) for i in range(3))
    # b is the b-th of what is left without a, c the c-th without both.
    b = b + (b >= a)
    first, second = torch.minimum(a, b), torch.maximum(a, b)
    c = c + (c >= first)
    c = c + (c >= second)
    return low + torch.stack([a, b, c], dim=2), sizes
