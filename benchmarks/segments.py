"""Into how many parts a sequence should be split: the GPU's time of forward and backward by number of parts.

    python benchmarks/segments.py --out segments.json [--head-dims 64 128 256]

H d = 2048, bfloat16, `B x L` tokens with few sequences.  A call is replayed as a CUDA graph, so that only the GPU's
work counts.  `rule` is what `configs.segments` chooses, `regret` how much longer its choice takes than the best one.
The counts of steps in that rule were fitted to this table (dn_lib/kernels/README.md).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Problem, Results, device_of, draw

from dn_lib.kernels import plan as configs
from dn_lib.kernels.delta_rule import launch

BATCHES = ((8, 4096), (4, 8192), (2, 16384), (1, 32768), (1, 8192))
PARTS = (1, 2, 4, 8, 16)


def calls(p: Problem, parts: int, chunk: int) -> dict[str, Callable[[], object]]:
    """Inference's forward, and training's forward with the backward, in so many parts."""
    q, k, v, beta = (x.detach() for x in (p.q, p.k, p.v, p.beta))
    options = {"scale": q.shape[-1] ** -0.5, "cu_seqlens": None, "chunk": chunk, "segments": parts, "precision": "ieee"}
    more = {"initial_state": None, "norm": False, "final_state": False}

    def training():
        *_, saved = launch.forward(q, k, v, beta, save=True, **more, **options)
        return launch.backward(q, k, v, beta, saved, p.do, None, initial_state=False, **options)

    return {
        "forward": lambda: launch.forward(q, k, v, beta, save=False, **more, **options),
        "forward_backward": training,
    }


def graph_ms(run: Callable[[], object], device: str, calls: int = 3, repeats: int = 5) -> float:
    """Median milliseconds of a call, replayed as part of a CUDA graph; a stub on a CPU."""
    run()
    if device == "cpu":
        return 1.0
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def measured(d: int, B: int, L: int, device: str, smoke: bool) -> dict:
    """Milliseconds by number of parts, and what the rule makes of it."""
    H, chunk = (1, 16) if smoke else (2048 // d, 64)
    p = draw(B, L, H, d, d, torch.bfloat16, device, seed=1)
    rows = {
        n: {name: graph_ms(run, device) for name, run in calls(p, n, chunk).items()} for n in PARTS if n * chunk <= L
    }
    rule = 1 if smoke else configs.segments(B, L, H, d, d, chunk, torch.cuda.current_device())
    regret = {name: rows[rule][name] / min(row[name] for row in rows.values()) - 1 for name in rows[rule]}
    return {"d": d, "H": H, "B": B, "L": L, "ms": rows, "rule": rule, "regret": regret}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256], choices=(64, 128, 256))
    parser.add_argument("--smoke", action="store_true", help="one tiny shape in Triton's interpreter; times are stubs")
    options = parser.parse_args(argv)
    device = device_of(options.smoke)
    settings = {"head_dims": options.head_dims, "clock": "median of 5 replays of a CUDA graph of 3 calls"}
    results = Results(options.out, settings, smoke=options.smoke, seed=1)
    shapes = [(16, 1, 40)] if options.smoke else [(d, B, L) for d in options.head_dims for B, L in BATCHES]
    for d, B, L in shapes:
        key = f"d={d} B={B} L={L}"
        results.measure(key, lambda d=d, B=B, L=L: measured(d, B, L, device, options.smoke))
    for row in results.rows:
        if row["status"] == "ok":
            times = " | ".join(f"{n}: {m['forward']:.3f} {m['forward_backward']:.3f}" for n, m in row["ms"].items())
            print(f"{row['key']:24} rule {row['rule']}  {times}")
    results.write()
    if options.smoke:
        print("NOT MEASURED: smoke run")
    return int(any(row["status"] != "ok" for row in results.rows))


if __name__ == "__main__":
    raise SystemExit(main())
