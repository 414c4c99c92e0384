"""Wrong answers to the exercises of chapter 2."""

from __future__ import annotations

import torch

from dn_lib.forms.delta_rule import delta_rule_step, recurrent_delta_rule
from dn_lib.forms.gated import recurrent_gated_delta_rule

from . import Answer


# 2.1 and 2.2 ---------------------------------------------------------------------------------------------
def write(k, v, beta, state):
    return state + beta * torch.outer(k, v - k @ state)


def write_with_matrix(k, v, beta, state):
    return (torch.eye(len(k), dtype=k.dtype) - beta * torch.outer(k, k)) @ state + beta * torch.outer(k, v)


def write_in_place(k, v, beta, state):
    state += beta * torch.outer(k, v - k @ state)
    return state


def write_without_return(k, v, beta, state):
    state = write(k, v, beta, state)


def no_erase(k, v, beta, state):
    return state + beta * torch.outer(k, v)


def late_error(k, v, beta, state):
    new = state + beta * torch.outer(k, v)
    return new - beta * torch.outer(k, k @ new)


def beta_on_erasure(k, v, beta, state):
    return state + torch.outer(k, v - beta * (k @ state))


def beta_on_write(k, v, beta, state):
    return state + torch.outer(k, beta * v - k @ state)


def decay_all(k, v, beta, state):
    return (1 - beta) * state + beta * torch.outer(k, v)


def unit_key(k, v, beta, state):
    return write(k / k.norm(), v, beta, state)


def run(step=write, read="after", start="given", scale=1.0, skip=0):
    def answer(q, k, v, beta, state):
        first = state
        state, o = state if start == "given" else 0 * state, []
        for t in range(skip, len(q)):
            new = step(k[t], v[t], beta[t], state)
            o.append(scale * q[t] @ {"after": new, "before": state, "first": first}[read])
            state = new
        return (q @ state if read == "last" else torch.stack(o)), state

    return answer


def all_from_the_last(q, k, v, beta, state):
    state = run()(q, k, v, beta, state)[1]
    return q @ state, state


# 2.4 -----------------------------------------------------------------------------------------------------
def compared_with_a_write(step):
    generator = torch.Generator().manual_seed(0)
    k, S = torch.randn(5, generator=generator, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    v, beta = torch.randn(3, generator=generator, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    return torch.allclose(step(k, v, beta, S), S + beta * torch.outer(k, v - k @ S))


def property_test(along=True, aside=True, length=2.0, beta=0.3, empty=False, equal=False, d=5):
    def is_delta_rule(step):
        generator = torch.Generator().manual_seed(0)
        k, v, state, other = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((d,), (3,), (d, 3), (d,))
        )
        k, state = length * k / k.norm(), 0 * state if empty else state
        b = torch.tensor(beta, dtype=torch.float64)
        new = step(k, v, b, state)
        same = torch.equal if equal else torch.allclose
        ok = not along or same(v - k @ new, (1 - b * (k @ k)) * (v - k @ state))
        other = other - (other @ k) / (k @ k) * k
        return bool(ok and (not aside or same(other @ new, other @ state)))

    return is_delta_rule


def stores_exactly(step):
    k, v, state = torch.eye(3).double()[0], torch.ones(2).double(), torch.ones(3, 2).double()
    return torch.allclose(k @ step(k, v, torch.tensor(1.0).double(), state), v)


def no_state(step):
    k, v = torch.randn(3).double(), torch.randn(2).double()
    beta = torch.tensor(0.5).double()
    return torch.allclose(step(k, v, beta, torch.zeros(3, 2).double()), beta * torch.outer(k, v))


def nothing_at_zero(step):
    k, v, state = torch.randn(3).double(), torch.randn(2).double(), torch.randn(3, 2).double()
    return torch.allclose(step(k, v, torch.tensor(0.0).double(), state), state)


def prints_only(step):
    print(property_test()(step))


# 2.5 -----------------------------------------------------------------------------------------------------
def sweeps(step=write, order=1, restart=False):
    def answer(keys, values, beta, passes):
        state = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
        for _ in range(passes):
            state = 0 * state if restart else state
            for k, v in list(zip(keys, values, strict=True))[::order]:
                state = step(k, v, beta, state)
        return state

    return answer


def sweeps_as_batch(keys, values, beta, passes):
    state = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
    for _ in range(passes):
        state = state + beta * keys.T @ (values - keys @ state)
    return state


def sweeps_each_often(keys, values, beta, passes):
    state = torch.zeros(keys.shape[1], values.shape[1], dtype=keys.dtype)
    for k, v in zip(keys, values, strict=True):
        for _ in range(passes):
            state = write(k, v, beta, state)
    return state


def sweeps_by_library(keys, values, beta, passes):
    k, v = keys.repeat(passes, 1), values.repeat(passes, 1)
    return recurrent_delta_rule(k, k, v, beta.expand(len(k)))[1]


def one_sweep(keys, values, beta, passes):
    return sweeps()(keys, values, beta, 1)


def solved(keys, values, beta, passes):
    return torch.linalg.pinv(keys) @ values


# 2.6 -----------------------------------------------------------------------------------------------------
def parity(beta=lambda b: 2 * b, value=lambda b: 0 * b, start=1.0, scale=1.0):
    def answer(bits):
        one = torch.ones(len(bits), 1, dtype=bits.dtype)
        S = torch.full((1, 1), start, dtype=bits.dtype)
        o, _ = recurrent_delta_rule(one, one, value(bits)[:, None], beta(bits), scale=scale, initial_state=S)
        return o[:, 0]

    return answer


def parity_column(bits):
    return parity()(bits)[:, None]


# 2.7 and 2.8 ---------------------------------------------------------------------------------------------
def gated(step, scale=1.0):
    def answer(q, k, v, alpha, beta):
        state, o = torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype), []
        for t in range(len(q)):
            state = step(k[t], v[t], alpha[t], beta[t], state)
            o.append(scale * q[t] @ state)
        return torch.stack(o), state

    return answer


