"""Recall in documents that end without a mark, and whether Lightning's speed depends on the length.

Recall. A text is a row of short documents. Each writes some keys of a small pool with new values, `k v k v ...`, and
then asks for all of them; only the value of this document is right. Where one document ends and the next begins nothing
says, or, for comparison, a token of its own does. Small models that differ in their mixers learn it from nothing. A row
holds the share of questions answered, of new texts, by document.

Prediction, written down before any run. Without a mark: linear attention answers at least 20 points fewer in the last
documents than in the first; the delta rule and the gated delta rule are within 3 points of one another in the last
documents; fixed decays with slow heads (RetNet's table) are within 10 points of the delta rule, and those of
Lightning's code below them. With a mark the gated delta rule gains more than the delta rule. Two seeds.

Speed. Forward and backward pass of one layer's mixing, 16 heads of 128, bfloat16, 131,072 tokens in sequences of 1,024
to 131,072: `dn_lib.linear_attention` with a fixed decay per head (Lightning), `dn_lib.delta_rule`, and PyTorch's causal
attention. Prediction: Lightning's tokens per second at 131,072 are at least 0.7 of those at 1,024; attention's are less
than a tenth.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import dn_lib
from dn_lib.data.recall import IGNORE
from dn_lib.layers.lightning import decay_slopes
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.clock import Clock
from experiments.harness.kinds import Kind
from experiments.harness.results import Results

MARK, VOCAB = 0, 128  # keys are 1 ... 63, values 64 ... 127
DOCUMENTS, PAIRS, POOL = 12, 6, 18
SEEDS = 2
SHAPE = {"vocab_size": VOCAB, "width": 128, "layers": 2, "heads": 4}
TINY = {"vocab_size": VOCAB, "width": 16, "layers": 1, "heads": 2}
KINDS: dict[str, Kind] = {
    "linear": Kind({"mixer": "linear"}),
    "Lightning's table": Kind({"mixer": "lightning"}),
    "RetNet's table": Kind({"mixer": "lightning", "decay": "retnet"}),
    "delta": Kind({"mixer": "delta"}),
    "gated delta": Kind({"mixer": "gated_delta", "expand_v": 1.0, "output_gate": False}),
}
LENGTHS = tuple(2**n for n in range(10, 18))


def documents(
    n: int,
    count: int = DOCUMENTS,
    pairs: int = PAIRS,
    pool: int = POOL,
    *,
    marked: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens and labels `[n, count * (3 * pairs + marked)]` of `n` texts of `count` documents; -100 is not scored.

    Each text has its own pool of keys.  A document writes `pairs` of them with new values and asks for them in another
    order.  marked: each document begins with the token `MARK`.  Raises ValueError unless pairs <= pool <= 63.
    """
    half = VOCAB // 2
    if not 0 < pairs <= pool < half:
        raise ValueError(f"pool must be from pairs = {pairs} to {half - 1}, got {pool}")
    device = "cpu" if generator is None else generator.device

    def order(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device).argsort(-1)

    pools = 1 + order(n, half - 1)[:, :pool]
    keys = pools[:, None].expand(n, count, pool).gather(2, order(n, count, pool)[..., :pairs])
    values = torch.randint(half, VOCAB, (n, count, pairs), generator=generator, device=device)
    asked = order(n, count, pairs)
    written = torch.stack([keys, values], -1).flatten(2)
    tokens = torch.cat([written, keys.gather(2, asked)], -1)
    labels = torch.cat([torch.full_like(written, IGNORE), values.gather(2, asked)], -1)
    if marked:
        tokens, labels = F.pad(tokens, (1, 0), value=MARK), F.pad(labels, (1, 0), value=IGNORE)
    return tokens.flatten(1), labels.flatten(1)


def recall(name: str, marked: bool, seed: int, device: str, smoke: bool) -> dict:
    """Train one model, and what it answers: the row."""
    torch.manual_seed(seed)
    model = KINDS[name].build(**(TINY if smoke else SHAPE)).to(device)
    steps, batch = (2, 4) if smoke else (1500, 64)
    sizes = {"count": 3, "pairs": 2, "pool": 4} if smoke else {}
    generator = torch.Generator(device).manual_seed(1000 + seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.1)
    curve = []
    for _ in range(steps):
        tokens, labels = documents(batch, marked=marked, generator=generator, **sizes)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        curve.append(loss.detach())
    tokens, labels = documents(256, marked=marked, generator=torch.Generator(device).manual_seed(1), **sizes)
    with torch.no_grad():
        right = model(tokens).argmax(-1) == labels
    count = sizes.get("count", DOCUMENTS)
    scored = (labels != IGNORE).unflatten(1, (count, -1))
    by_document = (right.unflatten(1, (count, -1)) & scored).sum((0, 2)) / scored.sum((0, 2))
    return {
        "part": "recall",
        "kind": name,
        "marked": marked,
        "seed": seed,
        "accuracy": by_document.tolist(),
        "curve": torch.stack(curve)[::25].tolist(),
    }


