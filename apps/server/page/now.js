// What is being drawn, with its preview and the time left, and the jobs that wait.

import { call, pictureUrl } from "./api.js";
import { $, duration, el, fail } from "./dom.js";

const open = new Map();
let previews = new Map();
let shown = null;
let parts = null;

const LOADING = "Loading and compiling the model for this size. The first time takes longest.";

export function reset(jobs) {
  open.clear();
  previews = new Map();
  for (const job of jobs) open.set(job.id, job);
  show();
}

export function heard(kind, data) {
  if (kind === "preview") {
    previews.set(data.id, `data:image/jpeg;base64,${data.jpeg}`);
    if (shown === data.id && parts) image(previews.get(data.id));
    return;
  }
  const job = data.job;
  if (["waiting", "loading", "drawing"].includes(job.state) && kind !== "gone") open.set(job.id, job);
  else {
    open.delete(job.id);
    previews.delete(job.id);
  }
  if (kind === "picture" && job.pictures.length) previews.set(job.id, pictureUrl(job, data.n));
  if (kind === "step" && shown === job.id) update(job);
  else show(job);
}

function image(url) {
  if (parts.picture.tagName !== "IMG") {
    const made = el("img", { alt: "What is drawn so far" });
    parts.picture.replaceWith(made);
    parts.picture = made;
  }
  parts.picture.src = url;
}

function cancel(job) {
  return el("button", {
    type: "button",
    ariaLabel: `Cancel ${job.wish.prompt}`,
    onclick: () => call(`/api/jobs/${job.id}/cancel`, {}).catch(fail),
  }, "Cancel");
}

function show(changed) {
  const jobs = [...open.values()].sort((a, b) => (a.id < b.id ? -1 : 1));
  const current = jobs.find((job) => job.state === "drawing") || jobs.find((job) => job.state === "loading");
  const waiting = jobs.filter((job) => job !== current);
  $("queue").replaceChildren(...waiting.map((job, n) => el("li", {},
    el("span", { className: "place" }, `${n + 1}.`), el("span", { title: job.wish.prompt }, job.wish.prompt), cancel(job))));
  document.title = current ? `${Math.round(current.share * 100)} % – edge-sd` : "edge-sd";
  if (!current) {
    if (changed && changed.id === shown && changed.state === "done" && changed.pictures.length) {
      image(pictureUrl(changed, changed.pictures.at(-1)));
      parts.what.textContent = `Done in ${duration(changed.seconds)}.`;
      parts.bar.remove();
      parts.stop.remove();
    } else if (shown === null || !changed || changed.id === shown) {
      $("live").replaceChildren(el("p", { className: "hint" }, changed?.state === "failed" ? changed.error : changed?.state === "cancelled" ? "Cancelled." : "Nothing is being drawn."));
    }
    shown = null;
    return;
  }
  if (shown !== current.id) {
    shown = current.id;
    parts = {
      picture: el("div", { className: "blank" }), what: el("p", { role: "status" }), bar: el("progress", { ariaLabel: "Progress" }),
      stop: cancel(current),
    };
    const ratio = (current.wish.width || 1) / (current.wish.height || current.wish.width || 1);
    parts.picture.style.setProperty("--ratio", String(ratio));
    const words = el("p", {}, current.wish.prompt);
    $("live").replaceChildren(parts.picture, el("div", { className: "about" }, words, parts.what, parts.bar, el("p", {}, parts.stop)));
    if (previews.has(current.id)) image(previews.get(current.id));
  }
  update(current);
}

function update(job) {
  if (!parts) return;
  if (job.state === "loading") {
    parts.bar.removeAttribute("value");
    parts.what.textContent = LOADING;
    return;
  }
  parts.bar.max = 1;
  parts.bar.value = job.share;
  const many = job.count > 1 ? `Picture ${Math.min(job.done + 1, job.count)} of ${job.count}, step` : "Step";
  const left = job.left === null ? "" : `, ${duration(job.left)} left`;
  parts.what.textContent = `${many} ${job.step} of ${job.total}${left}`;
  document.title = `${Math.round(job.share * 100)} % – edge-sd`;
}
