"""Compiles the Hopper kernels for a GPU that is not there, and lists what each one uses.

    python -m dn_lib.kernels.hopper.aot [--json]

The launchers themselves run, on CPU tensors.  serialised: ptxas warns (C7514) that it made the tensor cores' products
wait for one another.  Without Triton's interpreter, so in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time

from dn_lib.kernels.aot import _AbsentGPU, resources  # first: it turns the interpreter off

import torch  # isort: skip
import triton  # isort: skip
from triton import knobs  # isort: skip
from triton.experimental.gluon._runtime import GluonJITFunction  # isort: skip

from dn_lib.kernels.hopper import launch  # isort: skip

ARCH = 90


def compile_all() -> list[dict]:
    """A row for each variant: inference, plain training, and all that a call may ask for, without and with gates."""
    triton.runtime.driver.set_active(_AbsentGPU(ARCH))
    knobs.nvidia.dump_ptxas_log = True
    original, rows = GluonJITFunction.run, []

    def record(self, *args, grid, warmup, **options):
        start, log = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = original(self, *args, grid=grid, warmup=True, **options)
        if "bytes stack frame" not in log.getvalue():
            raise RuntimeError(f"no report of ptxas on {self.fn.__name__}: was it in Triton's cache?")
        rows.append(
            {
                "kernel": self.fn.__name__,
                **{name: value for name, value in options.items() if name.isupper()},
                "warps": options["num_warps"],
                "shared": kernel.metadata.shared,
                **resources(kernel.asm["cubin"]),
                "serialised": "C7514" in log.getvalue(),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        return kernel

    GluonJITFunction.run = record
    try:
        for gates in (False, True):
            for save, everything in ((False, False), (True, False), (True, True)):
                _launch(save, everything, gates)
    finally:
        GluonJITFunction.run = original
    return rows


def _launch(save: bool, everything: bool, gates: bool) -> None:
    B, L, H, d, C = 1, 128, 1, launch.HEAD, launch.CHUNK
    low = {"dtype": torch.bfloat16}

    def tile() -> torch.Tensor:
        return torch.zeros(B, L, H, d, **low)

    def optional(*shape: int, **options) -> torch.Tensor | None:
        return torch.zeros(*shape, **options) if everything else None

    common = {
        "q": tile(), "k": tile(), "beta": torch.zeros(B, L, H, **low), "n": torch.zeros(B, L, H, C, **low),
        "q_norm": optional(B, L, H), "k_norm": optional(B, L, H), "scale": 1.0, "segment": L, "segments": 1,
        "sums": torch.zeros(H, B, L, 2) if gates else None,
    }  # fmt: skip
    ends = {f"state_{end}": optional(B, H, d, d) for end in ("in", "out")}
    kept = {"pseudo": tile(), "states": torch.zeros(B * L // C, H, d, d, **low)}
    for values in (d // 2, d):
        launch.chunk_scan_fwd(**common, **ends, **(kept if save else {}), v=tile(), o=tile(), values=values)
    if not save:
        return
    gradients = {"do": tile(), "dq": tile(), "dk": tile(), "dv": tile(), "dbeta": torch.zeros(B, L, H, **low)}
    gradients["dg"] = torch.zeros(B, L, H) if gates else None
    launch.chunk_scan_bwd(**common, **{f"d{name}": x for name, x in ends.items()}, **kept, **gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    rows = compile_all()
    if parser.parse_args().json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(*(f"{name} {value}" for name, value in row.items()), sep="\t")


if __name__ == "__main__":
    main()
