"""The labelled equations of chapter 2, in its order."""

from __future__ import annotations

import torch
from torch import Tensor

from dn_lib.forms.delta_rule import delta_rule_step, erase_write, recurrent_delta_rule, sweep_matrix
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.teaching.registry import Equation

F64 = torch.float64


def _int(g: torch.Generator, low: int, high: int) -> int:
    """An integer in low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=F64)


def _rand(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=F64)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def one_write(g: torch.Generator) -> tuple:
    """k, v, beta, S for a single write; k has any length, d_k and d_v differ."""
    dk, dv = _int(g, 2, 6), _int(g, 7, 9)
    return _randn(g, dk), _randn(g, dv), 0.1 + _rand(g), _randn(g, dk, dv)


def sequence(g: torch.Generator) -> tuple:
    """q, k, v, beta, S_0 of a short sequence with keys of any length below 1.2."""
    length, dk, dv = _int(g, 2, 8), _int(g, 2, 6), _int(g, 7, 9)
    k = _unit(_randn(g, length, dk)) * (0.5 + 0.7 * _rand(g, length, 1))
    return _randn(g, length, dk), k, _randn(g, length, dv), 0.1 + _rand(g, length), _randn(g, dk, dv)


# -- one step of gradient descent ------------------------------------------------------------------------


def _gradient(loss, state: Tensor) -> Tensor:
    state = state.clone().requires_grad_()
    return torch.autograd.grad(loss(state), state)[0]


def autograd_linear_step(k, v, beta, state):
    return state - beta * _gradient(lambda s: -(k @ s) @ v, state)


def autograd_regression_gradient(k, v, beta, state):
    return _gradient(lambda s: 0.5 * ((k @ s - v) ** 2).sum(), state)


def autograd_regression_step(k, v, beta, state):
    return state - beta * autograd_regression_gradient(k, v, beta, state)


# -- the recurrence, with every part of it replaceable -----------------------------------------------------


def loop(update, read=lambda q, before, after: q.shape[0] ** -0.5 * (after.mT @ q)):
    """A function of (q, k, v, beta, S) that runs `update` at each step; returns outputs and state."""

    def run(q, k, v, beta, state):
        outputs = []
        for t in range(k.shape[0]):
            before, state = state, update(k[t], v[t], beta[t], state)
            outputs.append(read(q[t], before, state))
        return torch.stack(outputs), state

    return run


def state_of(fn):
    return lambda *inputs: fn(*inputs)[1]


def output_of(fn):
    return lambda *inputs: fn(*inputs)[0]


def delta(k, v, b, s):
    return (torch.eye(len(k), dtype=F64) - b * torch.outer(k, k)) @ s + b * torch.outer(k, v)


def library(q, k, v, beta, state):
    return recurrent_delta_rule(q, k, v, beta, initial_state=state)


def erase_after_write(k, v, b, s):
    s = s + b * torch.outer(k, v)
    return s - b * torch.outer(k, k @ s)


def right_multiplied(k, v, b, s):
    """The paper's factor on the paper's side, for a state in our layout: needs a key of d_v entries."""
    key = torch.nn.functional.pad(k, (0, len(v) - len(k)))
    return s @ (torch.eye(len(v), dtype=F64) - b * torch.outer(key, key)) + b * torch.outer(k, v)


def erase_write_right(k, v, beta, state):
    v_old = state.mT @ k
    v_new = beta * v + (1 - beta) * v_old
    return v_old, v_new, state - torch.outer(k, v_old) + torch.outer(k, v_new)


def erase_write_left(k, v, beta, state):
    v_old, v_new = erase_write(k, v, beta, state)
    return v_old, v_new, delta_rule_step(k, k, v, beta, state)[1]


def wrong_erase_write(v_new):
    def right(k, v, beta, state):
        v_old = state.mT @ k
        new = v_new(v, beta, v_old)
        return v_old, new, state - torch.outer(k, v_old) + torch.outer(k, new)

    return right


def error_after(k, v, beta, state):
    return v - delta_rule_step(k, k, v, beta, state)[1].mT @ k


# -- stability -------------------------------------------------------------------------------------------


def eigenvalue_sample(g):
    k, _, beta, _ = one_write(g)
    return k, 2 * beta


def eigenvalues(k, beta):
    return torch.linalg.eigvalsh(torch.eye(len(k), dtype=F64) - beta * torch.outer(k, k))


def eigenvalues_formula(along):
    def right(k, beta):
        return torch.cat([along(k, beta)[None], torch.ones(len(k) - 1, dtype=F64)]).sort().values

    return right


def stable_sample(g):
    """A state, a key and a beta with beta |k|^2 anywhere in [0, 2], the ends often."""
    k, _, _, state = one_write(g)
    product = (2.0, 0.0, 1.0, 2 * float(_rand(g)))[_int(g, 0, 3)]
    if _int(g, 0, 1):
        state = torch.outer(k, _randn(g, state.shape[1]))  # all of it along k
    return k, torch.tensor(product, dtype=F64) / (k @ k), state


def erased_norm(k, beta, state):
    return delta_rule_step(k, k, torch.zeros(state.shape[1], dtype=F64), beta, state)[1].norm()


# -- several writes --------------------------------------------------------------------------------------


def same_key_sample(g):
    n, dk, dv = _int(g, 3, 7), _int(g, 2, 5), _int(g, 1, 4)
    return _unit(_randn(g, dk)), _randn(g, n, dv), 0.2 + 0.6 * _rand(g), _randn(g, dk, dv)


def same_key_read(k, v, beta, state):
    n = len(v)
    keys = k.expand(n, -1)
    return recurrent_delta_rule(keys, keys, v, beta.expand(n), initial_state=state)[1].mT @ k


def moving_average(weights, first):
    def right(k, v, beta, state):
        n = len(v)
        age = torch.arange(n - 1, -1, -1, dtype=F64)
        return first(beta, n) * (state.mT @ k) + weights(beta, age) @ v

    return right


def two_keys(g):
    """Two unit keys with a cosine in [0.3, 0.9], of either sign, and two values."""
    dk, dv = _int(g, 2, 6), _int(g, 1, 4)
    basis = torch.linalg.qr(_randn(g, dk, 2)).Q.mT
    c = (0.3 + 0.6 * _rand(g)) * (1, -1)[_int(g, 0, 1)]
    return torch.stack([basis[0], c * basis[0] + (1 - c**2).sqrt() * basis[1]]), _randn(g, 2, dv)


def read_first_of_two(k, v):
    state = recurrent_delta_rule(k, k, v, torch.ones(2, dtype=F64))[1]
    return state.mT @ k[0]


def cosine(k):
    return k[0] @ k[1]


def independent_keys(g):
    """n <= d unit keys, a state that solves them, and a state to start from."""
    dk, dv = _int(g, 3, 6), _int(g, 1, 4)
    n = _int(g, 2, dk)
    return _unit(_randn(g, n, dk)), 0.2 + 1.6 * _rand(g), _randn(g, dk, dv), _randn(g, dk, dv)


def swept_error(k, beta, solution, state):
    """The difference after a sweep, and the library's matrix P."""
    betas = beta.expand(len(k))
    after = recurrent_delta_rule(k, k, k @ solution, betas, initial_state=state)[1]
    return after - solution, sweep_matrix(k, betas)


