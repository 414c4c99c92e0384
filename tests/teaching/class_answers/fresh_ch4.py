"""Wrong answers to the exercises of chapter 4, written from the book alone, before the judge had been looked at."""
# As a class writes, and kept so.
# ruff: noqa: B905

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import scaled_inverse, ut_transform

from . import NOT_NAMED, Answer


def _ratios(alpha, strict=False):
    b = alpha.log().cumsum(0)
    return (b[:, None] - b[None]).tril().exp().tril()


# 4.1 -----------------------------------------------------------------------------------------------------
def answer_4_1_1(q, k, v, beta, S):
    u = ut_transform(k, beta) @ v
    return (q @ S + (q @ k.T).tril() @ u, S + k.T @ u)


def answer_4_1_2(q, k, v, beta, S):
    T = ut_transform(k, beta)
    u = T @ (beta[:, None] * (v - k @ S))
    return (q @ S + (q @ k.T).tril() @ u, S + k.T @ u)


def answer_4_1_3(q, k, v, beta, S):
    o = []
    for t in range(len(q)):
        S = S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S)
        o.append(q[t] @ S)
    return (torch.stack(o), S)


def answer_4_1_4(q, k, v, beta, S):
    p = ut_transform(k, beta) @ (v - k @ S)
    return (q @ S + (q @ k.T).tril() @ p, S + k.T @ v)


def answer_4_1_5(q, k, v, beta, S):
    p = ut_transform(k, beta) @ (v - k @ S)
    S = S + k.T @ p
    return (q @ S + (q @ k.T).tril() @ p, S)


def answer_4_1_6(q, k, v, beta, S):
    p = ut_transform(k, beta).T @ (v - k @ S)
    return (q @ S + (q @ k.T).tril() @ p, S + k.T @ p)


def answer_4_1_7(q, k, v, beta, S):
    p = beta[:, None] * (v - k @ S)
    return (q @ S + (q @ k.T).tril() @ p, S + k.T @ p)


def answer_4_1_8(q, k, v, beta, S):
    p = ut_transform(k, beta) @ (v - k @ S)
    return (q @ S + q @ k.T @ p, S + k.T @ p)


def answer_4_1_9(q, k, v, beta, S):
    T = ut_transform(k, beta)
    p = T @ v + T @ k @ S
    return (q @ S + (q @ k.T).tril() @ p, S + k.T @ p)


def answer_4_1_10(q, k, v, beta, S):
    p = ut_transform(k, beta) @ v - k @ S
    return (q @ S + (q @ k.T).tril() @ p, S + k.T @ p)


# 4.2 -----------------------------------------------------------------------------------------------------
def answer_4_2_1(q, k, beta, i, j):
    x = k[j]
    for t in range(j, i + 1):
        x = x - beta[t] * k[t] * (k[t] @ x)
    return beta[j] * (q[i] @ x)


def answer_4_2_2(q, k, beta, i, j):
    x = k[j]
    for t in range(j + 1, i):
        x = x - beta[t] * k[t] * (k[t] @ x)
    return beta[j] * (q[i] @ x)


def answer_4_2_3(q, k, beta, i, j):
    x = k[j]
    for t in range(i, j, -1):
        x = x - beta[t] * k[t] * (k[t] @ x)
    return beta[j] * (q[i] @ x)


def answer_4_2_4(q, k, beta, i, j):
    x = q[i]
    for t in range(j + 1, i + 1):
        x = x - beta[t] * k[t] * (k[t] @ x)
    return beta[j] * (x @ k[j])


def answer_4_2_5(q, k, beta, i, j):
    x = k[j]
    for t in range(j + 1, i + 1):
        x = x - beta[t] * k[t] * (k[t] @ x)
    return beta[i] * (q[i] @ x)


def answer_4_2_6(q, k, beta, i, j):
    x = k[j]
    for t in range(j + 1, i + 1):
        x = x - beta[t] * k[t] * (k[t] @ x)
    return q[i] @ x


