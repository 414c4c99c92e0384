"""One cell of a table: all its seeds, learning rates and weight decays trained as one job, step by step together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.data.recall import IGNORE
from dn_lib.forms.common import working_dtype
from dn_lib.models import ModelConfig
from experiments.harness.results import first_line
from experiments.reproduce.parts.model import TaskModel, stack
from experiments.reproduce.parts.optimiser import RunsAdamW, schedule
from experiments.reproduce.parts.tasks import Split, Task


@dataclass(frozen=True)
class Run:
    """What distinguishes one run of a cell from the others: its start and order by `seed`, and how it learns."""

    seed: int
    learning_rate: float
    weight_decay: float

    @property
    def point(self) -> tuple[float, float]:
        """Its place in the grid, which it shares with the runs of other seeds."""
        return self.learning_rate, self.weight_decay


@dataclass(frozen=True)
class Training:
    """How all runs of a cell are trained.

    batch: examples a step, of every run.  epochs: passes over the training examples, their last incomplete batch left
    out.  warmup: share of the steps.  floor, floor_share: the learning rate at the end, a number plus a share of the
    peak.  init: standard deviation of the weights at the start.  clip: largest norm of a gradient.
    evaluations: how often the test is taken, evenly spread, the last time at the end; all but the last time on
    `glance` of its examples.  enough: training ends at a test (the whole of it) in which all seeds of one point of the
    grid have more.
    precision: "bf16" (autocast), "tf32" or "float32", on a GPU; on a CPU it is float32.
    """

    batch: int
    epochs: float
    warmup: float = 0.1
    floor: float = 0.0
    floor_share: float = 0.0
    init: float = 0.02
    clip: float = 1.0
    evaluations: int = 20
    glance: int = 500
    enough: float = 2.0
    precision: str = "bf16"

    def __post_init__(self):
        if self.precision not in ("bf16", "tf32", "float32"):
            raise ValueError(f"precision must be bf16, tf32 or float32, got {self.precision!r}")

    def steps(self, examples: int) -> int:
        return max(1, round(self.epochs * (examples // self.batch)))


def losses(logits: Tensor, labels: Tensor, runs: int) -> Tensor:
    """The mean cross-entropy of each run `[R]`: logits `[R B, A, V]`, labels `[R B, A]`, those of -100 left out."""
    wide = logits.to(working_dtype(logits)).flatten(0, -2)
    every = F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORE, reduction="none")
    return every.view(runs, -1).sum(1) / (labels != IGNORE).view(runs, -1).sum(1)


def right(logits: Tensor, asked: Split) -> Tensor:
    """Which answers are right: logits `[..., A, V]` -> bool `[..., A]`."""
    answer = logits.argmax(-1)
    if asked.legal is None:
        return answer == asked.labels
    return (asked.legal >> answer.clamp(max=62) & 1).bool()


class Job:
    """The models of a cell, stacked, their optimiser, and the steps that they take together."""

    def __init__(
        self, task: Task, config: ModelConfig, runs: list[Run], training: Training, *, device: str = "cpu",
        dtype: torch.dtype = torch.float32, eager: bool = False,
    ):  # fmt: skip
        self.task, self.runs, self.training, self.device = task, runs, training, device
        self.eager = eager or device == "cpu"
        self.steps, self.per_epoch = training.steps(len(task.train)), len(task.train) // training.batch
        if self.per_epoch < 1:
            raise ValueError(f"batch must be at most the {len(task.train)} training examples, got {training.batch}")
        models = [new_model(task, config, run.seed, training.init).to(dtype) for run in runs]
        self.model = stack(models).to(device)
        rate = torch.tensor([run.learning_rate for run in runs], dtype=torch.float64)
        floor = training.floor + training.floor_share * rate[:, None]
        rates = schedule(rate, self.steps, round(training.warmup * self.steps), floor)
        decay = torch.tensor([run.weight_decay for run in runs], dtype=torch.float64)
        self.optimiser = RunsAdamW(self.model, rates, decay, clip=training.clip)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.history = torch.zeros(2, len(runs), self.steps, device=device)  # loss and accuracy of each step
        self.order = torch.zeros(len(runs), self.per_epoch * training.batch, dtype=torch.long, device=device)
        self.epoch = -1
        self.done, self.seconds, self.step_seconds = 0, 0.0, 0.0
        self.tests: list[dict] = []

    # --- Steps ----------------------------------------------------------------------------------------------------

    def autocast(self):
        half = self.device == "cuda" and self.training.precision == "bf16"
        # No cache of cast weights: it would not be filled anew when a recorded step runs again.
        return torch.autocast(self.device, torch.bfloat16, enabled=half, cache_enabled=False)

    def step(self) -> None:
        """One step of all runs, on the next batch of each.  Asks nothing of the host, so that it can be recorded."""
        runs, batch = len(self.runs), self.training.batch
        begin = self.count % self.per_epoch * batch
        which = self.order.gather(1, (begin + torch.arange(batch, device=self.device)).expand(runs, -1))
        asked = self.task.train.rows(which.flatten())
        with self.autocast():
            logits = self.model(asked.tokens, asked.at)
        loss = losses(logits, asked.labels, runs)
        self.optimiser.backward(loss.sum())
        self.optimiser.step(self.count)
        hits = (right(logits.detach(), asked) & asked.scored).view(runs, -1).sum(1)
        accuracy = hits / asked.scored.view(runs, -1).sum(1).clamp(min=1)
        self.history.index_copy_(2, self.count, torch.stack([loss.detach(), accuracy])[..., None].to(self.history))
        self.count += 1

    def shuffle(self, epoch: int) -> None:
        """The order of an epoch: runs of one seed see the same, which depends on nothing but seed and epoch."""
        for row, run in zip(self.order, self.runs, strict=True):
            g = torch.Generator().manual_seed(1_000_003 * (run.seed + 1) + epoch)
            row.copy_(torch.randperm(len(self.task.train), generator=g)[: self.order.shape[1]])
        self.epoch = epoch

    def recorded(self) -> tuple[Callable[[], None], str]:
        """What makes one step: the replay of a CUDA graph, or `step` itself, and which it is.

        The three steps that have to be taken before a recording are taken back.
        """
        if self.eager:
            return self.step, "eager"
        before = [x.clone() for x in self.state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            step, how = graph.replay, "CUDA graph"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            torch.cuda.synchronize()
            step, how = self.step, f"eager, for recording failed: {first_line(error)}"
        for x, old in zip(self.state, before, strict=True):
            x.copy_(old)
        return step, how

    # --- Training -------------------------------------------------------------------------------------------------

    def train(self, left: Callable[[], float] = lambda: float("inf"), say: Callable[[str], None] | None = None) -> bool:
        """Trains to the end, or until it is enough: True; False if `left()` seconds ran out before.

        A later call, also of a job that was given this one's `saved`, goes on.
        """
        step, self.steps_by = self.recorded()
        last = max(1, self.training.evaluations)
        test_at = sorted({round(self.steps * i / last) for i in range(1, last + 1)} - {0})
        while self.done < self.steps and not self.is_enough():
            if self.done // self.per_epoch != self.epoch:
                self.shuffle(self.done // self.per_epoch)
            until = min((self.epoch + 1) * self.per_epoch, self.done + 50, next(t for t in test_at if t > self.done))
            begun, taken = time.monotonic(), until - self.done
            for _ in range(taken):
                step()
            self.done = int(self.count)  # waits for the device
            self.step_seconds += time.monotonic() - begun
            if self.done in test_at:
                self.tests.append(self.test(None if self.done == self.steps else self.training.glance))
                if self.is_enough():  # by a glance, perhaps
                    self.tests[-1] = self.test()
                if say is not None:
                    say(f"step {self.done} of {self.steps}: accuracy {best_of(self.tests[-1]['accuracy']):.3f}")
            self.seconds += time.monotonic() - begun
            if left() <= 0 and self.done < self.steps and not self.is_enough():
                return False
        return True

    def is_enough(self) -> bool:
        """Whether the last test was better than `enough` for every seed of one point of the grid."""
        return bool(self.tests) and any(
            all(accuracy > self.training.enough for accuracy in values) for values in self.by_point().values()
        )

    def by_point(self) -> dict[tuple[float, float], list[float]]:
        """The accuracies of the last test, seed by seed, of each point of the grid."""
        found: dict[tuple[float, float], list[float]] = {}
        for run, accuracy in zip(self.runs, self.tests[-1]["accuracy"], strict=True):
            found.setdefault(run.point, []).append(accuracy)
        return found

    @torch.no_grad()
    def test(self, examples: int | None = None) -> dict:
        """Accuracy of each run on the first `examples` of the test (all, for None), and by place.

        `by_place` `[R][K]` are the shares of right answers in each column of labels, None where none is scored.
        """
        runs, batch = len(self.runs), self.training.batch
        count = len(self.task.test) if examples is None else min(examples, len(self.task.test))
        hits = asked_for = torch.zeros(())
        for begin in range(0, count, batch):
            asked = self.task.test.rows(slice(begin, min(begin + batch, count)))
            tokens, at = (x.repeat(runs, 1) for x in (asked.tokens, asked.at))
            with self.autocast():
                logits = self.model(tokens, at)
            found = right(logits.unflatten(0, (runs, -1)), asked) & asked.scored
            hits = hits + found.sum(1).cpu()
            asked_for = asked_for + asked.scored.sum(0).cpu()
        share = hits.double() / asked_for
        return {
            "step": self.done,
            "examples": count,
            "accuracy": (hits.double().sum(1) / asked_for.sum()).tolist(),
            "by_place": [[None if x != x else x for x in row] for row in share.tolist()],
        }

    # --- What is kept ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> list[Tensor]:
        return [*self.optimiser.state, self.count, self.history]

    def saved(self) -> dict:
        """What `restore` needs to go on in another process."""
        numbers = {name: getattr(self, name) for name in ("done", "seconds", "step_seconds", "tests")}
        return {"state": [x.cpu() for x in self.state], **numbers}

    def restore(self, saved: dict) -> None:
        for x, old in zip(self.state, saved["state"], strict=True):
            x.copy_(old)
        self.done, self.seconds, self.step_seconds = saved["done"], saved["seconds"], saved["step_seconds"]
        self.tests = saved["tests"]

    def curves(self, points: int = 40) -> dict:
        """Loss and accuracy on the batches, averaged over `points` stretches, of each run."""
        every = max(1, self.done // points)
        means = self.history[..., : self.done - self.done % every].unflatten(2, (-1, every)).mean(3).cpu()
        steps = [every * (i + 1) for i in range(means.shape[2])]
        return {"steps": steps, "loss": means[0].tolist(), "accuracy": means[1].tolist()}


def best_of(values: list[float]) -> float:
    """The largest, where one that is no number (a run that diverged) is the least."""
    return max((x for x in values if x == x), default=float("nan"))


def new_model(task: Task, config: ModelConfig, seed: int, init: float) -> TaskModel:
    """The model of one run, as `seed` draws it; the generator of the process is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TaskModel(config, task.decoded, init)
