"""Equations of study 3, in its order.  "By hand" means: token by token, with no stretch anywhere."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from dn_lib.forms.serving import dequantise_state, quantise_state, rounding_bound, step_back, step_back_growth
from dn_lib.parallel.simulated import counted_row_bytes, counted_state_bytes
from dn_lib.parallel.traffic import RULES, rows_bytes, state_bytes
from dn_lib.teaching.registry import Equation

STATE, KEY = 4, 2  # bytes of a number: of a state, float32, and of a key, bfloat16


# Inputs ------------------------------------------------------------------------------------------------
def _randint(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _tokens(generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unit k, v, beta in (0, 2), gates per channel in (0.5, 1) and a state, of random sizes."""
    length = length or _randint(generator, 4, 10)
    d_k, d_v = _randint(generator, 2, 5), _randint(generator, 2, 5)
    k = _randn(generator, length, d_k)
    return (
        k / k.norm(dim=-1, keepdim=True),
        _randn(generator, length, d_v),
        2 * _uniform(generator, length),
        0.5 + 0.5 * _uniform(generator, length, d_k),
        _randn(generator, d_k, d_v),
    )


def _cuts(generator: torch.Generator, length: int) -> list[int]:
    """Where three stretches begin and end."""
    return [0, *sorted(_randint(generator, 1, length - 1) for _ in range(2)), length]


# What a stretch is -------------------------------------------------------------------------------------
def _one_rule(generator: torch.Generator) -> tuple:
    """k, v, erasure, strength, gates, state: a rule of the family, A_t = (I - erasure k k^T) Diag(gates)."""
    k, v, beta, gates, S = _tokens(generator)
    one, rule = torch.ones_like(beta), _randint(generator, 0, 4)
    erasure, strength = (beta, beta) if rule >= 3 else (0 * beta, one)
    gates = {0: torch.ones_like(gates), 1: gates[:, :1].expand_as(gates), 3: torch.ones_like(gates)}.get(rule, gates)
    return k, v, erasure, strength, gates, S


def _walk(k: Tensor, v: Tensor, erasure: Tensor, strength: Tensor, gates: Tensor, S: Tensor) -> Tensor:
    """The last state, by hand: decay, erase, write."""
    for t in range(len(k)):
        S = gates[t][:, None] * S
        S = S - erasure[t] * torch.outer(k[t], k[t] @ S) + strength[t] * torch.outer(k[t], v[t])
    return S


def _step(k: Tensor, erasure: Tensor, gates: Tensor) -> Tensor:
    return (torch.eye(len(k), dtype=k.dtype) - erasure * torch.outer(k, k)) @ torch.diag(gates)


def _map(k, v, erasure, strength, gates, *, ascending=False, own=False) -> tuple[Tensor, Tensor]:
    """(M, X): the product of all A_t, and the writes, each carried through the steps after it."""
    eye = torch.eye(k.shape[1], dtype=k.dtype)
    M, X = eye, torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype)
    for t in range(len(k)):
        A = _step(k[t], erasure[t], gates[t])
        M = M @ A if ascending else A @ M
        write = strength[t] * torch.outer(k[t], v[t])
        X = A @ (X + write) if own else A @ X + write
    return M, X


def _by_map(k, v, erasure, strength, gates, S, **wrong) -> Tensor:
    M, X = _map(k, v, erasure, strength, gates, **wrong)
    return M @ S + X


family_map = Equation(
    label="eq-family-map",
    kind="identity",
    sample=_one_rule,
    left=_walk,
    right=_by_map,
    mutants={
        "M in the order of time": lambda *x: _by_map(*x, ascending=True),
        "a write passes its own step": lambda *x: _by_map(*x, own=True),
        "M left out": lambda *x: _map(*x[:5])[1] + x[5],
    },
)


# Decay: a number beside the state ------------------------------------------------------------------------
def _decaying(generator: torch.Generator) -> tuple:
    k, v, _, gates, _ = _tokens(generator)
    return k, v, gates[:, 0], _cuts(generator, len(k))


def _entering_by_hand(k: Tensor, v: Tensor, gates: Tensor, cuts: list[int]) -> Tensor:
    one = torch.ones_like(gates)
    empty = torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype)
    wide = gates[:, None].expand_as(k)
    return torch.stack([_walk(k[:a], v[:a], 0 * one[:a], one[:a], wide[:a], empty) for a in cuts[1:]])


