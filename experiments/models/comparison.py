"""Six language models of one size on the same tokens in the same order, several seeds each: what chapter 6 compares.

    python -m experiments comparison --plan                      the cells that are left, with seconds each on an H200
    python -m experiments comparison --budget 420                as many of them as begin within seven minutes
    python -m experiments comparison --cells "DeltaNet, rate"    those whose name begins so

First a sweep: every kind at three learning rates, for a few steps, one seed. Then the runs: every kind at the rate
that was best for it, three seeds of the window hybrid, DeltaNet and both Transformers, one of the others. (Few steps
favour a high rate, in all kinds alike.) Kinds differ in their mixers alone (`experiments.harness.kinds`), and a seed
draws the same batches for all. Each cell is a run of its own that takes minutes, and a row of the result once it is
done: the same command goes on with the next. A cell that is stopped within begins anew, or goes on where --folder keeps
checkpoints.

Text: `python -m dn_lib prepare-data wheels --archive wheels.tar.xz`, given as --corpus. Bytes are the tokens. A row has
kind, rate, seed, steps, tokens, parameters, mixers, curve (training loss, about a hundred points), evaluations,
bits_per_byte on the validation part in windows of the training length, and, if it is none of the sweep,

- loss_by_position, to four times that length, in windows of that;
- unseen_names: loss at names that occur nowhere in the training text, first and later occurrences of the same names
  (`dn_lib.training.loss_at_unseen_names`);
- recall: assignments of random numbers to random names, told twice (`dn_lib.training.recall_of_assignments`);
- seconds, tokens_per_second and peak_memory_bytes, which are no benchmark: `throughput` is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from dn_lib.data import Corpus, load_corpus, split_text
from dn_lib.models import LanguageModel
from dn_lib.training import (
    TrainConfig,
    bits_per_byte,
    document_windows,
    loss_at_unseen_names,
    loss_by_position,
    recall_of_assignments,
    token_losses,
    train,
    windows,
    words_of,
)
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.kinds import COMPARED, Kind, parameters
from experiments.harness.problems import matmul_precision
from experiments.harness.provenance import RESULTS
from experiments.harness.results import OutOfTime, Results
from experiments.models.train_hybrid import compile_blocks

RATES = (1e-3, 2e-3, 4e-3)
SEEDS = {"window hybrid": 3, "DeltaNet": 3, "Transformer": 3, "Transformer, convolutions": 3}  # of the others one
TOKENS_PER_SECOND = {  # of such models on an H200, as once measured beside other work; `--plan` reckons with them
    "window hybrid": 1.4e6, "DeltaNet": 1.0e6, "gated DeltaNet": 0.9e6, "global hybrid": 1.0e6,
    "Transformer": 1.35e6, "Transformer, convolutions": 1.1e6,
}  # fmt: skip
OVERHEAD = 35  # seconds of a run that are no training: compiling, evaluations, measures
SWEEP_OVERHEAD = 20


@dataclass(frozen=True)
class Cell:
    """One training run. `rate` is None until the sweep has decided it."""

    kind: str
    seed: int
    rate: float | None
    steps: int

    @property
    def key(self) -> str:
        return f"{self.kind}, seed {self.seed}" if self.rate is None else f"{self.kind}, rate {self.rate:g}"

    def seconds(self, tokens_per_step: int) -> float:
        """Estimated, on an H200."""
        overhead = OVERHEAD if self.rate is None else SWEEP_OVERHEAD
        return overhead + self.steps * tokens_per_step / TOKENS_PER_SECOND[self.kind]


def cells(options: argparse.Namespace) -> list[Cell]:
    """All of them, in order of worth: the sweep, one seed of every kind, then the other seeds."""
    kinds = options.kinds or list(COMPARED)
    sweep = [Cell(kind, 0, rate, options.sweep_steps) for kind in kinds for rate in options.rates]
    most = max(SEEDS.values()) if options.seeds is None else options.seeds
    wanted = {kind: SEEDS.get(kind, 1) if options.seeds is None else most for kind in kinds}
    runs = [Cell(kind, seed, None, options.steps) for seed in range(most) for kind in kinds if seed < wanted[kind]]
    return [cell for cell in sweep + runs if cell.key.startswith(tuple(options.cells or [""]))]


def best_rate(rows: list[dict], kind: str) -> float:
    """The learning rate at which the sweep's loss was least. Raises ValueError where it was not swept."""
    swept = [row for row in rows if row["status"] == "ok" and row["kind"] == kind and row["sweep"]]
    if not swept:
        raise ValueError(f"{kind} has no rate yet: the cells '{kind}, rate ...' come first")
    return min(swept, key=lambda row: row["bits_per_byte"])["rate"]


