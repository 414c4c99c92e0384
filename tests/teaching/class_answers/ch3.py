"""Wrong answers to the exercises of chapter 3."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize

from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import ut_transform

from . import Answer


def eye(n):
    return torch.eye(n, dtype=torch.float64)


# 3.1 and 3.2 ---------------------------------------------------------------------------------------------
def reflect(k, factor=2.0):
    return eye(len(k)) - factor * torch.outer(k, k)


def unit(angle):
    return torch.stack([angle.cos(), angle.sin()])


def rotate(first, second, factor=2.0):
    return reflect(unit(second), factor) @ reflect(unit(first), factor)


def written_down(theta):
    c, s = theta.cos(), theta.sin()
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])


# 3.5 -----------------------------------------------------------------------------------------------------
def rows(k, beta, gram=None, start=None, end=lambda i, row: row, sign=-1.0, previous=True):
    A = beta[:, None] * (k @ k.T) if gram is None else gram
    T = torch.zeros(len(k), len(k), dtype=k.dtype)
    for i in range(len(k)):
        row = start(i) if start else beta[i] * eye(len(k))[i]
        if previous:
            row = row + sign * A[i, :i] @ T[:i]
        T[i] = end(i, row)
    return T


def by_inverse(k, beta):
    A = (beta[:, None] * (k @ k.T)).tril(-1)
    return torch.linalg.inv(eye(len(k)) + A) * beta


def by_reciprocal(k, beta):
    """T in the units of (I + A)^-1 and back again."""
    T = rows(k, beta)
    return T / beta[:, None] * beta[:, None]


def by_reciprocal_rows(k, beta):
    """Substitution in the compact form, whose diagonal is 1 / beta: right for beta = 0 as well, by luck."""
    inverse, done = torch.diag(1 / beta) + (k @ k.T).tril(-1), []
    for i in range(len(k)):
        row = eye(len(k))[i]
        done.append((row - inverse[i, :i] @ torch.stack(done) if done else row) / inverse[i, i])
    return torch.stack(done)


def by_powers(k, beta):
    N = -(beta[:, None] * (k @ k.T)).tril(-1)
    total = power = eye(len(k))
    for _ in range(len(k)):
        power = power @ N
        total = total + power
    return total * beta


# 3.6 -----------------------------------------------------------------------------------------------------
def merged(left=True, right=True, sign=-1.0, betas=True, swapped=False):
    def answer(N11, N22, L21, beta1, beta2):
        D1, D2 = torch.diag(beta1), torch.diag(beta2)
        if not betas:
            D1, D2 = torch.eye(len(beta1), dtype=D1.dtype), torch.eye(len(beta2), dtype=D2.dtype)
        X = N22 @ D2 if not swapped else D2 @ N22
        Y = D1 @ N11 if not swapped else N11 @ D1
        a = eye(len(beta2)) + X if left else eye(len(beta2))
        b = eye(len(beta1)) + Y if right else eye(len(beta1))
        return sign * a @ L21 @ b

    return answer


# 3.7 -----------------------------------------------------------------------------------------------------
def compared_with_the_library(implementation):
    generator = torch.Generator().manual_seed(0)
    for length, top in ((1, 2.0), (7, 2.0), (12, 0.0), (12, 2.0)):
        k = torch.randn(length, 8, generator=generator, dtype=torch.float64) / 3
        beta = top * torch.rand(length, generator=generator, dtype=torch.float64)
        if not (implementation(k, beta) - ut_transform(k, beta)).abs().max() <= 1e-9:
            return False
    return True


def residual_test(
    length=12, zero=True, large=True, unit=False, ones=False, tolerance=1e-9, nan_safe=True, shape="system"
):
    def accepts(implementation):
        generator = torch.Generator().manual_seed(0)
        k = torch.randn(length, 8, generator=generator, dtype=torch.float64) / 3
        k = normalize(k, dim=1) if unit else k
        beta = 2 * torch.rand(length, generator=generator, dtype=torch.float64)
        beta[0], beta[-1] = (1.9 if large else 0.5), (0.0 if zero else 0.5)
        beta = beta if large else beta.clamp(max=1.0)
        beta = torch.ones_like(beta) if ones else beta
        T = implementation(k, beta)
        if shape == "triangle":
            return torch.equal(T, T.tril())
        left = T + (beta[:, None] * (k @ k.T)).tril(-1) @ T - torch.diag(beta)
        worst = left.abs().max()
        return bool(worst <= tolerance) if nan_safe else not bool(worst > tolerance)

    return accepts


def diagonal_is_beta(implementation):
    k, beta = normalize(torch.randn(5, 4, dtype=torch.float64), dim=1), torch.rand(5, dtype=torch.float64)
    return torch.allclose(implementation(k, beta).diagonal(), beta)


def orthogonal_keys(implementation):
    beta = torch.rand(5, dtype=torch.float64)
    return torch.allclose(implementation(eye(5), beta), torch.diag(beta))


# 3.8 -----------------------------------------------------------------------------------------------------
def several(keep=-1, flip=False, scale=1.0, order="time"):
    def answer(q, k, v, beta):
        n, L = k.shape[1], len(q)
        if flip:
            k, v, beta = k.flip(1), v.flip(1), beta.flip(1)
        if order == "step":
            k, v, beta = k.transpose(0, 1), v.transpose(0, 1), beta.T
        o, _ = recurrent_delta_rule(
            q.repeat_interleave(n, 0), k.reshape(n * L, -1), v.reshape(n * L, -1), beta.reshape(-1), scale=scale
        )
        return o.view(L, n, -1)[:, keep]

    return answer


def repeated_queries(q, k, v, beta):
    n = k.shape[1]
    o, _ = recurrent_delta_rule(q.repeat(n, 1), k.flatten(0, 1), v.flatten(0, 1), beta.flatten(), scale=1.0)
    return o[n - 1 :: n]


def own_recurrence(q, k, v, beta):
    S, o = torch.zeros(k.shape[-1], v.shape[-1], dtype=k.dtype), []
    for t in range(len(q)):
        for s in range(k.shape[1]):
            S = S + beta[t, s] * torch.outer(k[t, s], v[t, s] - k[t, s] @ S)
        o.append(q[t] @ S)
    return torch.stack(o)


def all_outputs(q, k, v, beta):
    n = k.shape[1]
    return recurrent_delta_rule(q.repeat_interleave(n, 0), k.flatten(0, 1), v.flatten(0, 1), beta.flatten(), scale=1.0)[
        0
    ]


def averaged(q, k, v, beta):
    return all_outputs(q, k, v, beta).unflatten(0, (len(q), -1)).mean(1)


def same_state(q, k, v, beta):
    S, o = torch.zeros(k.shape[-1], v.shape[-1], dtype=k.dtype), []
    for t in range(len(q)):
        S = S + k[t].T @ (beta[t][:, None] * (v[t] - k[t] @ S))
        o.append(q[t] @ S)
    return torch.stack(o)


def summed(q, k, v, beta):
    return recurrent_delta_rule(q, k.sum(1), v.sum(1), beta.sum(1), scale=1.0)[0]


ANSWERS = {
    "3.1": [
        Answer("a + b", lambda a, b: reflect(normalize(a + b, dim=0)), "-b"),
        Answer("not normalised", lambda a, b: reflect(a - b), "unit vector"),
        Answer("projection", lambda a, b: reflect(normalize(a - b, dim=0), 1.0), "project"),
        Answer("rank one", lambda a, b: torch.outer(b, a) / (a @ a), "rank"),
        Answer("2 k k^T - I", lambda a, b: -reflect(normalize(a - b, dim=0)), "sign|2 k k"),
        Answer("key is a", lambda a, b: reflect(normalize(a, dim=0)), "along a|turns a"),
        Answer("key is b", lambda a, b: reflect(normalize(b, dim=0)), "along b|key is b"),
        Answer("the key itself", lambda a, b: normalize(a - b, dim=0), "matrix|the key"),
        Answer("norm, not squared", lambda a, b: eye(len(a)) - 2 * torch.outer(a - b, a - b) / (a - b).norm(), "unit"),
        Answer("forgot the 2", lambda a, b: eye(len(a)) - torch.outer(a - b, a - b) / ((a - b) @ (a - b)), "project"),
    ],
    "3.2": [
        Answer("angle theta", lambda t: rotate(0 * t, t), "2 theta"),
        Answer("clockwise", lambda t: rotate(t / 2, 0 * t), "clockwise"),
        Answer("one reflection", lambda t: reflect(unit(t / 2 + math.pi / 2)), "one reflection"),
        Answer("written down", written_down, "written down|no reflection"),
        Answer("beta one", lambda t: rotate(0 * t, t / 2, 1.0), "project"),
        Answer("quarter", lambda t: rotate(0 * t, t / 4), "half|theta / 2"),
        Answer("transposed", lambda t: written_down(t).T, "clockwise"),
        Answer("degrees", lambda t: rotate(0 * t, torch.deg2rad(t) / 2), "degree"),
        Answer("sum", lambda t: reflect(unit(0 * t)) + reflect(unit(t / 2)), "sum|product"),
    ],
    "3.3": [
        Answer("newest on the left", lambda k, w: eye(k.shape[1]) - k.T @ w, "newest"),
        Answer("plus", lambda k, w: eye(k.shape[1]) + w.T @ k, "sign"),
        Answer("inverse", lambda k, w: torch.linalg.inv(eye(k.shape[1]) - k.T @ w), "inverse"),
        Answer("k^T k", lambda k, w: eye(k.shape[1]) - k.T @ k, "w"),
        Answer("w^T w", lambda k, w: eye(k.shape[1]) - w.T @ w, "k"),
        Answer("L x L", lambda k, w: eye(len(k)) - w @ k.T, "shape"),
        Answer("no identity", lambda k, w: -w.T @ k, "identity"),
        Answer("identity forgotten and sign", lambda k, w: w.T @ k, "identity"),
        Answer("both flipped", lambda k, w: eye(k.shape[1]) - k.flip(0).T @ w, "revers|flip|partner|same token"),
        Answer("twice", lambda k, w: eye(k.shape[1]) - 2 * w.T @ k, "2|twice"),
    ],
    "3.4": [
        Answer("one column", lambda n: n * (n - 1) // 2, "one right-hand side"),
        Answer("zeros counted", lambda n: n * (n - 1) * (2 * n - 1) // 6, "zeros"),
        Answer("cube", lambda n: n**3, "full matrices"),
        Answer("one too many", lambda n: n * (n + 1) * (n + 2) // 6, "one product too many"),
        Answer("float", lambda n: n * (n - 1) * (n + 1) / 6, "float"),
        Answer("half a full count", lambda n: n**2 * (n - 1) // 2, "column|zeros"),
        Answer("a third", lambda n: n**3 // 3, "leading|about|exact"),
        Answer("a sixth", lambda n: n**3 // 6, "leading|about|exact"),
        Answer("choose three", lambda n: n * (n - 1) * (n - 2) // 6, "one product too few|m = j"),
        Answer("beta counted", lambda n: n * (n - 1) * (n + 1) // 6 + n * (n + 1) // 2, "beta"),
    ],
    "3.5": [
        Answer("no diag(beta)", lambda k, b: rows(k, b, start=lambda i: eye(len(k))[i]), "last factor"),
        Answer("plus", lambda k, b: rows(k, b, sign=1.0), "sign"),
        Answer("beta_j", lambda k, b: rows(k, b, gram=(k @ k.T) * b), "beta_j"),
        Answer("no beta in the sum", lambda k, b: rows(k, b, gram=k @ k.T), "beta"),
        Answer("nothing subtracted", lambda k, b: rows(k, b, previous=False), "diagonal|nothing"),
        Answer("beta twice", lambda k, b: rows(k, b, end=lambda i, row: b[i] * row), "twice"),
        Answer("inverse", by_inverse, "inverse|inv"),
        Answer(
            "solver",
            lambda k, b: torch.linalg.solve_triangular(
                eye(len(k)) + (b[:, None] * (k @ k.T)).tril(-1), torch.diag(b), upper=False
            ),
            "solve",
        ),
        Answer("library", lambda k, b: ut_transform(k, b), "library|ut_transform"),
        Answer("series of powers", by_powers, "power|full"),
        Answer("one over beta", by_reciprocal, "beta = 0|finite|NaN"),
        Answer("one over beta, by luck", by_reciprocal_rows, "divides by beta"),
        Answer("transposed", lambda k, b: rows(k, b).T, "transpos"),
    ],
    "3.6": [
        Answer("sign", merged(sign=1.0), "sign"),
        Answer("right bracket missing", merged(right=False), "N_11|bracket"),
        Answer("left bracket missing", merged(left=False), "N_22|bracket"),
        Answer("no brackets", merged(left=False, right=False), "bracket|alone|block"),
        Answer("no betas", merged(betas=False), "betas are"),
        Answer("D outside", merged(swapped=True), "outside"),
        Answer(
            "no identity", lambda N11, N22, L, b1, b2: -(N22 * b2) @ L @ (b1[:, None] * N11), "identity|direct|alone"
        ),
        Answer(
            "T blocks",
            lambda N11, N22, L, b1, b2: (
                -(torch.diag(b2) + b2[:, None] * N22 * b2) @ L @ (torch.diag(b1) + b1[:, None] * N11 * b1)
            ),
            "T|ends",
        ),
        Answer("transposed", lambda *x: merged()(*x).T, "transpos"),
        Answer("one-sided D", lambda N11, N22, L, b1, b2: merged()(N11, N22, L, torch.ones_like(b1), b2), "D_1|beta1"),
    ],
    "3.7": [
        Answer("the library's T to compare with", compared_with_the_library, "computes T itself"),
        Answer("no beta of zero", residual_test(zero=False), "0/0|beta = 0|divid"),
        Answer("beta at most one", residual_test(large=False), "clamp|above 1"),
        Answer("unit keys", residual_test(unit=True), "normalis|unit"),
        Answer("four tokens", residual_test(length=4), "power|four|long"),
        Answer("all betas one", residual_test(ones=True), "beta"),
        Answer("NaN passes", residual_test(nan_safe=False), "NaN|divid|beta = 0"),
        Answer("equality to the bit", residual_test(tolerance=0.0), "right|reject"),
        Answer("triangular", residual_test(shape="triangle"), "bug"),
        Answer("diagonal only", diagonal_is_beta, "bug"),
        Answer("orthogonal keys", orthogonal_keys, "bug"),
        Answer("everything", lambda implementation: True, "everything|all"),
        Answer("nothing", lambda implementation: False, "everything|rejects"),
    ],
    "3.8": [
        Answer("first output", several(keep=0), "first step"),
        Answer("backwards", several(flip=True), "backwards"),
        Answer("default scale", several(scale=None), "scale"),
        Answer("step outside", several(order="step"), "wrong order"),
        Answer("query repeated, not interleaved", repeated_queries, "quer"),
        Answer("own recurrence", own_recurrence, "recurrent_delta_rule"),
        Answer("all outputs", all_outputs, "shape|every step"),
        Answer("average", averaged, "mean|average"),
        Answer("same state", same_state, "all see the state"),
        Answer("summed", summed, "sum|added"),
    ],
}
