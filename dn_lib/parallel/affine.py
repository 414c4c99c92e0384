"""Chapter 4: one long sequence on several processes, with one exchange in each direction.

Process r of p holds the r-th stretch of the sequence.  To the rest of the world its tokens are one affine
map of the state, S -> M_r S + X_r (`segment_affine`).  Every process gets all p pairs in one all-gather, puts
those before it together, and knows the state that enters its own stretch.  Going back, gradients of states
travel the other way through the transposed maps: one more all-gather.

What is sent does not grow with the length of the sequence: d_k (d_k + d_v) numbers per head and process
forward, d_k d_v back.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from dn_lib.forms.affine import check_affine, segment_affine, segment_state_gradient
from dn_lib.forms.chunkwise_backward import chunkwise_delta_rule_backward, chunkwise_forward_with_errors
from dn_lib.forms.common import (
    check_chunk_size,
    check_function,
    check_integer,
    check_sequence,
    describe,
    scale_or_default,
    working_dtype,
)
from dn_lib.forms.derivatives import differentiable_once, refuse_transforms


def _check_pieces(pieces: list[tuple[Tensor, Tensor]], rank: int, beyond: int) -> None:
    """Raise unless `pieces` are affine maps (None where one plays no part) and `rank` is one of them, or `beyond`."""
    if not isinstance(pieces, (list, tuple)) or not pieces:
        raise TypeError(f"pieces must be a list of pairs (M, X), one for each stretch, got {describe(pieces)}")
    for i, piece in enumerate(pieces):
        if isinstance(piece, (tuple, list)) and len(piece) == 2 and piece[0] is None:
            continue
        check_affine(f"pieces[{i}]", piece)
    check_integer("rank", rank, least=0)
    most = len(pieces) - 1 + beyond
    if rank > most:
        raise ValueError(f"rank must be at most {most} with {len(pieces)} pieces, got {rank}")


# The arithmetic, without any process -------------------------------------------------------------------
def entering_state(pieces: list[tuple[Tensor, Tensor]], rank: int) -> Tensor:
    """The state that enters stretch `rank`, from the pairs (M, X) of all stretches; the first begins at zero.

    A rank one past the last gives the state that leaves them all.
    S_0 = 0, S_{r+1} = M_r S_r + X_r.  Implements eq-entering-state.

    >>> one = torch.ones(1, 1)
    >>> entering_state([(one, 2 * one), (3 * one, one), (one, one)], 2).item()
    7.0
    """
    _check_pieces(pieces, rank, beyond=1)
    state = torch.zeros_like(pieces[0][1])
    for M, X in pieces[:rank]:
        state = M @ state + X
    return state


def leaving_gradient(pieces: list[tuple[Tensor, Tensor]], rank: int) -> Tensor:
    """The gradient that the later stretches send into the state that leaves stretch `rank`, from all (M, Y).

    g_{p-1} = 0, g_{r-1} = M_r^T g_r + Y_r: Y_r is the gradient of the state entering stretch r that its own
    outputs give.  Implements eq-leaving-gradient.

    >>> one = torch.ones(1, 1)
    >>> leaving_gradient([(one, one), (3 * one, one), (one, 2 * one)], 0).item()
    7.0
    """
    _check_pieces(pieces, rank, beyond=0)
    gradient = torch.zeros_like(pieces[0][1])
    for M, Y in reversed(pieces[rank + 1 :]):
        gradient = M.mT @ gradient + Y
    return gradient


# The exchange ------------------------------------------------------------------------------------------
def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    x = x.contiguous()
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, x, group=group)
    return everyone


class SequenceParallelDeltaRule(torch.autograd.Function):
    """The delta rule over the processes of `group`; see `sequence_parallel_delta_rule`."""

    @staticmethod
    def forward(ctx, q, k, v, beta, initial_state, scale, chunk_size, group):
        rank, d_k = dist.get_rank(group), k.shape[-1]
        dtype = working_dtype(q, k, v, beta)  # not the state's, which other processes may not have: all must agree
        qs, ks, vs, bs = (x.to(dtype) for x in (q, k, v, beta))
        # The state before the whole sequence is the first stretch's business alone.
        start = initial_state.to(dtype) if rank == 0 and initial_state is not None else None
        M, X = segment_affine(ks, vs, bs, initial_state=start, chunk_size=chunk_size)
        pieces = [(both[..., :d_k], both[..., d_k:]) for both in _all_gather(torch.cat([M, X], dim=-1), group)]
        state = entering_state(pieces, rank) if start is None else start
        o, errors, final_state = chunkwise_forward_with_errors(qs * scale, ks, vs, bs, state, chunk_size=chunk_size)
        later = [M.clone() for M, _ in pieces[rank + 1 :]]  # a copy, so as not to keep X alive
        ctx.save_for_backward(q, k, beta, errors, final_state, *later)
        ctx.options, ctx.group = {"scale": scale, "chunk_size": chunk_size}, group
        ctx.dtypes = [x if x is None else x.dtype for x in (q, k, v, beta, initial_state)]
        return o.to(v.dtype), final_state

    @staticmethod
    def backward(ctx, do, dstate):
        refuse_transforms("sequence_parallel_delta_rule", "differentiate once, by backward()", do, dstate)
        q, k, beta, errors, final_state, *later = ctx.saved_tensors
        with torch.no_grad():
            grads = SequenceParallelDeltaRule._gradients(ctx, q, k, beta, errors, final_state, later, do, dstate)
        message = (
            "sequence_parallel_delta_rule can be differentiated once, not twice: gather the sequence on one process "
            "and use chunkwise_delta_rule"
        )
        return *differentiable_once(message, grads, (q, k, beta, do, dstate)), None, None, None

    @staticmethod
    def _gradients(ctx: Any, q, k, beta, errors, final_state, later, do, dstate):
        rank, dtype, options = dist.get_rank(ctx.group), errors.dtype, ctx.options
        q, k, beta, do = (x.to(dtype) for x in (q, k, beta, do))
        chunk_size = options["chunk_size"]
        Y = segment_state_gradient(options["scale"] * q, k, beta, do, dstate, chunk_size=chunk_size)
        all_Y = _all_gather(Y, ctx.group)
        unused = [None] * (rank + 1)  # maps of this stretch and of those before it play no part
        pieces: list[Any] = list(zip([*unused, *later], all_Y, strict=True))
        dstate = dstate + leaving_gradient(pieces, rank)
        *grads, dstart = chunkwise_delta_rule_backward(q, k, beta, errors, final_state, do, dstate, **options)
        grads.append(dstart if rank == 0 else torch.zeros_like(dstart))
        return [None if t is None else g.to(t) for g, t in zip(grads, ctx.dtypes, strict=True)]


def sequence_parallel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule on a sequence whose stretches lie, in order of rank, on the processes of `group`.

    q, k, v, beta: this process's stretch, `[..., L_r, d]`; lengths may differ, all other sizes must not.
    initial_state: the state before the whole sequence; only the first process reads it, in the dtype of the
    computation (float64 if q, k, v or beta is, else float32); its gradient is zero on the others.
    Returns this stretch's outputs and the state that leaves it: on the last process, the final state of the
    sequence.  Differentiable once: every process must then call backward.
    Raises errors as `chunkwise_delta_rule` does, and RuntimeError if no process group was set up.
    Implements eq-entering-state and eq-leaving-gradient.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> x = torch.eye(3)
    >>> sequence_parallel_delta_rule(x, x, x, torch.ones(3))[1].diagonal().tolist()
    [1.0, 1.0, 1.0]
    >>> dist.destroy_process_group()
    """
    check_sequence(q, k, v, initial_state, beta=beta)
    check_chunk_size(chunk_size)
    scale = scale_or_default(scale, q)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or None, got {describe(group)}")
    remedy = "gather the sequence on one process and use chunkwise_delta_rule"
    refuse_transforms("sequence_parallel_delta_rule", remedy, q, k, v, beta, initial_state)
    if not dist.is_initialized():
        raise RuntimeError("sequence_parallel_delta_rule needs torch.distributed.init_process_group first")
    return SequenceParallelDeltaRule.apply(
        q,
        k,
        v,
        beta,
        initial_state,
        scale,
        chunk_size,
        dist.group.WORLD if group is None else group,
    )


