"""The training loop."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dn_lib.data import Batches, Corpus
from dn_lib.training import checkpoint as checkpoints
from dn_lib.training.config import TrainConfig
from dn_lib.training.distributed import (
    Processes,
    distribute,
    gradient_sync,
    join_processes,
    resolve_device,
    sum_over_processes,
)
from dn_lib.training.evaluate import autocast, bits_per_byte, token_losses, windows
from dn_lib.training.optimiser import learning_rate_at, make_optimiser

PEAK_FLOPS = {  # dense bfloat16, from the makers' data sheets
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "T4": 65e12,
}


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""


@dataclass
class History:
    """What a run leaves behind.

    steps: a record for every step: step (steps done), loss, learning_rate, gradient_norm, seconds.
    evaluations: a record for every evaluation: step, loss, bits_per_byte, seconds.
    tokens_per_second: over the whole run, evaluations and checkpoints left out.
    stopped: the signal that ended the run early, or None.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    tokens_per_second: float = 0.0
    stopped: int | None = None


def train(
    model: nn.Module,
    corpus: Corpus,
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    report: Callable[[dict[str, float]], None] | None = None,
) -> History:
    """Train `model`, a `LanguageModel`, in place.

    folder: where `log.jsonl` and the checkpoints go; None for neither.
    resume: go on from the newest checkpoint in `folder`, if there is one.
    progress: show a tqdm bar.  report: called with every evaluation.

    With checkpoints, SIGINT and SIGTERM end the run after the current step, with a checkpoint written.
    Under torchrun each process calls this with the same arguments; `model` must be built from the same seed.
    Raises DataError (context longer than the data), CheckpointError (a checkpoint of another model; a
    full disk), TrainingError (the loss is no number).
    """
    place = join_processes(config.device)
    with _signals(folder is not None) as caught:
        return _Run(model, corpus, config, place, folder, caught).go(resume, progress, report)


