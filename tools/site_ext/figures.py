"""Figures on paper and on a phone.

An animation is printed as the frame that is just shown.  So each gets a second picture, its still (`plotting.still`),
as the class `dn-still` beside the class `dn-moving`; book.css shows the one or the other.  And each picture stands in a
box, `dn-picture`, which scrolls sideways where a screen is too narrow for the picture's letters; figures.js adds a
button that shows the whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from dn_lib.teaching import plotting


def add_stills(app: Sphinx, doctree: nodes.document) -> None:
    """Behind each image that moves, another that does not; its file lies beside the first, NAME_still.png."""
    for moving in list(doctree.findall(nodes.image)):
        path = Path(app.env.relfn2path(moving["uri"], app.env.docname)[1])
        if path.suffix != ".png" or not path.exists():
            continue
        picture = plotting.still(path.read_bytes())
        if picture is None:
            continue
        path.with_name(f"{path.stem}_still.png").write_bytes(picture)
        still = moving.deepcopy()
        still["uri"] = moving["uri"].removesuffix(".png") + "_still.png"
        still["alt"] = f"The stages in one picture. {moving.get('alt', '')}".strip()
        moving["classes"].append("dn-moving")
        still["classes"].append("dn-still")
        moving.parent.insert(moving.parent.index(moving) + 1, still)


def box_pictures(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """In HTML, a box around the pictures of each figure; elsewhere, where nothing moves anyhow, no second picture."""
    if app.builder.format != "html":
        for still in [image for image in doctree.findall(nodes.image) if "dn-still" in image["classes"]]:
            still.parent.remove(still)
        return
    for figure in doctree.findall(nodes.figure):
        pictures = [child for child in figure.children if isinstance(child, nodes.image)]
        if pictures:
            box = nodes.container("", *(picture.deepcopy() for picture in pictures), classes=["dn-picture"])
            figure.children = [child for child in figure.children if child not in pictures]
            figure.insert(0, box)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_js_file("figures.js", loading_method="defer")
    app.connect("doctree-read", add_stills, priority=400)  # before Sphinx collects the images
    app.connect("doctree-resolved", box_pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
