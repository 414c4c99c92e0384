"""The exercises of chapter 1: references, and the wrong answers that learners give."""

from __future__ import annotations

import math
from functools import partial

import torch

from dn_lib.forms.linear_attention import (
    chunkwise_linear_attention,
    elu_feature_map,
    parallel_linear_attention,
    recurrent_linear_attention,
    softmax_attention,
)
from dn_lib.teaching.judge.method import (
    Record,
    Rule,
    at_most,
    few_steps,
    no_library,
    no_operations,
    no_square,
)
from dn_lib.teaching.registry import Candidate, Exercise, Extreme, Mutant


def _integer(g, low, high):
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _qkv(g):
    length = _integer(g, 4, 20)
    return _normal(g, length, 3), _normal(g, length, 3), _normal(g, length, 5)


def _fixed(length, d_k=3, d_v=5):
    """q, k, v of one size, on which the method is looked at."""
    g = torch.Generator().manual_seed(length)
    return _normal(g, length, d_k), _normal(g, length, d_k), _normal(g, length, d_v)


# --- 1.1 a running sum -----------------------------------------------------------------------------------


def _identity(x):
    return x


def _elu(x):
    return elu_feature_map(x) - 1


def _relu(x):
    return x.relu() + 1


def _shares(x):
    return elu_feature_map(x) / elu_feature_map(x).sum(-1, keepdim=True)


def _running_sum(
    q, k, v, *, phi_q=elu_feature_map, phi_k=elu_feature_map, z_of="k", reads="after", divide="z", scale=1.0
):
    """Kernel attention from two running sums; `reads="before"` reads S, or S and z, before the token is written."""
    state, z, outputs = v.new_zeros(k.shape[-1], v.shape[-1]), v.new_zeros(k.shape[-1]), []
    for t in range(len(q)):
        query, key = phi_q(scale * q[t]), phi_k(k[t])
        old_state, old_z = state, z
        state = state + torch.outer(key, v[t])
        z = {"k": z + key, "q": z + query, "now": key}[z_of]
        read = query @ (state if reads == "after" else old_state)
        by = {
            "z": query @ (old_z if reads == "both before" else z),
            "nothing": 1.0,
            "length": t + 1,
            "entries of z": z.sum(),
            "final z": query @ phi_k(k).sum(0),
            "norms": query.norm() * z.norm(),
            "diagonal": (phi_q(q[: t + 1]) * phi_k(k[: t + 1])).sum(),
        }[divide]
        outputs.append(read / by)
    return torch.stack(outputs)


