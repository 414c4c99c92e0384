"""What this machine has of what the book needs, and what to do about the rest: `python -m dn_lib doctor`.

The set-up failures that it looks for, the likeliest first as far as we can tell. Each is simulated in
`tests/cli/test_doctor.py`.

1. Packages are missing: the library alone was installed, and a notebook is opened.
2. A notebook's kernel belongs to another Python, which has no dn_lib.
3. torch was built without CUDA, and there is a GPU.
4. The NVIDIA driver is too old for torch's CUDA, or the GPU is hidden by CUDA_VISIBLE_DEVICES.
5. Triton is missing, as on macOS and Windows.
6. torch or Triton is of a version that was never tested, or Triton is not the one that this torch asks for.
7. There is no C compiler, or there are no headers of Python: on a GPU Triton needs both.
8. The GPU is too old for the kernels, as those that are lent for nothing often are.
9. TRITON_INTERPRET says the opposite of what the machine needs.
10. Downloads have no place: the cache cannot be written, or the disk is full.

Python's own version, and a file of the working folder that hides a package, are looked at too.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import dn_lib

NOTEBOOKS = ("jupyterlab", "ipykernel")
BOOK = (*NOTEBOOKS, "jupytext", "nbclient", "sphinx", "myst-nb")
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


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    remedy = "" if version >= (3, 11) else "install Python 3.11 or later, and dn_lib into it"
    number = ".".join(map(str, version))
    return Finding("Python", f"{number} on {platform.system()} {platform.machine()}", remedy)


def is_checkout() -> bool:
    """Whether dn_lib is that of a clone of the repository, where the chapters and the tests are too."""
    return (Path(dn_lib.__file__).parents[1] / "book" / "conf.py").exists()


def package() -> Finding:
    where = "in a clone of the repository" if is_checkout() else "installed without the book's chapters"
    return Finding("dn_lib", f"{dn_lib.__version__}, {where}")


def hidden(folder: Path | None = None) -> list[Finding]:
    """Files of the working folder that Python imports in place of a package of the same name."""
    folder = folder or Path.cwd()
    names = ("torch", "triton", "numpy", "matplotlib", "jupyterlab", "IPython", "safetensors", "tqdm", "typer")
    files = [folder / f"{name}.py" for name in names if (folder / f"{name}.py").is_file()]
    remedy = "give it another name: here Python imports it in place of the package"
    return [Finding("Hidden", f"{file.stem}, by {file}", remedy) for file in files]


def _numbers(version: str) -> tuple[int, ...]:
    """
    >>> _numbers("2.13.0+cpu")
    (2, 13, 0)
    """
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _allows(requirement: str, version: str) -> bool:
    """
    >>> _allows("triton<3.10,>=3.6; sys_platform == 'linux'", "3.10.1"), _allows("triton==3.7.1", "3.7.1")
    (False, True)
    """
    bounds = re.findall(r"(<|>=|==)\s*([\d.]+)", requirement.partition(";")[0])
    own = _numbers(version)
    compare = {"<": own.__lt__, ">=": own.__ge__, "==": own.__eq__}
    return all(compare[sign](_numbers(bound)) for sign, bound in bounds)


def _requirements(distribution: str) -> list[str]:
    try:
        return metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []


def versions(
    version_of: Callable[[str], str | None] = _version, required_by: Callable[[str], list[str]] = _requirements
) -> list[Finding]:
    """torch and Triton where they are not those that dn_lib was tested with, or that torch asks for; else nothing."""
    found = []
    for by in ("dn-lib", "torch"):
        for requirement in required_by(by):
            match = re.match(r"(torch|triton)\b(?![-_.])[^;]*", requirement)
            version = version_of(match[1]) if match and "extra ==" not in requirement else None
            if match and version and not _allows(requirement, version):
                whose = "torch asks for" if by == "torch" else "dn_lib is tested with"
                remedy = f"{whose} {match[0].strip()}: pip install '{match[0].strip()}'"
                found.append(Finding("Versions", f"{match[1]} {version}", remedy))
    return found


def devices() -> list[Finding]:
    """PyTorch, the processor, and every GPU that PyTorch sees."""
    found = [Finding("torch", torch.__version__), Finding("CPU", f"{os.cpu_count()} cores")]
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return [*found, Finding("GPU", "none; every chapter also runs on the CPU")]
        return [*found, Finding("GPU", "torch sees none, though there is an NVIDIA driver", _why_unseen())]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB"
        old = "" if about.major >= 8 else "the kernels are tested on sm_80 and later; use backend='chunkwise'"
        found.append(Finding(f"GPU {index}", text, old))
    return found


def _why_unseen() -> str:
    """The remedy where there is a driver and torch sees no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: unset it"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA: install one that is (the plain wheel on PyPI is)"
    return (
        f"torch is built for CUDA {torch.version.cuda}: see in `nvidia-smi` whether the driver is of that version or "
        "later; if not, update the driver, or install a torch built for an older CUDA"
    )


