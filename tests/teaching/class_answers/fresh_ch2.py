"""Wrong answers to the exercises of chapter 2, written from the book alone, before the judge had been looked at."""
# As a class writes, and kept so.
# ruff: noqa: B905, E741

from __future__ import annotations

import torch

from dn_lib.forms.delta_rule import erase_write, recurrent_delta_rule

from . import NOT_NAMED, Answer


# 2.1 -----------------------------------------------------------------------------------------------------
def answer_2_1_1(k, v, beta, state):
    return (1 - beta) * state + beta * torch.outer(k, v)


def answer_2_1_2(k, v, beta, state):
    H = torch.eye(len(k), dtype=k.dtype) - beta * torch.outer(k, k)
    return H @ state + beta * torch.outer(k, v)


def answer_2_1_3(k, v, beta, state):
    error = v - state.T @ k
    state += beta * torch.outer(k, error)
    return state


def answer_2_1_4(k, v, beta, state):
    old = state.T @ k
    return state - beta * torch.outer(old, k).T + torch.outer(k, v)


def answer_2_1_5(k, v, beta, state):
    old = state.T @ k
    return state - torch.outer(k, old) + beta * torch.outer(k, v)


def answer_2_1_6(k, v, beta, state):
    e = k @ state - v
    return state + beta * torch.outer(k, e)


def answer_2_1_7(k, v, beta, state):
    return beta * torch.outer(k, v - k @ state)


def answer_2_1_8(k, v, beta, state):
    e = v - state @ k
    return state + beta * torch.outer(k, e)


def answer_2_1_9(k, v, beta, state):
    return state + beta * torch.outer(k, v)


def answer_2_1_10(k, v, beta, state):
    e = beta * (v - k @ state)
    return state + beta * torch.outer(k, e)


def answer_2_1_11(k, v, beta, state):
    old, new = erase_write(k, v, beta, state)
    return state - torch.outer(k, old) + torch.outer(k, new)


# 2.2 -----------------------------------------------------------------------------------------------------
def answer_2_2_1(q, k, v, beta, state):
    out = []
    for t in range(len(q)):
        out.append(q[t] @ state)
        state = state + beta[t] * torch.outer(k[t], v[t] - k[t] @ state)
    return (torch.stack(out), state)


def answer_2_2_2(q, k, v, beta, state):
    for t in range(len(q)):
        state = state + beta[t] * torch.outer(k[t], v[t] - k[t] @ state)
    return (q @ state, state)


def answer_2_2_3(q, k, v, beta, state):
    S = torch.zeros_like(state)
    out = []
    for t in range(len(q)):
        S = S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S)
        out.append(q[t] @ S)
    return (torch.stack(out), S)


def answer_2_2_4(q, k, v, beta, state):
    o = []
    for t in range(len(q)):
        state = state + beta[t] * torch.outer(k[t], v[t] - k[t] @ state)
        o.append(k[t] @ state)
    return (torch.stack(o), state)


def answer_2_2_5(q, k, v, beta, state):
    E = v - k @ state
    o = q @ state + (q @ k.T).tril() @ (beta[:, None] * E)
    return (o, state + k.T @ (beta[:, None] * E))


def answer_2_2_6(q, k, v, beta, state):
    o = []
    for t in range(len(q)):
        state = state + beta[0] * torch.outer(k[t], v[t] - k[t] @ state)
        o.append(q[t] @ state)
    return (torch.stack(o), state)


def answer_2_2_7(q, k, v, beta, state):
    o = []
    for t in range(len(q)):
        kk = k[t] / k[t].norm() * 2**0.5
        state = state + beta[t] * torch.outer(kk, v[t] - kk @ state)
        o.append(q[t] @ state)
    return (torch.stack(o), state)


def answer_2_2_8(q, k, v, beta, state):
    o = []
    for t in range(len(q)):
        state = state + beta[t] * torch.outer(k[t], v[t] - k[t] @ state)
        o.append(q[t] @ state)
    return torch.stack(o)


