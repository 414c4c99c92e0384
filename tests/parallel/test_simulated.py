"""Counting for processes that are not there: the counts are the formulas', and nothing is left behind."""

from __future__ import annotations

import sys

import pytest
import torch.distributed as dist

from dn_lib.parallel.simulated import as_one_of, counted_row_bytes, counted_state_bytes
from dn_lib.parallel.traffic import RULES, rows_bytes, state_bytes


@pytest.mark.parametrize("ranks", [2, 64])
@pytest.mark.parametrize("rule", RULES)
def test_counted_states_are_those_of_the_formulas(rule, ranks):
    want = tuple(state_bytes(rule, ranks, 1, 2, 3, 5, backward=back) for back in (False, True))
    assert counted_state_bytes(rule, ranks, 2, 3, 5) == want
    assert counted_state_bytes(rule, ranks, 2, 3, 5, length=7) == want


@pytest.mark.parametrize("rows", [0, 3, 9, 100])
def test_counted_rows_are_those_of_the_formulas(rows):
    length, ranks, width = 32, 8, 5
    forward = rows_bytes(length, ranks, ranks - 1, rows, width)
    back = rows_bytes(length, ranks, 0, rows, width, backward=True)
    assert counted_row_bytes(length, ranks, rows, width) == (forward, back)


def test_nothing_is_left_behind():
    hook = sys.excepthook
    with pytest.raises(KeyError), as_one_of(3, 1):
        assert dist.get_world_size() == 3
        raise KeyError
    assert not dist.is_initialized() and sys.excepthook is hook


def test_wrong_arguments_are_named():
    for arguments, name in (((0, 0), "ranks"), ((2, 2), "rank"), ((2, -1), "rank")):
        with pytest.raises(ValueError, match=f"^{name} must be"), as_one_of(*arguments):
            pass
    with as_one_of(2, 0), pytest.raises(RuntimeError, match="one already"), as_one_of(2, 1):
        pass
    with pytest.raises(ValueError, match=r"^rule must be"):
        counted_state_bytes("softmax", 2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"^ranks must be"):
        counted_row_bytes(8, 0, 1, 4)
    with pytest.raises(ValueError, match=r"^length must be a multiple"):
        counted_row_bytes(9, 2, 1, 4)
