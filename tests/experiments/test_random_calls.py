"""The random calls whose errors are judged (experiments.operators.errors)."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

from dn_lib.operators import DELTA_RULE, OPERATORS, Form
from dn_lib.testing import LAYOUTS, delta_rule_reference, relative_error
from experiments.harness.results import OutOfTime, Results

errors = pytest.importorskip("experiments.operators.errors")
harness = pytest.importorskip("experiments.harness.errors")
KERNEL = {"only": ["delta_rule"], "forms": ["triton"]}


def test_calls_are_reproducible_and_cover_the_options():
    configs = errors.configurations(4, 0, **KERNEL)
    assert configs == errors.configurations(4, 0, **KERNEL) and len(configs) == 96
    calls = [errors.a_call(n, configs, seed=0) for n in range(400)]
    assert calls[7] == errors.a_call(7, configs, seed=0)
    for name in ("norm", "state", "dstate", "varlen", "alone", "whole", "edges"):
        assert {c[name] for c in calls} == {False, True}
    assert {c["segments"] for c in calls} == {None, 2, 3, 5} and {c["chunk"] for c in calls} == {16, 32, 64}
    assert {c["layout"] for c in calls} == set(LAYOUTS) and {c["scale"] for c in calls} == {None, 0.7}
    assert {c["beta_range"] for c in calls} == {1.0, 2.0} and "identical" in {c["bias"] for c in calls}
    assert all(sum(c["lengths"]) == c["L"] and c["B"] == 1 for c in calls if c["varlen"])
    assert any(errors.fla_takes(c) for c in calls)


def test_every_operator_of_the_registry_is_called_with_what_its_forms_take():
    configs = errors.configurations(4, seed=0)
    assert {c["operator"] for c in configs} == set(OPERATORS)
    steps = errors.configurations(1, 0, forms=["in steps", "chunk kernel"])
    assert {c["form"] for c in steps} == {"in steps", "chunk kernel"}
    for c in (errors.a_call(n, configs, seed=0) for n in range(len(configs))):
        operator, form = OPERATORS[c["operator"]], errors.form_of(c)
        assert form.triton == any("initial_state" in kernel.takes for kernel in operator.kernels.values())
        p = errors.problem(
            c | {"B": 1, "L": operator.length or 3, "H": 1, "lengths": [0, 3] if c["varlen"] else None}, "cpu"
        )
        assert set(p.options) <= set(form.takes) and (p.dstate is None or form.differentiable)
        assert len(p.inputs) == len(operator.inputs) and all(x.dtype in form.dtypes for x in p.inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_form_of_any_operator_is_found(name, monkeypatch):
    """A form whose output is off by one part in a thousand, in place of those that the operator has."""
    operator = OPERATORS[name]
    right = next(form for form in operator.forms.values() if form.differentiable)

    def off(*inputs, **options):
        o, state = right(*inputs, **options)
        return 1.001 * o, state

    wrong = dataclasses.replace(operator, forms={"off": Form(off, takes=right.takes)}, kernels={})
    for registered, fine in ((dataclasses.replace(operator, kernels={}), True), (wrong, False)):
        monkeypatch.setitem(OPERATORS, name, registered)
        configs = errors.configurations(1, 0, True, [name])
        calls = [errors.a_call(n, configs, 0, True) for n, c in enumerate(configs) if c["dtype"] == "float32"]
        # The reference of a wrong registry is right as long as it is the recurrence.
        rows = [
            errors.measure(c | {"L": min(c["L"], 40), "lengths": None, "varlen": False}, "cpu", False) for c in calls
        ]
        assert rows and all(bool(errors.faults(c, row)) is not fine for c, row in zip(calls, rows, strict=True))


@pytest.mark.parametrize("lengths", [None, [0, 30, 1, 59]])
def test_what_stands_in_for_the_recurrence_agrees_with_it(lengths):
    """Above and below the number of tokens at which one takes the other's place."""
    for L in (90, harness.RECURRENCE) if lengths is None else (90,):
        c = {"operator": "delta_rule", "B": 1, "L": L, "H": 2, "d_k": 8, "d_v": 12, "dtype": "float32", "seed": 3}
        c |= {"bias": 1.0, "beta_range": 2.0, "edges": True, "norm": True, "state": True, "dstate": True, "chunk": 16}
        p = errors.problem(c | {"lengths": lengths, "scale": 0.7, "layout": "rows apart"}, "cpu")
        found, size = harness.reference_of(p)
        o, state, terms = delta_rule_reference(*p.inputs, **{n: x for n, x in p.options.items() if n != "chunk_size"})
        gradients = torch.autograd.grad((o, state), p.leaves, (p.do.double(), p.dstate.double()))
        assert (size > 0) is (L <= harness.RECURRENCE) and size in (0.0, terms)
        assert list(found) == ["o", *(f"d{name}" for name in DELTA_RULE.inputs), "dinitial", "state"]
        # The gradients of rounded inputs are handed back in their dtype, float32.
        for name, x in zip(found, (o, *gradients, state), strict=True):
            assert relative_error(x, found[name]) < (1e-12 if name in ("o", "state") else 1e-6), name


