"""Previews on hover: what an equation, a figure, a term or a source is, beside the link that leads to it.

Four things are done here, and the rest by `_static/previews.js`.  Terms of the glossary get an address.  On every
other page the first mention of a term becomes a link to it.  Where a text names a figure or an exercise by its number,
the name becomes a link: chapters cannot write one that their notebooks would understand.  And when a page is written,
what can be previewed on it is collected, to be stored in `_static/previews_data.js`, a table from addresses to HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_id

GLOSSARY = ("notation", "sec-glossary")  # the page, and the label of its section
# Words that mean something else in most sentences: a link from the first of them would mislead.
ORDINARY = {"head", "kernel", "program", "prompt", "scan", "sector", "segment", "state", "token", "wave", "wrapper"}


def names(term: str) -> list[str]:
    """What a term of the glossary is called in a text.

    >>> names("Warp, warpgroup"), names("Streaming multiprocessor (SM)"), names("State")
    (['Warp', 'warpgroup'], ['Streaming multiprocessor', 'SM'], [])
    """
    found = [name.strip() for name in re.split(r"[,()]", term)]
    return [name for name in found if name and name.lower() not in ORDINARY]


def pattern(name: str) -> str:
    """A regular expression for a name: abbreviations as they are, words with either case at first, and a plural.

    >>> [bool(re.fullmatch(pattern("Unit key"), text)) for text in ("unit keys", "Unit key", "unit keyed")]
    [True, True, False]
    >>> bool(re.fullmatch(pattern("HBM"), "hbm"))
    False
    """
    if name[:2].isupper():  # an abbreviation, or a name that begins with one
        return rf"{re.escape(name)}s?"
    return rf"[{name[0].upper()}{name[0].lower()}]{re.escape(name[1:])}s?"


def glossary(doctree: nodes.document) -> Iterator[tuple[nodes.term, nodes.definition]]:
    """The terms of the glossary page, each with its definition."""
    for section in doctree.findall(nodes.section):
        if GLOSSARY[1] in section["ids"] or GLOSSARY[1] in section["names"]:
            for item in section.findall(nodes.definition_list_item):
                term, definition = item.children[0], item.children[-1]
                if isinstance(term, nodes.term) and isinstance(definition, nodes.definition):
                    yield term, definition


def give_terms_addresses(app: Sphinx, doctree: nodes.document) -> None:
    if app.env.docname != GLOSSARY[0]:
        return
    table: dict[str, Any] = {}
    for term, _ in glossary(doctree):
        address = make_id(app.env, doctree, "term", term.astext())
        term["ids"].append(address)
        table |= dict.fromkeys(names(term.astext()), address)
    app.env.dn_terms = table  # type: ignore[attr-defined] - ours, kept on it


def link_terms(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """The first mention of each term in a paragraph of `page`, outside links and emphasis, leads to the glossary."""
    table: dict[str, str] = getattr(app.env, "dn_terms", {})
    if app.builder.format != "html" or not table or page in {"index", GLOSSARY[0], "bibliography"}:
        return
    left = dict(table)
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.paragraph) or not left:
            continue
        if isinstance(text.parent.parent, nodes.caption | nodes.legend | nodes.entry):
            continue
        longest = sorted(left, key=len, reverse=True)
        words = re.compile(r"(?<![\w-])(?:" + "|".join(f"({pattern(name)})" for name in longest) + r")(?![\w-])")
        pieces: list[nodes.Node] = []
        start = 0
        for match in words.finditer(text.astext()):
            name = longest[next(i for i, group in enumerate(match.groups()) if group)]
            if name not in left:
                continue
            address = left[name]
            left = {other: where for other, where in left.items() if where != address}
            link = nodes.reference("", match[0], internal=True, classes=["dn-term"])
            link["refuri"] = f"{app.builder.get_relative_uri(page, GLOSSARY[0])}#{address}"
            pieces += [nodes.Text(text.astext()[start : match.start()]), link]
            start = match.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(text.astext()[start:])])


NUMBERED = re.compile(r"\b([Ff]igure|[Ee]xercise) (\d|S\d|[A-Z])\.(\d+)(?!\d|\.\d)")


def link_numbers(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """`Figure 2.4` and `exercise 3.1` in a paragraph or a caption of `page` lead there, if there is such a thing."""
    if app.builder.format != "html":
        return
    labels = app.env.domains.standard_domain.anonlabels
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.paragraph | nodes.caption | nodes.emphasis):
            continue
        pieces: list[nodes.Node] = []
        start = 0
        for match in NUMBERED.finditer(text.astext()):
            prefix = "fig" if match[1].lower() == "figure" else "ex"
            target = labels.get(f"{prefix}-{match[2].lower()}-{match[3]}") or labels.get(
                f"{prefix}-{match[2]}-{match[3]}"
            )
            if target is None:
                continue
            link = nodes.reference("", match[0], internal=True)
            link["refuri"] = f"{app.builder.get_relative_uri(page, target[0])}#{target[1]}"
            pieces += [nodes.Text(text.astext()[start : match.start()]), link]
            start = match.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(text.astext()[start:])])


def html(app: Sphinx, node: nodes.Node) -> str:
    """`node` as HTML, its links made plain text: addresses would be those of another page."""
    copy = node.deepcopy()
    for link in list(copy.findall(nodes.reference)):
        link.replace_self(nodes.inline("", "", *link.children))
    return str(app.builder.render_partial(copy)["fragment"]).strip()  # type: ignore[attr-defined] - the HTML builder has it


def picture(app: Sphinx, image: nodes.image) -> str:
    """The address of an image from the site's root, or "" for one that the builder does not know."""
    wanted = [image["uri"], *image.get("candidates", {}).values()]
    known = [app.env.images[uri][1] for uri in wanted if uri in app.env.images]
    return f"_images/{known[0]}" if known else ""