def answer_4_2_7(q, k, beta, i, j):
    x = k[j].clone()
    for t in range(j + 1, i + 1):
        x = x - beta[t] * k[t] * (k[t] @ k[j])
    return beta[j] * (q[i] @ x)


def answer_4_2_8(q, k, beta, i, j):
    M = torch.eye(k.shape[1], dtype=k.dtype)
    for t in range(j + 1, i + 1):
        M = (torch.eye(k.shape[1], dtype=k.dtype) - beta[t] * torch.outer(k[t], k[t])) @ M
    return beta[j] * (q[i] @ M @ k[j])


def answer_4_2_9(q, k, beta, i, j):
    return beta[j] * (q[i] @ k[j])


# 4.3 -----------------------------------------------------------------------------------------------------
def answer_4_3_1(q, k, beta, sequence):
    same = (sequence[:, None] == sequence[None]).to(q.dtype)
    return (q @ k.T).tril() * same @ ut_transform(k, beta)


def answer_4_3_2(q, k, beta, sequence):
    m = sequence[:, None] * sequence[None]
    m = m.to(q.dtype)
    C = len(q)
    B = (k @ k.T).tril(-1) * m
    T = torch.linalg.inv(torch.eye(C, dtype=q.dtype) + beta[:, None] * B) @ torch.diag(beta)
    return (q @ k.T).tril() * m @ T


def answer_4_3_3(q, k, beta, sequence):
    first = torch.cat([torch.zeros(1, dtype=torch.bool), sequence[1:] != sequence[:-1]])
    b = torch.where(first, torch.zeros_like(beta), beta)
    return (q @ k.T).tril() @ ut_transform(k, b)


def answer_4_3_4(q, k, beta, sequence):
    out = []
    for n in (0, 1):
        m = sequence == n
        out.append((q[m] @ k[m].T).tril() @ ut_transform(k[m], beta[m]))
    return out


def answer_4_3_5(q, k, beta, sequence):
    T = ut_transform(k, beta)
    rows = (sequence == 1).to(q.dtype)
    A = (q @ k.T).tril() @ T
    return A * (1 - rows[:, None])


def answer_4_3_6(q, k, beta, sequence):
    same = (sequence[:, None] == sequence[None]).to(q.dtype)
    A = torch.eye(len(k), dtype=q.dtype) + beta[:, None] * (k @ k.T).tril(-1) * same
    return (q @ k.T).tril(-1) * same @ torch.linalg.inv(A) @ torch.diag(beta)


def answer_4_3_7(q, k, beta, sequence):
    out = torch.zeros(len(q), len(q), dtype=q.dtype)
    n = int((sequence == 0).sum())
    out[:n, :n] = (q[:n] @ k[:n].T).tril() @ ut_transform(k[:n], beta[:n])
    out[n:, n:] = q[n:] @ k[n:].T @ ut_transform(k[n:], beta[n:])
    return out


# 4.4 -----------------------------------------------------------------------------------------------------
def answer_4_4_1(k, beta, E, F):
    pseudo = beta[:, None] * E
    dR = beta[:, None] * F
    dB = -(dR @ pseudo.T).tril(-1)
    return (dR, (F * E).sum(1), (dB + dB.T) @ k)


def answer_4_4_2(k, beta, E, F):
    N = scaled_inverse(k, beta)
    Z = F + N @ (beta[:, None] * F)
    dR = beta[:, None] * Z
    dB = -(dR @ (beta[:, None] * E).T).tril(-1)
    return (dR, (Z * E).sum(1), (dB + dB.T) @ k)


def answer_4_4_3(k, beta, E, F):
    N = scaled_inverse(k, beta)
    Z = F + N.T @ (beta[:, None] * F)
    dR = beta[:, None] * Z
    dB = -(dR @ (beta[:, None] * E).T).tril(-1)
    return (dR, (Z * E).sum(1), dB @ k)


def answer_4_4_4(k, beta, E, F):
    T = ut_transform(k, beta)
    dR = T.T @ F
    Z = dR / beta[:, None]
    dB = -(dR @ (beta[:, None] * E).T).tril(-1)
    return (dR, (Z * E).sum(1), (dB + dB.T) @ k)


