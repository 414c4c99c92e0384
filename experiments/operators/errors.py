"""Errors of the operator against float64 on random calls with gradients: sizes, dtypes and options mixed.

    python -m experiments errors --calls 2000 --seconds 240
    python -m experiments errors --out one.json --start 1234 --calls 1      # repeats call 1234 alone

A call is fixed by --seed, --variants and its number.  Kernels are compiled in parallel first, then the calls run.  The
table gives median, 99th percentile and worst error of each dtype and output, and the ratio to fla's on the same
inputs where fla takes them (bfloat16 and float16, head sizes 64 and 128), its autotuning cut to one configuration.
Failures are stored with their settings.

A single call's ratio scatters, as fla's own error does with other random numbers (`scatter`: its error with others
over its error with these, shape and options the same), the more so the more alike the keys are.  So the ratio, ours
over fla's, is judged by its geometric mean over the random calls of a configuration, if there are ten or more
(`ratio_by_configuration`).

Exits with 1 if a result is not finite, if an error in float32 with ieee dots is above 1e-5, if a call raises, or if
the ratio of a configuration is above 1.1 for any output; with 3 if the GPU is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import random
import statistics
import time
from collections import defaultdict

import torch

from dn_lib.kernels import plan, rules
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.errors import MEANING, errors_of, exact_results
from experiments.harness.peers import load_fla
from experiments.harness.problems import OUTPUTS, Problem, draw, forward_backward, operator
from experiments.harness.processes import compile_ahead
from experiments.harness.results import Results, first_line

SIZES = ((64, 64), (128, 128), (256, 256), (96, 96), (40, 24), (128, 64), (64, 128), (16, 16))
DTYPES = ("bfloat16", "float16", "float32")
FLA_SIZES, FLA_HEADS = ((64, 64), (128, 128)), 2  # fla compiles anew for each number of heads
FLOAT32_LIMIT = 1e-5
RATIO_LIMIT, RATIO_CALLS = 1.1, 10  # of a configuration with so many calls of fla


def configurations(variants: int, seed: int, smoke: bool = False) -> list[dict]:
    """What kernels are compiled for: for each size and dtype, `variants` draws of the options.

    Options are dealt like cards, so that each value comes up equally often with every size.
    """
    rng, rows = random.Random(f"configurations {seed}"), []
    sizes = ((16, 16), (40, 24)) if smoke else SIZES
    for (d_k, d_v), dtype in itertools.product(sizes, DTYPES):
        decks = {
            "norm": (False, True),
            "state": (False, True),
            "dstate": (False, True),
            "varlen": (False, True),
            "chunk": (64, 32, 16),
            "segments": (None, 2, 3, 5),
            "alone": (False, True),  # whether each program has an SM to itself: other tiles
            "whole": (False, True),  # whole chunks, 1,024 tokens at least: TMA fetches the tiles
        }
        dealt = {}
        for name, values in decks.items():
            cards = (list(values) * variants)[: max(variants, len(values))]
            rng.shuffle(cards)
            dealt[name] = cards
        for i in range(variants):
            row = {"d_k": d_k, "d_v": d_v, "dtype": dtype, **{name: cards[i] for name, cards in dealt.items()}}
            if row["varlen"]:
                row |= {"segments": None, "whole": False}  # packed sequences are not split, nor fetched so
            rows.append(row)
    return rows


def a_call(number: int, configs: list[dict], seed: int, smoke: bool = False) -> dict:
    """Settings of one call."""
    rng = random.Random(f"call {seed} {number}")
    c = dict(configs[number % len(configs)])
    longest = 70 if smoke else 700
    B, L = rng.choice((1, 2, 3)), rng.choice((rng.randint(1, longest), rng.randint(1, 80)))
    if c["whole"] and not smoke:
        L = 64 * rng.randint(16, 20)
    H = FLA_HEADS if (c["d_k"], c["d_v"]) in FLA_SIZES else rng.choice((1, 2, 3))
    bias = rng.choice((0.0, 0.0, 0.3, 1.0, 3.0, "identical"))
    c |= {"bias": bias, "beta_range": rng.choice((1.0, 2.0)), "seed": rng.randrange(2**31), "lengths": None}
    if c["varlen"]:
        cuts = sorted(rng.randint(0, L) for _ in range(rng.randint(0, 5)))  # sequences may be empty
        c["lengths"] = [b - a for a, b in itertools.pairwise((0, *cuts, L))]
        B = 1
    if smoke:
        B, H = 1, 1
    return {"number": number, "B": B, "L": L, "H": H, **c}


def problem(c: dict, device: str) -> Problem:
    identical = c["bias"] == "identical"
    return draw(
        c["B"], c["L"], c["H"], c["d_k"], c["d_v"], getattr(torch, c["dtype"]), device, seed=c["seed"],
        bias=0.0 if identical else c["bias"], identical=identical, beta_range=c["beta_range"], norm=c["norm"],
        state=c["state"], dstate=c["dstate"], lengths=c["lengths"], chunk=c["chunk"],
    )  # fmt: skip


def planned(c: dict, device: str) -> contextlib.AbstractContextManager:
    """Within it the operator is planned as the call says.

    With `alone` every program has an SM to itself, else none has: the plan is for a GPU that has very many, or none.
    """
    arch = plan.target_of(torch.device(device)).arch
    target = rules.Target(arch, sms=2**20 if c["alone"] else 0)
    return plan.using(segments=c["segments"], tma=True if c["whole"] else None, target=target)


def fla_takes(c: dict) -> bool:
    return (c["d_k"], c["d_v"]) in FLA_SIZES and c["dtype"] != "float32" and 0 not in (c["lengths"] or [1])


def compile_one(job: tuple[dict, bool]) -> None:
    """In a process of its own: one small call, so that Triton's cache holds the kernels."""
    c, with_fla = job
    c = c | {"number": -1, "B": 1, "L": 150, "H": FLA_HEADS, "bias": 0.0, "beta_range": 1.0, "seed": 0}
    c["lengths"] = [100, 50] if c["varlen"] else None
    if c["segments"] is not None:
        c["L"] = 64 * c["segments"]
    if c["whole"]:
        c["L"] = 1024
    p = problem(c, "cuda")
    with planned(c, "cuda"):
        forward_backward(operator, p)
    if with_fla and fla_takes(c):
        peer = load_fla(False)
        if peer.chunk is not None:
            peer.cut = True
            forward_backward(peer.form, p)


