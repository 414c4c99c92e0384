"""More memory at equal bytes, and a Transformer's weights in layers with a state.

Recall.  Multi-query recall, 256 tokens and 64 pairs, of models whose states hold the same numbers per layer, and of one
small state: a mixture of four memories and a shared one, with one and with two active memories (with one, no gradient
but that of the balance loss reaches the router); Gated DeltaNet with wide keys; with wider heads.  One and two layers.
A row holds the accuracy, its curve in training, and of a mixture the `agreement` of each layer's router: the share of a
question's weight that falls on memories to which the value's token went.  By chance it is 25% with one active memory
and 50% with two.

Text.  A Transformer is trained on the standard library's text, and its weights are carried over (Liger).  Then, on the
same tokens: both halves, the window alone and the recurrent half alone with LoRA, and a Liger model from scratch; and
conversions of which a quarter and a half of the layers stay attention.  A row holds bits per byte at the start and the
end, and the share of digits recalled in assignments that are told twice, by the number of pairs (8 pairs reach beyond
the window).

Predictions, written down before any run.  With one layer and one active memory, the agreement is between 20% and 38%,
and the accuracy is above that of the small state, by at most 30 points.  In two layers with two active memories, the
second router agrees more than the first by at least 10 points; with one active memory, by less.  With one active memory
and two layers, the mixture is below the wide keys, and above the wider heads only where it agrees in more than 80% of
cases.  On text, the window
alone is within 1% of both halves; the recurrent half alone is worse by more than 5%; the model from scratch ends above
all converted ones.  Of 8 pairs, all that were converted without attention recall fewer than 20% of the digits beyond
what they guess.  Two seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_lib.data import Corpus, load_corpus, split_text
from dn_lib.data.recall import IGNORE, multi_query_associative_recall
from dn_lib.layers import Liger, MixtureOfMemories
from dn_lib.layers.mom import balance_losses
from dn_lib.models import LanguageModel, ModelConfig, to_liger
from dn_lib.models.lora import add_lora
from dn_lib.training import TrainConfig, evaluate, recall_of_assignments, train
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.results import Results

# Numbers in the states of a layer of two heads: 512, and 2,560 (2,592 of the wider heads).
KINDS: dict[str, dict] = {
    "small state": {"mixer": "gated_delta", "head_dim": 16, "expand_v": 1.0},
    "mixture": {"mixer": "mom", "head_dim": 16, "expand_v": 1.0, "memories": 4, "active_memories": 1},
    "mixture, two active": {"mixer": "mom", "head_dim": 16, "expand_v": 1.0, "memories": 4, "active_memories": 2},
    "wide keys": {"mixer": "gated_delta", "head_dim": 80, "expand_v": 0.2},
    "wider heads": {"mixer": "gated_delta", "head_dim": 36, "expand_v": 1.0},
}
SEEDS = 2
BALANCE = 0.01  # the factor of the balance loss, as in the paper's configurations
TASK = {"length": 256, "pairs": 64, "vocab": 512, "batch": 64, "steps": 1000, "test": 512}
SMALL_TASK = {"length": 32, "pairs": 4, "vocab": 32, "batch": 2, "steps": 2, "test": 4}
TEXT = {"width": 256, "layers": 8, "heads": 4, "window": 64, "length": 512, "batch": 32, "steps": 1000, "after": 150}
SMALL_TEXT = {"width": 16, "layers": 2, "heads": 2, "window": 4, "length": 16, "batch": 2, "steps": 2, "after": 2}


# --- Recall ---------------------------------------------------------------------------------------------------------
def draw(n: int, task: dict, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return multi_query_associative_recall(
        n, task["length"], task["pairs"], vocab=task["vocab"], power=1.0, generator=generator
    )


@torch.no_grad()
def agreements(model: LanguageModel, tokens: Tensor, pairs: int) -> list[float]:
    """Of each mixture, the share of the question's weight on memories that the value's token wrote; tokens `[n, L]`.

    With one active memory: how often both go to the same one.  The shared memory is left out.
    The task has its pairs first, key and value by turns, and then each key once among zeros.
    """
    seen: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, MixtureOfMemories)]

    def hook(layer: MixtureOfMemories) -> Callable:
        def keep(_module: object, _inputs: object, logits: Tensor) -> None:
            top = logits.float().topk(layer.active, dim=-1)
            seen.append(torch.zeros_like(logits.float()).scatter(-1, top.indices, top.values.softmax(-1)))

        return keep

    hooks = [layer.router.register_forward_hook(hook(layer)) for layer in layers]
    try:
        model(tokens)
    finally:
        for handle in hooks:
            handle.remove()
    keys, rest = tokens[:, 0 : 2 * pairs : 2], tokens[:, 2 * pairs :]
    asked = 2 * pairs + (keys[:, :, None] == rest[:, None]).int().argmax(-1)
    found = []
    for weights in seen:
        written, read = weights[:, 1 : 2 * pairs : 2] > 0, weights.take_along_dim(asked[..., None], 1)
        found.append((read * written).sum(-1).double().mean().item())
    return found


@torch.no_grad()
def accuracy(model: LanguageModel, tokens: Tensor, labels: Tensor, batch: int) -> float:
    right = [
        (model(x).argmax(-1) == y)[y != IGNORE] for x, y in zip(tokens.split(batch), labels.split(batch), strict=True)
    ]
    return torch.cat(right).double().mean().item()


def recall_cell(kind: str, layers: int, seed: int, task: dict, device: str) -> dict:
    """Train one model on recall and ask it."""
    torch.manual_seed(seed)
    shape = {"vocab_size": task["vocab"], "width": 128, "layers": layers, "heads": 2, "mlp_ratio": 0}
    model = LanguageModel(ModelConfig(**shape, **KINDS[kind])).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    generator = torch.Generator(device).manual_seed(seed)
    mixture, curve = KINDS[kind]["mixer"] == "mom", []
    for step in range(task["steps"]):
        for group in optimiser.param_groups:
            done = step / task["steps"]
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        tokens, labels = draw(task["batch"], task, generator)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if mixture:
                with balance_losses(model) as balance:
                    logits = model(tokens)
            else:
                logits, balance = model(tokens), []
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        total = loss + BALANCE * torch.stack(balance).sum() if balance else loss
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % max(1, task["steps"] // 20) == 0:
            curve.append([step + 1, round(loss.item(), 4)])
    tokens, labels = draw(task["test"], task, torch.Generator(device).manual_seed(12345))
    row = {"part": "recall", "kind": kind, "layers": layers, "seed": seed, "parameters": model.num_parameters()}
    row |= {"accuracy": accuracy(model, tokens, labels, task["batch"]), "curve": curve}
    few = tokens[: task["batch"]]
    return row | ({"agreement": agreements(model, few, task["pairs"])} if mixture else {})


# --- Text -----------------------------------------------------------------------------------------------------------
def conversions(layers: int) -> dict[str, dict]:
    """What is tried: the share of the recurrent half, layers that stay attention, whether it starts from scratch."""
    return {
        "both halves": {"share": 0.5},
        "window alone": {"share": 0.0},
        "recurrent half alone": {"share": 1.0},
        "a quarter stays": {"share": 0.5, "keep": range(0, layers, 4)},
        "half stays": {"share": 0.5, "keep": range(0, layers, 2)},
        "from scratch": {"share": 0.5, "scratch": True},
    }


def measures(model: LanguageModel, corpus: Corpus, text: dict, pairs: tuple[int, ...]) -> dict:
    bits = evaluate(model, corpus, length=text["length"], limit=1 << 18, batch=text["batch"])["bits_per_byte"]
    recalled = recall_of_assignments(model, pairs, n=32)
    return {"bits_per_byte": bits, "digits": {str(n): found["digits"] for n, found in recalled.items()}}


def text_cell(seed: int, corpus: Corpus, text: dict, device: str) -> dict:
    """Train a Transformer and all that is made of it."""
    torch.manual_seed(seed)
    sizes = {name: text[name] for name in ("width", "layers", "heads")}
    transformer = LanguageModel(ModelConfig(vocab_size=256, mixer="attention", **sizes))
    common = {"batch": text["batch"], "length": text["length"], "evaluate_every": 0, "device": device}
    warmup = max(1, text["steps"] // 20)
    train(transformer, corpus, TrainConfig(steps=text["steps"], warmup=warmup, seed=seed, **common))
    pairs = (2, 8) if text["length"] >= 256 else (1, 2)
    row: dict = {"part": "text", "seed": seed, "tokens": text["steps"] * text["batch"] * text["length"]}
    row["Transformer"] = measures(transformer, corpus, text, pairs)
    again = TrainConfig(steps=text["after"], warmup=max(1, text["after"] // 20), seed=seed + 100, **common)
    row["tokens_after"] = again.steps * again.tokens_per_step
    for name, change in conversions(text["layers"]).items():
        model = to_liger(transformer, window=text["window"], keep=change.get("keep", ()))
        if change.get("scratch"):
            torch.manual_seed(seed + 1)
            model = LanguageModel(model.config).to(device)
        for block in model.blocks:
            if isinstance(block.mixer, Liger):
                block.mixer.share = change["share"]
        before = measures(model, corpus, text, pairs)
        if not change.get("scratch"):
            add_lora(model, rank=8)
        train(model, corpus, again)
        row[name] = {"before": before, "after": measures(model, corpus, text, pairs)}
    return row


# --- The file -------------------------------------------------------------------------------------------------------
def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if row["part"] == "recall":
            agreed = " ".join(f"{x:.0%}" for x in row.get("agreement", []))
            lines.append(f"{row['key']:42} {row['accuracy']:6.1%}  {agreed}")
        else:
            lines.append(f"{row['key']:42} Transformer {row['Transformer']['bits_per_byte']:.3f}")
            for name, found in row.items():
                if isinstance(found, dict) and "after" in found:
                    bits = (found[when]["bits_per_byte"] for when in ("before", "after"))
                    lines.append(f"  {name:40} {' -> '.join(f'{x:.3f}' for x in bits)}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    device = device_of(options.smoke)
    task, text = (SMALL_TASK, SMALL_TEXT) if options.smoke else (TASK, TEXT)
    results = Results(options.out, settings_of(options, "parts"), budget=options.budget, smoke=options.smoke)

    def body() -> None:
        for seed in range(1 if options.smoke else SEEDS):
            if "recall" in options.parts:
                for layers in (1, 2):
                    for kind in KINDS:
                        cell = (kind, layers, seed, task, device)
                        results.measure(f"{kind}, layers {layers}, seed {seed}", lambda c=cell: recall_cell(*c))
            if "text" in options.parts:
                lines = "".join(f"name_{i % 37} = value({i % 11})\n" for i in range(400)).encode()
                corpus = split_text(lines, name="text") if options.smoke else load_corpus("stdlib")
                work = (seed, corpus, text, device)
                results.measure(f"text, seed {seed}", lambda w=work: text_cell(*w))

    code = results.fill(body)
    return results.finish(table(results.done), code, failed=results.not_done)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=("recall", "text"), default=["recall", "text"], help="only these")


EXPERIMENT = Experiment(
    question="Does a mixture of memories recall more than other states of its bytes? What does a borrowed model keep?",
    writes=("memory.json",),
    minutes=9,
    gpu="H200, in cells of a quarter of a minute (recall) and two minutes (text)",
    run=run,
    options=options,
    shared=("budget", "smoke"),
    measured=False,
)
