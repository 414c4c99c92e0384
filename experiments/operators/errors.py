"""Errors of the operators against float64 on random calls with gradients: sizes, dtypes, layouts and options mixed.

    python -m experiments errors --budget 120                           # as many of the calls as fit; again: goes on
    python -m experiments errors --only delta_rule --forms triton       # one form of one operator
    python -m experiments errors --out one.json --start 1234 --calls 1  # call 1234 alone

Every operator of the registry (`dn_lib.operators`) is called, with inputs of its own sampler and against its own
reference: its kernels that take a state, or its forms in plain PyTorch where it has none.  (Kernels without are those
that chapter 5 builds on its way; large heads do not fit into their shared memory.)  What a call draws is what the form
takes.  A call is fixed by its number, --seed, --variants, --only and --forms.

Compiling takes most of the time, so calls come in cells: ten of one set of kernels.  Kernels are compiled ahead in
processes of their own, in the order in which cells need them; cells stand in random order, so that those that a
budget leaves are a sample of all.  The file is written after each cell, and the same command goes on with the next.

The table gives median, 99th percentile and worst error of each form, dtype and output, and the ratio to fla's on the
same inputs where fla takes them (bfloat16 and float16, head sizes 64 and 128), its autotuning cut to one
configuration.  Failures are stored with their settings.

A single call's ratio scatters, as fla's own error does with other random numbers (`scatter`: its error with others
over its error with these, shape and options the same), the more so the more alike the keys are.  So the ratio, ours
over fla's, is judged by its geometric mean over the random calls of a configuration, if there are ten or more
(`ratio_by_configuration`).

Exits with 1 if a result is not finite, if an error in float32 with ieee dots is above 1e-5, if a call raises, or if
the ratio of a configuration is above 1.1 for any output; with 2 if the budget ran out; with 3 if the GPU is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dn_lib.kernels import plan, rules
from dn_lib.operators import OPERATORS
from dn_lib.operators import Form as RegisteredForm
from dn_lib.testing import LAYOUTS
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.errors import MEANING, errors_of, reference_of
from experiments.harness.peers import Peer, load_fla
from experiments.harness.problems import (
    Problem,
    draw,
    forward_backward,
    forward_results,
    matmul_precision,
    peer_form,
    registered,
)
from experiments.harness.processes import Died, spread
from experiments.harness.results import OutOfTime, Results, first_line

SIZES = ((64, 64), (128, 128), (256, 256), (96, 96), (40, 24), (128, 64), (64, 128), (16, 16))
DTYPES = ("bfloat16", "float16", "float32")
FLA_SIZES, FLA_HEADS = ((64, 64), (128, 128)), 2  # fla compiles anew for each number of heads
FLOAT32_LIMIT = 1e-5
RATIO_LIMIT, RATIO_CALLS = 1.1, 10  # of a configuration with so many calls of fla
CELL = 10  # calls


# --- What is called ----------------------------------------------------------------------------------------------


def subjects(only: list[str], forms: list[str] | None) -> list[tuple[str, str]]:
    """(operator, form): kernels that take a state, or forms in PyTorch if there is none; or those named in `forms`."""
    found = []
    for name in only:
        operator = OPERATORS[name]
        whole = [name for name, form in operator.kernels.items() if "initial_state" in form.takes]
        names = whole or operator.forms if forms is None else (f for f, _ in operator.every_form() if f in forms)
        found += [(name, form) for form in names]
    return found


def form_of(c: dict) -> RegisteredForm:
    return dict(OPERATORS[c["operator"]].every_form())[c["form"]]


def configurations(
    variants: int, seed: int, smoke: bool = False, only: list[str] | None = None, forms: list[str] | None = None
) -> list[dict]:
    """What kernels are compiled for: for each form, size and dtype, `variants` draws of the options that it takes.

    Options are dealt like cards, so that each value comes up equally often with every size.
    """
    rows = []
    sizes = ((16, 16), (40, 24)) if smoke else SIZES
    for name, form_name in subjects(list(OPERATORS) if only is None else only, forms):
        operator, rng = OPERATORS[name], random.Random(f"configurations {seed} {name} {form_name}")
        form = form_of({"operator": name, "form": form_name})
        long = form.triton and operator.length is None
        decks = {
            "norm": (False, True) if "qk_l2norm" in form.takes else (False,),
            "state": (False, True) if "initial_state" in form.takes else (False,),
            "dstate": (False, True) if form.differentiable else (False,),
            "varlen": (False, True) if "cu_seqlens" in form.takes and operator.length is None else (False,),
            "chunk": (64, 32, 16) if "chunk_size" in form.takes else (None,),
            "scale": (None, 0.7) if "scale" in form.takes else (None,),
            "layout": LAYOUTS,
            "segments": (None, 2, 3, 5) if long else (None,),
            # Whether each program has an SM to itself: other tiles.
            "alone": (False, True) if form.triton else (False,),
            # Whole chunks, 1,024 tokens at least: TMA fetches the tiles.
            "whole": (False, True) if long else (False,),
        }
        if form.triton and not {"g", "g_channels"}.isdisjoint(operator.inputs):
            # Log gates in float32, as layers have them; value heads that share a head of q and k.
            decks |= {"gates": (None, "float32"), "group": (1, 2, 3)}
        for (d_k, d_v), dtype in itertools.product(sizes, DTYPES):
            if getattr(torch, dtype) not in form.dtypes:
                continue
            dealt = {}
            for option, values in decks.items():
                cards = (list(values) * variants)[: max(variants, len(values))]
                rng.shuffle(cards)
                dealt[option] = cards
            for i in range(variants):
                row = {"operator": name, "form": form_name, "d_k": d_k, "d_v": d_v, "dtype": dtype}
                row |= {"gates": None, "group": 1} | {option: cards[i] for option, cards in dealt.items()}
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
    L = OPERATORS[c["operator"]].length or L
    H = FLA_HEADS if (c["d_k"], c["d_v"]) in FLA_SIZES else rng.choice((1, 2, 3))
    bias = rng.choice((0.0, 0.0, 0.3, 1.0, 3.0, "identical"))
    c |= {"bias": bias, "beta_range": rng.choice((1.0, 2.0)), "edges": rng.random() < 0.25}
    c |= {"seed": rng.randrange(2**31), "lengths": None}
    if c["varlen"]:
        cuts = sorted(rng.randint(0, L) for _ in range(rng.randint(0, 5)))  # sequences may be empty
        c["lengths"] = [b - a for a, b in itertools.pairwise((0, *cuts, L))]
        B = 1
    if smoke:
        B, H = 1, 1
    return {"number": number, "B": B, "L": L, "H": H, **c}


def problem(c: dict, device: str) -> Problem:
    """Drawn on the CPU: a call that fails on a GPU can be repeated without one, in Triton's interpreter."""
    operator, identical = OPERATORS[c["operator"]], c["bias"] == "identical"
    sampled = {"bias": 0.0 if identical else c["bias"], "equal": identical}
    if "beta" in operator.inputs:
        sampled |= {"beta_max": c["beta_range"], "edges": c["edges"]}
    group = c.get("group", 1)
    p = draw(
        c["B"], c["L"], c["H"] * group, c["d_k"], c["d_v"], getattr(torch, c["dtype"]), device, operator=operator,
        seed=c["seed"], norm=c["norm"], state=c["state"], dstate=c["dstate"], lengths=c["lengths"], chunk=c["chunk"],
        scale=c["scale"], layout=c["layout"], drawn_on="cpu", **sampled,
    )  # fmt: skip
    inputs = {name: x.detach() for name, x in zip(operator.inputs, p.inputs, strict=True)}
    inputs |= {name: inputs[name][:, :, ::group] for name in ("q", "k")}
    if gates := c.get("gates"):
        inputs |= {name: inputs[name].to(getattr(torch, gates)) for name in ("g", "g_channels") if name in inputs}
    return replace(p, inputs=list(inputs.values())).requiring_grad()


