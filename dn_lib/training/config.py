"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

AT_LEAST_ONE = ("steps", "batch", "length", "accumulate", "keep", "log_every")
AT_LEAST_ZERO = ("warmup", "evaluate_every", "evaluation_tokens", "checkpoint_every")
LARGEST = 2**63 - 1  # that a tensor's sizes and indices can be
FLOATS = ("learning_rate", "min_learning_rate", "weight_decay", "clip")


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run, beside the model and the corpus.

    steps: optimiser steps.  batch: sequences in a step, over all processes.  length: tokens in a sequence.
    learning_rate, min_learning_rate, warmup: peak, floor and number of warm-up steps, see `learning_rate_at`.
    weight_decay: on matrices only.  betas: of AdamW.  clip: largest gradient norm, 0 for none.
    accumulate: gradient accumulation, parts that a step's batch is cut into.
    evaluate_every, evaluation_tokens: how often, and on how much of the validation part; 0 for never.
    checkpoint_every, keep: how often a checkpoint is written, and how many are kept.
    log_every: steps between two looks at the losses, each of which waits for the device.
    precision: "bfloat16" (autocast), "float32", or "auto": bfloat16 on a GPU.
    device: "auto", "cpu", "cuda", "cuda:1".  compile: `torch.compile` the model.
    parallel: "ddp" or "fsdp" when several processes run.  seed: of the batches.

    Raises ValueError naming the setting that cannot be: of another type, not finite, out of its range.

    >>> TrainConfig(steps=100, warmup=10).tokens_per_step
    4096
    """

    steps: int = 200
    batch: int = 16
    length: int = 256
    learning_rate: float = 3e-3
    min_learning_rate: float = 3e-4
    warmup: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    evaluate_every: int = 50
    evaluation_tokens: int = 32768
    checkpoint_every: int = 0
    keep: int = 2
    log_every: int = 10
    precision: str = "auto"
    device: str = "auto"
    compile: bool = False
    parallel: str = "ddp"
    seed: int = 0

    def __post_init__(self):
        for name in AT_LEAST_ONE:
            self._set(name, _integer(name, getattr(self, name), 1, LARGEST))
        for name in AT_LEAST_ZERO:
            self._set(name, _integer(name, getattr(self, name), 0, LARGEST))
        self._set("seed", _integer("seed", self.seed, -(2**63), 2**64 - 1))
        for name in FLOATS:
            self._set(name, _finite(name, getattr(self, name)))
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be between 0 and learning_rate={self.learning_rate}, "
                f"got {self.min_learning_rate}"
            )
        self._set("betas", _betas(self.betas))
        if not isinstance(self.compile, bool):
            raise ValueError(f"compile must be True or False, got {self.compile!r}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be auto, float32 or bfloat16, got {self.precision!r}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be ddp or fsdp, got {self.parallel!r}")
        self._set("device", str(self.device))

    def _set(self, name: str, value: Any) -> None:
        """Keep `value` as a plain Python number, so that a checkpoint can hold it as JSON."""
        object.__setattr__(self, name, value)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"unknown training settings: {', '.join(sorted(unknown))}")
        return cls(**values)


def _integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and int(value) > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return int(value)


def _finite(name: str, value: Any) -> float:
    """`value` as a float that is finite and not negative; NaN fails every comparison, so it is refused by name."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return float(value)


def _betas(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    first, second = (_finite("betas", beta) for beta in betas)
    if max(first, second) >= 1:
        raise ValueError(f"betas must be below 1, got {betas!r}")
    return first, second