# Doubles eight numbers, in a loop whose bound is read at run time (what fails first where versions do not match): on
# the GPU where Triton compiles, on the CPU where it interprets.
TRIAL = """
import torch, triton, triton.language as tl
from dn_lib.kernels.common import INTERPRETED

@triton.jit
def double(x, times, n: tl.constexpr):
    i = tl.arange(0, n)
    for _ in range(tl.cdiv(times, 1)):
        tl.store(x + i, 2 * tl.load(x + i))

x = torch.arange(8.0, device="cpu" if INTERPRETED.value else "cuda")
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
    asked = os.environ.get("TRITON_INTERPRET")
    gpu = torch.cuda.is_available()
    interprets = not gpu if asked is None else asked.lower() in ("1", "true", "on", "yes", "y")
    if gpu and interprets:
        remedy = f"TRITON_INTERPRET={asked} is set although there is a GPU: unset it to have kernels compiled"
        return Finding("Triton", f"{version}, interprets", remedy)
    if not gpu and not interprets:
        remedy = f"TRITON_INTERPRET={asked} is set although there is no GPU: unset it to have kernels interpreted"
        return Finding("Triton", f"{version}, runs no kernel", remedy)
    trouble = attempt()
    if trouble:
        remedy = (
            "reinstall triton: pip install --force-reinstall 'triton>=3.6,<3.10'"
            if interprets
            else "Triton needs a C compiler, the NVIDIA driver, and the triton that this torch asks for"
        )
        return Finding("Triton", f"{version}, fails: {trouble}", remedy)
    return Finding("Triton", f"{version}, " + ("interprets (slow, exact, on the CPU)" if interprets else "compiles"))


def c_compiler(headers: str | None = None) -> list[Finding]:
    """The compiler and, where there is a GPU, Python's headers, which a launcher of Triton's includes."""
    path = next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )
    remedy = "install one, for instance `apt-get install gcc` (Triton builds its launcher with it on a GPU)"
    found = [Finding("C compiler", path) if path else Finding("C compiler", "missing", remedy)]
    header = Path(headers or sysconfig.get_paths()["include"], "Python.h")
    if torch.cuda.is_available() and not header.exists():
        remedy = "install Python's headers, for instance `apt-get install python3-dev` (Triton compiles with them)"
        found.append(Finding("Headers", f"no {header}", remedy))
    return found


def extras(version_of: Callable[[str], str | None] = _version, *, checkout: bool | None = None) -> list[Finding]:
    """The Jupyter pieces and the pieces of the test suite; outside a clone, what notebooks need."""
    if not (is_checkout() if checkout is None else checkout):
        there = [f"{name} {version}" for name in NOTEBOOKS if (version := version_of(name))]
        if len(there) == len(NOTEBOOKS):
            return [Finding("Jupyter", ", ".join(there))]
        return [Finding("Jupyter", "not installed; to open the book's notebooks: pip install 'dn-lib[book]'")]
    found = []
    for subject, names, extra in (("Jupyter", BOOK, "book"), ("Tests", TEST, "test")):
        numbers = {name: version_of(name) for name in names}
        missing = [name for name, version in numbers.items() if version is None]
        text = ", ".join(f"{name} {version}" for name, version in numbers.items() if version)
        if missing:
            remedy = f"missing {', '.join(missing)}: pip install -c constraints.txt -e '.[{extra}]'"
            found.append(Finding(subject, text or "nothing of it", remedy))
        else:
            found.append(Finding(subject, text))
    return found


def notebook_kernel() -> list[Finding]:
    """Which Python the kernel `python3` of Jupyter starts; nothing where Jupyter is not installed."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError:
        return []
    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return [Finding("Kernel", "Jupyter has none called python3", "python -m ipykernel install --sys-prefix")]
    if not os.path.isabs(command):  # "python": Jupyter takes the Python that it runs in
        command = sys.executable
    if Path(command).parent == Path(sys.executable).parent:
        return [Finding("Kernel", command)]
    remedy = f"notebooks run in another Python: {sys.executable} -m ipykernel install --user, and restart Jupyter"
    return [Finding("Kernel", f"{command}, not {sys.executable}", remedy)]


def cache(least: int = 2**30) -> Finding:
    """Where downloads and prepared corpora go, whether they can, and whether the disk has `least` bytes for them."""
    from dn_lib.data import cache_folder

    folder = cache_folder().absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        free = shutil.disk_usage(there).free
        if free < least:
            remedy = "make room, or set DN_LIB_CACHE to a folder on another disk (named corpora take up to a gigabyte)"
            return Finding("Cache", f"{folder}, whose disk has {free / 2**30:.1f} GiB left", remedy)
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
    "Hidden": hidden,
    "Devices": devices,
    "Versions": versions,
    "Triton": triton,
    "C compiler": c_compiler,
    "Packages": extras,
    "Kernel": notebook_kernel,
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
