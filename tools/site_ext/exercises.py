"""Exercises: one form of title, folded hints, and a link to the solution, which stands behind the hint.

A reader who looks for a hint should not meet the solution on the way.  So its link is the last line of the hint, and
leads to this exercise's section on the page of solutions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx_exercise.nodes import exercise_enumerable_node, exercise_subtitle

from tools.lowering import exercise_title


def fold_hints(app: Sphinx, doctree: nodes.document) -> None:
    """An admonition of the class `dropdown` is closed until it is clicked."""
    for admonition in doctree.findall(nodes.admonition):
        if "dropdown" in admonition["classes"]:
            admonition["collapsible"] = "closed"


def is_hint(node: nodes.Node) -> bool:
    return isinstance(node, nodes.admonition) and node.children[0].astext().startswith("Hint")


def last_hint(exercise: nodes.Element) -> nodes.Element:
    """The last of the hints inside an exercise or right below it; the exercise itself where there is none."""
    found = [node for node in exercise.findall(nodes.admonition) if is_hint(node)]
    siblings = exercise.parent.children
    for node in siblings[siblings.index(exercise) + 1 :]:
        if not is_hint(node):
            break
        found.append(node)  # type: ignore[arg-type] - Sphinx's types are looser
    return found[-1] if found else exercise


def solution_label(number: str) -> str:
    """The label of the section that solves an exercise.

    >>> solution_label("2.3")
    'solution-2-3'
    """
    return "solution-" + number.replace(".", "-")


def complete(app: Sphinx, doctree: nodes.document) -> None:
    """Stars and minutes in one form in every title, and a link to the solution."""
    page = f"solutions/{app.env.docname.rpartition('/')[2]}"
    path = Path(app.srcdir) / f"{page}.md"
    text = path.read_text(encoding="utf-8") if page in app.env.found_docs else ""
    for exercise in list(doctree.findall(exercise_enumerable_node)):
        (subtitle,) = exercise.findall(exercise_subtitle)
        title, stars, minutes = exercise_title(subtitle.astext())
        subtitle.children = [nodes.Text(f"{title}, {'★' * stars}, {minutes} minutes")]
        if not text:
            continue
        number = str(exercise["label"]).removeprefix("ex-").replace("-", ".")
        options = {"refdomain": "std", "refdoc": app.env.docname, "refexplicit": True, "refwarn": True}
        if re.search(rf"(?m)^## {re.escape(number)}\s", text):
            options |= {"reftype": "ref", "reftarget": solution_label(number)}
        else:
            options |= {"reftype": "doc", "reftarget": f"/{page}"}
        link = pending_xref("", nodes.inline("", f"Solution to exercise {number}"), **options)
        last_hint(exercise).append(nodes.paragraph("", "", link, classes=["solution-link"]))


def label_solutions(app: Sphinx, doctree: nodes.document) -> None:
    """A section `2.3 ...` of a page of solutions can be referred to as `solution-2-3`."""
    if not app.env.docname.startswith("solutions/"):
        return
    labels = app.env.domains.standard_domain
    for section in doctree.findall(nodes.section):
        title = section.children[0].astext()
        if match := re.match(r"(S?\d+\.\d+)\s", title):
            label = solution_label(match[1])
            section["ids"].insert(0, label)
            labels.anonlabels[label] = app.env.docname, label
            labels.labels[label] = app.env.docname, label, title


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", fold_hints)
    app.connect("doctree-read", complete)
    app.connect("doctree-read", label_solutions)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
