"""The printed book as Sphinx sees it: an extension that book/conf.py loads under the tag `print` (tools/pdf.py).

The root is book/print.md instead of book/index.md.  Each exercise says on which page its solution stands, and a
study or an appendix has its number from LaTeX alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
from docutils import nodes
from matplotlib.ft2font import FT2Font
from PIL import Image
from sphinx.addnodes import tabular_col_spec
from sphinx.application import Sphinx
from sphinx.builders.latex.nodes import thebibliography
from sphinx.config import Config
from sphinx_exercise.nodes import exercise_enumerable_node

import dn_lib

STYLE = Path(__file__).with_name("pdf_style.tex")
FACE = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"  # as in STYLE
FULL = 877  # pixels of a figure of the book's width (dn_lib.teaching.plotting)
SHARE = 0.88  # of the text's width, for such a figure
COLUMNS, SIZE = 106, 8.8  # of code on a line, at this size in points (STYLE)
TITLE = r"""
\begin{titlepage}
\vspace*{5cm}
{\sffamily\bfseries\fontsize{34}{40}\selectfont %(title)s\par}
\vspace{8mm}
{\sffamily\LARGE An executable textbook\par}
\vfill
{\sffamily With \texttt{dn\_lib} %(version)s, the package that the chapters build and use.\par
\medskip Text: CC BY 4.0. Code: Apache-2.0.\par}
\end{titlepage}
"""


def settings(app: Sphinx, config: Config) -> None:
    """What of the configuration is different on paper."""
    own: dict[str, Any] = {
        "root_doc": "print",
        "exclude_patterns": [*config.exclude_patterns, "index.md"],
        "suppress_warnings": [*config.suppress_warnings, "toc.not_included"],  # pages that only the site has
        "html_static_path": [],
        "html_favicon": None,
        "latex_engine": "xelatex",
        "latex_documents": [("print", "book.tex", config.project, config.author, "manual")],
        "latex_use_xindy": False,
        "latex_domain_indices": False,
        "latex_elements": {
            "papersize": "a4paper",
            "pointsize": "10pt",
            "extraclassoptions": "openany,oneside",
            "fontpkg": "",
            "polyglossia": "",
            "babel": r"\usepackage[english]{babel}",
            "fncychap": "",
            "makeindex": "",
            "printindex": "",
            "tableofcontents": r"{\small\sphinxtableofcontents}",
            "figure_align": "H",  # where it is discussed
            "sphinxsetup": ",".join(
                [
                    "verbatimwithframe=false",
                    "verbatimforcewraps=true",
                    "VerbatimColor={RGB}{244,245,247}",
                    "verbatimsep=4pt",
                    "TitleColor={RGB}{20,40,70}",
                    "InnerLinkColor={RGB}{20,70,140}",
                    "OuterLinkColor={RGB}{20,70,140}",
                    "HeaderFamily=\\sffamily\\bfseries",
                ]
            ),
            "maketitle": TITLE % {"title": config.project, "version": dn_lib.__version__.replace("_", r"\_")},
            "preamble": STYLE.read_text(encoding="utf-8"),
        },
    }
    for name, value in own.items():
        setattr(config, name, value)


def latex(text: str) -> nodes.raw:
    return nodes.raw("", text, format="latex")


def name_solutions(app: Sphinx, doctree: nodes.document) -> None:
    """A page number at every exercise, and at every solution what it refers to."""
    for link in [p for p in doctree.findall(nodes.paragraph) if "solution-link" in p["classes"]]:
        link.parent.remove(link)
    for exercise in doctree.findall(exercise_enumerable_node):
        number = ".".join(exercise["label"].split("-")[1:])
        exercise += latex(rf"\solutionpage{{{number}}}")
    if app.env.docname.startswith("solutions/"):
        for section in doctree.findall(nodes.section):
            if number := re.match(r"(S?\d+\.\d+) ", section[0].astext()):
                section.insert(1, latex(rf"\label{{solution-{number[1]}}}"))


def drop_letters(app: Sphinx, doctree: nodes.document) -> None:
    """ "Appendix A: Measuring", "Study 1: Forgetting" -> "Measuring", "Forgetting": LaTeX puts the first part there."""
    if app.env.docname.startswith(("appendix/", "beyond/")):
        title = next(iter(doctree.findall(nodes.title)))
        text = next(iter(title.findall(nodes.Text)))
        text.parent.replace(text, nodes.Text(re.sub(r"^(Appendix [A-Z]|Study \d): ", "", text.astext())))


ROOM = 94  # characters of a line of a table, at 10 points
SMALLEST = r"\scriptsize"
ROOMS = {"": ROOM, r"\footnotesize": round(ROOM * 10 / 8), SMALLEST: round(ROOM * 10 / 7)}


def columns(lengths: list[list[float]], words: list[float], room: int = ROOM) -> list[float]:
    """Widths of a table's columns, all in characters, for cells of these `lengths` (row by row).

    A column has what its longest cell needs if there is room for that.  Otherwise each has room for its longest word,
    and what is left goes where it makes rows lower.

    >>> columns([[10, 20], [5, 4]], [10, 20])
    [10, 20]
    >>> widths = columns([[10, 100, 50], [10, 90, 20]], [10, 10, 10])
    >>> widths[0] < widths[2] < widths[1], round(sum(widths))
    (True, 94)
    """
    needs = [max(column) for column in zip(*lengths, strict=True)]
    if sum(needs) <= room:
        return needs
    widths = list(words) if sum(words) <= room else [min(word, room / len(words)) for word in words]

    def height(i: int) -> float:
        """Of all rows, if column i had one character more; a row is about as high as its highest cell."""
        trial = [width + (i == j) for j, width in enumerate(widths)]
        return sum(sum((cell / width) ** 4 for cell, width in zip(row, trial, strict=True)) ** 0.25 for row in lengths)

    while sum(widths) < room:
        best = min(range(len(widths)), key=height)
        widths[best] += min(1, room - sum(widths))
    return widths


def printed(cell: nodes.Element) -> list[float]:
    """About how many characters wide each piece of a table's cell is that cannot be broken.

    Of a formula, a command counts as one character, and braces not at all.
    """
    pieces: list[float] = []
    for node in cell.findall():
        if isinstance(node, nodes.math):
            pieces.append(1.1 * len(re.sub(r"[{}^_ ]", "", re.sub(r"\\[a-zA-Z]+ ?", "x", node.astext()))))
        elif isinstance(node, nodes.Text) and not isinstance(node.parent, nodes.math):
            letter = 1.15 if isinstance(node.parent, nodes.literal) else 1.0
            # Words that a no-break space joins are one.
            for word in re.split(r"[ \n]+", node.astext().strip(" \n")):
                pieces.append(letter * len(word) + sum(map(str.isupper, word)) / 2 + 1)
    return pieces or [0]


def fit_tables(app: Sphinx, doctree: nodes.document) -> None:
    """Columns of a table that is wider than the page are broken where that costs least; a long one goes on overleaf."""
    for table in list(doctree.findall(nodes.table)):
        rows = [[printed(cell) for cell in row.findall(nodes.entry)] for row in table.findall(nodes.row)]
        lengths = [[sum(cell) + 2 for cell in row] for row in rows]
        words = [max(max(cell) for cell in column) + 2 for column in zip(*rows, strict=True)]
        size, room = next((s, r) for s, r in ROOMS.items() if sum(words) <= r or s == SMALLEST)
        widths = columns(lengths, words, room)
        if len(rows) > 12:
            table["classes"].append("longtable")
        place = table.parent.index(table)
        # Without widths of ours LaTeX gives a cell at most an equal share of the line.
        if sum(max(column) for column in zip(*lengths, strict=True)) > room or max(words) > room / len(words):
            total = max(room, round(sum(widths)))
            spec = "".join(rf"\X{{{round(10 * width)}}}{{{10 * total}}}" for width in widths)
            table.parent.insert(place, tabular_col_spec(spec=spec))
        if size:
            table.parent.insert(place, latex(rf"\begingroup{size}"))
            table.parent.insert(table.parent.index(table) + 1, latex(r"\endgroup"))


def replace_unknown(app: Sphinx, doctree: nodes.document) -> None:
    """An untrained model prints any character; one that the typeface lacks becomes a box."""
    known = set(FT2Font(FACE).get_charmap()) | {ord("\n"), ord("\t")}
    for block in doctree.findall(nodes.literal_block):
        text = block.astext()
        if shown := "".join(c if ord(c) in known else "□" for c in text):
            block.rawsource = shown
            if shown != text:
                block.children = [nodes.Text(shown)]


def shrink_tables(app: Sphinx, doctree: nodes.document) -> None:
    """A table that code has printed is set smaller where its lines would be broken; code a little, prose not at all."""
    for block in list(doctree.findall(nodes.literal_block)):
        lines = block.astext().splitlines()
        longest = max(map(len, lines), default=0)
        most = 1.15 if "cell_input" in getattr(block.parent, "attributes", {}).get("classes", []) else 1.5
        if len(lines) > 2 and COLUMNS < longest <= most * COLUMNS:
            size = SIZE * COLUMNS / longest
            place = block.parent.index(block)
            begin = rf"\begingroup\fvset{{fontsize=\fontsize{{{size:.2f}}}{{{1.25 * size:.2f}}}\selectfont}}"
            block.parent[place : place + 1] = [latex(begin), block, latex(r"\endgroup")]


def size_figures(app: Sphinx, doctree: nodes.document) -> None:
    """Figures have one scale, so that what was drawn narrower stays so."""
    for image in doctree.findall(nodes.image):
        path = Path(app.srcdir, image["uri"])
        if path.suffix == ".png" and path.exists():
            with Image.open(path) as picture:
                share = picture.width / FULL
            # Animations have fewer pixels for the same width.
            image["width"] = f"{round(100 * SHARE * (share if share < 0.8 else 1))}%"


def sort_bibliography(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """By the words by which a work is cited: on paper it is looked up, and not clicked at."""
    for works in doctree.findall(thebibliography):
        works.children.sort(key=lambda work: next(work.findall(nodes.label)).astext().casefold())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", settings, priority=100)
    app.connect("doctree-read", name_solutions, priority=900)  # after book/conf.py has completed the exercises
    for change in (drop_letters, fit_tables, replace_unknown, shrink_tables, size_figures):
        app.connect("doctree-read", change, priority=900)
    app.connect("doctree-resolved", sort_bibliography)
    return {"parallel_read_safe": True}
