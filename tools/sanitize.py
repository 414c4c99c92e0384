"""Every kernel on small shapes under compute-sanitizer: memcheck, racecheck and initcheck.

    python -m tools.sanitize --out sanitizer.json

Needs an NVIDIA GPU and `compute-sanitizer` (part of the CUDA toolkit).  The kernels are compiled first, without it.
Exits with 1 if a tool reports an error or does not finish.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck")


SIZES = ((64, 64, "bfloat16"), (128, 128, "bfloat16"), (40, 24, "float32"))
# Length, parts of a sequence, packed, keys normalised, programs alone on their multiprocessors.
REGIMES = (
    (70, 1, False, False, True),
    (1024, 1, False, True, False),
    (1024, 1, False, False, True),
    (1024, 3, False, False, False),
    (70, 1, True, True, True),
)
CASES = tuple(itertools.product(SIZES, REGIMES))


def exercise(case: tuple, device: str = "cuda") -> int:
    """Forward, gradients, decoding and the recurrence of one of CASES; how many calls were made."""
    import dn_lib  # first, so that nothing else imports Triton before it

    # isort: split
    import torch

    (d_k, d_v, kind), (L, parts, packed, norm, alone) = case
    dtype = getattr(torch, kind)
    q, k = (torch.nn.functional.normalize(torch.randn(1, L, 1, d_k, device=device), dim=-1) for _ in range(2))
    v, beta = torch.randn(1, L, 1, d_v, device=device), torch.rand(1, L, 1, device=device)
    cu = torch.tensor([0, 0, 17, L], device=device) if packed else None
    first = torch.randn(3 if packed else 1, 1, d_k, d_v, device=device)
    x = [t.to(dtype).requires_grad_() for t in (q, k, v, beta)]
    rule = mock.patch("dn_lib.kernels.plan.segments", lambda *_: parts)
    with rule, mock.patch("dn_lib.kernels.plan.alone", lambda *_: alone):
        o, state = dn_lib.delta_rule(
            *x, initial_state=first, output_final_state=True, cu_seqlens=cu, qk_l2norm=norm, backend="triton"
        )
        torch.autograd.grad((o, state), x, (torch.randn_like(o), torch.randn_like(state)))
        with torch.no_grad():
            dn_lib.delta_rule(*x, cu_seqlens=cu, qk_l2norm=norm, backend="triton")
            dn_lib.fused_recurrent_delta_rule(*(t[:, :9] for t in x))
            dn_lib.decode_delta_rule(*(t[:, 0].detach() for t in x), first[:1].clone())
    if device == "cuda":
        torch.cuda.synchronize()
    return 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the summaries")
    parser.add_argument("--exercise", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.exercise:
        print("calls:", sum(map(exercise, CASES)), flush=True)
        return 0
    program = shutil.which("compute-sanitizer")
    if program is None:
        parser.error("compute-sanitizer is not on the PATH: install the CUDA toolkit")
    # Without PyTorch's cache each tensor is an allocation of its own, so that its ends are watched.
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "tools.sanitize", "--exercise"]
    with multiprocessing.get_context("spawn").Pool(min(len(CASES), os.cpu_count())) as pool:
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
    if options.out:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from provenance import provenance

        options.out.write_text(json.dumps({"provenance": provenance(), "tools": found}, indent=1) + "\n")
    return int(any(r["exit_code"] or not r["calls"] for r in found.values()))


if __name__ == "__main__":
    sys.exit(main())
