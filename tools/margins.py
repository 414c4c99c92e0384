"""How much room each tolerance of the suite leaves, under several settings of the libraries that do the sums.

    python -m tools.margins tests/forms/test_chunkwise.py    (or `make margins`: the numerical tests)

A matrix product is summed in another order by each processor's kernel, and its last bits differ. A tolerance that
holds with a factor of two to spare under every setting below holds on the next machine, too. The command runs pytest
once for each setting, records both sides of every comparison that looks like a tolerance, and lists those with less
than a factor of two between them; it fails if there are any, or if a test does.

The recording is a pytest plugin: the comparisons `<`, `<=`, `>` and `>=` of the test modules and of the book's checks
are rewritten before they are compiled, and the `allclose` functions are wrapped.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import json
import operator
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 2.0  # the factor that has to be left
LARGEST = 0.05  # no tolerance is above it; what is compared with more is a count, a probability or a score
FOLDER = "MARGINS_FOLDER"  # where the plugin writes what it saw, one file for each process
WITHOUT_ONEDNN = "MARGINS_WITHOUT_ONEDNN"

# Three libraries multiply matrices: MKL and oneDNN in torch, OpenBLAS in numpy (and so in Triton's interpreter); ATen
# sums. One run moves all of them, since hardly a comparison depends on two. The last needs a processor with AVX-512.
SETTINGS = {
    "as it is": {},
    "oldest": {
        "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Prescott", "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "sse and avx": {"MKL_CBWR": "SSE4_2", "OPENBLAS_CORETYPE": "Sandybridge", "ONEDNN_MAX_CPU_ISA": "AVX"},
    "avx2, two threads": {
        "MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": "2",
    },
    "without oneDNN": {WITHOUT_ONEDNN: "1", "OPENBLAS_CORETYPE": "Zen", "MKL_CBWR": "AVX"},
    "avx512": {"MKL_CBWR": "AVX512", "OPENBLAS_CORETYPE": "SkylakeX", "ATEN_CPU_CAPABILITY": "avx512"},
}  # fmt: skip

NUMERICAL = [
    "tests/forms", "tests/kernels/test_kernels.py", "tests/kernels/test_ladder.py", "tests/layers/test_layers.py",
    "tests/models/test_convert.py", "tests/models/test_models.py", "tests/ops/test_ops.py", "tests/parallel",
    "tests/data/test_recall.py", "tests/teaching/test_equations.py", "tests/teaching/test_exercises.py",
    "tests/teaching/test_tiles.py",
]  # fmt: skip

# --- the plugin ---------------------------------------------------------------------------------------------------

OPERATORS = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
BY_NAME = {kind.__name__: function for kind, function in OPERATORS.items()}
least: dict[tuple[str, str], dict] = {}  # the least room at each place in each test


def record(where: str, value: float, bound: float) -> None:
    """Keeps the smallest ratio of the larger to the smaller side for each place and test."""
    small, large = sorted((value, bound))
    if not 0 < small <= LARGEST or large != large:
        return
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" ", 1)[0]
    room = large / small
    if (where, test) not in least or room < least[where, test]["room"]:
        least[where, test] = {"room": room, "value": value, "bound": bound, "where": where, "test": test}


def record_tensors(where: str, value, bound) -> None:
    """The narrowest of the entries that are positive on both sides, if all fall on one side of the bound."""
    import torch

    a, b = torch.broadcast_tensors(*(torch.as_tensor(x).detach().double().cpu() for x in (value, bound)))
    inside = (a > 0) & (b > 0)
    if inside.any() and (a < b)[inside].unique().numel() == 1:  # else it picks entries, and is no tolerance
        a, b = a[inside], b[inside]
        i = (a / b).log().abs().argmin()
        record(where, a[i].item(), b[i].item())


def is_real(x) -> bool:
    return isinstance(x, float) or (hasattr(x, "is_floating_point") and x.is_floating_point())


def compare(name: str, where: str, left, right):
    """`left < right` (or another comparison, by its name), recorded where both sides are real numbers or tensors."""
    if is_real(left) and is_real(right):
        record_tensors(where, left, right)
    return BY_NAME[name](left, right)


class Recorded(ast.NodeTransformer):
    """Turns `a < b` into a call of `compare`; chains stay as they are."""

    def __init__(self, path: str) -> None:
        self.path = path

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) != 1 or type(node.ops[0]) not in OPERATORS:
            return node
        where = f"{self.path}:{node.lineno}"
        arguments = [ast.Constant(type(node.ops[0]).__name__), ast.Constant(where), node.left, *node.comparators]
        call = ast.Call(ast.Name("_compare_with_margin", ast.Load()), arguments, [])
        return ast.fix_missing_locations(ast.copy_location(call, node))


def rewrite_before_pytest_does() -> None:
    from _pytest.assertion import rewrite

    setattr(builtins, "_compare_with_margin", compare)  # noqa: B010 (type checkers know what builtins holds)
    original = rewrite.rewrite_asserts

    def rewrite_asserts(tree, source, module_path=None, config=None):
        path = os.path.relpath(module_path or ROOT, ROOT)
        if path.startswith(("tests", "dn_lib")):  # and not the modules of other plugins
            tree = Recorded(path).visit(tree)
        original(tree, source, module_path, config)

    rewrite.rewrite_asserts = rewrite_asserts
    # What ordinary runs have compiled is not used, and not written over.
    rewrite._read_pyc = lambda *arguments: None
    rewrite._write_pyc = lambda *arguments: True


def wrap_allclose() -> None:
    import numpy as np
    import torch

    def caller() -> str:
        frame = sys._getframe(2)
        return f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}"

    def worst(where, a, b, rtol, atol):
        a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
        record_tensors(where, (a - b).abs(), atol + rtol * b.abs())

    def wrap(original):
        def allclose(a, b, rtol=1e-5, atol=1e-8, **options):
            worst(caller(), a, b, rtol, atol)
            return original(a, b, rtol=rtol, atol=atol, **options)

        return allclose

    torch.allclose, np.allclose = wrap(torch.allclose), wrap(np.allclose)
    assert_close = torch.testing.assert_close

    def wrapped(a, b, *, rtol=None, atol=None, **options):
        if isinstance(a, torch.Tensor):
            defaults = (1.3e-6, 1e-5) if a.dtype == torch.float32 else (1e-7, 1e-7)
            worst(caller(), a, b, *(defaults if rtol is None else (rtol, atol)))
        return assert_close(a, b, rtol=rtol, atol=atol, **options)

    torch.testing.assert_close = wrapped


def wrap_approx() -> None:
    import pytest

    scalar = type(pytest.approx(1.0))
    original = scalar.__eq__

    def equal(self, actual):
        if isinstance(actual, float) and isinstance(self.expected, float):
            frame = sys._getframe(1)
            where = f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}"
            record(where, abs(actual - self.expected), self.tolerance)
        return original(self, actual)

    scalar.__eq__ = equal


def pytest_configure(config) -> None:
    import torch

    if WITHOUT_ONEDNN in os.environ:
        torch.backends.mkldnn.enabled = False
    wrap_allclose()
    wrap_approx()


def pytest_sessionfinish() -> None:
    Path(os.environ[FOLDER], f"{os.getpid()}.json").write_text(json.dumps(list(least.values())))


if FOLDER in os.environ:  # pytest has loaded this module as a plugin
    import pytest

    pytest.register_assert_rewrite("dn_lib.teaching", "dn_lib.testing")
    rewrite_before_pytest_does()

# --- the command --------------------------------------------------------------------------------------------------


def has_avx512() -> bool:
    """ATen runs AVX-512 where it is told to, and a processor without it ends the process."""
    about = Path("/proc/cpuinfo")
    return about.exists() and "avx512f" in about.read_text().split()


def run(arguments: list[str], setting: dict[str, str], folder: Path) -> tuple[int, list[dict]]:
    """pytest's exit code and what was recorded, each entry with its place."""
    seen = folder / "seen"
    seen.mkdir()
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **setting, FOLDER: str(seen)}
    command = [sys.executable, "-m", "pytest", "-p", "tools.margins", "-p", "no:cacheprovider", *arguments]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    entries = [entry for file in seen.glob("*.json") for entry in json.loads(file.read_text())]
    return code, entries


def table(entries: list[dict]) -> str:
    lines = []
    for e in sorted(entries, key=lambda e: e["room"]):
        lines.append(
            f"{e['room']:6.2f}  {e['value']:.3g} against {e['bound']:.3g}  {e['where']}  {e['setting']}  {e['test']}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.margins", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="also write everything that was recorded to this file")
    options, arguments = parser.parse_known_args(argv)
    failed, entries = [], []
    for name in options.setting or SETTINGS:
        if "avx512" in name and not has_avx512():
            print(f"--- {name}: not on this processor", flush=True)
            continue
        print(f"--- {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            code, seen = run(arguments or NUMERICAL, SETTINGS[name], Path(folder))
        failed += [name] if code else []
        entries += [{**entry, "setting": name} for entry in seen]
    if options.json:
        options.json.write_text(json.dumps(entries, indent=1))
    narrow = [entry for entry in entries if entry["room"] < ENOUGH]
    print(f"\n{len(entries)} comparisons; less than a factor of {ENOUGH:g} between the sides of {len(narrow)}")
    print(table(narrow))
    if failed:
        print("tests failed under:", ", ".join(failed))
    return bool(failed or narrow)


if __name__ == "__main__":
    sys.exit(main())
