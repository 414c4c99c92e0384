"""The labelled equations of chapter 1, each with a check and its classic wrong versions."""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dn_lib.forms.decay import recurrent_decay_attention
from dn_lib.forms.linear_attention import (
    chunkwise_linear_attention,
    elu_feature_map,
    kernel_attention,
    recurrent_linear_attention,
    softmax_attention,
    taylor_feature_map,
)
from dn_lib.teaching.registry import Equation


def _integer(g, low, high):
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _qkv(g):
    """Length 6 to 12, d_k = 3, d_v = 5: small, and no two sizes alike."""
    length = _integer(g, 6, 12)
    return _normal(g, length, 3), _normal(g, length, 3), _normal(g, length, 5)


def _qkv_state(g):
    return *_qkv(g), _normal(g, 3, 5)


# --- softmax attention and kernels -----------------------------------------------------------------------


def _softmax(first=lambda i: 0, last=lambda i, n: i + 1, scale=lambda d: d**-0.5, normalise=True):
    """The sum over pairs as printed; the arguments make its mutants."""

    def right(q, k, v):
        rows = []
        for i in range(len(q)):
            js = range(first(i), last(i, len(q)))
            weights = [torch.exp(scale(len(q[i])) * (q[i] @ k[j])) for j in js]
            total = sum(weights) if normalise else 1.0
            rows.append(sum((w * v[j] for w, j in zip(weights, js, strict=True)), torch.zeros_like(v[0])))
            rows[-1] = rows[-1] / total if len(js) else rows[-1]
        return torch.stack(rows)

    return right


def _kernel(phi_q=elu_feature_map, phi_k=elu_feature_map, last=lambda i, n: i + 1, normalise=True):
    def right(q, k, v):
        rows = []
        for i in range(len(q)):
            weights = [phi_q(q[i]) @ phi_k(k[j]) for j in range(last(i, len(q)))]
            total = sum(weights) if normalise else 1.0
            rows.append(sum(w * v[j] for j, w in enumerate(weights)) / total)
        return torch.stack(rows)

    return right


def _kernel_sums(q, k, v):
    """The quadratic form, and the sums over all tokens that S and z have to be at the end."""
    phi_k = elu_feature_map(k)
    return kernel_attention(q, k, v), torch.einsum("ti,tj->ij", phi_k, v), phi_k.sum(0)


def _kernel_state(read_first=False, z_of="k", keep_z=1.0, keep_state=1.0, normalise=True):
    def right(q, k, v):
        phi_q, phi_k = elu_feature_map(q), elu_feature_map(k)
        state, z, rows = torch.zeros(k.shape[1], v.shape[1]).to(v), torch.zeros(k.shape[1]).to(v), []
        for t in range(len(q)):
            old_state = state
            state = keep_state * state + torch.outer(phi_k[t], v[t])
            z = keep_z * z + (phi_k[t] if z_of == "k" else phi_q[t])
            read = (old_state if read_first else state).T @ phi_q[t]
            rows.append(read / (z @ phi_q[t]) if normalise else read)
        return torch.stack(rows), state, z

    return right


def _taylor_features(x, y, degree):
    """The dot product of the features, how many there are, and the limit for many degrees."""
    phi_x, phi_y = taylor_feature_map(x, degree), taylor_feature_map(y, degree)
    return phi_x @ phi_y, phi_x.numel(), (x @ y).exp()


def _feature_pair(g):
    """Two vectors whose dot product is at most 1 in size, and a degree."""
    x, y = (torch.rand(2, 3, generator=g, dtype=torch.float64) * 2 - 1) / 3**0.5
    return x, y, _integer(g, 1, 5)


def _exp_features(first=0, last=0, factorial=math.factorial, count=lambda d, n: d**n):
    def polynomial(x, y, degree):
        return sum((x @ y) ** n / factorial(n) for n in range(first, degree + 1 + last))

    def right(x, y, degree):
        # Degree 20 stands for the limit: for the dot products of `_feature_pair` its remainder is below 1e-19.
        return polynomial(x, y, degree), sum(count(len(x), n) for n in range(degree + 1)), polynomial(x, y, 20)

    return right


# --- the three forms -------------------------------------------------------------------------------------


