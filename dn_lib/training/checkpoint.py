"""Checkpoints: one safetensors file for each, which is there whole or not at all, and says if it was damaged."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from dn_lib.models.wrappers import plain_name
from dn_lib.stored import digest
from dn_lib.training.distributed import assign, full_tensor

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
FILE_NAME = re.compile(r"checkpoint_([0-9]+)\.safetensors")
ABOUT = {"step": int, "seconds": float, "run": str, "model": dict, "train": dict, "corpus": dict}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message is one line."""


@dataclass
class Checkpoint:
    """What a file holds: `tensors` by name and `about`, a dictionary that JSON can hold.

    Names are `model.NAME`, `optimiser.exp_avg.NAME` and so on, `random.batches`, `random.cpu`, `random.cuda`.
    """

    tensors: dict[str, torch.Tensor]
    about: dict[str, Any]

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors by the model's own names."""
        return {name[6:]: value for name, value in self.tensors.items() if name.startswith("model.")}


# ------------------------------------------------------------------------------- from and into a model


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name; a tensor that two modules share is listed once.

    Names are those of the bare model, whatever `torch.compile` and DDP wrap around it or its parts.
    """
    kept = {plain_name(model, name) for name in model.state_dict()}
    parameters = {plain_name(model, name): parameter for name, parameter in model.named_parameters()}
    buffers = {plain_name(model, name): buffer for name, buffer in model.named_buffers()}
    return parameters | {name: buffer for name, buffer in buffers.items() if name in kept}


def capture(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches_state: torch.Tensor,
    about: dict[str, Any],
) -> Checkpoint:
    """All that the next step depends on, as whole tensors on the CPU.  Every process has to call it."""
    tensors, without_moments = {}, []
    optimised = _optimised(optimiser)
    for name, tensor in named_tensors(model).items():
        tensors[f"model.{name}"] = _on_cpu(tensor)
        state = optimiser.state.get(tensor, {})
        if tensor in optimised and not state:  # it never had a gradient
            without_moments.append(name)
        for moment in MOMENTS:
            if moment in state:
                tensors[f"optimiser.{moment}.{name}"] = _on_cpu(state[moment])
    tensors["random.batches"] = batches_state
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return Checkpoint(tensors, {**about, "without_moments": without_moments})


def _optimised(optimiser: torch.optim.Optimizer) -> set[torch.Tensor]:
    return {parameter for group in optimiser.param_groups for parameter in group["params"]}


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, contiguous, in memory that it shares with no other one (safetensors refuses that)."""
    whole = full_tensor(tensor).cpu().contiguous()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def restore(checkpoint: Checkpoint, model: nn.Module, optimiser: torch.optim.Optimizer) -> torch.Tensor:
    """Put `checkpoint` into model, optimiser and random generators; returns the batches' state.

    Raises CheckpointError, before anything is changed, if it is of another model or lacks what AdamW had kept.
    """
    tensors = checkpoint.tensors
    optimised = _optimised(optimiser)
    for name, parameter in named_tensors(model).items():
        kept = f"optimiser.step.{name}" in tensors
        expected = parameter in optimised and name not in checkpoint.about.get("without_moments", [])
        if expected and not kept and checkpoint.about["step"] > 0:
            raise CheckpointError(f"the checkpoint lacks the optimiser's moments of {name}")
    load_weights(checkpoint, model)
    fused = any(group.get("fused") for group in optimiser.param_groups)
    for name, parameter in named_tensors(model).items():
        if f"optimiser.step.{name}" not in tensors:
            continue
        state = {}
        for moment in MOMENTS:
            value = tensors[f"optimiser.{moment}.{name}"]
            if moment == "step":
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
    """Copy the checkpoint's weights into `model`.

    Raises CheckpointError, before anything is changed, if names, shapes or dtypes differ.
    """
    wanted, found = named_tensors(model), checkpoint.weights()
    if set(wanted) != set(found):
        name = sorted(set(wanted) ^ set(found))[0]
        raise CheckpointError(f"the checkpoint holds another model: {name} is in one of them only")
    for name, tensor in wanted.items():
        there, here = _layout(found[name]), _layout(tensor)
        if there != here:
            raise CheckpointError(f"the checkpoint holds another model: {name} is {there} there, {here} here")
    for name, tensor in wanted.items():
        assign(tensor, found[name])


