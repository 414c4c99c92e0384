"""Exercises of study 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.teaching.judge.method import no_library
from dn_lib.teaching.registry import Exercise, Extreme, Mutant


# Inputs ------------------------------------------------------------------------------------------------
def _randint(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# S4.1 --------------------------------------------------------------------------------------------------
def _router_sample(generator: torch.Generator) -> tuple:
    memories = _randint(generator, 4, 7)
    return 2 * _randn(generator, _randint(generator, 8, 10), memories), _randint(generator, 2, 3)


def router_weights(logits, active):
    p = logits.softmax(-1)
    top = p.topk(active)
    return torch.zeros_like(p).scatter(1, top.indices, top.values / top.values.sum(1, keepdim=True))


def _router(logits, active, *, over=1, renormalise=True, equal=False, all_kept=False, largest=True, again=False):
    p = logits.softmax(over)
    top = p.topk(active, largest=largest)
    values = torch.full_like(top.values, 1 / active) if equal else top.values
    values = values.softmax(-1) if again else values
    values = values / values.sum(1, keepdim=True) if renormalise and not again else values
    return p if all_kept else torch.zeros_like(p).scatter(1, top.indices, values)


def _raw_router(logits, active):
    top = logits.topk(active)
    return torch.zeros_like(logits).scatter(1, top.indices, top.values / top.values.sum(1, keepdim=True))


exercise_1 = Exercise(
    number="S4.1",
    title="Where a token goes",
    stars=1,
    minutes=5,
    sample=_router_sample,
    reference=router_weights,
    extremes=(
        Extreme(
            "one active memory",
            lambda g: (_randn(g, 5, 4), 1),
            "With one memory chosen its weight is 1, whatever its probability was.",
        ),
        Extreme("all memories active", lambda g: (_randn(g, 5, 3), 3), "Then nothing is left out."),
    ),
    mutants=(
        Mutant(
            lambda *x: _router(*x, renormalise=False),
            "The weights of a token do not sum to 1: they are the probabilities as the softmax over all gave them.",
            "Some of the probability went to memories that were not chosen. What is to be done about it?",
        ),
        Mutant(
            lambda *x: _router(*x, all_kept=True),
            "Every memory has a weight: no choice is made.",
            "Which entries of a row have to be exactly 0?",
        ),
        Mutant(
            lambda *x: _router(*x, equal=True),
            "All chosen memories get the same weight.",
            "Only the ratio of two probabilities tells the router anything during training. Is it still there?",
        ),
        Mutant(
            lambda *x: _router(*x, over=0),
            "The softmax runs over time: tokens compete for a memory, and a token sees later ones.",
            "Which axis holds what one token has to choose from?",
        ),
        Mutant(
            lambda *x: _router(*x, largest=False),
            "The least probable memories are chosen.",
            "Which end of the order does the router want?",
        ),
        Mutant(
            lambda *x: _router(*x, again=True),
            "A second softmax runs over the chosen probabilities, which makes the weights almost equal.",
            "The probabilities are exponentials already. What makes positive numbers sum to 1?",
        ),
        Mutant(
            _raw_router,
            "The logits themselves are divided by their sum; they may be negative, and their sum may be 0.",
            "What turns logits into positive numbers?",
        ),
    ),
    tested="8 random sets of logits in float64, with 2 or 3 memories active, and with 1 and all",
)


# S4.2 --------------------------------------------------------------------------------------------------
def _sort_sample(generator: torch.Generator) -> tuple:
    """Choices of which the last memory but one gets none."""
    memories, length = _randint(generator, 4, 6), _randint(generator, 9, 14)
    chosen = torch.randint(0, memories, (length,), generator=generator)
    chosen[:3] = torch.tensor([2, 0, 2])
    return torch.where(chosen == memories - 2, 1, chosen), memories


def sort_tokens(chosen, memories):
    order = chosen.argsort(stable=True)
    return order, F.pad(chosen.bincount(minlength=memories).cumsum(0), (1, 0))


def _sorted(chosen, memories, *, backwards=False, inverse=False, offsets="all", descending=False):
    if backwards:
        order = len(chosen) - 1 - chosen.flip(0).argsort(stable=True)
    else:
        order = chosen.argsort(stable=True, descending=descending)
    counts = chosen.bincount(minlength=memories)
    counts = counts.flip(0) if descending else counts
    ends = {
        "all": F.pad(counts.cumsum(0), (1, 0)),
        "counts": counts,
        "ends": counts.cumsum(0),
        "starts": counts.cumsum(0) - counts,
        "used": F.pad(counts[counts > 0].cumsum(0), (1, 0)),
    }[offsets]
    return (order.argsort() if inverse else order), ends


def _memories_of_rows(chosen, memories):
    return chosen.sort(stable=True).values, _sorted(chosen, memories)[1]


exercise_2 = Exercise(
    number="S4.2",
    title="Sort by memory",
    stars=2,
    minutes=10,
    sample=_sort_sample,
    reference=sort_tokens,
    outputs=("the order", "the offsets"),
    rules=(no_library(lambda: _sort_sample(torch.Generator().manual_seed(0))),),
    extremes=(
        Extreme(
            "all tokens in one memory",
            lambda g: (torch.full((6,), 1), 3),
            "The other memories are there as well, with no tokens.",
        ),
        Extreme("one token", lambda g: (torch.tensor([0]), 2), "One row, and offsets for both memories."),
    ),
    mutants=(
        Mutant(
            lambda *x: _sorted(*x, backwards=True),
            "Within a memory the tokens run backwards: it would write its latest token first.",
            "A state is a recurrence in time. In which order do its tokens have to come?",
        ),
        Mutant(
            lambda *x: _sorted(*x, inverse=True),
            "The order is the inverse one: it says where each token went, not which token stands in each row.",
            "Row r of the sorted tensor is x[order[r]]. What is order[0]?",
        ),
        Mutant(
            lambda *x: _sorted(*x, offsets="counts"),
            "The offsets are counts: how many tokens each memory got, not where its stretch begins.",
            "Offsets rise from 0 to L. What adds counts up?",
        ),
        Mutant(
            lambda *x: _sorted(*x, offsets="ends"),
            "The first offset, 0, is missing.",
            "M stretches have M + 1 ends. Where does the first one begin?",
        ),
        Mutant(
            lambda *x: _sorted(*x, offsets="starts"),
            "The last offset, L, is missing.",
            "M stretches have M + 1 ends. Where does the last one end?",
        ),
        Mutant(
            lambda *x: _sorted(*x, offsets="used"),
            "A memory without tokens has no offset, so that all later memories change their number.",
            "An empty stretch begins and ends at the same place, but it is there.",
        ),
        Mutant(
            lambda *x: _sorted(*x, descending=True),
            "The memories come in falling order.",
            "Stretch m has to be that of memory m, with the first memory first.",
        ),
        Mutant(
            _memories_of_rows,
            "In the place of the order stand the memories of the sorted rows.",
            "With `sort` come values and indices. Which of the two says which token a row belongs to?",
        ),
    ),
    tested="8 random choices, one memory of each without a token",
)


# S4.3 --------------------------------------------------------------------------------------------------
def _mixture_sample(generator: torch.Generator) -> tuple:
    """q, unit k, v, beta and weights `[L, M]`, two memories of three or four being active."""
    length, d_k, d_v, memories = _randint(generator, 8, 11), 3, _randint(generator, 4, 5), _randint(generator, 3, 4)
    k = _randn(generator, length, d_k)
    logits = _randn(generator, length, memories)
    beta = 0.3 + torch.rand(length, generator=generator, dtype=torch.float64)
    inputs = _randn(generator, length, d_k), k / k.norm(dim=-1, keepdim=True), _randn(generator, length, d_v), beta
    return *inputs, router_weights(logits, 2)


def _one_active(generator: torch.Generator) -> tuple:
    q, k, v, beta, weights = _mixture_sample(generator)
    return q, k, v, beta, router_weights(torch.log(weights + 0.01), 1)


def mixture(q, k, v, beta, weights, *, write="chosen", read="weights", strength="beta", late=False, common=False):
    S, o = q.new_zeros(weights.shape[1], q.shape[1], v.shape[1]), []
    for t in range(len(q)):
        before, w = S, weights[t]
        chosen = (w > 0).to(q) if write == "chosen" else torch.ones_like(w)
        b = beta[t] * (w if strength == "weighted" else chosen)
        error = v[t] - (w @ (S.mT @ k[t]) if common else S.mT @ k[t])
        S = S + b[:, None, None] * torch.einsum("i,mj->mij", k[t], error.expand(len(w), -1))
        r = {"weights": w, "all": torch.ones_like(w), "plain": (w > 0).to(q)}[read]
        o.append(r @ ((before if late else S).mT @ q[t]))
    return torch.stack(o)


def _additive(q, k, v, beta, weights):
    S, o = q.new_zeros(weights.shape[1], q.shape[1], v.shape[1]), []
    for t in range(len(q)):
        S = S + (weights[t] > 0).to(q)[:, None, None] * beta[t] * torch.outer(k[t], v[t])
        o.append(weights[t] @ (S.mT @ q[t]))
    return torch.stack(o)


exercise_3 = Exercise(
    number="S4.3",
    title="A mixture of delta rules",
    stars=2,
    minutes=20,
    sample=_mixture_sample,
    reference=mixture,
    rules=(no_library(lambda: _mixture_sample(torch.Generator().manual_seed(0))),),
    extremes=(
        Extreme("one active memory", _one_active, "The weight of the only chosen memory is 1."),
        Extreme(
            "beta = 0",
            lambda g: (*(x := _mixture_sample(g))[:3], torch.zeros_like(x[3]), x[4]),
            "A token with beta = 0 writes nothing. Nothing may be divided by beta.",
        ),
    ),
    mutants=(
        Mutant(
            lambda *x: mixture(*x, write="all"),
            "Every memory is written, also those that the token did not go to.",
            "What happens to a memory whose weight is 0?",
        ),
        Mutant(
            lambda *x: mixture(*x, read="all"),
            "All memories are read, with weight 1 each.",
            "The weights say which memories count, and how much.",
        ),
        Mutant(
            lambda *x: mixture(*x, read="plain"),
            "The chosen memories are read with weight 1 each.",
            "Their weights sum to 1. Where do they come in?",
        ),
        Mutant(
            lambda *x: mixture(*x, strength="weighted"),
            "The weights come in twice: also in the strength of the write.",
            "A chosen memory takes a whole step with beta. Where alone do the weights stand?",
        ),
        Mutant(
            lambda *x: mixture(*x, late=True),
            "The memories are read before the token is written.",
            "A token is written before it is read, as in the whole book.",
        ),
        Mutant(
            lambda *x: mixture(*x, common=True),
            "All chosen memories are given one error, that of their weighted sum.",
            "Each memory corrects what it returns itself. Which state is its error taken against?",
        ),
        Mutant(
            _additive,
            "Nothing is erased: this is a mixture of linear attentions.",
            "Each memory writes an error, not the value.",
        ),
    ),
    tested="8 random sequences in float64, 2 memories of 3 or 4 active, then with 1",
)


# S4.4 --------------------------------------------------------------------------------------------------
def _liger_sample(generator: torch.Generator) -> tuple:
    d = _randint(generator, 4, 6)
    return _randn(generator, d, d), *(2 * _randn(generator, d) for _ in range(3))


def _three(generator: torch.Generator) -> tuple:
    return tuple(_randn(generator, 4) for _ in range(3))


def liger_step(S, q, k, v, *, gate="key", root=16, late=False, features="both", swap=False, order="after"):
    phi_q = q if features in ("none", "key") else q.softmax(0)
    phi_k = k if features in ("none", "query") else k.softmax(0)
    alpha = {"key": k, "features": k.softmax(0), "value": v, "query": q}[gate].sigmoid() ** (1 / root)
    decay = alpha[None, :] if swap or gate == "value" else alpha[:, None]
    write = torch.outer(phi_k, v)
    new = decay * (S + write) if late else decay * S + write
    return (S if order == "before" else new).T @ phi_q, new


exercise_4 = Exercise(
    number="S4.4",
    title="A gate from a key",
    stars=2,
    minutes=10,
    sample=_liger_sample,
    reference=liger_step,
    outputs=("o", "the state"),
    rules=(no_library(lambda: _liger_sample(torch.Generator().manual_seed(0))),),
    extremes=(
        Extreme(
            "a state of zero",
            lambda g: (torch.zeros(4, 4, dtype=torch.float64), *_three(g)),
            "The first token finds nothing to decay.",
        ),
    ),
    mutants=(
        Mutant(
            lambda *x: liger_step(*x, gate="features"),
            "The gate is made from the features, softmax of the key, and not from the key itself.",
            "A sigmoid of what lies between 0 and 1 is never below one half. What is its argument here?",
        ),
        Mutant(
            lambda *x: liger_step(*x, gate="query"),
            "The gate is made from the query.",
            "Which of the three vectors speaks of what is stored?",
        ),
        Mutant(
            lambda *x: liger_step(*x, gate="value"),
            "The gate is made from the value, and acts on value channels.",
            "Diag(alpha) stands on the left of the state: which axis is that?",
        ),
        Mutant(
            lambda *x: liger_step(*x, swap=True),
            "The gate acts on the columns of the state, its value channels.",
            "Diag(alpha) stands on the left of the state: which axis is that?",
        ),
        Mutant(
            lambda *x: liger_step(*x, root=1),
            "The sixteenth root is missing: the state is gone after a few tokens.",
            "What is the half-life for a key of 0?",
        ),
        Mutant(
            lambda *x: liger_step(*x, late=True),
            "The new write decays as well.",
            "Which state does the gate of token t multiply: the one before the write, or after?",
        ),
        Mutant(
            lambda *x: liger_step(*x, features="none"),
            "Query and key come in as they are, without the softmax over their channels.",
            "What is phi?",
        ),
        Mutant(
            lambda *x: liger_step(*x, features="key"),
            "Only the key goes through the softmax; the query has to, too.",
            "Both sides of an inner product of features are features.",
        ),
        Mutant(
            lambda *x: liger_step(*x, features="query"),
            "Only the query goes through the softmax; the key has to, too.",
            "Both sides of an inner product of features are features.",
        ),
        Mutant(
            lambda *x: liger_step(*x, order="before"),
            "The state is read before the token is written.",
            "A token is written before it is read, as in the whole book.",
        ),
    ),
    tested="8 random steps in float64",
)


# S4.5 --------------------------------------------------------------------------------------------------
def _merge_sample(generator: torch.Generator) -> tuple:
    n = _randint(generator, 5, 7)  # square, as those of a model of one width: no shape tells B A from its transpose
    rank = _randint(generator, 2, 3)
    alpha = float(_randint(generator, 5, 20))
    return _randn(generator, n, n), _randn(generator, rank, n), _randn(generator, n, rank), alpha


def merge_adapter(W, A, B, alpha):
    return W + alpha / A.shape[0] * B @ A


exercise_5 = Exercise(
    number="S4.5",
    title="Merge an adapter",
    stars=1,
    minutes=5,
    sample=_merge_sample,
    reference=merge_adapter,
    extremes=(
        Extreme(
            "B = 0",
            lambda g: (*(x := _merge_sample(g))[:2], torch.zeros_like(x[2]), x[3]),
            "An adapter that has learned nothing changes nothing.",
        ),
    ),
    mutants=(
        Mutant(
            lambda W, A, B, alpha: W + alpha * B @ A,
            "The constant is not divided by the rank.",
            "With twice the rank the sum in B A has twice as many terms. What keeps its size?",
        ),
        Mutant(
            lambda W, A, B, alpha: W + B @ A,
            "The factor on B A is missing.",
            "What does the layer multiply the adapter's output with?",
        ),
        Mutant(
            lambda W, A, B, alpha: W + alpha / A.shape[0] * (B @ A).T,
            "The adapter is transposed.",
            "B A x: which of the two matrices does x meet first?",
        ),
        Mutant(
            lambda W, A, B, alpha: alpha / A.shape[0] * B @ A,
            "Only the change is left: the trained weight is gone.",
            "The merged layer has to do what both did together.",
        ),
        Mutant(
            lambda W, A, B, alpha: W + alpha / A.shape[1] * B @ A,
            "The factor is divided by the width, not by the rank.",
            "A is r x d_in. Which of its two sizes is the rank?",
        ),
        Mutant(
            lambda W, A, B, alpha: W - alpha / A.shape[0] * B @ A,
            "The adapter is subtracted.",
            "That would be undoing a merge.",
        ),
    ),
    tested="8 random adapters of square matrices in float64",
)

ENTRIES = [exercise_1, exercise_2, exercise_3, exercise_4, exercise_5]
