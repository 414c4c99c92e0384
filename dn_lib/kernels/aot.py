"""Compiles every kernel configuration for GPUs that are not there, and lists what each one uses.

    python -m dn_lib.kernels.aot [--all] [--arch 80 --arch 90]

The launch code itself runs, on CPU tensors, with a driver that only says which GPU to compile for: what is
compiled here is what a call would launch.  It must run without Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

os.environ["TRITON_INTERPRET"] = "0"
import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dn_lib.kernels.delta_rule import launch
from dn_lib.kernels.plan import plan_call, using
from dn_lib.kernels.races import overtaken_dots
from dn_lib.kernels.rules import CHUNK_SIZES, Target, default_chunk

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
Compile = Callable[[int, list[dict]], list[dict]]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class _AbsentGPU:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return int(self.target.arch)  # Triton keeps compiled kernels by device: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack a thread, as `cuobjdump` reads them from a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    fields = dict(f.split(":", 1) for f in run.stdout.split() if f.count(":") == 1)
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"])}


def compile_each(arch: int, calls: Iterable[tuple[dict, Callable[[], None]]]) -> list[dict]:
    """Compiles what each call launches: what a row says of it, and the call.  A row for each kernel compiled."""
    triton.runtime.driver.set_active(cast(Any, _AbsentGPU(arch)))
    original, rows, seen = JITFunction.run, [], set()

    def record(self, *args, grid, warmup, **kwargs):
        start = time.perf_counter()
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel is not None and kernel.hash not in seen:
            seen.add(kernel.hash)
            row = {
                "kernel": self.fn.__name__,
                "arch": arch,
                **record.about,
                "warps": kernel.metadata.num_warps,
                "shared": kernel.metadata.shared,
                "seconds": round(time.perf_counter() - start, 1),
                "overtaken": len(overtaken_dots(kernel.asm["ttgir"])),
            }
            rows.append(row | resources(kernel.asm["cubin"]))
        return kernel

    JITFunction.run = record
    try:
        for record.about, call in calls:
            call()
    finally:
        JITFunction.run = original
    return rows


# SMs of the GPU, for both regimes of `plan.is_one_wave`, and whether TMA is used in short calls as in long ones.
Ways = tuple[tuple[int, bool], ...]
BY_TMA: Ways = ((0, True), (10**6, True))
BY_POINTERS: Ways = ((0, False),)


def compile_calls(arch: int, calls: list[dict], ways: Ways = BY_TMA + BY_POINTERS) -> list[dict]:
    """A row for each kernel that forward, backward and the recurrence launch for `calls`, each in all of `ways`.

    A call may have `ways` of its own.
    """
    own = [({name: x for name, x in call.items() if name != "ways"}, call.get("ways") or ways) for call in calls]
    return compile_each(
        arch,
        (
            ({**call, "one_wave": sms > 0, "tma": tma}, functools.partial(_launch_on, Target(arch, sms), tma, call))
            for call, ways in own
            for sms, tma in ways
        ),
    )


def _launch_on(target: Target, tma: bool, call: dict) -> None:
    with using(target=target, tma=tma, gluon=False, segments=call["segments"]):
        _launch(**call)


def _launch(
    dtype: str, K: int, V: int, norm: bool, state: bool, varlen: bool, chunk: int, gate: bool = False,
    erase: bool = True, group: int = 1, **_,
):  # fmt: skip
    L, H, kind = max(2 * chunk, 1024), group, DTYPES[dtype]
    q, k = (torch.zeros(1, L, 1, K, dtype=kind) for _ in range(2))
    v = torch.zeros(1, L, H, V, dtype=kind)
    beta = torch.zeros(1, L, H, dtype=kind) if erase else None
    g = torch.zeros(1, L, H) if gate else None
    first = torch.zeros(1, H, K, V) if state else None
    cu = torch.tensor([0, L], dtype=torch.int32) if varlen else None
    inputs = {"q": q, "k": k, "v": v, "beta": beta, "scale": 1.0, "initial_state": first, "cu_seqlens": cu, "g": g}
    rule = {"cu_seqlens": cu, "norm": norm, "gate": gate, "erase": erase}
    for training in (False, True):
        plan = plan_call(q, k, v, training=training, chunk=chunk, **rule)
        *_, saved = launch.forward(plan=plan, **inputs, final_state=state)
    assert saved is not None
    launch.gradients(
        plan=plan, q=q, k=k, v=v, beta=beta, saved=saved, do=torch.zeros_like(v), dstate=first, scale=1.0,
        initial_state=state,
    )  # fmt: skip
    launch.recurrent(plan=plan_call(q, k, v, chunk=None, **rule), **inputs, final_state=first)


def configurations(everything: bool) -> list[dict]:
    """The calls to compile for: a few that cover every kernel, or one for each set of tiles and options."""
    names = ("dtype", "K", "V", "norm", "state", "varlen", "chunk", "segments", "gate", "erase", "group")
    rules = [(False, True, 1), (True, True, 2), (True, False, 1), (False, False, 1)]
    rows = [
        ("bfloat16", 64, 64, True, True, False, 64, 1, *rules[0]),
        ("bfloat16", 128, 128, False, True, False, 64, 2, *rules[0]),
        ("float32", 40, 24, True, True, True, 32, 1, *rules[0]),
        ("float16", 128, 128, False, True, False, 64, 1, *rules[1]),
        ("bfloat16", 64, 64, True, True, False, 64, 2, *rules[2]),
    ]
    # Of the few, those with a gate go each a part of the ways: compiling takes a second for every kernel and way.
    few: dict[int, Ways] = {3: BY_TMA[1:], 4: BY_TMA[:1] + BY_POINTERS}
    if everything:
        sizes = [(16, 16), (40, 24), (64, 64), (64, 128), (128, 128), (128, 256), (256, 64), (256, 256)]
        layouts = [(False, 1), (False, 2), (True, 1)]
        rows = [
            (dtype, K, V, norm, True, varlen, default_chunk(DTYPES[dtype]), segments, *rule)
            for dtype, (K, V), norm, (varlen, segments), rule in itertools.product(
                DTYPES, sizes, (False, True), layouts, rules
            )
        ]
        rows += [
            (dtype, K, K, norm, False, False, chunk, 1, *rules[0])
            for dtype, K, norm, chunk in itertools.product(DTYPES, (64, 128, 256), (False, True), CHUNK_SIZES)
        ]
    calls = [dict(zip(names, row, strict=True)) for row in rows]
    return calls if everything else [call | {"ways": few.get(number)} for number, call in enumerate(calls)]


def _compile_one(compile_calls: Compile, job: tuple[int, dict]) -> list[dict]:
    return compile_calls(job[0], [job[1]])


def run(about: str, compile_calls: Compile, configurations: Callable[[bool], list[dict]]) -> None:
    """The command line of a family of kernels.  Exits with a message if one of them cannot be run as it is."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--all", action="store_true", help="every configuration, not just one of each kind")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT), help="80 and/or 90")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    jobs = [(arch, call) for arch in options.arch or [80, 90] for call in configurations(options.all)]
    compile_one = functools.partial(_compile_one, compile_calls)
    if options.all:
        with multiprocessing.get_context("spawn").Pool() as pool:
            done = pool.imap(compile_one, jobs)
            rows = [row for part in tqdm(done, total=len(jobs), disable=options.json) for row in part]
    else:
        rows = [row for job in jobs for row in compile_one(job)]
    if options.json:
        print(json.dumps(rows))
    else:
        heading = list(rows[0])
        print(*heading, sep="\t")
        for row in rows:
            print(*(row[name] for name in heading), sep="\t")
    if overtaken := [row for row in rows if row["overtaken"]]:
        sys.exit(f"in {len(overtaken)} kernels a copy may overtake a dot, in the first: {overtaken[0]}")
    if over := [row for row in rows if row["shared"] > SHARED_LIMIT[row["arch"]]]:
        sys.exit(f"{len(over)} kernels need more shared memory than their GPU has, the first: {over[0]}")


if __name__ == "__main__":
    run((__doc__ or "").splitlines()[0], compile_calls, configurations)
