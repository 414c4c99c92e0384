"""AdamW with two parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from dn_lib.training.config import TrainConfig


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then half a cosine down to the floor.

    Implements eq-learning-rate, with t = step + 1; the last step has the floor.

    >>> config = TrainConfig(steps=11, warmup=1, learning_rate=1.0, min_learning_rate=0.2)
    >>> [round(learning_rate_at(step, config), 2) for step in (0, 5, 10)]
    [1.0, 0.6, 0.2]
    """
    t = step + 1
    if t <= config.warmup:
        return config.learning_rate * t / config.warmup
    progress = (t - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def make_optimiser(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW: weight decay on matrices, none on gains, biases and convolution taps.  Fused on a GPU."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim != 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    on_gpu = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True if on_gpu else None,
    )
