"""Tries tile sizes, warps and stages for each kernel of the operator on the GPU at hand, and says which is fastest.

    python -m experiments tune --out tiles_sm90.json [--head-dims 64 128 256] [--only chunk_scan_fwd] [--tma] [--norm]

One file for each architecture: the rule in `dn_lib/kernels/plan.py` is edited from it by hand.  A candidate first
has to agree with float64, outputs and gradients, on correlated keys; then its kernel is timed alone, on the arguments
of the operator's own launch.  Kernels that scan the chunks are timed in two regimes: `shared`, a batch that fills the
GPU, and `alone`, one long sequence whose programs have an SM each.  Tiles of 32 value channels are not
tried: one of them was miscompiled.  Candidates are compiled ahead of time on all cores, then measured in a process of
their own: one that takes the GPU's context down is a row with status `failed`.

A row for each kernel, variant and set of tiles: `tiles` (BK, BV, warps, stages, tma), the most `registers`, `stack` and
`shared` bytes of its forms, `errors` of output and gradients, and `ms` of the kernel alone, with the number of
`programs`; those of a split sequence's first pass at 2 and 3 segments.  `chosen` names the regimes in which the rule
picks the row at present; `summary.best` sets it beside the fastest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dn_lib.kernels import plan, rules
from dn_lib.kernels.delta_rule import launch
from dn_lib.kernels.rules import Tiles
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.clock import Clock
from experiments.harness.errors import errors_of, exact_results, limit_of, refused, verdict
from experiments.harness.launches import launches, through
from experiments.harness.problems import Problem, draw
from experiments.harness.results import OutOfTime, Results, first_line

KERNELS = ("chunk_scan_fwd", "chunk_scan_bwd", "chunk_bwd_dqk", "chunk_inverse")
SHAPES = {  # B, L, H
    "shared": {64: (16, 2048, 32), 128: (16, 2048, 16), 256: (8, 4096, 8)},
    "alone": {64: (1, 8192, 16), 128: (1, 8192, 16), 256: (1, 8192, 8)},
}
SEGMENTS = {"shared": 2, "alone": 3}  # of each sequence, where a first pass over a split one is timed
CHECKED = (1, 1024, 2)  # the least length for which the rule takes TMA
SHARED_LIMIT = 227 * 1024
PATIENCE = 60.0  # seconds without a row after which the process that measures is given up


# Of a kernel and its variant: the launches (see `rules.KERNELS`) whose tiles the candidate sets.
LAUNCHES = {
    ("chunk_scan_fwd", ""): "chunk_scan_fwd",
    ("chunk_scan_fwd", "transition"): "segment_maps_fwd",
    ("chunk_scan_bwd", "fused"): "chunk_scan_bwd",
    ("chunk_bwd_dqk", ""): "chunk_bwd_dqk",
    ("chunk_inverse", ""): "chunk_inverse",
}


@dataclass(frozen=True)
class Candidate:
    """variant: "transition" (chunk_scan_fwd) or "fused" (chunk_scan_bwd).

    chunk_scan_bwd of small heads without it is the first pass over a split sequence.
    """

    d: int
    norm: bool
    kernel: str
    variant: str
    tiles: Tiles

    @property
    def launch(self) -> str:
        """The name of the launch that takes the tiles, for `plan.using`."""
        if (self.kernel, self.variant) == ("chunk_scan_bwd", ""):
            return "segment_maps_bwd" if self.split else "chunk_scan_bwd"
        return LAUNCHES[self.kernel, self.variant]

    @property
    def key(self) -> str:
        t = self.tiles
        name = " ".join(filter(None, (self.kernel, self.variant, "norm" if self.norm else "")))
        return f"d{self.d} {name} {t.BK}x{t.BV} {t.warps} warps {t.stages} stages{' tma' if t.tma else ''}"

    @property
    def split(self) -> bool:
        """Whether the kernel's form is a first pass, launched for split sequences only."""
        return self.variant == "transition" or (self.kernel == "chunk_scan_bwd" and self.d <= 64 and not self.variant)

    @property
    def regimes(self) -> tuple[str, ...]:
        return ("shared", "alone") if self.kernel in ("chunk_scan_fwd", "chunk_scan_bwd") else ("shared",)

    def about(self) -> dict:
        """The row's own words: what was tried, and the regimes for which the rule has chosen it."""
        named = {"d": self.d, "norm": self.norm, "kernel": self.kernel, "variant": self.variant}
        picked = [r for r in self.regimes if self.rule(r == "alone") == self.tiles]
        return {**named, "tiles": shown(self.tiles), "chosen": picked}

    def rule(self, one_wave: bool) -> Tiles:
        """What the plan's rule chooses at present."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options = {"norm": self.norm, "arch": plan.target_of(device).arch}
        return rules.choose_tiles(self.launch, self.d, self.d, torch.bfloat16, one_wave=one_wave, **options)


def shown(tiles: Tiles) -> list:
    """BK, BV, warps, stages, tma."""
    return list(tiles[:5])


def candidates(d: int, norm: bool) -> Iterator[Candidate]:
    """What to try for head size d, TMA on and off."""

    def each(kernel: str, variant: str, *sizes: tuple) -> Iterator[Candidate]:
        for BK, BV, warps, stages, tma in itertools.product(*sizes):
            if max(BK, BV) <= d and BK * BV <= 128 * 128 and (stages < 4 or tma):
                yield Candidate(d, norm, kernel, variant, Tiles(BK, BV, warps, stages, tma))

    both, stages = (True, False), (1, 2, 3, 4)
    for BV, warps in ((64, 4), (128, 4), (128, 8), *(((64, 8),) if d == 256 else ())):
        for kernel, variant in (("chunk_scan_fwd", ""), ("chunk_scan_fwd", "transition"), ("chunk_scan_bwd", "")):
            yield from each(kernel, variant, (d,), (BV,), (warps,), stages, both)
        if d <= 64:
            yield from each("chunk_scan_bwd", "fused", (d,), (BV,), (warps,), stages, both)
    if d > 64:
        for BK, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
            if not norm or d == BK:
                yield from each("chunk_bwd_dqk", "", (BK,), (64, 128), (warps,), stages[:3], both)
    for BK, warps, deep in itertools.product((64, 128), (1, 2, 4), (2, 3)):
        if d >= BK:
            yield Candidate(d, norm, "chunk_inverse", "", Tiles(BK, 0, warps, deep))


def is_first_pass(options: dict) -> bool:
    """Whether a launch of a kernel is that of a first pass over a split sequence."""
    return bool(options.get("TRANSITION") or options.get("LOCAL"))


def chosen(c: Candidate, segments: int) -> contextlib.AbstractContextManager:
    """Within it the launch of a candidate takes its tiles, and all else what the rule says.

    Short calls fetch their tiles as long ones do.
    """
    return plan.using(tiles={c.launch: c.tiles}, segments=segments, tma=c.tiles.tma or None)


# --- Compiling ---------------------------------------------------------------------------------------------------


def compile_one(c: Candidate, arch: int, everything: bool = False) -> dict | str:
    """In a process of its own: registers, stack and shared memory, the most of the forms of the candidate's kernel.

    everything: compiles the operator's other kernels too, which the measurement then finds in Triton's cache.
    """
    from dn_lib.kernels import aot

    def only(plain, kernel, arguments: tuple, options: dict):
        mine = kernel.fn.__name__ == c.kernel and is_first_pass(options) == c.split
        return plain(kernel, *arguments, **options) if mine else None

    call = {"dtype": "bfloat16", "K": c.d, "V": c.d, "norm": c.norm, "state": False, "varlen": False, "chunk": 64}
    calls = [call | {"segments": 2 if c.split else 1}]
    try:
        with chosen(c, 2 if c.split else 1):
            with through(only):
                rows = aot.compile_calls(arch, calls, aot.BY_TMA)
            if everything:
                aot.compile_calls(arch, calls, aot.BY_TMA)
        return {name: max(row[name] for row in rows) for name in ("registers", "stack", "shared")}
    except Exception as error:
        return first_line(error)


def compile_job(job: tuple[Candidate, int, bool]) -> tuple[Candidate, dict | str]:
    return job[0], compile_one(*job)


# --- Measuring ---------------------------------------------------------------------------------------------------


class Bench:
    """Checks and times candidates of one head size; inputs and exact results are made once."""

    def __init__(self, d: int, norm: bool, smoke: bool):
        self.d, self.norm, self.smoke = d, norm, smoke
        self.device, self.chunk = ("cpu", 16) if smoke else ("cuda", 64)
        self.clock = Clock(5, 20, smoke=smoke)
        # Keys of the calls that are checked share a direction.
        self.small = self.inputs(*((1, 40, 1) if smoke else CHECKED), bias=0.2)
        shapes = {name: (1, 48, 1) if smoke else some[d] for name, some in SHAPES.items()}
        self.large = {name: self.inputs(*shape) for name, shape in shapes.items()}
        self.exact = exact_results(replace(self.small, norm=norm))

    def inputs(self, B: int, L: int, H: int, bias: float = 0.0) -> Problem:
        return draw(B, L, H, self.d, self.d, torch.bfloat16, self.device, bias=bias)

    def forward(self, p: Problem, *, training: bool) -> tuple[Callable[[], tuple], plan.Plan]:
        """The operator's forward as it is planned at present, and its plan."""
        q, k, v, beta = (x.detach() for x in p.leaves)
        made = plan.plan_call(q, k, v, norm=self.norm, training=training, chunk=self.chunk)
        return partial(launch.forward, plan=made, q=q, k=k, v=v, beta=beta, scale=self.d**-0.5), made

    def backward(self, p: Problem) -> tuple[Tensor, Callable[[], tuple]]:
        """The output, and what makes the gradients."""
        run, made = self.forward(p, training=True)
        o, _, saved = run()
        q, k, _, beta = (x.detach() for x in p.leaves)
        inputs = {"q": q, "k": k, "beta": beta, "saved": saved, "do": p.do, "scale": self.d**-0.5}
        return o, partial(launch.backward, plan=made, dstate=None, initial_state=False, **inputs)

    def errors(self) -> dict[str, float]:
        o, backward = self.backward(self.small)
        return errors_of(dict(zip(self.exact, (o, *backward()[:4]), strict=True)), self.exact)

    def times(self, c: Candidate, regime: str) -> dict:
        """Milliseconds of the candidate's kernel alone, by what the forward is for, and how many programs it has."""
        p, found = self.large[regime], {}
        with chosen(c, SEGMENTS[regime] if c.split else 1):
            calls = {"training": self.forward(p, training=True)[0]}
            if c.kernel == "chunk_scan_fwd" and not c.split:
                calls["inference"] = self.forward(p, training=False)[0]
            if c.kernel in ("chunk_scan_bwd", "chunk_bwd_dqk"):
                calls = {"training": self.backward(p)[1]}
        for name, call in calls.items():
            with launches() as seen:
                call()
            mine = next(one for one in seen if one.name == c.kernel and is_first_pass(one.options) == c.split)
            found[name] = self.clock.median(mine.again)
            found["programs"] = mine.facts()["programs"]
        return found

    def row(self, c: Candidate, compiled: dict | str | None) -> dict:
        if isinstance(compiled, str):
            return {"status": "failed", "failure": compiled}
        row = dict(compiled or {})
        if row.get("shared", 0) > SHARED_LIMIT:
            return row | {"status": "failed", "failure": f"{row['shared']} bytes of shared memory"}
        with chosen(c, 2 if c.split else 1):
            row["errors"] = self.errors()
        if wrong := verdict(row["errors"], None, limit_of(torch.bfloat16, device=self.device)):
            return row | refused(wrong)
        return row | {"ms": {regime: self.times(c, regime) for regime in c.regimes}}


