"""Training and decoding speed of 340M-parameter models on one GPU, side by side in one process.

    python benchmarks/throughput.py --out book/results/throughput.json [--only delta,attention,fla] [--profile]

Training: 24 layers, width 1024, 8 heads, vocabulary 32,000, bfloat16, AdamW included, at equal tokens a step:
2048 x 16, 8192 x 4, 16384 x 2.  `delta` is our DeltaNet, `attention` our Transformer (flash attention through
SDPA), both compiled; `fla` is flash-linear-attention's DeltaNetForCausalLM with its fused norm, SwiGLU and
cross-entropy, where that package is installed (extra `bench`).  Candidates take turns, so that a slow minute
hits all of them.  Decoding: tokens a second and bytes of cache after contexts of 1K to 64K.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dn_lib  # noqa: F401  (before anything that imports triton)

# isort: split
import torch
import torch.nn.functional as F
from provenance import package_version, provenance

from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.training.distributed import Processes
from dn_lib.training.loop import flop_use

SHAPE = {"vocab_size": 32000, "width": 1024, "layers": 24, "heads": 8}
TRAINING = ((2048, 16), (8192, 4), (16384, 2))
CONTEXTS = (1024, 4096, 16384, 65536)


def ours(mixer: str, options):
    """(model, function of tokens that returns the loss)."""
    shape = {**SHAPE, "layers": options.layers, "width": options.width, "mixer": mixer}
    model = LanguageModel(ModelConfig(**shape)).to(options.device)

    def loss_of(tokens):
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return model, loss_of if options.no_compile else torch.compile(loss_of)


def fla(options):
    """The peer, as its own configuration makes it."""
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM

    config = DeltaNetConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_heads=SHAPE["heads"],
        fuse_norm=True,
        fuse_swiglu=True,
        fuse_cross_entropy=True,
        tie_word_embeddings=False,
    )
    model = DeltaNetForCausalLM(config).to(options.device)
    return model, lambda tokens: model(input_ids=tokens[:, :-1].contiguous(), labels=tokens[:, :-1]).loss


def build(name: str, options):
    torch.manual_seed(options.seed)
    return fla(options) if name == "fla" else ours(name, options)


def training_step(model, loss_of, optimiser, tokens):
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        loss = loss_of(tokens)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def timed(function, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, by the GPU's own clock."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]


def training(name: str, length: int, batch: int, options) -> dict:
    """Tokens a second, peak memory and model-FLOP use of a whole step."""
    torch.cuda.empty_cache()
    model, loss_of = build(name, options)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(SHAPE["vocab_size"], (batch, length + 1), device=options.device)
    for _ in range(options.warmup):
        training_step(model, loss_of, optimiser, tokens)
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: training_step(model, loss_of, optimiser, tokens), options.repeats)
    speed = batch * length / statistics.median(seconds)
    found = {
        "name": name,
        "length": length,
        "batch": batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "tokens_per_second": speed,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
    if name != "fla":
        found["flop_use"] = flop_use(model, length, speed, Processes(0, 1, torch.device(options.device)))
    if options.profile:
        found["profile"] = profile(lambda: training_step(model, loss_of, optimiser, tokens))
    return found


def profile(function, rows: int = 20) -> list[dict]:
    """Where the time of one call goes: the kernels that take most of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        function()
        torch.cuda.synchronize()
    events = sorted(record.key_averages(), key=lambda event: -event.self_device_time_total)[:rows]
    return [
        {"kernel": event.key[:100], "calls": event.count, "milliseconds": event.self_device_time_total / 1000}
        for event in events
    ]


@torch.inference_mode()
def decoding(name: str, context: int, options) -> dict:
    """Tokens a second and bytes of cache of one sequence after `context` tokens; our models only."""
    model, _ = ours(name, options)
    model = model.eval().to(torch.bfloat16)
    cache = model.new_cache(1)
    tokens = torch.randint(SHAPE["vocab_size"], (1, 4096), device=options.device)
    for start in range(0, context, 4096):  # in pieces: the logits of a whole prompt are not needed
        model.features(tokens[:, : min(4096, context - start)], cache)

    def step():
        model.logits(model.features(tokens[:, :1], cache))

    for _ in range(4):
        step()
    seconds = timed(step, options.repeats)
    return {
        "name": name,
        "context": context,
        "seconds": seconds,
        "tokens_per_second": 1 / statistics.median(seconds),
        "cache_bytes": cache.bytes(),
    }


def attempt(function, *arguments) -> dict:
    """The measurement, or what stood in its way: a candidate that fails must not take the others along."""
    try:
        found = function(*arguments)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        found = {"name": arguments[0], "size": arguments[1], "error": " ".join(str(error).split())[:300]}
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    print(json.dumps({k: v for k, v in found.items() if k not in ("seconds", "profile")}), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="delta,attention,fla", help="which models, separated by commas")
    parser.add_argument("--lengths", default="2048,8192,16384")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each candidate at each length")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps in a turn")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--width", type=int, default=SHAPE["width"])
    parser.add_argument("--layers", type=int, default=SHAPE["layers"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU")
    options.device = "cuda"
    torch.set_float32_matmul_precision("high")
    names, lengths = options.only.split(","), [int(length) for length in options.lengths.split(",")]
    result = {"provenance": provenance(seed=options.seed, fla=package_version("flash-linear-attention"))}
    result |= {"shape": SHAPE | {"width": options.width, "layers": options.layers}, "training": [], "decoding": []}
    for length, batch in TRAINING:
        for turn in range(options.rounds if length in lengths else 0):
            for name in names:
                result["training"].append({"round": turn, **attempt(training, name, length, batch, options)})
    for context in () if options.no_decode else CONTEXTS:
        result["decoding"] += [attempt(decoding, name, context, options) for name in names if name != "fla"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    part = options.out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, options.out)


if __name__ == "__main__":
    main()
