"""Wrong answers to the exercises of chapter 4."""

from __future__ import annotations

import time

import torch
from torch.nn.functional import normalize

from dn_lib.forms.chunkwise import chunkwise_delta_rule, delta_attention_matrix
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.forms.householder import ut_transform
from dn_lib.parallel.affine import leaving_gradient
from dn_lib.teaching import relative_error

from . import Answer


def eye(n):
    return torch.eye(n, dtype=torch.float64)


# 4.1 -----------------------------------------------------------------------------------------------------
def chunk(sign=-1.0, mask=0, read="old", state="pseudo", twice=False, plain=False):
    def answer(q, k, v, beta, S):
        T = ut_transform(k, beta)
        T = T / beta if plain else T
        new = T @ v + sign * (T @ k) @ S
        new = beta[:, None] * new if twice else new
        end = S + k.T @ (v if state == "values" else new)
        return q @ (S if read == "old" else end) + (q @ k.T).tril(mask) @ (v if state == "inside" else new), end

    return answer


def chunk_by_tokens(q, k, v, beta, S):
    o = []
    for t in range(len(q)):
        S = S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S)
        o.append(q[t] @ S)
    return torch.stack(o), S


# 4.2 -----------------------------------------------------------------------------------------------------
def entry(order=1, first=1, last=1, weight="j", start="k"):
    def answer(q, k, beta, i, j):
        x = k[j]
        for t in list(range(j + first, i + last))[::order]:
            x = x - beta[t] * k[t] * (k[t] @ x)
        return {"j": beta[j], "no": 1.0, "i": beta[i]}[weight] * (q[i] @ x)

    return answer


def entry_with_matrices(q, k, beta, i, j):
    P = eye(k.shape[1])
    for t in range(j + 1, i + 1):
        P = (eye(k.shape[1]) - beta[t] * torch.outer(k[t], k[t])) @ P
    return beta[j] * q[i] @ P @ k[j]


def entry_from_t(q, k, beta, i, j):
    return ((q @ k.T).tril() @ ut_transform(k, beta))[i, j]


def entry_wrong_on_diagonal(q, k, beta, i, j):
    return q[i] @ k[j] if i == j else entry()(q, k, beta, i, j)


# 4.3 -----------------------------------------------------------------------------------------------------
def packed(scores=True, keys=True, strict=True, end=True):
    def answer(q, k, beta, sequence):
        same = sequence[:, None] == sequence
        A = (beta[:, None] * (k @ k.T)).tril(-1)
        T = torch.linalg.inv(eye(len(k)) + (A * same if keys else A)) * (beta if end else 1)
        P = (q @ k.T).tril(0 if strict else -1)
        return (P * same if scores else P) @ T

    return answer


def packed_different(q, k, beta, sequence):
    return delta_attention_matrix(q, k, beta, scale=1.0) * (sequence[:, None] != sequence)


def packed_beta(q, k, beta, sequence):
    start = torch.cat([beta[:1] * 0, sequence.diff().to(beta)])
    return delta_attention_matrix(q, k, beta * (1 - start), scale=1.0)


# 4.4 -----------------------------------------------------------------------------------------------------
def backward(solve="transposed", beta_from="Z", sides=2, partner="pseudo", sign=-1.0, dv="DZ", diagonal=-1):
    def answer(k, beta, E, dpseudo):
        B, b = (k @ k.T).tril(-1), beta[:, None]
        M = {"transposed": eye(len(k)) + B.T * beta, "forward": eye(len(k)) + B * beta, "none": eye(len(k))}[solve]
        Z = torch.linalg.solve(M, dpseudo)
        dR = b * Z
        dbeta = ({"Z": Z, "given": dpseudo, "E": E}[beta_from] * E).sum(1)
        G = sign * (dR @ (b * E if partner == "pseudo" else E).T).tril(diagonal)
        return {"DZ": dR, "Z": Z, "given": b * dpseudo}[dv], dbeta, (G + G.T if sides == 2 else G) @ k

    return answer


def backward_divided(k, beta, E, dpseudo):
    Z = (ut_transform(k, beta) / beta).T @ dpseudo
    b = beta[:, None]
    G = -(b * Z @ (b * E).T).tril(-1)
    return b * Z, (Z * E).sum(1), (G + G.T) @ k


def backward_by_autograd(k, beta, E, dpseudo):
    R = E + (k @ k.T).tril(-1) @ (beta[:, None] * E)
    k2, beta, R = (x.detach().requires_grad_() for x in (k, beta, R))
    e = torch.linalg.solve(eye(len(k)) + (k2 @ k2.T).tril(-1) * beta, R)
    grads = torch.autograd.grad(beta[:, None] * e, (R, beta, k2), dpseudo)
    return tuple(grads)


