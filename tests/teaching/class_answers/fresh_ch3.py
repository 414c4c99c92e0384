"""Wrong answers to the exercises of chapter 3, written from the book alone, before the judge had been looked at."""
# As a class writes, and kept so.
# ruff: noqa: E741, F841

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize

from dn_lib.forms import householder as hh
from dn_lib.forms.delta_rule import recurrent_delta_rule

from . import NOT_NAMED, Answer


# 3.1 -----------------------------------------------------------------------------------------------------
def answer_3_1_1(a, b):
    k = (a + b) / (a + b).norm()
    return torch.eye(len(a), dtype=a.dtype) - 2 * torch.outer(k, k)


def answer_3_1_2(a, b):
    k = b - a
    return torch.eye(len(a), dtype=a.dtype) - 2 * torch.outer(k, k)


def answer_3_1_3(a, b):
    k = (b - a) / (b - a).norm()
    return torch.eye(len(a), dtype=a.dtype) - torch.outer(k, k)


def answer_3_1_4(a, b):
    k = (b - a) / a.norm()
    return torch.eye(len(a), dtype=a.dtype) - 2 * torch.outer(k, k)


def answer_3_1_5(a, b):
    return torch.eye(len(a), dtype=a.dtype) + torch.outer(b - a, a) / (a @ a)


def answer_3_1_6(a, b):
    return (b - a) / (b - a).norm()


def answer_3_1_7(a, b):
    k = (b - a) / (b - a).norm()
    return torch.eye(len(a), dtype=a.dtype) + 2 * torch.outer(k, k)


def answer_3_1_8(a, b):
    k = a / a.norm()
    return torch.eye(len(a), dtype=a.dtype) - 2 * torch.outer(k, k)


def answer_3_1_9(a, b):
    k = (b - a) / (b - a).norm()
    return torch.eye(len(a), dtype=a.dtype) - 2 * k * k


# 3.2 -----------------------------------------------------------------------------------------------------
def answer_3_2_1(theta):
    I = torch.eye(2, dtype=torch.float64)
    k1 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    k2 = torch.stack([theta.cos(), theta.sin()]).double()
    return (I - 2 * torch.outer(k2, k2)) @ (I - 2 * torch.outer(k1, k1))


def answer_3_2_2(theta):
    I = torch.eye(2, dtype=torch.float64)
    k1 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    k2 = torch.stack([(theta / 2).cos(), (theta / 2).sin()]).double()
    return (I - 2 * torch.outer(k1, k1)) @ (I - 2 * torch.outer(k2, k2))


def answer_3_2_3(theta):
    c, s = (torch.cos(theta), torch.sin(theta))
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])]).double()


def answer_3_2_4(theta):
    I = torch.eye(2, dtype=torch.float64)
    k1 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    k2 = torch.stack([(theta / 2).cos(), (theta / 2).sin()]).double()
    return (I - torch.outer(k2, k2)) @ (I - torch.outer(k1, k1))


def answer_3_2_5(theta):

    def H(x):
        k = torch.stack([torch.cos(x), torch.sin(x)])
        return torch.eye(2, dtype=torch.float64) - 2 * torch.outer(k, k)

    zero = torch.zeros((), dtype=torch.float64)
    return H(theta / 2 + math.pi / 2) @ H(zero)


def answer_3_2_6(theta):
    k = torch.stack([torch.cos(theta / 2), torch.sin(theta / 2)])
    return torch.eye(2, dtype=torch.float64) - 2 * torch.outer(k, k)


def answer_3_2_7(theta):
    t = torch.deg2rad(theta) / 2
    k1 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    k2 = torch.stack([t.cos(), t.sin()])
    I = torch.eye(2, dtype=torch.float64)
    return (I - 2 * torch.outer(k2, k2)) @ (I - 2 * torch.outer(k1, k1))


# 3.3 -----------------------------------------------------------------------------------------------------
def answer_3_3_1(k, w):
    return torch.eye(k.shape[1], dtype=k.dtype) - k.T @ w


