"""Training and decoding speed of 340M-parameter models on one GPU, side by side in one process.

    python -m experiments throughput --tune-only --only fla [--budget 200]
    python -m experiments throughput --profile [--only delta,attention,fla]

Training: 24 layers, width 1024, 8 heads, vocabulary 32,000, bfloat16, AdamW included, at equal tokens a step:
2048 x 16, 8192 x 4, 16384 x 2.  `delta` is our DeltaNet, `attention` our Transformer (flash attention through
SDPA); one block of each is compiled and serves all 24, and so is the loss.  `fla` is flash-linear-attention's
DeltaNetForCausalLM with its fused norm, SwiGLU and cross-entropy, where that package is installed (extra
`bench`).  Each model is built once and stays; candidates take turns, so that a slow minute hits all of them.

Rows `train NAME LENGTH round N` hold tokens_per_second, flop_use and peak_bytes (of that candidate alone: what the
others hold is taken off); `profile NAME 8192`, with --profile, where the time of a step goes, by categories told from
kernels' names, and what the GPU idled; `decode NAME CONTEXT` tokens a second and bytes of cache of one sequence after
contexts of 1K to 64K.  `settings.fairness` says what is equal and what is not.

fla tunes every kernel at its first step, for minutes, and for this number of heads even if others were tuned before.
The budget cannot interrupt a row, so where a command has little time, tune first, with a cache that is kept
(TRITON_CACHE_DIR).  --tune-only does that, at one length, and says which kernel it is at; repeat it until it exits with
0 instead of 2.  A step has as many tokens at every length, so the other lengths find most choices made.  Most of that
time is the compiler's, so --workers processes, each with about 6 GiB of the GPU, compile all configurations first, and
the one that tunes has only to time them.  --fla-first-config does without tuning: those rows are named `fla, first
configuration`, and so are their ratios, which flatter us, by how much we do not know.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.training.distributed import Processes
from dn_lib.training.loop import flop_use
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.clock import seconds_of_each
from experiments.harness.peers import compile_only, load_fla
from experiments.harness.problems import matmul_precision
from experiments.harness.processes import spread
from experiments.harness.results import OutOfTime, Results, first_line

# fla's SwiGLU is 2816 wide: 8/3 of the width, rounded up to a multiple of 256.  Ours is given the same.
SHAPE = {"vocab_size": 32000, "width": 1024, "layers": 24, "heads": 8, "hidden": 2816}
TRAINING = {2048: 16, 8192: 4, 16384: 2}
CONTEXTS = (1024, 4096, 16384, 65536)
PROFILED = 8192
SMOKE = {
    "shape": {"vocab_size": 512, "width": 32, "layers": 3, "heads": 2, "hidden": 64},
    "training": {32: 4, 64: 2},
    "contexts": (16, 32),
    "profiled": 64,
}
FAIRNESS = {
    "parameters": "equal for delta and fla; attention lacks the convolutions and beta, 0.2% of them",
    "weights": "float32, AdamW (fused) on float32; forward and backward under bfloat16 autocast; all candidates",
    "fla": "DeltaNetConfig's own defaults (fuse_norm, fuse_swiglu, fuse_cross_entropy; convolution of 4 taps, SiLU, "
    "L2 norm, no gate, embeddings not tied, hidden_ratio 4 = 2816), eager, kernels autotuned by its own lists",
    "ours": "compiled by torch.compile (inductor), block by block, and so is the loss",
    "differences": "fla predicts one token less a sequence (it shifts the labels itself); norm_eps 1e-6, ours 1e-5; "
    "initial weights differ, which costs no time",
}


# --- Candidates --------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A model that is built, with its optimiser: `loss_of(inputs, targets)` is the loss of a batch."""

    model: nn.Module
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    optimiser: torch.optim.Optimizer
    warm: set

    def resident(self) -> int:
        """Bytes of weights and of AdamW's moments."""
        states = [t for s in self.optimiser.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in [*self.model.parameters(), *states])

    def gradients(self, inputs, targets) -> None:
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
            loss = self.loss_of(inputs, targets)
        loss.backward()

    def step(self, inputs, targets) -> None:
        self.gradients(inputs, targets)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def loss_of_features(features, weight, targets):
    """Cross-entropy in float32; the compiler reads the bfloat16 logits once and makes no float32 copy of them."""
    return F.cross_entropy(F.linear(features, weight).float(), targets)


