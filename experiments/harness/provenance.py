"""Where a result came from: every JSON file in book/results carries what this module returns."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from dn_lib.teaching.results import sources

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "book" / "results"


def git_commit() -> str:
    """`DN_COMMIT` if that is set (for a copy whose `.git` is missing or older); else the commit of the checkout.

    A "+" at the end says that tracked files differ from that commit; "unknown" that there is no checkout.
    """
    if given := os.environ.get("DN_COMMIT"):
        return given
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "")


def package_version(name: str) -> str | None:
    """The installed version of `name`, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name() -> str:
    """The first GPU's name, or the CPU's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} logical cores)"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} logical cores)"


def provenance(seed: int | list[int] | None = None, **extra: Any) -> dict[str, Any]:
    """What a reader needs in order to repeat a measurement; `extra` is added as it is.

    Keys: command, git_commit, date (UTC, ISO 8601), device, device_count, cuda, torch, triton, python,
    platform, seed, sources (a digest of each source file of the package, see `dn_lib.teaching.results`).
    """
    import torch

    arguments = [Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "", *sys.argv[1:]]
    script = Path(sys.argv[0]).resolve() if sys.argv and sys.argv[0] else None
    if script == ROOT / "experiments" / "__main__.py":
        arguments[:1] = ["-m", "experiments"]
    elif script and script.is_relative_to(ROOT):
        arguments[0] = script.relative_to(ROOT).as_posix()
    # Folders of the machine say nothing to a reader: of an absolute path the name is kept.
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    return {
        "command": shlex.join(["python", *arguments]),
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "device_count": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "seed": seed,
        **extra,
        "sources": sources(),
    }