def answer_2_2_9(q, k, v, beta, state):
    o = []
    for t in range(len(q)):
        state = state + beta[t] * torch.outer(k[t], v[t] - k[t] @ state)
        o.append(q[t] @ state)
    return (o, state)


# 2.3 -----------------------------------------------------------------------------------------------------
def answer_2_3_1(k):
    return 1 / k.norm()


def answer_2_3_2(k):
    return 1.0


def answer_2_3_3(k):
    return 2 / (k @ k)


def answer_2_3_4(k):
    return 1 / (k**2).mean()


def answer_2_3_5(k):
    return 1 / (k @ k) ** 2


# 2.4 -----------------------------------------------------------------------------------------------------
def answer_2_4_1(step):
    torch.manual_seed(0)
    k, v = (torch.randn(5, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
    S = torch.randn(5, 3, dtype=torch.float64)
    beta = torch.tensor(0.3, dtype=torch.float64)
    before, after = (v - k @ S, v - k @ step(k, v, beta, S))
    return torch.allclose(after, (1 - beta * (k @ k)) * before)


def answer_2_4_2(step):
    k = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    v = torch.randn(3, dtype=torch.float64)
    S = torch.randn(4, 3, dtype=torch.float64)
    new = step(k, v, torch.tensor(1.0, dtype=torch.float64), S)
    return torch.allclose(k @ new, v) and torch.allclose(new[1:], S[1:])


def answer_2_4_3(step):
    torch.manual_seed(0)
    k, v = (torch.randn(5, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
    S = torch.randn(5, 3, dtype=torch.float64)
    beta = torch.tensor(0.3, dtype=torch.float64)
    new = step(k, v, beta, S.clone())
    x = torch.randn(5, dtype=torch.float64)
    x = x - x @ k / (k @ k) * k
    along = (k @ new == k @ S + beta * (k @ k) * (v - k @ S)).all()
    aside = (x @ new == x @ S).all()
    return bool(along and aside)


def answer_2_4_4(step):
    torch.manual_seed(0)
    for _ in range(3):
        k, v = (torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
        S, b = (torch.randn(4, 3, dtype=torch.float64), torch.rand((), dtype=torch.float64))
        H = torch.eye(4, dtype=torch.float64) - b * torch.outer(k, k)
        if not torch.allclose(step(k, v, b, S), H @ S + b * torch.outer(k, v)):
            return False
    return True


def answer_2_4_5(step):
    torch.manual_seed(0)
    k, v, S = (torch.randn(*s, dtype=torch.float64) for s in ((4,), (3,), (4, 3)))
    b = torch.tensor(0.4, dtype=torch.float64)
    x = torch.randn(4, dtype=torch.float64)
    x -= x @ k / (k @ k) * k
    keeps = torch.allclose(x @ step(k, v, b, S), x @ S)
    return keeps and torch.allclose(step(k, v, 0 * b, S), S)


def answer_2_4_6(step):
    torch.manual_seed(0)
    k, v = (torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
    b = torch.tensor(0.7, dtype=torch.float64)
    new = step(k, v, b, torch.zeros(4, 3, dtype=torch.float64))
    return torch.allclose(k @ new, b * (k @ k) * v)


# 2.5 -----------------------------------------------------------------------------------------------------
def answer_2_5_1(keys, values, beta, passes):
    S = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
    for _ in range(passes):
        S = S + beta * keys.T @ (values - keys @ S)
    return S


def answer_2_5_2(keys, values, beta, passes):
    for _ in range(passes):
        S = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
        for k, v in zip(keys, values):
            S = S + beta * torch.outer(k, v - k @ S)
    return S


def answer_2_5_3(keys, values, beta, passes):
    K, V = (keys.repeat(passes, 1), values.repeat(passes, 1))
    b = torch.full((len(K),), float(beta), dtype=keys.dtype)
    return recurrent_delta_rule(K, K, V, b)[1]


def answer_2_5_4(keys, values, beta, passes):
    S = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
    for k, v in zip(keys, values):
        for _ in range(passes):
            S = S + beta * torch.outer(k, v - k @ S)
    return S


def answer_2_5_5(keys, values, beta, passes):
    S = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
    for p in range(passes):
        for k, v in zip(keys, values):
            S = S + beta / (p + 1) * torch.outer(k, v - k @ S)
    return S


def answer_2_5_6(keys, values, beta, passes):
    S = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
    for i in range(len(keys)):
        S = S + beta * torch.outer(keys[i], values[i] - keys[i] @ S)
    return S


# 2.6 -----------------------------------------------------------------------------------------------------
def answer_2_6_1(bits):
    one = torch.ones(len(bits), 1, dtype=bits.dtype)
    s, _ = recurrent_delta_rule(one, one, 0 * one, bits, scale=1.0, initial_state=torch.ones(1, 1, dtype=bits.dtype))
    return s[:, 0]


def answer_2_6_2(bits):
    return torch.cumprod(1 - 2 * bits, 0)


def answer_2_6_3(bits):
    one = torch.ones(len(bits), 1, dtype=bits.dtype)
    s, _ = recurrent_delta_rule(one, one, 0 * one, 2 * bits, scale=1.0)
    return s[:, 0]


def answer_2_6_4(bits):
    one = torch.ones(len(bits), 1, dtype=bits.dtype)
    s, _ = recurrent_delta_rule(
        one, one, 0 * one, 2 * bits, scale=1.0, initial_state=torch.ones(1, 1, dtype=bits.dtype)
    )
    return (s[:, 0] < 0).to(bits.dtype)


def answer_2_6_5(bits):
    one = torch.ones(len(bits), 1, dtype=bits.dtype)
    s, _ = recurrent_delta_rule(
        one, one, (1 - 2 * bits)[:, None], torch.ones_like(bits), scale=1.0, initial_state=one[:1]
    )
    return s[:, 0]


def answer_2_6_6(bits):
    one = torch.ones(len(bits), 1, dtype=bits.dtype)
    s, _ = recurrent_delta_rule(one, one, 0 * one, 2 * bits, scale=1.0, initial_state=one[:1])
    return s


# 2.7 -----------------------------------------------------------------------------------------------------
def answer_2_7_1(q, k, v, alpha, beta):
    S = torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype)
    o = []
    for t in range(len(q)):
        e = v[t] - k[t] @ S
        S = alpha[t] * S + beta[t] * torch.outer(k[t], e)
        o.append(q[t] @ S)
    return (torch.stack(o), S)


def answer_2_7_2(q, k, v, alpha, beta):
    S = torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype)
    o = []
    for t in range(len(q)):
        S = alpha[t] * (S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S))
        o.append(q[t] @ S)
    return (torch.stack(o), S)


def answer_2_7_3(q, k, v, alpha, beta):
    S = torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype)
    I = torch.eye(k.shape[1], dtype=q.dtype)
    o = []
    for t in range(len(q)):
        S = alpha[t] * (I - beta[t] * torch.outer(k[t], k[t])) @ S + beta[t] * torch.outer(k[t], v[t])
        o.append(S.T @ q[t])
    return (torch.stack(o), S)


def answer_2_7_4(q, k, v, alpha, beta):
    S, o = (torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype), [])
    for t in range(len(q)):
        S = S - alpha[t] * beta[t] * torch.outer(k[t], k[t] @ S) + beta[t] * torch.outer(k[t], v[t])
        o.append(q[t] @ S)
    return (torch.stack(o), S)


def answer_2_7_5(q, k, v, alpha, beta):
    S, o = (torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype), [])
    for t in range(len(q)):
        S = (1 - alpha[t]) * S
        S = S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S)
        o.append(q[t] @ S)
    return (torch.stack(o), S)