def _entering_by_logs(k: Tensor, v: Tensor, gates: Tensor, cuts: list[int], *, lag: int = 0, use: bool = True):
    """The states after stretches 0, 1, 2: X of each, weighted by exp of a difference of sums of logs."""
    one, states = torch.ones_like(gates), []
    b = gates.log().cumsum(0)
    X = []
    for a, e in pairwise(cuts):
        wide = gates[a:e, None].expand_as(k[a:e])
        X.append(_map(k[a:e], v[a:e], 0 * one[a:e], one[a:e], wide)[1])
    ends = [b[e - 1] for e in cuts[1:]]
    for r in range(len(X)):
        weights = [(ends[r] - ends[max(j - lag, 0)]).exp() if use else 1.0 for j in range(r + 1)]
        states.append(sum((w * x for w, x in zip(weights, X, strict=False)), torch.zeros_like(X[0])))
    return torch.stack(states)


decay_entering = Equation(
    label="eq-decay-entering",
    kind="identity",
    sample=_decaying,
    left=_entering_by_hand,
    right=_entering_by_logs,
    mutants={
        "states summed": lambda *x: _entering_by_logs(*x, use=False),
        "the own stretch's gates too": lambda *x: _entering_by_logs(*x, lag=1),
    },
)


# The way back ------------------------------------------------------------------------------------------
def _chain(generator: torch.Generator) -> tuple:
    """M, X and Y of three stretches, and the gradient of the last state."""
    p, d_k, d_v = 3, _randint(generator, 2, 4), _randint(generator, 2, 4)
    sizes = ((p, d_k, d_k), (p, d_k, d_v), (p, d_k, d_v), (d_k, d_v))
    return tuple(_randn(generator, *size) for size in sizes)


def _chain_by_autograd(M: Tensor, X: Tensor, Y: Tensor, dS: Tensor) -> tuple[Tensor, Tensor]:
    M, X = (x.clone().requires_grad_() for x in (M, X))
    S, loss = torch.zeros_like(X[0]), torch.zeros((), dtype=X.dtype)
    for r in range(len(M)):
        loss = loss + (Y[r] * S).sum()  # what the outputs of stretch r send into the state that enters it
        S = M[r] @ S + X[r]
    dM, dX = torch.autograd.grad(loss + (dS * S).sum(), (M, X))
    return dM, dX


def _chain_gradients(M, X, Y, dS, *, state="entering", side="left", gradient="leaving") -> tuple[Tensor, Tensor]:
    states, leaving = [torch.zeros_like(X[0])], [dS]
    for r in range(len(M)):
        states.append(M[r] @ states[-1] + X[r])
    for r in reversed(range(len(M))):
        leaving.append(M[r].mT @ leaving[-1] + Y[r])
    leaving.reverse()  # leaving[r]: of the state that enters stretch r; one further, of the one that leaves it
    S = torch.stack(states[:-1] if state == "entering" else states[1:])
    g = torch.stack(leaving[1:] if gradient == "leaving" else leaving[:-1])
    return (g @ S.mT if side == "left" else (S @ g.mT)), g


map_gradient = Equation(
    label="eq-map-gradient",
    kind="identity",
    sample=_chain,
    left=_chain_by_autograd,
    right=_chain_gradients,
    mutants={
        "dM transposed": lambda *x: _chain_gradients(*x, side="right"),
        "the state that leaves": lambda *x: _chain_gradients(*x, state="leaving"),
        "the gradient of the state that enters": lambda *x: _chain_gradients(*x, gradient="entering"),
    },
)


# Bytes -------------------------------------------------------------------------------------------------
def _traffic(generator: torch.Generator) -> tuple:
    rule = RULES[_randint(generator, 0, len(RULES) - 1)]
    return rule, 2 ** _randint(generator, 1, 6), *(_randint(generator, 1, 6) for _ in range(3))


