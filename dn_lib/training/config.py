"""The settings of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


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

    Raises ValueError naming the setting that cannot be.

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
        for name in ("steps", "batch", "length", "accumulate", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "clip", "weight_decay", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be between 0 and learning_rate={self.learning_rate}, "
                f"got {self.min_learning_rate}"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be auto, float32 or bfloat16, got {self.precision!r}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be ddp or fsdp, got {self.parallel!r}")

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
        return cls(**{**values, "betas": tuple(values.get("betas", (0.9, 0.95)))})
