"""`dn_lib.doctor`: every line says what was found, and what is missing comes with its remedy."""

import importlib.util
import platform
import shutil
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


@pytest.mark.parametrize(("system", "remedy"), [("Linux", "pip install triton"), ("Darwin", "chapter 5 needs Linux")])
def test_missing_triton(monkeypatch, system, remedy):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(platform, "system", lambda: system)
    finding = doctor.triton()
    assert finding.found == "missing" and remedy in finding.remedy


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


def test_interpreter_asked_for_beside_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "unset it" in doctor.triton(lambda: None).remedy


def test_checks_of_values_are_named_where_a_gpu_would_only_assert(monkeypatch):
    monkeypatch.delenv("DN_LIB_CHECKED", raising=False)
    assert "DN_LIB_CHECKED=1" in doctor.checks().found and "tokens" in doctor.checks().found
    monkeypatch.setenv("DN_LIB_CHECKED", "1")
    assert "in every call" in doctor.checks().found


def test_missing_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install one" in doctor.c_compiler().remedy


def test_missing_extras():
    jupyter, tests = doctor.extras(lambda name: None if name == "nbval" else "1.0")
    assert "nbval" not in jupyter.remedy and "missing nbval: pip install" in tests.remedy


def test_driver_without_a_torch_that_uses_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "torch built for CUDA" in doctor.devices()[-1].remedy


def test_devices_lists_each_gpu(monkeypatch):
    about = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    gpus = doctor.devices()[2:]
    assert [str(gpu) for gpu in gpus] == [f"✓ GPU {i}        NVIDIA H100, sm_90, 80 GiB" for i in range(2)]
    about.major, about.minor = 7, 5
    assert "sm_80" in doctor.devices()[-1].remedy


@pytest.mark.parametrize("part", doctor.PARTS)
def test_a_part_that_fails_is_one_line_of_the_report(part):
    def fail():
        raise KeyError("of a broken\nmachine")

    lines = doctor.report(QUICK | {part: fail}).splitlines()
    assert sum("cannot be looked at: KeyError: 'of a broken" in line for line in lines) == 1
    assert len(lines) >= 8 and "to look at" in lines[-1]


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DN_LIB_CACHE", str(tmp_path / "file" / "cache"))
    assert "set DN_LIB_CACHE" in doctor.cache().remedy
    monkeypatch.setenv("DN_LIB_CACHE", str(tmp_path / "new" / "cache"))
    assert not doctor.cache().remedy
    assert not (tmp_path / "new").exists()


def test_messages_of_triton_in_another_encoding():
    assert "broken" in doctor.try_triton(trial=r"import os; os.write(2, b'\xe9\xff broken\n'); os._exit(1)")
