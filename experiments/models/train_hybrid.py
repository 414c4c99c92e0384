"""Train a language model for a few minutes and write what happened: the three runs that chapter 6 compares.

    python -m experiments train_hybrid --out book/results/hybrid_training.json
    python -m experiments train_hybrid --corpus wheels.tar.xz --minutes 8 --out ...
    python -m experiments train_hybrid --kind delta --steps 5000 --out book/results/delta_training.json
    python -m experiments train_hybrid --kind attention --steps 5000 --out book/results/attention_training.json

The first seconds time a step on a copy of the model; the number of steps that fits in --minutes is then
fixed, and written down, so that `--steps` repeats the run exactly.  Give other kinds the same --steps, and they
see the same tokens.  The kinds (hybrid, delta, attention: a Transformer++) have the same width, depth, heads and
feed-forward part, which leaves their parameters within a percent of each other: --sizes prints them and stops.
One block of each sort is compiled and serves all (--compile model compiles the whole); a copy of the model takes the
first steps, so that `tokens_per_second` holds no compiling.  `timings` says what was spent outside of training.
--folder keeps checkpoints there, and a killed or stopped run goes on from them.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dn_lib.data import load_corpus
from dn_lib.data.tokens import SEPARATOR
from dn_lib.models import LanguageModel, ModelConfig, generate
from dn_lib.training import (
    TrainConfig,
    bits_per_byte,
    document_windows,
    loss_at_names,
    loss_by_position,
    parses,
    token_losses,
    train,
    windows,
)
from dn_lib.training.distributed import Processes, resolve_device
from dn_lib.training.loop import flop_use
from experiments.harness.cli import Experiment
from experiments.harness.problems import matmul_precision
from experiments.harness.provenance import provenance
from experiments.harness.results import write_json

PROMPTS = ("def ", "class ", "\ndef read_file(path):\n    ")
KINDS: dict[str, dict[str, Any]] = {
    "hybrid": {"mixer": "delta", "hybrid": "window"},
    "delta": {"mixer": "delta", "hybrid": "none"},
    "attention": {"mixer": "attention", "hybrid": "none"},
}
SHAPE = ("width", "layers", "heads", "mixer", "hybrid", "window", "conv_size")


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kind", choices=KINDS, help="sets --mixer and --hybrid")
    add("--sizes", action="store_true", help="print the parameters of every kind at these sizes, and stop")
    add("--folder", type=Path, help="checkpoints and log go here; an earlier run there is resumed")
    add("--corpus", default="stdlib")
    add("--minutes", type=float, default=5.5, help="training time, evaluations left out")
    add("--steps", type=int, default=0, help="a fixed number of steps instead")
    add("--mixer", default="delta")
    add("--hybrid", default="window")
    add("--width", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=4)
    add("--window", type=int, default=256)
    add("--conv-size", type=int, default=4)
    add("--batch", type=int, default=64)
    add("--length", type=int, default=1024)
    add("--accumulate", type=int, default=1)
    add("--learning-rate", type=float, default=2e-3)
    add("--warmup", type=int, default=200)
    add("--weight-decay", type=float, default=0.1)
    add("--evaluations", type=int, default=16, help="how many evaluations, spread over the run")
    add("--evaluation-tokens", type=int, default=1 << 19)
    add("--checkpoint-every", type=int, default=2000, help="steps; a checkpoint takes a second or two")
    add(
        "--compile",
        choices=("blocks", "model", "none"),
        default="blocks",
        help="blocks: one block of each sort, which serves all of its sort (the quickest to compile); CUDA only",
    )
    add("--precision", default="auto")
    add("--device", default="auto")
    add("--samples", type=int, default=16, help="samples for each prompt, to see how many parse")
    add("--sample-tokens", type=int, default=256)


def sizes(options, vocab_size: int = 256) -> dict[str, int]:
    """Parameters of every kind at the sizes in `options`."""
    fixed: dict[str, Any] = {name: getattr(options, name) for name in SHAPE if name not in ("mixer", "hybrid")}
    with torch.device("meta"):
        models = {
            kind: LanguageModel(ModelConfig(vocab_size=vocab_size, **fixed | part)) for kind, part in KINDS.items()
        }
    return {kind: model.num_parameters() for kind, model in models.items()}


def compile_blocks(model: LanguageModel, wanted: bool) -> None:
    """Compile each block, or take that back: what generates, one token at a time, must not be compiled anew."""
    for block in model.blocks:
        if wanted:
            block.compile(dynamic=False)
        else:
            block._compiled_call_impl = None


@torch.no_grad()
def sample(model, tokenizer, options, prompts=PROMPTS) -> list[dict]:
    """`--samples` continuations of each prompt, and whether each parses."""
    device = next(model.parameters()).device
    found = []
    for prompt in prompts:
        start = torch.tensor([SEPARATOR, *tokenizer.encode(prompt).tolist()], device=device)
        generator = torch.Generator(device).manual_seed(options.seed)
        rows = generate(
            model,
            start.expand(options.samples, -1),
            options.sample_tokens,
            temperature=0.7,
            top_k=None,
            generator=generator,
        )
        for row in rows.tolist():
            row = row[1:]
            text = tokenizer.decode(row[: row.index(SEPARATOR)] if SEPARATOR in row else row)
            found.append({"prompt": prompt, "text": text, "parses": parses(text)})
    return found


def measure(model, corpus, options) -> dict:
    """Bits per byte, loss by position and loss at names, on the validation part."""
    batch = max(options.batch // options.accumulate, 1)
    common = {"batch": batch, "precision": options.precision}
    loss = token_losses(model, windows(corpus.validation, options.length, 4 * options.evaluation_tokens), **common)
    mean = loss.double().mean().item()
    edges, means = loss_by_position(loss, bins=32)
    result = {"loss": mean, "bits_per_byte": bits_per_byte(mean, corpus.bytes_per_token), "tokens": loss.numel()}
    result |= {"loss_by_position": {"position": edges, "loss": means}}
    if corpus.tokenizer.name == "bytes":
        result["loss_at_names"] = loss_at_names(
            model, document_windows(corpus.validation, options.length, 256), **common
        )
    return result


def decode_cost(model, options) -> dict:
    """Seconds a token and bytes of cache at growing context, one sequence at a time."""
    device = next(model.parameters()).device
    points = []
    for context in (256, 1024, 4096, 16384):
        tokens = torch.randint(1, 128, (1, context), device=device)
        cache = model.new_cache(1)
        # In pieces, so that a long context needs no more memory than a short one.
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for piece in tokens.split(2048, dim=1):
                model.features(piece, cache)
            for step in range(24):
                if step == 8:
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    began = time.perf_counter()
                model.logits(model.features(tokens[:, :1], cache))
            if device.type == "cuda":
                torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / 16
        points.append({"context": context, "seconds_per_token": seconds, "cache_bytes": cache.bytes()})
    return {"points": points}


def prepared(model, corpus, config, options, blocks: bool) -> TrainConfig:
    """`config` with its number of steps: those that fit in --minutes, unless --steps says it.

    A copy of the model takes the first steps, so that compiling is no part of the time of training.
    """
    probe = copy.deepcopy(model)  # without what is compiled; the code that its blocks make is found again
    compile_blocks(probe, blocks)

    def timed(steps: int) -> float:
        short = replace(config, steps=steps, warmup=0, evaluate_every=0, evaluation_tokens=0, log_every=steps)
        begun = time.perf_counter()
        train(probe, corpus, short)  # ends by reading the losses, so the device is done too
        return time.perf_counter() - begun

    timed(2)
    if options.steps:
        return config
    return replace(config, steps=max(int(60 * options.minutes / (timed(20) / 20)), 10))


class Stopwatch:
    """Seconds of each part of the script, for `result["timings"]`."""

    def __init__(self):
        self.mark, self.parts = time.perf_counter(), {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.parts[name] = round(now - self.mark, 2)
        self.mark = now
        print(f"[{name}: {self.parts[name]:.1f} s]", flush=True)


@matmul_precision("high")
def run(options: argparse.Namespace) -> int:
    watch = Stopwatch()
    if options.sizes:
        for kind, count in sizes(options).items():
            print(f"{kind:10s} {count:,}")
        return 0
    vars(options).update(KINDS.get(options.kind, {}))
    device = resolve_device(options.device)
    corpus = load_corpus(options.corpus)
    torch.manual_seed(options.seed)
    shape = ModelConfig(vocab_size=corpus.vocab_size, **{name: getattr(options, name) for name in SHAPE})
    model = LanguageModel(shape).to(device)
    print(f"{model.num_parameters():,} parameters, mixers {', '.join(shape.mixers())}, on {device}", flush=True)
    watch.lap("corpus and model")
    few = argparse.Namespace(**{**vars(options), "samples": 1, "sample_tokens": min(options.sample_tokens, 100)})
    before = sample(model.eval(), corpus.tokenizer, few, PROMPTS[:1])
    watch.lap("sample before")
    compiles = options.compile if device.type == "cuda" else "none"
    config = TrainConfig(
        steps=options.steps or 1000,
        batch=options.batch,
        length=options.length,
        accumulate=options.accumulate,
        learning_rate=options.learning_rate,
        min_learning_rate=options.learning_rate / 10,
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        evaluation_tokens=options.evaluation_tokens,
        checkpoint_every=options.checkpoint_every,
        compile=compiles == "model",
        precision=options.precision,
        device=str(device),
        log_every=20,
        seed=options.seed,
    )
    compile_blocks(model, compiles == "blocks")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="train_hybrid_"))
    began_with = folder / "config.json"
    if began_with.exists():  # resuming: the number of steps was fixed when the run began
        config = TrainConfig.from_dict(json.loads(began_with.read_text()))
    else:
        config = prepared(model, corpus, config, options, compiles == "blocks")
    if not began_with.exists():
        config = replace(
            config,
            warmup=min(options.warmup, max(config.steps // 10, 1)),
            evaluate_every=max(config.steps // options.evaluations, 1),
        )
        write_json(began_with, config.to_dict())
    watch.lap("compiling and timing a step")
    print(f"{config.steps} steps of {config.tokens_per_step:,} tokens, checkpoints in {folder}", flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    history = train(
        model,
        corpus,
        config,
        folder=folder,
        resume=True,
        progress=sys.stderr.isatty(),
        report=lambda r: print(
            f"step {r['step']:6d}  {r['bits_per_byte']:.4f} bits per byte  {r['seconds']:7.1f} s", flush=True
        ),
    )
    wall = time.perf_counter() - started
    watch.lap("training, evaluations and checkpoints")
    if history.stopped:
        print(f"stopped; the same command with --folder {folder} goes on")
        return 1
    model.eval()
    place = Processes(0, 1, device)
    stride = max(len(history.steps) // 1000, 1)
    result = {
        "provenance": provenance(seed=options.seed),
        "kind": next((kind for kind, part in KINDS.items() if part == _mixing(shape)), shape.mixer),
        "model": {
            **shape.to_dict(),
            "mixers": list(shape.mixers()),
            "parameters": model.num_parameters(),
            "flops_per_token": model.flops_per_token(options.length),
        },
        "train": config.to_dict(),
        "compile": compiles,
        "corpus": corpus.facts | {"train_tokens": len(corpus.train)},
        "seeds": [options.seed],
        "training_tokens": config.steps * config.tokens_per_step,
        "seconds": history.steps[-1]["seconds"],
        "wall_seconds": wall,
        "tokens_per_second": history.tokens_per_second,
        "flop_use": flop_use(model, options.length, history.tokens_per_second, place),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "steps": [{k: round(v, 6) for k, v in record.items()} for record in history.steps[stride - 1 :: stride]],
        "evaluations": history.evaluations,
        "samples_before": before,
    }
    result["final"] = measure(model, corpus, options)
    watch.lap("measures")
    compile_blocks(model, False)
    result["samples"] = sample(model, corpus.tokenizer, options)
    result["share_that_parses"] = sum(s["parses"] for s in result["samples"]) / len(result["samples"])
    watch.lap("samples")
    result["decode"] = decode_cost(model, options)
    watch.lap("decoding")
    result["timings"] = watch.parts
    write_json(options.out, result)
    print(
        f"{result['final']['bits_per_byte']:.4f} bits per byte, "
        f"{history.tokens_per_second:,.0f} tokens/s, {options.out}"
    )
    return 0


def _mixing(shape: ModelConfig) -> dict[str, str]:
    return {"mixer": shape.mixer, "hybrid": shape.hybrid}


EXPERIMENT = Experiment(
    question="How well do a DeltaNet, a hybrid and a Transformer of equal size learn the same tokens?",
    writes=tuple(f"{kind}_training.json" for kind in KINDS),
    minutes=2,
    gpu="H200, each with 1,264 steps on the text of `python -m dn_lib prepare-data wheels`",
    run=run,
    options=options,
    shared=("seed",),
    each=tuple(("--kind", kind, "--corpus", "wheels.tar.xz", "--steps", "1264") for kind in KINDS),
    dry=("sizes",),
)
