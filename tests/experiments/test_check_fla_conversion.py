"""The verdict on converted models, and the processes that compare them."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.harness.provenance import RESULTS
from experiments.models import check_fla_conversion as conversion


def test_the_conversions_report_is_the_same_for_any_number_of_processes(stubs):
    rows_of = stubs.rows_of
    units = [(variant, sort) for variant in ("x", "y", "z") for sort in ("a", "b")]
    alone = list(conversion.rows_of_all(rows_of, units, 0))
    assert [(row["variant"], row["sort"]) for row in alone[::2]] == units and len(alone) == 12
    for workers in (1, 4, 16):
        assert list(conversion.rows_of_all(rows_of, units, workers)) == alone


def test_a_process_that_ends_costs_its_own_models_only(stubs):
    units = [("x", "a"), ("killed", "a"), ("x", "b"), ("y", "a")]
    rows = list(conversion.rows_of_all(stubs.rows_of, units, 2))
    said = "its process ended early, with exit code 7"
    assert [row.get("failure") for row in rows] == [None, None, said, None, None, said]
    assert [row["variant"] for row in rows] == ["x", "x", "killed", "x", "x", "y"]
    assert not conversion.verdict(rows, {})["passed"]


LIMITS = {"float32": 1e-3, "bfloat16": 2e-2}


def rows_within_the_limits():
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


def test_the_conversions_verdict_of_a_right_one():
    said = conversion.verdict(rows_within_the_limits(), LIMITS)
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
def test_the_conversions_verdict_of_a_wrong_one(variant, sort, wrong):
    rows = rows_within_the_limits()
    next(r for r in rows if (r["variant"], r["sort"]) == (variant, sort)).update(wrong)
    assert not conversion.verdict(rows, LIMITS)["passed"]


def test_the_conversions_verdict_needs_every_variant_compared():
    rows = rows_within_the_limits()
    for variant in conversion.VARIANTS:
        for sort in LIMITS:
            rest = [r for r in rows if (r["variant"], r["sort"]) != (variant, sort)]
            assert not conversion.verdict(rest, LIMITS)["passed"]
    refused = [{k: x for k, x in r.items() if k != "ours_to_fla"} for r in rows]
    assert not conversion.verdict(refused, LIMITS)["passed"]


def test_the_committed_report_of_the_conversion_is_its_rows_verdict():
    report = json.loads((RESULTS / "fla_conversion.json").read_text())
    said = conversion.verdict(report["rows"], report["limits"])
    assert {key: report[key] for key in said} == said
    assert report["limits"] == LIMITS


def test_keys_through_elu_are_nearly_one_key_at_the_initial_weights_of_the_conversion():
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


def test_a_model_of_the_conversion_fails_as_a_row(monkeypatch):
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
