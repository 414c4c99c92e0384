"""One sequence on several machines: bytes that a process receives, and two GPUs against one.

Bytes: one layer of each kind on 2 to 64 processes, for the processes that receive most: the last forward, the first
back.  The exchange's own code counts them in a process group that moves nothing ("fake"), and each count must equal its
formula (`dn_lib.parallel.traffic`).  Ring attention's formula stands beside them.

Two GPUs: a hybrid model (delta, gated delta, linear, window and full attention) on one sequence that two processes
share, over NCCL.  Gradients of every parameter in float32 against one process (limit 1e-5), then, in bfloat16 at full
length, the time of a step on one GPU and on two, the bytes that were counted against the formulas, and how long NCCL's
kernels ran.  Where there are not two GPUs, this part is left out and the file says so.  (With two stretches no state
passes through the map of another one: the first begins at zero.  That is tested with three processes on a CPU.)
--smoke does it on a CPU, over gloo, with a tiny model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dn_lib.models import LanguageModel, ModelConfig
from dn_lib.models.context_parallel import context_parallel_loss, sum_gradients
from dn_lib.parallel.affine import _loopback
from dn_lib.parallel.simulated import counted_row_bytes, counted_state_bytes
from dn_lib.parallel.stretches import Stretches
from dn_lib.parallel.traffic import RULES, ring_attention_bytes, rows_bytes, state_bytes
from dn_lib.testing import relative_error
from experiments.harness.cli import Experiment, device_of, settings_of
from experiments.harness.provenance import ROOT
from experiments.harness.results import Results

LIMIT = 1e-5
RANKS = (2, 4, 8, 16, 32, 64)
PATTERN = ("delta", "window", "gated_delta", "attention", "linear", "window", "delta", "gated_delta")
MODEL: dict[str, Any] = {
    "vocab_size": 256,
    "width": 1024,
    "heads": 8,
    "window": 1024,
    "pattern": PATTERN,
    "layers": len(PATTERN),
}
TINY: dict[str, Any] = MODEL | {"width": 32, "heads": 2, "window": 9}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


# --- Bytes ----------------------------------------------------------------------------------------------
def state_counts(kind: str, ranks: int, heads: int, d: int) -> dict[str, list[int]]:
    """Forward and back, counted and by formula.  States know no length, so that one token a process will do."""
    return {
        "counted": list(counted_state_bytes(kind, ranks, heads, d, d)),
        "formula": [state_bytes(kind, ranks, 1, heads, d, d, backward=b) for b in (False, True)],
    }


def row_counts(ranks: int, length: int, reach: int, width: int) -> dict[str, list[int]]:
    """Forward for the last process, back for the first, counted and by formula, in bfloat16."""
    back = rows_bytes(length, ranks, 0, reach, width, backward=True)
    return {
        "counted": list(counted_row_bytes(length, ranks, reach, width)),
        "formula": [rows_bytes(length, ranks, ranks - 1, reach, width), back],
    }


def layer_bytes(ranks: int, length: int, heads: int, d: int) -> dict:
    """All kinds of layers; raises ValueError where a count is not what its formula says."""
    rows = {kind: state_counts(kind, ranks, heads, d) for kind in RULES}
    width = heads * d
    halos = {"convolution of 4": (3, width), "window of 128": (127, 2 * width), "attention": (length, 2 * width)}
    rows |= {kind: row_counts(ranks, length, *sizes) for kind, sizes in halos.items()}
    ring = [ring_attention_bytes(length, ranks, heads, d, backward=back) for back in (False, True)]
    if any(row["counted"] != row["formula"] for row in rows.values()):
        raise ValueError(f"bytes counted on {ranks} processes are not those of the formulas: {rows}")
    return {"ranks": ranks, "length": length, "heads": heads, "d": d, "layers": rows, "ring attention": ring}


# --- Two GPUs -------------------------------------------------------------------------------------------
def expected(config: ModelConfig, stretches: Stretches, size: int) -> dict[str, int]:
    """Bytes that a step of a model of this pattern receives here, forward and back, B = 1; `size` of a key's number."""
    mixers, H, d = config.mixers(), config.heads, config.width // config.heads
    rules = {"delta": ("delta", d), "gated_delta": ("delta", round(config.expand_v * d)), "linear": ("linear", d)}
    out: dict[str, int] = {"states": 0, "states, backward": 0}
    for mixer in (m for m in mixers if m in rules):
        rule, d_v = rules[mixer]
        out["states"] += state_bytes(rule, stretches.ranks, 1, H, d, d_v)
        out["states, backward"] += state_bytes(rule, stretches.ranks, 1, H, d, d_v, backward=True)
    reach = [{"window": config.window - 1, "attention": stretches.total}[m] for m in mixers if m not in rules]
    keys = 2 * H * d * size
    out["keys and values"] = sum(min(rows, stretches.start) * keys for rows in reach)
    return out


