"""How the page looks: a style sheet for screens, light and dark, and for paper. What it does: a script that sorts tables.

Both lie in the page itself. Without the script the tables are plain ones; without colours nothing is lost.
"""

CSS = """
:root { color-scheme: light dark; --ink: #23292f; --soft: #56616b; --paper: #fff; --line: #e4e8ec; --strong: #c9d1d8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5ea; --soft: #a3aeb8; --paper: #14181c; --line: #2c343b; --strong: #47525c }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem }
p, dl, .picture { max-width: 62rem }
p { margin: .25rem 0 .75rem; color: var(--soft) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .75rem 0 1.5rem; font-size: .92rem }
dt { color: var(--soft) }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere }
img { display: block; width: 100%; min-width: 36rem; height: auto }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .5rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--strong) }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 600 }
.words td, .words th { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere }
.words th, .words td:first-child { white-space: nowrap }
th[aria-sort] { cursor: pointer }
th[aria-sort]:hover, th[aria-sort]:focus-visible { color: var(--ink); text-decoration: underline }
th[aria-sort="ascending"]::after { content: " ▲"; font-size: .7em }
th[aria-sort="descending"]::after { content: " ▼"; font-size: .7em }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; print-color-adjust: exact }
ul { padding-left: 1.2rem; overflow-wrap: anywhere }
@media print {
  :root { --ink: #000; --soft: #333; --paper: #fff; --line: #ccc; --strong: #888 }
  @page { size: A4 landscape; margin: 1.5cm }
  body { max-width: none; padding: 0; font-size: 10pt }
  h2 { break-after: avoid; margin-top: 1.5rem }
  .scroll { overflow: visible }
  table { font-size: 7.5pt }
  th, td { padding: .25rem .35rem; white-space: normal }
  tr, .picture { break-inside: avoid }
  img { min-width: 0; max-height: 14cm; width: auto; max-width: 100% }
}
"""

# A click on a head sorts by that column, the largest number first; a second one turns the order round.
SCRIPT = """
const UNITS = { B: 1, KiB: 1024, MiB: 1048576, GiB: 1073741824 };
function key(row, column) {
  const text = row.cells[column].textContent.trim();
  const found = /^(-?[\\d,]*\\.?\\d+(?:e[+-]?\\d+)?)(?: ± \\S+)?(?: (B|KiB|MiB|GiB))?$/.exec(text);
  return found ? Number(found[1].replaceAll(",", "")) * (UNITS[found[2]] || 1) : text;
}
function order(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? 1 : -1;
  return a.localeCompare(b);
}
function sort(head) {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const rows = [...body.rows].map(row => [key(row, column), row]);
  const numbers = rows.some(([value]) => typeof value === "number");
  const before = head.getAttribute("aria-sort");
  const down = before === "none" ? numbers : before === "ascending";
  rows.sort(([a], [b]) => down ? order(b, a) : order(a, b));
  for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows.map(([, row]) => row));
}
for (const head of document.querySelectorAll("table.sorts th")) {
  head.tabIndex = 0;
  head.setAttribute("aria-sort", "none");
  head.addEventListener("click", () => sort(head));
  head.addEventListener("keydown", event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    sort(head);
  });
}
"""
