"""Search results with an excerpt, and a link to the section that it is from.

Sphinx's own results fetch each page to quote from it, which a browser refuses at `file://`.  So the text of every
section is stored in `_static/excerpts_data.js`, which the search page alone loads, and `_static/excerpts.js` quotes
from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

# What is no text of a page: targets and comments, and alternatives for other builders.
SKIPPED = (nodes.comment, nodes.raw, nodes.title, nodes.system_message, addnodes.toctree, addnodes.index)


def words(node: nodes.Node) -> str:
    """The text of a section without its subsections, in one line."""
    if isinstance(node, nodes.Text):
        return node.astext()
    if isinstance(node, SKIPPED):
        return ""
    if isinstance(node, addnodes.desc_signature):
        return str(node.attributes.get("fullname", ""))
    inline = isinstance(node, nodes.TextElement)
    parts = [words(child) for child in node.children if not isinstance(child, nodes.section)]
    return ("" if inline else " ").join(part for part in parts if part)


def collect(app: Sphinx, doctree: nodes.document, page: str) -> None:
    if app.builder.format != "html":
        return
    sections = []
    for section in doctree.findall(nodes.section):
        title = next(iter(section.findall(nodes.title)), None)
        text = " ".join(words(section).split())
        sections.append([section["ids"][0], title.astext() if title is not None else "", text])
    for entry in doctree.findall(addnodes.desc):  # a function of the reference has an address of its own
        signature = next(iter(entry.findall(addnodes.desc_signature)))
        if signature["ids"]:
            sections.append([signature["ids"][0], signature["fullname"], " ".join(words(entry.children[-1]).split())])
    app.dn_excerpts[page] = sections  # type: ignore[attr-defined] - ours, kept on it


def on_search_page(app: Sphinx, page: str, template: str, context: Any, doctree: nodes.document | None) -> None:
    if page == "search":
        app.add_js_file("excerpts_data.js", loading_method="defer")
        app.add_js_file("excerpts.js", loading_method="defer")


def write(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        table = json.dumps(app.dn_excerpts, ensure_ascii=False, sort_keys=True)  # type: ignore[attr-defined] - ours, kept on it
        path = Path(app.outdir) / "_static" / "excerpts_data.js"
        path.write_text(f"window.DN_EXCERPTS = {table};\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.dn_excerpts = {}  # type: ignore[attr-defined] - ours, kept on it
    app.connect("doctree-resolved", collect, priority=400)
    app.connect("html-page-context", on_search_page)
    app.connect("build-finished", write)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
