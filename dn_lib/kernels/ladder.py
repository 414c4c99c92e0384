"""Chapter 5's ladder: small kernels, from a first program to the delta rule in four steps and in one.

They are written to be read and compared, not to be fast; the operator uses the kernels beside this file.
Tensors are `[B, L, H, d]`, as in `dn_lib.delta_rule`; what is not contiguous is copied first.  A program that
owns a head finds row t of it `H * d` elements after row t - 1.  Every dot is taken in `DOT`: the tensors' own
type where the kernel is compiled, float32 in the interpreter, which would multiply the bit patterns of bfloat16.
An argument that does not fit raises a TypeError or ValueError that names it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

import dn_lib.kernels.interpreter  # noqa: F401  (turns the interpreter on where there is no GPU)
from dn_lib.forms.common import check_integer, check_shape, check_tensors, describe, scale_or_default
from dn_lib.kernels.arguments import readable
from dn_lib.kernels.inverse import scaled_inverse

LEAST_DOT = 16
"""The smallest side of a `tl.dot` that the hardware takes."""


def interpreted() -> bool:
    """Whether Triton kernels of this process run in the interpreter."""
    return not isinstance(scaled_add_kernel, triton.JITFunction)


def dot_type(x: Tensor) -> tl.dtype:
    """What the operands of `tl.dot` are converted to, for tensors like `x`: see the module's first lines.

    >>> dot_type(torch.zeros(1)) == tl.float32
    True
    """
    if interpreted():
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(x.dtype, tl.float32)


def block_width(d: int) -> int:
    """The width of a block that holds `d` columns: a power of two, and at least what a dot takes.

    >>> block_width(3), block_width(64), block_width(65)
    (16, 64, 128)
    """
    return max(LEAST_DOT, triton.next_power_of_2(d))


def check_block(name: str, size: int, least: int = LEAST_DOT) -> None:
    """Raise ValueError unless `size` is a power of two of at least `least`, as blocks are.

    >>> check_block("chunk_size", 24)
    Traceback (most recent call last):
    ValueError: chunk_size must be a power of two of at least 16, got 24
    """
    check_integer(name, size)
    if size < least or size & (size - 1):
        raise ValueError(f"{name} must be a power of two of at least {least}, got {size}")


def prepared(**given: Tensor) -> list[Tensor]:
    """The tensors of a rung of the ladder (some of q, k, v and beta), checked against the first, and contiguous."""
    check_tensors(**given)
    first, reference = next(iter(given.items()))
    if reference.ndim != 4:
        raise ValueError(f"{first} must be [B, L, H, d_k], got {list(reference.shape)}")
    rows = tuple(reference.shape[:3])
    for name, x in given.items():
        width = {"beta": (), "v": (x.shape[-1] if x.ndim else 1,)}.get(name, (reference.shape[3],))
        axes = {"beta": "B, L, H", "v": "B, L, H, d_v"}.get(name, "B, L, H, d_k")
        check_shape(name, x, axes, (*rows, *width), first)
    return readable(**given)


def value_block(chunk_size: int, block_v: int | None, d_v: int) -> int:
    """The width of a block of values, after a check of both sizes."""
    check_block("chunk_size", chunk_size)
    if block_v is None:
        return block_width(d_v)
    check_block("block_v", block_v)
    return block_v


def inverse_of(method: str, dtype: torch.dtype):
    """The kernel function that inverts by `method` where the inputs have `dtype`."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {describe(method)}")
    return INVERSES[method] if method in INVERSES else BLOCKS.get(dtype, inverse_by_blocks_ieee)


# --- First programs -------------------------------------------------------------------------------------


@triton.jit
def scaled_add_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # which elements are this program's
    inside = offsets < n  # the last program may reach past the end
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0)
    tl.store(out_ptr + offsets, a * x + y, mask=inside)


def scaled_add(x: Tensor, y: Tensor, a: float, *, block: int = 128) -> Tensor:
    """a x + y for `x` and `y` of one shape.

    >>> scaled_add(torch.ones(5), torch.arange(5.0), 2.0).tolist()
    [2.0, 3.0, 4.0, 5.0, 6.0]
    """
    check_tensors(x=x, y=y)
    check_shape("y", y, "...", x.shape, "x")
    check_block("block", block, least=1)
    x, y = readable(x=x, y=y)
    out = torch.empty_like(x)
    n = x.numel()
    scaled_add_kernel[(triton.cdiv(n, block),)](x, y, out, a, n, BLOCK=block)
    return out


