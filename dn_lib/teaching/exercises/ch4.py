"""Exercises of chapter 4."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dn_lib.forms.chunkwise import chunkwise_delta_rule, delta_attention_matrix, parallel_delta_rule
from dn_lib.forms.chunkwise_backward import reversible_chunkwise_delta_rule
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import ut_transform
from dn_lib.forms.linear_attention import chunkwise_linear_attention
from dn_lib.teaching.judge.method import few_steps, no_gradients, no_library, no_square
from dn_lib.teaching.registry import Candidate, Exercise, Extreme, Mutant, relative_error


# Inputs ------------------------------------------------------------------------------------------------
def _randint(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _inputs(generator: torch.Generator) -> tuple:
    """q, k (unit), v, beta in (0, 2) and a state, of random sizes."""
    length, d_k, d_v = _randint(generator, 4, 12), _randint(generator, 2, 6), _randint(generator, 7, 9)
    k = _randn(generator, length, d_k)
    beta = 2 * torch.rand(length, generator=generator, dtype=torch.float64)
    q, k, v = _randn(generator, length, d_k), k / k.norm(dim=-1, keepdim=True), _randn(generator, length, d_v)
    return q, k, v, beta, _randn(generator, d_k, d_v)


def _fixed(length: int, d_k: int = 3, *, beta: float | None = None) -> tuple:
    """q, unit k, v, beta and a state of one size: for extremes, and to look at the method."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = _randn(generator, length, d_k), _randn(generator, length, d_k), _randn(generator, length, 5)
    b = 2 * torch.rand(length, generator=generator, dtype=torch.float64)
    b = b if beta is None else torch.full_like(b, beta)
    return q, k / k.norm(dim=-1, keepdim=True), v, b, _randn(generator, d_k, 5)


AT_ZERO = "A token with beta = 0 writes nothing. Nothing may be divided by beta."
AT_TWO = "At beta = 2 and a unit key, a write turns the error round."


# 4.1 ---------------------------------------------------------------------------------------------------
def chunk_step(q, k, v, beta, S):
    T = ut_transform(k, beta)
    pseudo = T @ v - (T @ k) @ S
    return q @ S + (q @ k.mT).tril() @ pseudo, S + k.mT @ pseudo


def _chunk_step_variant(
    q,
    k,
    v,
    beta,
    S,
    *,
    subtract=1,
    diagonal=0,
    new=False,
    weighted=True,
    twice=False,
    written="both",
    raw=False,
    inside="",
    alone=False,
    turned=False,
):
    T = ut_transform(k, beta)
    T = T if weighted else T / beta
    T = torch.diag(beta) if alone else T.mT if turned else T
    in_w, in_u = (T * beta if letter in inside else T for letter in "WU")
    pseudo = in_u @ v - subtract * (k if raw else in_w @ k) @ S
    pseudo = beta[:, None] * pseudo if twice else pseudo
    after = S + k.mT @ (v if written == "outputs" else pseudo)
    return q @ (after if new else S) + (q @ k.mT).tril(diagonal) @ (v if written == "state" else pseudo), after


