"""One sequence cut into stretches, one for each process, and what the processes say to each other about it.

Process r holds tokens `start` to `start + lengths[r]` of every sequence of the batch.  All that a causal layer needs
from the others is one of two things:

- the rows just before the stretch (`earlier`): taps - 1 of them for a short convolution, window - 1 keys and values
  for attention in a window, all of them for full attention;
- a summary of everything before, as large for a long stretch as for a short one (`gathered`): the affine map of a
  recurrence, see `dn_lib.parallel.rules`.

Both are differentiable, and each process counts the bytes that it receives, by name, in `Stretches.received`.  Every
process must call the same functions in the same order, forward and backward.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dn_lib.forms.common import check_integer, check_tensors, describe
from dn_lib.forms.derivatives import refuse_transforms


class Stretches:
    """How a sequence lies on the processes of a group: `lengths[r]` of its tokens on process r, in order of rank.

    lengths: at least one token each, the same list on every process; `Stretches.of` gathers it.
    group: a ProcessGroup, the default one if None.
    `received` counts the bytes that this process got from others, by the name of what they were for.
    Raises RuntimeError without a process group, and ValueError, naming `lengths`, for what does not fit it.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> stretches = Stretches.of(5)
    >>> stretches.rank, stretches.start, stretches.length, stretches.total
    (0, 0, 5, 5)
    >>> dist.destroy_process_group()
    """

    def __init__(self, lengths: list[int] | tuple[int, ...], group: dist.ProcessGroup | None = None):
        self.group = checked_group(group)
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if not isinstance(lengths, (list, tuple)) or len(lengths) != self.ranks:
            got = f"{len(lengths)} of them" if isinstance(lengths, (list, tuple)) else describe(lengths)
            raise ValueError(f"lengths must be a list of {self.ranks} numbers, one for each process, got {got}")
        for r, length in enumerate(lengths):
            check_integer(f"lengths[{r}]", length)
        self.lengths = [int(length) for length in lengths]
        self.start, self.total = sum(self.lengths[: self.rank]), sum(self.lengths)
        self.received: Counter[str] = Counter()

    @classmethod
    def of(cls, length: int, group: dist.ProcessGroup | None = None, device: Any = "cpu") -> Stretches:
        """From this process's own number of tokens; the others' are gathered, by tensors on `device`."""
        check_integer("length", length)
        group = checked_group(group)
        own = torch.tensor([length], device=device)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, own, group=group)
        return cls([int(x) for x in everyone], group)

    @property
    def length(self) -> int:
        """The tokens of this process."""
        return self.lengths[self.rank]

    def mine(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's stretch of x, which has the whole sequence along `dim`.

        Raises ValueError unless that dimension has `total` rows.
        """
        if not isinstance(x, Tensor) or not -x.ndim <= dim < x.ndim or x.shape[dim] != self.total:
            raise ValueError(f"x must be a tensor with {self.total} tokens along dimension {dim}, got {describe(x)}")
        return x.narrow(dim, self.start, self.length)

    def check_rows(self, name: str, x: Tensor) -> None:
        """Raise ValueError unless x is `[B, L_r, ...]` with this process's L_r tokens."""
        if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != self.length:
            raise ValueError(
                f"{name} must be [B, L_r, ...] with this process's {self.length} tokens, got {describe(x)}"
            )

    # What moves ---------------------------------------------------------------------------------------------
    def gather(self, x: Tensor, name: str) -> list[Tensor]:
        """x of every process, in order of rank; all have one shape.  Not differentiable."""
        x = x.contiguous()
        everyone = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(everyone, x, group=self.group)
        self.received[name] += (self.ranks - 1) * x.numel() * x.element_size()
        return everyone

    def total_of(self, x: Tensor, name: str) -> Tensor:
        """The sum of x over all processes.  Not differentiable.

        Counted as what a ring receives, 2 (p - 1) / p of the tensor, rounded up.
        """
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        size = x.numel() * x.element_size()
        self.received[name] += -(-2 * (self.ranks - 1) * size // self.ranks)
        return x

    def swap(self, sent: dict[int, Tensor], wanted: dict[int, Tensor], name: str) -> None:
        """Send each tensor of `sent` to its rank, and fill each of `wanted` from its rank, all at once."""
        peer = {r: dist.get_global_rank(self.group, r) for r in (*sent, *wanted)}
        calls = [dist.P2POp(dist.irecv, x, peer[r], self.group) for r, x in wanted.items()]
        calls += [dist.P2POp(dist.isend, x.contiguous(), peer[r], self.group) for r, x in sent.items()]
        for work in dist.batch_isend_irecv(calls) if calls else ():
            work.wait()
        self.received[name] += sum(x.numel() * x.element_size() for x in wanted.values())

    def reach(self, reader: int, rows: int) -> dict[int, tuple[int, int]]:
        """Which rows process `reader` needs to have the `rows` before its own: {rank: (begin, end) in its stretch}.

        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> stretches = Stretches([9])
        >>> stretches.ranks, stretches.lengths = 3, [4, 2, 3]  # as if there were three
        >>> stretches.reach(2, 3)
        {0: (3, 4), 1: (0, 2)}
        >>> dist.destroy_process_group()
        """
        needed, at = {}, sum(self.lengths[:reader])
        oldest = max(0, at - rows)
        for rank in reversed(range(reader)):
            at -= self.lengths[rank]
            if at + self.lengths[rank] <= oldest:
                break
            needed[rank] = (max(oldest - at, 0), self.lengths[rank])
        return dict(sorted(needed.items()))


def checked_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """`group`, or the default one; raises TypeError or RuntimeError where there is none.

    >>> checked_group("gloo")
    Traceback (most recent call last):
    TypeError: group must be a ProcessGroup or None, got 'gloo'
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or None, got {describe(group)}")
    if not dist.is_initialized():
        raise RuntimeError("a sequence on several processes needs torch.distributed.init_process_group first")
    return cast(dist.ProcessGroup, dist.group.WORLD if group is None else group)


class _Earlier(torch.autograd.Function):
    """The rows before the stretch; backward, each process returns the gradients of the rows that it borrowed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, stretches: Stretches, name: str) -> Tensor:
        ctx.shape, ctx.rows, ctx.stretches, ctx.name = x.shape, rows, stretches, name
        own, borrowed, lent = stretches.rank, stretches.reach(stretches.rank, rows), {}
        for reader in range(own + 1, stretches.ranks):
            part = stretches.reach(reader, rows).get(own)
            if part is None:
                break
            lent[reader] = x[:, part[0] : part[1]]
        wanted = {r: x.new_empty(x.shape[0], b - a, *x.shape[2:]) for r, (a, b) in borrowed.items()}
        stretches.swap(lent, wanted, name)
        return torch.cat([x[:, :0], *wanted.values()], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), stretches, rows = grads, ctx.stretches, ctx.rows
        refuse_transforms("earlier", "differentiate once, by backward()", grad)
        own, borrowed = stretches.rank, stretches.reach(stretches.rank, rows)
        pieces = grad.split([b - a for a, b in borrowed.values()], dim=1) if borrowed else ()
        parts = {}
        for reader in range(own + 1, stretches.ranks):
            part = stretches.reach(reader, rows).get(own)
            if part is None:
                break
            parts[reader] = part
        size = ctx.shape
        wanted = {r: grad.new_empty(size[0], b - a, *size[2:]) for r, (a, b) in parts.items()}
        stretches.swap(dict(zip(borrowed, pieces, strict=True)), wanted, f"{ctx.name}, backward")
        dx = grad.new_zeros(size)
        for reader, (a, b) in parts.items():
            dx[:, a:b] += wanted[reader]
        return dx, None, None, None


