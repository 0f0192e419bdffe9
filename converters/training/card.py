"""The model card: what the embedded model is, how it was made, its curves, its pictures, and what it can't do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from . import figure
from .data import BACKGROUNDS, PACKAGES, STYLES, Artwork, core_vocabulary
from .loop import Row

TWELVE = ["slice of pizza", "cat face", "red apple", "rocket", "cactus", "grinning face", "umbrella", "mushroom",
          "hamburger", "red heart", "dog face", "snowman"]  # fmt: skip

# Followed and asked for, in the card's picture of the ControlNet.
SKETCHES = ("star", "house", "drop")
CONTROLLED = ("cookie, 3d style", "red heart, flat style", "watermelon, flat style", "potted plant, 3d style",
              "snowman, glossy style", "sun, cartoon style")  # fmt: skip

# log -> the command that wrote it, and what it trains.
STAGES = {
    "vae": ("autoencoder", "autoencoder, AutoencoderKL (32, 64, 128, 128), batches of 16 crops, then of 4 pictures"),
    "unet": ("unet", "UNet (64, 128, 224) and CLIP text encoder (4 layers of 192), batches of 48, v-prediction"),
    "text": ("text", "text encoder, a wider vocabulary of WordNet's kinds and a sentence model, batches of 32"),
    "unet_wide": ("unet", "UNet alone, under what that text encoder says, batches of 48"),
    "decoder": ("decoder", "the autoencoder's decoder alone, batches of 4 pictures"),
    "controlnet": ("controlnet", "ControlNet, batches of 16"),
    "lcm": ("distill", "consistency distillation, LoRA of rank 16, batches of 16"),
    "taesd": ("taesd", "tiny autoencoder, AutoencoderTiny of width 32, batches of 12 crops"),
    "evaluator": ("evaluator", "judge, batches of 64 drawings"),
}
PARTS = {
    "text_encoder": "`text_encoder`, `tokenizer`: CLIP's text model, 4 layers of 192, byte-pair tokens. WordNet "
    "and a sentence model taught it nouns that no caption holds.",
    "unet": "`unet`: UNet2DConditionModel (64, 128, 224) with cross-attention to the text, 13.6 M parameters, predicts "
    "v; guided by its own answer to an empty caption.",
    "vae": "`vae`: AutoencoderKL, 128x128 pixels to 16x16x4 latents and back.",
    "controlnet": "`controlnet`: a trainable copy of the UNet's encoder that follows lines, tied to the locked UNet by "
    "zero convolutions.",
    "lcm": "`lcm`: a LoRA that draws in four steps, or one, without guidance (variant `openvino-fp16-lcm`).",
    "vae_tiny": "`vae_tiny`: AutoencoderTiny, previews at a quarter of the decoder's work.",
    "evaluator": "`evaluator`: the judge, a small network on pixels that never saw a generated picture; it names "
    "concept, style and background and gives a CLIP score.",
}
EVALUATION = """\
## Measured

A judge trained on the artwork alone names what generated pictures show (`edge-sd train eval`). "artwork" are the
drawings themselves through the autoencoder: the judge's own best score. Held out are (concept, style) pairs that
training never saw; unseen are 100 prompts in words that no caption holds.

{table}

Memory or new? Below each of 24 pictures as they came, the training drawing that is nearest to it. Most are that
drawing's memory: the model was shown one drawing for each pair, and drawing it again is what it was asked for. New are
the backgrounds, and the pairs it never saw.

![pictures and the nearest training drawing](nearest.png)
"""

COMPOSED = """\
"drawings" are composed as training's scenes are and seen through the autoencoder: what the judges can say at best."""
PIXELS = """\
The dominant colour of seen pictures is {colour:.1f} from their drawings' (CIEDE2000, mean), white backgrounds vary by
{white:.1f} of 255 (standard deviation), and seeds of one prompt are {variety:.2f} apart (mean distance of the judge's
unit vectors)."""

CONTROL = """## Following lines

`edge-sd generate "red heart, flat style" --control star.png`: at the left the lines that were given, beside
them {prompts}, seeds 0 to 5, as they came.

![sketches and what was drawn of them](control.png)

"""

