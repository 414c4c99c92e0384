"""The exercises of chapter 5.

Where the answer is a kernel, the wrong answers are the right one with a piece of its text exchanged: text,
because kernels run in a child process, and because this module must load where Triton is not installed.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.cost import Shape, linear_attention
from dn_lib.forms.delta_rule import delta_rule_step
from dn_lib.forms.householder import scaled_inverse
from dn_lib.teaching.judge.child import KernelError
from dn_lib.teaching.judge.kernels import guarded
from dn_lib.teaching.judge.source import PLANS, Plan
from dn_lib.teaching.registry import Exercise, Mutant

NO_FAULTS = torch.zeros(4)  # accesses outside, races, doubtful dots, refusals: see `guarded`
IEEE = ', input_precision="ieee"'
C = 16


def _normal(g, *shape):
    return torch.randn(*shape, generator=g)


def _uniform(g, *shape):
    return torch.rand(*shape, generator=g)


def _integer(g, low, high):
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def exchange(source: str, *pairs: tuple[str, str]) -> str:
    """`source` with each first text replaced by the second.  Raises ValueError if it is not there once."""
    for old, new in pairs:
        if source.count(old) != 1:
            raise ValueError(f"{old!r} occurs {source.count(old)} times, must occur once")
        source = source.replace(old, new)
    return source


def _mutants(number: str, source: str, *wrong: tuple) -> tuple[Mutant, ...]:
    """Mutants from (pairs to exchange, message, hint)."""
    return tuple(
        Mutant(guarded(number, exchange(source, *pairs), strict=False), message, hint) for pairs, message, hint in wrong
    )


# --- 5.1 a masked copy -----------------------------------------------------------------------------------

COPY = """
@triton.jit
def copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(out_ptr + offsets, x, mask=offsets < n)
"""

PLANS["5.1"] = lambda x: Plan((x, torch.empty_like(x), len(x)), (1,), (-(-len(x) // 32),), {"BLOCK": 32})
EX_5_1 = Exercise(
    number="5.1",
    title="A masked copy",
    stars=1,
    minutes=10,
    sample=lambda g: (_normal(g, 32 * _integer(g, 2, 4) + _integer(g, 1, 31)),),
    reference=lambda x: (x, NO_FAULTS),
    tested="4 vectors whose length is no multiple of the block's, and compiled for sm_90",
    tolerance=1e-6,
    trials=4,
    mutants=_mutants(
        "5.1",
        COPY,
        (
            [("x_ptr + offsets, mask=offsets < n, other=0.0", "x_ptr + offsets"), (", x, mask=offsets < n", ", x")],
            "Nothing is masked: the last program has more places than there are numbers left.",
            "How many places do all programs together have, and how many numbers are there?",
        ),
        (
            [("x_ptr + offsets, mask=offsets < n, other=0.0", "x_ptr + offsets")],
            "Of load and store one has no mask: it reaches past the end of its tensor.",
            "Both touch memory.",
        ),
        (
            [
                ("x_ptr + offsets, mask=offsets < n", "x_ptr + offsets, mask=offsets <= n"),
                ("x, mask=offsets < n", "x, mask=offsets <= n"),
            ],
            "The mask lets one place too many through: element n is not there.",
            "Elements are counted from 0. Which is the last one?",
        ),
    ),
)


# --- 5.2 a two-dimensional block -------------------------------------------------------------------------

SCALE_ROWS = """
@triton.jit
def scale_rows(x_ptr, s_ptr, out_ptr, R, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < R) & (columns[None, :] < n)
    at = rows[:, None] * n + columns[None, :]
    s = tl.load(s_ptr + rows, mask=rows < R, other=0.0)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, s[:, None] * x, mask=inside)
"""


def _plan_scale_rows(x, s):
    rows, n = x.shape
    grid = (-(-rows // 8),)
    return Plan((x, s, torch.empty_like(x), rows, n), (2,), grid, {"ROWS": 8, "COLUMNS": C})


PLANS["5.2"] = _plan_scale_rows
EX_5_2 = Exercise(
    number="5.2",
    title="A block of rows",
    stars=1,
    minutes=15,
    sample=lambda g: (x := _normal(g, _integer(g, 17, 30), _integer(g, 9, 15)), _normal(g, x.shape[0])),
    reference=lambda x, s: (s[:, None] * x, NO_FAULTS),
    tested="4 matrices whose sizes are no multiple of the block's, and compiled for sm_90",
    tolerance=1e-6,
    trials=4,
    mutants=_mutants(
        "5.2",
        SCALE_ROWS,
        (
            [(" & (columns[None, :] < n)", " & (columns[None, :] < COLUMNS)")],
            "The columns have no mask: a block is wider than the matrix, and what lies past the end of a row "
            "is the next row.",
            "How many columns does the block have, and how many does the matrix?",
        ),
        (
            [("(rows[:, None] < R) & ", ""), ("mask=rows < R", "mask=rows >= 0")],
            "The rows have no mask: the last program reaches past the last row.",
            "How many rows do all programs together have, and how many does the matrix?",
        ),
        (
            [("tl.load(s_ptr + rows, mask=rows < R, other=0.0)", "tl.load(s_ptr + tl.arange(0, ROWS))")],
            "Every program reads the first numbers of s: they belong to the rows of program 0.",
            "Row r is multiplied by s[r]. Which rows does program 1 own?",
        ),
        (
            [("rows[:, None] * n +", "rows[:, None] * COLUMNS +")],
            "Wrong stride: neighbouring rows of the matrix do not lie COLUMNS elements apart.",
            "Where in memory does row 1 begin, if row 0 has n elements?",
        ),
        (
            [
                ("s_ptr + rows, mask=rows < R", "s_ptr + columns, mask=columns < n"),
                (", s[:, None] * x", ", s[None, :] * x"),
            ],
            "The scale follows the columns: s has one number for each row.",
            "Which of `rows` and `columns` indexes s, and along which axis is it then repeated?",
        ),
    ),
)


# --- 5.3 a tile of one head ------------------------------------------------------------------------------

HEADS_FIRST = """
@triton.jit
def heads_first(x_ptr, out_ptr, L, H, d, ROWS: tl.constexpr, D: tl.constexpr):
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    tokens, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    inside = (tokens[:, None] < L) & (columns[None, :] < d)
    source = ((b * L + tokens) * H + h)[:, None] * d + columns[None, :]
    target = ((b * H + h) * L + tokens)[:, None] * d + columns[None, :]
    x = tl.load(x_ptr + source, mask=inside, other=0.0)
    tl.store(out_ptr + target, x, mask=inside)