exercise_1 = Exercise(
    number="4.1",
    title="From linear attention's chunk to the delta rule's",
    stars=1,
    minutes=5,
    sample=_inputs,
    reference=chunk_step,
    outputs=("o", "the state"),
    extremes=(
        Extreme("one token", lambda g: _fixed(1), "A chunk of one token is one write."),
        Extreme("beta = 0", lambda g: _fixed(5, beta=0.0), AT_ZERO),
        Extreme("beta = 2", lambda g: _fixed(5, beta=2.0), AT_TWO),
    ),
    rules=(
        no_library(
            lambda: _fixed(8),
            *("ut_transform", "scaled_inverse", "pseudo_values", "wy_recursion", "chunk_wy"),
            hint="Start from the two lines of linear attention, and change what is written.",
        ),
        few_steps(
            lambda: _fixed(8),
            lambda: _fixed(16),
            "the chunk",
            "All tokens of a chunk at once: two lines, as in linear attention's chunk.",
        ),
    ),
    mutants=(
        Mutant(
            lambda q, k, v, beta, S: _chunk_step_variant(q, k, v, beta, S, alone=True),
            "All errors are taken against the state that enters: no token sees what earlier ones of the chunk wrote.",
            "Which matrix lets a token see the writes of the tokens before it?",
        ),
        Mutant(
            lambda q, k, v, beta, S: _chunk_step_variant(q, k, v, beta, S, turned=True),
            "T is transposed: the errors of a token depend on later writes.",
            "Is T lower or upper triangular, and what does that say of time?",
        ),
        Mutant(
            lambda q, k, v, beta, S: _chunk_step_variant(q, k, v, beta, S, inside="WU"),
            "Beta comes in twice: T has it already, and multiplies what has been scaled by beta before.",
            "T contains the last factor diag(beta). What does it multiply?",
        ),
        Mutant(
            lambda q, k, v, beta, S: _chunk_step_variant(q, k, v, beta, S, inside="W"),
            "In W beta comes in twice: T has it already, and multiplies keys that have been scaled before.",
            "T contains the last factor diag(beta). What does it multiply?",
        ),
        Mutant(
            lambda q, k, v, beta, S: _chunk_step_variant(q, k, v, beta, S, inside="U"),
            "In U beta comes in twice: T has it already, and multiplies values that have been scaled before.",
            "T contains the last factor diag(beta). What does it multiply?",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, subtract=-1),
            "The sign of W S: what the state already returns is added, not subtracted.",
            "If the state returns the right value already, what should be written?",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, raw=True),
            "K S stands where W S belongs: T has to act on what the state returns, too.",
            "The pseudo-values are T (V - K S). What is T K?",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, written="outputs"),
            "The new state is made from V as it was; only your outputs use the pseudo-values.",
            "Only one thing takes the place of V, and it does so in both lines.",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, written="state"),
            "The outputs use V as it was; only your state uses the pseudo-values.",
            "Only one thing takes the place of V, and it does so in both lines.",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, diagonal=10**6),
            "The causal mask is missing: each query sees the whole chunk, later tokens too.",
            "Which writes has token i seen when it is read?",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, twice=True),
            "Beta comes in twice: T ends in diag(beta) already.",
            "What does `ut_transform` return for a single token?",
        ),
        Mutant(
            lambda q, k, v, beta, S: chunkwise_linear_attention(q, k, v, scale=1.0, initial_state=S),
            "This is still linear attention: the values are written as they are.",
            "Only one thing takes the place of V, and it does so in both lines.",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, subtract=0),
            "The pseudo-values here are U: they ignore what the state already returns for these keys.",
            "Look at what W is multiplied with in the chunk's equation.",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, diagonal=-1),
            "Each query misses its own token: the mask leaves the diagonal out.",
            "A token is written before it is read: is j = i among the writes that o_i sees?",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, new=True),
            "The queries read the state that leaves the chunk, so they see the future, and each write twice.",
            "Which state do the tokens of the chunk have in common before any of them is written?",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, weighted=False),
            "T has lost its factor diag(beta): this is the inverse alone.",
            "There are two matrices called T in the literature. Which of them does `ut_transform` return?",
        ),
    ),
    tested="8 random chunks in float64, d_k and d_v different, beta up to 2",
)


# 4.2 ---------------------------------------------------------------------------------------------------
def _entry_sample(generator):
    q, k, _, beta, _ = _inputs(generator)
    i = _randint(generator, 2, k.shape[0] - 1)
    return q, k, beta, i, _randint(generator, 0, i - 2)


def _one_entry(i, j, *, length=6, d_k=3, beta: float | None = None):
    q, k, _, b, _ = _fixed(length, d_k, beta=beta)
    return q, k, b, i, j


def _entry(q, k, beta, i, j, *, ascending=False, first=1, last=0, weight="j"):
    steps = list(range(j + first, i + 1 + last))
    vector = k[j]
    for t in reversed(steps) if ascending else steps:
        vector = vector - beta[t] * k[t] * (k[t] @ vector)
    return {"j": beta[j], "i": beta[i], "none": 1.0}[weight] * (q[i] @ vector)


def _erasures_added(q, k, beta, i, j):
    steps = range(j + 1, i + 1)
    return beta[j] * (q[i] @ (k[j] - sum((beta[t] * k[t] * (k[t] @ k[j]) for t in steps), 0 * k[j])))


