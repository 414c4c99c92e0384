"""Which parts of a DeltaNet layer matter for recall: one layer, one change at a time, several seeds.

The task is chapter 6's: pairs of a key and a value, each key written twice, then questions, of which only the newest
value is right (`dn_lib.data.recall.recall_with_updates`). One layer, one head, no feed-forward part, a fixed number of
steps at one learning rate. Every variant differs in one thing from the one that it is held `against`: a field of
`ModelConfig` or an edit of the model (`experiments.harness.kinds`); a test counts. Runs on a CPU, a second or two each.

A row holds variant, against, change, seed, accuracy (share of questions answered, of 256 new texts), loss (there), and
curve (training loss of every tenth step). With --out book/results/ablations.json the same command goes on.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from dn_lib.data.recall import recall_with_updates
from experiments.harness.cli import Experiment, settings_of
from experiments.harness.kinds import Kind
from experiments.harness.results import Results

PAIRS, VOCAB, BATCH, TESTED = 4, 32, 64, 256
SHAPE = {"vocab_size": VOCAB, "width": 32, "layers": 1, "heads": 1, "mlp_ratio": 0, "window": 4}


@dataclass(frozen=True)
class Variant:
    """A kind of layer, and the variant from which it differs in one thing."""

    kind: Kind
    against: str
    change: str


WHOLE = "DeltaNet layer"
VARIANTS: dict[str, Variant] = {
    WHOLE: Variant(Kind(), WHOLE, "nothing"),
    "no convolution": Variant(Kind({"conv_size": 0}), WHOLE, "q, k and v of one token each"),
    "no SiLU": Variant(Kind({"activation": "identity"}), WHOLE, "q and k without an activation"),
    "1 + ELU": Variant(Kind({"activation": "elu1"}), WHOLE, "another feature map for q and k, which is positive"),
    "no norm of q, k": Variant(Kind({"qk_norm": "none"}), WHOLE, "q and k of any length"),
    "no output norm": Variant(Kind({}, ("no output norm",)), WHOLE, "o as large as the state makes it"),
    "beta = 1": Variant(Kind({}, ("beta = 1",)), WHOLE, "every token replaces what it finds"),
    "two heads of 16": Variant(Kind({"heads": 2}), WHOLE, "two states of 16 by 16 for one of 32 by 32"),
    "linear attention": Variant(Kind({"mixer": "linear"}), WHOLE, "writes add and erase nothing"),
    "attention": Variant(
        Kind({"mixer": "attention"}, ("convolutions in attention",)), WHOLE, "softmax attention behind the convolutions"
    ),
    "no convolution, attention": Variant(Kind({"mixer": "attention"}), "attention", "q, k and v of one token each"),
    "window of 4": Variant(
        Kind({"mixer": "window"}, ("convolutions in attention",)), "attention", "attention to the newest 4 tokens"
    ),
}


def train(kind: Kind, steps: int, seed: int, *, learning_rate: float = 1e-2) -> dict:
    """The row of one training: accuracy and loss on new texts, and the curve."""
    torch.manual_seed(seed)
    model = kind.build(**SHAPE)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(1000 + seed)
    curve = []
    for _ in range(steps):
        tokens, labels = recall_with_updates(BATCH, PAIRS, vocab=VOCAB, generator=generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(loss.item())
    tokens, labels = recall_with_updates(TESTED, PAIRS, vocab=VOCAB, generator=torch.Generator().manual_seed(1))
    asked = labels != -100
    with torch.no_grad():
        logits = model(tokens)
    return {
        "accuracy": (logits.argmax(-1) == labels)[asked].float().mean().item(),
        "loss": F.cross_entropy(logits[asked], labels[asked]).item(),
        "curve": curve[9::10],
    }


def row(name: str, steps: int, seed: int) -> dict:
    variant = VARIANTS[name]
    about = {"variant": name, "against": variant.against, "change": variant.change, "seed": seed}
    return about | train(variant.kind, steps, seed)


def summary(rows: list[dict]) -> dict[str, dict]:
    """For each variant the median accuracy, the least and the largest, and over how many seeds."""
    found = {}
    for name in VARIANTS:
        values = [r["accuracy"] for r in rows if r.get("variant") == name and r["status"] == "ok"]
        if values:
            found[name] = {
                "median": statistics.median(values), "least": min(values), "most": max(values), "seeds": len(values)
            }  # fmt: skip
    return found


def table(found: dict[str, dict]) -> str:
    lines = [f"{'':24}{'median':>8}{'least':>8}{'most':>8}  against"]
    for name, x in found.items():
        values = "".join(f"{x[key]:8.0%}" for key in ("median", "least", "most"))
        lines.append(f"{name:24}{values}  {VARIANTS[name].against}")
    return "\n".join(lines)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each variant")
    parser.add_argument("--steps", type=int, default=150)


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # one is faster for matrices this small
    if options.smoke:
        options.seeds, options.steps = 1, 2
    settings = settings_of(options, "seeds") | {
        "task": f"recall_with_updates, {PAIRS} pairs, vocabulary {VOCAB}, {BATCH} texts a step, {TESTED} tested",
        "shape": SHAPE,
        "optimiser": "AdamW, learning rate 0.01, no schedule",
    }
    results = Results(options.out, settings, budget=options.budget, smoke=options.smoke)

    def body() -> None:
        for seed in range(options.seeds):
            for name in VARIANTS:
                results.measure(f"{name}, seed {seed}", partial(row, name, options.steps, seed))

    code = results.fill(body)
    results.summary = summary(results.rows)
    return results.finish(table(results.summary), code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="What does each part of a DeltaNet layer do for recall?",
    writes=("ablations.json",),
    minutes=4,
    gpu="none: on one core of a CPU",
    run=run,
    options=options,
    shared=("budget", "smoke"),
)
