"""`make pdf` on a tiny book: numbers, references, long code, tables and solutions are right on paper too.

The LaTeX that Sphinx writes is tested everywhere; that it can be typeset, where LaTeX is installed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tools.lowering import Book
from tools.pdf import ALLOWED, complaints, main, missing, tex, typeset
from tools.pdf_pages import COLUMNS, SIZE
from tools.site import ROOT, fill_cache

BOOK = ROOT / "book"
HEAD = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

"""
CHAPTER = """# First

```{math}
:label: eq-first
x = 1
```

{eq}`eq-first`, {eq}`eq-A`, {eq}`eq-S2`, {ref}`the picture <fig-A-1>`,
{ref}`that of a study <fig-S2-1>`, {doc}`the appendix <appendix/A_more>`,
{cite}`widrow1960adaptive`, {cite}`arora2024zoology`.

````{exercise} Think (★, 5 min)
:label: ex-1-1

Show {eq}`eq-first`.
````

```{admonition} Hint
:class: dropdown
It is true.
```

| letter | in code | meaning |
|:--|:--|:--|
| $S$ | `a_name_that_is_long` | LONG |
| $T$ | `b` | short |

```{code-cell} ipython3
LINE
print("\\u0489 unknown, known: ○ ✓ β")
for row in range(3):
    print(row * 1000, "." * 110, row)
```
"""
EXTRA = """# {title}: More

```{{math}}
:label: eq-{letter}
z = 3
```

```{{code-cell}} ipython3
---
mystnb:
  image: {{alt: A line}}
  figure: {{caption: "A line.", name: fig-{letter}-1}}
---
import matplotlib.pyplot as plt
_ = plt.plot([0, 1])
```
"""
LONG = "a text that is much too long for one line of a table " * 4
LINE = "value = " + " + ".join(f"{n:04}.0" for n in range(1, 20)) + "  # END"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pdf") / "book"
    for name in ("solutions", "beyond", "appendix"):
        (folder / name).mkdir(parents=True)
    for name in ("conf.py", "print.md", "bibliography.md", "references.bib"):
        shutil.copy(BOOK / name, folder)
    conf = folder / "conf.py"
    conf.write_text(conf.read_text("utf-8").replace("Path(__file__).resolve().parent.parent", f"Path({str(ROOT)!r})"))
    chapter = HEAD + CHAPTER.replace("LONG", LONG).replace("LINE", LINE)
    (folder / "01_first.md").write_text(chapter, encoding="utf-8")
    for name, title, letter in (
        ("beyond/S1_way", "Study 1", "S1"),
        ("beyond/S2_side", "Study 2", "S2"),
        ("appendix/A_more", "Appendix A", "A"),
    ):
        (folder / f"{name}.md").write_text(HEAD + EXTRA.format(title=title, letter=letter), encoding="utf-8")
    (folder / "solutions" / "01_first.md").write_text(HEAD + "# Solutions\n\n## 1.1 Think\n\nIt is.\n")
    (folder / "notation.md").write_text("# Notation\n\nNone.\n")
    fill_cache(folder)
    return folder


@pytest.fixture(scope="module")
def written(sources) -> str:
    out = sources.parent / "out"
    tex(sources, out)
    return (out / "book.tex").read_text("utf-8")


def test_parts_of_the_book_stand_in_order(written):
    titles = re.findall(r"\\chapter\*?\{(.*?)\}", written)
    assert titles == ["About this book", "First", "More", "More", "More", "Notation", "Solutions", "Bibliography"]
    body = written[written.index(r"\begin{document}") :]
    order = [body.index(rf"\{mark}") for mark in ("chapter{First}", "studies", "chapter{More}", "appendix")]
    assert order == sorted(order)


def test_every_page_of_the_book_is_printed():
    globs = re.findall(r"(?m)^(\S*\*\S*|notation|bibliography)$", (BOOK / "print.md").read_text("utf-8"))
    found = {path for glob in globs for path in BOOK.glob(f"{glob}.md")}
    wanted = {*Book(BOOK).pages, *BOOK.glob("solutions/*.md"), BOOK / "notation.md", BOOK / "bibliography.md"}
    assert found == wanted


def test_code_is_broken_and_no_character_is_lost(written):
    code = written[written.index("0001.0") : written.index("END")]
    assert "0019.0" in re.sub(r"\\PYG\{\w+\}\{(.*?)\}", r"\1", code)
    assert r"□ unknown, known: ○ \(\checkmark\) β" in written.splitlines()
    assert "verbatimforcewraps=true" in written