exercise_2 = Exercise(
    number="4.2",
    title="One entry of the attention map",
    stars=1,
    minutes=10,
    sample=_entry_sample,
    reference=_entry,
    extremes=(
        Extreme("i = j", lambda g: _one_entry(3, 3), "No step lies between a token and itself, but it has its beta."),
        Extreme("i = j + 1", lambda g: _one_entry(3, 2), "One step lies between: that of token i."),
        Extreme("i = j = 0", lambda g: _one_entry(0, 0), "The first token, too, has an entry of its own."),
        Extreme("beta = 0", lambda g: _one_entry(4, 1, beta=0.0), AT_ZERO),
        Extreme("beta = 2", lambda g: _one_entry(4, 1, beta=2.0), AT_TWO),
    ),
    rules=(
        no_library(lambda: _one_entry(4, 1), hint="Follow one vector, k_j, through the steps between j and i."),
        no_square(
            lambda: _one_entry(8, 2, length=9, d_k=31),
            31,
            "d_k x d_k",
            "H_t x takes two products of vectors: k_t^T x first.",
        ),
        no_square(
            lambda: _one_entry(35, 2, length=40), 40, "L x L", "One entry is asked for. Which tokens take part in it?"
        ),
    ),
    mutants=(
        Mutant(
            _erasures_added,
            "Each step erases from k_j as it was, not from what the steps before have left of it.",
            "What does H_{j+2} act on, once H_{j+1} has acted?",
        ),
        Mutant(
            lambda *x: _entry(*x, weight="i"),
            "The entry is weighted by beta_i, the reader's; it is the writer's strength, beta_j, that counts.",
            "With which strength was v_j written?",
        ),
        Mutant(
            lambda q, k, beta, i, j: ut_transform(k, beta)[i, j],
            "That is an entry of T: the query does not occur in it.",
            "Write o_i = S_i^T q_i and unroll S_i: where does q_i stand?",
        ),
        Mutant(
            lambda *x: _entry(*x, weight="none"),
            "The strength beta_j with which token j was written is missing.",
            "What does H_i ... H_{j+1} act on: k_j, or what the state received from token j?",
        ),
        Mutant(
            lambda *x: _entry(*x, ascending=True),
            "The erasing steps act in the wrong order: the latest token acts first.",
            "The factor next to k_j is the one that acts on it first in time.",
        ),
        Mutant(
            lambda *x: _entry(*x, first=0),
            "Token j erases its own write.",
            "In S_j = H_j S_{j-1} + beta_j k_j v_j^T, what does H_j act on?",
        ),
        Mutant(
            lambda *x: _entry(*x, last=-1),
            "The last erasing step is missing: o_i is read from S_i, not from S_{i-1}.",
            "Write o_i = S_i^T q_i and unroll S_i once.",
        ),
        Mutant(
            lambda q, k, beta, i, j: beta[j] * (q[i] @ k[j]),
            "Nothing is erased between j and i: this is the map of linear attention, weighted by beta.",
            "What do the tokens between j and i do to what token j has written?",
        ),
    ),
    tested="8 random entries in float64",
)


# 4.3 ---------------------------------------------------------------------------------------------------
def _packed_sample(generator):
    q, k, _, beta, _ = _inputs(generator)
    cut = _randint(generator, 1, k.shape[0] - 2)
    return q, k, beta, (torch.arange(k.shape[0]) >= cut).long()


def _two_documents(length, cut, *, beta: float | None = None):
    q, k, _, b, _ = _fixed(length, beta=beta)
    return q, k, b, (torch.arange(length) >= cut).long()


def _packed(q, k, beta, sequence, mask_scores=True, mask_keys=True, *, diagonal=0, weight=True, other=False):
    same = (sequence[:, None] == sequence[None, :]) != other
    eye = torch.eye(k.shape[0], dtype=k.dtype)
    below = (beta[:, None] * (k @ k.mT)).tril(-1)
    T = torch.linalg.inv(eye + (below * same if mask_keys else below)) * (beta if weight else 1.0)
    scores = (q @ k.mT).tril(diagonal)
    return (scores * same if mask_scores else scores) @ T


