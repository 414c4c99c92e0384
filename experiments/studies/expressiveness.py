"""What a start is worth: steps until copying and recall are learned from scratch, drawn at random or mimetic.

    python -m experiments expressiveness --budget 470                 what is missing; the same command goes on
    python -m experiments expressiveness --mixers delta --tasks copying

Two layers without a feed-forward part, `ModelConfig(initialisation="normal")` or `"mimetic"`, all else equal: the same
seeds, rates and batches.  Copying: random letters, a separator, the letters again.  Recall: key-value pairs, then every
key once more (`dn_lib.data.recall.multi_query_associative_recall`).  A cell is one task, mixer, start, rate and seed.
It ends once the accuracy of `OVER` batches in a row is above 99%, or after --steps.

Predicted before it was run.  From the mimetic start, Mamba and GLA reach 99% in at most half the steps, DeltaNet in at
most two thirds of them; at the best rate of each start, accuracies at the end agree within three points.

`results` has one entry for each task, mixer and start, at the rate with the fewest steps (seeds that never get there
count as --steps): `steps` to 99% for each seed, null for never, and `accuracy` over the last `OVER` batches.  The words
of S3 and S5 are measured by `python -m experiments reproduce tracking --cells 's3-*' 's5-*'`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.models import LanguageModel, ModelConfig
from experiments.harness.cli import Experiment, device_of
from experiments.harness.problems import matmul_precision
from experiments.harness.results import Results, plain
from experiments.models.mqar import Training, answers, draw

MIXERS = {"delta": "DeltaNet", "gla": "GLA", "mamba": "Mamba"}
STARTS = ("normal", "mimetic")
LEARNED, OVER = 0.99, 20
HOW = ("out", "mixers", "tasks", "seeds", "learning_rates", "budget", "eager", "smoke")  # not which training


# --- Tasks -------------------------------------------------------------------------------------------------------
def draw_copies(n: int, letters: int, vocab: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random letters from 1, the separator 0, and all letters but the last again: tokens `[n, 2 letters]`.

    From the separator on, each position is asked for the letter that comes next.  Returns tokens, the positions that
    are asked, and their answers, `[n, letters]` each.

    >>> tokens, asked, right = draw_copies(1, 3, 9, "cpu")
    >>> bool((tokens[0, 4:] == right[0, :2]).all()), asked.tolist()
    (True, [[3, 4, 5]])
    """
    text = torch.randint(1, vocab, (n, letters), device=device)
    tokens = torch.cat([text, torch.zeros_like(text[:, :1]), text[:, :-1]], dim=1)
    return tokens, torch.arange(letters, 2 * letters, device=device).expand(n, -1), text


