"""`make slides`: every figure of a chapter is on a slide, and a page of slides works by itself, without a network."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import PROGRAM
from bs4 import BeautifulSoup
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tools.lowering import Book
from tools.notebooks import ROOT
from tools.slides import main, slides, still

BOOK = Book(ROOT / "book")
every_page = pytest.mark.parametrize("path", BOOK.pages, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    main(["--out-dir", str(folder)])
    return folder


def soup(out: Path, path: Path) -> BeautifulSoup:
    text = (out / f"{path.stem}.html").read_text("utf-8")
    return BeautifulSoup(text[: text.index("<script>")], "html.parser")


# --- what is on the slides


@every_page
def test_every_figure_with_its_caption_and_every_question(out, path):
    cells = jupytext.read(path, fmt="md:myst").cells
    names = [cell.metadata.get("mystnb", {}).get("figure", {}).get("name") for cell in cells]
    wanted = [f"Figure {name.removeprefix('fig-').replace('-', '.')}." for name in names if name]
    found = soup(out, path)
    captions = found.select("section.figure figcaption")
    assert len(wanted) > 2
    assert [caption.b.get_text() for caption in captions] == wanted
    assert all(len(caption.get_text()) > 40 for caption in captions)
    for figure in found.select("figure"):
        pictures = figure.select("img")
        assert [picture["class"] for picture in pictures] in ([["drawn"]], [["moving"], ["still"]])
        assert all(picture["src"].startswith("data:image/png;base64,") for picture in pictures)
        assert all(len(picture["alt"]) > 20 for picture in pictures)
    asked = path.read_text("utf-8").count("```{admonition} Predict")
    assert len(found.select("section.question")) >= asked
    titles = found.select("h1")
    assert len(titles) == 1 and "?" in found.select_one("section.title .body").get_text()


@every_page
def test_equations_and_exercises_in_their_order(out, path):
    found = soup(out, path)
    text = path.read_text("utf-8")
    exercises = re.findall(r"(?m)^:label: ex-(\w+)-(\d+)$", text)
    items = [item.get_text().split()[0] for item in found.select("section.exercises li")]
    assert items == [".".join(number) for number in exercises]
    tags = re.findall(r"\\tag\{([\w.]+)\}", found.get_text())
    numbers = [number for label, number in BOOK.equations.items() if f":label: {label}\n" in text]
    assert tags == numbers


def test_nothing_of_markdown_or_myst_is_left(out):
    for path in BOOK.pages:
        found = soup(out, path)
        for code in found.select("code, .tex"):
            code.decompose()
        text = "\n".join(part.get_text() for part in found.select("section"))
        assert not re.search(r"\*\*|\]\(|\{(eq|doc|ref|cite)\}|\$|^#", text), path.name


def test_what_moves_has_a_still_for_print():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="PNG", save_all=True, append_images=frames[1:], default_image=True, duration=100)
    calm = still(buffer.getvalue())
    assert calm is not None
    with Image.open(io.BytesIO(calm)) as picture:
        assert not getattr(picture, "is_animated", False) and picture.getpixel((0, 0)) == (255, 0, 0)
    assert still(calm) is None


def test_a_caption_without_a_picture_is_an_error():
    cell = nbformat.v4.new_markdown_cell("*Figure 1.1.* Nothing.")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1"), cell])
    with pytest.raises(ValueError, match=r"Figure 1\.1 has no picture"):
        slides(notebook)


def test_a_notebook_out_of_step_is_an_error(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "01_one.md").write_text("# One\n\n**The question.** Why?\n")
    with pytest.raises(SystemExit, match="missing: run make notebooks"):
        main(["--sources-dir", str(tmp_path), "--out-dir", str(tmp_path / "out")])
    cells = [nbformat.v4.new_markdown_cell("# 1. One\n\nNo question.")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "01_one.ipynb")
    with pytest.raises(SystemExit, match="out of step"):
        main(["--sources-dir", str(tmp_path), "--out-dir", str(tmp_path / "out")])


def test_the_same_book_gives_the_same_slides(out, tmp_path):
    main(["--only", "01", "--out-dir", str(tmp_path)])
    (made,) = tmp_path.iterdir()
    assert made.read_bytes() == (out / made.name).read_bytes()


# --- in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("no Chromium here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, path: Path, **options) -> tuple[Page, list[str]]:
    """The page, when its formulas are drawn, and what it complains about or asks for elsewhere."""
    page = browser.new_page(viewport={"width": 1280, "height": 720}, **options)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]", state="attached", timeout=60_000)
    wrong.remove(path.as_uri())
    return page, wrong


@every_page
def test_opens_without_a_complaint_and_nothing_is_cut_off(chromium, out, path):
    page, wrong = opened(chromium, out / f"{path.stem}.html")
    assert not wrong
    drawn, formulas = (
        page.evaluate(f"document.querySelectorAll('{name}').length") for name in ("mjx-container", ".tex")
    )
    assert drawn == formulas
    assert page.evaluate("document.querySelectorAll('mjx-merror, [data-mjx-error]').length") == 0
    count = page.evaluate("all.length")
    assert page.evaluate("all.filter(tight).map((slide) => slide.id)") == []
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    printed = page.pdf(prefer_css_page_size=True, print_background=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == count
    page.close()


def test_what_does_not_fit_is_found(chromium, out):
    page, _ = opened(chromium, out / "02_delta_rule.html")
    page.evaluate("all[0].querySelector('.body').style.fontSize = '200px'")
    assert page.evaluate("tight(all[0])")
    page.close()


def test_by_keyboard_and_buttons(chromium, out):
    page, wrong = opened(chromium, out / "02_delta_rule.html")
    count = page.evaluate("all.length")

    def shown() -> int:
        visible = page.evaluate("all.filter((s) => getComputedStyle(s).visibility === 'visible').map((s) => +s.id)")
        assert len(visible) == 1
        return visible[0]

    assert shown() == 1
    for key, expected in [("ArrowRight", 2), ("PageDown", 3), ("Space", 4), ("ArrowLeft", 3), ("Shift+Space", 2)]:
        page.keyboard.press(key)
        assert shown() == expected, key
    page.keyboard.press("End")
    assert shown() == count
    page.keyboard.press("ArrowRight")
    assert shown() == count
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert shown() == 1
    page.locator("#on").click()
    assert shown() == 2 and page.url.endswith("#2")
    assert page.locator("section.shown img.moving").is_visible()
    page.keyboard.press("p")
    assert page.locator("section.shown img.still").is_visible()
    assert not page.locator("section.shown img.moving").is_visible()
    page.evaluate("location.hash = '#5'")
    page.wait_for_function("document.querySelector('.shown').id === '5'")
    assert not wrong
    page.close()


def test_paper_and_readers_who_want_no_motion_get_the_still(chromium, out):
    page, _ = opened(chromium, out / "02_delta_rule.html", reduced_motion="reduce")
    pictures = "[...document.querySelectorAll('img.KIND')].map((image) => getComputedStyle(image).display)"
    for media in ("screen", "print"):
        page.emulate_media(media=media, reduced_motion="reduce" if media == "screen" else "no-preference")
        assert set(page.evaluate(pictures.replace("KIND", "moving"))) == {"none"}
        assert set(page.evaluate(pictures.replace("KIND", "still"))) == {"block"}
    page.close()


def test_slides_are_accessible(chromium, out):
    page, _ = opened(chromium, out / "02_delta_rule.html")
    for _ in range(3):  # title, figure, equations
        found = Axe().run(page, options={"preload": False}).response["violations"]
        serious = [violation for violation in found if violation["impact"] in {"serious", "critical"}]
        assert not serious, "\n".join(f"{v['id']}: {node['html'][:200]}" for v in serious for node in v["nodes"])
        page.keyboard.press("ArrowRight")
    page.close()