def mixings(length: int, device: str, smoke: bool) -> dict[str, Callable[[], object]]:
    """Forward and backward of each form on one batch."""
    total, heads, d = (64, 2, 16) if smoke else (LENGTHS[-1], 16, 128)
    dtype = torch.float32 if smoke else torch.bfloat16
    shape = (total // length, length, heads, d)
    q, k, v, do = torch.randn(4, *shape, device=device, dtype=dtype).unbind(0)
    k = F.normalize(k, dim=-1)
    beta = torch.rand(shape[:3], device=device, dtype=dtype)
    g = -decay_slopes(heads).to(device, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both(form: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form(*leaves), leaves, do)

    def attention(*x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in x)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return {
        "Lightning": both(lambda q, k, v: dn_lib.linear_attention(q, k, v, g)[0]),
        "delta rule": both(lambda q, k, v: dn_lib.delta_rule(q, k, v, beta)[0]),
        "attention": both(attention),
    }


def speed(length: int, device: str, clock: Clock) -> dict:
    """Tokens per second of each form at one length: the row."""
    total = 64 if clock.smoke else LENGTHS[-1]
    times = {name: clock.median(run) for name, run in mixings(length, device, clock.smoke).items()}
    return {
        "part": "speed",
        "length": length,
        "ms": times,
        "tokens_per_second": {name: 1000 * total / ms for name, ms in times.items()},
    }


def table(rows: list[dict]) -> str:
    """Accuracy in the first and the last third of the documents, and tokens per second relative to the shortest."""
    lines = [f"{'':20}{'':10}{'first third':>13}{'last third':>13}   each seed's last"]
    found = [row for row in rows if row.get("part") == "recall"]
    for name, marked in dict.fromkeys((row["kind"], row["marked"]) for row in found):
        own = [row["accuracy"] for row in found if (row["kind"], row["marked"]) == (name, marked)]
        third = max(1, len(own[0]) // 3)
        first, last = ([statistics.fmean(a[part]) for a in own] for part in (slice(third), slice(-third, None)))
        said = f"{statistics.fmean(first):13.1%}{statistics.fmean(last):13.1%}   {' '.join(f'{x:.1%}' for x in last)}"
        lines.append(f"{name:20}{'marked' if marked else 'no mark':10}{said}")
    measured = [row for row in rows if row.get("part") == "speed"]
    for row in measured:
        base = measured[0]["tokens_per_second"]
        rates = (f"{name} {x / base[name]:.2f}" for name, x in row["tokens_per_second"].items())
        lines.append(f"length {row['length']:7}: {', '.join(rates)} of the speed at {measured[0]['length']}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    device, clock = device_of(options.smoke), Clock.of(options)
    settings = settings_of(options) | {
        "task": f"{DOCUMENTS} documents of {PAIRS} pairs, pool of {POOL} keys",
        "shape": SHAPE,
        "clock": str(clock),
    }
    results = Results(options.out, settings, budget=options.budget, smoke=options.smoke)

    def body() -> None:
        for seed in range(1 if options.smoke else SEEDS):
            for marked in (False, True):
                for name in KINDS:
                    key = f"{name}, {'marked' if marked else 'no mark'}, seed {seed}"
                    cell = (name, marked, seed, device, options.smoke)
                    results.measure(key, lambda cell=cell: recall(*cell))
        for length in (16, 64) if options.smoke else LENGTHS:
            results.measure(f"speed at {length}", lambda length=length: speed(length, device, clock))

    code = results.fill(body)
    return results.finish(table(results.done), code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="Which memory still answers in documents that end without a mark, and is Lightning's speed constant?",
    writes=("forgetting.json",),
    minutes=8,
    gpu="H200",
    run=run,
    shared=("budget", "quick", "smoke"),
    measured=False,
)
