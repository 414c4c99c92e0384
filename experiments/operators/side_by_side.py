"""Time, memory and errors of the operator beside fla, softmax attention, the recurrence and PyTorch, in one process.

Errors come first: output and gradients of ours, and of fla, on a batch of at most two sequences of at most 1,024
tokens with the same heads (and, where the operator would split a long sequence, in as many segments), against the
PyTorch form in float64.  A shape at which an error of ours is above the dtype's limit (bfloat16: 8e-3), or above 1.1
times fla's, is not timed; its row says `refused` and why.  Then times, ours and fla by turns, so that
`ours_samples_ms` shows the spread.

--only picks sections: grid (21 shapes), small (one sequence of 512 tokens, many calls in a row), odd (unequal and
uneven head sizes), varlen, dtypes, decode, norm (normalisation inside the kernels) and first (seconds of the first
call in a new process with an empty cache, and how many kernels further shapes compile).  A row holds

- forward, forward_backward: ours_ms, fla_ms, ratio (fla over ours, so above 1 is faster than fla),
  of_compulsory_time (ours over the time to move the compulsory bytes at the copy rate measured in the same run),
  compulsory_bytes_per_s, ours_peak_extra_bytes, fla_peak_extra_bytes;
- others: milliseconds of the other forms, in the grid;
- errors, and fla: how fla was configured.

fla tunes itself for over a minute at each new head size, number of heads and dtype; --fla-first-config stops that
outside the grid, and rows made so say "fla": "first configuration": their ratio flatters us, by how much we do not
know.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import dn_lib
from dn_lib.kernels import plan, rules
from dn_lib.operators import DECODE_DELTA_RULE
from dn_lib.testing import mixed_lengths, relative_error
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.clock import Clock, ceilings, interleaved, peak_extra_bytes
from experiments.harness.errors import MEANING, errors_of, exact_results, limit_of, refused, verdict
from experiments.harness.peers import Peer, load_fla
from experiments.harness.problems import (
    COMPULSORY,
    INPUTS,
    Form,
    Problem,
    compulsory_bytes,
    draw,
    forward,
    forward_backward,
    matmul_precision,
    operator,
    peer_form,
    pytorch_form,
    recurrent_form,
    segments_of,
    softmax_form,
)
from experiments.harness.provenance import ROOT
from experiments.harness.results import Results, first_line, geometric_mean

HEADS = ((64, 32), (128, 16), (256, 8))  # (d, H): 2,048 channels
BATCHES = ((32, 1024), (16, 2048), (8, 4096), (4, 8192), (2, 16384), (1, 32768), (1, 8192))  # (B, L)
TUNED = ("autotuned", "first configuration")  # what a row says of fla if fla was there


class Bench:
    """Options, results, clock, peer and ceilings of one run."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.smoke = options, options.smoke
        self.device = device_of(options.smoke)
        self.clock = Clock.of(options)
        self.rounds = 1 if options.quick or options.smoke else 2
        self.peer: Peer = load_fla(options.skip_fla, options.smoke)
        settings = {
            **settings_of(options, "first_call"),
            "fla": {"status": self.peer.status, **self.peer.facts},
            "clock": f"{self.clock}; calls above 30 ms: median of three",
            "order": "ours, fla, ours" if self.rounds == 1 else "ours, fla, ours, fla, ours",
            "inputs": f"{INPUTS}; torch.autograd.grad",
            "errors": MEANING,
            "refused": "where an error of ours is above the dtype's limit or above 1.1 times fla's",
            "compulsory_bytes": COMPULSORY,
            "memory": "peak allocated during a call, less what was allocated before it",
        }
        self.results = Results(
            options.out, settings, budget=options.budget, smoke=options.smoke, any_commit=options.any_commit
        )
        self.checked: dict[tuple, dict] = {}

    def fla_state(self, cut: bool) -> str:
        if not self.peer.present:
            return self.peer.status
        return "first configuration" if cut else "autotuned"

    def again(self, row: dict) -> bool:
        """Whether a row that is there should be made anew: it lacks fla, which is here now; or it failed."""
        return (self.peer.present and row.get("fla", "autotuned") not in TUNED) or (
            self.options.retry and row["status"] != "ok"
        )

    def check(self, key: tuple, p: Problem, segments: int | None, limit: float, theirs: Form | None) -> dict:
        """Errors of ours and of fla on `p`, and what is wrong with ours; made once for each `key`."""
        if key not in self.checked:
            exact = exact_results(p)
            # Short calls of whole chunks fetch their tiles as the long ones that are timed do.
            tma = True if p.q.shape[1] >= rules.TMA_MIN_LENGTH else None
            with plan.using(segments=segments, tma=tma):
                found: dict[str, Any] = {"ours": errors_of(forward_backward(operator, p), exact)}
                found["ours"] |= {"o (no gradient)": relative_error(forward(operator, p), exact["o"])}
            if theirs is not None:
                try:
                    found["fla"] = errors_of(forward_backward(theirs, p), exact)
                    found["fla"] |= {"o (no gradient)": found["fla"]["o"]}
                except Exception as error:
                    found["fla_failure"] = first_line(error)
            found |= {"limit": limit, "wrong": verdict(found["ours"], found.get("fla"), limit)}
            self.checked[key] = found
        return self.checked[key]

    def compare(
        self, p: Problem, sample: Problem, key: tuple, *, cut: bool, segments: int | None = None,
        precision: str = "ieee", others: bool = False, loop: bool = False,
    ) -> dict:  # fmt: skip
        """The row of one shape: errors on `sample`, then forward and forward+backward of each form on `p`.

        Nothing is timed where `check` finds ours wrong.  cut: fla's autotuners try one configuration.
        """
        B, L, H, d_k = p.q.shape
        row = {"B": B, "L": L, "H": H, "d_k": d_k, "d_v": p.v.shape[-1], "dtype": p.q.dtype, "fla": self.fla_state(cut)}
        theirs = peer_form if self.peer.present else None
        self.peer.cut = cut
        if theirs is not None:
            try:
                forward_backward(theirs, p)  # fla tunes itself on the first shape it sees: let that be the large one
            except Exception as error:
                row["fla_failure"], theirs = first_line(error), None
        limit = limit_of(p.q.dtype, precision, self.device)
        row["errors"] = check = self.check(key, sample, segments, limit, theirs)
        if check["wrong"]:
            return row | refused(check["wrong"])
        row["copy_bytes_per_s"] = rate = self.results.ceilings["copy_bytes_per_s"]
        median = self.clock.loop if loop else self.clock.median
        for name, run, size in zip(
            ("forward", "forward_backward"), (forward, forward_backward), compulsory_bytes(p), strict=True
        ):
            ours = functools.partial(run, operator, p)
            other = None if theirs is None else functools.partial(run, theirs, p)
            times = interleaved(median, ours, other, self.rounds)
            times["compulsory_bytes"] = size
            times["of_compulsory_time"] = times["ours_ms"] / (size / rate * 1e3)
            times["compulsory_bytes_per_s"] = size / (times["ours_ms"] * 1e-3)
            times["ours_peak_extra_bytes"] = peak_extra_bytes(ours, self.smoke)
            if other is not None:
                times["fla_peak_extra_bytes"] = peak_extra_bytes(other, self.smoke)
            row[name] = times
        if others:
            row["others"] = self.others(p)
        return row

    def others(self, p: Problem) -> dict:
        """Softmax attention, the recurrent kernel and the PyTorch form; a refusal or lack of memory is recorded.

        softmax_attention is torch's FlashAttention kernel, softmax_attention_cudnn the one of cuDNN.
        """
        found = {}
        cudnn_form = functools.partial(softmax_form, kernel="CUDNN_ATTENTION")
        runs = {
            "softmax_attention.forward": lambda: forward(softmax_form, p),
            "softmax_attention.forward_backward": lambda: forward_backward(softmax_form, p, [p.q, p.k, p.v]),
            "softmax_attention_cudnn.forward": lambda: forward(cudnn_form, p),
            "softmax_attention_cudnn.forward_backward": lambda: forward_backward(cudnn_form, p, [p.q, p.k, p.v]),
            "recurrent.forward": lambda: forward(recurrent_form, p),
            "pytorch_chunkwise.forward": lambda: forward(pytorch_form, p),
            "pytorch_chunkwise.forward_backward": lambda: forward_backward(pytorch_form, p),
        }
        for name, run in runs.items():
            if self.options.quick and name.startswith("pytorch"):
                continue
            try:
                found[name] = {"ms": self.clock.median(run, quick=True)}
            except (RuntimeError, torch.OutOfMemoryError) as error:
                found[name] = {"failure": first_line(error)}
        return found