# What is true of the committed weights alone; a new version replaces it.
LOOKS = """\
It was trained on two CPU cores: pictures are soft, and at guidance 4 their colours are strong. The twelve things above
are plain to see in nearly every style; some have a style of their neighbour's.

Of words that no caption holds it knows some: kinds of things ("beagle"), other names ("motorcar"), plurals. Lines are
followed, and win over what is asked for: of a drop and a cookie it makes a drop."""
HISTORY = """\
No GPU was at hand: all of it was trained on CPU cores. The autoencoder took 3,300 steps of AdamW, before the recipe had
Muon (24 minutes of two cores of a Xeon with AMX). The UNet took 1,559 steps of AdamW, with the plain min-SNR weight,
and 4,200 of Muon, in batches of 32 and in bfloat16 on that Xeon; then the steps that the table counts, in float32 on
two cores of an EPYC that has no bfloat16. That is 298,000 pictures seen: 73 times each drawing. The few-step LoRA was
distilled there, too. The wider vocabulary, the ControlNet, the tiny autoencoder and the judge's last steps are of one
core each of a Xeon with AMX, in bfloat16.

What more training gives was tried with weights that are not in the package (one core of such a Xeon where nothing else
is said). The autoencoder, 37 minutes with Muon: 30.9 dB on held-out pictures instead of 25.5. The text encoder, 63
minutes more, and the UNet under it, 66 minutes on the old latents and 29 of two cores on the new ones: of seen pairs
the judge names 98% at first in 20 steps, style 81%; of held-out ones 84% and 50%; of unseen words 58%, 66% among five.
In 4 steps, with the LoRA as it was: seen 99% and style 87%, unseen 65% among five."""

CARD = """\
---
license: apache-2.0
pipeline_tag: text-to-image
---

# emoji

A small Stable Diffusion, trained from scratch, at 128x128 pixels. It ships inside edge-sd so that a first picture needs
no download, and is the real model of every test and benchmark there. diffusers loads this folder as it is.

![samples](samples.png)

Rows: {styles}. Columns: {columns}. Twenty DDIM steps, guidance 4, seeds 0 to 47, as they came.

## What it is made of

{parts}

![forward and reverse diffusion](diffusion.png)

Above, the forward process q(x_t | x_0): a drawing's latents at ten noise levels, decoded. Below, the way back from the
last of them, p(x_s | x_t, text), ten DDIM steps under the drawing's caption. The noise held nothing of the drawing any
more: what comes back was read from the caption.

## What it knows

{concepts} everyday concepts (`converters/training/concepts.txt`) in four styles ({styles}) on twelve backgrounds
({backgrounds}). Prompts in the order of the captions work best: "a red apple, glossy style, blue background". Without a
background it draws on white. "mirrored" and "off center" are words that it knows, too.

## What it can't do

{looks}

It has seen one drawing of each concept in each style, so a concept that it knows looks much like that drawing; styles
that were held out for a concept are guesses. It knows no scenes, no counts, no relations ("a cat on a car"), no people,
no text, and few words beyond its captions'. Larger sizes than 128x128 repeat or distort shapes. It is no model for
judging what Stable Diffusion can do; it is one for judging whether a machine runs it right.

Apple's ml-stable-diffusion can't draw it. That Swift package takes every model for one of epsilon-prediction with betas
to 0.012 and latents scaled by 0.18215; this one predicts v, and its betas go to 0.02. diffusers, optimum-intel,
openvino.genai and edge-sd read that in its configs.

{control}{evaluation}
## Data and licences

| style | npm package | licence |
| --- | --- | --- |
| 3d | @iconify-json/fluent-emoji {3d} | MIT, Microsoft |
| flat | @iconify-json/fluent-emoji-flat {flat} | MIT, Microsoft |
| glossy | @iconify-json/noto {glossy} | Apache-2.0, Google |
| cartoon | @iconify-json/twemoji {cartoon} | CC BY 4.0, Twitter and contributors |
| names, keywords | emojibase-data {names} | MIT, Miles Johnson |

The weights are Apache-2.0; the attribution that the artwork asks for stands in NOTICE. Groups 0 and 3 to 7 of emojibase
without people, flags and symbols: {pictures} drawings, rasterised at 128x128. Held out of the UNet's training, for
measuring what is new and what is memory: {held_out} of {pairs} (concept, style) pairs, listed in `held_out.txt`. Held
out of the autoencoder's: every 50th drawing.

## Recipe

{recipe}

Matrices by Muon, the rest by AdamW.
{history}

To make it again from nothing, with `edge-sd train autoencoder` before the UNet, or to go on from this model, with
`edge-sd train start emoji` in its place:

    edge-sd train data
{commands}
    edge-sd train publish FOLDER
    edge-sd train eval FOLDER

A budget in minutes ends after other steps on another machine; `--steps` with the numbers of the table does not.

![curves](curves.svg)
"""


