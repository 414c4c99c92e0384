"""`make slides`: for each chapter, study and appendix one HTML file of slides, of its figures and questions.

A slide is a figure with its caption, a question that the chapter asks before it answers, or the numbered equations of
a section; the first has the question of the chapter, the last its exercises.  A file holds all that it needs, MathJax
too, so it can be mailed, put on a stick and opened without a network.  Figures come from the executed notebooks.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat import NotebookNode
from PIL import Image

from tools.lowering import Book, lower
from tools.notebooks import ROOT

TEMPLATE = Path(__file__).with_name("slides_template.html")
BOOK_TITLE = "DeltaNet, step by step"
DISPLAY = re.compile(r"(?ms)^\$\$\n(?P<body>.*?)\$\$$")
NUMBERED = re.compile(r"\\tag\{([\w.]+)\}")
CAPTION = re.compile(r"\*(Figure [\w.]+)\.\* (.*)", re.DOTALL)
EXERCISE = re.compile(r"(?m)^\*\*Exercise ([\w.]+)\.\*\* (.*)$")
HEADING = re.compile(r"(?m)^(#{1,2}) (.*)$")
# A question to the class: a quotation under the title Predict, or a sentence that begins with such a word, emphasised.
QUESTION = re.compile(
    r"(?m)^> \*\*Predict[^*]*\*\*\n(?P<box>(?:>.*\n?)+)"
    r"|\*\*Predict\*\*(?P<rest>.*(?:\n.+)*)"
    r"|(?<!\*)\*(?P<slanted>(?:Predict|Before you|Two predictions)\b[^*]+)\*(?!\*)"
)
EQUATIONS = 3  # at most, on one slide


@dataclass
class Slide:
    """`kind` is title, equations, question, figure or exercises; `heading` is plain Markdown, `body` HTML."""

    kind: str
    heading: str
    body: str


def math(content: str, options: dict) -> str:
    """A formula as MathJax finds it."""
    left, right = (r"\[", r"\]") if options["display_mode"] else (r"\(", r"\)")
    return f'<span class="tex">{left}{escape(content)}{right}</span>'


PARSER = MarkdownIt("commonmark").use(dollarmath_plugin, renderer=math, allow_labels=False).enable("table")


def unlinked(text: str) -> str:
    """A link to another notebook becomes its text, since a slide stands alone."""
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


def render(text: str) -> str:
    """Markdown -> HTML.

    >>> render("as in [chapter 1](01_linear.ipynb), $a<b$")
    '<p>as in chapter 1, <span class="math inline"><span class="tex">\\\\(a&lt;b\\\\)</span></span></p>\\n'
    """
    return PARSER.render(unlinked(text))


def inline(text: str) -> str:
    """One line of Markdown -> HTML without a paragraph around it.

    >>> inline("1. *Linear* attention")
    '1. <em>Linear</em> attention'
    """
    return PARSER.renderInline(unlinked(text))


def still(png: bytes) -> bytes | None:
    """The picture that an animated PNG shows where nothing moves; None if `png` is not animated."""
    with Image.open(io.BytesIO(png)) as picture:
        if not getattr(picture, "is_animated", False):
            return None
        picture.seek(0)  # the default image, or the first frame
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


def picture(png: bytes, alt: str) -> str:
    """An `img` that holds its bytes; with a second one beside it, for print, if it moves."""

    def tag(data: bytes, kind: str) -> str:
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        return f'<img class="{kind}" alt="{escape(alt)}" src="{source}">'

    calm = still(png)
    return tag(png, "drawn") if calm is None else tag(png, "moving") + tag(calm, "still")


def pictures(cell: NotebookNode) -> list[bytes]:
    """The PNGs that a cell has shown."""
    shown = [output.get("data", {}).get("image/png") for output in cell.get("outputs", [])]
    return [base64.b64decode(data) for data in shown if data]


def opening(text: str) -> str:
    """The paragraph of a chapter's first cell that asks the chapter's question.

    Raises ValueError if there is none.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        if asked := re.search(r"(?s)\*\*The question\.\*\*\s*(.+)", paragraph):
            return asked[1]
        if re.search(r"\*\*[^*]+\?\*\*", paragraph):
            return paragraph
    raise ValueError("the first cell must ask the chapter's question, in bold or after **The question.**")


