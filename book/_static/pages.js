// What scrolls can be reached by the tab key, what moves can be stopped, and what is folded is printed.
"use strict";

(() => {
  const OURS = "mjx-container, .math, .dn-picture";

  // A box that is wider than the page scrolls, and the arrow keys move it when it has the focus. The theme sees to
  // code and tables when a page is loaded; formulas, pictures and what a fold hides at first are left to us. A formula
  // that fits is no stop: a chapter has hundreds between one hint and the next.
  const update = () => {
    for (const box of document.querySelectorAll(`article :is(${OURS}, pre, .pst-scrollable-table-container)`)) {
      const scrolls = box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX !== "visible";
      const stop = scrolls && box.clientWidth > 0;
      if (stop) box.tabIndex = 0;
      else if (box.matches(OURS)) box.removeAttribute("tabindex");
      if (box.matches(".dn-picture")) name(box, stop);
    }
  };
  // Who comes to a picture by the tab key is told why it is a stop; the picture itself says what it shows.
  const name = (box, stop) => {
    if (stop) box.setAttribute("role", "group");
    else box.removeAttribute("role");
    if (stop) box.setAttribute("aria-label", "Picture, wider than the screen: the arrow keys move it");
    else box.removeAttribute("aria-label");
  };
  let timer = 0;
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(update, 100);
  };
  addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    update();
  });
  addEventListener("resize", later);
  document.addEventListener("click", later); // a button may have changed what scrolls
  document.addEventListener("toggle", later, true);

  // An animation is a picture without a pause of its own; beside it lies its still, which takes its place.
  for (const moving of document.querySelectorAll("article img.dn-moving")) {
    const box = moving.closest(".dn-picture") ?? moving.parentElement;
    if (!box.querySelector("img.dn-still")) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "dn-pause";
    const stop = (stopped) => {
      box.classList.toggle("dn-paused", stopped);
      button.textContent = stopped ? "Play" : "Pause";
      button.setAttribute("aria-label", stopped ? "Play the animation" : "Stop the animation and show its stages");
    };
    button.addEventListener("click", () => stop(!box.classList.contains("dn-paused")));
    stop(false);
    box.after(button);
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("article details:not([open])")];
    for (const fold of opened) fold.open = true;
  });
  addEventListener("afterprint", () => {
    for (const fold of opened) fold.open = false;
  });
})();
