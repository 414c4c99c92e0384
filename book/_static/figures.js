// On a phone a picture is wider than the screen, so that its letters can be read: a button shows the whole of it, small.
for (const box of document.querySelectorAll(".dn-picture")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "dn-whole";
  const show = (whole) => {
    box.classList.toggle("whole", whole);
    button.textContent = whole ? "Enlarge the picture" : "Show the whole picture";
  };
  button.addEventListener("click", () => show(!box.classList.contains("whole")));
  show(false);
  box.after(button);
}

// Paper is white, whatever the screen's colours are.
const page = document.documentElement;
addEventListener("beforeprint", () => {
  page.dataset.themeOnScreen = page.dataset.theme;
  page.dataset.theme = "light";
});
addEventListener("afterprint", () => { page.dataset.theme = page.dataset.themeOnScreen; });
