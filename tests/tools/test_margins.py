"""The instrument that finds tolerances without room (`make margins`)."""

import ast
import re
from pathlib import Path

import pytest
import torch

from tools import margins

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def room(monkeypatch):
    """The least room between the sides of the comparisons in a piece of code, or None."""
    monkeypatch.setattr(margins, "least", {})

    def run(code, **names):
        tree = margins.Recorded("here").visit(ast.parse(code))
        exec(compile(tree, "here", "exec"), {"_compare_with_margin": margins.compare, **names})
        return min((entry["room"] for entry in margins.least.values()), default=None)

    return run


@pytest.mark.parametrize("code", ["assert 1e-6 < 4e-6", "assert 4e-6 >= 1e-6", "assert not 4e-6 <= 1e-6"])
def test_room_is_the_ratio_of_the_sides(room, code):
    assert room(code) == pytest.approx(4)


def test_the_narrowest_entry_of_a_tensor_counts(room):
    assert room("assert (x < 1e-5).all()", x=torch.tensor([1e-9, 5e-6, -1.0]).double()) == pytest.approx(2)


@pytest.mark.parametrize("code", ["assert 3 < 4", "assert 0.4 < 0.5", "assert 0.0 < 1e-6", "assert 'a' < 'b'"])
def test_what_is_no_tolerance_is_left_out(room, code):
    assert room(code) is None


def test_a_failing_assertion_still_fails(room):
    with pytest.raises(AssertionError):
        room("assert 2e-6 < 1e-6")


def test_the_upper_ends_of_the_ranges_are_not_below_what_is_pinned():
    ranges = dict(re.findall(r'"(torch|triton)>=[\d.]+,<([\d.]+)', (ROOT / "pyproject.toml").read_text("utf-8")))
    pins = dict(re.findall(r"^(torch|triton)==([\d.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M))
    assert set(ranges) == set(pins) == {"torch", "triton"}
    number = lambda version: [int(part) for part in version.split(".")]  # noqa: E731
    assert all(number(pins[name]) < number(ranges[name]) for name in ranges)
