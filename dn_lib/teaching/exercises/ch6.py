"""The exercises of chapter 6."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dn_lib.teaching.registry import Exercise, Extreme, Mutant

F64 = torch.float64


def _int(g: torch.Generator, low: int, high: int) -> int:
    """An integer in low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=F64)


# -- 6.1 bits per byte -----------------------------------------------------------------------------------


def sample_losses(g):
    return _randn(g, _int(g, 5, 20)).abs() * 3, _int(g, 20, 60)


def bits(losses, n_bytes):
    return losses.sum() / math.log(2) / n_bytes


# -- 6.2 the short convolution ---------------------------------------------------------------------------


def sample_convolution(g):
    length, channels, taps = _int(g, 4, 9), _int(g, 2, 5), _int(g, 2, 4)
    return _randn(g, length, channels), _randn(g, channels, taps)


def convolve(x, w, ahead=0):
    taps = w.shape[1]
    padded = torch.cat([x.new_zeros(taps - 1 - ahead, x.shape[1]), x, x.new_zeros(ahead, x.shape[1])])
    return torch.stack([w[:, j] * padded[j : j + len(x)] for j in range(taps)]).sum(0)


# -- 6.7 one token through the convolution ---------------------------------------------------------------


def sample_step(g):
    channels, taps = _int(g, 2, 5), _int(g, 3, 5)
    return _randn(g, channels), _randn(g, taps - 1, channels), _randn(g, channels, taps)


def step(x, past, w):
    window = torch.cat([past, x[None]])
    return (w.T * window).sum(0), window[1:]


# -- 6.3 parameters --------------------------------------------------------------------------------------


def sample_block(g):
    heads = _int(g, 1, 4)
    return heads * 8 * _int(g, 1, 4), heads, 64 * _int(g, 1, 3), _int(g, 2, 4)