EX_1_1 = Exercise(
    number="1.1",
    title="Attention from two running sums",
    stars=1,
    minutes=10,
    sample=_qkv,
    reference=_running_sum,
    tested="8 random sequences in float64",
    extremes=(Extreme("one token", lambda g: _fixed(1), "With one token, all weight is on it."),),
    rules=(
        no_library(lambda: _fixed(6), "elu_feature_map", "elu", hint="Write the loop over the tokens."),
        no_square(
            lambda: _fixed(40), 40, "L x L", "Two sums, of a size that does not depend on L, are all that is kept."
        ),
        at_most(
            lambda: _fixed(40),
            40 * 3 * 5,
            "a state for each token",
            "One S is enough: each token adds to it, then reads it.",
        ),
    ),
    mutants=(
        Mutant(
            partial(_running_sum, divide="nothing"),
            "The weights do not sum to one: the division by z^T phi(q) is missing.",
            "Two sums run along the sequence. You have one of them.",
        ),
        Mutant(
            partial(_running_sum, divide="length"),
            "You divide by the number of tokens: that is an average with equal weights in the denominator.",
            "The denominator is the sum of the weights of this query. Which sum of keys gives it?",
        ),
        Mutant(
            partial(_running_sum, divide="entries of z"),
            "You divide by the sum of the entries of z: the query has no part in your denominator.",
            "The denominator is the sum of the weights of this query. How does each weight depend on it?",
        ),
        Mutant(
            partial(_running_sum, divide="diagonal"),
            "Your denominator sums the weight of every earlier query with its own key, not those of this query.",
            "Whose query stands in each of the weights that belong to output t?",
        ),
        Mutant(
            lambda q, k, v: softmax_attention(q, k, v, scale=1.0),
            "These are softmax weights, exp(q^T k); asked for is the kernel phi(q)^T phi(k).",
            "What takes the place of the exponential in this section?",
        ),
        Mutant(
            partial(_running_sum, divide="final z"),
            "Every token is divided by the weights of all tokens, later ones too: your z is complete from the start.",
            "Which keys may the denominator of token t add up?",
        ),
        Mutant(
            partial(_running_sum, divide="norms"),
            "You divide by the lengths of phi(q) and z, as for a cosine, not by their dot product.",
            "The denominator is the sum of the weights of this query. What is one weight?",
        ),
        Mutant(
            partial(_running_sum, phi_q=_relu, phi_k=_relu),
            "Your feature map is relu(x) + 1: below zero it is 1, where elu(x) + 1 is e^x.",
            "The library's `elu_feature_map` may be called here.",
        ),
        Mutant(
            partial(_running_sum, phi_q=_shares, phi_k=_shares),
            "You make the features of each token sum to one: the weights are normalised, not the features.",
            "Over what does the sum in the denominator run: over entries of one key, or over keys?",
        ),
        Mutant(
            partial(_running_sum, z_of="now"),
            "Your z is the feature vector of the present key alone, not a running sum.",
            "How many keys does the denominator of token t add up?",
        ),
        Mutant(
            lambda q, k, v: _running_sum(q, k, v, scale=q.shape[-1] ** -0.5),
            "You scaled the queries before the feature map; there is no scale in this exercise.",
            "Read the definition of the kernel again: what goes into phi?",
        ),
        Mutant(
            partial(_running_sum, phi_q=_elu, phi_k=_elu),
            "Your feature map is elu(x), without the + 1: its values can be negative.",
            "A weight must not be negative. What makes elu(x) positive?",
        ),
        Mutant(
            partial(_running_sum, reads="both before"),
            "You read S and z before you wrote: token t does not see itself, and the first token divides 0 by 0.",
            "The sum in the definition runs up to and including t.",
        ),
        Mutant(
            partial(_running_sum, phi_q=_identity),
            "The query did not go through the feature map.",
            "The kernel is a dot product of two feature vectors. Which two?",
        ),
        Mutant(
            partial(_running_sum, phi_k=_identity),
            "The key did not go through the feature map.",
            "What is written into S and z: k, or something made from k?",
        ),
        Mutant(
            partial(_running_sum, reads="before"),
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


def _chunk_rules(*, with_gamma=False):
    """What the chunkwise form is: a few products per chunk, whatever its size, and one state at a time."""

    def inputs(length, chunk):
        return (*_fixed(length), 0.9, chunk) if with_gamma else (*_fixed(length), chunk)

    return (
        no_library(lambda: inputs(6, 2)),
        no_square(
            lambda: inputs(40, 4), 40, "L x L", "Only tokens of one chunk meet in a matrix of scores. How large is it?"
        ),
        at_most(
            lambda: inputs(96, 8),
            96 * 3 * 5,
            "a state for each token",
            "One state per chunk is enough: the one before it.",
        ),
        few_steps(
            lambda: inputs(24, 8),
            lambda: inputs(48, 16),
            "each chunk",
            "A chunk takes a few products of matrices, whatever its size. Which product adds all its writes at once?",
        ),
    )


_CHUNK_EXTREMES = (
    Extreme("chunks of one token", lambda g: (*_fixed(5), 1), "With C = 1 it has to be the recurrence."),
    Extreme("one token", lambda g: (*_fixed(1), 4), "A sequence may be shorter than a chunk."),
    Extreme("a chunk longer than the sequence", lambda g: (*_fixed(5), 9), "The first chunk may be the short one."),
)


def _chunkwise(
    q,
    k,
    v,
    chunk_size,
    *,
    diagonal=0,
    write_first=False,
    keep=1.0,
    ragged=True,
    scale=1.0,
    drop=False,
    upper=False,
    stays=False,
    swapped=False,
):
    state, outputs = torch.zeros(k.shape[-1], v.shape[-1]).to(v), []
    for start in range(0, len(q), chunk_size):
        q_c, k_c, v_c = (x[start : start + chunk_size] for x in (q, k, v))
        new_state = state if stays and start else keep * state + k_c.T @ v_c
        scores = k_c @ q_c.T if swapped else q_c @ k_c.T
        scores = scores.triu() if upper else scores.tril(diagonal)
        o = scale * (q_c @ (new_state if write_first else state) + scores @ v_c)
        if len(q_c) == chunk_size or not drop:
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
    extremes=_CHUNK_EXTREMES,
    rules=(
        *_chunk_rules(),
        no_operations(
            lambda: (*_fixed(6), 2),
            {"split": "`split` or `chunk`", "split_with_sizes": "`split`", "tensor_split": "`tensor_split`"},
            "The task asks for slices: `x[start : stop]`.",
        ),
    ),
    mutants=(
        Mutant(
            partial(_chunkwise, stays=True),
            "From the second chunk on, the state is not updated any more: later chunks read the first one's.",
            "What has each chunk to hand on to the next?",
        ),
        Mutant(
            partial(_chunkwise, swapped=True),
            "Your scores are K Q^T: in row i, the key of token i meets the queries of earlier tokens.",
            "Row i of the scores belongs to output i. Whose query does that output answer?",
        ),
        Mutant(
            partial(_chunkwise, drop=True),
            "The last, shorter chunk is missing from the outputs.",
            "How many chunks are there when C does not divide L?",
        ),
        Mutant(
            partial(_chunkwise, upper=True),
            "The mask keeps the upper triangle: inside a chunk, tokens see themselves and later ones, none before.",
            "In the scores, the row belongs to the query. Which columns came before it?",
        ),
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


def _outputs_come_last(record: Record) -> str:
    """Before the first output, K^T V has to be there for every worker but the last, who hands nothing on."""
    formed = 0
    for operation in record.own:
        if 0 in operation.reads and operation.reads & {1, 2}:
            break
        if operation.reads == {1, 2}:
            formed += sum(x.numel() // 15 for x in operation.outputs if x.shape[-2:] == (3, 5))
    if formed < 4:
        return "computes the first outputs before every worker has formed its K^T V, so that workers wait in turn"
    return ""


def _workers(q, k, v, workers, *, exchange="before", diagonal=0):
    size = len(q) // workers
    parts = [(q[i : i + size], k[i : i + size], v[i : i + size]) for i in range(0, len(q), size)]
    sums = torch.stack([k_w.T @ v_w for _, k_w, v_w in parts])
    states = {
        "before": sums.cumsum(0) - sums,
        "including": sums.cumsum(0),
        "all": sums.sum(0).expand_as(sums),
        "none": torch.zeros_like(sums),
        "neighbour": torch.cat([torch.zeros_like(sums[:1]), sums[:-1]]),
        "later": sums.sum(0) - sums.cumsum(0),
        "others": sums.sum(0) - sums,
        "mean": (sums.cumsum(0) - sums) / torch.arange(workers).clamp(min=1)[:, None, None].to(sums),
    }[exchange]
    return torch.cat(
        [q_w @ s + (q_w @ k_w.T).tril(diagonal) @ v_w for (q_w, k_w, v_w), s in zip(parts, states, strict=True)]
    )


EX_1_3 = Exercise(
    number="1.3",
    title="One sequence, several workers",
    stars=2,
    minutes=15,
    sample=_workers_sample,
    reference=_workers,
    tested="8 random sequences on 2 to 4 workers, in float64",
    extremes=(
        Extreme("one worker", lambda g: (*_fixed(6), 1), "Alone, a worker starts from an empty state."),
        Extreme("one token per worker", lambda g: (*_fixed(4), 4), "A part may hold one token only."),
    ),
    rules=(
        no_library(lambda: (*_fixed(6), 3)),
        no_square(
            lambda: (*_fixed(40), 5), 40, "L x L", "No worker ever sees all tokens. How large are its own scores?"
        ),
        Rule(
            lambda: ((*_fixed(40), 5),),
            _outputs_come_last,
            "Three phases: which part of the work needs nothing from the other workers, and can be done first by all?",
        ),
    ),
    mutants=(
        Mutant(
            partial(_workers, exchange="later"),
            "Each worker starts from the sum of the workers after it: it sees the future and not the past.",
            "Which workers hold tokens that come before mine?",
        ),
        Mutant(
            partial(_workers, exchange="others"),
            "Each worker starts from the sum over all other workers: it sees the past, and the future too.",
            "Which workers hold tokens that come before mine?",
        ),
        Mutant(
            partial(_workers, exchange="mean"),
            "Each worker starts from the mean of the earlier workers' matrices, not from their sum.",
            "The state is a sum over all earlier tokens, whoever holds them.",
        ),
        Mutant(
            partial(_workers, diagonal=-1),
            "The diagonal of the mask is left out: no token sees its own value.",
            "Which diagonal does the mask keep when i = j is allowed?",
        ),
        Mutant(
            partial(_workers, diagonal=10**6),
            "The mask is missing inside a part: tokens see the future.",
            "The recurrence reads S_t, which holds nothing after t.",
        ),
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


CANDIDATES = (
    Candidate(_by_recurrence, "the recurrence", right=True),
    Candidate(
        _by_matrix,
        "one masked matrix, which adds up in another order",
        "Sums in floating point depend on their order. How far apart may two right answers be?",
        right=True,
    ),
    Candidate(
        _by_chunks,
        "the chunkwise form, which adds up in another order",
        "Sums in floating point depend on their order. How far apart may two right answers be?",
        right=True,
    ),
    Candidate(
        partial(_implementation, diagonal=-1),
        "the mask leaves out the diagonal",
        "Compare the outputs of every token with those of the recurrence.",
    ),
    Candidate(
        partial(_implementation, diagonal=10**6),
        "there is no mask inside a chunk",
        "Change a later token: no earlier output may move. Are your chunks longer than one token?",
    ),
    Candidate(
        partial(_implementation, write_first=True),
        "a chunk reads the state after its own write",
        "Use more than one token per chunk and compare all outputs.",
    ),
    Candidate(
        partial(_implementation, start=0.0),
        "the initial state is ignored",
        "Call the implementation with an initial state as well as without.",
    ),
    Candidate(
        partial(_implementation, keep=0.0),
        "from the second chunk on, the old state is dropped when a chunk is written",
        "Use a sequence of at least three chunks.",
    ),
    Candidate(
        partial(_implementation, tail=False),
        "a short last chunk never reaches the final state",
        "Use a length that is no multiple of the chunk size, and look at the second result too.",
    ),
)


def _compare(implementation, *, length=13, chunk=4, state=True, final=True, tolerance=1e-9, equal=False):
    """A test by comparison with the recurrence; each keyword argument but the defaults makes it a weak one."""
    q, k, v = _fixed(length)
    start = torch.ones(3, 5, dtype=v.dtype) if state else None
    answer = implementation(q, k, v, chunk, start)[: 2 if final else 1]
    expected = recurrent_linear_attention(q, k, v, initial_state=start)[: 2 if final else 1]
    if equal:
        return all(torch.equal(a, b) for a, b in zip(answer, expected, strict=True))
    return all(bool((a - b).abs().max() <= tolerance) for a, b in zip(answer, expected, strict=True))


EX_1_4 = Exercise(
    number="1.4",
    title="A test that catches these bugs",
    stars=2,
    minutes=25,
    sample=lambda g: (),
    reference=_compare,
    candidates=CANDIDATES,
    tested="3 correct and 6 broken implementations",
    mutants=(
        Mutant(
            lambda implementation: True,
            "Your test accepts everything that it was shown; all 6 bugs get through:",
            CANDIDATES[3].hint,
        ),
        Mutant(
            lambda implementation: False,
            "Your test rejects everything that it was shown, the 3 right implementations too.",
            CANDIDATES[1].hint,
        ),
        Mutant(
            partial(_compare, equal=True),
            "rejected though right: the chunkwise form, which adds up in another order",
            CANDIDATES[1].hint,
        ),
        Mutant(partial(_compare, state=False), "gets through: the initial state is ignored", CANDIDATES[6].hint),
        Mutant(
            partial(_compare, final=False),
            "gets through: a short last chunk never reaches the final state",
            CANDIDATES[8].hint,
        ),
        Mutant(
            partial(_compare, chunk=13),
            "gets through: from the second chunk on, the old state is dropped when a chunk is written",
            CANDIDATES[7].hint,
        ),
        Mutant(
            partial(_compare, chunk=1),
            "gets through: there is no mask inside a chunk",
            CANDIDATES[4].hint,
        ),
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
    extremes=(
        Extreme("rho = 0", lambda g: (10, 5, 0.0), "Then the keys are random in d - 1 dimensions."),
        Extreme("rho = 1", lambda g: (10, 5, 1.0), "Then all keys are equal."),
        Extreme("n = 1", lambda g: (1, 5, 0.5), "A single pair meets no interference."),
        Extreme("d = 2", lambda g: (10, 2, 0.3), "Then u is one of two directions, and its overlaps are 1 or -1."),
    ),
    mutants=(
        Mutant(
            lambda n, d, rho: (n - 1) * (rho**4 + (1 - rho) ** 4 / (d - 1)),
            "Your overlap is rho^2 along c: the keys carry the root of rho, and two of them meet.",
            "How often does the root of rho enter k_i^T k_j? And its square?",
        ),
        Mutant(
            lambda n, d, rho: (n - 1) * (1 - rho**2) / (d - 1),
            "At rho = 1 your error is zero, but then all keys are equal and every pair interferes.",
            "Write out the overlap of two keys first: what is it along c?",
        ),
        Mutant(
            lambda n, d, rho: (n - 1) / (d - 1),
            "There is no rho in your answer: these are random keys in d - 1 dimensions.",
            "At rho = 1 all keys are equal. What does a read return then?",
        ),
        Mutant(
            lambda n, d, rho: (n - 1) * rho**2,
            "The random parts are missing: they overlap a little, too.",
            "What is the mean of (u_i^T u_j)^2 in d - 1 dimensions?",
        ),
        Mutant(
            lambda n, d, rho: (n - 1) * (rho + (1 - rho) / math.sqrt(d - 1)) ** 2,
            "Your middle term, the cross product of the two parts of the overlap, does not vanish.",
            "What is the mean of u_i^T u_j, without a square?",
        ),
        Mutant(
            lambda n, d, rho: n * _correlated_error(n, d, rho),
            "That is the error of all n pairs together; asked for is that of one of them.",
            "For one pair j, over which i does the sum run?",
        ),
        Mutant(
            lambda n, d, rho: (n - 1) * (rho + (1 - rho) / (d - 1)) ** 2,
            "You took the mean of the random part's square too early: you square rho + (1 - rho)/(d - 1) once more.",
            "Square the whole overlap first, and take the mean of each of the terms after that.",
        ),
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
    extremes=(
        Extreme("d_k = d_v = 1", lambda g: (1, 1), "One token adds two numbers, and the state is one."),
        Extreme("d_k = d_v = 2", lambda g: (2, 2), "Try it by hand: what do cache and state hold after one token?"),
        Extreme("d_k = 1", lambda g: (1, 64), "The state may be smaller than one token's key and value."),
    ),
    mutants=(
        Mutant(
            lambda d_k, d_v: d_k + 1,
            "You counted the values only; the cache holds the keys too.",
            "How many numbers does one token add to the cache?",
        ),
        Mutant(
            lambda d_k, d_v: d_k * d_v + 1,
            "You let each token add one number to the cache.",
            "How many numbers does one token add to the cache?",
        ),
        Mutant(
            lambda d_k, d_v: round(d_k * d_v / (d_k + d_v)) + 1,
            "You round to the nearest whole number before you add one: where it rounds up, that is one too many.",
            "The question asks for the first whole number above the crossing.",
        ),
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


def _decayed(
    q,
    k,
    v,
    gamma,
    chunk_size,
    *,
    inside=True,
    read_from: int | None = 1,
    carry="all",
    write="late",
    mask: bool | str = True,
    one_sided="no",
):
    state, outputs = torch.zeros(k.shape[-1], v.shape[-1]).to(v), []
    for start in range(0, len(q), chunk_size):
        q_c, k_c, v_c = (x[start : start + chunk_size] for x in (q, k, v))
        n = len(q_c)
        i = torch.arange(n).to(q)
        age = i[:, None] - i[None, :]
        fade = gamma ** (age.clamp(min=0) if mask else age) if inside else torch.ones(n, n).to(q)
        reach = gamma ** (i[:, None] + read_from) if read_from is not None else 1.0
        fade = {"no": fade, "reader": gamma ** (i[:, None] + 1), "end": gamma ** (n - 1 - i)}[one_sided]
        scores = (q_c @ k_c.T) * fade
        outputs.append((reach * q_c) @ state + (scores.tril() if mask is True else scores) @ v_c)
        left = {"late": n - 1 - i, "long": n - i, "early": i, "none": 0 * i}[write]
        new = (gamma ** left[:, None] * k_c).T @ v_c
        factor = gamma ** {"all": n, "none": 0, "one": 1, "sum": n}[carry]
        state = factor * (state + new) if carry == "sum" else factor * state + new
    return torch.cat(outputs)


EX_1_7 = Exercise(
    number="1.7",
    title="A fading state, chunk by chunk",
    stars=3,
    minutes=40,
    sample=_decay_sample,
    reference=_decayed,
    tested="8 random sequences with gamma between 0.5 and 0.95, some with a short last chunk, in float64",
    extremes=(
        Extreme("chunks of one token", lambda g: (*_fixed(5), 0.7, 1), "With C = 1 it has to be the recurrence."),
        Extreme("a sequence of one token", lambda g: (*_fixed(1), 0.7, 4), "A sequence may be shorter than a chunk."),
        Extreme(
            "gamma = 0.001 and chunks of 128 tokens",
            lambda g: (*_fixed(300), 1e-3, 128),
            "Powers with a negative exponent overflow: use only powers of gamma that are at most 1.",
        ),
    ),
    rules=_chunk_rules(with_gamma=True),
    mutants=(
        Mutant(
            lambda q, k, v, gamma, chunk_size: _chunkwise(
                q, gamma ** torch.arange(len(q)).to(q)[:, None] * k, v, chunk_size
            ),
            "A token's weight is gamma to the power of its position: it fades from the start, not from the reader.",
            "The exponent is t - i: the distance from the token to the one that reads.",
        ),
        Mutant(
            partial(_decayed, write="long"),
            "What a chunk writes fades once too often on its way to the chunk's end.",
            "By what is the value of the chunk's last token multiplied when the chunk ends?",
        ),
        Mutant(
            partial(_decayed, one_sided="reader"),
            "Inside a chunk all tokens have faded alike, as if each had been there when the chunk began.",
            "How old is token j when token i reads it? Try the token itself, j = i.",
        ),
        Mutant(
            partial(_decayed, one_sided="end"),
            "Inside a chunk, tokens are read with the fading that they will have at the chunk's end.",
            "How old is token j when token i reads it? That depends on i.",
        ),
        Mutant(
            partial(_decayed, carry="one"),
            "From chunk to chunk the state fades once only, not once for each token of the chunk.",
            "By which factor has the old state shrunk at the end of a chunk?",
        ),
        Mutant(
            partial(_decayed, carry="sum"),
            "Gamma multiplies the sum of the old state and the new writes: the writes, already aged, fade again.",
            "Which of the two terms of the new state has been there for a whole chunk?",
        ),
        Mutant(
            partial(_decayed, carry="sum", write="none"),
            "Gamma multiplies the sum of the old state and the new writes, which did not age token by token.",
            "How old is each token of the chunk at the chunk's end?",
        ),
        Mutant(
            partial(_decayed, mask=False),
            "Inside a chunk there is no mask: tokens see the future, with negative powers of gamma.",
            "For which pairs i, j of a chunk has token j been written when token i is read?",
        ),
        Mutant(
            partial(_decayed, mask="no, but ages are cut off at 0"),
            "Inside a chunk there is no mask: later tokens are read as if they had just been written.",
            "Cutting the exponent off at 0 makes a power 1, not 0. Which pairs need a 0?",
        ),
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
            partial(_decayed, carry="none"),
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