def measure(c: dict, device: str, peer) -> dict:
    """Errors of ours, and of fla if `peer` is given, for one call."""
    p = problem(c, device)
    exact = exact_results(p)
    with planned(c, device):
        row = {"ours": errors_of(forward_backward(operator, p), exact)}
    # Far smaller references than results are a sign of cancellation in the problem, not in the kernels.
    row["norms"] = {name: x.detach().norm().item() for name, x in exact.items()}
    if peer is not None:
        try:
            row["fla"] = errors_of(forward_backward(peer.form, p), exact)
            again = problem(c | {"seed": c["seed"] + 1}, device)
            row["fla again"] = errors_of(forward_backward(peer.form, again), exact_results(again))
        except Exception as error:
            row["fla_failure"] = first_line(error)
    return row


def faults(c: dict, row: dict) -> list[str]:
    """What is wrong with a call, beyond rounding."""
    found = [f"{name} is not finite" for name, e in row["ours"].items() if not math.isfinite(e)]
    if c["dtype"] == "float32":
        over = [name for name, e in row["ours"].items() if math.isfinite(e) and e > FLOAT32_LIMIT]
        found += [f"{name}: {row['ours'][name]:.3g} is above {FLOAT32_LIMIT:g} in float32" for name in over]
    return found


def percentile(x: list[float], share: float) -> float:
    x = sorted(x)
    return x[min(len(x) - 1, math.ceil(share * len(x)) - 1)] if x else math.nan


