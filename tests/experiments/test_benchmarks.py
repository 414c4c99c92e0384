"""The benchmark scripts without a GPU: they run on tiny shapes, mark what they write as not measured, and resume."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="--smoke is for machines without a GPU")
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = {
    "operator": ["--only", "grid", "decode", "--shapes", "16,1,1,40"],
    "errors": ["--variants", "1", "--calls", "3"],
    "paper_figure": [],
    "error_microscope": [],
    "tune": [],
    "segments": [],
}


def start(script: str, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--smoke", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=FOLDER.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
    """Exit code, what was printed and the file written, of each script; they run side by side."""
    folder = tmp_path_factory.mktemp("benchmarks")
    runs = {name: start(name, folder / f"{name}.json", *options) for name, options in SCRIPTS.items()}
    return {name: (run.communicate()[0], run.returncode, folder / f"{name}.json") for name, run in runs.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke_run_writes_a_whole_file_and_says_it_is_no_result(smoke, script):
    printed, code, path = smoke[script]
    assert code == 0, printed
    assert printed.rstrip().endswith("NOT MEASURED: smoke run")
    record = json.loads(path.read_text())
    assert {"provenance", "settings", "ceilings", "rows", "summary", "not_measured"} == set(record)
    assert record["provenance"]["command"].startswith(f"python benchmarks/{script}.py --smoke")
    assert record["provenance"]["git_commit"] and record["provenance"]["torch"] == torch.__version__
    assert record["rows"] and all(row["measured"] is False for row in record["rows"])
    assert not path.with_name(path.name + ".part").exists()


def test_operator_rows(smoke):
    record = json.loads(smoke["operator"][2].read_text())
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
    errors = json.loads(smoke["errors"][2].read_text())["summary"]["errors"]
    assert all(0 < e["worst"] < 0.06 for outputs in errors.values() for e in outputs.values())
    assert list(errors) == ["bfloat16", "float16", "float32"]
    assert max(e["worst"] for e in errors["float32"].values()) < 1e-5


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import errors
    import measure
    import side_by_side

    return measure, side_by_side, errors


@pytest.mark.parametrize("folder", [str(FOLDER), "benchmarks", "./benchmarks/"])
def test_the_standard_operator_is_found_from_this_folder(folder):
    """`benchmarks/operator.py` must not hide it from scripts that start in the folder."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); sys.modules.pop('operator', None); import operator; "
    code += "from operator import itemgetter; print(operator.add(1, 2), sys.path[0] == sys.argv[1])"
    command = [sys.executable, "-S", "-c", code, folder]
    run = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["3", "True"]


def test_wrong_or_worse_than_the_peer_is_refused(modules):
    measure, *_ = modules
    assert measure.verdict({"o": 4e-3}, {"o": 4e-3}, 8e-3) == []
    assert measure.verdict({"o": 4e-3}, {"o": float("nan")}, 8e-3) == []
    assert len(measure.verdict({"o": 4e-3}, {"o": 3.5e-3}, 8e-3)) == 1
    assert len(measure.verdict({"o": float("nan"), "dq": 1e-2}, None, 8e-3)) == 2


def test_a_row_that_raises_is_kept_and_the_rest_is_resumed(modules, tmp_path):
    measure, *_ = modules
    out, made = tmp_path / "r.json", []

    def row(name):
        made.append(name)
        if name == "bad":
            raise ValueError("no such tile")
        return {"x": float("inf")}

    for _ in range(2):
        results = measure.Results(out, {}, smoke=True)
        for name in ("good", "bad"):
            results.measure(name, lambda name=name: row(name))
    assert made == ["good", "bad"]
    good, bad = json.loads(out.read_text())["rows"]
    assert good["x"] == "inf" and bad["failure"] == "ValueError: no such tile"
    assert measure.Results(out, {}, smoke=False).rows == []  # what was not measured is not kept by a measurement
    with pytest.raises(measure.OutOfTime):
        measure.Results(out, {}, smoke=True, budget=-1.0).measure("new", lambda: row("new"))


