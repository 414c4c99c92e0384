"""The examples of each task, in one form and on the device: sequences, where they are asked, and what is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dn_lib.data import mad
from dn_lib.data.automata import VOCAB, regular_languages
from dn_lib.data.recall import IGNORE, multi_query_associative_recall
from dn_lib.data.state_tracking import modular_arithmetic, parity, permutation_composition

PART = 1024  # examples of associative recall drawn at once: 8,192 uniforms each


@dataclass(frozen=True)
class Split:
    """Examples: tokens `[n, L]`, positions `at` `[n, K]`, answers `labels` `[n, A]` and which of them are `scored`.

    K answers are asked for, one at each position, and A = K; or all A from one position, K = 1.  A label of -100 is
    neither learned nor scored.  `legal` `[n, A]`, if it is there, is a set of answers as bits: all of them are right.
    """

    tokens: Tensor
    at: Tensor
    labels: Tensor
    scored: Tensor
    legal: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: str) -> Split:
        """The same on a device, tokens and positions in 16 bits: what is drawn once is kept there for all steps."""
        tokens, at, labels = (x.to(device, torch.int16) for x in (self.tokens, self.at, self.labels))
        return Split(tokens, at, labels, self.scored.to(device), None if self.legal is None else self.legal.to(device))

    def rows(self, which: Tensor | slice) -> Split:
        """Examples of these numbers, `[...]` in place of n, as 64-bit integers."""
        tokens, at, labels = (x[which].long() for x in (self.tokens, self.at, self.labels))
        return Split(tokens, at, labels, self.scored[which], None if self.legal is None else self.legal[which])


@dataclass(frozen=True)
class Task:
    """What a cell is trained and tested on.

    classes: how many answers a guess has to choose from, if the score is to be scaled by chance.
    decoded: how many tokens are read off one vector; 0 for one answer a position.
    """

    vocab: int
    train: Split
    test: Split
    classes: int | None = None
    decoded: int = 0

    def to(self, device: str) -> Task:
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def asked(tokens: Tensor, labels: Tensor, scored: Tensor | None = None, legal: Tensor | None = None) -> Split:
    """Labels `[n, L]` at the positions that have one: `[n, K]`, K the most of any example; the rest is -100."""
    there = labels != IGNORE
    count = int(there.sum(1).max()) if there.numel() else 0
    at = there.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    scored = there if scored is None else scored & there
    return Split(tokens, at, labels.gather(1, at), scored.gather(1, at), None if legal is None else legal.gather(1, at))


def from_mad(x: mad.Examples) -> Split:
    if x.labels.shape == x.tokens.shape:
        return asked(*x)
    last = torch.full((len(x.tokens), 1), x.tokens.shape[1] - 1)
    return Split(x.tokens, last, x.labels, x.scored)


# --- Each task --------------------------------------------------------------------------------------------------------

Draw = Callable[[int, torch.Generator], Split]


def mqar(train: int, test: int, seed: int, device: str, *, length: int, pairs: int, vocab: int, power: float) -> Task:
    """Multi-query associative recall, drawn on the device."""

    def draw(n: int, g: torch.Generator) -> Split:
        parts = []
        for begin in range(0, n, PART):
            size = min(PART, n - begin)
            tokens, labels = multi_query_associative_recall(size, length, pairs, vocab=vocab, power=power, generator=g)
            parts.append(asked(tokens, labels).to(device))
        names = ("tokens", "at", "labels", "scored")
        return Split(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    return _both(draw, vocab, train, test, seed, device, drawn_on=device)


def in_mad(task: str, train: int, test: int, seed: int, device: str, *, vocab: int, length: int, **options) -> Task:
    """One of the six tasks of MAD."""
    draw_examples: Callable[..., mad.Examples] = getattr(mad, task)
    if task == "memorisation":
        facts = mad.facts_to_memorise(vocab, generator=torch.Generator().manual_seed(seed + 2))
        draw_examples = partial(draw_examples, facts=facts)

    def draw(n: int, g: torch.Generator, **more) -> Split:
        return from_mad(draw_examples(n, length=length, vocab=vocab, generator=g, **options, **more))

    made = _both(draw, vocab, train, test, seed, device)
    if task == "fuzzy_recall":  # tested on keys of full length
        g = torch.Generator().manual_seed(seed + 1)
        made = replace(made, test=draw(test, g, shortest_key=options.get("motif", 3)).to(device))
    return replace(made, decoded=length if task == "compression" else 0)


def regbench(train: int, test: int, seed: int, device: str) -> Task:
    """Languages for training, other ones for the test: no two of all of them are the same."""
    x = regular_languages(train + test, generator=torch.Generator().manual_seed(seed))
    everything = asked(x.tokens, x.labels, legal=x.legal).to(device)

    def part(where: slice) -> Split:
        legal = None if everything.legal is None else everything.legal[where]
        return Split(everything.tokens[where], everything.at[where], everything.labels[where],
                     everything.scored[where], legal)  # fmt: skip

    return Task(VOCAB, part(slice(train)), part(slice(train, None)))


def tracking(
    task: str, train: int, test: int, seed: int, device: str, *, length: int, test_length: int, modulus: int = 5
) -> Task:
    """Parity, modular arithmetic, S3 or S5: asked at every position, after a token that begins each sequence.

    Tested on longer sequences, of which only what lies beyond `length` counts.
    """
    classes = {"parity": 2, "arithmetic": modulus, "s3": 6, "s5": 120}[task]
    symbols = modulus + 3 if task == "arithmetic" else classes
    draws: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "parity": parity,
        "arithmetic": partial(modular_arithmetic, modulus=modulus),
        "s3": partial(permutation_composition, degree=3),
        "s5": partial(permutation_composition, degree=5),
    }

    def draw(n: int, g: torch.Generator, length: int = length, beyond: int = 0) -> Split:
        tokens, labels = draws[task](n, length, generator=g)
        begin = torch.full((n, 1), symbols)
        split = asked(torch.cat([begin, tokens], 1), torch.cat([torch.full_like(begin, IGNORE), labels], 1))
        return replace(split, scored=split.scored & (split.at > beyond))  # position t holds token t, from 1

    train_split, test_split = (torch.Generator().manual_seed(seed + i) for i in (0, 1))
    longer = draw(test, test_split, test_length, length)
    return Task(symbols + 1, draw(train, train_split).to(device), longer.to(device), classes)


def _both(draw: Draw, vocab: int, train: int, test: int, seed: int, device: str, drawn_on: str = "cpu") -> Task:
    """Training and test examples, each drawn from a seed of its own."""
    generators = (torch.Generator(drawn_on).manual_seed(seed + i) for i in (0, 1))
    learned, tested = (draw(n, g).to(device) for n, g in zip((train, test), generators, strict=True))
    return Task(vocab, learned, tested)


KINDS: dict[str, Callable[..., Task]] = {
    "mqar": mqar,
    "regbench": regbench,
    **{name: partial(in_mad, name) for name in
       ("in_context_recall", "noisy_recall", "fuzzy_recall", "selective_copying", "compression", "memorisation")},
    **{name: partial(tracking, name) for name in ("parity", "arithmetic", "s3", "s5")},
}  # fmt: skip


def make(kind: str, *, train: int, test: int, seed: int, device: str = "cpu", **options) -> Task:
    """The task `kind` with `train` and `test` examples drawn from `seed`, on `device`.

    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](train, test, seed, device, **options)