"""


def _plan_heads_first(x):
    B, L, H, d = x.shape
    out = torch.empty(B, H, L, d)
    return Plan((x, out, L, H, d), (1,), (-(-L // 8), B * H), {"ROWS": 8, "D": C})


PLANS["5.3"] = _plan_heads_first
EX_5_3 = Exercise(
    number="5.3",
    title="One head of four axes",
    stars=2,
    minutes=20,
    sample=lambda g: (_normal(g, 2, _integer(g, 9, 15), 3, _integer(g, 9, 15)),),
    reference=lambda x: (x.transpose(1, 2).contiguous(), NO_FAULTS),
    tested="3 tensors of odd sizes, and compiled for sm_90",
    tolerance=1e-6,
    trials=3,
    mutants=_mutants(
        "5.3",
        HEADS_FIRST,
        (
            [("source = ((b * L + tokens) * H + h)", "source = ((b * H + h) * L + tokens)")],
            "out holds the numbers in the order of x: one of your two addresses belongs to the other tensor.",
            "How many elements lie between token t of head h and token t + 1 of head h, in x, and in out?",
        ),
        (
            [("source = ((b * L + tokens) * H + h)", "source = (tokens * H + h)")],
            "Every sequence reads the first one: b is not in the address of x.",
            "Where in memory does sequence 1 begin?",
        ),
        (
            [("source = ((b * L + tokens) * H + h)", "source = ((b * L + tokens) * H)")],
            "Every head reads head 0: h is not in the address of x.",
            "Where does head 1 of token 0 begin?",
        ),
        (
            [
                (
                    "b, h = tl.program_id(1) // H, tl.program_id(1) % H",
                    "b, h = tl.program_id(1) % H, tl.program_id(1) // H",
                )
            ],
            "Sequence and head are exchanged: program_id(1) is b H + h.",
            "Which of the two grows by one from one program to the next?",
        ),
        (
            [("source = ((b * L + tokens) * H + h)", "source = (b * L * H + tokens + h)")],
            "In x, the tokens of a head are read d apart: between two of them lie the channels of the other heads.",
            "In memory, what stands between token t of head h and token t + 1 of head h?",
        ),
    ),
)


# --- 5.4 something carried -------------------------------------------------------------------------------

RUNNING_SUM = """
@triton.jit
def running_sum(x_ptr, out_ptr, L, d, C: tl.constexpr, D: tl.constexpr):
    rows, columns = tl.arange(0, C), tl.arange(0, D)
    total = tl.zeros([D], tl.float32)
    for start in range(0, L, C):
        at = (start + rows)[:, None] * d + columns[None, :]
        inside = (start + rows < L)[:, None] & (columns < d)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        here = tl.cumsum(x, axis=0)
        tl.store(out_ptr + at, total[None, :] + here, mask=inside)
        total += tl.sum(x, axis=0)
"""

PLANS["5.4"] = lambda x: Plan((x, torch.empty_like(x), *x.shape), (1,), (1,), {"C": C, "D": C})
EX_5_4 = Exercise(
    number="5.4",
    title="Something carried",
    stars=2,
    minutes=15,
    sample=lambda g: (_normal(g, C * _integer(g, 2, 3) + _integer(g, 1, 15), _integer(g, 9, 15)),),
    reference=lambda x: (x.double().cumsum(0).float(), NO_FAULTS),
    tested="3 sequences of odd lengths, and compiled for sm_90",
    tolerance=1e-5,
    trials=3,
    mutants=_mutants(
        "5.4",
        RUNNING_SUM,
        (
            [("total[None, :] + here", "here")],
            "Every chunk begins at zero: what earlier chunks have added up is not carried in.",
            "What does row 0 of the second chunk need besides its own numbers?",
        ),
        (
            [("total[None, :] + here", "total[None, :] + here - x")],
            "Row t leaves out its own number.",
            "What is the first row of the result?",
        ),
        (
            [("total += tl.sum", "total = tl.sum")],
            "The total holds the last chunk only: it is replaced where it should grow.",
            "With three chunks, what does the third one need?",
        ),
        (
            [
                ("        tl.store(", "        total += tl.sum(x, axis=0)\n        tl.store("),
                ("mask=inside)\n        total += tl.sum(x, axis=0)", "mask=inside)"),
            ],
            "The total takes in the chunk before the rows are stored: each chunk is counted twice.",
            "What should `total` hold while the rows of a chunk are stored?",
        ),
        (
            [("tl.cumsum(x, axis=0)", "tl.cumsum(x, axis=1)")],
            "Inside a chunk the sum runs along the channels: time is axis 0.",
            "Which axis of the block are the tokens?",
        ),
        (
            [("total[None, :] + here", "total[None, :] + x")],
            "Inside a chunk nothing is summed: every row has its own numbers and the earlier chunks' only.",
            "What does row 1 of the first chunk need besides its own numbers?",
        ),
        (
            [("total[None, :] + here", "total[:, None] + here")],
            "The totals are spread along the wrong axis: there is one for each channel, the same for all rows.",
            "Of `total[None, :]` and `total[:, None]`, which has a row that all tokens share?",
        ),
        (
            [("total += tl.sum(x, axis=0)", "total += tl.sum(here, axis=0)")],
            "The total takes in the running sums, in which each number stands many times.",
            "What does the next chunk need of this one: all of its running sums, or the last?",
        ),
    ),
)


# --- 5.5 a dot -------------------------------------------------------------------------------------------

SCORES = """
@triton.jit
def scores(q_ptr, k_ptr, p_ptr, C: tl.constexpr, D: tl.constexpr):
    i, d = tl.arange(0, C), tl.arange(0, D)
    at = i[:, None] * D + d[None, :]
    q, k = tl.load(q_ptr + at), tl.load(k_ptr + at)
    P = tl.dot(q, tl.trans(k), input_precision="ieee")
    P = tl.where(i[:, None] >= i[None, :], P, 0.0)
    tl.store(p_ptr + i[:, None] * C + i[None, :], P)