def test_summary_and_table(modules):
    _, side_by_side, _ = modules

    def times(ours, fla):
        found = {"ours_ms": ours, "fla_ms": fla, "ratio": fla / ours, "of_compulsory_time": 2.0}
        return found | {"ours_peak_extra_bytes": 50, "fla_peak_extra_bytes": 100}

    rows = [
        {"key": f"grid {i}", "status": "ok", "forward": times(1.0, r), "forward_backward": times(2.0, 2.0 * r)}
        for i, r in enumerate((2.0, 8.0))
    ]
    rows.append({"key": "odd", "status": "refused", "failure": "o: 1 is not below 0.008"})
    found = side_by_side.summary(rows)
    assert found["forward"]["geometric_mean_ratio"] == pytest.approx(4.0)
    assert (found["forward"]["least_ratio"], found["forward"]["least_ratio_at"]) == (2.0, "grid 0")
    assert found["forward_backward"]["most_memory_of_fla"] == 0.5
    assert found["refused_or_failed"] == ["odd"]
    text = side_by_side.table(rows)
    assert "refused: o: 1 is not below" in text and len(text.splitlines()) == 5


def test_calls_are_reproducible_and_cover_the_options(modules):
    measure, _, errors = modules
    configs = errors.configurations(4, seed=0)
    assert configs == errors.configurations(4, seed=0) and len(configs) == 96
    calls = [errors.a_call(n, configs, seed=0) for n in range(400)]
    assert calls[7] == errors.a_call(7, configs, seed=0)
    for name in ("norm", "state", "dstate", "varlen"):
        assert {c[name] for c in calls} == {False, True}
    assert {c["segments"] for c in calls} == {None, 2, 3, 5} and {c["chunk"] for c in calls} == {16, 32, 64}
    assert all(sum(c["lengths"]) == c["L"] and c["B"] == 1 for c in calls if c["varlen"])
    assert any(errors.fla_takes(c) for c in calls)
    assert sum(measure.mixed_lengths(64, 32768)) == 32768


def test_a_failure_is_seen(modules):
    *_, errors = modules
    c = errors.a_call(2, errors.configurations(1, seed=0), seed=0) | {"dtype": "float32"}
    tally = errors.Tally()
    for error in (1e-7, 2e-5, float("nan")):
        tally.add(c, {"ours": {"o": error}, "norms": {"o": 1.0}, "fla": {"o": 1e-3}})
    assert len(tally.failures) == 2
    assert tally.summary()["errors"]["float32"]["o"]["not_finite"] == 1


