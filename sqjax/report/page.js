"use strict";

// The places of values in order: numbers by size, texts by letters, what is missing always last.
function order(values, descending) {
  const sign = descending ? -1 : 1;
  const rank = (value) => (value === "" ? 1 : 0);
  const compare = (a, b) => {
    const missing = rank(a) - rank(b);
    if (missing !== 0) return missing;
    const difference = Number(a) - Number(b);
    if (!Number.isNaN(difference)) return sign * difference;
    return sign * a.localeCompare(b, "en", { numeric: true });
  };
  const places = values.map((_, place) => place);
  return places.sort((i, j) => compare(values[i], values[j]) || i - j);
}

function start() {
  const table = document.querySelector("#sites");
  if (table === null) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const shown = document.querySelector("#shown");
  const filter = document.querySelector("#filter");

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const values = rows.map((row) => row.cells[column].dataset.value);
      body.append(...order(values, descending).map((place) => rows[place]));
    });
  });

  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      count += row.hidden ? 0 : 1;
    }
    shown.textContent = count + " of " + rows.length + " sites";
  });
}

if (typeof document !== "undefined") start();
if (typeof module !== "undefined") module.exports = { order };