@triton.jit
def load_tile(base, rows, columns, stride, n_rows, n_columns):
    """The block base[rows, columns] of a matrix whose rows lie `stride` apart, zero outside of it."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, value, rows, columns, stride, n_rows, n_columns):
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    tl.store(base + rows[:, None] * stride + columns[None, :], value, mask=inside)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, M, N, K, DOT: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        a = load_tile(a_ptr, rows, inner, K, M, K).to(DOT)
        b = load_tile(b_ptr, inner, columns, N, K, N).to(DOT)
        total += tl.dot(a, b, input_precision="ieee")
    store_tile(out_ptr, total, rows, columns, N, M, N)


def matmul(a: Tensor, b: Tensor, *, block: int = 16) -> Tensor:
    """a @ b for matrices `[M, K]` and `[K, N]`, each program one block of the product.

    >>> matmul(torch.eye(3), torch.arange(6.0).reshape(3, 2)).tolist()
    [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    """
    check_tensors(a=a, b=b)
    if a.ndim != 2:
        raise ValueError(f"a must be [M, K], got {list(a.shape)}")
    check_shape("b", b, "K, N", (a.shape[1], b.shape[-1] if b.ndim else 1), "a")
    check_block("block", block)
    a, b = readable(a=a, b=b)
    (M, K), N = a.shape, b.shape[1]
    out = torch.empty(M, N, dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(M, block), triton.cdiv(N, block))
    matmul_kernel[grid](a, b, out, M, N, K, DOT=dot_type(a), BLOCK=block)
    return out


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 `x` as TF32 holds it: the 13 lowest of 23 fraction bits rounded away, half away from zero.

    What a tensor core sees of float32 operands by default, or twice as close to it: an H200 was measured to cut the
    bits off (`experiments/operators/error_microscope.py`).  Here so that a CPU can show it.

    >>> round_to_tf32(torch.tensor([1.0 + 2**-11, 1.0 + 2**-12])).tolist()
    [1.0009765625, 1.0]
    """
    check_tensors(x=x)
    if x.dtype != torch.float32:
        raise ValueError(f"x must be float32, got {x.dtype}")
    (x,) = readable(x=x)
    bits = x.view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


# --- Linear attention -----------------------------------------------------------------------------------


@triton.jit
def linear_attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, state_ptr, scale, L, H, d_k, d_v,
    DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    q_ptr, k_ptr = q_ptr + (b * L * H + h) * d_k, k_ptr + (b * L * H + h) * d_k
    v_ptr, o_ptr = v_ptr + (b * L * H + h) * d_v, o_ptr + (b * L * H + h) * d_v
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    causal = rows[:, None] >= rows[None, :]
    S = tl.zeros([BK, BV], tl.float32)  # one head's state, BV of its columns: it never leaves the chip
    for start in range(0, L, C):
        q = load_tile(q_ptr, start + rows, keys, H * d_k, L, d_k).to(DOT)
        k = load_tile(k_ptr, start + rows, keys, H * d_k, L, d_k).to(DOT)
        v = load_tile(v_ptr, start + rows, values, H * d_v, L, d_v).to(DOT)
        A = tl.where(causal, tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0).to(DOT)
        o = tl.dot(q, S.to(DOT), input_precision="ieee")  # what earlier chunks wrote
        o += tl.dot(A, v, input_precision="ieee")  # what this chunk wrote
        store_tile(o_ptr, scale * o, start + rows, values, H * d_v, L, d_v)
        S += tl.dot(tl.trans(k), v, input_precision="ieee")
    store_tile(state_ptr + tl.program_id(0).to(tl.int64) * d_k * d_v, S, keys, values, d_v, d_k, d_v)


def linear_attention(q, k, v, *, scale=None, chunk_size=16, block_v=None):
    """Chunkwise linear attention in one kernel (eq-triton-linear).

    q, k `[B, L, H, d_k]`, v `[B, L, H, d_v]` -> o like v, state `[B, H, d_k, d_v]` float32.

    >>> q, k, v = torch.randn(3, 1, 40, 2, 16).unbind(0)
    >>> [list(x.shape) for x in linear_attention(q, k, v)]
    [[1, 40, 2, 16], [1, 2, 16, 16]]
    """
    q, k, v = prepared(q=q, k=k, v=v)
    scale = scale_or_default(scale, q)
    (B, L, H, d_k), d_v = q.shape, v.shape[-1]
    BV = value_block(chunk_size, block_v, d_v)
    o, state = torch.empty_like(v), torch.empty(B, H, d_k, d_v, dtype=torch.float32, device=q.device)
    linear_attention_kernel[(B * H, triton.cdiv(d_v, BV))](
        q, k, v, o, state, scale, L, H, d_k, d_v,
        DOT=dot_type(q), C=chunk_size, BK=block_width(d_k), BV=BV,
    )  # fmt: skip
    return o, state


# --- The triangular inverse, three ways ------------------------------------------------------------------
# Each returns M = (I + A)^{-1} for strictly lower triangular A, [C, C] float32, without leaving the chip.


@triton.jit
def inverse_by_substitution(A, C: tl.constexpr):
    """Row by row (eq-ut-row): C - 1 dependent steps, no dot."""
    i = tl.arange(0, C)
    M = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, C):
        a = tl.sum(tl.where(i[:, None] == row, A, 0.0), axis=0)  # A[row, :]
        m = -tl.sum(a[:, None] * M, axis=0)  # A is zero from the diagonal on: only finished rows count
        M = tl.where(i[:, None] == row, m[None, :] + tl.where(i[None, :] == row, 1.0, 0.0), M)
    return M