def swept(product):
    """`product(k, beta)`, a candidate for P, applied to the difference, and itself."""

    def right(k, beta, solution, state):
        matrix = product(k, beta)
        return matrix @ (state - solution), matrix

    return right


def _householder(k, beta):
    return torch.eye(len(k), dtype=F64) - beta * torch.outer(k, k)


def ascending(k, beta):
    out = torch.eye(k.shape[1], dtype=F64)
    for key in k:
        out = out @ _householder(key, beta)
    return out


def descending(k, beta):
    out = torch.eye(k.shape[1], dtype=F64)
    for key in k:
        out = _householder(key, beta) @ out
    return out


def simultaneous(k, beta):
    return torch.eye(k.shape[1], dtype=F64) - beta * k.mT @ k


def two_key_sweeps(g):
    k, v = two_keys(g)
    return k, v, _int(g, 1, 4)


def two_key_errors(k, v, sweeps):
    state = torch.zeros(k.shape[1], v.shape[1], dtype=F64)
    for _ in range(sweeps):
        state = recurrent_delta_rule(k, k, v, torch.ones(2, dtype=F64), initial_state=state)[1]
    return v - k @ state


def two_key_formula(power, start):
    def right(k, v, n):
        c = cosine(k)
        first = -(c ** power(n)) * start(v, c)
        return torch.stack([first, torch.zeros_like(first)])

    return right