def answer_2_7_6(q, k, v, alpha, beta):
    S, o = (torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype), [])
    for t in range(len(q)):
        S = alpha[t] * S
        o.append(q[t] @ S)
        S = S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S)
    return (torch.stack(o), S)


def answer_2_7_7(q, k, v, alpha, beta):
    S, o = (torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype), [])
    for t in range(len(q)):
        old = k[t] @ S
        S = alpha[t] * S - beta[t] * torch.outer(k[t], old) + beta[t] * alpha[t] * torch.outer(k[t], v[t])
        o.append(q[t] @ S)
    return (torch.stack(o), S)


# 2.8 -----------------------------------------------------------------------------------------------------
def answer_2_8_1(q, k, v, alpha, beta):
    g = alpha.cumprod(0)
    o, S = recurrent_delta_rule(q, k, v, beta, scale=1.0)
    return (o * g[:, None], S * g[-1])


def answer_2_8_2(q, k, v, alpha, beta):
    g = alpha.cumprod(0)
    o, S = recurrent_delta_rule(q, k / g[:, None], v / g[:, None], beta, scale=1.0)
    return (o * g[:, None], S * g[-1])


def answer_2_8_3(q, k, v, alpha, beta):
    g = alpha.cumprod(0)[:, None]
    o, S = recurrent_delta_rule(q, k, v * g, beta, scale=1.0)
    return (o / g, S / g[-1])


