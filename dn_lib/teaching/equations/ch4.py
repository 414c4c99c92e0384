"""Equations of chapter 4, in its order.  "By hand" means: token by token, with no chunk anywhere."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dn_lib.forms.chunkwise import chunkwise_delta_rule, multiply_adds, saved_bytes
from dn_lib.forms.chunkwise_backward import reversible_chunkwise_delta_rule
from dn_lib.forms.delta_rule import recurrent_delta_rule
from dn_lib.teaching.registry import Equation


# Inputs ------------------------------------------------------------------------------------------------
def _randint(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _inputs(generator: torch.Generator, length: int | None = None, sizes: tuple[int, int] | None = None) -> tuple:
    """q, k (unit), v, beta in (0, 2) and a state, of random sizes."""
    length = length or _randint(generator, 3, 12)
    d_k, d_v = sizes or (_randint(generator, 2, 6), _randint(generator, 2, 5))
    k = _randn(generator, length, d_k)
    beta = 2 * torch.rand(length, generator=generator, dtype=torch.float64)
    return (
        _randn(generator, length, d_k),
        k / k.norm(dim=-1, keepdim=True),
        _randn(generator, length, d_v),
        beta,
        _randn(generator, d_k, d_v),
    )


def _with_gradients(generator: torch.Generator) -> tuple:
    """The same, with gradients of the outputs and of the state that leaves."""
    q, k, v, beta, S = _inputs(generator)
    return q, k, v, beta, S, _randn(generator, *v.shape), _randn(generator, *S.shape)


def _two_stretches(generator: torch.Generator) -> tuple:
    inputs = _inputs(generator, length=_randint(generator, 4, 10))
    return *inputs, _randint(generator, 1, 3)


def _adversarial(generator: torch.Generator) -> tuple:
    """Inputs that push |A_ij| up: equal keys, queries along keys, beta at its ends."""
    q, k, _, beta, _ = _inputs(generator)
    choice = _randint(generator, 0, 3)
    if choice >= 1:
        beta = torch.where(beta > 1, 2.0, 0.0).to(beta)
    if choice >= 2:
        k = k[:1].expand_as(k)
    if choice == 3:
        q = k * q.norm(dim=-1, keepdim=True)
    return q, k, beta


def _sizes(generator: torch.Generator) -> tuple:
    count, chunk = _randint(generator, 1, 4), _randint(generator, 1, 9)
    return count, chunk, _randint(generator, 1, 7), _randint(generator, 1, 7)


# Pieces, each the formula of the text ------------------------------------------------------------------
def _eye(k: Tensor) -> Tensor:
    return torch.eye(k.shape[-2], dtype=k.dtype)


def _t_bar(k: Tensor, beta: Tensor, diagonal: int = -1) -> Tensor:
    return torch.linalg.inv(_eye(k) + (beta[:, None] * (k @ k.mT)).tril(diagonal))


def _t(k: Tensor, beta: Tensor) -> Tensor:
    return _t_bar(k, beta) * beta


def _n(k: Tensor, beta: Tensor) -> Tensor:
    below = (k @ k.mT).tril(-1)
    return -torch.linalg.inv(_eye(k) + below * beta) @ below


def _pseudo(k: Tensor, v: Tensor, beta: Tensor, S: Tensor) -> Tensor:
    T = _t(k, beta)
    return T @ v - T @ k @ S


def _householder(k: Tensor, beta: Tensor, t: int) -> Tensor:
    return torch.eye(k.shape[-1], dtype=k.dtype) - beta[t] * torch.outer(k[t], k[t])


def _by_hand(k: Tensor, v: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """States S_0 ... S_L and errors v_t - S_{t-1}^T k_t."""
    states, errors = [S], []
    for t in range(k.shape[0]):
        errors.append(v[t] - states[-1].mT @ k[t])
        states.append(_householder(k, beta, t) @ states[-1] + beta[t] * torch.outer(k[t], v[t]))
    return torch.stack(states), torch.stack(errors)


def _outputs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor) -> Tensor:
    return torch.einsum("ti,tij->tj", q, _by_hand(k, v, beta, S)[0][1:])


def _gradients(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor, do: Tensor, dS: Tensor) -> tuple:
    """dq, dk, dv, dbeta, dS by autograd through the recurrence, token by token."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, beta, S)]
    o, state = recurrent_delta_rule(*leaves[:4], scale=1.0, initial_state=leaves[4])
    return torch.autograd.grad((o, state), leaves, (do, dS))