def answer_4_4_5(k, beta, E, F):
    k, beta = (k.clone().requires_grad_(), beta.clone().requires_grad_())
    with torch.enable_grad():
        D = torch.diag(beta)
        B0 = (k @ k.T).tril(-1)
        R = (E + B0 @ (D @ E)).detach().requires_grad_()
        A = torch.eye(len(k), dtype=k.dtype) + B0 @ D
        V = D @ torch.linalg.solve_triangular(A, R, upper=False)
        dv, db, dk = torch.autograd.grad(V, (R, beta, k), F)
    return (dv, db, dk)


def answer_4_4_6(k, beta, E, F):
    N = scaled_inverse(k, beta)
    Z = F + N.T @ (beta[:, None] * F)
    dB = -(Z @ (beta[:, None] * E).T).tril(-1)
    return (Z, (Z * E).sum(1), (dB + dB.T) @ k)


def answer_4_4_7(k, beta, E, F):
    N = scaled_inverse(k, beta)
    Z = F + N.T @ (beta[:, None] * F)
    dR = beta[:, None] * Z
    dB = (dR @ (beta[:, None] * E).T).tril(-1)
    return (dR, (F * E).sum(1), (dB + dB.T) @ k)


def answer_4_4_8(k, beta, E, F):
    N = scaled_inverse(k, beta)
    Z = F + N.T @ (beta[:, None] * F)
    dR = beta[:, None] * Z
    dB = -(dR @ (beta[:, None] * E).T).tril(-1)
    return (dR, (Z * E).sum(0), (dB + dB.T) @ k)


def answer_4_4_9(k, beta, E, F):
    N = scaled_inverse(k, beta)
    Z = F + N.T @ (beta[:, None] * F)
    dR = beta[:, None] * Z
    dB = (dR @ (beta[:, None] * E).T).tril(-1)
    return (dR, (Z * E).sum(1), (dB + dB.T) @ k)


# 4.5 -----------------------------------------------------------------------------------------------------
def answer_4_5_1(implementation):
    torch.manual_seed(0)
    q, v = (torch.randn(20, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64))
    k, b = (normalize(torch.randn(20, 8, dtype=torch.float64), dim=-1), torch.rand(20, dtype=torch.float64))
    return torch.allclose(implementation(q, k, v, b)[0], recurrent_delta_rule(q, k, v, b)[0])


def answer_4_5_2(implementation):
    torch.manual_seed(0)
    for L in (5, 16, 33):
        for C in (4, 16):
            q, v = (torch.randn(L, 6, dtype=torch.float64), torch.randn(L, 6, dtype=torch.float64))
            k, b = (normalize(torch.randn(L, 6, dtype=torch.float64), dim=-1), torch.rand(L, dtype=torch.float64))
            S = torch.randn(6, 6, dtype=torch.float64)
            a = implementation(q, k, v, b, initial_state=S, chunk_size=C)
            r = recurrent_delta_rule(q, k, v, b, initial_state=S)
            if not all((torch.allclose(x, y) for x, y in zip(a, r))):
                return False
    return True


def answer_4_5_3(implementation):
    torch.manual_seed(0)
    q, v = (torch.randn(2, 33, 6, dtype=torch.float64), torch.randn(2, 33, 5, dtype=torch.float64))
    k, b = (normalize(torch.randn(2, 33, 6, dtype=torch.float64), dim=-1), 2 * torch.rand(2, 33, dtype=torch.float64))
    S = torch.randn(2, 6, 5, dtype=torch.float64)
    a = implementation(q, k, v, b, initial_state=S, chunk_size=8)
    r = recurrent_delta_rule(q, k, v, b, initial_state=S)
    return bool((a[0] - r[0]).abs().mean() < 0.1 and (a[1] - r[1]).abs().mean() < 0.1)


