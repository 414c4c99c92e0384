"""What this machine has of what the book needs, and what to do about the rest: `python -m dn_lib doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import dn_lib

BOOK = ("jupyterlab", "ipykernel", "jupytext", "nbclient", "sphinx", "myst-nb")
TEST = ("pytest", "pytest-xdist", "hypothesis", "nbval", "ruff")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and the remedy if it is not in order."""

    subject: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'✗' if self.remedy else '✓'} {self.subject:<12} {self.found}"
        return line + (f"\n    → {self.remedy}" if self.remedy else "")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def python() -> Finding:
    remedy = "" if sys.version_info >= (3, 11) else "install Python 3.11 or later"
    return Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", remedy)


def package() -> Finding:
    return Finding("dn_lib", dn_lib.__version__)


def devices() -> list[Finding]:
    """PyTorch, the processor, and every GPU that PyTorch sees."""
    found = [Finding("torch", torch.__version__), Finding("CPU", f"{os.cpu_count()} cores")]
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return [*found, Finding("GPU", "none; every chapter also runs on the CPU")]
        remedy = (
            "there seems to be an NVIDIA driver that this torch cannot use: see `nvidia-smi`, and install a "
            "torch built for CUDA (the plain wheel on PyPI is)"
        )
        return [*found, Finding("GPU", "torch sees none", remedy)]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB"
        old = "" if about.major >= 8 else "the kernels are tested on sm_80 and later; use backend='chunkwise'"
        found.append(Finding(f"GPU {index}", text, old))
    return found


# Doubles eight numbers, in a loop whose bound is read at run time (what fails first where versions do not match): on
# the GPU where Triton compiles, on the CPU where it interprets.
TRIAL = """
import os, torch, dn_lib.kernels.common, triton, triton.language as tl

@triton.jit
def double(x, times, n: tl.constexpr):
    i = tl.arange(0, n)
    for _ in range(tl.cdiv(times, 1)):
        tl.store(x + i, 2 * tl.load(x + i))

x = torch.arange(8.0, device="cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
double[(1,)](x, 1, 8)
assert x.tolist() == [2.0 * i for i in range(8)], x
"""


def try_triton(seconds: float = 120, trial: str = TRIAL) -> str | None:
    """Run `trial` in a process of its own, since a broken compiler may take it along; None if all is well."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "trial.py")  # Triton reads a kernel's source from its file
        script.write_text(trial)
        command = [sys.executable, str(script)]
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"no answer in {seconds:.0f} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or ["no message"])[-1]


def triton(attempt: Callable[[], str | None] = try_triton) -> Finding:
    """Whether Triton compiles, interprets, or is missing; `attempt` runs a small kernel and says what is wrong."""
    if importlib.util.find_spec("triton") is None:
        if platform.system() != "Linux":
            remedy = "chapter 5 needs Linux; chapters 1-4 and 6 run here as they are"
        else:
            remedy = "pip install triton  (chapter 5 and backend='triton' need it; the rest runs without)"
        return Finding("Triton", "missing", remedy)
    version = _version("triton") or "of unknown version"
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    trouble = attempt()
    if trouble:
        remedy = (
            "unset TRITON_INTERPRET, or reinstall triton at the version in constraints.txt"
            if interprets
            else "Triton needs a C compiler, the NVIDIA driver, and the triton that this torch asks for"
        )
        return Finding("Triton", f"{version}, fails: {trouble}", remedy)
    if interprets and torch.cuda.is_available():
        remedy = "TRITON_INTERPRET=1 is set although there is a GPU: unset it to have kernels compiled"
        return Finding("Triton", f"{version}, interprets", remedy)
    return Finding("Triton", f"{version}, " + ("interprets (slow, exact, on the CPU)" if interprets else "compiles"))


def c_compiler() -> Finding:
    path = next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )
    if path:
        return Finding("C compiler", path)
    remedy = "install one, for instance `apt-get install gcc` (Triton builds its launcher with it on a GPU)"
    return Finding("C compiler", "missing", remedy)


def extras(version_of: Callable[[str], str | None] = _version) -> list[Finding]:
    """The Jupyter pieces and the pieces of the test suite."""
    found = []
    for subject, names, extra in (("Jupyter", BOOK, "book"), ("Tests", TEST, "test")):
        versions = {name: version_of(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        if missing:
            remedy = f"missing {', '.join(missing)}: pip install -c constraints.txt -e '.[{extra}]'"
            found.append(Finding(subject, text or "nothing of it", remedy))
        else:
            found.append(Finding(subject, text))
    return found


def cache() -> Finding:
    """Where downloads and prepared corpora go, and whether they can."""
    from dn_lib.data import cache_folder

    folder = cache_folder().absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Finding("Cache", str(folder))
    remedy = "set DN_LIB_CACHE to a folder that can be written (only named corpora and archives need it)"
    return Finding("Cache", f"{folder}, but {there} cannot be written", remedy)


def checks() -> Finding:
    """Whether values are read before a GPU reads them, which explains its device-side assertions."""
    if os.environ.get("DN_LIB_CHECKED") == "1":
        return Finding("Checks", "of values in every call (DN_LIB_CHECKED=1)")
    text = "of values off; DN_LIB_CHECKED=1 names what a GPU ends in a device-side assert over, as tokens out of range"
    return Finding("Checks", text)


Part = Callable[[], Finding | list[Finding]]
PARTS: dict[str, Part] = {
    "Python": python,
    "dn_lib": package,
    "Devices": devices,
    "Triton": triton,
    "C compiler": c_compiler,
    "Packages": extras,
    "Cache": cache,
    "Checks": checks,
}


def _look(subject: str, part: Part) -> list[Finding]:
    """What `part` finds. On a broken machine any part may fail; it must not take the rest of the report along."""
    try:
        found = part()
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return [Finding(subject, f"cannot be looked at: {message}", "repair what the message names, and run again")]
    return found if isinstance(found, list) else [found]


def report(parts: Mapping[str, Part] = PARTS) -> str:
    """Versions, devices, whether Triton compiles or interprets, and a remedy (→) for each thing missing.

    >>> print(report().splitlines()[0][:8])
    ✓ Python
    """
    findings = [finding for subject, part in parts.items() for finding in _look(subject, part)]
    problems = sum(bool(finding.remedy) for finding in findings)
    lines = [str(finding) for finding in findings]
    lines.append("Everything is there." if not problems else f"{problems} to look at: see →.")
    return "\n".join(lines)