exercise_3 = Exercise(
    number="4.3",
    title="Two sequences in one chunk",
    stars=2,
    minutes=15,
    sample=_packed_sample,
    reference=_packed,
    extremes=(
        Extreme("a first document of one token", lambda g: _two_documents(5, 1), "A document may be one token long."),
        Extreme("a second document of one token", lambda g: _two_documents(5, 4), "A document may be one token long."),
        Extreme("one document only", lambda g: _two_documents(5, 5), "Then it is the chunk's usual map."),
        Extreme("beta = 0", lambda g: _two_documents(6, 3, beta=0.0), AT_ZERO),
        Extreme("beta = 2", lambda g: _two_documents(6, 3, beta=2.0), AT_TWO),
    ),
    mutants=(
        Mutant(
            lambda q, k, beta, sequence: _packed(q, k, beta, sequence) * (sequence[:, None] * sequence),
            "You multiply by the numbers of the documents: those of document 0 make its whole map zero.",
            "Which entry should the mask have where both tokens belong to document 0?",
        ),
        Mutant(
            lambda q, k, beta, sequence: (
                delta_attention_matrix(q, k, beta, scale=1.0) * (sequence[:, None] != sequence[None, :])
            ),
            "Your comparison is the opposite one: it keeps what passes between different documents.",
            "Which tokens may meet: those of the same document, or of different ones?",
        ),
        Mutant(
            lambda *x: _packed(*x, diagonal=-1),
            "The diagonal of the scores is left out: no token sees what it writes itself.",
            "A token is written before it is read: is j = i among the writes that o_i sees?",
        ),
        Mutant(
            lambda *x: _packed(*x, weight=False),
            "T has lost its factor diag(beta): this is the inverse alone.",
            "Compare your T with the formula in the hint, from left to right.",
        ),
        Mutant(
            lambda q, k, beta, sequence: (q @ k.mT).tril() * (sequence[:, None] == sequence[None, :]),
            "T is missing: these are linear attention's scores, with two documents kept apart.",
            "What is multiplied with tril(Q K^T) in the delta rule's map?",
        ),
        Mutant(
            lambda *x: _packed(*x, diagonal=10**6),
            "The causal mask is missing: queries see later tokens of their document.",
            "What does tril do in the formula?",
        ),
        Mutant(
            lambda *x: _packed(*x, mask_keys=False, diagonal=10**6),
            "The causal mask is missing in the scores, and in T the documents still meet.",
            "What does tril do in the formula, and where does T compare keys?",
        ),
        Mutant(
            lambda *x: _packed(*x, mask_scores=False, mask_keys=False),
            "The second sequence reads the first: nothing separates them.",
            "Where can a token of one sequence meet a key of the other?",
        ),
        Mutant(
            lambda *x: _packed(*x, mask_keys=False),
            "The scores are separated, but the first sequence still reaches the second through T.",
            "The second sequence's pseudo-values must not depend on the first sequence's values.",
        ),
        Mutant(
            lambda *x: _packed(*x, mask_scores=False),
            "The pseudo-values are separated, but the second sequence's queries still read the first.",
            "A matrix of products of queries with keys is also a place where sequences meet.",
        ),
        Mutant(
            lambda q, k, beta, sequence: _packed(
                q, k, beta * torch.cat([beta[:1] * 0 + 1, 1 - sequence.diff()]), sequence * 0
            ),
            "Setting beta to zero where a sequence begins does not empty the state: that token is lost.",
            "beta = 0 means: neither erase nor write. What has to happen is that nothing earlier is seen.",
        ),
    ),
    tested="8 random chunks, each with one boundary inside",
)


# 4.4 ---------------------------------------------------------------------------------------------------
def _backward_sample(generator):
    _, k, v, beta, _ = _inputs(generator)
    below = (k @ k.mT).tril(-1)
    errors = torch.linalg.solve(torch.eye(len(k), dtype=k.dtype) + below * beta, v)
    return k, beta, errors, _randn(generator, *v.shape)


def _given_gradient(length, *, beta: float | None = None):
    _, k, v, b, _ = _fixed(length, beta=beta)
    errors = torch.linalg.solve(torch.eye(length, dtype=k.dtype) + (k @ k.mT).tril(-1) * b, v)
    return k, b, errors, _randn(torch.Generator().manual_seed(0), length, v.shape[1])


def _through_errors(
    k, beta, errors, dpseudo, *, solve="transposed", sign=-1, sides=2, direct=False, partner=True, dv="DZ", diagonal=-1
):
    B, eye = (k @ k.mT).tril(-1), torch.eye(len(k), dtype=k.dtype)
    M = {"transposed": eye + B.mT * beta, "forward": eye + B * beta, "none": eye}[solve]
    Z = torch.linalg.solve(M, dpseudo)
    dR = beta[:, None] * Z
    # A beta has two effects: on its own pseudo-value, and through that on every later error.
    dbeta = ((dpseudo if direct else Z) * errors).sum(-1)
    G = sign * (dR @ (beta[:, None] * errors if partner else errors).mT).tril(diagonal)
    dk = (G + G.mT if sides == 2 else G) @ k
    return {"DZ": dR, "Z": Z, "given": beta[:, None] * dpseudo}[dv], dbeta, dk


