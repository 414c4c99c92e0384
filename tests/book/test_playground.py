"""The landing page and the page to play with, in a real browser (Debian's Chromium, driven by Playwright).

What the playground computes is what `dn_lib.forms` computes; both pages can be used by the keyboard alone, fit three
widths in light and dark, ask for nothing off the machine, and give axe-core nothing serious to say.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from browser import PROGRAM
from page_checks import SIDEWAYS
from playwright.sync_api import Browser, Page, expect, sync_playwright
from torch import Tensor
from torch.nn.functional import normalize

from dn_lib.forms.delta_rule import delta_rule_step, recurrent_delta_rule
from dn_lib.forms.gated import recurrent_gated_delta_rule
from dn_lib.forms.linear_attention import recurrent_linear_attention
from dn_lib.teaching.figures.ch2 import LETTERS, word
from dn_lib.teaching.plotting import MECHANISMS
from tools.site_ext.landing import times

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
FOLDERS = ("beyond", "appendix", "reference", "solutions")
PAGES = ("index", "playground")
WIDTHS = {"phone": 390, "laptop": 1280, "projector": 1920}
RULES = {"additive": "linear", "delta": "delta", "gated": "gated"}  # in the script, in MECHANISMS

# A chapter that takes 17 minutes to read, so that the landing page cannot have its times from anywhere else.
CHAPTER = """# {name}

(sec-{name})=
## Nothing
"""
TIMED = """# Linear attention

**Time.** The main line takes about 17 minutes to read, and about 4 more with
its code; what is folded away takes 2. The page runs in about 3 seconds on two CPU cores.

(sec-first)=
## Section

```{exercise} One ★ (50 minutes)
```