class _Run:
    """The parts of one run, and the loop over its steps."""

    def __init__(self, model, corpus, config: TrainConfig, place: Processes, folder, caught: list[int]):
        self.model = model.to(place.device)
        self.corpus, self.config, self.place, self.caught = corpus, config, place, caught
        self.folder = Path(folder) if folder is not None else None
        self.batches = Batches(
            corpus.train,
            config.length,
            config.batch,
            seed=config.seed,
            accumulate=config.accumulate,
            rank=place.rank,
            world=place.world,
        )
        self.held_out = None
        if config.evaluation_tokens > 0:
            self.held_out = windows(corpus.validation, config.length, config.evaluation_tokens)
        self.module = distribute(self.model, place, config.parallel)
        self.optimiser = make_optimiser(self.model, config)
        if config.compile and self.module._compiled_call_impl is None:
            self.module.compile()
        self.history = History()
        self.done, self.busy, self.before, self.unlogged = 0, 0.0, 0.0, []

    def go(self, resume: bool, progress: bool, report) -> History:
        if resume:
            self.resume()
        elif self.folder is not None and self.place.first:
            _start_log(self.folder)
        config, started_at = self.config, self.done
        bar = tqdm(
            total=config.steps,
            initial=self.done,
            unit="step",
            disable=not progress or not self.place.first,
            dynamic_ncols=True,
        )
        self.model.train()
        with bar:
            mark = time.perf_counter()
            while self.done < config.steps:
                self.step()
                bar.update()
                evaluates = self.held_out is not None and self.due(config.evaluate_every)
                saves = self.folder is not None and (self.due(config.checkpoint_every) or self.stopping())
                if evaluates or saves or self.due(config.log_every):
                    self.flush_log(mark)
                    speed = self.speed(started_at)
                    bar.set_postfix(self.status(speed), refresh=False)
                    if evaluates:
                        self.evaluate(report)
                    if saves:
                        self.save()
                    if self.history.stopped:
                        break
                    mark = time.perf_counter()
        self.history.tokens_per_second = self.speed(started_at)
        return self.history

    def due(self, every: int) -> bool:
        return self.done == self.config.steps or (every > 0 and self.done % every == 0)

    def step(self) -> None:
        """One optimiser step: gradients of all parts of the batch, clipping, AdamW."""
        config = self.config
        rate = learning_rate_at(self.done, config)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        parts = self.batches.next().to(self.place.device, non_blocking=True)
        total = torch.zeros((), device=self.place.device)
        for i, part in enumerate(parts):
            with (
                gradient_sync(self.module, i == len(parts) - 1),
                autocast(self.place.device, config.precision),
            ):
                logits = self.module(part[:, :-1])
                loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
                (loss / len(parts)).backward()
            total += loss.detach() / len(parts)
        limit = config.clip if config.clip > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1
        self.unlogged.append((self.done, rate, total, norm.detach()))

    def flush_log(self, mark: float) -> None:
        """Read the losses since the last look from the device, check them, and log them.

        `mark` is the time at which the steps since then began.
        """
        values = torch.stack([torch.stack([loss, norm.to(loss)]) for _, _, loss, norm in self.unlogged])
        values[:, 0] = sum_over_processes(values[:, 0].contiguous(), self.place) / self.place.world
        self.busy += time.perf_counter() - mark
        seconds = round(self.busy, 3)
        for (step, rate, _, _), (loss, norm) in zip(self.unlogged, values.tolist(), strict=True):
            if not math.isfinite(loss):
                last = checkpoints.latest(self.folder) if self.folder else None
                hint = f"resume from {last} with" if last else "start again with"
                raise TrainingError(f"the loss is {loss} at step {step}: {hint} a lower learning rate")
            record = {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
            record["seconds"] = seconds
            self.history.steps.append(record)
            self.log(record)
        self.unlogged = []

    def evaluate(self, report) -> None:
        rows = self.held_out
        if len(rows) >= self.place.world:  # every process measures equally many
            rows = rows[self.place.rank :: self.place.world][: len(rows) // self.place.world]
        batch = max(self.config.batch // (self.config.accumulate * self.place.world), 1)
        loss = token_losses(self.module, rows, batch=batch, precision=self.config.precision)
        loss = loss.double().mean().to(self.place.device, torch.float32)
        mean = sum_over_processes(loss, self.place).item() / self.place.world
        record = {
            "step": self.done,
            "loss": mean,
            "bits_per_byte": bits_per_byte(mean, self.corpus.bytes_per_token),
            "seconds": round(self.busy, 3),
        }
        self.history.evaluations.append(record)
        self.log({"evaluation": record})
        if report is not None and self.place.first:
            report(record)

    def speed(self, started_at: int) -> float:
        """Tokens a second in this process's part of the run."""
        return (self.done - started_at) * self.config.tokens_per_step / max(self.busy - self.before, 1e-9)

    def status(self, speed: float) -> dict[str, str]:
        shown = {"loss": f"{self.history.steps[-1]['loss']:.3f}", "tokens/s": f"{speed:,.0f}"}
        use = flop_use(self.model, self.config.length, speed, self.place)
        return shown | ({"FLOP use": f"{use:.1%}"} if use else {})

    def stopping(self) -> bool:
        """Whether any process has been asked to stop; all of them learn it."""
        number = max(self.caught, default=0)
        if self.place.world > 1:
            if not self.due(self.config.log_every):  # asking the others waits for the device
                return False
            flag = torch.tensor([float(number)], device=self.place.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            number = int(flag.item())
        self.history.stopped = number or None
        return self.history.stopped is not None

    def log(self, record: dict[str, Any]) -> None:
        if self.folder is not None and self.place.first:
            try:
                with open(self.folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise checkpoints.CheckpointError(
                    f"could not write {self.folder / 'log.jsonl'}: {error.strerror}; "
                    f"the last good checkpoint is {checkpoints.latest(self.folder)}"
                ) from None

    def save(self) -> None:
        about = {
            "step": self.done,
            "seconds": self.busy,
            "model": self.model.config.to_dict(),
            "train": self.config.to_dict(),
            "corpus": self.corpus.facts,
            "bytes_per_token": self.corpus.bytes_per_token,
        }
        state = checkpoints.capture(self.model, self.optimiser, self.batches.state(), about)
        checkpoints.only_first_writes(state, self.folder, self.place, self.config.keep)
        if self.place.first:
            self.corpus.tokenizer.save(self.folder)

    def resume(self) -> None:
        if self.folder is None:
            raise ValueError("folder must be given to resume")
        path = checkpoints.latest(self.folder)
        if path is None:
            if self.place.first:
                _start_log(self.folder)
            return
        saved = checkpoints.read(path)
        checkpoints.check_same_run(saved.about, self.model.config.to_dict(), self.corpus.facts)
        self.batches.restore(checkpoints.restore(saved, self.model, self.optimiser))
        self.done, self.busy = saved.about["step"], saved.about["seconds"]
        self.before = self.busy
        records = _read_log(self.folder / "log.jsonl", self.done)
        self.history.steps = [record for record in records if "evaluation" not in record]
        self.history.evaluations = [record["evaluation"] for record in records if "evaluation" in record]
        if self.place.world > 1:
            torch.distributed.barrier()  # all have read the log before the first one cuts it
        if self.place.first:
            _write_log(self.folder / "log.jsonl", records)


def _start_log(folder: Path) -> None:
    """A new run in `folder`: refuse to mix it with the checkpoints of another."""
    if checkpoints.latest(folder) is not None:
        raise checkpoints.CheckpointError(f"{folder} holds a run already: go on with --resume, or take another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("")


def _read_log(path: Path, step: int) -> list[dict[str, Any]]:
    """The records up to `step`: what was logged after the checkpoint, or broke off, is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("evaluation", record)["step"] <= step:
            records.append(record)
    return records


def _write_log(path: Path, records: list[dict[str, Any]]) -> None:
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(part, path)


@contextmanager
def _signals(wanted: bool):
    """SIGINT and SIGTERM append to the list instead of ending the process; a second one ends it."""
    caught: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number, frame):
        if caught:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def flop_use(model: nn.Module, length: int, tokens_per_second: float, place: Processes) -> float | None:
    """Share of the GPU's peak that the model's own arithmetic uses; None for a device that is not listed."""
    if place.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(place.device)
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    if peak is None:
        return None
    return model.flops_per_token(length) * tokens_per_second / (peak * place.world)


def steps_within(
    seconds: float, model: nn.Module, corpus: Corpus, config: TrainConfig, *, trial: int = 4
) -> TrainConfig:
    """`config` with the number of steps that fits in `seconds`, timed on a copy of `model`.

    Warm-up becomes a tenth of the steps if `config` has more, and there will be six evaluations.
    """
    device = resolve_device(config.device)
    probe = copy.deepcopy(model).to(device)

    def timed(steps: int) -> float:
        short = replace(config, steps=steps, warmup=0, evaluate_every=0, evaluation_tokens=0, log_every=steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        train(probe, corpus, short)
        return time.perf_counter() - start

    timed(2)  # compiles, allocates
    each = timed(trial) / trial
    steps = max(int(seconds / each), 10)
    return replace(
        config,
        steps=steps,
        warmup=min(config.warmup, max(steps // 10, 1)),
        evaluate_every=-(-steps // 6),
    )
