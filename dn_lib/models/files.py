"""Models in folders: weights as safetensors, the configuration as JSON, with digests of both."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dn_lib.forms.common import describe, is_integer
from dn_lib.models.config import ModelConfig
from dn_lib.models.language_model import LanguageModel
from dn_lib.models.wrappers import WRAPPERS, name_without_wrappers
from dn_lib.stored import FLOATS, as_folder, digest, parse_json, read_tensors, read_text


def _write_atomically(path: Path, write) -> None:
    """`write(temporary path)`, then rename to `path`: a reader sees the old file or the new, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "nt":  # a folder cannot be opened there
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODEL_TYPE = "dn_lib"  # in a config.json that transformers wrote (`dn_lib.models.hf`)


def unwrapped(model: nn.Module) -> LanguageModel:
    """The `LanguageModel` inside any nesting of torch.compile, DDP and the like.

    >>> model = LanguageModel(ModelConfig(width=32, layers=1, heads=1))
    >>> unwrapped(nn.DataParallel(model)) is model
    True
    """
    inside: Any = model
    while not isinstance(inside, LanguageModel):
        # A wrapper of another package is followed too, if it calls what it wraps "module" as DDP does.
        children = inside.__dict__.get("_modules", {}) if isinstance(inside, nn.Module) else {}
        name = next((name for name in WRAPPERS if name in children), None)
        if name is None:
            raise TypeError(f"model must be a LanguageModel, compiled or wrapped or not, got {type(model).__name__}")
        inside = children[name]
    return inside


def save_model(folder: str | os.PathLike, model: nn.Module, state_dict: dict | None = None) -> None:
    """Write `model.safetensors` and `config.json` into `folder`, which is made if need be.

    A model that is compiled, or wrapped for several devices, or whose blocks are, is saved as the model inside.
    `state_dict` replaces the model's own (as when its parameters are spread over several devices). Each file is
    written under another name, flushed to disk and renamed. The weights carry the configuration too, and a digest of
    it and of themselves, so that `load_model` notices damage and a pair out of step.

    Weights that are not finite are written as they are. Raises TypeError for what is no `LanguageModel`, ValueError,
    before anything is written, for a `state_dict` that is not of this model.
    """
    from safetensors.torch import save_file

    model = unwrapped(model)
    if state_dict is not None and not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict of tensors or None, got {describe(state_dict)}")
    given = model.state_dict() if state_dict is None else state_dict
    weights = {name_without_wrappers(name): _to_store(name, t) for name, t in given.items()}
    missing, extra = _difference(_expected(model.config), weights)
    if missing or extra:
        raise ValueError(f"state_dict must be of this model: missing {missing}, not wanted {extra}")
    folder = as_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model.config.to_dict(), indent=2)
    metadata = {"config": config, "sha256": digest(weights, config), "format": "pt"}  # transformers asks for a format
    _write_atomically(folder / WEIGHTS, lambda p: save_file(weights, p, metadata=metadata))
    _write_atomically(folder / CONFIG, lambda p: Path(p).write_text(config + "\n", encoding="utf-8"))


