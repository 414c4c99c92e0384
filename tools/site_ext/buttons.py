"""From a page to running it: its notebook to download, and Colab, Binder and the repository if there is an address.

The address is `repository` in `[tool.dn-lib]` of pyproject.toml, the same that a built package names.  While it is
empty, only the download is offered.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from tools.project import address

GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+)")


def launchers(repository: str, notebook: str) -> list[tuple[str, str, str]]:
    """What can be done with `book/notebooks/NOTEBOOK` elsewhere: (text, address, what it does).

    >>> [url for _, url, _ in launchers("https://github.com/owner/name", "01_a.ipynb")]
    ['https://colab.research.google.com/github/owner/name/blob/main/book/notebooks/01_a.ipynb',
     'https://mybinder.org/v2/gh/owner/name/main?urlpath=lab/tree/book/notebooks/01_a.ipynb',
     'https://github.com/owner/name/blob/main/book/notebooks/01_a.ipynb']
    >>> launchers("", "01_a.ipynb")
    []
    """
    path = f"book/notebooks/{notebook}"
    found = []
    if match := GITHUB.fullmatch(repository):
        colab = f"https://colab.research.google.com/github/{match[1]}/blob/main/{path}"
        binder = f"https://mybinder.org/v2/gh/{match[1]}/main?urlpath=lab/tree/{path}"
        found += [("Colab", colab, "Run this page on Google Colab"), ("Binder", binder, "Run this page on Binder")]
    if repository:
        found.append(("Source", f"{repository}/blob/main/{path}", "This page in the repository"))
    return found


def link(url: str, text: str, tooltip: str, icon: str) -> dict[str, str]:
    return {"type": "link", "url": url, "text": text, "tooltip": tooltip, "icon": icon, "label": f"dn-{text.lower()}"}


def add(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """The theme shows what is in `header_buttons`, at the top right of every page."""
    buttons = context.get("header_buttons")
    if buttons is None:
        return
    notebook = f"{page.rpartition('/')[2]}.ipynb"
    offered = []
    if page in app.dn_notebooks:  # type: ignore[attr-defined] - ours, kept on it
        url = context["pathto"](f"notebooks/{notebook}", 1)
        offered.append(link(url, "Notebook", "Download this page as a notebook, with its results", "fas fa-download"))
        for text, url, tooltip in launchers(app.config.dn_repository, notebook):
            offered.append(link(url, text, tooltip, "fas fa-code" if text == "Source" else "fas fa-rocket"))
    elif app.config.dn_repository:
        offered.append(link(app.config.dn_repository, "Source", "The repository of this book", "fas fa-code"))
    buttons[:0] = offered


def find(app: Sphinx) -> None:
    """Which pages have a notebook: those with a pair of the same name."""
    pairs = {path.stem for path in Path(app.srcdir).glob("notebooks/*.ipynb")}
    pages = {page for page in app.project.docnames if not page.startswith("solutions/")}
    app.dn_notebooks = {page for page in pages if page.rpartition("/")[2] in pairs}  # type: ignore[attr-defined] - ours, kept on it
    if app.builder.format == "html":
        for page in app.dn_notebooks:  # type: ignore[attr-defined] - ours, kept on it
            name = f"{page.rpartition('/')[2]}.ipynb"
            (Path(app.outdir) / "notebooks").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(app.srcdir) / "notebooks" / name, Path(app.outdir) / "notebooks" / name)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("dn_repository", address(), "html", str)
    app.connect("env-before-read-docs", lambda app, env, names: find(app))
    app.connect("html-page-context", add, priority=900)  # after the theme has put its own there
    app.add_js_file("copy.js", loading_method="defer")
    app.add_js_file("pages.js", loading_method="defer")
    return {"parallel_read_safe": False, "parallel_write_safe": False}
