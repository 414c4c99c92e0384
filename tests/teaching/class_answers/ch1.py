"""Wrong answers to the exercises of chapter 1."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import elu

from dn_lib.forms import linear_attention as la

from . import Answer


# 1.1 -----------------------------------------------------------------------------------------------------
def two_sums(phi_q=la.elu_feature_map, phi_k=la.elu_feature_map, divide="z", z_from="k", when="after", scale=False):
    def answer(q, k, v):
        if scale:
            q = q * q.shape[1] ** -0.5
        S, z, o = v.new_zeros(k.shape[1], v.shape[1]), v.new_zeros(k.shape[1]), []
        for t in range(len(q)):
            a, b = phi_q(q[t]), phi_k(k[t])
            before = a @ S, a @ z
            S = S + torch.outer(b, v[t])
            z = (z if z_from != "now" else 0) + (a if z_from == "q" else b)
            top, bottom = (a @ S, a @ z) if when == "after" else before
            o.append(top / {"z": bottom, "no": 1.0, "length": t + 1}[divide])
        return torch.stack(o)

    return answer


def forgot_return_1(q, k, v):
    o = two_sums()(q, k, v)
    o.sum()


def masked_matrix_1(q, k, v):
    weights = (la.elu_feature_map(q) @ la.elu_feature_map(k).T).tril()
    return weights @ v / weights.sum(-1, keepdim=True)


# 1.2 -----------------------------------------------------------------------------------------------------
def chunks(mask="tril", state="before", update="add", scale=1.0, last="kept", order="kv", where="local"):
    def answer(q, k, v, chunk_size):
        S, o = v.new_zeros(k.shape[1], v.shape[1]), []
        stop = len(q) if last == "kept" else len(q) // chunk_size * chunk_size
        for start in range(0, stop, chunk_size):
            a, b, c = (x[start : start + chunk_size] for x in (q, k, v))
            scores = scale * a @ b.T
            scores = {"tril": scores.tril(), "strict": scores.tril(-1), "none": scores, "triu": scores.triu()}[mask]
            new = b.T @ c + (S if update == "add" else 0)
            o.append(scale * a @ (new if state == "after" else S) + scores @ c)
            S = new
        return torch.cat(o)

    return answer


def recurrence(q, k, v, *_):
    S, o = v.new_zeros(k.shape[1], v.shape[1]), []
    for t in range(len(q)):
        S = S + torch.outer(k[t], v[t])
        o.append(q[t] @ S)
    return torch.stack(o)


def masked_matrix(q, k, v, *_):
    return (q @ k.T).tril() @ v


def chunks_in_a_list(q, k, v, chunk_size):
    return [chunks()(q, k, v, chunk_size)[n : n + chunk_size] for n in range(0, len(q), chunk_size)]


# 1.3 -----------------------------------------------------------------------------------------------------
def workers(before=None, mask=0, read=True):
    def answer(q, k, v, workers):
        parts = list(zip(q.chunk(workers), k.chunk(workers), v.chunk(workers), strict=True))
        sums = [b.T @ c for _, b, c in parts]
        states = [before(sums, w) for w in range(workers)]
        return torch.cat([a @ S + (a @ b.T).tril(mask) @ c for (a, b, c), S in zip(parts, states, strict=True)])

    return answer


def exclusive(sums, w):
    return sum(sums[:w], torch.zeros_like(sums[0]))


def one_after_the_other(q, k, v, workers):
    return chunks()(q, k, v, len(q) // workers)


# 1.4 -----------------------------------------------------------------------------------------------------
def comparison(length=13, chunk=4, state=True, final=True, tolerance=1e-9, d_v=5, scaled=True, equal=False):
    def is_right(implementation):
        generator = torch.Generator().manual_seed(0)
        q, k, v, S = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((length, 4), (length, 4), (length, d_v), (4, d_v))
        )
        S = S if state else None
        o, last = implementation(q, k, v, chunk, S)
        expected, end = la.recurrent_linear_attention(q, k, v, initial_state=S, scale=None if scaled else 1.0)
        if equal:
            return torch.equal(o, expected) and torch.equal(last, end)
        near = bool((o - expected).abs().max() < tolerance)
        return near and (not final or bool((last - end).abs().max() < tolerance))

    return is_right


def only_causal(implementation):
    q, k, v = torch.randn(3, 12, 4, dtype=torch.float64).unbind(0)
    o, _ = implementation(q, k, v, 4)
    changed = v.clone()
    changed[-1] += 1
    return torch.allclose(implementation(q, k, changed, 4)[0][:-1], o[:-1])


def returns_a_vector(implementation):
    q, k, v = torch.randn(3, 12, 4, dtype=torch.float64).unbind(0)
    return (implementation(q, k, v, 4)[0] - la.recurrent_linear_attention(q, k, v)[0]).abs() < 1e-9


# 1.7 -----------------------------------------------------------------------------------------------------
def fading(inside=True, reach=1, carry="n", left="late", mask=True, write_scale=False, cut=False):
    def answer(q, k, v, gamma, chunk_size):
        S, o = v.new_zeros(k.shape[1], v.shape[1]), []
        for start in range(0, len(q), chunk_size):
            a, b, c = (x[start : start + chunk_size] for x in (q, k, v))
            n = len(a)
            i = torch.arange(n, dtype=q.dtype)[:, None]
            M = gamma ** (i - i.T).clamp(min=0 if cut else -n) if inside else torch.ones(n, n, dtype=q.dtype)
            scores = a @ b.T * M
            o.append(gamma ** (i + reach) * (a @ S) + (scores.tril() if mask else scores) @ c)
            age = {"late": n - 1 - i, "long": n - i, "early": i}[left]
            new = (gamma**age * b).T @ c
            power = {"n": n, "C": chunk_size, "one": 1}[carry]
            S = gamma**power * (S + new) if write_scale else gamma**power * S + new
        return torch.cat(o)

    return answer


def fading_recurrence(q, k, v, gamma, chunk_size):
    S, o = v.new_zeros(k.shape[1], v.shape[1]), []
    for t in range(len(q)):
        S = gamma * S + torch.outer(k[t], v[t])
        o.append(q[t] @ S)
    return torch.stack(o)


def fading_divided(q, k, v, gamma, chunk_size):
    """Powers of gamma on queries and their inverses on keys: right, until the inverse overflows."""
    S, o = v.new_zeros(k.shape[1], v.shape[1]), []
    for start in range(0, len(q), chunk_size):
        a, b, c = (x[start : start + chunk_size] for x in (q, k, v))
        n = len(a)
        power = gamma ** torch.arange(1, n + 1, dtype=q.dtype)[:, None]
        o.append((power * a) @ S + ((power * a) @ (b / power).T).tril() @ c)
        S = gamma**n * (S + (b / power).T @ c)
    return torch.cat(o)


def fading_matrix(q, k, v, gamma, chunk_size):
    i = torch.arange(len(q), dtype=q.dtype)[:, None]
    return (q @ k.T * gamma ** (i - i.T).clamp(min=0)).tril() @ v


ANSWERS = {
    "1.1": [
        Answer("divides by nothing", two_sums(divide="no"), "division|divide"),
        Answer("divides by the number of tokens", two_sums(divide="length"), "number of tokens|average"),
        Answer("elu without + 1", two_sums(lambda x: elu(x), lambda x: elu(x)), r"\+ 1"),
        Answer("query without features", two_sums(phi_q=lambda x: x), "query did not go"),
        Answer("reads S and z before it writes", two_sums(when="before"), "before you wrote|NaN"),
        Answer("z holds the present key only", two_sums(z_from="now"), "present|last key|not a running sum"),
        Answer("queries scaled by the root of d", two_sums(scale=True), "scale"),
        Answer("forgot the return", forgot_return_1, "return"),
        Answer("a list of outputs", lambda q, k, v: list(two_sums()(q, k, v)), "list"),
        Answer("the library", lambda q, k, v: la.recurrent_kernel_attention(q, k, v)[0], "library"),
        Answer("one masked matrix", masked_matrix_1, "L x L"),
    ],
    "1.2": [
        Answer("no mask", chunks(mask="none"), "mask is missing|future"),
        Answer("strict mask", chunks(mask="strict"), "own value"),
        Answer("upper triangle", chunks(mask="triu"), "triu|upper|wrong half|later"),
        Answer("reads the new state", chunks(state="after"), "twice"),
        Answer("state not added to", chunks(update="set"), "only the chunk before"),
        Answer("the last chunk is dropped", chunks(last="dropped"), "last|short"),
        Answer("usual scale", chunks(scale=3**-0.5), "scale"),
        Answer("list of chunks", chunks_in_a_list, "list"),
        Answer("recurrence", recurrence, "one by one|token by token"),
        Answer("one masked matrix", masked_matrix, "L x L"),
        Answer("float32", lambda q, k, v, C: chunks()(q.float(), k.float(), v.float(), C), "float32"),
        Answer("the library", lambda q, k, v, C: la.chunkwise_linear_attention(q, k, v, scale=1.0)[0], "library"),
    ],
    "1.3": [
        Answer("own part too", workers(lambda sums, w: exclusive(sums, w + 1)), "own"),
        Answer("everybody's sum", workers(lambda sums, w: sum(sums)), "all workers|future"),
        Answer("nothing exchanged", workers(lambda sums, w: 0 * sums[0]), "exchange"),
        Answer("neighbour only", workers(lambda sums, w: sums[w - 1] if w else 0 * sums[0]), "neighbour"),
        Answer("later workers", workers(lambda sums, w: sum(sums[w + 1 :], 0 * sums[0])), "after|later"),
        Answer("mean in place of sum", workers(lambda sums, w: exclusive(sums, w) / max(w, 1)), "mean|average"),
        Answer("strict mask", workers(exclusive, mask=-1), "own value|diagonal"),
        Answer("no mask", workers(exclusive, mask=10**6), "mask"),
        Answer("one masked matrix", masked_matrix, "L x L"),
        Answer("one worker after the other", one_after_the_other, "wait|turns|after the first"),
        Answer("recurrence", recurrence, "never|each part|K\\^T V"),
    ],
    "1.4": [
        Answer("tolerance of one half", comparison(tolerance=0.5, length=6, chunk=2, d_v=1), "bugs"),
        Answer("no initial state", comparison(state=False), "initial state is ignored"),
        Answer("outputs only", comparison(final=False), "short last chunk"),
        Answer("length a multiple of the chunk", comparison(length=12), "short last chunk"),
        Answer("one chunk", comparison(chunk=13), "dropped|old state"),
        Answer("chunks of one token", comparison(chunk=1), "no mask"),
        Answer("exact equality", comparison(equal=True), "order|round"),
        Answer("scale 1", comparison(scaled=False), "rejects"),
        Answer("causality only", only_causal, "diagonal"),
        Answer("everything", lambda implementation: True, "everything|all"),
        Answer("a tensor of answers", returns_a_vector, "True or False"),
    ],
    "1.5": [
        Answer("random keys", lambda n, d, rho: (n - 1) / d, "without a common"),
        Answer("d where d - 1", lambda n, d, rho: (n - 1) * (rho**2 + (1 - rho) ** 2 / d), "dimensions"),
        Answer("n terms", lambda n, d, rho: n * (rho**2 + (1 - rho) ** 2 / (d - 1)), "itself"),
        Answer("roots not taken", lambda n, d, rho: (n - 1) * (rho**4 + (1 - rho) ** 4 / (d - 1)), "power|root"),
        Answer("not squared", lambda n, d, rho: (n - 1) * (rho + (1 - rho) / (d - 1)), "squar"),
        Answer("common part only", lambda n, d, rho: (n - 1) * rho**2, "random part"),
        Answer("no common part", lambda n, d, rho: (n - 1) * (1 - rho) ** 2 / (d - 1), "common direction"),
        Answer("squared sum", lambda n, d, rho: (n - 1) * (rho + (1 - rho) / math.sqrt(d - 1)) ** 2, "cross|middle"),
        Answer("all pairs", lambda n, d, rho: n * (n - 1) * (rho**2 + (1 - rho) ** 2 / (d - 1)), "one of|all n|times"),
        Answer("a root of it", lambda n, d, rho: ((n - 1) * (rho**2 + (1 - rho) ** 2 / (d - 1))) ** 0.5, "root"),
    ],
    "1.6": [
        Answer("rounded up", lambda d_k, d_v: math.ceil(d_k * d_v / (d_k + d_v)), "tie"),
        Answer("rounded down", lambda d_k, d_v: d_k * d_v // (d_k + d_v), "early"),
        Answer("keys only", lambda d_k, d_v: d_v + 1, "keys only"),
        Answer("values only", lambda d_k, d_v: d_k + 1, "values only"),
        Answer("a float", lambda d_k, d_v: float(d_k * d_v // (d_k + d_v) + 1), "float"),
        Answer("the crossing itself", lambda d_k, d_v: d_k * d_v / (d_k + d_v), "whole"),
        Answer("size of the state", lambda d_k, d_v: d_k * d_v + 1, "one number|state"),
        Answer("rounded", lambda d_k, d_v: round(d_k * d_v / (d_k + d_v)) + 1, "round"),
        Answer("work", lambda d_k, d_v: 2 * d_k * d_v // (d_k + d_v) + 1, "work"),
    ],
    "1.7": [
        Answer("nothing fades inside", fading(inside=False), "Inside a chunk nothing"),
        Answer("state one step too fresh", fading(reach=0), "one step too little"),
        Answer("gamma ** (C - i)", fading(left="long"), "once too often|too much"),
        Answer("fading backwards", fading(left="early"), "backwards"),
        Answer("gamma once per chunk", fading(carry="one"), "once"),
        Answer("gamma on the sum", fading(carry="n", left="late", write_scale=True), "writes|sum"),
        Answer("no mask", fading(mask=False), "mask|future"),
        Answer("no mask, exponents cut off at 0", fading(mask=False, cut=True), "no mask"),
        Answer("recurrence", fading_recurrence, "one by one|token by token"),
        Answer("divides by powers", fading_divided, "finite|overflow|NaN|power"),
        Answer("one masked matrix", fading_matrix, "L x L"),
    ],
}
