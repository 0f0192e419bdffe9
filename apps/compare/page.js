"use strict";
// Each picture is in the page once; every <img> that shows it is given its address here.
const pictures = JSON.parse(document.getElementById("pictures").textContent);
for (const img of document.querySelectorAll("img[data-p]")) img.src = pictures[img.dataset.p];

// "412 ms" sorts before "1.2 s"; what was not measured comes last either way.
const value = (cell) => parseFloat(cell.textContent) * (cell.textContent.endsWith(" ms") ? 0.001 : 1);
// The first click puts the best first: the most decibels, the fewest megabytes.
for (const head of document.querySelectorAll(".sortable thead th")) {
  head.querySelector("button").onclick = () => {
    const best = head.dataset.best === "high" ? -1 : 1;
    const sorted = head.getAttribute("aria-sort");
    const sign = sorted ? (sorted === "ascending" ? -1 : 1) : best;
    const body = head.closest("table").tBodies[0], n = head.cellIndex;
    const compare = (a, b) => {
      const [x, y] = [a.cells[n], b.cells[n]];
      if (n === 0) return sign * x.textContent.localeCompare(y.textContent);
      const [v, w] = [value(x), value(y)];
      return isNaN(v) - isNaN(w) || sign * (v - w) || 0;
    };
    body.append(...[...body.rows].sort(compare));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  };
}

const by = (id) => document.getElementById(id);
if (by("divide")) {
  const show = () => {
    by("above").src = pictures[`${by("left").value}/${by("shot").value}`];
    by("below").src = pictures[`${by("right").value}/${by("shot").value}`];
    document.querySelector(".stage").style.setProperty("--at", `${by("divide").value}%`);
  };
  for (const id of ["left", "right", "shot", "divide"]) by(id).oninput = show;
  const stage = document.querySelector(".stage");
  stage.onpointerdown = stage.onpointermove = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    if (event.type === "pointerdown") stage.setPointerCapture(event.pointerId);
    const { left, width } = stage.getBoundingClientRect();
    by("divide").value = Math.min(100, Math.max(0, (event.clientX - left) / width * 100));
    show();
  };
  for (const img of stage.querySelectorAll("img")) img.draggable = false;
  show();
}
if (by("difference")) by("difference").oninput = () => document.body.classList.toggle("differences", by("difference").checked);
// Paper has no folds.
addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details")) fold.open = true; });
