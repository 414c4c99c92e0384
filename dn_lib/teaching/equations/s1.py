"""Equations of study 1, forgetting, in its order.  "By hand" means: token by token, with no chunk anywhere."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from dn_lib.forms.gated import (
    chunkwise_gated_delta_rule,
    chunkwise_gated_linear_attention,
    decayed_products,
    recurrent_gated_delta_rule,
)
from dn_lib.teaching.registry import Equation


# Inputs ------------------------------------------------------------------------------------------------
def _randint(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _gates(generator: torch.Generator, *shape: int) -> Tensor:
    """Logarithms of gates in (0.3, 1)."""
    return (0.3 + 0.7 * torch.rand(*shape, generator=generator, dtype=torch.float64)).log()


def _inputs(generator: torch.Generator, channels: bool = False) -> tuple:
    """q, k (unit), v, beta in (0, 2), log gates `[L]` or `[L, d_k]`, and a state."""
    length, d_k, d_v = _randint(generator, 3, 9), _randint(generator, 2, 5), _randint(generator, 2, 5)
    k = _randn(generator, length, d_k)
    return (
        _randn(generator, length, d_k),
        k / k.norm(dim=-1, keepdim=True),
        _randn(generator, length, d_v),
        2 * torch.rand(length, generator=generator, dtype=torch.float64),
        _gates(generator, length, d_k) if channels else _gates(generator, length),
        _randn(generator, d_k, d_v),
    )


def _per_channel(generator: torch.Generator) -> tuple:
    return _inputs(generator, channels=True)


# By hand -----------------------------------------------------------------------------------------------
def _erasing(
    q, k, v, beta, g, S, *, erase_first=False, error_first=False, decay_write=False, erase=True
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, errors, the last state: decay, then erase and write.  Gates `[L]` or `[L, d_k]`."""
    outputs, errors = [], []
    for t in range(len(k)):
        A = torch.diag(g[t].exp().expand(k.shape[1]))
        H = torch.eye(k.shape[1], dtype=k.dtype) - beta[t] * torch.outer(k[t], k[t]) * erase
        errors.append(v[t] - (S if error_first else A @ S).mT @ k[t])
        write = beta[t] * torch.outer(k[t], v[t])
        kept = A @ H @ S if erase_first else H @ A @ S
        S = kept + (A @ write if decay_write else write)
        outputs.append(q[t] @ S)
    return torch.stack(outputs), torch.stack(errors), S


def _adding(q, k, v, g, S) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(len(k)):
        S = g[t].exp() * S + torch.outer(k[t], v[t])
        outputs.append(q[t] @ S)
    return torch.stack(outputs), S


def _ratios(g: Tensor, diagonal: int = 0) -> Tensor:
    """exp(b_i - b_j) for j <= i - |diagonal|, by multiplying the gates between; 0 elsewhere.  `[C, C]`."""
    alpha, C = g.exp(), len(g)
    return torch.stack(
        [
            torch.stack([alpha[j + 1 : i + 1].prod() if j <= i + diagonal else alpha.new_zeros(()) for j in range(C)])
            for i in range(C)
        ]
    )


# The family --------------------------------------------------------------------------------------------
family = Equation(
    label="eq-s1-family",
    kind="definition",
    sample=_per_channel,
    left=lambda q, k, v, beta, g, S: recurrent_gated_delta_rule(q, k, v, beta, g, scale=1.0, initial_state=S),
    right=lambda *x: _erasing(*x)[::2],
    mutants={
        "erase first, then decay": lambda *x: _erasing(*x, erase_first=True)[::2],
        "the write decays too": lambda *x: _erasing(*x, decay_write=True)[::2],
        "no erasure": lambda *x: _erasing(*x, erase=False)[::2],
        "no decay": lambda q, k, v, beta, g, S: _erasing(q, k, v, beta, 0 * g, S)[::2],
    },
)


