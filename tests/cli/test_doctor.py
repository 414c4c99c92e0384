"""`dn_lib.doctor`: every line says what was found, and what is missing comes with its remedy."""

import importlib.util
import json
import platform
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dn_lib import doctor

# The report without the seconds that a kernel takes.
QUICK = doctor.PARTS | {"Triton": lambda: doctor.triton(lambda: None)}


def test_report_names_versions_devices_and_triton():
    text = doctor.report(QUICK)
    for subject in ("Python", "dn_lib", "torch", "CPU", "GPU", "Triton", "C compiler", "Jupyter", "Tests", "Cache"):
        assert any(line[2:].startswith(subject) for line in text.splitlines()), subject
    assert torch.__version__ in text
    arrows = sum(line.strip().startswith("→") for line in text.splitlines())
    assert arrows == sum(line.startswith("✗") for line in text.splitlines())


def test_triton_missing_on_linux(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    finding = doctor.triton()
    assert finding.found == "missing" and "pip install triton" in finding.remedy


def test_triton_that_cannot_run():
    pytest.importorskip("triton")
    finding = doctor.triton(lambda: doctor.try_triton(trial="raise RuntimeError('no driver')"))
    assert "fails: RuntimeError: no driver" in finding.found and finding.remedy
    assert doctor.try_triton(seconds=0.5, trial="import time; time.sleep(60)") == "no answer in 0 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton compiles")
def test_triton_interprets_without_a_gpu():
    pytest.importorskip("triton")
    finding = doctor.triton()
    assert "interprets" in finding.found and not finding.remedy


def test_checks_of_values_are_named_where_a_gpu_would_only_assert(monkeypatch):
    monkeypatch.delenv("DN_LIB_CHECKED", raising=False)
    assert "DN_LIB_CHECKED=1" in doctor.checks().found and "tokens" in doctor.checks().found
    monkeypatch.setenv("DN_LIB_CHECKED", "1")
    assert "in every call" in doctor.checks().found


def test_missing_extras():
    jupyter, tests = doctor.extras(lambda name: None if name == "nbval" else "1.0", checkout=True)
    assert "nbval" not in jupyter.remedy and "missing nbval: pip install" in tests.remedy


# --- The ten failures of the module's docstring, by their numbers -----------------------------------------------


class Machine:
    """What a failure is simulated with: pytest's monkeypatch, an empty folder, and what torch sees."""

    def __init__(self, monkeypatch, folder):
        self.patch, self.folder = monkeypatch, folder
        for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "CC"):
            monkeypatch.delenv(name, raising=False)

    def gpu(self, there, *, driver=True, major=9, minor=0, cuda="13.0"):
        about = SimpleNamespace(name="a GPU", major=major, minor=minor, total_memory=80 * 2**30)
        self.patch.setattr(torch.cuda, "is_available", lambda: there)
        self.patch.setattr(torch.cuda, "device_count", lambda: int(there))
        self.patch.setattr(torch.cuda, "get_device_properties", lambda index: about)
        self.patch.setattr(torch.version, "cuda", cuda)
        self.patch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if driver else None)


def packages_missing(machine):
    return doctor.extras(lambda name: None, checkout=True)[0]


def kernel_of_another_python(machine):
    folder = machine.folder / "kernels" / "python3"
    folder.mkdir(parents=True)
    command = [str(machine.folder / "bin" / "python3"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "P", "language": "python"}))
    machine.patch.setenv("JUPYTER_PATH", str(machine.folder))
    return doctor.notebook_kernel()[-1]


def torch_without_cuda(machine):
    machine.gpu(False, cuda=None)
    return doctor.devices()[-1]


def driver_too_old(machine):
    machine.gpu(False)
    return doctor.devices()[-1]


def gpu_hidden(machine):
    machine.gpu(False)
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", "")
    return doctor.devices()[-1]


def triton_missing(machine):
    machine.patch.setattr(importlib.util, "find_spec", lambda name: None)
    machine.patch.setattr(platform, "system", lambda: "Darwin")
    return doctor.triton()


def triton_untested(machine):
    wanted = {"dn-lib": ["torch<2.16,>=2.11", "triton<3.10,>=3.6; sys_platform == 'linux'"]}
    installed = {"torch": "2.13.0+cpu", "triton": "3.10.0"}
    (finding,) = doctor.versions(installed.get, lambda by: wanted.get(by, []))
    return finding


def triton_of_another_torch(machine):
    wanted = {"torch": ["filelock", "triton==3.7.1; platform_system == 'Linux'", 'triton-other; extra == "x"']}
    (finding,) = doctor.versions({"triton": "3.9.0"}.get, lambda by: wanted.get(by, []))
    return finding


def no_compiler(machine):
    machine.gpu(True, driver=False)
    return doctor.c_compiler()[0]


def no_headers(machine):
    machine.gpu(True)
    return doctor.c_compiler(str(machine.folder))[-1]


def old_gpu(machine):
    machine.gpu(True, major=7, minor=5)
    return doctor.devices()[-1]


def interpreter_beside_a_gpu(machine):
    machine.gpu(True)
    machine.patch.setenv("TRITON_INTERPRET", "1")
    return doctor.triton(lambda: None)


def no_interpreter_without_a_gpu(machine):
    machine.gpu(False)
    machine.patch.setenv("TRITON_INTERPRET", "0")
    return doctor.triton(lambda: None)


def cache_not_writable(machine):
    (machine.folder / "file").write_text("")
    machine.patch.setenv("DN_LIB_CACHE", str(machine.folder / "file" / "cache"))
    return doctor.cache()


def disk_full(machine):
    machine.patch.setenv("DN_LIB_CACHE", str(machine.folder))
    return doctor.cache(least=2**80)


