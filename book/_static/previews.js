// Previews: while the pointer rests on a link to an equation, a figure, a term or a source, or the link has the focus,
// a small box shows what it leads to.  Escape closes it.  The table of what there is comes with the first of them.
"use strict";

(() => {
  const here = document.currentScript.src;
  const root = here.slice(0, here.lastIndexOf("/_static/") + 1);
  const WAIT = 200; // milliseconds until it opens, and until it closes
  let table = null;
  let box = null; // what is shown
  let shown = null; // for which link
  let timer = 0;

  const loaded = () =>
    (table ??= new Promise((resolve) => {
      const script = document.head.appendChild(document.createElement("script"));
      script.onload = () => resolve(window.DN_PREVIEWS);
      script.onerror = () => resolve({});
      script.src = root + "_static/previews_data.js";
    }));

  const key = (link) => (link.hash && link.href.startsWith(root) ? decodeURI(link.href.slice(root.length)) : "");

  const close = () => {
    clearTimeout(timer);
    shown?.removeAttribute("aria-describedby");
    box?.remove();
    box = shown = null;
  };

  // Below the link, or above it where there is more room; never over the link itself, never outside of the window.
  const place = (link) => {
    const at = link.getClientRects()[0];
    const { width, height } = box.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8));
    const below = innerHeight - at.bottom > height + 8 || innerHeight - at.bottom > at.top;
    box.style.left = `${left + scrollX}px`;
    box.style.top = `${(below ? at.bottom + 6 : at.top - height - 6) + scrollY}px`;
  };

  const open = async (link) => {
    const html = (await loaded())[key(link)];
    if (!html || !link.matches(":hover, :focus-visible")) return;
    close();
    shown = link;
    box = document.body.appendChild(document.createElement("div"));
    box.className = "dn-preview";
    box.id = "dn-preview";
    box.setAttribute("role", "tooltip");
    box.innerHTML = html;
    for (const image of box.querySelectorAll("img")) {
      image.src = root + image.getAttribute("src");
      image.addEventListener("load", () => shown === link && place(link));
    }
    link.setAttribute("aria-describedby", box.id);
    box.addEventListener("pointerenter", () => clearTimeout(timer));
    box.addEventListener("pointerleave", later);
    place(link);
    const own = box;
    await window.MathJax?.startup?.promise;
    await window.MathJax?.typesetPromise?.([own]);
    if (box === own) place(link);
  };

  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(close, WAIT);
  };

  for (const link of document.querySelectorAll("article a.internal, article a.dn-term, article a.reference[href*='#']")) {
    if (!key(link) || link.classList.contains("headerlink")) continue;
    link.removeAttribute("title");
    link.addEventListener("pointerenter", (event) => {
      if (event.pointerType === "touch") return; // a tap follows the link
      clearTimeout(timer);
      if (shown !== link) timer = setTimeout(() => open(link), WAIT);
    });
    link.addEventListener("pointerleave", later);
    link.addEventListener("focus", () => open(link));
    link.addEventListener("blur", later);
  }
  addEventListener("keydown", (event) => event.key === "Escape" && close());
})();
