"""What several test modules share."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every file that git tracks, or would (untracked and not ignored)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(autouse=True)
def same_precision():
    """PyTorch's switch for float32 products decides what plans and tolerances are: no test leaves it changed."""
    import torch

    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def auto_takes():
    """A function that says what backend "auto" takes until the test ends: on a GPU it would be "triton"."""
    from dn_lib.ops.backend import using

    with contextlib.ExitStack() as stack:
        yield lambda backend: stack.enter_context(using(auto=backend))
