"""Wrong answers to the exercises of chapter 1, written from the book alone, before the judge had been looked at."""
# As a class writes, and kept so.
# ruff: noqa: B905, E731, RUF059

from __future__ import annotations

import math

import torch

from dn_lib.forms import linear_attention as la

from . import NOT_NAMED, Answer

phi = la.elu_feature_map


def _recurrence(q, k, v, S=None):
    S = q.new_zeros(k.shape[1], v.shape[1]) if S is None else S
    o = []
    for t in range(len(q)):
        S = S + torch.outer(k[t], v[t])
        o.append(q[t] @ S * q.shape[1] ** (-0.5))
    return (torch.stack(o), S)


# 1.1 -----------------------------------------------------------------------------------------------------
def answer_1_1_1(q, k, v):
    S = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype)
    z = torch.zeros(q.shape[1], dtype=q.dtype)
    out = []
    for i in range(len(q)):
        S = S + torch.outer(phi(k[i]), v[i])
        z = z + phi(k[i])
        out.append(phi(q[i]) @ S / z.sum())
    return torch.stack(out)


def answer_1_1_2(q, k, v):
    z = phi(k).sum(0)
    S = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype)
    out = torch.zeros_like(v)
    for i in range(len(q)):
        S += torch.outer(phi(k[i]), v[i])
        out[i] = phi(q[i]) @ S / (phi(q[i]) @ z)
    return out


def answer_1_1_3(q, k, v):
    fq, fk = (phi(q), phi(k))
    S = torch.einsum("la,lb->lab", fk, v).cumsum(0)
    z = fk.cumsum(0)
    return torch.einsum("la,lab->lb", fq, S) / (fq * z).sum(-1, keepdim=True)


def answer_1_1_4(q, k, v):
    f = lambda x: torch.relu(x) + 1
    S, z, o = (v.new_zeros(k.shape[1], v.shape[1]), v.new_zeros(k.shape[1]), [])
    for t in range(len(q)):
        S = S + torch.outer(f(k[t]), v[t])
        z = z + f(k[t])
        o.append(f(q[t]) @ S / (f(q[t]) @ z))
    return torch.stack(o)


def answer_1_1_5(q, k, v):
    o, S = ([], v.new_zeros(k.shape[1], v.shape[1]))
    z = v.new_zeros(k.shape[1])
    for t in range(len(q)):
        z = z + phi(k[t])
        S = S + torch.outer(phi(k[t]) / phi(k[t]).sum(), v[t])
        o.append(phi(q[t]) @ S / (phi(q[t]) @ z))
    return torch.stack(o)


def answer_1_1_6(q, k, v):
    S, z, o = (v.new_zeros(k.shape[1], v.shape[1]), 0.0, [])
    for t in range(len(q)):
        S = S + torch.outer(phi(k[t]), v[t])
        z = z + phi(q[t]) @ phi(k[t])
        o.append(phi(q[t]) @ S / z)
    return torch.stack(o)


def answer_1_1_7(q, k, v):
    S, z, o = (v.new_zeros(v.shape[1], k.shape[1]), v.new_zeros(k.shape[1]), [])
    for t in range(len(q)):
        S = S + torch.outer(v[t], phi(k[t]))
        z = z + phi(k[t])
        o.append(phi(q[t]) @ S / (phi(q[t]) @ z))
    return torch.stack(o)


def answer_1_1_8(q, k, v):
    o = []
    for t in range(len(q)):
        w = torch.softmax(k[: t + 1] @ q[t], 0)
        o.append(w @ v[: t + 1])
    return torch.stack(o)


def answer_1_1_9(q, k, v):
    S, z = (v.new_zeros(k.shape[1], v.shape[1]), v.new_zeros(k.shape[1]))
    for t in range(len(q)):
        S = S + torch.outer(phi(k[t]), v[t])
        z = z + phi(k[t])
        o = phi(q[t]) @ S / (phi(q[t]) @ z)
    return o