def answer_3_3_2(k, w):
    return torch.eye(len(k), dtype=k.dtype) - w @ k.T


def answer_3_3_3(k, w):
    return torch.eye(k.shape[1], dtype=k.dtype) + w.T @ k


def answer_3_3_4(k, w):
    return torch.linalg.inv(torch.eye(k.shape[1], dtype=k.dtype) - k.T @ w)


def answer_3_3_5(k, w):
    return torch.eye(k.shape[1], dtype=k.dtype) - k.T @ w


def answer_3_3_6(k, w):
    return -w.T @ k


# 3.4 -----------------------------------------------------------------------------------------------------
def answer_3_4_1(length):
    return length * (length - 1) * (2 * length - 1) // 6


def answer_3_4_2(length):
    return length * (length - 1) * (2 * length - 1) // 12


def answer_3_4_3(length):
    return length * (length - 1) // 2


def answer_3_4_4(length):
    return sum((length - g) * (g + 1) for g in range(1, length))


def answer_3_4_5(length):
    return length * (length - 1) * (length + 1) // 6 + length


def answer_3_4_6(length):
    return (length**3 - length) / 6


def answer_3_4_7(length):
    return length**3 // 3


# 3.5 -----------------------------------------------------------------------------------------------------
def answer_3_5_1(k, beta):
    L = len(k)
    B = (k @ k.T).tril()
    T = torch.zeros(L, L, dtype=k.dtype)
    for i in range(L):
        row = torch.zeros(L, dtype=k.dtype)
        row[i] = 1
        for j in range(i + 1):
            row = row - B[i, j] * T[j] if j < i else row / (1 + beta[i] * B[i, i])
        T[i] = beta[i] * row
    return T


def answer_3_5_2(k, beta):
    L = len(k)
    B = (k @ k.T).tril(-1)
    T = torch.zeros(L, L, dtype=k.dtype)
    for i in range(L):
        T[i] = -B[i, :i] @ T[:i]
        T[i, i] = beta[i]
    return T


def answer_3_5_3(k, beta):
    D = torch.diag(beta)
    A = torch.eye(len(k), dtype=k.dtype) + (D @ k @ k.T).tril(-1)
    return torch.linalg.solve_triangular(A, D, upper=False)


def answer_3_5_4(k, beta):
    L = len(k)
    G = k @ k.T
    T = torch.zeros(L, L, dtype=k.dtype)
    for i in range(L):
        T[i] = -beta[i] * (G[i] @ T)
        T[i, i] = T[i, i] + beta[i]
        T[i] = T[i] / 1.0
        T[i] = T[i] * (torch.arange(L) < i) + beta[i] * (torch.arange(L) == i) * 1.0
        T[i, :i] = T[i, :i] * beta[:i]
    return T


def answer_3_5_5(k, beta):
    L = len(k)
    T = torch.zeros(L, L)
    B = (k @ k.T).float()
    for i in range(L):
        T[i, i] = beta[i]
        T[i, :i] = -beta[i].float() * (B[i, :i] @ T[:i, :i])
    return T


def answer_3_5_6(k, beta):
    L = len(k)
    T = torch.zeros(L, L, dtype=k.dtype)
    for i in range(L):
        T[i] = -(k[:i] @ k[i] * beta[:i]) @ T[:i]
        T[i, i] = beta[i]
    return T


def answer_3_5_7(k, beta):
    L = len(k)
    T = torch.diag(beta)
    for i in range(1, L):
        T[i, i - 1] = -beta[i] * (k[i] @ k[i - 1]) * beta[i - 1]
    return T


def answer_3_5_8(k, beta):
    L = len(k)
    T = torch.zeros(L, L, dtype=k.dtype)
    for i in range(L):
        e = torch.zeros(L, dtype=k.dtype)
        e[i] = 1
        T[i] = beta[i] * (e + k[:i] @ k[i] @ T[:i])
    return T


