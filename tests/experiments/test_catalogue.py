"""The list of experiments, their command line, and the files that they say they write."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from experiments.harness import cli
from experiments.harness.provenance import RESULTS, ROOT, provenance


@pytest.fixture(scope="module")
def catalogue() -> list[cli.Experiment]:
    return list(cli.catalogue())


def test_each_experiment_is_listed_with_its_files(catalogue):
    listing = cli.listing()
    assert [e.name for e in catalogue] == list(cli.modules())
    for e in catalogue:
        assert f"\n{e.name}  ({e.minutes:g} min, {e.gpu})\n    {e.question}\n" in f"\n{listing}\n"
        assert all(f"    writes {file}" in listing for file in e.writes)
        assert len(e.each) == len(e.writes) and e.question.endswith("?") and "\n" not in e.question and e.minutes > 0


def test_every_result_is_written_by_one_experiment_and_every_measured_one_is_there(catalogue):
    written = [file for e in catalogue for file in e.writes]
    assert len(written) == len(set(written))
    there = {path.name for path in RESULTS.glob("*.json")}
    assert there == {file for e in catalogue if e.measured for file in e.writes}


def test_what_all_runs_is_taken_by_each_experiment(catalogue, tmp_path):
    for e in catalogue:
        for file, options in zip(e.writes, e.each, strict=True):
            assert e.arguments([*options, "--out", str(tmp_path / file)]).out == tmp_path / file
        assert sys.modules[e.run.__module__].__doc__ == e.parser().description


def test_all_runs_each_experiment_once_for_each_file_or_small_without_a_gpu(catalogue, tmp_path, monkeypatch, capsys):
    for e in catalogue:
        every = cli.runs(e, False, RESULTS)
        assert [e.arguments(words[1:]).out for words in every] == [RESULTS / file for file in e.writes]
        small = cli.runs(e, True, tmp_path)
        assert len(small) == ("smoke" in e.shared)
        for name, *words in small:
            options = e.arguments(words)
            assert name == e.name and options.smoke and options.out == tmp_path / f"{name}.json"
    codes = iter([0, -11, *[0] * len(catalogue)])
    started = []

    def run(command, cwd):
        started.append(command[2:])
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(cli.subprocess, "run", run)
    assert cli.main(["--all", "--smoke"]) == 11
    said = capsys.readouterr().out
    assert [words[1] for words in started] == [e.name for e in catalogue if "smoke" in e.shared]
    for e in catalogue:
        assert (f"== {e.name}: skipped, it has no smoke run" in said) == ("smoke" not in e.shared)
    assert f"== {len(started)} run, not 0: {started[1][1]} (11); written to " in said


def test_nothing_measured_without_a_gpu_goes_to_the_book_by_itself(catalogue, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for e in catalogue:
        with pytest.raises(SystemExit):
            e.arguments([])
        assert "--out is needed" in capsys.readouterr().err
        if "smoke" in e.shared:
            assert not e.arguments(["--smoke"]).out.is_relative_to(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    one = next(e for e in catalogue if e.name == "side_by_side")
    assert one.arguments([]).out == RESULTS / "operator.json"


def test_an_unknown_name_is_told_which_there_are(capsys):
    assert cli.main(["operator"]) == 2
    said = capsys.readouterr().err
    assert "no experiment operator" in said and "side_by_side" in said


def test_the_module_runs_by_its_name():
    run = subprocess.run([sys.executable, "-m", "experiments", "--list"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.rstrip("\n") == cli.listing()


def test_provenance_says_what_to_type(monkeypatch, tmp_path):
    entry = str(ROOT / "experiments" / "__main__.py")
    monkeypatch.setattr(sys, "argv", [entry, "ladder", "--out", str(tmp_path / "ladder.json")])
    assert provenance()["command"] == "python -m experiments ladder --out ladder.json"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "tools" / "margins.py")])
    assert provenance()["command"] == "python tools/margins.py"


SOURCES = sorted((ROOT / "experiments").rglob("*.py"))


def test_no_experiment_hides_a_module_of_the_standard_library():
    """Nothing puts a folder of experiments on Python's path, and no folder beside the package is named so."""
    assert "experiments" not in sys.stdlib_module_names
    assert not any("sys.path" in path.read_text() for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_experiment_replaces_a_name_of_the_package(path):
    """Neither by assignment to an attribute of a module of dn_lib, nor by a mock."""
    tree = ast.parse(path.read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.module.startswith("unittest"), "a mock"
            if node.module.startswith("dn_lib"):
                modules |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Import):
            modules |= {(name.asname or name.name).split(".")[0] for name in node.names if "dn_lib" in name.name}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            base = target
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(target, ast.Attribute) and isinstance(base, ast.Name):
                assert base.id not in modules, f"line {node.lineno} replaces {ast.unparse(target)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("setattr", "delattr")
