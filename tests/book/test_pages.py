"""Every page of the book's site in a real browser (Debian's Chromium, driven by Playwright).

The site is the book's own, with the results that `book/notebooks` holds (`tools.site --stored`): nothing is executed.
Each page is opened once, at three widths, light and dark: the console is quiet, nothing is asked of another machine,
all formulas, pictures and links are there, no glyph is cut off, no text scrolls sideways, and axe-core finds nothing
serious.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import PROGRAM
from bs4 import BeautifulSoup
from page_checks import CUT_OFF, FLATTEN, NOT_DRAWN, SETTLED, SIDEWAYS, UNREACHABLE
from playwright.sync_api import Browser, Page, TimeoutError, expect, sync_playwright

from tools.site import ROOT, main

BOOK = ROOT / "book"
WIDTHS = {"phone": 390, "laptop": 1280, "projector": 1920}
SOURCES = [
    path
    for folder in (".", "beyond", "appendix", "reference", "solutions")
    for path in sorted((BOOK / folder).glob("*.md"))
]
PAGES = [path.relative_to(BOOK).with_suffix("").as_posix() for path in SOURCES if path.name != "print.md"]
MADE = ["genindex", "py-modindex", "search"]  # by Sphinx itself
MAY_SCROLL = ".dn-picture, pre, div.math, span.math, .pst-scrollable-table-container, .dn-recall"
LINKS = (
    "article a[href], article img[src], .bd-sidebar-primary a[href], .header-article a[href], .prev-next-footer a[href]"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("no Chromium here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(chromium, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pages") / "html"
    main(["--stored", "--out-dir", str(out)])
    return out


@pytest.fixture(scope="module")
def window(chromium) -> Iterator[tuple[Page, list[str]]]:
    """One window for all pages, and what went wrong in it."""
    wrong: list[str] = []
    context = chromium.new_context(color_scheme="light", reduced_motion="reduce")
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    # What a click leaves behind half loaded is "aborted".
    page.on("requestfailed", lambda r: wrong.append(r.url) if r.failure != "net::ERR_ABORTED" else None)
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    yield page, wrong
    context.close()


@pytest.fixture
def visit(site, window):
    """Opens a page by its name, at a laptop's width; in the end nothing may have gone wrong."""
    page, wrong = window
    wrong.clear()

    def open_page(name: str, query: str = "") -> Page:
        page.set_viewport_size({"width": WIDTHS["laptop"], "height": 900})
        page.goto((site / f"{name}.html").as_uri() + query)
        page.evaluate(SETTLED)
        return page

    yield open_page
    assert not wrong


def serious(page: Page, rules: list[str] | None = None) -> list[str]:
    """What axe-core finds that is serious or worse, formulas left out."""
    options: dict = {"preload": False, "resultTypes": ["violations"]}
    if rules:
        options["runOnly"] = {"type": "rule", "values": rules}
    found = Axe().run(page, context={"exclude": [["mjx-container"]]}, options=options).response["violations"]
    worst = [violation for violation in found if violation["impact"] in {"serious", "critical"}]
    return [f"{violation['id']}: {node['html'][:200]}" for violation in worst for node in violation["nodes"]]


