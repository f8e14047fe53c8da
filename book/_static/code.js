// One switch for the folded code of a page, which other pages remember.
document.addEventListener("DOMContentLoaded", () => {
  const cells = document.querySelectorAll("details.hide.above-input, details.hide.above-cell");
  const title = document.querySelector("article h1");
  if (!cells.length || !title) return;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "code-switch";
  const show = open => {
    cells.forEach(cell => { cell.open = open; });
    button.textContent = open ? "Fold all code" : "Show all code";
    button.setAttribute("aria-pressed", open);
  };
  let open = false;
  try { open = localStorage.getItem("code") === "open"; } catch { /* files may have no storage */ }
  show(open);
  button.addEventListener("click", () => {
    open = !open;
    show(open);
    try { localStorage.setItem("code", open ? "open" : "folded"); } catch { /* as above */ }
  });
  title.after(button);
});
