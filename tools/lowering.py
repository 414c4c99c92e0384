"""From a chapter's MyST source to a notebook of plain Markdown.

JupyterLab, GitHub and Colab know no MyST.  A chapter may use the few directives and roles below, and here
each of them becomes Markdown that reads well without it.  Anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from markdown_it import MarkdownIt
from nbformat import NotebookNode
from pybtex.database import Entry, parse_file
from pybtex.plugin import find_plugin

from tools.project import address

ADMONITIONS = {"note": "Note", "warning": "Warning", "tip": "Tip"}
DIRECTIVES = {"math", "exercise", "admonition", *ADMONITIONS}
ROLES = {"eq", "cite", "ref", "doc"}

# A role, {name}`body`, or else a span of inline code, in which nothing is a role.
ROLE_OR_CODE = re.compile(r"\{(?P<role>[\w:.-]+)\}`(?P<body>[^`]+)`|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.S)
TARGET = re.compile(r"^\(([\w-]+)\)=\s*$")
TITLED = re.compile(r"^(.*?)\s*<([^<>]+)>$", re.DOTALL)  # text <target>
NUMBER = r"(\d+|S\d|[A-Z])"  # of a chapter, of a study, of an appendix
OPTION = re.compile(r"^:([\w-]+):\s*(.*)$")


@dataclass
class Directive:
    """A fenced block ```` ```{name} argument ````, with its options and its text."""

    name: str
    argument: str
    options: dict[str, str]
    body: str
    first: int  # the lines that it covers: first <= line < last
    last: int


def fences(text: str) -> list:
    """The fenced blocks of `text` that stand in the left margin, as markdown-it tokens."""
    return [t for t in MarkdownIt("commonmark").parse(text) if t.type == "fence" and t.level == 0]


def directives(text: str) -> list[Directive]:
    """The MyST directives of `text`, outermost only, in order."""
    found = []
    for token in fences(text):
        match = re.match(r"\{([\w:-]+)\}\s*(.*)", token.info)
        if match:
            lines = token.content.splitlines()
            options = {}
            while lines and (option := OPTION.match(lines[0])):
                options[option[1]] = option[2].strip()
                lines.pop(0)
            body = "\n".join(lines).strip("\n")
            found.append(Directive(match[1], match[2].strip(), options, body, *token.map))
    return found


def prose(text: str) -> str:
    """`text` without its fenced blocks and its inline code."""
    lines = text.splitlines()
    for token in reversed(fences(text)):
        lines[slice(*token.map)] = []
    return ROLE_OR_CODE.sub(lambda match: match[0] if match["role"] else "", "\n".join(lines))


def _pieces(text: str) -> Iterator[str]:
    """What of `text` is prose, in reading order: outside fenced blocks, and inside directives that hold prose."""
    lines, start = text.splitlines(), 0
    found = {directive.first: directive for directive in directives(text)}
    for token in fences(text):
        first, last = token.map
        yield "\n".join(lines[start:first])
        if first in found and found[first].name in DIRECTIVES - {"math"}:
            yield found[first].argument
            yield from _pieces(found[first].body)
        start = last
    yield "\n".join(lines[start:])


def roles(text: str) -> list[tuple[str, str]]:
    """The roles of `text` outside code, in directives too, as (name, body)."""
    matches = [match for piece in _pieces(text) for match in ROLE_OR_CODE.finditer(piece)]
    return [(match["role"], match["body"].strip()) for match in matches if match["role"]]


@dataclass
class Book:
    """The chapters in `folder`, its studies and appendices, and what they refer to in each other."""

    folder: Path
    bibliography: Path | None = None
    chapters: list[Path] = field(init=False)
    studies: list[Path] = field(init=False)
    appendices: list[Path] = field(init=False)

    def __post_init__(self):
        self.folder = Path(self.folder)
        self.chapters = sorted(self.folder.glob("[0-9][0-9]_*.md"))
        self.studies = sorted(self.folder.glob("beyond/S[0-9]_*.md"))
        self.appendices = sorted(self.folder.glob("appendix/[A-Z]_*.md"))
        if not self.chapters:
            raise ValueError(f"the sources folder must hold chapters NN_name.md, got {self.folder}")

    @property
    def pages(self) -> list[Path]:
        """What is executed and has a pair: the chapters, then the studies, then the appendices."""
        return [*self.chapters, *self.studies, *self.appendices]

    @cached_property
    def equations(self) -> dict[str, str]:
        """Equation label -> its number, chapter and position among the labelled equations: "2.3"."""
        numbers: dict[str, str] = {}
        for chapter in self.pages:
            labels = equation_labels(chapter.read_text(encoding="utf-8"))
            for position, label in enumerate(labels, 1):
                if label in numbers:
                    raise ValueError(f"{chapter.name}: the equation label {label} is used twice in the book")
                numbers[label] = f"{page_number(chapter)}.{position}"
        return numbers

    @cached_property
    def targets(self) -> dict[str, str]:
        """Label before a heading, `(sec-...)=` -> the chapter that holds it."""
        return {
            match[1]: chapter.stem
            for chapter in self.pages
            for line in chapter.read_text(encoding="utf-8").splitlines()
            if (match := TARGET.match(line))
        }

    @cached_property
    def sources(self) -> dict[str, Entry]:
        path = self.bibliography or self.folder / "references.bib"
        return dict(parse_file(path).entries) if path.exists() else {}


def page_number(path: Path) -> str:
    """What a page's equations and figures are numbered with: the number of a chapter or study, an appendix's letter.

    >>> [page_number(Path(name)) for name in ("05_triton_kernel.md", "beyond/S1_forgetting.md", "A_measuring.md")]
    ['5', 'S1', 'A']
    """
    return path.name.partition("_")[0].lstrip("0")


def equation_labels(text: str) -> list[str]:
    """The labels of the `{math}` directives in `text`, nested ones included, in order."""
    labels = []
    for directive in directives(text):
        if directive.name == "math" and "label" in directive.options:
            labels.append(directive.options["label"])
        elif directive.name in DIRECTIVES - {"math"}:
            labels += equation_labels(directive.body)
    return labels


def exercise_title(argument: str) -> tuple[str, int, int]:
    """Title, stars and minutes of an exercise, however they stand in its first line.

    >>> exercise_title("A running sum (★★, 10 minutes)"), exercise_title("★ A product (5 min)")
    (('A running sum', 2, 10), ('A product', 1, 5))
    """
    stars = re.search("★+", argument)
    minutes = re.search(r"(\d+) min(ute)?s?\b", argument)
    if not stars or not minutes:
        raise ValueError(f"an exercise needs its stars and minutes, as in (★★, 10 minutes), got {argument!r}")
    title = argument.replace(stars[0], "").replace(minutes[0], "")
    return re.sub(r"\(\W*\)", "", title).strip(" ,·"), len(stars[0]), int(minutes[1])


def author_year(entry: Entry) -> str:
    """ "Gu and Dao 2024", "Yang et al. 2024"."""
    persons: Any = entry.persons  # which its constructor fills, unknown to type checkers
    fields: Any = entry.fields
    names = [
        " ".join(str(part) for part in person.rich_prelast_names + person.rich_last_names)
        for person in persons["author"]
    ]
    authors = names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al."
    return f"{authors} {fields['year']}"


def install_cell(repository: str) -> str:
    """The first code cell of a notebook: it fetches the package, from the project's address if it has one.

    >>> print(install_cell("https://example.org/a"))
    # Fetches the package where it is missing, as on Colab. Elsewhere it does nothing.
    import importlib.util
    <BLANKLINE>
    if importlib.util.find_spec("dn_lib") is None:
        %pip install --quiet "dn-lib @ git+https://example.org/a"
    """
    package = f"dn-lib @ git+{repository}" if repository else "dn-lib"
    return INSTALL.format(package=package)


INSTALL = """\
# Fetches the package where it is missing, as on Colab. Elsewhere it does nothing.
import importlib.util

if importlib.util.find_spec("dn_lib") is None:
    %pip install --quiet "{package}\""""


class Chapter:
    """Lowers one chapter; remembers what it cites."""

    def __init__(self, path: Path, book: Book):
        self.path, self.book = path, book
        self.number = page_number(path)
        self.text = path.read_text(encoding="utf-8")
        self.labels = self._citation_labels()

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self.path.name}: {message}")

    def _citation_labels(self) -> dict[str, str]:
        """Key -> what stands in the text; works of one author and year are told apart by a letter."""
        keys = []
        for cell in self._notebook().cells:
            caption = cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "")
            cited = [
                body for role, body in roles(cell.source if cell.cell_type == "markdown" else caption) if role == "cite"
            ]
            keys += [key.strip() for body in cited for key in body.split(",")]
        keys = list(dict.fromkeys(keys))
        for key in keys:
            if key not in self.book.sources:
                raise self._error(f"{{cite}}`{key}` is not in references.bib")
        plain = {key: author_year(self.book.sources[key]) for key in keys}
        labels = {}
        for key, label in plain.items():
            same = [other for other in keys if plain[other] == label]
            labels[key] = label + ("abcdefgh"[same.index(key)] if len(same) > 1 else "")
        return labels

    def _notebook(self) -> NotebookNode:
        return jupytext.reads(self.text, fmt="md:myst")

    # --- inline

    def role(self, match: re.Match) -> str:
        if match["role"] is None:
            return match[0]
        name, body = match["role"], match["body"].strip()
        titled = TITLED.match(body)
        title, target = (titled[1], titled[2].strip()) if titled else (None, body)
        if name == "eq":
            if target not in self.book.equations:
                raise self._error(f"{{eq}}`{target}` names no labelled equation")
            return f"({self.book.equations[target]})"
        if name == "cite":
            return "[" + "; ".join(self.labels[key.strip()] for key in body.split(",")) + "]"
        if name == "ref":
            exercise = re.fullmatch(rf"ex-{NUMBER}-(\d+)", target)
            if exercise:
                return title or f"Exercise {exercise[1]}.{exercise[2]}"
            if title is None:
                raise self._error(f"{{ref}}`{body}` needs a text: {{ref}}`text <{target}>`")
            if re.fullmatch(rf"fig-{NUMBER}-(\d+)", target):
                return title
            if target not in self.book.targets:
                raise self._error(f"{{ref}}`{body}` names no label of the book")
            home = self.book.targets[target]
            return title if home == self.path.stem else f"[{title}]({home}.ipynb)"
        if name == "doc":
            if title is None:
                raise self._error(f"{{doc}}`{body}` needs a text: {{doc}}`text <{target}>`")
            # As Sphinx does: from the page's own folder, or from the book's if it begins with a slash.
            folder = self.book.folder if target.startswith("/") else self.path.parent
            page = (folder / f"{target.lstrip('/')}.md").resolve()
            if not page.exists():
                raise self._error(f"{{doc}}`{body}` names no page of the book")
            if any(page == other.resolve() for other in self.book.pages):
                return f"[{title}]({page.stem}.ipynb)"
            return f"[{title}](../{page.relative_to(self.book.folder.resolve()).as_posix()})"
        raise self._error(f"the role {{{name}}} is not one of {sorted(ROLES)}")

    def inline(self, text: str) -> str:
        return ROLE_OR_CODE.sub(self.role, text)

    # --- blocks

    def block(self, directive: Directive) -> str:
        name, title = directive.name, self.inline(directive.argument)
        if name == "math":
            body = directive.body
            if directive.argument:  # ```{math} may carry its first line beside the name
                body = f"{directive.argument}\n{body}".strip()
            if "\\\\" in body and not body.lstrip().startswith("\\begin{"):
                body = f"\\begin{{split}}\n{body}\n\\end{{split}}"  # what Sphinx does
            label = directive.options.get("label")
            return f"$$\n{body}\n" + (f"\\tag{{{self.book.equations[label]}}}\n$$" if label else "$$")
        if name not in DIRECTIVES:
            raise self._error(f"the directive {{{name}}} is not one of {sorted(DIRECTIVES)}")
        body = self.markdown(directive.body)
        if name == "exercise":
            numbered = re.fullmatch(rf"ex-{NUMBER}-(\d+)", directive.options.get("label", ""))
            if not numbered:
                raise self._error(f"{{exercise}} {title} needs :label: ex-N-M")
            try:
                title, stars, minutes = exercise_title(title)
            except ValueError as error:
                raise self._error(str(error)) from None
            about = f"({'★' * stars}, {minutes} minutes)"
            return f"**Exercise {numbered[1]}.{numbered[2]}.** {title} {about}\n\n{body}"
        title = title or ADMONITIONS.get(name, "")
        if "dropdown" in directive.options.get("class", "").split():
            return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
        # Inside a quotation, a display on several lines would swallow the quotation's marks.
        body = re.sub(r"\$\$(.+?)\$\$", lambda m: "$$ " + " ".join(m[1].split()) + " $$", body, flags=re.DOTALL)
        return "\n".join(f"> {line}".rstrip() for line in [f"**{title}**", "", *body.splitlines()])

    def markdown(self, text: str) -> str:
        """`text` in plain Markdown."""
        lines, start, out = text.splitlines(), 0, []
        found = {directive.first: directive for directive in directives(text)}
        for token in fences(text):
            first, last = token.map
            out += self._plain(lines[start:first])
            if first in found:
                out += [""] if out and out[-1] else []
                out += self.block(found[first]).splitlines()
                out += [""] if last < len(lines) and lines[last] else []
            else:
                out += lines[first:last]
            start = last
        return "\n".join(out + self._plain(lines[start:])).strip("\n")

    def _plain(self, lines: list[str]) -> list[str]:
        """Lines outside every fence: no targets, no MyST comments, roles replaced."""
        kept = [line for line in lines if not TARGET.match(line) and not line.startswith("% ")]
        return self.inline("\n".join(kept)).split("\n") if kept else []

    # --- the notebook

    def notebook(self) -> NotebookNode:
        cells = []
        for cell in self._notebook().cells:
            if cell.cell_type != "code":
                text = self.markdown(cell.source)
                if not cells and self.number.isdigit():  # the site numbers its chapters by itself
                    text = re.sub(r"(?m)^# ", f"# {self.number}. ", text, count=1)
                if text:
                    cells.append(nbformat.v4.new_markdown_cell(text))
                continue
            if not any(made.cell_type == "code" for made in cells):
                cells.append(nbformat.v4.new_code_cell(install_cell(address())))
            metadata = {"tags": list(cell.metadata["tags"])} if cell.metadata.get("tags") else {}
            figure = cell.metadata.get("mystnb", {})
            alt = figure.get("image", {}).get("alt")
            if alt:
                metadata["alt"] = alt
            cells.append(nbformat.v4.new_code_cell(cell.source, metadata=metadata))
            caption = figure.get("figure", {}).get("caption")
            if caption:
                name = re.fullmatch(rf"fig-{NUMBER}-(\d+)", figure["figure"].get("name", ""))
                if not name:
                    raise self._error("a figure needs the name fig-N-M")
                text = f"*Figure {name[1]}.{name[2]}.* {self.inline(caption)}"
                cells.append(nbformat.v4.new_markdown_cell(text))
        if self.labels:
            cells.append(nbformat.v4.new_markdown_cell(self.references()))
        for n, cell in enumerate(cells, 1):
            cell["id"] = f"cell-{n:03d}"
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        notebook.metadata["language_info"] = {"name": "python"}
        return notebook

    def references(self) -> str:
        """The works cited in this chapter, in the order in which it cites them."""
        style = find_plugin("pybtex.style.formatting", "unsrt")()
        backend = find_plugin("pybtex.backends", "markdown")()
        entries = list(style.format_entries([self.book.sources[key] for key in self.labels]))
        # pybtex breaks lines and escapes more than Markdown needs; a notebook should read well as text too.
        texts = [re.sub(r"\\([.()-])", r"\1", entry.text.render(backend)) for entry in entries]
        labels = [self.labels[entry.key] for entry in entries]
        lines = [f"- [{a}] {' '.join(b.split())}" for a, b in zip(labels, texts, strict=True)]
        return "\n".join(["## References", "", *lines])


def lower(path: Path, book: Book) -> NotebookNode:
    """The notebook of the chapter at `path`, not executed; the same source gives the same cells and ids.

    Raises ValueError for a directive, role, label or key that the book does not know, naming the chapter.
    """
    return Chapter(Path(path), book).notebook()
