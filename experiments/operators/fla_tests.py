"""fla's own tests of the operators whose signatures we carry, with our functions in the place of fla's.

Needs a checkout of github.com/fla-org/flash-linear-attention, whose package and tests are then one version, and what
fla itself needs.  Arguments that ours refuses by name count apart from failures, with what was said.  Exits with 1 if
a test fails otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from experiments.harness.cli import Experiment
from experiments.harness.provenance import ROOT, provenance
from experiments.harness.results import write_json

FILES = ("delta", "gdn", "simple_gla", "gla", "retention", "lightning_attn")


# Stands for fla in a smoke run, which has none.
TOY = """
import torch
from toy_fla import chunk_delta_rule, fused_recurrent_delta_rule

def inputs():
    return [torch.rand(1, 5, 2, 4) / 2 for _ in range(3)] + [torch.rand(1, 5, 2)]

def test_a_token_of_strength_zero_writes_nothing():
    q, k, v, beta = inputs()
    o, _ = chunk_delta_rule(q, k, v, 0 * beta)
    assert fused_recurrent_delta_rule is None and (o == 0).all()

def test_heads_first():
    chunk_delta_rule(*inputs(), head_first=True)

def test_that_calls_none_of_ours():
    raise AssertionError
"""


def write_toy(folder: Path) -> Path:
    (folder / "tests" / "ops").mkdir(parents=True)
    (folder / "toy_fla.py").write_text("chunk_delta_rule = fused_recurrent_delta_rule = None\n")
    (folder / "tests" / "ops" / "test_delta.py").write_text(TOY)
    return folder


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkout", type=Path, help="the folder of fla's repository")
    parser.add_argument("--processes", type=int, default=0, help="of pytest-xdist; 0: in turn")
    parser.add_argument("--select", default="", help="only tests that pytest's -k takes")


def rows_of(checkout: Path, *, processes: int = 0, select: str = "", budget: float | None = None) -> list[dict]:
    """One row for each test, as `fla_plugin` writes them; an unfinished run gives those that ended."""
    tests = [checkout / "tests" / "ops" / f"test_{name}.py" for name in FILES]
    there = [str(path) for path in tests if path.is_file()]
    if not there:
        raise FileNotFoundError(f"--checkout must be a checkout of fla with tests/ops/test_delta.py, got {checkout}")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        report.touch()
        paths = [str(checkout), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"DN_FLA_REPORT": str(report), "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "experiments.harness.fla_plugin", *there]
        command += ["-p", "no:cacheprovider", "--tb=no", *(["-n", str(processes)] if processes else [])]
        command += ["-k", select] if select else []
        try:
            subprocess.run(command, cwd=checkout, env=environment, timeout=budget, check=False)
        except subprocess.TimeoutExpired:
            print("The budget is spent.", file=sys.stderr)
        return [json.loads(line) for line in report.read_text().splitlines()]


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        checkout = write_toy(Path(folder)) if options.smoke else options.checkout
        if checkout is None:
            print("--checkout is needed: a folder with fla's repository", file=sys.stderr)
            return 2
        rows = rows_of(checkout, processes=options.processes, select=options.select, budget=options.budget)
    refused = [row for row in rows if row.get("refusal")]
    failed = [row for row in rows if row["outcome"] == "failed" and not row.get("refusal")]
    counts = Counter(row["outcome"] for row in rows)
    summary = {
        "tests": len(rows), "passed": counts["passed"], "skipped": counts["skipped"], "failed": len(failed),
        "refused": dict(Counter(row["error"] for row in refused)),
    }  # fmt: skip
    write_json(options.out, {"provenance": provenance(), "summary": summary, "rows": rows})
    print(json.dumps(summary, indent=1))
    for row in failed:
        print(row["test"], row["error"])
    return 1 if failed or not rows else 0


EXPERIMENT = Experiment(
    question="Do fla's own tests pass with our functions in the place of fla's?",
    writes=("fla_tests.json",),
    minutes=6,
    gpu="H200",
    run=run,
    options=options,
    shared=("smoke", "budget"),
    measured=False,
)
