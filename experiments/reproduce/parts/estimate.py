"""How long a cell takes on a GPU: from the bytes that its step moves, and from the cells that were measured before."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dn_lib.data.automata import LONGEST_WORD, MOST_WORDS
from experiments.reproduce.parts.tables import Cell

# These models read and write; they hardly multiply.  PASSES are the float32 activations of `width` channels that a
# layer reads or writes for each token, forward and backward.  They and LAUNCH were fitted to the milliseconds a step in
# book/results/mqar.json (DeltaNet of 64, 128 and 256 channels, two layers, on an H200), the other mixers' set by what
# their layers do beyond DeltaNet's.  Once cells of a table have been measured, `calibrated` corrects the fit.
PASSES = {"delta": 180, "gated_delta": 240, "linear": 170, "retnet": 220, "gla": 700, "attention": 110}
PASSES_PER_TAP = 48  # of the three short convolutions together
PASSES_OF_MLP = 14  # times hidden over width
LAUNCHES = {"delta": 150, "gated_delta": 180, "linear": 140, "retnet": 170, "gla": 700, "attention": 100}
LAUNCHES_PER_STEP = 150
LAUNCH = 2.5e-6  # seconds of a kernel too small to do anything else, within a CUDA graph
BYTES_PER_SECOND = 4e12
FLOPS_PER_SECOND = {"bf16": 2e14, "tf32": 1e14, "float32": 4e13}
WIDER = {"bf16": 1.0, "tf32": 1.3, "float32": 1.3}  # activations of 32 bits where autocast has some of 16
SETUP = 20.0  # seconds: kernels compiled, examples drawn, the step recorded


@dataclass(frozen=True)
class Estimate:
    """Of one cell: a step of all its runs in milliseconds, all its steps and tests in seconds, and FLOPs of it all."""

    ms_per_step: float
    seconds: float
    flops: float

    def times(self, factor: float) -> Estimate:
        return Estimate(self.ms_per_step * factor, SETUP + (self.seconds - SETUP) * factor, self.flops)


def sizes(cell: Cell) -> tuple[int, int]:
    """Tokens of a training sequence, and positions of it that are asked."""
    kind, task = cell.task["kind"], cell.task
    if kind == "regbench":
        length = MOST_WORDS * (LONGEST_WORD + 1)
        return length, length - MOST_WORDS
    length = task["length"]
    asked = {"mqar": "pairs", "selective_copying": "copied"}
    if kind in asked:
        return length, task[asked[kind]]
    if kind in ("compression", "parity", "arithmetic", "s3", "s5"):
        return length + 1, length
    return length, length // 2 if kind == "memorisation" else length


def estimate(cell: Cell) -> Estimate:
    """At most: a cell that has learned enough ends before."""
    config = cell.config(cell.task.get("vocab", 128))
    length, asked = sizes(cell)
    runs, width, layers = len(cell.runs), config.width, config.layers
    hidden = config.mlp_width()
    mixer, per_token = config.mixer, config.delta_steps
    passes = PASSES[mixer] * (0.3 + 0.7 * per_token) + PASSES_OF_MLP * hidden / width
    passes += 0 if mixer == "attention" else PASSES_PER_TAP * config.conv_size
    weights = layers * (4 * width**2 + 3 * width * hidden)
    tokens = runs * cell.training.batch * length
    answers = runs * cell.training.batch * asked
    precision = cell.training.precision

    moved = 4 * WIDER[precision] * tokens * width * layers * passes
    moved += 4 * 10 * answers * config.vocab_size  # logits, their softmax and its gradient
    moved += 4 * 20 * runs * (weights + config.vocab_size * width)  # AdamW
    flops = 6 * (tokens * weights + answers * width * config.vocab_size)
    if mixer == "attention":
        flops += 12 * tokens * layers * width * length / 2
    compute = moved / BYTES_PER_SECOND + flops / FLOPS_PER_SECOND[precision]
    step = LAUNCH * (LAUNCHES_PER_STEP + layers * LAUNCHES[mixer]) + compute

    tested = (cell.training.evaluations - 1) * min(cell.training.glance, cell.task["test"]) + cell.task["test"]
    longer = cell.task.get("test_length", length) / length
    tests = compute / 3 * longer * tested / cell.training.batch
    return Estimate(1e3 * step, SETUP + cell.steps * step + tests, cell.steps * flops)


def calibrated(cell: Cell, measured: Iterable[dict[str, Any]]) -> Estimate:
    """The estimate times what cells measured before took over theirs: of the same mixer if any, else of the table."""
    mixer = cell.model["mixer"]
    found = [(r["settings"]["model"]["mixer"], r["ms_per_step"] / r["estimated_ms_per_step"]) for r in measured]
    ratios = [ratio for name, ratio in found if name == mixer] or [ratio for _, ratio in found]
    return estimate(cell).times(statistics.median(ratios) if ratios else 1.0)
