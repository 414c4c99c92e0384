"""Bytes that one process receives for one layer and one pass, as formulas; `Stretches.received` counts them.

All functions take the number of processes p, batch B, heads H and the sizes of a head, and `size`, the bytes of a
number (4 for states, which are float32; 2 for keys in bfloat16).  The passes forward and back are counted apart.
"""

from __future__ import annotations

from dn_lib.forms.common import check_integer

RULES = ("linear", "decay", "channels", "delta")


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        check_integer(name, value)


def check_rule(rule: str) -> None:
    """Raise ValueError unless `rule` is one of `RULES`."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")


def state_bytes(
    rule: str, ranks: int, batch: int, heads: int, d_k: int, d_v: int, *, backward: bool = False, size: int = 4
) -> int:
    """Of the exchange of states, whatever the length of the sequence: an all-gather of p maps, its own excepted.

    rule: "linear" sends X; "decay" a number beside it, "channels" one for each key channel; "delta" (gated or not) the
    pair (M, X).  Back, every rule sends the gradient of a state.  Raises ValueError naming the argument.

    >>> state_bytes("linear", 4, 1, 2, 64, 64), state_bytes("delta", 4, 1, 2, 64, 64)
    (98304, 196608)
    """
    check_rule(rule)
    _check(ranks=ranks, batch=batch, heads=heads, d_k=d_k, d_v=d_v, size=size)
    beside = {"linear": 0, "decay": 1, "channels": d_k, "delta": d_k * d_k}[rule]
    return (ranks - 1) * batch * heads * (d_k * d_v + (0 if backward else beside)) * size


def rows_bytes(
    length: int,
    ranks: int,
    rank: int,
    rows: int,
    width: int,
    *,
    batch: int = 1,
    backward: bool = False,
    size: int = 2,
) -> int:
    """Of the `rows` rows of `width` numbers that stand before the stretch of `rank`, in p stretches of one length.

    A convolution of n taps over c channels: n - 1 rows of c.  Attention in a window w: w - 1 rows of 2 H d.  Full
    attention: all rows (`rows=length`).  Back, `rank` gets the gradients of those of its own rows that others have
    borrowed, once from each of them.  Raises ValueError unless the stretches are of one length.

    >>> rows_bytes(1024, 4, 2, 3, 64), rows_bytes(1024, 4, 3, 3, 64, backward=True)  # a halo; the last lends none
    (384, 0)
    >>> rows_bytes(1024, 4, 2, 1024, 64) == 2 * 256 * 64 * 2  # all keys of two stretches
    True
    """
    _check(length=length, ranks=ranks, width=width, batch=batch, size=size)
    check_integer("rank", rank, least=0)
    check_integer("rows", rows, least=0)
    if length % ranks or rank >= ranks:
        raise ValueError(f"length must be a multiple of ranks = {ranks} and rank below it, got {length} and {rank}")
    n = length // ranks
    moved = min(rows, rank * n)
    if backward:
        moved = sum(max(0, (rank + 1) * n - max(rank * n, reader * n - rows)) for reader in range(rank + 1, ranks))
    return moved * batch * width * size


def ring_attention_bytes(
    length: int, ranks: int, heads: int, d: int, *, batch: int = 1, backward: bool = False, size: int = 2
) -> int:
    """Of ring attention (Liu et al. 2023): keys and values of every other stretch pass through each process.

    Forward (p - 1) (L/p) 2 H d numbers.  Back, keys and values go round again, and their gradients with them, one step
    further to come home: (2 (p - 1) + 1) times, which is what a plain ring does.  Whether a stretch is behind the
    causal mask plays no part: it is passed on.  Raises ValueError unless p divides L.

    >>> ring_attention_bytes(1024, 4, 2, 64) == 3 * 256 * 2 * 2 * 64 * 2
    True
    """
    _check(length=length, ranks=ranks, heads=heads, d=d, batch=batch, size=size)
    if length % ranks:
        raise ValueError(f"length must be a multiple of ranks = {ranks}, got {length}")
    stretch = batch * (length // ranks) * 2 * heads * d * size
    if ranks == 1:
        return 0
    return stretch * (2 * (ranks - 1) + 1 if backward else ranks - 1)
