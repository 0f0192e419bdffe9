// Pictures: search, look at one with its parameters, compare two, delete with undo.

import { call, inWindow, pictureUrl } from "./api.js";
import { $, dialog, duration, el, fail, toast } from "./dom.js";
import * as form from "./form.js";

let jobs = [];
let more = false;
let asked = 0;
let picked = [];
let at = null;
let detail;
let side;

export function start() {
  detail = dialog("detail");
  side = dialog("side");
  let timer;
  $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(reload, 200); });
  document.addEventListener("keydown", (event) => {
    const typing = /INPUT|TEXTAREA|SELECT/.test(document.activeElement.tagName);
    if (event.key === "/" && !typing && !$("panel-draw").hidden) { event.preventDefault(); $("search").focus(); }
    if (detail.open && (event.key === "ArrowLeft" || event.key === "ArrowRight")) turn(event.key === "ArrowLeft" ? -1 : 1);
  });
  $("older").onclick = async () => {
    const found = await ask(jobs.at(-1).id).catch(fail);
    if (found) { jobs.push(...found.jobs); more = found.more; show(); }
  };
  $("compare").onclick = compare;
  $("slider").addEventListener("input", cut);
}

function ask(before = "") {
  return call(`/api/jobs?${new URLSearchParams({ search: $("search").value, before, limit: 60 })}`);
}

export async function reload() {
  const mine = ++asked;
  const found = await ask();
  if (mine !== asked) return;
  jobs = found.jobs;
  more = found.more;
  show();
}

export function heard(kind, { job }) {
  if (kind === "step" || job.door !== "jobs" && !job.pictures.length) return;
  const n = jobs.findIndex((each) => each.id === job.id);
  if (kind === "gone") jobs = jobs.filter((each) => each.id !== job.id);
  else if (n >= 0) jobs[n] = job;
  else if (matches(job)) jobs = [...jobs, job].sort((a, b) => (a.id < b.id ? 1 : -1));
  if (kind === "picture" || kind === "gone" || ["done", "failed", "cancelled"].includes(job.state)) show();
}

function matches(job) {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every((word) => job.wish.prompt.toLowerCase().includes(word));
}

const pictures = () => jobs.flatMap((job) => job.pictures.map((n) => ({ job, n })));
const key = ({ job, n }) => `${job.id}/${n}`;

function show() {
  const tiles = new Map([...$("gallery").children].map((each) => [each.dataset.key, each]));
  const rows = [];
  for (const job of jobs) {
    for (const n of job.pictures) rows.push(tiles.get(`${job.id}/${n}`) || tile(job, n));
    if (job.state === "failed") rows.push(tiles.get(job.id) || failed(job));
  }
  $("gallery").replaceChildren(...rows);
  picked = picked.filter((each) => rows.some((row) => row.dataset.key === each));
  $("compare").disabled = picked.length !== 2;
  $("empty").hidden = rows.length > 0;
  $("older").hidden = !more;
}

function tile(job, n) {
  const name = `${job.wish.prompt}, picture ${n + 1}`;
  const tick = el("input", { type: "checkbox", className: "pick", ariaLabel: `Compare ${name}` });
  tick.onchange = () => pick(`${job.id}/${n}`, tick);
  const image = el("img", { src: pictureUrl(job, n), alt: job.wish.prompt, loading: "lazy" });
  // Dragged out of the window it becomes a file.
  image.addEventListener("dragstart", (event) => {
    event.dataTransfer.setData("DownloadURL", `image/png:${fileName(job, n)}:${new URL(pictureUrl(job, n), location.href)}`);
  });
  const button = el("button", { type: "button", className: "show", ariaLabel: `Show ${name}`, onclick: () => look(job.id, n) }, image);
  const made = el("li", {}, button, tick);
  made.dataset.key = `${job.id}/${n}`;
  return made;
}

function failed(job) {
  const made = el("li", { className: "failed" },
    el("p", {}, job.wish.prompt), el("p", { className: "why" }, job.error),
    el("button", { type: "button", onclick: () => remove(job) }, "Remove"));
  made.dataset.key = job.id;
  return made;
}

function pick(which, tick) {
  picked = picked.filter((each) => each !== which);
  if (tick.checked) picked.push(which);
  if (picked.length > 2) {
    const first = picked.shift();
    document.querySelector(`#gallery li[data-key="${first}"] input`).checked = false;
  }
  $("compare").disabled = picked.length !== 2;
}