def serve(d: int, norm: bool, jobs: list, answers) -> None:
    """The process that measures: a row for each job.  A miscompiled kernel takes it down, and nothing else."""
    try:
        bench = Bench(d, norm, smoke=False)
    except Exception as error:  # the next process would fare no better
        for _ in jobs:
            answers.send({"status": "failed", "failure": first_line(error)})
        return
    for c, compiled in jobs:
        try:
            row = bench.row(c, compiled)
        except Exception as error:
            row = {"status": "failed", "failure": first_line(error)}
        answers.send(row)
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(1)  # the context is lost: the next process goes on


def served(d: int, norm: bool, jobs: list) -> Iterator[tuple[Candidate, dict]]:
    """(candidate, row) for each job, from as many processes as it takes."""
    context, done = multiprocessing.get_context("spawn"), 0
    while done < len(jobs):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=serve, args=(d, norm, jobs[done:], theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            while done < len(jobs):
                row = mine.recv() if mine.poll(PATIENCE) else {"status": "failed", "failure": "no answer"}
                yield jobs[done][0], row
                done += 1
                if row.get("failure") == "no answer":
                    break
        except EOFError:
            yield jobs[done][0], {"status": "failed", "failure": "the process that measured ended"}
            done += 1
        finally:
            process.kill()
            process.join()


# --- The table ---------------------------------------------------------------------------------------------------


def ordered(rows: list[dict], what: str, regime: str) -> list[dict]:
    timed = [r for r in rows if r["status"] == "ok" and what in r["ms"].get(regime, {})]
    return sorted(timed, key=lambda r: r["ms"][regime][what])


def summary(rows: list[dict]) -> dict:
    """For each kernel, regime and use: the fastest tiles, and those that the rule has chosen."""
    found = []
    groups = {}
    for r in (r for r in rows if "kernel" in r):  # one that raised before it was known says nothing
        groups.setdefault((r["d"], r["norm"], r["kernel"], r["variant"]), []).append(r)
    for (d, norm, kernel, variant), some in groups.items():
        for regime, what in itertools.product(SHAPES, ("inference", "training")):
            if not (best := ordered(some, what, regime)):
                continue
            rule = next((r for r in best if regime in r["chosen"]), None)
            found.append(
                {"d": d, "norm": norm, "kernel": kernel, "variant": variant, "regime": regime, "for": what}
                | {"fastest": best[0]["tiles"], "fastest_ms": best[0]["ms"][regime][what]}
                | {"chosen": rule and rule["tiles"], "chosen_ms": rule and rule["ms"][regime][what]}
            )
    return {
        "tiles": "BK, BV, warps, stages, tma",
        "best": found,
        "failed": [r["key"] for r in rows if r["status"] != "ok"],
    }


def table(found: dict) -> str:
    lines = [f"{'kernel':34} {'fastest':>24} {'ms':>8}  {'chosen':>24} {'ms':>8}"]
    for r in found["best"]:
        name = " ".join(filter(None, (f"d{r['d']}", r["kernel"], r["variant"], r["regime"], r["for"])))
        ms = f"{r['chosen_ms']:8.3f}" if r["chosen"] else f"{'-':>8}"
        lines.append(f"{name:40} {r['fastest']!s:>24} {r['fastest_ms']:8.3f}  {r['chosen']!s:>24} {ms}")
    return "\n".join([*lines, f"failed or refused: {len(found['failed'])}"])


def wanted(options: argparse.Namespace, d: int) -> list[Candidate]:
    """Candidates of one head size that the options ask for; those of the rule always, and first."""
    some = [c for c in candidates(d, options.norm) if not options.only or c.kernel in options.only]
    some = [c for c in some if c.tiles.tma or c.kernel == "chunk_inverse" or not options.tma]
    forms = dict.fromkeys((c.kernel, c.variant) for c in some)
    form = [Candidate(d, options.norm, kernel, variant, Tiles(0, 0, 0, 0)) for kernel, variant in forms]
    rules = [Candidate(d, c.norm, c.kernel, c.variant, c.rule(r == "alone")) for c in form for r in c.regimes]
    return list(dict.fromkeys([*rules, *some]))


def compiled_ahead(options: argparse.Namespace, jobs: list[Candidate], results: Results) -> dict:
    """Candidates with what compiling said of them."""
    major, minor = torch.cuda.get_device_capability()
    # One form of each head size compiles all kernels by their rule: the checks need them, whatever is tried.
    needed = [Candidate(d, options.norm, "chunk_scan_fwd", "transition", Tiles(0, 0, 0, 0)) for d in options.head_dims]
    needed = [replace(c, tiles=c.rule(False)) for c in needed]
    tasks = [(c, 10 * major + minor, c in needed) for c in dict.fromkeys([*needed, *jobs])]
    begun = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(tasks))) as pool:
        made = dict(pool.imap_unordered(compile_job, tasks, chunksize=1))
    results.settings["compiled"] = {"kernels": len(made), "seconds": time.monotonic() - begun}
    print(f"[{results.elapsed():6.1f} s] compiled {len(made)} candidates", flush=True)
    return made


