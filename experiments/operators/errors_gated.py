"""`errors` on the gated relatives alone: 2,000 random calls of their kernels, with gradients.

Gates of exactly 0 and 1 are among them, gates in float32 and value heads that share a head of q and k.

    python -m experiments errors_gated --budget 540                          # again: goes on where it stopped
    python -m experiments errors_gated --out one.json --start 77 --calls 1   # call 77 alone

Linear attention without gates, with a gate per token (`simple_gla`) and per key channel (`gla`), and the gated delta
rule, through their Triton kernels; fla on the same inputs where it takes them.  What is drawn, measured and judged, the
options, and what the exit codes mean: `python -m experiments errors --help`.
"""

from __future__ import annotations

import argparse

from experiments.harness.cli import Experiment
from experiments.operators import errors

GATED = ("linear_attention", "simple_gla", "gla", "gated_delta_rule")


def options(parser: argparse.ArgumentParser) -> None:
    errors.options(parser)
    parser.set_defaults(only=list(GATED), forms=["triton"], variants=2, fla_calls=400)


def run(options: argparse.Namespace) -> int:
    return errors.run(options)


EXPERIMENT = Experiment(
    question="How far from float64 are the gated operators on some thousand random calls, and how far is fla?",
    writes=("errors_gated.json",),
    minutes=15,
    gpu="H200",
    run=run,
    options=options,
    small=("--variants", "1", "--calls", "4"),
    shared=("budget", "seed", "smoke", "workers"),
    measured=False,
)
