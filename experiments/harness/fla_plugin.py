"""A pytest plugin for fla's own tests: puts our functions in the place of fla's, and writes down how each test ends.

    DN_FLA_REPORT=report.jsonl python -m pytest -p experiments.harness.fla_plugin tests/ops/test_delta.py

Only tests that call one of our functions are run.  Where a test compares a chunked function with a recurrent one, the
recurrent one stays fla's, as the reference.  One line of JSON for each test: `test`, `replaced`, `outcome` (passed,
failed or skipped) and, if it failed, `error` and whether it is a `refusal`: an argument that ours names and refuses.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import CodeType

import pytest

import dn_lib
from dn_lib.ops import fla as ours

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left = [], []
    for item in items:
        found = isinstance(item, pytest.Function) and to_replace(item.function.__code__)
        (kept if found else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def _ours_in_their_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in to_replace(request.function.__code__):
        monkeypatch.setattr(request.module, name, getattr(ours, name), raising=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: pytest.CallInfo):
    report = yield
    if call.when == "call" or (call.when == "setup" and not report.passed):
        row = {"test": item.nodeid, "replaced": to_replace(item.function.__code__), "outcome": report.outcome}
        if call.excinfo is not None and report.failed:
            within = Path(str(call.excinfo.traceback[-1].path)).is_relative_to(_PACKAGE)
            row["error"] = f"{call.excinfo.typename}: {call.excinfo.value}".splitlines()[0]
            row["refusal"] = within and isinstance(call.excinfo.value, REFUSALS)
        with open(os.environ["DN_FLA_REPORT"], "a") as file:
            file.write(json.dumps(row) + "\n")
    return report
