"""Exercises of study 3."""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.teaching.judge.method import few_steps, no_gradients, no_library
from dn_lib.teaching.registry import Exercise, Extreme, Mutant


# Inputs ------------------------------------------------------------------------------------------------
def _randint(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# S3.1 --------------------------------------------------------------------------------------------------
def _decayed(count: int, log: float | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """X and the logarithms of the decays of `count` stretches."""
    g = torch.Generator().manual_seed(seed)
    b = -2 * torch.rand(count, generator=g, dtype=torch.float64)
    return _randn(g, count, 3, 5), b if log is None else torch.full_like(b, log)


def _decayed_sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _decayed(_randint(generator, 3, 6), seed=_randint(generator, 0, 10**6))


def _entering(X, b, *, decay=True, leaving=False, write_too=False, late=False, backwards=False, log=False):
    S, states = torch.zeros_like(X[0]), []
    order = list(range(len(X)))
    for r in order[::-1] if backwards else order:
        states.append(S)
        gate = b[r - 1 if late and r else r]
        gate = gate if log else gate.exp()
        S = gate * (S + X[r]) if write_too else (gate * S if decay else S) + X[r]
        if leaving:
            states[-1] = S
    return torch.stack(states[::-1] if backwards else states)


exercise_1 = Exercise(
    number="S3.1",
    title="The state that enters, with decay",
    stars=1,
    minutes=10,
    sample=_decayed_sample,
    reference=_entering,
    extremes=(
        Extreme("one stretch", lambda g: _decayed(1), "Nothing stands before the first stretch."),
        Extreme("log_decay = 0", lambda g: _decayed(4, 0.0), "Without decay the states are summed."),
        Extreme(
            "log_decay = -800",
            lambda g: _decayed(4, -800.0),
            "exp(-800) is 0 in float64: multiply by decays, and divide by none.",
        ),
    ),
    rules=(
        no_library(
            lambda: _decayed(4), hint="One line in a loop over stretches, or sums of logarithms and one product."
        ),
    ),
    mutants=(
        Mutant(
            lambda X, b: _entering(X, b, decay=False),
            "The states are summed as they are: no stretch lets fade what came before it.",
            "What has a stretch left, at its end, of the state that entered it?",
        ),
        Mutant(
            lambda X, b: _entering(X, b, leaving=True),
            "These are the states that leave the stretches, not those that enter them.",
            "What enters the first stretch?",
        ),
        Mutant(
            lambda X, b: _entering(X, b, write_too=True),
            "The decay shrinks X of the same stretch, too: X is the state at its end, and has faded already.",
            "X is what the stretch would leave if it were the first. Which gates are in it already?",
        ),
        Mutant(
            lambda X, b: _entering(X, b, late=True),
            "Each state fades by the decay of the stretch before the one that it passes.",
            "The state that enters stretch r passes the tokens of stretch r.",
        ),
        Mutant(
            lambda X, b: _entering(X, b, backwards=True),
            "Your loop runs from the last stretch to the first: the states come from the future.",
            "Which stretches stand before stretch r?",
        ),
        Mutant(
            lambda X, b: _entering(X, b, log=True),
            "You multiply by log_decay itself, which is the logarithm of the decay.",
            "By what does a state shrink whose gates have logarithms that sum to b?",
        ),
    ),
    tested="8 random sets of 3 to 6 stretches",
)


# S3.2 --------------------------------------------------------------------------------------------------
def _chain(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return _randn(g, count, 3, 3), _randn(g, count, 3, 5), _randn(g, count, 3, 5), _randn(g, 3, 5)


def _chain_sample(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _chain(_randint(generator, 3, 5), _randint(generator, 0, 10**6))


def _map_gradients(M, S, Y, dS, *, transpose=True, use_m=True, use_y=True, enters=False, turned=False, shifted=False):
    g = [dS]
    for r in range(len(M) - 1, -1, -1):
        m = M[r].mT if transpose else M[r]
        g.append((m @ g[-1] if use_m else g[-1]) + (Y[r] if use_y else 0))
    g.reverse()
    dX = torch.stack(g[:-1] if enters else g[1:])
    states = torch.cat([S[1:], S[:1]]) if shifted else S
    return states @ dX.mT if turned else dX @ states.mT, dX


exercise_2 = Exercise(
    number="S3.2",
    title="The gradients of the maps",
    stars=2,
    minutes=15,
    sample=_chain_sample,
    reference=_map_gradients,
    outputs=("dM", "dX"),
    extremes=(
        Extreme("one stretch", lambda g: _chain(1), "Its own map is followed by nothing but the last state."),
        Extreme("two stretches", lambda g: _chain(2), "The first map acts on the loss through the second stretch."),
    ),
    rules=(
        no_gradients(lambda: _chain(3), "Two lines: a recursion from the last stretch to the first, and a product."),
        no_library(lambda: _chain(3), hint="Two lines: a recursion from the last stretch to the first, and a product."),
    ),
    mutants=(
        Mutant(
            lambda *x: _map_gradients(*x, turned=True),
            "dM is transposed: S g^T stands where g S^T belongs.",
            "Entry (i, j) of M multiplies row j of the state, and adds to row i of the next.",
        ),
        Mutant(
            lambda *x: _map_gradients(*x, enters=True),
            "You took the gradient of the state that enters each stretch; its map makes the one that leaves.",
            "In S' = M S + X, whose gradient is dX?",
        ),
        Mutant(
            lambda *x: _map_gradients(*x, transpose=False),
            "M is not transposed on the way back.",
            "The adjoint of S -> M S is g -> M^T g.",
        ),
        Mutant(
            lambda *x: _map_gradients(*x, use_m=False),
            "The gradients are summed: they pass through no map on their way back.",
            "The gradient of the state that enters r is made from that of the state that leaves it. How?",
        ),
        Mutant(
            lambda *x: _map_gradients(*x, use_y=False),
            "Y is missing: what the outputs of each stretch ask of the state that enters it.",
            "By which two ways does the state that enters stretch r reach the loss?",
        ),
        Mutant(
            lambda *x: _map_gradients(*x, shifted=True),
            "dM is made with the state of the next stretch.",
            "Which state does M_r multiply?",
        ),
    ),
    tested="8 random sets of 3 to 5 stretches",
)


# S3.3 --------------------------------------------------------------------------------------------------
def _sizes(generator: torch.Generator) -> tuple[int, int, int, int, int]:
    state, key = ((4, 2), (4, 4), (2, 2), (4, 1))[_randint(generator, 0, 3)]
    return _randint(generator, 8, 64), _randint(generator, 65, 128), 2 ** _randint(generator, 1, 5), state, key


def _shortest(
    d_k, d_v, p, state, key, *, back=True, back_pair=False, ring_back=True, home=1, even=False, own=0, square=True
):
    maps = d_k * d_v + (d_k * d_k if square else 0)
    states = (p - 1 + own) * (maps + (0 if not back else maps if back_pair else d_k * d_v)) * state
    hops = (p - 1) + (2 * (p - 1) + home if ring_back else 0)
    token = hops * (d_k + d_v) * key
    return -(-states // token) if even else states // token + 1


exercise_3 = Exercise(
    number="S3.3",
    title="From which length on is a state the lighter load?",
    stars=2,
    minutes=15,
    sample=_sizes,
    reference=_shortest,
    extremes=(
        Extreme(
            "equal bytes at 6 tokens", lambda g: (8, 8, 2, 4, 2), "At 6 tokens both are 768 bytes. Asked is: fewer."
        ),
        Extreme("64 processes", lambda g: (128, 128, 64, 4, 2), "Both grow with the number of processes."),
    ),
    mutants=(
        Mutant(
            lambda *x: _shortest(*x, back=False, ring_back=False),
            "These are the bytes of the forward pass alone.",
            "What goes back? For states one gradient each, for the ring keys, values and their gradients.",
        ),
        Mutant(
            lambda *x: _shortest(*x, back_pair=True),
            "You send the pair back as well; the maps are known by then.",
            "What is gathered on the way back, and which shape has it?",
        ),
        Mutant(
            lambda *x: _shortest(*x, square=False),
            "M is missing: these are the bytes of linear attention's states.",
            "What does a stretch of the delta rule send beside X?",
        ),
        Mutant(
            lambda *x: _shortest(*x, ring_back=False),
            "The ring's backward pass is missing.",
            "On the way back keys and values go round again. What goes with them?",
        ),
        Mutant(
            lambda *x: _shortest(*x, home=0),
            "In your ring the gradients stop one hop short of the process that owns them.",
            "After p - 1 hops a block has been everywhere. Where are its gradients then?",
        ),
        Mutant(
            lambda *x: _shortest(*x, own=1),
            "You count the own pair as received: from p processes, not from p - 1.",
            "How many of the p pairs come from elsewhere?",
        ),
        Mutant(
            lambda d_k, d_v, p, state, key: _shortest(d_k, d_v, p, 1, 1),
            "You count numbers, not bytes.",
            "How many bytes has a number of a state, and how many one of a key?",
        ),
    ),
    tested="8 random sizes, from 2 to 32 processes",
)


# S3.4 --------------------------------------------------------------------------------------------------
def _draft(m: int, accepted: int, seed: int = 0, beta: float | None = None) -> tuple:
    """The state after a draft of m tokens, its keys, values and writes, and how many are accepted."""
    g = torch.Generator().manual_seed(seed)
    k, v, S = _randn(g, m, 3), _randn(g, m, 5), _randn(g, 3, 5)
    k = k / k.norm(dim=-1, keepdim=True)
    strength = 0.2 + torch.rand(m, generator=g, dtype=torch.float64)
    strength = strength if beta is None else torch.full_like(strength, beta)
    written = []
    for t in range(m):
        written.append(strength[t] * (v[t] - k[t] @ S))
        S = S + torch.outer(k[t], written[-1])
    return S, k, v, torch.stack(written), accepted


def _draft_sample(generator: torch.Generator) -> tuple:
    m = _randint(generator, 4, 8)
    return _draft(m, _randint(generator, 1, m - 2), _randint(generator, 0, 10**6))


def _take_back(S, k, v, written, accepted, *, rows=None, first=None, last=None, sign=-1, scale=1.0):
    rows = written if rows is None else rows
    gone = slice(accepted if first is None else first, last)
    return S + sign * scale * k[gone].mT @ rows[gone]


def _asked_again(S, k, v, written, accepted):
    """Subtracts, token by token, the answer that the last state gives."""
    return S - k[accepted:].mT @ (k[accepted:] @ S)


exercise_4 = Exercise(
    number="S3.4",
    title="Take back what was rejected",
    stars=1,
    minutes=10,
    sample=_draft_sample,
    reference=_take_back,
    extremes=(
        Extreme("nothing accepted", lambda g: _draft(5, 0), "Then the whole draft is taken back."),
        Extreme("everything accepted", lambda g: _draft(5, 5), "Then nothing is taken back."),
        Extreme("beta = 1", lambda g: _draft(5, 2, beta=1.0), "A step that erases cannot be inverted. Need it be?"),
    ),
    rules=(
        no_library(lambda: _draft(5, 2), hint="One line: the state, less one product of two slices."),
        few_steps(
            lambda: _draft(6, 2),
            lambda: _draft(12, 4),
            "the draft",
            "What all rejected tokens have added is one matrix product.",
        ),
    ),
    mutants=(
        Mutant(
            lambda S, k, v, written, a: _take_back(S, k, v, written, a, rows=v),
            "You subtract the values; the tokens have added what they wrote, which is less.",
            "S_t - S_{t-1} is an outer product of k_t. With what?",
        ),
        Mutant(
            lambda S, k, v, written, a: _take_back(S, k, v, written, a, first=0, last=a),
            "You take back the accepted tokens and keep the rejected ones.",
            "Which rows of the draft come after the accepted ones?",
        ),
        Mutant(
            lambda S, k, v, written, a: _take_back(S, k, v, written, a, first=a + 1),
            "The first rejected token stays: you are off by one.",
            "We count from 0: which row is the first that was not accepted?",
        ),
        Mutant(
            lambda S, k, v, written, a: _take_back(S, k, v, written, a, first=max(a - 1, 0)),
            "The last accepted token goes, too: you are off by one.",
            "We count from 0: which row is the first that was not accepted?",
        ),
        Mutant(
            lambda S, k, v, written, a: _take_back(S, k, v, written, a, first=0),
            "The whole draft is taken back, accepted tokens too.",
            "What is `accepted` for?",
        ),
        Mutant(
            lambda S, k, v, written, a: _take_back(S, k, v, written, a, sign=1),
            "You add what the rejected tokens wrote a second time.",
            "Is the earlier state the later one plus, or less, what was written between them?",
        ),
        Mutant(
            _asked_again,
            "You subtract what the last state answers for the rejected keys; that holds older writes as well.",
            "What each token wrote is given. Does it have to be read out of the state?",
        ),
    ),
    tested="8 random drafts of 4 to 8 tokens",
)


# S3.5 --------------------------------------------------------------------------------------------------
def _state(rows: int = 4, zero: str = "", seed: int = 0) -> tuple[Tensor]:
    g = torch.Generator().manual_seed(seed)
    S = _randn(g, rows, 7) * (0.1 + 5 * torch.rand(rows, 1, generator=g, dtype=torch.float64))
    if zero == "row":
        S[1] = 0
    return (S * 0,) if zero == "all" else (S,)


def _state_sample(generator: torch.Generator) -> tuple[Tensor]:
    return _state(_randint(generator, 3, 6), seed=_randint(generator, 0, 10**6))


def _eight_bits(S, *, dims: tuple[int, ...] = (-1,), top=127, how="round", signed=True, inverse=False):
    sigma = S.abs().amax(dims, keepdim=True) / top if signed else S.amax(dims, keepdim=True) / top
    sigma = sigma.expand(len(S), 1) if dims == (-2, -1) else sigma
    safe = torch.where(sigma == 0, torch.ones_like(sigma), sigma)
    codes = getattr(S / safe, how)()
    return codes, 1 / safe if inverse else sigma


exercise_5 = Exercise(
    number="S3.5",
    title="Eight bits a number",
    stars=2,
    minutes=15,
    sample=_state_sample,
    reference=_eight_bits,
    outputs=("the codes", "the scales"),
    extremes=(
        Extreme("a row of zeros", lambda g: _state(4, "row"), "A row of zeros has the scale 0 and the codes 0."),
        Extreme("a state of zeros", lambda g: _state(4, "all"), "A row of zeros has the scale 0 and the codes 0."),
        Extreme("one row", lambda g: _state(1), "Each row has a scale of its own; one row has one."),
    ),
    rules=(no_library(lambda: _state(), hint="The largest modulus of each row, and a division."),),
    mutants=(
        Mutant(
            lambda S: _eight_bits(S, dims=(-2, -1)),
            "All rows share one scale, so that small rows keep few of their bits.",
            "The largest modulus of what?",
        ),
        Mutant(
            lambda S: _eight_bits(S, dims=(-2,)),
            "There is one scale for each column; asked is one for each row, which is a key channel.",
            "Along which axis do you take the largest modulus?",
        ),
        Mutant(
            lambda S: _eight_bits(S, how="trunc"),
            "The fractions are cut off: an entry can be off by a whole scale, and always towards zero.",
            "Which whole number is nearest to 3.9?",
        ),
        Mutant(
            lambda S: _eight_bits(S, how="floor"),
            "You round down: all errors have one sign.",
            "Which whole number is nearest to 3.9?",
        ),
        Mutant(
            lambda S: _eight_bits(S, top=128),
            "The largest code is 128, which int8 does not hold.",
            "Which whole numbers does an int8 hold, and which of them have a negative?",
        ),
        Mutant(
            lambda S: _eight_bits(S, top=255),
            "You use 255 steps for the positive numbers alone; a state has both signs.",
            "Which whole numbers does an int8 hold?",
        ),
        Mutant(
            lambda S: _eight_bits(S, inverse=True),
            "Your scales are the inverse ones: codes have to be multiplied by them to give the state.",
            "For a row with the largest modulus 127, which scale makes the codes its entries?",
        ),
    ),
    tested="8 random states in float64",
)

ENTRIES = [exercise_1, exercise_2, exercise_3, exercise_4, exercise_5]
