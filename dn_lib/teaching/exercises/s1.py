"""Exercises of study 1, forgetting."""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.teaching.judge.method import no_gradients, no_library
from dn_lib.teaching.registry import Exercise, Extreme, Mutant


# Inputs ------------------------------------------------------------------------------------------------
def _randint(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _gates(generator: torch.Generator, *shape: int) -> Tensor:
    """Logarithms of gates in (0.3, 1)."""
    return (0.3 + 0.7 * _rand(generator, *shape)).log()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# S1.1 --------------------------------------------------------------------------------------------------
def _mask_sample(generator: torch.Generator) -> tuple:
    return (_gates(generator, _randint(generator, 3, 8)),)


def _ratio_mask(g: Tensor, *, first: int = 1, own: int = 1, strict: bool = False) -> Tensor:
    """exp of the sum of g over j + first ... i - 1 + own, for j <= i (j < i if strict)."""
    C = len(g)
    out = g.new_zeros(C, C)
    for i in range(C):
        for j in range(i + (not strict)):
            out[i, j] = g[j + first : i + own].sum().exp()
    return out


def _whole_mask(g: Tensor) -> Tensor:
    b = g.cumsum(0)
    return (b[:, None] - b).exp()


exercise_1 = Exercise(
    number="S1.1",
    title="The mask of ratios",
    stars=1,
    minutes=10,
    sample=_mask_sample,
    reference=_ratio_mask,
    extremes=(
        Extreme("one token", lambda g: (_gates(g, 1),), "A token that reads its own write finds it undecayed."),
        Extreme(
            "200 tokens with a gate of 0.001",
            lambda g: (torch.full((200,), 1e-3, dtype=torch.float64).log(),),
            "The product of the gates underflows to zero: no ratio may be formed from it.",
        ),
        Extreme(
            "a gate of zero in the middle",
            lambda g: (torch.tensor([-0.1, -0.2, -torch.inf, -0.3, -0.4], dtype=torch.float64),),
            "-inf less -inf is not a number. The sum over a span that holds -inf is -inf; any other is finite.",
        ),
    ),
    rules=(no_library(lambda: (_gates(_seeded(0), 5),), hint="Sums over spans, for every pair: masks and cumsum do."),),
    mutants=(
        Mutant(
            _whole_mask,
            "The upper triangle is not empty: queries would read what is written after them.",
            "Which tokens has token i seen?",
        ),
        Mutant(
            lambda g: _ratio_mask(g, first=0),
            "Token j's own gate is in the ratio, but the gate decays the state before token j writes.",
            "Which is the first gate that what token j wrote meets?",
        ),
        Mutant(
            lambda g: _ratio_mask(g, own=0),
            "Token i's own gate is missing from the ratio.",
            "Token i reads the state after its own step. Has its gate been applied by then?",
        ),
        Mutant(
            lambda g: _ratio_mask(g, strict=True),
            "The diagonal is zero: a token would not read its own write.",
            "Does token i read S_{i-1} or S_i?",
        ),
        Mutant(
            lambda g: g.new_ones(len(g), len(g)).tril() * g.cumsum(0).exp()[:, None],
            "Each row holds the decay since the chunk began, whichever token wrote.",
            "The ratio has two indices. How long has the write of token j been there?",
        ),
    ),
    tested="8 random chunks in float64",
)


# S1.2 --------------------------------------------------------------------------------------------------
def _block_sample(generator: torch.Generator) -> tuple:
    C, d_k, d_v = _randint(generator, 3, 7), _randint(generator, 2, 4), _randint(generator, 5, 6)
    return (
        _randn(generator, C, d_k),
        _randn(generator, C, d_k),
        _randn(generator, C, d_v),
        float(0.4 + 0.55 * _rand(generator, 1)),
        _randn(generator, d_k, d_v),
        _randn(generator, C, d_v),
        _randn(generator, d_k, d_v),
    )


def _block(length: int, decay: float) -> tuple:
    g = _seeded(length)
    return (
        _randn(g, length, 3),
        _randn(g, length, 3),
        _randn(g, length, 5),
        decay,
        _randn(g, 3, 5),
        _randn(g, length, 5),
        _randn(g, 3, 5),
    )


def _block_backward(
    q, k, v, decay, S, do, dS, *, transpose=True, end=0, carry=True, own=True, late=0, mask=True, state=True
):
    C = len(q)
    i = torch.arange(C, dtype=q.dtype)
    age = (i[:, None] - i).clamp(min=0)
    D = (decay ** (age if mask else 0 * age)).tril()
    start, to_end = decay ** (i[:, None] + 1 + late), decay ** (C - 1 - i[:, None] + end)
    scores, back = D * (q @ k.mT), D * (do @ v.mT)
    dq = back @ k + (start * (do @ S.mT) if state else 0)
    dk = (back.mT if transpose else back) @ q + to_end * (v @ dS.mT)
    dv = (scores.mT if transpose else scores) @ do + to_end * (k @ dS)
    return dq, dk, dv, (decay**C if carry else 1) * dS * own + (start * q).mT @ do


exercise_2 = Exercise(
    number="S1.2",
    title="A block of Lightning, backwards",
    stars=2,
    minutes=20,
    sample=_block_sample,
    reference=_block_backward,
    outputs=("dq", "dk", "dv", "dS"),
    extremes=(
        Extreme("one token", lambda g: _block(1, 0.7), "A block of one token is one step of the recurrence."),
        Extreme("lambda = 1", lambda g: _block(5, 1.0), "Without decay it is linear attention."),
        Extreme(
            "200 tokens with lambda = 0.01",
            lambda g: _block(200, 0.01),
            "A power with a negative exponent overflows: all exponents that you need are at least 0.",
        ),
    ),
    rules=(
        no_gradients(lambda: _block(5, 0.7), hint="Four lines of matrix products, derived by hand."),
        no_library(lambda: _block(5, 0.7), hint="Four lines of matrix products, derived by hand."),
    ),
    mutants=(
        Mutant(
            lambda *x: _block_backward(*x, transpose=False),
            "The masked scores are not transposed: dk_j has to gather from the queries at or after j.",
            "Which outputs does the write of token j reach?",
        ),
        Mutant(
            lambda *x: _block_backward(*x, carry=False),
            "The gradient passes the block undecayed: the state that entered has decayed C times before it leaves.",
            "S' = lambda^C S + ... : what is the gradient of S?",
        ),
        Mutant(
            lambda *x: _block_backward(*x, own=False),
            "The gradient of the state that leaves does not reach the one that enters.",
            "By how many ways does S reach the loss?",
        ),
        Mutant(
            lambda *x: _block_backward(*x, end=1),
            "What a token writes decays once too often on its way to the end of the block.",
            "How much has the last token's write decayed when the block ends?",
        ),
        Mutant(
            lambda *x: _block_backward(*x, late=-1),
            "The outputs read the entering state with one decay too few.",
            "Does token 1 read the state before or after its own decay?",
        ),
        Mutant(
            lambda *x: _block_backward(*x, mask=False),
            "The mask holds ones: inside the block nothing decays.",
            "What did the forward pass multiply with the scores?",
        ),
        Mutant(
            lambda *x: _block_backward(*x, state=False),
            "dq forgets that the query read the entering state, too.",
            "O has two terms with Q. Both give dQ.",
        ),
    ),
    tested="8 random blocks in float64",
)


# S1.3 --------------------------------------------------------------------------------------------------
def _tile_sample(generator: torch.Generator) -> tuple:
    C, d_k = _randint(generator, 4, 8), _randint(generator, 2, 4)
    n = _randint(generator, 1, C - 1)
    return _randn(generator, C, d_k), _randn(generator, C, d_k), _gates(generator, C, d_k), n


def _strong(length: int, alpha: float) -> tuple:
    g = _seeded(length)
    gates = torch.full((length, 3), alpha, dtype=torch.float64).log()
    return _randn(g, length, 3), _randn(g, length, 3), gates, length // 2


def _tile(q, k, g, n, *, own=False, left=True, right=True, mean=False, tail=False):
    b = (g.mean(-1, keepdim=True).expand_as(g) if mean else g).cumsum(0)
    queries = q[n:] * ((b[n:] - b[n - 1]).exp() if left else 1)
    to_cut = b[n - 1] - b[:n]
    if own:
        to_cut = to_cut + g[:n]
    keys = k[:n] * (to_cut.exp() if right else 1)
    if tail:
        keys = k[:n] * b[:n].exp()
    return queries @ keys.mT


exercise_3 = Exercise(
    number="S1.3",
    title="One tile of a product per channel",
    stars=2,
    minutes=15,
    sample=_tile_sample,
    reference=_tile,
    extremes=(
        Extreme("gates of 1", lambda g: _strong(6, 1.0), "Without decay the tile is a block of Q K^T."),
        Extreme(
            "400 tokens with gates of 0.01",
            lambda g: _strong(400, 0.01),
            "The exponential of a positive number overflows: cut each span in two, so that no exponent is above 0.",
        ),
    ),
    rules=(no_library(lambda: _strong(6, 0.5), hint="One product of two matrices, each decayed up to the cut."),),
    mutants=(
        Mutant(
            lambda q, k, g, n: _tile(q, k, g, n, left=False),
            "The queries carry no decay: what was stored at the cut fades further until the query reads it.",
            "The span from j to i has two parts, one on each side of the cut.",
        ),
        Mutant(
            lambda q, k, g, n: _tile(q, k, g, n, right=False),
            "The keys carry no decay: what token j wrote fades until the cut.",
            "The span from j to i has two parts, one on each side of the cut.",
        ),
        Mutant(
            lambda q, k, g, n: _tile(q, k, g, n, own=True),
            "Token j's own gate is counted, but the gate decays the state before token j writes.",
            "Which is the first gate that what token j wrote meets?",
        ),
        Mutant(
            lambda q, k, g, n: _tile(q, k, g, n, mean=True),
            "One gate for all channels of a token: here every channel has its own.",
            "b is [C, d_k]. Multiply before you sum over channels.",
        ),
        Mutant(
            lambda q, k, g, n: _tile(q, k, g, n, tail=True),
            "The keys are multiplied with their decay since the chunk began, not with that from j to the cut.",
            "What token j wrote was not there before j.",
        ),
    ),
    tested="8 random tiles in float64",
)


# S1.4 --------------------------------------------------------------------------------------------------
def _kda_sample(generator: torch.Generator) -> tuple:
    L, d_k, d_v = _randint(generator, 3, 8), _randint(generator, 2, 5), _randint(generator, 6, 7)
    k = _randn(generator, L, d_k)
    return (
        _randn(generator, L, d_k),
        k / k.norm(dim=-1, keepdim=True),
        _randn(generator, L, d_v),
        2 * _rand(generator, L),
        _gates(generator, L, d_k).exp(),
    )


def _kda_fixed(length: int, alpha: float | None = None, beta: float | None = None) -> tuple:
    g = _seeded(length)
    q, k, v, b, a = _randn(g, length, 3), _randn(g, length, 3), _randn(g, length, 5), 2 * _rand(g, length), None
    a = _rand(g, length, 3) if alpha is None else torch.full((length, 3), alpha, dtype=torch.float64)
    b = b if beta is None else torch.full_like(b, beta)
    return q, k / k.norm(dim=-1, keepdim=True), v, b, a


def _kda(q, k, v, beta, alpha, *, rule="kda"):
    S, outputs = torch.zeros(k.shape[1], v.shape[1]).to(v), []
    for t in range(len(k)):
        fade = alpha[t][:, None]
        if rule == "number":
            fade = alpha[t].mean()
        if rule == "values":
            fade = alpha[t].mean() * torch.ones_like(fade)
        if rule == "erase first":
            S = fade * (S - beta[t] * torch.outer(k[t], k[t] @ S)) + beta[t] * torch.outer(k[t], v[t])
        elif rule == "write too":
            S = fade * (S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S))
        elif rule == "old error":
            S = fade * S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S)
        elif rule == "no erasure":
            S = fade * S + beta[t] * torch.outer(k[t], v[t])
        else:
            S = fade * S
            S = S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S)
        outputs.append(q[t] @ S)
    return torch.stack(outputs)