class Bench:
    """Models by name, built when first asked for."""

    def __init__(self, options, device: str, shape: dict):
        self.options, self.device, self.shape, self.built = options, device, shape, {}
        self.backend = None if options.no_compile else "eager" if options.smoke else "inductor"  # of torch.compile
        self.loss = loss_of_features
        if self.backend is not None:
            self.loss = torch.compile(loss_of_features, dynamic=False, backend=self.backend)

    def config(self, name: str) -> ModelConfig:
        return ModelConfig(**self.shape, mixer="delta" if name == "fla" else name)

    def ours(self, name: str):
        model = LanguageModel(self.config(name)).to(self.device)
        head = model.embedding if model.head is None else model.head
        for block in model.blocks if self.backend is not None else ():
            block.compile(dynamic=False, backend=self.backend)  # the second block finds the first one's code

        def loss_of(inputs, targets):
            # Flat, so that the compiled loss has one shape for all lengths.
            return self.loss(model.features(inputs).flatten(0, 1), head.weight, targets.flatten())

        return model, loss_of

    def fla(self):
        """The peer, as its own configuration makes it."""
        models = importlib.import_module("fla.models")
        model = models.DeltaNetForCausalLM(
            models.DeltaNetConfig(
                vocab_size=self.shape["vocab_size"],
                hidden_size=self.shape["width"],
                num_hidden_layers=self.shape["layers"],
                num_heads=self.shape["heads"],
                hidden_ratio=4,
                fuse_norm=True,
                fuse_swiglu=True,
                fuse_cross_entropy=True,
                tie_word_embeddings=False,
            )
        )
        model = model.to(self.device).train()
        return model, lambda inputs, targets: model(input_ids=inputs, labels=inputs, use_cache=False).loss

    def candidate(self, name: str) -> Candidate:
        if name not in self.built:
            torch.manual_seed(self.options.seed)
            model, loss_of = self.fla() if name == "fla" else self.ours(name)
            optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=self.device == "cuda")
            self.built[name] = Candidate(model, loss_of, optimiser, set())
        return self.built[name]

    def drop(self, name: str) -> None:
        """Forget a candidate that failed: it may hold half a step's memory."""
        self.built.pop(name, None)
        gc.collect()

    def flop_use(self, name: str, length: int, speed: float) -> float | None:
        with torch.device("meta"):
            model = LanguageModel(self.config(name))
        return flop_use(model, length, speed, Processes(0, 1, torch.device(self.device)))


# --- Tuning beforehand -------------------------------------------------------------------------------------------


def say_what_is_tuned(elapsed, budget: float | None) -> None:
    """From now on each Triton autotuner prints what it begins with; after `budget` seconds it raises OutOfTime."""
    from triton.runtime.autotuner import Autotuner

    plain = Autotuner.prune_configs

    def prune(self, *arguments, **options):
        configs = plain(self, *arguments, **options)
        if budget is not None and elapsed() > budget:
            raise OutOfTime
        print(f"[{elapsed():6.1f} s] {self.base_fn.__name__}: {len(configs)} configurations", flush=True)
        return configs

    Autotuner.prune_configs = prune


def compile_part(worker: int, options, length: int, batch: int) -> str:
    """One of `options.workers` processes: compiles its part of what fla's step is tuned from; what it did, in words.

    The batch is that of the step, as some kernels are compiled for the number of its tokens.  One layer, without an
    optimiser, holds the fewest other bytes: with the logits about 6 GiB, of which there are as many as processes.
    """
    torch.set_num_threads(1)
    load_fla(False).cut = options.fla_first_config
    tally = compile_only(worker, options.workers)
    try:
        bench = Bench(options, "cuda", {**SHAPE, "layers": 1})
        bench.candidate("fla").gradients(*a_batch(bench, length, batch))
    except Exception as error:
        return f"{tally}; then it failed: {first_line(error)}"
    return f"{tally}; {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB at most"


def compile_beforehand(options, length: int, batch: int, elapsed, compile_it=compile_part) -> None:
    """All that `tune` will time, compiled side by side.  A worker that fails leaves its part to `tune`."""
    print(f"[{elapsed():6.1f} s] fla: {options.workers} processes compile its kernels", flush=True)
    job = functools.partial(compile_it, options=options, length=length, batch=batch)
    deadline = None if options.budget is None else time.monotonic() - elapsed() + options.budget
    for worker, said in spread(job, range(options.workers), options.workers, deadline):
        print(f"[{elapsed():6.1f} s] worker {worker}: {said}", flush=True)


