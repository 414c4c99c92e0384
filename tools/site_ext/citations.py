"""Citations by author and year, [Yang et al. 2024a], with a letter where two works would look the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pybtex.database import Entry
from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style as Unsorted
from pybtex.style.labels import BaseLabelStyle
from sphinx.application import Sphinx

from tools.lowering import author_year


class Labels(BaseLabelStyle):
    """Authors and year as the notebooks have them, with a letter in the order of the bibliography."""

    def format_labels(self, sorted_entries: list[Entry]) -> Iterator[str]:
        plain = [author_year(entry) for entry in sorted_entries]
        total, seen = Counter(plain), Counter[str]()
        for label in plain:
            seen[label] += 1
            yield label + ("abcdefghijklmnopqrstuvwxyz"[seen[label] - 1] if total[label] > 1 else "")


class Style(Unsorted):
    """pybtex's plain style with these labels, in the order of authors and years."""

    default_label_style = Labels
    default_sorting_style = "author_year_title"


def plain_list(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Sphinx calls the bibliography a list, and its entries something that no list may hold: roles that say less."""
    if "body" in context:
        body = context["body"].replace('<div role="list" class="citation-list">', '<div class="citation-list">')
        context["body"] = body.replace(' role="doc-biblioentry"', "")


def setup(app: Sphinx) -> dict[str, Any]:
    register_plugin("pybtex.style.formatting", "book", Style)
    app.connect("html-page-context", plain_list)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
