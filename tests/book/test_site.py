"""`make book` on two tiny chapters: numbers, folds and links are right, and nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jupytext
import nbformat
import pytest
from browser import PROGRAM, Browser
from bs4 import BeautifulSoup
from page_checks import CUT_OFF

from tools.lowering import Book, directives, page_number, prose
from tools.site import ROOT, main, pages_with_code, with_stored_results
from tools.site_ext import buttons

BOOK = ROOT / "book"
HEAD = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

"""
FIRST = """# First

(sec-a)=
## Section

```{math}
:label: eq-a
x = 1
```

````{exercise} Think (★, 5 min)
:label: ex-1-1

Show {eq}`eq-a` {cite}`yang2024parallelizing` {cite}`yang2024gla`.

```{admonition} Hint
:class: dropdown
It is true.
```
````
"""
SECOND = """# Second

```{math}
:label: eq-b
y = 2
```

{eq}`eq-a`, {eq}`eq-b`, {ref}`the section <sec-a>`, {doc}`first <01_first>`

Figure 2.1 draws what exercise 1.1 asks; there is no figure 2.7.

```{code-cell} ipython3
---
mystnb:
  image: {alt: A line}
  figure: {caption: "A line.", name: fig-2-1}
---
import matplotlib.pyplot as plt
plt.plot([0, 1])
plt.show()
```
"""
INDEX = """# Site

```{toctree}
:numbered: 1
:glob:
[0-9][0-9]_*
```

```{toctree}
bibliography
solutions/01_first
solutions/S2_side
beyond/S1_way
beyond/S2_side
appendix/A_more
appendix/B_last
```
"""
LETTERED = ("beyond/S1_way", "beyond/S2_side", "appendix/A_more", "appendix/B_last")
EXTRA = """# {title}: More

```{{exercise}} ★ Try (5 min)
:label: ex-{letter}-1
Do.
```

```{{admonition}} Hint
:class: dropdown
Look.
```

```{{math}}
:label: eq-{letter}
z = 3
```

{{eq}}`eq-{letter}`, {{eq}}`eq-a`, exercise {letter}.1, {{ref}}`tried <ex-{letter}-1>`, {{doc}}`first </01_first>`

```{{code-cell}} ipython3
---
mystnb:
  image: {{alt: A line}}
  figure: {{caption: "A line.", name: fig-{letter}-1}}
---
import matplotlib.pyplot as plt
plt.plot([0, 1])
plt.show()
```
"""


def formulas() -> tuple[list[str], list[str]]:
    """Every formula of the book, as its source: those on lines of their own, and the different ones within text."""
    displayed, inline = [], []
    for page in (*Book(BOOK).pages, BOOK / "notation.md", *sorted(BOOK.glob("solutions/*.md"))):
        cells = jupytext.read(page, fmt="md:myst").cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        found = directives(text)
        for directive in found:  # nested ones join the end of the list
            found += directives(directive.body)
        displayed += [directive.body for directive in found if directive.name == "math"]
        for part in [prose(text), *(prose(directive.body) for directive in found if directive.name != "math")]:
            displayed += re.findall(r"(?s)\$\$(.+?)\$\$", part)
            inline += re.findall(r"(?<![$\\])\$([^$\n]+)\$(?!\$)", part)
    return displayed, list(dict.fromkeys(inline))


def page_of_formulas() -> str:
    """A chapter of nothing but formulas; every second one is numbered, which leaves it less of the line."""
    displayed, inline = formulas()
    label = (f":label: eq-all-{i}\n" if i % 2 else "" for i in range(len(displayed)))
    blocks = [f"```{{math}}\n{line}{formula.strip()}\n```" for line, formula in zip(label, displayed, strict=True)]
    return "\n\n".join(["# Formulas", *blocks, *(f"A line with ${formula}$ in it." for formula in inline)])