def tune(bench: Bench, names: list[str], length: int, batch: int) -> int:
    """One step of each candidate, two layers deep, for what it leaves in the caches.  0; 1 failed; 2 out of time.

    Two layers have the kernels of all 24, and a step has as many tokens at every length, which is all that most
    of fla's kernels are tuned for besides their head sizes.
    """
    started = time.monotonic()

    def elapsed() -> float:
        return time.monotonic() - started

    if "fla" in names and bench.options.workers:
        compile_beforehand(bench.options, length, batch, elapsed)
        if bench.options.budget is not None and elapsed() > bench.options.budget:
            print(f"[{elapsed():6.1f} s] fla: stopped at the budget; the same command goes on", flush=True)
            return 2
    say_what_is_tuned(elapsed, bench.options.budget)
    for name in names:
        try:
            bench.candidate(name).step(*a_batch(bench, length, batch))
            if bench.device == "cuda":
                torch.cuda.synchronize()
        except OutOfTime:
            print(f"[{elapsed():6.1f} s] {name}: stopped at the budget; the same command goes on", flush=True)
            return 2
        except Exception as error:
            print(f"[{elapsed():6.1f} s] {name}: failed: {first_line(error)}", flush=True)
            return 1
        print(f"[{elapsed():6.1f} s] {name}: a step at {length} is tuned and compiled", flush=True)
        bench.drop(name)
    return 0


# --- Rows --------------------------------------------------------------------------------------------------------