def mean_decrease(k, beta, solution, state):
    """E |D'|^2 for a key drawn uniformly, by trying each."""
    values = k @ solution
    after = [delta_rule_step(k[i], k[i], values[i], beta, state)[1] - solution for i in range(len(k))]
    return torch.stack([(d**2).sum() for d in after]).mean()


def decrease(factor, error):
    def right(k, beta, solution, state):
        difference = state - solution
        return (difference**2).sum() - factor(beta) * (error(k, difference) ** 2).sum() / len(k)

    return right


def spanning_keys(g):
    """At least d unit keys, so that they span; sometimes an orthonormal basis, where the bound is tight."""
    dk, dv = _int(g, 2, 5), _int(g, 1, 4)
    k = _unit(_randn(g, dk + _int(g, 0, 3), dk))
    if _int(g, 0, 1):
        k = torch.linalg.qr(_randn(g, dk, dk)).Q
    solution = _randn(g, dk, dv)
    weakest = torch.linalg.svd(k).Vh[-1]
    state = solution + torch.outer(weakest, _randn(g, dv)) + (0.3 * _randn(g, dk, dv) if _int(g, 0, 1) else 0)
    return k, 0.1 + 1.8 * _rand(g), solution, state


def rate_bound(factor):
    def right(k, beta, solution, state):
        smallest = torch.linalg.svdvals(k)[-1]
        return (1 - factor(beta, smallest, len(k))) * ((state - solution) ** 2).sum()

    return right


# -- parity ----------------------------------------------------------------------------------------------


def bits_sample(g):
    return (torch.randint(2, (_int(g, 6, 20),), generator=g).to(F64),)


def parity_states(bits):
    one = torch.ones(len(bits), 1, dtype=F64)
    start = torch.ones(1, 1, dtype=F64)
    return recurrent_delta_rule(one, one, 0 * one, 2 * bits, scale=1.0, initial_state=start)[0][:, 0]


def both_members(factors, power):
    """Both members of the printed equation: the product, given its factors, and the power of -1."""
    return lambda bits: (factors(bits).cumprod(0), (-1.0) ** power(bits))


def constant_sample(g):
    k, v, beta, state = one_write(g)
    return _unit(k), v, beta, state, _int(g, 2, 8)


def constant_read(k, v, beta, state, n):
    keys, values = k.expand(n, -1), v.expand(n, -1)
    return recurrent_delta_rule(keys, keys, values, beta.expand(n), scale=1.0, initial_state=state)[0][-1]


# -- forgetting ------------------------------------------------------------------------------------------


def basis_sample(g):
    dk = _int(g, 2, 8)
    return torch.linalg.qr(_randn(g, dk, dk)).Q, 0.1 + 1.8 * _rand(g), _randn(g, dk)


def mean_survival(basis, beta, x):
    """Mean of |(I - beta k k^T) x|^2 over an orthonormal basis of keys."""
    return torch.stack([((_householder(k, beta) @ x) ** 2).sum() for k in basis]).mean()


def gated_sample(g):
    q, k, v, beta, state = sequence(g)
    return q, k, v, 0.3 + 0.6 * _rand(g, len(beta)), beta, state


def gated_library(q, k, v, alpha, beta, state):
    return recurrent_gated_delta_rule(q, k, v, beta, alpha.log(), initial_state=state)[1]