def loss_alone(model: LanguageModel, tokens: Tensor) -> Tensor:
    logits = model(tokens)[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def timed(step, device: str, repeats: int) -> float:
    """Median milliseconds of a step; 1 on a CPU, where nothing is measured."""
    step()
    if device == "cpu":
        return 1.0
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def nccl_ms(step) -> float:
    """Milliseconds that NCCL's kernels ran in one step, waiting for the other GPU included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(e.device_time_total for e in profile.key_averages() if "nccl" in e.key.lower()) / 1e3


def worker(out: Path, smoke: bool, length: int) -> None:
    """One of the two processes; the first writes what both found."""
    device = "cpu" if smoke else f"cuda:{os.environ['LOCAL_RANK']}"
    if not smoke:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("gloo" if smoke else "nccl")
    rank, config = dist.get_rank(), ModelConfig(**(TINY if smoke else MODEL))
    torch.manual_seed(0)
    model, alone = (LanguageModel(config).to(device) for _ in range(2))
    alone.load_state_dict(model.state_dict())
    dist.broadcast_object_list([None])  # the first exchange sets NCCL up
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        dist.broadcast(p.data, 0)
        q.data.copy_(p.data)
    random = torch.Generator().manual_seed(1)

    def drawn(n: int) -> Tensor:
        return torch.randint(0, 256, (1, n), generator=random).to(device)

    # Gradients, in float32, on stretches of unequal length.
    lengths = [70, 61] if smoke else [2500, 1596]
    tokens, stretches = drawn(sum(lengths)), Stretches(lengths)
    context_parallel_loss(model, stretches.mine(tokens), stretches).backward()
    sum_gradients(model, stretches)
    loss_alone(alone, tokens).backward()
    pairs = zip(model.named_parameters(), alone.parameters(), strict=True)
    errors = {name: relative_error(cast(Tensor, p.grad), cast(Tensor, q.grad)) for (name, p), q in pairs}

    # A step, in bfloat16, at full length.
    tokens, stretches = drawn(length), Stretches([length // 2] * 2)

    def shared() -> None:
        model.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = context_parallel_loss(model, stretches.mine(tokens), stretches)
        loss.backward()
        sum_gradients(model, stretches)

    def single() -> None:
        alone.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_alone(alone, tokens)
        loss.backward()

    two = timed(shared, device, 5)
    stretches.received.clear()
    shared()
    wanted = expected(config, stretches, size=2)
    counted = {name: stretches.received[name] for name in wanted}
    nccl = None if smoke else nccl_ms(shared)
    dist.barrier()
    one = timed(single, device, 5) if rank == 0 else None
    dist.barrier()
    mine = {"worst": max(errors.values()), "counted": counted, "formula": wanted, "two_ms": two, "nccl_ms": nccl}
    mine |= {"all_received": dict(stretches.received), "one_ms": one}
    both: list = [None, None]
    dist.all_gather_object(both, mine)
    if rank == 0:
        out.write_text(json.dumps(both))
    dist.destroy_process_group()


def two_processes(smoke: bool, length: int, seconds: float) -> dict:
    """Start both, and judge what they found; raises ValueError for what is off."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if smoke and (loopback := _loopback()):
        environment["GLOO_SOCKET_IFNAME"] = loopback
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = [*TORCHRUN, "-m", "experiments", "context_parallel", "--worker", str(out), "--length", str(length)]
        words += ["--smoke"] if smoke else []
        done = subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        if done.returncode or not out.exists():
            raise ValueError((done.stdout + done.stderr).strip()[-280:])
        both = json.loads(out.read_text())
    for rank, found in enumerate(both):
        if not found["worst"] <= LIMIT:
            raise ValueError(f"gradients on process {rank} are {found['worst']:.1e} from one process, limit {LIMIT:g}")
        if found["counted"] != found["formula"]:
            raise ValueError(f"bytes on process {rank}: counted {found['counted']}, formula {found['formula']}")
    one, two = both[0]["one_ms"], max(found["two_ms"] for found in both)
    return {"length": length, "processes": both, "limit": LIMIT, "speedup": one / two}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=65536, help="tokens of the sequence that two GPUs share")
    parser.add_argument("--seconds", type=float, default=240, help="give the two processes up after so many")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    length = 256 if options.smoke else options.length
    if options.worker:
        worker(options.worker, options.smoke, length)
        return 0
    device_of(options.smoke)
    results = Results(options.out, settings_of(options, "worker", "seconds"), smoke=options.smoke)
    gpus = torch.cuda.device_count()

    def body() -> None:
        for ranks in RANKS:
            sizes = (256, 2, 8) if options.smoke else (options.length, 16, 128)
            results.measure(f"bytes, {ranks} processes", lambda r=ranks, s=sizes: layer_bytes(r, *s))
        if options.smoke or gpus >= 2:
            results.measure("two processes", lambda: two_processes(options.smoke, length, options.seconds))

    code = results.fill(body)
    if not options.smoke and gpus < 2:
        results.summary["left_out"] = f"two processes: torch finds {gpus} GPU"
    lines = []
    for row in results.done:
        if "ranks" in row:
            cells = {k: f"{sum(v['counted']) / 2**20:.3g}" for k, v in row["layers"].items()}
            ring = sum(row["ring attention"]) / 2**20
            lines.append(f"{row['ranks']:3d} processes, MiB: {cells}, ring attention {ring:.3g}")
        else:
            worst = max(found["worst"] for found in row["processes"])
            lines.append(f"two processes: gradients within {worst:.1e}, {row['speedup']:.2f} times as fast as one")
    lines += [str(text) for text in results.summary.values()]
    return results.finish("\n".join(lines), code, failed=results.not_done)


EXPERIMENT = Experiment(
    question="What must a process receive to hold a part of a sequence, and are two GPUs as good as one, and faster?",
    writes=("context_parallel.json",),
    minutes=4,
    gpu="two H200",
    run=run,
    options=options,
    shared=("smoke",),
    dry=("worker",),
    measured=False,
)
