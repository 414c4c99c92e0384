"""What a form or a kernel of the book has to do: bytes, floating-point operations, serial steps.

A `Cost` is what one kernel moves and computes; a form is a tuple of them, since kernels run one after the
other and each reads what the one before wrote.  Bytes are sums of tensor sizes, tested against the tensors
themselves and against what the kernels are seen to touch; FLOPs count the dots as they are executed, two a
multiply-add, with the masked half of a triangle included because the hardware computes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, log2


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem.  `element`: bytes of one number of q, k, v, o.  `block_v`: the columns of the
    state that one program holds (all of them if None); `block_k`: the key channels for which one program of
    the backward makes dq and dk (likewise).

    >>> Shape(B=1, L=128, H=2, d_k=64, d_v=64).chunks
    2
    """

    B: int
    L: int
    H: int
    d_k: int
    d_v: int
    C: int = 64
    element: int = 2
    block_v: int | None = None
    block_k: int | None = None

    @property
    def chunks(self) -> int:
        return ceil(self.L / self.C)

    @property
    def heads(self) -> int:
        return self.B * self.H

    @property
    def tokens(self) -> int:
        """Tokens times heads, chunks padded to their full length: the rows that dots work on."""
        return self.heads * self.chunks * self.C

    @property
    def value_blocks(self) -> int:
        return ceil(self.d_v / (self.block_v or self.d_v))

    @property
    def key_blocks(self) -> int:
        return ceil(self.d_k / (self.block_k or self.d_k))

    def tensor_bytes(self, name: str) -> int:
        """Bytes of a tensor of the book, by its name.  Raises KeyError for an unknown one."""
        rows, e = self.B * self.L * self.H, self.element
        state = self.d_k * self.d_v * 4
        known = {
            **dict.fromkeys(("q", "k", "W", "a", "b", "dq", "dk", "da", "db"), rows * self.d_k * e),
            **dict.fromkeys(("v", "o", "U", "new", "Vn", "do", "dv"), rows * self.d_v * e),
            **dict.fromkeys(("beta", "dbeta", "g", "dg"), rows * e),
            **dict.fromkeys(("g_channels", "dg_channels"), rows * self.d_k * e),
            "dbeta_partials": rows * 4 * self.value_blocks,
            "sums": rows * 8,
            "chunk_sums": self.heads * self.chunks * 8,
            "dg_partials": rows * 4 * self.key_blocks,
            "T": rows * self.C * e,
            "N": rows * self.C * e,
            "S": self.heads * self.chunks * state,
            **dict.fromkeys(("states", "dstates"), self.heads * self.chunks * self.d_k * self.d_v * e),
            "final": self.heads * state,
            # Of the kernels with a gate per channel.  A is read up to its diagonal, and written by squares of 16.
            **dict.fromkeys(("q_decayed", "k_decayed", "dq_decayed", "dk_decayed"), rows * self.d_k * e),
            **dict.fromkeys(("A", "dA"), self.tokens * (self.C + 1) // 2 * e),
            "A_squares": self.tokens * (self.C + 16) // 2 * e,
            "dA_whole": rows * self.C * e,
            "whole": self.heads * self.chunks * self.d_k * 4,
            "passing": self.heads * self.chunks * ceil(self.C / 16) * self.d_k * 4,
            **dict.fromkeys(("dg_channels32", "dg_in_parts"), rows * self.d_k * 4),
        }
        if name not in known:
            raise KeyError(f"no bytes for {name!r}: add it to Shape.tensor_bytes")
        return known[name]


@dataclass(frozen=True)
class Cost:
    """One kernel.  reads, writes: bytes of each tensor, once.  times: how often the programs together ask
    for a tensor (caches may answer all but the first), a fraction where they ask for some rows more often than for
    others.  steps: the longest chain of dependent chunks or tokens.
    """

    name: str
    reads: dict[str, int]
    writes: dict[str, int]
    flops: int
    times: Mapping[str, int | Fraction] = field(default_factory=dict)
    steps: int = 1

    @property
    def bytes(self) -> int:
        """Bytes that memory must move if every repeated read is answered by a cache."""
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def requested(self) -> int:
        """Bytes that the programs ask for."""
        moves = (*self.reads.items(), *self.writes.items())
        return int(sum(size * self.times.get(name, 1) for name, size in moves))

    @property
    def intensity(self) -> float:
        """FLOPs for each byte moved."""
        return self.flops / self.bytes


def _cost(
    shape: Shape, name: str, reads: str, writes: str, flops: int, again: str = "", steps: int = 1,
    blocks: int | None = None,
) -> Cost:  # fmt: skip
    """A `Cost` from names of tensors; those in `again` are read by every one of `blocks` (those of values)."""
    return Cost(
        name,
        {n: shape.tensor_bytes(n) for n in reads.split()},
        {n: shape.tensor_bytes(n) for n in writes.split()},
        flops,
        dict.fromkeys(again.split(), shape.value_blocks if blocks is None else blocks),
        steps,
    )


def roofline_time(costs: Iterable[Cost], bandwidth: float, flop_rate: float) -> float:
    """Seconds that `costs` take one after the other (eq-roofline), at `bandwidth` bytes and `flop_rate`
    operations a second.

    >>> roofline_time([Cost("copy", {"x": 1000}, {"y": 1000}, flops=0)], bandwidth=1e3, flop_rate=1e3)
    2.0
    """
    return sum(max(c.bytes / bandwidth, c.flops / flop_rate) for c in costs)


def total_bytes(costs: Iterable[Cost]) -> int:
    return sum(c.bytes for c in costs)


def total_flops(costs: Iterable[Cost]) -> int:
    return sum(c.flops for c in costs)


# --- What nobody can avoid ------------------------------------------------------------------------------


def compulsory(
    shape: Shape, *, inputs: Iterable[str] = ("q", "k", "v", "beta"), backward: bool = False
) -> tuple[Cost, ...]:
    """Each of `inputs` read once and o written once; with `backward`, of both passes together."""
    reads = {n: shape.tensor_bytes(n) for n in inputs}
    forward = Cost("compulsory", reads, {"o": shape.tensor_bytes("o")}, 0)
    if not backward:
        return (forward,)
    gradients = {f"d{n}": size for n, size in reads.items()}
    return forward, Cost("compulsory backward", reads | {"do": shape.tensor_bytes("o")}, gradients, 0)


def softmax_attention(shape: Shape) -> tuple[Cost, ...]:
    """Causal attention in one kernel that keeps its scores on chip and skips the blocks above the diagonal."""
    work = shape.B * shape.H * shape.L * (shape.L + shape.C) * (shape.d_k + shape.d_v)
    return (_cost(shape, "softmax attention", "q k v", "o", work),)


# --- Linear attention -----------------------------------------------------------------------------------


def recurrent_linear_attention(shape: Shape) -> tuple[Cost, ...]:
    """Token after token, the state on chip: write 2 d_k d_v, read 2 d_k d_v, no dot large enough for the
    matrix units."""
    flops = shape.B * shape.L * shape.H * 4 * shape.d_k * shape.d_v
    return (_cost(shape, "recurrent", "q k v", "o final", flops, again="q k", steps=shape.L),)


def linear_attention(shape: Shape) -> tuple[Cost, ...]:
    """The chunk kernel of `dn_lib.kernels.ladder` (eq-triton-linear-flops)."""
    C, d_k, d_v, t = shape.C, shape.d_k, shape.d_v, shape.tokens
    flops = t * (2 * C * d_k * shape.value_blocks + 2 * C * d_v + 4 * d_k * d_v)
    return (_cost(shape, "chunk kernel", "q k v", "o final", flops, again="q k", steps=shape.chunks),)


# --- The delta rule -------------------------------------------------------------------------------------


def inverse_flops(C: int, method: str) -> int:
    """FLOPs in the dots of one C x C inverse (eq-inverse-flops): a method of
    `dn_lib.kernels.ladder.INVERSES`, or "scaled", the operator's own N, or "halves", which is that for float16.

    "substitution" takes none: its C - 1 dependent steps are sums.  "scaled" joins blocks up to 16 as C / 16
    small matrices and wider ones as what they are, two dots for each pair.  "halves" has three dots for each of
    those, since an operand is the sum of two float16.  Raises KeyError for another method.

    >>> [round(inverse_flops(64, m) / (2 * 64**3), 2) for m in ("doubling", "merging", "scaled")]
    [10.0, 12.0, 0.69]
    """
    levels = int(log2(C))
    small = 3 * 2 * 2 * (C // 16) * 16**3
    scaled = small + sum(2 * 2 * (C // (2 * size)) * size**3 for size in (16, 32) if size < C)
    return {
        "substitution": 0,
        "doubling": 2 * (levels - 1) * 2 * C**3,
        "merging": 2 * levels * 2 * C**3,
        "scaled": scaled,
        "halves": 3 * scaled,
    }[method]


def recurrent_delta_rule(shape: Shape) -> tuple[Cost, ...]:
    """Token after token, the state on chip: 6 d_k d_v a token and head."""
    flops = shape.B * shape.L * shape.H * 6 * shape.d_k * shape.d_v
    return (_cost(shape, "recurrent", "q k v beta", "o final", flops, again="q k beta", steps=shape.L),)


def chunkwise_delta_rule_flops(shape: Shape) -> int:
    """FLOPs of the matrix products and the triangular solves of `dn_lib.forms.chunkwise.chunkwise_delta_rule`.

    Implements eq-chunk-work, which counts multiply-adds, for chunks that are all full.

    >>> chunkwise_delta_rule_flops(Shape(B=1, L=64, H=1, d_k=64, d_v=64)) // (2 * 64**3)
    8
    """
    C, d_k, d_v = shape.C, shape.d_k, shape.d_v
    chunk = C * C * (3 * d_k + 2 * d_v) + C * C * (C - 1) // 2 + 3 * C * d_k * d_v
    return 2 * shape.heads * shape.chunks * chunk


def delta_rule_in_steps(shape: Shape, *, method: str = "merging") -> tuple[Cost, ...]:
    """The four kernels of `dn_lib.kernels.ladder.delta_rule_in_steps` (eq-steps-bytes)."""
    C, d_k, d_v, t = shape.C, shape.d_k, shape.d_v, shape.tokens
    inverse = shape.heads * shape.chunks * inverse_flops(C, method)
    return (
        _cost(shape, "T", "k beta", "T", t * 2 * C * d_k + inverse),
        _cost(shape, "W, U", "T k v", "W U", t * 2 * C * (d_k + d_v)),
        _cost(shape, "states", "k W U", "S new final", t * 4 * d_k * d_v, again="k W", steps=shape.chunks),
        _cost(shape, "output", "q k new S", "o", t * (2 * C * (d_k + d_v) + 2 * d_k * d_v)),
    )


def delta_rule_in_three(shape: Shape, *, method: str = "scaled") -> tuple[Cost, ...]:
    """`dn_lib.kernels.rungs.delta_rule_in_three`: W and U as above, then a walk that keeps S and writes o.

    A token's products: W S, Q S and K^T E, 2 d_k d_v each; Q K^T, for every block of values, and its product with E.
    """
    C, d_k, d_v = shape.C, shape.d_k, shape.d_v
    walk = shape.tokens * (6 * d_k * d_v + 2 * C * d_v + 2 * C * d_k * shape.value_blocks)
    last = _cost(shape, "walk", "q k W U", "o final", walk, again="q k W", steps=shape.chunks)
    return (*delta_rule_in_steps(shape, method=method)[:2], last)


def delta_rule_in_two(shape: Shape, *, method: str = "scaled") -> tuple[Cost, ...]:
    """`dn_lib.kernels.rungs.delta_rule_in_two`: the same with K S for W S, and T times the errors, 2 C d_v more."""
    C, d_k, d_v = shape.C, shape.d_k, shape.d_v
    walk = shape.tokens * (6 * d_k * d_v + 4 * C * d_v + 2 * C * d_k * shape.value_blocks)
    last = _cost(shape, "walk", "q k v T", "o final", walk, again="q k T", steps=shape.chunks)
    return (delta_rule_in_steps(shape, method=method)[0], last)


def two_kernels(shape: Shape, *, method: str = "scaled", save: str = "") -> tuple[Cost, ...]:
    """The operator's forward: one kernel writes N, the second walks the chunks and writes o (eq-walk-bytes).

    save: names of what the walk also writes for the backward: "Vn" for small heads, "Vn states" for wide ones.
    method: "halves" where the inputs are float16.
    """
    C, d_k, d_v, t = shape.C, shape.d_k, shape.d_v, shape.tokens
    inverse = shape.heads * shape.chunks * inverse_flops(C, method)
    walk = t * (6 * d_k * d_v + 4 * C * d_v + 2 * C * d_k * shape.value_blocks)
    reads, writes = "q k v beta N", f"o final {save}"
    return (
        _cost(shape, "N", "k beta", "N", t * 2 * C * d_k + inverse),
        _cost(shape, "chunk_scan_fwd", reads, writes, walk, again="q k beta N", steps=shape.chunks),
    )


def fused(shape: Shape, *, method: str = "merging") -> tuple[Cost, ...]:
    """The one kernel of `dn_lib.kernels.ladder.delta_rule_in_one`; every block of values inverts anew."""
    first, second = two_kernels(shape, method=method)
    flops = first.flops * shape.value_blocks + second.flops
    reads, writes = "q k v beta", "o final"
    return (_cost(shape, "one kernel", reads, writes, flops, again="q k beta", steps=shape.chunks),)


def backward(shape: Shape) -> tuple[Cost, ...]:
    """The operator's backward for wide heads: a walk back writes dv and dS at every chunk; dq and dk are made of
    these and of the states that the forward saved, all chunks at once.

    With one block of values its sum is dbeta.  With several, each leaves a partial sum in float32, and
    `chunk_bwd_dqk` adds them up.

    >>> walk, last = backward(Shape(B=1, L=64, H=1, d_k=128, d_v=128, block_v=64))
    >>> list(walk.writes), list(last.writes)
    (['dv', 'dbeta_partials', 'dstates'], ['dq', 'dk', 'dbeta'])
    """
    C, d_k, d_v, t = shape.C, shape.d_k, shape.d_v, shape.tokens
    walk = t * (6 * d_k * d_v + 4 * C * d_v + 2 * C * d_k * shape.value_blocks)
    last = t * (6 * d_k * d_v + 4 * C * d_v * shape.key_blocks + 6 * C * d_k)
    whole = shape.value_blocks == 1
    strengths = "dbeta" if whole else "dbeta_partials"
    reads, writes = "q k beta Vn do dv states dstates", "dq dk"
    if not whole:
        reads, writes = f"{reads} dbeta_partials", f"{writes} dbeta"
    return (
        _cost(
            shape, "chunk_scan_bwd", "q k beta N Vn do", f"dv {strengths} dstates", walk, again="q k beta N",
            steps=shape.chunks,
        ),
        _cost(shape, "chunk_bwd_dqk", reads, writes, last, again="beta Vn do dv", blocks=shape.key_blocks),
    )  # fmt: skip


def fused_backward(shape: Shape) -> tuple[Cost, ...]:
    """The operator's backward for small heads: one walk from the right carries dS and, beside it, the state."""
    C, d_k, d_v, t = shape.C, shape.d_k, shape.d_v, shape.tokens
    flops = t * (14 * d_k * d_v + 8 * C * d_v + 8 * C * d_k)
    reads, writes = "q k beta N Vn do final", "dv dbeta dq dk"
    return (_cost(shape, "chunk_scan_bwd", reads, writes, flops, steps=shape.chunks),)


def gated(shape: Shape, *, gate: bool = True, erase: bool = True, save: bool = False) -> tuple[Cost, ...]:
    """The forward with a gate per token, without erasure, or both; save: what the backward needs is written.

    The sums of gates are two float32 a token, and those of a whole chunk are read once more.

    >>> [cost.name for cost in gated(Shape(B=1, L=64, H=1, d_k=64, d_v=64), erase=False)]
    ['gate_sums', 'chunk_scan_fwd']
    """
    C, d_k, d_v, t = shape.C, shape.d_k, shape.d_v, shape.tokens
    sums = " sums chunk_sums" if gate else ""
    found = [_cost(shape, "gate_sums", "g", "sums", 0)] if gate else []
    scores = 2 * C * d_k * shape.value_blocks
    if erase:
        inverse = shape.heads * shape.chunks * inverse_flops(C, "scaled")
        found.append(_cost(shape, "N", f"k beta{sums}", "N", t * 2 * C * d_k + inverse))
        again, work, kept = f"q k beta N{sums}", t * (6 * d_k * d_v + 4 * C * d_v + scores), "Vn states"
    else:
        again, work, kept = f"q k{sums}", t * (4 * d_k * d_v + 2 * C * d_v + scores), "states"
    writes = f"o final {kept if save else ''}"
    found.append(
        _cost(shape, "chunk_scan_fwd", f"{again} v", writes, work, again=again, steps=shape.chunks)
    )  # fmt: skip
    return tuple(found)


def gated_backward(shape: Shape, *, gate: bool = True, erase: bool = True) -> tuple[Cost, ...]:
    """The backward of `gated`: the walk back, then dq, dk and dg of all chunks at once.

    With one block of values its sum is dbeta, with one block of keys dg; else they leave partial sums.
    """
    C, d_k, d_v, t = shape.C, shape.d_k, shape.d_v, shape.tokens
    sums = " sums chunk_sums" if gate else ""
    scores, blocks = 2 * C * d_k * shape.value_blocks, shape.key_blocks
    reads, writes = f"do dv states dstates{sums} q k", f"dq dk{' dg_partials' * gate}"
    if erase:
        whole = shape.value_blocks == 1
        again, walk = f"q k beta N{sums}", t * (6 * d_k * d_v + 4 * C * d_v + scores)
        back = _cost(
            shape, "chunk_scan_bwd", f"{again} Vn do", f"dv {'dbeta' if whole else 'dbeta_partials'} dstates", walk,
            again=again, steps=shape.chunks,
        )  # fmt: skip
        reads += " beta Vn" if whole else " beta Vn dbeta_partials"
        writes += "" if whole else " dbeta"
        work = t * (6 * d_k * d_v + 4 * C * d_v * blocks + (10 if gate else 6) * C * d_k)
        shared = f"beta Vn do dv{sums}"
    else:
        again, walk = f"q k{sums}", t * (4 * d_k * d_v + 2 * C * d_v + scores)
        back = _cost(
            shape, "chunk_scan_bwd", f"{again} do", "dv dstates", walk, again=again, steps=shape.chunks
        )  # fmt: skip
        reads = reads.replace("dv ", "v ", 1)
        work = t * (4 * d_k * d_v + 2 * C * d_v * blocks + (6 if gate else 4) * C * d_k)
        shared = f"v do{sums}"
    if gate and shape.element == 4:  # in float32 dg's sum over j < m <= i is a product, see `gate_gradient`
        work += t * 2 * C * C * blocks
    return back, _cost(shape, "chunk_bwd_dqk", reads, writes, work, again=shared, blocks=blocks)


def _times(shape: Shape, each: int, pair: int = 0) -> Fraction:
    """How often a row of a chunk is read: `each` rows in a sub-chunk of 16, and `pair` in two of them."""
    subs = shape.C // 16
    return Fraction(each * subs + pair * (subs * (subs - 1) // 2), shape.C)


def gated_by_channel(shape: Shape) -> tuple[Cost, ...]:
    """The forward of linear attention with a gate per key channel, `dn_lib.kernels.gla`, for chunks that are all full.

    Squares of 16 x 16 on the diagonal of A are sums, which are not counted; the others are dots.

    >>> [cost.name for cost in gated_by_channel(Shape(B=1, L=64, H=1, d_k=64, d_v=64))]
    ['chunk_scores', 'chunk_states', 'chunk_output']
    """
    C, d_k, d_v, t = shape.C, shape.d_k, shape.d_v, shape.tokens
    nk, nv = shape.key_blocks, shape.value_blocks
    tensors, subs = shape.tensor_bytes, C // 16
    gates = {"k": _times(shape, 32, 16), "g_channels": _times(shape, 47, 31)}
    return (
        Cost(
            "chunk_scores", {n: tensors(n) for n in ("q", "k", "g_channels")},
            {n: tensors(n) for n in ("A_squares", "q_decayed", "k_decayed", "whole")}, t * 16 * (subs - 1) * d_k, gates,
        ),
        Cost(
            "chunk_states", {n: tensors(n) for n in ("k_decayed", "v", "whole")},
            {n: tensors(n) for n in ("states", "final")}, t * 2 * d_k * d_v, {"k_decayed": nv, "v": nk, "whole": nv},
            shape.chunks,
        ),
        _cost(shape, "chunk_output", "q_decayed A v states", "o", t * (2 * d_k * d_v + 2 * C * d_v), "q_decayed A"),
    )  # fmt: skip


def gated_by_channel_backward(shape: Shape) -> tuple[Cost, ...]:
    """The backward of `gated_by_channel`: the gradient of the state right to left, then all chunks at once.

    dg is written in two steps, in float32.

    >>> [cost.name for cost in gated_by_channel_backward(Shape(B=1, L=64, H=1, d_k=64, d_v=64))]
    ['chunk_states_bwd', 'chunk_bwd_dv', 'chunk_bwd_decayed', 'chunk_bwd_dqkg']
    """
    C, d_k, d_v, t = shape.C, shape.d_k, shape.d_v, shape.tokens
    nk, nv = shape.key_blocks, shape.value_blocks
    tensors, subs = shape.tensor_bytes, C // 16
    twice = _times(shape, 47, 16)  # q and k, once for dq and once for dk
    last = ("q", "k", "g_channels", "dA", "dq_decayed", "dk_decayed", "passing", "dg_in_parts")
    return (
        Cost(
            "chunk_states_bwd", {n: tensors(n) for n in ("q_decayed", "do", "whole")}, {"dstates": tensors("dstates")},
            t * 2 * d_k * d_v, {"q_decayed": nv, "do": nk, "whole": nv}, shape.chunks,
        ),
        _cost(
            shape, "chunk_bwd_dv", "k_decayed v A do dstates", "dv dA_whole", t * (4 * C * d_v + 2 * d_k * d_v),
            again="k_decayed",
        ),
        _cost(
            shape, "chunk_bwd_decayed", "q_decayed k_decayed v do states dstates whole",
            "dq_decayed dk_decayed passing", t * 4 * d_k * d_v, again="v do", blocks=nk,
        ),
        Cost(
            "chunk_bwd_dqkg",
            {n: tensors(n) for n in last},
            {n: tensors(n) for n in ("dq", "dk", "dg_channels32", "dg_in_parts")}, t * 32 * (subs - 1) * d_k,
            {"q": twice, "k": twice, "g_channels": _times(shape, 77, 63), "dA": 2 * nk},
        ),
    )  # fmt: skip


def decode(shape: Shape) -> tuple[Cost, ...]:
    """One token of every head (shape.L is 1): the state is read and written once, whatever came before.

    The FLOPs are sums, which the matrix units do not do.

    >>> one, = decode(Shape(B=1, L=1, H=1, d_k=128, d_v=128))
    >>> round(one.bytes / (2 * 4 * 128 * 128), 3)
    1.008
    """
    work = 6 * shape.heads * shape.d_k * shape.d_v
    return (_cost(shape, "token", "q k v beta final", "o final", work, again="q k beta"),)