def gated(update):
    def right(q, k, v, alpha, beta, state):
        for t in range(len(beta)):
            state = update(alpha[t], _householder(k[t], beta[t]), beta[t] * torch.outer(k[t], v[t]), state)
        return state

    return right


ENTRIES = [
    Equation(
        "eq-regression-gradient",
        "identity",
        one_write,
        autograd_regression_gradient,
        lambda k, v, b, s: torch.outer(k, s.mT @ k - v),
        {
            "sign": lambda k, v, b, s: torch.outer(k, v - s.mT @ k),
            "factor two, as if there were no 1/2": lambda k, v, b, s: 2 * torch.outer(k, s.mT @ k - v),
            "state's answer forgotten": lambda k, v, b, s: torch.outer(k, -v),
            "key normalised": lambda k, v, b, s: torch.outer(_unit(k), s.mT @ k - v),
        },
    ),
    Equation(
        "eq-regression-step",
        "identity",
        one_write,
        autograd_regression_step,
        lambda k, v, b, s: s - b * torch.outer(k, s.mT @ k - v),
        {
            "ascent in place of descent": lambda k, v, b, s: s + b * torch.outer(k, s.mT @ k - v),
            "beta dropped": lambda k, v, b, s: s - torch.outer(k, s.mT @ k - v),
            "linear attention's step": lambda k, v, b, s: s + b * torch.outer(k, v),
            "beta on the erasure only": lambda k, v, b, s: s - torch.outer(k, b * (s.mT @ k) - v),
            "beta on the write only": lambda k, v, b, s: s - torch.outer(k, s.mT @ k - b * v),
            "factor two": lambda k, v, b, s: s - 2 * b * torch.outer(k, s.mT @ k - v),
            "step divided by |k|^2": lambda k, v, b, s: s - b * torch.outer(k, s.mT @ k - v) / (k @ k),
        },
    ),
    Equation(
        "eq-linear-step",
        "identity",
        one_write,
        autograd_linear_step,
        lambda k, v, b, s: s + b * torch.outer(k, v),
        {
            "beta dropped": lambda k, v, b, s: s + torch.outer(k, v),
            "sign of the step": lambda k, v, b, s: s - b * torch.outer(k, v),
            "error in place of the value": lambda k, v, b, s: s + b * torch.outer(k, v - k @ s),
        },
    ),
    Equation(
        "eq-delta-recurrence",
        "definition",
        sequence,
        state_of(library),
        state_of(loop(delta)),
        {
            "beta dropped from the write": state_of(
                loop(lambda k, v, b, s: delta(k, v, b, s) + (1 - b) * torch.outer(k, v))
            ),
            "beta dropped from the erasure": state_of(
                loop(lambda k, v, b, s: s - torch.outer(k, k @ s) + b * torch.outer(k, v))
            ),
            "nothing erased: linear attention": state_of(loop(lambda k, v, b, s: s + b * torch.outer(k, v))),
            "erased twice, with beta squared": state_of(
                loop(lambda k, v, b, s: s - b * b * torch.outer(k, k @ s) + b * torch.outer(k, v))
            ),
            "error taken after the write": state_of(loop(erase_after_write)),
            "I + beta k k^T": state_of(loop(lambda k, v, b, s: s + b * torch.outer(k, k @ s) + b * torch.outer(k, v))),
            "transition on the value side": state_of(loop(right_multiplied)),
            "decay of everything: (1 - beta) S": state_of(loop(lambda k, v, b, s: (1 - b) * s + b * torch.outer(k, v))),
        },
    ),
    Equation(
        "eq-delta-output",
        "definition",
        sequence,
        output_of(library),
        output_of(loop(delta)),
        {
            "read before the write": output_of(
                loop(delta, lambda q, before, after: q.shape[0] ** -0.5 * (before.mT @ q))
            ),
            "scale dropped": output_of(loop(delta, lambda q, before, after: after.mT @ q)),
            "scale 1/d": output_of(loop(delta, lambda q, before, after: after.mT @ q / q.shape[0])),
        },
    ),
    Equation(
        "eq-erase-write",
        "identity",
        one_write,
        erase_write_left,
        erase_write_right,
        {
            "v_new is v": wrong_erase_write(lambda v, b, old: v),
            "v_new is beta v": wrong_erase_write(lambda v, b, old: b * v),
            "weights swapped": wrong_erase_write(lambda v, b, old: (1 - b) * v + b * old),
        },
    ),
    Equation(
        "eq-error-contraction",
        "identity",
        one_write,
        error_after,
        lambda k, v, b, s: (1 - b * (k @ k)) * (v - s.mT @ k),
        {
            "|k| for |k|^2": lambda k, v, b, s: (1 - b * k.norm()) * (v - s.mT @ k),
            "unit key taken for granted": lambda k, v, b, s: (1 - b) * (v - s.mT @ k),
            "beta squared": lambda k, v, b, s: (1 - b * b * (k @ k)) * (v - s.mT @ k),
            "sign of the error": lambda k, v, b, s: (1 - b * (k @ k)) * (s.mT @ k - v),
        },
    ),
    Equation(
        "eq-eigenvalues",
        "identity",
        eigenvalue_sample,
        eigenvalues,
        eigenvalues_formula(lambda k, b: 1 - b * (k @ k)),
        {
            "|k| for |k|^2, which unit keys hide": eigenvalues_formula(lambda k, b: 1 - b * k.norm()),
            "1 - beta": eigenvalues_formula(lambda k, b: 1 - b),
            "1 + beta |k|^2": eigenvalues_formula(lambda k, b: 1 + b * (k @ k)),
        },
    ),
    Equation(
        "eq-stability",
        "bound",
        stable_sample,
        erased_norm,
        lambda k, b, s: s.norm(),
        {
            "contracts by |1 - beta |k|^2| everywhere": lambda k, b, s: (1 - b * (k @ k)).abs() * s.norm(),
            "strictly contracts": lambda k, b, s: 0.99 * s.norm(),
            "contracts by 1 - beta |k|^2 / 2": lambda k, b, s: (1 - b * (k @ k) / 2) * s.norm(),
        },
        trials=60,
    ),
    Equation(
        "eq-moving-average",
        "identity",
        same_key_sample,
        same_key_read,
        moving_average(lambda b, age: b * (1 - b) ** age, lambda b, n: (1 - b) ** n),
        {
            "the sum that linear attention returns": moving_average(
                lambda b, age: b * torch.ones_like(age), lambda b, n: 1
            ),
            "only the newest": moving_average(lambda b, age: (age == 0).to(F64), lambda b, n: 0),
            "off by one in the age": moving_average(lambda b, age: b * (1 - b) ** (age + 1), lambda b, n: (1 - b) ** n),
            "first state forgotten": moving_average(lambda b, age: b * (1 - b) ** age, lambda b, n: 0),
        },
    ),
    Equation(
        "eq-disturbance",
        "identity",
        two_keys,
        read_first_of_two,
        lambda k, v: (1 - cosine(k) ** 2) * v[0] + cosine(k) * v[1],
        {
            "linear attention": lambda k, v: v[0] + cosine(k) * v[1],
            "1 - c for 1 - c^2": lambda k, v: (1 - cosine(k)) * v[0] + cosine(k) * v[1],
            "no interference": lambda k, v: v[0],
        },
    ),
    Equation(
        "eq-sweep",
        "identity",
        independent_keys,
        swept_error,
        swept(descending),
        {
            "factors in ascending order": swept(ascending),
            "all keys at once: I - beta K^T K": swept(simultaneous),
            "beta dropped": swept(lambda k, b: descending(k, 1.0)),
            "two sweeps": swept(lambda k, b: descending(k, b) @ descending(k, b)),
        },
    ),
    Equation(
        "eq-two-key-rate",
        "identity",
        two_key_sweeps,
        two_key_errors,
        two_key_formula(lambda n: 2 * n - 1, lambda v, c: v[1] - c * v[0]),
        {
            "c^n": two_key_formula(lambda n: n, lambda v, c: v[1] - c * v[0]),
            "one sweep too many": two_key_formula(lambda n: 2 * n, lambda v, c: v[1] - c * v[0]),
            "first write forgotten": two_key_formula(lambda n: 2 * n - 1, lambda v, c: v[1]),
        },
    ),
    Equation(
        "eq-kaczmarz",
        "identity",
        independent_keys,
        mean_decrease,
        decrease(lambda b: b * (2 - b), lambda k, d: k @ d),
        {
            "2 beta: the square of the step forgotten": decrease(lambda b: 2 * b, lambda k, d: k @ d),
            "beta": decrease(lambda b: b, lambda k, d: k @ d),
            "the whole error, not its part along the keys": decrease(lambda b: b * (2 - b), lambda k, d: d),
            "beta (1 - beta)": decrease(lambda b: b * (1 - b), lambda k, d: k @ d),
        },
    ),
    Equation(
        "eq-kaczmarz-rate",
        "bound",
        spanning_keys,
        mean_decrease,
        rate_bound(lambda b, s, n: b * (2 - b) * s**2 / n),
        {
            "sigma for sigma^2": rate_bound(lambda b, s, n: b * (2 - b) * s / n),
            "not divided by n": rate_bound(lambda b, s, n: b * (2 - b) * s**2),
            "2 beta": rate_bound(lambda b, s, n: 2 * b * s**2 / n),
        },
        trials=60,
    ),
    Equation(
        "eq-parity",
        "identity",
        bits_sample,
        lambda bits: (parity_states(bits),) * 2,
        both_members(lambda bits: 1 - 2 * bits, lambda bits: bits.cumsum(0)),
        {
            "parity of the other bits": both_members(lambda bits: 1 - 2 * bits, lambda bits: (1 - bits).cumsum(0)),
            "before the bit": both_members(lambda bits: 1 - 2 * bits, lambda bits: bits.cumsum(0) - bits),
            "this bit only": both_members(lambda bits: 1 - 2 * bits, lambda bits: bits),
            "beta = x: erased at the first one": both_members(lambda bits: 1 - bits, lambda bits: bits.cumsum(0)),
            "sign of every factor": both_members(lambda bits: 2 * bits - 1, lambda bits: bits.cumsum(0)),
        },
    ),
    Equation(
        "eq-constant-input",
        "identity",
        constant_sample,
        constant_read,
        lambda k, v, b, s, n: v + (1 - b) ** n * (s.mT @ k - v),
        {
            "one step fewer": lambda k, v, b, s, n: v + (1 - b) ** (n - 1) * (s.mT @ k - v),
            "n steps at once": lambda k, v, b, s, n: v + (1 - n * b) * (s.mT @ k - v),
            "value left out": lambda k, v, b, s, n: (1 - b) ** n * (s.mT @ k),
        },
    ),
    Equation(
        "eq-lifetime",
        "identity",
        basis_sample,
        mean_survival,
        lambda basis, b, x: (1 - b * (2 - b) / len(x)) * (x @ x),
        {
            "beta / d": lambda basis, b, x: (1 - b / len(x)) * (x @ x),
            "2 beta / d": lambda basis, b, x: (1 - 2 * b / len(x)) * (x @ x),
            "no d": lambda basis, b, x: (1 - b * (2 - b)) * (x @ x),
        },
    ),
    Equation(
        "eq-gated-delta",
        "definition",
        gated_sample,
        gated_library,
        gated(lambda a, h, write, s: a * h @ s + write),
        {
            "decay of the write too": gated(lambda a, h, write, s: a * (h @ s + write)),
            "decay dropped": gated(lambda a, h, write, s: h @ s + write),
            "write scaled by alpha only": gated(lambda a, h, write, s: h @ s + a * write),
            "error taken before the decay": gated(
                lambda a, h, write, s: a * s - (torch.eye(len(h), dtype=F64) - h) @ s + write
            ),
        },
    ),
]