```{exercise} Another (★★, 15 min)
```
"""


def states(rule: str, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """The state of the library after all writes, scale 1."""
    if rule == "additive":
        return recurrent_linear_attention(k, k, v)[1]
    if rule == "delta":
        return recurrent_delta_rule(k, k, v, beta)[1]
    return recurrent_gated_delta_rule(k, k, v, beta, alpha.log())[1]


def distance(found: list, expected: Tensor) -> float:
    return float((torch.tensor(found, dtype=torch.float64) - expected).norm() / expected.norm())


# --- The site: both pages as they are, chapters cut down to a title ---------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("playground") / "book"
    folder.mkdir()
    for name in ("conf.py", "index.md", "playground.md", "notation.md", "bibliography.md", "references.bib"):
        shutil.copy(BOOK / name, folder)
    shutil.copytree(BOOK / "_static", folder / "_static")
    for path in [*BOOK.glob("[0-9][0-9]_*.md"), *(p for f in FOLDERS for p in BOOK.glob(f"{f}/*.md"))]:
        stub = folder / path.relative_to(BOOK)
        stub.parent.mkdir(exist_ok=True)
        text = TIMED if stub.name.startswith("01_") and stub.parent == folder else CHAPTER.format(name=stub.stem)
        stub.write_text(text, encoding="utf-8")
    for path in BOOK.glob("*.md"):  # further pages that the landing page lists
        if not (folder / path.name).exists():
            (folder / path.name).write_text(CHAPTER.format(name=path.stem), encoding="utf-8")
    out = folder / "_build" / "html"
    # No -W: sections of chapters that the notation page refers to are not there.
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-D", "nb_execution_mode=off", str(folder), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return out


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("no Chromium here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(site, chromium) -> Iterator[Callable[..., Page]]:
    """Opens a page by its name in a window with `options`; in the end nothing may have gone wrong in any of them."""
    contexts, wrong = [], []

    def open_page(name: str, width: int = 1280, **options) -> Page:
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        # Without JavaScript the browser refuses scripts: "csp".
        page.on("requestfailed", lambda request: wrong.append(request.url) if request.failure != "csp" else None)
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
        page.goto((site / f"{name}.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


# --- What is computed -------------------------------------------------------------------------------------------


def problems() -> list[dict]:
    """Random writes with unit keys, betas from 0 to 2 and gates from 0.5 to 1, and the states of `dn_lib.forms`."""
    generator, found = torch.Generator().manual_seed(0), []
    for rows, columns, length in ((2, 35, 1), (2, 35, 24), (5, 3, 40), (8, 8, 40)):
        k = normalize(torch.randn(length, rows, generator=generator, dtype=torch.float64), dim=-1)
        v = torch.randn(length, columns, generator=generator, dtype=torch.float64)
        beta = 2 * torch.rand(length, generator=generator, dtype=torch.float64)
        alpha = 0.5 + 0.5 * torch.rand(length, generator=generator, dtype=torch.float64)
        inputs = {name: x.tolist() for name, x in (("k", k), ("v", v), ("beta", beta), ("alpha", alpha))}
        for rule in RULES:
            state = states(rule, k, v, beta, alpha).tolist()
            found.append(inputs | {"rule": rule, "rows": rows, "columns": columns, "state": state})
    return found


def test_the_script_computes_what_the_library_computes(visit, tmp_path):
    """At most 40 writes: none enlarges an earlier error, and each adds some 10 roundings of 1.1e-16: 5e-14 in all."""
    (tmp_path / "values.json").write_text(json.dumps(problems()))
    cases = json.loads((tmp_path / "values.json").read_text())
    computed = visit("playground").evaluate(
        """(cases) => cases.map((c) => {
          const writes = c.k.map((k, t) => ({ k, v: c.v[t], beta: c.beta[t], alpha: c.alpha[t] }));
          return DeltaMemory.run(c.rule, writes, NaN, NaN, c.rows, c.columns);
        })""",
        cases,
    )
    expected = [torch.tensor(case["state"], dtype=torch.float64) for case in cases]
    errors = [distance(state, truth) for state, truth in zip(computed, expected, strict=True)]
    assert max(errors) < 1e-12, errors
    # The comparison tells the rules apart: on the same 24 writes, one rule's state is far from another's.
    assert min(distance(computed[i], expected[j]) for i in (3, 4, 5) for j in (3, 4, 5) if i != j) > 0.1


def test_the_script_reads_what_the_library_reads(visit):
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    k = torch.randn(4, generator=generator, dtype=torch.float64)
    zero = torch.zeros(6, dtype=torch.float64)
    answer = delta_rule_step(k, k, zero, torch.tensor(0.0, dtype=torch.float64), state, scale=1.0)[0]
    found = visit("playground").evaluate("([S, k]) => DeltaMemory.read(S, k)", [state.tolist(), k.tolist()])
    assert distance(found, answer) < 1e-12


def test_letters_and_colours_are_those_of_the_figures(visit, site):
    page = visit("playground")
    assert page.evaluate("DeltaMemory.LETTERS") == LETTERS
    for rule, mechanism in RULES.items():
        colour = "(rule) => getComputedStyle(document.querySelector(`[data-rule=${rule}]`)).borderTopColor"
        red, green, blue = (int(MECHANISMS[mechanism]["color"][i : i + 2], 16) for i in (1, 3, 5))
        assert page.evaluate(colour, rule) == f"rgb({red}, {green}, {blue})"


# --- The page to play with ----------------------------------------------------------------------------------------


def assert_states(page: Page, writes: str, beta: float = 1.0, alpha: float = 0.9) -> None:
    """The playground's memories are those of the library after `writes`, such as "D0 G90"."""
    angles = torch.tensor([math.radians(float(w[1:])) for w in writes.split()], dtype=torch.float64)
    k, v = torch.stack([angles.cos(), angles.sin()], dim=1), word("".join(w[0] for w in writes.split()))
    strength = torch.full((len(k),), beta, dtype=torch.float64)
    kept = torch.full((len(k),), alpha, dtype=torch.float64)
    for rule in RULES:
        found = page.evaluate("(rule) => document.querySelector('#dn-playground').state(rule)", rule)
        assert distance(found, states(rule, k, v, strength, kept)) < 1e-12, (rule, writes)


def said(page: Page, text: str) -> None:
    expect(page.get_by_role("status")).to_contain_text(text)


