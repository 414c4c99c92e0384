"""Animations on paper, figures on a phone: `tools.site_ext.figures` and book.css, on a page with two figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from browser import PROGRAM, Browser
from bs4 import BeautifulSoup
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CONF = """
extensions = ["myst_nb", "tools.site_ext.figures"]
html_theme = "sphinx_book_theme"
html_static_path = [{static!r}]
html_css_files = ["book.css"]
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
"""
PAGE = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# Pictures

```{code-cell} ipython3
---
mystnb:
  image: {alt: Something moves}
  figure: {caption: A caption that is longer than a phone is wide and so has more lines than one., name: fig-moves}
---
from dn_lib.teaching import plotting

write = lambda fig, word: fig.text(0.5, 0.5, word)
plotting.animation(write, ["one", "two"], height=2, still=lambda fig: write(fig, "both"))
```

```{code-cell} ipython3
---
mystnb:
  image: {alt: A line}
  figure: {caption: A line., name: fig-line}
---
plotting.use_style()
fig, ax = plotting.figure(height=2)
_ = ax.plot([0, 1])
```
"""


def build(folder: Path, builder: str) -> Path:
    out = folder / builder
    command = [sys.executable, "-m", "sphinx", "-b", builder, "-q", "-W", "-d", folder / "doctrees"]
    command += [folder / "source", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "source").mkdir()
    (folder / "source" / "conf.py").write_text(CONF.format(static=str(ROOT / "book" / "_static")))
    (folder / "source" / "index.md").write_text(PAGE)
    return folder


@pytest.fixture(scope="module")
def site(folder) -> Path:
    return build(folder, "html")


def test_the_book_is_built_with_it():
    conf = (ROOT / "book" / "conf.py").read_text("utf-8")
    assert '"tools.site_ext.figures"' in conf and '"book.css"' in conf


def test_only_what_moves_has_a_still(site):
    moving, line = BeautifulSoup((site / "index.html").read_text("utf-8"), "html.parser").select("article figure")
    first, second = moving.select(".dn-picture > img")
    assert (first["class"], second["class"]) == (["dn-moving"], ["dn-still"])
    assert str(second["alt"]).endswith("Something moves") and moving.select("figure > figcaption")
    pages = [getattr(Image.open(site / image["src"]), "n_frames", 1) for image in (first, second)]
    assert pages == [1 + 2, 1]  # the still and two frames; the still
    (only,) = line.select(".dn-picture > img")
    assert "class" not in only.attrs


def test_a_builder_of_paper_gets_one_picture_of_each(folder):
    (tex,) = build(folder, "latex").glob("*.tex")
    text = tex.read_text("utf-8")
    assert text.count("sphinxincludegraphics{") == 2 and "_still" not in text


SHOWN = "[...document.querySelectorAll('article figure img')].map((image) => image.getClientRects().length > 0)"
SIZES = """
[...document.querySelectorAll('.dn-picture')].map((box) => {
  const image = [...box.children].find((child) => child.getClientRects().length);
  return [image.getBoundingClientRect().width, box.clientWidth, box.scrollWidth, 0.6 * image.naturalWidth];
})
"""


@pytest.fixture(scope="module")
def browser(site, tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no Chromium here")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        browser.resize(1280, 1)
        browser.open(site / "index.html")
        yield browser


@pytest.mark.parametrize(
    ("media", "shown"),
    [
        ({"media": "screen"}, [True, False, True]),
        ({"media": "print"}, [False, True, True]),
        ({"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}, [False, True, True]),
    ],
)
def test_paper_and_quiet_screens_show_the_still(browser, media, shown):
    browser.send("Emulation.setEmulatedMedia", **media)
    assert browser.ask(SHOWN) == shown
    browser.send("Emulation.setEmulatedMedia", media="", features=[])


def test_a_page_read_in_the_dark_is_printed_on_white(browser):
    theme = "document.documentElement.dataset.theme"
    browser.ask(f"{theme} = 'dark'")
    browser.ask(f"addEventListener('beforeprint', () => window.printed = {theme})")
    browser.send("Page.printToPDF")
    assert [browser.ask("window.printed"), browser.ask(theme)] == ["light", "dark"]
    browser.ask(f"{theme} = 'light'")


def test_a_phone_shows_a_point_as_a_pixel_and_the_page_stays_put(browser):
    browser.resize(390, 2)
    try:
        for width, room, whole, points in browser.ask(SIZES):
            assert width == pytest.approx(points, abs=1) and room < 390 and whole >= width - 1  # the box scrolls
        assert browser.ask("document.documentElement.scrollWidth") <= 390
        for whole in (True, False):  # a touch of the button, and another
            browser.ask("document.querySelectorAll('.dn-whole').forEach((button) => button.click())")
            assert [width <= room for width, room, *_ in browser.ask(SIZES)] == [whole] * 2
        browser.resize(1280, 1)
        for width, room, whole, _ in browser.ask(SIZES):
            assert 72 * 7.2 < width <= room and whole == room  # a wide screen shows all of it, and no button
        assert browser.ask("[...document.querySelectorAll('.dn-whole')].every((b) => !b.getClientRects().length)")
    finally:
        browser.resize(1280, 1)