def ratio_of(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """By output, where both are finite and neither is zero."""
    both = {name: (e, theirs.get(name, math.nan)) for name, e in ours.items()}
    return {name: a / b for name, (a, b) in both.items() if math.isfinite(a) and math.isfinite(b) and a > 0 and b > 0}


def spread_of(ratios: list[float]) -> dict:
    return {
        "calls": len(ratios),
        "geometric_mean": math.exp(statistics.mean(math.log(x) for x in ratios)),
        "median": statistics.median(ratios),
        "p99": percentile(ratios, 0.99),
        "max": max(ratios),
        "above_1.1": sum(x > 1.1 for x in ratios),
    }


OPTIONS = ("d_k", "d_v", "dtype", "norm", "state", "dstate", "varlen", "chunk", "segments", "alone", "whole")


class Tally:
    """Errors by dtype and output, ratios to fla, and the calls that have something wrong."""

    def __init__(self):
        self.calls = self.fla_calls = self.fla_not_finite = 0
        self.grouped = defaultdict(lambda: defaultdict(list))  # (what, its value) -> output -> ratios
        self.scatter = defaultdict(list)  # keys -> fla again over fla, of o
        self.errors = defaultdict(list)  # (dtype, output) -> [(error, number)]
        self.ratios = defaultdict(list)  # (dtype, output) -> [(ours / fla, number)]
        self.failures, self.fla_failures, self.worst = [], [], {}

    def add(self, c: dict, row: dict) -> None:
        self.calls += 1
        for name, e in row["ours"].items():
            at = c["dtype"], name
            self.errors[at].append((e, c["number"]))
            if at not in self.worst or not e <= self.worst[at]["error"]:
                norm = row["norms"][name]
                self.worst[at] = {"dtype": c["dtype"], "output": name, "error": e, "reference_norm": norm, "call": c}
        for name, ratio in ratio_of(row["ours"], row.get("fla", {})).items():
            self.ratios[c["dtype"], name].append((ratio, c["number"]))
            self.grouped["configuration", tuple(c[o] for o in OPTIONS)][name].append(ratio)
            self.grouped["keys", (c["dtype"], c["bias"], c["beta_range"])][name].append(ratio)
        if "fla again" in row:
            scatter = ratio_of(row["fla again"], row["fla"])
            self.scatter[c["dtype"], c["bias"], c["beta_range"]] += [scatter["o"]] if "o" in scatter else []
        if "fla" in row:
            self.fla_calls += 1
            self.fla_not_finite += any(not math.isfinite(e) for e in row["fla"].values())
        if "fla_failure" in row:
            self.fla_failures.append({"call": c["number"], "failure": row["fla_failure"]})
        if wrong := faults(c, row):
            self.failures.append({"wrong": wrong, "call": c, "errors": row["ours"]})

    def by_configuration(self) -> list[dict]:
        """The geometric means of each configuration's ratios to fla, and those outputs for which they are too large."""
        rows = []
        for (what, options), outputs in self.grouped.items():
            if what == "configuration" and len(outputs["o"]) >= RATIO_CALLS:
                means = {name: spread_of(r)["geometric_mean"] for name, r in outputs.items()}
                above = [name for name, mean in means.items() if mean > RATIO_LIMIT]
                row = {"options": dict(zip(OPTIONS, options, strict=True)), "calls": len(outputs["o"])}
                rows.append(row | {"ratios": means, "above": above})
        return rows

    def by_keys(self) -> list[dict]:
        """Ratios of o and the worst output by how alike the keys are, with fla's own scatter beside them."""
        rows = []
        for (what, keys), outputs in self.grouped.items():
            if what == "keys":
                means = {name: spread_of(r)["geometric_mean"] for name, r in outputs.items()}
                row = dict(zip(("dtype", "bias", "beta_range"), keys, strict=True)) | {"o": spread_of(outputs["o"])}
                row |= {"geometric_means": means}
                rows.append(row | ({"scatter": spread_of(self.scatter[keys])} if self.scatter[keys] else {}))
        return sorted(rows, key=lambda r: (r["dtype"], str(r["bias"]), r["beta_range"]))

    def summary(self) -> dict:
        """In chapters' order of outputs: worst, 99th percentile and median of each dtype; ratios ours / fla."""
        order = [(d, n) for d in DTYPES for n in OUTPUTS if (d, n) in self.errors]
        errors, ratios = {}, {}
        for dtype, name in order:
            e = [x for x, _ in self.errors[dtype, name]]
            finite = [x for x in e if math.isfinite(x)]
            errors.setdefault(dtype, {})[name] = {
                "calls": len(e),
                "not_finite": len(e) - len(finite),
                "worst": max(finite, default=math.nan),
                "p99": percentile(finite, 0.99),
                "median": statistics.median(finite) if finite else math.nan,
                "worst_call": self.worst[dtype, name]["call"]["number"],
            }
            if r := self.ratios[dtype, name]:
                largest, number = max(r)
                found = spread_of([x for x, _ in r]) | {"max": largest, "max_call": number}
                ratios.setdefault(dtype, {})[name] = found | {"above_1.1": sorted(n for x, n in r if x > 1.1)[:50]}
        return {
            "calls": self.calls,
            "fla_calls": self.fla_calls,
            "fla_calls_not_finite": self.fla_not_finite,
            "errors": errors,
            "ratio_to_fla": ratios,
            "ratio_limit": RATIO_LIMIT,
            "ratio_by_configuration": self.by_configuration(),
            "ratio_by_keys": self.by_keys(),
            "failures": len(self.failures),
            "fla_failures": self.fla_failures[:20],
        }


def table(s: dict) -> str:
    lines = [f"{'dtype':9} {'output':9} {'calls':>6} {'median':>9} {'p99':>9} {'worst':>9} | ours / fla: median, max"]
    for dtype, outputs in s["errors"].items():
        for name, e in outputs.items():
            r = s["ratio_to_fla"].get(dtype, {}).get(name)
            last = f"{r['median']:.2f} {r['max']:.2f} (call {r['max_call']}) of {r['calls']}" if r else "-"
            lines.append(
                f"{dtype:9} {name:9} {e['calls']:6d} {e['median']:9.2e} {e['p99']:9.2e} {e['worst']:9.2e} | {last}"
            )
    for row in s["ratio_by_keys"]:
        scatter = row.get("scatter", {})
        lines.append(
            f"{row['dtype']:9} keys {row['bias']!s:9} beta to {row['beta_range']:g}: o {row['o']['geometric_mean']:.2f}"
            f" (most {row['o']['max']:.2f}), worst output {max(row['geometric_means'].values()):.2f}; fla again over"
            f" fla most {scatter.get('max', math.nan):.2f}, above 1.1 in {scatter.get('above_1.1')}"
        )
    for row in s["ratio_by_configuration"]:
        over = f"  ABOVE {s['ratio_limit']} {row['above']}" if row["above"] else ""
        means = " ".join(f"{name} {mean:.2f}" for name, mean in row["ratios"].items())
        lines.append(f"{row['options']} of {row['calls']}: {means}{over}")
    return "\n".join(lines)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="number of the first call")
    parser.add_argument("--seconds", type=float, help="begin no call after so many, compilation not counted")
    parser.add_argument("--variants", type=int, default=4, help="draws of the options for each size and dtype")
    parser.add_argument("--no-fla", action="store_true")
    parser.add_argument("--fla-calls", type=int, default=150, help="at most so many calls of fla")


