"""Every kernel on small shapes under compute-sanitizer: memcheck, racecheck and initcheck.

Needs an NVIDIA GPU and `compute-sanitizer` (part of the CUDA toolkit).  The kernels are compiled first, without it.
Exits with 1 if a tool reports an error or does not finish, with 2 if there is no such tool.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time

import torch

import dn_lib
from dn_lib.kernels import plan, rules
from experiments.harness.cli import Experiment
from experiments.harness.provenance import ROOT, provenance
from experiments.harness.results import write_json

TOOLS = ("memcheck", "racecheck", "initcheck")
SIZES = ((64, 64, "bfloat16"), (128, 128, "bfloat16"), (40, 24, "float32"))
# Length, segments of a sequence, packed, keys normalised, each program with an SM to itself.
REGIMES = (
    (70, 1, False, False, True),
    (1024, 1, False, True, False),
    (1024, 1, False, False, True),
    (1024, 3, False, False, False),
    (70, 1, True, True, True),
)
CASES = tuple(itertools.product(SIZES, REGIMES))
CALLS = 7  # of each case


def exercise(case: tuple, device: str = "cuda") -> int:
    """Forward, gradients, decoding and the recurrence of one of CASES; how many calls were made.

    The gated calls have two value heads for the key head, and some gates of zero.
    """
    (d_k, d_v, kind), (L, segments, packed, norm, one_wave) = case
    dtype = getattr(torch, kind)
    q, k = (torch.nn.functional.normalize(torch.randn(1, L, 1, d_k, device=device), dim=-1) for _ in range(2))
    v, beta = torch.randn(1, L, 1, d_v, device=device), torch.rand(1, L, 1, device=device)
    cu = torch.tensor([0, 0, 17, L], device=device) if packed else None
    first = torch.randn(3 if packed else 1, 1, d_k, d_v, device=device)
    x = q, k, v, beta = tuple(t.to(dtype).requires_grad_() for t in (q, k, v, beta))
    v2, beta2 = (t.detach().repeat_interleave(2, 2).requires_grad_() for t in (v, beta))
    g = torch.rand(1, L, 2, device=device).log().masked_fill(torch.rand(1, L, 2, device=device) < 0.1, -torch.inf)
    g.requires_grad_()
    target = rules.Target(plan.target_of(torch.device(device)).arch, sms=2**20 if one_wave else 0)
    with plan.using(segments=segments, target=target):
        o, state = dn_lib.delta_rule(
            q, k, v, beta, initial_state=first, output_final_state=True, cu_seqlens=cu, qk_l2norm=norm, backend="triton"
        )
        assert state is not None
        torch.autograd.grad((o, state), x, (torch.randn_like(o), torch.randn_like(state)))
        options = {"output_final_state": True, "cu_seqlens": cu, "qk_l2norm": norm, "backend": "triton"}
        for leaves, rule in (
            ((q, k, v2, beta2, g), dn_lib.gated_delta_rule),
            ((q, k, v2, g), dn_lib.linear_attention),
        ):
            o, state = rule(*leaves, initial_state=first.repeat_interleave(2, 1), **options)
            assert state is not None
            torch.autograd.grad((o, state), leaves, (torch.randn_like(o), torch.randn_like(state)))
        with torch.no_grad():
            dn_lib.delta_rule(q, k, v, beta, cu_seqlens=cu, qk_l2norm=norm, backend="triton")
            dn_lib.fused_recurrent_delta_rule(q[:, :9], k[:, :9], v[:, :9], beta[:, :9])
            dn_lib.decode_delta_rule(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], first[:1].clone())
    if device == "cuda":
        torch.cuda.synchronize()
    return CALLS


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exercise", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.exercise:
        print("calls:", sum(map(exercise, CASES)), flush=True)
        return 0
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("compute-sanitizer is not on the PATH: install the CUDA toolkit", file=sys.stderr)
        return 2
    # Without PyTorch's cache each tensor is an allocation of its own, so that its ends are watched.
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "experiments", "sanitizer", "--exercise"]
    with multiprocessing.get_context("spawn").Pool(min(len(CASES), os.cpu_count() or 1)) as pool:
        pool.map(exercise, CASES, chunksize=1)  # compiles them
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running, begun = {}, time.monotonic()
    for tool in TOOLS:
        run = [program, "--tool", tool, "--kernel-regex-exclude", "kns=at::", "--error-exitcode", "99", *command]
        running[tool] = subprocess.Popen(
            run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    found = {}
    for tool, process in running.items():
        text = process.communicate()[0]
        summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
        calls = re.findall(r"^calls: (\d+)", text, re.MULTILINE)
        found[tool] = {
            "exit_code": process.returncode,
            "calls": int(calls[0]) if calls else 0,
            "summary": summaries[-1:],
            "seconds": round(time.monotonic() - begun, 1),
            "last_lines": [] if process.returncode == 0 else text.splitlines()[-40:],
        }
        print(tool, found[tool], flush=True)
    write_json(options.out, {"provenance": provenance(), "tools": found})
    return int(any(r["exit_code"] or not r["calls"] for r in found.values()))


EXPERIMENT = Experiment(
    question="Does any kernel read or write where it must not?",
    writes=("sanitizer.json",),
    minutes=1,
    gpu="H200",
    run=run,
    options=options,
    dry=("exercise",),
)