# A chunk with one number per token -----------------------------------------------------------------------
def _mask_chunk(q, k, v, beta, g, S, *, own=False, read=True, end=True, carry=True, mask=True):
    """O and S' from the mask of ratios; own: a token's own gate is in the mask too."""
    gamma, ratios = g.exp().cumprod(0), _ratios(g)
    scores = (q @ k.mT) * (ratios * g.exp() if own else ratios if mask else torch.ones_like(ratios).tril())
    left = (gamma[-1] / gamma) if end else torch.ones_like(gamma)
    reach = gamma if read else torch.ones_like(gamma)
    o = reach[:, None] * (q @ S) + scores @ v
    return o, (gamma[-1] if carry else 1) * S + (left[:, None] * k).mT @ v


decay_chunk = Equation(
    label="eq-s1-mask",
    kind="identity",
    sample=_inputs,
    left=lambda q, k, v, beta, g, S: _adding(q, k, v, g, S),
    right=_mask_chunk,
    mutants={
        "a token's write has decayed already when it is read": lambda *x: _mask_chunk(*x, own=True),
        "the mask holds ones": lambda *x: _mask_chunk(*x, mask=False),
        "the entering state is read undecayed": lambda *x: _mask_chunk(*x, read=False),
        "writes reach the end undecayed": lambda *x: _mask_chunk(*x, end=False),
        "the entering state leaves undecayed": lambda *x: _mask_chunk(*x, carry=False),
    },
)


# Lightning's backward pass -------------------------------------------------------------------------------
def _fixed(generator: torch.Generator) -> tuple:
    """One block with one decay: q, k, v, the logarithm of lambda, S, dO, and the gradient of the state that leaves."""
    q, k, v, _, g, S = _inputs(generator)
    return q, k, v, g[:1], S, _randn(generator, *v.shape), _randn(generator, *S.shape)


def _lightning_autograd(q, k, v, g, S, do, dS):
    q, k, v, S = (x.clone().requires_grad_() for x in (q, k, v, S))
    gates = g.expand(len(q))
    o, state = chunkwise_gated_linear_attention(q, k, v, gates, scale=1.0, initial_state=S, chunk_size=3)
    return torch.autograd.grad((o, state), (q, k, v, S), (do, dS))


def _lightning(q, k, v, g, S, do, dS, *, end=True, carry=True, transpose=True, mask=True, late=0):
    C = len(q)
    i = torch.arange(1, C + 1, dtype=q.dtype)
    D = torch.exp(g * (i[:, None] - i)).tril() if mask else torch.ones(C, C, dtype=q.dtype).tril()
    from_start = torch.exp(g * (i + late))[:, None]
    to_end = torch.exp(g * (C - i))[:, None] if end else torch.ones_like(from_start)
    scores, back = D * (q @ k.mT), D * (do @ v.mT)
    dq = back @ k + from_start * (do @ S.mT)
    dk = (back.mT if transpose else back) @ q + to_end * (v @ dS.mT)
    dv = scores.mT @ do + to_end * (k @ dS)
    return dq, dk, dv, (torch.exp(g * C) if carry else 1) * dS + (from_start * q).mT @ do


lightning_backward = Equation(
    label="eq-s1-lightning",
    kind="identity",
    sample=_fixed,
    left=_lightning_autograd,
    right=_lightning,
    mutants={
        "the mask without decay": lambda *x: _lightning(*x, mask=False),
        "the scores not transposed": lambda *x: _lightning(*x, transpose=False),
        "no decay to the end of the block": lambda *x: _lightning(*x, end=False),
        "the gradient leaves undecayed": lambda *x: _lightning(*x, carry=False),
        "one decay too few from the start": lambda *x: _lightning(*x, late=-1),
    },
)


# Channels ------------------------------------------------------------------------------------------------
def _per_pair(q, k, v, beta, g, S, *, own=False, mean=False, reverse=False, all_pairs=False):
    """P_ij, channel by channel, each from a product of gates."""
    if mean:
        g = g.mean(-1, keepdim=True).expand_as(g)
    channels = torch.stack([_ratios(g[:, c]) for c in range(g.shape[1])], -1)  # [C, C, d_k]
    if own:
        channels = channels * g.exp()
    if reverse:
        channels = channels.flip(-1)
    if all_pairs:
        return (q @ k.mT * channels.mean(-1)).tril()
    return torch.einsum("ic,jc,ijc->ij", q, k, channels)