def tab_to(page: Page, selector: str) -> None:
    """Press the tab key until the element has the focus, and its focus is seen."""
    for _ in range(150):
        page.keyboard.press("Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            assert page.evaluate(outline) != "none", f"{selector} has the focus, and nothing shows it"
            return
    raise AssertionError(f"the tab key does not reach {selector}")


def test_by_the_keyboard_alone(visit):
    page = visit("playground")
    assert_states(page, "D0 G90 M0")  # what the page begins with
    tab_to(page, "[role=slider]")
    for key in ("PageUp", "ArrowRight", "ArrowUp", "ArrowLeft", "End", "Home", "ArrowDown", "PageUp", "PageUp"):
        page.keyboard.press(key)
    expect(page.get_by_role("slider", name="Angle of the key")).to_have_attribute("aria-valuenow", "55")
    said(page, "Read at 55°: additive ")
    tab_to(page, "[data-letter=T]")
    page.keyboard.press("Enter")
    assert_states(page, "D0 G90 M0 T55")
    said(page, "Write 4: T under 55°. Read at 55°: additive")
    said(page, "delta rule T, off by 0.00; gated delta rule T, off by 0.00.")
    tab_to(page, "#dn-beta")
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    assert_states(page, "D0 G90 M0 T55", beta=0.6)
    tab_to(page, "#dn-alpha")
    page.keyboard.press("End")
    assert_states(page, "D0 G90 M0 T55", beta=0.6, alpha=1.0)
    tab_to(page, "[data-do=Undo]")
    page.keyboard.press("Space")
    page.keyboard.press("Space")
    assert_states(page, "D0 G90", beta=0.6, alpha=1.0)
    said(page, "Undone: M under 0°.")
    tab_to(page, "[data-do=Step]")
    page.keyboard.press("Enter")
    assert_states(page, "D0 G90 M0", beta=0.6, alpha=1.0)
    tab_to(page, "[data-do=Reset]")
    page.keyboard.press("Enter")
    said(page, "All memories are empty.")
    assert page.evaluate("document.querySelector('#dn-playground').state('delta').flat().every((x) => x === 0)")
    tab_to(page, "[data-example='Three keys']")
    page.keyboard.press("Enter")
    assert_states(page, "D0 G60 M120", beta=0.6, alpha=1.0)


def test_by_the_mouse(visit):
    page = visit("playground")
    page.get_by_role("button", name="Reset").click()
    dial = page.get_by_role("slider", name="Angle of the key")
    box = dial.bounding_box()
    x, y, r = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box["width"] / 3
    page.mouse.move(x + r, y)
    page.mouse.down()
    page.mouse.move(x, y - r, steps=5)
    expect(dial).to_have_attribute("aria-valuenow", "90")
    page.mouse.move(x - r, y - 1, steps=5)
    page.mouse.up()
    page.mouse.move(x, y + r)  # the button is up: nothing turns
    expect(dial).to_have_attribute("aria-valuenow", "180")
    page.get_by_role("button", name="Write L").click()
    assert_states(page, "L180")


def test_by_touch(visit):
    page = visit("playground", width=390, has_touch=True, is_mobile=True)
    page.get_by_role("button", name="Reset").tap()
    page.get_by_role("slider", name="Angle of the key").scroll_into_view_if_needed()
    box = page.get_by_role("slider", name="Angle of the key").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + 0.15 * box["height"])
    page.get_by_role("button", name="Write A").tap()
    assert_states(page, "A90")


def test_many_keys_on_a_phone(visit):
    """Answers for eleven keys are wider than a phone: their box scrolls, by the keyboard too, and the page does not."""
    page = visit("playground", width=390)
    page.get_by_role("button", name="Reset").click()
    for _ in range(11):
        page.get_by_role("button", name="Write A").click()
        page.get_by_role("slider", name="Angle of the key").press("PageUp")
    assert_states(page, " ".join(f"A{30 * n}" for n in range(11)))
    answers = page.get_by_role("region", name="What each memory answers")
    assert answers.evaluate("(box) => box.scrollWidth > box.clientWidth")
    tab_to(page, ".dn-recall")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_write_after_undo_replaces_what_was_undone_and_there_is_an_end(visit):
    page = visit("playground")
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Write E").click()
    assert_states(page, "D0 G90 E0")
    page.get_by_role("button", name="Step").click(force=True)  # it is marked as having nothing to do
    said(page, "No write is left to repeat.")
    for _ in range(25):
        page.get_by_role("button", name="Write L").click()
    said(page, "24 writes are enough")
    assert_states(page, "D0 G90 E0 " + "L0 " * 21)


def test_answers_in_words(visit):
    """T under two opposite keys: a correction replaces, so one key answers the negative; a sum is nothing."""
    page = visit("playground")
    page.get_by_role("button", name="Opposite keys").click()
    said(page, "Read at 0°: additive nothing; delta rule minus T, off by 0.00; gated delta rule minus T, off by 0.00.")
    for name, cell in (("additive", "nothing"), ("delta", "minus T, off by 0.00")):
        expect(page.locator(f"[data-rule={name}] .dn-reads")).to_have_text(cell)
    expect(page.get_by_role("img", name="Delta rule at 180 degrees: T, off by 0.00", exact=True)).to_be_visible()


