"""Time and errors beside FlashQLA, the fastest peer on Hopper, and fla: heads of 128, in one process.

FlashQLA (PyPI `flash-qla`, TileLang) has the gated delta rule alone.  With --operator delta_rule it is given gates of
one (g = 0), which makes it our operator; it computes a gradient of g besides, and that is its cost, not ours.  With
--operator gated_delta_rule all have the same gates and return the same gradients.  FlashQLA looks for how far back a
token is seen through its gates and begins there, so its time depends on them: --gates says which.

Shapes: 32,768 tokens with 16 heads, from 32 x 1024 to 1 x 32768, and what is left on one GPU of a model whose heads are
shared by several: one sequence of 2K to 32K tokens with 4 to 64 heads.  Errors of all come first, against float64, on
a batch of at most two sequences of at most 1,024 tokens; where one of ours is above 8e-3 nothing is timed, and a
peer is not where one of its own is above four times that.

A row holds, for forward and forward_backward, the milliseconds of each (medians of `do_bench` by turns; all samples),
and `ratios`, the others' over ours: above 1 ours is faster.  TileLang compiles each of FlashQLA's kernels for some 10
to 40 s, so --workers processes make each call once before, for the caches on the disk.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dn_lib.kernels import plan
from dn_lib.operators import OPERATORS, Operator, Peer
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.clock import Clock
from experiments.harness.errors import MEANING, errors_of, exact_results, limit_of, refused, verdict
from experiments.harness.problems import (
    GATES,
    INPUTS,
    Form,
    Problem,
    draw,
    forward,
    forward_backward,
    peer_form,
    registered,
    segments_of,
)
from experiments.harness.processes import compile_ahead
from experiments.harness.provenance import package_version
from experiments.harness.results import Results, first_line, geometric_mean

D = 128
GRID = tuple((16, B, L) for B, L in ((32, 1024), (16, 2048), (8, 4096), (4, 8192), (2, 16384), (1, 32768), (1, 8192)))
SHARED_HEADS = (
    (4, 1, 32768), (8, 1, 2048), (8, 1, 16384), (16, 1, 4096), (16, 1, 16384), (32, 1, 8192), (32, 1, 32768),
    (64, 1, 8192),
)  # fmt: skip
FLASH_QLA = Peer("flash_qla:chunk_gated_delta_rule", {"qk_l2norm": "use_qk_l2norm_in_kernel", "chunk_size": None})
PACKAGES = {"flash_qla": "flash-qla", "fla": "flash-linear-attention"}
# fla hands the gated rule to FlashQLA where that is installed, unless it is told not to before it is imported.
FLA_BY_ITSELF = {"FLA_FLASH_QLA": "0"}


@functools.cache
def gates_of_one(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=device)


def flash_qla_form(p: Problem) -> tuple[Tensor, Tensor | None]:
    given = dict(zip(p.operator.inputs, p.inputs, strict=True))
    if "g" not in given:
        given["g"] = gates_of_one(p.beta.shape, p.q.device)
    given["g"] = given["g"].float()  # its backward takes no other
    o, state, *_ = FLASH_QLA.load()(**FLASH_QLA.keywords(**given, qk_l2norm=p.norm))
    return o, state


def contenders(operator: Operator, options: argparse.Namespace) -> dict[str, Form]:
    """Ours, and those of the others that are installed."""
    found: dict[str, Form] = {"ours": registered(operator.kernels["triton"])}
    if options.smoke:
        return found
    for name, form in {"flash_qla": flash_qla_form, "fla": functools.partial(peer_form, name="fla")}.items():
        if importlib.util.find_spec(name) is not None and name not in options.skip:
            found[name] = form
    return found


def call_once(job: tuple[str, str, tuple[int, int, int], str, str]) -> None:
    """One shape's calls of one contender, as `measured` makes them."""
    name, who, (H, B, L), device, gates = job
    os.environ.update(FLA_BY_ITSELF)
    operator = OPERATORS[name]
    form = flash_qla_form if who == "flash_qla" else functools.partial(peer_form, name=who)
    for b, length in ((min(B, 2), min(L, 1024)), (B, L)):
        p = draw(b, length, H, D, D, torch.bfloat16, device, operator=operator, seed=1, gates=gates)
        forward_backward(form, p)
        forward(form, p)