def results_of(c: dict, p: Problem) -> dict[str, torch.Tensor]:
    form = form_of(c)
    return (forward_backward if form.differentiable else forward_results)(registered(form), p)


def planned(c: dict, device: str) -> contextlib.AbstractContextManager:
    """Within it the operator is planned as the call says.

    With `alone` every program has an SM to itself, else none has: the plan is for a GPU that has very many, or none.
    """
    arch = plan.target_of(torch.device(device)).arch
    target = rules.Target(arch, sms=2**20 if c["alone"] else 0)
    return plan.using(segments=c["segments"], tma=True if c["whole"] else None, target=target)


def fla_takes(c: dict) -> bool:
    """Whether fla's function has what the call asks for, and gradients to compare."""
    peer = OPERATORS[c["operator"]].peers.get("fla")
    if peer is None or not form_of(c).differentiable or c["dtype"] == "float32" or 0 in (c.get("lengths") or [1]):
        return False
    if c["group"] > 1:
        return False
    asked = {"cu_seqlens": c["varlen"], "qk_l2norm": c["norm"], "initial_state": c["state"]}
    lacks = [name for name, wanted in asked.items() if wanted and peer.arguments.get(name, name) is None]
    return (c["d_k"], c["d_v"]) in FLA_SIZES and not lacks


