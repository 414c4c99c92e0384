"""A finished or stopped run, read back from its folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dn_lib.data.tokens import ByteTokenizer, Tokenizer, load_tokenizer
from dn_lib.models import LanguageModel, ModelConfig, load_model, save_model
from dn_lib.training import checkpoint as checkpoints


def export(folder: str | Path, tokenizer: Tokenizer) -> Path:
    """Write `folder/model` (weights, configuration, tokenizer) from the newest checkpoint in `folder`."""
    folder = Path(folder)
    path = checkpoints.latest(folder)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint")
    saved = checkpoints.read(path)
    model = LanguageModel(ModelConfig.from_dict(saved.about["model"]))
    checkpoints.load_weights(saved, model)
    save_model(folder / "model", model)
    tokenizer.save(folder / "model")
    about = {"step": saved.about["step"], "corpus": saved.about["corpus"], "train": saved.about["train"]}
    (folder / "model" / "run.json").write_text(json.dumps(about, indent=1) + "\n")
    return folder / "model"


def load_run(folder: str | Path, device: str | torch.device | None = None) -> tuple[LanguageModel, Tokenizer, dict]:
    """(model, tokenizer, facts of the corpus) from a run folder or a model folder.

    A run that was stopped is read from its newest checkpoint.
    Raises FileNotFoundError if there is nothing to load.
    """
    folder = Path(folder)
    if (folder / "model" / "config.json").exists():
        folder = folder / "model"
    if (folder / "config.json").exists():
        about = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}
        return load_model(folder, device), load_tokenizer(folder), about.get("corpus", {})
    path = checkpoints.latest(folder) if folder.is_dir() else None
    if path is None:
        raise FileNotFoundError(f"folder must hold a model or a checkpoint, {folder} holds neither")
    saved = checkpoints.read(path)
    facts = saved.about["corpus"]
    if facts.get("tokenizer", "bytes") != ByteTokenizer.name and not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"folder must hold the tokenizer.json of its run, {folder} does not")
    model = LanguageModel(ModelConfig.from_dict(saved.about["model"]))
    checkpoints.load_weights(saved, model)
    return model.to(device or "cpu"), load_tokenizer(folder), facts