def show(page: Page, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate(
        "(scheme) => Object.assign(document.documentElement.dataset, { theme: scheme, mode: scheme })", scheme
    )


def found_in_the_end(page: Page, script: str) -> list[str]:
    """What `script` finds: nothing, as soon as it finds nothing, or what it still finds after two seconds.

    The theme makes stops for the tab key a third of a second after a window has changed.
    """
    with contextlib.suppress(TimeoutError):
        page.wait_for_function(f"() => !({script})().length", timeout=2000)
    return page.evaluate(script)


# --- Every page ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PAGES, *MADE])
def test_a_page(visit, name):
    page = visit(name)
    page.evaluate("document.querySelectorAll('article details').forEach((fold) => (fold.open = true))")
    assert page.evaluate(NOT_DRAWN) == []
    for size, width in WIDTHS.items():
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("innerWidth") == width
        formulas = page.evaluate(CUT_OFF)
        assert formulas["cut"] == {"display": 0, "inline": 0}, size
        assert page.evaluate(SIDEWAYS, MAY_SCROLL) == [], size
    page.set_viewport_size({"width": WIDTHS["phone"], "height": 900})
    assert found_in_the_end(page, UNREACHABLE) == []
    page.evaluate(FLATTEN)
    show(page, WIDTHS["laptop"], "light")
    assert found_in_the_end(page, UNREACHABLE) == []
    assert serious(page) == [], "light"
    show(page, WIDTHS["laptop"], "dark")
    assert serious(page, ["color-contrast"]) == [], "dark"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_code_is_readable(visit, scheme):
    page = visit("solutions/05_triton_kernel")
    show(page, WIDTHS["laptop"], scheme)
    assert page.locator(".highlight span").count() > 500
    assert serious(page, ["color-contrast"]) == []


def test_every_link_and_picture_leads_somewhere(site):
    pages = {path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in site.rglob("*.html")}
    pages = {path: soup for path, soup in pages.items() if "_static" not in path.parts}
    assert {path.relative_to(site).with_suffix("").as_posix() for path in pages} == {*PAGES, *MADE}
    ids = {path: {tag["id"] for tag in soup.find_all(id=True)} for path, soup in pages.items()}
    broken = []
    for path, soup in pages.items():
        for tag in soup.select(LINKS):
            address = tag.get("href") or tag.get("src")
            if re.match(r"(https?|mailto|data):", address):
                continue
            file, _, anchor = address.partition("#")
            target = (path.parent / file.partition("?")[0]).resolve() if file else path
            if not target.is_file() or (anchor and target in ids and anchor not in ids[target]):
                broken.append(f"{path.relative_to(site)}: {address}")
    assert not broken


def test_the_checks_see_what_is_wrong(visit):
    page = visit("reference/operators")
    page.evaluate("document.querySelector('article p').style.cssText = 'width: 3000px; color: #ddd'")
    assert "the page" in page.evaluate(SIDEWAYS, MAY_SCROLL)
    assert [found for found in serious(page) if found.startswith("color-contrast")]
    page.evaluate("document.querySelector('article p').innerHTML = '<img src=\"data:,\"><span class=math>x</span>'")
    assert len(page.evaluate(NOT_DRAWN)) == 2
    page.evaluate("Object.assign(document.querySelector('article pre').style, { width: '50px', overflow: 'auto' })")
    page.evaluate("document.querySelector('article pre').tabIndex = -1")
    assert len(page.evaluate(UNREACHABLE)) >= 1
    page = visit("02_delta_rule")
    page.evaluate("for (const sheet of document.styleSheets) sheet.disabled ||= /book[.]css/.test(sheet.href)")
    assert page.evaluate(CUT_OFF)["cut"]["display"] > 3


# --- Search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query, first",
    [
        ("UT transform", "03_householder_wy.html"),
        ("chunk_delta_rule", "reference/operators.html#dn_lib.chunk_delta_rule"),
    ],
)
def test_search_finds_it_and_quotes_it(visit, site, query, first):
    page = visit("search", "?q=" + query.replace(" ", "+"))
    expect(page.locator("#search-results .search-summary")).to_contain_text(re.compile(r"found (one|\d+) pages?"))
    results = page.locator("#search-results li")
    links = [link.get_attribute("href") for link in results.locator("a").all()]
    assert links[0].startswith(first)
    assert results.count() == page.locator("#search-results li .context").count() > 0
    assert query.lower() in results.first.inner_text().lower()
    # It leads to the section that is quoted, and not to the top of its page.
    quoted = re.sub(r"\W+", " ", results.first.locator("mark").first.inner_text())
    with page.expect_navigation():
        results.first.locator("a").click()
    page.evaluate(SETTLED)
    section = page.evaluate(
        "document.getElementById(decodeURIComponent(location.hash.slice(1)))?.parentElement.textContent"
    )
    assert quoted.lower() in section.lower()
    assert page.evaluate("scrollY") > 500


def test_search_from_a_page(visit):
    page = visit("index")
    page.keyboard.press("Control+k")
    page.keyboard.type("orthogonal keys")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("search.html"))
    expect(page.locator("#search-results .context").first).to_be_visible()


