"""Every form of every operator in the registry (`dn_lib.operators`), and its peers: errors first, then times.

A form first has to agree with the operator's reference, the recurrence in float64, on a small problem.  Then its
forward is timed on a large one, without gradients.  Where the registry says what a form launches, `predicted_ms` is
`dn_lib.cost.roofline_time` of it, at the rates measured in the same run.  A new operator is measured as soon as it is
registered.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dn_lib import cost
from dn_lib.operators import OPERATORS, Operator
from dn_lib.testing import relative_error
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.clock import Clock, ceilings
from experiments.harness.errors import limit_of, refused, verdict
from experiments.harness.results import Results

SIZE = (4, 2048, 16, 128)  # B, L, H, d
CHECKED = (2, 150, 2, 128)
SMOKE = (1, 40, 1, 16)
# Kernels of chapter 5's ladder round four intermediates to bfloat16, one after the other.
LIMIT = {torch.bfloat16: 2e-2, torch.float32: limit_of(torch.float32)}


def sized(operator: Operator, B: int, L: int, H: int, d: int) -> tuple[int, int, int, int]:
    """The sizes, or those of many short sequences where the operator takes one length alone."""
    return (B, L, H, d) if operator.length is None else (B * L // 16, operator.length, H, d)


def drawn(
    operator: Operator, size: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor | None]:
    """Inputs and, where there is nothing without one, an initial state."""
    B, L, H, d = size
    state = None if operator.length is None else B
    *inputs, first = operator.sample(B, L, H, d, d, seed=1, dtype=dtype, state=state, device=device)
    return [x for x in inputs if x is not None], first


def runs(operator: Operator) -> Iterator[tuple[str, Callable, Callable | None]]:
    """(name, function of the inputs and `initial_state`, what it launches); peers only where they are installed."""
    for name, form in operator.every_form():
        yield name, form, form.cost
    for name, peer in operator.peers.items():
        if importlib.util.find_spec(peer.function.partition(".")[0]) is not None:

            def run(*inputs, peer=peer, **options):
                given = dict(zip(operator.inputs, inputs, strict=True))
                return peer.load()(**peer.keywords(**given, **options))[:2]

            yield name, run, None


def a_row(operator: Operator, run: Callable, launches: Callable | None, device: str, clock: Clock, rates: dict) -> dict:
    small, large = (sized(operator, *(SMOKE if clock.smoke else size)) for size in (CHECKED, SIZE))
    dtype = torch.float32 if clock.smoke else torch.bfloat16  # the interpreter would truncate
    inputs, first = drawn(operator, small, dtype, device)
    o, state, scale = operator.reference(*inputs, initial_state=first)
    with torch.no_grad():
        got = run(*inputs, initial_state=first)
    errors = {"o": relative_error(got[0], o, scale), "state": relative_error(got[1], state)}
    B, L, H, d = large
    shape = cost.Shape(B, L, H, d, d, element=dtype.itemsize, C=min(L, 64), block_v=min(d, 64))
    row = {"B": B, "L": L, "H": H, "d": d, "dtype": dtype, "errors": errors}
    row["compulsory_bytes"] = cost.total_bytes(operator.compulsory(shape))
    if wrong := verdict(errors, None, LIMIT[dtype]):
        return row | refused(wrong)
    inputs, first = drawn(operator, large, dtype, device)
    with torch.no_grad():
        row["forward"] = {"ms": clock.median(lambda: run(*inputs, initial_state=first))}
    if launches is not None:
        seconds = cost.roofline_time(launches(shape), rates["copy_bytes_per_s"], rates["matmul_flops_per_s"])
        row["forward"]["predicted_ms"] = 1e3 * seconds
    return row


def table(rows: list[dict]) -> str:
    lines = [f"{'operator and form':36} {'error of o':>10} {'ms':>9} {'predicted':>9}"]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['key']:36} {row['status']}: {row['failure']}")
            continue
        times = row["forward"]
        predicted = f"{times['predicted_ms']:9.3f}" if "predicted_ms" in times else f"{'-':>9}"
        lines.append(f"{row['key']:36} {row['errors']['o']:10.1e} {times['ms']:9.3f} {predicted}")
    return "\n".join(lines)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="these operators alone")


def run(options: argparse.Namespace) -> int:
    """0; 1 if a row failed or was refused; 2 if the budget ran out; 3 if the GPU was lost."""
    device, clock = device_of(options.smoke), Clock.of(options)
    settings = settings_of(options) | {
        "clock": str(clock),
        "errors": "relative norm against the recurrence in float64 of the same rounded inputs; o: against the size of "
        "its terms, where that is larger",
    }
    results = Results(options.out, settings, budget=options.budget, smoke=options.smoke)

    def body() -> None:
        results.ceilings = ceilings(clock)
        for operator in (OPERATORS[name] for name in options.only):
            for name, form, launches in runs(operator):
                results.measure(
                    f"{operator.name}: {name}",
                    lambda o=operator, f=form, la=launches: a_row(o, f, la, device, clock, results.ceilings),
                )

    code = results.fill(body)
    results.summary = {"refused_or_failed": results.not_done}
    return results.finish(table(results.rows), code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="How exact and how fast is every form of every registered operator, beside its peers?",
    writes=("every_form.json",),
    minutes=1,
    gpu="H100",
    run=run,
    options=options,
    shared=("budget", "quick", "smoke"),
)