exercise_4 = Exercise(
    number="S1.4",
    title="Decay first, then erase",
    stars=1,
    minutes=10,
    sample=_kda_sample,
    reference=_kda,
    extremes=(
        Extreme("one token", lambda g: _kda_fixed(1), "The first token writes beta k v^T into an empty state."),
        Extreme("gates of 0", lambda g: _kda_fixed(5, alpha=0.0), "With gates of 0 each token finds an empty state."),
        Extreme("beta = 0", lambda g: _kda_fixed(5, beta=0.0), "With beta = 0 nothing is written."),
    ),
    rules=(no_library(lambda: _kda_fixed(4), hint="A loop of three lines."),),
    mutants=(
        Mutant(
            lambda *x: _kda(*x, rule="erase first"),
            "You erase first and decay then: with one gate for each channel that is another rule.",
            "In (I - beta k k^T) Diag(alpha) S, which of the two factors meets S first?",
        ),
        Mutant(
            lambda *x: _kda(*x, rule="write too"),
            "The new write decays too: it comes after the decay.",
            "In the rule, what does Diag(alpha) multiply, and what does it not?",
        ),
        Mutant(
            lambda *x: _kda(*x, rule="old error"),
            "The error is taken against the state before it decays.",
            "Which state is there when the error is taken?",
        ),
        Mutant(
            lambda *x: _kda(*x, rule="no erasure"),
            "Nothing is erased: this is gated linear attention.",
            "What does the state hold for k before the write?",
        ),
        Mutant(
            lambda *x: _kda(*x, rule="number"),
            "One gate for the whole state: here every channel of the keys has its own.",
            "alpha[t] has d_k entries, and the state d_k rows.",
        ),
    ),
    tested="8 random sequences in float64",
)


