"""Clocks: how long a call takes, how much memory it needs, and what the GPU itself can do."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from experiments.harness.problems import matmul_precision


@dataclass
class Clock:
    """Medians in milliseconds; with `smoke` each call runs once and the time is a stub."""

    warmup: int = 25
    rep: int = 100
    smoke: bool = False

    @classmethod
    def of(cls, options) -> Clock:
        """The clock that `--quick` and `--smoke` ask for."""
        return cls(*((10, 40) if options.quick else (25, 100)), smoke=options.smoke)

    def __str__(self) -> str:
        return f"triton.testing.do_bench medians, warm-up {self.warmup} ms, {self.rep} ms measured"

    def median(self, run: Callable[[], object], quick: bool = False) -> float:
        """`do_bench`, which clears the L2 cache between calls; a few calls if one takes longer than 30 ms."""
        if self.smoke:
            run()
            return 1.0
        from triton.testing import do_bench

        run()
        once = self.loop(run, calls=1, repeats=1, warm=0)
        if once > 500:
            return once
        if once > 30:
            return statistics.median(self.loop(run, calls=1, repeats=1, warm=0) for _ in range(3))
        warmup, rep = (5, 30) if quick else (self.warmup, self.rep)
        return cast(float, do_bench(run, warmup=warmup, rep=rep, return_mode="median"))

    def loop(self, run: Callable[[], object], *, calls: int = 200, repeats: int = 5, warm: int = 20) -> float:
        """Milliseconds a call when many follow one another: what the host needs counts, the cache stays warm."""
        if self.smoke:
            run()
            return 1.0
        times = []
        for _ in range(warm):
            run()
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        return statistics.median(times)


def seconds_of_each(run: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds of each of `repeats` calls in a row, by the GPU's own clock; a stub on a CPU."""
    if device == "cpu":
        for _ in range(repeats):
            run()
        return [1.0] * repeats
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]


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


def interleaved(time_it: Callable, ours: Callable, theirs: Callable | None, rounds: int) -> dict:
    """ours, theirs, ours, ... , ours: the samples show the spread; the medians are compared."""
    samples: dict[str, list[float]] = {"ours": [], "fla": []}
    for _ in range(rounds):
        samples["ours"].append(time_it(ours))
        if theirs is not None:
            samples["fla"].append(time_it(theirs))
    samples["ours"].append(time_it(ours))
    row = {"ours_ms": statistics.median(samples["ours"]), "ours_samples_ms": samples["ours"]}
    if theirs is not None:
        row |= {"fla_ms": statistics.median(samples["fla"]), "fla_samples_ms": samples["fla"]}
        row["ratio"] = row["fla_ms"] / row["ours_ms"]
    return row


def peak_extra_bytes(run: Callable[[], object], smoke: bool) -> int | None:
    """Peak of allocated memory during a call above what was allocated before it (the inputs)."""
    if smoke:
        return None
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(clock: Clock) -> dict:
    """Bytes a second of a device-to-device copy (read and written), FLOP/s of an 8192^3 bfloat16 matmul."""
    smoke = clock.smoke
    device, count, n = ("cpu", 1 << 16, 64) if smoke else ("cuda", 1 << 30, 8192)
    x = torch.randn(count, device=device)
    y = torch.empty_like(x)
    copy = clock.median(lambda: y.copy_(x))
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = clock.median(lambda: a @ b)
    return {
        "copy_bytes_per_s": 2 * x.numel() * 4 / (copy * 1e-3),
        "copy_bytes": 2 * x.numel() * 4,
        "matmul_flops_per_s": 2 * n**3 / (matmul * 1e-3),
        "matmul_size": n,
    }


def float32_rate(clock: Clock) -> dict:
    """FLOP/s of a float32 product without TF32: what dots of full float32 operands can reach."""
    n = 64 if clock.smoke else 4096
    a, b = (torch.randn(n, n, device="cpu" if clock.smoke else "cuda") for _ in range(2))
    with matmul_precision("highest"):
        ms = clock.median(lambda: a @ b)
    return {"float32_flops_per_s": 2 * n**3 / (ms * 1e-3), "float32_size": n}
