"""The six tasks of MAD, each solved by a reader that knows only its rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_lib.data import mad
from dn_lib.data.recall import IGNORE


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(x: mad.Examples):
    assert x.tokens.dtype == x.labels.dtype == torch.int64 and x.labels.shape == x.scored.shape
    assert not (x.scored & (x.labels == IGNORE)).any()
    return zip(x.tokens.tolist(), x.labels.tolist(), x.scored.tolist(), strict=True)


@given(
    pairs=st.integers(1, 40), words=st.sampled_from([2, 4, 16]), noise=st.sampled_from([0, 1, 16]),
    p=st.sampled_from([0.2, 0.8, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_recall_is_a_dictionary_look_up(pairs, words, noise, p, seed):
    if noise:
        x = mad.noisy_recall(3, 2 * pairs, words + noise, noise_tokens=noise, p=p, generator=generator(seed))
    else:
        x = mad.in_context_recall(3, 2 * pairs, words, generator=generator(seed))
    for row, target, scored in rows(x):
        assert target == [*row[1:], IGNORE]
        known = {}
        for t in range(0, 2 * pairs, 2):
            key, value = row[t], row[t + 1]
            assert (key >= words) == (value >= words)  # noise comes in pairs
            assert not scored[t + 1] and scored[t] == (key in known)
            if key in known:
                assert known[key] == value == target[t]
            elif key < words:
                assert key < words // 2 <= value
                known[key] = value


def test_noise_is_as_frequent_as_asked():
    x = mad.noisy_recall(2000, 128, 32, p=0.4, generator=generator())
    noisy = (x.tokens[:, 0::2] >= 16).double()
    assert abs(noisy.mean() - 0.4) < 5 * (0.24 / noisy.numel()) ** 0.5  # five standard deviations
    assert x.tokens.flatten().bincount(minlength=32).min() > 0


def parse(row, vocab):
    """The pairs of motifs with the position of each key's last token, from a row without its padding."""
    half, pairs, t = (vocab - 1) // 2, [], 0
    while t < len(row):
        key_at = t
        while row[t] < half:
            t += 1
        value_at = t
        while t < len(row) and row[t] >= half:
            t += 1
        pairs.append((tuple(row[key_at:value_at]), tuple(row[value_at:t]), value_at - 1))
    return pairs


@given(
    motif=st.integers(1, 3), full=st.booleans(), extra=st.integers(0, 60), vocab=st.sampled_from([7, 8, 16, 33]),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_fuzzy_recall_is_a_look_up_of_motifs(motif, full, extra, vocab, seed):
    length, shortest = 4 * motif + extra, motif if full else 1
    x = mad.fuzzy_recall(4, length, vocab, motif=motif, shortest_key=shortest, generator=generator(seed))
    pad = vocab - 1
    for row, target, scored in rows(x):
        padding = next(t for t, token in enumerate(row) if token != pad)
        assert pad not in row[padding:] and padding < 2 * motif + 2 * motif  # one more pair might not have fitted
        assert target == [*[IGNORE] * padding, *row[padding + 1 :], IGNORE]
        known, asked = {}, set()
        for key, value, at in parse(row[padding:], vocab):
            assert shortest <= len(key) <= motif and 1 <= len(value) <= motif
            assert len(set(key)) == len(key) and len(set(value)) == len(value)
            if key in known:
                assert known[key] == value
                asked |= {padding + at + i for i in range(len(value))}
            known[key] = value
        assert asked == {t for t in range(length) if scored[t]}
        assert padding + at in asked  # the probe


def test_motifs_have_every_length_and_token():
    x = mad.fuzzy_recall(400, 128, 16, generator=generator())
    pairs = [pair for row in x.tokens.tolist() for pair in parse([t for t in row if t != 15], 16)]
    for part in (0, 1):
        sizes = [len(pair[part]) for pair in pairs]
        # Short pairs fit more often at the end of a row: a share is near a third, not exactly one.
        assert all(0.25 < sizes.count(size) / len(sizes) < 0.42 for size in (1, 2, 3))
    first = torch.tensor([pair[0][0] for pair in pairs]).bincount(minlength=7) / len(pairs)
    assert len(first) == 7 and ((first - 1 / 7).abs() < 0.03).all()


@given(copied=st.integers(1, 10), extra=st.integers(0, 30), vocab=st.integers(3, 20), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_copying_is_reading_what_is_no_blank(copied, extra, vocab, seed):
    length = 2 * copied + 1 + extra
    x = mad.selective_copying(3, length, vocab, copied=copied, generator=generator(seed))
    for row, target, scored in rows(x):
        ask = row.index(vocab - 1)
        content = [t for t in row[:ask] if t != vocab - 2]
        assert len(content) == copied and row[ask + 1 :] == [vocab - 2] * copied and len(row) == length
        assert target == [*[IGNORE] * (ask + 1), *content] and scored == [t != IGNORE for t in target]


@given(length=st.integers(1, 20), vocab=st.integers(2, 20), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_compression_asks_for_everything(length, vocab, seed):
    x = mad.compression(3, length, vocab, generator=generator(seed))
    for row, target, scored in rows(x):
        assert row == [*target, vocab - 1] and all(scored) and all(t < vocab - 1 for t in target)


@given(pairs=st.integers(1, 20), vocab=st.integers(3, 30), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_memorisation_asks_for_the_same_facts_in_every_draw(pairs, vocab, seed):
    facts = mad.facts_to_memorise(vocab, generator=generator(seed))
    keys = (vocab - 1) // 2
    assert len(facts) == keys and all(keys <= value < vocab - 1 for value in facts.tolist())
    for again in range(2):
        x = mad.memorisation(3, facts, 2 * pairs, vocab, generator=generator(seed + again))
        for row, target, scored in rows(x):
            assert all(key < keys for key in row[0::2]) and set(row[1::2]) == {vocab - 1}
            assert target[0::2] == [IGNORE] * pairs and target[1::2] == [int(facts[key]) for key in row[0::2]]
            assert scored == [t != IGNORE for t in target]


def test_draws_repeat_with_the_generator():
    facts = mad.facts_to_memorise(generator=generator())
    for task in (mad.in_context_recall, mad.noisy_recall, mad.fuzzy_recall, mad.selective_copying, mad.compression,
                 lambda n, generator: mad.memorisation(n, facts, generator=generator)):  # fmt: skip
        a, b, c = (task(5, generator=generator(seed)) for seed in (1, 1, 2))
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True)) and not torch.equal(a.tokens, c.tokens)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("n", lambda: mad.in_context_recall(-1)),
        ("length", lambda: mad.in_context_recall(1, 7)),
        ("vocab - noise_tokens", lambda: mad.noisy_recall(1, vocab=16)),
        ("p", lambda: mad.noisy_recall(1, p=1.2)),
        ("p", lambda: mad.noisy_recall(1, vocab=16, noise_tokens=0, p=0.2)),
        ("motif", lambda: mad.fuzzy_recall(1, motif=4)),
        ("motif", lambda: mad.fuzzy_recall(1, shortest_key=0)),
        ("vocab", lambda: mad.fuzzy_recall(1, vocab=6)),
        ("length", lambda: mad.fuzzy_recall(1, 11)),
        ("vocab", lambda: mad.selective_copying(1, vocab=2)),
        ("length", lambda: mad.selective_copying(1, 32)),
        ("length", lambda: mad.compression(1, 0)),
        ("vocab", lambda: mad.facts_to_memorise(2)),
        ("facts", lambda: mad.memorisation(1, torch.zeros(3, dtype=torch.long))),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=f"^{name} "):
        call()