def block_parameters(d, H, m, n, *, mixer=4, conv=3, beta=1, mlp=3, norms=2, gain="head"):
    gains = {"head": d // H, "width": d, "heads": H, "none": 0}[gain]
    return mixer * d * d + conv * n * d + beta * d * H + gains + mlp * d * m + norms * d


# -- 6.4 memory of a hybrid ------------------------------------------------------------------------------


def sample_memory(g):
    heads, kinds = _int(g, 2, 4), ["delta", "window", "attention"]
    # Each kind, and some of them again, in lists of different lengths; t is larger than w, and smaller.
    mixers = kinds + [kinds[_int(g, 0, 2)] for _ in range(_int(g, 1, 4))]
    return mixers, heads * 8, heads, _int(g, 20, 60), _int(g, 10, 80)


def memory(mixers, d, H, w, t, *, state="heads", sides=2, window="min", grow=True, state_grows=False):
    tokens = {"min": min(t, w), "all": t, "full": w}[window]
    sizes = {
        "delta": {"heads": d * d // H, "width": d * d, "one": (d // H) ** 2}[state] * (t if state_grows else 1),
        "window": sides * d * tokens,
        "attention": sides * d * (t if grow else 1),
    }
    return sum(sizes[mixer] for mixer in mixers)


def _memory_of(*mixers, t=50):
    return lambda g: (list(mixers), 32, 4, 20, t)


# -- 6.5 the learning rate -------------------------------------------------------------------------------


def sample_schedule(g):
    warmup = _int(g, 3, 8)
    return warmup, warmup + _int(g, 5, 30), 1.0, 0.1


def rates(w, T, top, floor, *, shift=0, start=None, low=True, shape="half", first=1, warm=True, last=0):
    values = []
    for t in range(first, T + first):
        begin = w if start is None else start
        r = (t - begin) / (T + last - begin)
        fall = {"half": (1 + math.cos(math.pi * r)) / 2, "line": 1 - r, "quarter": math.cos(math.pi * r / 2)}[shape]
        base = floor if low else 0.0
        values.append(top * (t - shift) / w if t <= w and warm else base + (top - base) * fall)
    return torch.tensor(values, dtype=F64)


# -- 6.6 unequal parts -----------------------------------------------------------------------------------


def sample_parts(g):
    sizes = [_int(g, 1, 3), _int(g, 5, 8), _int(g, 2, 4)]
    return _randn(g, 3, _int(g, 2, 5)), torch.tensor(sizes, dtype=F64)


def weighted(gradients, sizes):
    return (sizes[:, None] * gradients).sum(0) / sizes.sum()


ENTRIES = [
    Exercise(
        number="6.1",
        title="Bits per byte",
        stars=1,
        minutes=5,
        sample=sample_losses,
        reference=bits,
        tested="8 lists of token losses",
        extremes=(
            Extreme("one token", lambda g: (torch.full((1,), 2.0, dtype=F64), 7), "A text may be one token."),
            Extreme("no loss", lambda g: (torch.zeros(4, dtype=F64), 7), "What is certain costs nothing."),
        ),
        mutants=(
            Mutant(
                lambda losses, n: losses.sum() / math.log(2),
                "That is the cost of the whole text in bits; it is not yet divided by its bytes.",
                "Bits per what?",
            ),
            Mutant(
                lambda losses, n: torch.log2(losses.sum()) / n,
                "You took the logarithm of the losses; they are logarithms already.",
                "A change of the base of a logarithm is a factor. Which?",
            ),
            Mutant(
                lambda losses, n: losses.sum() / math.log(2) / n / 8,
                "You divided by 8: a byte is the unit here, and its bits are what is counted.",
                "How many bits would bytes cost that are all equally likely?",
            ),
            Mutant(
                lambda losses, n: losses.mean().exp(),
                "That is the perplexity per token.",
                "Asked for are bits, and per byte: no exponential.",
            ),
            Mutant(
                lambda losses, n: losses.sum() / n,
                "These are nats per byte: the logarithm is the natural one.",
                "How many nats is one bit?",
            ),
            Mutant(
                lambda losses, n: losses.mean() / math.log(2),
                "These are bits per token: a tokenizer with longer tokens would look worse than it is.",
                "The text has `n_bytes` bytes, however many tokens it was cut into.",
            ),
            Mutant(
                lambda losses, n: losses.mean() / math.log(2) / n,
                "The mean over tokens was divided by the bytes of the whole text.",
                "Total over total: which total is still missing?",
            ),
            Mutant(
                lambda losses, n: losses.sum() * math.log(2) / n,
                "The factor ln 2 stands on the wrong side.",
                "A byte that is sure to be one of two equally likely ones costs ln 2 nats. How many bits?",
            ),
        ),
    ),
    Exercise(
        number="6.2",
        title="A short causal convolution",
        stars=2,
        minutes=10,
        sample=sample_convolution,
        reference=convolve,
        tested="8 random shapes in float64",
        extremes=(
            Extreme("one token", lambda g: (_randn(g, 1, 2), _randn(g, 2, 4)), "The first token has zeros before it."),
            Extreme("one tap", lambda g: (_randn(g, 5, 2), _randn(g, 2, 1)), "A single tap sees the present token."),
            Extreme("more taps than tokens", lambda g: (_randn(g, 2, 3), _randn(g, 3, 4)), "Zeros fill the rest."),
        ),
        mutants=(
            Mutant(
                lambda x, w: convolve(x, w, ahead=w.shape[1] - 1),
                "The padding is at the end: every tap but the first reads a later token.",
                "All the padding belongs on one side. On which, if the future must not be seen?",
            ),
            Mutant(
                lambda x, w: convolve(x, w, ahead=w.shape[1] // 2),
                "The filter is centred: half of it reads later tokens.",
                "All the padding belongs on one side.",
            ),
            Mutant(
                lambda x, w: w[:, -1] * x,
                "Only the tap of the present token is used.",
                "How many tokens does a filter of `taps` taps read?",
            ),
            Mutant(
                lambda x, w: convolve(x, w.flip(1)),
                "The taps are in reverse: the last tap belongs to the present token.",
                "Write out y for the first token. Which tap is left?",
            ),
            Mutant(
                lambda x, w: convolve(x, w, ahead=1),
                "Token t sees token t + 1: in training the model would read the answer.",
                "All the padding belongs on one side.",
            ),
            Mutant(
                lambda x, w: convolve(x, w).sum(1, keepdim=True).expand_as(x),
                "The channels were added up: this convolution is depthwise.",
                "Each channel has its own filter and its own output.",
            ),
            Mutant(
                lambda x, w: convolve(torch.cat([x.new_zeros(1, x.shape[1]), x[:-1]]), w),
                "The present token is left out.",
                "How many zeros have to stand before the first token for a filter of `taps` taps?",
            ),
        ),
    ),
    Exercise(
        number="6.3",
        title="Count a block's parameters",
        stars=1,
        minutes=10,
        sample=sample_block,
        reference=block_parameters,
        tested="8 random shapes, exactly",
        tolerance=0.0,
        mutants=(
            Mutant(
                lambda *s: block_parameters(*s, mixer=3),
                "A matrix of the mixer is missing.",
                "q, k and v come in through a matrix each. How does o leave?",
            ),
            Mutant(
                lambda *s: block_parameters(*s, conv=0),
                "The short convolutions are missing.",
                "They are few parameters, but there are three of them.",
            ),
            Mutant(
                lambda *s: block_parameters(*s, conv=1),
                "One short convolution was counted.",
                "Which of q, k and v go through a convolution of their own?",
            ),
            Mutant(
                lambda *s: block_parameters(*s, gain="none"),
                "The norm of the heads' outputs is missing.",
                "What stands between the heads and the output matrix?",
            ),
            Mutant(
                lambda *s: block_parameters(*s, gain="width"),
                "The norm of the heads was counted with a gain for each channel; the heads share one.",
                "A head has d/H channels. How many gains do all heads need, if they share them?",
            ),
            Mutant(
                lambda *s: block_parameters(*s, gain="heads"),
                "The norm of the heads was counted with one gain per head.",
                "It has a gain for each channel of a head.",
            ),
            Mutant(
                lambda *s: block_parameters(*s, norms=1),
                "One norm of width d was counted.",
                "What stands before the mixer, and what before SwiGLU?",
            ),
            Mutant(
                lambda *s: block_parameters(*s, beta=0),
                "The projection that gives beta is missing.",
                "Each head has a beta of its own, from the same input as q.",
            ),
            Mutant(
                lambda *s: block_parameters(*s, mlp=2),
                "SwiGLU was counted with two matrices.",
                "It has a gate beside the matrix that goes up and the one that goes down.",
            ),
        ),
    ),
    Exercise(
        number="6.4",
        title="What a hybrid has to remember",
        stars=2,
        minutes=10,
        sample=sample_memory,
        reference=memory,
        tested="8 random shapes, exactly",
        tolerance=0.0,
        extremes=(
            Extreme("fewer tokens than the window", _memory_of("window", t=5), "What has not come is not kept."),
            Extreme("layers of one kind", _memory_of("delta", "delta", "delta"), "Go through the list that is given."),
            Extreme("no layers", _memory_of(), "An empty list keeps nothing."),
        ),
        mutants=(
            Mutant(
                lambda *s: memory(*s, window="full"),
                "The window's cache was counted full; after fewer tokens than w it holds fewer.",
                "How much is there to keep after the first token?",
            ),
            Mutant(
                lambda *s: memory(*s, state="one"),
                "The state of one head was counted; a layer has H of them.",
                "Each head has a state of (d/H) x (d/H). How many heads are there?",
            ),
            Mutant(
                lambda *s: memory(*s, state_grows=True),
                "The state was counted once for each token, but it does not grow.",
                "What does a DeltaNet layer keep of its past?",
            ),
            Mutant(
                lambda mixers, *s: memory(["delta", "window", "attention"], *s),
                "Your count does not follow the list: it has each kind once, whatever `mixers` holds.",
                "Which layers does the model have?",
            ),
            Mutant(
                lambda *s: memory(*s, window="all"),
                "The window's cache grows without end.",
                "What can a window layer forget?",
            ),
            Mutant(
                lambda *s: memory(*s, sides=1),
                "Attention keeps keys, but it needs something else as well.",
                "What is summed with the weights that the keys give?",
            ),
            Mutant(
                lambda *s: memory(*s, state="width"),
                "The state was counted as one d x d matrix; heads make it smaller.",
                "Each head has a state of (d/H) x (d/H). How many heads are there?",
            ),
            Mutant(
                lambda *s: memory(*s, grow=False),
                "Full attention was counted with one token.",
                "Which earlier tokens may a full-attention layer never forget?",
            ),
        ),
    ),
    Exercise(
        number="6.5",
        title="The learning-rate schedule",
        stars=1,
        minutes=10,
        sample=sample_schedule,
        reference=rates,
        tested="8 schedules, every step",
        tolerance=1e-6,  # rates in float32 are right, too
        extremes=(
            Extreme("one step of warm-up", lambda g: (1, 5, 1.0, 0.1), "The first step then has the peak rate."),
            Extreme("another peak and floor", lambda g: (4, 12, 3e-3, 3e-4), "The rates scale with `top` and `floor`."),
        ),
        mutants=(
            Mutant(
                lambda *s: rates(*s, first=0),
                "You count from 0: the first rate is zero, and the last step never comes.",
                "t runs from 1 to T.",
            ),
            Mutant(
                lambda *s: rates(*s, shape="quarter"),
                "The rate falls along a quarter of a cosine wave, which ends steeply.",
                "Half a period of the cosine goes from 1 to -1.",
            ),
            Mutant(
                lambda *s: rates(*s, warm=False),
                "There is no warm-up: the first steps follow the cosine as well.",
                "Which of the two cases holds for t below w?",
            ),
            Mutant(
                lambda *s: rates(*s, last=1),
                "The floor is never reached: your cosine would end one step after the last.",
                "What is r at t = T?",
            ),
            Mutant(
                lambda *s: rates(*s, shift=1),
                "The warm-up starts with a step of rate zero, which is wasted.",
                "t counts from 1.",
            ),
            Mutant(
                lambda *s: rates(*s, start=0),
                "The cosine was counted from the first step, so that the rate jumps where the warm-up ends.",
                "What must r be at the step in which the warm-up ends?",
            ),
            Mutant(
                lambda *s: rates(*s, low=False),
                "The rate goes down to zero instead of to the floor.",
                "At r = 1 the cosine part vanishes. What is left?",
            ),
            Mutant(
                lambda *s: rates(*s, shape="line"),
                "The rate falls along a straight line.",
                "Half a period of the cosine goes from 1 to -1.",
            ),
        ),
    ),
    Exercise(
        number="6.6",
        title="Accumulation over unequal parts",
        stars=3,
        minutes=15,
        sample=sample_parts,
        reference=weighted,
        tested="8 random splits in float64",
        extremes=(
            Extreme(
                "one part", lambda g: (_randn(g, 1, 3), torch.tensor([4.0], dtype=F64)), "A single mean is the answer."
            ),
            Extreme(
                "equal parts",
                lambda g: (_randn(g, 3, 2), torch.full((3,), 4.0, dtype=F64)),
                "With equal parts, the answer has to be their mean.",
            ),
        ),
        mutants=(
            Mutant(
                lambda g, n: (n[:, None] * g).mean(0),
                "Weighted, but divided by the number of parts, not by the number of tokens.",
                "The loss of the whole batch is a mean over what?",
            ),
            Mutant(
                lambda g, n: g.sum(0) / n.sum(),
                "The parts' gradients go in without their weights: each is a mean, not a sum.",
                "Turn each mean back into a sum first.",
            ),
            Mutant(
                lambda g, n: g[n.argmax()],
                "That is the gradient of the largest part alone.",
                "All tokens count, those of small parts too.",
            ),
            Mutant(
                lambda g, n: (n.sqrt()[:, None] * g).sum(0) / n.sqrt().sum(),
                "The weights are the roots of the sizes.",
                "Should a part with twice the tokens count twice?",
            ),
            Mutant(
                lambda g, n: g.mean(0),
                "Tokens in small parts count for more than tokens in large ones.",
                "The mean over all tokens: how often does each part's mean enter it?",
            ),
            Mutant(
                lambda g, n: g.sum(0),
                "The gradients are added up: the step grows with the number of parts.",
                "With equal parts, the answer has to be their mean.",
            ),
            Mutant(
                lambda g, n: (n[:, None] * g).sum(0),
                "Weighted, but not divided by the number of tokens.",
                "The loss of the whole batch is a mean.",
            ),
            Mutant(
                lambda g, n: (g / n[:, None]).sum(0) / (1 / n).sum(),
                "The weights are the wrong way round.",
                "Should a part with twice the tokens count twice or half?",
            ),
        ),
    ),
    Exercise(
        number="6.7",
        title="One token at a time through the convolution",
        stars=2,
        minutes=10,
        sample=sample_step,
        reference=step,
        tested="8 random shapes in float64",
        outputs=("y", "the new past"),
        extremes=(
            Extreme(
                "one tap", lambda g: (_randn(g, 2), _randn(g, 0, 2), _randn(g, 2, 1)), "With one tap there is no past."
            ),
        ),
        mutants=(
            Mutant(
                lambda x, past, w: (step(x, past, w)[0], torch.cat([past, step(x, past, w)[0][None]])[1:]),
                "The output was put into the memory; the taps multiply inputs.",
                "What will the next token need as its past?",
            ),
            Mutant(
                lambda x, past, w: ((w[:, :-1].T * past).sum(0), step(x, past, w)[1]),
                "The present token is missing in the output.",
                "A filter of n taps multiplies n inputs. Which is the last of them?",
            ),
            Mutant(
                lambda x, past, w: ((w.T * torch.cat([past[:1], past])).sum(0), step(x, past, w)[1]),
                "The present token is missing in the output, and the oldest input stands in twice.",
                "A filter of n taps multiplies n inputs. Which is the last of them?",
            ),
            Mutant(
                lambda x, past, w: ((w.T * torch.cat([past, x[None]])).sum(0), past),
                "The output is right, but the memory is not moved on.",
                "What will the next token need as its past?",
            ),
            Mutant(
                lambda x, past, w: (step(x, past, w)[0], torch.cat([x[None], past])[:-1]),
                "The memory is in the wrong order: the newest input was put first.",
                "The rows of the memory stand in time order, oldest first. Where does x belong?",
            ),
            Mutant(
                lambda x, past, w: (step(x, past, w)[0], torch.cat([past, x[None]])),
                "The memory has grown by one row, and would grow with every token.",
                "A filter of n taps looks at how many tokens before the present one?",
            ),
            Mutant(
                lambda x, past, w: ((w.flip(1).T * torch.cat([past, x[None]])).sum(0), step(x, past, w)[1]),
                "The taps are in reverse: the last tap belongs to the present token.",
                "In which order do the rows of [past; x] stand in time, and the columns of w?",
            ),
        ),
    ),
]