def answer_2_8_4(q, k, v, alpha, beta):
    g = torch.cat([torch.ones(1, dtype=alpha.dtype), alpha.cumprod(0)[:-1]])[:, None]
    o, S = recurrent_delta_rule(q, k, v / g, beta, scale=1.0)
    return (o * g, S * g[-1])


def answer_2_8_5(q, k, v, alpha, beta):
    a = alpha[:, None]
    o, S = recurrent_delta_rule(q, k, v / a, beta, scale=1.0)
    return (o * a, S * alpha.prod())


ANSWERS = {
    "2.1": [
        Answer(
            "multiplies the whole state by 1 - beta instead of the answer for k (mixes old and new everywhere)",
            answer_2_1_1,
            "whole state decay",
        ),
        Answer("forms I - beta k k^T", answer_2_1_2, "d_k x d_k"),
        Answer("updates the given state in place", answer_2_1_3, "writes into its argument"),
        Answer(
            "beta in the erasure, and the new value in full",
            answer_2_1_4,
            "written in full",
        ),
        Answer("erases in full, writes with beta", answer_2_1_5, "whole old answer"),
        Answer("the sign of the error: answer minus value", answer_2_1_6, "sign of the error"),
        Answer("returns only what is added, not the new state", answer_2_1_7, "`state`, which is missing"),
        Answer("asks state @ k: shapes do not fit when d_k is not d_v", answer_2_1_8, NOT_NAMED),
    ],
    "2.2": [
        Answer("reads before writing: o_t from S_{t-1}", answer_2_2_1, "before the write"),
        Answer("collects states and reads all tokens from the last one", answer_2_2_2, "last state"),
        Answer("starts from zeros and ignores the state that is given", answer_2_2_3, "started from zeros"),
        Answer(
            "returns the list of the states' answers to the keys in place of the queries",
            answer_2_2_4,
            "`k` in the place of `q`",
        ),
        Answer("computes all errors from the initial state in one matrix product", answer_2_2_5, "All errors"),
        Answer("beta of the first token for all", answer_2_2_6, "first token"),
        Answer("normalises the keys first, as the model would", answer_2_2_7, NOT_NAMED),
    ],
    "2.3": [
        Answer("1 over the length, not the squared length", answer_2_3_1, r"divided by \|k\|"),
        Answer("beta = 1, as for a unit key", answer_2_3_2, "another length"),
        Answer("half: as a reflection would need 2/|k|^2", answer_2_3_3, "reflection"),
        Answer("mean of squares: d / |k|^2", answer_2_3_4, "length of k"),
    ],
    "2.4": [
        Answer(
            "looks along the key only: the error must shrink by 1 - beta |k|^2",
            answer_2_4_1,
            "orthogonal to the key decay",
        ),
        Answer(
            "a unit key and beta = 1 only: stored exactly, and orthogonal answers unchanged",
            answer_2_4_2,
            "beta is ignored",
        ),
        Answer("compares without tolerance", answer_2_4_3, "tolerance"),
        Answer("checks with the library's own step", answer_2_4_4, "computes the new state"),
        Answer(
            "only that the direction orthogonal to the key is kept and that beta 0 does nothing",
            answer_2_4_5,
            "nothing is erased",
        ),
    ],
    "2.5": [
        Answer("gradient descent on all pairs at once: one error for the whole pass", answer_2_5_1, "same state"),
        Answer("begins every pass from zero again", answer_2_5_2, "one pass only"),
        Answer("the library on the repeated list", answer_2_5_3, "library's"),
        Answer("repeats each key `passes` times before going on to the next", answer_2_5_4, "several times in a row"),
        Answer("divides beta by the number of the pass, a shrinking step size", answer_2_5_5, NOT_NAMED),
    ],
    "2.6": [
        Answer("beta is the bit itself, not twice the bit", answer_2_6_1, "erases"),
        Answer("a cumulative product instead of the delta rule", answer_2_6_2, "never calls"),
        Answer("forgets the initial state: starts from zero and stays there", answer_2_6_3, "starts at 0"),
        Answer("returns parity 0 and 1 in place of the state's sign", answer_2_6_4, "0 or 1"),
        Answer("values 1 - 2x with beta 1: the state is the last bit's sign", answer_2_6_5, "last bit"),
    ],
    "2.7": [
        Answer("the error is taken against the state before the fade", answer_2_7_1, "before its decay"),
        Answer("fades after the write: the new pair fades too", answer_2_7_2, "also shrinks"),
        Answer("multiplies out H with alpha", answer_2_7_3, "d_k x d_k"),
        Answer("alpha on the erasing term only: S - alpha beta k (k^T S) + beta k v^T", answer_2_7_4, "erasure alone"),
        Answer("1 - alpha is kept: alpha read as the amount that is forgotten", answer_2_7_5, "1 - alpha"),
        Answer("alpha shrinks the outputs' state only: the output reads alpha S", answer_2_7_6, "other order"),
    ],
    "2.8": [
        Answer("rescales the outputs and forgets to divide the values", answer_2_8_1, "as they are"),
        Answer("divides the keys as well as the values by gamma", answer_2_8_2, "changed the keys"),
        Answer(
            "multiplies values by gamma and divides the outputs: the change of units the wrong way",
            answer_2_8_3,
            "reciprocal",
        ),
        Answer("gamma leaves out the token's own alpha (product up to t - 1)", answer_2_8_4, "token before"),
    ],
}