def _recurrence(q, k, v, state):
    return recurrent_linear_attention(q, k, v, initial_state=state)


def _printed_recurrence(scale=lambda d: d**-0.5, keep=1.0, read_first=False, write=lambda q, k: k):
    def right(q, k, v, state):
        rows = []
        for t in range(len(q)):
            old_state = state
            state = keep * state + torch.outer(write(q[t], k[t]), v[t])
            rows.append((old_state if read_first else state).T @ (scale(q.shape[1]) * q[t]))
        return torch.stack(rows), state

    return right


def _unrolled(last=lambda t, n: t + 1, start=1.0, read=lambda q, k, t: q[t]):
    def right(q, k, v, state):
        q, rows = q * q.shape[1] ** -0.5, []
        for t in range(len(q)):
            written = (k[i] @ read(q, k, t) * v[i] for i in range(last(t, len(q))))
            rows.append(sum(written, start * state.T @ q[t]))
        return torch.stack(rows)

    return right


def _parallel(mask=torch.tril, start=1.0):
    def right(q, k, v, state):
        q = q * q.shape[1] ** -0.5
        return mask(q @ k.T) @ v + start * q @ state

    return right


def _chunked_sample(g):
    chunk, d_k, d_v = _integer(g, 2, 5), 3, 4
    q, k, v = (_normal(g, 3 * chunk, d) for d in (d_k, d_k, d_v))
    return q, k, v, _normal(g, d_k, d_v), chunk


def _state_before(k, v, state, start):
    """The state before token `start`, as a plain sum of outer products."""
    return sum((torch.outer(k[i], v[i]) for i in range(start)), state)


def _chunk_outputs(mask=torch.tril, state_at=lambda start, chunk: start):
    def right(q, k, v, state, chunk):
        q, rows = q * q.shape[1] ** -0.5, []
        for start in range(0, len(q), chunk):
            now = slice(start, start + chunk)
            before = _state_before(k, v, state, state_at(start, chunk))
            rows.append(q[now] @ before + mask(q[now] @ k[now].T) @ v[now])
        return torch.cat(rows)

    return right


def _chunk_states(keep=1.0, added=lambda q, k, v: k.T @ v):
    def right(q, k, v, state, chunk):
        states = []
        for start in range(0, len(q), chunk):
            now = slice(start, start + chunk)
            state = keep * state + added(q[now], k[now], v[now])
            states.append(state)
        return torch.stack(states)

    return right


# --- costs -----------------------------------------------------------------------------------------------


def _work_sample(g):
    chunk = _integer(g, 2, 8)
    return chunk * _integer(g, 2, 5), _integer(g, 2, 9), _integer(g, 10, 15), chunk


def _counted_flops(length, d_k, d_v, chunk):
    q, k, v = torch.zeros(length, d_k), torch.zeros(length, d_k), torch.zeros(length, d_v)
    with FlopCounterMode(display=False) as counter:
        chunkwise_linear_attention(q, k, v, chunk_size=chunk)
    return counter.get_total_flops()


def _counted_memory(tokens, d_k, d_v):
    """Numbers held after `tokens` steps of decoding, by a cache and by a state."""
    cache, state = [], torch.zeros(d_k, d_v)
    for _ in range(tokens):
        k, v = torch.ones(d_k), torch.ones(d_v)
        cache += [k, v]
        state = state + torch.outer(k, v)
    return sum(x.numel() for x in cache), state.numel()


# --- memory ----------------------------------------------------------------------------------------------


def _pairs(g):
    n, d = _integer(g, 3, 8), 4
    return _normal(g, n, d), _normal(g, n, 5)


def _read_back(k, v):
    state = torch.stack([torch.outer(k[i], v[i]) for i in range(len(k))]).sum(0)
    return torch.stack([state.T @ k[j] for j in range(len(k))])


def _retrieved(own=lambda k: k @ k, overlap=lambda a, b: a @ b, others=lambda i, j: i != j, sign=1.0):
    def right(k, v):
        rows = []
        for j in range(len(k)):
            crosstalk = sum(overlap(k[i], k[j]) * v[i] for i in range(len(k)) if others(i, j))
            rows.append(own(k[j]) * v[j] + sign * crosstalk)
        return torch.stack(rows)

    return right


