// Comparisons of a model's variants.

import { $ } from "./dom.js";

export function start() {
  $("tab-quant").hidden = true;
}

export function show() {}