def _state_traffic(rule: str, p: int, H: int, d_k: int, d_v: int, *, own=0, back=False, square=True):
    m = {"linear": 0, "decay": 1, "channels": d_k, "delta": d_k**2 if square else d_k}[rule]
    forward = (p - 1 + own) * H * (d_k * d_v + m) * STATE
    return forward, (forward if back else (p - 1 + own) * H * d_k * d_v * STATE)


state_traffic = Equation(
    label="eq-state-traffic",
    kind="count",
    sample=_traffic,
    left=counted_state_bytes,
    right=_state_traffic,
    mutants={
        "the own state is received too": lambda *x: _state_traffic(*x, own=1),
        "maps go back as well": lambda *x: _state_traffic(*x, back=True),
        "M is a column": lambda *x: _state_traffic(*x, square=False),
    },
)


def _halo(generator: torch.Generator) -> tuple:
    p, n = 2 ** _randint(generator, 1, 4), _randint(generator, 1, 6)
    return n * p, p, _randint(generator, 0, 2 * n * p), _randint(generator, 1, 5)


def _row_traffic(length: int, p: int, rows: int, c: int, *, all_of_it=False, more=0, once=False) -> tuple[int, int]:
    n, w = length // p, rows + 1  # a layer that looks at w tokens, the newest included, reaches back w - 1 rows
    moved = min(w - 1 + more, (p - 1) * n) if not all_of_it else (p - 1) * n
    # Back, to the first process: each later one returns the gradients of those of its rows that it borrowed.
    lent = sum(max(0, n - max(0, r * n - w + 1)) for r in range(1, 2 if once else p))
    return moved * c * KEY, lent * c * KEY


row_traffic = Equation(
    label="eq-row-traffic",
    kind="count",
    sample=_halo,
    left=counted_row_bytes,
    right=_row_traffic,
    mutants={
        "always everything": lambda *x: _row_traffic(*x, all_of_it=True),
        "one row too many": lambda *x: _row_traffic(*x, more=1),
        "lent once": lambda *x: _row_traffic(*x, once=True),
    },
)


def _ring_sizes(generator: torch.Generator) -> tuple:
    p = 2 ** _randint(generator, 1, 4)
    return p * _randint(generator, 1, 5), p, _randint(generator, 1, 3), _randint(generator, 1, 4)


