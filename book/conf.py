"""Sphinx configuration of the book's site; `make book` builds it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `tools`

project = "DeltaNet, step by step"
author = ""
# Sphinx's catalogue of British English lacks the plurals that its search needs to say how much it has found.
language = "en_GB" if tags.has("print") else "en"  # noqa: F821 - Sphinx defines `tags`

extensions = [
    "myst_nb",
    "sphinx_exercise",
    "sphinxcontrib.bibtex",
    "sphinx-mathjax-offline",
    # Our own: each says at its top what it does.
    "tools.site_ext.buttons",
    "tools.site_ext.citations",
    "tools.site_ext.excerpts",
    "tools.site_ext.exercises",
    "tools.site_ext.figures",
    "tools.site_ext.landing",
    "tools.site_ext.previews",
    "tools.site_ext.reference",
    "tools.site_ext.results",
]
exclude_patterns = ["_build", "notebooks", "results", ".jupyter_cache", "**/.ipynb_checkpoints"]

# On paper the book begins with another page and has settings of its own: tools/pdf_pages.py.
if tags.has("print"):  # noqa: F821 - Sphinx defines `tags`
    extensions.append("tools.pdf_pages")
else:
    exclude_patterns.append("print.md")

# Chapters are executed beforehand, two at a time, into this cache (tools/site.py).
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / ".jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True
nb_ipywidgets_js = {}  # no widgets, and nothing to load from elsewhere

myst_enable_extensions = ["deflist", "dollarmath"]
# Everything is numbered within its chapter: equation (2.3), figure 2.1, exercise 2.4. See `letter_pages` for the rest.
numfig = True
numfig_secnum_depth = 1
numfig_format = {"figure": "Figure %s"}
math_numfig = True
math_eqref_format = "({number})"

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "book"  # of tools/site_ext/citations.py
bibtex_reference_style = "label"

html_theme = "sphinx_book_theme"
html_title = project
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["book.css", "pages.css"]
html_show_search_summary = False  # our own, which need not fetch pages (tools/site_ext/excerpts.py)
html_theme_options = {
    "logo": {
        "text": project,
        "image_light": "_static/favicon.svg",
        "image_dark": "_static/favicon.svg",
        "alt_text": "",
    },
    "extra_footer": "Text: CC BY 4.0. Code: Apache-2.0.",
    "navbar_persistent": [],
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
# A formula is no stop of the tab key: a chapter has hundreds between one hint and the next.
mathjax4_config = {"options": {"menuOptions": {"settings": {"inTabOrder": False}}}}
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system has it
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False


def letter_pages(app, env):
    """Equations, figures and exercises of a study are numbered (S1.1), those of an appendix (A.1)."""
    lettered = [name for name in env.toc_fignumbers if name.startswith(("beyond/", "appendix/"))]
    for name in lettered:
        letter = Path(name).name.partition("_")[0]
        for numbers in env.toc_fignumbers[name].values():
            # Without a chapter's number Sphinx goes on counting from page to page: each page begins anew.
            for position, (target, number) in enumerate(sorted(numbers.items(), key=lambda item: item[1]), 1):
                if number[0] != letter:
                    numbers[target] = (letter, position)
    return lettered


def setup(app):
    app.connect("env-get-updated", letter_pages, priority=900)  # after Sphinx has numbered what it can
