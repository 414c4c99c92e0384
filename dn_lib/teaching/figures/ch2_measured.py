"""What the figures of chapter 2 show, measured: sizes of states, sweeps over pairs, trained models, wear.

Everything is computed by `dn_lib` in float64, from a generator of its own, unless a model is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from dn_lib.data.recall import correlated_keys
from dn_lib.forms.delta_rule import delta_rule_step, recurrent_delta_rule, sweep_rate
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.forms.linear_attention import recurrent_linear_attention
from dn_lib.teaching.figures.ch2 import NAMES, Model, newer_or_older, writes
from dn_lib.teaching.tables import Table, Tables

DOUBLE = torch.float64


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# --- Stability -------------------------------------------------------------------------------------------
def state_sizes(tokens: int = 60, d_k: int = 16, d_v: int = 4, seed: int = 0) -> dict[str, list[float]]:
    r"""The norm of the state after each of `tokens` random writes, by what beta |k|^2 is.

    For unit keys with beta |k|^2 of 1, 2 and 3, and for keys of normal numbers, as they are, with beta = 1/2.
    """
    keys, values = _normal(torch.Generator().manual_seed(seed), tokens, d_k + d_v).split([d_k, d_v], dim=1)
    runs = {f"$\\beta|k|^2 = {p:g}$": (p, _unit(keys)) for p in (1.0, 2.0, 3.0)}
    runs["$\\beta = 0.5$, raw keys"] = (0.5, keys)
    sizes: dict[str, list[float]] = {}
    for name, (beta, k) in runs.items():
        S, sizes[name] = torch.zeros(d_k, d_v, dtype=DOUBLE), []
        for t in range(tokens):
            S = delta_rule_step(k[t], k[t], values[t], torch.tensor(beta, dtype=DOUBLE), S)[1]
            sizes[name].append(S.norm().item())
    return sizes


# --- Sweeps over a list of pairs -------------------------------------------------------------------------
def lists_of_pairs(counts: Sequence[int], d: int, trials: int, seed: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    """For each n in `counts`, n random pairs: unit keys and values of mean square one, `[trials, n, d]` each."""
    generator = torch.Generator().manual_seed(seed)
    lists: dict[int, tuple[Tensor, Tensor]] = {}
    for n in counts:
        values = _normal(generator, trials, n, d) / d**0.5
        lists[n] = _unit(_normal(generator, trials, n, d)), values
    return lists


def recall_errors(
    keys: Tensor, values: Tensor, beta: float = 1.0, sweeps: Sequence[int] = (1, 5, 20)
) -> dict[str | int, float]:
    """Mean squared recall error of the pairs, keys `[..., n, d_k]` and values `[..., n, d_v]`, from several states.

    "added": from K^T V.  "best": from the state of least squares.  And after each number of `sweeps` of the delta rule.

    >>> keys, values = lists_of_pairs([4], d=8, trials=2)[4]
    >>> recall_errors(keys, values)["best"] < 1e-20  # four independent keys: there is a state without error
    True
    """

    def error(S: Tensor) -> float:
        return (keys @ S - values).square().sum(-1).mean().item()

    found: dict[str | int, float] = {"added": error(keys.mT @ values), "best": error(torch.linalg.pinv(keys) @ values)}
    S = torch.zeros(*keys.shape[:-2], keys.shape[-1], values.shape[-1], dtype=keys.dtype)
    strength = torch.full(keys.shape[:-1], beta, dtype=keys.dtype)
    for sweep in range(1, max(sweeps) + 1):
        S = recurrent_delta_rule(keys, keys, values, strength, initial_state=S)[1]
        if sweep in sweeps:
            found[sweep] = error(S)
    return found


def sweeps_measured(
    cosines: Sequence[float], n: int = 8, d: int = 12, sweeps: int = 30, runs: int = 200, seed: int = 0
) -> dict[float, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For n keys with equal cosines and beta = 1: the squared distance to the solution, relative to the first.

    For each cosine: after each sweep in a fixed order, `[sweeps + 1]`; after as many writes in random order, mean of
    `runs`; the factor of a sweep that the eigenvalue predicts (squared); the bound for random order, `[sweeps + 1]`.
    """
    measured: dict[float, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    for c in cosines:
        k = correlated_keys(n, d, c, dtype=DOUBLE, generator=generator)
        beta, S = torch.ones(n, dtype=DOUBLE), torch.zeros(d, 4, dtype=DOUBLE)
        solution = k.T @ _normal(generator, n, 4)  # in the span of the keys
        gap = -solution.expand(runs, -1, -1)  # the same start in every run
        zeros, ones = torch.zeros(runs, n, 4, dtype=DOUBLE), torch.ones(runs, n, dtype=DOUBLE)
        fixed: list[Tensor] = []
        random: list[Tensor] = []
        for _ in range(sweeps + 1):
            fixed.append((S - solution).square().sum())
            random.append(gap.square().sum((1, 2)).mean())
            S = recurrent_delta_rule(k, k, k @ solution, beta, initial_state=S)[1]
            picks = k[torch.randint(n, (runs, n), generator=generator)]
            gap = recurrent_delta_rule(picks, picks, zeros, ones, initial_state=gap)[1]
        bound = (1 - (1 - c) / n) ** (n * torch.arange(sweeps + 1))
        scaled = [torch.stack(curve) / curve[0] for curve in (fixed, random)]
        measured[c] = scaled[0], scaled[1], sweep_rate(k, beta) ** 2, bound
    return measured


# --- Trained models --------------------------------------------------------------------------------------
def train(model: nn.Module, draw: Callable[[], tuple[Tensor, Tensor]], steps: int, lr: float) -> list[float]:
    """AdamW on the labelled positions of a fresh batch at every step; returns the accuracy at every step.

    model: (tokens `[n, L]`, where it is asked `[n, L]`) -> logits, one row for each question; trained in place.
    draw: returns tokens and labels `[n, L]`, where a label below 0 asks nothing.  The rate rises and falls once.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    history: list[float] = []
    for _ in range(steps):
        tokens, labels = draw()
        asked = labels >= 0
        logits, right = model(tokens, asked), labels[asked]
        optimiser.zero_grad()
        cross_entropy(logits, right).backward()
        optimiser.step()
        schedule.step()
        history.append((logits.argmax(-1) == right).float().mean().item())
    return history


def recall_table(
    models: Mapping[tuple[str, str], Any],
    mean: Mapping[tuple[str, str], float],
    updates: tuple[Tensor, Tensor, int],
) -> Tables:
    """The accuracy of each (task, rule), and what the models for "updates" answer and write.

    updates: tokens, labels and the number of pairs, of `dn_lib.data.recall.recall_with_updates`.
    """
    scores = [(task, NAMES[rule], f"{accuracy:.3f}") for (task, rule), accuracy in mean.items()]
    answers, writing = list[tuple[str, ...]](), list[tuple[str, ...]]()
    for rule in ("linear", "delta"):
        shares = newer_or_older(models["updates", rule], *updates)
        answers.append((NAMES[rule], *(f"{share:.0%}" for share in shares)))
    for rule, what in (("delta", "beta"), ("linear", "|v|"), ("linear", "|cosine| of q, k")):
        means = writes(models["updates", rule], *updates)[what]
        writing.append((NAMES[rule], what, *(f"{x:.2f}" for x in means)))
    return Tables(
        Table(("task", "rule", "accuracy"), scores),
        Table(("answers to updates", "newer value", "older value"), answers),
        Table(("means over updates", "of", "keys", "values", "questions"), writing),
    )


@torch.no_grad()
def right_answers(model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    """1 where the model answers rightly, and else 0: `[n, questions]`, for as many questions in every row."""
    asked = labels >= 0
    right = model(tokens, asked).argmax(-1) == labels[asked]
    return right.view(len(tokens), -1).float()


@torch.no_grad()
def parity_table(model: Any, tokens: Tensor, labels: Tensor, stretches: Sequence[tuple[int, int]]) -> Table:
    """The accuracy by last bit and parity over stretches of positions; below it, beta and keys of a 0 and a 1.

    tokens, labels `[n, L + 1]`: a start token, which asks nothing, and L bits.  A stretch (101, 160) counts from 1.
    """
    betas, pair = (x[:, 0] for x in model.beta(model.embed(torch.arange(2))[:, None]))
    cosine = cosine_similarity(*model.k(pair), dim=0).abs()
    right = right_answers(model, tokens, labels)
    rows: list[tuple[str, ...]] = []
    for start, stop in stretches:
        last, odd = tokens[:, start : stop + 1], labels[:, start : stop + 1] == 1
        ok = right[:, start - 1 : stop]
        cases = [(last == bit) & (odd == is_odd) for bit in (0, 1) for is_odd in (False, True)]
        rows.append((f"{start} to {stop}", *(f"{ok[case].mean():.2f}" for case in cases)))
    note = f"beta of a 0: {betas[0]:.3f}, of a 1: {betas[1]:.3f}; |cosine| of their keys {cosine:.2f}"
    return Table(("accuracy by last bit and parity", "0 even", "0 odd", "1 even", "1 odd"), rows, notes=[note])


# --- Weaknesses ------------------------------------------------------------------------------------------
def worn_directions(
    cases: Sequence[tuple[int, float]], later: int = 300, runs: int = 200, seed: int = 0
) -> dict[tuple[int, float], Tensor]:
    """The mean squared length of what is left of a unit vector after 0 to `later` random writes, `[later + 1]`.

    cases: pairs of a dimension and a beta.
    """
    generator, worn = torch.Generator().manual_seed(seed), dict[tuple[int, float], Tensor]()
    for d, beta in cases:
        x, lengths = _unit(_normal(generator, runs, d))[..., None], list[Tensor]()
        zero, strength = torch.zeros(runs, 1, dtype=DOUBLE), torch.tensor(beta, dtype=DOUBLE)
        for _ in range(later + 1):
            lengths.append(x.square().sum(1).mean())
            k = _unit(_normal(generator, runs, d))
            x = delta_rule_step(k, k, zero, strength, x)[1]
        worn[d, beta] = torch.stack(lengths)
    return worn


def crowded_memories(
    old: Sequence[int], new: int = 4, d: int = 64, runs: int = 300, seed: int = 0
) -> dict[str, list[float]]:
    """The mean squared error on `new` pairs that were written after n old ones, for each n in `old` and each rule.

    The gated rule has the gate alpha = 0 at the first new pair, which clears the memory, and 1 elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    crowded: dict[str, list[float]] = {"linear": [], "delta": [], "gated": []}
    for n in old:
        k, v = _unit(_normal(generator, runs, n + new, d)), _unit(_normal(generator, runs, n + new, 8))
        beta = torch.ones(runs, n + new, dtype=DOUBLE)
        alpha = (torch.arange(n + new) != n).to(DOUBLE).expand(runs, -1)
        states = (
            recurrent_linear_attention(k, k, v)[1],
            recurrent_delta_rule(k, k, v, beta)[1],
            recurrent_gated_delta_rule(k, k, v, beta, alpha.log())[1],
        )
        for series, S in zip(crowded.values(), states, strict=True):
            series.append((k[:, n:] @ S - v[:, n:]).square().sum(-1).mean().item())
    return crowded