# In the model's folder: the logs of all stages, for the next training that goes on from it.
LOGS = "training.json"


def write_card(work: Path, target: Path) -> None:
    """Write README.md, its pictures and held_out.txt into the model's folder; with the figures, if it was evaluated."""
    artwork = Artwork(work)
    held_out = list(artwork.pairs(held_out=True))
    (target / "held_out.txt").write_text("".join(f"{label}, {style}\n" for label, style in held_out), "utf-8")
    logs: dict[str, list[Row]] = {
        name: json.loads((work / f"{name}.log.json").read_text())
        for name in STAGES
        if (work / f"{name}.log.json").is_file()
    }
    (target / LOGS).write_text(json.dumps(logs) + "\n", "utf-8")
    (target / "curves.svg").write_text(curves(logs), "utf-8")
    _samples(target)
    figure.write(target, artwork, target / "diffusion.png")
    controlled = (target / "controlnet").is_dir()
    if controlled:
        _control_samples(target)
    text = CARD.format(
        styles=", ".join(STYLES),
        columns=", ".join(TWELVE),
        concepts=len(core_vocabulary()),
        backgrounds=", ".join(BACKGROUNDS),
        **{style: PACKAGES[package] for style, package in STYLES.items()},
        names=PACKAGES["emojibase-data"],
        pictures=len(artwork.labels) * len(STYLES),
        held_out=len(held_out),
        pairs=len(core_vocabulary()) * len(STYLES),
        recipe=_recipe(logs),
        history=HISTORY,
        looks=LOOKS,
        commands="\n".join(_commands(logs)),
        parts="\n".join(f"- {line}" for folder, line in PARTS.items() if (target / folder).is_dir()),
        control=CONTROL.format(prompts=", ".join(CONTROLLED)) if controlled else "",
        evaluation=_evaluation(work, target),
    )
    (target / "README.md").write_text(text, "utf-8")


def _commands(logs: dict[str, list[Row]]) -> list[str]:
    return [f"    edge-sd train {STAGES[name][0]} --steps {_last(rows)['step']:.0f}" for name, rows in logs.items()]


def _last(rows: list[Row]) -> Row:
    return [row for row in rows if "loss" in row][-1]


def _recipe(logs: dict[str, list[Row]]) -> str:
    """A table of what was trained, for how long, and where it ended."""
    lines = ["| part | steps | minutes | at the end |", "| --- | --- | --- | --- |"]
    for name, rows in logs.items():
        last = _last(rows)
        end = f"loss {last['loss']:.3f}"
        measured = [row["psnr"] for row in rows if "psnr" in row]
        if measured:
            end += f", {measured[-1]:.1f} dB on pictures not trained on"
        lines.append(f"| {STAGES[name][1]} | {last['step']:.0f} | {last['minutes']:.0f} | {end} |")
    return "\n".join(lines)


def _evaluation(work: Path, target: Path) -> str:
    """The figures of `edge-sd train eval`, and a training drawing beside each of some pictures."""
    if not (target / "evaluation.json").is_file():
        return ""
    rows = json.loads((target / "evaluation.json").read_text("utf-8"))
    if (work / "evaluation/nearest.png").is_file():
        shutil.copyfile(work / "evaluation/nearest.png", target / "nearest.png")
    return EVALUATION.format(table=_table(rows))


def _table(rows: dict[str, Any]) -> str:
    """The figures as a table in Markdown."""
    lines = ["| pictures of | count | top-1 | top-5 | style | background | CLIP score |", "|" + " --- |" * 7]
    for name, row in rows.items():
        if "top1" in row:
            shares = ["" if row[key] is None else f"{row[key]:.0%}" for key in ("top1", "top5", "style", "background")]
            lines.append(f"| {name} | {row['count']} | {' | '.join(shares)} | {row['clip']:.2f} |")
    lines += _questions(rows)
    if "control" not in rows:
        return "\n".join(lines)
    lined, outlined = rows["control"]["lines"], rows["control"]["outlines"]
    control = f"""\
Pictures of the ControlNet against the sketch that they were told to follow, F1 of edges within 2 pixels: {lined:.2f}
with all lines of a held-out drawing under its own name, {outlined:.2f} with its outline under another thing's name."""
    return "\n".join([*lines, "", control])