def by_turns(clock: Clock, runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(clock.median(run))
    return samples


def measured(
    operator: Operator, shape: tuple[int, int, int], forms: dict[str, Form], clock: Clock, device: str, gates: str
) -> dict:
    H, B, L = shape
    d = D if device == "cuda" else 16
    row: dict = {"H": H, "B": B, "L": L, "d": d}
    segments = segments_of(B, L, H, d, torch.bfloat16, device)
    drawn = {"operator": operator, "gates": gates}
    sample = draw(min(B, 2), min(L, 1024), H, d, d, torch.bfloat16, device, seed=1, **drawn)
    p = draw(B, L, H, d, d, torch.bfloat16, device, seed=2, **drawn)
    exact, errors, there = exact_results(sample), {}, dict(forms)
    for name, form in forms.items():
        try:
            with plan.using(segments=segments if segments > 1 else None):
                errors[name] = errors_of(forward_backward(form, sample), exact)
        except Exception as error:
            if name == "ours":
                raise
            row[f"{name}_failure"] = first_line(error)
            del there[name]
    row["errors"], limit = errors, limit_of(torch.bfloat16, device=device)
    if wrong := verdict(errors["ours"], None, limit):
        return row | refused(wrong)
    for name in sorted(set(there) - {"ours"}):
        if wrong := verdict(errors[name], None, 4 * limit):
            row[f"{name}_failure"] = "; ".join(wrong)
            del there[name]
    for name, run in (("forward", forward), ("forward_backward", forward_backward)):
        runs = {who: functools.partial(run, form, p) for who, form in there.items()}
        samples = by_turns(clock, runs, 1 if clock.smoke else 3)
        ms = {who: statistics.median(times) for who, times in samples.items()}
        ratios = {who: time / ms["ours"] for who, time in ms.items() if who != "ours"}
        row[name] = {"ms": ms, "samples_ms": samples, "ratios": ratios}
    return row


def summary(rows: list[dict]) -> dict:
    """Geometric means and least ratios against each of the others."""
    found: dict = {}
    for name in ("forward", "forward_backward"):
        for who in PACKAGES:
            ratios = {row["key"]: row[name]["ratios"][who] for row in rows if who in row[name]["ratios"]}
            if ratios:
                least = min(ratios, key=lambda key: ratios[key])
                found[f"{name}, {who}"] = {
                    "shapes": len(ratios), "geometric_mean_ratio": geometric_mean(list(ratios.values())),
                    "least_ratio": ratios[least], "least_ratio_at": least,
                }  # fmt: skip
    return found


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--operator", choices=("delta_rule", "gated_delta_rule"), default="delta_rule")
    parser.add_argument("--gates", choices=tuple(GATES), default="layer", help="as a new layer's, or strong ones")
    parser.add_argument("--skip", nargs="*", default=[], choices=tuple(PACKAGES), help="peers to leave out")


def run(options: argparse.Namespace) -> int:
    os.environ.update(FLA_BY_ITSELF)
    device, clock = device_of(options.smoke), Clock.of(options)
    operator = OPERATORS[options.operator]
    forms = contenders(operator, options)
    settings = {
        **settings_of(options),
        "peers": {name: package_version(PACKAGES[name]) for name in forms if name != "ours"},
        "clock": f"{clock}, by turns, three each",
        "inputs": f"{INPUTS}; torch.autograd.grad",
        "gates": (GATES[options.gates].__doc__ or "").partition("\n")[0] if "g" in operator.inputs else "none",
        "errors": MEANING,
    }
    results = Results(options.out, settings, budget=options.budget, smoke=options.smoke, any_commit=options.any_commit)
    shapes = ((1, 1, 70),) if options.smoke else (*GRID, *SHARED_HEADS)

    def body() -> None:
        for shape in shapes:
            key = "H={} B={} L={}".format(*shape)
            results.measure(key, lambda shape=shape: measured(operator, shape, forms, clock, device, options.gates))

    if options.workers and not options.smoke:
        others = [who for who in forms if who != "ours"]
        jobs = [(options.operator, who, shape, device, options.gates) for who in others for shape in reversed(shapes)]
        settings["compiled"] = compile_ahead(call_once, jobs, options.workers) if jobs else {}
    code = results.fill(body)
    results.summary = summary(results.done)
    lines = []
    for row in results.rows:
        cells = [
            " ".join(f"{who} {ms:.3f}" for who, ms in row[name]["ms"].items())
            for name in ("forward", "forward_backward")
            if name in row
        ]
        lines.append(f"{row['key']:24} {' | '.join(cells) or row.get('failure')}")
    lines += [f"{name}: {about}" for name, about in results.summary.items()]
    return results.finish("\n".join(lines), code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="How much faster or slower than FlashQLA and fla is the operator at heads of 128?",
    writes=("flash_qla.json", "flash_qla_gated.json", "flash_qla_strong.json"),
    minutes=8,
    gpu="H200",
    run=run,
    options=options,
    shared=("any-commit", "budget", "quick", "smoke", "workers"),
    each=((), ("--operator", "gated_delta_rule"), ("--operator", "gated_delta_rule", "--gates", "strong")),
    small=("--quick",),
    measured=False,
)
