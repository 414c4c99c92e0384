"""Exercises of chapter 4."""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

from dn_lib.forms.chunkwise import chunkwise_delta_rule, delta_attention_matrix, parallel_delta_rule
from dn_lib.forms.chunkwise_backward import reversible_chunkwise_delta_rule
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import ut_transform
from dn_lib.forms.linear_attention import chunkwise_linear_attention
from dn_lib.parallel.affine import leaving_gradient
from dn_lib.teaching.registry import Exercise, Mutant, relative_error


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


# 4.1 ---------------------------------------------------------------------------------------------------
def chunk_step(q, k, v, beta, S):
    T = ut_transform(k, beta)
    pseudo = T @ v - (T @ k) @ S
    return q @ S + (q @ k.mT).tril() @ pseudo, S + k.mT @ pseudo


def _chunk_step_variant(q, k, v, beta, S, *, subtract=True, diagonal=0, new=False, weighted=True):
    T = ut_transform(k, beta)
    T = T if weighted else T / beta
    pseudo = T @ v - (T @ k) @ S if subtract else T @ v
    after = S + k.mT @ pseudo
    return q @ (after if new else S) + (q @ k.mT).tril(diagonal) @ pseudo, after


exercise_1 = Exercise(
    number="4.1",
    title="From linear attention's chunk to the delta rule's",
    stars=1,
    minutes=5,
    sample=_inputs,
    reference=chunk_step,
    mutants=(
        Mutant(
            lambda q, k, v, beta, S: chunkwise_linear_attention(q, k, v, scale=1.0, initial_state=S),
            "This is still linear attention: the values are written as they are.",
            "Only one thing takes the place of V, and it does so in both lines.",
        ),
        Mutant(
            lambda *x: _chunk_step_variant(*x, subtract=False),
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


def _entry(q, k, beta, i, j, *, ascending=False, first=1, last=0, weight=True):
    steps = list(range(j + first, i + 1 + last))
    vector = k[j]
    for t in reversed(steps) if ascending else steps:
        vector = vector - beta[t] * k[t] * (k[t] @ vector)
    return (beta[j] if weight else 1.0) * (q[i] @ vector)


exercise_2 = Exercise(
    number="4.2",
    title="One entry of the attention map",
    stars=1,
    minutes=10,
    sample=_entry_sample,
    reference=_entry,
    mutants=(
        Mutant(
            lambda *x: _entry(*x, weight=False),
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


def _packed(q, k, beta, sequence, mask_scores=True, mask_keys=True):
    same = sequence[:, None] == sequence[None, :]
    eye = torch.eye(k.shape[0], dtype=k.dtype)
    below = (beta[:, None] * (k @ k.mT)).tril(-1)
    T = torch.linalg.inv(eye + (below * same if mask_keys else below)) * beta
    scores = (q @ k.mT).tril()
    return (scores * same if mask_scores else scores) @ T


exercise_3 = Exercise(
    number="4.3",
    title="Two sequences in one chunk",
    stars=2,
    minutes=15,
    sample=_packed_sample,
    reference=_packed,
    mutants=(
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


def _through_errors(k, beta, errors, dpseudo, *, transpose=True, sign=-1, sides=2, direct=False, partner=True):
    T_bar = ut_transform(k, beta) / beta
    Z = (T_bar.mT if transpose else T_bar) @ dpseudo
    dR = beta[:, None] * Z
    # A beta has two effects: on its own pseudo-value, and through that on every later error.
    dbeta = ((dpseudo if direct else Z) * errors).sum(-1)
    G = sign * (dR @ (beta[:, None] * errors if partner else errors).mT).tril(-1)
    return dR, dbeta, (G + G.mT if sides == 2 else G) @ k


exercise_4 = Exercise(
    number="4.4",
    title="Backward through the triangular system",
    stars=2,
    minutes=20,
    sample=_backward_sample,
    reference=_through_errors,
    mutants=(
        Mutant(
            lambda *x: _through_errors(*x, transpose=False),
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


BUGS = ("initial state", "tail", "final state", "scale", "beta", "batch", "precision", "carry", "diagonal")
IMPLEMENTATIONS = (
    chunkwise_delta_rule,
    reversible_chunkwise_delta_rule,
    _without_chunks(parallel_delta_rule),
    _without_chunks(recurrent_delta_rule),
    *(_buggy(bug) for bug in BUGS),
)
_in_turn = cycle(IMPLEMENTATIONS)


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


def _weak(message, hint, **weakness):
    return Mutant(lambda implementation: property_test(implementation, **weakness), message, hint)


exercise_5 = Exercise(
    number="4.5",
    title="A property test that catches these bugs",
    stars=2,
    minutes=25,
    sample=lambda generator: (next(_in_turn),),
    reference=lambda implementation: property_test(implementation),
    mutants=(
        Mutant(
            lambda implementation: True,
            "Your test accepts everything it was shown, right or wrong.",
            "Compare the implementation with something that you trust.",
        ),
        Mutant(
            lambda implementation: False,
            "Your test rejects everything it was shown; four of those implementations are right.",
            "Try it on `chunkwise_delta_rule` yourself.",
        ),
        _weak(
            "Your test lets an implementation pass that ignores one of its arguments.",
            "Which argument is optional, and never passed by your test?",
            state=False,
        ),
        _weak(
            "Your test lets an implementation pass that fails on some lengths.",
            "Which lengths does a loop over chunks find awkward?",
            tail=False,
        ),
        _weak(
            "Your test lets an implementation pass whose outputs are right, but not all that it returns.",
            "An implementation returns a pair.",
            final=False,
        ),
        _weak(
            "Your test lets an implementation pass that confuses two sizes.",
            "Two of the sizes in your test are always equal. Which?",
            square=True,
        ),
        _weak(
            "Your test lets an implementation pass that mistakes one matrix called T for the other.",
            "For which write strengths are the two matrices equal?",
            unit_beta=True,
        ),
        _weak(
            "Your test lets an implementation pass that treats all heads alike.",
            "Sequences may carry leading dimensions.",
            batch=False,
        ),
        _weak(
            "Your test lets an implementation pass that computes in half precision.",
            "How large an error do you forgive, and how large does float64 make it?",
            tolerance=0.05,
        ),
        _weak(
            "Your test lets an implementation pass that forgets everything but the last chunk.",
            "How many chunks do your sequences have?",
            chunks=False,
        ),
        _weak(
            "Your test rejects right implementations: two forms of one sum are rounded differently.",
            "Ask for a small relative error, not for equal bits.",
            exact=True,
        ),
    ),
    tested="13 implementations, 4 of them right",
    trials=len(IMPLEMENTATIONS),
)


# 4.6 ---------------------------------------------------------------------------------------------------
def _pieces_sample(generator):
    count, d_k, d_v = _randint(generator, 3, 5), _randint(generator, 2, 4), _randint(generator, 5, 6)
    return _randn(generator, count, d_k, d_k), _randn(generator, count, d_k, d_v), _randn(generator, d_k, d_v)


def _leaving_gradients(M, Y, dstate):
    # The final state's gradient is one more contribution, from beyond the last stretch.
    pieces = [*zip(M, Y, strict=True), (torch.eye(M.shape[-1], dtype=M.dtype), dstate)]
    return torch.stack([leaving_gradient(pieces, rank) for rank in range(len(M))])


def _leaving_variant(M, Y, dstate, *, transpose=True, use_m=True, own=False, ahead=False):
    gradient, found = dstate, []
    stretches = list(zip(M, Y, strict=True))
    for m, y in stretches if ahead else reversed(stretches):
        found.append(gradient)
        m = m.mT if transpose else m
        gradient = (m @ gradient if use_m else gradient) + y
        if own:
            found[-1] = gradient
    return torch.stack(found if ahead else found[::-1])


exercise_6 = Exercise(
    number="4.6",
    title="The exchange on the way back",
    stars=2,
    minutes=15,
    sample=_pieces_sample,
    reference=_leaving_gradients,
    mutants=(
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


def _gated_by_hand(q, k, v, beta, alpha, S, *, decay_write=False, first_erase=False):
    outputs = []
    for t in range(len(k)):
        before = S if first_erase else alpha[t] * S
        write = beta[t] * torch.outer(k[t], v[t] - before.mT @ k[t])
        S = alpha[t] * (S + write) if decay_write else alpha[t] * S + write
        outputs.append(q[t] @ S)
    return torch.stack(outputs), S


def _gated_chunk(q, k, v, beta, alpha, S, *, in_t=True, in_error=True, at_end=True):
    gamma = alpha.cumprod(0)
    ratio = gamma[:, None] / gamma[None, :]
    A = (beta[:, None] * (k @ k.mT) * (ratio if in_t else 1)).tril(-1)
    R = v - (gamma[:, None] if in_error else 1) * (k @ S)
    pseudo = torch.linalg.solve(torch.eye(len(k), dtype=k.dtype) + A, beta[:, None] * R)
    o = gamma[:, None] * (q @ S) + (ratio * (q @ k.mT)).tril() @ pseudo
    left = ratio[-1][:, None] if at_end else 1
    return o, gamma[-1] * S + k.mT @ (left * pseudo)


exercise_7 = Exercise(
    number="4.7",
    title="A chunk of the gated delta rule",
    stars=3,
    minutes=45,
    sample=_gated_sample,
    reference=_gated_by_hand,
    mutants=(
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

# Solutions that go another way, which `check` must accept as well: the suite tries them.
OTHER_SOLUTIONS = {
    "4.3": (
        lambda q, k, beta, sequence: (
            delta_attention_matrix(q, k, beta, scale=1.0) * (sequence[:, None] == sequence[None, :])
        ),
    ),
    "4.7": (_gated_chunk,),
}
