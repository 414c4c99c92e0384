"""Two GPUs against one: the same losses, and the delta rule along a sequence that two GPUs share.

Starts, side by side, `python -m dn_lib train ...` and `torchrun --nproc-per-node 2 -m dn_lib train ...` with
--parallel ddp and fsdp, in float32 and at the same total batch, over NCCL: the losses of every step and of the
evaluation must agree to 1e-5.  And `dn_lib.parallel.affine`, forward and backward, on stretches of unequal
length, against the chunkwise form on one GPU: 1e-5 in float32, 1e-12 in float64.
--smoke does it on a CPU, over gloo, with a tiny model.  Exits with 1 if anything differs or fails (`failures` holds the
last words of what failed).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dn_lib.forms.chunkwise import chunkwise_delta_rule
from dn_lib.parallel.affine import _loopback, split_and_run
from dn_lib.testing import relative_error
from experiments.harness.cli import Experiment, device_of
from experiments.harness.provenance import ROOT, provenance
from experiments.harness.results import SMOKE_RUN, first_line, write_json

LIMITS = {"training": 1e-5, "float32": 1e-5, "float64": 1e-12}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = {"steps": 10, "batch": 16, "length": 256, "width": 256, "layers": 4, "heads": 4, "hybrid": "global"}
TRAIN |= {"learning-rate": 1e-3, "warmup": 4, "evaluate-every": 0, "evaluation-tokens": 16384, "precision": "float32"}
SMOKE = {"steps": 4, "batch": 4, "length": 32, "width": 32, "layers": 4, "heads": 2, "evaluation-tokens": 256}
SEQUENCE = {"B": 2, "H": 4, "d": 64, "lengths": [1500, 2596]}
SMOKE_SEQUENCE = {"B": 1, "H": 2, "d": 8, "lengths": [70, 61]}


def commands(folder: Path, corpus: str, device: str, smoke: bool) -> dict[str, list[str]]:
    """What is run, by name; each training leaves `log.jsonl` in folder/NAME."""
    settings = {**TRAIN, **(SMOKE if smoke else {}), "corpus": corpus, "device": device}
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    train = ["-m", "dn_lib", "train", *options, "--quiet", "--out"]
    two = [*TORCHRUN, *train]
    return {
        "one": [*train, str(folder / "one")],
        "ddp": [*two, str(folder / "ddp"), "--parallel", "ddp"],
        "fsdp": [*two, str(folder / "fsdp"), "--parallel", "fsdp"],
        "sequence": [*TORCHRUN, "-m", "experiments", "two_gpus", "--worker", str(folder / "sequence.json")]
        + (["--smoke"] if smoke else []),
    }


def logged(folder: Path) -> list[float]:
    """The losses of all steps, then of the evaluations."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [record["loss"] for record in records if "loss" in record]
    return steps + [record["evaluation"]["loss"] for record in records if "evaluation" in record]


def compared(one: list[float], two: list[float]) -> dict:
    """The largest relative difference of losses."""
    if len(one) != len(two) or not one:
        raise ValueError(f"one process logged {len(one)} losses, two {len(two)}")
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    return {"losses": two, "worst": worst, "limit": LIMITS["training"], "passed": worst <= LIMITS["training"]}


def sequence_errors(shape: dict, dtype: torch.dtype, device: str) -> dict[str, float]:
    """In each of the processes: relative distances of this process's results from those of one alone."""
    random = torch.Generator().manual_seed(0)
    lengths, B, H, d = shape["lengths"], shape["B"], shape["H"], shape["d"]
    L, rank = sum(lengths), dist.get_rank()

    def normal(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64).to(device, dtype)

    q, k = (torch.nn.functional.normalize(normal(B, H, L, d), dim=-1) for _ in range(2))
    inputs = {"q": q, "k": k, "v": normal(B, H, L, d), "beta": normal(B, H, L).sigmoid()}
    inputs |= {"initial_state": normal(B, H, d, d), "do": normal(B, H, L, d), "dstate": normal(B, H, d, d)}
    mine = split_and_run({**inputs, "lengths": lengths, "chunk_size": 64})
    names = ("q", "k", "v", "beta", "initial_state")
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    o, state = chunkwise_delta_rule(*leaves[:4], initial_state=leaves[4])
    grads = torch.autograd.grad((o, state), leaves, (inputs["do"], inputs["dstate"]))
    whole = {"o": o, **{f"d{name}": g for name, g in zip(names, grads, strict=True)}}
    errors = {
        name: relative_error(mine[name], x.split(lengths, dim=2)[rank])
        for name, x in whole.items()
        if name[1:] != names[4]
    }
    if rank == 0:
        errors["dinitial_state"] = relative_error(mine["dinitial_state"], whole["dinitial_state"])
    else:
        errors["state"] = relative_error(mine["state"], state)
    return errors