"""

PLANS["5.5"] = lambda q, k: Plan((q, k, torch.empty(C, C)), (2,), (1,), {"C": C, "D": 32}, dots=True)
EX_5_5 = Exercise(
    number="5.5",
    title="A dot",
    stars=1,
    minutes=15,
    sample=lambda g: (_normal(g, C, 32), _normal(g, C, 32)),
    reference=lambda q, k: ((q.double() @ k.double().T).tril().float(), NO_FAULTS),
    tested="3 chunks, and compiled for sm_90",
    tolerance=1e-5,
    trials=3,
    mutants=_mutants(
        "5.5",
        SCORES,
        (
            [(IEEE, "")],
            "The numbers are right here, but on a GPU this dot would round its float32 operands to TF32.",
            "Look at how the dots of the chapter ask for full precision.",
        ),
        (
            [(">=", ">")],
            "The diagonal is missing: a token may read what it has written itself.",
            "tril(X) keeps the diagonal, tril(X, -1) does not.",
        ),
        (
            [(">=", "<=")],
            "The mask is upside down: what is left are the pairs in which the key comes after the query.",
            "In P[i, j], which index is the query's?",
        ),
        (
            [("tl.dot(q, tl.trans(k)", "tl.dot(k, tl.trans(q)")],
            "Queries and keys are exchanged: row i belongs to query i.",
            "What is P[1, 0]: q_1 . k_0, or k_1 . q_0?",
        ),
        (
            [("P = tl.where(i[:, None] >= i[None, :], P, 0.0)", "P = P")],
            "There is no causal mask.",
            "For which pairs i, j has token j been written when token i is read?",
        ),
        (
            [("i[None, :], P, 0.0)", 'i[None, :], P, float("-inf"))')],
            "The masked scores are minus infinity, as before a softmax: here there is none, and they have to be 0.",
            "These scores are multiplied with values as they are.",
        ),
        (
            [("i[None, :], P, 0.0)", "i[None, :], P * D**-0.5, 0.0)")],
            "The scores are divided by the root of D: P = tril(Q K^T) has no scale.",
            "What does the equation say, and what comes with it in softmax attention only?",
        ),
    ),
)


# --- 5.6 bytes of a kernel -------------------------------------------------------------------------------


def _requested(B, L, H, d_k, d_v, element, block_v):
    shape = Shape(B=B, L=L, H=H, d_k=d_k, d_v=d_v, element=element, block_v=block_v)
    return linear_attention(shape)[0].requested


def _sample_requested(g):
    d_v = 32 * _integer(g, 2, 4)
    return _integer(g, 1, 4), 64 * _integer(g, 1, 9), _integer(g, 1, 8), 16 * _integer(g, 1, 8), d_v, 2, 32


EX_5_6 = Exercise(
    number="5.6",
    title="Count before you run",
    stars=1,
    minutes=10,
    sample=_sample_requested,
    reference=_requested,
    tested="8 random shapes, to the byte",
    tolerance=0.0,
    mutants=(
        Mutant(
            lambda B, L, H, d_k, d_v, e, bv: B * H * (L * (2 * d_k + 2 * d_v) * e + d_k * d_v * 4),
            "q and k are counted once, but every block of values reads them again.",
            "Programs share nothing. Which tensors do two programs of one head both need?",
        ),
        Mutant(
            lambda B, L, H, d_k, d_v, e, bv: B * H * L * (2 * d_k * (d_v // bv) + 2 * d_v) * e,
            "The final state is missing.",
            "What does the kernel store after its loop?",
        ),
        Mutant(
            lambda B, L, H, d_k, d_v, e, bv: B * H * (L * (2 * d_k * (d_v // bv) + 2 * d_v) + d_k * d_v) * e,
            "The state is counted in the elements of q, but it is float32.",
            "How many bytes does one number of the state take?",
        ),
        Mutant(
            lambda B, L, H, d_k, d_v, e, bv: B * H * (L * (2 * d_k + 2 * d_v) * (d_v // bv) * e + d_k * d_v * 4),
            "v and o are counted once for every block of values, but a program takes only its own columns.",
            "Which columns of v does a program load?",
        ),
        Mutant(
            lambda B, L, H, d_k, d_v, e, bv: B * H * (L * (2 * d_k + 2 * d_v * (d_v // bv)) * e + d_k * d_v * 4),
            "It is q and k that every block of values reads again, and not v and o.",
            "Which tensors do two programs of one head both need?",
        ),
        Mutant(
            lambda B, L, H, d_k, d_v, e, bv: B * H * (L * (2 * d_k * (d_v // bv) + 2 * d_v) * e + d_k * d_v * 8),
            "The state is counted twice: it begins at zero on chip, and is written only, once.",
            "Does the kernel load a state?",
        ),
        Mutant(
            lambda B, L, H, d_k, d_v, e, bv: (
                B * H * (L * (2 * d_k * (d_v // bv) + 2 * d_v) * e + d_k * d_v * (d_v // bv) * 4)
            ),
            "Every block of values writes the whole state here, but it has its own columns only.",
            "Which columns of S does a program hold?",
        ),
    ),
)


# --- 5.7 linear attention that forgets -------------------------------------------------------------------

RETENTION = """
@triton.jit
def retention(
    q_ptr, k_ptr, v_ptr, o_ptr, state_ptr, log_gamma, gamma_C, L, C: tl.constexpr, D: tl.constexpr
):
    i, d = tl.arange(0, C), tl.arange(0, D)
    gap = i[:, None] - i[None, :]
    within = tl.where(gap >= 0, tl.exp2(gap * log_gamma), 0.0)
    since = tl.exp2((i + 1) * log_gamma)
    until = tl.exp2((C - 1 - i) * log_gamma)
    S = tl.zeros([D, D], tl.float32)
    for start in range(0, L, C):
        at = (start + i)[:, None] * D + d[None, :]
        q, k, v = tl.load(q_ptr + at), tl.load(k_ptr + at), tl.load(v_ptr + at)
        A = tl.dot(q, tl.trans(k), input_precision="ieee") * within
        new = tl.dot(tl.trans(k), until[:, None] * v, input_precision="ieee")
        o = tl.dot(A, v, input_precision="ieee")
        o += since[:, None] * tl.dot(q, S, input_precision="ieee")
        tl.store(o_ptr + at, o)
        S = gamma_C * S + new
    tl.store(state_ptr + d[:, None] * D + d[None, :], S)
"""


def _sample_retention(g):
    length = C * _integer(g, 2, 4)
    q, k, v = (_normal(g, length, C) for _ in range(3))
    return q, k, v, 0.7 + 0.25 * float(_uniform(g, 1))


def _retention(q, k, v, gamma):
    state, outputs = torch.zeros(C, C, dtype=torch.float64), []
    for q_t, k_t, v_t in zip(q.double(), k.double(), v.double(), strict=True):
        state = gamma * state + torch.outer(k_t, v_t)
        outputs.append(q_t @ state)
    return torch.stack(outputs).float(), state.float(), NO_FAULTS


def _plan_retention(q, k, v, gamma):
    arguments = (q, k, v, torch.empty_like(v), torch.empty(C, C), math.log2(gamma), gamma**C, q.shape[0])
    return Plan(arguments, (3, 4), (1,), {"C": C, "D": C}, dots=True)


PLANS["5.7"] = _plan_retention
EX_5_7 = Exercise(
    number="5.7",
    title="A state that forgets",
    stars=3,
    minutes=40,
    sample=_sample_retention,
    reference=_retention,
    tested="3 sequences of 32 to 64 tokens, outputs and final state, and compiled for sm_90",
    tolerance=1e-5,
    trials=3,
    mutants=_mutants(
        "5.7",
        RETENTION,
        (
            [("gap >= 0", "gap > 0")],
            "The diagonal is missing: a token does not see its own value.",
            "With gamma^0 = 1, what does token i read of what token i wrote?",
        ),
        (
            [("tl.exp2(gap * log_gamma)", "1.0")],
            "Inside a chunk nothing fades: the weights there are those of linear attention.",
            "How many times has a value been multiplied by gamma between token j and token i?",
        ),
        (
            [('input_precision="ieee") * within', 'input_precision="ieee")')],
            "Inside a chunk there is neither a mask nor a power of gamma: every token sees the whole chunk, "
            "later tokens too.",
            "The product of Q and K^T meets another C x C matrix before it meets V. What is its entry [i, j]?",
        ),
        (
            [("tl.where(gap >= 0, tl.exp2(gap * log_gamma), 0.0)", "tl.exp2(gap * log_gamma)")],
            "There is no causal mask: a token reads later ones, and with gamma to a negative power.",
            "For which pairs i, j of a chunk has token j been written when token i is read?",
        ),
        (
            [("(i + 1) * log_gamma", "i * log_gamma")],
            "The chunk's input state is one factor of gamma too large: row 0 already sees it faded once.",
            "Write the recurrence for the first token of a chunk.",
        ),
        (
            [("(C - 1 - i) * log_gamma", "(C - i) * log_gamma")],
            "What the chunk writes into the state fades once too often.",
            "By what is the value of the chunk's last token multiplied when the chunk ends?",
        ),
        (
            [
                (
                    "        o += since[:, None]",
                    "        S = gamma_C * S + new\n        o += since[:, None]",
                ),
                (
                    "        tl.store(o_ptr + at, o)\n        S = gamma_C * S + new",
                    "        tl.store(o_ptr + at, o)",
                ),
            ],
            "The state is updated before the output is read: this chunk's values are counted twice.",
            "Which state does Q meet in the chunk's output: the one before the chunk, or after?",
        ),
        (
            [("* S + new", "* S + new\n        S = S.to(tl.bfloat16).to(tl.float32)")],
            "The state is kept in bfloat16: every chunk rounds it to 8 bits.",
            "The inputs may be short numbers. What about a sum that thousands of tokens go into?",
        ),
        (
            [("since[:, None] * tl.dot(q, S", "tl.dot(q, S")],
            "The chunk's input state is read as it came in: since then it has faded, more with each row.",
            "How many times has the state been multiplied by gamma when row i reads it?",
        ),
        (
            [
                ("tl.exp2(gap * log_gamma)", "1.0"),
                ("since[:, None] * tl.dot(q, S", "tl.dot(q, S"),
                ("until[:, None] * v", "v"),
                ("gamma_C * S + new", "S + new"),
            ],
            "Nothing fades, neither inside a chunk nor between chunks: this is linear attention.",
            "How many times has a value been multiplied by gamma between token j and token i?",
        ),
        (
            [("gamma_C * S + new", "S + new")],
            "From chunk to chunk the state does not fade.",
            "After C steps, what is left of the state before the chunk?",
        ),
        (
            [("gamma_C * S + new", "tl.exp2(log_gamma) * S + new")],
            "From chunk to chunk the state fades by one step, and a chunk has C of them.",
            "After C steps, what is left of the state before the chunk?",
        ),
        (
            [("until[:, None] * v", "v")],
            "What the chunk writes goes into the state without fading.",
            "How many steps lie between row j's write and the end of the chunk?",
        ),
        (
            [("(C - 1 - i) * log_gamma", "i * log_gamma")],
            "What the chunk writes fades the wrong way round: the chunk's last token fades most.",
            "How many steps lie between row j's write and the end of the chunk?",
        ),
    ),
)


# --- 5.8 join two blocks of N ----------------------------------------------------------------------------

JOIN = """
@triton.jit
def join(n_ptr, b_ptr, beta_ptr, out_ptr, HALF: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, C)
    at = i[:, None] * C + i[None, :]
    n, b, beta = tl.load(n_ptr + at), tl.load(b_ptr + at), tl.load(beta_ptr + i)
    cross = tl.where((i[:, None] >= HALF) & (i[None, :] < HALF), b, 0.0)
    right = cross + tl.dot(cross, beta[:, None] * n, input_precision="ieee")
    left = right + tl.dot(n * beta[None, :], right, input_precision="ieee")
    tl.store(out_ptr + at, n - left)