def _ring_counted(length: int, p: int, H: int, d: int) -> tuple[int, int]:
    """Pass blocks round a ring until each process has seen all; back, with gradients that end where they belong."""
    blocks = torch.zeros(p, length // p, 2, H, d, dtype=torch.bfloat16)

    def round_trip(hops: int) -> tuple[int, list[int]]:
        holds, received = list(range(p)), 0
        for _ in range(hops):
            holds = [holds[r - 1] for r in range(p)]  # process r receives what process r - 1 held
            received += blocks[holds[0]].nbytes
        return received, holds

    forward, _ = round_trip(p - 1)
    keys, _ = round_trip(p - 1)
    gradients, at = round_trip(p)
    if at != list(range(p)):
        raise AssertionError("gradients did not come home")
    return forward, keys + gradients


def _ring_traffic(length: int, p: int, H: int, d: int, *, hops=-1, values=2, home=1) -> tuple[int, int]:
    stretch = length // p * values * H * d * KEY
    return (p + hops) * stretch, (2 * (p + hops) + home) * stretch


ring_traffic = Equation(
    label="eq-ring-traffic",
    kind="count",
    sample=_ring_sizes,
    left=_ring_counted,
    right=_ring_traffic,
    mutants={
        "keys without values": lambda *x: _ring_traffic(*x, values=1),
        "own block received too": lambda *x: _ring_traffic(*x, hops=0),
        "gradients left one hop from home": lambda *x: _ring_traffic(*x, home=0),
    },
)


def _widths(generator: torch.Generator) -> tuple:
    return _randint(generator, 2, 40), _randint(generator, 2, 40), 2 ** _randint(generator, 1, 5)


def _break_even_searched(d_k: int, d_v: int, p: int) -> int:
    """The shortest stretch whose keys and values are more bytes than the pair (M, X)."""
    pair, n = state_bytes("delta", p, 1, 1, d_k, d_v), 1
    while rows_bytes(n * p, p, p - 1, n * p, d_k + d_v) <= pair:
        n += 1
    return n


break_even = Equation(
    label="eq-break-even",
    kind="count",
    sample=_widths,
    left=_break_even_searched,
    right=lambda d_k, d_v, p: d_k * STATE // KEY + 1,
    mutants={
        "numbers of one size": lambda d_k, d_v, p: d_k + 1,
        "more processes, longer stretches": lambda d_k, d_v, p: d_k * STATE // KEY * (p - 1) + 1,
        "the value's width": lambda d_k, d_v, p: d_v * STATE // KEY + 1,
    },
)


# Tokens taken back ---------------------------------------------------------------------------------------
def _draft(generator: torch.Generator) -> tuple:
    k, v, beta, _, S = _tokens(generator)
    return k, v, beta, S, _randint(generator, 1, len(k) - 1)


def _drafted(k: Tensor, v: Tensor, beta: Tensor, S: Tensor) -> tuple[list[Tensor], Tensor]:
    """All states, and what was written under each key."""
    states, written = [S], []
    for t in range(len(k)):
        written.append(beta[t] * (v[t] - k[t] @ states[-1]))
        states.append(states[-1] + torch.outer(k[t], written[-1]))
    return states, torch.stack(written)


def _taken_back(k, v, beta, S, m, *, what="written", skip=0, sign=-1):
    states, written = _drafted(k, v, beta, S)
    rows = {"written": written, "values": beta[:, None] * v}[what]
    gone = slice(len(k) - m + skip, None)
    return states[-1] + sign * k[gone].mT @ rows[gone]


rolled_back = Equation(
    label="eq-roll-back",
    kind="identity",
    sample=_draft,
    left=lambda k, v, beta, S, m: _drafted(k, v, beta, S)[0][len(k) - m],
    right=_taken_back,
    mutants={
        "values for what was written": lambda *x: _taken_back(*x, what="values"),
        "one token too few": lambda *x: _taken_back(*x, skip=1),
        "written again": lambda *x: _taken_back(*x, sign=1),
    },
)


def _one_step(generator: torch.Generator) -> tuple:
    k, v, beta, gates, S = _tokens(generator, length=1)
    return k[0] * (0.5 + _uniform(generator, 1)), v[0], 0.4 * beta[0], gates[0, 0], S


def _forward_and_back(k, v, beta, alpha, S, *, gate_first=False, unit=False, sign=1.0):
    after = alpha * S
    after = after - beta * torch.outer(k, k @ after) + beta * torch.outer(k, v)
    left = after - beta * torch.outer(k, v)
    left = left / alpha if gate_first else left
    norm = 1.0 if unit else k @ k
    left = left + sign * beta / (1 - beta * norm) * torch.outer(k, k @ left)
    return left if gate_first else left / alpha


stepped_back = Equation(
    label="eq-step-back",
    kind="identity",
    sample=_one_step,
    left=lambda k, v, beta, alpha, S: S,
    right=_forward_and_back,
    mutants={
        "keys taken for unit vectors": lambda *x: _forward_and_back(*x, unit=True),
        "the sign of the inverse": lambda *x: _forward_and_back(*x, sign=-1.0),
        "the gate left in": lambda k, v, beta, alpha, S: alpha * _forward_and_back(k, v, beta, alpha, S),
    },
)


def _disturbed(generator: torch.Generator) -> tuple:
    """A state and a disturbance of it; the newest key lies along the disturbance in half of the draws."""
    k, v, beta, gates, S = _tokens(generator, length=_randint(generator, 1, 4))
    beta = 0.05 + 0.9 * beta / 2
    noise = _randn(generator, *S.shape)
    if _randint(generator, 0, 1):
        k = k[-1:].expand_as(k).clone()
        noise = torch.outer(k[-1], noise[0])
    alpha = gates[:, 0] if _randint(generator, 0, 1) else torch.ones_like(beta)
    return k, v, beta, alpha, S, noise


def _growth(k, v, beta, alpha, S, noise, *, gate=True, newest=False, keys=True):
    k, beta, alpha = (x[-1:] if newest else x for x in (k, beta, alpha))
    g = alpha.log() if gate else torch.zeros_like(alpha)
    # A hair above, for rounding where the bound is reached: states of size 1 in float64, divided by 0.05 at most.
    factor = step_back_growth(k, beta, g=g) if keys else (1 / alpha).prod()
    return factor * noise.norm() * (1 + 1e-9)


def _moved(k, v, beta, alpha, S, noise):
    g = alpha.log()
    return (step_back(S + noise, k, v, beta, g=g) - step_back(S, k, v, beta, g=g)).norm()


growth = Equation(
    label="eq-step-back-growth",
    kind="bound",
    sample=_disturbed,
    left=_moved,
    right=_growth,
    mutants={
        "gates left out": lambda *x: _growth(*x, gate=False),
        "the newest token only": lambda *x: _growth(*x, newest=True),
        "erasure left out": lambda *x: _growth(*x, keys=False),
    },
    trials=40,
)


# Eight bits ----------------------------------------------------------------------------------------------
def _state(generator: torch.Generator) -> tuple:
    d_k, d_v = _randint(generator, 2, 8), _randint(generator, 2, 8)
    return (_randn(generator, d_k, d_v) * _uniform(generator, d_k, 1) * 10,)


def _eight_bits(S: Tensor, *, axis: int | None = -1, top: float = 127, cut: bool = False) -> Tensor:
    largest = S.abs().amax() if axis is None else S.abs().amax(axis, keepdim=True)
    sigma = largest / top
    ratio = S / sigma
    return sigma * (ratio.trunc() if cut else ratio.round())


eight_bits = Equation(
    label="eq-eight-bits",
    kind="definition",
    sample=_state,
    left=lambda S: dequantise_state(*quantise_state(S)),
    right=_eight_bits,
    mutants={
        "one scale for the state": lambda S: _eight_bits(S, axis=None),
        "a scale for each column": lambda S: _eight_bits(S, axis=-2),
        "cut off, not rounded": lambda S: _eight_bits(S, cut=True),
        "128 steps": lambda S: _eight_bits(S, top=128),
    },
)


def _least_even(generator: torch.Generator) -> tuple:
    """States whose entries lie nearly half a scale off the grid, where rounding does its worst."""
    (S,) = _state(generator)
    sigma = S.abs().amax(-1, keepdim=True) / 127
    worst = sigma * ((S / sigma).trunc() + 0.499 * S.sign())
    worst[:, 0] = 127 * sigma[:, 0]
    return (worst,)


rounding = Equation(
    label="eq-rounding-bound",
    kind="bound",
    sample=_least_even,
    left=lambda S: (dequantise_state(*quantise_state(S)) - S).norm(),
    right=lambda S: rounding_bound(quantise_state(S)[1], S.shape[1]),
    mutants={
        "a quarter of a scale": lambda S: rounding_bound(quantise_state(S)[1], S.shape[1]) / 2,
        "one number a row": lambda S: rounding_bound(quantise_state(S)[1], 1),
    },
)


def _stored(generator: torch.Generator) -> tuple:
    k, v, beta, gates, S = _tokens(generator, length=8)
    return k, v, beta, gates[:, :1].expand_as(gates), S


def _drift(k: Tensor, v: Tensor, beta: Tensor, gates: Tensor, S: Tensor) -> tuple[Tensor, list[float]]:
    """How far the stored state is from the exact one after the last token, and the bound of each rounding."""
    kept, bounds = S, []
    for t in range(len(k)):
        one = slice(t, t + 1)
        S, kept = (_walk(k[one], v[one], beta[one], beta[one], gates[one], x) for x in (S, kept))
        codes, scales = quantise_state(kept)
        kept = dequantise_state(codes, scales)
        bounds.append(float(rounding_bound(scales, v.shape[1])))
    return (kept - S).norm(), bounds


drift_bound = Equation(
    label="eq-drift-bound",
    kind="bound",
    sample=_stored,
    left=lambda *x: _drift(*x)[0],
    right=lambda *x: math.fsum(_drift(*x)[1]),
    mutants={
        "the last rounding only": lambda *x: _drift(*x)[1][-1],
        "their mean": lambda *x: math.fsum(_drift(*x)[1]) / len(x[0]),
    },
    trials=30,
)

ENTRIES = [
    family_map,
    decay_entering,
    map_gradient,
    state_traffic,
    row_traffic,
    ring_traffic,
    break_even,
    rolled_back,
    stepped_back,
    growth,
    eight_bits,
    rounding,
    drift_bound,
]
