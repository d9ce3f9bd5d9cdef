"use strict";
// A click on a column's header sorts its table by it: descending first, then ascending.
for (const button of document.querySelectorAll(".sortable th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th");
    const body = header.closest("table").tBodies[0];
    const order = header.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", order);
    const key = (row) => Number(row.cells[header.cellIndex].dataset.key);
    const sign = order === "descending" ? -1 : 1;
    body.append(...[...body.rows].sort((one, other) => sign * (key(one) - key(other))));
    body.closest(".scroll").scrollTop = 0;
  });
}
// Paper cannot be unfolded.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
