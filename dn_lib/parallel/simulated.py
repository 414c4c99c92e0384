"""A group of processes of which only this one is there: what it would receive is counted, nothing is moved.

Code that runs on 64 processes asks each of them for the same things as code on two.  To count bytes there is no need to
start the other 63: PyTorch's backend "fake" answers every collective call at once, with whatever stands in memory.
Numbers that come out are therefore meaningless; shapes, and so `Stretches.received`, are right.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dn_lib.forms.common import check_integer
from dn_lib.parallel.rules import stretched_rule
from dn_lib.parallel.stretches import Stretches, earlier
from dn_lib.parallel.traffic import check_rule


@contextlib.contextmanager
def as_one_of(ranks: int, rank: int) -> Iterator[None]:
    """Within the block, this process is number `rank` of `ranks`; the others are not there, and nothing is moved.

    Raises ValueError, naming the argument, unless 0 <= rank < ranks, and RuntimeError inside another group.

    >>> with as_one_of(64, 63):
    ...     dist.get_rank(), dist.get_world_size()
    (63, 64)
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # here: only what counts needs it

    check_integer("ranks", ranks)
    check_integer("rank", rank, least=0)
    if rank >= ranks:
        raise ValueError(f"rank must be below ranks = {ranks}, got {rank}")
    if dist.is_initialized():
        raise RuntimeError("as_one_of sets up a process group of its own, and there is one already")
    hook = sys.excepthook  # PyTorch puts one of its own around it, which names the rank, and leaves it there
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def counted_state_bytes(rule: str, ranks: int, heads: int, d_k: int, d_v: int, *, length: int = 1) -> tuple[int, int]:
    """Bytes that one of `ranks` processes receives for a layer, forward and back, as the exchange's own code counts.

    rule: one of `dn_lib.parallel.traffic.RULES`; B = 1, float32; `length` tokens on each process.
    Raises ValueError naming the argument.

    >>> counted_state_bytes("linear", 4, 2, 64, 64), counted_state_bytes("linear", 4, 2, 64, 64, length=100)
    ((98304, 98304), (98304, 98304))
    """
    check_rule(rule)
    gates = {"decay": (1, length, heads), "channels": (1, length, heads, d_k)}.get(rule)
    g = None if gates is None else torch.zeros(gates)
    beta = torch.ones(1, length, heads) if rule == "delta" else None
    with as_one_of(ranks, ranks - 1), torch.enable_grad():
        stretches = Stretches([length] * ranks)
        q, v = (torch.zeros(1, length, heads, d, dtype=torch.float32, requires_grad=True) for d in (d_k, d_v))
        stretched_rule(q, q, v, beta, g, stretches=stretches)[0].sum().backward()
    return stretches.received["states"], stretches.received["states, backward"]


def counted_row_bytes(
    length: int, ranks: int, rows: int, width: int, *, dtype: torch.dtype = torch.bfloat16
) -> tuple[int, int]:
    """The same for the `rows` rows of `width` numbers before a stretch; forward on the last process, back on the first.

    These two receive most.  length: of the whole sequence, a multiple of ranks.  Raises ValueError naming the argument.

    >>> counted_row_bytes(1024, 4, 3, 64)
    (384, 384)
    """
    check_integer("length", length)
    check_integer("ranks", ranks)
    if length % ranks:
        raise ValueError(f"length must be a multiple of ranks = {ranks}, got {length}")
    counted = []
    for rank, name in ((ranks - 1, "rows"), (0, "rows, backward")):
        with as_one_of(ranks, rank), torch.enable_grad():
            stretches = Stretches([length // ranks] * ranks)
            x = torch.zeros(1, length // ranks, width, dtype=dtype, requires_grad=True)
            earlier(x, rows, stretches).sum().backward()
        counted.append(stretches.received[name])
    return counted[0], counted[1]
