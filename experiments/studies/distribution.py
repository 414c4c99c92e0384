"""What states in 8 bits do to a model's predictions, by position.

Small models (linear attention, delta rule, gated delta rule) are trained on the standard library's text.  Each then
reads windows of the validation text token by token.  After each token the states of all layers are stored: as they are,
in 8 bits with a scale for each row and nearest rounding, or the same with random rounding.  The rows of one batch are
stored in the three ways, so that all else is the same.  A row holds the loss in bits per byte, for each way and each
quarter of the window, and how far the first layer's state is from the one that is stored as it is.

Prediction, written down before any run: with nearest rounding the loss of the delta rule and of the gated delta rule
rises by less than 1% in each quarter, and by no more in the last than in the second.  Linear attention's rises with
the position.  Random rounding is worse than nearest rounding, by a factor of about the root of two in the error of the
state.  Two seeds.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.data import Corpus, load_corpus, split_text
from dn_lib.forms.serving import dequantise_state, quantise_state
from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.testing import relative_error
from dn_lib.training import TrainConfig, train, windows
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.results import Results

MIXERS = ("linear", "delta", "gated_delta")
WAYS = ("as it is", "nearest", "random")
SEEDS = 2
MODEL: dict[str, Any] = {"width": 256, "layers": 4, "heads": 4}
TINY: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2}


def store(state: Tensor, generator: torch.Generator) -> Tensor:
    """States `[3 n, H, d_k, d_v]`: the first third as it is, the second rounded to the nearest, the last at random."""
    kept, nearest, random = state.chunk(3)
    rounded = dequantise_state(*quantise_state(nearest)), dequantise_state(*quantise_state(random, generator=generator))
    return torch.cat([kept, *rounded])


@torch.no_grad()
def read(model: LanguageModel, text: Tensor, seed: int) -> dict:
    """The row of one model, which reads text `[n, L + 1]` three times at once."""
    tokens = text.repeat(len(WAYS), 1)
    generator = torch.Generator(tokens.device).manual_seed(seed)
    cache, length = model.new_cache(len(tokens)), tokens.shape[1] - 1
    losses = torch.empty(len(tokens), length, device=tokens.device)
    for t in range(length):
        logits = model(tokens[:, t : t + 1], cache)[:, 0]
        losses[:, t] = F.cross_entropy(logits.float(), tokens[:, t + 1], reduction="none")
        for layer in cache.layers:
            layer["state"] = store(layer["state"], generator)
    quarters = losses.unflatten(1, (4, -1)).unflatten(0, (len(WAYS), -1)).mean((1, 3)) / math.log(2)
    kept, *others = cache.layers[0]["state"].chunk(3)
    return {
        "bits_per_byte": dict(zip(WAYS, quarters.tolist(), strict=True)),
        "state_error": {way: relative_error(x, kept) for way, x in zip(WAYS[1:], others, strict=True)},
    }


def cell(mixer: str, seed: int, corpus: Corpus, device: str, smoke: bool) -> dict:
    """Train one model and let it read."""
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig(**(TINY if smoke else MODEL), mixer=mixer)).to(device)
    sizes: dict[str, Any] = {"steps": 1500, "batch": 32, "length": 512}
    if smoke:
        sizes = {"steps": 4, "batch": 4, "length": 24, "warmup": 1}
    history = train(model, corpus, TrainConfig(**sizes, evaluate_every=0, seed=seed, device=device))
    length, count = (32, 2) if smoke else (2048, 8)
    text = windows(corpus.validation, length, length * count).to(device)
    last = [record["loss"] for record in history.steps[-1:]]
    return {"mixer": mixer, "seed": seed, "training_loss": last, "windows": len(text), "length": length} | read(
        model.eval(), text, seed
    )


def run(options: argparse.Namespace) -> int:
    device = device_of(options.smoke)
    small = "".join(f"name_{i % 37} = value({i % 11})\n" for i in range(400)).encode()
    corpus = split_text(small, name="text") if options.smoke else load_corpus("stdlib")
    results = Results(options.out, settings_of(options), budget=options.budget, smoke=options.smoke)

    def body() -> None:
        for mixer in MIXERS:
            for seed in range(1 if options.smoke else SEEDS):
                settings = (mixer, seed, corpus, device, options.smoke)
                results.measure(f"{mixer}, seed {seed}", lambda s=settings: cell(*s))

    code, lines = results.fill(body), []
    for row in results.done:
        cells = [f"{way}: " + " ".join(f"{x:.4f}" for x in row["bits_per_byte"][way]) for way in WAYS]
        lines.append(f"{row['key']:24} {' | '.join(cells)}")
    return results.finish("\n".join(lines), code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="Does a state in 8 bits change what a model predicts, and more so the longer it reads?",
    writes=("distribution.json",),
    minutes=7,
    gpu="H200",
    run=run,
    shared=("budget", "smoke"),
    measured=False,
)
