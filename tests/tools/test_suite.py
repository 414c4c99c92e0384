"""The order in which `make test` hands out files, and what it says of their times: the root's conftest.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]


def settings(request):
    """conftest.py of the root, as pytest has loaded it."""
    return request.config.pluginmanager.get_plugin(str(ROOT / "conftest.py"))


def test_the_dearest_files_are_there_and_are_begun_first(request):
    conftest = settings(request)
    assert all((ROOT / name).is_file() for name in conftest.DEAREST)
    names = ["tests/data/test_mad.py::test_a", f"{conftest.DEAREST[1]}::test_b", f"{conftest.DEAREST[0]}::test_c"]
    items = [SimpleNamespace(nodeid=name, get_closest_marker=lambda _: None) for name in names]
    conftest.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == names[::-1]


def test_each_part_has_a_line(request):
    reports = [
        SimpleNamespace(nodeid=name, duration=seconds)
        for name, seconds in (
            ("tests/book/test_site.py::test_a", 1.0),
            ("tests/book/test_site.py::test_a", 2.0),  # its call, after its fixtures
            ("tests/book/test_pdf.py::test_b", 4.0),
            ("book/notebooks/01_linear_attention.ipynb::Cell 1", 5.0),
            ("dn_lib/cost.py::dn_lib.cost", 1.0),
            ("tests/test_cost.py::test_c", 0.4),
        )
    ]
    lines: list[str] = []
    terminal = SimpleNamespace(stats={"passed": reports, "": [object()]}, section=lines.append, line=lines.append)
    settings(request).pytest_terminal_summary(terminal)
    assert [line.split() for line in lines[1:]] == [
        ["7", "s", "2", "tests", "tests/book"],
        ["5", "s", "1", "tests", "book/notebooks"],
        ["1", "s", "1", "tests", "doctests"],
        ["0", "s", "1", "tests", "tests"],
    ]
    lines.clear()
    terminal.stats = {"passed": reports[:3]}  # one part alone needs no table
    settings(request).pytest_terminal_summary(terminal)
    assert not lines
