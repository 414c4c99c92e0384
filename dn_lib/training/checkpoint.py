"""Checkpoints: one safetensors file for each, which is there whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from dn_lib.training.distributed import Processes, assign, full_tensor

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message is one line."""


@dataclass
class Checkpoint:
    """What a file holds: `tensors` by name and `about`, a dictionary that JSON can hold.

    Names are `model.NAME`, `optimiser.exp_avg.NAME` and so on, `random.batches`, `random.cpu`, `random.cuda`.
    """

    tensors: dict[str, torch.Tensor]
    about: dict[str, Any]


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name; a tensor that two modules share is listed once."""
    kept = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def capture(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches_state: torch.Tensor,
    about: dict[str, Any],
) -> Checkpoint:
    """All that the next step depends on, as whole tensors on the CPU.  Every process has to call it."""
    tensors = {}
    for name, tensor in named_tensors(model).items():
        tensors[f"model.{name}"] = full_tensor(tensor).cpu().contiguous()
        for moment in MOMENTS:
            value = optimiser.state.get(tensor, {}).get(moment)
            if value is not None:
                tensors[f"optimiser.{moment}.{name}"] = full_tensor(value).cpu().contiguous()
    tensors["random.batches"] = batches_state
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return Checkpoint(tensors, about)


def restore(checkpoint: Checkpoint, model: nn.Module, optimiser: torch.optim.Optimizer) -> torch.Tensor:
    """Put `checkpoint` into model, optimiser and random generators; returns the batches' state."""
    tensors = checkpoint.tensors
    load_weights(checkpoint, model)
    for name, parameter in model.named_parameters():
        if f"optimiser.step.{name}" not in tensors:
            continue
        state = {}
        for moment in MOMENTS:
            value = tensors[f"optimiser.{moment}.{name}"]
            if moment == "step":
                fused = any(group.get("fused") for group in optimiser.param_groups)
                state[moment] = value.to(parameter.device) if fused else value.clone()
            else:
                state[moment] = torch.zeros_like(parameter, requires_grad=False)
                assign(state[moment], value)
        optimiser.state[parameter] = state
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return tensors["random.batches"]


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy the checkpoint's weights into `model`.  Raises CheckpointError if names or shapes differ."""
    wanted = named_tensors(model)
    found = {name[6:]: value for name, value in checkpoint.tensors.items() if name.startswith("model.")}
    if set(wanted) != set(found):
        name = sorted(set(wanted) ^ set(found))[0]
        raise CheckpointError(f"the checkpoint holds another model: {name} is in one of them only")
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"the checkpoint holds another model: {name} is {list(found[name].shape)} there, "
                f"{list(tensor.shape)} here"
            )
        assign(tensor, found[name])


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """The file of the checkpoint after `step` steps."""
    return Path(folder) / f"checkpoint_{step:07d}.safetensors"


def write(checkpoint: Checkpoint, folder: str | Path, *, keep: int = 2) -> Path:
    """Write atomically, then delete all but the newest `keep` checkpoints of `folder`.

    The file gets its name only when all of it is on the disk, so that whatever happens while it is written
    (a killed process, a full disk, a power cut), the previous checkpoint is still there and whole.
    Raises CheckpointError if the disk refuses.
    """
    folder = Path(folder)
    path = checkpoint_path(folder, checkpoint.about["step"])
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = to_bytes(checkpoint.tensors, metadata={"about": json.dumps(checkpoint.about)})
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        last = latest(folder)
        kept = f"the last good one is {last}" if last else "there is none before it"
        raise CheckpointError(
            f"could not write checkpoint {path}: {error.strerror or error}; {kept}; "
            "free some space and run again with --resume"
        ) from None
    for old in sorted(folder.glob("checkpoint_*.safetensors"))[:-keep]:
        old.unlink()
    return path


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint in `folder`, or None."""
    return max(Path(folder).glob("checkpoint_*.safetensors"), default=None)


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint.  Raises CheckpointError if the file is no checkpoint."""
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, about)  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable checkpoint: {error}") from None


def check_same_run(about: dict[str, Any], model_config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise CheckpointError unless a run with this model and corpus can go on from the checkpoint."""
    saved = about["model"]
    for name in sorted(set(saved) | set(model_config), key=lambda name: (name != "vocab_size", name)):
        if saved.get(name) != model_config.get(name):
            raise CheckpointError(
                f"cannot resume: {name} is {saved.get(name)!r} in the checkpoint, {model_config.get(name)!r} here"
            )
    for name in ("tokenizer", "file_list_sha256"):
        if about["corpus"].get(name) != facts.get(name):
            raise CheckpointError(
                f"cannot resume: the corpus differs ({name} is {about['corpus'].get(name)!r} in the "
                f"checkpoint, {facts.get(name)!r} here)"
            )


def only_first_writes(checkpoint: Checkpoint, folder: str | Path, place: Processes, keep: int) -> None:
    """`write` in the first process; an error there is raised in all of them."""
    problem: list[str | None] = [None]
    if place.first:
        try:
            write(checkpoint, folder, keep=keep)
        except CheckpointError as error:
            problem = [str(error)]
    if place.world > 1:
        torch.distributed.broadcast_object_list(problem, src=0, device=place.device)
    if problem[0]:
        raise CheckpointError(problem[0])