def answer_4_5_4(implementation):
    torch.manual_seed(0)
    d = torch.float64
    q, k, v = (torch.randn(24, 4, dtype=d), normalize(torch.randn(24, 4, dtype=d), dim=-1), torch.randn(24, 5, dtype=d))
    b = torch.rand(24, dtype=d)
    o, _ = implementation(q, k, v, b, chunk_size=8)
    v2 = v.clone()
    v2[20:] = 7
    o2, _ = implementation(q, k, v2, b, chunk_size=8)
    return torch.allclose(o[:20], o2[:20])


def answer_4_5_5(implementation):
    torch.manual_seed(0)
    d = torch.float64
    q, v = (torch.randn(2, 25, 6, dtype=d), torch.randn(2, 25, 4, dtype=d))
    k, b = (normalize(torch.randn(2, 25, 6, dtype=d), dim=-1), torch.rand(2, 25, dtype=d))
    S = torch.randn(2, 6, 4, dtype=d)
    got = implementation(q, k, v, b, initial_state=S, chunk_size=8)
    ref = recurrent_delta_rule(q, k, v, b, initial_state=S)
    return all((abs(float(x.norm() - y.norm())) < 0.5 for x, y in zip(got, ref)))


def answer_4_5_6(implementation):
    torch.manual_seed(0)
    d = torch.float64
    q, v = (torch.randn(2, 16, 6, dtype=d), torch.randn(2, 16, 4, dtype=d))
    k, b = (normalize(torch.randn(2, 16, 6, dtype=d), dim=-1), 2 * torch.rand(2, 16, dtype=d))
    S = torch.randn(2, 6, 4, dtype=d)
    got = implementation(q, k, v, b, initial_state=S, chunk_size=16)
    return all((torch.allclose(x, y) for x, y in zip(got, recurrent_delta_rule(q, k, v, b, initial_state=S))))


# 4.6 -----------------------------------------------------------------------------------------------------
def answer_4_6_1(M, Y, dstate):
    out = [dstate]
    for r in range(len(M) - 1, 0, -1):
        out.insert(0, M[r - 1].T @ out[0] + Y[r - 1])
    return torch.stack(out)


def answer_4_6_2(M, Y, dstate):
    out, g = ([], dstate)
    for r in reversed(range(len(M))):
        g = M[r].T @ g + Y[r]
        out.append(g)
    return torch.stack(out[::-1])


def answer_4_6_3(M, Y, dstate):
    out = torch.zeros_like(Y)
    out[-1] = dstate
    for r in range(len(M) - 1, 0, -1):
        out[r - 1] = M[r] @ out[r] + Y[r]
    return out


def answer_4_6_4(M, Y, dstate):
    out = [dstate]
    for r in range(len(M) - 1, 0, -1):
        out.insert(0, out[0] + Y[r])
    return torch.stack(out)


def answer_4_6_5(M, Y, dstate):
    out = torch.zeros_like(Y)
    out[-1] = dstate + Y[-1]
    for r in range(len(M) - 1, 0, -1):
        out[r - 1] = M[r].T @ out[r] + Y[r]
    return out


def answer_4_6_6(M, Y, dstate):
    out, g = ([], dstate)
    for r in range(len(M)):
        out.append(g)
        g = M[r].T @ g + Y[r]
    return torch.stack(out)


def answer_4_6_7(M, Y, dstate):
    out = [dstate]
    for r in range(len(M) - 1, 0, -1):
        out.append(M[r].T @ out[-1] + Y[r])
    return torch.stack(out)


# 4.7 -----------------------------------------------------------------------------------------------------
def answer_4_7_1(q, k, v, beta, alpha, S):
    b = alpha.log().cumsum(0)
    G = _ratios(alpha)
    B = (k @ k.T * G).tril(-1)
    A = torch.eye(len(k), dtype=q.dtype) + B * beta
    E = torch.linalg.solve_triangular(A, v - k @ S, upper=False)
    W = beta[:, None] * E
    o = b.exp()[:, None] * (q @ S) + (q @ k.T * G).tril() @ W
    return (o, b[-1].exp() * S + (k * (b[-1] - b).exp()[:, None]).T @ W)