def _frame(g):
    """More unit keys than dimensions: random ones, or several rotated bases, where the bound is met."""
    d = _integer(g, 2, 6)
    if _integer(g, 0, 1):
        keys = torch.cat([torch.linalg.qr(_normal(g, d, d))[0] for _ in range(_integer(g, 2, 4))])
    else:
        keys = F.normalize(_normal(g, _integer(g, d + 1, 4 * d), d), dim=-1)
    return (keys,)


def _overlaps(k):
    return k @ k.T - torch.eye(len(k)).to(k)


def _crosstalk_sample(g):
    """A unit key to read with, values, and for each other key a rotated set of the 2d unit vectors +-e_m.

    Such a set has the first and second moments of the uniform distribution on the sphere, so that averages
    of quadratic functions over it are exact.
    """
    d, n = _integer(g, 2, 4), 3
    bases = [torch.linalg.qr(_normal(g, d, d))[0] for _ in range(n - 1)]
    return F.normalize(_normal(g, d), dim=-1), [torch.cat([b, -b]) for b in bases], _normal(g, n - 1, 5)


def _average_crosstalk(query, designs, values):
    errors = []
    for keys in product(*designs):
        read = torch.stack([(key @ query) * value for key, value in zip(keys, values, strict=True)]).sum(0)
        errors.append(read @ read)
    return torch.stack(errors).mean()


# --- gradients -------------------------------------------------------------------------------------------


def _scores(g):
    length = _integer(g, 3, 8)
    return torch.rand(length, generator=g, dtype=torch.float64) + 0.1, _normal(g, length, 4)


def _jacobian(fn, x):
    return torch.autograd.functional.jacobian(fn, x)


def _gradient_by_score(a, v):
    return _jacobian(lambda a: a @ v / a.sum(), a).T


def _gradient_by_logit(s, v):
    return _jacobian(lambda s: s.softmax(0) @ v, s).T


def _feature_sample(g):
    """A query, keys and values; two opposite tokens share the attention, which brings the bound close."""
    phi = (elu_feature_map, torch.exp, torch.relu)[_integer(g, 0, 2)]
    q, k, v = _normal(g, 3) - 2, _normal(g, 20, 3) - 3, 0.1 * _normal(g, 20, 4)
    if phi is torch.relu:
        q, k = q.abs() / 10, k.abs() / 100
    k[7, 1], v[7], k[8, 0], v[8] = 6.0, v[7] + 5, 6.0, v[8] - 5
    q[0] = q[1]
    return phi, q, k, v


def _feature_attention(phi, q, k, v):
    weights = phi(k) @ phi(q)
    return weights @ v / weights.sum()


def _gradient_by_query(phi, q, k, v):
    return _jacobian(lambda q: _feature_attention(phi, q, k, v), q).norm(dim=0)


def _feature_bound(divide=True, spread=lambda distance: distance.max()):
    def right(phi, q, k, v):
        slope = torch.diagonal(_jacobian(phi, q)).abs()
        distance = (v - _feature_attention(phi, q, k, v)).norm(dim=-1)
        return (slope / phi(q) if divide else slope) * spread(distance)

    return right


def _norm_sample(g):
    d = _integer(g, 3, 8)
    return _normal(g, d) * 10.0 ** _integer(g, -4, 1), 10.0 ** -_integer(g, 2, 5)


def _normed(x, eps):
    jacobian = _jacobian(lambda x: F.rms_norm(x, x.shape, eps=eps), x)
    return F.rms_norm(x, x.shape, eps=eps).norm(), torch.linalg.matrix_norm(jacobian, ord=2)


# --- decay -----------------------------------------------------------------------------------------------


def _fixed_decay_sample(g):
    return *_qkv(g), 0.5 + 0.4 * torch.rand((), generator=g, dtype=torch.float64)


def _fixed_decay(power=lambda t, i: t - i):
    def right(q, k, v, gamma):
        q, rows = q * q.shape[1] ** -0.5, []
        for t in range(len(q)):
            rows.append(sum(gamma ** power(t, i) * (k[i] @ q[t]) * v[i] for i in range(t + 1)))
        return torch.stack(rows)

    return right


def _gated_decay_sample(g):
    q, k, v = _qkv(g)
    return q, k, v, 0.3 + 0.7 * torch.rand(k.shape, generator=g, dtype=torch.float64)


