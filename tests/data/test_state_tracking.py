"""Parity is in test_recall; here arithmetic and permutations, each solved from its definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_lib.data.recall import IGNORE
from dn_lib.data.state_tracking import (
    composition_table,
    modular_arithmetic,
    permutation_composition,
    permutations_of,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(length=st.integers(0, 25), modulus=st.integers(2, 9), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_arithmetic_is_what_python_computes(length, modulus, seed):
    tokens, labels = modular_arithmetic(4, length, modulus=modulus, generator=generator(seed))
    assert tokens.shape == labels.shape == (4, length) and tokens.dtype == labels.dtype == torch.int64
    for row, target in zip(tokens.tolist(), labels.tolist(), strict=True):
        words = [str(x) if x < modulus else "+-*"[x - modulus] for x in row]
        assert all(word.isdigit() == (t % 2 == 0) for t, word in enumerate(words))
        for t in range(length):
            assert target[t] == (IGNORE if t % 2 else eval("".join(words[: t + 1])) % modulus)


@given(length=st.integers(0, 12), degree=st.integers(2, 5), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_permutations_are_composed_one_image_at_a_time(length, degree, seed):
    images = permutations_of(degree).tolist()
    assert images == [list(p) for p in itertools.permutations(range(degree))]
    tokens, labels = permutation_composition(3, length, degree, generator=generator(seed))
    assert tokens.shape == labels.shape == (3, length)
    for row, target in zip(tokens.tolist(), labels.tolist(), strict=True):
        where = list(range(degree))  # where each point is by now
        for token, label in zip(row, target, strict=True):
            where = [images[token][i] for i in where]
            assert images[label] == where


def test_the_table_is_that_of_a_group():
    table = composition_table(4)
    everything = torch.arange(24)
    assert torch.equal(table[0], everything) and torch.equal(table[:, 0], everything)  # row 0 is the identity
    assert all(torch.equal(line.sort().values, everything) for line in (*table, *table.mT))
    a, b, c = torch.randint(24, (3, 200), generator=generator())
    assert torch.equal(table[a, table[b, c]], table[table[a, b], c]) and not torch.equal(table[a, b], table[b, a])


def test_every_element_is_as_likely():
    tokens, labels = permutation_composition(500, 40, 3, generator=generator())
    for x in (tokens, labels):
        share = x.flatten().bincount(minlength=6) / x.numel()
        # five standard deviations of a share; products of uniform elements are uniform and pairwise independent
        assert ((share - 1 / 6).abs() < 5 * (5 / 36 / x.numel()) ** 0.5).all()


def test_draws_repeat_with_the_generator():
    for draw in (
        lambda seed: modular_arithmetic(4, 21, generator=generator(seed)),
        lambda seed: permutation_composition(4, 20, 5, generator=generator(seed)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1), strict=True))
        assert not torch.equal(draw(1)[0], draw(2)[0])


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("n", lambda: modular_arithmetic(-1, 3)),
        ("modulus", lambda: modular_arithmetic(1, 3, modulus=1)),
        ("n", lambda: permutation_composition(1, -3, 3)),
        ("degree", lambda: permutation_composition(1, 3, 7)),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=f"^{name} "):
        call()