def answer_4_7_2(q, k, v, beta, alpha, S):
    b = alpha.log().cumsum(0)
    G = _ratios(alpha)
    A = torch.eye(len(k), dtype=q.dtype) + (k @ k.T).tril(-1) * beta
    E = torch.linalg.solve_triangular(A, v - b.exp()[:, None] * (k @ S), upper=False)
    W = beta[:, None] * E
    o = b.exp()[:, None] * (q @ S) + (q @ k.T * G).tril() @ W
    return (o, b[-1].exp() * S + (k * (b[-1] - b).exp()[:, None]).T @ W)


def answer_4_7_3(q, k, v, beta, alpha, S):
    g = alpha.cumprod(0)
    T = ut_transform(k, beta)
    U = T @ (v / g[:, None] - k @ S)
    o = g[:, None] * (q @ S + (q @ k.T).tril() @ U)
    return (o, g[-1] * (S + k.T @ U))


def answer_4_7_4(q, k, v, beta, alpha, S):
    p = ut_transform(k, beta * alpha) @ (v - k @ S)
    return (q @ S + (q @ k.T).tril() @ p, S + k.T @ p)


def answer_4_7_5(q, k, v, beta, alpha, S):
    b = alpha.log().cumsum(0)
    G = (b[:, None] - b[None]).tril().exp().tril()
    A = torch.eye(len(k), dtype=q.dtype) + (k @ k.T * G).tril(-1) * beta
    W = beta[:, None] * torch.linalg.solve_triangular(A, v - b.exp()[:, None] * (k @ S), upper=False)
    return (b.exp()[:, None] * (q @ S) + (q @ k.T * G).tril() @ W, b[-1].exp() * S + k.T @ W)


def answer_4_7_6(q, k, v, beta, alpha, S):
    b = alpha.log().cumsum(0)
    G = (b[:, None] - b[None]).tril().exp().tril()
    A = torch.eye(len(k), dtype=q.dtype) + (k @ k.T * G).tril(-1) * beta
    W = beta[:, None] * torch.linalg.solve_triangular(A, v - b.exp()[:, None] * (k @ S), upper=False)
    return (q @ S + (q @ k.T * G).tril() @ W, b[-1].exp() * S + (k * (b[-1] - b).exp()[:, None]).T @ W)