# 3.6 -----------------------------------------------------------------------------------------------------
def answer_3_6_1(N11, N22, B21, beta1, beta2):
    return -(N22 * beta2) @ B21 @ (beta1[:, None] * N11)


def answer_3_6_2(N11, N22, B21, beta1, beta2):
    X = B21 + beta2[:, None] * N22 @ B21
    return -(X + X @ (beta1[:, None] * N11))


def answer_3_6_3(N11, N22, B21, beta1, beta2):
    return -N22 @ B21 @ N11


def answer_3_6_4(N11, N22, B21, beta1, beta2):
    return -(B21 + N22 * beta2 @ B21 + B21 * beta1 @ N11)


def answer_3_6_5(N11, N22, B21, beta1, beta2):
    X = B21 + N22 * beta2 @ B21
    return -(X + X @ N11 * beta1)


def answer_3_6_6(N11, N22, B21, beta1, beta2):
    return -(B21 + N22 * beta2 @ B21)


# 3.7 -----------------------------------------------------------------------------------------------------
def answer_3_7_1(implementation):
    torch.manual_seed(0)
    k = normalize(torch.randn(8, 5, dtype=torch.float64), dim=-1)
    beta = 0.1 + torch.rand(8, dtype=torch.float64)
    T = implementation(k, beta)
    R = (torch.diag(1 / beta) + (k @ k.T).tril(-1)) @ T - torch.eye(8, dtype=torch.float64)
    return bool(R.abs().max() < 1e-10)


def answer_3_7_2(implementation):
    k = torch.randn(6, 4, dtype=torch.float64)
    beta = 2 * torch.rand(6, dtype=torch.float64)
    T = implementation(k, beta)
    return torch.allclose(T, T.tril()) and torch.allclose(T.diagonal(), beta)


def answer_3_7_3(implementation):
    ok = True
    for L in (1, 2, 7, 16):
        for top in (0.0, 1.0, 2.0):
            k = normalize(torch.randn(L, 5, dtype=torch.float64), dim=-1) * (
                0.8 + 0.4 * torch.rand(L, 1, dtype=torch.float64)
            )
            beta = top * torch.rand(L, dtype=torch.float64)
            T = implementation(k, beta)
            ok = ok and T.shape == (L, L) and bool((T - hh.ut_transform(k, beta)).norm() <= 1e-08)
    return ok


def answer_3_7_4(implementation):
    torch.manual_seed(0)
    for beta in (torch.rand(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)):
        k = normalize(torch.randn(9, 4, dtype=torch.float64), dim=-1)
        D = torch.diag(beta)
        R = (torch.eye(9, dtype=torch.float64) + D @ (k @ k.T).tril(-1)) @ implementation(k, beta) - D
        if R.abs().max() > 1e-09:
            return False
    return True


def answer_3_7_5(implementation):
    torch.manual_seed(3)
    k = torch.randn(5, 3, dtype=torch.float64)
    beta = torch.ones(5, dtype=torch.float64)
    T = implementation(k, beta)
    return bool(
        ((torch.eye(5, dtype=torch.float64) + (k @ k.T).tril(-1)) @ T - torch.eye(5, dtype=torch.float64)).norm()
        < 1e-06
    )


def answer_3_7_6(implementation):
    k = torch.randn(5, 3, dtype=torch.float64)
    T = implementation(k, torch.ones(5, dtype=torch.float64))
    ok = torch.allclose(T, T.tril())


# 3.8 -----------------------------------------------------------------------------------------------------
def answer_3_8_1(q, k, v, beta):
    L, n, d = k.shape
    qq = q.repeat_interleave(n, 0)
    o, _ = recurrent_delta_rule(qq, k.reshape(L * n, d), v.reshape(L * n, -1), beta.reshape(-1), scale=1.0)
    return o[::n]


def answer_3_8_2(q, k, v, beta):
    L, n, d = k.shape
    kk = k.transpose(0, 1).reshape(L * n, d)
    vv = v.transpose(0, 1).reshape(L * n, -1)
    bb = beta.T.reshape(-1)
    qq = q.repeat(n, 1)
    o, _ = recurrent_delta_rule(qq, kk, vv, bb, scale=1.0)
    return o[-L:]