def _layout(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# --------------------------------------------------------------------------------------------- files


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """The file of the checkpoint after `step` steps."""
    return Path(folder) / f"checkpoint_{step:07d}.safetensors"


def step_of(path: str | Path) -> int | None:
    """The number of steps that a checkpoint's name tells; None if it is not named as a run names its checkpoints.

    >>> step_of("run/checkpoint_0000120.safetensors"), step_of("run/checkpoint_best.safetensors")
    (120, None)
    """
    match = FILE_NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def _steps(path: Path) -> int:
    """`step_of` a path out of `numbered`."""
    step = step_of(path)
    assert step is not None
    return step


def numbered(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder`, the oldest first, by number: not by name, which fails at ten million steps.

    Raises CheckpointError if the folder cannot be listed.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            return []
        found = [(step_of(path), path) for path in folder.iterdir() if step_of(path) is not None and path.is_file()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror or error}") from None
    return [path for _, path in sorted(found)]


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint in `folder`, or None.  Files of any other name (`checkpoint_best`) are no candidates."""
    return max(numbered(folder), key=_steps, default=None)


def newest_whole(folder: str | Path, below: int) -> Path | None:
    """The newest checkpoint of fewer than `below` steps that can be read without an error, or None."""
    for path in reversed(numbered(folder)):
        if _steps(path) < below:
            with contextlib.suppress(CheckpointError):
                read(path)
                return path
    return None


def write(checkpoint: Checkpoint, folder: str | Path, *, keep: int = 2) -> Path:
    """Write atomically, then delete all but the newest `keep` checkpoints that this run wrote into `folder`.

    The file gets its name only when all of it is on the disk, so that whatever happens while it is written
    (a killed process, a full disk, a power cut), the previous checkpoint is still there and whole.
    A file of that name that another run wrote is set aside, see `set_aside`.
    Raises CheckpointError if the disk refuses, or if a value is no number.
    """
    folder = Path(folder)
    path = checkpoint_path(folder, checkpoint.about["step"])
    _check(checkpoint, f"{path} was not written: it")
    about = json.dumps(checkpoint.about)
    metadata = {"about": about, "sha256": digest(checkpoint.tensors, about)}
    try:
        if path.exists() and run_of(path) != checkpoint.about["run"]:
            set_aside(path)
        write_file(path, to_bytes(checkpoint.tensors, metadata=metadata), checkpoint.about["run"])
    except OSError as error:
        raise CheckpointError(
            f"could not write checkpoint {path}: {error.strerror or error}; {_last_good(folder)}; "
            "free some space and run again with --resume"
        ) from None
    with contextlib.suppress(CheckpointError, OSError):  # one checkpoint too many is no reason to end a run
        _prune(folder, checkpoint.about["run"], checkpoint.about["step"], keep)
    return path


def _last_good(folder: Path) -> str:
    try:
        last = latest(folder)
    except CheckpointError as error:
        return str(error)
    return f"the last good one is {last}" if last else "there is none before it"


def _prune(folder: Path, run: str, step: int, keep: int) -> None:
    """Delete the run's own checkpoints but the newest `keep`: what it did not write, it does not delete."""
    named = [path for path in numbered(folder) if path == checkpoint_path(folder, _steps(path))]  # no user's copy
    own = [path for path in named if _steps(path) <= step and run_of(path) == run]
    for old in own[:-keep]:
        old.unlink()


def run_of(path: str | Path) -> str | None:
    """Which run wrote the checkpoint, by its header alone; None if that cannot be read."""
    try:
        return json.loads(_metadata(path)["about"])["run"]
    except Exception:
        return None


def _metadata(path: str | Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def set_aside(path: Path) -> Path:
    """Give a file a name that no run takes for its own; nothing is deleted.  Returns the new path."""
    target = name_aside(path)
    path.rename(target)
    return target


def name_aside(path: Path) -> Path:
    """A free name beside `path` that no run takes for its own."""
    target, number = path.with_name(f"set_aside_{path.name}"), 2
    while os.path.lexists(target):
        target, number = path.with_name(f"set_aside_{number}_{path.name}"), number + 1
    return target


def write_file(path: Path, content: bytes, run: str) -> None:
    """Write `content` under a name of its own, force it to the disk, rename it to `path`.  Raises OSError.

    The passing name holds `run`, so that a later process of the same run can tell what a killed one left.
    """
    part = path.with_name(f"{path.name}.{run}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path, run: str) -> None:
    """Delete the unfinished files that killed processes of `run` left; the caller holds the folder's lock."""
    for part in folder.glob(f"*.{run}.*.part"):
        with contextlib.suppress(OSError):
            part.unlink()


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


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint and verify it.

    Raises CheckpointError if the file is no checkpoint, if its content is not what was written (a digest of all
    names, shapes, dtypes, bytes and of `about` is in the file), or if its parts contradict each other or its name.
    """
    path = Path(path)
    try:
        metadata = _metadata(path)
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        text, stored = metadata["about"], metadata.get("sha256")
        about = json.loads(text)
    except Exception as error:  # a damaged file makes the parsers raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is no readable checkpoint: {reason}") from None
    if stored is None:
        raise CheckpointError(f"{path} holds no digest: it is damaged, or an earlier version of dn_lib wrote it")
    if stored != digest(tensors, text):
        raise CheckpointError(f"{path} is damaged: its content does not have the digest that was written with it")
    checkpoint = Checkpoint(tensors, about)
    _check(checkpoint, f"{path}")
    if step_of(path) not in (None, about["step"]):
        raise CheckpointError(
            f"{path} is named for step {step_of(path)} and holds step {about['step']}: it was renamed or copied; "
            f"its own name is {checkpoint_path('', about['step'])}"
        )
    return checkpoint


# --------------------------------------------------------------------------------------------- schema


def _check(checkpoint: Checkpoint, subject: str) -> None:
    """Raise CheckpointError, its message begun with `subject`, unless the parts fit together."""
    for problem in itertools.chain(_problems_of_about(checkpoint.about), _problems_of_tensors(checkpoint)):
        raise CheckpointError(f"{subject} is no usable checkpoint: {problem}")


def _problems_of_about(about: Any):
    if not isinstance(about, dict):
        yield f"its description must be a dictionary, it is {type(about).__name__}"
        return
    for name, kind in ABOUT.items():
        if type(about.get(name)) is not kind:
            yield f"its {name} must be of type {kind.__name__}, it is {about.get(name)!r}"
    if isinstance(about.get("step"), int) and about["step"] < 0:
        yield f"its step must not be negative, it is {about['step']}"


def _problems_of_tensors(checkpoint: Checkpoint):
    tensors, weights, step = checkpoint.tensors, checkpoint.weights(), checkpoint.about["step"]
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        moment, _, owner = rest.partition(".")
        if part == "optimiser" and moment in MOMENTS and owner in weights:
            yield from _problems_of_moment(tensors, moment, owner, step)
        elif part not in ("model", "random"):
            yield f"it holds {name}, which belongs to nothing"
        if part != "random" and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            yield f"{name} holds values that are no numbers"
    wanted = _layout(torch.get_rng_state())
    for name in ("random.batches", "random.cpu"):
        if name not in tensors:
            yield f"it lacks {name}"
        elif _layout(tensors[name]) != wanted:
            yield f"{name} must be {wanted}, it is {_layout(tensors[name])}"
    cuda = tensors.get("random.cuda")
    if cuda is not None and (cuda.dtype, cuda.ndim) != (torch.uint8, 1):
        yield f"random.cuda must be uint8 and one-dimensional, it is {_layout(cuda)}"


def _problems_of_moment(tensors: dict[str, torch.Tensor], moment: str, owner: str, step: int):
    value = tensors[f"optimiser.{moment}.{owner}"]
    for other in MOMENTS:
        if f"optimiser.{other}.{owner}" not in tensors:
            yield f"it lacks optimiser.{other}.{owner}"
    if moment != "step" and _layout(value) != _layout(tensors[f"model.{owner}"]):
        wanted = _layout(tensors[f"model.{owner}"])
        yield f"optimiser.{moment}.{owner} must be {wanted} as the weight is, it is {_layout(value)}"
    if moment == "step" and (value.numel() != 1 or not 0 <= value.item() <= step):
        found = f"{_layout(value)} {value.flatten()[:1].tolist()}"
        yield f"optimiser.step.{owner} must be one number from 0 to {step}, it is {found}"