def a_batch(bench: Bench, length: int, batch: int):
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(bench.shape["vocab_size"], (batch, length + 1), generator=generator).to(bench.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def ready(bench: Bench, name: str, length: int, batch: int, steps: int) -> tuple[Candidate, tuple]:
    """A candidate that has taken its first steps at this length (compiled, autotuned, moments allotted)."""
    candidate, data = bench.candidate(name), a_batch(bench, length, batch)
    for _ in range(1 if length in candidate.warm else steps):
        candidate.step(*data)
    candidate.warm.add(length)
    return candidate, data


def shown(bench: Bench, name: str) -> str:
    """What rows call a candidate: fla that was kept from tuning says so."""
    return f"{name}, first configuration" if name == "fla" and bench.options.fla_first_config else name


def training(bench: Bench, name: str, length: int, batch: int) -> dict:
    """Tokens a second, peak memory and model-FLOP use of a whole step."""
    try:
        candidate, data = ready(bench, name, length, batch, bench.options.warmup)
        others = 0
        if bench.device == "cuda":
            torch.cuda.synchronize()
            others = torch.cuda.memory_allocated() - candidate.resident()
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of_each(lambda: candidate.step(*data), bench.options.repeats, bench.device)
    except Exception:
        bench.drop(name)
        raise
    speed = batch * length / statistics.median(seconds)
    cuda = bench.device == "cuda"
    return {
        "name": shown(bench, name),
        "length": length,
        "batch": batch,
        "parameters": sum(p.numel() for p in candidate.model.parameters()),
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "peak_bytes": torch.cuda.max_memory_allocated() - others if cuda else None,
        "resident_bytes": candidate.resident(),
        "flop_use": bench.flop_use(name, length, speed),
    }


@torch.inference_mode()
def decoding(bench: Bench, name: str, context: int, models: dict) -> dict:
    """Tokens a second and bytes of cache of one sequence after `context` tokens; our models only.

    `step_seconds`: as it runs, the host launching each kernel.  `graph_seconds`: the same step as one CUDA graph,
    replayed on the same token, so that only the GPU's work counts.
    """
    if name not in models:
        torch.manual_seed(bench.options.seed)
        model = LanguageModel(bench.config(name)).eval()
        models[name] = model.to(bench.device, torch.bfloat16 if bench.device == "cuda" else torch.float32)
    model, cuda = models[name], bench.device == "cuda"
    cache = model.new_cache(1)
    tokens = torch.randint(bench.shape["vocab_size"], (1, context), device=bench.device)
    model.features(tokens, cache)

    def step():
        return model.logits(model.features(tokens[:, :1], cache))

    for _ in range(3):
        step()
    seconds = seconds_of_each(step, bench.options.repeats, bench.device)
    row = {"name": name, "context": context, "step_seconds": seconds, "cache_bytes": cache.bytes()}
    row["tokens_per_second"] = 1 / statistics.median(seconds)
    if cuda:
        try:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                step()
            graph.replay()
            row["graph_seconds"] = seconds_of_each(graph.replay, bench.options.repeats, bench.device)
            row["graph_tokens_per_second"] = 1 / statistics.median(row["graph_seconds"])
        except RuntimeError as error:
            row["graph_failure"] = str(error).splitlines()[0][:200]
    return row


# What a kernel's name tells of its work, the first pattern that is found in it.  Ours, fla's and PyTorch's names.
CATEGORIES = (
    ("loss", r"cross_entropy|log_softmax|nll_loss|logsumexp"),
    ("optimiser", r"multi_tensor|adam"),
    ("attention", r"flash|fmha|sdpa|attention_kernel|cudnn.*(sdp|attn)"),
    ("delta rule", r"^(merge_segments|recurrent)\b|delta_rule|chunk_(scaled_dot|fwd|bwd|local)|wy|w_u"),
    ("delta rule", r"solve_tril|_inverse_|l2norm|^chunk_|fused_recurrent"),
    ("matrix products", r"gemm|cutlass|cublas|nvjet|xmma|gemv|splitk|matmul"),
    ("convolution", r"causal_conv|conv1d|^triton_.*fused.*(cat|slice)"),
    ("norms, activations", r"^triton_|norm|swiglu|silu|sigmoid"),
    ("copies, fills, the rest", r""),
)


def category(kernel: str) -> str:
    """What kind of work the kernel does, by its name.

    A compiled kernel that pads a sequence is counted as convolution, with what the compiler has fused with it.
    """
    return next(kind for kind, pattern in CATEGORIES if re.search(pattern, kernel.lower()))


def profile(bench: Bench, name: str, length: int, batch: int, rows: int = 25) -> dict:
    """Where the time of one step goes: milliseconds by category, and the kernels that take most of it."""
    try:
        candidate, data = ready(bench, name, length, batch, bench.options.warmup)
        wall = seconds_of_each(lambda: candidate.step(*data), 3, bench.device)
        kind = "CUDA" if bench.device == "cuda" else "CPU"
        with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as record:
            candidate.step(*data)
            if kind == "CUDA":
                torch.cuda.synchronize()
    except Exception:
        bench.drop(name)
        raise
    times = {}
    for event in record.key_averages():
        if spent := getattr(event, f"self_{'device' if kind == 'CUDA' else 'cpu'}_time_total") / 1000:
            count, total = times.get(event.key, (0, 0.0))
            times[event.key] = count + event.count, total + spent
    groups = dict.fromkeys([kind for kind, _ in CATEGORIES], 0.0)
    for kernel, (_, spent) in times.items():
        groups[category(kernel)] += spent
    step = 1000 * statistics.median(wall)
    busy = sum(groups.values())
    listed = sorted(times.items(), key=lambda item: -item[1][1])[:rows]
    return {
        "name": shown(bench, name),
        "length": length,
        "batch": batch,
        "step_ms": step,
        "kernels_ms": busy,
        "idle_ms": max(step - busy, 0.0),
        "categories_ms": {kind: spent for kind, spent in groups.items() if spent},
        "kernels": [
            {"kernel": kernel[:100], "category": category(kernel), "calls": count, "ms": spent}
            for kernel, (count, spent) in listed
        ],
    }


# --- Summary -----------------------------------------------------------------------------------------------------


def summary(rows: list[dict]) -> dict:
    """Medians over the rounds by length and name, and delta's speed over the others'."""
    found: dict[str, dict] = {}
    for row in rows:
        if row["status"] == "ok" and row["key"].startswith("train"):
            found.setdefault(str(row["length"]), {}).setdefault(row["name"], []).append(row)
    training = {
        length: {
            name: {
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in turns),
                "rounds": [r["tokens_per_second"] for r in turns],
                "peak_bytes": max((r["peak_bytes"] for r in turns if r["peak_bytes"]), default=None),
                "flop_use": statistics.median(r["flop_use"] for r in turns) if turns[0]["flop_use"] else None,
            }
            for name, turns in names.items()
        }
        for length, names in found.items()
    }
    ratios = {
        length: {
            f"delta over {name}": names["delta"]["tokens_per_second"] / other["tokens_per_second"]
            for name, other in names.items()
            if name != "delta"
        }
        for length, names in training.items()
        if "delta" in names
    }
    failed = [row["key"] for row in rows if row["status"] != "ok"]
    return {"training": training, "ratios": ratios, "failed": failed}


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['key']:28s} {row['status']}: {row['failure']}")
        elif "categories_ms" in row:
            parts = ", ".join(f"{kind} {spent:.1f}" for kind, spent in row["categories_ms"].items())
            lines.append(f"{row['key']:28s} {row['step_ms']:.1f} ms: {parts}, idle {row['idle_ms']:.1f}")
        elif "context" in row:
            graph = f"{row['graph_tokens_per_second']:9.0f}/s as a graph" if "graph_seconds" in row else ""
            memory = row["cache_bytes"] / 2**20
            lines.append(f"{row['key']:28s} {row['tokens_per_second']:9.0f}/s {graph} {memory:9.2f} MiB of cache")
        else:
            memory = f"{row['peak_bytes'] / 2**30:6.1f} GiB" if row["peak_bytes"] else ""
            use = f"{row['flop_use']:.1%} of peak" if row["flop_use"] else ""
            lines.append(f"{row['key']:28s} {row['tokens_per_second']:9.0f}/s {memory} {use}")
    return "\n".join(lines)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="delta,attention,fla", help="which models, separated by commas")
    parser.add_argument("--lengths", help="which of the lengths, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each candidate at each length")
    parser.add_argument("--repeats", type=int, default=8, help="timed steps in a turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before a candidate's first turn at a length")
    parser.add_argument("--tune-only", action="store_true", help="fill Triton's cache at the first length; no rows")
    parser.add_argument("--fla-first-config", action="store_true", help="keep fla from tuning; its rows say so")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--profile", action="store_true", help=f"where the time goes, at {PROFILED}")


