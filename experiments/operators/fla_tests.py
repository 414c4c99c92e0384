"""fla's own tests of the operators whose signatures we carry, with our functions in the place of fla's.

    python -m experiments fla_tests --checkout FOLDER --budget 540      # again: goes on with the tests that are left
    python -m experiments fla_tests --checkout FOLDER --rows 300 --out out.json     # short ones, as a CPU can take

Needs a checkout of github.com/fla-org/flash-linear-attention (its folders `fla` and `tests` alone will do), whose
package and tests are then one version, and einops.  Arguments that ours refuses by name count apart from failures, with
what was said.  Without a GPU all kernels, fla's too, run in Triton's interpreter.  Exits with 1 if a test fails
otherwise, with 2 if the budget ran out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

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
    parser.add_argument(
        "--rows", type=int, default=0, help="only tests with at most so many tokens times heads; 0: all"
    )


def rows_of(
    checkout: Path, *, processes: int = 0, select: str = "", most: int = 0, budget: float | None = None,
    before: list[dict] | None = None,
) -> tuple[list[dict], bool]:  # fmt: skip
    """One row for each test, as `fla_plugin` writes them, and whether all of them have ended.

    before: rows of tests that are not to be repeated.  most: see --rows.
    """
    tests = [checkout / "tests" / "ops" / f"test_{name}.py" for name in FILES]
    there = [str(path) for path in tests if path.is_file()]
    if not there:
        raise FileNotFoundError(f"--checkout must be a checkout of fla with tests/ops/test_delta.py, got {checkout}")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        report.write_text("".join(json.dumps(row) + "\n" for row in before or []))
        paths = [str(checkout), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"DN_FLA_REPORT": str(report), "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {"DN_FLA_ROWS": str(most)}
        if not torch.cuda.is_available():
            environment |= {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "experiments.harness.fla_plugin", *there]
        command += ["-p", "no:cacheprovider", "--tb=no", *(["-n", str(processes)] if processes else [])]
        command += ["-k", select] if select else []
        ended = True
        try:
            subprocess.run(command, cwd=checkout, env=environment, timeout=budget, check=False)
        except subprocess.TimeoutExpired:
            print("The budget is spent: the same command goes on.", file=sys.stderr)
            ended = False
        return [json.loads(line) for line in report.read_text().splitlines()], ended


def kept(out: Path, now: dict) -> list[dict]:
    """The rows of an earlier run, if it was of the same sources, device and fla."""
    if not out.is_file():
        return []
    then = json.loads(out.read_text())
    same = all(then.get("provenance", {}).get(name) == now[name] for name in ("sources", "device"))
    return then["rows"] if same and then.get("fla") == now["fla"] else []


def version_of(checkout: Path) -> str | None:
    """What fla's package says of itself."""
    package = checkout / "fla" / "__init__.py"
    found = re.search(r"__version__ = ['\"](.+)['\"]", package.read_text()) if package.is_file() else None
    return found and found[1]


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        checkout = write_toy(Path(folder)) if options.smoke else options.checkout
        if checkout is None:
            print("--checkout is needed: a folder with fla's repository", file=sys.stderr)
            return 2
        checkout = checkout.resolve()
        origin, fla = provenance(), version_of(checkout)
        before = kept(options.out, origin | {"fla": fla})
        rows, ended = rows_of(
            checkout, processes=options.processes, select=options.select, most=options.rows, budget=options.budget,
            before=before,
        )  # fmt: skip
    refused = [row for row in rows if row.get("refusal")]
    failed = [row for row in rows if row["outcome"] == "failed" and not row.get("refusal")]
    counts = Counter(row["outcome"] for row in rows)
    summary = {
        "tests": len(rows), "passed": counts["passed"], "skipped": counts["skipped"], "failed": len(failed),
        "refused": dict(Counter(row["error"] for row in refused)),
        "all": ended and not options.select and not options.rows,
    }  # fmt: skip
    write_json(options.out, {"provenance": origin, "fla": fla, "summary": summary, "rows": rows})
    print(json.dumps(summary, indent=1))
    for row in failed:
        print(row["test"], row["error"])
    if failed or not rows:
        return 1
    return 0 if ended else 2


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