exercise_4 = Exercise(
    number="4.4",
    title="Backward through the triangular system",
    stars=2,
    minutes=20,
    sample=_backward_sample,
    reference=_through_errors,
    outputs=("dv", "dbeta", "dk"),
    extremes=(
        Extreme("one token", lambda g: _given_gradient(1), "Alone, a token has no later errors."),
        Extreme("beta = 0", lambda g: _given_gradient(5, beta=0.0), AT_ZERO),
        Extreme("beta = 2", lambda g: _given_gradient(5, beta=2.0), AT_TWO),
    ),
    rules=(
        no_gradients(
            lambda: _given_gradient(4), "You derived three formulas: products of what is given, after one solve."
        ),
        no_library(
            lambda: _given_gradient(4), "scaled_inverse", "ut_transform", hint="Write the three gradients out yourself."
        ),
    ),
    mutants=(
        Mutant(
            lambda *x: _through_errors(*x, solve="none"),
            "The system is missing: later errors, which depend on this pseudo-value, send nothing back.",
            "What reaches the pseudo-value of token j through the errors of the tokens after it?",
        ),
        Mutant(
            lambda *x: _through_errors(*x, dv="Z"),
            "Your dv lacks the factor beta: it is the gradient of the pseudo-values.",
            "The pseudo-value is D E, and E = R - ...: by what is Z multiplied on its way to R?",
        ),
        Mutant(
            lambda *x: _through_errors(*x, dv="given"),
            "Your dv is made from the given gradient, not from the total one, so that later errors are missing in it.",
            "First find the total gradient of the pseudo-values.",
        ),
        Mutant(
            lambda *x: _through_errors(*x, diagonal=0),
            "Your gradient of B has a diagonal; B is strictly lower triangular.",
            "Does token i's error depend on its own pseudo-value?",
        ),
        Mutant(
            lambda *x: _through_errors(*x, solve="forward"),
            "The system is solved in the forward direction: gradients run from later tokens to earlier ones.",
            "The adjoint of y = M x is dx = M^T dy.",
        ),
        Mutant(
            lambda *x: _through_errors(*x, sign=1),
            "The gradient through K K^T has the wrong sign.",
            "E = R - B (beta E): with which sign does B enter?",
        ),
        Mutant(
            lambda *x: _through_errors(*x, sides=1),
            "Only one of the two keys in each product k_i^T k_j gets its gradient.",
            "If B_ij = k_i^T k_j, what are its derivatives by k_i and by k_j?",
        ),
        Mutant(
            lambda *x: _through_errors(*x, direct=True),
            "beta's gradient counts only its own pseudo-value, not the later errors that it changes.",
            "Use the total gradient of the pseudo-value, not the one you were given.",
        ),
        Mutant(
            lambda *x: _through_errors(*x, partner=False),
            "In the gradient of B the error stands where the pseudo-value belongs.",
            "What does B multiply in E = R - B (beta E)?",
        ),
    ),
    tested="8 random chunks in float64, three gradients each",
)


# 4.5: a property test that catches these bugs ------------------------------------------------------------
def _variant(q, k, v, beta, *, initial_state=None, chunk_size=64, bug=""):
    """A chunkwise delta rule with one bug, as they are met in the wild; with bug="" it is right."""
    dtype = torch.bfloat16 if bug == "precision" else q.dtype
    S = torch.zeros(*k.shape[:-2], k.shape[-1], v.shape[-1], dtype=q.dtype)
    if initial_state is not None and bug != "initial state":
        S = initial_state
    if bug == "batch":
        beta = beta[(0,) * (beta.dim() - 1)].expand_as(beta)
    before, first, outputs = S, S, [v[..., :0, :]]  # so that no tokens are no error
    scale = (v if bug == "scale" else q).shape[-1] ** -0.5
    for start in range(0, q.shape[-2], chunk_size):
        qc, kc, vc = (x[..., start : start + chunk_size, :] for x in (scale * q, k, v))
        if bug == "tail" and qc.shape[-2] < chunk_size:
            outputs.append(torch.zeros_like(vc))
            break
        bc = beta[..., start : start + chunk_size]
        T = ut_transform(kc, bc)
        T = T / bc[..., None, :] if bug == "beta" else T
        pseudo = (T @ vc - (T @ kc) @ S).to(dtype).to(q.dtype)
        outputs.append(qc @ S + (qc @ kc.mT).tril(-1 if bug == "diagonal" else 0) @ pseudo)
        before, S = S, (first if bug == "carry" else S) + kc.mT @ pseudo
    return torch.cat(outputs, dim=-2), before if bug == "final state" else S


def _buggy(bug):
    def implementation(q, k, v, beta, *, initial_state=None, chunk_size=64):
        return _variant(q, k, v, beta, initial_state=initial_state, chunk_size=chunk_size, bug=bug)

    return implementation


def _without_chunks(form):
    def implementation(q, k, v, beta, *, initial_state=None, chunk_size=64):
        return form(q, k, v, beta, initial_state=initial_state)

    return implementation


