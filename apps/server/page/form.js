// The form: what is asked for, kept in the browser between visits.

import { call } from "./api.js";
import { Board } from "./board.js";
import { $, el, fail, options, readFile, toast } from "./dom.js";

const FIELDS = ["prompt", "negative", "width", "height", "steps", "guidance", "seed", "sampler", "preset", "count",
  "model", "variant", "device"];
const NUMBERS = new Set(["width", "height", "steps", "guidance", "seed", "count"]);
const KEPT = "edge-sd-form";

let offer;
let lastSeed = null;
// Fields of a wish that the form has no control for, taken over from a picture.
let carried = {};
const boards = {};

export function start(found, submit) {
  offer = found;
  options($("model"), offer.models.map((model) => [model.name, model.name]));
  options($("device"), [["auto", "auto"], ...offer.devices.map((each) => [each.name, each.name])], "auto");
  options($("preset"), offer.presets.map((name) => [name, name]), "exact");
  makeLoras();
  boards.image = new Board($("canvas-image"), { ink: "#e0245e", onremove: () => { $("drop-image").hidden = false; } });
  boards.control = new Board($("canvas-control"), { ink: "#000", paper: "#fff", onremove: () => {} });
  restore();
  wire(submit);
}

export function model() {
  return offer.models.find((each) => each.name === $("model").value) || offer.models[0];
}

function makeLoras() {
  $("loras").hidden = !offer.loras.length;
  for (const name of offer.loras) {
    const weight = el("input", { type: "number", min: -2, max: 2, step: 0.05, value: 1, ariaLabel: `Weight of ${name}` });
    const tick = el("input", { type: "checkbox", value: name });
    $("loras").append(el("div", { className: "lora" }, el("label", {}, tick, name), weight));
  }
}

function wire(submit) {
  const form = $("form");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const mistake = $("mistake");
    mistake.hidden = true;
    try {
      const job = await submit(read());
      lastSeed = job.wish.seed;
      // On narrow screens the results are below the form.
      $("now").scrollIntoView({ block: "nearest" });
      $("seed").placeholder = `random (last: ${lastSeed})`;
    } catch (error) {
      mistake.textContent = error.message;
      mistake.hidden = false;
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
      form.requestSubmit();
    }
  });
  form.addEventListener("input", keep);
  $("model").addEventListener("change", () => { modelChanged(); keep(); });
  for (const id of ["variant", "device", "preset"]) $(id).addEventListener("change", showPlan);
  $("swap").onclick = () => { [$("width").value, $("height").value] = [$("height").value, $("width").value]; keep(); };
  $("dice").onclick = () => { $("seed").value = Math.floor(Math.random() * 2 ** 32); lock(true); };
  $("lock").onclick = () => {
    const on = $("lock").getAttribute("aria-pressed") !== "true";
    if (on && $("seed").value === "" && lastSeed !== null) $("seed").value = lastSeed;
    if (!on) $("seed").value = "";
    lock(on);
  };
  $("seed").addEventListener("input", () => lock($("seed").value !== ""));
  $("reset").onclick = () => { for (const id of ["width", "height", "steps", "guidance", "sampler"]) $(id).value = ""; carry({}); keep(); };
  for (const [range, shown] of [["strength", "strength-shown"], ["control_weight", "weight-shown"]]) {
    const show = () => { $(shown).textContent = Number($(range).value).toFixed(2); };
    $(range).addEventListener("input", show);
    show();
  }
  $("file-image").onchange = (event) => give(event.target.files[0]);
  $("file-control").onchange = async (event) => {
    if (event.target.files[0]) await boards.control.show(await readFile(event.target.files[0])).catch(fail);
    event.target.value = "";
  };
  $("sketch").onclick = () => {
    const defaults = model().defaults;
    boards.control.blank(Number($("width").value) || defaults.width, Number($("height").value) || defaults.height);
    boards.control.canvas.focus();
  };
  wireDrop();
}

function wireDrop() {
  const isFile = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    document.body.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("over");
    if (!isFile(event)) return;
    event.preventDefault();
    give(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files || [])].find((each) => each.type.startsWith("image/"));
    if (file) { event.preventDefault(); give(file); }
  });
}

// Start from a picture; one that says how it was made offers that too.
export async function give(file) {
  if (!file) return;
  try {
    const url = await readFile(file);
    await startFrom(url);
    const found = await call("/api/recorded", { image: url.split(",")[1] });
    if (!found.reason) {
      toast("This picture says how it was made.", "Use these", () => {
        boards.image.remove();
        $("drop-image").hidden = false;
        use(found.wish, found.left_out);
      });
    }
  } catch (error) { fail(error); }
  $("file-image").value = "";
}

export async function startFrom(url) {
  await boards.image.show(url);
  $("drop-image").hidden = true;
}

function lock(on) {
  $("lock").setAttribute("aria-pressed", String(on));
  keep();
}