HELD_OUT = {
    "2.1": [
        Answer("linear attention's write with beta: no erasing", answer_2_1_9, "linear attention"),
        Answer(
            "beta in the error only for the old value, written with beta again: beta squared", answer_2_1_10, "squared"
        ),
        Answer("uses the library", answer_2_1_11, "library's"),
    ],
    "2.2": [
        Answer("returns only the outputs", answer_2_2_8, "one value"),
        Answer("collects the outputs in a list and does not stack; returns list and state", answer_2_2_9, "list"),
    ],
    "2.3": [
        Answer("norm to the fourth: squares the squared norm", answer_2_3_5, "square of"),
    ],
    "2.4": [
        Answer("state zero, so nothing can be erased", answer_2_4_6, "nothing is erased"),
    ],
    "2.5": [
        Answer("one pass only: `passes` is not used", answer_2_5_6, "one pass"),
    ],
    "2.6": [
        Answer("returns a column [L, 1]", answer_2_6_6, "wrong shape"),
    ],
    "2.7": [
        Answer(
            "alpha multiplies the state only in the erasing bracket's first term: alpha S - beta k (k S) + beta k v",
            answer_2_7_7,
            NOT_NAMED,
        ),
    ],
    "2.8": [
        Answer("gammas of the single tokens, no cumulative product", answer_2_8_5, NOT_NAMED),
    ],
}
