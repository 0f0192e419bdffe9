// Elements, toasts and numbers. Text of prompts and errors only ever becomes text.

export const $ = (id) => document.getElementById(id);

export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "role") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function options(select, rows, chosen) {
  select.replaceChildren(...rows.map(([value, text]) => el("option", { value }, text)));
  if (rows.some(([value]) => value === chosen)) select.value = chosen;
}

export function toast(text, action, act, seconds = 8) {
  const made = el("div", {}, el("span", {}, text));
  const close = () => made.remove();
  if (action) made.append(el("button", { type: "button", onclick: () => { close(); act(); } }, action));
  $("toast").append(made);
  setTimeout(close, seconds * 1000);
}

export function fail(error) {
  toast(error.message || String(error));
}

export function duration(seconds) {
  if (seconds < 1) return "under a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

export function dialog(id) {
  const made = $(id);
  made.querySelector("[data-close]").onclick = () => made.close();
  made.addEventListener("click", (event) => { if (event.target === made) made.close(); });
  return made;
}

export function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file could not be read."));
    reader.readAsDataURL(file);
  });
}

export function loadImage(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("That is not a picture the browser can show."));
    image.src = url;
  });
}
