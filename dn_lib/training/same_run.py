"""Whether a run that goes on is the run that was stopped: every setting that decides its numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import numpy as np

from dn_lib.training.checkpoint import CheckpointError
from dn_lib.training.config import TrainConfig

FREE = {  # what may differ without a word: how often one looks, and on which machine
    "device", "compile", "parallel", "log_every", "evaluate_every", "evaluation_tokens", "checkpoint_every", "keep",
}  # fmt: skip
FREE_OF_MODEL = {"backend"}
CORPUS_FACTS = ("tokenizer", "file_list_sha256")
BLOCK, BLOCKS = 2**20, 1024


def tokens_digest(tokens: np.ndarray) -> str:
    """SHA-256 of an array's dtype, length and content; of arrays above one GiB, 1024 MiB spread evenly over it.

    >>> tokens_digest(np.arange(5, dtype=np.uint8)) == tokens_digest(np.arange(5, dtype=np.uint16))
    False
    """
    total = hashlib.sha256(f"{tokens.dtype.str} {len(tokens)}".encode())
    size = BLOCK // tokens.dtype.itemsize
    starts = range(0, len(tokens), size)
    if len(starts) > BLOCKS:
        starts = np.linspace(0, len(tokens) - size, BLOCKS).astype(np.int64).tolist()
    for start in starts:
        total.update(np.ascontiguousarray(tokens[start : start + size]).data)
    return total.hexdigest()


def check_changes(allow_changes: Collection[str], model: dict[str, Any]) -> None:
    """Raise ValueError unless every name in `allow_changes` is a setting that a run may change."""
    known = {field.name for field in fields(TrainConfig)} | set(model) | {"corpus"}
    if isinstance(allow_changes, str):
        raise ValueError(f"allow_changes must be a collection of names, got the string {allow_changes!r}")
    for name in allow_changes:
        if name not in known:
            raise ValueError(f"allow_changes must hold settings of the run, got {name!r}: one of {sorted(known)}")


def check_same_run(saved: dict[str, Any], here: dict[str, Any], allow_changes: Collection[str] = ()) -> None:
    """Raise CheckpointError unless a run described by `here` can go on from a checkpoint described by `saved`.

    Both hold `model`, `train`, `corpus` (facts), `tokens` (digests) and `precision` (the one in use). The error names
    the first setting that differs, and both values.
    """
    for name, there, now in _differences(saved, here):
        if name in allow_changes:
            continue
        if name == "corpus":
            raise CheckpointError(
                f"cannot resume: the corpus differs ({there} in the checkpoint, {now} here); "
                "--change corpus (allow_changes=['corpus']) goes on with the new one"
            )
        remedy = ""
        if name in here["train"]:
            remedy = f"; --change {name} (allow_changes=[{name!r}]) goes on with the new value"
        raise CheckpointError(f"cannot resume: {name} is {there!r} in the checkpoint, {now!r} here{remedy}")


def _differences(saved: dict[str, Any], here: dict[str, Any]):
    """(name, value in the checkpoint, value here) of all that differs; the size of the vocabulary comes first."""
    there, now = saved["model"], here["model"]
    for name in sorted((set(there) | set(now)) - FREE_OF_MODEL, key=lambda name: (name != "vocab_size", name)):
        if there.get(name) != now.get(name):
            yield name, there.get(name), now.get(name)
    for name in CORPUS_FACTS:
        a, b = saved["corpus"].get(name), here["corpus"].get(name)
        if a != b:
            yield "corpus", f"{name} {a!r}", f"{name} {b!r}"
    for part, digest in here["tokens"].items():
        if saved.get("tokens", {}).get(part) != digest:
            yield "corpus", f"{part} tokens {saved.get('tokens', {}).get(part)}", f"{part} tokens {digest}"
    there, now = _numbers(saved), _numbers(here)
    for name in now:
        if there.get(name) != now[name]:
            yield name, there.get(name), now[name]


def _numbers(about: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the numbers, `precision` as it is used: "auto" may mean another one here."""
    settings = {name: value for name, value in about["train"].items() if name not in FREE}
    return settings | {"precision": about.get("precision", settings.get("precision"))}