BUGS = {
    "initial state": ("the initial state is ignored", "Which argument is optional, and never passed by your test?"),
    "tail": ("the outputs of a short last chunk are zeros", "Which lengths does a loop over chunks find awkward?"),
    "final state": (
        "the final state is the one before the last chunk",
        "An implementation returns a pair. And how long are your sequences?",
    ),
    "scale": ("the scale is d_v^-1/2", "Two of the sizes in your test are always equal. Which?"),
    "beta": ("T lacks its factor diag(beta)", "For which write strengths are the two matrices called T equal?"),
    "batch": ("all sequences of a batch share the betas of the first", "Sequences may carry leading dimensions."),
    "precision": (
        "pseudo-values are rounded to bfloat16",
        "How large an error do you forgive, and how large does float64 make it?",
    ),
    "carry": ("the state forgets every chunk but the last", "How many chunks do your sequences have?"),
    "diagonal": ("a query does not see its own token", "Compare the outputs with those of the recurrence."),
}
_ROUNDING = "Two forms of one sum are rounded differently. Ask for a small relative error, not for equal bits."
CANDIDATES = (
    Candidate(chunkwise_delta_rule, "the chunkwise form", _ROUNDING, right=True),
    Candidate(reversible_chunkwise_delta_rule, "the chunkwise form that recomputes states", _ROUNDING, right=True),
    Candidate(_without_chunks(parallel_delta_rule), "the parallel form", _ROUNDING, right=True),
    Candidate(_without_chunks(recurrent_delta_rule), "the recurrence", _ROUNDING, right=True),
    *(Candidate(_buggy(bug), name, hint) for bug, (name, hint) in BUGS.items()),
)


def property_test(
    implementation, *, state=True, tail=True, final=True, square=False, unit_beta=False, batch=True,
    tolerance=1e-8, chunks=True, exact=False,
):  # fmt: skip
    """Compare with the recurrence on a few random inputs; each keyword weakens or strengthens the test."""
    generator = torch.Generator().manual_seed(1)
    for length in (12, 13 if tail else 16):
        d_k, d_v, lead = 5, 5 if square else 3, (2,) if batch else ()
        q, k, v = (_randn(generator, *lead, length, d) for d in (d_k, d_k, d_v))
        k = k / k.norm(dim=-1, keepdim=True)
        beta = torch.rand(*lead, length, generator=generator, dtype=torch.float64) + 0.1
        beta = torch.ones_like(beta) if unit_beta else beta
        S = _randn(generator, *lead, d_k, d_v) if state else None
        answer = implementation(q, k, v, beta, initial_state=S, chunk_size=4 if chunks else length)
        expected = recurrent_delta_rule(q, k, v, beta, initial_state=S)
        outputs = 2 if final else 1
        if exact and not all(torch.equal(a, b) for a, b in zip(answer, expected, strict=True)):
            return False
        if relative_error(answer[:outputs], expected[:outputs]) > tolerance:
            return False
    return True


def _weak(bug, *, first=None, **weakness):
    """A test that `bug` gets through; `first` is the bug whose hint is given, if others get through as well."""
    return Mutant(partial(property_test, **weakness), f"gets through: {BUGS[bug][0]}", BUGS[first or bug][1])


exercise_5 = Exercise(
    number="4.5",
    title="A property test that catches these bugs",
    stars=2,
    minutes=25,
    sample=lambda generator: (),
    reference=property_test,
    candidates=CANDIDATES,
    mutants=(
        Mutant(
            lambda implementation: True,
            "Your test accepts everything that it was shown; all 9 bugs get through:",
            BUGS["initial state"][1],
        ),
        Mutant(
            lambda implementation: False,
            "Your test rejects everything that it was shown, the 4 right implementations too.",
            _ROUNDING,
        ),
        _weak("initial state", state=False),
        _weak("tail", tail=False),
        _weak("final state", final=False),
        _weak("scale", square=True),
        _weak("beta", unit_beta=True),
        _weak("batch", batch=False),
        _weak("precision", tolerance=0.05),
        _weak("carry", first="tail", chunks=False),
        Mutant(partial(property_test, exact=True), "rejected though right: the parallel form", _ROUNDING),
    ),
    tested="13 implementations, 4 of them right",
)


# 4.6 ---------------------------------------------------------------------------------------------------
def _pieces_sample(generator):
    count, d_k, d_v = _randint(generator, 3, 5), _randint(generator, 2, 4), _randint(generator, 5, 6)
    return _randn(generator, count, d_k, d_k), _randn(generator, count, d_k, d_v), _randn(generator, d_k, d_v)


def _leaving_gradients(M, Y, dstate):
    leaving = [dstate]
    for r in range(len(M) - 1, 0, -1):
        leaving.append(M[r].mT @ leaving[-1] + Y[r])
    return torch.stack(leaving[::-1])


def _stretches(count):
    g = torch.Generator().manual_seed(count)
    return _randn(g, count, 3, 3), _randn(g, count, 3, 5), _randn(g, 3, 5)


