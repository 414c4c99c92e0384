"""What a page is asked in a browser: scripts for `Page.evaluate`, used by the tests of this folder."""

# Resolves when all that a page draws late is there.
SETTLED = """
async () => {
  if (document.querySelector("article .math")) {
    while (!window.MathJax?.startup?.promise) await new Promise((resolve) => setTimeout(resolve, 20));
    await MathJax.startup.promise;
  }
  await document.fonts.ready;
  await Promise.all([...document.images].map((image) => image.decode().catch(() => null)));
}
"""

# Formulas that MathJax has not drawn or not understood, and pictures without a size.
NOT_DRAWN = """
() => {
  const formulas = [...document.querySelectorAll("article .math")].filter((box) => !box.querySelector("mjx-container"));
  const errors = [...document.querySelectorAll("mjx-merror")];
  const pictures = [...document.querySelectorAll("article img")].filter((image) => !image.naturalWidth);
  return [...formulas, ...errors, ...pictures].map((box) => box.outerHTML.slice(0, 200));
}
"""

# Formulas of which a glyph is cut off: it has less than one pixel of room (the least that keeps it whole, for glyphs
# are drawn on whole pixels) above or below within an element that clips, or stands out sideways from one that does
# not scroll.
CUT_OFF = """
() => {
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
}
"""

# What stands out sideways of the page, or of a box that clips or scrolls.  Code, formulas and tables may scroll in
# boxes of their own (`may_scroll`, a selector); text may not.
SIDEWAYS = """
(may_scroll) => {
  const right = document.documentElement.clientWidth;
  const all = [...document.querySelectorAll("article *")].filter((element) => element.getClientRects().length);
  const shown = all.filter((element) => !element.closest(`mjx-container, ${may_scroll}`));
  const wide = shown.filter((element) => {
    const { overflowX, display } = getComputedStyle(element);
    return overflowX !== "visible" && display !== "inline" && element.scrollWidth > element.clientWidth + 1;
  });
  const out = shown.filter((element) => element.getBoundingClientRect().right > right + 1);
  const names = [...wide, ...out].map((element) => `${element.tagName}.${element.className}: ${element.innerText}`);
  const page = document.documentElement.scrollWidth > right ? ["the page"] : [];
  return [...page, ...names.map((text) => text.slice(0, 120))];
}
"""

# What scrolls sideways and cannot be reached by the tab key.
UNREACHABLE = """
() => [...document.querySelectorAll("article *")].filter((box) => {
  if (!["auto", "scroll"].includes(getComputedStyle(box).overflowX) || box.scrollWidth <= box.clientWidth) return false;
  return box.clientWidth && box.tabIndex < 0 && !box.querySelector("a[href], button, [tabindex='0']");
}).map((box) => box.outerHTML.slice(0, 200))
"""

# Formulas without their glyphs, code without its colours, and all signatures of the reference but five without
# theirs: tens of thousands of elements, in each of which axe-core would look for the colours of a few.
FLATTEN = """
() => {
  for (const part of document.querySelectorAll("mjx-container > *")) part.remove();
  for (const code of document.querySelectorAll("article .highlight pre")) code.textContent = code.textContent;
  for (const code of [...document.querySelectorAll("article dt.sig")].slice(5)) code.textContent = code.textContent;
}
"""
