"""A cache that is kept can be continued again, and answers as if the whole prompt had been read."""

from __future__ import annotations

import pytest
import torch
from small_models import MODELS, model_and_tokens

from dn_lib.models.snapshots import PrefixCache, copy_cache, read_prompt
from dn_lib.testing import relative_error

SOME = ("delta", "gated_delta", "hybrid window", "hybrid global", "mamba2")


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("inference", [False, True])
def test_a_copy_continues_as_the_original_would_have(name, inference):
    model, tokens = model_and_tokens(MODELS[name])
    with torch.inference_mode(inference):
        cache = model.new_cache(2)
        model(tokens[:, :9], cache)
        kept = copy_cache(cache)
        first = model(tokens[:, 9:14], cache)
        model(tokens[:, 14:], cache)  # goes on in place
    with torch.no_grad():
        again = model(tokens[:, 9:14], copy_cache(kept))
        other = model(tokens.flip(1)[:, 9:14], copy_cache(kept))
        assert torch.equal(again, first)
        assert relative_error(other, first) > 1e-3
        assert kept.length == 9 and kept.layers[0].batch_size == 2
        assert torch.equal(model(tokens[:, 9:14], kept), first)


@pytest.mark.parametrize("name", SOME)
def test_a_prompt_is_read_from_the_longest_snapshot(name):
    model, tokens = model_and_tokens(MODELS[name], length=23, batch=1)
    model = model.double()
    row, prefixes = tokens[0].tolist(), PrefixCache(10**7)
    logits, cache, reused = read_prompt(model, row, prefixes, every=5)
    assert reused == 0 and len(prefixes) == 4 and cache.length == 23
    with torch.no_grad():
        assert relative_error(logits, model(tokens)[0, -1]) < 1e-10
    other = [*row[:17], *reversed(row)]
    got, _, reused = read_prompt(model, torch.tensor(other), prefixes, every=5)
    assert reused == 15
    with torch.no_grad():
        assert relative_error(got, model(torch.tensor([other]))[0, -1]) < 1e-10
    assert read_prompt(model, row, prefixes, every=5)[2] == 20  # and the snapshots are as they were


def test_a_snapshot_of_all_tokens_leaves_one_to_read():
    model, tokens = model_and_tokens({}, length=6, batch=1)
    prefixes = PrefixCache(10**7)
    read_prompt(model, tokens[0], prefixes, every=3)
    assert prefixes.longest(tokens[0])[0] == 3
    assert prefixes.longest([*tokens[0].tolist(), 1])[0] == 6


def test_the_least_recently_used_goes_first():
    model, tokens = model_and_tokens({}, length=9, batch=1)
    one = model.new_cache(1)
    model(tokens[:, :1], one)
    prefixes, row = PrefixCache(2 * one.bytes()), tokens[0].tolist()
    caches = {}
    for n in (1, 2, 3):
        caches[n] = model.new_cache(1)
        model(tokens[:, :n], caches[n])
    prefixes.put(row[:1], caches[1])
    prefixes.put(row[:2], caches[2])
    assert prefixes.longest(row[:2])[0] == 1  # uses the shorter one
    prefixes.put(row[:3], caches[3])
    assert len(prefixes) == 2 and prefixes.bytes() <= prefixes.capacity
    assert prefixes.longest(row)[0] == 3 and prefixes.longest(row[:3])[0] == 1
    small = PrefixCache(one.bytes() - 1)
    small.put(row[:1], caches[1])
    assert len(small) == 0


def test_wrong_arguments_are_named():
    model, tokens = model_and_tokens({}, length=3, batch=1)
    prefixes, cache = PrefixCache(10**7), model.new_cache(1)
    model(tokens, cache)
    with pytest.raises(ValueError, match=r"^cache must have read the 2 tokens"):
        prefixes.put([1, 2], cache)
    with pytest.raises(TypeError, match=r"^cache must be"):
        prefixes.put([1, 2, 3], {})
    with pytest.raises(TypeError, match=r"^cache must be"):
        copy_cache(None)
    with pytest.raises(ValueError, match=r"^capacity must be"):
        PrefixCache(0)
    with pytest.raises(ValueError, match=r"^tokens must be whole numbers"):
        prefixes.longest([1.5])
    with pytest.raises(TypeError, match=r"^tokens must be a list"):
        prefixes.longest("text")
    with pytest.raises(ValueError, match=r"^prompt must have"):
        read_prompt(model, [], prefixes)
    with pytest.raises(ValueError, match=r"^every must be"):
        read_prompt(model, [1], prefixes, every=0)
    with pytest.raises(TypeError, match=r"^model must be"):
        read_prompt(None, [1], prefixes)
    with pytest.raises(TypeError, match=r"^prefixes must be"):
        read_prompt(model, [1], None)