"""
JOIN_SMALL = """
@triton.jit
def join(n_ptr, b_ptr, beta_ptr, out_ptr, HALF: tl.constexpr, C: tl.constexpr):
    i, h = tl.arange(0, C), tl.arange(0, HALF)
    at = i[:, None] * C + i[None, :]
    upper = h[:, None] * C + h[None, :]
    lower = upper + HALF * (C + 1)
    corner = upper + HALF * C
    n11, n22, b21 = tl.load(n_ptr + upper), tl.load(n_ptr + lower), tl.load(b_ptr + corner)
    right = b21 + tl.dot(b21, tl.load(beta_ptr + h)[:, None] * n11, input_precision="ieee")
    n21 = right + tl.dot(n22 * tl.load(beta_ptr + HALF + h)[None, :], right, input_precision="ieee")
    tl.store(out_ptr + at, tl.load(n_ptr + at))
    tl.store(out_ptr + corner, -n21)
"""


def _sample_join(g):
    k = normalize(_normal(g, C, C) + 0.4, dim=-1)
    beta = 2 * _uniform(g, C)
    halves = [scaled_inverse(k[h], beta[h]) for h in (slice(0, C // 2), slice(C // 2, C))]
    return torch.block_diag(*halves), (k @ k.T).tril(-1), beta


def _join(n, gram, beta):
    n, gram, beta = n.double(), gram.double(), beta.double()
    h = C // 2
    n21 = -(torch.eye(h) + n[h:, h:] * beta[h:]) @ gram[h:, :h] @ (torch.eye(h) + beta[:h, None] * n[:h, :h])
    out = n.clone()
    out[h:, :h] = n21
    return out.float(), NO_FAULTS


PLANS["5.8"] = lambda n, gram, beta: Plan((n, gram, beta, torch.empty_like(n)), (3,), (1,), {"HALF": C // 2, "C": C})
EX_5_8 = Exercise(
    number="5.8",
    title="Join two blocks of N",
    stars=2,
    minutes=25,
    sample=_sample_join,
    reference=_join,
    tested="3 chunks of correlated keys with beta up to 2, and compiled for sm_90",
    tolerance=1e-5,
    trials=3,
    mutants=(
        *_mutants(
            "5.8",
            JOIN,
            (
                [("n - left", "n + left")],
                "The sign of the new block is wrong: each pass through B brings a minus.",
                "Take beta = 0: what is N then?",
            ),
            (
                [("beta[:, None] * n", "n"), ("n * beta[None, :]", "n")],
                "beta is missing: N stands between two diagonal matrices in T = D + D N D.",
                "Where do D_1 and D_2 stand in the equation?",
            ),
            (
                [
                    ("beta[:, None] * n", "n * beta[None, :]"),
                    ("n * beta[None, :], right", "beta[:, None] * n, right"),
                ],
                "beta multiplies the wrong side: rows where it should be columns.",
                "D_1 N_11 scales the rows of N_11. And N_22 D_2?",
            ),
            (
                [("beta[:, None] * n", "beta[None, :] * n")],
                "On the right of B_21, beta multiplies the columns of N_11: D_1 stands before N_11.",
                "What does a diagonal matrix do to a matrix from the left, and what from the right?",
            ),
            (
                [("n * beta[None, :]", "n * beta[:, None]")],
                "On the left of B_21, beta multiplies the rows of N_22: D_2 stands after N_22.",
                "What does a diagonal matrix do to a matrix from the right, and what from the left?",
            ),
            (
                [("tl.where((i[:, None] >= HALF) & (i[None, :] < HALF), b, 0.0)", "b")],
                "b is not masked to the corner: the diagonal blocks of B enter too, but N_11 and N_22 hold "
                "them already.",
                "Which block of B is not yet part of N?",
            ),
            (
                [("tl.store(out_ptr + at, n - left)", "tl.store(out_ptr + at, -left)")],
                "Only the new block is written: N_11 and N_22 are part of the joined N.",
                "What does the joined N hold in its two diagonal blocks?",
            ),
            (
                [("left = right + tl.dot(", "left = cross + tl.dot("), (", right, input", ", cross, input")],
                "Only the lower half is passed through: the factor I + D_1 N_11 is lost.",
                "The new block is a product of three matrices. How many are in yours?",
            ),
            (
                [('left = right + tl.dot(n * beta[None, :], right, input_precision="ieee")', "left = right")],
                "Only the upper half is passed through: the factor I + N_22 D_2 is lost.",
                "The new block is a product of three matrices. How many are in yours?",
            ),
            (
                [("right = cross + tl.dot", "right = tl.dot"), ("left = right + tl.dot", "left = tl.dot")],
                "The identities are lost: a path may begin or end right at the cut.",
                "What is the new block of two halves with N = 0?",
            ),
            (
                [("(i[:, None] >= HALF) & (i[None, :] < HALF)", "i[:, None] >= HALF")],
                "The mask lets B_22 through as well, and N_22 holds it already.",
                "The corner has a condition for rows and one for columns.",
            ),
        ),
        Mutant(
            guarded("5.8", JOIN_SMALL, strict=False),
            "The numbers are right, but the hardware refuses: these dots have an inner size of 8, and 16 is the least.",
            "Work in the full 16 x 16 square, and let masks choose the block.",
        ),
    ),
)


# --- 5.9 one chunk in error form -------------------------------------------------------------------------

ERRORS = """
@triton.jit
def errors(k_ptr, v_ptr, beta_ptr, n_ptr, s_ptr, e_ptr, out_ptr, C: tl.constexpr, D: tl.constexpr):
    i, d = tl.arange(0, C), tl.arange(0, D)
    row, square, state = i[:, None] * D + d[None, :], i[:, None] * C + i[None, :], d[:, None] * D + d[None, :]
    k, v, beta = tl.load(k_ptr + row), tl.load(v_ptr + row), tl.load(beta_ptr + i)[:, None]
    n, S = tl.load(n_ptr + square), tl.load(s_ptr + state)
    R = v - tl.dot(k, S, input_precision="ieee")
    E = R + tl.dot(n, beta * R, input_precision="ieee")
    tl.store(e_ptr + row, E)
    tl.store(out_ptr + state, S + tl.dot(tl.trans(k), beta * E, input_precision="ieee"))