channel_products = Equation(
    label="eq-s1-channels",
    kind="definition",
    sample=_per_channel,
    left=lambda q, k, v, beta, g, S: decayed_products(q, k, g, sub_chunk=3),
    right=_per_pair,
    mutants={
        "the gate of token j as well": lambda *x: _per_pair(*x, own=True),
        "the mean gate of a token": lambda *x: _per_pair(*x, mean=True),
        "gates in the wrong channels": lambda *x: _per_pair(*x, reverse=True),
        "the mean ratio outside of the product": lambda *x: _per_pair(*x, all_pairs=True),
    },
)


def _cut(generator: torch.Generator) -> tuple:
    inputs = _per_channel(generator)
    return *inputs, _randint(generator, 1, len(inputs[0]) - 1)


def _tile(q, k, v, beta, g, S, n, *, left=True, right=True, swap=False, shift=0):
    """Rows n ... C, columns 1 ... n - 1 (from 1) by one matrix product, cut at row n."""
    b = g.cumsum(0)
    at = b[min(n + shift, len(b) - 1)]
    queries = q[n:] * ((b[n:] - b[n]).exp() if left else 1)
    keys = k[:n] * ((b[:n] - b[n] if swap else at - b[:n]).exp() if right else 1)
    return queries @ keys.mT


tile = Equation(
    label="eq-s1-tile",
    kind="identity",
    sample=_cut,
    left=lambda q, k, v, beta, g, S, n: _per_pair(q, k, v, beta, g, S)[n:, :n],
    right=_tile,
    mutants={
        "the queries do not decay": lambda *x: _tile(*x, left=False),
        "the keys do not decay": lambda *x: _tile(*x, right=False),
        "the keys' exponent has the wrong sign": lambda *x: _tile(*x, swap=True),
        "cut at two different rows": lambda *x: _tile(*x, shift=-1),
    },
)


# Erasure -------------------------------------------------------------------------------------------------
def _gated_errors(q, k, v, beta, g, S, *, state=True, overlaps=True, inclusive=False):
    """E = R + N D R, with decayed overlaps and a decayed entering state."""
    b = g.cumsum(0)
    pairs = _per_pair(k, k, v, beta, g if overlaps else 0 * g, S)
    B = pairs if inclusive else pairs.tril(-1)
    R = v - (k * (b.exp() if state else 1)) @ S
    N = -torch.linalg.inv(torch.eye(len(k), dtype=k.dtype) + B * beta) @ B
    return R + N @ (beta[:, None] * R)


gated_errors = Equation(
    label="eq-s1-error",
    kind="identity",
    sample=_per_channel,
    left=lambda *x: _erasing(*x)[1],
    right=_gated_errors,
    mutants={
        "the entering state undecayed": lambda *x: _gated_errors(*x, state=False),
        "the overlaps undecayed": lambda *x: _gated_errors(*x, overlaps=False),
        "the diagonal included": lambda *x: _gated_errors(*x, inclusive=True),
        "no erasure": lambda q, k, v, beta, g, S: v - (k * g.cumsum(0).exp()) @ S,
    },
)


def _adversarial(generator: torch.Generator) -> tuple:
    """Gates, keys and betas that push |N_ij| up: equal keys, betas at 0 and 2, gates near 1."""
    _, k, _, beta, g, _ = _inputs(generator)
    choice = _randint(generator, 0, 3)
    if choice >= 1:
        beta = torch.where(beta > 1, 2.0, 0.0).to(beta)
    if choice >= 2:
        k = k[:1].expand_as(k)
    if choice == 3:
        g = 0.01 * g
    return k, beta, g