def compile_one(job: tuple[dict, bool]) -> str | None:
    """In a process of its own: one small call, so that Triton's cache holds the kernels; what went wrong, or None.

    It goes wrong again, and is recorded, where it is measured.
    """
    c, with_fla = job
    length = OPERATORS[c["operator"]].length or 150
    c = c | {"number": -1, "B": 1, "L": length, "H": FLA_HEADS, "bias": 0.0, "beta_range": 1.0, "edges": False}
    c |= {"seed": 0, "lengths": [100, 50] if c["varlen"] else None}
    if c["segments"] is not None:
        c["L"] = 64 * c["segments"]
    if c["whole"]:
        c["L"] = 1024
    try:
        p = problem(c, "cuda")
        with planned(c, "cuda"):
            results_of(c, p)
        if with_fla and fla_takes(c):
            peer = load_fla(False)
            if peer.present:
                peer.cut = True
                forward_backward(peer_form, p)
        torch.cuda.synchronize()
    except Exception as error:
        return first_line(error)
    return None


def measure(c: dict, device: str, with_fla: bool) -> dict:
    """Errors of ours, and of fla if it is asked for, for one call."""
    p, gradients = problem(c, device), form_of(c).differentiable
    exact, size = reference_of(p, gradients=gradients)
    with planned(c, device):
        row: dict[str, Any] = {"ours": errors_of(results_of(c, p), exact, size)}
    # Far smaller references than results are a sign of cancellation in the problem, not in the kernels.
    row["norms"] = {name: x.detach().norm().item() for name, x in exact.items()}
    if with_fla:
        try:
            row["fla"] = errors_of(forward_backward(peer_form, p), exact, size)
            again = problem(c | {"seed": c["seed"] + 1}, device)
            row["fla again"] = errors_of(forward_backward(peer_form, again), *reference_of(again))
        except Exception as error:
            row["fla_failure"] = first_line(error)
    return row


# --- Cells -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Some calls of one configuration; fla is called, too, in the first `fla` of them."""

    configuration: int
    numbers: range
    fla: int = 0


def cells(numbers: range, configs: list[dict], seed: int, fla_calls: int) -> list[Cell]:
    """All calls, in random order; of those that fla takes, `fla_calls` are spread over all cells alike."""
    found, count = [], len(configs)
    for i in sorted({n % count for n in numbers}):
        mine = numbers[next(at for at, n in enumerate(numbers) if n % count == i) :: count]
        found += [Cell(i, mine[at : at + CELL]) for at in range(0, len(mine), CELL)]
    random.Random(f"cells {seed}").shuffle(found)
    comparable = sum(fla_takes(configs[cell.configuration]) for cell in found)
    return [
        Cell(cell.configuration, cell.numbers, math.ceil(fla_calls / comparable))
        if fla_takes(configs[cell.configuration])
        else cell
        for cell in found
    ]


