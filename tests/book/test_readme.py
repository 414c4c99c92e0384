"""The figures that README.md shows are those of the result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tools.notebooks import PICTURE, picture

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def result(name: str) -> dict:
    return json.loads((ROOT / "book" / "results" / f"{name}.json").read_text())


def test_running_times_are_the_measured_ones():
    for chapter, seconds in result("chapter_times")["cpu"]["seconds"].items():
        row = next(line for line in README.splitlines() if f"{chapter}.ipynb" in line)
        assert row.endswith(f"| {seconds:.0f} s |"), row


def test_speed_table_is_the_measured_one():
    found = result("operator")
    grid = [row for row in found["rows"] if row["key"].startswith("grid")]
    for name, key in (("forward", "forward"), ("forward and backward", "forward_backward")):
        summary = found["summary"][key]
        shown = [float(x) for x in re.search(rf"^\| {name} \|(.*)\|$", README, re.M)[1].split("|")]
        most = max(row[key]["ratio"] for row in grid)
        true = [summary["geometric_mean_ratio"], summary["least_ratio"], most, summary["most_memory_of_fla"]]
        assert shown == [round(x, 2) for x in true]


def test_errors_are_below_those_of_fla_as_the_text_says():
    grid = [row["errors"] for row in result("operator")["rows"] if row["key"].startswith("grid")]
    assert len(grid) == 21
    for errors in grid:
        assert all(errors["ours"][name] < errors["fla"][name] for name in errors["fla"])


def test_ratios_on_random_calls_are_the_measured_ones():
    rows = result("errors")["summary"]["ratio_by_configuration"]
    ratios = [ratio for row in rows for ratio in row["ratios"].values()]
    assert f"geometric means of {min(ratios):.2f} to {max(ratios):.2f} of fla's" in README
    assert len(rows) == 8 and "each of the eight configurations" in README


def test_training_speeds_are_the_measured_ones():
    found = result("throughput")
    ratios = found["summary"]["ratios"]
    assert list(ratios) == ["2048", "8192", "16384"]
    for name, key in (("fla's DeltaNet", "delta over fla"), ("our Transformer", "delta over attention")):
        shown = re.search(rf"^\| {name} \|(.*)\|$", README, re.M)[1].split("|")
        assert [float(x) for x in shown] == [round(row[key], 2) for row in ratios.values()]
    rounds = {name: row["rounds"] for name, row in found["summary"]["training"]["2048"].items()}
    assert f"the second rounds alone give {rounds['delta'][1] / rounds['fla'][1]:.2f} there" in README
    assert found["rows"][0]["parameters"] // 10**6 == 374


def test_picture_is_the_notebooks():
    assert (ROOT / "book" / PICTURE[2]).read_bytes() == picture(ROOT / "book" / "notebooks")