# 4.5 -----------------------------------------------------------------------------------------------------
def rule_test(state=True, length=13, final=True, d_v=3, ones=False, lead=(2,), tolerance=1e-8, C=4, equal=False):
    def is_right(implementation):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(*lead, length, d, generator=generator, dtype=torch.float64) for d in (5, 5, d_v))
        k, beta = normalize(k, dim=-1), 2 * torch.rand(*lead, length, generator=generator, dtype=torch.float64)
        beta = torch.ones_like(beta) if ones else beta
        S = torch.randn(*lead, 5, d_v, generator=generator, dtype=torch.float64) if state else None
        answer = implementation(q, k, v, beta, initial_state=S, chunk_size=C)
        expected = recurrent_delta_rule(q, k, v, beta, initial_state=S)
        if equal:
            return torch.equal(answer[0], expected[0]) and torch.equal(answer[1], expected[1])
        return relative_error(answer[: 2 if final else 1], expected[: 2 if final else 1]) < tolerance

    return is_right


def endless_test(implementation):
    while True:
        time.sleep(0)


# 4.6 -----------------------------------------------------------------------------------------------------
def leaving(transpose=True, use=True, shift=0, order=-1, add=True):
    def answer(M, Y, dstate):
        g, found = dstate, []
        steps = range(len(M))[::order]
        for r in steps:
            found.append(g)
            r = min(max(r + shift, 0), len(M) - 1)
            g = ((M[r].T if transpose else M[r]) @ g if use else g) + (Y[r] if add else 0)
        return torch.stack(found[::order])

    return answer


def entering(M, Y, dstate):
    g, found = dstate, []
    for r in range(len(M) - 1, -1, -1):
        g = M[r].T @ g + Y[r]
        found.append(g)
    return torch.stack(found[::-1])


def from_the_right(M, Y, dstate):
    g, found = dstate, [dstate]
    for r in range(len(M) - 1, 0, -1):
        g = M[r].T @ (g + Y[r])
        found.append(g)
    return torch.stack(found[::-1])


def leaving_by_library(M, Y, dstate):
    pieces = [*zip(M, Y, strict=True), (eye(M.shape[-1]), dstate)]
    return torch.stack([leaving_gradient(pieces, rank) for rank in range(len(M))])


# 4.7 -----------------------------------------------------------------------------------------------------
def gated(in_t=True, in_error=True, in_p=True, at_end=True, carry=True, reach=0, ratio="log"):
    def answer(q, k, v, beta, alpha, S):
        b = alpha.log().cumsum(0)
        gamma = b.exp()[:, None]
        L = len(k)
        above = torch.ones(L, L, dtype=torch.bool).triu(1)
        R = (b[:, None] - b).masked_fill(above, -torch.inf).exp()
        if ratio == "divide":
            R = (gamma / gamma.T).tril()
        one = torch.ones(L, L, dtype=q.dtype).tril()
        A = beta[:, None] * ((R if in_t else one) * (k @ k.T)).tril(-1)
        E = v - (gamma if in_error else 1) * (k @ S)
        new = torch.linalg.solve_triangular(eye(L) + A, beta[:, None] * E, upper=False)
        reads = torch.cat([torch.ones_like(gamma[:1]), gamma[:-1]]) if reach else gamma
        o = reads * (q @ S) + ((R if in_p else one) * (q @ k.T)) @ new
        return o, (gamma[-1] if carry else 1) * S + k.T @ ((R[-1][:, None] if at_end else 1) * new)

    return answer


def gated_loop(q, k, v, beta, alpha, S):
    o = []
    for t in range(len(q)):
        S = alpha[t] * S
        S = S + beta[t] * torch.outer(k[t], v[t] - k[t] @ S)
        o.append(q[t] @ S)
    return torch.stack(o), S


def gated_by_library(q, k, v, beta, alpha, S):
    return recurrent_gated_delta_rule(q, k, v, beta, alpha.log(), scale=1.0, initial_state=S)


def beta_on_the_keys(q, k, v, b, S):
    T = ut_transform(k, b)
    pseudo = T @ v - T @ (b[:, None] * k) @ S
    return q @ S + (q @ k.T).tril() @ pseudo, S + k.T @ pseudo


def beta_on_the_values(q, k, v, b, S):
    T = ut_transform(k, b)
    pseudo = T @ (b[:, None] * v) - T @ k @ S
    return q @ S + (q @ k.T).tril() @ pseudo, S + k.T @ pseudo


