"""Caches that are kept: a prompt's beginning that many requests share is read once.

A list of keys and values can be reused up to any token.  A state stands for exactly the tokens that it has read: it can
be continued, but not cut.  So snapshots are taken at chosen places, and a request continues from the longest that fits.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from dn_lib.forms.common import check_integer, describe
from dn_lib.models.cache import Cache
from dn_lib.models.language_model import LanguageModel


def copy_cache(cache: Cache) -> Cache:
    """A cache with memory of its own: continuing either leaves the other as it was.

    Raises TypeError for what is no `Cache`.

    >>> from dn_lib.models.config import ModelConfig
    >>> model, tokens = LanguageModel(ModelConfig(width=32, layers=1, heads=1)), torch.zeros(1, 3, dtype=torch.long)
    >>> cache = model.new_cache(1)
    >>> _ = model(tokens, cache)
    >>> kept = copy_cache(cache)
    >>> torch.equal(model(tokens, cache), model(tokens, kept))
    True
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache, got {describe(cache)}")
    return copy.deepcopy(cache)


class PrefixCache:
    """Snapshots of a model's cache by the tokens that it has read, at most `capacity` bytes of them.

    The least recently used goes first.  What is put in and handed out are copies.

    >>> from dn_lib.models.config import ModelConfig
    >>> model = LanguageModel(ModelConfig(width=32, layers=1, heads=1))
    >>> prefixes = PrefixCache(capacity=10**6)
    >>> _ = read_prompt(model, [3, 1, 4, 1, 5], prefixes, every=2)
    >>> prefixes.longest([3, 1, 4, 1, 9])[0], prefixes.longest([3, 1, 9])[0], prefixes.longest([2])[0]
    (4, 2, 0)
    """

    def __init__(self, capacity: int):
        check_integer("capacity", capacity)
        self.capacity = capacity
        self._snapshots: OrderedDict[tuple[int, ...], Cache] = OrderedDict()

    def __len__(self) -> int:
        return len(self._snapshots)

    def bytes(self) -> int:
        """The memory held by all snapshots."""
        return sum(cache.bytes() for cache in self._snapshots.values())

    def put(self, tokens: Sequence[int] | Tensor, cache: Cache) -> None:
        """Keep a copy of `cache`, which has read exactly `tokens`, of one sequence; too large a one is not kept.

        Raises ValueError unless it has read as many tokens, of one sequence.
        """
        key = _key(tokens)
        if not isinstance(cache, Cache):
            raise TypeError(f"cache must be a Cache, got {describe(cache)}")
        if cache.batch_size != 1 or cache.length != len(key):
            got = f"{cache.length} of {cache.batch_size}"
            raise ValueError(f"cache must have read the {len(key)} tokens of one sequence, got {got}")
        if cache.bytes() > self.capacity:
            return
        self._snapshots[key] = copy_cache(cache)
        self._snapshots.move_to_end(key)
        while self.bytes() > self.capacity:
            self._snapshots.popitem(last=False)

    def longest(self, tokens: Sequence[int] | Tensor) -> tuple[int, Cache | None]:
        """How many of the first tokens the best snapshot has read, and a copy of it; (0, None) if there is none.

        At least one token is left to be read: a cache holds no logits.
        """
        key = _key(tokens)
        for length in sorted({len(k) for k in self._snapshots if len(k) < len(key)}, reverse=True):
            kept = self._snapshots.get(key[:length])
            if kept is not None:
                self._snapshots.move_to_end(key[:length])
                return length, copy_cache(kept)
        return 0, None


def read_prompt(
    model: LanguageModel, prompt: Sequence[int] | Tensor, prefixes: PrefixCache, *, every: int = 512
) -> tuple[Tensor, Cache, int]:
    """Read one prompt from the longest snapshot on: the logits of its last token `[vocab_size]`, its cache, and
    how many tokens were not read again.

    Snapshots are taken at the multiples of `every`, so that another prompt that begins alike finds one at most `every`
    tokens before the place where it differs.  Runs without gradients.
    Raises ValueError or TypeError, naming the argument, for what does not fit.
    """
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model must be a LanguageModel, got {describe(model)}")
    if not isinstance(prefixes, PrefixCache):
        raise TypeError(f"prefixes must be a PrefixCache, got {describe(prefixes)}")
    check_integer("every", every)
    key = _key(prompt)
    if not key:
        raise ValueError("prompt must have at least one token, got none")
    start, cache = prefixes.longest(key)
    cache = model.new_cache(1) if cache is None else cache
    tokens, at = torch.tensor([key], device=model.embedding.weight.device), start
    with torch.no_grad():
        while True:
            stop = min(len(key), (at // every + 1) * every)
            features = model.features(tokens[:, at:stop], cache)
            if stop % every == 0:
                prefixes.put(key[:stop], cache)
            if stop == len(key):
                return model.logits(features[0, -1]), cache, start
            at = stop


def _key(tokens: Sequence[int] | Tensor) -> tuple[int, ...]:
    """The tokens as a tuple; raises ValueError unless they are whole numbers in one row."""
    values = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"tokens must be a list of whole numbers, got {describe(tokens)}")
    for token in values:
        if type(token) is not int:
            raise ValueError(f"tokens must be whole numbers in one row, got {describe(token)} among them")
    return tuple(values)
