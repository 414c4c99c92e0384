"""fla's own tests with our functions in the place of fla's: here on a toy that stands for fla."""

from __future__ import annotations

from experiments.operators import fla_tests


def test_ours_are_in_their_place_and_refusals_are_told_from_failures(tmp_path):
    checkout = fla_tests.write_toy(tmp_path)
    test = checkout / "tests" / "ops" / "test_delta.py"
    test.write_text(test.read_text() + "\n\ndef test_wrong():\n    assert chunk_delta_rule(*inputs())[1] is not None\n")
    rows = {row["test"].partition("::")[2]: row for row in fla_tests.rows_of(checkout)}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_a_token_of_strength_zero_writes_nothing": "passed",
        "test_heads_first": "failed",
        "test_wrong": "failed",
    }
    assert rows["test_heads_first"]["refusal"] and "head_first must be False" in rows["test_heads_first"]["error"]
    assert not rows["test_wrong"]["refusal"]
    assert all(row["replaced"] == ["chunk_delta_rule"] for row in rows.values())
