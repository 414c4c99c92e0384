"""Wrong answers of a second round, beside the eight of each exercise."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize, softmax

from dn_lib.forms import linear_attention as la
from dn_lib.forms.chunkwise import chunkwise_delta_rule, delta_attention_matrix
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import scaled_inverse, ut_transform

from . import Answer, ch1, ch2, ch3, ch4


# Chapter 1 -----------------------------------------------------------------------------------------------
def softmax_answer(q, k, v):
    scores = (q @ k.T).masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -torch.inf)
    return softmax(scores, -1) @ v


def float32_state(q, k, v):
    S, z, o = torch.zeros(k.shape[1], v.shape[1]), torch.zeros(k.shape[1]), []
    for a, b, c in zip(la.elu_feature_map(q), la.elu_feature_map(k), v, strict=True):
        S = (S + torch.outer(b, c)).float()
        z = (z + b).float()
        o.append((a.float() @ S) / (a.float() @ z))
    return torch.stack(o)


def last_token_only(q, k, v):
    return ch1.two_sums()(q, k, v)[-1]


def state_as_well(q, k, v, chunk_size):
    return ch1.chunks()(q, k, v, chunk_size), k.T @ v


def dimension_by_token(q, k, v, chunk_size):
    return ch1.chunks()(q, k, v, chunk_size).T


def state_of_first_chunk(q, k, v, chunk_size):
    S = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype)
    o = []
    for n in range(0, len(q), chunk_size):
        a, b, c = (x[n : n + chunk_size] for x in (q, k, v))
        o.append(a @ S + (a @ b.T).tril() @ c)
        if n == 0:
            S = b.T @ c
    return torch.cat(o)


def unequal_index(q, k, v, workers):
    parts = list(zip(q.chunk(workers), k.chunk(workers), v.chunk(workers), strict=True))
    total, o = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for a, b, c in parts:
        o.append(a @ total + (a @ b.T).tril() @ c)
        total = total + b.T @ c
    return torch.cat(o)


def index_error(q, k, v, workers):
    return torch.stack([q[t] @ k[t + 1] * v[t] for t in range(len(q))])


def compares_shapes(implementation):
    q, k, v = torch.randn(3, 9, 4, dtype=torch.float64).unbind(0)
    o, S = implementation(q, k, v, 4)
    return o.shape == v.shape and S.shape == (4, 4)


def one_seed_one_token(implementation):
    q, k, v = torch.randn(3, 1, 4, dtype=torch.float64).unbind(0)
    return torch.allclose(implementation(q, k, v, 4)[0], la.recurrent_linear_attention(q, k, v)[0])


def fading_by_index(q, k, v, gamma, chunk_size):
    """Every token is weighted by its distance from the start, not from the reader."""
    i = torch.arange(len(q), dtype=q.dtype)[:, None]
    return ch1.chunks()(q, gamma**i * k, v, chunk_size)


def fading_linear(q, k, v, gamma, chunk_size):
    return ch1.chunks()(q, k, v, chunk_size)


# Chapter 2 -----------------------------------------------------------------------------------------------
def written_with_squared_beta(k, v, beta, state):
    return ch2.write(k, v, beta * beta, state)


def values_for_keys(k, v, beta, state):
    return state + beta * torch.outer(v, k - v @ state.T).T


def scalar_memory(k, v, beta, state):
    return k @ state + beta * (v - k @ state)


def sequence_as_list(q, k, v, beta, state):
    o, S = ch2.run()(q, k, v, beta, state)
    return list(o), S


def skips_first(q, k, v, beta, state):
    o = []
    for t in range(len(q)):
        if t:
            state = ch2.write(k[t], v[t], beta[t], state)
        o.append(q[t] @ state)
    return torch.stack(o), state


def all_states(keys, values, beta, passes):
    state, found = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype), []
    for _ in range(passes):
        for k, v in zip(keys, values, strict=True):
            state = ch2.write(k, v, beta, state)
        found.append(state)
    return torch.stack(found)


def one_pass_too_many(keys, values, beta, passes):
    return ch2.sweeps()(keys, values, beta, passes + 1)


def zigzag(keys, values, beta, passes):
    state = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
    for n in range(passes):
        order = range(len(keys)) if n % 2 == 0 else reversed(range(len(keys)))
        for i in order:
            state = ch2.write(keys[i], values[i], beta, state)
    return state


def parity_last(bits):
    return ch2.parity()(bits)[-1]


def gate_on_output(q, k, v, alpha, beta):
    o, S = ch2.gated(lambda k, v, a, b, S: ch2.write(k, v, b, S))(q, k, v, alpha, beta)
    return alpha[:, None] * o, S


def ignores_the_state(step):
    k, v = torch.eye(4, dtype=torch.float64)[0], torch.ones(3, dtype=torch.float64)
    state = torch.zeros(4, 3, dtype=torch.float64)
    return bool((step(k, v, torch.tensor(1.0, dtype=torch.float64), state)[0] - v).abs().max() < 1e-9)


# Chapter 3 -----------------------------------------------------------------------------------------------
def merged_other_order(N11, N22, L21, beta1, beta2):
    eye1, eye2 = ch3.eye(len(beta1)), ch3.eye(len(beta2))
    return -((eye2 + N22 @ torch.diag(beta2)) @ (L21 @ (eye1 + N11 @ torch.diag(beta1))))


def whole_block(N11, N22, L21, beta1, beta2):
    n21 = ch3.merged()(N11, N22, L21, beta1, beta2)
    return torch.cat([torch.cat([N11, torch.zeros(len(N11), len(N22), dtype=N11.dtype)], 1), torch.cat([n21, N22], 1)])


def compares_with_library(implementation):
    k, beta = normalize(torch.randn(6, 4, dtype=torch.float64), dim=1), torch.rand(6, dtype=torch.float64)
    return torch.allclose(implementation(k, beta), ut_transform(k, beta))


def lets_it_raise(implementation):
    k, beta = torch.randn(6, 4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    return implementation(k, beta) is not None


def with_diagonal(k, beta):
    A = (beta[:, None] * (k @ k.T)).tril()
    T = torch.zeros(len(k), len(k), dtype=k.dtype)
    for i in range(len(k)):
        T[i] = (beta[i] * ch3.eye(len(k))[i] - A[i, :i] @ T[:i]) / (1 + A[i, i])
    return T


def previous_row_only(k, beta):
    A = (beta[:, None] * (k @ k.T)).tril(-1)
    T = torch.diag(beta).clone()
    for i in range(1, len(k)):
        T[i] = T[i] - A[i, i - 1] * T[i - 1]
    return T


# Chapter 4 -----------------------------------------------------------------------------------------------
def without_w(q, k, v, beta, S):
    new = ut_transform(k, beta) @ v - k @ S
    return q @ S + (q @ k.T).tril() @ new, S + k.T @ new


def state_transposed(q, k, v, beta, S):
    o, end = ch4.chunk()(q, k, v, beta, S)
    return o, end.T


def scaled_query(q, k, v, beta, S):
    return ch4.chunk()(q * q.shape[1] ** -0.5, k, v, beta, S)


def dense_backward(k, beta, E, dpseudo):
    dv, dbeta, dk = ch4.backward()(k, beta, E, dpseudo)
    return dv, dbeta[:, None], dk


def backward_without_dk(k, beta, E, dpseudo):
    return ch4.backward()(k, beta, E, dpseudo)[:2]


def random_inputs_only(implementation):
    q, k, v = torch.randn(3, 8, 4, dtype=torch.float64).unbind(0)
    k, beta = normalize(k, dim=1), torch.rand(8, dtype=torch.float64)
    return torch.allclose(implementation(q, k, v, beta)[0], recurrent_delta_rule(q, k, v, beta)[0])


def gate_twice(q, k, v, beta, alpha, S):
    return ch4.gated()(q, k, v, beta, alpha**2, S)


def gate_in_beta(q, k, v, beta, alpha, S):
    return ch4.chunk()(q, k, v, beta * alpha, S)


ANSWERS = {
    "1.1": [
        Answer("softmax", softmax_answer, "softmax|exp"),
        Answer("a float32 state", float32_state, "float32"),
        Answer("the last output", last_token_only, "shape"),
    ],
    "1.2": [
        Answer("returns the state as well", state_as_well, "2 values"),
        Answer("transposed", dimension_by_token, "transposed"),
        Answer("state of the first chunk", state_of_first_chunk, "first one"),
    ],
    "1.3": [
        Answer("a running total", unequal_index, "worker"),
        Answer("runs past the end", index_error, "IndexError|index"),
        Answer("list of parts", lambda *x: list(unequal_index(*x).chunk(x[3])), "list"),
    ],
    "1.4": [
        Answer("shapes only", compares_shapes, "gets through"),
        Answer("one token", one_seed_one_token, "gets through"),
    ],
    "1.5": [
        Answer("half of it", lambda n, d, rho: ch1.ANSWERS["1.5"][0].fn(n, d - 1, rho), "common|rho"),
        Answer("variance", lambda n, d, rho: (n - 1) * (1 - rho**2) / (d - 1), "common|rho"),
    ],
    "1.6": [
        Answer("two late", lambda a, b: a * b // (a + b) + 2, "too large"),
        Answer("float division", lambda a, b: a * b / (a + b) + 1, "float|fraction|whole"),
    ],
    "1.7": [
        Answer("faded from the start", fading_by_index, "start|reader|age"),
        Answer("no gamma at all", fading_linear, "gamma|fade"),
        Answer("forgot return", lambda q, k, v, g, C: q.sum() and None, "return"),
    ],
    "2.1": [
        Answer("beta squared", written_with_squared_beta, "squared"),
        Answer("keys and values exchanged", values_for_keys, "exchang|transpos|key"),
        Answer("a vector", scalar_memory, "shape"),
    ],
    "2.2": [
        Answer("a list of outputs", sequence_as_list, "list"),
        Answer("first token never written", skips_first, "first"),
    ],
    "2.3": [Answer("a vector", lambda k: 1 / (k * k), "shape"), Answer("minus", lambda k: -1 / (k @ k), "sign")],
    "2.4": [Answer("no state", ignores_the_state, "gets through")],
    "2.5": [
        Answer("all states", all_states, "shape"),
        Answer("one pass too many", one_pass_too_many, "pass"),
        Answer("zigzag", zigzag, "order|back"),
    ],
    "2.6": [Answer("last state", parity_last, "shape"), Answer("minus", lambda b: -ch2.parity()(b), "sign")],
    "2.7": [Answer("gate on the output", gate_on_output, "output|state")],
    "2.8": [Answer("no rescaling", ch2.rescaled(values="no", outputs=False, state=False), "alpha|gate|rescal|units")],
    "3.1": [Answer("identity", lambda a, b: torch.eye(len(a), dtype=a.dtype), "depend on")],
    "3.2": [
        Answer("sign of theta", lambda t: ch3.rotate(0 * t, -t / 2), "clockwise"),
        Answer("twice", lambda t: ch3.rotate(0 * t, t / 2) @ ch3.rotate(0 * t, t / 2), "2 theta"),
    ],
    "3.3": [Answer("transposed twice", lambda k, w: (torch.eye(k.shape[1], dtype=k.dtype) - w.T @ k).T, "newest")],
    "3.4": [Answer("factor two", lambda n: n * (n - 1) * (n + 1) // 3, "times|twice")],
    "3.5": [
        Answer("diagonal in A", with_diagonal, "diagonal"),
        Answer("only the row above", previous_row_only, "row|before it"),
        Answer("N", lambda k, b: scaled_inverse(k, b), "N|diagonal|beta"),
    ],
    "3.6": [
        Answer("the whole N", whole_block, "shape"),
        Answer("D_1 on the other side", merged_other_order, "D_1|side|columns"),
    ],
    "3.7": [
        Answer("random inputs", compares_with_library, "gets through"),
        Answer("wrong shapes", lets_it_raise, "raised"),
    ],
    "3.8": [Answer("scale twice", lambda q, k, v, b: ch3.several()(2 * q, k, v, b), "2 times")],
    "4.1": [
        Answer("K S in place of W S", without_w, "W"),
        Answer("state transposed", state_transposed, "the state is transposed"),
        Answer("scaled again", scaled_query, "scale"),
    ],
    "4.2": [Answer("matrix", lambda q, k, b, i, j: delta_attention_matrix(q, k, b)[i, j], "scale|library")],
    "4.3": [Answer("one document", lambda q, k, b, s: delta_attention_matrix(q, k, b, scale=1.0), "separates")],
    "4.4": [
        Answer("a column", dense_backward, "shape"),
        Answer("two of three", backward_without_dk, "2 values|expected 3"),
    ],
    "4.5": [Answer("random inputs only", random_inputs_only, "gets through")],
    "4.6": [Answer("minus", lambda *x: -ch4.leaving()(*x), "sign")],
    "4.7": [
        Answer("gate twice", gate_twice, "twice|alpha"),
        Answer("gate in beta", gate_in_beta, "beta|alpha|gate"),
        Answer("raises", lambda q, k, v, b, a, S: chunkwise_delta_rule(q, k, v, b, S), "raised"),
        Answer("root of gamma", lambda q, k, v, b, a, S: ch4.gated()(q, k, v, b, a.sqrt(), S), "root|alpha"),
    ],
    "6.1": [Answer("base 10", lambda losses, n: losses.sum() / math.log(10) / n, "times|base")],
    "6.4": [Answer("twice", lambda *x: 2 * sum((x[1] * x[1] // x[2],) * len(x[0])), "list|window|attention")],
}