# --- Previews -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, link, shown",
    [
        ("02_delta_rule", "article a[href^='#equation-']", "mjx-container"),
        ("solutions/02_delta_rule", "article a[href*='02_delta_rule.html#equation-']", "mjx-container"),
        ("02_delta_rule", "article a.dn-term[href*='term-Delta-rule']", "text=Write the difference between"),
        ("03_householder_wy", "article a[href*='bibliography.html#']", "text=/[12][90][0-9][0-9]/"),
    ],
)
def test_previews(visit, name, link, shown):
    page = visit(name)
    links = [candidate for candidate in page.locator(link).all() if candidate.is_visible()]
    assert links
    box = page.locator(".dn-preview")
    links[0].scroll_into_view_if_needed()
    links[0].hover()
    expect(box.locator(shown).first).to_be_visible()
    where, window = box.bounding_box(), page.viewport_size
    assert where and where["x"] >= 0 and where["x"] + where["width"] <= window["width"]
    page.keyboard.press("Escape")
    expect(box).to_have_count(0)
    page.mouse.move(0, 0)
    page.keyboard.press("Tab")  # from here on the keyboard leads
    links[0].focus()
    expect(box).to_be_visible()
    assert links[0].get_attribute("aria-describedby") == box.get_attribute("id")
    links[0].blur()
    expect(box).to_have_count(0)


# --- Exercises, code, notebooks -----------------------------------------------------------------------------------


def test_hints_by_the_keyboard_alone_in_a_few_tabs(visit):
    page = visit("02_delta_rule")
    titles = page.locator(".exercise .admonition-title")
    assert titles.count() == 8
    for number in range(8):
        titles.nth(number).click()  # where a reader is; the tab key goes on from there
        for _ in range(4):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.matches('summary')"):
                break
        summary = page.locator("summary:focus")
        expect(summary).to_have_text(re.compile("^Hint"))
        assert summary.evaluate("(summary) => getComputedStyle(summary).outlineStyle") != "none"
        fold = summary.locator("xpath=..")
        assert not fold.evaluate("(fold) => fold.open")
        page.keyboard.press("Enter")
        assert fold.evaluate("(fold) => fold.open")
        solution = fold.locator(".solution-link a")
        expect(solution).to_have_attribute("href", f"solutions/02_delta_rule.html#solution-2-{number + 1}")
        page.keyboard.press("Enter")


def test_no_solution_is_in_the_way_and_each_leads_to_its_section(site):
    count = 0
    for path in sorted(site.glob("[0-9]*.html")):
        soup = BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for link in soup.select(".solution-link a"):
            count += 1
            number = link.get_text().removeprefix("Solution to exercise ")
            assert link.find_parent("details"), f"the solution of {number} is not behind a hint"
            file, _, anchor = link["href"].partition("#")
            solutions = BeautifulSoup((site / file).read_text("utf-8"), "html.parser")
            target = solutions.find(id=anchor)
            section = target if target.name == "section" else target.find_parent("section")
            assert section.h2.get_text().startswith(f"{number} "), link["href"]
    assert count == sum(path.read_text("utf-8").count("{exercise}") for path in BOOK.glob("[0-9]*.md"))


def test_code_is_copied_as_it_was_typed(visit):
    page = visit("02_delta_rule")
    cell = page.locator(".cell_input").nth(1)
    cell.hover()
    cell.get_by_role("button", name="Copy this code").click()
    expect(cell.get_by_role("button")).to_have_text("Copied")
    page.evaluate("document.querySelector('article').prepend(document.createElement('textarea'))")
    page.locator("article textarea").focus()
    page.keyboard.press("Control+v")
    pasted = page.locator("article textarea").input_value()
    assert pasted == cell.locator("pre").inner_text().removesuffix("\n") and "import torch" in pasted
    # An example is copied without its prompts and without its results.
    page = visit("reference/operators")
    example = page.locator(".doctest").first
    example.hover()
    example.get_by_role("button", name="Copy this code").click()
    page.evaluate("document.querySelector('article').prepend(document.createElement('textarea'))")
    page.locator("article textarea").focus()
    page.keyboard.press("Control+v")
    pasted = page.locator("article textarea").input_value()
    assert pasted.startswith("q = k = v = torch.eye(16)") and ">>>" not in pasted and "(True" not in pasted