def measure_all(options: argparse.Namespace, results: Results) -> None:
    todo = {d: [c for c in wanted(options, d) if not results.find(c.key)] for d in options.head_dims}
    made = compiled_ahead(options, [c for some in todo.values() for c in some], results)
    for d, some in todo.items():
        for c, row in served(d, options.norm, [(c, made[c]) for c in some]):
            results.add({"key": c.key, "status": "ok", **c.about(), **row})
            said = row.get("failure") or {name: ms.get("training") for name, ms in row["ms"].items()}
            print(f"[{results.elapsed():6.1f} s] {c.key}: {said}", flush=True)
            if options.budget is not None and results.elapsed() > options.budget:
                raise OutOfTime


def measure_few(options: argparse.Namespace, results: Results) -> None:
    """One set of tiles for each form of a kernel, in the interpreter."""
    bench, tiles = Bench(16, options.norm, smoke=True), Tiles(16, 16, 4, 1)
    forms = [
        ("chunk_scan_fwd", ""),
        ("chunk_scan_fwd", "transition"),
        ("chunk_scan_bwd", "fused"),
        ("chunk_scan_bwd", ""),
    ]
    some = [(kernel, variant, tiles) for kernel, variant in forms]
    for kernel, variant, chosen_tiles in [*some, ("chunk_inverse", "", tiles._replace(BV=0))]:
        c = Candidate(16, options.norm, kernel, variant, chosen_tiles)
        results.measure(c.key, lambda c=c: {**c.about(), **bench.row(c, None)})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256], choices=(64, 128, 256))
    parser.add_argument("--only", nargs="+", choices=KERNELS, help="these kernels alone")
    parser.add_argument("--tma", action="store_true", help="only tiles that TMA fetches")
    parser.add_argument("--norm", action="store_true", help="queries and keys are normalised in the kernels")