def answer_3_8_3(q, k, v, beta):
    L, n, d = k.shape
    o, _ = recurrent_delta_rule(
        q.repeat_interleave(n, 0), k.reshape(L * n, d), v.reshape(L * n, -1), beta.reshape(-1), scale=1.0
    )
    return o.view(L, n, -1).mean(1)


def answer_3_8_4(q, k, v, beta):
    S, o = (v.new_zeros(k.shape[-1], v.shape[-1]), [])
    for t in range(len(q)):
        for j in range(k.shape[1]):
            S = S + beta[t, j] * torch.outer(k[t, j], v[t, j] - k[t, j] @ S)
        o.append(q[t] @ S)
    return torch.stack(o)


def answer_3_8_5(q, k, v, beta):
    L, n, d = k.shape
    o, _ = recurrent_delta_rule(
        q.repeat_interleave(n, 0), k.reshape(L * n, d), v.reshape(L * n, -1), beta.reshape(-1), scale=1.0
    )
    return o.view(L, n, -1).sum(1)


def answer_3_8_6(q, k, v, beta):
    L, n, d = k.shape
    qq = torch.zeros(L, n, d, dtype=q.dtype)
    qq[:, 0] = q
    o, _ = recurrent_delta_rule(qq.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), beta.flatten(), scale=1.0)
    return o.view(L, n, -1)[:, -1]