# S1.5 --------------------------------------------------------------------------------------------------
def _noise_sample(generator: torch.Generator) -> tuple:
    count = _randint(generator, 3, 40)
    return (
        float(0.5 + 0.49 * _rand(generator, 1)),
        _randint(generator, 0, count - 1),
        count,
        _randint(generator, 8, 64),
    )


def _expected(decay, age, count, d, *, power=2, own=False, lost=2, forever=False, flat=False, width=1.0):
    ages = range(count)
    total = sum(decay ** (power * a) for a in ages if own or a != age)
    if forever:
        total = 1 / (1 - decay**2) - decay ** (2 * age)
    if flat:
        total = count - 1
    return (1 - decay**age) ** lost + total / d**width


exercise_5 = Exercise(
    number="S1.5",
    title="How wrong is a fading memory?",
    stars=2,
    minutes=15,
    sample=_noise_sample,
    reference=_expected,
    extremes=(
        Extreme("the newest pair", lambda g: (0.9, 0, 10, 16), "The newest pair has not decayed: only noise is left."),
        Extreme("one pair", lambda g: (0.9, 0, 1, 16), "With one pair there is nothing to disturb it."),
        Extreme("no decay", lambda g: (1.0, 3, 10, 16), "Without decay every other pair disturbs by 1/d."),
    ),
    rules=(no_library(lambda: (0.9, 2, 5, 8), hint="Two terms: what the pair has lost, and what the others add."),),
    mutants=(
        Mutant(
            lambda *x: _expected(*x, power=1),
            "The noise adds amplitudes: independent signs cancel, and what adds up are squares.",
            "The mean square of a sum of independent terms of mean zero is the sum of what?",
        ),
        Mutant(
            lambda *x: _expected(*x, own=True),
            "The pair itself is counted among those that disturb it.",
            "Which terms of S^T k have the inner product 1?",
        ),
        Mutant(
            lambda *x: _expected(*x, lost=1),
            "What the pair has lost enters unsquared: the error is a squared length.",
            "The answer holds lambda^a v, not v. What is the squared length of the difference?",
        ),
        Mutant(
            lambda *x: _expected(*x, forever=True),
            "The noise is that of an endless stream, not of the pairs that there are.",
            "How many pairs have been written?",
        ),
        Mutant(
            lambda *x: _expected(*x, flat=True),
            "The other pairs disturb as if they had not decayed.",
            "How strong is the write of a pair of age m?",
        ),
        Mutant(
            lambda *x: _expected(*x, width=0.5),
            "The noise is divided by the root of d: squared inner products of random unit keys are 1/d on average.",
            "Sum the squared inner products of a unit vector with an orthonormal basis.",
        ),
    ),
    tested="8 random memories",
)


ENTRIES = [exercise_1, exercise_2, exercise_3, exercise_4, exercise_5]
