"""A pytest plugin for fla's own tests: puts our functions in the place of fla's, and writes down how each test ends.

    DN_FLA_REPORT=report.jsonl python -m pytest -p experiments.harness.fla_plugin tests/ops/test_delta.py

Only tests are run that call one of our functions, that the report doesn't hold yet and that have at most DN_FLA_ROWS
rows, tokens times heads.  Where a test compares a chunked function with a recurrent one, the recurrent one stays fla's,
as the reference.  One line of JSON for each test: `test`, `replaced`, `outcome` (passed, failed or skipped), `seconds`
and, if it failed, `error` and whether it is a `refusal`: an argument that ours names and refuses.

Without a GPU, fla's tests are pointed at the CPU.  With TRITON_INTERPRET=1 kernels, theirs and ours, are interpreted.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch

import dn_lib
from dn_lib.ops import fla as ours
from dn_lib.ops.backend import using

REFUSALS = (TypeError, ValueError, NotImplementedError)
_PACKAGE = Path(dn_lib.__file__).parent


def names_in(code: CodeType) -> set[str]:
    """Global names and attributes that a function uses, and the functions within it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= names_in(constant)
    return found


def to_replace(code: CodeType) -> list[str]:
    used = sorted(names_in(code) & set(ours.__all__))
    return [name for name in used if name.startswith("chunk_")] or used


def point_fla_at_the_cpu() -> None:
    """Before fla's tests are imported: fla falls back to "cuda" where it finds no GPU."""
    with contextlib.suppress(ImportError):
        from triton.runtime.autotuner import Autotuner

        plain = Autotuner.run

        def run(self, *given, **options):
            self.configs = self.configs[:1]  # with one there is nothing to time, which takes a GPU
            return plain(self, *given, **options)

        Autotuner.run = run
    for name in ("fla.utils", "fla.utils._device", "fla.utils._decorators"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            new = {"device": "cpu", "device_torch_lib": torch.cpu}
            new["custom_device_ctx"] = lambda index: contextlib.nullcontext()
            vars(module).update({key: value for key, value in new.items() if hasattr(module, key)})


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    if not torch.cuda.is_available():
        point_fla_at_the_cpu()


def done() -> set[str]:
    """The tests that the report holds."""
    report = Path(os.environ["DN_FLA_REPORT"])
    return {json.loads(line)["test"] for line in report.read_text().splitlines()} if report.is_file() else set()


def rows_of(item: pytest.Item) -> int:
    """Tokens times heads, by the names that fla's tests have for their sizes; 0 for a test without sizes."""
    sizes: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    tokens = sizes["cu_seqlens"][-1] if "cu_seqlens" in sizes else sizes.get("B", 1) * sizes.get("T", 0)
    return tokens * max(sizes.get(name, 1) for name in ("H", "HV", "Hq"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left, before = [], [], done()
    most = int(os.environ.get("DN_FLA_ROWS") or 0)
    for item in items:
        wanted = isinstance(item, pytest.Function) and to_replace(item.function.__code__) and item.nodeid not in before
        (kept if wanted and (not most or rows_of(item) <= most) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def _ours_in_their_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in to_replace(request.function.__code__):
        monkeypatch.setattr(request.module, name, getattr(ours, name), raising=False)
    with contextlib.nullcontext() if torch.cuda.is_available() else using(auto="triton"):
        yield


def refusal_in(error: BaseException) -> BaseException | None:
    """The refusal by ours that a test ended with.  `pytest.warns` puts its own failure in front of what was raised."""
    for e in (error, error.__context__ if isinstance(error, pytest.fail.Exception) else None):
        frames = traceback.extract_tb(e.__traceback__) if isinstance(e, REFUSALS) else ()
        if frames and Path(frames[-1].filename).is_relative_to(_PACKAGE):
            return e
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: pytest.CallInfo):
    report = yield
    if call.when == "call" or (call.when == "setup" and not report.passed):
        row = {"test": item.nodeid, "replaced": to_replace(item.function.__code__), "outcome": report.outcome}
        if call.excinfo is not None and report.failed:
            refusal = refusal_in(call.excinfo.value)
            error = refusal or call.excinfo.value
            row |= {"error": f"{type(error).__name__}: {error}".splitlines()[0], "refusal": refusal is not None}
        row["seconds"] = round(call.duration, 1)
        with open(os.environ["DN_FLA_REPORT"], "a") as file:
            file.write(json.dumps(row) + "\n")
    return report