# A chunk -----------------------------------------------------------------------------------------------
def _prefix_states(k, v, beta, S, *, shift=0, minus=True, all_rows=False):
    T = _t(k, beta)
    new = T @ v - (T @ k @ S if minus else 0)
    upto = [k.shape[0] if all_rows else max(i + shift, 0) for i in range(1, k.shape[0] + 1)]
    return torch.stack([S + k[:i].mT @ new[:i] for i in upto])


chunk_prefix = Equation(
    label="eq-chunk-prefix",
    kind="identity",
    sample=lambda g: _inputs(g)[1:],
    left=lambda k, v, beta, S: _by_hand(k, v, beta, S)[0][1:],
    right=_prefix_states,
    mutants={
        "own token left out": lambda *x: _prefix_states(*x, shift=-1),
        "what the state already holds not subtracted": lambda *x: _prefix_states(*x, minus=False),
        "future tokens included": lambda *x: _prefix_states(*x, all_rows=True),
    },
)

chunk_state = Equation(
    label="eq-chunk-state",
    kind="identity",
    sample=lambda g: _inputs(g)[1:],
    left=lambda k, v, beta, S: _by_hand(k, v, beta, S)[0][-1],
    right=lambda k, v, beta, S: S + k.mT @ _pseudo(k, v, beta, S),
    mutants={
        "W S not subtracted": lambda k, v, beta, S: S + k.mT @ _t(k, beta) @ v,
        "W S added": lambda k, v, beta, S: S + k.mT @ _t(k, beta) @ (v + k @ S),
        "beta dropped from T": lambda k, v, beta, S: S + k.mT @ _t_bar(k, beta) @ (v - k @ S),
        "T transposed": lambda k, v, beta, S: S + k.mT @ _t(k, beta).mT @ (v - k @ S),
        "diagonal inside tril": lambda k, v, beta, S: S + k.mT @ (_t_bar(k, beta, 0) * beta) @ (v - k @ S),
        "T left out": lambda k, v, beta, S: S + k.mT @ (beta[:, None] * (v - k @ S)),
        "W in the place of K": lambda k, v, beta, S: S + (_t(k, beta) @ k).mT @ _pseudo(k, v, beta, S),
        "W S taken with the new state": lambda k, v, beta, S: (
            S + k.mT @ _pseudo(k, v, beta, S + k.mT @ _pseudo(k, v, beta, S))
        ),
    },
)


def _chunk_output(q, k, v, beta, S, diagonal=0, read=None):
    return q @ (S if read is None else read) + (q @ k.mT).tril(diagonal) @ _pseudo(k, v, beta, S)


chunk_output = Equation(
    label="eq-chunk-output",
    kind="identity",
    sample=_inputs,
    left=_outputs,
    right=_chunk_output,
    mutants={
        "diagonal left out": lambda *x: _chunk_output(*x, diagonal=-1),
        "no causal mask": lambda *x: _chunk_output(*x, diagonal=len(x[0])),
        "the new state read": lambda q, k, v, beta, S: _chunk_output(
            q, k, v, beta, S, read=S + k.mT @ _pseudo(k, v, beta, S)
        ),
        "values in the place of pseudo-values": lambda q, k, v, beta, S: q @ S + (q @ k.mT).tril() @ v,
        "W S not subtracted": lambda q, k, v, beta, S: q @ S + (q @ k.mT).tril() @ _t(k, beta) @ v,
        "state left out": lambda q, k, v, beta, S: (q @ k.mT).tril() @ _pseudo(k, v, beta, S),
        "queries and keys swapped": lambda q, k, v, beta, S: q @ S + (k @ q.mT).tril() @ _pseudo(k, v, beta, S),
    },
)


def _errors(k, v, beta, S, N=None, minus=True, weighted=True):
    R = v - k @ S if minus else v
    return R + (_n(k, beta) if N is None else N) @ (beta[:, None] * R if weighted else R)


def _errors_and_pseudo(k, v, beta, S, **changes):
    E = _errors(k, v, beta, S, **changes)
    return E, beta[:, None] * E