@matmul_precision("high")
def run(options: argparse.Namespace) -> int:
    """0; 1 if a row failed; 2 if the budget ran out, or there was nothing to tune; 3 if the GPU was lost."""
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # read where fla's kernels are defined: what it tunes stays
    device = device_of(options.smoke)
    shape, lengths, contexts, profiled = SHAPE, TRAINING, CONTEXTS, PROFILED
    if options.smoke:
        shape, lengths, contexts, profiled = (SMOKE[n] for n in ("shape", "training", "contexts", "profiled"))
    if options.lengths:
        wanted = [int(length) for length in options.lengths.split(",")]
        lengths = {length: batch for length, batch in lengths.items() if length in wanted}
    fla = load_fla(False, options.smoke)
    peer, fla.cut = fla.status, options.fla_first_config
    names = [name for name in options.only.split(",") if name != "fla" or peer == "present"]
    torch._dynamo.config.recompile_limit = 32  # one block's code is compiled for each mixer and length
    if options.tune_only:
        if not names:
            print(f"nothing to tune: fla is {peer}")
            return 2
        length, batch = next(iter(lengths.items()))
        return tune(Bench(options, device, {**shape, "layers": 2}), names, length, batch)
    kept = settings_of(options, "budget", "retry", "tune_only", "workers")
    settings = {**kept, "shape": shape, "fairness": FAIRNESS, "fla": peer}
    results = Results(options.out, settings, budget=options.budget, smoke=options.smoke, seed=options.seed)
    bench = Bench(options, device, shape)

    def measure(key, run):
        results.measure(key, run, again=lambda row: options.retry and row["status"] != "ok")

    def body() -> None:
        for length, batch in lengths.items():
            for turn in range(options.rounds):
                for name in names:
                    key = f"train {shown(bench, name)} {length} round {turn}"
                    measure(key, lambda n=name, le=length, b=batch: training(bench, n, le, b))
            if options.profile and length == profiled:
                for name in names:
                    key = f"profile {shown(bench, name)} {length}"
                    measure(key, lambda n=name, le=length, b=batch: profile(bench, n, le, b))
        bench.built.clear()
        gc.collect()
        models = {}
        for context in () if options.no_decode else contexts:
            for name in names:
                if name != "fla":
                    measure(f"decode {name} {context}", lambda n=name, c=context: decoding(bench, n, c, models))

    code = results.fill(body)
    results.summary = summary(results.rows)
    text = f"{table(results.rows)}\n{json.dumps(results.summary['ratios'])}"
    return results.finish(text, code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="How fast does a 340M model train and decode, beside fla's and beside a Transformer?",
    writes=("throughput.json",),
    minutes=3,
    gpu="H200, and some more until fla is tuned",
    run=run,
    options=options,
    shared=("budget", "retry", "seed", "smoke", "workers"),
    each=(("--profile",),),
    small=("--profile", "--repeats", "1", "--warmup", "1", "--rounds", "1", "--lengths", "64"),
    dry=("tune_only",),
)
