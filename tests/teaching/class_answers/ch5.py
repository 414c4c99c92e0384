"""Wrong answers to the exercises of chapter 5, written from the chapter's text before the mutants were looked at.

A kernel is text, as the judge takes it; `kernel` exchanges pieces of a right one in a style of its own.
"""

from __future__ import annotations

import inspect
import math

import torch
import triton
import triton.language as tl

from dn_lib.teaching.exercises.ch5 import launched
from dn_lib.teaching.judge.kernels import guarded

from . import NOT_NAMED, Answer


def kernel(number, source, *exchanges):
    """The kernel `source` with pieces of its text exchanged, as it would be handed in."""
    for old, new in exchanges:
        assert old in source, old
        source = source.replace(old, new)
    return guarded(number, source)


# 5.1 -----------------------------------------------------------------------------------------------------
COPY = """
@triton.jit
def copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    place = pid * BLOCK + tl.arange(0, BLOCK)
    real = place < n
    tl.store(out_ptr + place, tl.load(x_ptr + place, mask=real), mask=real)
"""

# 5.2 -----------------------------------------------------------------------------------------------------
ROWS = """
@triton.jit
def scale_rows(x_ptr, s_ptr, out_ptr, R, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    ok = (r[:, None] < R) & (c[None, :] < n)
    where = r[:, None] * n + c[None, :]
    s = tl.load(s_ptr + r, mask=r < R, other=0.0)
    x = tl.load(x_ptr + where, mask=ok, other=0.0)
    tl.store(out_ptr + where, x * s[:, None], mask=ok)
"""

# 5.3 -----------------------------------------------------------------------------------------------------
HEADS = """
@triton.jit
def heads_first(x_ptr, out_ptr, L, H, d, ROWS: tl.constexpr, D: tl.constexpr):
    pair = tl.program_id(1)
    b = pair // H
    h = pair % H
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, D)
    ok = (t[:, None] < L) & (i[None, :] < d)
    source = ((b * L + t[:, None]) * H + h) * d + i[None, :]
    target = ((b * H + h) * L + t[:, None]) * d + i[None, :]
    tl.store(out_ptr + target, tl.load(x_ptr + source, mask=ok, other=0.0), mask=ok)
"""

# 5.4 -----------------------------------------------------------------------------------------------------
SUM = """
@triton.jit
def running_sum(x_ptr, out_ptr, L, d, C: tl.constexpr, D: tl.constexpr):
    i = tl.arange(0, D)
    carried = tl.zeros([D], tl.float32)
    for begin in range(0, L, C):
        t = begin + tl.arange(0, C)
        ok = (t[:, None] < L) & (i[None, :] < d)
        where = t[:, None] * d + i[None, :]
        x = tl.load(x_ptr + where, mask=ok, other=0.0)
        tl.store(out_ptr + where, tl.cumsum(x, axis=0) + carried[None, :], mask=ok)
        carried += tl.sum(x, axis=0)
"""

# 5.5 -----------------------------------------------------------------------------------------------------
SCORES = """
@triton.jit
def scores(q_ptr, k_ptr, p_ptr, C: tl.constexpr, D: tl.constexpr):
    r, c = tl.arange(0, C), tl.arange(0, D)
    q = tl.load(q_ptr + r[:, None] * D + c[None, :])
    k = tl.load(k_ptr + r[:, None] * D + c[None, :])
    p = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.where(r[:, None] >= r[None, :], p, 0.0)
    tl.store(p_ptr + r[:, None] * C + r[None, :], p)
"""


# 5.6 -----------------------------------------------------------------------------------------------------
def count(blocks_of="qk", state=4, blocks=math.ceil, length=True, state_blocks=False):
    def requested_bytes(B, L, H, d_k, d_v, element, block_v):
        n = blocks(d_v / block_v)
        qk = 2 * d_k * (n if "q" in blocks_of else 1)
        vo = 2 * d_v * (n if "v" in blocks_of else 1)
        per_state = {4: 4, 0: 0, "e": element, 2: 8}[state] * d_k * d_v * (n if state_blocks else 1)
        return B * H * (L * element * (qk + vo) + per_state)

    return requested_bytes