chunk_error = Equation(
    label="eq-chunk-error",
    kind="identity",
    sample=lambda g: _inputs(g)[1:],
    left=lambda k, v, beta, S: (_by_hand(k, v, beta, S)[1], _pseudo(k, v, beta, S)),
    right=_errors_and_pseudo,
    mutants={
        "N with the wrong sign": lambda k, v, b, S: _errors_and_pseudo(k, v, b, S, N=-_n(k, b)),
        "N transposed": lambda k, v, b, S: _errors_and_pseudo(k, v, b, S, N=_n(k, b).mT),
        "only the direct effect of earlier writes": lambda k, v, b, S: _errors_and_pseudo(
            k, v, b, S, N=-(k @ k.mT).tril(-1)
        ),
        "beta dropped": lambda *x: _errors_and_pseudo(*x, weighted=False),
        "the state not subtracted": lambda *x: _errors_and_pseudo(*x, minus=False),
    },
)


# The paper's listing -----------------------------------------------------------------------------------
def _listing(k, beta, sign=-1, upto=None, columns=False):
    """B <- -tril(D K K^T, -1); rows 2..C in order: B[i, :i] += B[i, :i] B[:i, :i]; I + B."""
    B = sign * (beta[:, None] * (k @ k.mT)).tril(-1)
    for i in range(1, upto or k.shape[0]):
        if columns:
            B[i, :i] = B[i, :i] + B[:i, :i] @ B[i, :i]
        else:
            B[i, :i] = B[i, :i] + B[i, :i] @ B[:i, :i]
    return _eye(k) + B


listing_row = Equation(
    label="eq-listing-row",
    kind="identity",
    sample=lambda g: (lambda q, k, v, beta, S: (k, beta))(*_inputs(g)),
    left=_t_bar,
    right=_listing,
    mutants={
        "sign forgotten": lambda k, beta: _listing(k, beta, sign=1),
        "block transposed": lambda k, beta: _listing(k, beta, columns=True),
        "last row not updated": lambda k, beta: _listing(k, beta, upto=k.shape[0] - 1),
        "taken for the UT matrix": lambda k, beta: _listing(k, beta) * beta,
    },
)

two_matrices = Equation(
    label="eq-two-matrices",
    kind="identity",
    sample=lambda g: _inputs(g)[1:4],
    # Left: W and U by their recurrences, w_t = beta_t (k_t - sum_{i<t} (k_t^T k_i) w_i).
    # Its T: the same recurrence with the rows of the identity, since T is T I.
    left=lambda k, v, beta: (_rows(k, k, beta), _rows(k, v, beta), _rows(k, _eye(k), beta)),
    right=lambda k, v, beta: (
        _t_bar(k, beta) @ (beta[:, None] * k),
        _t_bar(k, beta) @ (beta[:, None] * v),
        _t_bar(k, beta) @ torch.diag(beta),
    ),
    mutants={
        "beta neither in T nor in its factors": lambda k, v, beta: (
            _t_bar(k, beta) @ k,
            _t_bar(k, beta) @ v,
            _t(k, beta),
        ),
        "beta twice": lambda k, v, beta: (
            _t(k, beta) @ (beta[:, None] * k),
            _t(k, beta) @ (beta[:, None] * v),
            _t(k, beta),
        ),
        "beta on the left of the inverse": lambda k, v, beta: (
            beta[:, None] * (_t_bar(k, beta) @ k),
            beta[:, None] * (_t_bar(k, beta) @ v),
            beta[:, None] * _t_bar(k, beta),
        ),
        "the two matrices taken for one": lambda k, v, beta: (*two_matrices.right(k, v, beta)[:2], _t_bar(k, beta)),
    },
)


def _rows(k, y, beta):
    rows = []
    for t in range(k.shape[0]):
        rows.append(beta[t] * (y[t] - sum((k[t] @ k[i]) * rows[i] for i in range(t))))
    return torch.stack(rows)


# The parallel form -------------------------------------------------------------------------------------
def _attention(q, k, beta):
    return (q @ k.mT).tril() @ _t(k, beta)