ANSWERS = {
    "3.1": [
        Answer("the key is along the sum a + b, the mirror itself", answer_3_1_1, "a to -b"),
        Answer("k = b - a is not made a unit vector", answer_3_1_2, "not a unit vector"),
        Answer("forgets the 2: the projection that takes the difference away", answer_3_1_3, "project"),
        Answer("normalises the difference by the length of a", answer_3_1_4, "length of a"),
        Answer(
            "a matrix that carries a to b, but no reflection: I + (b - a) a^T / |a|^2", answer_3_1_5, "not symmetric"
        ),
        Answer("returns the key, not the matrix", answer_3_1_6, "axes"),
        Answer("plus in place of minus", answer_3_1_7, "wrong sign"),
    ],
    "3.2": [
        Answer("angle between the keys is theta, not half of it", answer_3_2_1, "2 theta"),
        Answer("the product in the order H_1 H_2: rotates clockwise", answer_3_2_2, "clockwise"),
        Answer("writes the rotation matrix down", answer_3_2_3, "written down"),
        Answer("both reflections with beta 1: the projections multiplied", answer_3_2_4, "project"),
        Answer("second key at 90 degrees plus half the angle: turns by theta + 180", answer_3_2_5, "wrong sign"),
        Answer("returns only the second reflection", answer_3_2_6, "one reflection"),
    ],
    "3.3": [
        Answer("I - K^T W, the order for the state on the right", answer_3_3_1, "newest factor"),
        Answer(
            "transposes K and W one by one, I - W K^T: an L x L matrix, which fits only when L = d",
            answer_3_3_2,
            "axes",
        ),
        Answer("I + W^T K, the sign", answer_3_3_3, "sign"),
        Answer("the inverse in place of the transpose", answer_3_3_4, "inverse"),
    ],
    "3.4": [
        Answer("the full rectangle, with the zeros: formula of the text", answer_3_4_1, "zeros above"),
        Answer("half of the text's formula", answer_3_4_2, "halve"),
        Answer("counts entries below the diagonal, not products", answer_3_4_3, "one right-hand side"),
        Answer("lets m run to i: sum over g of (C - g)(g + 1)", answer_3_4_4, "one product too many"),
        Answer("counts the diagonal entries as well, each one product", answer_3_4_5, "by length"),
    ],
    "3.5": [
        Answer("includes |k_i|^2 on the diagonal: sum over j <= i with tril(0)", answer_3_5_1, "diagonal"),
        Answer("only the diagonal gets beta, the rest of the row does not", answer_3_5_2, "scales your diagonal"),
        Answer("solves the triangular system with torch", answer_3_5_3, "solver"),
        Answer("uses keys' products from above the diagonal too: all j except i", answer_3_5_4, NOT_NAMED),
        Answer("float32 by the default of torch.zeros", answer_3_5_5, "float32"),
        Answer("beta of the column token: T[i] = -(beta_j k_i.k_j) T[j]", answer_3_5_6, "beta_j"),
        Answer("only the row directly above and its product: bidiagonal", answer_3_5_7, NOT_NAMED),
    ],
    "3.6": [
        Answer(
            "forgets the paths that begin or end at the cut: N22 D2 B21 D1 N11 without the identities",
            answer_3_6_1,
            "identity is missing",
        ),
        Answer("betas scale the wrong side: rows instead of columns of N22", answer_3_6_2, "wrong side"),
        Answer(
            "the merge of T without the minus's betas: -N22 B21 N11 as for the inverse",
            answer_3_6_3,
            "does not depend on `beta1`",
        ),
        Answer(
            "the second product takes B21 again and adds: -(B + N22 D2 B + B D1 N11), the corner term lost",
            answer_3_6_4,
            "through both",
        ),
        Answer("D1 and D2 exchanged", answer_3_6_5, "wrong side"),
    ],
    "3.7": [
        Answer(
            "betas away from zero and unit keys, one length, residual of T^-1 = 1/beta + tril",
            answer_3_7_1,
            "divided by beta",
        ),
        Answer("only shape and triangularity and the diagonal", answer_3_7_2, "T is diagonal"),
        Answer("compares with the library's ut_transform", answer_3_7_3, "computes T itself"),
        Answer(
            "residual of (I + DB) T = D, but with unit keys of one length and NaN passing", answer_3_7_4, "normalised"
        ),
        Answer(
            "checks T^-1's lower triangle with one random draw and beta near 1, exact shape",
            answer_3_7_5,
            "beta is cut off",
        ),
    ],
    "3.8": [
        Answer(
            "keeps the first output of each token's steps instead of the last", answer_3_8_1, "after the first step"
        ),
        Answer(
            "lays the steps out step-major: all first steps of all tokens, then all second steps",
            answer_3_8_2,
            "first step, then all",
        ),
        Answer("reads the mean of the n outputs of a token", answer_3_8_3, "mean"),
        Answer("a recurrence of one's own", answer_3_8_4, "never calls"),
        Answer("asks the query at every step but sums the n answers", answer_3_8_5, "sum what"),
    ],
}

HELD_OUT = {
    "3.1": [
        Answer("a key along a: turns a itself round", answer_3_1_8, "along a"),
        Answer(
            "key from b - a with single entries: elementwise product in place of the outer product",
            answer_3_1_9,
            NOT_NAMED,
        ),
    ],
    "3.2": [
        Answer("degrees and radians: converts theta", answer_3_2_7, "degrees"),
    ],
    "3.3": [
        Answer("I - K^T W, transposed wrongly back to I - (W^T)^T... the newest-left product", answer_3_3_5, "newest"),
        Answer("only the sum, without the identity", answer_3_3_6, "identity is missing"),
    ],
    "3.4": [
        Answer("returns the formula as a float by true division", answer_3_4_6, "float"),
        Answer("C^3/3 rounded", answer_3_4_7, "leading term"),
    ],
    "3.5": [
        Answer("the sum over rows above uses the transposed inner products' sign: plus", answer_3_5_8, "sign"),
    ],
    "3.6": [
        Answer("one bracket only: -(I + N22 D2) B21", answer_3_6_6, "right is missing"),
    ],
    "3.7": [
        Answer("prints and returns nothing", answer_3_7_6, "returns None"),
    ],
    "3.8": [
        Answer(
            "zero queries at the other steps, but the sum over n taken of the wrong axis: query at the first step",
            answer_3_8_6,
            NOT_NAMED,
        ),
    ],
}