def rescaled(values="divide", outputs=True, state=True, product=True, keys=False):
    def answer(q, k, v, alpha, beta):
        gamma = (alpha.cumprod(0) if product else alpha)[:, None]
        v = {"divide": v / gamma, "multiply": v * gamma, "no": v}[values]
        o, S = recurrent_delta_rule(q, k / gamma if keys else k, v, beta, scale=1.0)
        return o * gamma if outputs else o, gamma[-1] * S if state else S

    return answer


def rescaled_default_scale(q, k, v, alpha, beta):
    gamma = alpha.cumprod(0)[:, None]
    o, S = recurrent_delta_rule(q, k, v / gamma, beta)
    return o * gamma, gamma[-1] * S


def rescaled_by_steps(q, k, v, alpha, beta):
    S, o = torch.zeros(k.shape[1], v.shape[1], dtype=k.dtype), []
    for t in range(len(q)):
        o_t, S = recurrent_delta_rule(
            q[t : t + 1], k[t : t + 1], v[t : t + 1], beta[t : t + 1], scale=1.0, initial_state=alpha[t] * S
        )
        o.append(o_t[0])
    return torch.stack(o), S


plain_gated = gated(lambda k, v, a, b, S: write(k, v, b, a * S))

ANSWERS = {
    "2.1": [
        Answer("nothing is erased", no_erase, "linear attention"),
        Answer("error after the write", late_error, "after the write"),
        Answer("beta forgotten", lambda k, v, beta, state: write(k, v, 1.0, state), "beta is not used|beta = 1|ignor"),
        Answer("beta on the erasure only", beta_on_erasure, "beta"),
        Answer("beta on the write only", beta_on_write, "beta is missing"),
        Answer("everything decays", decay_all, "whole state decay"),
        Answer("key normalised", unit_key, "normalis|length"),
        Answer("transposed update", lambda k, v, beta, state: write(k, v, beta, state).T, "transpos"),
        Answer("d_k x d_k matrix", write_with_matrix, "d_k x d_k"),
        Answer("in place", write_in_place, "argument|as it is|in place"),
        Answer("forgot the return", write_without_return, "return"),
        Answer("the library", lambda k, v, beta, state: delta_rule_step(k, k, v, beta, state)[1], "library"),
    ],
    "2.2": [
        Answer("reads before", run(read="before"), "before the write"),
        Answer("reads the first state", run(read="first"), "first state|given state"),
        Answer("reads the last state", all_from_the_last, "last state"),
        Answer("starts from zeros", run(start="zeros"), "zeros"),
        Answer("usual scale", lambda *x: run(scale=x[0].shape[1] ** -0.5)(*x), "scale"),
        Answer("nothing erased", run(no_erase), "erase|linear attention"),
        Answer("error after the write", run(late_error), "after the write"),
        Answer("beta forgotten", run(lambda k, v, b, S: write(k, v, 1.0, S)), "beta"),
        Answer("outputs only", lambda *x: run()(*x)[0], "state"),
        Answer("state and outputs", lambda *x: run()(*x)[::-1], "order"),
        Answer(
            "the library", lambda q, k, v, b, S: recurrent_delta_rule(q, k, v, b, scale=1.0, initial_state=S), "libr"
        ),
    ],
    "2.3": [
        Answer("one over the norm", lambda k: 1 / k.norm(), r"\|k\|"),
        Answer("one", lambda k: torch.ones((), dtype=k.dtype), "another length|Beta = 1"),
        Answer("reflection", lambda k: 2 / (k @ k), "reflection"),
        Answer("squared norm", lambda k: k @ k, "upside down|inverse|1 / "),
        Answer("norm", lambda k: k.norm(), "upside down|inverse|1 / "),
        Answer("one over d", lambda k: torch.tensor(1 / len(k), dtype=k.dtype), "entries|length"),
        Answer("one over each entry", lambda k: 1 / k**2, "shape|a number"),
        Answer("key over squared norm", lambda k: k / (k @ k), "shape|a number"),
        Answer("half of it", lambda k: 0.5 / (k @ k), "times|half"),
    ],
    "2.4": [
        Answer("along the key only", property_test(aside=False), "bug|whole state|thrown"),
        Answer("aside only", property_test(along=False), "bug"),
        Answer("beta one", property_test(beta=1.0), "beta is ignored"),
        Answer("an implementation to compare with", compared_with_a_write, "computes the new state itself"),
        Answer("unit key", property_test(length=1.0), "normalised"),
        Answer("empty state", property_test(empty=True), "erased"),
        Answer("equality to the bit", property_test(equal=True), "right implementation|reject"),
        Answer("stores exactly", stores_exactly, "bug"),
        Answer("no state", no_state, "bug|erased"),
        Answer("nothing at beta zero", nothing_at_zero, "bug"),
        Answer("everything", lambda step: True, "everything|all"),
        Answer("prints", prints_only, "return"),
    ],
    "2.5": [
        Answer("batch", sweeps_as_batch, "batch"),
        Answer("backwards", sweeps(order=-1), "last to the first"),
        Answer("no erasure", sweeps(no_erase), "erase"),
        Answer("each key several times", sweeps_each_often, "in a row"),
        Answer("one pass only", one_sweep, "one pass|once"),
        Answer("starts anew in each pass", sweeps(restart=True), "one pass|anew|once"),
        Answer("least squares", solved, "least squares|limit"),
        Answer("error after the write", sweeps(late_error), "after the write"),
        Answer("beta forgotten", sweeps(lambda k, v, b, S: write(k, v, 1.0, S)), "beta"),
        Answer("library", sweeps_by_library, "library"),
    ],
    "2.6": [
        Answer("beta is the bit", parity(lambda b: b), "erases"),
        Answer("counts zeros", parity(lambda b: 2 - 2 * b), "zeros"),
        Answer("zero and one", lambda bits: bits.cumsum(0) % 2, "parity itself"),
        Answer("cumprod", lambda bits: (1 - 2 * bits).cumprod(0), "recurrent_delta_rule"),
        Answer("last bit", parity(lambda b: 0 * b + 1, lambda b: 1 - 2 * b), "last bit"),
        Answer("starts at -1", parity(start=-1.0), "sign"),
        Answer("starts at 0", parity(start=0.0), "zero|0"),
        Answer("a column", parity_column, "shape"),
        Answer("stores the bit as well", parity(value=lambda b: b), "value"),
        Answer("number of ones", lambda bits: bits.cumsum(0), "count|number of ones"),
    ],
    "2.7": [
        Answer("decays the write", gated(lambda k, v, a, b, S: a * write(k, v, b, S)), "also shrinks"),
        Answer(
            "error before decay", gated(lambda k, v, a, b, S: a * S + b * torch.outer(k, v - k @ S)), "before its decay"
        ),
        Answer("no gate", gated(lambda k, v, a, b, S: write(k, v, b, S)), "Alpha is not used"),
        Answer("no erasure", gated(lambda k, v, a, b, S: a * S + b * torch.outer(k, v)), "without erasure"),
        Answer("1 - alpha", gated(lambda k, v, a, b, S: write(k, v, b, (1 - a) * S)), "1 - alpha"),
        Answer("alpha and beta exchanged", gated(lambda k, v, a, b, S: write(k, v, a, b * S)), "exchanged|swap"),
        Answer("usual scale", lambda *x: gated(lambda k, v, a, b, S: write(k, v, b, a * S), 0.5)(*x), "times|scale"),
        Answer("outputs only", lambda *x: plain_gated(*x)[0], "state"),
        Answer("d_k x d_k", gated(lambda k, v, a, b, S: write_with_matrix(k, v, b, a * S)), "d_k x d_k"),
        Answer("library", lambda q, k, v, a, b: recurrent_gated_delta_rule(q, k, v, b, a.log(), scale=1.0), "library"),
    ],
    "2.8": [
        Answer("values multiplied", rescaled(values="multiply"), "other way"),
        Answer("outputs not rescaled", rescaled(outputs=False), "outputs are not"),
        Answer("state not rescaled", rescaled(state=False), "state is not|last state"),
        Answer("values not divided", rescaled(values="no"), "values"),
        Answer("own alpha only", rescaled(product=False), "own alpha"),
        Answer("default scale", rescaled_default_scale, "scale"),
        Answer("keys divided as well", rescaled(keys=True), "key"),
        Answer("a loop", plain_gated, "recurrent_delta_rule"),
        Answer("one call per token", rescaled_by_steps, "one call|once|times"),
        Answer("gated form", lambda q, k, v, a, b: recurrent_gated_delta_rule(q, k, v, b, a.log(), scale=1.0), "gated"),
    ],
}