parallel_form = Equation(
    label="eq-parallel-form",
    kind="identity",
    sample=lambda g: _inputs(g)[:4],
    left=lambda q, k, v, beta: _outputs(q, k, v, beta, v.new_zeros(k.shape[-1], v.shape[-1])),
    right=lambda q, k, v, beta: _attention(q, k, beta) @ v,
    mutants={
        "mask after T": lambda q, k, v, beta: (q @ k.mT @ _t(k, beta)).tril() @ v,
        "diagonal left out": lambda q, k, v, beta: (q @ k.mT).tril(-1) @ _t(k, beta) @ v,
        "T on the left": lambda q, k, v, beta: _t(k, beta) @ (q @ k.mT).tril() @ v,
        "beta dropped": lambda q, k, v, beta: (q @ k.mT).tril() @ _t_bar(k, beta) @ v,
        "linear attention": lambda q, k, v, beta: (q @ k.mT).tril() @ (beta[:, None] * v),
        "T transposed": lambda q, k, v, beta: (q @ k.mT).tril() @ _t(k, beta).mT @ v,
    },
)


def _entries(q, k, beta, *, ascending=False, first=1, last=0, weight=None):
    """A_ij = beta_j q_i^T H_i ... H_{j+1} k_j, one at a time; first and last shift the product's ends."""
    length = k.shape[0]
    weight = beta if weight is None else weight
    A = torch.zeros(length, length, dtype=k.dtype)
    for i in range(length):
        for j in range(i + 1):
            steps = range(j + first, i + 1 + last)
            vector = k[j]
            for t in reversed(steps) if ascending else steps:  # the first to act stands on the right
                vector = _householder(k, beta, t) @ vector
            A[i, j] = weight[j] * (q[i] @ vector)
    return A


attention_entry = Equation(
    label="eq-attention-entry",
    kind="identity",
    sample=lambda g: (lambda q, k, v, beta, S: (q, k, beta))(*_inputs(g)),
    left=_attention,
    right=_entries,
    mutants={
        "beta dropped": lambda q, k, beta: _entries(q, k, beta, weight=torch.ones_like(beta)),
        "product in ascending order": lambda q, k, beta: _entries(q, k, beta, ascending=True),
        "the key's own H included": lambda q, k, beta: _entries(q, k, beta, first=0),
        "the query's own H left out": lambda q, k, beta: _entries(q, k, beta, last=-1),
        "no erasing: linear attention": lambda q, k, beta: (q @ k.mT).tril() * beta,
    },
)

attention_bound = Equation(
    label="eq-attention-bound",
    kind="bound",
    sample=_adversarial,
    left=lambda q, k, beta: _attention(q, k, beta).abs(),
    right=lambda q, k, beta: beta * q.norm(dim=-1, keepdim=True),
    mutants={
        "beta at most one assumed": lambda q, k, beta: q.norm(dim=-1, keepdim=True).expand(-1, k.shape[0]),
        "half as large": lambda q, k, beta: 0.5 * beta * q.norm(dim=-1, keepdim=True),
        "a row sums to at most one": lambda q, k, beta: torch.ones(k.shape[0], k.shape[0], dtype=k.dtype),
    },
    trials=60,
)

parallel_initial_state = Equation(
    label="eq-parallel-initial-state",
    kind="identity",
    sample=_inputs,
    left=_outputs,
    right=lambda q, k, v, beta, S: _attention(q, k, beta) @ v + (q - _attention(q, k, beta) @ k) @ S,
    mutants={
        "the state never erased": lambda q, k, v, beta, S: _attention(q, k, beta) @ v + q @ S,
        "the state left out": lambda q, k, v, beta, S: _attention(q, k, beta) @ v,
        "sign": lambda q, k, v, beta, S: _attention(q, k, beta) @ v + (q + _attention(q, k, beta) @ k) @ S,
        "linear attention's map": lambda q, k, v, beta, S: _attention(q, k, beta) @ v + (q - (q @ k.mT).tril() @ k) @ S,
    },
)


# What it costs -----------------------------------------------------------------------------------------
def _counted_work(count, chunk, d_k, d_v):
    q, k = (torch.ones(count * chunk, d_k) for _ in range(2))
    v, beta = torch.ones(count * chunk, d_v), torch.ones(count * chunk)
    return multiply_adds(chunkwise_delta_rule, q, k, v, beta, chunk_size=chunk)