def _leaving_variant(M, Y, dstate, *, transpose=True, use_m=True, own=False, ahead=False, use_y=True, after=False):
    gradient, found = dstate, []
    Y = Y * use_y
    stretches = list(zip(M, Y, strict=True))
    for m, y in stretches if ahead else reversed(stretches):
        found.append(gradient)
        m = m.mT if transpose else m
        gradient = m @ (gradient + y) if after else (m @ gradient if use_m else gradient) + y
        if own:
            found[-1] = gradient
    return torch.stack(found if ahead else found[::-1])


def _leaving_off_by_one(M, Y, dstate):
    found = [dstate]
    for r in range(len(M) - 2, -1, -1):
        found.append(M[r].mT @ found[-1] + Y[r])
    return torch.stack(found[::-1])


exercise_6 = Exercise(
    number="4.6",
    title="The exchange on the way back",
    stars=2,
    minutes=15,
    sample=_pieces_sample,
    reference=_leaving_gradients,
    extremes=(
        Extreme("one stretch", lambda g: _stretches(1), "The only stretch is the last: its gradient is given."),
        Extreme("two stretches", lambda g: _stretches(2), "One step to the left, through the second stretch."),
    ),
    rules=(no_library(lambda: _stretches(3), hint="One line in a loop over stretches, from the last to the first."),),
    mutants=(
        Mutant(
            _leaving_off_by_one,
            "You are off by one: to get from stretch r to r - 1 you use M and Y of r - 1, not of r.",
            "The state that leaves r - 1 enters r. Through which stretch does its gradient come back?",
        ),
        Mutant(
            lambda *x: _leaving_variant(*x, use_y=False),
            "Y is missing: the outputs of a stretch, too, depend on the state that enters it.",
            "By how many ways does the state that enters a stretch reach the loss?",
        ),
        Mutant(
            lambda *x: _leaving_variant(*x, after=True),
            "M^T multiplies Y as well: Y is a gradient of the entering state already.",
            "Which of the two terms has still to pass through the stretch?",
        ),
        Mutant(
            lambda *x: _leaving_variant(*x, use_m=False),
            "The gradients are summed, as for linear attention: no stretch erases anything.",
            "S_out = M S_in + X. What is the gradient of S_in, given that of S_out?",
        ),
        Mutant(
            lambda *x: _leaving_variant(*x, transpose=False),
            "M is not transposed: gradients are carried with the map of the states.",
            "The adjoint of S -> M S is G -> M^T G.",
        ),
        Mutant(
            lambda *x: _leaving_variant(*x, ahead=True),
            "The gradients run forward in time, from the first stretch to the last.",
            "Which stretches depend on the state that leaves stretch r: those before it or those after it?",
        ),
        Mutant(
            lambda *x: _leaving_variant(*x, own=True),
            "Each gradient belongs to the state that enters the stretch, not to the one that leaves it.",
            "Which gradient does the last stretch need, before anything was computed there?",
        ),
    ),
    tested="8 random sets of 3 to 5 stretches",
)


# 4.7 ---------------------------------------------------------------------------------------------------
def _gated_sample(generator):
    q, k, v, beta, S = _inputs(generator)
    return q, k, v, beta, 0.6 + 0.4 * torch.rand(len(k), generator=generator, dtype=torch.float64), S


