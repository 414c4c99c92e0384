"""`tools.lowering`: MyST in, plain Markdown out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.lowering import Book, equation_labels, lower, prose
from tools.project import ROOT, address

HEAD = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

"""
BIBLIOGRAPHY = """
@misc{one, author = {Van Loan, Ada and Roe, Bo and Poe, Cy}, title = {First}, year = {2020}}
@misc{two, author = {Van Loan, Ada and Zoe, Di and Poe, Cy}, title = {Second}, year = {2020}}
@misc{three, author = {Solo, Han}, title = {Third}, year = {1977}}
"""


@pytest.fixture
def cells(tmp_path):
    """Lower the chapter 02_second.md with the given text; chapter 1 and a solutions page stand beside it."""

    def lowered(text):
        (tmp_path / "references.bib").write_text(BIBLIOGRAPHY)
        first = "# First\n\n(sec-first)=\n## A\n\n```{math}\n:label: eq-first\nx\n```\n"
        (tmp_path / "01_first.md").write_text(HEAD + first)
        (tmp_path / "solutions").mkdir(exist_ok=True)
        (tmp_path / "solutions" / "02_second.md").write_text("# Solutions\n")
        (tmp_path / "02_second.md").write_text(HEAD + text, encoding="utf-8")
        return lower(tmp_path / "02_second.md", Book(tmp_path)).cells

    return lowered


@pytest.fixture
def markdown(cells):
    return lambda text: cells(text)[0].source


def test_plain_markdown_and_code_pass_unchanged(markdown):
    text = "# 2. Title\n\nText $a_1$, `{eq}`, `` a {eq}`x` `` and\n\n$$\nx = \\frac12\n$$\n"
    text += "\n```python\n({not}`a role`)\n(sec-x)=\n\n\nx\n```"
    assert markdown(text.replace("2. ", "")) == text  # but for the title, which gets the chapter's number


def test_math_gets_the_number_of_its_chapter(markdown):
    text = "```{math}\n:label: eq-a\n\na = b\n```\n\n```{math}\nno = number\n```\n\n```{math}\n:label: eq-b\nc\n```"
    assert markdown(text + "\n\nSee {eq}`eq-b` and {eq}`eq-first`.") == (
        "$$\na = b\n\\tag{2.1}\n$$\n\n$$\nno = number\n$$\n\n$$\nc\n\\tag{2.2}\n$$\n\nSee (2.2) and (1.1)."
    )


def test_math_on_several_lines_is_aligned_as_on_the_site(markdown):
    body = "a &= b \\\\\nc &= d"
    assert f"\\begin{{split}}\n{body}\n\\end{{split}}" in markdown(f"```{{math}}\n{body}\n```")
    own = "\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}"
    assert markdown(f"```{{math}}\n{own}\n```") == f"$$\n{own}\n$$"


def test_exercise_with_a_folded_hint(markdown):
    text = (
        "````{exercise} Write $x$ (★★, 10 min)\n:label: ex-2-1\n\nDo it.\n\n"
        "```{admonition} Hint\n:class: dropdown\nLook at $x$.\n```\n````\n\n{ref}`ex-2-1`"
    )
    assert markdown(text) == (
        "**Exercise 2.1.** Write $x$ (★★, 10 minutes)\n\nDo it.\n\n"
        "<details><summary>Hint</summary>\n\nLook at $x$.\n\n</details>\n\nExercise 2.1"
    )


def test_admonitions_become_quotations_with_displays_on_one_line(markdown):
    assert markdown("```{note}\nText\n\n$$\na\n= b\n$$\n```") == "> **Note**\n>\n> Text\n>\n> $$ a = b $$"
    assert markdown("```{admonition} An *aside*\nText\n```") == "> **An *aside***\n>\n> Text"


def test_citations_and_their_list(cells):
    lowered = cells("{cite}`one` and {cite}`three,two`.")
    assert lowered[0].source == "[Van Loan et al. 2020a] and [Solo 1977; Van Loan et al. 2020b]."
    references = lowered[-1].source.splitlines()
    assert references[:2] == ["## References", ""]
    assert [line.split("]")[0] for line in references[2:]] == [
        "- [Van Loan et al. 2020a", "- [Solo 1977", "- [Van Loan et al. 2020b",
    ]  # fmt: skip
    assert "Han Solo. Third. 1977." in references[3]


def test_citations_in_directives_and_captions_are_listed_too(cells):
    text = "```{note}\nAs in {cite}`three`.\n```\n\n"
    text += (
        "```{code-cell} ipython3\n---\nmystnb:\n  figure: {caption: 'See {cite}`one`.', name: fig-2-1}\n---\n1\n```\n"
    )
    lowered = cells(text)
    assert "[Solo 1977]" in lowered[0].source and "[Van Loan et al. 2020]" in lowered[3].source
    assert len(lowered[-1].source.splitlines()) == 4


def test_references_to_sections_pages_and_figures(markdown):
    text = "(sec-here)=\n## Here\n\n{ref}`here <sec-here>`, {ref}`there <sec-first>`, {ref}`picture <fig-2-1>`"
    assert markdown(text) == "## Here\n\nhere, [there](01_first.ipynb), picture"
    text = "{doc}`first <01_first>`, {doc}`the\nsolutions <solutions/02_second>`"
    assert markdown(text) == "[first](01_first.ipynb), [the\nsolutions](../solutions/02_second.md)"


