"""A finished or stopped run, read back from its folder."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dn_lib.data.tokens import ByteTokenizer, Tokenizer, load_tokenizer
from dn_lib.models import LanguageModel, ModelConfig, load_model, save_model
from dn_lib.training import checkpoint as checkpoints
from dn_lib.training.checkpoint import CheckpointError
from dn_lib.training.folder import run_facts


def export(folder: str | Path, tokenizer: Tokenizer, path: str | Path | None = None) -> Path:
    """Write `folder/model` (weights, configuration, tokenizer) from a checkpoint; returns that folder.

    path: the checkpoint, `History.checkpoint` after `train`; None for the newest in `folder`.
    Raises FileNotFoundError if there is none, CheckpointError if it cannot be used.
    """
    folder = Path(folder)
    path = path or checkpoints.latest(folder)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint")
    saved = checkpoints.read(path)
    save_model(folder / "model", _model_of(saved))
    tokenizer.save(folder / "model")
    about = {name: saved.about[name] for name in ("step", "corpus", "train", "notes")}
    content = (json.dumps(about, indent=1) + "\n").encode()
    checkpoints.write_file(folder / "model" / "run.json", content, secrets.token_hex(8))
    return folder / "model"


def load_run(folder: str | Path, device: str | torch.device | None = None) -> tuple[LanguageModel, Tokenizer, dict]:
    """(model, tokenizer, facts of the corpus) from a run folder, a model folder or a checkpoint's file.

    A run folder gives its newest state: the exported model, or a checkpoint of more steps. A run may be writing into
    the folder meanwhile.
    Raises FileNotFoundError if there is nothing to load, CheckpointError if a checkpoint is damaged, or if the
    tokenizer is not the one that the model was trained with.
    """
    folder = Path(folder)
    if folder.is_file():
        return _from_checkpoint(checkpoints.read(folder), folder.parent, device)
    model, newest = _model_folder(folder), checkpoints.latest(folder)
    if model is not None:
        about = _read_json(model / "run.json")
        if newest is None or checkpoints.step_of(newest) <= about.get("step", float("inf")):
            facts = about.get("corpus", {})
            return load_model(model, device), _tokenizer_of(model, facts), facts
    if newest is None:
        raise FileNotFoundError(f"folder must hold a model or a checkpoint, {folder} holds neither")
    return _from_checkpoint(_read_latest(folder), folder, device)


def notes(folder: str | Path) -> dict[str, Any]:
    """The `notes` that the run in `folder` was begun with; empty if there are none, or no run.

    From `run.json`, or from the newest checkpoint that can be read where that file is gone.
    """
    about = run_facts(folder)
    for path in reversed(checkpoints.numbered(folder)):
        if about:
            break
        try:
            about = checkpoints.read(path).about
        except CheckpointError:
            continue
    found = about.get("notes", {})
    return found if isinstance(found, dict) else {}


def origin(folder: str | Path) -> dict[str, Any]:
    """What is known of the run behind a run folder, a model folder or a checkpoint's file: `corpus`, as it was given to
    `train` on the command line, and `length`, the tokens in a sequence. Empty where nothing is known.
    """
    folder = Path(folder)
    if folder.is_file():
        about = checkpoints.read(folder).about
    else:
        model = _model_folder(folder)
        about = (_read_json(model / "run.json") if model else {}) | {"notes": notes(folder)}
    known = (about.get("train") or {}, about.get("notes") or {})
    found = {name: value for part in known for name, value in part.items() if name in ("corpus", "length")}
    return {name: value for name, value in found.items() if type(value) is (str if name == "corpus" else int)}


def _model_folder(folder: Path) -> Path | None:
    return next((place for place in (folder / "model", folder) if (place / "config.json").exists()), None)


def _read_json(path: Path) -> dict[str, Any]:
    """The dictionary in `path`, empty where there is no such file.  Raises CheckpointError if it is broken."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a dictionary, it holds {type(found).__name__}")
    return found


def _read_latest(folder: Path, latest: Callable[[Path], Path | None] = checkpoints.latest) -> checkpoints.Checkpoint:
    """The newest checkpoint; a run at work may delete the one that was the newest before it could be opened."""
    for _ in range(10):
        path = latest(folder)
        if path is None:
            break
        try:
            return checkpoints.read(path)
        except CheckpointError as error:
            if not path.exists():
                continue
            older = checkpoints.newest_whole(folder, below=checkpoints.step_of(path) or 0)
            remedy = f"the newest older one that is whole is {older}: give its path instead of the folder"
            raise CheckpointError(f"{error}; {remedy if older else 'no older one is whole'}") from None
    raise FileNotFoundError(f"{folder} holds no checkpoint any more")


def _from_checkpoint(saved: checkpoints.Checkpoint, folder: Path, device: str | torch.device | None):
    facts = saved.about["corpus"]
    return _model_of(saved).to(device or "cpu"), _tokenizer_of(folder, facts), facts


def _tokenizer_of(folder: Path, facts: dict[str, Any]) -> Tokenizer:
    """The tokenizer in `folder`, which has to be the one of `facts`: another would read and write other text."""
    wanted = facts.get("tokenizer")
    if wanted not in (None, ByteTokenizer.name) and not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"folder must hold the tokenizer.json of its run, {folder} does not")
    tokenizer = load_tokenizer(folder)
    if wanted not in (None, tokenizer.name):
        raise CheckpointError(
            f"{folder} must hold the tokenizer of its run, {wanted}, it holds {tokenizer.name}: its tokenizer.json is "
            "damaged, or another's"
        )
    return tokenizer


def _model_of(saved: checkpoints.Checkpoint) -> LanguageModel:
    """The model of a checkpoint, in the dtypes of its weights, on the CPU."""
    try:
        model = LanguageModel(ModelConfig.from_dict(saved.about["model"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint holds a model that cannot be built here: {error}") from None
    weights = saved.weights()
    for name, tensor in checkpoints.named_tensors(model).items():
        if name in weights:
            tensor.data = tensor.data.to(weights[name].dtype)
    checkpoints.load_weights(saved, model)
    return model