ANSWERS = {
    "4.1": [
        Answer(
            "pseudo-values U = TV only: what the state already answers is not subtracted",
            answer_4_1_1,
            "already returns",
        ),
        Answer("multiplies T with beta v: beta twice", answer_4_1_2, "twice"),
        Answer("a loop over tokens", answer_4_1_3, "token by token"),
        Answer("the outputs get the corrected values, the state the plain v", answer_4_1_4, "made from V as it was"),
        Answer("outputs read the new state as well as the scores", answer_4_1_5, "leaves the chunk"),
        Answer("T transposed", answer_4_1_6, "transposed"),
        Answer("beta in place of T: all errors against the first state", answer_4_1_7, "All errors"),
        Answer("mask left out in the output", answer_4_1_8, "mask"),
    ],
    "4.2": [
        Answer("token j's own H is in the product too", answer_4_2_1, "erases its own"),
        Answer("stops before token i: H_i is left out", answer_4_2_2, "last erasing step"),
        Answer("latest factor acts first", answer_4_2_3, "wrong order"),
        Answer(
            "takes the query through the steps in the order of time, not the key: H_{j+1} acts on q first",
            answer_4_2_4,
            "wrong order",
        ),
        Answer("beta of the reader in place of the writer", answer_4_2_5, "reader"),
        Answer("forgets beta_j in front", answer_4_2_6, "beta_j"),
        Answer("adds up the erasures instead of chaining them", answer_4_2_7, "as it was"),
    ],
    "4.3": [
        Answer("masks the scores only, T still mixes the documents", answer_4_3_1, "reaches the second"),
        Answer("masks with the document number itself: document 0 disappears", answer_4_3_2, "document 0"),
        Answer(
            "sets beta to zero at the first token of the second document, hoping that it clears",
            answer_4_3_3,
            "does not empty",
        ),
        Answer(
            "cuts into the two documents and returns the two maps side by side as a list", answer_4_3_4, "block_diag"
        ),
        Answer("masks T after the inverse by the query's document only (rows of the second)", answer_4_3_5, NOT_NAMED),
    ],
    "4.4": [
        Answer("F taken for the total derivative: the system is left out", answer_4_4_1, "system is missing"),
        Answer("the forward system instead of its transpose", answer_4_4_2, "forward direction"),
        Answer("dK from B takes one of the two places only", answer_4_4_3, "Only one of the two"),
        Answer("dbeta by dividing dR by beta", answer_4_4_4, "divided by beta"),
        Answer("differentiates by autograd", answer_4_4_5, "autograd"),
        Answer("Z returned for dv: the beta between dZ and dR forgotten", answer_4_4_6, NOT_NAMED),
        Answer("dbeta from the given F: direct effect alone", answer_4_4_7, "own pseudo-value"),
    ],
    "4.5": [
        Answer("compares outputs only, default chunk, one short sequence", answer_4_5_1, "initial state is ignored"),
        Answer("chunks and states varied, but no leading dimension, d_k = d_v", answer_4_5_2, "betas of the first"),
        Answer("a tolerance far too wide: mean error below one tenth", answer_4_5_3, "bfloat16"),
        Answer("causality and one state, no reference", answer_4_5_4, "initial state is ignored"),
        Answer("compares norms of outputs and states", answer_4_5_5, "betas of the first"),
    ],
    "4.6": [
        Answer("uses M_{r-1} and Y_{r-1} to go from dS'_r to dS'_{r-1}", answer_4_6_1, "off by one"),
        Answer("returns the gradients of the states that enter: one step too far", answer_4_6_2, "enters the stretch"),
        Answer("M without the transpose", answer_4_6_3, "not transposed"),
        Answer(
            "sums the Y and multiplies once: dS' of stretch r is dstate plus all later Y, no M between",
            answer_4_6_4,
            "summed",
        ),
        Answer("starts from dstate plus Y of the last stretch", answer_4_6_5, NOT_NAMED),
        Answer("walks to the right: the recursion of states", answer_4_6_6, "forward in time"),
    ],
    "4.7": [
        Answer("the error is taken against S without the fade of token i: R = V - K S", answer_4_7_1, "as it entered"),
        Answer(
            "B without the ratios: writes within the chunk do not fade before they are asked",
            answer_4_7_2,
            "do not decay",
        ),
        Answer("divides by gamma: K / gamma, which overflows", answer_4_7_3, "underflow"),
        Answer(
            "alphas multiply beta in T, i.e. gate taken for a smaller write strength", answer_4_7_4, "multiplies beta"
        ),
        Answer("the writes reach the chunk's end unfaded", answer_4_7_5, "not decayed"),
    ],
}

HELD_OUT = {
    "4.1": [
        Answer("the sign: U + W S", answer_4_1_9, "sign"),
        Answer("subtracts K S from the values but forgets T for it: T V - K S", answer_4_1_10, "K S stands"),
    ],
    "4.2": [
        Answer("builds the H matrices", answer_4_2_8, "d_k x d_k"),
        Answer("no steps between at all: beta_j q_i.k_j, linear attention's entry", answer_4_2_9, "Nothing is erased"),
    ],
    "4.3": [
        Answer("masks both, but with the strict triangle in the scores", answer_4_3_6, "diagonal"),
        Answer(
            "both documents start at zero of their own, but second block written to the wrong place (flipped)",
            answer_4_3_7,
            NOT_NAMED,
        ),
    ],
    "4.4": [
        Answer("dbeta sums over tokens instead of value dimensions", answer_4_4_8, "axes"),
        Answer("the gradient of B without the minus", answer_4_4_9, "sign"),
    ],
    "4.5": [
        Answer("one chunk only: chunk_size as long as the sequence", answer_4_5_6, "chunk but the last"),
    ],
    "4.6": [
        Answer("returns the list from last to first", answer_4_6_7, "reversed"),
    ],
    "4.7": [
        Answer("the entering state is read without its fading in the outputs", answer_4_7_6, NOT_NAMED),
    ],
}