def worker(out: Path, smoke: bool) -> None:
    """One of the two processes that share a sequence; the first writes what both found."""
    device = "cpu" if smoke else f"cuda:{os.environ['LOCAL_RANK']}"
    if not smoke:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if smoke else "nccl")
    found = {}
    for dtype in (torch.float32, torch.float64):
        mine = sequence_errors(SMOKE_SEQUENCE if smoke else SEQUENCE, dtype, device)
        both = [None] * dist.get_world_size()
        dist.all_gather_object(both, mine)
        found[str(dtype).removeprefix("torch.")] = both
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def judged(found: dict[str, list[dict[str, float]]]) -> dict:
    """The worst error of each dtype against its limit."""
    rows = {}
    for dtype, both in found.items():
        worst = max(error for errors in both for error in errors.values())
        finite = all(error == error for errors in both for error in errors.values())
        rows[dtype] = {"errors": both, "worst": worst, "limit": LIMITS[dtype]}
        rows[dtype]["passed"] = finite and worst <= LIMITS[dtype]
    return {**rows, "passed": all(row["passed"] for row in rows.values())}


def finish(processes: dict[str, subprocess.Popen], seconds: float) -> dict[str, str]:
    """Wait for all; what those that failed, or took too long, said last."""
    failures, end = {}, time.monotonic() + seconds
    for name, process in processes.items():
        try:
            output, _ = process.communicate(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes too
            output, _ = process.communicate()
            output += f"\nended after {seconds:g} s"
        if process.returncode:
            failures[name] = output.strip()[-1500:]
    return failures


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", default="stdlib")
    parser.add_argument("--seconds", type=float, default=150, help="give up after so many")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.worker:
        worker(options.worker, options.smoke)
        return 0
    device = device_of(options.smoke)
    if not options.smoke and torch.cuda.device_count() < 2:
        print(f"two GPUs are needed, torch finds {torch.cuda.device_count()}: --smoke runs it on a CPU")
        return 2
    begun, loopback = time.monotonic(), _loopback()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if options.smoke and loopback:
        environment["GLOO_SOCKET_IFNAME"] = loopback
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wanted = commands(folder, options.corpus, device, options.smoke)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        started = {name: subprocess.Popen([sys.executable, *words], **pipes) for name, words in wanted.items()}
        failures = finish(started, options.seconds)
        checks = {}
        for name in ("ddp", "fsdp", "sequence"):
            try:
                if name == "sequence":
                    checks[name] = judged(json.loads((folder / "sequence.json").read_text()))
                else:
                    checks[name] = compared(logged(folder / "one"), logged(folder / name))
            except (OSError, ValueError) as error:
                checks[name] = {"passed": False, "failure": failures.get(name, first_line(error))}
    shown = {
        n: " ".join(["python", *(Path(w).name if Path(w).is_absolute() else w for w in wanted[n])]) for n in wanted
    }
    record = {"not_measured": "smoke run on a CPU, over gloo"} if options.smoke else {}
    record |= {"provenance": provenance(seed=0), "backend": "gloo" if options.smoke else "nccl", "commands": shown}
    record |= {"checks": checks, "failures": failures, "seconds": round(time.monotonic() - begun, 1)}
    record["passed"] = not failures and all(check["passed"] for check in checks.values())
    write_json(options.out, record)
    for name, check in checks.items():
        parts = [check] if name != "sequence" else [check.get("float32", check), check.get("float64", check)]
        print(f"{name:9s}", *(f"{p['worst']:.1e} (limit {p['limit']:g})" if "worst" in p else p for p in parts))
    print(json.dumps(failures) if failures else f"passed: {record['passed']}, {record['seconds']} s")
    if options.smoke:
        print(SMOKE_RUN)
    return 0 if record["passed"] else 1


EXPERIMENT = Experiment(
    question="Do two GPUs give the losses of one, and does a sequence that they share give its gradients?",
    writes=("two_gpus.json",),
    minutes=1,
    gpu="two H200",
    run=run,
    options=options,
    shared=("smoke",),
    dry=("worker",),
)
