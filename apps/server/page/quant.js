// Comparisons of a model's variants: which, how thoroughly, and the report.

import { call } from "./api.js";
import { $, el, fail } from "./dom.js";

let offer;
let timer;

export function start(found) {
  offer = found;
  const model = el("select", { id: "quant-model", onchange: ticks }, ...offer.models.map((each) => el("option", { value: each.name }, each.name)));
  const number = (id, text, value, max) => el("div", {}, el("label", { htmlFor: id }, text), el("input", { id, type: "number", min: id === "quant-rounds" ? 0 : 1, max, value }));
  $("quant-form").append(
    el("div", {}, el("label", { htmlFor: "quant-model" }, "Model"), model),
    el("fieldset", { id: "quant-variants", className: "ticks" }),
    el("div", {}, el("label", { htmlFor: "quant-prompts" }, "Prompts, one a line (empty: the standard set)"), el("textarea", { id: "quant-prompts", rows: 3 })),
    el("div", { className: "pair" }, number("quant-seeds", "Pictures of each prompt", 1, 16), number("quant-rounds", "Timed runs", 1, 5), number("quant-steps", "Steps (empty: their own)", "", 200)),
    el("p", { id: "quant-mistake", className: "mistake", role: "alert", hidden: true }),
    el("div", {}, el("button", { className: "primary" }, "Compare")),
  );
  $("quant-form").addEventListener("submit", begin);
  ticks();
}

function ticks() {
  const model = offer.models.find((each) => each.name === $("quant-model").value);
  const rows = model.variants.map((each) => el("label", {},
    el("input", { type: "checkbox", value: each.name, checked: each.backend === "openvino" }), `${each.name} (${(each.bytes / 1e6).toFixed(0)} MB)`));
  $("quant-variants").replaceChildren(el("legend", {}, "Variants"), ...rows);
}

async function begin(event) {
  event.preventDefault();
  const mistake = $("quant-mistake");
  mistake.hidden = true;
  const ask = {
    model: $("quant-model").value,
    variants: [...$("quant-variants").querySelectorAll("input:checked")].map((each) => each.value),
    seeds: Number($("quant-seeds").value), rounds: Number($("quant-rounds").value),
  };
  const prompts = $("quant-prompts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (prompts.length) ask.prompts = prompts;
  if ($("quant-steps").value) ask.steps = Number($("quant-steps").value);
  try {
    if (ask.variants.length < 2) throw new Error("Choose two variants or more.");
    await call("/api/comparisons", ask);
    await show();
  } catch (error) {
    mistake.textContent = error.message;
    mistake.hidden = false;
  }
}

const STATES = { running: "running", done: "done", failed: "failed", stopped: "stopped" };

export async function show() {
  clearTimeout(timer);
  let rows;
  try { rows = await call("/api/comparisons"); } catch (error) { fail(error); return; }
  $("quant-runs").replaceChildren(...rows.map(row));
  if (rows.some((each) => each.state === "running") && !$("panel-quant").hidden) timer = setTimeout(show, 1500);
}

function row(each) {
  const acts = [];
  if (each.state === "done") acts.push(el("a", { className: "link", href: `/api/comparisons/${each.id}/report`, target: "_blank", rel: "noopener" }, "Open the report"));
  if (each.state === "running") acts.push(el("button", { type: "button", onclick: () => call(`/api/comparisons/${each.id}/stop`, {}).then(show, fail) }, "Stop"));
  return el("div", {},
    el("div", { className: "bar" }, el("strong", {}, `${each.ask.model}: ${STATES[each.state]}`), el("span", { className: "hint" }, new Date(each.created * 1000).toLocaleString()), ...acts),
    el("div", {}, each.ask.variants.join(", ")),
    each.state === "running" || each.state === "failed" ? el("div", { className: "hint" }, each.line) : null);
}