def run(options: argparse.Namespace) -> int:
    device = device_of(options.smoke)
    options.out.unlink(missing_ok=True)
    configs = configurations(options.variants, options.seed, options.smoke)
    peer = load_fla(options.no_fla, options.smoke)
    peer.cut = True
    settings = settings_of(options) | {
        "fla": {"status": peer.status, **peer.facts, "autotuning": "first configuration"},
        "sizes": SIZES,
        "errors": MEANING,
        "reproduce": "the same command with --start NUMBER --calls 1 and the same --seed and --variants",
        "rows": "failures first, then the worst call of each dtype and output",
    }
    results = Results(options.out, settings, smoke=options.smoke, seed=options.seed)
    torch.set_float32_matmul_precision("highest")
    numbers = range(options.start, options.start + options.calls)
    used = [configs[i] for i in sorted({n % len(configs) for n in numbers})]
    if options.workers and not options.smoke and len(used) > 1:
        jobs = [(c, peer.chunk is not None) for c in used]
        settings["precompiled"] = {"configurations": len(used), **compile_ahead(compile_one, jobs, options.workers)}
        print(settings["precompiled"], flush=True)
    tally, begun = Tally(), time.monotonic()
    code = calls(numbers, configs, options, device, peer, tally)
    results.summary = tally.summary() | {"seconds": time.monotonic() - begun}
    for kind, rows in (("failure", tally.failures[:200]), ("worst", tally.worst.values())):
        results.rows += [results.marked({"key": f"{kind} {i}", **row}) for i, row in enumerate(rows)]
    failed = [" ".join(map(str, ("FAILED", *failure["wrong"], failure["call"]))) for failure in tally.failures[:10]]
    counts = f"{tally.calls} calls, {tally.fla_calls} of fla, {len(tally.failures)} failures"
    worse = [row for row in results.summary["ratio_by_configuration"] if row["above"]]
    return results.finish("\n".join([*failed, table(results.summary), counts]), code, failed=tally.failures or worse)


def calls(numbers: range, configs: list[dict], options: argparse.Namespace, device: str, peer, tally: Tally) -> int:
    """Makes the calls and tallies them: 0; 3 if the GPU was lost."""
    left, begun, shown = options.fla_calls, time.monotonic(), 0.0
    for number in numbers:
        elapsed = time.monotonic() - begun
        if options.seconds is not None and elapsed > options.seconds:
            print(f"stopped after {elapsed:.0f} s and {tally.calls} calls", flush=True)
            break
        c = a_call(number, configs, options.seed, options.smoke)
        with_fla = peer.chunk is not None and left > 0 and fla_takes(c)
        left -= with_fla
        try:
            tally.add(c, measure(c, device, peer if with_fla else None))
        except Exception as error:
            tally.failures.append({"wrong": [first_line(error)], "call": c})
            try:
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception:
                print(f"GPU lost at call {c}: go on with --start {number + 1}", flush=True)
                return 3
        if elapsed - shown > 10:
            shown = elapsed
            print(f"[{elapsed:5.0f} s] {tally.calls} calls, {len(tally.failures)} failures", flush=True)
    return 0


EXPERIMENT = Experiment(
    question="How far from float64 is the operator on some thousand random calls, and how far is fla?",
    writes=("errors.json",),
    minutes=4,
    gpu="H200",
    run=run,
    options=options,
    each=(("--calls", "2200", "--seconds", "160", "--variants", "2", "--fla-calls", "400"),),
    shared=("seed", "smoke", "workers"),
)