# --- Sections ----------------------------------------------------------------------------------------------------


def grid(bench: Bench) -> None:
    heads, batches = (((16, 1), (32, 1)), ((2, 40),)) if bench.smoke else (HEADS, BATCHES)
    shapes = [(d, H, B, L) for d, H in heads for B, L in batches]
    if bench.options.shapes:
        shapes = bench.options.shapes
    for d, H, B, L in shapes:

        def row(d=d, H=H, B=B, L=L):
            kind, parts = torch.bfloat16, segments_of(B, L, H, d, torch.bfloat16, bench.device)
            sample = draw(min(B, 2), min(L, 1024), H, d, d, kind, bench.device, seed=1)
            p = draw(B, L, H, d, d, kind, bench.device, seed=2)
            # The split form is checked too, on a sequence short enough for a reference.
            segments = parts if parts > 1 else None
            row = bench.compare(p, sample, ("grid", d, H, parts), cut=False, segments=segments, others=True)
            return row | {"parts": parts}

        bench.results.measure(f"grid d={d} H={H} B={B} L={L}", row, again=bench.again)


def small(bench: Bench) -> None:
    """One short sequence, many calls in a row, no CUDA graph: what the host needs for a call shows."""
    B, L, H, d = (1, 40, 1, 16) if bench.smoke else (1, 512, 8, 128)

    def row():
        p = draw(B, L, H, d, d, torch.bfloat16, bench.device, seed=3)
        return bench.compare(p, p, ("small",), cut=bench.options.fla_first_config, loop=True)

    bench.results.measure(f"small d={d} H={H} B={B} L={L}", row, again=bench.again)