@pytest.fixture
def mqar(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import mqar

    return mqar


def test_recall_smoke_run_is_marked_and_resumed(mqar, tmp_path, capsys):
    out = tmp_path / "mqar.json"
    run = start("mqar", out)
    printed, _ = run.communicate()
    assert run.returncode == 0, printed
    assert printed.rstrip().endswith("NOT MEASURED: smoke run")
    first = json.loads(out.read_text())["rows"]
    assert mqar.main(["--smoke", "--out", str(out)]) == 0 and "4 rows kept" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == first
    record = json.loads(out.read_text())
    assert {"provenance", "settings", "results", "rows", "not_measured"} == set(record)
    assert all(row["measured"] is False and row["status"] == "ok" for row in record["rows"])
    assert [(r["model"], r["width"], len(r["accuracy"])) for r in record["results"]] == [
        ("DeltaNet", 16, 2),
        ("RetNet", 16, 2),
    ]


def test_recall_examples_are_those_of_the_library(mqar):
    torch.manual_seed(0)
    tokens, asked, right = mqar.draw(50, 40, 8, 64, "cpu")
    keys, values = tokens[:, 0:16:2], tokens[:, 1:16:2]
    assert keys.min() >= 1 and keys.max() < 32 <= values.min() and values.max() < 64
    assert all(len(set(row.tolist())) == 8 for x in (keys, values, asked) for row in x)
    assert torch.equal(tokens.gather(1, asked), keys) and torch.equal(right, values)
    assert asked.min() == 16 and asked.max() == 38 and (asked % 2 == 0).all()
    assert ((tokens != 0).sum(1) == 24).all()
    # The first of two gaps drawn without replacement, and both together, against the library's generator.
    _, asked, _ = mqar.draw(40_000, 24, 2, 16, "cpu", power=0.5)
    _, labels = mqar.multi_query_associative_recall(40_000, 24, 2, vocab=16, power=0.5)
    ours = torch.zeros(40_000, 24).scatter(1, asked, 1.0).mean(0)
    torch.testing.assert_close(ours, (labels >= 0).float().mean(0), atol=0.015, rtol=0)


def test_recall_is_learned_and_training_ends_then(mqar):
    names = "--out x --length 16 --pairs 2 --vocab 32 --batch 64 --steps 400 --warmup 20 --test 200"
    o = mqar.arguments([*names.split(), "--layers", "1", "--heads", "1"])
    row = mqar.a_cell("delta", 32, 1e-2, 0, o, "cpu")
    assert row["accuracy"] > 0.98 and row["steps_taken"] < 400
    assert row["curve"]["accuracy"][0] < 0.2 < 0.9 < row["curve"]["accuracy"][-1]
    skipped = mqar.a_cell("delta", 32, 1e-2, 0, o, "cpu", left=lambda: 0.0)
    assert skipped["status"] == "skipped" and "accuracy" not in skipped


def test_recall_is_taught_from_short_lists_to_long_ones(mqar):
    o = mqar.arguments(["--out", "x", "--batch", "32"])
    assert mqar.lessons(o) == [(256, 64, 8), (128, 128, 16), (64, 256, 32), (32, 512, 64)]
    assert mqar.lessons(mqar.arguments(["--out", "x", "--batch", "32", "--lessons", "1"])) == [(32, 512, 64)]
    names = "--out x --length 24 --pairs 6 --vocab 32 --batch 2 --steps 20 --warmup 2 --test 3"
    o = mqar.arguments(names.split())
    assert mqar.lessons(o) == [(2, 24, 6)]  # half of 6 would be too short a list
    o.length, o.pairs = 32, 8
    training = mqar.Training("linear", 16, 1e-2, o, "cpu")
    found = training.run()["lessons"]
    assert [(x["batch"], x["length"], x["pairs"], x["steps"]) for x in found] == [(4, 16, 4, 2), (2, 32, 8, 18)]


def test_recall_cells_are_trained_in_the_order_of_their_worth(mqar):
    o = mqar.arguments(["--out", "x", "--models", "delta", "linear", "gla", "--widths", "64", "128"])
    cells = [f"{mixer} {width} {seed}" for mixer, width, _, seed in mqar.plan(o)]
    first = ["delta 64 0", "linear 64 0", "delta 128 0", "linear 128 0", "gla 64 0", "gla 128 0"]
    assert cells == first + [cell[:-1] + "1" for cell in first]


def test_recall_keeps_the_best_learning_rate_and_forgets_failures(mqar):
    def row(rate, seed, accuracy, status="ok"):
        found = {"model": "GLA", "width": 64, "length": 512, "pairs": 64, "learning_rate": rate, "seed": seed}
        return found | {"accuracy": accuracy, "steps_taken": 9, "status": status}

    rows = [row(1e-2, 1, 0.9), row(1e-2, 0, 0.5), row(1e-3, 0, 0.6), {"key": "x", "status": "failed"}]
    (entry,) = mqar.collected(rows)
    assert entry["accuracy"] == [0.5, 0.9] and entry["learning_rate"] == 1e-2 and entry["steps"] == [9, 9]


# --- ladder.py ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ladder_run(tmp_path_factory) -> tuple[str, int, dict]:
    path = tmp_path_factory.mktemp("ladder") / "ladder.json"
    run = start("ladder", path)
    printed = run.communicate()[0]
    return printed, run.returncode, json.loads(path.read_text())


@pytest.fixture
def ladder_script(modules):
    import ladder

    return ladder


def test_every_stage_of_the_ladder_is_checked_and_predicted(ladder_run):
    printed, code, record = ladder_run
    assert code == 0, printed
    assert printed.rstrip().endswith("NOT MEASURED: smoke run")
    assert {"provenance", "settings", "ceilings", "rows", "summary", "not_measured"} == set(record)
    rows = {row["stage"]: row for row in record["rows"]}
    assert list(rows) == [
        "linear attention", "T by substitution", "T by doubling", "T by merging", "four kernels",
        "two kernels", "one kernel", "operator, training", "operator, backward", "one token",
    ]  # fmt: skip
    rates = record["ceilings"]
    for row in rows.values():
        assert row["measured"] is False and row["status"] == "ok" and row["samples_ms"] == [1.0, 1.0]
        assert all(0 < error < row["limit"] for error in row["errors"].values())  # bfloat16: zero would be no check
        times = [
            max(x["bytes"] / rates["copy_bytes_per_s"], x["flops"] / rates["matmul_flops_per_s"])
            for x in row["kernels"]
        ]
        assert row["predicted_ms"] == pytest.approx(1e3 * sum(times), rel=1e-4)
        assert row["ratio"] == pytest.approx(row["ms"] / row["predicted_ms"], rel=1e-4)
    four = ["ut_kernel", "wu_kernel", "state_kernel", "output_kernel"]
    launched = {name: [kernel["kernel"] for kernel in row["kernels"]] for name, row in rows.items()}
    assert launched["four kernels"] == four and launched["T by doubling"] == four[:1]
    assert launched["two kernels"] == launched["operator, training"] == ["chunk_inverse", "chunk_scan_fwd"]
    assert launched["one kernel"] == ["one_kernel"] and launched["one token"] == ["recurrent"]
    assert set(rows["operator, backward"]["errors"]) == {"dq", "dk", "dv", "dbeta"}
    assert rows["one kernel"]["bytes"] < rows["two kernels"]["bytes"] < rows["four kernels"]["bytes"]


def test_a_stage_that_is_wrong_or_launches_what_was_not_counted_gets_no_time(ladder_script):
    measure = sys.modules["measure"]
    size = ladder_script.Size(2, 32, 1, 16, "cpu", chunk=16, decoded=2)
    rates = {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1.0, "float32_flops_per_s": 1.0}
    clock, stage = measure.Clock(smoke=True), size.inverse("merging")
    right = ladder_script.measure(stage, clock, rates)
    assert right["float32_ms"] == pytest.approx(1e3 * 4 * 2 * 4 * 2 * 16**3)  # 4 chunks, 4 levels of 2 dots
    stage.limit = right["errors"]["T"] / 2
    row = ladder_script.measure(stage, clock, rates)
    assert row["status"] == "refused" and "ms" not in row
    stage.limit, stage.model = 1.0, lambda seen: ()
    with pytest.raises(ValueError, match=r"counts 0 kernels, launched were \['ut_kernel'\]"):
        ladder_script.measure(stage, clock, rates)
    with pytest.raises(ValueError, match="no model for the launches"):
        size.operator_model([])


def test_nothing_that_was_not_written_passes_for_a_result(ladder_script):
    size = ladder_script.Size(2, 32, 1, 16, "cpu", chunk=16, decoded=2)
    with ladder_script.poisoned():
        fresh = torch.empty_like(size.inputs[0])
    assert fresh.isnan().all() and not torch.are_deterministic_algorithms_enabled()
    assert sys.modules["measure"].verdict(size.compare(("o", fresh, size.exact["o"])), None, 1.0)


def test_what_is_off_by_more_than_forty_percent(ladder_script):
    rows = [{"key": str(r), "status": "ok", "ratio": r} for r in (0.5, 0.7, 1.39, 1.41, 9.0)]
    found = ladder_script.summary([*rows, {"key": "no", "status": "failed", "failure": "x"}])
    assert found["off"] == ["0.5", "1.41", "9.0"] and found["within"] == ["0.7", "1.39"]
    assert found["refused_or_failed"] == ["no"] and found["stages"] == 6


# --- tune.py ------------------------------------------------------------------------------------------------------


def test_tuning_checks_and_times_every_form_of_a_kernel(smoke):
    record = json.loads(smoke["tune"][2].read_text())
    rows = {(row["kernel"], row["variant"]): row for row in record["rows"]}
    first_pass = {("chunk_scan_fwd", "transition"), ("chunk_scan_bwd", "")}
    assert set(rows) == {("chunk_scan_fwd", ""), ("chunk_scan_bwd", "fused"), ("chunk_inverse", "")} | first_pass
    for form, row in rows.items():
        assert row["status"] == "ok" and row["tiles"] == [16, 16, 4, 1, False]
        assert all(0 < error < 0.03 for error in row["errors"].values()) and len(row["errors"]) == 5
        assert row["chosen"] == list(row["ms"]) == (["shared", "alone"] if "scan" in form[0] else ["shared"])
    assert {name for name in rows["chunk_scan_fwd", ""]["ms"]["alone"]} == {"training", "inference", "programs"}
    # Of three parts two, each with its X and its M; that of the first M has nothing to do.
    assert rows["chunk_scan_fwd", "transition"]["ms"]["alone"]["programs"] == 4
    assert record["provenance"]["compute_capability"] is None and len(record["summary"]["best"]) == 11


def test_tuning_tries_what_the_rule_has_chosen_and_marks_the_fastest(modules, monkeypatch):
    import argparse

    import tune

    options = argparse.Namespace(norm=False, only=["chunk_scan_fwd"], tma=True)
    found = tune.wanted(options, 128)
    assert len(set(found)) == len(found) and {c.variant for c in found} == {"", "transition"}
    assert found[0].tiles == found[0].rule(False) and all(c.tiles.tma for c in found[2:])
    assert {c.kernel for c in tune.candidates(64, False)} == {"chunk_scan_fwd", "chunk_scan_bwd", "chunk_inverse"}
    norm = [c.tiles.BK for c in tune.candidates(256, True) if c.kernel == "chunk_bwd_dqk"]
    assert set(norm) == {256}  # whole rows
    rows = [
        {**c.about(), "key": c.key, "status": "ok", "ms": {"shared": {"training": ms}}}
        for c, ms in ((found[0], 2.0), (found[-1], 1.0))
    ]
    rows[1]["variant"] = ""
    (best,) = tune.summary(rows)["best"]
    assert (best["fastest_ms"], best["chosen_ms"]) == (1.0, 2.0) and best["fastest"] == rows[1]["tiles"]


# --- The error microscope ----------------------------------------------------------------------------------------


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


@pytest.fixture
def microscope(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import error_microscope

    return error_microscope


def test_inputs_of_the_microscope(microscope):
    source = microscope.Source([0, 1], 256, 2, 32, "cpu")
    for cosine in microscope.COSINES:
        c = microscope.BASE | {"cosine": cosine, "norm": 1.5, "beta_range": 2.0}
        p = source.problem(c, torch.float32)
        found = microscope.facts(p.k, p.beta)
        assert found["measured_cosine"] == pytest.approx(1.0 if cosine == "identical" else cosine, abs=0.03)
        assert torch.allclose(p.k.norm(dim=-1), torch.tensor(1.5)) and p.beta.max() <= 2
        assert found["may_grow"] and found["beta_k2_max"] == pytest.approx(1.5**2 * p.beta.max().item(), rel=1e-5)
    calm = source.problem(microscope.BASE | {"norm": 0.5}, torch.float32)
    assert not microscope.facts(calm.k, calm.beta)["may_grow"]


@pytest.mark.parametrize("cosine", [0.5, "identical"])
@pytest.mark.parametrize("with_N", [False, True])
def test_what_the_microscope_computes_through_the_inverse_is_the_operator(microscope, cosine, with_N):
    """With the exact inverse: one chunk from state zero, its gradients by autograd through the float64 recurrence."""
    import dn_lib
    from dn_lib.forms.householder import scaled_inverse, ut_transform

    source = microscope.Source([0, 1], 24, 1, 16, "cpu")
    p = source.problem(microscope.BASE | {"cosine": cosine, "beta_range": 2.0}, torch.float64)
    o, _ = dn_lib.delta_rule(p.q, p.k, p.v, p.beta, backend="recurrent")
    exact = dict(zip(("o", "dq", "dk", "dv", "dbeta"), (o, *torch.autograd.grad(o, p.leaves, p.do)), strict=True))
    q, k, v, do, beta = (x.detach()[:, :, 0] for x in (p.q, p.k, p.v, p.do, p.beta))
    N = scaled_inverse(k, beta) if with_N else None
    found = microscope.used(ut_transform(k, beta), N, q, k, v, beta, do)
    for name, x in exact.items():
        assert torch.allclose(found[name], x[:, :, 0].detach(), rtol=0, atol=1e-11), name


def test_the_microscope_keeps_what_is_not_finite_as_null_and_says_so(microscope):
    exact = {"o": torch.ones(3, 4, 1, 2, dtype=torch.float64)}
    x = exact["o"].clone()
    x[0, 0] = float("inf")
    x[1] *= 1.5
    assert microscope.errors_by_seed({"o": x}, exact)["o"] == {"median": 0.25, "max": 0.5, "not_finite": 1}
    lost = {"o": torch.full_like(x, float("nan"))}
    nothing = microscope.errors_by_seed(lost, exact)
    assert nothing["o"] == {"median": None, "max": None, "not_finite": 3}
    point = {"cosine": 0.0, "may_grow": False, "errors": nothing}
    row = {"key": "operator cosine", "status": "ok", "section": "operator", "axis": "cosine", "points": [point]}
    assert len(microscope.faults([row])) == 1
    point["may_grow"] = True
    assert microscope.faults([row]) == []
    raised = microscope.a_sweep([{"cosine": 0.0}], lambda c: [][0])["points"]
    assert raised == [{"cosine": 0.0, "failure": "IndexError: list index out of range"}]
    assert len(microscope.faults([row | {"points": raised}])) == 1


def test_chapters_are_compared_by_what_they_show(modules):
    """Cells that may differ are left out; printed text and results of the others count."""
    pytest.importorskip("pybtex")  # the chapters' tools
    from nbformat import v4

    times = importlib.import_module("chapter_times")

    def notebook(text: str, result: str, ignored: str):
        cells = [
            v4.new_code_cell("a", outputs=[v4.new_output("stream", text=text)]),
            v4.new_code_cell("b", outputs=[v4.new_output("execute_result", data={"text/plain": result})]),
            v4.new_code_cell("c", outputs=[v4.new_output("stream", text=ignored)]),
            v4.new_markdown_cell("d"),
        ]
        cells[2].metadata["tags"] = ["nbval-ignore-output"]
        return v4.new_notebook(cells=cells)

    stored = notebook("1.0\n", "True", "3 ms")
    assert times.differences(notebook("1.0\n", "True", "4 ms"), stored) == []
    found = times.differences(notebook("1.1\n", "False", "4 ms"), stored)
    assert [(d["cell"], d["shown"], d["stored"]) for d in found] == [(1, "1.1", "1.0"), (2, "False", "True")]


# --- Compiling the peer with all cores ---------------------------------------------------------------------------

STUBS = '''
import os, time

def rows_of(unit):
    """Units that are begun first are ready last; one ends its process."""
    if unit == ("killed", "a"):
        os._exit(7)
    time.sleep(0.2 if unit[1] == "a" else 0)
    return [{"variant": unit[0], "sort": unit[1], "shape": [2, length]} for length in (7, 300)]

def compiling(worker, options, length, batch):
    if options.budget is not None:
        time.sleep(600)
    return f"{length} x {batch}"
'''


@pytest.fixture
def peer(monkeypatch, tmp_path):
    """`peer_compile`, and a module of stubs that other processes can import as well."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "stubs_of_test_benchmarks.py").write_text(STUBS)
    stubs = importlib.import_module("stubs_of_test_benchmarks")
    yield importlib.import_module("peer_compile"), stubs
    del sys.modules["stubs_of_test_benchmarks"]


@pytest.mark.parametrize("workers", [1, 2, 7, 16])
def test_every_configuration_is_one_workers(peer, workers):
    part = peer[0].part
    shares = [0] * workers
    for kernel in range(200):
        parts = [part(f"kernel {kernel}", kernel % 9, worker, workers) for worker in range(workers)]
        assert sorted(n for found in parts for n in found) == list(range(kernel % 9))
        shares = [share + len(found) for share, found in zip(shares, parts, strict=True)]
    assert max(shares) < 1.7 * min(shares)  # were all kernels begun at worker 0, the first would have all of it


def test_autotuners_compile_their_part_and_launch_nothing(peer, monkeypatch):
    import triton
    from triton.runtime.autotuner import Autotuner, Heuristics

    for name in ("run", "prune_configs"):
        monkeypatch.setattr(Autotuner, name, getattr(Autotuner, name))  # put back in the end

    class Compiled:
        def __init__(self, BT):
            self.hash = str(BT)

        @property
        def run(self):
            if self.hash == "3":
                raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    class Kernel:
        """As `triton.jit` makes it: `run` compiles, and launches unless `warmup`."""

        def __init__(self):
            self.asked, self.launched = [], 0

        @staticmethod
        def fn(x, T):
            pass

        def run(self, x, *, T, BT, even, num_warps, num_ctas, num_stages, grid, warmup):
            assert even is (T % 2 == 0) and num_warps == 8
            self.asked.append(BT)
            self.launched += not warmup
            if BT == 4:
                raise RuntimeError("no such instruction")
            return Compiled(BT)

    def no_time(call, quantiles):
        call()
        raise AssertionError("timed")

    def tuner(kernel, **options):
        inner = Heuristics(kernel, ["x", "T"], {"even": lambda given: given["T"] % 2 == 0})
        configs = [triton.Config({"BT": n}, num_warps=8) for n in range(10)]
        return Autotuner(inner, ["x", "T"], configs, ["T"], ["x"], None, do_bench=no_time, **options)

    done, failed = set(), {}
    for worker in range(3):
        tally, kernel = peer[0].compile_only(worker, 3), Kernel()
        pruned = {"early_config_prune": lambda configs, named, **options: configs[: options["T"]]}
        call = tuner(kernel, prune_configs_by=pruned)[lambda meta: 1 / 0]  # the grid is asked for by a launch only
        for _ in range(2):
            call(torch.ones(3), T=8)
        assert kernel.launched == 0 and kernel.asked == 2 * list(peer[0].part("fn", 8, worker, 3))
        assert not done & tally.done
        done, failed = done | tally.done, failed | tally.failed
        assert str(tally).startswith(f"{len(tally.done)} configurations compiled")
        assert ("cannot be used (such as fn BT: " in str(tally)) == bool(tally.failed)
    assert done == {"0", "1", "2", "5", "6", "7"}
    assert sorted(failed.values()) == ["OutOfResources", "RuntimeError"]
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="timed"):  # the stub is one that Triton's own `run` would have timed
        tuner(Kernel())[(1,)](torch.ones(3), T=8)


@pytest.fixture
def conversion(peer, monkeypatch):
    return importlib.import_module("check_fla_conversion")


def test_the_conversions_report_is_the_same_for_any_number_of_processes(peer, conversion):
    rows_of = peer[1].rows_of
    units = [(variant, sort) for variant in ("x", "y", "z") for sort in ("a", "b")]
    alone = list(conversion.run(rows_of, units, 0))
    assert [(row["variant"], row["sort"]) for row in alone[::2]] == units and len(alone) == 12
    for workers in (1, 4, 16):
        assert list(conversion.run(rows_of, units, workers)) == alone


def test_a_process_that_ends_costs_its_own_models_only(peer, conversion):
    units = [("x", "a"), ("killed", "a"), ("x", "b"), ("y", "a")]
    rows = list(conversion.run(peer[1].rows_of, units, 2))
    said = "its process ended early, with exit code 7"
    assert [row.get("failure") for row in rows] == [None, None, said, None, None, said]
    assert [row["variant"] for row in rows] == ["x", "x", "killed", "x", "x", "y"]
    assert not conversion.verdict(rows, {})["passed"]


LIMITS = {"float32": 1e-3, "bfloat16": 2e-2}


def rows_within_the_limits(conversion):
    """What a right conversion gives: `1 + elu` in bfloat16 further from fla's than from float64, on either side."""
    rows = []
    for variant in conversion.VARIANTS:
        for sort, (between, own) in {"float32": (2e-6, 2e-6), "bfloat16": (1.5e-2, 1e-2)}.items():
            if variant in conversion.BEYOND and sort == "bfloat16":
                between, own = 2.5e-2, 1.9e-2
            found = {"ours_to_float64": own, "fla_to_float64": own, "ours_to_fla": between}
            rows.append({"variant": variant, "sort": sort} | found)
            refused = {"ours_to_float64": own, "refused_by_fla": "no float32"}
            rows.append({"variant": variant, "sort": sort} | (refused if sort == "float32" else found))
    return rows


def test_the_conversions_verdict_of_a_right_one(conversion):
    said = conversion.verdict(rows_within_the_limits(conversion), LIMITS)
    assert said["passed"]
    assert said["worst"] == {"float32": 2e-6, "bfloat16": 1.5e-2, "bfloat16 deep": None}
    apart = {"ours_to_fla": 2.5e-2, "ours_to_float64": 1.9e-2, "fla_to_float64": 1.9e-2}
    assert said["beyond"] == {"1 + elu": apart}


@pytest.mark.parametrize(
    "variant, sort, wrong",
    [
        ("as in the paper", "bfloat16", {"ours_to_fla": 2.1e-2}),
        ("relu, sum norm", "bfloat16", {"ours_to_fla": 2.1e-2}),
        ("output gate", "bfloat16", {"ours_to_fla": float("nan")}),
        ("1 + elu", "float32", {"ours_to_fla": 1.1e-3}),
        ("1 + elu", "bfloat16", {"fla_to_float64": 2.1e-2}),  # what a wrong conversion of it would change
        ("1 + elu", "bfloat16", {"ours_to_float64": 2.1e-2}),
        ("tied embeddings", "float32", {"failure": "its process ended early"}),
    ],
)
def test_the_conversions_verdict_of_a_wrong_one(conversion, variant, sort, wrong):
    rows = rows_within_the_limits(conversion)
    next(r for r in rows if (r["variant"], r["sort"]) == (variant, sort)).update(wrong)
    assert not conversion.verdict(rows, LIMITS)["passed"]


def test_the_conversions_verdict_needs_every_variant_compared(conversion):
    rows = rows_within_the_limits(conversion)
    for variant in conversion.VARIANTS:
        for sort in LIMITS:
            rest = [r for r in rows if (r["variant"], r["sort"]) != (variant, sort)]
            assert not conversion.verdict(rest, LIMITS)["passed"]
    refused = [{k: x for k, x in r.items() if k != "ours_to_fla"} for r in rows]
    assert not conversion.verdict(refused, LIMITS)["passed"]


def test_the_committed_report_of_the_conversion_is_its_rows_verdict(conversion):
    report = json.loads((FOLDER.parent / "book" / "results" / "fla_conversion.json").read_text())
    said = conversion.verdict(report["rows"], report["limits"])
    assert {key: report[key] for key in said} == said
    assert report["limits"] == LIMITS


def test_keys_through_elu_are_nearly_one_key_at_the_initial_weights_of_the_conversion(conversion):
    """The reason why that variant is judged apart; all matrices are drawn as fla draws them, convolutions too."""
    from dn_lib.models import LanguageModel, ModelConfig

    _, layers, std = conversion.SORTS["bfloat16"]
    cosines = {}
    for activation in ("silu", "elu1"):
        torch.manual_seed(0)
        config = ModelConfig(vocab_size=512, width=256, layers=layers, heads=4, activation=activation)
        mixer = (model := LanguageModel(config)).blocks[0].mixer
        for parameter in (p for p in model.parameters() if p.ndim > 1):
            torch.nn.init.normal_(parameter, std=std)
        with torch.no_grad():
            x = model.blocks[0].mixer_norm(model.embedding(torch.randint(512, (1, 64))))
            _, k, _ = mixer._query_key_value(x, None)
        unit = torch.nn.functional.normalize(k[0].transpose(0, 1), dim=-1)
        between = (unit @ unit.mT)[:, *torch.tril_indices(64, 64, -1)]
        cosines[activation] = between.mean().item()
    assert abs(cosines["silu"]) < 0.05 and 0.999 < cosines["elu1"] < 1


def test_a_model_of_the_conversion_fails_as_a_row(conversion, monkeypatch):
    def broken(*arguments):
        raise ImportError("no fla here")

    monkeypatch.setattr(conversion, "build_fla", broken)
    threads = torch.get_num_threads()
    unit, about = ("output gate", "bfloat16"), {"device": "cpu", "lengths": [7], "seed": 0}
    try:
        (row,) = conversion.compare_unit(unit, **about, until=None)
        (late,) = conversion.compare_unit(unit, **about, until=0.0)
    finally:
        torch.set_num_threads(threads)
    assert row == {"variant": "output gate", "sort": "bfloat16", "failure": "ImportError: no fla here"}
    assert late["failure"] == "not begun: the budget was over"


def test_tuning_beforehand_smoke_run():
    command = [sys.executable, str(FOLDER / "throughput.py"), "--smoke", "--tune-only", "--workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    said = [line.partition("] ")[2] for line in run.stdout.splitlines()]
    assert said == [f"{name}: a step at 32 is tuned and compiled" for name in ("delta", "attention")]


def test_workers_that_compile_are_stopped_at_the_budget(peer, capsys):
    import argparse
    import time

    throughput, begun = importlib.import_module("throughput"), time.monotonic()

    def said(budget):
        options = argparse.Namespace(workers=2, budget=budget)
        throughput.compile_beforehand(options, 2048, 16, lambda: time.monotonic() - begun, peer[1].compiling)
        return [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]

    first = "fla: 2 processes compile its kernels"
    assert said(None) == [first, "worker 0: 2048 x 16", "worker 1: 2048 x 16"]
    assert said(0.0) == [first, "worker 0: stopped at the budget", "worker 1: stopped at the budget"]
    assert time.monotonic() - begun < 300  # the stub would have slept for 600 s


def test_errors_are_judged_by_the_mean_ratio_of_each_configuration(modules):
    _, _, errors = modules
    tally, configs = errors.Tally(), errors.configurations(2, 0)
    one = {name: 1e-3 for name in ("o", "dq", "dk", "dv", "dbeta")}
    calls = [errors.a_call(n, configs, 0) for n in range(1500)]
    first, *_ = chosen = [c for c in calls if errors.fla_takes(c)]
    same = [c for c in chosen if all(c[o] == first[o] for o in errors.OPTIONS)]
    for c in chosen:
        worse = c in same
        ours = {**one, "dk": 1e-3 * (1.3 if worse else 0.9)}
        tally.add(c, {"ours": ours, "fla": one, "fla again": {**one, "o": 2e-3}, "norms": one})
    rows = tally.by_configuration()
    assert [row["above"] for row in rows if row["above"]] == [["dk"]] and len(rows) > 5
    judged = next(row for row in rows if row["above"])
    assert judged["calls"] == len(same) and judged["ratios"]["dk"] == pytest.approx(1.3)
    keys = tally.by_keys()
    assert all(row["scatter"]["max"] == pytest.approx(2.0) for row in keys) and len(keys) > 10
    assert "ABOVE 1.1 ['dk']" in errors.table(tally.summary())