def earlier(x: Tensor, rows: int, stretches: Stretches, name: str = "rows") -> Tensor:
    """The `rows` tokens before this stretch, or as many as there are: `[B, L_r, ...]` -> `[B, n, ...]`.

    They may lie on more than one process, where stretches are shorter than `rows`.  Differentiable once, for every
    process together; first derivatives go back to the processes that own the rows.
    name: under which `stretches.received` counts the bytes.
    Raises ValueError or TypeError, naming the argument.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> earlier(torch.ones(1, 4, 2), 3, Stretches([4])).shape  # nothing is before the first
    torch.Size([1, 0, 2])
    >>> dist.destroy_process_group()
    """
    check_stretches(stretches)
    check_tensors(x=x)
    stretches.check_rows("x", x)
    check_integer("rows", rows, least=0)
    refuse_transforms("earlier", "gather the sequence on one process", x)
    return cast(Tensor, _Earlier.apply(x, rows, stretches, name))


def next_token(tokens: Tensor, stretches: Stretches, missing: int = -100) -> Tensor:
    """The token after each: `[B, L_r]` integers -> the same, over the borders of stretches.

    After the last token of the sequence there is none: `missing`, which `cross_entropy` passes over.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> next_token(torch.tensor([[3, 1, 4]]), Stretches([3]))
    tensor([[   1,    4, -100]])
    >>> dist.destroy_process_group()
    """
    check_stretches(stretches)
    stretches.check_rows("tokens", tokens)
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens must be whole numbers [B, L_r], got {tokens.dtype} {list(tokens.shape)}")
    follows = torch.full_like(tokens[:, :1], missing)
    sent = {stretches.rank - 1: tokens[:, :1]} if stretches.rank else {}
    wanted = {stretches.rank + 1: follows} if stretches.rank + 1 < stretches.ranks else {}
    stretches.swap(sent, wanted, "labels")
    return torch.cat([tokens[:, 1:], follows], dim=1)


def check_stretches(stretches: Any) -> None:
    """Raise TypeError unless `stretches` is a `Stretches`.

    >>> check_stretches([3, 4])
    Traceback (most recent call last):
    TypeError: stretches must be a Stretches, got list
    """
    if not isinstance(stretches, Stretches):
        raise TypeError(f"stretches must be a Stretches, got {describe(stretches)}")