def _gated_decay(first=1, last=1, gate=lambda alpha: alpha):
    def right(q, k, v, alpha):
        q, alpha, rows = q * q.shape[1] ** -0.5, gate(alpha), []
        for t in range(len(q)):
            faded = ((k[i] * alpha[i + first : t + last].prod(0), v[i]) for i in range(t + 1))
            rows.append(sum((key @ q[t]) * value for key, value in faded))
        return torch.stack(rows)

    return right


ENTRIES = [
    Equation(
        label="eq-softmax-attention",
        kind="definition",
        sample=_qkv,
        left=softmax_attention,
        right=_softmax(),
        mutants={
            "scale dropped": _softmax(scale=lambda d: 1.0),
            "looks at the future": _softmax(last=lambda i, n: n),
            "own token left out": _softmax(last=lambda i, n: i),
            "not normalised": _softmax(normalise=False),
            "only the last two tokens": _softmax(first=lambda i: max(0, i - 1)),
        },
    ),
    Equation(
        label="eq-kernel-attention",
        kind="definition",
        sample=_qkv,
        left=kernel_attention,
        right=_kernel(),
        mutants={
            "no feature map on the query": _kernel(phi_q=lambda x: x),
            "no feature map on the key": _kernel(phi_k=lambda x: x),
            "looks at the future": _kernel(last=lambda i, n: n),
            "not normalised": _kernel(normalise=False),
            "elu without the one": _kernel(phi_q=F.elu, phi_k=F.elu),
        },
    ),
    Equation(
        label="eq-kernel-state",
        kind="identity",
        sample=_qkv,
        left=_kernel_sums,
        right=_kernel_state(),
        mutants={
            "read before the write": _kernel_state(read_first=True),
            "z sums the queries": _kernel_state(z_of="q"),
            "z is not accumulated": _kernel_state(keep_z=0.0),
            "S is not accumulated": _kernel_state(keep_state=0.0),
            "not normalised": _kernel_state(normalise=False),
        },
    ),
    Equation(
        label="eq-exp-features",
        kind="identity",
        sample=_feature_pair,
        left=_taylor_features,
        right=_exp_features(),
        mutants={
            "constant left out": _exp_features(first=1),
            "one power short": _exp_features(last=-1),
            "no factorial": _exp_features(factorial=lambda n: 1.0),
            "root of the factorial": _exp_features(factorial=lambda n: math.sqrt(math.factorial(n))),
            "powers of single entries only": _exp_features(count=lambda d, n: d if n else 1),
        },
    ),
    Equation(
        label="eq-linear-attention",
        kind="definition",
        sample=_qkv_state,
        left=_recurrence,
        right=_printed_recurrence(),
        mutants={
            "read before the write": _printed_recurrence(read_first=True),
            "state replaced": _printed_recurrence(keep=0.0),
            "scale dropped": _printed_recurrence(scale=lambda d: 1.0),
            "scaled by d_k, not its root": _printed_recurrence(scale=lambda d: 1.0 / d),
            "written under the query": _printed_recurrence(write=lambda q, k: q),
        },
    ),
    Equation(
        label="eq-linear-unrolled",
        kind="identity",
        sample=_qkv_state,
        left=lambda *x: _recurrence(*x)[0],
        right=_unrolled(),
        mutants={
            "own token left out": _unrolled(last=lambda t, n: t),
            "looks at the future": _unrolled(last=lambda t, n: n),
            "initial state dropped": _unrolled(start=0.0),
            "initial state counted twice": _unrolled(start=2.0),
            "read with the key": _unrolled(read=lambda q, k, t: k[t]),
        },
    ),
    Equation(
        label="eq-linear-parallel",
        kind="identity",
        sample=_qkv_state,
        left=lambda *x: _recurrence(*x)[0],
        right=_parallel(),
        mutants={
            "diagonal left out": _parallel(mask=lambda a: a.tril(-1)),
            "no mask": _parallel(mask=lambda a: a),
            "mask transposed": _parallel(mask=torch.triu),
            "rows made to sum to one": _parallel(mask=lambda a: a.tril() / a.tril().sum(-1, keepdim=True)),
            "initial state dropped": _parallel(start=0.0),
        },
    ),
    Equation(
        label="eq-linear-chunk-output",
        kind="identity",
        sample=_chunked_sample,
        left=lambda q, k, v, s, chunk: _recurrence(q, k, v, s)[0],
        right=_chunk_outputs(),
        mutants={
            "diagonal left out": _chunk_outputs(mask=lambda a: a.tril(-1)),
            "no mask": _chunk_outputs(mask=lambda a: a),
            "own chunk counted twice": _chunk_outputs(state_at=lambda start, chunk: start + chunk),
            "one chunk late": _chunk_outputs(state_at=lambda start, chunk: max(0, start - chunk)),
            "initial state for every chunk": _chunk_outputs(state_at=lambda start, chunk: 0),
        },
    ),
    Equation(
        label="eq-linear-chunk-state",
        kind="identity",
        sample=_chunked_sample,
        left=lambda q, k, v, s, chunk: torch.stack(
            [_recurrence(q[:n], k[:n], v[:n], s)[1] for n in range(chunk, len(q) + 1, chunk)]
        ),
        right=_chunk_states(),
        mutants={
            "state replaced": _chunk_states(keep=0.0),
            "last token of the chunk left out": _chunk_states(added=lambda q, k, v: k[:-1].T @ v[:-1]),
            "queries written": _chunk_states(added=lambda q, k, v: q.T @ v),
            "mean over the chunk": _chunk_states(added=lambda q, k, v: k.T @ v / len(k)),
            "mask applied to the write": _chunk_states(added=lambda q, k, v: k.T @ (q @ k.T).tril() @ v),
        },
    ),
    Equation(
        label="eq-linear-work",
        kind="count",
        sample=_work_sample,
        left=_counted_flops,
        right=lambda n, d_k, d_v, c: 4 * n * d_k * d_v + 2 * n * c * (d_k + d_v),
        mutants={
            "masked half not counted": lambda n, d_k, d_v, c: 4 * n * d_k * d_v + n * c * (d_k + d_v),
            "state update forgotten": lambda n, d_k, d_v, c: 2 * n * d_k * d_v + 2 * n * c * (d_k + d_v),
            "quadratic in the length": lambda n, d_k, d_v, c: 4 * n * d_k * d_v + 2 * n * n * (d_k + d_v),
            "an addition is free": lambda n, d_k, d_v, c: 2 * n * d_k * d_v + n * c * (d_k + d_v),
        },
    ),
    Equation(
        label="eq-retrieval",
        kind="identity",
        sample=_pairs,
        left=_read_back,
        right=_retrieved(),
        mutants={
            "key norm forgotten": _retrieved(own=lambda k: 1.0),
            "key norm not squared": _retrieved(own=lambda k: k.norm()),
            "own pair counted twice": _retrieved(others=lambda i, j: True),
            "only earlier pairs interfere": _retrieved(others=lambda i, j: i < j),
            "overlap squared": _retrieved(overlap=lambda a, b: (a @ b) ** 2),
            "interference subtracted": _retrieved(sign=-1.0),
        },
    ),
    Equation(
        label="eq-interference",
        kind="identity",
        sample=_crosstalk_sample,
        left=_average_crosstalk,
        right=lambda q, designs, v: v.square().sum() / len(q),
        mutants={
            "grows with d": lambda q, designs, v: v.square().sum() * len(q),
            "root of d": lambda q, designs, v: v.square().sum() / len(q) ** 0.5,
            "1 / (d - 1)": lambda q, designs, v: v.square().sum() / (len(q) - 1),
            "values added before squaring": lambda q, designs, v: v.sum(0).square().sum() / len(q),
            "one pair too many": lambda q, designs, v: v.square().sum() / len(q) * (len(v) + 1) / len(v),
        },
    ),
    Equation(
        label="eq-welch",
        kind="bound",
        sample=_frame,
        left=lambda k: len(k) ** 2 / k.shape[1] - len(k),
        right=lambda k: _overlaps(k).square().sum(),
        mutants={
            "overlaps not squared": lambda k: _overlaps(k).sum(),
            "each pair counted once": lambda k: _overlaps(k).square().triu(1).sum(),
            "fourth powers": lambda k: _overlaps(k).pow(4).sum(),
            "mean instead of sum": lambda k: _overlaps(k).square().mean(),
        },
    ),
    Equation(
        label="eq-normaliser-gradient",
        kind="identity",
        sample=_scores,
        left=_gradient_by_score,
        right=lambda a, v: (v - a @ v / a.sum()) / a.sum(),
        mutants={
            "derivative of the normaliser forgotten": lambda a, v: v / a.sum() + 0 * a[:, None],
            "divided by the own score": lambda a, v: (v - a @ v / a.sum()) / a[:, None],
            "weighted as in softmax": lambda a, v: (a / a.sum())[:, None] * (v - a @ v / a.sum()),
            "sign turned": lambda a, v: (a @ v / a.sum() - v) / a.sum(),
        },
    ),
    Equation(
        label="eq-softmax-gradient",
        kind="identity",
        sample=_scores,
        left=_gradient_by_logit,
        right=lambda s, v: s.softmax(0)[:, None] * (v - s.softmax(0) @ v),
        mutants={
            "derivative of the normaliser forgotten": lambda s, v: s.softmax(0)[:, None] * v,
            "weight forgotten": lambda s, v: v - s.softmax(0) @ v,
            "p (1 - p) for every pair": lambda s, v: (s.softmax(0) * (1 - s.softmax(0)))[:, None] * v,
            "weighted with the logit": lambda s, v: s[:, None] * (v - s.softmax(0) @ v),
        },
    ),
    Equation(
        label="eq-feature-gradient",
        kind="bound",
        sample=_feature_sample,
        left=_gradient_by_query,
        right=_feature_bound(),
        trials=30,
        mutants={
            "not divided by the feature": _feature_bound(divide=False),
            "typical distance instead of the largest": _feature_bound(spread=lambda distance: distance.median()),
            "last value's distance": _feature_bound(spread=lambda distance: distance[-1]),
        },
    ),
    Equation(
        label="eq-output-norm",
        kind="bound",
        sample=_norm_sample,
        left=_normed,
        right=lambda x, eps: (len(x) ** 0.5, eps**-0.5),
        trials=30,
        mutants={
            "output of length one": lambda x, eps: (1.0, eps**-0.5),
            "slope at most one": lambda x, eps: (len(x) ** 0.5, 1.0),
            "fourth root of eps": lambda x, eps: (len(x) ** 0.5, eps**-0.25),
        },
    ),
    Equation(
        label="eq-kv-cache",
        kind="count",
        sample=lambda g: (_integer(g, 1, 20), _integer(g, 2, 6), _integer(g, 7, 12)),
        left=_counted_memory,
        right=lambda t, d_k, d_v: (t * (d_k + d_v), d_k * d_v),
        mutants={
            "only keys are kept": lambda t, d_k, d_v: (t * d_k, d_k * d_v),
            "state grows with t": lambda t, d_k, d_v: (t * (d_k + d_v), t * d_k * d_v),
            "cache is quadratic": lambda t, d_k, d_v: (t * t * (d_k + d_v), d_k * d_v),
        },
    ),
    Equation(
        label="eq-fixed-decay",
        kind="identity",
        sample=_fixed_decay_sample,
        left=lambda q, k, v, gamma: recurrent_decay_attention(q, k, v, gamma.expand(k.shape))[0],
        right=_fixed_decay(),
        mutants={
            "no decay": _fixed_decay(power=lambda t, i: 0),
            "one step too many": _fixed_decay(power=lambda t, i: t - i + 1),
            "age counted from the start": _fixed_decay(power=lambda t, i: i),
            "same decay for all tokens": _fixed_decay(power=lambda t, i: t),
        },
    ),
    Equation(
        label="eq-gated-decay",
        kind="identity",
        sample=_gated_decay_sample,
        left=lambda q, k, v, alpha: recurrent_decay_attention(q, k, v, alpha)[0],
        right=_gated_decay(),
        mutants={
            "new pair already decayed": _gated_decay(first=0),
            "today's decay left out": _gated_decay(last=0),
            "one decay for all channels": _gated_decay(gate=lambda a: a.mean(-1, keepdim=True).expand(a.shape)),
            "forgets what it should keep": _gated_decay(gate=lambda a: 1 - a),
        },
    ),
]