def key_of(cell: Cell, configs: list[dict], options: argparse.Namespace) -> str:
    """Says everything that the cell's calls depend on."""
    c = configs[cell.configuration]
    drawn = f"seed {options.seed}, {options.variants} variants"
    which = f"calls {cell.numbers[0]} to {cell.numbers[-1]} by {len(configs)}, {cell.fla} of fla"
    return f"{c['operator']}, {c['form']}, {c['d_k']}x{c['d_v']} {c['dtype']}: {drawn}, {which}"


def a_cell(cell: Cell, configs: list[dict], options: argparse.Namespace, device: str) -> dict:
    """The row of a cell: the errors of each call, or what it raised."""
    made = []
    for i, number in enumerate(cell.numbers):
        c = a_call(number, configs, options.seed, options.smoke)
        try:
            made.append({"number": number, **measure(c, device, i < cell.fla and fla_takes(c))})
        except Exception as error:
            made.append({"number": number, "raised": first_line(error)})
            if device == "cuda":
                try:
                    torch.cuda.synchronize()
                except Exception:
                    break  # the context is lost; who keeps the rows will see it
    return {"calls": made}


def ready(
    todo: list[Cell], configs: list[dict], with_fla: bool, workers: int, deadline: float | None
) -> Iterator[Cell]:
    """The cells, each when its kernels are compiled, by other processes.  Raises OutOfTime at the deadline."""
    order = list(dict.fromkeys(cell.configuration for cell in todo))
    done, failed = set(), 0
    compiled = spread(compile_one, [(configs[i], with_fla) for i in order], workers, deadline)
    for cell in todo:
        while workers and cell.configuration not in done:
            _, failure = next(compiled)
            if isinstance(failure, Died) and deadline is not None and time.monotonic() > deadline - 1:
                raise OutOfTime  # it was ended then, and so were the others
            failed += failure is not None
            done.add(order[len(done)])
            print(f"    {len(done)} of {len(order)} configurations compiled, {failed} of them failed", flush=True)
        yield cell


def numbers_of(x: dict[str, Any]) -> dict[str, float]:
    """As they were before JSON, which holds no NaN."""
    return {name: float(value) for name, value in x.items()}


def tallied(rows: list[dict], configs: list[dict], options: argparse.Namespace) -> Tally:
    """What the calls of all cells come to."""
    tally = Tally()
    for call in (call for row in rows for call in row.get("calls", ())):
        c = a_call(call["number"], configs, options.seed, options.smoke)
        if "raised" in call:
            tally.failures.append({"wrong": [call["raised"]], "call": c})
        else:
            tally.add(c, call | {n: numbers_of(call[n]) for n in ("ours", "norms", "fla", "fla again") if n in call})
    return tally


# --- The tally ---------------------------------------------------------------------------------------------------


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


OPTIONS = ("operator", "form", "d_k", "d_v", "dtype", "norm", "state", "dstate", "varlen", "chunk", "scale")
OPTIONS += ("layout", "segments", "alone", "whole", "gates", "group")
KEYS = ("operator", "form", "dtype", "bias", "beta_range")


def form_name(c: dict) -> str:
    return f"{c['operator']}, {c['form']}"


