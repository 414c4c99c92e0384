"""Files that may be damaged: tensors and configurations are read whole and right, or refused in one line.

Whatever a parser raises over such a file arrives as one ValueError that names the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST_JSON = 64 * 2**20  # bytes; the index of a model with 100,000 tensors has some ten million


def as_folder(folder: Any) -> Path:
    """`folder` as a Path. Raises TypeError, naming the argument, for what is no path.

    >>> as_folder(5)
    Traceback (most recent call last):
    TypeError: folder must be a path, got int
    """
    try:
        return Path(folder)
    except TypeError:
        raise TypeError(f"folder must be a path, got {type(folder).__name__}") from None


def digest(tensors: dict[str, Tensor], about: str) -> str:
    """SHA-256, in hexadecimal, of `about` and of every tensor's name, dtype, shape and bytes. Tensors on the CPU.

    >>> digest({"a": torch.zeros(2)}, "") == digest({"a": torch.zeros(2, 1)}, "")
    False
    """
    total = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def parse_json(text: str, source: str) -> dict[str, Any]:
    """The object in `text`. Raises ValueError, naming `source`, for a name given twice, NaN, or what is no object.

    >>> parse_json('{"a": 1, "a": 2}', "config.json")
    Traceback (most recent call last):
    ValueError: config.json cannot be read: 'a' is given twice
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in items:
            if name in values:
                raise ValueError(f"{name!r} is given twice")
            values[name] = value
        return values

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def read_text(path: Path) -> str:
    """The text of a small file in UTF-8. Raises ValueError, naming the file, if it is none."""
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"{path} must have at most {MOST_JSON} bytes, it has {path.stat().st_size}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, as `parse_json`."""
    return parse_json(read_text(path), str(path))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, in memory of their own on the CPU, and its metadata.

    Raises ValueError, naming the file, if it is damaged or no such file, or holds what is no floating-point tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            allowed = ", ".join(str(dtype) for dtype in FLOATS)
            raise ValueError(f"{path} must hold tensors of {allowed}; {name} has {tensor.dtype}")
    return tensors, metadata