def test_printed_tables_are_set_smaller_and_not_broken(written):
    sizes = re.findall(r"\\begingroup\\fvset\{fontsize=\\fontsize\{([\d.]+)\}", written)
    assert sizes == [f"{SIZE * COLUMNS / 117:.2f}"]


def test_wide_tables_have_columns_by_what_they_hold(written):
    (spec,) = re.findall(r"\\begin\{tabular\}\[t\]\{((?:\\X\{\d+\}\{\d+\})+)\}", written)
    widths = [int(width) for width, _ in re.findall(r"\{(\d+)\}\{(\d+)\}", spec)]
    assert widths[0] < widths[1] < widths[2]


def test_works_are_sorted_by_the_words_that_cite_them(written):
    labels = re.findall(r"\\bibitem\[(.*?)\]", written)
    assert len(labels) == 2 and "Widrow" in labels[1] and "Arora" in labels[0]
    assert re.search(r"\{\[\}\\hyperlink\{.*?\}\{Widrow", written)


def test_what_is_typeset(sources, tmp_path, capsys):
    if lacking := missing():
        pytest.skip(f"no LaTeX here: {', '.join(lacking)}")
    main(["--sources-dir", str(sources), "--out-dir", str(tmp_path)])
    assert re.search(r"\d+ pages in \d+ s\. Open  file://.*book\.pdf", capsys.readouterr().out)
    assert (tmp_path / "book.pdf").read_bytes().startswith(b"%PDF")
    labels = dict(re.findall(r"\\newlabel\{(.*?)\}\{\{(.*?)\}", (tmp_path / "book.aux").read_text("utf-8")))
    numbers = {name.rpartition(":")[2]: number for name, number in labels.items()}
    assert numbers["eq-first"].strip("{}") == "1.1"
    assert numbers["eq-A"].strip("{}") == numbers["fig-a-1"] == "A.1"
    assert numbers["eq-S2"].strip("{}") == numbers["fig-s2-1"] == "S2.1"
    pages = dict(re.findall(r"\\newlabel\{(.*?)\}\{\{.*?\}\{(\d+)\}", (tmp_path / "book.aux").read_text("utf-8")))
    assert int(pages["solution-1.1"]) > 3


def test_a_line_that_stands_out_and_a_lost_character_are_errors(tmp_path):
    if lacking := missing():
        pytest.skip(f"no LaTeX here: {', '.join(lacking)}")
    body = r"\noindent\hbox{\rule{2\linewidth}{1pt}} 㹆 \ref{nowhere}"
    (tmp_path / "book.tex").write_text(rf"\documentclass{{article}}\begin{{document}}{body}\end{{document}}", "utf-8")
    with pytest.raises(SystemExit, match=r"(?s)Overfull \\hbox.*Missing character.*nowhere|complains"):
        typeset(tmp_path)
    (tmp_path / "book.tex").write_text(r"\documentclass{article}\begin{document}\nonsense\end{document}", "utf-8")
    with pytest.raises(SystemExit, match=r"(?s)LaTeX stopped.*Undefined control sequence"):
        typeset(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        rf"Overfull \hbox ({ALLOWED + 0.1}pt too wide) in paragraph at lines 3--4",
        r"Overfull \vbox (20.0pt too high) detected at line 8",
        "Missing character: There is no x in font y!",
        "LaTeX Warning: Reference `a' on page 1 undefined on input line 3.",
        "LaTeX Warning: Label `a' multiply defined.",
    ],
)
def test_every_complaint_is_heard(line):
    assert complaints(f"before\n{line}\nafter") == [line]


def test_without_latex_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"(?s)latexmk.*xelatex.*apt-get install"):
        main(["--out-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_words_that_hold_together_get_the_room_that_they_need():
    """Sizes are joined by no-break spaces, and LaTeX gives a cell an equal share of the line unless it is told more."""
    from docutils import nodes

    from tools.pdf_pages import ROOM, columns, printed

    entry = nodes.entry("", nodes.paragraph("", "16\u00a0x\u00a02048 kernels", nodes.literal("", "chunk_scan")))
    joined, plain, code = printed(entry)
    assert joined == len("16 x 2048") + 1 and plain == len("kernels") + 1 and code > len("chunk_scan") + 1
    widths = columns([[30.0, 40, 40], [30, 40, 40]], [30.0, 8, 8])
    assert widths[0] >= 30 and round(sum(widths)) == ROOM