def _to_store(name: str, tensor: Tensor) -> Tensor:
    """Whole, contiguous, on the CPU, in memory that it shares with no other (safetensors refuses that)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"state_dict must hold tensors, {name} is {describe(tensor)}")
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"state_dict must hold whole tensors (see DTensor.full_tensor), {name} is a shard")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"state_dict must hold tensors of {', '.join(map(str, FLOATS))}; {name} has {tensor.dtype}")
    whole = tensor.detach().cpu().contiguous()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def load_model(folder: str | os.PathLike, device: str | torch.device | None = None) -> LanguageModel:
    """The model that `save_model` wrote, in the dtype of its weights, on `device` (the CPU if None).

    Raises FileNotFoundError if a file is missing; ValueError, naming the file, if it cannot be read, if its content
    is not what was written, or if the two files do not belong together. Files without a digest, as earlier versions
    wrote them and other programs may (`save_pretrained` of `dn_lib.models.hf` does), are loaded if names and shapes
    fit: what was changed in their numbers goes unnoticed. Weights that are not finite are loaded as they are.

        >>> import tempfile
        >>> model = LanguageModel(ModelConfig(width=32, layers=1, heads=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(folder, model)
        ...     again = load_model(folder)
        >>> torch.equal(again.head.weight, model.head.weight)
        True
    """
    folder, device = as_folder(folder), _device(device)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder must hold {CONFIG} and {WEIGHTS}: no {name} in {folder}")
    text = read_text(folder / CONFIG)
    values = parse_json(text, str(folder / CONFIG))
    weights, metadata = read_tensors(folder / WEIGHTS)
    _check_metadata(folder, metadata, weights, text, values)
    if values.get("model_type") == MODEL_TYPE:
        values, weights = _from_transformers(values, weights)
    config = _config_that_fits(folder, values, weights)
    with torch.device("meta"):
        model = LanguageModel(config)
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cpu")
    if not isinstance(device, (str, torch.device)) and not is_integer(device):
        raise TypeError(f"device must be a torch.device, its name or None, got {describe(device)}")
    try:
        return torch.device(device)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"device must be one of PyTorch's, got {describe(device)}") from error


def _from_transformers(values: dict, weights: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Our fields and weights in what `save_pretrained` of `dn_lib.models.hf` wrote, weights without their prefix."""
    ours = {field.name for field in dataclasses.fields(ModelConfig)}
    values = {name: value for name, value in values.items() if name in ours}
    return values, {name.removeprefix("model."): weight for name, weight in weights.items()}


def _check_metadata(folder: Path, metadata: dict[str, str], weights: dict[str, Tensor], text: str, values) -> None:
    """Raise ValueError unless the weights are those that were written, with this configuration."""
    unknown = sorted(set(metadata) - {"config", "sha256", "format"})
    if unknown:
        raise ValueError(f"{folder / WEIGHTS} is damaged, or not of `save_model`: unknown metadata {unknown[0]!r}")
    config, stored = metadata.get("config"), metadata.get("sha256")
    if stored is not None and (config is None or stored != digest(weights, config)):
        raise ValueError(f"{folder / WEIGHTS} is damaged: its content does not have the digest written with it")
    if config is None:
        return
    # With a digest the two texts are compared to the letter, so that nothing in config.json can change unnoticed.
    same = text == config + "\n" if stored is not None else parse_json(config, str(folder / WEIGHTS)) == values
    if not same:
        raise ValueError(
            f"{CONFIG} and {WEIGHTS} in {folder} come from two different models: one of them was changed, or saving "
            "the second was interrupted"
        )


def _config_that_fits(folder: Path, values: dict, weights: dict[str, Tensor]) -> ModelConfig:
    """The configuration, if the weights are of such a model; raises ValueError if not."""
    misfit = f"{WEIGHTS} in {folder} does not fit {CONFIG}"
    layers, found = values.get("layers", ModelConfig.layers), {n.split(".")[1] for n in weights if n[:7] == "blocks."}
    if isinstance(layers, int) and layers != len(found):  # first, since it says how much is built below
        raise ValueError(f"{misfit}: {len(found)} layers, not {layers}")
    try:
        config = ModelConfig.from_dict(values)
        missing, extra = _difference(_expected(config), weights)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG} holds no usable configuration: {error}") from None
    if missing or extra:
        raise ValueError(f"{misfit}: missing {missing}, not wanted {extra}")
    return config


def _expected(config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of the right names and shapes, without numbers. Raises ValueError for sizes that no tensor has."""
    try:
        with torch.device("meta"):
            return LanguageModel(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"config asks for tensors that cannot be made: {' '.join(str(error).split())}") from None


def _difference(wanted: dict, given: dict) -> tuple[list[str], list[str]]:
    """Names (with shapes) that only one of two state dicts has; at most three of each."""
    a, b = ({f"{name} {list(t.shape)}" for name, t in d.items()} for d in (wanted, given))
    return sorted(a - b)[:3], sorted(b - a)[:3]
