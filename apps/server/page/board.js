// A board to paint on: a mask over a picture, or a sketch on paper.

import { el, loadImage } from "./dom.js";

const MAX_SIDE = 2048;

export class Board {
  // `ink` and `paper` are colours; without paper the board is a mask over the picture below it.
  constructor(root, { ink, paper = null, onremove }) {
    this.root = root;
    this.ink = ink;
    this.paper = paper;
    this.strokes = [];
    this.picture = null;
    this.canvas = el("canvas", { className: paper ? "layer" : "layer mask", tabIndex: 0 });
    this.canvas.setAttribute("aria-label", paper ? "Paper for the sketch" : "Paint what is drawn anew");
    this.canvas.setAttribute("role", "img");
    this.size = el("input", { type: "range", min: 1, max: 30, value: paper ? 2 : 10 });
    this.size.setAttribute("aria-label", "Width of the brush");
    this.rubber = el("button", { type: "button", onclick: () => this.toggle() }, "Rubber");
    this.rubber.setAttribute("aria-pressed", "false");
    root.querySelector(".tools").append(
      this.size, this.rubber,
      el("button", { type: "button", onclick: () => { this.strokes.pop(); this.paint(); } }, "Undo"),
      el("button", { type: "button", onclick: () => { this.strokes = []; this.paint(); } }, "Clear"),
      el("button", { type: "button", onclick: () => { this.remove(); onremove(); } }, "Remove"),
    );
    this.canvas.addEventListener("pointerdown", (event) => this.begin(event));
    this.canvas.addEventListener("pointermove", (event) => this.go(event));
    this.canvas.addEventListener("keydown", (event) => {
      if ((event.ctrlKey || event.metaKey) && event.key === "z") { this.strokes.pop(); this.paint(); event.preventDefault(); }
    });
  }

  get open() { return !this.root.hidden; }

  toggle() {
    const on = this.rubber.getAttribute("aria-pressed") !== "true";
    this.rubber.setAttribute("aria-pressed", String(on));
  }

  async show(url) {
    this.url = url;
    this.picture = await loadImage(url);
    const scale = Math.min(1, MAX_SIDE / Math.max(this.picture.naturalWidth, this.picture.naturalHeight));
    this.set(Math.round(this.picture.naturalWidth * scale), Math.round(this.picture.naturalHeight * scale));
  }

  blank(width, height) {
    this.url = null;
    this.picture = null;
    const scale = 512 / Math.max(width, height);
    this.set(Math.round(width * scale), Math.round(height * scale));
  }

  set(width, height) {
    this.canvas.width = width;
    this.canvas.height = height;
    this.strokes = [];
    const below = this.picture && !this.paper ? this.picture : el("canvas", { width, height });
    below.alt = "The picture that is begun from";
    this.root.querySelector(".stack").replaceChildren(below, this.canvas);
    this.root.hidden = false;
    this.paint();
  }

  remove() {
    this.root.hidden = true;
    this.picture = this.url = null;
    this.strokes = [];
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.canvas.width,
      ((event.clientY - box.top) / box.height) * this.canvas.height,
    ];
  }

  begin(event) {
    this.canvas.setPointerCapture(event.pointerId);
    const width = (Number(this.size.value) / 100) * this.canvas.width;
    this.strokes.push({ width, rub: this.rubber.getAttribute("aria-pressed") === "true", points: [this.at(event)] });
    this.paint();
  }

  go(event) {
    if (!event.buttons || !this.canvas.hasPointerCapture(event.pointerId)) return;
    this.strokes.at(-1).points.push(this.at(event));
    this.paint();
  }

  paint() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, width, height);
    if (this.paper) {
      context.fillStyle = this.paper;
      context.fillRect(0, 0, width, height);
      if (this.picture) context.drawImage(this.picture, 0, 0, width, height);
    }
    context.lineCap = context.lineJoin = "round";
    for (const stroke of this.strokes) {
      context.globalCompositeOperation = stroke.rub && !this.paper ? "destination-out" : "source-over";
      context.strokeStyle = stroke.rub && this.paper ? this.paper : this.ink;
      context.lineWidth = stroke.width;
      context.beginPath();
      const [first, ...rest] = stroke.points;
      context.moveTo(...first);
      for (const point of rest.length ? rest : [[first[0] + 0.1, first[1]]]) context.lineTo(...point);
      context.stroke();
    }
  }

  // The sketch as it is; "" where nothing is on the paper.
  sketch() {
    return this.open && (this.picture || this.strokes.length) ? base64(this.canvas) : "";
  }

  // White where it was painted, black elsewhere; "" where nothing was.
  mask() {
    if (!this.open || !this.strokes.some((stroke) => !stroke.rub)) return "";
    const made = el("canvas", { width: this.canvas.width, height: this.canvas.height });
    const context = made.getContext("2d");
    context.drawImage(this.canvas, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, made.width, made.height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, made.width, made.height);
    return base64(made);
  }

  // The picture below, as large as the mask.
  image() {
    if (!this.open || !this.picture) return "";
    const made = el("canvas", { width: this.canvas.width, height: this.canvas.height });
    const context = made.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, made.width, made.height);
    context.drawImage(this.picture, 0, 0, made.width, made.height);
    return base64(made);
  }
}

const base64 = (canvas) => canvas.toDataURL("image/png").split(",")[1];
