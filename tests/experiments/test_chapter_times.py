"""Chapters are compared with what is stored of them."""

from __future__ import annotations

import pytest

from experiments.chapters import chapter_times as times


def test_chapters_are_compared_by_what_they_show():
    """Cells that may differ are left out; printed text and results of the others count."""
    pytest.importorskip("pybtex")  # the chapters' tools
    from nbformat import v4

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
