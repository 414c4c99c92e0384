"""The paper's figure on this GPU: the chunkwise form over the recurrent one, both as Triton kernels of ours.

    python benchmarks/paper_figure.py --out book/results/paper_figure.json

2,048 channels, 16,384 tokens in all, head sizes 64, 128 and 256, lengths 512 to 16,384.  Either kernel has to agree
with float64 before it is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import (
    Clock,
    DeviceLost,
    OutOfTime,
    Results,
    ceilings,
    device_of,
    draw,
    errors_of,
    exact_results,
    forward,
    forward_backward,
    limit_of,
    operator,
    recurrent_form,
    relative,
    verdict,
)

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
        errors["recurrent o"] = relative(forward(recurrent_form, sample), exact["o"])
        checked[d] = errors, verdict(errors, None, limit_of(torch.bfloat16, device=device))
    row["errors"], wrong = checked[d]
    if wrong:
        return row | {"status": "refused", "failure": "; ".join(wrong)}
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


def main(argv: list[str] | None = None) -> int:
    """0; 1 if a row failed or was refused; 2 if the budget ran out; 3 if the GPU was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="shorter timings")
    parser.add_argument("--budget", type=float, metavar="S", help="begin no row after so many seconds")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes in Triton's interpreter; times are stubs")
    options = parser.parse_args(argv)
    device = device_of(options.smoke)
    clock = Clock(*((10, 40) if options.quick else (25, 100)), smoke=options.smoke)
    channels, tokens, head_dims, lengths = CHANNELS, TOKENS, HEAD_DIMS, LENGTHS
    if options.smoke:
        channels, tokens, head_dims, lengths = 16, 64, (16,), (32, 64)
    settings = {
        **{name: value for name, value in vars(options).items() if name != "out"},
        "channels": channels,
        "tokens": tokens,
        "clock": f"triton.testing.do_bench medians, warm-up {clock.warmup} ms, {clock.rep} ms measured; "
        "calls above 30 ms: median of three",
        "forms": "chunkwise: dn_lib.delta_rule, recurrent: dn_lib.fused_recurrent_delta_rule; no gradients",
        "inputs": "q, k normalised in float32 then cast; beta = sigmoid(normal); v, do normal",
        "paper": PAPER,
    }
    results = Results(options.out, settings, budget=options.budget, smoke=options.smoke)
    code, checked = 0, {}
    try:
        results.ceilings = ceilings(clock)
        for d in head_dims:
            for L in lengths:
                B, H = tokens // L, channels // d
                results.measure(f"d={d} L={L}", lambda d=d, L=L, B=B, H=H: a_row(d, L, B, H, clock, device, checked))
    except OutOfTime:
        print("stopped at the budget; the same command goes on", flush=True)
        code = 2
    except DeviceLost as error:
        print(f"GPU lost at {error}; the same command goes on after it", flush=True)
        code = 3
    done = [row for row in results.rows if row["status"] == "ok"]
    results.summary = {
        "lengths": list(lengths),
        "speed_up": {str(d): [row["speed_up"] for row in done if row["d"] == d] for d in head_dims},
        "refused_or_failed": [row["key"] for row in results.rows if row["status"] != "ok"],
    }
    results.write()
    print(f"{'d':>4} {'L':>6} {'chunkwise':>10} {'recurrent':>10} {'speed-up':>9} {'paper':>6} {'fwd+bwd':>8}")
    for row in done:
        paper = f"{row['paper_speed_up']:6.1f}" if "paper_speed_up" in row else "     -"
        print(
            f"{row['d']:4d} {row['L']:6d} {row['chunkwise_ms']:10.3f} {row['recurrent_ms']:10.3f} "
            f"{row['speed_up']:9.1f} {paper} {row['chunkwise_forward_backward_ms']:8.3f}"
        )
    if options.smoke:
        print("NOT MEASURED: smoke run")
    return code or int(bool(results.summary["refused_or_failed"]))


if __name__ == "__main__":
    raise SystemExit(main())
