"""Train a hybrid language model for a few minutes and write what happened to a JSON file.

    python benchmarks/train_hybrid.py --out book/results/hybrid_training.json
    python benchmarks/train_hybrid.py --corpus wheels.tar.xz --minutes 8 --out ...
    python benchmarks/train_hybrid.py --mixer attention --hybrid none --steps 2000 --out ...

The first seconds time a step on a copy of the model; the number of steps that fits in --minutes is then
fixed, and written down, so that `--steps` repeats the run exactly.  Give other mixers the same --steps:
they then see the same tokens.  --folder keeps checkpoints there, and a killed run goes on from them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_lib  # noqa: F401  (before anything that imports triton)

# isort: split
import torch
from provenance import provenance

from dn_lib.data import load_corpus
from dn_lib.data.tokens import SEPARATOR
from dn_lib.models import LanguageModel, ModelConfig, generate
from dn_lib.training import (
    TrainConfig,
    document_windows,
    evaluate,
    loss_at_names,
    loss_by_position,
    parses,
    steps_within,
    token_losses,
    train,
    windows,
)
from dn_lib.training.distributed import Processes, resolve_device
from dn_lib.training.loop import flop_use

PROMPTS = ("def ", "class ", "import ", "\ndef read_file(path):\n    ", "# ")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the JSON file to write")
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
    add("--evaluations", type=int, default=20, help="how many evaluations, spread over the run")
    add("--evaluation-tokens", type=int, default=1 << 19)
    add("--checkpoint-every", type=int, default=500)
    add("--no-compile", action="store_true", help="leave torch.compile off")
    add("--precision", default="auto")
    add("--device", default="auto")
    add("--seed", type=int, default=0)
    add("--samples", type=int, default=8, help="samples for each prompt, to see how many parse")
    add("--sample-tokens", type=int, default=512)
    return parser.parse_args()


@torch.no_grad()
def sample(model, tokenizer, options) -> list[dict]:
    """`--samples` continuations of each prompt, and whether each parses."""
    device = next(model.parameters()).device
    found = []
    for prompt in PROMPTS:
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
    rows = windows(corpus.validation, options.length, 4 * options.evaluation_tokens)
    edges, means = loss_by_position(token_losses(model, rows, **common), bins=32)
    result = evaluate(model, corpus, length=options.length, limit=4 * options.evaluation_tokens, **common)
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
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            model.features(tokens, cache)  # past torch.compile, which would compile every shape
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


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, path)


def main() -> None:
    options = arguments()
    device = resolve_device(options.device)
    torch.set_float32_matmul_precision("high")
    corpus = load_corpus(options.corpus)
    torch.manual_seed(options.seed)
    names = ("width", "layers", "heads", "mixer", "hybrid", "window", "conv_size")
    shape = ModelConfig(vocab_size=corpus.vocab_size, **{name: getattr(options, name) for name in names})
    model = LanguageModel(shape).to(device)
    print(f"{model.num_parameters():,} parameters, mixers {', '.join(shape.mixers())}, on {device}", flush=True)
    before = sample(model.eval(), corpus.tokenizer, argparse.Namespace(**{**vars(options), "samples": 1}))
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
        compile=not options.no_compile and device.type == "cuda",
        precision=options.precision,
        device=str(device),
        log_every=20,
        seed=options.seed,
    )
    folder = options.folder or Path(tempfile.mkdtemp(prefix="train_hybrid_"))
    began_with = folder / "config.json"
    if began_with.exists():  # resuming: the number of steps was fixed when the run began
        config = TrainConfig.from_dict(json.loads(began_with.read_text()))
    elif not options.steps:
        config = steps_within(60 * options.minutes, model, corpus, config, trial=20)
    if not began_with.exists():
        config = replace(
            config,
            warmup=min(options.warmup, max(config.steps // 10, 1)),
            evaluate_every=max(config.steps // options.evaluations, 1),
        )
        write(began_with, config.to_dict())
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
    if history.stopped:
        sys.exit(f"stopped; the same command with --folder {folder} goes on")
    model.eval()
    place = Processes(0, 1, device)
    stride = max(len(history.steps) // 1000, 1)
    result = {
        "provenance": provenance(seed=options.seed),
        "model": {
            **shape.to_dict(),
            "mixers": list(shape.mixers()),
            "parameters": model.num_parameters(),
            "flops_per_token": model.flops_per_token(options.length),
        },
        "train": config.to_dict(),
        "corpus": corpus.facts,
        "seeds": [options.seed],
        "training_tokens": config.steps * config.tokens_per_step,
        "seconds": history.steps[-1]["seconds"],
        "wall_seconds": wall,
        "tokens_per_second": history.tokens_per_second,
        "flop_use": flop_use(model, options.length, history.tokens_per_second, place),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "steps": [{k: round(v, 6) for k, v in record.items()} for record in history.steps[stride - 1 :: stride]],
        "evaluations": history.evaluations,
        "final": measure(model, corpus, options),
        "decode": decode_cost(model, options),
        "samples_before": before,
        "samples": sample(model, corpus.tokenizer, options),
    }
    result["share_that_parses"] = sum(s["parses"] for s in result["samples"]) / len(result["samples"])
    write(options.out, result)
    print(
        f"{result['final']['bits_per_byte']:.4f} bits per byte, "
        f"{history.tokens_per_second:,.0f} tokens/s, {options.out}"
    )


if __name__ == "__main__":
    main()
