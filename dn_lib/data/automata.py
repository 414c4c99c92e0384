"""RegBench (Akyurek et al. 2024): learn a regular language in context, from some of its words.

Every example is a language of its own: a random automaton and words that it accepts.  Whoever reads them can tell more
and more of its states and transitions apart, and so which letters may come next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dn_lib.data.recall import IGNORE

LETTERS = 18
BAR, STOP = 18, 19  # what stands between words, and after the last
VOCAB = 20
MOST_STATES = 12
LONGEST_WORD = 49
MOST_WORDS = 19


class Languages(NamedTuple):
    """Examples of RegBench.

    tokens: int64 `[n, L]`; letters are 0 to 17, 18 is the bar between words, 19 ends the last word and fills up.
    labels: int64 `[n, L]`, the next token where that is a letter, else -100.
    legal: int64 `[n, L]`, a set of letters as bits: bit a says that letter a may come next.  0 where the label is -100.
    edges: int64 `[n, 12, 18]`, the automata.
    """

    tokens: Tensor
    labels: Tensor
    legal: Tensor
    edges: Tensor


def random_automata(n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw `n` automata: int64 edges `[n, 12, 18]`, the state that letter a leads to from state s, or -1.

    Of each, the number of states is uniform in 4, ..., 12 and the size of its alphabet in 4, ..., 18, a random set of
    letters.  A state has one to three edges, with letters and targets drawn without replacement, none to itself.
    State 0 is the start; all states accept.  Raises ValueError if n is negative.

    >>> edges = random_automata(5)
    >>> edges.shape, bool(((edges >= 0).sum(2)[:, 0] >= 1).all())
    (torch.Size([5, 12, 18]), True)
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    states = torch.randint(4, MOST_STATES + 1, (n, 1), generator=generator)
    alphabet_size = torch.randint(4, LETTERS + 1, (n, 1), generator=generator)
    alphabet = torch.rand(n, LETTERS, generator=generator).argsort(1).argsort(1) < alphabet_size
    degree = torch.randint(1, 4, (n, MOST_STATES), generator=generator)

    numbers = torch.arange(MOST_STATES)
    exists = numbers < states
    may_lead = exists[:, None, :] & (numbers[:, None] != numbers)
    noise = torch.rand(n, MOST_STATES, MOST_STATES, generator=generator)
    targets = noise.masked_fill(~may_lead, -1).topk(3, dim=2).indices
    noise = torch.rand(n, MOST_STATES, LETTERS, generator=generator)
    letters = noise.masked_fill(~alphabet[:, None, :], -1).topk(3, dim=2).indices
    there = exists[..., None] & (torch.arange(3) < degree[..., None])
    edges = torch.full((n, MOST_STATES, LETTERS + 1), -1)
    edges.scatter_(2, torch.where(there, letters, LETTERS), targets)
    return edges[..., :LETTERS]


def state_numbers(edges: Tensor) -> Tensor:
    """A number for what each state accepts, int64 `[n, 12]`: equal where, and only where, two states accept the same.

    The coarsest partition is refined until the states of any two automata are told apart, which takes at most as many
    rounds as both have states (Moore 1956).  The parts are named by hashes of 64 bits, so that states of different
    automata can be compared: of a million states, two different ones share a number with probability below 1e-6.

    >>> edges = torch.full((1, 12, 18), -1)
    >>> edges[0, 0, 0], edges[0, 1, 0] = 1, 0  # two states, one letter: both accept any number of it
    >>> len(state_numbers(edges)[0, :2].unique())
    1
    """
    mix = torch.Generator().manual_seed(20)
    factors = torch.randint(-(2**62), 2**62, (2, LETTERS), generator=mix) | 1
    numbers = torch.zeros(edges.shape[:2], dtype=torch.long)
    there = edges >= 0
    for _ in range(2 * MOST_STATES):
        reached = numbers.gather(1, edges.clamp(min=0).flatten(1)).view_as(edges)
        seen = _scrambled(reached * factors[0] + factors[1])
        numbers = _scrambled((seen * there).sum(2))
    return numbers


def _scrambled(x: Tensor) -> Tensor:
    """A permutation of the 64-bit numbers that leaves no pattern: the finaliser of MurmurHash3 (Appleby 2011)."""
    low = 2**31 - 1  # a signed shift fills with the sign, which the method wants to be zeros
    for factor in (-49064778989728563, -4265267296055464877):
        x = (x ^ (x >> 33 & low)) * factor
    return x ^ (x >> 33 & low)


def minimal_sizes(edges: Tensor) -> Tensor:
    """How many states the smallest automaton for the language of each has: int64 `[n]`.

    States that no word leads to are left out, and those that accept the same are one.

    >>> edges = torch.full((1, 12, 18), -1)
    >>> edges[0, 0, 0], edges[0, 1, 0], edges[0, 2, 1] = 1, 0, 0  # state 2 is never reached
    >>> minimal_sizes(edges).tolist()
    [1]
    """
    n = len(edges)
    reached = torch.zeros(n, MOST_STATES + 1, dtype=torch.bool)
    reached[:, 0] = True
    for _ in range(MOST_STATES):
        from_here = torch.where(reached[:, :-1, None] & (edges >= 0), edges, MOST_STATES)
        reached.scatter_(1, from_here.flatten(1), True)
    numbers = state_numbers(edges)
    same = (numbers[:, :, None] == numbers[:, None, :]).tril(-1)
    doubled = (same & reached[:, None, :-1]).any(2)
    return (reached[:, :-1] & ~doubled).sum(1)


def regular_languages(n: int, *, generator: torch.Generator | None = None) -> Languages:
    """Draw `n` examples, no two of the same language.

    An example has 10 to 19 words of 1 to 49 letters, both uniform.  A word is a walk from the start of the automaton
    (`random_automata`), each edge of a state equally likely.  Words are joined by the bar, and the last is followed by
    the end token, up to 950 tokens in all.  Merging states that accept the same, or leaving out those that are never
    reached, would not change what is drawn, so the automata are not minimised; `minimal_sizes` says how small they
    could be.  Languages are held apart by `state_numbers` of their start.
    Returns `Languages` on the CPU.  Raises ValueError if n is negative.  Source: Akyurek et al. (2024).

    >>> x = regular_languages(2)
    >>> x.tokens.shape, x.tokens.max().item()
    (torch.Size([2, 950]), 19)
    """
    edges = _distinct(n, generator)
    count = torch.randint(10, MOST_WORDS + 1, (n, 1), generator=generator)
    sizes = torch.randint(1, LONGEST_WORD + 1, (n, MOST_WORDS), generator=generator)
    sizes = sizes * (torch.arange(MOST_WORDS) < count)

    length = MOST_WORDS * (LONGEST_WORD + 1)
    begins = (sizes + 1).cumsum(1) - (sizes + 1)
    tokens, states = torch.full((2, n, length + 1), 0).unbind(0)
    tokens.fill_(STOP)
    edge_letters = (edges >= 0).long() * torch.arange(1, LETTERS + 1)  # 1 + letter where there is an edge, else 0
    edge_letters = edge_letters.sort(dim=2, descending=True).values[..., :3] - 1
    degree = (edge_letters >= 0).sum(2)
    rows = torch.arange(n)[:, None]
    state = torch.zeros(n, MOST_WORDS, dtype=torch.long)
    for t in range(LONGEST_WORD):
        degree_here = degree[rows, state]
        choice = (torch.rand(n, MOST_WORDS, generator=generator, dtype=torch.float64) * degree_here).long()
        letter = edge_letters[rows, state, choice]
        state = edges[rows, state, letter]
        at = torch.where(t < sizes, begins + t, length)
        tokens.scatter_(1, at, letter)
        states.scatter_(1, at, state)
    ends = begins + sizes
    has_next = torch.arange(1, MOST_WORDS + 1) < count
    tokens.scatter_(1, torch.where(has_next, ends, length), BAR)  # the state behind a bar is the start, 0
    tokens, states = tokens[:, :length], states[:, :length]

    labels = torch.full_like(tokens, IGNORE)
    labels[:, :-1] = tokens[:, 1:].masked_fill(tokens[:, 1:] >= LETTERS, IGNORE)
    may_follow = ((edges >= 0).long() << torch.arange(LETTERS)).sum(2)
    return Languages(tokens, labels, may_follow[rows, states] * (labels != IGNORE), edges)


def _distinct(n: int, generator: torch.Generator | None) -> Tensor:
    """Automata of `n` different languages: those that repeat an earlier one are drawn again."""
    edges = random_automata(n, generator=generator)
    while True:
        starts = state_numbers(edges)[:, 0]
        ordered, order = starts.sort(stable=True)
        again = order[1:][ordered[1:] == ordered[:-1]]
        if not len(again):
            return edges
        edges[again] = random_automata(len(again), generator=generator)
