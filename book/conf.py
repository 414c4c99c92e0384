"""Sphinx configuration of the book's site; `make book` builds it."""

import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx_exercise.nodes import exercise_enumerable_node, exercise_subtitle

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.lowering import Book, exercise_title

project = "DeltaNet, step by step"
author = ""
language = "en_GB"

extensions = [
    "myst_nb",
    "sphinx_exercise",
    "sphinxcontrib.bibtex",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "notebooks", "results", ".jupyter_cache", "**/.ipynb_checkpoints"]

# Chapters are executed beforehand, two at a time, into this cache (tools/site.py).
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / ".jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True
nb_ipywidgets_js = {}  # no widgets, and nothing to load from elsewhere

myst_enable_extensions = ["deflist", "dollarmath"]
# Everything is numbered within its chapter: equation (2.3), figure 2.1, exercise 2.4.
numfig = True
numfig_secnum_depth = 1
numfig_format = {"figure": "Figure %s"}
math_numfig = True
math_eqref_format = "({number})"

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
bibtex_reference_style = "author_year"

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_theme_options = {
    "extra_footer": "Text: CC BY 4.0. Code: Apache-2.0.",
    "navbar_persistent": [],
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system has it
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False


def fold_hints(app, doctree):
    """An admonition of the class `dropdown` is closed until it is clicked."""
    for admonition in doctree.findall(nodes.admonition):
        if "dropdown" in admonition["classes"]:
            admonition["collapsible"] = "closed"


def complete_exercises(app, doctree):
    """Stars and minutes in one form in every title, and below each exercise a link to its solution's page."""
    solutions = f"solutions/{app.env.docname}"
    for exercise in doctree.findall(exercise_enumerable_node):
        (subtitle,) = exercise.findall(exercise_subtitle)
        title, stars, minutes = exercise_title(subtitle.astext())
        subtitle.children = [nodes.Text(f"{title}, {'★' * stars}, {minutes} minutes")]
        if solutions in app.env.found_docs:
            options = {"refdomain": "std", "reftype": "doc", "refdoc": app.env.docname, "refexplicit": True}
            link = pending_xref("", nodes.inline("", "Solution"), reftarget=f"/{solutions}", refwarn=True, **options)
            exercise += nodes.paragraph("", "", link, classes=["solution-link"])


def letter_appendices(app, env):
    """Equations and figures of an appendix are numbered by its letter, (A.1), as those of a chapter by its number."""
    lettered = [name for name in env.toc_fignumbers if name.startswith("appendix/")]
    for name in lettered:
        letter = Path(name).name.partition("_")[0]
        for numbers in env.toc_fignumbers[name].values():
            # Without a chapter's number Sphinx goes on counting from page to page: each appendix begins anew.
            for position, (target, number) in enumerate(sorted(numbers.items(), key=lambda item: item[1]), 1):
                if number[0] != letter:
                    numbers[target] = (letter, position)
    return lettered


def times(chapter):
    """How long a chapter takes, in one line: reading and running as its opening says, its exercises added up."""
    text = chapter.read_text(encoding="utf-8")
    opening = " ".join(text.partition("\n(sec-")[0].split())
    minutes = [exercise_title(line)[2] for line in re.findall(r"(?m)^`{3,}\{exercise\} (.*)", text)]
    parts = []
    if found := re.search(r"main line takes about (\d+) minutes( to read)?, and about (\d+) more with", opening):
        parts.append(f"{found[1]} minutes to read, {int(found[1]) + int(found[3])} with its code")
    elif found := re.search(r"Reading takes about ([\w ]+) with its code", opening):
        parts.append(f"{found[1]} to read with its code")
    if minutes:
        parts.append(f"{len(minutes)} exercises, {sum(minutes) // 60} h {sum(minutes) % 60:02d}")
    if found := re.search(r"[Rr]uns in ((?:about|under|less than)? ?[\w ]+?) on two CPU cores", opening):
        parts.append(f"runs in {found[1].strip()}")
    return " · ".join(parts)


def fill_in_times(app, docname, source):
    """On the landing page, `{{ 01_name }}` stands for the times that the chapter of that name states."""
    if docname == "index":
        lines = {chapter.stem: f"*{times(chapter)}*" for chapter in Book(app.srcdir).chapters}
        source[0] = re.sub(r"\{\{ (\w+) \}\}", lambda match: lines[match[1]], source[0])


def title_landing_page(app, pagename, templatename, context, doctree):
    """The landing page's heading is the site's name, which the title of every page ends with."""
    if pagename == "index":
        context["title"] = "An executable textbook"


def setup(app):
    app.connect("html-page-context", title_landing_page)
    app.connect("source-read", fill_in_times)
    app.connect("env-get-updated", letter_appendices, priority=900)  # after Sphinx has numbered what it can
    app.connect("doctree-read", fold_hints)
    app.connect("doctree-read", complete_exercises)