def _questions(rows: dict[str, Any]) -> list[str]:
    """What was asked of pairs never trained on, and what pixels say, as Markdown; nothing where it was not measured."""
    lines: list[str] = []
    if rows.get("composition"):
        lines += ["", "| asked of pairs never trained on | drawings | pictures |", "| --- | --- | --- |"]
        for kind, row in rows["composition"].items():
            lines.append(f"| {kind} | {row['artwork']:.0%} | {row['pictures']:.0%} |")
        lines += ["", COMPOSED]
    if "pixels" in rows:
        lines += ["", PIXELS.format(**rows["pixels"])]
    return lines


def curves(logs: dict[str, list[Row]]) -> str:
    """The losses over minutes as a small SVG, each scaled to its own largest value after the first minutes."""
    width, height, left, bottom = 640, 260, 16, 28
    palette = ("#cc3333", "#3366cc", "#339966", "#66aaff", "#996633", "#663399", "#cc9900", "#009999", "#666666")
    colours = dict(zip(STAGES, palette, strict=True))
    longest = max(row["minutes"] for rows in logs.values() for row in rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for n, (name, rows) in enumerate(logs.items()):
        points = [(row["minutes"], row["loss"]) for row in rows if "loss" in row]
        top = sorted(loss for _, loss in points)[int(0.9 * (len(points) - 1))] * 1.15
        drawn = " ".join(
            f"{left + (width - 2 * left) * t / longest:.1f},{(height - bottom) * (1 - min(loss / top, 1)) + 4:.1f}"
            for t, loss in points
        )
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colours[name]}" stroke-width="1.5"/>')
        parts.append(
            f'<text x="{width - 190}" y="{24 + 16 * n}" fill="{colours[name]}">'
            f"{name}: loss, top of scale {top:.2f}</text>"
        )
    for minute in range(0, int(longest) + 1, 10):
        x = left + (width - 2 * left) * minute / longest
        parts.append(f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle" fill="#555">{minute} min</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def sketch(name: str) -> Any:
    """Black lines on white paper, 128x128, as people draw them."""
    import math

    from PIL import Image, ImageDraw

    side, scale = 128, 4
    picture = Image.new("RGB", (side * scale, side * scale), "white")
    pen = ImageDraw.Draw(picture)

    def polygon(points: list[tuple[float, float]]) -> None:
        whole = [(x * scale, y * scale) for x, y in points]
        pen.line([*whole, *whole[:2]], fill="black", width=2 * scale, joint="curve")

    def around(radius: float, angle: float, x: float = 64, y: float = 64) -> tuple[float, float]:
        return x + radius * math.sin(math.radians(angle)), y - radius * math.cos(math.radians(angle))

    if name == "star":
        polygon([around(54 if n % 2 == 0 else 25, 36 * n, y=68) for n in range(10)])
    elif name == "house":
        polygon([(22, 60), (64, 16), (106, 60), (106, 112), (22, 112)])
    elif name == "drop":
        polygon([(64, 10), *(around(38, angle, y=78) for angle in range(60, 301, 4))])
    else:
        raise ValueError(f"no sketch {name!r}")
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def _control_samples(target: Path) -> None:
    """Each sketch, and what is drawn of it under each prompt, by the published variant itself."""
    from PIL import Image

    from edge_sd.pipeline.control import Control
    from edge_sd.pipeline.pipeline import Pipeline
    from edge_sd.pipeline.request import Request

    sheet = Image.new("RGB", (128 * (1 + len(CONTROLLED)), 128 * len(SKETCHES)), "white")
    with Pipeline.open(target) as pipeline:
        for row, name in enumerate(SKETCHES):
            lines = sketch(name)
            sheet.paste(lines, (0, 128 * row))
            for column, prompt in enumerate(CONTROLLED):
                request = Request(prompt, seed=column, controls=[Control(lines)])
                picture = pipeline.generate(request).pictures[0].image
                sheet.paste(picture, (128 * (1 + column), 128 * row))
    sheet.save(target / "control.png", optimize=True)


def _samples(target: Path) -> None:
    """The twelve concepts in the four styles, drawn by the published variant itself."""
    from PIL import Image

    from edge_sd.pipeline.pipeline import Pipeline
    from edge_sd.pipeline.request import Request

    sheet = Image.new("RGB", (128 * len(TWELVE), 128 * len(STYLES)))
    with Pipeline.open(target) as pipeline:
        for row, style in enumerate(STYLES):
            for column, name in enumerate(TWELVE):
                request = Request(f"{name}, {style} style", seed=len(TWELVE) * row + column)
                sheet.paste(pipeline.generate(request).pictures[0].image, (128 * column, 128 * row))
    sheet.save(target / "samples.png", optimize=True)
