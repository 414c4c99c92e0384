"""`make book` on two tiny chapters: numbers, folds and links are right, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import jupytext
import pytest
from browser import PROGRAM, Browser
from bs4 import BeautifulSoup

from tools.lowering import Book, directives, prose
from tools.site import ROOT, main

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

Show {eq}`eq-a` {cite}`yang2024parallelizing`.

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
appendix/A_more
appendix/B_last
```
"""
EXTRA = """# Appendix {letter}: More

```{{math}}
:label: eq-{letter}
z = 3
```

{{eq}}`eq-{letter}`, {{eq}}`eq-a`, {{doc}}`first </01_first>`

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
    conf = (BOOK / "conf.py").read_text("utf-8")
    (folder / "conf.py").write_text(conf.replace("Path(__file__).resolve().parents[2]", f"Path({str(ROOT)!r})"))
    shutil.copytree(BOOK / "_static", folder / "_static")
    (folder / "index.md").write_text(INDEX)
    (folder / "01_first.md").write_text(HEAD + first, encoding="utf-8")
    (folder / "02_second.md").write_text(HEAD + SECOND, encoding="utf-8")
    (folder / "appendix").mkdir()
    for name in ("A_more", "B_last"):
        (folder / "appendix" / f"{name}.md").write_text(HEAD + EXTRA.format(letter=name[0]), encoding="utf-8")
    (folder / "solutions" / "01_first.md").write_text(HEAD + "# Solutions\n\nText.\n")


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


@pytest.mark.parametrize("name", ["A_more", "B_last"])
def test_appendices_are_numbered_by_their_letter(site, name):
    appendix, letter = page(site, f"appendix/{name}.html"), name[0]
    assert [span.get_text()[:5] for span in appendix.select(".eqno")] == [f"({letter}.1)"]
    assert f"({letter}.1), (1.1), first" in appendix.select_one("article").get_text()
    assert f"Figure {letter}.1" in appendix.select_one("figcaption").get_text()


def test_hints_are_folded_and_exercises_lead_to_their_solutions(site):
    exercise = page(site, "01_first.html").select_one(".exercise")
    assert not exercise.select_one("details").has_attr("open")
    assert exercise.select_one(".solution-link a")["href"] == "solutions/01_first.html"


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


# Formulas of which a glyph is cut off: it has less than one pixel of room (the least that keeps it whole, for glyphs
# are drawn on whole pixels) above or below within an element that clips, or stands out sideways from one that does
# not scroll.
CUT_OFF = """
(() => {
  const known = new Map();
  const clips = (element) => {  // the elements around that hide what stands out of them, the innermost last
    if (!element || element === document.body) return [];
    if (!known.has(element)) {
      const style = getComputedStyle(element), found = [...clips(element.parentElement)];
      if (style.overflowY !== "visible") {
        const box = element.getBoundingClientRect(), left = box.left + element.clientLeft;
        const top = box.top + element.clientTop, scrolls = ["auto", "scroll"].includes(style.overflowX);
        found.push({ left, right: left + element.clientWidth, top, bottom: top + element.clientHeight, scrolls });
      }
      known.set(element, found);
    }
    return known.get(element);
  };
  const cut = { display: 0, inline: 0 }, count = { display: 0, inline: 0, glyphs: 0 };
  for (const formula of document.querySelectorAll("mjx-container")) {
    const around = clips(formula), kind = formula.closest("div.math") ? "display" : "inline";
    const glyphs = [...formula.querySelectorAll("mjx-c")].map((glyph) => glyph.getBoundingClientRect());
    const shown = glyphs.filter((box) => box.height > 0);
    const inside = (box) =>
      around.every((clip) => box.top - clip.top >= 1 && clip.bottom - box.bottom >= 1) &&
      around.slice(-1).every((clip) => clip.scrolls || (box.left > clip.left - 1 && box.right < clip.right + 1));
    count[kind] += shown.length > 0;
    count.glyphs += shown.length;
    cut[kind] += !shown.every(inside);
  }
  const boxes = [...document.querySelectorAll(".math, mjx-container")];
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowY);
  const upright = boxes.filter((element) => scrolls(element) && element.scrollHeight > element.clientHeight);
  const fits = (element) => {  // all of its glyphs are seen without scrolling
    const { left, width } = element.getBoundingClientRect();
    const boxes = [...element.querySelectorAll("mjx-c")].map((glyph) => glyph.getBoundingClientRect());
    return boxes.every((box) => box.left >= left && box.right <= left + width);
  };
  const barred = boxes.filter((element) => element.offsetHeight > element.clientHeight && fits(element));
  return { count, cut, upright: upright.length, barred: barred.length };
})()
"""
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
    for width in (PHONE, LAPTOP, PROJECTOR):
        for density in (1, 1.25):
            browser.resize(width, density)
            assert browser.ask("[innerWidth, devicePixelRatio]") == [width, density]
            found = browser.ask(CUT_OFF)
            assert (found["count"]["display"], found["count"]["inline"]) == (len(displayed), len(inline))
            assert found["count"]["glyphs"] > 3 * (len(displayed) + len(inline))
            assert found["cut"] == {"display": 0, "inline": 0}, f"{width} pixels wide, density {density}"
            assert not found["upright"], "a formula scrolls up and down"
            assert not found["barred"], "a formula that fits has a scroll bar"
    browser.ask("for (const sheet of document.styleSheets) sheet.disabled ||= /book[.]css/.test(sheet.href)")
    spoilt = browser.ask(CUT_OFF)["cut"]  # as the theme alone has it
    assert spoilt["display"] > 10 and spoilt["inline"] > 10


def test_a_broken_reference_fails(tmp_path, capfd):
    write(tmp_path / "book", first=FIRST.replace("{eq}`eq-a`", "{eq}`eq-nowhere`"))
    with pytest.raises(SystemExit, match="sphinx found errors"):
        main(["--sources-dir", str(tmp_path / "book")])
    assert "eq-nowhere" in capfd.readouterr().err