def drawn(task: str, o: argparse.Namespace, device: str) -> tuple[Tensor, Tensor, Tensor]:
    if task == "copying":
        return draw_copies(o.batch, o.length // 2, o.vocab, device)
    return draw(o.batch, o.length, o.length // 4, o.vocab, device)


# --- Training ----------------------------------------------------------------------------------------------------
class Start(Training):
    """One model from one start; `recorded` makes a CUDA graph of `step`."""

    def __init__(self, task: str, mixer: str, start: str, rate: float, seed: int, o: argparse.Namespace, device: str):
        self.task, self.o, self.device, cuda = task, o, device, device == "cuda"
        config = ModelConfig(
            vocab_size=o.vocab, width=o.width, layers=2, heads=o.heads, mixer=mixer, conv_size=o.conv_size, mlp_ratio=0,
            tie_embeddings=True, initialisation=start,
        )  # fmt: skip
        self.model = LanguageModel(config).to(device)
        torch.manual_seed(seed)
        self.model.reset_parameters(o.init)  # what a start sets comes last: all else is the same from both
        torch.manual_seed(seed)  # and so are the batches
        self.rate = torch.tensor(rate, device=device)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=self.rate, weight_decay=0.01, fused=cuda or None, capturable=cuda
        )
        # Each recording takes 3 steps first.
        self.warm = rate * (torch.arange(1, o.steps + 4, device=device) / o.warmup).clamp(max=1)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.history = torch.zeros(o.steps + 3, device=device)  # accuracy of each step

    def step(self) -> None:
        tokens, asked, right = drawn(self.task, self.o, self.device)
        self.optimiser.zero_grad(set_to_none=True)
        with self.autocast():
            logits = answers(self.model, tokens, asked)
        F.cross_entropy(logits.flatten(0, 1).float(), right.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.rate.copy_(self.warm[self.count][0])
        self.optimiser.step()
        self.history.index_copy_(0, self.count, (logits.detach().argmax(-1) == right).float().mean()[None])
        self.count += 1

    def run(self, left: Callable[[], float] = lambda: float("inf")) -> dict[str, Any]:
        """Until it is learned, or for `steps` steps; hardly at all if `left()` seconds are too few for all of these."""
        begun = time.monotonic()
        step, how = self.recorded()
        done, timed = int(self.count), time.monotonic()
        first = done
        while done < self.o.steps:
            for _ in range(min(OVER, self.o.steps - done)):
                step()
            done = int(self.count)  # waits for the device
            if (wanted := (time.monotonic() - timed) / (done - first) * (self.o.steps - done)) > left():
                return {"status": "skipped", "failure": f"{wanted:.0f} s of training would not fit into the budget"}
            if done >= OVER and self.history[done - OVER : done].mean() > LEARNED:
                break
        history = self.history[:done].cpu()
        every = max(1, done // 40)
        return {
            "steps_taken": done,
            "steps_to_learn": learned_after(history),
            "accuracy": history[-OVER:].mean().item(),
            "curve": history[: done - done % every].unflatten(0, (-1, every)).mean(1).tolist(),
            "curve_steps": every,
            "seconds": time.monotonic() - begun,
            "steps_by": how,
        }


def learned_after(history: Tensor) -> int | None:
    """After how many steps the mean of the last `OVER` accuracies is above `LEARNED`; None if it never is.

    >>> learned_after(torch.cat([torch.zeros(5), torch.ones(30)])), learned_after(torch.zeros(40))
    (25, None)
    """
    if len(history) < OVER:
        return None
    there = (history.double().unfold(0, OVER, 1).mean(1) > LEARNED).nonzero()
    return int(there[0]) + OVER if len(there) else None


def a_cell(task, mixer, start, rate, seed, o: argparse.Namespace, device: str, left=None) -> dict[str, Any]:
    row = {"task": task, "mixer": MIXERS[mixer], "start": start, "learning_rate": rate, "seed": seed}
    row |= {"training": training_settings(o)}
    return row | Start(task, mixer, start, rate, seed, o, device).run(left or (lambda: float("inf")))


# --- The file ----------------------------------------------------------------------------------------------------
def training_settings(o: argparse.Namespace) -> dict[str, Any]:
    """What makes two cells comparable."""
    return {name: value for name, value in vars(o).items() if name not in HOW}


def collected(rows: list[dict]) -> list[dict]:
    """One entry for each task, mixer and start, at the rate with the fewest steps on average."""
    groups: dict[tuple, dict[float, list[dict]]] = {}
    for row in rows:
        if row["status"] == "ok":
            at = row["task"], row["mixer"], row["start"]
            groups.setdefault(at, {}).setdefault(row["learning_rate"], []).append(row)

    def cost(cells: list[dict]) -> float:
        return statistics.fmean(cell["steps_to_learn"] or cell["training"]["steps"] for cell in cells)

    found = []
    for at, by_rate in groups.items():
        rate = min(by_rate, key=lambda r: (cost(by_rate[r]), -statistics.fmean(c["accuracy"] for c in by_rate[r])))
        cells = sorted(by_rate[rate], key=lambda cell: cell["seed"])
        entry = dict(zip(("task", "mixer", "start"), at, strict=True)) | {"learning_rate": rate}
        entry |= {"steps": [cell["steps_to_learn"] for cell in cells], "accuracy": [c["accuracy"] for c in cells]}
        found.append(entry)
    return sorted(found, key=lambda e: (e["task"], e["mixer"], e["start"] != "normal"))


class Starts(Results):
    """`Results` with what a reader of the file wants first: `results`, see `collected`."""

    not_measured = "smoke run: a few steps of a tiny model; no number here is a result"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        wanted = plain(self.settings["training"])  # a row of other settings is another experiment
        self.rows = [row for row in self.rows if row.get("training") == wanted]

    def record(self) -> dict:
        found = {"provenance": self.provenance, "settings": self.settings}
        return {**found, "results": collected(self.rows), "rows": self.rows}


def plan(o: argparse.Namespace) -> list[tuple[str, str, str, float, int]]:
    """Cells in the order of their worth: both starts of a mixer before the next, seed by seed."""
    return [
        (task, mixer, start, rate, seed)
        for seed in range(o.seeds)
        for mixer in o.mixers
        for task, rate, start in itertools.product(o.tasks, o.learning_rates, STARTS)
    ]


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mixers", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    add("--tasks", nargs="+", choices=("copying", "recall"), default=["copying", "recall"])
    add("--learning-rates", nargs="+", type=float, default=[3e-3, 1e-2], help="of which each start has its best")
    add("--seeds", type=int, default=2)
    add("--steps", type=int, default=1500, help="at most")
    add("--warmup", type=int, default=50)
    add("--batch", type=int, default=64)
    add("--length", type=int, default=64)
    add("--vocab", type=int, default=64)
    add("--width", type=int, default=64)
    add("--heads", type=int, default=2)
    add("--conv-size", type=int, default=4)
    add("--init", type=float, default=0.1, help="standard deviation of the weights that no start sets")
    add("--eager", action="store_true", help="no CUDA graph")


def table(rows: list[dict]) -> str:
    lines = [f"{'task':8} {'mixer':9} {'start':8} {'rate':>7} {'seed':>4} {'to 99%':>7} {'accuracy':>8} {'s':>6}"]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['key']}: {row['status']}: {row.get('failure')}")
            continue
        steps = "never" if row["steps_to_learn"] is None else row["steps_to_learn"]
        line = f"{row['task']:8} {row['mixer']:9} {row['start']:8} {row['learning_rate']:7.0e} {row['seed']:4d}"
        lines.append(f"{line} {steps:>7} {100 * row['accuracy']:8.2f} {row['seconds']:6.1f}")
    return "\n".join(lines)


@matmul_precision("high")
def run(o: argparse.Namespace) -> int:
    """0; 1 if a cell failed; 2 if the budget ran out; 3 if the GPU was lost."""
    if o.smoke:
        o.learning_rates, o.seeds, o.steps, o.warmup = [1e-2], 1, 2, 1
        o.batch, o.length, o.vocab, o.width = 2, 16, 16, 16
    device = device_of(o.smoke)
    settings = {
        "training": training_settings(o),
        **{name: getattr(o, name) for name in HOW if name != "out"},
        "optimiser": "AdamW, weight decay 0.01, gradient norm at most 1, linear warm-up, then a constant rate",
        "precision": "bfloat16 by autocast on a GPU, float32 on a CPU",
        "end": f"after `steps` steps, or once the mean accuracy of {OVER} batches in a row is above {LEARNED}",
    }
    results = Starts(o.out, settings, budget=o.budget, smoke=o.smoke)

    def body() -> None:
        left = None if o.budget is None else lambda: o.budget - results.elapsed()
        for task, mixer, start, rate, seed in plan(o):
            results.measure(
                f"{task} {mixer} {start} lr={rate:g} seed={seed}",
                lambda cell=(task, mixer, start, rate, seed): a_cell(*cell, o, device, left),
                again=lambda row: row["status"] != "ok",
            )

    code = results.fill(body)
    return results.finish(table(results.rows), code, failed=any(row["status"] == "failed" for row in results.rows))


EXPERIMENT = Experiment(
    question="In how many steps are copying and recall learned, from a drawn and from a mimetic start?",
    writes=("expressiveness.json",),
    minutes=8,
    gpu="H200",
    run=run,
    options=options,
    shared=("budget", "smoke"),
    measured=False,
)
