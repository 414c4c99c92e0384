"""Into how many segments a sequence should be split: the GPU's time of forward and backward by number of segments.

H d = 2048, bfloat16, `B x L` tokens with few sequences.  A call is replayed as a CUDA graph, so that only the GPU's
work counts.  `rule` is what the plan's rule chooses, `regret` how much longer its choice takes than the best one.
The costs of steps in that rule were fitted to this table (dn_lib/kernels/README.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from dn_lib.kernels import plan
from dn_lib.kernels.delta_rule import launch
from experiments.harness.cli import Experiment, device_of
from experiments.harness.clock import graph_ms
from experiments.harness.problems import Problem, draw, segments_of
from experiments.harness.results import Results

BATCHES = ((8, 4096), (4, 8192), (2, 16384), (1, 32768), (1, 8192))
SEGMENTS = (1, 2, 4, 8, 16)


def calls(p: Problem, segments: int, chunk: int) -> dict[str, Callable[[], object]]:
    """Inference's forward, and training's forward with the backward, in so many segments."""
    q, k, v, beta = (x.detach() for x in (p.q, p.k, p.v, p.beta))
    with plan.using(segments=segments):
        inference, training = (plan.plan_call(q, k, v, training=training, chunk=chunk) for training in (False, True))
    inputs = {"q": q, "k": k, "v": v, "beta": beta, "scale": q.shape[-1] ** -0.5}

    def both():
        *_, saved = launch.forward(plan=training, **inputs)
        rest = {name: inputs[name] for name in ("q", "k", "beta", "scale")}
        return launch.backward(plan=training, saved=saved, do=p.do, dstate=None, initial_state=False, **rest)

    return {"forward": lambda: launch.forward(plan=inference, **inputs), "forward_backward": both}


def measured(d: int, B: int, L: int, device: str, smoke: bool) -> dict:
    """Milliseconds by number of segments, and what the rule makes of it."""
    H, chunk = (1, 16) if smoke else (2048 // d, 64)
    p = draw(B, L, H, d, d, torch.bfloat16, device, seed=1)
    rows = {
        n: {name: graph_ms(run, device) for name, run in calls(p, n, chunk).items()} for n in SEGMENTS if n * chunk <= L
    }
    rule = segments_of(B, L, H, d, torch.bfloat16, device)
    regret = {name: rows[rule][name] / min(row[name] for row in rows.values()) - 1 for name in rows[rule]}
    return {"d": d, "H": H, "B": B, "L": L, "ms": rows, "rule": rule, "regret": regret}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256], choices=(64, 128, 256))


def run(options: argparse.Namespace) -> int:
    device = device_of(options.smoke)
    settings = {"head_dims": options.head_dims, "clock": "median of 5 replays of a CUDA graph of 3 calls"}
    results = Results(options.out, settings, smoke=options.smoke, seed=1)
    shapes = [(16, 1, 40)] if options.smoke else [(d, B, L) for d in options.head_dims for B, L in BATCHES]

    def body() -> None:
        for d, B, L in shapes:
            key = f"d={d} B={B} L={L}"
            results.measure(key, lambda d=d, B=B, L=L: measured(d, B, L, device, options.smoke))

    code, lines = results.fill(body), []
    for row in results.done:
        times = " | ".join(f"{n}: {m['forward']:.3f} {m['forward_backward']:.3f}" for n, m in row["ms"].items())
        lines.append(f"{row['key']:24} rule {row['rule']}  {times}")
    return results.finish("\n".join(lines), code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="Into how many segments should a sequence be split, and what does the rule's choice cost?",
    writes=("segments.json",),
    minutes=1,
    gpu="H100",
    run=run,
    options=options,
    shared=("smoke",),
)