class Tally:
    """Errors by form, dtype and output, ratios to fla, and the calls that have something wrong."""

    def __init__(self):
        self.calls = self.fla_calls = self.fla_not_finite = 0
        self.grouped = defaultdict(lambda: defaultdict(list))  # (what, its value) -> output -> ratios
        self.scatter = defaultdict(list)  # keys -> fla again over fla, of o
        self.errors = defaultdict(list)  # (form, dtype, output) -> [(error, number)]
        self.ratios = defaultdict(list)  # (form, dtype, output) -> [(ours / fla, number)]
        self.failures, self.fla_failures, self.worst = [], [], {}

    def add(self, c: dict, row: dict) -> None:
        self.calls += 1
        for name, e in row["ours"].items():
            at = form_name(c), c["dtype"], name
            self.errors[at].append((e, c["number"]))
            if at not in self.worst or not e <= self.worst[at]["error"]:
                norm = row["norms"][name]
                about = {"form": at[0], "dtype": c["dtype"], "output": name}
                self.worst[at] = about | {"error": e, "reference_norm": norm, "call": c}
        for name, ratio in ratio_of(row["ours"], row.get("fla", {})).items():
            self.ratios[form_name(c), c["dtype"], name].append((ratio, c["number"]))
            self.grouped["configuration", tuple(c[o] for o in OPTIONS)][name].append(ratio)
            self.grouped["keys", tuple(c[n] for n in KEYS)][name].append(ratio)
        if "fla again" in row:
            scatter = ratio_of(row["fla again"], row["fla"])
            self.scatter[tuple(c[n] for n in KEYS)] += [scatter["o"]] if "o" in scatter else []
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
                row = dict(zip(KEYS, keys, strict=True)) | {"o": spread_of(outputs["o"])}
                row |= {"geometric_means": means}
                rows.append(row | ({"scatter": spread_of(self.scatter[keys])} if self.scatter[keys] else {}))
        return sorted(rows, key=lambda r: [str(r[name]) for name in KEYS])

    def summary(self) -> dict:
        """Worst, 99th percentile and median by form, dtype and output, as the forms name them; ratios ours / fla."""
        errors, ratios = {}, {}
        for at in sorted(self.errors, key=lambda at: (at[0], DTYPES.index(at[1]))):
            form, dtype, name = at
            e = [x for x, _ in self.errors[at]]
            finite = [x for x in e if math.isfinite(x)]
            errors.setdefault(form, {}).setdefault(dtype, {})[name] = {
                "calls": len(e),
                "not_finite": len(e) - len(finite),
                "worst": max(finite, default=math.nan),
                "p99": percentile(finite, 0.99),
                "median": statistics.median(finite) if finite else math.nan,
                "worst_call": self.worst[at]["call"]["number"],
            }
            if r := self.ratios[at]:
                largest, number = max(r)
                found = spread_of([x for x, _ in r]) | {"max": largest, "max_call": number}
                ratios.setdefault(form, {}).setdefault(dtype, {})[name] = found | {
                    "above_1.1": sorted(n for x, n in r if x > 1.1)[:50]
                }
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
    columns = f"{'calls':>6} {'median':>9} {'p99':>9} {'worst':>9} | ours / fla: median, max"
    lines = [f"{'form':31} {'dtype':9} {'output':9} {columns}"]
    for form, dtype, name, e in (
        (form, dtype, name, e)
        for form, dtypes in s["errors"].items()
        for dtype, outputs in dtypes.items()
        for name, e in outputs.items()
    ):
        r = s["ratio_to_fla"].get(form, {}).get(dtype, {}).get(name)
        last = f"{r['median']:.2f} {r['max']:.2f} (call {r['max_call']}) of {r['calls']}" if r else "-"
        found = f"{e['calls']:6d} {e['median']:9.2e} {e['p99']:9.2e} {e['worst']:9.2e}"
        lines.append(f"{form:31} {dtype:9} {name:9} {found} | {last}")
    for row in s["ratio_by_keys"]:
        scatter = row.get("scatter", {})
        lines.append(
            f"{form_name(row)}, {row['dtype']} keys {row['bias']!s:9} beta to {row['beta_range']:g}: "
            f"o {row['o']['geometric_mean']:.2f} (most {row['o']['max']:.2f}), "
            f"worst output {max(row['geometric_means'].values()):.2f}; fla again over fla "
            f"most {scatter.get('max', math.nan):.2f}, above 1.1 in {scatter.get('above_1.1')}"
        )
    for row in s["ratio_by_configuration"]:
        over = f"  ABOVE {s['ratio_limit']} {row['above']}" if row["above"] else ""
        means = " ".join(f"{name} {mean:.2f}" for name, mean in row["ratios"].items())
        lines.append(f"{row['options']} of {row['calls']}: {means}{over}")
    return "\n".join(lines)