def run(options: argparse.Namespace) -> int:
    """0; 2 if the budget ran out.  Candidates that fail are part of the answer, but none may in a smoke run."""
    device_of(options.smoke)
    settings = {
        **settings_of(options),
        "clock": "triton.testing.do_bench medians of the kernel alone, warm-up 5 ms, 20 ms measured",
        "shapes": {name: {str(d): shape for d, shape in some.items()} for name, some in SHAPES.items()},
        "parts": SEGMENTS,
        "errors": "relative Frobenius norm against float64 of the same bfloat16 inputs; keys share a direction",
        "tiles": "BK, BV, warps, stages, tma; registers, stack and shared: the most of the kernel's forms",
    }
    results = Results(options.out, settings, budget=options.budget, smoke=options.smoke)
    capability = None if options.smoke else ".".join(map(str, torch.cuda.get_device_capability()))
    results.provenance["compute_capability"] = capability
    code = results.fill(lambda: (measure_few if options.smoke else measure_all)(options, results))
    results.summary = summary(results.rows)
    return results.finish(table(results.summary), code, failed=options.smoke and results.not_done)


EXPERIMENT = Experiment(
    question="Which tile sizes, warps and stages are fastest for each kernel on this GPU?",
    writes=("tiles_sm90.json",),
    minutes=2,
    gpu="H200",
    run=run,
    options=options,
    shared=("budget", "smoke"),
    each=(("--only", "chunk_scan_fwd", "chunk_scan_bwd", "chunk_bwd_dqk", "--tma", "--budget", "110"),),
)