# Several processes on this computer --------------------------------------------------------------------
def split_and_run(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What each process does in the chapter: take its stretch, run forward and backward, return the results.

    inputs: the whole q, k, v, beta, initial_state, do and dstate (the gradients of outputs and final state),
    `lengths` of the stretches, and chunk_size.  Returns this stretch's o and state, and the gradients.
    """
    rank, last, lengths = dist.get_rank(), dist.get_world_size() - 1, inputs["lengths"]
    q, k, v, do = (inputs[name].split(lengths, dim=-2)[rank] for name in ("q", "k", "v", "do"))
    beta = inputs["beta"].split(lengths, dim=-1)[rank]
    leaves = [x.clone().requires_grad_() for x in (q, k, v, beta, inputs["initial_state"])]
    o, state = sequence_parallel_delta_rule(*leaves[:4], initial_state=leaves[4], chunk_size=inputs["chunk_size"])
    dstate = inputs["dstate"] if rank == last else torch.zeros_like(state)
    grads = torch.autograd.grad((o, state), leaves, (do, dstate))
    names = ("dq", "dk", "dv", "dbeta", "dinitial_state")
    return {"o": o.detach(), "state": state.detach(), **dict(zip(names, grads, strict=True))}


def _loopback() -> str | None:
    """The name of the interface that leads only to this computer ("lo" on Linux, "lo0" on macOS)."""
    if not hasattr(socket, "if_nameindex"):
        return None
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


def _worker(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple) -> None:
    loopback = _loopback()
    if loopback is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback
    torch.set_num_threads(1)
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        torch.save(fn(*args), Path(folder) / f"result-{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_on_processes(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(*args)` in `world_size` new processes of this computer, joined by gloo; return the results.

    fn: a function that can be imported (a new process cannot see one defined in a notebook cell or in a
    script's main part); it finds `torch.distributed` set up, and returns tensors, or dicts of them.
    The processes talk through the loopback interface only, and meet by a file in a temporary folder.
    Raises ValueError if world_size < 1, and torch's ProcessRaisedException if fn fails.

    >>> run_on_processes(torch.ones, 2, 3)  # doctest: +SKIP
    [tensor([1., 1., 1.]), tensor([1., 1., 1.])]
    """
    check_function("fn", fn)
    check_integer("world_size", world_size)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, args=(world_size, folder, fn, args), nprocs=world_size)
        return [torch.load(Path(folder) / f"result-{rank}.pt") for rank in range(world_size)]
