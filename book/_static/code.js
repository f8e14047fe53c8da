// What a reader does with a page: folds all code, takes figures and tables along, and follows heads to the explorer.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false; // it would have to read other files
document.addEventListener("DOMContentLoaded", () => {
  addCodeSwitch();
  document.querySelectorAll("figure, .cell_output").forEach(addLinks);
  document.querySelectorAll(".cell_output thead th").forEach(head => { head.scope = "col"; });
  document.querySelectorAll(".cell_output tbody th").forEach(head => { head.scope = "row"; });
  document.querySelectorAll(".cell_output table").forEach(makeSortable);
  document.querySelectorAll(".cell_output table, .cell_output img").forEach(makeScrollable);
  document.querySelectorAll("div.cell_input pre, div.highlight pre").forEach(code => { code.tabIndex = 0; }); // it may scroll
  document.querySelectorAll(".citation-list[role]").forEach(list => list.removeAttribute("role")); // its entries are no items
  linkHeads();
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

// Cells that span rows or columns are repeated, so that every line has all columns.
function asCsv(table) {
  const quoted = text => /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text, grid = [];
  [...table.rows].forEach((row, y) => [...row.cells].forEach(cell => {
    let x = 0;
    while (grid[y] && grid[y][x] !== undefined) x += 1;
    for (let down = 0; down < cell.rowSpan; down++) {
      grid[y + down] = grid[y + down] || [];
      for (let across = 0; across < cell.colSpan; across++) grid[y + down][x + across] = cell.textContent.trim();
    }
  }));
  return grid.map(row => row.map(quoted).join(",")).join("\n");
}

// A table or figure wider than the page scrolls in a box of its own, which the keyboard reaches.
function makeScrollable(wide) {
  const box = document.createElement("div");
  box.className = "table-box";
  wide.before(box);
  box.append(wide);
  const mark = () => {
    const tooWide = () => box.scrollWidth > box.clientWidth + 1;
    box.classList.remove("dense");
    if (tooWide()) box.classList.add("dense"); // smaller, before it scrolls
    const wider = tooWide();
    box.classList.toggle("wider", wider);
    if (wider) { box.tabIndex = 0; box.setAttribute("role", "region"); box.setAttribute("aria-label", "wider than the page"); }
    else { box.removeAttribute("tabindex"); box.removeAttribute("role"); box.removeAttribute("aria-label"); }
  };
  mark();
  new ResizeObserver(mark).observe(box);
}

// Heads that a table names, as "L7.H3", link to the head explorer; the first column has their encoder.
function linkHeads() {
  const tables = [...document.querySelectorAll(".cell_output table")].filter(table => /\bL\d+\.H\d+\b/.test(table.textContent));
  if (!tables.length) return;
  const list = document.createElement("script");
  list.src = "explorer/encoders.js";
  list.addEventListener("load", () => tables.forEach(linkHeadsOf));
  document.head.append(list);
}

function linkHeadsOf(table) {
  let encoder = "", rows = 0; // left of the encoder's cell, which may span several
  for (const row of table.rows) {
    if (rows === 0) { encoder = row.cells[0].textContent.trim(); rows = row.cells[0].rowSpan; }
    rows -= 1;
    if (!Object.hasOwn(window.exploredEncoders, encoder)) continue;
    for (const cell of row.cells) {
      const parts = cell.textContent.split(/(\bL\d+\.H\d+\b)/);
      if (parts.length === 1 || cell.children.length) continue;
      cell.replaceChildren(...parts.map((part, i) => i % 2 === 0 ? part : Object.assign(document.createElement("a"),
        { href: "explorer/index.html#" + encodeURIComponent(encoder) + "/" + part, textContent: part })));
    }
  }
}

// Long tables, where no cell spans rows, can be sorted by a column and searched. The packaged libraries for it are heavier
// than the rest of a page.
function makeSortable(table) {
  const body = table.tBodies[0], rows = body ? [...body.rows] : [], heads = table.tHead ? table.tHead.rows : [];
  const plain = [...table.querySelectorAll("th, td")].every(cell => cell.rowSpan === 1 && cell.colSpan === 1);
  if (rows.length < 12 || heads.length !== 1 || !plain) return;
  table.classList.add("sortable");
  [...heads[0].cells].forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: head.textContent.trim() });
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      [...heads[0].cells].forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      body.append(...[...rows].sort((a, b) => (falling ? -1 : 1) * compareCells(a.cells[column], b.cells[column])));
    });
    head.replaceChildren(button);
  });
  if (rows.length < 20) return;
  const search = Object.assign(document.createElement("input"), { type: "search", className: "table-search", placeholder: "search this table" });
  search.setAttribute("aria-label", "search this table");
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    rows.forEach(row => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
  });
  table.before(search);
}

// Numbers by value, and before words; words by their letters.
function compareCells(a, b) {
  const [x, y] = [a, b].map(cell => parseFloat(cell.textContent.replace(/[,\s]/g, "").replace("−", "-")));
  if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a.textContent.localeCompare(b.textContent);
  return x - y;
}