ANSWERS = {
    "4.1": [
        Answer("still linear attention", lambda q, k, v, b, S: (q @ S + (q @ k.T).tril() @ v, S + k.T @ v), "linear"),
        Answer("U alone", chunk(sign=0.0), "pseudo-values here are U"),
        Answer("U + W S", chunk(sign=1.0), "sign"),
        Answer("state from V", chunk(state="values"), "state"),
        Answer("outputs from V", chunk(state="inside"), "output"),
        Answer("strict mask", chunk(mask=-1), "diagonal"),
        Answer("no mask", chunk(mask=10**6), "mask|future"),
        Answer("reads the new state", chunk(read="new"), "leaves the chunk"),
        Answer("beta twice", chunk(twice=True), "twice"),
        Answer("beta on the keys again", beta_on_the_keys, "In W .*twice"),
        Answer("beta on the values again", beta_on_the_values, "In U .*twice"),
        Answer("inverse alone", chunk(plain=True), "diag\\(beta\\)"),
        Answer("outputs only", lambda *x: chunk()(*x)[0], "state"),
        Answer("token by token", chunk_by_tokens, "one by one|token by token"),
        Answer(
            "library", lambda q, k, v, b, S: chunkwise_delta_rule(q, k, v, b, scale=1.0, initial_state=S), "library"
        ),
    ],
    "4.2": [
        Answer("no beta_j", entry(weight="no"), "strength"),
        Answer("beta_i", entry(weight="i"), "beta_i|reader"),
        Answer("wrong order", entry(order=-1), "order"),
        Answer("erases itself", entry(first=0), "own write"),
        Answer("last step missing", entry(last=0), "last erasing"),
        Answer("linear attention", lambda q, k, b, i, j: b[j] * (q[i] @ k[j]), "Nothing is erased"),
        Answer("matrices", entry_with_matrices, "d_k x d_k"),
        Answer("T", entry_from_t, "L x L|library|T"),
        Answer("wrong on the diagonal", entry_wrong_on_diagonal, "i = j"),
        Answer("entry of T", lambda q, k, b, i, j: ut_transform(k, b)[i, j], "q|T"),
    ],
    "4.3": [
        Answer("no mask", packed(scores=False, keys=False), "nothing separates"),
        Answer("scores only", packed(keys=False), "through T"),
        Answer("keys only", packed(scores=False), "queries still read"),
        Answer("beta zero", packed_beta, "beta to zero"),
        Answer("wrong comparison", packed_different, "other|!=|opposite|different"),
        Answer("diagonal left out", packed(strict=False), "own|diagonal"),
        Answer("no diag(beta)", packed(end=False), "diag\\(beta\\)|beta"),
        Answer("no T", lambda q, k, b, s: (q @ k.T).tril() * (s[:, None] == s), "T is|linear"),
        Answer(
            "no causal mask",
            lambda q, k, b, s: ((q @ k.T) * (s[:, None] == s)) @ ut_transform(k, b),
            "future|causal|mask",
        ),
    ],
    "4.4": [
        Answer("forward solve", backward(solve="forward"), "forward"),
        Answer("no system", backward(solve="none"), "system|later errors"),
        Answer("beta from the given gradient", backward(beta_from="given"), "own pseudo-value"),
        Answer("one side", backward(sides=1), "one of the two keys"),
        Answer("error as partner", backward(partner="error"), "pseudo-value"),
        Answer("sign", backward(sign=1.0), "sign"),
        Answer("dv without D", backward(dv="Z"), "dV|dv"),
        Answer("dv from the given gradient", backward(dv="given"), "dV|dv|later errors"),
        Answer("divides by beta", backward_divided, "beta = 0"),
        Answer("autograd", backward_by_autograd, "autograd"),
        Answer("diagonal in dB", backward(diagonal=0), "diagonal"),
    ],
    "4.5": [
        Answer("no state", rule_test(state=False), "initial state"),
        Answer("whole chunks", rule_test(length=12), "last chunk|short"),
        Answer("outputs only", rule_test(final=False), "final state"),
        Answer("square", rule_test(d_v=5), "scale|d_v"),
        Answer("beta one", rule_test(ones=True), "T|beta"),
        Answer("one sequence", rule_test(lead=()), "leading|head"),
        Answer("loose", rule_test(tolerance=0.05), "precision|bfloat16"),
        Answer("one chunk", rule_test(C=13), "chunk"),
        Answer("equality to the bit", rule_test(equal=True), "reject"),
        Answer("endless", endless_test, "did not finish"),
        Answer("everything", lambda implementation: True, "everything|all"),
    ],
    "4.6": [
        Answer("sums", leaving(use=False), "summed"),
        Answer("not transposed", leaving(transpose=False), "transposed"),
        Answer("forwards", leaving(order=1), "forward in time"),
        Answer("entering", entering, "enters"),
        Answer("off by one", leaving(shift=-1), "stretch before|r - 1|one stretch"),
        Answer("Y forgotten", leaving(add=False), "Y"),
        Answer("M on the sum", from_the_right, "M|also"),
        Answer("reversed", lambda *x: leaving()(*x).flip(0), "revers"),
        Answer("list", lambda *x: list(leaving()(*x)), "list"),
        Answer("library", leaving_by_library, "library"),
        Answer("gradient of the first state only", lambda *x: entering(*x)[0], "shape"),
    ],
    "4.7": [
        Answer("no gate", lambda q, k, v, b, a, S: chunk()(q, k, v, b, S), "not used"),
        Answer("T without decay", gated(in_t=False), "T is that"),
        Answer("state not faded in the errors", gated(in_error=False), "entered the chunk"),
        Answer("scores without decay", gated(in_p=False), "score|P"),
        Answer("writes not faded at the end", gated(at_end=False), "end of the chunk"),
        Answer("state not faded at the end", gated(carry=False), "state|carr"),
        Answer("one gate too few", gated(reach=1), "one"),
        Answer("divides by gamma", gated(ratio="divide"), "finite|underflow|NaN|gamma"),
        Answer("loop", gated_loop, "one by one|token by token"),
        Answer("library", gated_by_library, "library"),
    ],
}
