"""The exercises of chapter 1: references, and the wrong answers that learners give."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations, cycle

import torch

from dn_lib.forms.linear_attention import (
    chunkwise_linear_attention,
    elu_feature_map,
    parallel_linear_attention,
    recurrent_linear_attention,
)
from dn_lib.teaching.registry import Exercise, Mutant


def _integer(g, low, high):
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _qkv(g):
    length = _integer(g, 4, 20)
    return _normal(g, length, 3), _normal(g, length, 3), _normal(g, length, 5)


# --- 1.1 a running sum -----------------------------------------------------------------------------------


def _running_sum(q, k, v, *, phi_q=elu_feature_map, phi_k=elu_feature_map, z_of="k", shift=0, divide=True):
    """Kernel attention from cumulative sums; `shift=1` reads before it writes."""
    phi_q, phi_k = phi_q(q), phi_k(k)
    writes = phi_k[:, :, None] * v[:, None, :]
    states = writes.cumsum(0) - shift * writes
    z = (phi_k if z_of == "k" else phi_q).cumsum(0)
    read = torch.einsum("td,tde->te", phi_q, states)
    return read / (phi_q * z).sum(-1, keepdim=True) if divide else read


EX_1_1 = Exercise(
    number="1.1",
    title="Attention from two running sums",
    stars=1,
    minutes=10,
    sample=_qkv,
    reference=_running_sum,
    tested="8 random sequences in float64",
    mutants=(
        Mutant(
            partial(_running_sum, divide=False),
            "The weights do not sum to one: the division by z^T phi(q) is missing.",
            "Two sums run along the sequence. You have one of them.",
        ),
        Mutant(
            partial(_running_sum, phi_q=lambda x: x),
            "The query did not go through the feature map.",
            "The kernel is a dot product of two feature vectors. Which two?",
        ),
        Mutant(
            partial(_running_sum, phi_k=lambda x: x),
            "The key did not go through the feature map.",
            "What is written into S and z: k, or something made from k?",
        ),
        Mutant(
            partial(_running_sum, shift=1),
            "You read before you wrote: token t does not see its own value, though z counts it.",
            "The sum in the definition runs up to and including t.",
        ),
        Mutant(
            partial(_running_sum, z_of="q"),
            "z sums the features of the queries.",
            "Write the denominator as a sum over j and see what can be pulled out of it.",
        ),
    ),
)


# --- 1.2 chunkwise ---------------------------------------------------------------------------------------


def _chunked_sample(g):
    chunk = _integer(g, 2, 6)
    length = chunk * _integer(g, 2, 4) + _integer(g, 1, chunk - 1)
    return _normal(g, length, 3), _normal(g, length, 3), _normal(g, length, 5), chunk


def _chunkwise(q, k, v, chunk_size, *, diagonal=0, write_first=False, keep=1.0, ragged=True, scale=1.0):
    state, outputs = torch.zeros(k.shape[-1], v.shape[-1]).to(v), []
    for start in range(0, len(q), chunk_size):
        q_c, k_c, v_c = (x[start : start + chunk_size] for x in (q, k, v))
        new_state = keep * state + k_c.T @ v_c
        o = scale * (q_c @ (new_state if write_first else state) + (q_c @ k_c.T).tril(diagonal) @ v_c)
        outputs.append(o if ragged or len(q_c) == chunk_size else torch.zeros_like(o))
        state = new_state
    return torch.cat(outputs)


EX_1_2 = Exercise(
    number="1.2",
    title="The chunkwise form, with a short last chunk",
    stars=2,
    minutes=15,
    sample=_chunked_sample,
    reference=_chunkwise,
    tested="8 random sequences whose length is no multiple of the chunk size, in float64",
    mutants=(
        Mutant(
            partial(_chunkwise, diagonal=-1),
            "Inside a chunk, no token sees its own value.",
            "Which diagonal does the mask keep when i = j is allowed?",
        ),
        Mutant(
            partial(_chunkwise, diagonal=10**6),
            "Inside a chunk, tokens see the future: the mask is missing.",
            "The recurrence reads S_t, which holds nothing after t.",
        ),
        Mutant(
            partial(_chunkwise, write_first=True),
            "Your own chunk is counted twice: once through the state and once through the scores.",
            "Does a chunk read the state before it, or the state after it?",
        ),
        Mutant(
            partial(_chunkwise, keep=0.0),
            "Each chunk remembers only the chunk before it.",
            "What happens to the old state when a chunk is written?",
        ),
        Mutant(
            partial(_chunkwise, ragged=False),
            "The last, shorter chunk comes out as zeros.",
            "How many chunks are there when C does not divide L?",
        ),
        Mutant(
            lambda q, k, v, chunk_size: _chunkwise(q, k, v, chunk_size, scale=q.shape[-1] ** -0.5),
            "You scaled the queries; this exercise asks for scale 1.",
            "Reread the signature in the task.",
        ),
    ),
)


# --- 1.3 several workers ---------------------------------------------------------------------------------


def _workers_sample(g):
    workers = _integer(g, 2, 4)
    length = workers * _integer(g, 2, 5)
    return _normal(g, length, 3), _normal(g, length, 3), _normal(g, length, 5), workers


def _workers(q, k, v, workers, *, exchange="before"):
    size = len(q) // workers
    parts = [(q[i : i + size], k[i : i + size], v[i : i + size]) for i in range(0, len(q), size)]
    sums = torch.stack([k_w.T @ v_w for _, k_w, v_w in parts])
    states = {
        "before": sums.cumsum(0) - sums,
        "including": sums.cumsum(0),
        "all": sums.sum(0).expand_as(sums),
        "none": torch.zeros_like(sums),
        "neighbour": torch.cat([torch.zeros_like(sums[:1]), sums[:-1]]),
    }[exchange]
    return torch.cat([q_w @ s + (q_w @ k_w.T).tril() @ v_w for (q_w, k_w, v_w), s in zip(parts, states, strict=True)])


EX_1_3 = Exercise(
    number="1.3",
    title="One sequence, several workers",
    stars=2,
    minutes=15,
    sample=_workers_sample,
    reference=_workers,
    tested="8 random sequences on 2 to 4 workers, in float64",
    mutants=(
        Mutant(
            partial(_workers, exchange="including"),
            "Each worker was given its own writes as well, and counts them twice.",
            "Worker 0 must start from an empty state.",
        ),
        Mutant(
            partial(_workers, exchange="all"),
            "Every worker starts from the sum over all workers: that lets it see the future.",
            "Which workers hold tokens that come before mine?",
        ),
        Mutant(
            partial(_workers, exchange="none"),
            "The workers did not exchange anything: each answers as if its part were the whole sequence.",
            "What does the second worker need to know about the first one's tokens?",
        ),
        Mutant(
            partial(_workers, exchange="neighbour"),
            "Each worker was given its neighbour's writes only.",
            "With three workers, what has the last one missed?",
        ),
    ),
)


# --- 1.4 a property test ---------------------------------------------------------------------------------


def _implementation(
    q, k, v, chunk_size, initial_state=None, *, diagonal=0, write_first=False, keep=1.0, start=1.0, tail=True
):
    """The chunkwise form; each keyword argument but the defaults puts one bug into it."""
    state = torch.zeros(k.shape[-1], v.shape[-1]).to(v) if initial_state is None else start * initial_state
    outputs = [v[:0]]
    for n in range(0, len(q), chunk_size):
        q_c, k_c, v_c = (
            q[n : n + chunk_size] * q.shape[-1] ** -0.5,
            k[n : n + chunk_size],
            v[n : n + chunk_size],
        )
        new_state = (keep if n else 1.0) * state + k_c.T @ v_c
        outputs.append(q_c @ (new_state if write_first else state) + (q_c @ k_c.T).tril(diagonal) @ v_c)
        state = new_state if tail or len(q_c) == chunk_size else state
    return torch.cat(outputs), state


def _by_recurrence(q, k, v, chunk_size, initial_state=None):
    return recurrent_linear_attention(q, k, v, initial_state=initial_state)


def _by_matrix(q, k, v, chunk_size, initial_state=None):
    return parallel_linear_attention(q, k, v, initial_state=initial_state)


def _by_chunks(q, k, v, chunk_size, initial_state=None):
    return chunkwise_linear_attention(q, k, v, initial_state=initial_state, chunk_size=chunk_size)


CORRECT = (_by_recurrence, _by_matrix, _by_chunks)
BROKEN = {
    partial(_implementation, diagonal=-1): "the mask leaves out the diagonal",
    partial(_implementation, diagonal=10**6): "there is no mask inside a chunk",
    partial(_implementation, write_first=True): "a chunk reads the state after its own write",
    partial(_implementation, start=0.0): "the initial state is ignored",
    partial(_implementation, keep=0.0): "from the second chunk on, the old state is dropped when a chunk is written",
    partial(_implementation, tail=False): "a short last chunk never reaches the final state",
}
HINTS = (
    "Compare the outputs of every token with those of the recurrence.",
    "Change a later token: no earlier output may move.",
    "Use more than one token per chunk and compare all outputs.",
    "Call the implementation with an initial state as well as without.",
    "Use a sequence of at least three chunks.",
    "Use a length that is no multiple of the chunk size, and look at the second result too.",
)


def _passes(implementation, missed):
    """What a test says that catches every broken implementation but those in `missed`."""
    return implementation in CORRECT or implementation in missed


def _survivors():
    """One mutant for every non-empty set of broken implementations that a test may let through."""
    mutants, broken = [], list(BROKEN)
    for size in range(len(broken), 0, -1):
        for missed in combinations(broken, size):
            named = "; ".join(BROKEN[b] for b in missed)
            score = f"Your test catches {len(broken) - size} of {len(broken)} bugs."
            message = f"{score} It passes code in which {named}."
            hint = HINTS[broken.index(missed[0])]
            mutants.append(Mutant(partial(_passes, missed=missed), message, hint))
    return tuple(mutants)


_CASES = cycle([*BROKEN, *CORRECT])

EX_1_4 = Exercise(
    number="1.4",
    title="A test that catches these bugs",
    stars=2,
    minutes=25,
    sample=lambda g: (next(_CASES),),
    reference=lambda implementation: implementation in CORRECT,
    trials=len(BROKEN) + len(CORRECT),  # any run of that many draws from the cycle meets each of them once
    tested="3 correct and 6 broken implementations",
    mutants=(
        Mutant(
            lambda implementation: False,
            "Your test fails everything, the correct implementations too.",
            "Run it on `chunkwise_linear_attention` first. Which of your conditions is not met?",
        ),
        Mutant(
            lambda implementation: implementation is _by_recurrence,
            "Your test fails correct implementations that add up in another order.",
            "Sums in floating point depend on their order. How far apart may two right answers be?",
        ),
        *_survivors(),
    ),
)


# --- 1.5 interference of correlated keys -----------------------------------------------------------------


def _correlated_error(n, d, rho):
    return (n - 1) * (rho**2 + (1 - rho) ** 2 / (d - 1))


EX_1_5 = Exercise(
    number="1.5",
    title="Interference of keys that share a direction",
    stars=2,
    minutes=20,
    sample=lambda g: (
        _integer(g, 2, 200),
        _integer(g, 2, 64),
        float(torch.rand((), generator=g, dtype=torch.float64)),
    ),
    reference=_correlated_error,
    tested="8 triples (n, d, rho)",
    mutants=(
        Mutant(
            lambda n, d, rho: (n - 1) / d,
            "This is the answer for keys without a common direction.",
            "At rho = 1 all keys are equal. What does a read return then?",
        ),
        Mutant(
            lambda n, d, rho: (n - 1) * (rho**2 + (1 - rho) ** 2 / d),
            "The random parts live in fewer dimensions than you count.",
            "u is orthogonal to c. How many dimensions are left for it?",
        ),
        Mutant(
            lambda n, d, rho: (n - 1) * (rho + (1 - rho) / (d - 1)),
            "You averaged the parts of the overlap without squaring them.",
            "Write out the overlap of two keys first, then square it.",
        ),
        Mutant(
            lambda n, d, rho: n * (rho**2 + (1 - rho) ** 2 / (d - 1)),
            "A pair does not interfere with itself.",
            "How many terms has the sum over i different from j?",
        ),
        Mutant(
            lambda n, d, rho: (n - 1) * (1 - rho) ** 2 / (d - 1),
            "The common direction is missing: it overlaps for every two keys.",
            "What is the overlap of two keys along c alone?",
        ),
    ),
)


# --- 1.6 cache against state -----------------------------------------------------------------------------


EX_1_6 = Exercise(
    number="1.6",
    title="From which token on is the cache larger?",
    stars=1,
    minutes=5,
    sample=lambda g: (2 ** _integer(g, 1, 7), 2 ** _integer(g, 1, 7) * _integer(g, 1, 3)),
    reference=lambda d_k, d_v: d_k * d_v // (d_k + d_v) + 1,
    trials=40,
    tested="40 pairs of sizes, with and without an exact tie",
    mutants=(
        Mutant(
            lambda d_k, d_v: math.ceil(d_k * d_v / (d_k + d_v)),
            "At a tie the cache is not larger yet.",
            "Try d_k = d_v = 2 by hand: what do cache and state hold after one token?",
        ),
        Mutant(
            lambda d_k, d_v: d_k * d_v // (d_k + d_v),
            "One token early: at that length the cache is at most as large as the state.",
            "The question asks for the first whole number above the crossing.",
        ),
        Mutant(
            lambda d_k, d_v: d_v + 1,
            "You counted the keys only; the cache holds the values too.",
            "How many numbers does one token add to the cache?",
        ),
        Mutant(
            lambda d_k, d_v: 2 * d_k * d_v // (d_k + d_v) + 1,
            "That is where the *work* of the quadratic form overtakes the recurrence, not the memory.",
            "Count numbers that must be kept from one token to the next, not multiplications.",
        ),
    ),
)


# --- 1.7 decay, chunk by chunk ---------------------------------------------------------------------------


def _decay_sample(g):
    chunk = _integer(g, 2, 5)
    length = chunk * 3 + _integer(g, 0, chunk - 1)
    gamma = 0.5 + 0.45 * float(torch.rand((), generator=g, dtype=torch.float64))
    return _normal(g, length, 3), _normal(g, length, 3), _normal(g, length, 5), gamma, chunk


def _decayed(q, k, v, gamma, chunk_size, *, inside=True, read_from: int | None = 1, carry=True, write="late"):
    state, outputs = torch.zeros(k.shape[-1], v.shape[-1]).to(v), []
    for start in range(0, len(q), chunk_size):
        q_c, k_c, v_c = (x[start : start + chunk_size] for x in (q, k, v))
        n = len(q_c)
        i = torch.arange(n).to(q)
        fade = gamma ** (i[:, None] - i[None, :]).clamp(min=0) if inside else torch.ones(n, n).to(q)
        reach = gamma ** (i[:, None] + read_from) if read_from is not None else 1.0
        outputs.append((reach * q_c) @ state + ((q_c @ k_c.T) * fade).tril() @ v_c)
        left = {"late": n - 1 - i, "early": i, "none": 0 * i}[write]
        state = (gamma**n if carry else 1.0) * state + (gamma ** left[:, None] * k_c).T @ v_c
    return torch.cat(outputs)


EX_1_7 = Exercise(
    number="1.7",
    title="A fading state, chunk by chunk",
    stars=3,
    minutes=40,
    sample=_decay_sample,
    reference=_decayed,
    tested="8 random sequences with gamma between 0.5 and 0.95, some with a short last chunk, in float64",
    mutants=(
        Mutant(
            partial(_decayed, inside=False),
            "Inside a chunk nothing fades.",
            "Multiply the scores by a matrix whose entry (i, j) depends on i - j.",
        ),
        Mutant(
            partial(_decayed, read_from=None),
            "The state before the chunk is read as if no time had passed inside the chunk.",
            "How often has it been multiplied by gamma when the chunk's first token reads it?",
        ),
        Mutant(
            partial(_decayed, read_from=0),
            "The state before the chunk has faded one step too little.",
            "The recurrence fades first, then writes, then reads: count for the chunk's first token.",
        ),
        Mutant(
            partial(_decayed, carry=False),
            "The state does not fade from one chunk to the next.",
            "By which factor has the old state shrunk at the end of a chunk?",
        ),
        Mutant(
            partial(_decayed, write="none"),
            "All tokens of a chunk enter the state at full strength.",
            "The chunk's first token is already C - 1 steps old when the chunk ends.",
        ),
        Mutant(
            partial(_decayed, write="early"),
            "The fading of the writes runs backwards: old tokens enter the state strongest.",
            "Which token of a chunk is the youngest at its end?",
        ),
    ),
)

ENTRIES = [EX_1_1, EX_1_2, EX_1_3, EX_1_4, EX_1_5, EX_1_6, EX_1_7]
