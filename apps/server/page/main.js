// The page: it asks what there is, listens to the server, and tells the parts.

import { call, listen, tokenFromAddress } from "./api.js";
import { $, el, fail } from "./dom.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as now from "./now.js";
import * as quant from "./quant.js";
import * as words from "./words.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const each of tabs) {
    const on = each === tab;
    each.setAttribute("aria-selected", String(on));
    each.tabIndex = on ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = !on;
  }
  if (tab.id === "tab-words") words.show();
  if (tab.id === "tab-quant") quant.show();
}

function wireTabs() {
  tabs.forEach((tab, n) => {
    tab.onclick = () => choose(tab);
    tab.onkeydown = (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = tabs[(n + by + tabs.length) % tabs.length];
      choose(next);
      next.focus();
    };
  });
}

async function refresh() {
  const open = await call("/api/jobs?open_only=true&limit=500");
  now.reset(open.jobs);
  await gallery.reload();
}

async function begin() {
  await tokenFromAddress();
  wireTabs();
  const offer = await call("/api/offer");
  form.start(offer, (wish) => call("/api/jobs", wish));
  gallery.start();
  words.start();
  quant.start(offer);
  listen(
    (kind, data) => {
      now.heard(kind, data);
      if (kind !== "preview") gallery.heard(kind, data);
    },
    (up) => {
      $("link").textContent = up ? `edge-sd ${offer.version}` : "The server is away; trying again…";
      // Whatever happened meanwhile is asked for.
      if (up) refresh().catch(fail);
    },
  );
}

// What the menu of the desktop window calls.
window.edgeSd = {
  give(data) {
    const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
    form.give(new File([bytes], "picture"));
  },
};

begin().catch((error) => document.querySelector("main").prepend(el("p", { className: "mistake", role: "alert" }, error.message)));
