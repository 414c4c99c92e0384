"""Right answers that go another way than the solutions: a rule about the method must not refuse them."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from dn_lib.forms import linear_attention as la
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.forms.householder import householder_matrix, householder_product, scaled_inverse, ut_transform


# Chapter 1 -----------------------------------------------------------------------------------------------
def sums_in_one_state(q, k, v):
    """z as one more column of S: values that end in a one."""
    phi_q, phi_k = la.elu_feature_map(q), la.elu_feature_map(k)
    v = torch.cat([v, torch.ones(len(v), 1, dtype=v.dtype)], dim=1)
    S, rows = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for a, b, c in zip(phi_q, phi_k, v, strict=True):
        S += b[:, None] * c
        rows.append(a @ S)
    o = torch.stack(rows)
    return o[:, :-1] / o[:, -1:]


def sums_into_a_tensor(q, k, v):
    o = torch.empty_like(v)
    S, z = v.new_zeros(k.shape[1], v.shape[1]), v.new_zeros(k.shape[1])
    for t in range(len(q)):
        phi = torch.nn.functional.elu(k[t]) + 1
        S, z = S + torch.einsum("i,j->ij", phi, v[t]), z + phi
        query = torch.nn.functional.elu(q[t]) + 1
        o[t] = torch.matmul(query, S) / query.dot(z)
    return o


def chunks_at_once(q, k, v, chunk_size):
    """All chunks in one batch, padded with zeros, their states by a running sum."""
    length = len(q)
    full = -(-length // chunk_size) * chunk_size
    a, b, c = (pad(x, (0, 0, 0, full - length)).unflatten(0, (-1, chunk_size)) for x in (q, k, v))
    writes = b.mT @ c
    states = writes.cumsum(0) - writes
    return (a @ states + (a @ b.mT).tril() @ c).flatten(0, 1)[:length]


def chunks_with_a_mask(q, k, v, chunk_size):
    o, S = torch.zeros_like(v), torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype)
    n = 0
    while n < len(q):
        stop = min(n + chunk_size, len(q))
        mask = torch.ones(stop - n, stop - n, dtype=torch.bool).triu(1)
        scores = torch.einsum("id,jd->ij", q[n:stop], k[n:stop]).masked_fill(mask, 0.0)
        o[n:stop] = q[n:stop] @ S + scores @ v[n:stop]
        S = S + torch.einsum("td,te->de", k[n:stop], v[n:stop])
        n = stop
    return o


def workers_in_a_batch(q, k, v, workers):
    a, b, c = (x.unflatten(0, (workers, -1)) for x in (q, k, v))
    writes = torch.einsum("wtd,wte->wde", b, c)
    before = torch.cat([torch.zeros_like(writes[:1]), writes.cumsum(0)[:-1]])
    return (torch.bmm(a, before) + torch.bmm(torch.bmm(a, b.mT).tril(), c)).reshape(len(q), -1)


def workers_with_loops_of_their_own(q, k, v, workers):
    n = len(q) // workers
    starts = range(0, len(q), n)
    writes = []
    for start in starts:
        S = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype)
        for t in range(start, start + n):
            S = S + torch.outer(k[t], v[t])
        writes.append(S)
    o = []
    for w, start in enumerate(starts):
        S = sum(writes[:w], torch.zeros_like(writes[0]))
        for t in range(start, start + n):
            S = S + torch.outer(k[t], v[t])
            o.append(q[t] @ S)
    return torch.stack(o)


def fading_with_lists(q, k, v, gamma, chunk_size):
    S, o = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for n in range(0, len(q), chunk_size):
        a, b, c = q[n : n + chunk_size], k[n : n + chunk_size], v[n : n + chunk_size]
        C = len(a)
        M = torch.tensor([[gamma ** (i - j) if i >= j else 0.0 for j in range(C)] for i in range(C)], dtype=v.dtype)
        reach = torch.tensor([gamma ** (i + 1) for i in range(C)], dtype=v.dtype)
        o.append(reach[:, None] * (a @ S) + (M * (a @ b.T)) @ c)
        S = S * gamma**C + b.T @ (M[-1][:, None] * c)
    return torch.cat(o)


# Chapter 2 -----------------------------------------------------------------------------------------------
def write_by_components(k, v, beta, state):
    old = (k[:, None] * state).sum(0)
    return torch.addr(state, k, v - old, alpha=float(beta))


def write_erasing_first(k, v, beta, state):
    erased = state - torch.outer(beta * k, state.T @ k)
    return erased + k.unsqueeze(1) * (beta * v)


def sequence_on_a_copy(q, k, v, beta, state):
    state, o = state.clone(), torch.zeros_like(v)
    for t, (a, b, c) in enumerate(zip(q, k, v, strict=True)):
        state += torch.outer(b, beta[t] * (c - b @ state))
        o[t] = a @ state
    return o, state


def sweeps_with_while(keys, values, beta, passes):
    S, n = keys.new_zeros(keys.shape[1], values.shape[1]), 0
    while n < passes * len(keys):
        k, v = keys[n % len(keys)], values[n % len(keys)]
        S, n = write_by_components(k, v, beta, S), n + 1
    return S


def parity_by_where(bits):
    one, S = bits.new_ones(len(bits), 1), bits.new_ones(1, 1)
    beta = torch.where(bits == 1, 2.0, 0.0).to(bits)
    return recurrent_delta_rule(one, one, torch.zeros_like(one), beta, scale=1.0, initial_state=S)[0].squeeze(1)


def gated_in_place(q, k, v, alpha, beta):
    S, o = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for t in range(len(q)):
        S *= alpha[t]
        S += beta[t] * k[t, :, None] * (v[t] - k[t] @ S)[None]
        o.append((S.T @ q[t]).clone())
    return torch.stack(o), S


def rescaled_by_logarithms(q, k, v, alpha, beta):
    gamma = alpha.log().cumsum(0).exp().unsqueeze(1)
    out, state = recurrent_delta_rule(q, k, v / gamma, beta, scale=1.0)
    return out * gamma, state * gamma[-1, 0]


# Chapter 3 -----------------------------------------------------------------------------------------------
def rotation_of_library_matrices(theta):
    keys = torch.stack(
        [torch.tensor([0.0, 1.0], dtype=theta.dtype), torch.stack([-(theta / 2).sin(), (theta / 2).cos()])]
    )
    return householder_matrix(keys[1], 2.0) @ householder_matrix(keys[0], 2.0)


def rotation_step_by_step(theta):
    """Two writes with value zero, applied to the identity."""
    M = torch.eye(2, dtype=theta.dtype)
    for angle in (0 * theta, theta / 2):
        k = torch.stack([angle.cos(), angle.sin()])
        M = M - 2 * torch.outer(k, k @ M)
    return M


def rows_in_place(k, beta):
    T = torch.diag(beta)
    for i in range(1, len(k)):
        T[i] -= beta[i] * (k[i] @ k.T)[:i] @ T[:i]
    return T


def rows_with_whole_products(k, beta):
    A = torch.tril(torch.diag(beta) @ k @ k.T, -1)
    T, eye = torch.zeros(len(k), len(k), dtype=k.dtype), torch.eye(len(k), dtype=k.dtype)
    for i in range(len(k)):
        T[i : i + 1] = beta[i] * eye[i : i + 1] - A[i : i + 1] @ T
    return T


def rows_in_a_list(k, beta):
    rows = []
    for i in range(len(k)):
        row = torch.zeros(len(k), dtype=k.dtype)
        row[i] = 1.0
        for j in range(i):
            row = row - (k[i] @ k[j]) * rows[j]
        rows.append(beta[i] * row)
    return torch.stack(rows)


def steps_with_silent_queries(q, k, v, beta):
    length, n, d = k.shape
    queries = torch.zeros(length, n, d, dtype=q.dtype)
    queries[:, -1] = q
    o, _ = recurrent_delta_rule(
        queries.view(-1, d), k.reshape(-1, d), v.reshape(length * n, -1), beta.reshape(-1), scale=1
    )
    return o.view(length, n, -1)[:, -1]


# Chapter 4 -----------------------------------------------------------------------------------------------
def chunk_by_solving(q, k, v, beta, S):
    A = torch.eye(len(k), dtype=k.dtype) + torch.tril(beta[:, None] * (k @ k.T), -1)
    new = torch.linalg.solve_triangular(A, beta[:, None] * (v - k @ S), upper=False)
    return q @ S + torch.tril(q @ k.T) @ new, S + k.T @ new


def chunk_by_n(q, k, v, beta, S):
    E = beta[:, None] * (v - k @ S)
    new = E + beta[:, None] * (scaled_inverse(k, beta) @ E)
    return q @ S + torch.tril(q @ k.T) @ new, S + k.T @ new


def entry_from_the_query(q, k, beta, i, j):
    x = q[i]
    for t in range(i, j, -1):
        x = x - beta[t] * (x @ k[t]) * k[t]
    return x @ k[j] * beta[j]


def errors_backwards(k, beta, E, dpseudo):
    """The transposed system, solved from the last row to the first by hand."""
    Z = dpseudo.clone()
    for j in range(len(k) - 1, -1, -1):
        Z[j] = Z[j] - (k[j + 1 :] @ k[j]) @ (beta[j + 1 :, None] * Z[j + 1 :])
    dB = -torch.tril((beta[:, None] * Z) @ (beta[:, None] * E).T, -1)
    return beta[:, None] * Z, (Z * E).sum(-1), dB @ k + dB.T @ k


def errors_by_t(k, beta, E, dpseudo):
    Z = dpseudo - (ut_transform(k, beta) @ torch.tril(k @ k.T, -1)).T @ dpseudo
    G = torch.tril(torch.outer(beta, beta) * (Z @ E.T), -1)
    return beta[:, None] * Z, (Z * E).sum(1), -(G + G.T) @ k


def leaving_by_list(M, Y, dstate):
    found = [dstate]
    for m, y in zip(M.flip(0)[:-1], Y.flip(0)[:-1], strict=True):
        found.insert(0, m.T @ found[0] + y)
    return torch.stack(found)


def gated_by_cumprod(q, k, v, beta, alpha, S):
    """Ratios as running products of the gates below the diagonal: nothing is divided."""
    L = len(k)
    below = torch.ones(L, L, dtype=torch.bool).tril(-1)
    R = alpha[:, None].expand(L, L).where(below, 1.0).cumprod(0).tril()
    gamma = alpha.cumprod(0)[:, None]
    A = torch.eye(L, dtype=k.dtype) + beta[:, None] * (R * (k @ k.T)).tril(-1)
    new = torch.linalg.solve(A, beta[:, None] * (v - gamma * (k @ S)))
    return gamma * (q @ S) + (R * (q @ k.T)) @ new, gamma[-1] * S + k.T @ (R[-1, :, None] * new)


def map_masked_at_the_end(q, k, beta, sequence):
    """Documents lie one after the other, so what crosses their border can be cut off at the end."""
    same = (sequence[:, None] == sequence).to(q.dtype)
    return ((q @ k.T).tril() @ ut_transform(k, beta)) * same


# Tests ---------------------------------------------------------------------------------------------------
def two_directions(step):
    """Along the key and orthogonal to it; and beta = 0 changes nothing."""
    generator = torch.Generator().manual_seed(0)
    k, x, v = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    S = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    beta = torch.tensor(0.3, dtype=torch.float64)
    x = x - (x @ k) / (k @ k) * k
    new = step(k, v, beta, S)
    still = step(k, v, 0 * beta, S)
    along = torch.allclose(v - k @ new, (1 - beta * (k @ k)) * (v - k @ S))
    return along and torch.allclose(x @ new, x @ S) and torch.allclose(still, S)


def product_of_steps(implementation):
    """Keys that are independent: I - K^T T K is the product of the H's for one T alone."""
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 7, 12):
        k = torch.randn(length, 16, generator=generator, dtype=torch.float64) / 4
        beta = 2 * torch.rand(length, generator=generator, dtype=torch.float64)
        beta[length // 2] = 0.0 if length > 1 else 1.9
        left = torch.eye(16, dtype=torch.float64) - k.T @ implementation(k, beta) @ k
        if not (left - householder_product(k, beta)).abs().max() <= 1e-9:
            return False
    return True


# Chapter 6 -----------------------------------------------------------------------------------------------
def convolution_by_lags(x, w):
    lags = [torch.cat([x.new_zeros(lag, x.shape[1]), x])[: len(x)] for lag in range(w.shape[1])]
    return sum(w[:, -1 - lag] * shifted for lag, shifted in enumerate(lags))


RIGHT = {
    "1.1": [sums_in_one_state, sums_into_a_tensor],
    "1.2": [chunks_at_once, chunks_with_a_mask],
    "1.3": [workers_in_a_batch, workers_with_loops_of_their_own],
    "1.7": [fading_with_lists],
    "2.1": [write_by_components, write_erasing_first],
    "2.2": [sequence_on_a_copy],
    "2.3": [lambda k: k.norm() ** -2, lambda k: 1 / sum(float(x) ** 2 for x in k)],
    "2.4": [two_directions],
    "2.5": [sweeps_with_while],
    "2.6": [parity_by_where],
    "2.7": [gated_in_place],
    "2.8": [rescaled_by_logarithms],
    "3.1": [lambda a, b: torch.eye(len(a), dtype=a.dtype) - torch.outer(a - b, a - b) / (a @ a - a @ b)],
    "3.2": [rotation_of_library_matrices, rotation_step_by_step],
    "3.4": [lambda n: sum(i - j for i in range(n) for j in range(i))],
    "3.5": [rows_in_place, rows_with_whole_products, rows_in_a_list],
    "3.7": [product_of_steps],
    "3.8": [steps_with_silent_queries],
    "4.1": [chunk_by_solving, chunk_by_n],
    "4.2": [entry_from_the_query],
    "4.3": [map_masked_at_the_end],
    "4.4": [errors_backwards, errors_by_t],
    "4.6": [leaving_by_list],
    "4.7": [gated_by_cumprod],
    "6.2": [convolution_by_lags],
}