def python_too_old(machine):
    return doctor.python((3, 10, 4))


def a_file_hides_a_package(machine):
    (machine.folder / "triton.py").write_text("")
    (finding,) = doctor.hidden(machine.folder)
    return finding


FAILURES = {
    packages_missing: (1, "missing jupyterlab, ipykernel, .*pip install"),
    kernel_of_another_python: (2, "another Python: .* -m ipykernel install --user"),
    torch_without_cuda: (3, "is not built for CUDA"),
    driver_too_old: (4, "built for CUDA 13.0: .*update the driver"),
    gpu_hidden: (4, "CUDA_VISIBLE_DEVICES='' hides every GPU: unset it"),
    triton_missing: (5, "chapter 5 needs Linux"),
    triton_untested: (6, re.escape("tested with triton<3.10,>=3.6: pip install 'triton<3.10,>=3.6'")),
    triton_of_another_torch: (6, "torch asks for triton==3.7.1: pip install"),
    no_compiler: (7, "apt-get install gcc"),
    no_headers: (7, "apt-get install python3-dev"),
    old_gpu: (8, "tested on sm_80 and later; use backend='chunkwise'"),
    interpreter_beside_a_gpu: (9, "unset it to have kernels compiled"),
    no_interpreter_without_a_gpu: (9, "unset it to have kernels interpreted"),
    cache_not_writable: (10, "set DN_LIB_CACHE"),
    disk_full: (10, "make room"),
    python_too_old: ("Python's own version", "install Python 3.11"),
    a_file_hides_a_package: ("hides a package", "another name"),
}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
def test_failure_is_named_with_its_remedy(failure, monkeypatch, tmp_path):
    if failure is kernel_of_another_python:
        pytest.importorskip("jupyter_client")
    if FAILURES[failure][0] == 9:
        pytest.importorskip("triton")
    finding = failure(Machine(monkeypatch, tmp_path))
    assert re.search(FAILURES[failure][1], finding.remedy), finding
    assert str(finding).startswith("✗") and f"→ {finding.remedy}" in str(finding)


def test_every_failure_of_the_list_is_simulated():
    listed = re.findall(r"(?m)^(\d+)\. ", doctor.__doc__)
    assert listed == [str(n) for n in range(1, 11)]
    places = [place for place, _ in FAILURES.values()]
    assert {place for place in places if isinstance(place, int)} == {int(n) for n in listed}
    assert all(place in doctor.__doc__ for place in places if isinstance(place, str))


def test_a_machine_in_order_has_no_remedy(monkeypatch, tmp_path):
    """What looks for failures finds none where there is none, on a GPU as well."""
    machine = Machine(monkeypatch, tmp_path)
    machine.gpu(True)
    (tmp_path / "Python.h").write_text("")
    found = [doctor.python(), *doctor.devices(), *doctor.c_compiler(str(tmp_path)), *doctor.hidden(tmp_path)]
    found += doctor.versions(
        {"torch": "2.15.1", "triton": "3.9.0"}.get,
        {
            "dn-lib": ["torch<2.16,>=2.11", "triton<3.10,>=3.6; sys_platform == 'linux'"],
            "torch": ["triton==3.9.0; platform_system == 'Linux'"],
        }.__getitem__,
    )
    found += doctor.extras(lambda name: "1.0", checkout=True)
    if importlib.util.find_spec("triton"):
        found.append(doctor.triton(lambda: None))
        assert "compiles" in found[-1].found
    assert [str(finding) for finding in found if finding.remedy] == []


def test_kernel_of_this_python_is_in_order(monkeypatch, tmp_path):
    pytest.importorskip("jupyter_client")
    for command in (sys.executable, "python"):
        folder = tmp_path / "kernels" / "python3"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernel.json").write_text(json.dumps({"argv": [command], "display_name": "P", "language": "python"}))
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
        assert [str(finding) for finding in doctor.notebook_kernel()] == [f"✓ Kernel       {sys.executable}"]


def test_from_a_wheel_no_advice_needs_the_repository():
    bare = doctor.extras(lambda name: None, checkout=False)
    assert [finding.remedy for finding in bare] == [""] and "pip install 'dn-lib[book]'" in bare[0].found
    whole = doctor.extras(lambda name: "1.0", checkout=False)
    assert [str(finding) for finding in whole] == ["✓ Jupyter      jupyterlab 1.0, ipykernel 1.0"]
    text = Path(doctor.__file__).read_text("utf-8")
    assert text.count("constraints.txt") == 1  # in the advice of `extras` to a clone alone


def test_devices_lists_each_gpu(monkeypatch):
    about = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    gpus = doctor.devices()[2:]
    assert [str(gpu) for gpu in gpus] == [f"✓ GPU {i}        NVIDIA H100, sm_90, 80 GiB" for i in range(2)]


@pytest.mark.parametrize("part", doctor.PARTS)
def test_a_part_that_fails_is_one_line_of_the_report(part):
    def fail():
        raise KeyError("of a broken\nmachine")

    lines = doctor.report(QUICK | {part: fail}).splitlines()
    assert sum("cannot be looked at: KeyError: 'of a broken" in line for line in lines) == 1
    assert len(lines) >= 8 and "to look at" in lines[-1]


def test_a_cache_is_looked_at_and_not_made(monkeypatch, tmp_path):
    monkeypatch.setenv("DN_LIB_CACHE", str(tmp_path / "new" / "cache"))
    assert not doctor.cache(least=1).remedy
    assert not (tmp_path / "new").exists()


def test_messages_of_triton_in_another_encoding():
    assert "broken" in doctor.try_triton(trial=r"import os; os.write(2, b'\xe9\xff broken\n'); os._exit(1)")