class Text:
    """The corpus, and what is known about it once it is asked for."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        if corpus.tokenizer.name != "bytes":
            raise ValueError(f"--corpus must hold bytes, this one holds {corpus.tokenizer.name}: names are read in it")

    @cached_property
    def words(self) -> set[bytes]:
        """All words of the training part."""
        return words_of(self.corpus.train)


def measures(model: LanguageModel, text: Text, options: argparse.Namespace, sweep: bool) -> dict:
    """What is asked of a trained model; of one of the sweep only its loss."""
    model.eval()
    corpus, length = text.corpus, options.length
    common = {"batch": max(options.batch // options.accumulate, 1)}
    loss = token_losses(model, windows(corpus.validation, length, options.evaluation_tokens), **common)
    found: dict = {"bits_per_byte": bits_per_byte(loss.double().mean().item()), "tokens_measured": loss.numel()}
    if sweep:
        return found
    far = windows(corpus.validation, 4 * length, options.evaluation_tokens)
    position, means = loss_by_position(token_losses(model, far, batch=max(common["batch"] // 4, 1)), bins=32)
    found["loss_by_position"] = {"position": position, "loss": means, "windows": len(far)}
    rows = document_windows(corpus.validation, length, options.documents)
    found["unseen_names"] = loss_at_unseen_names(model, rows, text.words, **common) | {"documents": len(rows)}
    pairs = [count for count in (4, 8, 16, 32) if 24 * count <= length]
    recall = recall_of_assignments(model, pairs, n=options.probes, **common)
    found["recall"] = [{"pairs": count, **shares} for count, shares in recall.items()]
    return found


def run_cell(cell: Cell, text: Text, options: argparse.Namespace, device: str, rate: float) -> dict:
    """Train one model and measure it. Raises OutOfTime if it was stopped by a signal."""
    torch.manual_seed(cell.seed)
    kind: Kind = COMPARED[cell.kind]
    shape = {name: getattr(options, name) for name in ("width", "layers", "heads", "window")}
    model = kind.build(vocab_size=256, **shape).to(device)
    compile_blocks(model, device == "cuda" and options.compile)
    sweep = cell.rate is not None
    config = TrainConfig(
        steps=cell.steps,
        batch=options.batch,
        length=options.length,
        accumulate=options.accumulate,
        learning_rate=rate,
        min_learning_rate=rate / 10,
        warmup=min(options.warmup, max(cell.steps // 10, 1)),
        evaluate_every=0 if sweep else max(cell.steps // 10, 1),
        evaluation_tokens=options.evaluation_tokens // 4,
        checkpoint_every=options.checkpoint_every,
        keep=1,
        device=device,
        log_every=20,
        seed=cell.seed,
    )
    folder = options.folder / cell.key.replace(" ", "_").replace(",", "") if options.folder else None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    history = train(
        model, text.corpus, config, folder=folder, resume=folder is not None, progress=sys.stderr.isatty(),
        report=lambda r: print(f"  step {r['step']:6d}  {r['bits_per_byte']:.4f} bits per byte", flush=True),
    )  # fmt: skip
    if history.stopped:
        raise OutOfTime
    every = max(len(history.steps) // 100, 1)
    row = {
        "kind": cell.kind,
        "sweep": sweep,
        "rate": rate,
        "seed": cell.seed,
        "steps": cell.steps,
        "tokens": cell.steps * config.tokens_per_step,
        "parameters": model.num_parameters(),
        "mixers": list(model.config.mixers()),
        "edits": list(kind.edits),
        "curve": [[r["step"], round(r["loss"], 5)] for r in history.steps[every - 1 :: every]],
        "evaluations": [[r["step"], round(r["bits_per_byte"], 5)] for r in history.evaluations],
        "training_seconds": history.steps[-1]["seconds"],
        "tokens_per_second": history.tokens_per_second,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }
    row |= measures(model, text, options, sweep)
    return row | {"wall_seconds": time.perf_counter() - begun}


def spread(values: list[float]) -> dict:
    """Mean, range and count; the range is what seeds do."""
    return {"mean": statistics.fmean(values), "least": min(values), "most": max(values), "seeds": len(values)}


def summary(rows: list[dict]) -> dict:
    """By kind: the rate that the sweep chose and its losses, and what the runs came to."""
    done, found = [row for row in rows if row["status"] == "ok"], {}
    for kind in COMPARED:
        runs = [row for row in done if row["kind"] == kind and not row["sweep"]]
        about: dict = {
            "sweep": {f"{r['rate']:g}": r["bits_per_byte"] for r in done if r["kind"] == kind and r["sweep"]}
        }
        if runs:
            about |= {"rate": runs[0]["rate"], "bits_per_byte": spread([r["bits_per_byte"] for r in runs])}
            for name in ("first", "later"):
                about[f"unseen_names_{name}"] = spread([bits_per_byte(r["unseen_names"][name]) for r in runs])
            counts = [entry["pairs"] for entry in runs[0]["recall"]]
            about["recall"] = {
                n: spread([e["digits"] for r in runs for e in r["recall"] if e["pairs"] == n]) for n in counts
            }
            about["gpu_minutes"] = sum(r["wall_seconds"] for r in runs) / 60
        if about["sweep"] or runs:
            found[kind] = about
    return found


def table(found: dict) -> str:
    lines = [f"{'':26}{'rate':>7}  {'bits per byte':22}{'unseen names: first':>20}{'later':>8}{'digits of 32':>14}"]
    for kind, about in found.items():
        if "rate" not in about:
            lines.append(f"{kind:26}  sweep: {', '.join(f'{r} {x:.4f}' for r, x in about['sweep'].items())}")
            continue
        bits, most = about["bits_per_byte"], max(about["recall"], default=0)
        shown = f"{bits['mean']:.4f} ({bits['least']:.4f} to {bits['most']:.4f})"
        first, later = (about[f"unseen_names_{name}"]["mean"] for name in ("first", "later"))
        digits = f"{about['recall'][most]['mean']:.0%} ({most})" if most else "-"
        lines.append(f"{kind:26}{about['rate']:7g}  {shown:22}{first:20.2f}{later:8.2f}{digits:>14}")
    return "\n".join(lines)


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--plan", action="store_true", help="print the cells that are left and the seconds they should take, and stop")
    add("--cells", nargs="+", metavar="NAME", help="only those whose name begins so")
    add("--kinds", nargs="+", choices=COMPARED, metavar="KIND", help="only these")
    add("--seeds", type=int, help="so many of each kind (default: three of four kinds, one of the others)")
    add("--corpus", default="wheels.tar.xz")
    add("--steps", type=int, default=2500, help="of a run")
    add("--sweep-steps", type=int, default=400, help="of a cell of the sweep")
    add("--rates", nargs="+", type=float, default=list(RATES))
    for name, default in {"width": 512, "layers": 8, "heads": 4, "window": 256, "batch": 64, "length": 1024}.items():
        add(f"--{name}", type=int, default=default)
    add("--accumulate", type=int, default=1)
    add("--warmup", type=int, default=200)
    add("--evaluation-tokens", type=int, default=1 << 21)
    add("--documents", type=int, default=512, help="validation documents in which names are looked for")
    add("--probes", type=int, default=64, help="texts of assignments for each number of pairs")
    add("--folder", type=Path, help="keep checkpoints here; a cell that was stopped goes on")
    add("--checkpoint-every", type=int, default=0)
    add("--no-compile", dest="compile", action="store_false", help="leave the blocks uncompiled")


# What --smoke makes of the sizes: all parts of the program, nothing of the numbers.
SMALL = {
    "steps": 4, "sweep_steps": 2, "rates": [1e-3, 2e-3], "width": 16, "layers": 4, "heads": 2, "window": 8, "batch": 4,
    "length": 96, "warmup": 1, "evaluation_tokens": 384, "documents": 2, "probes": 2, "seeds": 2,
    "kinds": ["window hybrid", "Transformer, convolutions"],
}  # fmt: skip


def small_text() -> Corpus:
    """A text of which every line has a name of its own, so that those of the validation part are new there."""
    lines = [f"name_{i} = value_{i % 7}(name_{i})\n" for i in range(3000)]
    return split_text("".join(lines).encode(), name="smoke")


@matmul_precision("high")
def run(options: argparse.Namespace) -> int:
    if options.smoke:
        vars(options).update(SMALL)
    wanted = cells(options)
    per_step = options.batch * options.length
    left_out = ("plan", "cells", "kinds", "seeds", "folder", "checkpoint_every", "compile", "corpus")
    if options.plan:
        return plan(options, wanted, per_step)
    device = device_of(options.smoke)
    text = Text(small_text() if options.smoke else load_corpus(options.corpus))
    settings = settings_of(options, *left_out) | {
        "corpus": text.corpus.facts | {"train_tokens": len(text.corpus.train)},
        "parameters": {
            kind: parameters(
                model, vocab_size=256, width=options.width, layers=options.layers, heads=options.heads,
                window=options.window,
            )
            for kind, model in COMPARED.items()
        },
        "differences": "of two kinds no more than their mixers; batches of one seed are the same for all",
    }  # fmt: skip
    results = Results(options.out, settings, budget=options.budget, smoke=options.smoke)

    def body() -> None:
        for cell in wanted:
            needed = 0 if options.smoke else cell.seconds(per_step)
            if results.find(cell.key) is None and results.budget and results.elapsed() + needed > results.budget:
                raise OutOfTime  # it would not end in time, and a row that has not ended is lost

            def one(cell: Cell = cell) -> dict:
                rate = best_rate(results.rows, cell.kind) if cell.rate is None else cell.rate
                return run_cell(cell, text, options, device, rate)

            results.measure(cell.key, one)

    code = results.fill(body)
    results.summary = summary(results.rows)
    return results.finish(table(results.summary), code, failed=results.not_done)


def plan(options: argparse.Namespace, wanted: list[Cell], per_step: int) -> int:
    """Print what is left to do."""
    out = options.out or RESULTS / "comparison.json"
    results = Results(out, {}, any_commit=True) if out.exists() else None
    left = [cell for cell in wanted if results is None or results.find(cell.key) is None]
    for cell in left:
        print(f"{cell.seconds(per_step):6.0f} s  {cell.key}")
    total = sum(cell.seconds(per_step) for cell in left)
    print(f"{total:6.0f} s  in all, {total / 60:.0f} minutes on an H200, {len(left)} of {len(wanted)} cells")
    return 0


EXPERIMENT = Experiment(
    question="Which of six mixers learns best at equal size and data, and by how much more than its seeds part?",
    writes=("comparison.json",),
    minutes=55,
    gpu="H200, in cells of two to six minutes on the text of `python -m dn_lib prepare-data wheels`",
    run=run,
    options=options,
    shared=("budget", "smoke"),
    measured=False,
    dry=("plan",),
)