function carry(fields) {
  carried = fields;
  $("carried")?.remove();
  const names = Object.entries(fields).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
  if (!names.length) return;
  const drop = el("button", { type: "button", className: "quiet", onclick: () => carry({}) }, "leave out");
  $("reset").parentElement.before(el("p", { id: "carried" }, `Also: ${names.join(", ")} `, drop));
}

// Put the values of a picture into the form.
export function use(wish, leftOut = []) {
  if (wish.model !== undefined && offer.models.some((each) => each.name === wish.model)) $("model").value = wish.model;
  modelChanged();
  for (const name of ["prompt", "negative", "width", "height", "steps", "guidance", "sampler"]) $(name).value = wish[name] ?? "";
  if (wish.variant) $("variant").value = wish.variant;
  $("preset").value = wish.preset || "exact";
  $("count").value = 1;
  $("seed").value = wish.seed ?? "";
  lock(wish.seed !== undefined);
  const skipped = new Set([...FIELDS, "loras", "count", "safety", "zero_snr", "colour", "strength"]);
  const neutral = [null, undefined, "", 0, false, "full"];
  const more = Object.entries(wish).filter(([name, value]) => !skipped.has(name) && !neutral.includes(value) && !isDefault(name, value));
  carry(Object.fromEntries(more));
  keep();
  if (leftOut.length) toast(`Made with more, which has to be given again: ${leftOut.join(", ")}`);
  $("prompt").focus();
}

const DEFAULTS = { control_weight: 1, control_end: 1, guidance_end: 1, deep_every: 1, clip_skip: 1, control_reading: "auto" };
const isDefault = (name, value) => DEFAULTS[name] === value;

function modelChanged() {
  const found = model();
  const defaults = found.defaults;
  options($("variant"), [["", "automatic"], ...found.variants.map((each) => [each.name, `${each.name} (${(each.bytes / 1e6).toFixed(0)} MB)`])]);
  const own = offer.samplers.find((each) => each.name === defaults.sampler)?.title || defaults.sampler;
  const chosen = $("sampler").value;
  options($("sampler"), [["", `${own}, default`], ...offer.samplers.map((each) => [each.name, each.title])], chosen);
  for (const name of ["width", "height", "steps", "guidance"]) $(name).placeholder = defaults[name];
  $("lines").hidden = !found.controlnet;
  showPlan();
}

let planning = 0;

async function showPlan() {
  const mine = ++planning;
  const given = new URLSearchParams({ model: $("model").value, device: $("device").value, preset: $("preset").value });
  if ($("variant").value) given.set("variant", $("variant").value);
  const [summary, text] = [$("plan").querySelector("summary"), $("plan").querySelector("pre")];
  try {
    const found = await call(`/api/plan?${given}`);
    if (mine !== planning) return;
    summary.textContent = found.summary;
    text.textContent = found.explanation;
  } catch (error) {
    if (mine === planning) { summary.textContent = error.message; text.textContent = ""; }
  }
}

// The wish as the server takes it; what is empty is the model's default.
function read() {
  const wish = { ...carried };
  for (const name of FIELDS) {
    const value = $(name).value;
    if (value === "" || (name === "seed" && $("lock").getAttribute("aria-pressed") !== "true")) continue;
    wish[name] = NUMBERS.has(name) ? Number(value) : value;
  }
  const loras = {};
  for (const row of $("loras").querySelectorAll(".lora")) {
    const [tick, weight] = row.querySelectorAll("input");
    if (tick.checked) loras[tick.value] = Number(weight.value);
  }
  if (Object.keys(loras).length) wish.loras = loras;
  const image = boards.image.image();
  if (image) {
    wish.image = image;
    wish.strength = Number($("strength").value);
    const mask = boards.image.mask();
    if (mask) wish.mask = mask;
  }
  const control = $("lines").hidden ? "" : boards.control.sketch();
  if (control) {
    wish.control = control;
    wish.control_weight = Number($("control_weight").value);
    wish.control_reading = boards.control.picture ? "auto" : "scribble";
  }
  return wish;
}

function keep() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  values.locked = $("lock").getAttribute("aria-pressed");
  try { localStorage.setItem(KEPT, JSON.stringify(values)); } catch { /* A private window keeps nothing. */ }
}

function restore() {
  let values = {};
  try { values = JSON.parse(localStorage.getItem(KEPT)) || {}; } catch { /* As on a first visit. */ }
  if (values.model) $("model").value = values.model;
  if (!$("model").value) $("model").value = offer.models[0].name;
  modelChanged();
  for (const name of FIELDS) {
    if (name !== "model" && typeof values[name] === "string" && values[name] !== "") $(name).value = values[name];
  }
  for (const [name, first] of [["device", "auto"], ["preset", "exact"]]) if (!$(name).value) $(name).value = first;
  if ($("variant").selectedIndex < 0) $("variant").value = "";
  if ($("sampler").selectedIndex < 0) $("sampler").value = "";
  if (values.locked === "true") lock(true);
  showPlan();
}