def collect(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Everything on `page` that a link may lead to and that fits a small box, into the table."""
    if app.builder.format != "html":
        return
    table: dict[str, str] = app.dn_previews  # type: ignore[attr-defined] - ours, kept on it
    where = app.builder.get_target_uri(page)
    for equation in doctree.findall(nodes.math_block):
        for address in equation.get("ids", []):
            number = equation.get("number")
            label = equation.get("label")
            if label and number is None:
                continue
            body = nodes.math_block("", equation.astext(), nowrap=False, number=None)
            table[f"{where}#{address}"] = html(app, body)
    for figure in doctree.findall(nodes.figure):
        images = [picture(app, image) for image in figure.findall(nodes.image)]
        caption = next(iter(figure.findall(nodes.caption)), None)
        if images and images[0] and caption is not None:
            text = html(app, nodes.paragraph("", "", *(child.deepcopy() for child in caption.children)))
            for address in figure["ids"]:
                table[f"{where}#{address}"] = f'<img src="{images[0]}" alt="">{text}'
    if page == GLOSSARY[0]:
        for term, definition in glossary(doctree):
            name = html(app, nodes.strong("", "", *(child.deepcopy() for child in term.children)))
            text = "".join(html(app, child) for child in definition.children)
            table |= {f"{where}#{address}": f"<p>{name}</p>{text}" for address in term["ids"]}
    for source in doctree.findall(nodes.citation):
        body = "".join(html(app, child) for child in source.children if not isinstance(child, nodes.label))
        table |= {f"{where}#{address}": body for address in source["ids"]}


def write(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        table = json.dumps(app.dn_previews, ensure_ascii=False, sort_keys=True)  # type: ignore[attr-defined] - ours, kept on it
        path = Path(app.outdir) / "_static" / "previews_data.js"
        path.write_text(f"window.DN_PREVIEWS = {table};\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.dn_previews = {}  # type: ignore[attr-defined] - ours, kept on it
    app.add_js_file("previews.js", loading_method="defer")
    app.connect("doctree-read", give_terms_addresses)
    app.connect("doctree-resolved", link_terms)
    app.connect("doctree-resolved", link_numbers)
    app.connect("doctree-resolved", collect, priority=600)
    app.connect("build-finished", write)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
