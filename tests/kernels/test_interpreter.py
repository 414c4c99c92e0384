"""When Triton interprets: for whoever needs it, in this process alone, in whatever order things are imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton compiles")

ROOT = Path(__file__).resolve().parents[2]

KERNEL = """
import triton, triton.language as tl

@triton.jit
def library(x, o, n: tl.constexpr):
    i = tl.arange(0, n)
    y = tl.load(x + i)
    tl.store(o + i, y.cumsum(0) + tl.sum(y) + y.max(axis=0) + tl.argmax(y, axis=0) + tl.sort(y) + tl.cdiv(7, 2))
"""
RULE = """
import dn_lib, torch
q, k, v = torch.randn(3, 1, 40, 2, 16)
k, beta = torch.nn.functional.normalize(k, dim=-1), torch.rand(1, 40, 2)
found = [dn_lib.delta_rule(q, k, v, beta, backend=name)[0].double() for name in ("triton", "recurrent")]
assert torch.dist(*found) < 1e-4 * found[1].norm()  # float32, 40 steps: some 1e-6
"""
USE = """
x, o = torch.randn(16), torch.empty(16)
library[(1,)](x, o, 16)
assert torch.allclose(o, x.cumsum(0) + x.sum() + x.max() + x.argmax() + x.sort().values + 4, atol=1e-4)
"""


def run(folder: Path, code: str, **environment) -> str:
    script = folder / "script.py"  # Triton reads a kernel's source from its file
    script.write_text(code)
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean |= {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=folder, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_changes_nothing_outside(tmp_path):
    """Neither the environment, which programs that are started would inherit, nor Triton."""
    code = "import os, sys\nbefore = dict(os.environ)\nimport dn_lib, dn_lib.models\n"
    assert run(tmp_path, code + "print(before == dict(os.environ), 'triton' in sys.modules)") == "True False\n"


@pytest.mark.parametrize("first", ["", "import triton", "import triton.language", "import dn_lib.kernels.inverse"])
def test_our_kernels_are_interpreted_whatever_was_imported_first(first, tmp_path):
    code = f"import os\nbefore = dict(os.environ)\n{first}\n{RULE}print(before == dict(os.environ))"
    assert run(tmp_path, code) == "True\n"


@pytest.mark.parametrize("order", [("import triton\n", RULE, KERNEL), ("import dn_lib.teaching, torch\n", KERNEL)])
def test_kernels_defined_later_are_interpreted_too(order, tmp_path):
    """With all that they use of Triton's library, as functions and as methods."""
    run(tmp_path, "".join(order) + USE)


def test_kernels_defined_before_are_left_alone(tmp_path):
    code = KERNEL + RULE + "print(type(library).__name__)"
    assert run(tmp_path, code) == "JITFunction\n"


@pytest.mark.parametrize(("value", "interprets"), [("0", False), ("1", True)])
def test_the_variable_of_the_environment_decides_where_it_is_set(value, interprets, tmp_path):
    code = "from dn_lib.kernels.interpreter import INTERPRETS\nfrom triton import knobs\n"
    code += "print(INTERPRETS, knobs.runtime.interpret)"
    assert run(tmp_path, code, TRITON_INTERPRET=value) == f"{interprets} {interprets}\n"