# 5.7 -----------------------------------------------------------------------------------------------------
FADE = """
@triton.jit
def retention(
    q_ptr, k_ptr, v_ptr, o_ptr, state_ptr, log_gamma, gamma_C, L,
    C: tl.constexpr, D: tl.constexpr,
):
    i, c = tl.arange(0, C), tl.arange(0, D)
    S = tl.zeros([D, D], tl.float32)
    age = i[:, None] - i[None, :]
    inner = tl.where(age >= 0, tl.exp2(age * log_gamma), 0.0)
    since = tl.exp2((i + 1) * log_gamma)
    left = tl.exp2((C - 1 - i) * log_gamma)
    for start in range(0, L, C):
        at = (start + i)[:, None] * D + c[None, :]
        q, k, v = tl.load(q_ptr + at), tl.load(k_ptr + at), tl.load(v_ptr + at)
        p = tl.dot(q, tl.trans(k), input_precision="ieee") * inner
        o = tl.dot(q, S, input_precision="ieee") * since[:, None] + tl.dot(p, v, input_precision="ieee")
        tl.store(o_ptr + at, o)
        S = gamma_C * S + tl.dot(tl.trans(k), v * left[:, None], input_precision="ieee")
    tl.store(state_ptr + c[:, None] * D + c[None, :], S)
"""

# 5.8 -----------------------------------------------------------------------------------------------------
JOIN = """
@triton.jit
def join(n_ptr, b_ptr, beta_ptr, out_ptr, HALF: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, C)
    at = i[:, None] * C + i[None, :]
    n, b, beta = tl.load(n_ptr + at), tl.load(b_ptr + at), tl.load(beta_ptr + i)
    corner = (i[:, None] >= HALF) & (i[None, :] < HALF)
    b = tl.where(corner, b, 0.0)
    left = b + tl.dot(n, beta[:, None] * b, input_precision="ieee")
    new = left + tl.dot(left * beta[None, :], n, input_precision="ieee")
    tl.store(out_ptr + at, n - new)
"""

# 5.9 -----------------------------------------------------------------------------------------------------
ERRORS = """
@triton.jit
def errors_of_chunk(
    k_ptr, v_ptr, beta_ptr, n_ptr, s_ptr, e_ptr, out_ptr, C: tl.constexpr, D: tl.constexpr
):
    i, c = tl.arange(0, C), tl.arange(0, D)
    tile, square = i[:, None] * D + c[None, :], c[:, None] * D + c[None, :]
    k, v = tl.load(k_ptr + tile), tl.load(v_ptr + tile)
    beta = tl.load(beta_ptr + i)[:, None]
    n = tl.load(n_ptr + i[:, None] * C + i[None, :])
    s = tl.load(s_ptr + square)
    r = v - tl.dot(k, s, input_precision="ieee")
    e = r + tl.dot(n, beta * r, input_precision="ieee")
    tl.store(e_ptr + tile, e)
    tl.store(out_ptr + square, s + tl.dot(tl.trans(k), beta * e, input_precision="ieee"))
"""


# 5.10 ----------------------------------------------------------------------------------------------------
def segments(start="S", order=1, transposed=False, inside=False, first=0, write=True):
    def join_segments(M, X, S):
        state = {"S": S, "zero": torch.zeros_like(S)}[start]
        for m, x in list(zip(M, X, strict=True))[first:][::order]:
            m = m.T if transposed else m
            state = m @ (state + x) if inside else m @ state + (x if write else 0)
        return state

    return join_segments


def segments_summed(M, X, S):
    return S + X.sum(0)


def segments_with_one_map(M, X, S):
    return M[3] @ M[2] @ M[1] @ M[0] @ S + X.sum(0)


