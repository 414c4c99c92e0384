"""Chapter 5: what the Triton kernels compute, move and count.

The kernels run in the interpreter (in a child process where this machine compiles them), in float32: where
they stand against a formula the tolerance is float32's.  Counts are exact.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize

from dn_lib import cost
from dn_lib.forms.householder import rounded_matmul
from dn_lib.teaching.registry import Equation

SINGLE = 1e-5  # relative error of a few hundred float32 operations


def _integer(g, low, high):
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _observe(function, *args, **kwargs):
    from dn_lib.teaching.judge.trace import observe

    return observe(function, *args, **kwargs)


def _ladder(name, *args, **kwargs):
    """A function of `dn_lib.kernels.ladder`, which can only be imported where Triton is."""
    from dn_lib.kernels import ladder

    return _observe(getattr(ladder, name), *args, **kwargs)


# --- First programs -------------------------------------------------------------------------------------


def _sample_blocks(g):
    return _integer(g, 1, 300), 2 ** _integer(g, 4, 7)


def _count_programs(n, block):
    x = torch.zeros(n)
    _, trace = _ladder("scaled_add", x, x, 1.0, block=block)
    loads = [a for a in trace.launches[0].accesses if a.kind == "store"]
    return trace.launches[0].programs, int(loads[-1].elements[0]), sum(a.elements.size for a in loads)


BLOCKS = Equation(
    label="eq-blocks",
    kind="count",
    sample=_sample_blocks,
    left=_count_programs,
    right=lambda n, B: (math.ceil(n / B), (math.ceil(n / B) - 1) * B, n),
    mutants={
        "rounded down": lambda n, B: (n // B, (n // B - 1) * B, n),
        "one program too many": lambda n, B: (n // B + 1, n // B * B, n),
        "no mask": lambda n, B: (math.ceil(n / B), (math.ceil(n / B) - 1) * B, math.ceil(n / B) * B),
        "blocks interleaved": lambda n, B: (math.ceil(n / B), math.ceil(n / B) - 1, n),
    },
)

# --- Rounding of operands -------------------------------------------------------------------------------

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, "tf32": 2.0**-11}


def _sample_rounding(g):
    a, b = _normal(g, 4, 48), _normal(g, 48, 4)
    return a.float().double(), b.float().double(), (torch.float16, torch.bfloat16, "tf32")[_integer(g, 0, 2)]


def _rounding_error(a, b, dtype):
    if dtype == "tf32":
        from dn_lib.kernels.ladder import round_to_tf32

        product = round_to_tf32(a.float()).double() @ round_to_tf32(b.float()).double()
    else:
        product = rounded_matmul(dtype)(a, b)
    return (product - a @ b).abs()


def _rounding_bound(a, b, dtype, factor=1.0):
    u = factor * UNIT[dtype]
    return (2 * u + u**2) * (a.abs() @ b.abs())


ROUNDING = Equation(
    label="eq-dot-rounding",
    kind="bound",
    sample=_sample_rounding,
    left=_rounding_error,
    right=_rounding_bound,
    mutants={
        "relative to the result": lambda a, b, t: (2 * UNIT[t] + UNIT[t] ** 2) * (a @ b).abs(),
        "five bits more": lambda a, b, t: _rounding_bound(a, b, t, 2.0**-5),
        "float32's u": lambda a, b, t: 2 * 2.0**-24 * (a.abs() @ b.abs()),
        "bfloat16 as fine as float16": lambda a, b, t: 2 * 2.0**-11 * (a.abs() @ b.abs()),
    },
    trials=30,
)

# --- Linear attention -----------------------------------------------------------------------------------


def _sample_linear(g):
    L, d_k, d_v = _integer(g, 20, 60), _integer(g, 5, 24), _integer(g, 5, 24)
    return tuple(_normal(g, 1, L, 1, d) for d in (d_k, d_k, d_v))


def _linear_kernel(q, k, v):
    return _ladder("linear_attention", q.float(), k.float(), v.float())[0]


def _linear(q, k, v, *, offset=0, late=False, write=True, read=True, scale=True, C=16):
    """The chunk equations as printed, in float64."""
    q, k, v = (x[0, :, 0] for x in (q, k, v))
    S, outputs = torch.zeros(k.shape[1], v.shape[1], dtype=torch.float64), []
    for start in range(0, len(q), C):
        Q, K, V = (x[start : start + C] for x in (q, k, v))
        new = S + K.T @ V if write else S
        outputs.append((Q @ (new if late else S) if read else 0) + (Q @ K.T).tril(offset) @ V)
        S = new
    o = torch.cat(outputs) * (q.shape[1] ** -0.5 if scale else 1.0)
    return o[None, :, None], S[None, None]


LINEAR = Equation(
    label="eq-triton-linear",
    kind="definition",
    sample=_sample_linear,
    left=_linear_kernel,
    right=_linear,
    mutants={
        "diagonal left out": lambda q, k, v: _linear(q, k, v, offset=-1),
        "no causal mask": lambda q, k, v: _linear(q, k, v, offset=99),
        "state updated before the output": lambda q, k, v: _linear(q, k, v, late=True),
        "state not read": lambda q, k, v: _linear(q, k, v, read=False),
        "state not written": lambda q, k, v: _linear(q, k, v, write=False),
        "scale dropped": lambda q, k, v: _linear(q, k, v, scale=False),
    },
    tolerance=SINGLE,
    trials=5,
)


def _sample_shape(g):
    """Sizes for which no block is padded: powers of two, a length of whole chunks, two blocks of values."""
    B, H, chunks = _integer(g, 1, 2), _integer(g, 1, 2), _integer(g, 1, 3)
    d_k, d_v = 16 * 2 ** _integer(g, 0, 1), 32
    return cost.Shape(B=B, L=16 * chunks, H=H, d_k=d_k, d_v=d_v, C=16, element=4, block_v=16)


def _tensors(s, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s.B, s.L, s.H, d, generator=g) for d in (s.d_k, s.d_k, s.d_v))
    q, k, v = (normalize(x, dim=-1).to(dtype) for x in (q, k, v))
    return q, k, v, torch.rand(s.B, s.L, s.H, generator=g).to(dtype)


def _trace_linear(s):
    q, k, v, _ = _tensors(s)
    return _ladder("linear_attention", q, k, v, chunk_size=s.C, block_v=s.block_v)[1]


def _linear_bytes(s, *, blocks=None, state=4, qk=2, vo=2):
    blocks = s.value_blocks if blocks is None else blocks
    per_token = s.element * (qk * s.d_k * blocks + vo * s.d_v)
    return s.B * s.H * (s.L * per_token + state * s.d_k * s.d_v)


LINEAR_BYTES = Equation(
    label="eq-triton-linear-bytes",
    kind="count",
    sample=lambda g: (_sample_shape(g),),
    left=lambda s: _trace_linear(s).bytes(),
    right=_linear_bytes,
    mutants={
        "q and k once": lambda s: _linear_bytes(s, blocks=1),
        "state forgotten": lambda s: _linear_bytes(s, state=0),
        "state in half precision": lambda s: _linear_bytes(s, state=2),
        "output forgotten": lambda s: _linear_bytes(s, vo=1),
        "k forgotten": lambda s: _linear_bytes(s, qk=1),
    },
    trials=4,
)


def _linear_flops(s, *, scores=2, half: float = 1, state=4):
    blocks = s.value_blocks
    return s.tokens * (scores * s.C * s.d_k * blocks + 2 * s.C * s.d_v * half + state * s.d_k * s.d_v)


LINEAR_FLOPS = Equation(
    label="eq-triton-linear-flops",
    kind="count",
    sample=lambda g: (_sample_shape(g),),
    left=lambda s: _trace_linear(s).flops,
    right=_linear_flops,
    mutants={
        "multiply-add counted as one": lambda s: _linear_flops(s) // 2,
        "masked half left out": lambda s: _linear_flops(s, half=0.5),
        "state read but not written": lambda s: _linear_flops(s, state=2),
        "scores shared by blocks of values": lambda s: (
            _linear_flops(s) - s.tokens * 2 * s.C * s.d_k * (s.value_blocks - 1)
        ),
    },
    trials=4,
)


def _sample_roofline(g):
    shape = _sample_shape(g)
    costs = cost.delta_rule_in_steps(shape)
    # Ceilings near the kernels' own intensity, so that some are bound by bytes and some by operations.
    ridge = costs[_integer(g, 0, 3)].intensity * (0.5 + float(torch.rand(1, generator=g)))
    return costs, 1e9, 1e9 * ridge


ROOFLINE = Equation(
    label="eq-roofline",
    kind="definition",
    sample=_sample_roofline,
    left=cost.roofline_time,
    right=lambda costs, bw, fl: sum(max(c.bytes / bw, c.flops / fl) for c in costs),
    mutants={
        "sum of both": lambda costs, bw, fl: sum(c.bytes / bw + c.flops / fl for c in costs),
        "bytes only": lambda costs, bw, fl: sum(c.bytes / bw for c in costs),
        "operations only": lambda costs, bw, fl: sum(c.flops / fl for c in costs),
        "the smaller of the two": lambda costs, bw, fl: sum(min(c.bytes / bw, c.flops / fl) for c in costs),
        "maximum of the sums": lambda costs, bw, fl: max(
            sum(c.bytes for c in costs) / bw, sum(c.flops for c in costs) / fl
        ),
    },
    trials=30,
)

# --- The inverse ----------------------------------------------------------------------------------------


def _sample_strictly_lower(g):
    size = 2 ** _integer(g, 1, 5)
    return (0.5 * _normal(g, size, size).tril(-1),)


def _merge_levels(A, *, sign=-1.0, cross=lambda row, column: (row % 2 == 1) & (column == row - 1), once=False):
    M, i, size = torch.eye(len(A), dtype=A.dtype), torch.arange(len(A)), 1
    while size < len(A):
        A_s = A * cross(i[:, None] // size, i[None, :] // size)
        M = M + sign * (A_s @ M if once else M @ A_s @ M)
        size *= 2
    return M


MERGE = Equation(
    label="eq-merge-levels",
    kind="identity",
    sample=_sample_strictly_lower,
    left=lambda A: torch.linalg.inv(torch.eye(len(A), dtype=A.dtype) + A),
    right=_merge_levels,
    mutants={
        "plus for minus": lambda A: _merge_levels(A, sign=1.0),
        "every second pair only": lambda A: _merge_levels(A, cross=lambda r, c: (r % 4 == 1) & (c == r - 1)),
        "neighbours that are no pair": lambda A: _merge_levels(A, cross=lambda r, c: c == r - 1),
        "all of A at each level": lambda A: _merge_levels(A, cross=lambda r, c: (r % 2 == 1) | (c >= 0)),
        "lower block not inverted": lambda A: _merge_levels(A, once=True),
    },
)

METHODS = ("substitution", "doubling", "merging", "scaled")


def _sample_inverse(g):
    return 16 * 2 ** _integer(g, 0, 2), METHODS[_integer(g, 0, 3)]


def _count_inverse(C, method):
    shape = cost.Shape(B=1, L=C, H=1, d_k=16, d_v=16, C=C, element=4)
    q, k, v, beta = _tensors(shape)
    if method == "scaled":
        import dn_lib

        trace = _observe(dn_lib.delta_rule, q, k, v, beta, backend="triton", chunk_size=C)[1]
    else:
        trace = _ladder("ut_transform", k, beta, method=method, chunk_size=C)[1]
    gram = 2 * C * C * shape.d_k
    return sum(dot.flops for dot in trace.launches[0].dots) - gram


def _inverse_flops(C, method, *, half: float = 1, dots=2, small=6, pairs=1 / 3, more=1):
    """As printed."""
    levels, part = int(math.log2(C)), (16 / C) ** 2
    return 2 * C**3 * half * {
        "substitution": 0,
        "doubling": dots * (levels - more),
        "merging": dots * levels,
        "scaled": small * part + pairs * (1 - part),
    }[method]  # fmt: skip


INVERSE_FLOPS = Equation(
    label="eq-inverse-flops",
    kind="count",
    sample=_sample_inverse,
    left=_count_inverse,
    right=lambda C, m: round(_inverse_flops(C, m)),
    mutants={
        "multiply-add counted as one": lambda C, m: round(_inverse_flops(C, m, half=0.5)),
        "one dot a level": lambda C, m: round(_inverse_flops(C, m, dots=1)),
        "dots for blocks of size 1 too": lambda C, m: round(_inverse_flops(C, m, small=8)),
        "pairs joined in the full square": lambda C, m: (
            round(_inverse_flops(C, m, pairs=0)) + (m == "scaled") * 2 * (int(math.log2(C)) - 4) * 2 * C**3
        ),
        "pairs of blocks forgotten": lambda C, m: round(_inverse_flops(C, m, pairs=0)),
        "doubling as dear as merging": lambda C, m: round(_inverse_flops(C, m, more=0)),
    },
    trials=12,
)

# --- The ladder of kernels -------------------------------------------------------------------------------


def _count_steps(s):
    q, k, v, beta = _tensors(s)
    trace = _ladder("delta_rule_in_steps", q, k, v, beta, chunk_size=s.C, block_v=s.block_v)[1]
    return tuple(launch.bytes() for launch in trace.launches)


def _steps_bytes(s, *, blocks=None, states=1, T_reads=1, new=1):
    """Per kernel: T; W and U; states; output, as printed."""
    b = s.value_blocks if blocks is None else blocks
    rows, e = s.B * s.L * s.H, s.element
    S = s.B * s.H * s.chunks * 4 * s.d_k * s.d_v
    final = s.B * s.H * 4 * s.d_k * s.d_v
    return (
        rows * e * (s.d_k + 1 + s.C),
        rows * e * (T_reads * s.C + 2 * s.d_k + 2 * s.d_v),
        rows * e * (2 * s.d_k * b + (1 + new) * s.d_v) + states * S + final,
        rows * e * (2 * s.d_k + 2 * s.d_v) + states * S,
    )


STEPS = Equation(
    label="eq-steps-bytes",
    kind="count",
    sample=lambda g: (_sample_shape(g),),
    left=_count_steps,
    right=_steps_bytes,
    mutants={
        "k and W once": lambda s: _steps_bytes(s, blocks=1),
        "the stored states forgotten": lambda s: _steps_bytes(s, states=0),
        "T stays on chip": lambda s: _steps_bytes(s, T_reads=0),
        "U - W S not written": lambda s: _steps_bytes(s, new=0),
    },
    trials=3,
)


def _operator_in_blocks(q, k, v, beta, chunk_size, block_v):
    """The operator, its walk in blocks of `block_v` value columns.

    The interpreter takes tiles as wide as they can be, so that there would be one block only.  A function of this
    module, because where kernels are compiled `observe` calls it in a child process.
    """
    import dn_lib
    from dn_lib.kernels.plan import using
    from dn_lib.kernels.rules import Tiles, padded

    with using(tiles={"chunk_scan_fwd": Tiles(padded(k.shape[-1]), block_v, warps=4, stages=1)}):
        return dn_lib.delta_rule(q, k, v, beta, backend="triton", chunk_size=chunk_size, output_final_state=True)


def _count_walk(s):
    trace = _observe(_operator_in_blocks, *_tensors(s), s.C, s.block_v)[1]
    return tuple(launch.bytes() for launch in trace.launches)


def _walk_bytes(s, *, n=1, w=0, states=0, k=1, blocks=None):
    b = s.value_blocks if blocks is None else blocks
    rows, e = s.B * s.L * s.H, s.element
    final = s.B * s.H * 4 * s.d_k * s.d_v
    first = rows * e * (s.d_k + 1 + s.C)
    S = s.B * s.H * s.chunks * 4 * s.d_k * s.d_v
    walk = rows * e * (((1 + k + w) * s.d_k + 1 + n * s.C) * b + 2 * s.d_v) + final + states * S
    return first, walk


WALK = Equation(
    label="eq-walk-bytes",
    kind="count",
    sample=lambda g: (_sample_shape(g),),
    left=_count_walk,
    right=_walk_bytes,
    mutants={
        "N stays on chip": lambda s: _walk_bytes(s, n=0),
        "W is read": lambda s: _walk_bytes(s, w=1),
        "the states are stored": lambda s: _walk_bytes(s, states=1),
        "k is read once": lambda s: _walk_bytes(s, k=0),
        "q, k, beta and N read by one block of values": lambda s: _walk_bytes(s, blocks=1),
    },
    trials=3,
)

ENTRIES = [
    BLOCKS,
    ROUNDING,
    LINEAR,
    LINEAR_BYTES,
    LINEAR_FLOPS,
    ROOFLINE,
    MERGE,
    INVERSE_FLOPS,
    STEPS,
    WALK,
]
