"""Tries tile sizes, warps and stages for each kernel on the GPU at hand and reports which is fastest.

    python benchmarks/tune.py --out tune.json [--head-dims 64 128 256]

Every candidate first has to agree with float64, outputs and gradients, on correlated keys.  Candidates are
compiled ahead of time on all cores, so that the GPU waits for nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

import torch

import dn_lib
from dn_lib.kernels import configs, launch
from dn_lib.kernels.configs import Tiles

SHAPES = {64: (16, 2048, 32), 128: (16, 2048, 16), 256: (8, 4096, 8)}
PLAIN_TILES, PLAIN_PLAN = configs.tiles, configs.plan


def candidates(d: int, norm: bool) -> list[tuple[str, bool, Tiles]]:
    """(kernel, fused, tiles) to try for head size d."""
    rows = []
    values = [b for b in (32, 64, 128) if b <= d]
    for BV, warps, stages, tma in itertools.product(values, (4, 8), (1, 2, 3, 4), (True, False)):
        if BV * d > 128 * 128 or (warps == 8 and BV < 128 and d < 256) or (stages == 4 and (not tma or d > 64)):
            continue
        if BV >= 64 or d == 256:
            rows.append(("walk", False, Tiles(d, BV, warps, stages, tma)))
        rows.append(("walk_back", False, Tiles(d, BV, warps, stages, tma)))
        if BV == d == 64:
            rows.append(("walk", True, Tiles(d, BV, warps, stages, tma)))
            rows.append(("walk_back", True, Tiles(d, BV, warps, stages, tma)))
    for BK, BV, warps, stages, tma in itertools.product((64, 128), (64, 128), (4, 8), (3, 4), (True, False)):
        if d >= BK and d >= BV and (tma or stages == 3):
            rows.append(("recompute_states", False, Tiles(BK, BV, warps, stages, tma)))
    for BK, BV, warps, stages, tma in itertools.product((64, 128, 256), values, (4, 8), (1, 2, 3), (True, False)):
        if d >= BK and (d == BK or not norm) and BK * BV <= 128 * 128 and (warps == 4) == (BK == 64):
            rows.append(("gradients", False, Tiles(BK, BV, warps, stages, tma)))
    rows.append(("chunk_inverse", False, Tiles(d, d, 4, 1)))
    return rows


class chosen:
    """Within it, `kernel` uses `tiles` and everything else its default."""

    def __init__(self, kernel: str, fused: bool, tiles: Tiles):
        self.choice = kernel, fused, tiles

    def __enter__(self):
        kernel, fused, tiles = self.choice

        def pick(name, *rest):
            return tiles if name == kernel else PLAIN_TILES(name, *rest)

        def plan(L, K, V, dtype, chunk, segments):
            p = PLAIN_PLAN(L, K, V, dtype, chunk, segments)
            return configs.Plan(p.chunk, fused, p.segment, p.segments)

        configs.tiles, configs.plan = pick, plan

    def __exit__(self, *_):
        configs.tiles, configs.plan = PLAIN_TILES, PLAIN_PLAN


def compile_one(job):
    d, norm, candidate = job
    os.environ["TRITON_INTERPRET"] = "0"
    from dn_lib.kernels import aot

    call = {"dtype": "bfloat16", "K": d, "V": d, "norm": norm, "state": False, "varlen": False, "chunk": 64}
    with chosen(*candidate):
        try:
            rows = aot.compile_calls(90, [call | {"segments": 1}])
        except Exception as error:
            return job, str(error).splitlines()[-1][:200]
    return job, [row for row in rows if row["kernel"] == candidate[0]]


def inputs(B, L, H, d, dtype=torch.bfloat16, bias=0.0, device="cuda"):
    q, k, v, do = (torch.randn(B, L, H, d, device=device) for _ in range(4))
    k = torch.nn.functional.normalize(k + bias, dim=-1)
    q = torch.nn.functional.normalize(q, dim=-1)
    return [x.to(dtype) for x in (q, k, v, torch.rand(B, L, H, device=device), do)]


def run(q, k, v, beta, do, norm):
    scale = q.shape[-1] ** -0.5
    options = {"scale": scale, "cu_seqlens": None, "chunk": 64, "precision": "ieee"}
    o, _, saved = launch.forward(q, k, v, beta, initial_state=None, norm=norm, save=True, final_state=True, **options)
    grads = launch.backward(q, k, do, beta, saved, do, None, initial_state=False, **options)
    return [o, *grads[:4]]


def reference(q, k, v, beta, do, norm):
    x = [t.double().requires_grad_() for t in (q, k, v, beta)]
    o, _ = dn_lib.delta_rule(*x, backend="chunkwise", qk_l2norm=norm)
    return [o, *torch.autograd.grad(o, x, do.double())]


def measure(d: int, norm: bool, compiled: list, start: int, lines: Path) -> None:
    """Runs in a process of its own, since a miscompiled kernel takes the whole GPU context down with it."""
    from triton.testing import do_bench

    torch.manual_seed(0)
    small, large = inputs(1, 320, 2, d, bias=0.2), inputs(*SHAPES[d], d)
    exact = reference(*small, norm)
    for candidate, info in compiled[start:]:
        kernel, fused, tiles = candidate
        row = {"d": d, "norm": norm, "kernel": kernel, "fused": fused, "tiles": list(vars(tiles).values())}
        if isinstance(info, str) or (info and max(r["shared"] for r in info) > 227 * 1024):
            row["failed"] = info if isinstance(info, str) else "shared memory"
        else:
            row["resources"] = [[r["registers"], r["stack"], r["shared"] // 1024] for r in info]
            with chosen(*candidate):
                got = run(*small, norm)
                row["errors"] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
                q, k, v, beta, do = large
                common = {"scale": d**-0.5, "cu_seqlens": None, "chunk": 64, "precision": "ieee"}
                forward = {"initial_state": None, "norm": norm, "final_state": False} | common
                saved = launch.forward(q, k, v, beta, save=True, **forward)[2]
                if kernel in ("walk_back", "recompute_states", "gradients"):
                    back = partial(launch.backward, q, k, do, beta, saved, do, None, initial_state=False, **common)
                    row["ms"] = [do_bench(back, warmup=5, rep=20, return_mode="median")]
                else:
                    calls = [partial(launch.forward, q, k, v, beta, save=save, **forward) for save in (False, True)]
                    row["ms"] = [do_bench(call, warmup=5, rep=20, return_mode="median") for call in calls]
        with lines.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--only", nargs="*", help="these kernels alone")
    parser.add_argument("--tma", action="store_true", help="only tiles that the copy engine fetches")
    parser.add_argument("--norm", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    jobs = [
        (d, options.norm, c)
        for d in options.head_dims
        for c in candidates(d, options.norm)
        if (not options.only or c[0] in options.only) and (c[2].tma or not options.tma)
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        compiled = pool.map(compile_one, jobs, chunksize=1)
    print("compiled", len(compiled), flush=True)
    options.out.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    rows = []
    for d in options.head_dims:
        mine = [(candidate, info) for (size, _, candidate), info in compiled if size == d]
        done = len(rows)
        while len(rows) - done < len(mine):
            worker = context.Process(target=measure, args=(d, options.norm, mine, len(rows) - done, options.out))
            worker.start()
            worker.join()
            rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
            if len(rows) - done < len(mine):
                kernel, fused, tiles = mine[len(rows) - done][0]
                row = {"d": d, "norm": options.norm, "kernel": kernel, "fused": fused}
                row |= {"tiles": list(vars(tiles).values()), "failed": "crashed"}
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
    for d, kernel in itertools.product(options.head_dims, sorted({r["kernel"] for r in rows})):
        mine = [r for r in rows if r["d"] == d and r["kernel"] == kernel]
        for r in sorted(mine, key=lambda r: r.get("ms", [1e9])[-1])[:6]:
            worst = max(r["errors"]) if "errors" in r else None
            print(
                d,
                kernel,
                "fused" if r["fused"] else "",
                r["tiles"],
                r.get("resources"),
                r.get("ms"),
                worst,
                r.get("failed", ""),
            )
        print("  wrong:", [r["tiles"] for r in mine if "errors" in r and not max(r["errors"]) < 0.01],
              "failed:", [(r["tiles"], r["failed"][:60]) for r in mine if "failed" in r][:4])  # fmt: skip


if __name__ == "__main__":
    main()