"""


def _sample_errors(g):
    k, beta = normalize(_normal(g, C, 32) + 0.2, dim=-1), 2 * _uniform(g, C)
    return k, _normal(g, C, 32), beta, scaled_inverse(k, beta), _normal(g, 32, 32)


def _errors(k, v, beta, n, S):
    k, v, beta, state = (x.double() for x in (k, v, beta, S))
    found = []
    for k_t, v_t, b_t in zip(k, v, beta, strict=True):
        found.append(v_t - k_t @ state)
        state = state + torch.outer(k_t, b_t * found[-1])
    return torch.stack(found).float(), state.float(), NO_FAULTS


PLANS["5.9"] = lambda k, v, beta, n, S: Plan(
    (k, v, beta, n, S, torch.empty_like(v), torch.empty_like(S)), (5, 6), (1,), {"C": C, "D": 32}
)
EX_5_9 = Exercise(
    number="5.9",
    title="One chunk, in errors",
    stars=2,
    minutes=20,
    sample=_sample_errors,
    reference=_errors,
    tested="3 chunks against a loop over tokens, errors and state, and compiled for sm_90",
    tolerance=1e-5,
    trials=3,
    mutants=_mutants(
        "5.9",
        ERRORS,
        (
            [("tl.dot(n, beta * R,", "tl.dot(n, R,")],
            "Inside N the earlier residuals count in full, but a write of strength beta moves by beta R.",
            "What stands to the right of N in T = D + D N D?",
        ),
        (
            [("tl.trans(k), beta * E", "tl.trans(k), E")],
            "The state takes the whole error: beta is missing from the write.",
            "The pseudo-value of a token is not its error. What is it?",
        ),
        (
            [("E = R + tl.dot", "E = R - tl.dot")],
            "N is subtracted, but it carries its own minus.",
            "N = -(I + B D)^{-1} B.",
        ),
        (
            [('R = v - tl.dot(k, S, input_precision="ieee")', "R = v")],
            "The residual forgets the state: what earlier chunks stored for these keys is not taken off.",
            "What would the state return for each key before this chunk writes?",
        ),
        (
            [("tl.store(out_ptr + state, S +", "tl.store(out_ptr + state,")],
            "The chunk's input state is lost: only what this chunk writes comes out.",
            "S' = S + ...",
        ),
        (
            [("tl.store(e_ptr + row, E)", "tl.store(e_ptr + row, beta * E)")],
            "What you store as E is D E, what is written: asked for is the error itself.",
            "How wrong is the state about a token's value, whatever the strength of its write?",
        ),
        (
            [('E = R + tl.dot(n, beta * R, input_precision="ieee")', "E = R")],
            "E is R here: the tokens of a chunk do not see one another's writes.",
            "R is wrong by what earlier tokens of the same chunk have written in between. What mends it?",
        ),
        (
            [("tl.dot(k, S,", "tl.dot(k, tl.trans(S),")],
            "The state is read transposed: its rows belong to the keys.",
            "R = V - K S: which axis of S is summed?",
        ),
    ),
)


# --- 5.10 join segments -----------------------------------------------------------------------------------


def _join_segments(M, X, S, *, reverse=False, forget=False, enter=True, transpose=False):
    pairs = list(zip(M, X, strict=True))
    state = S if enter else torch.zeros_like(S)
    for m, x in reversed(pairs) if reverse else pairs:
        state = (state if forget else (m.mT if transpose else m) @ state) + x
    return state


def _double(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


EX_5_10 = Exercise(
    number="5.10",
    title="Four segments, one state",
    stars=2,
    minutes=10,
    sample=lambda g: (_double(g, 4, 5, 5), _double(g, 4, 5, 7), _double(g, 5, 7)),
    reference=_join_segments,
    tested="8 chains of four segments in float64",
    mutants=(
        Mutant(
            lambda M, X, S: _join_segments(M, X, S, forget=True),
            "You add the segments up. That is linear attention: here each segment also erases.",
            "What does segment 2 do to a state that segment 1 left behind?",
        ),
        Mutant(
            lambda M, X, S: _join_segments(M, X, S, reverse=True),
            "The order is reversed: the first segment in time must act first.",
            "Which matrix stands next to the initial state in M_4 M_3 M_2 M_1 S?",
        ),
        Mutant(
            lambda M, X, S: _join_segments(M, X, S, enter=False),
            "The initial state does not enter.",
            "The chain begins with a state, not with zero.",
        ),
        Mutant(
            lambda M, X, S: _join_segments(M, X, S, transpose=True),
            "M is transposed, as in the paper's convention; our states are [d_k, d_v].",
            "Which side of S does H_t = I - beta k k^T stand on in our delta rule?",
        ),
        Mutant(
            lambda M, X, S: M[3] @ (M[2] @ (M[1] @ (M[0] @ (S + X[0]) + X[1]) + X[2]) + X[3]),
            "Each segment's map is applied to its own X as well: X is what it has written by its end.",
            "S_out = M S_in + X: is X inside of the product?",
        ),
        Mutant(
            lambda M, X, S: _join_segments(M[1:], X[1:], S),
            "The first segment is left out.",
            "How many maps are there, and how many have you applied?",
        ),
        Mutant(
            lambda M, X, S: M[3] @ M[2] @ M[1] @ M[0] @ S + X.sum(0),
            "The maps act on S only: what an early segment wrote is erased by the later ones, too.",
            "What does segment 2 do to X of segment 1?",
        ),
    ),
)


# --- 5.11 to 5.13 the whole forward ----------------------------------------------------------------------

ALL_INVERSES = """
@triton.jit
def all_inverses(k_ptr, beta_ptr, n_ptr, L, H, d, C: tl.constexpr, D: tl.constexpr):
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    i, columns = tl.arange(0, C), tl.arange(0, D)
    tokens = tl.program_id(0) * C + i
    row = (b * L + tokens) * H + h
    real = tokens < L
    k = tl.load(k_ptr + row[:, None] * d + columns[None, :], mask=real[:, None] & (columns < d)[None, :], other=0.0)
    beta = tl.load(beta_ptr + row, mask=real, other=0.0)
    B = tl.where(i[:, None] > i[None, :], tl.dot(k, tl.trans(k), input_precision="ieee"), 0.0)
    N = -B
    for r in range(1, C):
        b_r = tl.sum(tl.where(i[:, None] == r, B, 0.0), axis=0)
        n_r = -b_r - tl.sum((b_r * beta)[:, None] * N, axis=0)
        N = tl.where(i[:, None] == r, n_r[None, :], N)
    tl.store(n_ptr + row[:, None] * C + i[None, :], N, mask=real[:, None])
