"""The generators of chapter 2: associative recall, keys of known correlation, parity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_lib.data.recall import (
    IGNORE,
    correlated_keys,
    multi_query_associative_recall,
    recall_with_updates,
)
from dn_lib.data.state_tracking import parity


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    pairs=st.integers(1, 8), extra=st.integers(0, 20), vocab=st.sampled_from([18, 64, 512]), seed=st.integers(0, 999)
)
@settings(max_examples=40, deadline=None)
def test_mqar_has_the_published_form(pairs, extra, vocab, seed):
    length = 4 * pairs + extra
    tokens, labels = multi_query_associative_recall(7, length, pairs, vocab=vocab, generator=generator(seed))
    assert tokens.shape == labels.shape == (7, length) and tokens.dtype == labels.dtype == torch.int64
    for row, target in zip(tokens.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and all(1 <= key < vocab // 2 for key in keys)
        assert len(set(values)) == pairs and all(vocab // 2 <= value < vocab for value in values)
        answers = dict(zip(keys, values, strict=True))
        asked = [t for t in range(length) if target[t] != IGNORE]
        assert sorted(row[t] for t in asked) == sorted(keys)  # every key once
        for t in range(2 * pairs, length):
            if t in asked:
                assert (t - 2 * pairs) % 2 == 0 and target[t] == answers[row[t]]
            else:
                assert row[t] == 0
        assert all(t >= 2 * pairs for t in asked)


def test_mqar_gaps_follow_the_power_law():
    """With one pair the gap's distribution is the weights themselves."""
    _, labels = multi_query_associative_recall(40_000, 34, 1, vocab=8, power=0.5, generator=generator())
    space = 16
    weights = torch.arange(1, space + 1) ** -0.5
    expected = weights / weights.sum()
    share = (labels != IGNORE).double().mean(0)[2::2]
    # five standard deviations of a share that is a mean over 40,000 draws
    assert ((share - expected).abs() < 5 * (expected / 40_000).sqrt()).all()


def test_mqar_at_the_papers_sizes():
    for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64)):
        tokens, labels = multi_query_associative_recall(3, length, pairs, generator=generator())
        assert tokens.max() < 8192 and ((labels != IGNORE).sum(1) == pairs).all()


def test_draws_repeat_with_the_generator_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    for draw in (
        lambda seed: multi_query_associative_recall(4, 32, 4, vocab=32, generator=generator(seed)),
        lambda seed: recall_with_updates(4, 4, generator=generator(seed)),
        lambda seed: parity(4, 32, generator=generator(seed)),
    ):
        assert torch.equal(draw(1)[0], draw(1)[0]) and not torch.equal(draw(1)[0], draw(2)[0])
    assert torch.equal(before, torch.get_rng_state())


@given(pairs=st.integers(1, 8), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_updates_ask_for_the_newest_value(pairs, seed):
    tokens, labels = recall_with_updates(5, pairs, vocab=64, generator=generator(seed))
    assert tokens.shape == (5, 6 * pairs)
    for row, target in zip(tokens.tolist(), labels.tolist(), strict=True):
        memory = {}
        for t in range(0, 4 * pairs, 2):
            memory[row[t]] = row[t + 1]
        assert len(memory) == pairs and len(set(row[1 : 4 * pairs : 2])) == 2 * pairs
        asked = range(4 * pairs, 6 * pairs, 2)
        assert sorted(row[t] for t in asked) == sorted(memory)
        for t in range(6 * pairs):
            assert target[t] == (memory[row[t]] if t in asked else IGNORE)


@given(n=st.integers(1, 6), more=st.integers(1, 5), cosine=st.floats(0, 1), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_correlated_keys_have_that_cosine(n, more, cosine, seed):
    k = correlated_keys(n, n + more, cosine, dtype=torch.float64, generator=generator(seed))
    expected = torch.full((n, n), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    torch.testing.assert_close(k @ k.mT, expected, rtol=0, atol=1e-12)


@given(n=st.integers(0, 4), length=st.integers(0, 30), p=st.floats(0, 1), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_parity_counts_the_ones(n, length, p, seed):
    bits, labels = parity(n, length, p=p, generator=generator(seed))
    assert bits.shape == labels.shape == (n, length)
    for row, target in zip(bits.tolist(), labels.tolist(), strict=True):
        assert target == [sum(row[: t + 1]) % 2 for t in range(length)]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("length", lambda: multi_query_associative_recall(1, 15, 4)),
        ("length", lambda: multi_query_associative_recall(1, 16, 0)),
        ("vocab", lambda: multi_query_associative_recall(1, 64, 8, vocab=16)),
        ("vocab", lambda: multi_query_associative_recall(1, 64, 8, vocab=63)),
        ("n", lambda: multi_query_associative_recall(-1, 16, 4)),
        ("vocab", lambda: recall_with_updates(1, 8, vocab=30)),
        ("n", lambda: recall_with_updates(1, 0)),
        ("cosine", lambda: correlated_keys(2, 4, 1.5)),
        ("n", lambda: correlated_keys(4, 4, 0.5)),
        ("p", lambda: parity(1, 4, p=2.0)),
        ("n", lambda: parity(1, -4)),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=f"^{name} "):
        call()
