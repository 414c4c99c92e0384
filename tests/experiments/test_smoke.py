"""Experiments without a GPU: they run on tiny shapes, and mark what they write as not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dn_lib.operators import OPERATORS

pytest.importorskip("triton")

from experiments.harness import cli

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="--smoke is for machines without a GPU")


SCRIPTS = (
    "side_by_side", "errors", "paper_figure", "error_microscope", "tune", "segments", "ladder", "every_form"
)  # fmt: skip


@pytest.fixture(scope="module")
def smoke(begin, tmp_path_factory) -> dict[str, tuple[str, int, Path]]:
    """What was printed, exit code and the file written, of each experiment; as `--all --smoke`, but side by side."""
    folder = tmp_path_factory.mktemp("experiments")
    every = {e.name: cli.runs(e, True, folder) for e in cli.catalogue()}
    runs = {name: begin(*every[name][0]) for name in SCRIPTS}
    return {name: (run.communicate()[0], run.returncode, folder / f"{name}.json") for name, run in runs.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke_run_writes_a_whole_file_and_says_it_is_no_result(smoke, script):
    printed, code, path = smoke[script]
    assert code == 0, printed
    assert printed.rstrip().endswith("NOT MEASURED: smoke run")
    record = json.loads(path.read_text())
    assert {"provenance", "settings", "ceilings", "rows", "summary", "not_measured"} == set(record)
    assert record["provenance"]["command"].startswith(f"python -m experiments {script} --smoke")
    assert record["provenance"]["git_commit"] and record["provenance"]["torch"] == torch.__version__
    assert record["rows"] and all(row["measured"] is False for row in record["rows"])
    assert not path.with_name(path.name + ".part").exists()


def test_operator_rows(smoke):
    record = json.loads(smoke["side_by_side"][2].read_text())
    grid, decode = record["rows"]
    assert grid["status"] == decode["status"] == "ok"
    assert set(grid["errors"]["ours"]) == {"o", "dq", "dk", "dv", "dbeta", "o (no gradient)"}
    assert all(0 < error < 0.03 for error in grid["errors"]["ours"].values())  # interpreter: bfloat16 is truncated
    # One head of 40 tokens and 16 channels: (4 d + 1) numbers of 2 bytes, and (7 d + 2) more with the backward.
    assert grid["forward"]["compulsory_bytes"] == 40 * 65 * 2
    assert grid["forward_backward"]["compulsory_bytes"] == 40 * (65 + 114) * 2
    assert decode["forward"]["state_bytes"] == 2 * 2 * 16 * 16 * 4
    assert set(grid["others"]) >= {"recurrent.forward", "pytorch_chunkwise.forward_backward"}


def test_errors_are_those_of_float32_and_half_precision(smoke):
    """Of every operator of the registry, and of all outputs that have a gradient."""
    summary = json.loads(smoke["errors"][2].read_text())["summary"]
    assert {form.partition(", ")[0] for form in summary["errors"]} == set(OPERATORS) and not summary["failures"]
    for form, errors in summary["errors"].items():
        assert list(errors) == ["bfloat16", "float16", "float32"], form
        assert all(0 <= e["worst"] < 0.06 for outputs in errors.values() for e in outputs.values()), form
        assert all(outputs["o"]["worst"] > 0 for outputs in errors.values()), form
        assert max(e["worst"] for e in errors["float32"].values()) < 1e-5, form
    assert summary["calls_made"] == summary["calls_asked"] == summary["calls"]


def test_every_stage_of_the_ladder_is_checked_and_predicted(smoke):
    record = json.loads(smoke["ladder"][2].read_text())
    rows = {row["stage"]: row for row in record["rows"]}
    assert list(rows) == [
        "linear attention", "T by substitution", "T by doubling", "T by merging", "T by blocks", "four kernels",
        "three kernels", "two kernels, plain", "one kernel", "two kernels", "operator, training", "operator, backward",
        "one token", "softmax attention, FlashAttention", "softmax attention, cuDNN",
    ]  # fmt: skip
    rates = record["ceilings"]
    for row in rows.values():
        assert row["measured"] is False and row["status"] == "ok" and row["samples_ms"] == [1.0, 1.0]
        assert all(0 < error < row["limit"] for error in row["errors"].values())  # bfloat16: zero would be no check
        times = [
            max(x["bytes"] / rates["copy_bytes_per_s"], x["flops"] / rates["matmul_flops_per_s"])
            for x in row["kernels"] or [row]
        ]
        assert row["predicted_ms"] == pytest.approx(1e3 * sum(times), rel=1e-4)
        assert row["ratio"] == pytest.approx(row["ms"] / row["predicted_ms"], rel=1e-4)
    four = ["ut_kernel", "wu_kernel", "state_kernel", "output_kernel"]
    launched = {name: [kernel["kernel"] for kernel in row["kernels"]] for name, row in rows.items()}
    assert launched["four kernels"] == four and launched["T by doubling"] == four[:1]
    assert launched["two kernels"] == launched["operator, training"] == ["chunk_inverse", "chunk_scan_fwd"]
    assert launched["one kernel"] == ["one_kernel"] and launched["one token"] == ["recurrent"]
    assert set(rows["operator, backward"]["errors"]) == {"dq", "dk", "dv", "dbeta"}
    climb = ["four kernels", "three kernels", "two kernels, plain", "one kernel"]
    assert [len(rows[name]["kernels"]) for name in climb] == [4, 3, 2, 1]
    assert {rows[name]["inverse"] for name in climb} == {"blocks"}  # the same on every rung
    sizes = [rows[name]["bytes"] for name in climb]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert rows["two kernels"]["bytes"] > rows["two kernels, plain"]["bytes"]  # beta is read again, for N


def test_tuning_checks_and_times_every_form_of_a_kernel(smoke):
    record = json.loads(smoke["tune"][2].read_text())
    rows = {(row["kernel"], row["variant"]): row for row in record["rows"]}
    first_pass = {("chunk_scan_fwd", "transition"), ("chunk_scan_bwd", "")}
    assert set(rows) == {("chunk_scan_fwd", ""), ("chunk_scan_bwd", "fused"), ("chunk_inverse", "")} | first_pass
    for form, row in rows.items():
        assert row["status"] == "ok"
        assert row["tiles"] == [16, 0 if form[0] == "chunk_inverse" else 16, 4, 1, False]
        assert all(0 < error < 0.03 for error in row["errors"].values()) and len(row["errors"]) == 5
        assert row["chosen"] == list(row["ms"]) == (["shared", "alone"] if "scan" in form[0] else ["shared"])
    assert {name for name in rows["chunk_scan_fwd", ""]["ms"]["alone"]} == {"training", "inference", "programs"}
    # Of three parts two, each with its X and its M; that of the first M has nothing to do.
    assert rows["chunk_scan_fwd", "transition"]["ms"]["alone"]["programs"] == 4
    assert record["provenance"]["compute_capability"] is None and len(record["summary"]["best"]) == 11


def points_of(record, section, **names):
    rows = [row for row in record["rows"] if row["section"] == section]
    return [p for row in rows if all(row.get(n) == x for n, x in names.items()) for p in row["points"]]


def test_the_microscope_measures_every_axis(smoke):
    record = json.loads(smoke["error_microscope"][2].read_text())
    assert record["summary"]["faults"] == []
    axes = {"chunk", "norm", "cosine", "cosine, beta to 2", "beta"}
    for section, names in (("operator", "format"), ("inverse", "method")):
        assert {row["axis"] for row in record["rows"] if row["section"] == section} == axes
        assert all(p["errors"] for p in points_of(record, section))
        assert len({row[names] for row in record["rows"] if row["section"] == section}) == (
            4 if names == "format" else 9
        )
    # The interpreter multiplies float32 as it is, and cuts bfloat16 off.
    for name, limit in (("float32", 1e-5), ("tf32", 1e-5), ("float16", 6e-3), ("bfloat16", 6e-2)):
        found = [e["max"] for p in points_of(record, "operator", format=name) for e in p["errors"].values()]
        assert 0 < max(found) < limit
    assert all(p["may_grow"] for p in points_of(record, "operator", axis="norm") if p["norm"] == 2.0)
    assert all(p["measured_cosine"] > 0.999 for p in points_of(record, "operator") if p.get("cosine") == "identical")
    hard = {"section": "inverse", "axis": "cosine, beta to 2"}
    bad, good = (points_of(record, **hard, method=f"{m}, float16")[0]["errors"] for m in ("doubling", "recursion on N"))
    assert bad["T"]["max"] > 100 * good["T"]["max"] and "N" in good and "N" not in bad


def test_every_form_of_every_registered_operator_is_measured(smoke):
    rows = {row["key"]: row for row in json.loads(smoke["every_form"][2].read_text())["rows"]}
    forms = {f"{x.name}: {name}": form for x in OPERATORS.values() for name, form in x.every_form()}
    assert list(rows) == list(forms) and len(rows) >= 14
    for key, form in forms.items():
        row = rows[key]
        assert row["forward"]["ms"] == 1.0 and ("predicted_ms" in row["forward"]) == (form.cost is not None)
        assert row["compulsory_bytes"] > 0 and row["dtype"] == "float32"
        assert all(0 < error < 1e-5 for error in row["errors"].values())
