"""Copies that may overtake a dot on a Hopper GPU are found, in a kernel made to have one."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dn_lib.kernels.races import overtaken_dots

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton's ptxas is for Linux on x86-64"
    ),
]

# Sums of products of tiles: of x with itself, and of its entries.  In a file, since Triton reads a kernel's source.
KERNEL = """
import os
os.environ["TRITON_INTERPRET"] = "0"
import json
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(x, out, sums, blocks, BOTH: tl.constexpr, STAGES: tl.constexpr):
    rows = tl.arange(0, 64)
    total = tl.zeros([64, 64], dtype=tl.float32)
    entries = tl.zeros([64], dtype=tl.float32)
    for i in tl.range(0, blocks, num_stages=STAGES):
        tile = tl.load(x + (i * 64 + rows)[:, None] * 64 + rows[None, :])
        total += tl.dot(tile, tl.trans(tile))
        if BOTH:
            entries += tl.sum(tile.to(tl.float32), axis=1)
    tl.store(out + rows[:, None] * 64 + rows[None, :], total)
    tl.store(sums + rows, entries)


def ttgir(both, stages):
    signature = {"x": "*fp16", "out": "*fp32", "sums": "*fp32", "blocks": "i32"}
    names = kernel.arg_names
    signature |= {name: "constexpr" for name in ("BOTH", "STAGES")}
    source = ASTSource(
        kernel, signature, constexprs={(names.index("BOTH"),): both, (names.index("STAGES"),): stages},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttgir"]


print(json.dumps([[both, stages, ttgir(both, stages)] for both in (False, True) for stages in (1, 2, 3)]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[bool, int], str]:
    folder = tmp_path_factory.mktemp("races")
    (folder / "sums.py").write_text(KERNEL)
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, folder / "sums.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(both, stages): text for both, stages, text in json.loads(done.stdout)}


@pytest.mark.parametrize("stages", [2, 3])
def test_a_tile_that_serves_a_dot_and_a_sum_is_overtaken(compiled, stages):
    """Should a newer Triton give such a tile its buffer, this fails: then kernels need no care any more."""
    (found,) = {(x.ahead, x.buffers) for x in overtaken_dots(compiled[True, stages])}
    assert found == (stages - 1, stages - 1)


@pytest.mark.parametrize("both, stages", [(False, 1), (False, 2), (False, 3), (True, 1)])
def test_a_tile_for_dots_alone_or_without_a_pipeline_is_not(compiled, both, stages):
    assert "warp_group_dot" in compiled[both, stages]  # else there is nothing that could be overtaken
    assert overtaken_dots(compiled[both, stages]) == []
