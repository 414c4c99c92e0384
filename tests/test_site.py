"""`make book` on two tiny chapters: numbers, folds and links are right, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

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
```
"""


def write(folder: Path, first: str = FIRST) -> None:
    (folder / "solutions").mkdir(parents=True)
    for name in ("references.bib", "bibliography.md"):
        shutil.copy(BOOK / name, folder)
    conf = (BOOK / "conf.py").read_text("utf-8")
    (folder / "conf.py").write_text(conf.replace("Path(__file__).resolve().parent.parent", f"Path({str(ROOT)!r})"))
    shutil.copytree(BOOK / "_static", folder / "_static")
    (folder / "index.md").write_text(INDEX)
    (folder / "01_first.md").write_text(HEAD + first, encoding="utf-8")
    (folder / "02_second.md").write_text(HEAD + SECOND, encoding="utf-8")
    (folder / "solutions" / "01_first.md").write_text(HEAD + "# Solutions\n\nText.\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "book"
    write(folder)
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


def test_mathematics_is_rendered_and_the_console_is_quiet(site, tmp_path):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000"]
    url = (site / "01_first.html").as_uri()
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=300, check=False)
    soup = BeautifulSoup(done.stdout, "html.parser")
    assert soup.select("mjx-container"), "MathJax has drawn nothing"
    assert not soup.select("mjx-merror"), "MathJax does not understand an equation"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in console if re.search(r"error|invalid|failed|refused", line, re.IGNORECASE)], console


def test_a_broken_reference_fails(tmp_path, capfd):
    write(tmp_path / "book", first=FIRST.replace("{eq}`eq-a`", "{eq}`eq-nowhere`"))
    with pytest.raises(SystemExit, match="sphinx found errors"):
        main(["--sources-dir", str(tmp_path / "book")])
    assert "eq-nowhere" in capfd.readouterr().err