def answer_1_1_10(q, k, v):
    S, z, o = (v.new_zeros(k.shape[1], v.shape[1]), v.new_zeros(k.shape[1]), [])
    for t in range(len(q)):
        S = S + torch.outer(phi(k[t]), phi(v[t]))
        z = z + phi(k[t])
        o.append(phi(q[t]) @ S / (phi(q[t]) @ z))
    return torch.stack(o)


# 1.2 -----------------------------------------------------------------------------------------------------
def answer_1_2_1(q, k, v, chunk_size):
    S = q.new_zeros(k.shape[1], v.shape[1])
    o = []
    for s in range(0, len(q), chunk_size):
        qc, kc, vc = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        S = S + kc.T @ vc
        o.append(qc @ S + (qc @ kc.T).tril() @ vc)
    return torch.cat(o)


def answer_1_2_2(q, k, v, chunk_size):
    S = q.new_zeros(k.shape[1], v.shape[1])
    o = q.new_zeros(len(q), v.shape[1])
    for c in range(len(q) // chunk_size):
        s = slice(c * chunk_size, (c + 1) * chunk_size)
        o[s] = q[s] @ S + (q[s] @ k[s].T).tril() @ v[s]
        S = S + k[s].T @ v[s]
    return o


def answer_1_2_3(q, k, v, chunk_size):
    S = q.new_zeros(k.shape[1], v.shape[1])
    o = []
    for s in range(0, len(q), chunk_size):
        for t in range(s, min(s + chunk_size, len(q))):
            S = S + torch.outer(k[t], v[t])
            o.append(q[t] @ S)
    return torch.stack(o)


def answer_1_2_4(q, k, v, chunk_size):
    S = q.new_zeros(k.shape[1], v.shape[1])
    o = []
    for s in range(0, len(q), chunk_size):
        qc, kc, vc = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        o.append(qc @ S + (qc @ kc.T).tril() @ vc)
        S = kc.T @ vc
    return torch.cat(o)


def answer_1_2_5(q, k, v, chunk_size):
    S, o = (v.new_zeros(k.shape[1], v.shape[1]), [])
    for s in range(0, len(q), chunk_size):
        a, b, c = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        o.append(a @ S + (b @ a.T).tril() @ c)
        S = S + b.T @ c
    return torch.cat(o)


def answer_1_2_6(q, k, v, chunk_size):
    S, o = (v.new_zeros(k.shape[1], v.shape[1]), [])
    for s in range(0, len(q), chunk_size):
        a, b, c = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        o.append(a @ S + (a @ b.T).tril() @ c)
        S = S + b.T @ c
    return (torch.cat(o), S)


def answer_1_2_7(q, k, v, chunk_size):
    S = k[:chunk_size].T @ v[:chunk_size]
    o = []
    for s in range(0, len(q), chunk_size):
        a, b, c = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        o.append(a @ S + (a @ b.T).tril() @ c)
        S = S + b.T @ c
    return torch.cat(o)


def answer_1_2_8(q, k, v, chunk_size):
    S, o = (v.new_zeros(k.shape[1], v.shape[1]), torch.zeros_like(v))
    for s in range(0, len(q), chunk_size):
        e = s + chunk_size - 1
        a, b, c = (q[s:e], k[s:e], v[s:e])
        o[s:e] = a @ S + (a @ b.T).tril() @ c
        S = S + b.T @ c
    return o


def answer_1_2_9(q, k, v, chunk_size):
    P = (q @ k.T).tril()
    S, o = (v.new_zeros(k.shape[1], v.shape[1]), [])
    for s in range(0, len(q), chunk_size):
        e = s + chunk_size
        o.append(q[s:e] @ S + P[s:e, s:e] @ v[s:e])
        S = S + k[s:e].T @ v[s:e]
    return torch.cat(o)


def answer_1_2_10(q, k, v, chunk_size):
    S, o = (v.new_zeros(k.shape[1], v.shape[1]), [])
    for s in range(0, len(q), chunk_size):
        a, b, c = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        o.append(a @ S + (a @ b.T).tril() @ c)
        S += S + b.T @ c
    return torch.cat(o)


# 1.3 -----------------------------------------------------------------------------------------------------
def answer_1_3_1(q, k, v, workers):
    qs, ks, vs = (q.chunk(workers), k.chunk(workers), v.chunk(workers))
    kv = [a.T @ b for a, b in zip(ks, vs)]
    out = []
    for w in range(workers):
        S = sum(kv[: w + 1])
        out.append(qs[w] @ S + (qs[w] @ ks[w].T).tril() @ vs[w])
    return torch.cat(out)


def answer_1_3_2(q, k, v, workers):
    S = q.new_zeros(k.shape[1], v.shape[1])
    out = []
    for a, b, c in zip(q.chunk(workers), k.chunk(workers), v.chunk(workers)):
        out.append(a @ S + (a @ b.T).tril() @ c)
        S = S + b.T @ c
    return torch.cat(out)


def answer_1_3_3(q, k, v, workers):
    n = len(q) // workers
    kv = torch.stack([k[w * n : (w + 1) * n].T @ v[w * n : (w + 1) * n] for w in range(workers)])
    total = kv.sum(0)
    out = []
    for w in range(workers):
        s = slice(w * n, (w + 1) * n)
        out.append(q[s] @ (total - kv[w]) + (q[s] @ k[s].T).tril() @ v[s])
    return torch.cat(out)


def answer_1_3_4(q, k, v, workers):
    parts = [(q[w::workers], k[w::workers], v[w::workers]) for w in range(workers)]
    kv = [b.T @ c for _, b, c in parts]
    out = torch.zeros(len(q), v.shape[1], dtype=v.dtype)
    S = torch.zeros_like(kv[0])
    for w, (a, b, c) in enumerate(parts):
        out[w::workers] = a @ S + (a @ b.T).tril() @ c
        S = S + kv[w]
    return out


def answer_1_3_5(q, k, v, workers):
    n = len(q) // workers
    kv = [k[i * n : (i + 1) * n].T @ v[i * n : (i + 1) * n] for i in range(workers)]
    out, S = ([], torch.zeros_like(kv[0]))
    for i in range(workers):
        out.append(q[i * n : (i + 1) * n] @ S)
        S = S + kv[i]
    return torch.cat(out)


def answer_1_3_6(q, k, v, workers):
    n = len(q) // workers
    kv = torch.stack([k[i * n : (i + 1) * n].T @ v[i * n : (i + 1) * n] for i in range(workers)]).cumsum(0)
    return torch.cat([q[i * n : (i + 1) * n] @ kv[i] for i in range(workers)])


def answer_1_3_7(q, k, v, workers):
    n = len(q) // workers
    parts = [(q[i * n : (i + 1) * n], k[i * n : (i + 1) * n], v[i * n : (i + 1) * n]) for i in range(workers)]
    kv = [b.T @ c for a, b, c in parts]
    return [a @ sum(kv[:i], torch.zeros_like(kv[0])) + (a @ b.T).tril() @ c for i, (a, b, c) in enumerate(parts)]


def answer_1_3_8(q, k, v, workers):
    S, o = (v.new_zeros(k.shape[1], v.shape[1]), [])
    kv = [k[s : s + workers].T @ v[s : s + workers] for s in range(0, len(q), workers)]
    for i, s in enumerate(range(0, len(q), workers)):
        a, b, c = (q[s : s + workers], k[s : s + workers], v[s : s + workers])
        o.append(a @ S + a @ b.T @ c)
        S = S + kv[i]
    return torch.cat(o)


# 1.4 -----------------------------------------------------------------------------------------------------
def answer_1_4_1(implementation):
    torch.manual_seed(0)
    q, k, v = (torch.randn(10, 4), torch.randn(10, 4), torch.randn(10, 3))
    a = implementation(q, k, v, 4)[0]
    k2 = k.clone()
    k2[7] += 1
    b = implementation(q, k2, v, 4)[0]
    return torch.allclose(a[:7], b[:7])


def answer_1_4_2(implementation):
    torch.manual_seed(0)
    q, k, v = (torch.randn(13, 4, dtype=torch.float64) for _ in range(3))
    o, S = _recurrence(q, k, v)
    o2, S2 = implementation(q, k, v, 4)
    return torch.allclose(o, o2) and torch.allclose(S, S2)


def answer_1_4_3(implementation):
    torch.manual_seed(0)
    q, k, v = (torch.randn(13, 4, dtype=torch.float64) for _ in range(3))
    S0 = torch.randn(4, 4, dtype=torch.float64)
    o, S = _recurrence(q, k, v, S0)
    o2, S2 = implementation(q, k, v, 4, initial_state=S0)
    return torch.equal(o, o2) and torch.equal(S, S2)


def answer_1_4_4(implementation):
    torch.manual_seed(1)
    q, k, v = (torch.randn(12, 4, dtype=torch.float64) for _ in range(3))
    o, S = implementation(q, k, v, 4)
    r, R = la.recurrent_linear_attention(q, k, v)
    return abs(o.sum() - r.sum()) < 0.5


def answer_1_4_5(implementation):
    torch.manual_seed(1)
    q, k, v = (torch.randn(13, 4, dtype=torch.float64) for _ in range(3))
    S0 = torch.randn(4, 4, dtype=torch.float64)
    o, S = implementation(q, k, v, 4, S0)
    r = q @ S0 + (q @ k.T).tril() @ v
    return torch.allclose(o, r) and torch.allclose(S, S0 + k.T @ v)


def answer_1_4_6(implementation):
    torch.manual_seed(1)
    q, k, v = (torch.randn(13, 4, dtype=torch.float64) for _ in range(3))
    S0 = torch.randn(4, 4, dtype=torch.float64)
    got = implementation(q, k, v, 4, S0)
    ref = la.recurrent_linear_attention(q, k, v, initial_state=S0)
    return [torch.allclose(a, b) for a, b in zip(got, ref)]


def answer_1_4_7(implementation):
    torch.manual_seed(0)
    q, k, v = (torch.randn(11, 3, dtype=torch.float64) for _ in range(3))
    S0 = torch.randn(3, 3, dtype=torch.float64)
    return torch.allclose(implementation(q, k, v, 4, S0)[1], S0 + k.T @ v)


# 1.5 -----------------------------------------------------------------------------------------------------
def answer_1_5_1(n, d, rho):
    return (n - 1) * (rho + (1 - rho) / (d - 1))


def answer_1_5_2(n, d, rho):
    return (n - 1) * (1 - rho) ** 2 / (d - 1)


def answer_1_5_3(n, d, rho):
    return (n - 1) * (rho + (1 - rho) / math.sqrt(d - 1)) ** 2


def answer_1_5_4(n, d, rho):
    return (n - 1) * (math.sqrt(rho) ** 2 + math.sqrt(1 - rho) ** 2 / (d - 1)) ** 2


def answer_1_5_5(n, d, rho):
    return d * (n - 1) * (rho**2 + (1 - rho) ** 2 / (d - 1))


def answer_1_5_6(n, d, rho):
    return (n - 1) * (rho**2 + (1 - rho**2) / (d - 1))


def answer_1_5_7(n, d, rho):
    return (n - 1) / n * (rho**2 + (1 - rho) ** 2 / (d - 1))


def answer_1_5_8(n, d, rho):
    return (n - 1) * (rho**2 + (1 - rho) ** 2 * (d - 1))


# 1.6 -----------------------------------------------------------------------------------------------------
def answer_1_6_1(d_k, d_v):
    return math.ceil(d_k * d_v / (d_k + d_v))


def answer_1_6_2(d_k, d_v):
    return d_k * d_v // max(d_k, d_v) + 1


def answer_1_6_3(d_k, d_v):
    return math.floor(d_k * d_v / (d_k + d_v)) + 1.0


def answer_1_6_4(d_k, d_v):
    t = 1
    while t * (d_k + d_v) < d_k * d_v:
        t += 1
    return t


def answer_1_6_5(d_k, d_v):
    return (d_k * d_v + d_k + d_v - 1) // (d_k + d_v) + 1


def answer_1_6_6(d_k, d_v):
    return math.ceil(d_k * d_v / (d_k + d_v)) + 1


# 1.7 -----------------------------------------------------------------------------------------------------
def answer_1_7_1(q, k, v, gamma, chunk_size):
    S = q.new_zeros(k.shape[1], v.shape[1])
    out = []
    for s in range(0, len(q), chunk_size):
        qc, kc, vc = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        c = len(qc)
        i = torch.arange(c, dtype=q.dtype)
        M = (gamma ** (i[:, None] - i[None]).clamp(min=0)).tril()
        out.append((gamma**i)[:, None] * (qc @ S) + qc @ kc.T * M @ vc)
        S = gamma**c * S + (kc * (gamma ** (c - 1 - i))[:, None]).T @ vc
    return torch.cat(out)


def answer_1_7_2(q, k, v, gamma, chunk_size):
    S = q.new_zeros(k.shape[1], v.shape[1])
    out = []
    for s in range(0, len(q), chunk_size):
        qc, kc, vc = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        c = len(qc)
        p = gamma ** torch.arange(1, c + 1, dtype=q.dtype)
        qs, ks = (qc * p[:, None], kc / p[:, None])
        out.append(qs @ S + (qs @ ks.T).tril() @ vc)
        S = p[-1] * (S + ks.T @ vc)
    return torch.cat(out)


def answer_1_7_3(q, k, v, gamma, chunk_size):
    S = q.new_zeros(k.shape[1], v.shape[1])
    out = []
    for s in range(0, len(q), chunk_size):
        qc, kc, vc = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        c = len(qc)
        i = torch.arange(c, dtype=q.dtype)
        M = (gamma ** (i[:, None] - i[None]).clamp(min=0)).tril()
        out.append((gamma ** (i + 1))[:, None] * (qc @ S) + qc @ kc.T * M @ vc)
        S = gamma**c * S + kc.T @ vc
    return torch.cat(out)


def answer_1_7_4(q, k, v, gamma, chunk_size):
    S, o = (v.new_zeros(k.shape[1], v.shape[1]), [])
    for s in range(0, len(q), chunk_size):
        a, b, c = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        n = len(a)
        p = gamma ** torch.arange(1, n + 1, dtype=q.dtype)
        o.append(p[:, None] * (a @ S + (a @ b.T).tril() @ c))
        S = gamma**n * S + (p.flip(0)[:, None] / gamma * b).T @ c
    return torch.cat(o)


def answer_1_7_5(q, k, v, gamma, chunk_size):
    S, o = (v.new_zeros(k.shape[1], v.shape[1]), [])
    for s in range(0, len(q), chunk_size):
        a, b, c = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        n = len(a)
        i = torch.arange(n, dtype=q.dtype)
        left = gamma ** (n - 1 - i)
        o.append(gamma ** (i + 1)[:, None] * (a @ S) + (a @ (left[:, None] * b).T).tril() @ c)
        S = gamma**n * S + (left[:, None] * b).T @ c
    return torch.cat(o)


def answer_1_7_6(q, k, v, gamma, chunk_size):
    S, o = (v.new_zeros(k.shape[1], v.shape[1]), [])
    for s in range(0, len(q), chunk_size):
        a, b, c = (q[s : s + chunk_size], k[s : s + chunk_size], v[s : s + chunk_size])
        n = len(a)
        i = torch.arange(n, dtype=q.dtype)
        F = gamma ** (i[:, None] - i[None]).clamp(min=0)
        o.append(gamma**n * (a @ S) + (a @ b.T * F).tril() @ c)
        S = gamma**n * S + (gamma ** (n - 1 - i)[:, None] * b).T @ c
    return torch.cat(o)


ANSWERS = {
    "1.1": [
        Answer(
            "divides by the sum of the keys' features, entry by entry summed, not by their product with the query",
            answer_1_1_1,
            "entries of z",
        ),
        Answer("sums all keys first, so that every token divides by the final z", answer_1_1_2, "all tokens"),
        Answer(
            "keeps a state for every token with cumsum, then one batched product; no loop",
            answer_1_1_3,
            "state for each token",
        ),
        Answer("relu + 1 in place of elu + 1", answer_1_1_4, r"relu\(x\)"),
        Answer(
            "normalises the weights of each step and sums the results: divides inside the running sum",
            answer_1_1_5,
            NOT_NAMED,
        ),
        Answer("z is a number: the running sum of the weights of all queries so far", answer_1_1_6, "own key"),
        Answer("writes v k^T and reads it with q S: shapes do not fit", answer_1_1_7, NOT_NAMED),
        Answer("softmax weights in place of kernel weights", answer_1_1_8, "softmax"),
    ],
    "1.2": [
        Answer(
            "the state takes in the chunk before the outputs are read, so the chunk counts twice",
            answer_1_2_1,
            "counted twice",
        ),
        Answer("takes only whole chunks; the tail of the output stays zero", answer_1_2_2, "zeros"),
        Answer("inside the chunk goes token by token", answer_1_2_3, "token by token"),
        Answer(
            "each chunk hands on only its own keys and values, not the sum of all before",
            answer_1_2_4,
            "only the chunk before",
        ),
        Answer("reads the scores the wrong way round: K Q^T, lower triangle", answer_1_2_5, "K Q"),
        Answer("returns the state as well", answer_1_2_6, "return it alone"),
        Answer(
            "the state begins with the first chunk's K^T V, so the first chunk is counted again",
            answer_1_2_7,
            NOT_NAMED,
        ),
        Answer(
            "off by one in slices: chunks end at s + chunk_size - 1, one token lost in each",
            answer_1_2_8,
            "row of zeros",
        ),
    ],
    "1.3": [
        Answer(
            "the prefix contains the worker's own part (inclusive instead of exclusive sum)", answer_1_3_1, "own writes"
        ),
        Answer("one running state from worker to worker: each waits for the one before", answer_1_3_2, "wait in turn"),
        Answer(
            "an all-reduce: every worker begins with the sum over all other workers, later ones too",
            answer_1_3_3,
            "all other workers",
        ),
        Answer(
            "workers take turns in the tokens (0, w, 2w, ...) instead of holding equal stretches",
            answer_1_3_4,
            NOT_NAMED,
        ),
        Answer("only the exchanged states: each worker's own part is left out", answer_1_3_5, "term is missing"),
        Answer(
            "forgets to start from nothing: worker 0 reads its own sum, worker i those up to i, no masked part",
            answer_1_3_6,
            "mask is missing",
        ),
    ],
    "1.4": [
        Answer(
            "looks at causality only: a later token may not change an earlier output",
            answer_1_4_1,
            "the mask leaves out the diagonal",
        ),
        Answer("compares with the recurrence from a zero state only", answer_1_4_2, "initial state is ignored"),
        Answer("demands equality to the last bit", answer_1_4_3, "another order"),
        Answer("sums all outputs and compares the two sums, loosely", answer_1_4_4, "initial state is ignored"),
        Answer("forgets the scale in the reference, so that right ones fail", answer_1_4_5, "scale, state"),
        Answer("returns a list of booleans", answer_1_4_6, "list of 2 values"),
    ],
    "1.5": [
        Answer(
            "the mean square of the cosine is taken as rho plus the rest, rho not squared",
            answer_1_5_1,
            "without squaring",
        ),
        Answer(
            "forgets the shared direction: (n-1)/d of chapter with (1-rho) only",
            answer_1_5_2,
            "common direction is missing",
        ),
        Answer(
            "adds the expectation of the square as square of the sum: (rho + (1-rho)/sqrt(d-1))^2, the cross term kept",
            answer_1_5_3,
            "does not vanish",
        ),
        Answer("root of rho kept in the square: k_i.k_j along c counted as sqrt(rho)", answer_1_5_4, "too early"),
        Answer(
            "relative to d instead of one unit value: multiplies by d, summing over entries of v",
            answer_1_5_5,
            "d times",
        ),
        Answer(
            "the overlap along c forgotten in expectation, variance of sum: (n-1)(rho + (1-rho)/d)",
            answer_1_5_6,
            NOT_NAMED,
        ),
    ],
    "1.6": [
        Answer("rounds up: if the division comes out even, cache and state are equal, not larger", answer_1_6_1, "tie"),
        Answer(
            "compares the cache with d_k + d_v numbers of one token against one row: returns d_k*d_v // d_k",
            answer_1_6_2,
            NOT_NAMED,
        ),
        Answer("the right number but as a float", answer_1_6_3, "float"),
        Answer(
            "counts up while the cache is smaller, and stops where both are equal",
            answer_1_6_4,
            "tie",
        ),
        Answer("solves for bytes: counts d_k + d_v per token against d_k + d_v of the state", answer_1_6_5, NOT_NAMED),
    ],
    "1.7": [
        Answer(
            "token i reads the old state with gamma^i counted from 0: one fade too few",
            answer_1_7_1,
            "one step too little",
        ),
        Answer("splits gamma^(t-i) into gamma^t times gamma^-i", answer_1_7_2, "negative exponent"),
        Answer("the chunk's own tokens enter the state unfaded", answer_1_7_3, "full strength"),
        Answer(
            "fading inside the chunk uses the row index alone: gamma^i, not gamma^(i-j)", answer_1_7_4, "faded alike"
        ),
        Answer(
            "age inside a chunk counted from the chunk's end for the readers, too", answer_1_7_5, "at the chunk's end"
        ),
    ],
}

HELD_OUT = {
    "1.1": [
        Answer("returns the last output only", answer_1_1_9, "axes"),
        Answer("phi of the value too: all three inputs through the feature map", answer_1_1_10, "elu"),
    ],
    "1.2": [
        Answer("computes the scores of the whole sequence and cuts blocks out of them", answer_1_2_9, "L x L"),
        Answer(
            "reads earlier chunks twice: adds Q S, then S carries a double sum (S = S + S + K^T V)",
            answer_1_2_10,
            NOT_NAMED,
        ),
    ],
    "1.3": [
        Answer("returns the list of parts without joining them", answer_1_3_7, "list"),
        Answer("takes `workers` for the length of a part", answer_1_3_8, NOT_NAMED),
    ],
    "1.4": [
        Answer("looks at the final state only", answer_1_4_7, "mask"),
    ],
    "1.5": [
        Answer(
            "the values' square counted with n pairs, the mean over pairs: divides by n", answer_1_5_7, "times what"
        ),
        Answer("u uniform in d - 2 dimensions left over", answer_1_5_8, NOT_NAMED),
    ],
    "1.6": [
        Answer("adds one only after rounding up", answer_1_6_6, NOT_NAMED),
    ],
    "1.7": [
        Answer(
            "each token reads the state of earlier chunks with the fading of the whole chunk",
            answer_1_7_6,
            NOT_NAMED,
        ),
    ],
}
