// Search results: below each, a few words around what was searched, from the section in which most of it is found.
"use strict";

(() => {
  const LENGTH = 240; // characters
  const query = (new URLSearchParams(location.search).get("q") ?? "").toLowerCase().trim();
  const words = query.split(/[^\p{L}\p{N}_]+/u).filter((word) => word.length > 1);
  const list = document.getElementById("search-results");
  if (!words.length || !list) return;

  // A word that the index found by its stem is found here by what it begins with.
  const stem = (word) => (word.length > 5 ? word.replace(/(ing|ed|es|s|e)$/, "") : word);
  const escaped = [query, ...words.map(stem)].map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const patterns = escaped.map((word) => new RegExp(`(?<![\\p{L}\\p{N}_])${word}`, "iu"));
  const places = (text) => patterns.map((pattern) => text.search(pattern));

  // The whole query counts most, then words in the title, then words in the text.
  const score = ([, title, text]) => {
    const [whole, ...each] = places(text);
    const [titled, ...eachTitled] = places(title);
    const found = (indices) => indices.filter((index) => index >= 0).length;
    return 8 * (whole >= 0) + 12 * (titled >= 0) + 2 * found(eachTitled) + 2 * found(each);
  };

  const marked = (text) => {
    const piece = document.createElement("p");
    piece.className = "context";
    for (const part of text.split(new RegExp(`((?<![\\p{L}\\p{N}_])(?:${escaped.join("|")})[\\p{L}\\p{N}]*)`, "iu")).entries()) {
      const node = part[0] % 2 ? document.createElement("mark") : document.createTextNode("");
      node.textContent = part[1];
      piece.append(node);
    }
    return piece;
  };

  const excerpt = (text) => {
    const found = places(text).filter((index) => index >= 0);
    let start = Math.max(0, (found[0] ?? 0) - LENGTH / 3);
    if (start) start = text.indexOf(" ", start) + 1;
    let end = Math.min(text.length, start + LENGTH);
    if (end < text.length) end = text.lastIndexOf(" ", end);
    return marked(`${start ? "… " : ""}${text.slice(start, end)}${end < text.length ? " …" : ""}`);
  };

  const complete = (item) => {
    const link = item.querySelector("a");
    if (!link || item.querySelector(".context")) return;
    const [file, anchor] = link.getAttribute("href").split("#");
    const sections = window.DN_EXCERPTS?.[file.replace(/\.html$/, "")];
    if (!sections?.length) return;
    const own = anchor && sections.find(([id]) => id === decodeURIComponent(anchor));
    const [id, title, text] = own ?? sections.reduce((best, next) => (score(next) > score(best) ? next : best));
    if (!anchor && id !== sections[0][0]) {
      link.href = `${file}#${id}`;
      link.append(` › ${title}`);
    }
    item.append(excerpt(text));
  };

  new MutationObserver(() => list.querySelectorAll("li").forEach(complete)).observe(list, { childList: true, subtree: true });
  list.querySelectorAll("li").forEach(complete);
})();