chunk_work = Equation(
    label="eq-chunk-work",
    kind="count",
    sample=_sizes,
    left=_counted_work,
    right=lambda n, C, d_k, d_v: n * (C * C * (3 * d_k + 2 * d_v) + C * C * (C - 1) // 2 + 3 * C * d_k * d_v),
    mutants={
        "the solve forgotten": lambda n, C, d_k, d_v: n * (C * C * (3 * d_k + 2 * d_v) + 3 * C * d_k * d_v),
        "T for C^2": lambda n, C, d_k, d_v: n * (C * C * (3 * d_k + 2 * d_v + 1) + 3 * C * d_k * d_v),
        "once for the whole sequence": lambda n, C, d_k, d_v: (
            C * C * (3 * d_k + 2 * d_v) + C * C * (C - 1) // 2 + 3 * C * d_k * d_v
        ),
        "d_k and d_v exchanged": lambda n, C, d_k, d_v: (
            n * (C * C * (2 * d_k + 3 * d_v) + C * C * (C - 1) // 2 + 3 * C * d_k * d_v)
        ),
    },
)


# The backward pass -------------------------------------------------------------------------------------
def _pseudo_gradient(q, k, v, beta, S, do, dS):
    """By autograd: the pseudo-value as a leaf, o = Q S + P Vn and S' = S + K^T Vn."""
    Vn = _pseudo(k, v, beta, S).requires_grad_()
    o = q @ S + (q @ k.mT).tril() @ Vn
    return torch.autograd.grad((o, S + k.mT @ Vn), Vn, (do, dS))[0]


def _dpseudo(q, k, do, dS):
    return (q @ k.mT).tril().mT @ do + k @ dS


backward_pseudo = Equation(
    label="eq-backward-pseudo",
    kind="identity",
    sample=_with_gradients,
    left=_pseudo_gradient,
    right=lambda q, k, v, beta, S, do, dS: _dpseudo(q, k, do, dS),
    mutants={
        "the final state's gradient left out": lambda q, k, v, b, S, do, dS: (q @ k.mT).tril().mT @ do,
        "P not transposed": lambda q, k, v, b, S, do, dS: (q @ k.mT).tril() @ do + k @ dS,
        "diagonal left out": lambda q, k, v, b, S, do, dS: (q @ k.mT).tril(-1).mT @ do + k @ dS,
        "mask of the wrong triangle": lambda q, k, v, b, S, do, dS: (k @ q.mT).tril() @ do + k @ dS,
    },
)


def _through_t(k, R, beta, dVn):
    """By autograd through Vn = T R, T = (I + tril(D K K^T, -1))^{-1} D: gradients of R, beta, K."""
    k, R, beta = (x.clone().requires_grad_() for x in (k, R, beta))
    return torch.autograd.grad(_t(k, beta) @ R, (R, beta, k), dVn)


def _through_t_by_hand(k, R, beta, dVn, *, transpose=True, diagonal=-1, sign=-1, partner="pseudo", sides=2, z=True):
    N, b = _n(k, beta), beta[:, None]
    E = R + N @ (b * R)
    Z = dVn + (N.mT if transpose else N) @ (b * dVn)
    dR = b * Z
    dbeta = ((Z if z else dVn) * E).sum(-1)
    G = sign * (dR @ {"pseudo": b * E, "error": E, "R": b * R}[partner].mT).tril(diagonal)
    return dR, dbeta, (G + G.mT if sides == 2 else G) @ k


backward_t = Equation(
    label="eq-backward-t",
    kind="identity",
    # Every third beta is zero: Z has to be right there too, where T^T alone would not give it.
    sample=lambda g: (lambda q, k, v, b, S, do, dS: (k, v, b * (torch.arange(len(b)) % 3 > 0), do))(
        *_with_gradients(g)
    ),
    left=_through_t,
    right=_through_t_by_hand,
    mutants={
        "N not transposed": lambda *x: _through_t_by_hand(*x, transpose=False),
        "diagonal kept in dB": lambda *x: _through_t_by_hand(*x, diagonal=0),
        "sign of dB": lambda *x: _through_t_by_hand(*x, sign=1),
        "keys on one side only": lambda *x: _through_t_by_hand(*x, sides=1),
        "error in the place of the pseudo-value in dB": lambda *x: _through_t_by_hand(*x, partner="error"),
        "R in the place of E in dB": lambda *x: _through_t_by_hand(*x, partner="R"),
        "beta's effect on later errors forgotten": lambda *x: _through_t_by_hand(*x, z=False),
    },
)


def _dR(q, k, beta, do, dS):
    return _t(k, beta).mT @ _dpseudo(q, k, do, dS)


backward_state = Equation(
    label="eq-backward-state",
    kind="identity",
    sample=_with_gradients,
    left=lambda *x: _gradients(*x)[4],
    right=lambda q, k, v, b, S, do, dS: dS + q.mT @ do - k.mT @ _dR(q, k, b, do, dS),
    mutants={
        "the erasing forgotten": lambda q, k, v, b, S, do, dS: dS + q.mT @ do,
        "sign": lambda q, k, v, b, S, do, dS: dS + q.mT @ do + k.mT @ _dR(q, k, b, do, dS),
        "the outputs forgotten": lambda q, k, v, b, S, do, dS: dS - k.mT @ _dR(q, k, b, do, dS),
        "dVn in the place of dR": lambda q, k, v, b, S, do, dS: dS + q.mT @ do - k.mT @ _dpseudo(q, k, do, dS),
    },
)


def _input_gradients(q, k, v, beta, S, do, dS, drop="", diagonal=0):
    Vn, dR = _pseudo(k, v, beta, S), _dR(q, k, beta, do, dS)
    F = (do @ Vn.mT).tril(diagonal)
    G = -(dR @ Vn.mT).tril(-1)
    terms = {
        "outputs": F.mT @ q,
        "write": Vn @ dS.mT,
        "error": -dR @ S.mT,
        "T": (G + G.mT) @ k,
    }
    return do @ S.mT + F @ k, sum(term for name, term in terms.items() if name != drop), dR


backward_inputs = Equation(
    label="eq-backward-inputs",
    kind="identity",
    sample=_with_gradients,
    left=lambda *x: _gradients(*x)[:3],
    right=_input_gradients,
    mutants={
        "dK without the outputs": lambda *x: _input_gradients(*x, drop="outputs"),
        "dK without the write": lambda *x: _input_gradients(*x, drop="write"),
        "dK without the error": lambda *x: _input_gradients(*x, drop="error"),
        "dK without T": lambda *x: _input_gradients(*x, drop="T"),
        "mask without its diagonal": lambda *x: _input_gradients(*x, diagonal=-1),
        "dV = dVn": lambda q, k, v, b, S, do, dS: (
            *_input_gradients(q, k, v, b, S, do, dS)[:2],
            _dpseudo(q, k, do, dS),
        ),
    },
)

reversible_state = Equation(
    label="eq-reversible-state",
    kind="identity",
    sample=lambda g: _inputs(g)[1:],
    left=lambda k, v, beta, S: S,
    right=lambda k, v, beta, S: _by_hand(k, v, beta, S)[0][-1] - k.mT @ (beta[:, None] * _by_hand(k, v, beta, S)[1]),
    mutants={
        "sign": lambda k, v, beta, S: (
            _by_hand(k, v, beta, S)[0][-1] + k.mT @ (beta[:, None] * _by_hand(k, v, beta, S)[1])
        ),
        "beta dropped": lambda k, v, beta, S: _by_hand(k, v, beta, S)[0][-1] - k.mT @ _by_hand(k, v, beta, S)[1],
        "values in the place of errors": lambda k, v, beta, S: (
            _by_hand(k, v, beta, S)[0][-1] - k.mT @ (beta[:, None] * v)
        ),
    },
)


def _saved(count, chunk, d_k, d_v):
    length = count * chunk
    shapes = ((length, d_k), (length, d_k), (length, d_v), (length,))
    inputs = [torch.ones(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return saved_bytes(reversible_chunkwise_delta_rule, *inputs, chunk_size=chunk)


reversible_bytes = Equation(
    label="eq-saved-bytes",
    kind="count",
    sample=_sizes,
    left=_saved,
    right=lambda n, C, d_k, d_v: 8 * (n * C * (2 * d_k + d_v + 1) + d_k * d_v),
    mutants={
        "a state for each chunk": lambda n, C, d_k, d_v: 8 * (n * C * (2 * d_k + d_v + 1) + (n + 1) * d_k * d_v),
        "values kept as well": lambda n, C, d_k, d_v: 8 * (n * C * (2 * d_k + 2 * d_v + 1) + d_k * d_v),
        "beta forgotten": lambda n, C, d_k, d_v: 8 * (n * C * (2 * d_k + d_v) + d_k * d_v),
    },
)


# Chunks as affine maps ---------------------------------------------------------------------------------
def _affine(k, v, beta):
    T = _t(k, beta)
    return torch.eye(k.shape[-1], dtype=k.dtype) - k.mT @ T @ k, k.mT @ T @ v


def _product_and_state(k, v, beta):
    M = torch.eye(k.shape[-1], dtype=k.dtype)
    for t in range(k.shape[0]):
        M = _householder(k, beta, t) @ M
    return M, _by_hand(k, v, beta, v.new_zeros(k.shape[-1], v.shape[-1]))[0][-1]


chunk_affine = Equation(
    label="eq-chunk-affine",
    kind="identity",
    sample=lambda g: _inputs(g)[1:4],
    left=_product_and_state,
    right=_affine,
    mutants={
        "product in ascending order": lambda k, v, b: (_affine(k, v, b)[0].mT, _affine(k, v, b)[1]),
        "K and W exchanged": lambda k, v, b: (
            torch.eye(k.shape[-1], dtype=k.dtype) - (_t(k, b) @ k).mT @ k,
            _affine(k, v, b)[1],
        ),
        "values in the place of U": lambda k, v, b: (_affine(k, v, b)[0], k.mT @ (b[:, None] * v)),
        "one beta missing": lambda k, v, b: (
            torch.eye(k.shape[-1], dtype=k.dtype) - k.mT @ _t_bar(k, b) @ k,
            _affine(k, v, b)[1],
        ),
    },
)


def _both(q, k, v, beta, S, cut):
    return _affine(k[:cut], v[:cut], beta[:cut]), _affine(k[cut:], v[cut:], beta[cut:])


def _composed(*x, rule):
    (M1, X1), (M2, X2) = _both(*x)
    return rule(M1, X1, M2, X2)


affine_composition = Equation(
    label="eq-affine-composition",
    kind="identity",
    sample=_two_stretches,
    left=lambda q, k, v, beta, S, cut: _product_and_state(k, v, beta),
    right=lambda *x: _composed(*x, rule=lambda M1, X1, M2, X2: (M2 @ M1, M2 @ X1 + X2)),
    mutants={
        "factors of M swapped": lambda *x: _composed(*x, rule=lambda M1, X1, M2, X2: (M1 @ M2, M2 @ X1 + X2)),
        "M1 acts on X2": lambda *x: _composed(*x, rule=lambda M1, X1, M2, X2: (M2 @ M1, M1 @ X2 + X1)),
        "states summed": lambda *x: _composed(*x, rule=lambda M1, X1, M2, X2: (M2 @ M1, X1 + X2)),
        "M1 acts on X1": lambda *x: _composed(*x, rule=lambda M1, X1, M2, X2: (M2 @ M1, M1 @ X1 + X2)),
        "the later M transposed": lambda *x: _composed(*x, rule=lambda M1, X1, M2, X2: (M2.mT @ M1, M2.mT @ X1 + X2)),
        "only the later state": lambda *x: _composed(*x, rule=lambda M1, X1, M2, X2: (M2 @ M1, X2)),
    },
)

summing_error = Equation(
    label="eq-summing-error",
    kind="identity",
    sample=_two_stretches,
    # Left: the states of both stretches, each begun at zero, summed, less the true state.
    left=lambda q, k, v, beta, S, cut: (
        [
            _product_and_state(k[:cut], v[:cut], beta[:cut])[1]
            + _product_and_state(k[cut:], v[cut:], beta[cut:])[1]
            - _product_and_state(k, v, beta)[1]
        ]
        * 2
    ),
    # Right: (I - M_2) X_1 with M_2 multiplied out, and K_2^T W_2 X_1.
    right=lambda q, k, v, beta, S, cut: (
        _affine(k[:cut], v[:cut], beta[:cut])[1]
        - _product_and_state(k[cut:], v[cut:], beta[cut:])[0] @ _affine(k[:cut], v[:cut], beta[:cut])[1],
        k[cut:].mT @ _t(k[cut:], beta[cut:]) @ k[cut:] @ _affine(k[:cut], v[:cut], beta[:cut])[1],
    ),
    mutants={
        "no error": lambda q, k, v, beta, S, cut: [torch.zeros_like(S)] * 2,
        "M2 X1": lambda *x: [_composed(*x, rule=lambda M1, X1, M2, X2: M2 @ X1)] * 2,
        "the wrong stretch": lambda *x: [_composed(*x, rule=lambda M1, X1, M2, X2: X2 - M1 @ X2)] * 2,
        "W_2 for K_2": lambda q, k, v, beta, S, cut: (
            summing_error.right(q, k, v, beta, S, cut)[0],
            (_t(k[cut:], beta[cut:]) @ k[cut:]).mT @ k[cut:] @ _affine(k[:cut], v[:cut], beta[:cut])[1],
        ),
    },
)

backward_affine = Equation(
    label="eq-backward-affine",
    kind="identity",
    sample=_with_gradients,
    left=lambda *x: _gradients(*x)[4],
    right=lambda q, k, v, b, S, do, dS: _affine(k, v, b)[0].mT @ dS + (q - _attention(q, k, b) @ k).mT @ do,
    mutants={
        "M not transposed": lambda q, k, v, b, S, do, dS: (
            _affine(k, v, b)[0] @ dS + (q - _attention(q, k, b) @ k).mT @ do
        ),
        "Y without the erasing": lambda q, k, v, b, S, do, dS: _affine(k, v, b)[0].mT @ dS + q.mT @ do,
        "linear attention": lambda q, k, v, b, S, do, dS: dS + q.mT @ do,
    },
)


# Sequence parallelism ----------------------------------------------------------------------------------
def _stretches(generator: torch.Generator) -> tuple:
    q, k, v, beta, S, do, dS = _with_gradients(generator)
    cuts = sorted(_randint(generator, 0, k.shape[0]) for _ in range(2))
    return q, k, v, beta, S, do, dS, [0, *cuts, k.shape[0]]


def _entering(q, k, v, beta, S, do, dS, offsets, use_m=True, transpose=False, inclusive=False):
    states = [S]
    for a, b in pairwise(offsets):
        M, X = _affine(k[a:b], v[a:b], beta[a:b])
        M = M.mT if transpose else M
        states.append((M @ states[-1] if use_m else states[-1]) + X)
    return torch.stack(states[1:] if inclusive else states[:-1])


entering_state = Equation(
    label="eq-entering-state",
    kind="identity",
    sample=_stretches,
    left=lambda q, k, v, beta, S, do, dS, offsets: _by_hand(k, v, beta, S)[0][offsets[:-1]],
    right=_entering,
    mutants={
        "states summed": lambda *x: _entering(*x, use_m=False),
        "M transposed": lambda *x: _entering(*x, transpose=True),
        "own stretch included": lambda *x: _entering(*x, inclusive=True),
    },
)


def _leaving_by_autograd(q, k, v, beta, S, do, dS, offsets):
    """The gradients of the states at the ends of the stretches, each as the input of what follows it."""
    states = _by_hand(k, v, beta, S)[0]
    return torch.stack(
        [_gradients(q[b:], k[b:], v[b:], beta[b:], states[b], do[b:], dS)[4] if b < len(q) else dS for b in offsets[1:]]
    )


def _leaving(q, k, v, beta, S, do, dS, offsets, use_m=True, transpose=True, backwards=True):
    gradients = [dS]
    stretches = list(pairwise(offsets))
    for a, b in reversed(stretches[1:]) if backwards else stretches[:-1]:
        M, _ = _affine(k[a:b], v[a:b], beta[a:b])
        Y = (q[a:b] - _attention(q[a:b], k[a:b], beta[a:b]) @ k[a:b]).mT @ do[a:b]
        M = M.mT if transpose else M
        gradients.append((M @ gradients[-1] if use_m else gradients[-1]) + Y)
    return torch.stack(gradients[::-1])


leaving_gradient = Equation(
    label="eq-leaving-gradient",
    kind="identity",
    sample=_stretches,
    left=_leaving_by_autograd,
    right=_leaving,
    mutants={
        "gradients summed": lambda *x: _leaving(*x, use_m=False),
        "M not transposed": lambda *x: _leaving(*x, transpose=False),
        "carried forward in time": lambda *x: _leaving(*x, backwards=False),
    },
)

ENTRIES = [
    chunk_prefix,
    chunk_state,
    chunk_output,
    chunk_error,
    listing_row,
    two_matrices,
    parallel_form,
    attention_entry,
    attention_bound,
    parallel_initial_state,
    chunk_work,
    backward_pseudo,
    backward_t,
    backward_state,
    backward_inputs,
    reversible_state,
    reversible_bytes,
    chunk_affine,
    affine_composition,
    summing_error,
    entering_state,
    backward_affine,
    leaving_gradient,
]
