"""The model card: what the embedded model is, how it was made, its curves, its pictures, and what it can't do."""

from __future__ import annotations

import json
from pathlib import Path

from .data import BACKGROUNDS, PACKAGES, STYLES, Artwork, core_vocabulary
from .loop import Row

TWELVE = ["slice of pizza", "cat face", "red apple", "rocket", "cactus", "grinning face", "umbrella", "mushroom",
          "hamburger", "red heart", "dog face", "snowman"]  # fmt: skip

# What is true of the committed weights alone; a new version replaces it.
LOOKS = """\
This is a first version, trained on two CPU cores in an afternoon: pictures are soft. Of the twelve things above, cat,
apple, cactus, grinning face, umbrella, hamburger, heart and dog are plain to see; pizza, rocket, mushroom and snowman
are not yet."""
HISTORY = """\
The autoencoder was trained before the recipe had Muon, with AdamW alone, and so were the UNet's first 1,559 steps,
which also had the plain min-SNR weight; then came the recipe as it stands, which the table counts."""

CARD = """\
---
license: apache-2.0
pipeline_tag: text-to-image
---

# emoji

A small Stable Diffusion, trained from scratch: text encoder, UNet with cross-attention, autoencoder of factor 8, at
128x128 pixels. It ships inside edge-sd so that a first picture needs no download, and is the real model of every test
and benchmark there. diffusers loads this folder as it is.

![samples](samples.png)

Rows: {styles}. Columns: {columns}. Twenty DDIM steps, guidance 4, seeds 0 to 47, as they came.

## What it knows

{concepts} everyday concepts (`converters/training/concepts.txt`) in four styles ({styles}) on twelve backgrounds
({backgrounds}). Prompts in the order of the captions work best: "a red apple, glossy style, blue background". Without a
background it draws on white.

## What it can't do

{looks}

It has seen one drawing of each concept in each style, so a concept that it knows looks much like that drawing; styles
that were held out for a concept are guesses. It knows no scenes, no counts, no relations ("a cat on a car"), no people,
no text, and few words beyond its captions'. Larger sizes than 128x128 repeat or distort shapes. It is no model for
judging what Stable Diffusion can do; it is one for judging whether a machine runs it right.

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

Seeds 0. bfloat16 autocast, two cores of a server CPU with AMX, no GPU. To make it again:

    edge-sd train data
{commands}
    edge-sd train publish FOLDER

A budget in minutes ends after other steps on another machine; `--steps` with the numbers of the table does not.

![curves](curves.svg)
"""


def write_card(work: Path, target: Path) -> None:
    """Write README.md, curves.svg, samples.png and held_out.txt into the model's folder."""
    artwork = Artwork(work)
    held_out = list(artwork.pairs(held_out=True))
    (target / "held_out.txt").write_text("".join(f"{label}, {style}\n" for label, style in held_out), "utf-8")
    logs: dict[str, list[Row]] = {
        name: json.loads((work / f"{name}.log.json").read_text())
        for name in ("vae", "unet", "decoder")
        if (work / f"{name}.log.json").is_file()
    }
    (target / "curves.svg").write_text(curves(logs), "utf-8")
    _samples(target)
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
    )
    (target / "README.md").write_text(text, "utf-8")


def _commands(logs: dict[str, list[Row]]) -> list[str]:
    words = {"vae": "autoencoder", "unet": "unet", "decoder": "decoder"}
    return [
        f"    edge-sd train {words[name]} --minutes {max(row['minutes'] for row in rows):.0f}"
        for name, rows in logs.items()
    ]


def _recipe(logs: dict[str, list[Row]]) -> str:
    """A table of what was trained, for how long, and where it ended."""
    what = {
        "vae": "autoencoder, AutoencoderKL (32, 64, 128, 128), batches of 16 crops, then of 4 pictures",
        "decoder": "its decoder alone, batches of 4 pictures",
        "unet": "UNet (64, 128, 224) and CLIP text encoder (4 layers of 192), batches of 32, v-prediction",
    }
    lines = ["| part | steps | minutes | at the end |", "| --- | --- | --- | --- |"]
    for name, rows in logs.items():
        last = [row for row in rows if "loss" in row][-1]
        end = f"loss {last['loss']:.3f}"
        measured = [row["psnr"] for row in rows if "psnr" in row]
        if measured:
            end += f", {measured[-1]:.1f} dB on held-out drawings"
        lines.append(f"| {what[name]} | {last['step']:.0f} | {last['minutes']:.0f} | {end} |")
    return "\n".join(lines)


def curves(logs: dict[str, list[Row]]) -> str:
    """The losses over minutes as a small SVG, each scaled to its own largest value after the first minutes."""
    width, height, left, bottom = 640, 260, 16, 28
    colours = {"vae": "#3366cc", "unet": "#cc3333", "decoder": "#339966"}
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


def _samples(target: Path) -> None:
    """The twelve concepts in the four styles, drawn by the published variant itself."""
    from PIL import Image

    from edge_sd.pipeline import Pipeline
    from edge_sd.request import Request

    sheet = Image.new("RGB", (128 * len(TWELVE), 128 * len(STYLES)))
    with Pipeline.open(target) as pipeline:
        for row, style in enumerate(STYLES):
            for column, name in enumerate(TWELVE):
                request = Request(f"{name}, {style} style", seed=len(TWELVE) * row + column)
                sheet.paste(pipeline.generate(request).pictures[0].image, (128 * column, 128 * row))
    sheet.save(target / "samples.png", optimize=True)