def found(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """What a Markdown cell has for slides, in its order: (heading | equation | question | exercise, match)."""
    kinds = {"heading": HEADING, "equation": DISPLAY, "question": QUESTION, "exercise": EXERCISE}
    matches = [(match.start(), kind, match) for kind, pattern in kinds.items() for match in pattern.finditer(text)]
    for _, kind, match in sorted(matches, key=lambda item: item[0]):
        if kind != "equation" or NUMBERED.search(match["body"]):
            yield kind, match


def question(match: re.Match[str]) -> str:
    """Its text, without the answer that may follow in the same paragraph.

    >>> question(QUESTION.search("Some text. **Predict**: does it\\ngrow? It does."))
    'Does it\\ngrow?'
    >>> question(QUESTION.search("**Predict** the left panel. It falls."))
    'Predict the left panel.'
    """
    if match["box"]:
        return "\n".join(line.removeprefix(">").removeprefix(" ") for line in match["box"].splitlines())
    if match["slanted"]:
        return match["slanted"]
    text = match["rest"]
    sentence = re.match(r"(?s).*?\.(?=\s|$)|.*", text)
    text = (text[: text.rfind("?") + 1] or (sentence[0] if sentence else text)).strip()
    if text[0] not in ",:":
        return f"Predict {text}"
    text = text[1:].strip()
    return text[0].upper() + text[1:]


def slides(notebook: NotebookNode) -> list[Slide]:
    """The slides of an executed chapter.  Raises ValueError if a caption stands under no picture."""
    out: list[Slide] = []
    heading, equations, exercises = "", [], []

    def flush() -> None:
        while equations:
            part = equations[:EQUATIONS]
            del equations[:EQUATIONS]
            out.append(Slide("equations", heading, "\n".join(render(f"$$\n{body}$$") for body in part)))

    for before, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
        if cell.cell_type != "markdown" or cell.source.startswith("## References"):
            continue
        if caption := CAPTION.fullmatch(cell.source):
            flush()
            shown = pictures(before) if before else []
            if not before or not shown:
                raise ValueError(f"{caption[1]} has no picture: run make notebooks")
            figures = "".join(picture(png, before.metadata.get("alt", "")) for png in shown)
            text = f"<figcaption><b>{caption[1]}.</b> {inline(caption[2])}</figcaption>"
            out.append(Slide("figure", heading, f"<figure>{figures}{text}</figure>"))
            continue
        for kind, match in found(cell.source):
            if kind == "heading":
                flush()
                heading = match[2]
                if match[1] == "#":
                    out.append(Slide("title", heading, render(opening(cell.source))))
            elif kind == "equation":
                equations.append(match["body"])
            elif kind == "question":
                flush()
                out.append(Slide("question", heading, render(question(match))))
            else:
                exercises.append(f"{match[1]} &ensp; {inline(match[2])}")
    flush()
    if exercises:
        items = "".join(f"<li>{line}</li>" for line in exercises)
        out.append(Slide("exercises", "Exercises", f"<ul>{items}</ul>"))
    return out


def mathjax() -> str:
    """MathJax as the site has it, in the form that needs no fonts: formulas become drawings."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("sphinx-mathjax-offline is not installed: pip install 'dn-lib[book]'")
    return (Path(spec.origin).parent / "static" / "mathjax" / "tex-svg-full.js").read_text(encoding="utf-8")


def page(path: Path, book: Book) -> str:
    """The slides of the chapter at `path` as one HTML page.

    Raises ValueError if its executed notebook is missing or is out of step with it.
    """
    pair = book.folder / "notebooks" / f"{path.stem}.ipynb"
    if not pair.exists():
        raise ValueError(f"{pair.name} is missing: run make notebooks")
    notebook = nbformat.read(pair, as_version=4)
    if [cell.source for cell in notebook.cells] != [cell.source for cell in lower(path, book).cells]:
        raise ValueError(f"{pair.name} is out of step with {path.name}: run make notebooks")
    made = slides(notebook)
    sections = []
    for number, slide in enumerate(made, 1):
        level = "h1" if slide.kind == "title" else "h2"
        sections.append(
            f'<section class="slide {slide.kind}" id="{number}" aria-label="Slide {number} of {len(made)}">'
            f"<{level}>{inline(slide.heading)}</{level}>\n"
            f'<div class="body">{slide.body}</div></section>'
        )
    title = made[0].heading
    marks = {
        "TITLE": escape(f"{title} · {BOOK_TITLE}"),
        "FOOTER": escape(f"{BOOK_TITLE} · {title}"),
        "SLIDES": "\n".join(sections),
        "MATHJAX": mathjax().replace("</script", r"<\/script"),
        "COUNT": json.dumps(len(made)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: marks[match[1]], template)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.slides", description=__doc__)
    parser.add_argument("--sources-dir", type=Path, default=ROOT / "book", help="where the chapters are")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "build" / "slides", help="where the slides go")
    parser.add_argument("--only", default="", help="only pages whose name begins so, e.g. 03, S1 or A")
    options = parser.parse_args(arguments)
    book = Book(options.sources_dir)
    chosen = [path for path in book.pages if path.name.startswith(options.only)]
    if not chosen:
        raise SystemExit(f"--only must begin the name of a chapter, got {options.only!r}")
    out = options.out_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for path in chosen:
        try:
            text = page(path, book)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        (out / f"{path.stem}.html").write_text(text, encoding="utf-8")
        print(f"{text.count('<section class='):3} slides  file://{out / f'{path.stem}.html'}", flush=True)
    print("Arrow keys turn the page, P stops what moves; to print, or for a PDF, use the browser's own print.")


if __name__ == "__main__":
    main()