def test_pictures_change_with_the_theme(visit):
    pixel = "[...document.querySelector('.dn-answer canvas').getContext('2d').getImageData(0, 0, 1, 1).data]"
    light, dark = (visit("playground", color_scheme=scheme).evaluate(pixel) for scheme in ("light", "dark"))
    assert min(light[:3]) > 230 and max(dark[:3]) < 60  # paper
    page = visit("playground", color_scheme="light")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")  # as the theme's button does
    page.wait_for_function(f"{pixel}[0] < 60")


# --- The landing page ---------------------------------------------------------------------------------------------


def test_times_on_the_landing_page_are_those_of_the_chapters(visit):
    page = visit("index")
    line = "17 minutes to read, 21 with its code · 2 exercises, 1 h 05 · runs in about 3 seconds"
    expect(page.locator(".dn-chapters em").first).to_have_text(line)
    assert "{{" not in page.locator("article").inner_text()
    assert page.title() == "An executable textbook — DeltaNet, step by step"
    assert "delta rule" in (page.locator("meta[name=description]").get_attribute("content") or "")


def test_every_time_that_a_chapter_states_is_found():
    for chapter in sorted(BOOK.glob("[0-9][0-9]_*.md")):
        opening = chapter.read_text("utf-8").partition("\n(sec-")[0]
        line = times(chapter)
        assert " exercises, " in line and "runs in " in line, (chapter.name, line)
        assert ("to read" in line) == bool(re.search(r"minutes\s+to\s+read|Reading", opening)), (chapter.name, line)


def test_the_picture_moves_pauses_and_stands_still_where_motion_is_unwelcome(visit):
    board = "[...document.querySelectorAll('.dn-board canvas')].map((c) => c.toDataURL()).join()"
    page = visit("index", reduced_motion="no-preference")
    first = page.evaluate(board)
    page.wait_for_function(f"(first) => {board} !== first", arg=first, timeout=20_000)
    page.get_by_role("button", name="Pause").click()
    held = page.evaluate(board)
    page.wait_for_timeout(2000)
    assert page.evaluate(board) == held
    still = visit("index", reduced_motion="reduce")
    complete = still.evaluate(board)
    still.wait_for_timeout(2000)
    assert still.evaluate(board) == complete
    still.get_by_role("button", name="Play").click()
    still.wait_for_function(f"(complete) => {board} !== complete", arg=complete, timeout=20_000)


# --- Both pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_without_javascript_there_is_a_picture_and_a_sentence(visit, name):
    page = visit(name, java_script_enabled=False)
    picture = page.get_by_role("img", name="Three rows of five letters")
    expect(picture).to_be_visible()
    assert picture.bounding_box()["height"] > 100
    expect(page.get_by_text("one that follows the delta rule")).to_be_visible()


@pytest.mark.parametrize("name", PAGES)
def test_every_link_and_picture_is_there(visit, site, name):
    page = visit(name)
    found = "[...document.querySelectorAll('article :is(a[href], img[src])')].map((e) => e.href || e.src)"
    addresses = page.evaluate(found)
    assert len(addresses) > 2
    for address in addresses:
        path, _, anchor = address.removeprefix(site.as_uri() + "/").partition("#")
        target = site / path
        assert target.is_file(), address
        assert not anchor or f'id="{anchor}"' in target.read_text("utf-8"), address


def violations(page: Page) -> list[dict]:
    """What axe-core finds, all its rules, on the whole page.  Without preloading it asks for no file itself."""
    return Axe().run(page, options={"preload": False}).response["violations"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_fits_and_is_accessible(visit, name, size, scheme):
    page = visit(name, width=WIDTHS[size], color_scheme=scheme, reduced_motion="reduce")
    expect(page.locator("html")).to_have_attribute("data-theme", scheme)
    assert page.evaluate("innerWidth") == WIDTHS[size]
    assert page.evaluate(SIDEWAYS, "mjx-container") == []
    serious = [violation for violation in violations(page) if violation["impact"] in {"serious", "critical"}]
    assert not serious, "\n".join(f"{v['id']}: {node['html'][:200]}" for v in serious for node in v["nodes"])


def test_a_page_that_is_too_wide_and_a_pale_text_are_found(visit):
    page = visit("playground", width=390, color_scheme="light")
    page.evaluate("document.querySelector('.dn-formula').style.cssText = 'width: 800px; color: #ddd'")
    assert page.evaluate(SIDEWAYS, "mjx-container")
    assert "color-contrast" in [violation["id"] for violation in violations(page)]
