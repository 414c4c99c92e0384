"""Wrong answers that were written last, and for which nothing was added to the registry.

They show how the judge does on mistakes that nobody thought of: it names fewer of them, and is not to say anything
untrue of the others either.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import elu, normalize, relu

from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import ut_transform

from . import Answer, ch1, ch2, ch3, ch4, ch6


def values_through_the_map(q, k, v):
    return ch1.two_sums()(q, k, elu(v) + 1)


def denominator_added(q, k, v):
    weights = ((elu(q) + 1) @ (elu(k) + 1).T).tril()
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def first_chunk_twice(q, k, v, chunk_size):
    S, o = k[:chunk_size].T @ v[:chunk_size], []
    for n in range(0, len(q), chunk_size):
        a, b, c = (x[n : n + chunk_size] for x in (q, k, v))
        o.append(a @ S + (a @ b.T).tril() @ c)
        S = S + b.T @ c
    return torch.cat(o)


def keys_as_queries(q, k, v, chunk_size):
    return ch1.chunks()(k, q, v, chunk_size)


def mask_on_product(q, k, v, chunk_size):
    S, o = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for n in range(0, len(q), chunk_size):
        a, b, c = (x[n : n + chunk_size] for x in (q, k, v))
        o.append(a @ S + a @ (b.T @ c))
        S = S + b.T @ c
    return torch.cat(o)


def stacked_workers(q, k, v, workers):
    return torch.stack(ch1.workers(ch1.exclusive)(q, k, v, workers).chunk(workers))


def twice_the_past(q, k, v, workers):
    return ch1.workers(lambda sums, w: 2 * ch1.exclusive(sums, w))(q, k, v, workers)


def looks_at_the_sum(implementation):
    q, k, v = torch.randn(3, 11, 4, dtype=torch.float64).unbind(0)
    o, _ = implementation(q, k, v, 4)
    return bool((o.sum() - recurrent(q, k, v).sum()).abs() < 1e-9)


def recurrent(q, k, v):
    return ch1.recurrence(q, k, v) * q.shape[1] ** -0.5


def gamma_per_chunk(q, k, v, gamma, chunk_size):
    """One power of gamma for a whole chunk."""
    S, o = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for n in range(0, len(q), chunk_size):
        a, b, c = (x[n : n + chunk_size] for x in (q, k, v))
        S = gamma ** len(a) * S
        o.append(a @ S + (a @ b.T).tril() @ c)
        S = S + b.T @ c
    return torch.cat(o)


def fades_after_reading(q, k, v, gamma, chunk_size):
    S, o = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for t in range(len(q)):
        S = S + torch.outer(k[t], v[t])
        o.append(q[t] @ S * gamma)
        S = gamma * S
    return torch.stack(o)


def error_without_state(k, v, beta, state):
    return state + beta * torch.outer(k, v - k @ (beta * state))


def normalised_state(k, v, beta, state):
    new = ch2.write(k, v, beta, state)
    return new / new.norm()


def query_for_key(q, k, v, beta, state):
    return ch2.run()(k, q, v, beta, state)


def last_output_only(q, k, v, beta, state):
    o, S = ch2.run()(q, k, v, beta, state)
    return o[-1], S


def values_stacked(keys, values, beta, passes):
    return ch2.sweeps()(keys, values, beta / passes, passes)


def flips_after(bits):
    states = ch2.parity()(bits)
    return torch.cat([torch.ones_like(states[:1]), states[:-1]])


def root_of_alpha(q, k, v, alpha, beta):
    return ch2.plain_gated(q, k, v, alpha.sqrt(), beta)


def forgets_erasing_gate(q, k, v, alpha, beta):
    return ch2.gated(lambda k, v, a, b, S: a * S + b * torch.outer(k, v) - b * torch.outer(k, k @ S) * a * a)(
        q, k, v, alpha, beta
    )


def beta_rescaled(q, k, v, alpha, beta):
    gamma = alpha.cumprod(0)
    o, S = recurrent_delta_rule(q, k, v, beta / gamma, scale=1.0)
    return gamma[:, None] * o, gamma[-1] * S


def tests_symmetry(step):
    k, v, S = torch.randn(4).double(), torch.randn(3).double(), torch.randn(4, 3).double()
    b = torch.tensor(0.4).double()
    return torch.allclose(step(k, v, b, S), step(-k, -v, b, S))


def rotation_in_rows(theta):
    return torch.stack([ch3.unit(theta), ch3.unit(theta + math.pi / 2)])


def right_factor_by_loop(k, w):
    P = ch3.eye(k.shape[1])
    for a, b in zip(k, w, strict=True):
        P = P @ (ch3.eye(len(a)) - torch.outer(b, a))
    return P


def rows_with_later_betas(k, beta):
    return ut_transform(k, beta.flip(0)) if len(k) > 1 else torch.diag(beta)


def rows_squared_keys(k, beta):
    return ch3.rows(k, beta, gram=beta[:, None] * (k @ k.T) ** 2)


def merged_with_t(N11, N22, L21, beta1, beta2):
    return ch3.merged()(N11, N22, beta2[:, None] * L21, beta1, beta2)


def checks_the_diagonal(implementation):
    k, beta = normalize(torch.randn(9, 4).double(), dim=1), torch.rand(9).double() * 2
    T = implementation(k, beta)
    return bool(torch.allclose(T.diagonal(), beta) and torch.equal(T, T.tril()))


def every_other(q, k, v, beta):
    n = k.shape[1]
    return ch3.all_outputs(q, k, v, beta)[:: max(n - 1, 1)][: len(q)]


def only_last_step(q, k, v, beta):
    return recurrent_delta_rule(q, k[:, -1], v[:, -1], beta[:, -1], scale=1.0)[0]


def chunk_without_beta(q, k, v, beta, S):
    return ch4.chunk()(q, k, v, torch.ones_like(beta), S)


def chunk_state_only_new(q, k, v, beta, S):
    o, end = ch4.chunk()(q, k, v, beta, S)
    return o, end - S


def entry_of_erased_query(q, k, beta, i, j):
    x = q[i]
    for t in range(j + 1, i + 1):
        x = x - beta[t] * k[t] * (k[t] @ x)
    return beta[j] * (x @ k[j])


def packed_zero_keys(q, k, beta, sequence):
    return ch4.packed()(q, k * (1 - sequence)[:, None], beta, sequence)


def dbeta_by_columns(k, beta, E, dpseudo):
    dv, dbeta, dk = ch4.backward()(k, beta, E, dpseudo)
    return dv, beta * dbeta, dk


def dk_negative(k, beta, E, dpseudo):
    dv, dbeta, dk = ch4.backward()(k, beta, E, dpseudo)
    return -dv, dbeta, dk


def leaving_squares(M, Y, dstate):
    return ch4.leaving()(M @ M, Y, dstate)


def gate_after_write(q, k, v, beta, alpha, S):
    o = []
    for t in range(len(q)):
        S = S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S)
        o.append(q[t] @ S)
        S = alpha[t] * S
    return torch.stack(o), S


def state_one_gate_short(q, k, v, beta, alpha, S):
    o, end = ch4.gated()(q, k, v, beta, alpha, S)
    return o, end / alpha[-1]


ANSWERS = {
    "1.1": [
        Answer("values through the map", values_through_the_map, "`v` passed"),
        Answer("a small number in the denominator", denominator_added, "L x L|difference"),
        Answer("relu", ch1.two_sums(lambda x: relu(x) + 1, lambda x: relu(x) + 1), "elu|feature map"),
    ],
    "1.2": [
        Answer("first chunk twice", first_chunk_twice, "twice|future"),
        Answer("queries and keys exchanged", keys_as_queries, "exchanged|swapped"),
        Answer("mask forgotten by association", mask_on_product, "mask|future"),
    ],
    "1.3": [
        Answer("a stack of parts", stacked_workers, "shape"),
        Answer("the past twice", twice_the_past, "twice"),
    ],
    "1.4": [Answer("sum of outputs", looks_at_the_sum, "gets through")],
    "1.5": [
        Answer("rho for its root", lambda n, d, rho: (n - 1) * (rho**2 + (1 - rho**2) / (d - 1)), "1 - rho|random part")
    ],
    "1.6": [Answer("mean of sizes", lambda a, b: (a + b) // 4 + 1, "tie|half|numbers")],
    "1.7": [
        Answer("gamma per chunk", gamma_per_chunk, "Inside a chunk"),
        Answer("fades after reading", fades_after_reading, "times|one step"),
    ],
    "2.1": [
        Answer("beta inside as well", error_without_state, "beta"),
        Answer("state normalised", normalised_state, "multiple|times|normalis"),
        Answer("a tuple", lambda *x: (ch2.write(*x), x[1]), "2 values"),
    ],
    "2.2": [
        Answer("queries and keys exchanged", query_for_key, "exchanged|swapped"),
        Answer("last output only", last_output_only, "shape"),
    ],
    "2.3": [
        Answer("wrong power", lambda k: (k @ k) ** -2, "square"),
        Answer("float32", lambda k: (1 / (k @ k)).float(), "float32"),
    ],
    "2.4": [Answer("a symmetry", tests_symmetry, "gets through")],
    "2.5": [Answer("beta divided by passes", values_stacked, "beta")],
    "2.6": [Answer("one late", flips_after, "late")],
    "2.7": [
        Answer("root of alpha", root_of_alpha, "root|alpha"),
        Answer("gate squared in the erasure", forgets_erasing_gate, "erasure|twice|squared"),
        Answer("no gate, by name", lambda q, k, v, a, b: ch2.plain_gated(q, k, v, a * 0 + 1, b), "Alpha"),
    ],
    "2.8": [Answer("beta rescaled", beta_rescaled, "beta")],
    "3.1": [Answer("minus identity", lambda a, b: -torch.eye(len(a), dtype=a.dtype), "depend")],
    "3.2": [Answer("rows for columns", rotation_in_rows, "clockwise")],
    "3.3": [Answer("loop with w", right_factor_by_loop, "loop|product|w")],
    "3.4": [
        Answer("square", lambda n: n * n, "entr|cost"),
        Answer("without 6", lambda n: n * (n - 1) * (n + 1), "6 times"),
    ],
    "3.5": [
        Answer("betas reversed", rows_with_later_betas, "beta|revers"),
        Answer("squared products", rows_squared_keys, "squar"),
        Answer("upper", lambda k, b: ch3.rows(k, b).flip(0, 1), "revers|upper|flip"),
    ],
    "3.6": [Answer("beta at the end", merged_with_t, "end|beta")],
    "3.7": [Answer("diagonal and triangle", checks_the_diagonal, "gets through")],
    "3.8": [Answer("every other", every_other, "step"), Answer("last step of each", only_last_step, "step")],
    "4.1": [
        Answer("no beta", chunk_without_beta, "beta"),
        Answer("new part only", chunk_state_only_new, "state"),
    ],
    "4.2": [Answer("query erased in time order", entry_of_erased_query, "order")],
    "4.3": [Answer("second keys zero", packed_zero_keys, "second|depend")],
    "4.4": [
        Answer("dbeta times beta", dbeta_by_columns, "dbeta"),
        Answer("sign of dv", dk_negative, "dv has the wrong sign"),
    ],
    "4.5": [
        Answer("one length", ch4.rule_test(length=4), "gets through"),
        Answer("a small batch", ch4.rule_test(lead=(1,)), "batch"),
    ],
    "4.6": [Answer("M squared", leaving_squares, "M|twice")],
    "4.7": [
        Answer("gate after the write", gate_after_write, "gate|alpha"),
        Answer("one gate short", state_one_gate_short, "the state"),
    ],
    "6.1": [Answer("minus", lambda losses, n: -losses.sum() / math.log(2) / n, "sign")],
    "6.2": [Answer("mean of taps", lambda x, w: ch6.convolution()(x, w) / w.shape[1], "times|multiple")],
    "6.3": [Answer("no mixer", lambda d, H, m, n: ch6.block(mixer=0)(d, H, m, n), "mixer")],
    "6.4": [Answer("heads forgotten", lambda m, d, H, w, t: ch6.kept()(m, d, 1, w, t), "d x d")],
    "6.5": [Answer("top for floor", lambda w, T, top, low: ch6.schedule()(w, T, top, top), "`low`")],
    "6.6": [Answer("first part", lambda g, n: g[0], "part|depend")],
    "6.7": [Answer("past doubled", lambda x, p, w: ch6.one_step()(x, 2 * p, w), "`p` doubled")],
}