def odd(bench: Bench) -> None:
    B, L, H = (1, 40, 1) if bench.smoke else (8, 4096, 8)
    for d_k, d_v in ((24, 16),) if bench.smoke else ((128, 256), (96, 96), (40, 40)):

        def row(d_k=d_k, d_v=d_v):
            sample = draw(min(B, 2), min(L, 1024), H, d_k, d_v, torch.bfloat16, bench.device, seed=4)
            p = draw(B, L, H, d_k, d_v, torch.bfloat16, bench.device, seed=5)
            return bench.compare(p, sample, ("odd", d_k, d_v), cut=bench.options.fla_first_config)

        bench.results.measure(f"odd d_k={d_k} d_v={d_v} H={H} B={B} L={L}", row, again=bench.again)


def varlen(bench: Bench) -> None:
    count, total, H, d = (3, 60, 1, 16) if bench.smoke else (64, 32768, 16, 128)
    lengths = mixed_lengths(count, total)

    def row():
        few = lengths[: max(2, count // 8)]
        sample = draw(1, sum(few), H, d, d, torch.bfloat16, bench.device, seed=6, lengths=few)
        p = draw(1, total, H, d, d, torch.bfloat16, bench.device, seed=7, lengths=lengths)
        row = bench.compare(p, sample, ("varlen",), cut=bench.options.fla_first_config)
        return row | {"lengths": lengths}

    bench.results.measure(f"varlen d={d} H={H} sequences={count} tokens={total}", row, again=bench.again)


def dtypes(bench: Bench) -> None:
    B, L, H, d = (1, 40, 1, 16) if bench.smoke else (8, 4096, 16, 128)
    kinds = ((torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"))
    for dtype, precision in kinds[:2] if bench.smoke else kinds:

        def row(dtype=dtype, precision=precision):
            with matmul_precision("highest" if precision == "ieee" else "high"):
                sample = draw(min(B, 2), min(L, 1024), H, d, d, dtype, bench.device, seed=8)
                p = draw(B, L, H, d, d, dtype, bench.device, seed=9)
                cut = bench.options.fla_first_config
                row = bench.compare(p, sample, ("dtypes", dtype, precision), cut=cut, precision=precision)
            return row | {"precision": precision}

        name = str(dtype).removeprefix("torch.")
        bench.results.measure(f"dtypes {name} {precision} d={d} H={H} B={B} L={L}", row, again=bench.again)


def decode(bench: Bench) -> None:
    """One token of many sequences: nothing but the states should cost anything."""
    N, H, d = (2, 1, 16) if bench.smoke else (512, 16, 128)

    def row():
        p = draw(N, 1, H, d, d, torch.bfloat16, bench.device, seed=10, state=True)
        assert p.initial_state is not None
        token = q, k, v, beta = tuple(x.detach()[:, 0] for x in p.inputs)
        state = p.initial_state.detach().clone()
        few = slice(0, min(N, 8))
        o, last, _ = DECODE_DELTA_RULE.reference(*(x[few, None] for x in token), initial_state=state[few])
        got = dn_lib.decode_delta_rule(q, k, v, beta, state)
        errors = {"o": relative_error(got[few], o[:, 0]), "state": relative_error(state[few], last)}
        limit = limit_of(torch.bfloat16, device=bench.device)
        result = {"sequences": N, "H": H, "d": d, "errors": {"ours": errors, "limit": limit}}
        if wrong := verdict(errors, None, limit):
            return result | refused(wrong)
        theirs = None
        if bench.peer.present:
            peer = DECODE_DELTA_RULE.peers["fla"]
            keywords = peer.keywords(q=p.q, k=p.k, v=p.v, beta=p.beta, initial_state=state)
            theirs = torch.no_grad()(functools.partial(peer.load(), **keywords))
            try:
                theirs()
            except Exception as error:
                result["fla_failure"], theirs = first_line(error), None
        ours = functools.partial(dn_lib.decode_delta_rule, *token, state)
        times = interleaved(bench.clock.median, ours, theirs, bench.rounds)
        size = 2 * state.numel() * state.element_size()
        rate = bench.results.ceilings["copy_bytes_per_s"]
        times |= {"state_bytes": size, "of_state_time": times["ours_ms"] / (size / rate * 1e3)}
        return result | {"fla": bench.fla_state(False), "forward": times, "copy_bytes_per_s": rate}

    bench.results.measure(f"decode d={d} H={H} sequences={N}", row, again=bench.again)


def norm(bench: Bench) -> None:
    """Queries and keys normalised inside the kernels, on either side."""
    B, L, H, d = (1, 40, 1, 16) if bench.smoke else (16, 2048, 16, 128)

    def row():
        sample = draw(min(B, 2), min(L, 1024), H, d, d, torch.bfloat16, bench.device, seed=11, norm=True)
        p = draw(B, L, H, d, d, torch.bfloat16, bench.device, seed=12, norm=True)
        return bench.compare(p, sample, ("norm",), cut=bench.options.fla_first_config)

    bench.results.measure(f"norm d={d} H={H} B={B} L={L}", row, again=bench.again)


def first(bench: Bench) -> None:
    """Seconds of the first forward+backward of each head size, in a new process with an empty Triton cache."""
    for d, H in ((16, 1),) if bench.smoke else HEADS:

        def row(d=d, H=H):
            if bench.smoke:
                return {"d": d, **first_call(d, H, "cpu")}
            with tempfile.TemporaryDirectory(prefix="fresh_cache_") as folder:
                command = [sys.executable, "-m", "experiments", "side_by_side", "--first-call", f"{d},{H}"]
                environment = {**os.environ, "TRITON_CACHE_DIR": folder}
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode)
            return {"d": d, **json.loads(done.stdout.splitlines()[-1])}

        bench.results.measure(f"first d={d} H={H}", row, again=bench.again)


def first_call(d: int, H: int, device: str) -> dict:
    """First forward+backward, then what further shapes cost: seconds, and kernels that Triton compiled for it."""
    cache, calls, before = os.environ.get("TRITON_CACHE_DIR"), [], 0
    if device == "cuda":
        (torch.randn(256, 256, device=device) @ torch.randn(256, 256, device=device)).sum().item()
    shapes = ((4, 2048, H), (3, 1000, H + 1), (1, 32768, H)) if device == "cuda" else ((1, 40, H),)
    for B, L, heads in shapes:
        p = draw(B, L, heads, d, d, torch.bfloat16, device, seed=13)
        begun = time.perf_counter()
        forward_backward(operator, p)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        count = len(list(Path(cache).rglob("*.cubin"))) if cache else 0
        calls.append({"B": B, "L": L, "H": heads, "seconds": seconds, "kernels_compiled": count - before})
        before = count
    return {"first_call_s": calls[0]["seconds"], "calls": calls}


SECTIONS = {f.__name__: f for f in (grid, small, odd, varlen, dtypes, decode, norm, first)}


# --- What it comes to --------------------------------------------------------------------------------------------


def summary(rows: list[dict]) -> dict:
    """Geometric means and worst cases over the grid, and the one number of each other section."""
    grid_rows = [row for row in rows if row["key"].startswith("grid")]
    done = [row for row in grid_rows if row["status"] == "ok"]
    result = {"grid_shapes": len(done), "refused_or_failed": [row["key"] for row in rows if row["status"] != "ok"]}
    for name in ("forward", "forward_backward"):
        ratios = {row["key"]: row[name]["ratio"] for row in done if "ratio" in row[name]}
        bytes_ratio = {
            row["key"]: row[name]["ours_peak_extra_bytes"] / row[name]["fla_peak_extra_bytes"]
            for row in done
            if row[name].get("fla_peak_extra_bytes")
        }
        worst = max(bytes_ratio, key=lambda key: bytes_ratio[key], default=None)
        least = min(ratios, key=lambda key: ratios[key], default=None)
        result[name] = {
            "shapes_with_fla": len(ratios),
            "geometric_mean_ratio": geometric_mean(list(ratios.values())),
            "least_ratio": None if least is None else ratios[least],
            "least_ratio_at": least,
            "geometric_mean_of_compulsory_time": geometric_mean([row[name]["of_compulsory_time"] for row in done]),
            "most_memory_of_fla": None if worst is None else bytes_ratio[worst],
            "most_memory_at": worst,
        }
    for row in rows:
        if row["key"].startswith("decode") and "forward" in row:
            result["decode_of_state_time"] = row["forward"]["of_state_time"]
        if row["key"].startswith("first") and "first_call_s" in row:
            result.setdefault("first_call_s", {})[str(row["d"])] = row["first_call_s"]
    return result


def table(rows: list[dict]) -> str:
    """A line a row: ms of ours and fla, ratio, times the compulsory bytes' time, peak extra MiB."""

    def number(x, form="{:.3f}"):
        return form.format(x) if isinstance(x, int | float) else "-"

    lines = [f"{'':44} {'forward':^31} | {'forward + backward':^31} | {'MiB':^13}"]
    head = f"{'ours':>7} {'fla':>7} {'ratio':>7} {'/bytes':>7}"
    lines.append(f"{'ms, median':44} {head} | {head} | {'ours':>6} {'fla':>6}")
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['key']:44} {row['status']}: {row.get('failure', '')[:100]}")
            continue
        if "first_call_s" in row:
            calls = ", ".join(f"{c['seconds']:.2f} s ({c['kernels_compiled']} kernels)" for c in row["calls"])
            lines.append(f"{row['key']:44} {calls}")
            continue
        cells = []
        for name in ("forward", "forward_backward"):
            t = row.get(name, {})
            of_bytes = t.get("of_compulsory_time", t.get("of_state_time"))
            cells.append(
                f"{number(t.get('ours_ms')):>7} {number(t.get('fla_ms')):>7} "
                f"{number(t.get('ratio'), '{:.2f}'):>7} {number(of_bytes, '{:.2f}'):>7}"
            )
        t = row.get("forward_backward", {})
        peak = [t.get(f"{who}_peak_extra_bytes") for who in ("ours", "fla")]
        peak = [number(x and x / 2**20, "{:.0f}") for x in peak]
        lines.append(f"{row['key']:44} {cells[0]} | {cells[1]} | {peak[0]:>6} {peak[1]:>6}")
        if row.get("fla_failure"):
            lines.append(f"{'':44} fla: {row['fla_failure'][:100]}")
    return "\n".join(lines)


def a_shape(text: str) -> tuple[int, ...]:
    shape = tuple(map(int, text.split(",")))
    if len(shape) != 4:
        raise argparse.ArgumentTypeError(f"a shape must be d,H,B,L, got {text}")
    return shape


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--shapes", nargs="+", type=a_shape, metavar="d,H,B,L", help="these shapes of the grid alone")
    parser.add_argument("--skip-fla", action="store_true")
    parser.add_argument("--fla-first-config", action="store_true", help="outside the grid, do not let fla autotune")
    parser.add_argument("--first-call", metavar="d,H", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """0; 1 if a row failed or was refused; 2 if the budget ran out; 3 if the GPU was lost."""
    if options.first_call:
        d, H = map(int, options.first_call.split(","))
        print(json.dumps(first_call(d, H, "cuda")))
        return 0
    bench = Bench(options)
    results = bench.results
    print(f"fla: {bench.peer.status}", flush=True)

    def body() -> None:
        results.ceilings = ceilings(bench.clock)
        results.write()
        rate, flops = results.ceilings["copy_bytes_per_s"], results.ceilings["matmul_flops_per_s"]
        if not bench.smoke:
            print(f"copy {rate / 1e12:.2f} TB/s, matmul {flops / 1e12:.0f} TFLOP/s", flush=True)
            torch.cuda.empty_cache()
        for name in options.only:
            SECTIONS[name](bench)

    code = results.fill(body)
    results.summary = summary(results.rows)
    lines = [table(results.rows)]
    for name in ("forward", "forward_backward"):
        s = results.summary[name]
        if s["geometric_mean_ratio"] is not None and math.isfinite(s["geometric_mean_ratio"]):
            lines.append(
                f"{name}: geometric mean {s['geometric_mean_ratio']:.2f} times fla over {s['shapes_with_fla']} shapes, "
                f"least {s['least_ratio']:.2f} at {s['least_ratio_at']}"
            )
    return results.finish("\n".join(lines), code, failed=results.summary["refused_or_failed"])


EXPERIMENT = Experiment(
    question="How fast, how large and how exact is the operator beside fla, attention, the recurrence and PyTorch?",
    writes=("operator.json",),
    minutes=6,
    gpu="H200",
    run=run,
    options=options,
    small=("--only", "grid", "decode", "--shapes", "16,1,1,40"),
    shared=("any-commit", "budget", "quick", "retry", "smoke"),
    dry=("first_call",),
)