def write(folder: Path, first: str = FIRST) -> None:
    (folder / "solutions").mkdir(parents=True)
    for name in ("references.bib", "bibliography.md"):
        shutil.copy(BOOK / name, folder)
    shutil.copy(BOOK / "conf.py", folder)
    shutil.copytree(BOOK / "_static", folder / "_static")
    (folder / "index.md").write_text(INDEX)
    (folder / "01_first.md").write_text(HEAD + first, encoding="utf-8")
    (folder / "02_second.md").write_text(HEAD + SECOND, encoding="utf-8")
    for name in LETTERED:
        letter = page_number(folder / name)
        title = f"Study {letter[1:]}" if name.startswith("beyond/") else f"Appendix {letter}"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.md").write_text(HEAD + EXTRA.format(letter=letter, title=title), encoding="utf-8")
    (folder / "solutions" / "S2_side.md").write_text(HEAD + "# Solutions to study 2\n\n## S2.1 Try\n\nText.\n")
    (folder / "solutions" / "01_first.md").write_text(HEAD + "# Solutions\n\n## 1.1 Think\n\nText.\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "book"
    write(folder)
    (folder / "03_formulas.md").write_text(HEAD + page_of_formulas(), encoding="utf-8")
    main(["--sources-dir", str(folder)])
    return folder / "_build" / "html"


def page(site: Path, name: str) -> BeautifulSoup:
    return BeautifulSoup((site / name).read_text("utf-8"), "html.parser")


def test_equations_figures_and_exercises_are_numbered_by_chapter(site):
    first, second = page(site, "01_first.html"), page(site, "02_second.html")
    assert [span.get_text()[:5] for span in first.select(".eqno")] == ["(1.1)"]
    assert [span.get_text()[:5] for span in second.select(".eqno")] == ["(2.1)"]
    assert "(1.1), (2.1), the section, first" in second.select_one("article").get_text()
    assert "Figure 2.1" in second.select_one("figcaption").get_text()
    assert second.select_one("figure img")["alt"] == "A line"
    title = first.select_one(".exercise .admonition-title").get_text(" ", strip=True)
    assert re.sub(r"\s+", " ", title) == "Exercise 1.1 (Think, ★, 5 minutes)"


@pytest.mark.parametrize("name", LETTERED)
def test_studies_and_appendices_have_numbers_of_their_own(site, name):
    found, letter = page(site, f"{name}.html"), page_number(Path(name))
    assert [span.get_text().strip("#()") for span in found.select(".eqno")] == [f"{letter}.1"]
    assert f"({letter}.1), (1.1), exercise {letter}.1, tried, first" in found.select_one("article").get_text()
    assert f"Figure {letter}.1" in found.select_one("figcaption").get_text()
    title = found.select_one(".exercise .admonition-title").get_text(" ", strip=True)
    assert re.sub(r"\s+", " ", title) == f"Exercise {letter}.1 (Try, ★, 5 minutes)"


def test_the_exercise_of_a_study_is_linked_with_its_solution(site):
    found = page(site, "beyond/S2_side.html")
    assert found.select_one(".solution-link a")["href"] == "../solutions/S2_side.html#solution-S2-1"
    assert any(link.get_text() == "exercise S2.1" and link["href"].startswith("#ex-") for link in found.select("p a"))


def test_hints_are_folded_and_lead_to_solutions(site):
    exercise = page(site, "01_first.html").select_one(".exercise")
    hint = exercise.select_one("details")
    assert not hint.has_attr("open")
    assert hint.select_one(".solution-link a")["href"] == "solutions/01_first.html#solution-1-1"
    assert not page(site, "02_second.html").select(".solution-link")
    section = page(site, "solutions/01_first.html").find(id="solution-1-1")
    assert section.find_parent("section").h2.get_text().startswith("1.1 Think")


def test_figures_and_exercises_that_a_text_names_are_links_with_previews(site):
    second = page(site, "02_second.html")
    links = {link.get_text(): link["href"] for link in second.select("article p a.reference")}
    assert links["Figure 2.1"] == "#fig-2-1" and links["exercise 1.1"] == "01_first.html#ex-1-1"
    assert "figure 2.7" not in links
    table = (site / "_static" / "previews_data.js").read_text("utf-8").removeprefix("window.DN_PREVIEWS = ")
    previews = json.loads(table.rstrip().removesuffix(";"))
    figure = BeautifulSoup(previews["02_second.html#fig-2-1"], "html.parser")
    assert (site / figure.img["src"]).is_file() and "A line." in figure.get_text()
    assert "x = 1" in previews["01_first.html#equation-eq-a"]
    sources = [
        link["href"].partition("#")[2] for link in page(site, "01_first.html").select("a[href*='bibliography.html#']")
    ]
    assert "Parallelizing" in previews[f"bibliography.html#{sources[0]}"]


def test_citations_of_one_author_and_year_are_told_apart(site):
    cited = [link.get_text() for link in page(site, "01_first.html").select(".exercise a[href*='bibliography']")]
    assert cited == ["Yang et al. 2024b", "Yang et al. 2024a"]


class App:
    """What `buttons.add` asks of Sphinx."""

    def __init__(self, repository: str):
        self.config = type("Config", (), {"dn_repository": repository})
        self.dn_notebooks = {"01_first"}


@pytest.mark.parametrize(
    "repository, offered",
    [
        ("", ["Notebook"]),
        ("https://github.com/owner/name", ["Notebook", "Colab", "Binder", "Source"]),
        ("https://elsewhere.org/name", ["Notebook", "Source"]),
    ],
)
def test_one_address_drives_what_a_page_offers(repository, offered):
    context = {"header_buttons": [], "pathto": lambda file, resource: file}
    buttons.add(App(repository), "01_first", "page.html", context, None)
    assert [button["text"] for button in context["header_buttons"]] == offered
    assert context["header_buttons"][0]["url"] == "notebooks/01_first.ipynb"
    context = {"header_buttons": [], "pathto": lambda file, resource: file}
    buttons.add(App(repository), "notation", "page.html", context, None)
    assert [button["text"] for button in context["header_buttons"]] == (["Source"] if repository else [])


def test_stored_results_are_those_of_the_same_cells(tmp_path):
    cell = "```{code-cell} ipython3\n%s\n```\n\n"
    path, pair = tmp_path / "01_a.md", tmp_path / "01_a.ipynb"
    path.write_text(HEAD + "# A\n\n" + "".join(cell % line for line in ("x = 1", "y = 2", "print(3)")))
    code = [nbformat.v4.new_code_cell(line) for line in ("print(0)", "x = 1", "print(3)")]
    for number, stored in enumerate(code):
        stored.outputs = [nbformat.v4.new_output("stream", text=str(number))]
    nbformat.write(nbformat.v4.new_notebook(cells=code), pair)
    cells = [cell for cell in with_stored_results(path, pair).cells if cell.cell_type == "code"]
    assert [[output.text for output in cell.outputs] for cell in cells] == [["1"], [], ["2"]]
    assert not [c for c in with_stored_results(path, tmp_path / "none.ipynb").cells if c.get("outputs")]


def test_every_page_with_code_is_executed_beforehand():
    pages = {path.relative_to(BOOK).as_posix() for path in pages_with_code(BOOK)}
    assert {"01_linear_attention.md", "appendix/A_measuring.md", "solutions/01_linear_attention.md"} <= pages
    assert "instructors.md" in pages and "notation.md" not in pages


def test_nothing_is_loaded_from_elsewhere(site):
    for path in set(site.rglob("*.html")) - set((site / "_static").rglob("*.html")):
        soup = BeautifulSoup(path.read_text("utf-8"), "html.parser")
        loaded = [tag.get("src") for tag in soup.find_all(["script", "img", "iframe", "source"])]
        loaded += [tag.get("href") for tag in soup.find_all("link") if "canonical" not in tag.get("rel", [])]
        assert not [url for url in loaded if url and re.match(r"(https?:)?//", url)], path.name
        for url in filter(None, loaded):
            if not url.startswith("data:"):
                local = (path.parent / url.split("?")[0].split("#")[0]).resolve()
                assert local.exists(), f"{path.name} asks for {url}"
    for path in (site / "_static").rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?https?:", path.read_text("utf-8")), path.name


DRAWN = """
(async () => {
  while (!window.MathJax?.startup?.promise) await new Promise((resolve) => setTimeout(resolve, 50));
  await MathJax.startup.promise;
  await document.fonts.ready;
})()
"""
PHONE, LAPTOP, PROJECTOR = 390, 1280, 1920


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no Chromium here")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def test_mathematics_is_rendered_and_the_console_is_quiet(site, browser):
    browser.open(site / "01_first.html")
    browser.ask(DRAWN)
    assert browser.ask("document.querySelectorAll('mjx-container').length"), "MathJax has drawn nothing"
    assert not browser.complaints, browser.complaints


def test_no_glyph_of_any_formula_is_cut_off(site, browser):
    displayed, inline = formulas()
    assert len(displayed) > 100 and len(inline) > 500
    browser.open(site / "03_formulas.html")
    browser.ask(DRAWN)
    assert not browser.ask("document.querySelectorAll('mjx-merror').length"), "MathJax does not understand a formula"
    # With one device pixel to each of CSS, test_pages.py asks the same of every formula where it stands.
    for width, density in ((PHONE, 1.25), (LAPTOP, 1), (LAPTOP, 1.25), (PROJECTOR, 1.25)):
        browser.resize(width, density)
        assert browser.ask("[innerWidth, devicePixelRatio]") == [width, density]
        found = browser.ask(f"({CUT_OFF})()")
        assert (found["count"]["display"], found["count"]["inline"]) == (len(displayed), len(inline))
        assert found["count"]["glyphs"] > 3 * (len(displayed) + len(inline))
        assert found["cut"] == {"display": 0, "inline": 0}, f"{width} pixels wide, density {density}"
        assert not found["upright"], "a formula scrolls up and down"
        assert not found["barred"], "a formula that fits has a scroll bar"
    browser.ask("for (const sheet of document.styleSheets) sheet.disabled ||= /book[.]css/.test(sheet.href)")
    spoilt = browser.ask(f"({CUT_OFF})()")["cut"]  # as the theme alone has it
    assert spoilt["display"] > 10 and spoilt["inline"] > 10


def test_a_broken_reference_fails(tmp_path, capfd):
    write(tmp_path / "book", first=FIRST.replace("{eq}`eq-a`", "{eq}`eq-nowhere`"))
    with pytest.raises(SystemExit, match="sphinx found errors"):
        main(["--sources-dir", str(tmp_path / "book"), "--stored", "--out-dir", str(tmp_path / "html")])
    assert "eq-nowhere" in capfd.readouterr().err