# 5.11 to 5.13 --------------------------------------------------------------------------------------------
@triton.jit
def all_inverses(k_ptr, beta_ptr, n_ptr, L, H, d, C: tl.constexpr, D: tl.constexpr):
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    i, c = tl.arange(0, C), tl.arange(0, D)
    t = tl.program_id(0) * C + i
    token = (b * L + t) * H + h
    k = tl.load(k_ptr + token[:, None] * d + c[None, :], mask=(t[:, None] < L) & (c[None, :] < d), other=0.0)
    beta = tl.load(beta_ptr + token, mask=t < L, other=0.0)
    kk = tl.dot(k, tl.trans(k), input_precision="ieee")
    B = tl.where(i[:, None] > i[None, :], kk, 0.0)
    N = -B
    for r in range(1, C):
        row = tl.sum(tl.where((i == r)[:, None], B, 0.0), axis=0)
        new = -row - tl.sum((row * beta)[:, None] * N, axis=0)
        N = tl.where((i == r)[:, None], new[None, :], N)
    tl.store(n_ptr + token[:, None] * C + i[None, :], N, mask=(t < L)[:, None])


@triton.jit
def scan(
    q_ptr, k_ptr, v_ptr, beta_ptr, n_ptr, o_ptr, state_ptr, scale, L, H, d, C: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    i, c = tl.arange(0, C), tl.arange(0, D)
    S = tl.zeros([D, D], tl.float32)
    for start in range(0, L, C):
        t = start + i
        token = (b * L + t) * H + h
        ok = (t[:, None] < L) & (c[None, :] < d)
        at = token[:, None] * d + c[None, :]
        q = tl.load(q_ptr + at, mask=ok, other=0.0)
        k = tl.load(k_ptr + at, mask=ok, other=0.0)
        v = tl.load(v_ptr + at, mask=ok, other=0.0)
        beta = tl.load(beta_ptr + token, mask=t < L, other=0.0)[:, None]
        n = tl.load(n_ptr + token[:, None] * C + i[None, :], mask=(t < L)[:, None], other=0.0)
        r = v - tl.dot(k, S, input_precision="ieee")
        e = r + tl.dot(n, beta * r, input_precision="ieee")
        p = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.where(i[:, None] >= i[None, :], p, 0.0)
        o = tl.dot(q, S, input_precision="ieee") + tl.dot(p, beta * e, input_precision="ieee")
        tl.store(o_ptr + at, o * scale, mask=ok)
        S += tl.dot(tl.trans(k), beta * e, input_precision="ieee")
    corner = (c[:, None] < d) & (c[None, :] < d)
    tl.store(state_ptr + (b * H + h) * d * d + c[:, None] * d + c[None, :], S, mask=corner)


INVERSES = "\n" + inspect.getsource(all_inverses.fn)
SCAN = "\n" + inspect.getsource(scan.fn)


def whole(q, k, v, beta):
    B, L, H, d = q.shape
    D = max(16, triton.next_power_of_2(d))
    n, o = torch.empty(B, L, H, 16, device=q.device), torch.empty_like(v)
    state = torch.empty(B, H, d, d, device=q.device)
    all_inverses[(triton.cdiv(L, 16), B * H)](k, beta, n, L, H, d, C=16, D=D)
    scan[(B * H,)](q, k, v, beta, n, o, state, d**-0.5, L, H, d, C=16, D=D)
    return o, state


def whole_with_floored_grid(q, k, v, beta):
    B, L, H, d = q.shape
    D = max(16, triton.next_power_of_2(d))
    n, o = torch.empty(B, L, H, 16, device=q.device), torch.empty_like(v)
    state = torch.empty(B, H, d, d, device=q.device)
    all_inverses[(L // 16, B * H)](k, beta, n, L, H, d, C=16, D=D)
    scan[(B * H,)](q, k, v, beta, n, o, state, d**-0.5, L, H, d, C=16, D=D)
    return o, state


def whole_without_scale(q, k, v, beta):
    B, L, H, d = q.shape
    D = max(16, triton.next_power_of_2(d))
    n, o = torch.empty(B, L, H, 16, device=q.device), torch.empty_like(v)
    state = torch.empty(B, H, d, d, device=q.device)
    all_inverses[(triton.cdiv(L, 16), B * H)](k, beta, n, L, H, d, C=16, D=D)
    scan[(B * H,)](q, k, v, beta, n, o, state, 1.0, L, H, d, C=16, D=D)
    return o, state


def whole_of_one_head(q, k, v, beta):
    B, L, H, d = q.shape
    D = max(16, triton.next_power_of_2(d))
    n, o = torch.empty(B, L, H, 16, device=q.device), torch.empty_like(v)
    state = torch.empty(B, H, d, d, device=q.device)
    all_inverses[(triton.cdiv(L, 16), B * H)](k, beta, n, L, H, d, C=16, D=D)
    scan[(B,)](q, k, v, beta, n, o, state, d**-0.5, L, H, d, C=16, D=D)
    return o, state


def whole_with_small_state(q, k, v, beta):
    B, L, H, d = q.shape
    D = max(16, triton.next_power_of_2(d))
    n, o = torch.empty(B, L, H, 16, device=q.device), torch.empty_like(v)
    state = torch.empty(B, d, d, device=q.device)
    all_inverses[(triton.cdiv(L, 16), B * H)](k, beta, n, L, H, d, C=16, D=D)
    scan[(B * H,)](q, k, v, beta, n, o, state, d**-0.5, L, H, d, C=16, D=D)
    return o, state


def whole_swapped(q, k, v, beta):
    o, state = whole(q, k, v, beta)
    return state, o


def whole_with_grid_axes_swapped(q, k, v, beta):
    B, L, H, d = q.shape
    D = max(16, triton.next_power_of_2(d))
    n, o = torch.empty(B, L, H, 16, device=q.device), torch.empty_like(v)
    state = torch.empty(B, H, d, d, device=q.device)
    all_inverses[(B * H, triton.cdiv(L, 16))](k, beta, n, L, H, d, C=16, D=D)
    scan[(B * H,)](q, k, v, beta, n, o, state, d**-0.5, L, H, d, C=16, D=D)
    return o, state


def whole_without_inverses(q, k, v, beta):
    B, L, H, d = q.shape
    D = max(16, triton.next_power_of_2(d))
    n, o = torch.zeros(B, L, H, 16, device=q.device), torch.empty_like(v)
    state = torch.empty(B, H, d, d, device=q.device)
    scan[(B * H,)](q, k, v, beta, n, o, state, d**-0.5, L, H, d, C=16, D=D)
    return o, state


# 5.14 ----------------------------------------------------------------------------------------------------
VALUES = """
@triton.jit
def value_gradient(n_ptr, beta_ptr, dvn_ptr, dv_ptr, C: tl.constexpr, D: tl.constexpr):
    i, c = tl.arange(0, C), tl.arange(0, D)
    at = i[:, None] * D + c[None, :]
    n = tl.load(n_ptr + i[:, None] * C + i[None, :])
    beta = tl.load(beta_ptr + i)[:, None]
    f = tl.load(dvn_ptr + at)
    z = f + tl.dot(tl.trans(n), beta * f, input_precision="ieee")
    tl.store(dv_ptr + at, beta * z)
"""

# 5.15 ----------------------------------------------------------------------------------------------------
DECODE = """
@triton.jit
def decode(q_ptr, k_ptr, v_ptr, beta_ptr, s_ptr, o_ptr, out_ptr, d, D: tl.constexpr):
    h = tl.program_id(0)
    c = tl.arange(0, D)
    real = c < d
    both = real[:, None] & real[None, :]
    at = h * d * d + c[:, None] * d + c[None, :]
    q = tl.load(q_ptr + h * d + c, mask=real, other=0.0)
    k = tl.load(k_ptr + h * d + c, mask=real, other=0.0)
    v = tl.load(v_ptr + h * d + c, mask=real, other=0.0)
    beta = tl.load(beta_ptr + h)
    s = tl.load(s_ptr + at, mask=both, other=0.0)
    e = v - tl.sum(k[:, None] * s, axis=0)
    new = s + beta * k[:, None] * e[None, :]
    tl.store(o_ptr + h * d + c, tl.sum(q[:, None] * new, axis=0), mask=real)
    tl.store(out_ptr + at, new, mask=both)
"""

RIGHT = {
    "5.1": COPY, "5.2": ROWS, "5.3": HEADS, "5.4": SUM, "5.5": SCORES, "5.7": FADE, "5.8": JOIN, "5.9": ERRORS,
    "5.11": INVERSES, "5.12": SCAN, "5.14": VALUES, "5.15": DECODE,
}  # fmt: skip


def wrong(number, name, says, *exchanges):
    return Answer(name, kernel(number, RIGHT[number], *exchanges), says)


ANSWERS = {
    "5.1": [
        wrong(
            "5.1",
            "the load has no mask",
            r"one has no mask",
            ("tl.load(x_ptr + place, mask=real)", "tl.load(x_ptr + place)"),
        ),
        wrong("5.1", "the store has no mask", r"one has no mask", ("mask=real), mask=real)", "mask=real, other=0.0))")),
        wrong("5.1", "one element too many", r"one place too many", ("place < n", "place <= n")),
        wrong("5.1", "every program owns the first block", NOT_NAMED, ("pid * BLOCK + ", "")),
        wrong("5.1", "blocks begin one apart", NOT_NAMED, ("pid * BLOCK", "pid")),
        wrong("5.1", "the mask asks for the place in the block", NOT_NAMED, ("place < n", "place < BLOCK")),
    ],
    "5.2": [
        wrong(
            "5.2", "rows as far apart as the block is wide", r"Wrong stride", ("r[:, None] * n", "r[:, None] * COLUMNS")
        ),
        wrong(
            "5.2",
            "columns are not masked",
            r"columns have no mask",
            ("ok = (r[:, None] < R) & (c[None, :] < n)", "ok = r[:, None] < R"),
        ),
        wrong(
            "5.2",
            "rows are not masked",
            r"rows have no mask|would load x",
            ("ok = (r[:, None] < R) & (c[None, :] < n)", "ok = c[None, :] < n"),
        ),
        wrong("5.2", "s is not masked", r"would load s", ("s_ptr + r, mask=r < R, other=0.0", "s_ptr + r")),
        wrong(
            "5.2",
            "s is read from its beginning by every program",
            r"first numbers of s",
            ("tl.load(s_ptr + r, mask=r < R, other=0.0)", "tl.load(s_ptr + tl.arange(0, ROWS))"),
        ),
        wrong("5.2", "divided", NOT_NAMED, ("x * s", "x / s")),
    ],
    "5.3": [
        wrong(
            "5.3",
            "rows d apart in x",
            r"read d apart",
            ("((b * L + t[:, None]) * H + h) * d + i", "b * L * H * d + h * d + t[:, None] * d + i"),
        ),
        wrong(
            "5.3",
            "b and h exchanged",
            r"Sequence and head are exchanged",
            ("pair // H", "pair % H"),
            ("h = pair % H", "h = pair // H"),
        ),
        wrong(
            "5.3",
            "x is copied as it is",
            r"in the order of x",
            ("((b * H + h) * L + t[:, None]) * d", "((b * L + t[:, None]) * H + h) * d"),
        ),
        wrong("5.3", "channels are not masked", r"would load x", (" & (i[None, :] < d)", "")),
        wrong(
            "5.3",
            "the axes of the grid exchanged",
            NOT_NAMED,
            ("pair = tl.program_id(1)", "pair = tl.program_id(0)"),
            ("t = tl.program_id(0)", "t = tl.program_id(1)"),
        ),
        wrong("5.3", "heads forgotten in the target", NOT_NAMED, ("((b * H + h) * L", "(b * L")),
    ],
    "5.4": [
        wrong("5.4", "nothing is carried", r"not carried in", (" + carried[None, :]", "")),
        wrong("5.4", "only the last chunk is carried", r"last chunk only", ("carried += ", "carried = ")),
        wrong(
            "5.4",
            "the token itself is left out",
            r"leaves out its own",
            ("tl.cumsum(x, axis=0)", "tl.cumsum(x, axis=0) - x"),
        ),
        wrong("5.4", "summed over channels", r"along the channels", ("tl.cumsum(x, axis=0)", "tl.cumsum(x, axis=1)")),
        wrong("5.4", "the last chunk is dropped", NOT_NAMED, ("range(0, L, C)", "range(0, L // C * C, C)")),
        wrong(
            "5.4",
            "the chunk is in the total already",
            r"counted twice",
            ("        tl.store", "        carried += tl.sum(x, axis=0)\n        tl.store"),
            ("mask=ok)\n        carried += tl.sum(x, axis=0)\n", "mask=ok)\n"),
        ),
    ],
    "5.5": [
        wrong("5.5", "no mask", r"no causal mask", ("    p = tl.where(r[:, None] >= r[None, :], p, 0.0)\n", "")),
        wrong("5.5", "without the diagonal", r"diagonal is missing", (">=", ">")),
        wrong("5.5", "the future instead of the past", r"upside down", (">=", "<=")),
        wrong("5.5", "without ieee", r"TF32", (', input_precision="ieee"', "")),
        wrong(
            "5.5",
            "keys times queries",
            r"Queries and keys are exchanged",
            ("tl.dot(q, tl.trans(k)", "tl.dot(k, tl.trans(q)"),
        ),
        wrong("5.5", "scaled", r"no scale", ("p, 0.0)", "p * D ** -0.5, 0.0)")),
    ],
    "5.6": [
        Answer("q and k read once", count(blocks_of=""), r"q and k are counted once"),
        Answer("everything read by each block", count(blocks_of="qv"), r"v and o are counted once for every"),
        Answer("v and o by each block, q and k once", count(blocks_of="v"), r"and not v and o"),
        Answer("state in the inputs' format", count(state="e"), r"it is float32"),
        Answer("no state", count(state=0), r"final state is missing"),
        Answer("state read as well", count(state=2), r"state is counted twice"),
        Answer("each block writes the whole state", count(state_blocks=True), r"writes the whole state"),
    ],
    "5.7": [
        wrong("5.7", "the state is read without fading", r"read as it came in", (" * since[:, None]", "")),
        wrong(
            "5.7",
            "the state fades one step less",
            r"one factor of gamma too large",
            ("(i + 1) * log_gamma", "i * log_gamma"),
        ),
        wrong(
            "5.7",
            "scores do not fade",
            r"nothing fades",
            ("tl.where(age >= 0, tl.exp2(age * log_gamma), 0.0)", "tl.where(age >= 0, 1.0, 0.0)"),
        ),
        wrong("5.7", "the carried state does not fade", r"state does not fade", ("gamma_C * S", "S")),
        wrong("5.7", "writes do not fade", r"without fading", (" * left[:, None]", "")),
        wrong("5.7", "writes fade one step more", r"once too often", ("C - 1 - i", "C - i")),
        wrong("5.7", "writes fade by their place", r"wrong way round", ("C - 1 - i", "i")),
        wrong(
            "5.7", "the chunk's state fades one step", r"fades by one step", ("gamma_C * S", "tl.exp2(log_gamma) * S")
        ),
    ],
    "5.8": [
        wrong("5.8", "plus", r"sign of the new block", ("n - new", "n + new")),
        wrong("5.8", "no beta", r"beta is missing", ("beta[:, None] * b", "b"), ("left * beta[None, :]", "left")),
        wrong("5.8", "no identities", r"identities are lost", ("left = b + ", "left = "), ("new = left + ", "new = ")),
        wrong(
            "5.8",
            "only the first half before the cut",
            r"I \+ N_22 D_2 is lost",
            ('left = b + tl.dot(n, beta[:, None] * b, input_precision="ieee")', "left = b"),
        ),
        wrong("5.8", "the whole lower half of b", r"lets B_22 through", (" & (i[None, :] < HALF)", "")),
        wrong("5.8", "only the corner", r"Only the new block", ("n - new", "-new")),
    ],
    "5.9": [
        wrong("5.9", "no beta inside N", r"Inside N the earlier residuals", ("tl.dot(n, beta * r", "tl.dot(n, r")),
        wrong(
            "5.9",
            "no beta on the way to the state",
            r"beta is missing from the write",
            ("tl.trans(k), beta * e", "tl.trans(k), e"),
        ),
        wrong(
            "5.9",
            "E with beta",
            r"is D E, what is written",
            ("tl.store(e_ptr + tile, e)", "tl.store(e_ptr + tile, beta * e)"),
        ),
        wrong("5.9", "minus N", r"carries its own minus", ("e = r + ", "e = r - ")),
        wrong("5.9", "R for E", r"E is R here", ('e = r + tl.dot(n, beta * r, input_precision="ieee")', "e = r")),
        wrong("5.9", "the write alone", r"input state is lost", ("s + tl.dot(tl.trans(k)", "tl.dot(tl.trans(k)")),
        wrong("5.9", "the state transposed", r"read transposed", ("tl.dot(k, s,", "tl.dot(k, tl.trans(s),")),
    ],
    "5.10": [
        Answer("added up", segments_summed, r"add the segments up"),
        Answer("from the last to the first", segments(order=-1), r"order is reversed"),
        Answer("maps transposed", segments(transposed=True), r"M is transposed"),
        Answer("written before the map", segments(inside=True), r"applied to its own X"),
        Answer("from zero", segments(start="zero"), r"initial state does not enter"),
        Answer("the first is left out", segments(first=1), r"first segment is left out"),
        Answer("nothing written", segments(write=False), r"`X` replaced by zeros"),
        Answer("maps on S only", segments_with_one_map, r"act on S only"),
    ],
    "5.11": [
        wrong("5.11", "plus B", r"this is -N", ("N = -B", "N = B"), ("new = -row - ", "new = row - ")),
        wrong("5.11", "no beta", r"beta is missing inside", ("(row * beta)", "row")),
        wrong(
            "5.11", "beta twice", NOT_NAMED, ("(row * beta)[:, None] * N", "(row * beta)[:, None] * N * beta[None, :]")
        ),
        wrong("5.11", "first order only", r"nothing is inverted", ("range(1, C)", "range(1, 1)")),
        wrong("5.11", "the diagonal too", r"B has a diagonal", ("i[:, None] > i[None, :]", "i[:, None] >= i[None, :]")),
        wrong(
            "5.11", "rows d apart", r"\[B, H, L, d\]", ("token = (b * L + t) * H + h", "token = (b * H + h) * L + t")
        ),
        wrong("5.11", "the last chunk's store is not masked", r"would store n", (", mask=(t < L)[:, None])", ")")),
    ],
    "5.12": [
        wrong("5.12", "no scale", r"scale is missing", ("o * scale", "o")),
        wrong(
            "5.12",
            "scale on the state's part only",
            r"Only Q S is scaled",
            ('o = tl.dot(q, S, input_precision="ieee") + ', 'o = scale * tl.dot(q, S, input_precision="ieee") + '),
            ("o * scale", "o"),
        ),
        wrong(
            "5.12",
            "read after the write",
            r"counted twice",
            (
                "        o = tl.dot(q, S",
                '        S += tl.dot(tl.trans(k), beta * e, input_precision="ieee")\n        o = tl.dot(q, S',
            ),
            ('mask=ok)\n        S += tl.dot(tl.trans(k), beta * e, input_precision="ieee")\n', "mask=ok)\n"),
        ),
        wrong(
            "5.12",
            "scores see the future",
            r"no causal mask",
            ("        p = tl.where(i[:, None] >= i[None, :], p, 0.0)\n", ""),
        ),
        wrong("5.12", "no beta in the output", r"output reads E", ("tl.dot(p, beta * e", "tl.dot(p, e")),
        wrong(
            "5.12",
            "values in place of errors",
            r"residual forgets the state",
            ('r = v - tl.dot(k, S, input_precision="ieee")', "r = v"),
        ),
        wrong("5.12", "the state is stored without a mask", r"would store state", (", S, mask=corner)", ", S)")),
    ],
    "5.13": [
        Answer("the last chunk has no program", launched(whole_with_floored_grid), NOT_NAMED),
        Answer("no scale", launched(whole_without_scale), r"scale is missing"),
        Answer("a program for each sequence", launched(whole_of_one_head), NOT_NAMED),
        Answer("one state for all heads", launched(whole_with_small_state), r"would store state"),
        Answer("results exchanged", launched(whole_swapped), r"wrong order"),
        Answer("grid axes exchanged", launched(whole_with_grid_axes_swapped), NOT_NAMED),
        Answer("N never computed", launched(whole_without_inverses), r"n holds zeros"),
    ],
    "5.14": [
        wrong("5.14", "T, not its transpose", r"N is not transposed", ("tl.trans(n)", "n")),
        wrong("5.14", "Z, not dV", r"stopped at Z", ("beta * z", "z")),
        wrong("5.14", "no beta inside", r"beta on the side of the later", ("beta * f", "f")),
        wrong("5.14", "the diagonal left out", r"own write is missing", ("z = f + ", "z = ")),
        wrong("5.14", "minus", r"carries its own minus", ("z = f + ", "z = f - ")),
        wrong("5.14", "beta once too often", r"beta too many", ("beta * z", "beta * beta * z")),
    ],
    "5.15": [
        wrong(
            "5.15",
            "q reads the old state",
            r"before the token is written",
            ("tl.sum(q[:, None] * new", "tl.sum(q[:, None] * s"),
        ),
        wrong("5.15", "nothing is erased", r"Nothing is erased", ("e = v - tl.sum(k[:, None] * s, axis=0)", "e = v")),
        wrong(
            "5.15",
            "the state read across",
            r"along its wrong axis",
            ("tl.sum(k[:, None] * s, axis=0)", "tl.sum(k[None, :] * s, axis=1)"),
        ),
        wrong("5.15", "no beta", r"beta is missing", ("beta * k", "k")),
        wrong("5.15", "the first head's beta for all", r"beta of head 0", ("beta_ptr + h", "beta_ptr")),
        wrong("5.15", "heads D D apart", r"D D apart", ("h * d * d + c[:, None] * d", "h * D * D + c[:, None] * d")),
        wrong("5.15", "rows of the state D apart", r"read D apart", ("c[:, None] * d + c", "c[:, None] * D + c")),
        wrong(
            "5.15",
            "the state's mask has one condition",
            r"no condition for its columns",
            ("real[:, None] & real[None, :]", "real[:, None]"),
        ),
    ],
}


# Further ones, written when the mutants were known, judged once; nothing was added to the registry for them.
def segments_and_then_the_state(M, X, S):
    return segments(start="zero")(M, X, S) + S


HELD_OUT = {
    "5.4": [
        wrong(
            "5.4",
            "the total begins with the first row",
            NOT_NAMED,
            ("tl.zeros([D], tl.float32)", "tl.load(x_ptr + i, mask=i < d, other=0.0)"),
        ),
    ],
    "5.5": [wrong("5.5", "weights of a softmax", NOT_NAMED, ("p, 0.0)", "tl.exp(p), 0.0)"))],
    "5.8": [wrong("5.8", "the direct edge is lost on the left", NOT_NAMED, ("left = b + ", "left = "))],
    "5.9": [
        wrong(
            "5.9",
            "beta after N",
            NOT_NAMED,
            ('tl.dot(n, beta * r, input_precision="ieee")', 'beta * tl.dot(n, r, input_precision="ieee")'),
        )
    ],
    "5.10": [Answer("the first state is added at the end", segments_and_then_the_state, NOT_NAMED)],
    "5.12": [wrong("5.12", "the query is asked for the residual", NOT_NAMED, ("tl.dot(k, S,", "tl.dot(q, S,"))],
    "5.14": [
        wrong(
            "5.14",
            "N is not used",
            NOT_NAMED,
            ('z = f + tl.dot(tl.trans(n), beta * f, input_precision="ieee")', "z = f"),
        )
    ],
    "5.15": [
        wrong(
            "5.15",
            "the output is scaled",
            NOT_NAMED,
            ("tl.sum(q[:, None] * new, axis=0)", "tl.sum(q[:, None] * new, axis=0) * d**-0.5"),
        )
    ],
}
