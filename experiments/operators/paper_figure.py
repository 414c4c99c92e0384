"""The paper's figure on this GPU: the chunkwise form over the recurrent one, both as Triton kernels of ours.

2,048 channels, 16,384 tokens in all, head sizes 64, 128 and 256, lengths 512 to 16,384.  Either kernel has to agree
with float64 before it is timed.
"""

from __future__ import annotations

import argparse

import torch

from dn_lib.testing import relative_error
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.clock import Clock, ceilings
from experiments.harness.errors import errors_of, exact_results, limit_of, refused, verdict
from experiments.harness.problems import INPUTS, draw, forward, forward_backward, operator, recurrent_form
from experiments.harness.results import Results

CHANNELS, TOKENS = 2048, 16384
HEAD_DIMS, LENGTHS = (64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384)
PAPER = {
    "citation": "yang2024parallelizing",
    "what": "speed-up of the chunkwise over the recurrent form, both in Triton, 2,048 channels, 16,384 tokens in all",
    "read": "off the figure's pixels, so to about two digits; the authors' kernels and GPU, not ours",
    "lengths": [512, 1024, 2048, 4096, 8192, 16384],
    "speed_up": {
        "64": [4.0, 4.5, 5.8, 9.5, 15.7, 23.7],
        "128": [7.1, 7.5, 7.3, 10.5, 15.8, 32.8],
        "256": [10.2, 10.2, 10.2, 17.5, 28.7, 36.6],
    },
}


def a_row(d: int, L: int, B: int, H: int, clock: Clock, device: str, checked: dict) -> dict:
    row = {"d": d, "L": L, "B": B, "H": H, "dtype": "bfloat16"}
    if d not in checked:
        sample = draw(min(B, 2), min(L, 1024), H, d, d, torch.bfloat16, device, seed=1)
        exact = exact_results(sample)
        errors = errors_of(forward_backward(operator, sample), exact)
        errors["recurrent o"] = relative_error(forward(recurrent_form, sample), exact["o"])
        checked[d] = errors, verdict(errors, None, limit_of(torch.bfloat16, device=device))
    row["errors"], wrong = checked[d]
    if wrong:
        return row | refused(wrong)
    p = draw(B, L, H, d, d, torch.bfloat16, device, seed=2)
    runs = {
        "chunkwise_ms": lambda: forward(operator, p),
        "recurrent_ms": lambda: forward(recurrent_form, p),
        "chunkwise_again_ms": lambda: forward(operator, p),
        "chunkwise_forward_backward_ms": lambda: forward_backward(operator, p),
    }
    row |= {name: clock.median(run) for name, run in runs.items()}
    row["speed_up"] = row["recurrent_ms"] / row["chunkwise_ms"]
    if str(d) in PAPER["speed_up"] and L in PAPER["lengths"]:
        row["paper_speed_up"] = PAPER["speed_up"][str(d)][PAPER["lengths"].index(L)]
    return row


def table(rows: list[dict]) -> str:
    lines = [f"{'d':>4} {'L':>6} {'chunkwise':>10} {'recurrent':>10} {'speed-up':>9} {'paper':>6} {'fwd+bwd':>8}"]
    for row in rows:
        paper = f"{row['paper_speed_up']:6.1f}" if "paper_speed_up" in row else "     -"
        lines.append(
            f"{row['d']:4d} {row['L']:6d} {row['chunkwise_ms']:10.3f} {row['recurrent_ms']:10.3f} "
            f"{row['speed_up']:9.1f} {paper} {row['chunkwise_forward_backward_ms']:8.3f}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """0; 1 if a row failed or was refused; 2 if the budget ran out; 3 if the GPU was lost."""
    device, clock = device_of(options.smoke), Clock.of(options)
    channels, tokens, head_dims, lengths = CHANNELS, TOKENS, HEAD_DIMS, LENGTHS
    if options.smoke:
        channels, tokens, head_dims, lengths = 16, 64, (16,), (32, 64)
    settings = {
        **settings_of(options),
        "channels": channels,
        "tokens": tokens,
        "clock": f"{clock}; calls above 30 ms: median of three",
        "forms": "chunkwise: dn_lib.delta_rule, recurrent: dn_lib.fused_recurrent_delta_rule; no gradients",
        "inputs": INPUTS,
        "paper": PAPER,
    }
    results, checked = Results(options.out, settings, budget=options.budget, smoke=options.smoke), {}

    def body() -> None:
        results.ceilings = ceilings(clock)
        for d in head_dims:
            for L in lengths:
                B, H = tokens // L, channels // d
                results.measure(f"d={d} L={L}", lambda d=d, L=L, B=B, H=H: a_row(d, L, B, H, clock, device, checked))

    code = results.fill(body)
    results.summary = {
        "lengths": list(lengths),
        "speed_up": {str(d): [row["speed_up"] for row in results.done if row["d"] == d] for d in head_dims},
        "refused_or_failed": results.not_done,
    }
    return results.finish(table(results.done), code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="How much faster is the chunkwise form than the recurrent one, at the sizes of the paper's figure?",
    writes=("paper_figure.json",),
    minutes=1,
    gpu="H200",
    run=run,
    shared=("budget", "quick", "smoke"),
    each=(("--quick",),),
)
