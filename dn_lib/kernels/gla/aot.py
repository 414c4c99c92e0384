"""Compiles the kernels for linear attention with a gate per channel, for GPUs that are not there.

    python -m dn_lib.kernels.gla.aot [--all] [--arch 80 --arch 90] [--json]

The launch code itself runs, on CPU tensors, with a driver that only says which GPU to compile for.  Without Triton's
interpreter, so in a process of its own.  Lists registers, stack and shared memory, and dots that a copy may overtake.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from dn_lib.kernels.aot import DTYPES, compile_each, run  # first: it turns the interpreter off

import torch  # isort: skip

from dn_lib.kernels.gla import launch  # isort: skip
from dn_lib.kernels.gla.plan import plan_call  # isort: skip
from dn_lib.kernels.rules import CHUNK_SIZES, Target, default_chunk  # isort: skip


def compile_calls(arch: int, calls: list[dict]) -> list[dict]:
    """A row for each kernel that forward, backward and the recurrence launch for `calls`."""
    return compile_each(arch, ((call, functools.partial(_launch, arch, **call)) for call in calls))


def _launch(
    arch: int, dtype: str, gates: str, K: int, V: int, state: bool, varlen: bool, group: int, chunk: int
) -> None:  # fmt: skip
    L, kind = 256, DTYPES[dtype]
    q, k = (torch.zeros(1, L, 1, K, dtype=kind) for _ in range(2))
    v = torch.zeros(1, L, group, V, dtype=kind)
    g = torch.zeros(1, L, group, K, dtype=DTYPES[gates])
    first = torch.zeros(1, group, K, V) if state else None
    cu = torch.tensor([0, L], dtype=torch.int32) if varlen else None
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "g": g, "scale": 1.0}
    options: dict[str, Any] = {"cu_seqlens": cu, "target": Target(arch, 132)}
    plan = plan_call(q, k, v, training=True, chunk=chunk, **options)
    *_, saved = launch.forward(plan=plan, **inputs, initial_state=first, cu_seqlens=cu, final_state=state)
    assert saved is not None
    launch.backward(plan=plan, **inputs, saved=saved, do=torch.zeros_like(v), dstate=first, initial_state=state)
    plan = plan_call(q, k, v, chunk=None, **options)
    launch.recurrent(plan=plan, **inputs, initial_state=first, final_state=first, cu_seqlens=cu)


def configurations(everything: bool) -> list[dict]:
    """The calls to compile for: a few, or one for each set of tiles and options."""
    names = ("dtype", "gates", "K", "V", "state", "varlen", "group", "chunk")
    rows: list[tuple] = [
        ("bfloat16", "float32", 128, 128, True, False, 1, 64),
        ("float32", "float32", 40, 24, False, True, 2, 32),
        ("float16", "float16", 64, 64, True, False, 1, 16),
    ]
    if everything:
        sizes = [(16, 16), (40, 24), (64, 64), (64, 128), (128, 128), (128, 256), (256, 64), (256, 256)]
        rows = [
            (dtype, gates, K, V, True, varlen, group, default_chunk(DTYPES[dtype]))
            for dtype, (K, V), (gates, varlen, group) in itertools.product(
                DTYPES, sizes, [("float32", False, 1), ("float32", True, 2), ("bfloat16", False, 1)]
            )
        ]
        rows += [
            (dtype, "float32", 128, 128, False, False, 1, chunk)
            for dtype, chunk in itertools.product(DTYPES, CHUNK_SIZES)
        ]
    return [dict(zip(names, row, strict=True)) for row in rows]


if __name__ == "__main__":
    run((__doc__ or "").splitlines()[0], compile_calls, configurations)
