"""Tables of cells: the same numbers as Markdown and as text, and nothing in a cell is read as Markdown."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from dn_lib.teaching.tables import NOTHING, Table, Tables, as_markdown

HEAD = ("kernel", "of *all*", "ms")
ROWS = [("`chunk_scan_fwd`", "a_b | $c$", "0.250"), ("one [x]", "", "12.0"), ("", "<b>", "-")]
MARKDOWN = MarkdownIt("commonmark").enable("table")


def cells(text: str) -> list[list[str]]:
    """The cells of every row of a Markdown table, without markup, as they are rendered."""
    rows: list[list[str]] = []
    for token in MARKDOWN.parse(text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append("".join(child.content for child in token.children or []))
    return rows


def test_markdown_shows_each_cell_as_it_is():
    table = Table(HEAD, ROWS)
    # `$` is no markup of plain Markdown, and stays escaped for readers for whom it is.
    assert cells(table._repr_markdown_()) == [[cell.replace("`", "") for cell in line] for line in (HEAD, *ROWS)]
    tokens = [token for token in MARKDOWN.parse(table._repr_markdown_()) if token.type == "inline"]
    assert [c.content for token in tokens for c in token.children or [] if c.type == "code_inline"] == [
        "chunk_scan_fwd"
    ]
    assert not [
        c for token in tokens for c in token.children or [] if c.type not in {"text", "code_inline", "text_special"}
    ]


def test_numbers_are_aligned_to_the_right():
    table = Table(HEAD, ROWS)
    assert table._repr_markdown_().splitlines()[1] == "| :-- | :-- | --: |"
    first, *rest = str(table).splitlines()
    assert first.endswith("   ms") and all(len(line) == len(first) for line in rest)
    for number in ("3", "-1.5", "12%", "1024 B", "9e-08", "1e+09", "1,024", "-"):
        assert Table(("n",), [(number,)])._numbers() == [True]
    for word in ("1 x 2", "float16", "two", "21 shapes"):
        assert Table(("n",), [(word,)])._numbers() == [False]
    assert Table(("n",), [("",)])._numbers() == [False]


def test_notes_stand_below_and_an_empty_table_says_why():
    table = Table(("n",), [("1",)], notes=["of `one` run"])
    assert str(table).splitlines()[-1] == "of one run" and table._repr_markdown_().endswith("\n\nof `one` run")
    assert str(Table(("n",), [])) == Table(("n",), [])._repr_markdown_() == NOTHING
    assert str(Table(("n",), [], empty="none_ran")) == "none_ran"
    both = Tables(table, "and *this*")
    assert both._repr_markdown_() == table._repr_markdown_() + "\n\nand \\*this\\*"
    assert as_markdown("two\nlines") == "two lines"


def test_a_shape_is_not_broken_over_lines():
    cell = Table(("n",), [("12 x 3 x 4, by x",)])._repr_markdown_().splitlines()[-1]
    assert cell == "| 12\u00a0x\u00a03\u00a0x\u00a04, by x |"


@pytest.mark.parametrize(
    ("cell", "shown"),
    [("1e-04", "1e\u221204"), ("-1.5e-04", "\u22121.5e\u221204"), ("1e+04", "1e+04"), ("-", "-"), ("a-1", "a-1")],
)
def test_a_number_is_not_broken_at_its_minus(cell, shown):
    table = Table(("n",), [(cell,)])
    assert table._repr_markdown_().splitlines()[-1] == f"| {shown} |" and str(table).splitlines()[-1].strip() == cell


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="rows must have 2 cells as head has, got 1 in row 1"):
        Table(("a", "b"), [("1", "2"), ("3",)])
