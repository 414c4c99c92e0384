"""The landing page's times, which the chapters state, and what every page says of itself in its head."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from tools.lowering import Book, exercise_title


def times(chapter: Path) -> str:
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


def fill_in_times(app: Sphinx, docname: str, source: list[str]) -> None:
    """On the landing page, `{{ 01_name }}` stands for the times that the chapter or study of that name states."""
    if docname == "index":
        book = Book(Path(app.srcdir))
        lines = {chapter.stem: f"*{times(chapter)}*" for chapter in (*book.chapters, *book.studies)}
        source[0] = re.sub(r"\{\{ (\w+) \}\}", lambda match: lines[match[1]], source[0])


def title_and_describe(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """The landing page's heading is the site's name, which the title of every page ends with.

    A page that says nothing of itself to search engines is described by its first paragraph.
    """
    if pagename == "index":
        context["title"] = "An executable textbook"
    elif doctree is not None and 'name="description"' not in context.get("metatags", ""):
        paragraphs = (" ".join(paragraph.astext().split()) for paragraph in doctree.findall(nodes.paragraph))
        first = next((text for text in paragraphs if len(text) > 40), "").removeprefix("The question. ")
        text = first if len(first) <= 200 else f"{first[:200].rpartition(' ')[0]} …"
        context["metatags"] = context.get("metatags", "") + f'<meta name="description" content="{escape(text)}" />'


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", fill_in_times)
    app.connect("html-page-context", title_and_describe)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
