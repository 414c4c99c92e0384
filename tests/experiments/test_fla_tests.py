"""fla's own tests with our functions in the place of fla's: here on a toy that stands for fla."""

from __future__ import annotations

import json

from experiments.operators import fla_tests

MORE = """

import pytest

def test_wrong():
    assert chunk_delta_rule(*inputs())[1] is not None

def test_that_an_older_name_is_warned_of():
    with pytest.warns(DeprecationWarning):
        chunk_delta_rule(*inputs(), older=True)

def test_that_no_warning_comes():
    with pytest.warns(DeprecationWarning):
        chunk_delta_rule(*inputs())
"""


def test_ours_are_in_their_place_and_refusals_are_told_from_failures(tmp_path):
    checkout = fla_tests.write_toy(tmp_path)
    test = checkout / "tests" / "ops" / "test_delta.py"
    test.write_text(test.read_text() + MORE)
    rows = {row["test"].partition("::")[2]: row for row in fla_tests.rows_of(checkout)[0]}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_a_token_of_strength_zero_writes_nothing": "passed",
        "test_heads_first": "failed",
        "test_wrong": "failed",
        "test_that_an_older_name_is_warned_of": "failed",
        "test_that_no_warning_comes": "failed",
    }
    assert rows["test_heads_first"]["refusal"] and "head_first must be False" in rows["test_heads_first"]["error"]
    assert not rows["test_wrong"]["refusal"] and not rows["test_that_no_warning_comes"]["refusal"]
    hidden = rows["test_that_an_older_name_is_warned_of"]
    assert hidden["refusal"] and "has no argument 'older'" in hidden["error"]
    assert all(row["replaced"] == ["chunk_delta_rule"] for row in rows.values())


def test_the_same_command_goes_on(tmp_path):
    """Tests of an earlier run of the same sources are not repeated; a limit on rows leaves long ones."""
    checkout = fla_tests.write_toy(tmp_path)
    first, ended = fla_tests.rows_of(checkout, select="zero")
    assert ended and len(first) == 1
    both, _ = fla_tests.rows_of(checkout, before=first)
    assert both[0] == first[0] and len(both) == 2
    test = checkout / "tests" / "ops" / "test_delta.py"
    test.write_text(
        test.read_text()
        + """

@__import__("pytest").mark.parametrize("B, T, H", [(1, 5, 2), (2, 50, 2)])
def test_sizes(B, T, H):
    assert fused_recurrent_delta_rule(*inputs())[0].shape == (1, 5, 2, 4)
"""
    )
    sized, _ = fla_tests.rows_of(checkout, most=20, select="sizes")
    assert [(row["outcome"], row["replaced"]) for row in sized] == [("passed", ["fused_recurrent_delta_rule"])]


def test_rows_of_other_sources_are_not_kept(tmp_path):
    now, out = {"sources": {"x.py": "a"}, "device": "b", "fla": "1"}, tmp_path / "out.json"
    assert fla_tests.kept(out, now) == []
    out.write_text(
        json.dumps({"provenance": {"sources": {"x.py": "a"}, "device": "b"}, "fla": "1", "rows": [{"test": "x"}]})
    )
    assert fla_tests.kept(out, now) == [{"test": "x"}]
    for name in now:
        assert fla_tests.kept(out, now | {name: "other"}) == []