function find(which) {
  return pictures().find((each) => key(each) === which);
}

function compare() {
  const two = picked.map(find);
  side.querySelectorAll("img").forEach((image, n) => { image.src = pictureUrl(two[n].job, two[n].n); });
  side.querySelectorAll(".two span").forEach((span, n) => { span.textContent = caption(two[n]); });
  $("slider").value = 50;
  cut();
  side.showModal();
}

function cut() {
  side.querySelector(".over").style.setProperty("--cut", `${$("slider").value}%`);
}

const settingsOf = ({ job, n }) => job.settings.find((row) => row.n === n) || {};

function caption(each) {
  const row = settingsOf(each);
  return `${row.prompt ?? each.job.wish.prompt} · ${row.variant ?? ""} · seed ${row.seed ?? ""}`;
}

function look(id, n) {
  at = { job: jobs.find((job) => job.id === id), n };
  fill();
  if (!detail.open) detail.showModal();
}

function turn(by) {
  const all = pictures();
  const next = all[all.findIndex((each) => key(each) === key(at)) + by];
  if (next) look(next.job.id, next.n);
}

function fill() {
  const { job, n } = at;
  const row = settingsOf(at);
  detail.querySelector(".shown").replaceChildren(el("img", { src: pictureUrl(job, n), alt: job.wish.prompt }));
  const button = (text, onclick) => el("button", { type: "button", onclick }, text);
  detail.querySelector(".acts").replaceChildren(
    button("Use these", () => { detail.close(); form.use({ ...job.wish, ...used(row) }, job.given); }),
    button("Start from it", () => { detail.close(); form.startFrom(pictureUrl(job, n)).catch(fail); }),
    save(job, n),
    button("Delete", () => { detail.close(); remove(job); }),
  );
  detail.querySelector("dl").replaceChildren(...rows(job, row).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

// The desktop window asks where to; a browser downloads.
function save(job, n) {
  if (inWindow()) {
    const act = () => call("/api/save", { id: job.id, n }).then(({ name }) => name && toast(`Saved as ${name}.`)).catch(fail);
    return el("button", { type: "button", onclick: act }, "Save as…");
  }
  return el("a", { href: `${pictureUrl(job, n)}?download=true`, download: fileName(job, n), className: "link" }, "Download");
}

const fileName = (job, n) => `edge-sd-${job.id}-${n}.png`;

function used(row) {
  const names = ["prompt", "negative", "width", "height", "steps", "guidance", "sampler", "sigmas", "seed", "variant", "variation_seed"];
  return Object.fromEntries(names.filter((name) => row[name] !== null && row[name] !== undefined).map((name) => [name, row[name]]));
}

function rows(job, row) {
  const spaced = row.sigmas ? `${row.sampler} ${row.sigmas}` : row.sampler;
  const all = [
    ["Prompt", row.prompt ?? job.wish.prompt], ["Negative", row.negative], ["Size", row.width && `${row.width} × ${row.height}`],
    ["Steps", row.steps], ["Guidance", row.guidance], ["Sampler", spaced], ["Seed", row.seed], ["Strength", row.strength],
    ["Model", row.model], ["Variant", row.variant], ["Device", row.device], ["Preset", job.wish.preset], ["Plan", job.plan],
    ["Time", job.seconds ? duration(job.seconds) : ""], ["Made with", job.given.join(", ")], ["Notes", job.notes.join("; ")],
    ["Drawn", new Date(job.finished * 1000).toLocaleString()],
  ];
  return all.filter(([, value]) => value !== undefined && value !== null && value !== "").map(([name, value]) => [name, String(value)]);
}

async function remove(job) {
  try {
    await call(`/api/jobs/${job.id}`, undefined, "DELETE");
  } catch (error) { fail(error); return; }
  jobs = jobs.filter((each) => each.id !== job.id);
  show();
  const what = job.pictures.length > 1 ? `${job.pictures.length} pictures` : "One picture";
  toast(`${what} deleted.`, "Undo", async () => {
    await call(`/api/jobs/${job.id}/restore`, {}).catch(fail);
    await reload().catch(fail);
  }, 12);
}
