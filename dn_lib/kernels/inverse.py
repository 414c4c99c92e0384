"""The triangular inverse on chip, as the strictly lower matrix N with T = D + D N D, D = diag(beta).

N_ij = -k_i^T H_{i-1} ... H_{j+1} k_j.  With unit keys and beta in [0, 2] each H is a contraction, so
|N_ij| <= 1, and so is every number that the recursion below meets: it multiplies float16 operands safely on
inputs (identical keys, beta = 2) where doubling, (I - A)(I + A^2)(I + A^4)..., overflows.

With a gate per token B is tril(K K^T * ratios, -1), the recursion is the same, and so is the bound: N_ij is then
multiplied by the gates from j + 1 to i, each at most 1.  The proof, also for gates per key channel, is in
`dn_lib.forms.gated.gated_scaled_inverse`.

How finely the operands are rounded is PRECISION: "half" (float16, for bfloat16 inputs, which are coarser than that),
"halves" (each operand as the sum of two float16, for float16 inputs), "ieee" or "tf32" (for float32 inputs).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dn_lib.kernels.common import dot


@triton.jit
def _quarters(x, G: tl.constexpr, S: tl.constexpr):
    """Of G matrices of 2S x 2S: the blocks on the diagonal, `[2 G, S, S]`, and those below it, `[G, S, S]`."""
    x = tl.permute(tl.reshape(x, [G, 2, S, 2, S]), (0, 2, 4, 1, 3))
    left, right = tl.split(x)
    x11, x21 = tl.split(left)
    _, x22 = tl.split(right)
    return tl.reshape(tl.permute(tl.join(x11, x22), (0, 3, 1, 2)), [2 * G, S, S]), x21


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b of float32 matrices, rounded as PRECISION says; two halves hold 22 bits, and lo lo' is below them."""
    if PRECISION == "half":
        return dot(a.to(tl.float16), b.to(tl.float16), "ieee")
    elif PRECISION == "halves":
        a_hi, b_hi = a.to(tl.float16), b.to(tl.float16)
        a_lo, b_lo = (a - a_hi.to(tl.float32)).to(tl.float16), (b - b_hi.to(tl.float32)).to(tl.float16)
        return dot(a_lo, b_hi, "ieee") + dot(a_hi, b_lo, "ieee") + dot(a_hi, b_hi, "ieee")
    else:
        return dot(a, b, PRECISION)


@triton.jit
def _product(b21, n11, n22, beta1, beta2, PRECISION: tl.constexpr):
    """-N_21 = (I + N_22 D_2) B_21 (I + D_1 N_11), matrix by matrix."""
    right = b21 + _dot(b21, beta1 * n11, PRECISION)
    return right + _dot(n22 * beta2, right, PRECISION)


@triton.jit
def _below(i, j, SIZE: tl.constexpr):
    """Entries below the diagonal between two neighbouring blocks of SIZE."""
    return (i // (2 * SIZE) == j // (2 * SIZE)) & (i // SIZE > j // SIZE)


@triton.jit
def _inside(x, beta, PRECISION: tl.constexpr):
    """N of each of the 16 x 16 blocks of B, from blocks of 2, 4 and 8; x: `[G, 16, 16]`, beta: `[G, 16]`.

    A dot takes no less than 16 x 16, so the small blocks stay where they are, the rest of the matrix being zero.
    """
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    n = tl.where(i // 2 == j // 2, -x, 0.0)
    for level in tl.static_range(1, 4):
        below = tl.where(_below(i, j, 2**level), x, 0.0)
        n -= _product(below, n, n, beta[:, :, None], beta[:, None, :], PRECISION)
    return n


@triton.jit
def _joined(n, b21, beta, G: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr):
    """N of G blocks of 2S from those of 2 G blocks of S, `[2 G, S, S]`, and B between them, `[G, S, S]`."""
    n11, n22 = tl.split(tl.permute(tl.reshape(n, [G, 2, S, S]), (0, 2, 3, 1)))
    beta1, beta2 = tl.split(tl.permute(tl.reshape(beta, [G, 2, S]), (0, 2, 1)))
    n21 = -_product(b21, n11, n22, beta1[:, :, None], beta2[:, None, :], PRECISION)
    rows = tl.join(tl.join(n11, tl.zeros_like(n11)), tl.join(n21, n22))
    return tl.reshape(tl.permute(rows, (0, 4, 1, 3, 2)), [G, 2 * S, 2 * S])


@triton.jit
def scaled_inverse(B, beta, C: tl.constexpr, PRECISION: tl.constexpr):
    """N from B = tril(K K^T, -1) and beta: blocks of 2, 4, ..., C, each from two of the size before.

    B: [C, C] float32, strictly lower, C one of 16, 32, 64.  beta: [C] float32.  Half of all entries are zero by
    their place and never multiplied.
    """
    if C == 64:
        x, below32 = _quarters(tl.reshape(B, [1, 64, 64]), 1, 32)
        x, below16 = _quarters(x, 2, 16)
    elif C == 32:
        x, below16 = _quarters(tl.reshape(B, [1, 32, 32]), 1, 16)
    else:
        x = tl.reshape(B, [1, 16, 16])
    n = _inside(x, tl.reshape(beta, [C // 16, 16]), PRECISION)
    if C >= 32:
        n = _joined(n, below16, beta, C // 32, 16, PRECISION)
    if C == 64:
        n = _joined(n, below32, beta, 1, 32, PRECISION)
    return tl.reshape(n, [C, C])