def _gated_inputs(length, alpha: float | None = None, beta: float | None = None):
    q, k, v, b, S = _fixed(length, beta=beta)
    a = 0.6 + 0.4 * torch.rand(length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return q, k, v, b, a if alpha is None else torch.full_like(a, alpha), S


def _gated_by_hand(q, k, v, beta, alpha, S, *, decay_write=False, first_erase=False):
    outputs = []
    for t in range(len(k)):
        before = S if first_erase else alpha[t] * S
        write = beta[t] * torch.outer(k[t], v[t] - before.mT @ k[t])
        S = alpha[t] * (S + write) if decay_write else alpha[t] * S + write
        outputs.append(q[t] @ S)
    return torch.stack(outputs), S


def _gated_chunk(
    q, k, v, beta, alpha, S, *, in_t=True, in_error=True, in_p=True, at_end=True, carry=True, late=False, divide=False
):
    b = alpha.log().cumsum(0)
    gamma = b.exp()
    above = torch.ones(len(k), len(k), dtype=torch.bool).triu(1)
    ratio = (b[:, None] - b).masked_fill(above, -torch.inf).exp()
    if divide:  # right, until gamma underflows
        ratio = (gamma[:, None] / gamma).tril()
    plain = torch.ones_like(ratio).tril()
    A = (beta[:, None] * (k @ k.mT) * (ratio if in_t else plain)).tril(-1)
    R = v - (gamma[:, None] if in_error else 1) * (k @ S)
    pseudo = torch.linalg.solve(torch.eye(len(k), dtype=k.dtype) + A, beta[:, None] * R)
    reach = torch.cat([torch.ones_like(gamma[:1]), gamma[:-1]]) if late else gamma
    o = reach[:, None] * (q @ S) + ((ratio if in_p else plain) * (q @ k.mT)) @ pseudo
    left = ratio[-1][:, None] if at_end else 1
    return o, (gamma[-1] if carry else 1) * S + k.mT @ (left * pseudo)


exercise_7 = Exercise(
    number="4.7",
    title="A chunk of the gated delta rule",
    stars=3,
    minutes=45,
    sample=_gated_sample,
    reference=_gated_by_hand,
    outputs=("o", "the state"),
    extremes=(
        Extreme("one token", lambda g: _gated_inputs(1), "A chunk of one token is one write."),
        Extreme("alpha = 1", lambda g: _gated_inputs(6, alpha=1.0), "At alpha = 1 it is the plain delta rule."),
        Extreme("beta = 0", lambda g: _gated_inputs(6, beta=0.0), "At beta = 0 the state only fades."),
        Extreme("beta = 2", lambda g: _gated_inputs(6, beta=2.0), AT_TWO),
        Extreme(
            "128 tokens with alpha = 0.001",
            lambda g: _gated_inputs(128, alpha=1e-3),
            "The products gamma underflow to zero: form the ratios from sums of logarithms.",
        ),
    ),
    rules=(
        no_library(lambda: _gated_inputs(6), "ut_transform", "scaled_inverse", hint="Derive the chunk's three lines."),
        few_steps(
            lambda: _gated_inputs(8),
            lambda: _gated_inputs(16),
            "the chunk",
            "One triangular system and a few products hold all tokens at once.",
        ),
    ),
    mutants=(
        Mutant(
            lambda q, k, v, beta, alpha, S: _gated_by_hand(q, k, v, beta, alpha**2, S),
            "Every gate comes in twice: with alpha squared your answer would be right.",
            "In how many of your factors does alpha_i occur?",
        ),
        Mutant(
            lambda q, k, v, beta, alpha, S: chunk_step(q, k, v, alpha * beta, S),
            "Alpha multiplies beta: then it weakens the writes, and no state fades.",
            "In the recurrence, what does alpha_t multiply?",
        ),
        Mutant(
            lambda *x: _gated_chunk(*x, in_p=False),
            "The scores do not decay: what token j wrote reaches later queries at full strength.",
            "What is left, in S_i, of what token j wrote?",
        ),
        Mutant(
            lambda *x: _gated_chunk(*x, carry=False),
            "In the final state, what was there before the chunk has not decayed.",
            "What is left, at the chunk's end, of the state that entered?",
        ),
        Mutant(
            lambda *x: _gated_chunk(*x, late=True),
            "The outputs read the entering state with one gate too few: token i's own is missing.",
            "Does token i read S_{i-1} or S_i, and how often has S faded by then?",
        ),
        Mutant(
            lambda q, k, v, beta, alpha, S: chunk_step(q, k, v, beta, S),
            "The gate is not used: this is the delta rule without decay.",
            "Follow what is left of the state, and of a write, after several tokens.",
        ),
        Mutant(
            lambda *x: _gated_by_hand(*x, decay_write=True),
            "The gate shrinks the new write too.",
            "In the recurrence, what does alpha_t multiply, and what does it not?",
        ),
        Mutant(
            lambda *x: _gated_by_hand(*x, first_erase=True),
            "The error is taken against the state before it decays.",
            "Multiply out alpha_t (I - beta_t k_t k_t^T) S_{t-1}: which state does k_t^T act on?",
        ),
        Mutant(
            lambda *x: _gated_chunk(*x, in_t=False),
            "The writes do not decay on their way to later keys: T is that of the delta rule.",
            "What is left, at token i, of what token j wrote?",
        ),
        Mutant(
            lambda *x: _gated_chunk(*x, in_error=False),
            "The errors are taken against the state as it entered the chunk, not as it has decayed by then.",
            "The chunk's first state reaches token i through i decays.",
        ),
        Mutant(
            lambda *x: _gated_chunk(*x, at_end=False),
            "The writes have not decayed to the end of the chunk in the final state.",
            "Compare the state after token C with what the last query reads.",
        ),
    ),
    tested="8 random chunks in float64, against the recurrence",
)

ENTRIES = [exercise_1, exercise_2, exercise_3, exercise_4, exercise_5, exercise_6, exercise_7]