# --- The run -----------------------------------------------------------------------------------------------------


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=int, help="default: 2000; in a smoke run one of each configuration")
    parser.add_argument("--start", type=int, default=0, help="number of the first call")
    parser.add_argument("--variants", type=int, default=4, help="draws of the options for each form, size and dtype")
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="these operators alone")
    parser.add_argument("--forms", nargs="+", metavar="FORM", help="these forms or kernels, by name")
    parser.add_argument("--no-fla", action="store_true")
    parser.add_argument("--fla-calls", type=int, default=150, help="about so many calls of fla, some in each cell")


def run(options: argparse.Namespace) -> int:
    device, begun = device_of(options.smoke), time.monotonic()
    configs = configurations(options.variants, options.seed, options.smoke, options.only, options.forms)
    if not configs:
        raise SystemExit(f"no operator of {', '.join(options.only)} has a form {' or '.join(options.forms or ())}")
    if options.calls is None:
        options.calls = len(configs) if options.smoke else 2000
    peer: Peer = load_fla(options.no_fla, options.smoke)
    peer.cut = True
    settings = settings_of(options) | {
        "fla": {"status": peer.status, **peer.facts, "autotuning": "first configuration"},
        "sizes": SIZES,
        "errors": MEANING,
        "reproduce": "--start NUMBER --calls 1 with the same --seed, --variants, --only and --forms",
        "rows": "failures first, then the worst call of each form, dtype and output; until all calls are made: cells",
    }
    results = Results(options.out, settings, budget=options.budget, smoke=options.smoke, seed=options.seed)
    numbers = range(options.start, options.start + options.calls)
    every = cells(numbers, configs, options.seed, options.fla_calls if peer.present else 0)
    keys = {key_of(cell, configs, options): cell for cell in every}
    results.rows = [row for row in results.rows if row["key"] in keys]  # those of a whole file are others
    before = sum(len(row.get("calls", ())) for row in results.rows)

    def body() -> None:
        todo = [cell for key, cell in keys.items() if results.find(key) is None]
        deadline = None if options.budget is None else begun + options.budget
        for cell in ready(todo, configs, peer.present, 0 if options.smoke else options.workers, deadline):
            results.measure(key_of(cell, configs, options), functools.partial(a_cell, cell, configs, options, device))

    with matmul_precision("highest"):
        code = results.fill(body)
    tally = tallied(results.rows, configs, options)
    made = tally.calls + sum("raised" in call for row in results.rows for call in row.get("calls", ()))
    counts = {"calls_made": made, "calls_asked": options.calls, "calls_made_by_this_run": made - before}
    results.summary = tally.summary() | counts | {"seconds": results.elapsed()}
    lost = [row for row in results.rows if row["status"] != "ok"]
    if code == 0:
        results.rows = [*lost]
        for kind, rows in (("failure", tally.failures[:200]), ("worst", tally.worst.values())):
            results.rows += [
                results.marked({"key": f"{kind} {i}", "status": "ok", **row}) for i, row in enumerate(rows)
            ]
    failed = [" ".join(map(str, ("FAILED", *failure["wrong"], failure["call"]))) for failure in tally.failures[:10]]
    said = f"{made} of {options.calls} calls made, {made - before} of them in these {results.elapsed():.0f} s"
    said += f"; {tally.fla_calls} of fla, {len(tally.failures)} failures"
    worse = [row for row in results.summary["ratio_by_configuration"] if row["above"]]
    text = "\n".join([*failed, table(results.summary), said])
    return results.finish(text, code, failed=tally.failures or worse or lost)


EXPERIMENT = Experiment(
    question="How far from float64 are the operators on some thousand random calls, and how far is fla?",
    writes=("errors.json",),
    minutes=4,
    gpu="H200",
    run=run,
    options=options,
    each=(("--only", "delta_rule", "--forms", "triton", "--calls", "2200", "--variants", "2", "--fla-calls", "400"),),
    small=("--variants", "1"),
    shared=("budget", "seed", "smoke", "workers"),
)
