"""Several processes: DDP or FSDP2, started by torchrun, with NCCL on GPUs and gloo on CPUs."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from dn_lib.models.wrappers import PARALLEL, inner

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process's place: `rank` of `world`, and the device it works on."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def resolve_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes a GPU if there is one.

    Raises ValueError if a GPU is asked for that is not there.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    number = int(str(name).partition(":")[2] or 0)  # torch keeps eight bits of it: cuda:256 would be cuda:0
    if device.type == "cuda" and number >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"device {name} was asked for, but torch finds {found} GPUs: use --device cpu")
    return device


def join_processes(device: str = "auto") -> Processes:
    """Join the other processes if torchrun started this one; a single process otherwise.

    The group stays until the process ends: a second run in it must not meet what is left of the first.
    """
    chosen = resolve_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Processes(0, 1, chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(_leave_processes)
    return Processes(dist.get_rank(), dist.get_world_size(), chosen)


def _leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def in_first(place: Processes, action: Callable[[], Result]) -> Result:
    """`action()` in the first process; what it returns, or raises, in all of them."""
    if place.world == 1:
        return action()
    outcome: list[Any] = [None, None]
    if place.first:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=place.device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def in_all(place: Processes, action: Callable[[], Result]) -> Result:
    """`action()` in every process.  If it fails in one, all raise, so that none waits for one that is gone."""
    if place.world == 1:
        return action()
    result: Any = None
    problem = None
    try:
        result = action()
    except Exception as error:
        problem = error
    problems: list[Any] = [None] * place.world
    dist.all_gather_object(problems, problem)
    for error in (problem, *problems):
        if error is not None:
            raise error
    return result


def distribute(model: nn.Module, place: Processes, parallel: str) -> nn.Module:
    """The module to call in the loop.  `model` keeps the parameters (as shards with "fsdp").

    "ddp": every process has all parameters, gradients are averaged.  "fsdp": each process has a part of
    every parameter and gathers a block's when the block runs.  A model that is in DDP already stays as it is.
    """
    if place.world == 1 or any(isinstance(module, PARALLEL) for module in model.modules()):
        return model
    if parallel == "ddp":
        ids = [place.device.index] if place.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(place.device.type, (place.world,))
    for child in inner(model).children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                fully_shard(inner(block), mesh=mesh)
    fully_shard(inner(model), mesh=mesh)
    return model


def gradient_sync(module: nn.Module, wanted: bool):
    """A context for one forward and backward pass; gradients are exchanged in it only if `wanted`."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not wanted:
        return module.no_sync()
    if sync := getattr(module, "set_requires_gradient_sync", None):  # FSDP's
        sync(wanted)
    return nullcontext()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter, gathered if it is sharded.  Every process has to call it."""
    tensor = tensor.detach()
    gather = getattr(tensor, "full_tensor", None)  # a DTensor's
    return tensor if gather is None else gather()


def assign(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor into `target`, or this process's part of it if `target` is sharded."""
    with torch.no_grad():
        if hasattr(target, "full_tensor"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            sharded = cast(DTensor, target)
            value = value.to(target.device, target.dtype)
            value = distribute_tensor(value, sharded.device_mesh, sharded.placements)
        target.copy_(value)


def sum_over_processes(tensor: torch.Tensor, place: Processes) -> torch.Tensor:
    """The sum over all processes (a new tensor); the tensor itself if there is one process."""
    if place.world == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total
