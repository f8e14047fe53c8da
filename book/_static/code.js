// What a reader does with a page: folds all code, and takes figures and tables along.
document.addEventListener("DOMContentLoaded", () => {
  addCodeSwitch();
  document.querySelectorAll("figure, .cell_output").forEach(addLinks);
  document.querySelectorAll(".cell_output table").forEach(makeScrollable);
});

// One switch for the folded code of a page, which other pages remember.
function addCodeSwitch() {
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
}

// A figure as the file it is, a table as the numbers it shows.
function addLinks(place) {
  if (place.matches("figure") || !place.closest("figure")) {
    const image = place.querySelector("img[src$='.svg'], img[src$='.png']");
    const table = place.querySelector("table");
    const inner = place.matches(".cell_output") && place.querySelector("figure");
    if (inner || (!image && !table)) return;
    const links = document.createElement("p");
    links.className = "take-along";
    if (image) links.append(link(image.src, image.src.split("/").pop(), "figure (" + image.src.split(".").pop().toUpperCase() + ")"));
    if (table) {
      const name = (place.id || "table") + ".csv";
      const data = "data:text/csv;charset=utf-8," + encodeURIComponent(asCsv(table));
      links.append(link(data, name, "data (CSV)"));
    }
    place.append(links);
  }
}

function link(address, name, text) {
  const made = document.createElement("a");
  made.href = address;
  made.download = name;
  made.textContent = text;
  return made;
}

function asCsv(table) {
  const quoted = text => /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  return [...table.rows].map(row => [...row.cells].flatMap(cell =>
    [quoted(cell.textContent.trim()), ...Array(cell.colSpan - 1).fill("")]).join(",")).join("\n");
}

// A table wider than the page scrolls in a box of its own, which the keyboard reaches.
function makeScrollable(table) {
  const box = document.createElement("div");
  box.className = "table-box";
  table.before(box);
  box.append(table);
  const mark = () => {
    const wider = box.scrollWidth > box.clientWidth + 1;
    box.classList.toggle("wider", wider);
    if (wider) { box.tabIndex = 0; box.setAttribute("role", "region"); box.setAttribute("aria-label", "wide table"); }
    else { box.removeAttribute("tabindex"); box.removeAttribute("role"); box.removeAttribute("aria-label"); }
  };
  mark();
  new ResizeObserver(mark).observe(box);
}
