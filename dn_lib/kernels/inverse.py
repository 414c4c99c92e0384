"""The triangular inverse on chip, as the strictly lower matrix N with T = D + D N D, D = diag(beta).

N_ij = -k_i^T H_{i-1} ... H_{j+1} k_j.  With unit keys and beta in [0, 2] each H is a contraction, so
|N_ij| <= 1, and so is every number that the recursion below meets: it multiplies float16 operands safely on
inputs (identical keys, beta = 2) where doubling, (I - A)(I + A^2)(I + A^4)..., overflows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.common import dot


@triton.jit
def _join(n, l_cross, beta_rows, beta_columns, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """N_21 = -(I + N_22 D_2) L_21 (I + D_1 N_11), for all pairs of neighbouring blocks at once.

    `n` is block diagonal, `l_cross` holds L in the blocks to be filled; the product lies in those blocks.
    """
    l_half = l_cross.to(DTYPE)
    right = l_cross + dot(l_half, (beta_rows * n).to(DTYPE), PRECISION)
    left = right + dot((n * beta_columns).to(DTYPE), right.to(DTYPE), PRECISION)
    return n - left


@triton.jit
def _cross(i, j, SIZE: tl.constexpr):
    """Entries below the diagonal that lie between two neighbouring blocks of SIZE."""
    return (i // (2 * SIZE) == j // (2 * SIZE)) & (i // SIZE > j // SIZE)


@triton.jit
def scaled_inverse(L, beta, C: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr):
    """N from L = tril(K K^T, -1) and beta: blocks of 2, 4, ..., C, each from two of the size before.

    L: [C, C] float32, strictly lower.  beta: [C] float32.  Operands are float16 if HALF, else float32.
    Blocks up to 16 are joined as C/16 small matrices, wider ones in the full C x C square.
    """
    DTYPE: tl.constexpr = tl.float16 if HALF else tl.float32
    G: tl.constexpr = C // 16
    # The diagonal blocks of L as [G, 16, 16].
    g = tl.arange(0, G)
    same = g[:, None, None, None] == g[None, None, :, None]
    small = tl.sum(tl.where(same, tl.reshape(L, [G, 16, G, 16]), 0.0), axis=2)
    beta16 = tl.reshape(beta, [G, 16])
    r = tl.arange(0, 16)[None, :, None]
    c = tl.arange(0, 16)[None, None, :]
    n16 = tl.where(r // 2 == c // 2, -small, 0.0)
    for level in tl.static_range(1, 4):
        cross = tl.where(_cross(r, c, 2**level), small, 0.0)
        n16 = _join(n16, cross, beta16[:, :, None], beta16[:, None, :], DTYPE, PRECISION)
    n = tl.reshape(tl.where(same, n16[:, :, None, :], 0.0), [C, C])
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    for level in tl.static_range(4, 6):
        if 2**level < C:
            cross = tl.where(_cross(i, j, 2**level), L, 0.0)
            n = _join(n, cross, beta[:, None], beta[None, :], DTYPE, PRECISION)
    return n