"""
SCAN = """
@triton.jit
def scan(
    q_ptr, k_ptr, v_ptr, beta_ptr, n_ptr, o_ptr, state_ptr, scale, L, H, d, C: tl.constexpr, D: tl.constexpr
):
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    i, columns = tl.arange(0, C), tl.arange(0, D)
    S = tl.zeros([D, D], tl.float32)
    for start in range(0, L, C):
        row = (b * L + start + i) * H + h
        real = start + i < L
        at, inside = row[:, None] * d + columns[None, :], real[:, None] & (columns < d)[None, :]
        q = tl.load(q_ptr + at, mask=inside, other=0.0)
        k = tl.load(k_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        beta = tl.load(beta_ptr + row, mask=real, other=0.0)[:, None]
        N = tl.load(n_ptr + row[:, None] * C + i[None, :], mask=real[:, None], other=0.0)
        R = v - tl.dot(k, S, input_precision="ieee")
        E = R + tl.dot(N, beta * R, input_precision="ieee")
        P = tl.where(i[:, None] >= i[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
        new = tl.dot(tl.trans(k), beta * E, input_precision="ieee")
        o = tl.dot(q, S, input_precision="ieee") + tl.dot(P, beta * E, input_precision="ieee")
        tl.store(o_ptr + at, scale * o, mask=inside)
        S += new
    square = columns[:, None] * d + columns[None, :]
    tl.store(state_ptr + (b * H + h) * d * d + square, S, mask=(columns < d)[:, None] & (columns < d)[None, :])
"""


def _sample_keys(g):
    B, L, H, d = 2, C + _integer(g, 1, 15), 3, _integer(g, 9, 15)
    return normalize(_normal(g, B, L, H, d) + 0.2, dim=-1), 2 * _uniform(g, B, L, H)


def _all_inverses(k, beta):
    """N of every chunk, row t at token t: [B, L, H, C]."""
    n = torch.zeros(*k.shape[:3], C, dtype=torch.float64)
    for start in range(0, k.shape[1], C):
        part = slice(start, min(start + C, k.shape[1]))
        of_chunk = scaled_inverse(k[:, part].double().transpose(1, 2), beta[:, part].double().transpose(1, 2))
        n[:, part, :, : part.stop - start] = of_chunk.transpose(1, 2)
    return n.float()


def _plan_all_inverses(k, beta):
    B, L, H, d = k.shape
    n = torch.empty(B, L, H, C)
    return Plan((k, beta, n, L, H, d), (2,), (-(-L // C), B * H), {"C": C, "D": C})


PLANS["5.11"] = _plan_all_inverses
EX_5_11 = Exercise(
    number="5.11",
    title="The whole forward: N of every chunk",
    stars=3,
    minutes=40,
    sample=_sample_keys,
    reference=lambda k, beta: (_all_inverses(k, beta), NO_FAULTS),
    tested="2 batches of odd sizes, and compiled for sm_90",
    tolerance=1e-5,
    trials=2,
    mutants=_mutants(
        "5.11",
        ALL_INVERSES,
        (
            [("(b_r * beta)[:, None]", "b_r[:, None]")],
            "beta is missing inside the inverse: N = -(I + B D)^{-1} B.",
            "Write out row 2 of N + B D N = -B for a chunk of three tokens.",
        ),
        (
            [("(b_r * beta)[:, None] * N", "b_r[:, None] * N * beta[None, :]")],
            "beta multiplies the columns of N: D stands between B and N.",
            "In B D N, which index do D's numbers belong to?",
        ),
        (
            [("-b_r - tl.sum", "-b_r + tl.sum")],
            "The earlier rows come in with the wrong sign.",
            "N + B D N = -B: bring the second term to the other side.",
        ),
        (
            [("    N = -B\n", "    N = B\n"), ("n_r = -b_r - tl.sum", "n_r = b_r - tl.sum")],
            "Every entry has the wrong sign: this is -N.",
            "What is N for two tokens?",
        ),
        (
            [("for r in range(1, C)", "for r in range(C, C)")],
            "This is -B: nothing is inverted.",
            "Row 1 of N is row 1 of -B. Row 2 is not.",
        ),
        (
            [("i[:, None] > i[None, :]", "i[:, None] >= i[None, :]")],
            "B has a diagonal: tril(K K^T, -1) has none.",
            "Does a token's own key count among the earlier ones?",
        ),
        (
            [("beta)[:, None] * N", "beta)[:, None] * -B")],
            "The earlier rows come in as they are in -B, not as they are in N: only one step of the inverse is taken.",
            "When row 3 is made, rows 1 and 2 have been mended already.",
        ),
        (
            [
                (
                    "B = tl.where(i[:, None] > i[None, :], tl.dot(",
                    "B = tl.where(i[:, None] > i[None, :], beta[:, None] * tl.dot(",
                )
            ],
            "beta multiplies the rows of B as well: B = tril(K K^T, -1) has none.",
            "In N = -(I + B D)^{-1} B, where does D stand, and how often?",
        ),
        (
            [
                ("    N = -B\n", "    N = tl.where(i[:, None] == i[None, :], 1.0, -B)\n"),
                ("n_r = -b_r - tl.sum((b_r * beta)", "n_r = tl.where(i == r, 1.0, -b_r) - tl.sum((b_r * beta)"),
            ],
            "Your matrix has ones on its diagonal: N is strictly lower triangular.",
            "Is N the inverse of a matrix, or that inverse times B?",
        ),
        (
            [("row = (b * L + tokens) * H + h", "row = (b * H + h) * L + tokens")],
            "Rows are read as if the tensors were [B, H, L, d]: they are [B, L, H, d].",
            "Exercise 5.3 has both addresses.",
        ),
    ),
)


def _sample_scan(g):
    k, beta = _sample_keys(g)
    return _normal(g, *k.shape), k, _normal(g, *k.shape), beta, _all_inverses(k, beta)


def _loop(q, k, v, beta, scale=None, *, N=True):
    """o and the last state of every head, by chunks of C in float64; without N each chunk sees its residual R."""
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    B, L, H, d = q.shape
    state, outputs = torch.zeros(B, H, d, d, dtype=torch.float64), []
    block = 1 if N else C
    for t in range(0, L, block):
        q_t, k_t, v_t = (x[:, t : t + block].transpose(1, 2) for x in (q, k, v))
        new = beta[:, t : t + block].transpose(1, 2)[..., None] * (v_t - k_t @ state)
        outputs.append(q_t @ state + (q_t @ k_t.mT).tril() @ new)
        state = state + k_t.mT @ new
    o = torch.cat(outputs, dim=2).transpose(1, 2) * (d**-0.5 if scale is None else scale)
    return o.contiguous().float(), state.float()


def _plan_scan(q, k, v, beta, n):
    B, L, H, d = q.shape
    arguments = (q, k, v, beta, n, torch.empty_like(v), torch.empty(B, H, d, d), d**-0.5, L, H, d)
    return Plan(arguments, (5, 6), (B * H,), {"C": C, "D": C})


PLANS["5.12"] = _plan_scan
EX_5_12 = Exercise(
    number="5.12",
    title="The whole forward: scan and output",
    stars=3,
    minutes=40,
    sample=_sample_scan,
    reference=lambda q, k, v, beta, n: (*_loop(q, k, v, beta), NO_FAULTS),
    tested="2 batches of odd sizes against a loop over tokens, and compiled for sm_90",
    tolerance=1e-5,
    trials=2,
    mutants=_mutants(
        "5.12",
        SCAN,
        (
            [("scale * o", "o")],
            "The scale is missing: o is that of unscaled queries.",
            "Which argument have you not used yet?",
        ),
        (
            [("o = tl.dot(q, S", "o = scale * tl.dot(q, S"), ("o_ptr + at, scale * o", "o_ptr + at, o")],
            "Only Q S is scaled: the scale belongs to the queries, which stand in the scores as well.",
            "Where does q occur in O?",
        ),
        (
            [
                (
                    'P = tl.where(i[:, None] >= i[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)',
                    'P = tl.dot(q, tl.trans(k), input_precision="ieee")',
                )
            ],
            "There is no causal mask: a token reads what later ones of its chunk write.",
            "For which pairs i, j has token j been written when token i is read?",
        ),
        (
            [
                ("        S += new\n", ""),
                (
                    "        P = tl.where",
                    '        S += tl.dot(tl.trans(k), beta * E, input_precision="ieee")\n        P = tl.where',
                ),
            ],
            "The state takes in the chunk before the output is read: what the chunk writes is counted twice.",
            "Which state does Q meet: the one before the chunk, or after?",
        ),
        (
            [("tl.dot(N, beta * R,", "tl.dot(N, R,")],
            "Inside N the earlier residuals count in full, but a write of strength beta moves by beta R.",
            "What stands between N and R in E = R + N D R?",
        ),
        (
            [("tl.trans(k), beta * E", "tl.trans(k), E"), ("tl.dot(P, beta * E", "tl.dot(P, E")],
            "beta is missing from the write: the pseudo-value is D E.",
            "How far does a write of strength 0.1 move the stored value?",
        ),
        (
            [('E = R + tl.dot(N, beta * R, input_precision="ieee")', "E = R")],
            "N is not used: the tokens of a chunk do not see one another's writes.",
            "R is wrong by what earlier tokens of the same chunk have written in between. What mends it?",
        ),
        (
            [("tl.dot(P, beta * E", "tl.dot(P, E")],
            "The output reads E, the state takes D E: both have to be what was written.",
            "What does a token read of what an earlier one wrote with strength 0?",
        ),
        (
            [("tl.trans(k), beta * E", "tl.trans(k), E")],
            "The output reads D E, but the state takes E: beta is missing from the write.",
            "The state of a token with strength 0: does it change?",
        ),
        (
            [("E = R + tl.dot", "E = R - tl.dot")],
            "N is subtracted, but it carries its own minus.",
            "N = -(I + B D)^{-1} B.",
        ),
        (
            [("i[:, None] >= i[None, :]", "i[:, None] > i[None, :]")],
            "The scores lack their diagonal: a token reads what it has written itself.",
            "o_t = S_t^T q_t: has token t been written into S_t?",
        ),
        (
            [('R = v - tl.dot(k, S, input_precision="ieee")', "R = v")],
            "The residual forgets the state: what earlier chunks stored for these keys is not taken off.",
            "What would the state return for each key before this chunk writes?",
        ),
        (
            [('o = tl.dot(q, S, input_precision="ieee") + ', "o = ")],
            "The output reads this chunk's writes only: Q S is missing.",
            "Where does the output get what earlier chunks have written?",
        ),
        (
            [("S += new", "S = new")],
            "The chunk's input state is lost: only what this chunk writes goes on.",
            "S' = S + ...",
        ),
        (
            [("row = (b * L + start + i) * H + h", "row = (b * H + h) * L + start + i")],
            "Rows are read as if the tensors were [B, H, L, d]: they are [B, L, H, d].",
            "Exercise 5.3 has both addresses.",
        ),
    ),
)

OURS = {"chunk_inverse", "chunk_scan_fwd", "recurrent", "one_kernel", "ut_kernel", "wu_kernel", "state_kernel"}


def launched(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, a function that launches kernels, for `check`.

    It is called on the device on which kernels run here.  What it allocates is full of NaN until a kernel writes it.
    In the interpreter its launches are watched; a stray access or a race raises a KernelError of one line.
    """

    @functools.wraps(fn)
    def answer(*inputs: Tensor) -> Any:
        from dn_lib.kernels.ladder import interpreted
        from dn_lib.teaching.judge.trace import record

        with _unwritten_is_nan():
            if not interpreted():
                found = fn(*(x.cuda() for x in inputs))
                return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found
            with record() as trace:
                try:
                    found = fn(*inputs)
                except TypeError as error:
                    if "must be an iterable, not int" not in str(error):
                        raise
                    message = "a grid is a tuple, of one number too: kernel[(programs,)](...)"
                    raise KernelError(message).with_traceback(error.__traceback__) from None
        if isinstance(found, tuple) and all(isinstance(x, Tensor) for x in found):
            _complain(trace, found)
        return found

    judged: Any = answer
    judged.limited = torch.cuda.is_available()  # a process that has used a GPU cannot be copied
    return judged


@contextlib.contextmanager
def _unwritten_is_nan() -> Iterator[None]:
    """Inside, `torch.empty` is filled with NaN."""
    memory: Any = torch.utils.deterministic
    strict, filled = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        memory.fill_uninitialized_memory = filled


def _complain(trace: Any, found: tuple[Tensor, ...]) -> None:
    """Raise a KernelError for what is wrong with the launches, or with memory that they left as it was."""
    if not trace.launches:
        raise KernelError("no kernel was launched")
    borrowed = sorted({launch.kernel for launch in trace.launches} & OURS)
    if borrowed:
        raise KernelError(f"`{borrowed[0]}` is a kernel of the package: launch your own")
    if trace.outside:
        raise KernelError(str(trace.outside[0]))
    races = [race for launch in trace.launches for race in launch.overlaps()]
    if races:
        raise KernelError(races[0])
    for position, x in enumerate(found):
        if x.isnan().any():
            at = [int(i) for i in x.isnan().nonzero()[0]]
            raise KernelError(
                f"output {position} is NaN first at {at}: no program has written that, or what it came from"
            )


def _sample_whole(g):
    k, beta = _sample_keys(g)
    return _normal(g, *k.shape), k, _normal(g, *k.shape), beta


def _heads_first_memory(x):
    """What a kernel reads that takes the memory of [B, L, H, ...] for [B, H, L, ...]."""
    B, L, H = x.shape[:3]
    return x.reshape(B, H, L, *x.shape[3:]).transpose(1, 2)


def _wrong_layout(q, k, v, beta):
    o, state = _loop(*(_heads_first_memory(x) for x in (q, k, v, beta)))
    return o.transpose(1, 2).reshape(q.shape), state


def _transposed_state(q, k, v, beta):
    o, state = _loop(q, k, v, beta)
    return o, state.mT.contiguous()


EX_5_13 = Exercise(
    number="5.13",
    title="The whole forward: wrapper, grid and launch",
    stars=2,
    minutes=25,
    sample=_sample_whole,
    reference=_loop,
    tested="2 batches of odd sizes against a loop over tokens, every launch watched where kernels are interpreted",
    tolerance=1e-5,
    trials=2,
    outputs=("o", "state"),
    mutants=(
        Mutant(
            lambda q, k, v, beta: _loop(q, k, v, beta, 1.0),
            "The scale is missing: it is d to the power of -1/2.",
            "What have you handed over as `scale`?",
        ),
        Mutant(
            lambda q, k, v, beta: _loop(q, k, v, beta, C**-0.5),
            "The scale is made of the block's width, not of the head's.",
            "D is the next power of two. Which of D and d do the queries have?",
        ),
        Mutant(
            _wrong_layout,
            "The kernels read the tensors as [B, H, L, d]: they are [B, L, H, d].",
            "Do `L` and `H` arrive in the right places?",
        ),
        Mutant(
            lambda q, k, v, beta: _loop(q, k, v, beta, N=False),
            "n holds zeros when the second kernel reads it.",
            "Which of the two launches comes first, and are both handed the same tensor?",
        ),
        Mutant(
            _transposed_state,
            "The state is transposed: keys run along its rows.",
            "S is [d_k, d_v].",
        ),
    ),
)


# --- 5.14 the gradient of the values ----------------------------------------------------------------------

VALUE_GRADIENT = """
@triton.jit
def value_gradient(n_ptr, beta_ptr, dvn_ptr, dv_ptr, C: tl.constexpr, D: tl.constexpr):
    i, d = tl.arange(0, C), tl.arange(0, D)
    n, beta = tl.load(n_ptr + i[:, None] * C + i[None, :]), tl.load(beta_ptr + i)[:, None]
    dvn = tl.load(dvn_ptr + i[:, None] * D + d[None, :])
    z = dvn + tl.dot(tl.trans(n), beta * dvn, input_precision="ieee")
    tl.store(dv_ptr + i[:, None] * D + d[None, :], beta * z)
"""


def _sample_value_gradient(g):
    k, beta = normalize(_normal(g, C, 8) + 0.4, dim=-1), 0.1 + 1.8 * _uniform(g, C)
    return scaled_inverse(k, beta), beta, _normal(g, C, 32)


def _value_gradient(n, beta, dvn):
    """Through autograd: dV of the sum of dVn * Vn, Vn = D (R + N D R), R = V - K S."""
    n, beta, dvn = n.double(), beta.double()[:, None], dvn.double()
    r = torch.zeros_like(dvn, requires_grad=True)
    (gradient,) = torch.autograd.grad((dvn * beta * (r + n @ (beta * r))).sum(), r)
    return gradient.float(), NO_FAULTS


PLANS["5.14"] = lambda n, beta, dvn: Plan((n, beta, dvn, torch.empty_like(dvn)), (3,), (1,), {"C": C, "D": 32})
EX_5_14 = Exercise(
    number="5.14",
    title="The gradient of the values",
    stars=2,
    minutes=25,
    sample=_sample_value_gradient,
    reference=_value_gradient,
    tested="3 chunks against autograd in float64, and compiled for sm_90",
    tolerance=1e-5,
    trials=3,
    mutants=_mutants(
        "5.14",
        VALUE_GRADIENT,
        (
            [(IEEE, "")],
            "On a GPU this dot would round its float32 operands to TF32, 11 bits: asked for nothing, Triton does.",
            "Look at the dots of the chapter's kernels: what do they ask for?",
        ),
        (
            [("tl.trans(n)", "n")],
            "N is not transposed: gradients run from later tokens to earlier ones.",
            "If y = A x, what matrix takes dy to dx?",
        ),
        (
            [("tl.trans(n), beta * dvn", "tl.trans(n), dvn")],
            "The beta on the side of the later token is missing: T^T is D + D N^T D.",
            "How many times does D stand beside N^T?",
        ),
        (
            [(", beta * z)", ", z)")],
            "You stopped at Z: the gradient of V has one more factor of beta.",
            "T^T begins with D, too.",
        ),
        (
            [("z = dvn + tl.dot", "z = tl.dot")],
            "The token's own write is missing: T has a diagonal.",
            "T = D + D N D has two terms.",
        ),
        (
            [("z = dvn + tl.dot", "z = dvn - tl.dot")],
            "N is subtracted, but it carries its own minus.",
            "T = D + D N D.",
        ),
        (
            [(", beta * z)", ", beta * beta * z)")],
            "There is a beta too many on the left.",
            "T^T = D + D N^T D: how many D stand on the left of each term?",
        ),
    ),
)


# --- 5.15 decoding ----------------------------------------------------------------------------------------

DECODE = """
@triton.jit
def decode(q_ptr, k_ptr, v_ptr, beta_ptr, s_ptr, o_ptr, out_ptr, d, D: tl.constexpr):
    h = tl.program_id(0)
    i = tl.arange(0, D)
    square = h * d * d + i[:, None] * d + i[None, :]
    inside = (i[:, None] < d) & (i[None, :] < d)
    q = tl.load(q_ptr + h * d + i, mask=i < d, other=0.0)
    k = tl.load(k_ptr + h * d + i, mask=i < d, other=0.0)
    v = tl.load(v_ptr + h * d + i, mask=i < d, other=0.0)
    beta = tl.load(beta_ptr + h)
    S = tl.load(s_ptr + square, mask=inside, other=0.0)
    error = v - tl.sum(k[:, None] * S, axis=0)
    S += k[:, None] * (beta * error)[None, :]
    o = tl.sum(q[:, None] * S, axis=0)
    tl.store(o_ptr + h * d + i, o, mask=i < d)
    tl.store(out_ptr + square, S, mask=inside)
"""


def _sample_decode(g):
    heads, d = _integer(g, 2, 4), _integer(g, 9, 15)
    q, k, v = (_normal(g, heads, d) for _ in range(3))
    return q, normalize(k, dim=-1), v, 2 * _uniform(g, heads), _normal(g, heads, d, d)


def _decode(q, k, v, beta, state):
    o, new = delta_rule_step(*(x.double() for x in (q, k, v, beta, state)), scale=1.0)
    return o.float(), new.float(), NO_FAULTS


PLANS["5.15"] = lambda q, k, v, beta, s: Plan(
    (q, k, v, beta, s, torch.empty_like(v), torch.empty_like(s), q.shape[1]), (5, 6), (q.shape[0],), {"D": C}
)
EX_5_15 = Exercise(
    number="5.15",
    title="One token",
    stars=2,
    minutes=25,
    sample=_sample_decode,
    reference=_decode,
    tested="3 states whose size is no power of two, and compiled for sm_90",
    tolerance=1e-5,
    trials=3,
    mutants=_mutants(
        "5.15",
        DECODE,
        (
            [
                ("    o = tl.sum(q[:, None] * S, axis=0)\n", ""),
                ("    error = v", "    o = tl.sum(q[:, None] * S, axis=0)\n    error = v"),
            ],
            "The output is read before the token is written.",
            "o_t = S_t^T q_t: which of the two states is S_t?",
        ),
        (
            [("error = v - tl.sum(k[:, None] * S, axis=0)", "error = v")],
            "Nothing is erased: that is linear attention with a write strength.",
            "What does the state return for k before the write?",
        ),
        (
            [("beta * error", "error")],
            "beta is missing: every write replaces the old value completely.",
            "How far does a write of strength 0.1 move the stored value?",
        ),
        (
            [("k[:, None] * S, axis=0", "k[None, :] * S, axis=1")],
            "The state is read along its wrong axis: S is [d_k, d_v], and k runs along its rows.",
            "Which index of S does a key share, and which is summed?",
        ),
        (
            [
                ("k[:, None] * S, axis=0", "k[:, None] * S, axis=1"),
                ("q[:, None] * S, axis=0", "q[:, None] * S, axis=1"),
            ],
            "Reading sums along axis=1, the values: what is left has one number for each component of the key.",
            "S^T k has one number for each component of a value. Which axis of S disappears?",
        ),
        (
            [
                ("tl.sum(k[:, None] * S, axis=0)", "tl.sum(k[None, :] * S, axis=1)"),
                ("k[:, None] * (beta * error)[None, :]", "k[None, :] * (beta * error)[:, None]"),
                ("tl.sum(q[:, None] * S, axis=0)", "tl.sum(q[None, :] * S, axis=1)"),
            ],
            "The state is taken for its transpose, in reading and in writing: keys run along its rows.",
            "S is [d_k, d_v], and o_t = S_t^T q_t. Which index of S does a key share?",
        ),
        (
            [("inside = (i[:, None] < d) & (i[None, :] < d)", "inside = i[:, None] < D")],
            "The state has no mask: a 16 x 16 block is larger than the state, and reaches into other heads.",
            "A mask for a matrix has two conditions.",
        ),
        (
            [("tl.load(beta_ptr + h)", "tl.load(beta_ptr)")],
            "Every head takes the beta of head 0.",
            "Where does the beta of head h stand?",
        ),
        (
            [("square = h * d * d", "square = h * D * D")],
            "The heads' states are read D D apart: in memory they lie d d apart.",
            "How many numbers has the state of one head?",
        ),
        (
            [("i[:, None] * d + i[None, :]", "i[:, None] * D + i[None, :]")],
            "The rows of a state are read D apart: in memory they lie d apart.",
            "How many numbers has a row of the state?",
        ),
        (
            [("(i[:, None] < d) & (i[None, :] < d)", "i[:, None] < d")],
            "The mask of the state has no condition for its columns.",
            "A mask for a matrix has two conditions.",
        ),
    ),
)


ENTRIES = [
    EX_5_1,
    EX_5_2,
    EX_5_3,
    EX_5_4,
    EX_5_5,
    EX_5_6,
    EX_5_7,
    EX_5_8,
    EX_5_9,
    EX_5_10,
    EX_5_11,
    EX_5_12,
    EX_5_13,
    EX_5_14,
    EX_5_15,
]