@triton.jit
def inverse_by_doubling(A, C: tl.constexpr):
    """(I - A)(I + A^2)(I + A^4)... (eq-doubling): 2 (log2 C - 1) dots.  Exact, and unusable."""
    i = tl.arange(0, C)
    power = -A
    M = tl.where(i[:, None] == i[None, :], 1.0, 0.0) + power
    size = 2
    while size < C:
        power = tl.dot(power, power, input_precision="ieee")
        M += tl.dot(power, M, input_precision="ieee")
        size *= 2
    return M


@triton.jit
def inverse_by_merging(A, C: tl.constexpr):
    """Diagonal blocks of size 1, 2, 4, ... merged in pairs (eq-merge-levels): 2 log2 C dots."""
    i = tl.arange(0, C)
    M = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    size = 1
    while size < C:
        block, other = i[:, None] // size, i[None, :] // size
        below = tl.where((block % 2 == 1) & (other == block - 1), A, 0.0)  # A21 of every pair
        M -= tl.dot(tl.dot(M, below, input_precision="ieee"), M, input_precision="ieee")
        size *= 2
    return M


# The operator's own inverse, so that forms can be compared which differ in nothing else: `dn_lib.kernels.inverse` gives
# N = -(I + B D)^{-1} B.  With A for B and 1 for D that is M - I.  A function for each precision of its dots.


