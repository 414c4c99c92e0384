"""Pictures of a kernel's accesses: what each program touched, and when; in print three steps one below the other."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from dn_lib.teaching import pictures, plotting
from dn_lib.teaching.judge.trace import Access, Launch

ROWS, COLUMNS = 3, 4


@pytest.fixture
def launch():
    """One program that reads `x` and then writes `y`, a row at a time."""
    events = [
        Access(0, kind, name, np.arange(row * COLUMNS, (row + 1) * COLUMNS), 4)
        for row in range(ROWS)
        for kind, name in (("load", "x"), ("store", "y"))
    ]
    return Launch("copy", (1, 1, 1), {"x": (ROWS, COLUMNS), "y": (ROWS, COLUMNS)}, list(events))


def shades(ax) -> list[str]:
    """For each row of the picture: touched now (full colour), touched before (pale), or not yet."""
    picture = np.asarray(ax.images[0].get_array())
    return ["not" if row.min() == 1 else "before" if row.min() > 0.7 else "now" for row in picture]


def test_a_strip_has_a_row_for_each_step_and_a_column_for_each_tensor(launch):
    fig = Figure()
    pictures.draw_strip(fig, launch, ["x", "y"], [0, 3, 5])
    assert [ax.get_ylabel() for ax in fig.axes[::2]] == ["step 1", "step 4", "step 6"]
    assert [shades(ax) for ax in fig.axes] == [
        ["now", "not", "not"], ["not", "not", "not"],
        ["before", "before", "not"], ["before", "now", "not"],
        ["before", "before", "before"], ["before", "before", "now"],
    ]  # fmt: skip
    widths = [ax.spines["left"].get_linewidth() for ax in fig.axes]
    assert [width > 1 for width in widths] == [False, False, False, True, False, True]  # thick where it is stored
    assert plotting.smallest_type(fig) >= plotting.SMALLEST


def test_a_step_is_the_row_of_the_strip_that_shows_it(launch):
    step, strip = Figure(), Figure()
    pictures.draw_step(step, launch, ["x", "y"], 3)
    pictures.draw_strip(strip, launch, ["x", "y"], [3])
    assert [shades(ax) for ax in step.axes] == [shades(ax) for ax in strip.axes]
    assert [ax.get_title() for ax in step.axes] == ["x", "y (store)"]


def test_an_animation_stands_still_as_its_strip(launch):
    moving = pictures.animate(launch)
    again = plotting.animation(
        lambda fig, n: pictures.draw_step(fig, launch, ["x", "y"], n),
        range(6),
        height=3.0,
        still=lambda fig: pictures.draw_strip(fig, launch, ["x", "y"], [0, 3, 5]),
    )
    last = plotting.animation(lambda fig, n: pictures.draw_step(fig, launch, ["x", "y"], n), range(6), height=3.0)
    assert plotting.still(moving.data) == plotting.still(again.data) != plotting.still(last.data)


@pytest.mark.parametrize(("count", "shown"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (24, [0, 12, 23])])
def test_stages_begin_with_the_first_step_and_end_with_the_last(count, shown):
    assert pictures.stages(count) == shown