def test_code_cells_keep_tags_and_figures_get_alt_and_caption(cells):
    text = (
        "```{code-cell} ipython3\n---\nmystnb:\n  image: {alt: What is seen}\n"
        '  figure: {caption: "As in {eq}`eq-first`: so.", name: fig-2-1}\ntags: [nbval-ignore-output]\n---\n'
        "# a time\nprint(1)\n```\n"
    )
    _, code, caption = cells(text)
    assert code.source == "# a time\nprint(1)"
    assert code.metadata == {"tags": ["nbval-ignore-output"], "alt": "What is seen"}
    assert caption.source == "*Figure 2.1.* As in (1.1): so."


def test_lowering_is_deterministic_and_ids_count_up(cells):
    text = "# A\n\n```{code-cell} ipython3\n1\n```\n\nB {cite}`one`\n"
    once = cells(text)
    assert once == cells(text)
    assert [cell.id for cell in once] == [f"cell-{n:03d}" for n in range(1, 6)]


def test_the_first_code_cell_fetches_the_package_where_it_is_missing(cells, tmp_path):
    """As in a notebook opened with nothing installed: here pip only writes down what it was asked for."""
    title, install, first = cells("# A\n\n```{code-cell} ipython3\nimport dn_lib\n```\n")
    assert (title.source, first.source) == ("# 2. A", "import dn_lib")
    asked = tmp_path / "asked"
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "import importlib.util\n"
        "shell = InteractiveShell.instance()\n"
        f"shell.register_magic_function(lambda line: open({str(asked)!r}, 'a').write(line), magic_name='pip')\n"
        "found = importlib.util.find_spec\n"
        f"shell.run_cell({install.source!r}).raise_error()\n"
        "importlib.util.find_spec = lambda name: None if name == 'dn_lib' else found(name)\n"
        f"shell.run_cell({install.source!r}).raise_error()\n"
    )
    environment = os.environ | {"IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    package = f"dn-lib @ git+{address()}" if address() else "dn-lib"
    assert asked.read_text() == f'install --quiet "{package}"'  # once: the first time the package was there


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```{figure} x.png\n```", r"the directive \{figure\} is not one of"),
        ("{numref}`fig-2-1`", r"the role \{numref\} is not one of"),
        ("{eq}`eq-none`", "names no labelled equation"),
        ("{cite}`nobody2020`", "is not in references.bib"),
        ("{ref}`x <sec-none>`", "names no label of the book"),
        ("{ref}`sec-first`", "needs a text"),
        ("{doc}`x <99_none>`", "names no page of the book"),
        ("```{exercise} Title\n```", "needs :label: ex-N-M"),
        ("```{exercise} Title\n:label: ex-2-1\n```", "needs its stars and minutes"),
        ("```{math}\n:label: eq-first\nx\n```\n{eq}`eq-first`", "is used twice in the book"),
    ],
)
def test_what_the_book_does_not_know_is_named(cells, text, message):
    with pytest.raises(ValueError, match=rf"02_second.md: .*{message}"):
        cells(text)


def test_no_chapters(tmp_path):
    with pytest.raises(ValueError, match="must hold chapters"):
        Book(tmp_path)


def test_labels_inside_other_directives_count(markdown):
    text = "````{exercise} T (★, 5 min)\n:label: ex-2-1\n```{math}\n:label: eq-in\nx\n```\n````\n"
    text += "\n```{math}\n:label: eq-b\ny\n```"
    assert equation_labels(text) == ["eq-in", "eq-b"]
    assert "\\tag{2.1}" in markdown(text)


def test_prose_leaves_out_code_but_not_roles():
    assert prose("a `code` {eq}`x` ``{ref}`y` ``\n\n```\nfence\n```\nend") == "a  {eq}`x` \n\nend"


@pytest.mark.parametrize(("name", "number"), [("beyond/S2_side", "S2"), ("appendix/A_more", "A")])
def test_other_pages_have_numbers_of_their_own_and_are_linked_both_ways(tmp_path, name, number):
    """Links of a pair go to the pair beside it; a target that begins with a slash is counted from the book's folder."""
    (tmp_path / name).parent.mkdir()
    stem = Path(name).name
    equation = "```{math}\n:label: eq-extra\nx\n```"
    exercise = f"```{{exercise}} ★ Try (5 min)\n:label: ex-{number}-1\nDo.\n```"
    figure = f"```{{code-cell}}\n---\nmystnb:\n  figure: {{caption: A line., name: fig-{number}-1}}\n---\nx\n```"
    first = f"# First\n\n{{eq}}`eq-extra`, {{ref}}`there <sec-extra>`, {{doc}}`all <{name}>`, {{ref}}`ex-{number}-1`"
    links = "{doc}`back </01_first>`, {doc}`notation </notation>`"
    more = f"(sec-extra)=\n# More\n\n{equation}\n\n{links}\n\n{exercise}\n\n{figure}"
    (tmp_path / "01_first.md").write_text(HEAD + first)
    (tmp_path / "notation.md").write_text("# Notation")
    (tmp_path / f"{name}.md").write_text(HEAD + more)
    book = Book(tmp_path)
    assert [path.stem for path in book.pages] == ["01_first", stem] and len(book.chapters) == 1
    chapter, extra = (lower(path, book).cells for path in book.pages)
    assert chapter[0].source.endswith(f"({number}.1), [there]({stem}.ipynb), [all]({stem}.ipynb), Exercise {number}.1")
    assert extra[0].source.startswith("# More") and f"\\tag{{{number}.1}}" in extra[0].source
    assert "[back](01_first.ipynb), [notation](../notation.md)" in extra[0].source
    assert f"**Exercise {number}.1.** Try (★, 5 minutes)" in extra[0].source
    assert extra[-1].source == f"*Figure {number}.1.* A line."
