"""A plan in words: what `print(plan)` says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from dn_lib.kernels.rules import SCANS

if TYPE_CHECKING:
    from dn_lib.kernels.plan import Plan


def sentences(plan: Plan) -> Iterator[str]:
    c, layout = plan.call, plan.layout
    name = str(c.dtype).removeprefix("torch.")
    where = "Triton's interpreter" if c.target.arch is None else f"compute capability {c.target.arch / 10}"
    where += f", {c.target.sms} SMs" if c.target.sms else ""
    sequences = f"{c.sequences} packed sequences" if layout.packed else f"{c.B} x {c.L:,} tokens"
    heads = f"{c.H} heads" if c.group == 1 else f"{c.key_heads} key heads for {c.H} value heads"
    yield f"{sequences}, {heads} of {c.K} key and {c.V} value channels, {name}; {where}"
    if c.gate or not c.erase:
        yield ", ".join(["the delta rule" if c.erase else "linear attention", *["with a gate per token"] * c.gate])
    if c.chunk is None:
        yield "the recurrence, one token at a time, in float32"
    else:
        dots = f"; float32 dots in {c.precision}" if c.dtype == torch.float32 else ""
        yield f"chunks of {c.chunk}{dots}; {_why_segments(plan)}"
    for number, (step, launch) in enumerate(plan.launches.items(), 1):
        t = launch.tiles
        sizes = f"{t.rows} rows" if t.rows else f"tiles of {t.BK} keys" + (f" x {t.BV} values" if t.BV else "")
        wave = ", one wave" if step in SCANS and launch.one_wave else ""
        parts = [
            f"{launch.programs:,} programs{wave}", sizes, f"{t.warps} warp{'s' * (t.warps > 1)}",
            f"{t.stages} stage{'s' * (t.stages > 1)}", "TMA" if launch.tma else "pointers",
            *["Gluon"] * launch.gluon,
        ]  # fmt: skip
        yield f"{number}. {launch.kernel} ({launch.does}): {', '.join(parts)}"
    if c.training:
        kept = layout.buffers
        size = sum(math.prod(b.shape) * b.dtype.itemsize for b in kept.values())
        each = (f"{key} {list(b.shape)} {str(b.dtype).removeprefix('torch.')}" for key, b in kept.items())
        yield f"saved for the backward, {size / 2**20:,.1f} MiB: {', '.join(each)}"


def _why_segments(plan: Plan) -> str:
    c, layout = plan.call, plan.layout
    scan = plan.launches["chunk_scan_fwd"]
    if layout.packed:
        return "one segment per sequence: packed sequences are not split"
    if layout.segments > 1:
        unsplit = scan.programs // layout.segments
        rule = f"since unsplit only {unsplit:,} programs would run on {c.target.sms} SMs"
        why = "asked for" if c.overrides.segments else rule
        return f"{layout.segments} segments of {layout.segment_length:,} tokens per sequence, {why}"
    if c.overrides.segments:
        return "one segment per sequence, asked for"
    if not c.target.sms:
        return "one segment per sequence: a CPU runs programs one after the other"
    if scan.programs >= c.target.sms:
        return f"one segment per sequence, since {scan.programs:,} programs fill {c.target.sms} SMs"
    return f"one segment per sequence: {scan.programs:,} programs leave SMs idle, and a split would cost more"
