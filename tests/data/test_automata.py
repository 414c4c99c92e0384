"""RegBench: random automata, their words, and what may come next, checked by following them letter by letter."""

from __future__ import annotations

import pytest
import torch

from dn_lib.data.automata import (
    BAR,
    LETTERS,
    STOP,
    minimal_sizes,
    random_automata,
    regular_languages,
    state_numbers,
)
from dn_lib.data.recall import IGNORE


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def steps_of(edges):
    """An automaton as dictionaries: the edges of each state."""
    return [{letter: to for letter, to in enumerate(row) if to >= 0} for row in edges.tolist()]


def minimal(steps):
    """States of the smallest automaton by Moore's refinement over those reached, named as Python sees fit."""
    reached, new = {0}, [0]
    while new:
        for to in steps[new.pop()].values():
            if to not in reached:
                reached.add(to)
                new.append(to)
    part = dict.fromkeys(reached, 0)
    while True:
        seen = {s: (part[s], tuple(sorted((a, part[to]) for a, to in steps[s].items()))) for s in reached}
        names = {kind: i for i, kind in enumerate(sorted(set(seen.values()), key=str))}
        if len(names) == len(set(part.values())):
            return part
        part = {s: names[seen[s]] for s in reached}


def test_automata_are_drawn_as_described():
    edges = random_automata(3000, generator=generator())
    degrees = (edges >= 0).sum(2)
    states = (degrees > 0).sum(1)
    assert edges.shape == (3000, 12, LETTERS) and sorted(states.unique().tolist()) == list(range(4, 13))
    for automaton, count in zip(edges[:200], states[:200].tolist(), strict=True):
        steps = steps_of(automaton)
        alphabet = {a for row in steps for a in row}
        assert len(alphabet) <= LETTERS
        for state, row in enumerate(steps):
            assert (1 <= len(row) <= 3) == (state < count)
            assert len(set(row.values())) == len(row) and all(to != state and to < count for to in row.values())
    for size in (1, 2, 3):
        assert abs((degrees[degrees > 0] == size).double().mean() - 1 / 3) < 0.02
    letters = (edges >= 0).any(1).sum(1)
    assert letters.max() > 14 and (edges >= 0).any(1).double().mean(0).std() < 0.05


def test_an_alphabet_bounds_the_letters():
    """With 12 states and up to three edges each, all letters of a small alphabet show, and no others."""
    edges = random_automata(3000, generator=generator(1))
    letters = (edges >= 0).any(1).sum(1)
    assert letters.min() <= 4 and (letters == 4).any()


def test_minimal_sizes_are_moores():
    edges = random_automata(300, generator=generator(2))
    edges[:100, :, 3:] = -1  # few letters, so that states are alike, and some have no edge
    expected = [len(set(minimal(steps_of(e)).values())) for e in edges]
    assert minimal_sizes(edges).tolist() == expected and min(expected) < 4 and max(expected) > 8


def test_numbers_tell_states_apart_across_automata():
    edges = random_automata(40, generator=generator(3))
    swapped = edges.clone()
    swapped[:, [1, 2]] = edges[:, [2, 1]]
    swapped = torch.where(swapped == 1, 2, torch.where(swapped == 2, 1, swapped))
    a, b = state_numbers(edges), state_numbers(swapped)
    assert torch.equal(a[:, 0], b[:, 0]) and torch.equal(a[:, 1], b[:, 2])  # the names of states do not matter
    assert len(a[:, 0].unique()) == 40
    changed = edges.clone()
    changed[:, 0] = torch.where(edges[:, 0] >= 0, edges[:, 0], -1).roll(1, dims=1)  # other letters at the start
    assert (state_numbers(changed)[:, 0] != a[:, 0]).all()


def test_examples_are_words_and_what_may_follow():
    x = regular_languages(60, generator=generator())
    assert x.tokens.shape == x.labels.shape == x.legal.shape == (60, 950)
    for row, target, legal, edges in zip(x.tokens.tolist(), x.labels.tolist(), x.legal.tolist(), x.edges, strict=True):
        steps, end = steps_of(edges), row.index(STOP)
        assert row[end:] == [STOP] * (950 - end)
        words = "".join("|" if t == BAR else chr(97 + t) for t in row[:end]).split("|")
        assert 10 <= len(words) <= 19 and all(1 <= len(word) <= 49 for word in words)
        state = 0
        for t in range(950):
            if row[t] < LETTERS:
                state = steps[state][row[t]]  # a KeyError here would be a word that the automaton refuses
            elif row[t] == BAR:
                state = 0
            follows = row[t + 1] if t + 1 < 950 else STOP
            if follows < LETTERS:
                assert target[t] == follows and legal[t] == sum(1 << a for a in steps[state])
                assert legal[t] >> follows & 1
            else:
                assert target[t] == IGNORE and legal[t] == 0


def test_merging_states_changes_no_answer():
    """The next letters of a state are those of its part in the smallest automaton: nothing need be minimised."""
    for edges in random_automata(200, generator=generator(4)):
        steps = steps_of(edges)
        part = minimal(steps)
        letters = {}
        for state, name in part.items():
            assert letters.setdefault(name, sorted(steps[state])) == sorted(steps[state])


def test_edges_are_equally_likely_and_sizes_uniform():
    x = regular_languages(400, generator=generator(5))
    first = x.tokens[:, 0]
    start = x.edges[:, 0] >= 0
    two = start.sum(1) == 2
    lower = first[two] == start[two].long().argmax(1)
    assert abs(lower.double().mean() - 0.5) < 5 * (0.25 / int(two.sum())) ** 0.5  # five standard deviations
    words = 1 + (x.tokens == BAR).sum(1)
    assert sorted(words.unique().tolist()) == list(range(10, 20))
    letters = (x.tokens < LETTERS).sum(1) / words
    # A word's size has mean 25 and variance (49^2 - 1) / 12 = 200.
    assert abs(letters.mean() - 25) < 5 * (200 / int(words.sum())) ** 0.5


def test_languages_differ_and_repeat_with_the_generator():
    a, b, c = (regular_languages(30, generator=generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True)) and not torch.equal(a.tokens, c.tokens)
    assert len(state_numbers(a.edges)[:, 0].unique()) == 30
    assert regular_languages(0).tokens.shape == (0, 950)
    with pytest.raises(ValueError, match=r"^n "):
        random_automata(-1)
