"""The training loop."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dn_lib.data import Batches, Corpus
from dn_lib.models.language_model import LanguageModel
from dn_lib.models.wrappers import COMPILED, inner
from dn_lib.training import checkpoint as checkpoints
from dn_lib.training import folder as folders
from dn_lib.training.config import TrainConfig
from dn_lib.training.distributed import (
    Processes,
    distribute,
    full_tensor,
    gradient_sync,
    in_all,
    in_first,
    join_processes,
    resolve_device,
    sum_over_processes,
)
from dn_lib.training.evaluate import autocast, bits_per_byte, precision_in_use, token_losses, windows
from dn_lib.training.interruptions import Log, Report, Screen, stop_signals
from dn_lib.training.optimiser import learning_rate_at, make_optimiser
from dn_lib.training.same_run import check_changes, check_same_run, tokens_digest

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
    checkpoint: the file that holds what was trained, or None.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    tokens_per_second: float = 0.0
    stopped: int | None = None
    checkpoint: Path | None = None


def train(
    model: nn.Module,
    corpus: Corpus,
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    resume: bool | str | Path = False,
    allow_changes: Collection[str] = (),
    notes: dict[str, Any] | None = None,
    progress: bool = False,
    report: Callable[[dict[str, float]], None] | None = None,
) -> History:
    """Train `model`, a `LanguageModel`, in place.  It may be compiled, or in DDP, whole or in parts.

    folder: where `log.jsonl` and the checkpoints go; None for neither.  One run at a time uses a folder.
    resume: True goes on from the newest checkpoint in `folder`, or begins if there is none.  A path goes on from
      that checkpoint: newer ones in `folder` are set aside.
    allow_changes: names of settings (of `config`, or "corpus") that may differ from those that the checkpoint was
      trained with.  Any other that decides the numbers has to be the same.
    notes: kept in `run.json` and in every checkpoint; what JSON can hold.
    progress: show a tqdm bar.  report: called with every evaluation; an exception in it becomes a warning.

    With a folder, SIGINT, SIGTERM and SIGHUP end the run after the current step, with a checkpoint written.
    Under torchrun each process calls this with the same arguments; `model` must be built from the same seed.
    Raises DataError (context longer than the data), CheckpointError (a folder in use, a damaged checkpoint or one of
    another run, a full disk), TrainingError (a loss, a gradient or a weight is no number; the last good checkpoint
    stays), ValueError (an argument that cannot be).
    """
    if resume and folder is None:
        raise ValueError("folder must be given to resume")
    place = join_processes(config.device)
    run = _Run(model, corpus, config, place, folder, notes or {})
    check_changes(allow_changes, run.about.get("model", {}))
    with ExitStack() as stack:
        if folder is not None:
            in_first(place, lambda: stack.enter_context(folders.held(Path(folder))))
        run.caught = stack.enter_context(stop_signals(folder is not None))
        run.begin(resume, allow_changes)
        return run.go(progress, Report(report))


class _Run:
    """The parts of one run, and the loop over its steps."""

    def __init__(self, model, corpus, config: TrainConfig, place: Processes, folder, notes: dict[str, Any]):
        model.to(place.device)
        self.model: Any = inner(
            model
        )  # a LanguageModel, or a module with its methods; keeps the parameters; `module`, below, is called
        self.corpus, self.config, self.place, self.caught = corpus, config, place, []
        self.folder = Path(folder) if folder is not None else None
        self.about = self.describe(notes) if self.folder else {}
        self.log = Log(self.folder / folders.LOG if self.folder and place.first else None)
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
        self.module = distribute(model, place, config.parallel)
        self.optimiser = make_optimiser(self.model, config)
        if config.compile and COMPILED not in self.module._modules and self.module._compiled_call_impl is None:
            self.module.compile()
        self.history = History()
        self.done, self.busy, self.before, self.unlogged = 0, 0.0, 0.0, []

    def describe(self, notes: dict[str, Any]) -> dict[str, Any]:
        """What every checkpoint says about the run, in the form in which JSON gives it back."""
        facts, config = self.corpus.facts, self.config
        about = {
            "model": self.model.config.to_dict(),
            "train": config.to_dict(),
            "precision": precision_in_use(self.place.device, config.precision),
            "corpus": facts,
            "bytes_per_token": self.corpus.bytes_per_token,
            "notes": notes,
        }
        for name, value in (("notes", notes), ("corpus.facts", facts), ("model.config", about["model"])):
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} must hold only what JSON can, got {value!r}: {error}") from None
        return json.loads(json.dumps(about))

    def begin(self, resume: bool | str | Path, allow_changes: Collection[str]) -> None:
        """Make the folder ready, and go on from a checkpoint if there is one to go on from."""
        if (folder := self.folder) is None:
            return
        parts = {"train": self.corpus.train, "validation": self.corpus.validation}
        self.about["tokens"] = {part: tokens_digest(tokens) for part, tokens in parts.items()}
        path = None
        if resume:
            path = in_first(self.place, lambda: checkpoints.latest(folder) if resume is True else Path(resume))
        if path is not None:
            self.resume(path, allow_changes)
        else:
            notes, again = self.about["notes"], bool(resume)
            self.about["run"] = in_first(self.place, lambda: folders.begin(folder, notes, again))
        in_first(self.place, self.save_tokenizer)

    def go(self, progress: bool, report: Report) -> History:
        config, started_at = self.config, self.done
        bar = tqdm(
            total=config.steps,
            initial=self.done,
            unit="step",
            disable=not progress or not self.place.first,
            dynamic_ncols=True,
            file=Screen(),
        )

        def apart(record: dict[str, float]) -> None:  # what is reported begins a line of its own, the bar follows it
            bar.clear()
            report(record)
            bar.refresh()

        self.module.train()
        with bar:
            mark = time.perf_counter()
            while self.done < config.steps:
                self.step()
                bar.update()
                evaluates = self.held_out is not None and self.due(config.evaluate_every)
                stops = self.folder is not None and self.stopping()
                saves = stops or (self.folder is not None and self.due(config.checkpoint_every))
                if evaluates or saves or self.due(config.log_every):
                    self.flush_log(mark)
                    speed = self.speed(started_at)
                    bar.set_postfix(self.status(speed), refresh=False)
                    if evaluates or saves:
                        self.check_weights()
                    if evaluates:
                        self.evaluate(apart)
                    if saves:
                        self.save()
                    if stops:
                        break
                    mark = time.perf_counter()
        self.log.add()  # once more, what waits
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
        norm = full_tensor(norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1
        self.unlogged.append((self.done, rate, total, norm))

    def flush_log(self, mark: float) -> None:
        """Read the losses since the last look from the device, check them, and log them.

        `mark` is the time at which the steps since then began.
        """
        values = torch.stack([torch.stack([loss, norm.to(loss)]) for _, _, loss, norm in self.unlogged])
        values[:, 0] = sum_over_processes(values[:, 0].contiguous(), self.place) / self.place.world
        self.busy += time.perf_counter() - mark
        seconds, records, problem = round(self.busy, 3), [], None
        for (step, rate, _, _), (loss, norm) in zip(self.unlogged, values.tolist(), strict=True):
            wrong = [f"{name} is {x}" for name, x in (("loss", loss), ("gradient norm", norm)) if not math.isfinite(x)]
            if wrong:
                problem = f"the {wrong[0]} at step {step}: {self.remedy()}"
                break
            record = {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
            records.append({**record, "seconds": seconds})
        self.history.steps += records
        self.log.add(*records)
        self.unlogged = []
        if problem:
            raise TrainingError(problem)

    def check_weights(self) -> None:
        """Nothing is stored or measured whose weights are no numbers; a finite loss and gradient can still make one."""
        tensors = [p.detach() for p in self.model.parameters()]
        tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        bad = torch.stack([t.isfinite().all() for t in tensors]).logical_not().sum().float()
        if sum_over_processes(bad, self.place).item():
            raise TrainingError(f"a weight is no finite number after step {self.done}: {self.remedy()}")

    def remedy(self) -> str:
        if self.history.checkpoint is None:
            return "start again with a lower learning rate"
        return (
            f"the last good checkpoint is {self.history.checkpoint}: go on from it with a lower learning rate "
            "(--resume --change learning_rate)"
        )

    def evaluate(self, report) -> None:
        rows = self.held_out
        assert rows is not None  # asked for only where some are
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
        self.log.add({"evaluation": record})
        if self.place.first:
            report(record)

    def speed(self, started_at: int) -> float:
        """Tokens a second in this process's part of the run."""
        return (self.done - started_at) * self.config.tokens_per_step / max(self.busy - self.before, 1e-9)

    def status(self, speed: float) -> dict[str, str]:
        shown = {"loss": f"{self.history.steps[-1]['loss']:.3f}", "tokens/s": f"{speed:,.0f}"}
        use = flop_use(self.model, self.config.length, speed, self.place)
        return shown | ({"FLOP use": f"{use:.1%}"} if use else {})

    def stopping(self) -> bool:
        """Whether any process has been asked to stop before the end; all of them learn it."""
        if self.done == self.config.steps:
            return False
        number = max(self.caught, default=0)
        if self.place.world > 1:
            if not self.due(self.config.log_every):  # asking the others waits for the device
                return False
            flag = torch.tensor([float(number)], device=self.place.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            number = int(flag.item())
        self.history.stopped = number or None
        return self.history.stopped is not None

    @property
    def kept_in(self) -> Path:
        """The folder of a run that has one."""
        assert self.folder is not None
        return self.folder

    def save(self) -> None:
        about = {**self.about, "step": self.done, "seconds": self.busy, "unlogged": self.log.waiting}
        state = checkpoints.capture(self.model, self.optimiser, self.batches.state(), about)
        self.history.checkpoint = in_first(
            self.place, lambda: checkpoints.write(state, self.kept_in, keep=self.config.keep)
        )

    def save_tokenizer(self) -> None:
        try:
            self.corpus.tokenizer.save(self.kept_in)
        except OSError as error:
            reason = error.strerror or error
            raise checkpoints.CheckpointError(f"could not write into {self.folder}: {reason}") from None

    def resume(self, path: Path, allow_changes: Collection[str]) -> None:
        saved = in_all(self.place, lambda: folders.read_to_resume(path, self.kept_in))
        check_same_run(saved.about, self.about, allow_changes)
        batches = checkpoints.restore(saved, self.model, self.optimiser)
        if saved.about["train"].get("seed") == self.config.seed:  # a changed seed draws its own batches from here on
            self.batches.restore(batches)
        self.about["run"] = saved.about["run"]
        self.done, self.busy = saved.about["step"], saved.about["seconds"]
        self.before, self.history.checkpoint = self.busy, path
        records = in_first(self.place, lambda: folders.go_on(self.kept_in, saved, self.about["notes"]))
        self.history.steps = [record for record in records if "evaluation" not in record]
        self.history.evaluations = [record["evaluation"] for record in records if "evaluation" in record]


def flop_use(model: LanguageModel, length: int, tokens_per_second: float, place: Processes) -> float | None:
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
