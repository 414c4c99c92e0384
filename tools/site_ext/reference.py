"""The package's reference from its docstrings: plain text there, with links to the book's equations here.

A docstring of `dn_lib` is written to be read in a terminal.  Code stands between single backquotes, an equation of the
book goes by its label, and examples are doctests.  Sphinx reads reStructuredText, so each line is translated: code gets
its second backquotes, a label becomes a link, and what else reStructuredText would take for markup is kept as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from tools.lowering import Book

CODE_OR_LABEL = re.compile(r"`([^`]+)`|(?<![\w-])(eq-[a-z0-9]+(?:-[a-z0-9]+)*)")
SECTION = re.compile(r"\s*(Args|Returns|Raises|Yields|Attributes):\s*$")

# In the list of arguments, a line such as "all else as in `delta_rule`.", which names none.
NO_NAME = re.compile(r"(    )(?! )(?![\w*][\w*, ]*:)(.+)")


def escape(text: str) -> str:
    r"""`text` with nothing left that reStructuredText would take for markup.

    >>> escape("beta |k|^2 and a_ b*c")
    'beta \\|k\\|^2 and a\\_ b\\*c'
    """
    return re.sub(r"([\\*|]|_(?=\W|$))", r"\\\1", text)


def translate(line: str, labels: set[str] | dict[str, str]) -> str:
    """One line of a docstring in reStructuredText.

    >>> translate("`[B, L]`, by `eq-delta-rule` and eq-other", {"eq-delta-rule"})
    '``[B, L]``, by equation :eq:`eq-delta-rule` and eq-other'
    """
    pieces, start = [], 0
    for match in CODE_OR_LABEL.finditer(line):
        label = match[2] or match[1]
        pieces.append(escape(line[start : match.start()]))
        if label in labels:
            pieces.append(f"equation :eq:`{label}`")
        else:
            pieces.append(f"``{match[1]}``" if match[1] else match[2])
        start = match.end()
    return "".join([*pieces, escape(line[start:])])


def rewrite(lines: list[str], labels: set[str] | dict[str, str]) -> list[str]:
    """A docstring's lines in reStructuredText: examples as they are, each on its own; sections for napoleon.

    >>> rewrite(["One.", "    more", ">>> f(x_)", "1"], set())
    ['One.', 'more', '', '>>> f(x_)', '1']
    >>> rewrite(["These:", "- a", "  b", "c"], set())
    ['These:', '', '- a', '  b', '', 'c']
    >>> rewrite(["Args:", "    q, k: two.", "    all else as in f."], set())
    ['Args:', '    q, k: two.', '    others: all else as in f.']
    """
    out: list[str] = []
    example, section, listed = False, "", False
    for line in lines:
        bare = line.strip()
        if not section and not example and listed and line and not line.startswith((" ", "- ")):
            out += [""] if out[-1] else []
            listed = False
        elif not section and line.startswith("- "):
            out += [""] if not listed and out and out[-1] else []
            listed = True
        if bare.startswith(">>>"):
            if not example and out and out[-1]:
                out.append("")
            example, section = True, ""
        elif not bare:
            example = False
        if example:
            out.append(bare)
            continue
        if heading := SECTION.match(line):
            if out and out[-1]:
                out.append("")
            section = heading[1]
            out.append(bare)
            continue
        if section and line and not line.startswith(" "):
            section = ""
            if out and out[-1]:
                out.append("")
        # Only in a section and in a list does an indentation mean something; elsewhere it would make a quotation.
        if section == "Args" and (item := NO_NAME.match(line)):
            line = f"{item[1]}others: {item[2]}"
        keep = section or (listed and line.startswith("  "))
        out.append(translate(line if keep else bare, labels))
    return out


def on_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = rewrite(lines, app.dn_labels)  # type: ignore[attr-defined] - ours, kept on it


def short_types(text: str | None) -> str | None:
    """A signature with the last part of each type's name, also where Sphinx leaves that to a later step.

    >>> short_types("(f: ~collections.abc.Callable[[~torch.Tensor], int])")
    '(f: Callable[[Tensor], int])'
    """
    return text and re.sub(r"~(?:\w+\.)+(\w+)", r"\1", text)


def on_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    return short_types(signature), short_types(returned)


def plain_signatures(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Sphinx writes the parameters of a long signature as a list of definitions without terms; here they are lines."""

    def lines(match: re.Match[str]) -> str:
        inner = match[2].replace("<dd>", '<span class="dn-parameter">').replace("</dd>", "</span>")
        return f"{match[1]}{inner}"

    if "body" in context:
        pattern = r'(?s)(<span class="sig-paren">\(</span>)\s*<dl>(.*?)</dl>'
        context["body"] = re.sub(pattern, lines, context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("builder-inited", lambda app: setattr(app, "dn_labels", Book(Path(app.srcdir)).equations))
    app.connect("autodoc-process-docstring", on_docstring, priority=100)  # before napoleon
    app.setup_extension("sphinx.ext.napoleon")
    app.connect("autodoc-process-signature", on_signature)
    app.connect("html-page-context", plain_signatures)
    app.config.autodoc_preserve_defaults = True
    app.config.autodoc_inherit_docstrings = False
    app.config.autodoc_member_order = "bysource"
    app.config.napoleon_use_param = False
    app.config.napoleon_use_rtype = False
    app.config.python_maximum_signature_line_length = 72
    return {"parallel_read_safe": False, "parallel_write_safe": False}