def test_calls_are_made_in_small_cells_each_once_and_budgets_leave_a_sample():
    configs = errors.configurations(2, 0, **KERNEL)
    numbers = range(5, 2005)
    cells = errors.cells(numbers, configs, 0, fla_calls=100)
    assert sorted(n for cell in cells for n in cell.numbers) == list(numbers)
    assert all(len(cell.numbers) <= errors.CELL for cell in cells)
    assert all(n % len(configs) == cell.configuration for cell in cells for n in cell.numbers)
    assert cells == errors.cells(numbers, configs, 0, fla_calls=100) != errors.cells(numbers, configs, 1, fla_calls=100)
    assert 100 <= sum(cell.fla for cell in cells) < 200  # of the calls that fla takes, some for each cell
    first = {configs[cell.configuration]["dtype"] for cell in cells[: len(cells) // 4]}
    assert first == set(errors.DTYPES)
    assert [cell.numbers for cell in errors.cells(range(1234, 1235), configs, 0, 9)] == [range(1234, 1235)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it is a GPU's absence that nothing is compiled by")
def test_cells_come_when_their_kernels_are_compiled_and_none_after_the_deadline(capsys):
    configs = errors.configurations(1, 0, **KERNEL)
    cells = [errors.Cell(i, range(i, i + 1)) for i in (3, 0, 3, 1)]
    assert list(errors.ready(cells, configs, False, 1, None)) == cells
    assert capsys.readouterr().out.splitlines()[-1] == "    3 of 3 configurations compiled, 3 of them failed"
    with pytest.raises(OutOfTime):
        next(errors.ready(cells, configs, False, 1, time.monotonic()))
    assert list(errors.ready(cells, configs, False, 0, time.monotonic())) == cells  # by no process beforehand


def test_a_run_out_of_budget_says_how_many_calls_it_made_and_the_next_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DN_COMMIT", "one")  # nobody commits between the two runs
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "errors.json"
    options = ["--smoke", "--only", "linear_attention", "--variants", "1", "--calls", "9", "--out", str(out)]
    assert errors.EXPERIMENT.start([*options, "--budget", "0"]) == 2
    said = capsys.readouterr().out
    assert "stopped at the budget" in said and "0 of 9 calls made" in said
    assert errors.EXPERIMENT.start([*options[:-4], "--calls", "4", *options[-2:]]) == 0
    assert "4 of 4 calls made, 4 of them" in capsys.readouterr().out
    whole = json.loads(out.read_text())
    assert whole["summary"]["calls_made"] == 4 and {row["key"].split()[0] for row in whole["rows"]} == {"worst"}
    # The rows of a whole file are no cells: another run begins anew, and a file of cells is gone on with.
    cells = [row for row in rows_of(errors, options) if "calls" in row]
    whole["rows"] = cells[:2]
    out.write_text(json.dumps(whole))
    made = sum(len(row["calls"]) for row in cells[:2])
    assert errors.EXPERIMENT.start(options) == 0
    assert f"9 of 9 calls made, {9 - made} of them" in capsys.readouterr().out


def rows_of(errors, argv: list[str]) -> list[dict]:
    """The rows of all cells, as a run without end would keep them."""
    options = errors.EXPERIMENT.arguments(argv)
    configs = errors.configurations(options.variants, options.seed, True, options.only, options.forms)
    results = Results(options.out.with_name("cells.json"), {}, smoke=True)
    for cell in errors.cells(range(options.calls), configs, options.seed, 0):
        results.add(
            {
                "key": errors.key_of(cell, configs, options),
                "status": "ok",
                **errors.a_cell(cell, configs, options, "cpu"),
            }
        )
    return results.rows


def test_a_failure_is_seen():
    c = errors.a_call(2, errors.configurations(1, seed=0), seed=0) | {"dtype": "float32"}
    tally = errors.Tally()
    for error in (1e-7, 2e-5, float("nan")):
        tally.add(c, {"ours": {"o": error}, "norms": {"o": 1.0}, "fla": {"o": 1e-3}})
    assert len(tally.failures) == 2
    assert tally.summary()["errors"][errors.form_name(c)]["float32"]["o"]["not_finite"] == 1


def test_errors_are_judged_by_the_mean_ratio_of_each_configuration():
    tally, configs = errors.Tally(), errors.configurations(2, 0, **KERNEL)
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


@pytest.mark.parametrize("one_wave", [False, True])
def test_a_call_is_planned_as_it_says(one_wave):
    """With the tiles of programs that have an SM to themselves, or that share it, and in so many segments."""
    from dn_lib.kernels import plan, rules

    c = {"segments": 3, "alone": one_wave, "whole": True}
    x = torch.empty(1, 1152, 2, 128, dtype=torch.bfloat16)
    with errors.planned(c, "cpu"):
        made = plan.plan_call(x, x, x, training=True, chunk=64)
    assert made.layout.segments == 3 and made.call.overrides.tma is True
    target = made.call.target._replace(arch=90)  # as on a GPU
    assert rules.is_one_wave(made.launches["chunk_scan_fwd"].programs, target) is one_wave


def test_gated_calls_have_gates_in_float32_and_shared_heads():
    """As their reference has them: heads of q and k are repeated there, and the gradients are those of each."""
    configs = errors.configurations(3, 0, True, ["gla", "gated_delta_rule"], ["triton"])
    assert {c["group"] for c in configs} == {1, 2, 3} and {c["gates"] for c in configs} == {None, "float32"}
    picked = [
        next(c for c in configs if c["operator"] == name and c["dtype"] == "float16" and c["gates"] and c["group"] > 1)
        for name in ("gla", "gated_delta_rule")
    ]
    for c in picked:
        call = errors.a_call(0, [c], 0, True) | {"L": 20, "lengths": None, "varlen": False}
        p = errors.problem(call, "cpu")
        assert p.v.shape[2] == c["group"] * p.q.shape[2] and p.inputs[-1].dtype == torch.float32
        row = errors.measure(call, "cpu", False)
        assert not errors.faults(call, row) and max(row["ours"].values()) < 8 * 2**-11  # roundings, one after another
        assert not errors.fla_takes(call)
    # A reference that gives value heads other key heads is told.
    p = errors.problem(call, "cpu")
    right, size = harness.reference_of(p)
    wrong = errors.replace(p, inputs=[x.flip(2) if x is p.v else x for x in p.inputs])
    assert harness.errors_of({"o": right["o"]}, harness.reference_of(wrong)[0])["o"] > 0.1 and size >= 0
