"""A small corpus and a run on it, that several test modules share."""

from __future__ import annotations

import time

import torch

from dn_lib.data import Corpus, split_text
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.training import TrainConfig

TEXT = "".join(f"name_{i % 37} = value({i % 11})\n" for i in range(2000)).encode()


TINY = dict(width=16, layers=2, heads=2, hybrid="window", window=8)


CONFIG = TrainConfig(
    steps=12, batch=4, length=24, warmup=2, evaluate_every=6, evaluation_tokens=240, log_every=4, device="cpu"
)


def corpus() -> Corpus:
    return split_text(TEXT, name="text")


def model(seed: int = 0, **changes) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(**{**TINY, **changes}))


def losses(history) -> list[float]:
    return [record["loss"] for record in history.steps]


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


def last_logged(folder) -> int:
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [int(line.split('"step": ')[1].split(",")[0]) for line in lines if line.startswith('{"step": ')]
    return max(steps, default=0)