def test_every_page_with_a_notebook_offers_it(visit, site):
    page = visit("appendix/A_measuring")
    link = page.locator("a.btn-dn-notebook")
    href = link.get_attribute("href")
    target = (site / "appendix" / href).resolve()
    assert nbformat.read(target, as_version=4) == nbformat.read(BOOK / "notebooks" / "A_measuring.ipynb", as_version=4)
    offered = {path for path in PAGES if "btn-dn-notebook" in (site / f"{path}.html").read_text("utf-8")}
    assert {name.rpartition("/")[2] for name in offered} == {path.stem for path in BOOK.glob("notebooks/*.ipynb")}


def test_an_animation_can_be_stopped(site, chromium):
    context = chromium.new_context(reduced_motion="no-preference")
    page = context.new_page()
    page.goto((site / "02_delta_rule.html").as_uri())
    moving, still = page.locator("img.dn-moving").first, page.locator("img.dn-still").first
    expect(moving).to_be_visible()
    page.get_by_role("button", name="Stop the animation").first.click()
    expect(moving).to_be_hidden()
    expect(still).to_be_visible()
    page.get_by_role("button", name="Play the animation").first.click()
    expect(moving).to_be_visible()
    page.emulate_media(reduced_motion="reduce")
    expect(moving).to_be_hidden()
    expect(still).to_be_visible()
    context.close()


def test_a_picture_is_a_stop_of_the_tab_key_only_where_it_scrolls(visit):
    page = visit("02_delta_rule")
    stops = page.locator(".dn-picture[tabindex='0'][role='group'][aria-label]")
    expect(stops).to_have_count(0)
    page.set_viewport_size({"width": WIDTHS["phone"], "height": 900})
    expect(stops).to_have_count(page.locator(".dn-picture").count())
    page.get_by_role("button", name="Show the whole picture").first.click()
    expect(stops).to_have_count(page.locator(".dn-picture").count() - 1)
    page.set_viewport_size({"width": WIDTHS["laptop"], "height": 900})
    expect(page.locator(".dn-picture:is([tabindex], [role], [aria-label])")).to_have_count(0)


def test_what_is_folded_is_printed_and_no_code_is_cut(visit):
    page = visit("02_delta_rule")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("article details:not([open])").count() == 0
    cut = "[...document.querySelectorAll('article pre')].filter((box) => box.scrollWidth > box.clientWidth + 1).length"
    assert page.evaluate(cut) == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("article details:not([open])").count() > 5
    page.emulate_media(media="screen")


# --- The reference ------------------------------------------------------------------------------------------------


def test_the_reference_has_every_public_operator_and_its_equation(site):
    import dn_lib

    soup = BeautifulSoup((site / "reference/operators.html").read_text("utf-8"), "html.parser")
    for name in dn_lib.__all__:
        assert soup.find(id=f"dn_lib.{name}"), f"{name} is not in the reference"
    forms = BeautifulSoup((site / "reference/forms.html").read_text("utf-8"), "html.parser")
    entry = forms.find(id="dn_lib.forms.householder.ut_transform").find_parent("dl")
    equations = {link["href"] for link in entry.select("a[href*='#equation-']")}
    assert "../03_householder_wy.html#equation-eq-ut" in equations
    for page in ("operators", "forms", "models", "training"):
        article = BeautifulSoup((site / f"reference/{page}.html").read_text("utf-8"), "html.parser").select_one(
            "article"
        )
        unknown = re.findall(r"(?<![\w-])eq-[a-z-]+", article.get_text())
        assert not unknown, f"docstrings on {page} name equations that the book does not have"


def test_results_name_machine_command_and_commit(site):
    soup = BeautifulSoup((site / "results.html").read_text("utf-8"), "html.parser")
    files = {path.stem for path in BOOK.glob("results/*.json")}
    assert {heading.get_text().rstrip("#") for heading in soup.select("article h2")} == files
    for link in soup.select("a.download"):
        assert (site / link["href"]).is_file()
    assert "NVIDIA H200" in soup.get_text() and "commit" in soup.get_text()
