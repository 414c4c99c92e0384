"""Chapter 3: products of Householder matrices, the WY representation and the UT transform.

Shapes: k `[..., L, d]`, v `[..., L, d_v]`, beta `[..., L]`, with any leading dimensions.  Arithmetic is in
float32, or in float64 if any input is float64, and results have that dtype.  Everything is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from dn_lib.forms.common import check_function, check_tensors, describe, fresh, is_number, working_dtype

MatMul = Callable[[Tensor, Tensor], Tensor]


Method = TypeVar("Method")


def _prepare(k: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """k and beta in the working dtype, after a check of what they are and of their shapes."""
    check_tensors(k=k, beta=beta)
    if k.dim() < 2:
        raise ValueError(f"k must be [..., L, d], got {list(k.shape)}")
    if beta.shape != k.shape[:-1]:
        raise ValueError(f"beta must be [..., L] = {list(k.shape[:-1])} to match k, got {list(beta.shape)}")
    dtype = working_dtype(k, beta)
    return k.to(dtype), beta.to(dtype)


def _choose(name: str, value: str, table: dict[str, Method]) -> Method:
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, table))}, got {describe(value)}")
    return table[value]


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


# ---- One matrix ------------------------------------------------------------------------------------------
def householder_matrix(k: Tensor, beta: Tensor | float) -> Tensor:
    """H = I - beta k k^T: the identity across k, the factor 1 - beta |k|^2 along k.

    k: `[..., d]`.  beta: `[...]`, or a number.  Returns `[..., d, d]`.
    Raises ValueError if beta's shape is not k's without its last dimension.
    Implements eq-householder-matrix; with beta |k|^2 = 2 the reflector of Householder (1958).

    >>> householder_matrix(torch.tensor([0.6, 0.8]), 2.0) @ torch.tensor([0.6, 0.8])
    tensor([-0.6000, -0.8000])
    """
    check_tensors(k=k)
    if k.dim() < 1:
        raise ValueError(f"k must be [..., d], got {list(k.shape)}")
    if isinstance(beta, Tensor):
        check_tensors(k=k, beta=beta)
    elif not is_number(beta):
        raise TypeError(f"beta must be a tensor or a number, got {describe(beta)}")
    beta = torch.as_tensor(beta, device=k.device)
    if beta.dim() > 0 and beta.shape != k.shape[:-1]:
        raise ValueError(f"beta must be [...] = {list(k.shape[:-1])} to match k, got {list(beta.shape)}")
    # A plain number takes k's precision; a float64 tensor asks for float64.
    dtype = working_dtype(k, beta) if beta.dim() > 0 else working_dtype(k)
    k, beta = k.to(dtype), beta.to(dtype)
    return _eye(k.shape[-1], k) - beta[..., None, None] * k[..., :, None] * k[..., None, :]


# ---- Products --------------------------------------------------------------------------------------------
def householder_product(k: Tensor, beta: Tensor) -> Tensor:
    """H_L ... H_1, multiplied out: the newest factor on the left, L products of d x d matrices.

    k: `[..., L, d]`.  beta: `[..., L]`.  Returns `[..., d, d]`, the identity if L is 0.
    Raises ValueError if the shapes do not match.
    The left side of eq-wy.  It costs L d^3 multiplications: a reference, not a method.

    >>> householder_product(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 2.0]))
    tensor([[ 0.,  0.],
            [ 0., -1.]])
    """
    k, beta = _prepare(k, beta)
    product = _eye(k.shape[-1], k).expand(*k.shape[:-2], -1, -1)
    for t in range(k.shape[-2]):
        product = householder_matrix(k[..., t, :], beta[..., t]) @ product
    return product


def apply_householder(k: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """H_L ... H_1 S without forming any H: L rank-one updates of 2 d d_v multiplications each.

    k: `[..., L, d]`.  beta: `[..., L]`.  state: `[..., d, d_v]`.  Returns `[..., d, d_v]`.
    Raises ValueError if the shapes do not match.  Implements eq-householder-apply.

    >>> apply_householder(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]), torch.eye(2))
    tensor([[0., 0.],
            [0., 1.]])
    """
    k, beta = _prepare(k, beta)
    check_tensors(k=k, state=state)
    if state.dim() < 2 or state.shape[-2] != k.shape[-1]:
        raise ValueError(f"state must be [..., {k.shape[-1]}, d_v] to match k, got {list(state.shape)}")
    try:
        leading = torch.broadcast_shapes(k.shape[:-2], state.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"state must have leading dimensions {list(k.shape[:-2])} to match k, got {list(state.shape)}"
        ) from None
    dtype = working_dtype(k, state)
    k, beta, state = k.to(dtype), beta.to(dtype), state.to(dtype)
    if k.shape[-2] == 0:  # what is handed back must not be the caller's own tensor
        return fresh(state.expand(*leading, *state.shape[-2:]))
    for t in range(k.shape[-2]):
        k_t = k[..., t : t + 1, :]
        state = state - beta[..., t, None, None] * (k_t.mT @ (k_t @ state))
    return state


# ---- The WY representation -------------------------------------------------------------------------------
def pseudo_values(k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """U with rows u_t = beta_t (v_t - sum_{i<t} (k_t^T k_i) u_i), one after the other.

    k: `[..., L, d]`.  v: `[..., L, d_v]`.  beta: `[..., L]`.  Returns `[..., L, d_v]`.
    Raises ValueError if the shapes do not match.
    Implements eq-pseudo-values: K^T U is the state that the delta rule reaches from zero.

    >>> k, v = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[5.0], [7.0]])
    >>> pseudo_values(k, v, torch.tensor([1.0, 1.0]))
    tensor([[5.],
            [2.]])
    """
    k, beta = _prepare(k, beta)
    check_tensors(k=k, v=v)
    if v.shape[:-1] != k.shape[:-1]:
        wanted = ", ".join(map(str, [*k.shape[:-1], "d_v"]))
        raise ValueError(f"v must be [..., L, d_v] = [{wanted}] to match k, got {list(v.shape)}")
    dtype = working_dtype(k, v)
    k, v, beta = k.to(dtype), v.to(dtype), beta.to(dtype)
    u = v[..., :0, :]
    for t in range(k.shape[-2]):
        seen = (k[..., t : t + 1, :] @ k[..., :t, :].mT) @ u
        u = torch.cat([u, beta[..., t, None, None] * (v[..., t : t + 1, :] - seen)], dim=-2)
    return u


def wy_recursion(k: Tensor, beta: Tensor) -> Tensor:
    """W with rows w_t = beta_t (k_t - sum_{i<t} (k_t^T k_i) w_i): the pseudo-values of the keys themselves.

    k: `[..., L, d]`.  beta: `[..., L]`.  Returns `[..., L, d]`.
    Raises ValueError if the shapes do not match.
    Implements eq-wy-vectors, so that H_L ... H_1 = I - K^T W (eq-wy; Bischof and Van Loan, 1987).

    >>> wy_recursion(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0.5, 1.0]))
    tensor([[0.5000, 0.0000],
            [0.5000, 0.0000]])
    """
    return pseudo_values(k, k, beta)


# ---- The UT transform ------------------------------------------------------------------------------------
def ut_transform(k: Tensor, beta: Tensor, *, method: str = "solve", matmul: MatMul = torch.matmul) -> Tensor:
    """T = (I + tril(diag(beta) K K^T, -1))^{-1} diag(beta), so that W = T K and U = T V.

    k: `[..., L, d]`.  beta: `[..., L]`.  Returns `[..., L, L]`, lower triangular with diagonal beta.
    method: `"substitution"` row by row (eq-ut-row); `"solve"` one triangular solve; `"blocked"` the recursion
    on N (eq-n-blocked), safe for correlated keys; `"doubling"` products of powers (eq-doubling), which fails
    on correlated keys in floating point and is here to show it.
    matmul: what multiplies matrices in every method but `"solve"`; see `rounded_matmul`.
    Raises ValueError if the shapes do not match or the method is unknown.
    Implements eq-ut (Joffrain et al., 2006).

    >>> ut_transform(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0.5, 1.0]))
    tensor([[ 0.5000,  0.0000],
            [-0.5000,  1.0000]])
    """
    k, beta = _prepare(k, beta)
    check_function("matmul", matmul)
    return _choose("method", method, UT_METHODS)((k @ k.mT).tril(-1), beta, matmul)


def _ut_substitution(B: Tensor, beta: Tensor, matmul: MatMul) -> Tensor:
    """eq-ut-row: row i from the i rows above it, i^2 multiplications."""
    T = B[..., :0, :0]
    for i in range(B.shape[-1]):
        beta_i = beta[..., i, None, None]
        row = torch.cat([-beta_i * matmul(B[..., i : i + 1, :i], T), beta_i], dim=-1)
        T = torch.cat([pad(T, (0, 1)), row], dim=-2)
    return T


def _ut_solve(B: Tensor, beta: Tensor, matmul: MatMul) -> Tensor:
    A = beta[..., None] * B
    identity_plus_A = A + _eye(B.shape[-1], B)
    return torch.linalg.solve_triangular(identity_plus_A, torch.diag_embed(beta), upper=False, unitriangular=True)


def _ut_blocked(B: Tensor, beta: Tensor, matmul: MatMul) -> Tensor:
    """eq-scaled-inverse: T = D + D N D."""
    return torch.diag_embed(beta) + beta[..., None] * _n_blocked(B, beta, matmul) * beta[..., None, :]


def _ut_doubling(B: Tensor, beta: Tensor, matmul: MatMul) -> Tensor:
    """eq-doubling: after the factor with power 2^m, `total` is the sum of all powers below 2^(m+1)."""
    power = -beta[..., None] * B
    total, reach = power + _eye(B.shape[-1], B), 2
    while reach < B.shape[-1]:
        power = matmul(power, power)
        total, reach = total + matmul(total, power), 2 * reach
    return total * beta[..., None, :]


UT_METHODS = {
    "substitution": _ut_substitution,
    "solve": _ut_solve,
    "blocked": _ut_blocked,
    "doubling": _ut_doubling,
}


# ---- T without the betas at its ends -----------------------------------------------------------------------
def scaled_inverse(k: Tensor, beta: Tensor, *, method: str = "blocked", matmul: MatMul = torch.matmul) -> Tensor:
    """N, strictly lower triangular, with T = D + D N D where D = diag(beta); |N| <= 1 for unit keys.

    k: `[..., L, d]`.  beta: `[..., L]`, zeros allowed.  Returns `[..., L, L]`.
    method: `"blocked"` merges pairs of diagonal blocks of size 1, 2, 4, ... (eq-n-blocked); `"masked"` does
    the same merges as products of whole matrices (eq-n-level), as a kernel does that cannot cut a tile into
    pieces; `"solve"` is one triangular solve with N = -(I + B D)^{-1} B, where B = tril(K K^T, -1).
    matmul: what multiplies matrices in the first two; see `rounded_matmul`.
    Raises ValueError if the shapes do not match or the method is unknown.
    Implements eq-scaled-inverse and eq-n-entries.

    >>> scaled_inverse(torch.tensor([[1.0, 0.0]]).expand(3, 2), torch.tensor([2.0, 2.0, 2.0]))
    tensor([[ 0.,  0.,  0.],
            [-1.,  0.,  0.],
            [ 1., -1.,  0.]])
    """
    k, beta = _prepare(k, beta)
    check_function("matmul", matmul)
    return _choose("method", method, N_METHODS)((k @ k.mT).tril(-1), beta, matmul)


def _n_solve(B: Tensor, beta: Tensor, matmul: MatMul) -> Tensor:
    identity_plus_BD = B * beta[..., None, :] + _eye(B.shape[-1], B)
    return torch.linalg.solve_triangular(identity_plus_BD, -B, upper=False, unitriangular=True)


def _merge(N11: Tensor, N22: Tensor, B21: Tensor, beta1: Tensor, beta2: Tensor, matmul: MatMul) -> Tensor:
    """eq-n-blocked: N_21 = -(I + N_22 D_2) B_21 (I + D_1 N_11)."""
    left = B21 + matmul(N22, beta2[..., :, None] * B21)
    return -(left + matmul(left * beta1[..., None, :], N11))


def _n_blocked(B: Tensor, beta: Tensor, matmul: MatMul) -> Tensor:
    """Blocks of size s in a stack `[..., L/s, s, s]`, merged two by two until one is left."""
    length, batch = B.shape[-1], B.shape[:-2]
    size = 1 << max(length - 1, 0).bit_length()
    # Padding has beta = 0: such a step does nothing, and nothing here divides by beta.
    B, beta = pad(B, (0, size - length) * 2), pad(beta, (0, size - length))
    N, s = B.new_zeros(*batch, size, 1, 1), 1
    while s < size:
        pairs = size // (2 * s)
        tiles = B.reshape(*batch, pairs, 2, s, pairs, 2, s).diagonal(dim1=-6, dim2=-3)
        B21 = tiles[..., 1, :, 0, :, :].movedim(-1, -3)
        N11, N22 = N[..., 0::2, :, :], N[..., 1::2, :, :]
        beta1, beta2 = beta.reshape(*batch, pairs, 2, s).unbind(-2)
        N21 = _merge(N11, N22, B21, beta1, beta2, matmul)
        N, s = torch.cat([pad(N11, (0, s)), torch.cat([N21, N22], dim=-1)], dim=-2), 2 * s
    return N[..., 0, :length, :length]


def _n_masked(B: Tensor, beta: Tensor, matmul: MatMul) -> Tensor:
    """All merges of a level at once: N is block diagonal, B_s holds the lower left block of each pair."""
    N, s, index = torch.zeros_like(B), 1, torch.arange(B.shape[-1], device=B.device)
    while s < B.shape[-1]:
        block = index // s
        lower_left = (block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1)
        N, s = N + _merge(N, N, B * lower_left, beta, beta, matmul), 2 * s
    return N


N_METHODS = {"blocked": _n_blocked, "masked": _n_masked, "solve": _n_solve}


def rounded_matmul(dtype: torch.dtype) -> MatMul:
    """A matrix product whose operands are first rounded to `dtype` and whose sums keep the wider dtype.

    That is what a tensor core does with half-precision operands.  Returns a function of two tensors
    `[..., m, n]` and `[..., n, p]` of one dtype, which gives `[..., m, p]` in that dtype.

    >>> a = torch.tensor([[1.0 + 2**-12]])
    >>> rounded_matmul(torch.float16)(a, a).item(), (a @ a).item() > 1
    (1.0, True)
    """

    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        return a.to(dtype).to(a.dtype) @ b.to(dtype).to(b.dtype)

    return matmul