@triton.jit
def inverse_by_blocks_half(A, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.where(i[:, None] == i[None, :], 1.0, 0.0) + scaled_inverse(A, tl.full([C], 1.0, tl.float32), C, "half")


@triton.jit
def inverse_by_blocks_halves(A, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.where(i[:, None] == i[None, :], 1.0, 0.0) + scaled_inverse(A, tl.full([C], 1.0, tl.float32), C, "halves")


@triton.jit
def inverse_by_blocks_ieee(A, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.where(i[:, None] == i[None, :], 1.0, 0.0) + scaled_inverse(A, tl.full([C], 1.0, tl.float32), C, "ieee")


# --- The delta rule in separate steps: every intermediate goes through memory -----------------------------


@triton.jit
def ut_kernel(
    k_ptr, beta_ptr, T_ptr, L, H, d_k,
    INVERSE: tl.constexpr, DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Step 1, a program a chunk: T = (I + tril(diag(beta) K K^T, -1))^{-1} diag(beta)."""
    b, h, start = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(0) * C
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    head = b * L * H + h
    k = load_tile(k_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
    beta = tl.load(beta_ptr + head + (start + rows) * H, mask=start + rows < L, other=0.0).to(tl.float32)
    A = beta[:, None] * tl.dot(k, tl.trans(k), input_precision="ieee")
    A = tl.where(rows[:, None] > rows[None, :], A, 0.0)
    T = INVERSE(A, C) * beta[None, :]
    store_tile(T_ptr + head * C, T, start + rows, rows, H * C, L, C)


@triton.jit
def wu_kernel(
    T_ptr, k_ptr, v_ptr, W_ptr, U_ptr, L, H, d_k, d_v,
    DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Step 2, a program a chunk: W = T K and U = T V."""
    b, h, start = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(0) * C
    rows, keys, values = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    head = b * L * H + h
    T = load_tile(T_ptr + head * C, start + rows, rows, H * C, L, C).to(DOT)
    k = load_tile(k_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
    W = tl.dot(T, k, input_precision="ieee")
    store_tile(W_ptr + head * d_k, W, start + rows, keys, H * d_k, L, d_k)
    v = load_tile(v_ptr + head * d_v, start + rows, values, H * d_v, L, d_v).to(DOT)
    U = tl.dot(T, v, input_precision="ieee")
    store_tile(U_ptr + head * d_v, U, start + rows, values, H * d_v, L, d_v)


@triton.jit
def state_kernel(
    k_ptr, W_ptr, U_ptr, new_ptr, S_ptr, final_ptr, L, H, d_k, d_v,
    DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Step 3, a program a head and a block of values: S' = S + K^T (U - W S), chunk after chunk."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    head = b * L * H + h
    S = tl.zeros([BK, BV], tl.float32)
    for start in range(0, L, C):
        chunk = (b * tl.cdiv(L, C) + start // C) * H + h
        store_tile(S_ptr + chunk * d_k * d_v, S, keys, values, d_v, d_k, d_v)
        W = load_tile(W_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
        U = load_tile(U_ptr + head * d_v, start + rows, values, H * d_v, L, d_v)
        new = U - tl.dot(W, S.to(DOT), input_precision="ieee")
        store_tile(new_ptr + head * d_v, new, start + rows, values, H * d_v, L, d_v)
        k = load_tile(k_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
        S += tl.dot(tl.trans(k), new.to(DOT), input_precision="ieee")
    store_tile(final_ptr + tl.program_id(0).to(tl.int64) * d_k * d_v, S, keys, values, d_v, d_k, d_v)


@triton.jit
def output_kernel(
    q_ptr, k_ptr, new_ptr, S_ptr, o_ptr, scale, L, H, d_k, d_v,
    DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Step 4, a program a chunk: O = scale (Q S + tril(Q K^T)(U - W S))."""
    b, h, start = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(0) * C
    rows, keys, values = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    head, chunk = b * L * H + h, (b * tl.cdiv(L, C) + tl.program_id(0)) * H + h
    q = load_tile(q_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
    k = load_tile(k_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
    S = load_tile(S_ptr + chunk * d_k * d_v, keys, values, d_v, d_k, d_v).to(DOT)
    new = load_tile(new_ptr + head * d_v, start + rows, values, H * d_v, L, d_v).to(DOT)
    P = tl.where(rows[:, None] >= rows[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
    o = tl.dot(q, S, input_precision="ieee") + tl.dot(P.to(DOT), new, input_precision="ieee")
    store_tile(o_ptr + head * d_v, scale * o, start + rows, values, H * d_v, L, d_v)


INVERSES = {
    "substitution": inverse_by_substitution,
    "doubling": inverse_by_doubling,
    "merging": inverse_by_merging,
}
BLOCKS = {torch.bfloat16: inverse_by_blocks_half, torch.float16: inverse_by_blocks_halves}
METHODS = (*INVERSES, "blocks")


def ut_transform(k: Tensor, beta: Tensor, *, method: str = "merging", chunk_size: int = 16) -> Tensor:
    """T of every chunk, by one of `METHODS`: k `[B, L, H, d_k]`, beta `[B, L, H]` -> `[B, L, H, C]`.

    Row t holds row t mod C of the T of t's chunk.  Raises ValueError for an unknown `method`.

    >>> ut_transform(torch.zeros(1, 2, 1, 16), torch.full((1, 2, 1), 0.5))[0, :, 0, :2].tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    inverse_of(method, torch.float32)
    k, beta = prepared(k=k, beta=beta)
    inverse = inverse_of(method, k.dtype)
    check_block("chunk_size", chunk_size)
    B, L, H, d_k = k.shape
    T = torch.empty(B, L, H, chunk_size, dtype=k.dtype, device=k.device)
    ut_kernel[(triton.cdiv(L, chunk_size), B * H)](
        k, beta, T, L, H, d_k,
        INVERSE=inverse, DOT=dot_type(k), C=chunk_size, BK=block_width(d_k),
    )  # fmt: skip
    return T


def delta_rule_in_steps(q, k, v, beta, *, scale=None, chunk_size=16, method="merging", block_v=None):
    """The delta rule as four kernels (eq-steps-bytes), each of which writes its result to memory.

    q, k `[B, L, H, d_k]`, v `[B, L, H, d_v]`, beta `[B, L, H]`.  Returns o like v, the final
    state `[B, H, d_k, d_v]` float32, and the intermediates by name: T, W, U, new (U - W S) and S, the
    state before each chunk, `[B, chunks, H, d_k, d_v]` float32.

    >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 1, 40, 2, 16), dim=-1).unbind(0)
    >>> o, state, steps = delta_rule_in_steps(q, k, v, torch.rand(1, 40, 2))
    >>> list(o.shape), list(steps["S"].shape)
    ([1, 40, 2, 16], [1, 3, 2, 16, 16])
    """
    q, k, v, beta = prepared(q=q, k=k, v=v, beta=beta)
    scale = scale_or_default(scale, q)
    (B, L, H, d_k), d_v = q.shape, v.shape[-1]
    narrow = value_block(chunk_size, block_v, d_v)
    chunks = triton.cdiv(L, chunk_size)
    BK, BV = block_width(d_k), block_width(d_v)
    sizes = dict(DOT=dot_type(q), C=chunk_size, BK=BK)
    T = ut_transform(k, beta, method=method, chunk_size=chunk_size)
    W, U, new, o = torch.empty_like(k), *(torch.empty_like(v) for _ in range(3))
    S = torch.empty(B, chunks, H, d_k, d_v, dtype=torch.float32, device=q.device)
    final = torch.empty(B, H, d_k, d_v, dtype=torch.float32, device=q.device)
    wu_kernel[(chunks, B * H)](T, k, v, W, U, L, H, d_k, d_v, **sizes, BV=BV)
    state_kernel[(B * H, triton.cdiv(d_v, narrow))](k, W, U, new, S, final, L, H, d_k, d_v, **sizes, BV=narrow)
    output_kernel[(chunks, B * H)](q, k, new, S, o, scale, L, H, d_k, d_v, **sizes, BV=BV)
    return o, final, dict(T=T, W=W, U=U, new=new, S=S)


# --- The delta rule in one step: T, the errors and the state stay on chip ----------------------------------


@triton.jit
def one_kernel(
    q_ptr, k_ptr, v_ptr, beta_ptr, o_ptr, final_ptr, scale, L, H, d_k, d_v,
    INVERSE: tl.constexpr, DOT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All four steps in the walk, a program a head and a block of values; U - W S is T (V - K S)."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    head = b * L * H + h
    S = tl.zeros([BK, BV], tl.float32)
    for start in range(0, L, C):
        k = load_tile(k_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
        beta = tl.load(beta_ptr + head + (start + rows) * H, mask=start + rows < L, other=0.0).to(tl.float32)
        A = beta[:, None] * tl.dot(k, tl.trans(k), input_precision="ieee")
        T = INVERSE(tl.where(rows[:, None] > rows[None, :], A, 0.0), C) * beta[None, :]
        v = load_tile(v_ptr + head * d_v, start + rows, values, H * d_v, L, d_v)
        R = v - tl.dot(k, S.to(DOT), input_precision="ieee")  # what the state gets wrong about each value
        new = tl.dot(T.to(DOT), R.to(DOT), input_precision="ieee").to(DOT)  # U - W S
        q = load_tile(q_ptr + head * d_k, start + rows, keys, H * d_k, L, d_k).to(DOT)
        P = tl.where(rows[:, None] >= rows[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
        o = tl.dot(q, S.to(DOT), input_precision="ieee") + tl.dot(P.to(DOT), new, input_precision="ieee")
        store_tile(o_ptr + head * d_v, scale * o, start + rows, values, H * d_v, L, d_v)
        S += tl.dot(tl.trans(k), new, input_precision="ieee")
    store_tile(final_ptr + tl.program_id(0).to(tl.int64) * d_k * d_v, S, keys, values, d_v, d_k, d_v)


def delta_rule_in_one(q, k, v, beta, *, scale=None, chunk_size=16, method="merging", block_v=None):
    """The delta rule as one kernel: nothing but o and the final state is written.

    Shapes, and the first two results, as in `delta_rule_in_steps`.  Each block of `block_v` values inverts anew.

    >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 1, 40, 2, 16), dim=-1).unbind(0)
    >>> [list(x.shape) for x in delta_rule_in_one(q, k, v, torch.rand(1, 40, 2))]
    [[1, 40, 2, 16], [1, 2, 16, 16]]
    """
    inverse_of(method, torch.float32)
    q, k, v, beta = prepared(q=q, k=k, v=v, beta=beta)
    inverse = inverse_of(method, q.dtype)
    scale = scale_or_default(scale, q)
    (B, L, H, d_k), d_v = q.shape, v.shape[-1]
    BV = value_block(chunk_size, block_v, d_v)
    o, final = torch.empty_like(v), torch.empty(B, H, d_k, d_v, dtype=torch.float32, device=q.device)
    one_kernel[(B * H, triton.cdiv(d_v, BV))](
        q, k, v, beta, o, final, scale, L, H, d_k, d_v,
        INVERSE=inverse, DOT=dot_type(q), C=chunk_size, BK=block_width(d_k), BV=BV,
    )  # fmt: skip
    return o, final