def _n(k: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    B = ((k @ k.mT) * _ratios(g)).tril(-1)
    return -torch.linalg.inv(torch.eye(len(k), dtype=k.dtype) + B * beta) @ B


def _paths(k, beta, g, *, own=True, first=False, between=True, sign=-1.0) -> Tensor:
    """N_ij, step by step: what the error of token i sees of k_j.  Gates `[L, d_k]`."""
    N = torch.zeros(len(k), len(k), dtype=k.dtype)
    for j in range(len(k)):
        x = g[j].exp() * k[j] if first else k[j]
        for i in range(j + 1, len(k)):
            faded = g[i].exp() * x
            N[i, j] = sign * k[i] @ (faded if own else x)
            x = faded if between else x
            x = x - beta[i] * k[i] * (k[i] @ x)
    return N


def _keys_and_channels(generator: torch.Generator) -> tuple:
    _, k, _, beta, g, _ = _per_channel(generator)
    return k, beta, g


def _n_per_channel(k: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    B = decayed_products(k, k, g).tril(-1)
    return -torch.linalg.inv(torch.eye(len(k), dtype=k.dtype) + B * beta) @ B


entries = Equation(
    label="eq-s1-n-entries",
    kind="identity",
    sample=_keys_and_channels,
    left=_n_per_channel,
    right=_paths,
    mutants={
        "the error sees the state before it fades": lambda *x: _paths(*x, own=False),
        "token j's own gate as well": lambda *x: _paths(*x, first=True),
        "the steps between without gates": lambda *x: _paths(*x, between=False),
        "the other sign": lambda *x: _paths(*x, sign=1.0),
    },
)

bound = Equation(
    label="eq-s1-bound",
    kind="bound",
    sample=_adversarial,
    left=lambda k, beta, g: _n(k, beta, g).tril(-1).abs(),
    # Where the bound is attained, as for equal keys, the inverse is some units of the last place off.
    right=lambda k, beta, g: _ratios(g, diagonal=-1) * (1 + 1e-11),
    mutants={
        "one gate more": lambda k, beta, g: _ratios(g, diagonal=-1) * g.exp() * (1 + 1e-11),
        "squared": lambda k, beta, g: _ratios(g, diagonal=-1) ** 2 * (1 + 1e-11),
        "half of it": lambda k, beta, g: _ratios(g, diagonal=-1) / 2,
    },
    trials=100,
)


# Order ---------------------------------------------------------------------------------------------------
def _one_step(generator: torch.Generator) -> tuple:
    _, k, _, beta, g, _ = _per_channel(generator)
    return k[0], beta[0], g[0].exp()


def _commutator(k, beta, alpha):
    H, A = torch.eye(len(k), dtype=k.dtype) - beta * torch.outer(k, k), torch.diag(alpha)
    return H @ A - A @ H


order = Equation(
    label="eq-s1-order",
    kind="identity",
    sample=_one_step,
    left=_commutator,
    right=lambda k, beta, alpha: beta * torch.outer(k, k) * (alpha[:, None] - alpha),
    mutants={
        "they commute": lambda k, beta, alpha: torch.zeros(len(k), len(k), dtype=k.dtype),
        "the other sign": lambda k, beta, alpha: beta * torch.outer(k, k) * (alpha - alpha[:, None]),
        "without beta": lambda k, beta, alpha: torch.outer(k, k) * (alpha[:, None] - alpha),
        "ratios for differences": lambda k, beta, alpha: beta * torch.outer(k, k) * (alpha[:, None] / alpha - 1),
    },
)


# Backwards in time -----------------------------------------------------------------------------------------
def _undone(q, k, v, beta, g, S, *, divide=True, decay=True, strength=True):
    """The state that entered, from the state that left and the errors."""
    _, errors, left = _erasing(q, k, v, beta, g, S)
    b = g.cumsum(0)
    writes = k * ((b[-1] - b).exp()[:, None] if decay else 1)
    return (left - writes.mT @ ((beta[:, None] if strength else 1) * errors)) / (b[-1].exp() if divide else 1)


walk_back = Equation(
    label="eq-s1-walk-back",
    kind="identity",
    sample=_inputs,
    left=lambda q, k, v, beta, g, S: S,
    right=_undone,
    mutants={
        "not divided by the gates": lambda *x: _undone(*x, divide=False),
        "writes undecayed": lambda *x: _undone(*x, decay=False),
        "the errors without beta": lambda *x: _undone(*x, strength=False),
    },
)


# Noise -----------------------------------------------------------------------------------------------------
def _stream(generator: torch.Generator) -> tuple:
    """Unit keys, unit values, a decay, and which pair (from 0) is asked for."""
    count, d = _randint(generator, 2, 6), _randint(generator, 2, 4)
    k, v = _randn(generator, count, d), _randn(generator, count, 3)
    decay = torch.rand(1, generator=generator, dtype=torch.float64)
    return (
        k / k.norm(dim=-1, keepdim=True),
        v / v.norm(dim=-1, keepdim=True),
        decay,
        _randint(generator, 0, count - 1),
    )


def _mean_over_signs(k: Tensor, v: Tensor, decay: Tensor, asked: int) -> Tensor:
    """The mean squared error of the answer over all signs of the values, each pattern tried."""
    total, patterns = torch.zeros((), dtype=k.dtype), list(product((-1.0, 1.0), repeat=len(k)))
    for signs in patterns:
        signed = torch.tensor(signs, dtype=k.dtype)[:, None] * v
        S = torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype)
        for t in range(len(k)):
            S = decay * S + torch.outer(k[t], signed[t])
        total = total + (k[asked] @ S - signed[asked]).pow(2).sum()
    return total / len(patterns)


def _expected(k, v, decay, asked, *, power=2, own=False, lost=True, square=True, count=False):
    ages = torch.arange(len(k) - 1, -1, -1, dtype=k.dtype)
    others = torch.ones(len(k), dtype=k.dtype)
    others[asked] = float(own)
    overlap = (k @ k[asked]).pow(2 if square else 1).abs()
    noise = (others * decay ** (power * ages) * overlap).sum()
    return ((1 - decay ** (asked if count else ages[asked])).pow(2).sum() if lost else 0) + noise


noise = Equation(
    label="eq-s1-noise",
    kind="identity",
    sample=_stream,
    left=_mean_over_signs,
    right=_expected,
    mutants={
        "amplitudes, not their squares": lambda *x: _expected(*x, power=1),
        "overlaps not squared": lambda *x: _expected(*x, square=False),
        "the pair's own write among the noise": lambda *x: _expected(*x, own=True),
        "nothing of the pair itself is lost": lambda *x: _expected(*x, lost=False),
        "its age counted from the start": lambda *x: _expected(*x, count=True),
    },
)


# The library's chunkwise forms ---------------------------------------------------------------------------
def _gated_chunk(q, k, v, beta, g, S, *, in_scores=True, end=True):
    """A chunk of the whole family: everything from the errors of eq-s1-error."""
    b = g.cumsum(0)
    written = beta[:, None] * _gated_errors(q, k, v, beta, g, S)
    o = (q * b.exp()) @ S + _per_pair(q, k, v, beta, g if in_scores else 0 * g, S) @ written
    return o, b[-1].exp()[:, None] * S + (k * ((b[-1] - b).exp() if end else 1)).mT @ written


gated_chunk = Equation(
    label="eq-s1-chunk",
    kind="definition",
    sample=_per_channel,
    left=lambda q, k, v, beta, g, S: chunkwise_gated_delta_rule(
        q, k, v, beta, g, scale=1.0, initial_state=S, chunk_size=16
    ),
    right=_gated_chunk,
    mutants={
        "the scores undecayed": lambda *x: _gated_chunk(*x, in_scores=False),
        "writes reach the end undecayed": lambda *x: _gated_chunk(*x, end=False),
    },
)

ENTRIES = [
    family,
    decay_chunk,
    lightning_backward,
    channel_products,
    tile,
    order,
    gated_errors,
    gated_chunk,
    entries,
    bound,
    walk_back,
    noise,
]
