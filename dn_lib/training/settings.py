"""The settings of a run as a user gives them: on the command line, in a file, or as the run was begun.

A setting is known by one name: a field of `ModelConfig` or of `TrainConfig`, `corpus` or `vocab`. No two of them share
a name, so that all of them fit into one flat dictionary, which is also what a run's `notes` hold.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dn_lib.models import ModelConfig
from dn_lib.training.config import TrainConfig

TEXT = ("corpus", "vocab")
MODEL = tuple(field.name for field in fields(ModelConfig) if field.name != "vocab_size")  # the corpus decides that
TRAIN = tuple(field.name for field in fields(TrainConfig))
TABLES = {"model": MODEL, "train": TRAIN}
MACHINE = ("device", "compile", "parallel")
"""Settings of a call, which a run that goes on elsewhere does not keep."""


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, flat: `corpus` and `vocab` at its top, the rest in [model] and [train].

    Raises ValueError, naming the file, for what is no TOML or no setting, and OSError if it cannot be read.
    """
    try:
        found = tomllib.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:  # of TOML or of UTF-8
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    settings: dict[str, Any] = {}
    for name, value in found.items():
        if name in TEXT:
            settings[name] = _of_text(name, value, path)
        elif name not in TABLES:
            known = ", ".join((*TEXT, *(f"[{table}]" for table in TABLES)))
            raise ValueError(f"--config {path} must hold {known} at its top, got {name!r}{_home_of(name)}")
        elif not isinstance(value, dict):
            raise ValueError(f"--config {path}: {name} must be a table, [{name}], got {value!r}")
        else:
            if unknown := sorted(set(value) - set(TABLES[name])):
                raise ValueError(
                    f"--config {path}: [{name}] has no setting {unknown[0]!r}{_home_of(unknown[0])}; "
                    f"it has {', '.join(TABLES[name])}"
                )
            settings |= value
    return settings


def _home_of(name: str) -> str:
    """Where a misplaced setting belongs, as part of a message."""
    if name in TEXT:
        return ", which belongs at the top"
    return "".join(f", which belongs into [{table}]" for table, names in TABLES.items() if name in names)


def _of_text(name: str, value: Any, path: Path) -> Any:
    if name == "corpus":
        if not isinstance(value, str):
            raise ValueError(f"--config {path}: corpus must be a text, got {value!r}")
        return value
    if type(value) is not int or (value != 0 and not 257 <= value <= 65536):
        raise ValueError(f"--config {path}: vocab must be 0 (plain bytes) or from 257 to 65536, got {value!r}")
    return value


def merged(
    options: Mapping[str, Any], given: Collection[str], from_file: Mapping[str, Any], begun: Mapping[str, Any]
) -> dict[str, Any]:
    """What holds of each setting: what was `given` on the command line, else what is in the file, else what the run was
    `begun` with, else the default in `options`. The number of layers follows a `pattern` where nothing else says it.

    >>> merged({"width": 64, "layers": 4}, ["width"], {"width": 32}, {"layers": 2, "heads": 1})
    {'width': 64, 'layers': 2, 'heads': 1}
    """
    begun = {name: value for name, value in begun.items() if name not in MACHINE}
    said = begun | dict(from_file) | {name: options[name] for name in given}
    settings = dict(options) | said
    if settings.get("pattern") is not None and "layers" not in said:
        settings["layers"] = len(settings["pattern"])
    return settings


def model_config(settings: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    """The model of flat `settings`; what they do not name has its default."""
    return ModelConfig(vocab_size=vocab_size, **{name: settings[name] for name in MODEL if name in settings})


def train_config(settings: Mapping[str, Any]) -> TrainConfig:
    """The training of flat `settings`; the floor of the learning rate is a tenth of its peak where they name none.

    >>> train_config({"learning_rate": 1e-2}).min_learning_rate
    0.001
    """
    values = {name: settings[name] for name in TRAIN if name in settings}
    peak = values.get("learning_rate")
    if values.get("min_learning_rate") is None and isinstance(peak, int | float):
        values["min_learning_rate"] = peak / 10
    return TrainConfig(**values)
