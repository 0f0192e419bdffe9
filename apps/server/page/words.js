// What the model was taught: a word goes into the prompt when it is pressed.

import { call } from "./api.js";
import { $, el, fail } from "./dom.js";
import * as form from "./form.js";

let words = null;

export async function show() {
  const name = form.model().name;
  try {
    words = await call(`/api/words?${new URLSearchParams({ model: name })}`);
  } catch (error) { fail(error); return; }
  $("words-hint").textContent = words.concepts.length
    ? `${name} was taught these. Prompts work best as: ${words.pattern}`
    : `${name} brings no list of its words.`;
  fill();
}

export function start() {
  $("words-search").addEventListener("input", fill);
}

function fill() {
  if (!words) return;
  const search = $("words-search").value.toLowerCase();
  const group = (title, list, say) => {
    const found = list.filter((word) => word.toLowerCase().includes(search));
    if (!found.length) return null;
    const rows = found.map((word) => el("li", {}, el("button", { type: "button", onclick: () => add(say(word), say) }, word)));
    return el("section", {}, el("h3", {}, `${title} (${found.length})`), el("ul", {}, ...rows));
  };
  $("words").replaceChildren(...[
    group("Things", words.concepts, (word) => word), group("Styles", words.styles, (word) => `${word} style`),
    group("Backgrounds", words.backgrounds, (word) => `${word} background`),
  ].filter(Boolean));
}

function add(text) {
  const prompt = $("prompt");
  prompt.value = prompt.value.trim() ? `${prompt.value.trim().replace(/,$/, "")}, ${text}` : text;
  prompt.dispatchEvent(new Event("input", { bubbles: true }));
  $("tab-draw").click();
  prompt.focus();
}
