"""AUTOMATIC1111's text, which many programs write into pictures, and what its fields mean to a request.

    a red apple
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, …

Other programs' records (programs.py, comfyui.py) become the same fields. A field that a request has an option for is
taken over; of the rest, each that changes a picture is named in a note. Reading is linear in the text's length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidRequest
from ..sampling.names import AUTOMATIC as AUTOMATIC_SIGMAS
from ..sampling.names import choose_sampler, find_sampler, find_sigmas

NEGATIVE = "Negative prompt:"
# sd-dynamic-prompts' and SD.Next's lines with what the prompts were before they were expanded.
TEMPLATES = ("Template:", "Negative Template:")
# Values in quotes or braces that turn out to be no JSON; each costs a scan of the rest.
MAX_FAULTS = 16
WORD = (1 << 32) - 1

# What programs call the sampler or the schedule that they choose themselves.
AUTOMATIC = {"", "automatic", "default", "auto", "none", "discrete", "normal", "uniform", "null"}
# Fields that say where a picture comes from, and change nothing of it; `Guidance` is that of distilled transformers.
ABOUT = {
    "version", "app", "program", "model", "model hash", "pipeline", "operations", "batch", "batch size", "batch pos",
    "index", "grid", "user", "created date", "date", "time", "lora hashes", "ti hashes", "hashes", "sdcpp", "parser",
    "template", "negative template", "styles", "comment", "te", "unet", "te hash", "unet hash", "generator", "workflow",
    "guidance", "civitai resources", "civitai metadata", "generation time", "generation_time", "filename",
}  # fmt: skip


@dataclass(frozen=True)
class Infotext:
    """A prompt, a negative one, and the fields by the names that AUTOMATIC1111 gives them; `program` wrote them."""

    prompt: str
    negative: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    program: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Taken:
    """What a request takes over of an Infotext.

    settings   names and values of Request
    for_image, for_mask   those that need an image or a mask, which a text can't hold
    others     the fields that are none of a request's, as written
    notes      what is not taken over, or not as it was written
    """

    settings: dict[str, Any]
    for_image: dict[str, Any]
    for_mask: dict[str, Any]
    others: dict[str, str]
    notes: tuple[str, ...]


def is_infotext(text: str) -> bool:
    """Whether `text` has a line of fields."""
    return "Steps:" in text


def parse_infotext(text: str) -> Infotext:
    """Split AUTOMATIC1111's text. Lines before and after the fields may be templates of the prompts."""
    lines = text.strip().split("\n")
    at = next((n for n in range(len(lines) - 1, -1, -1) if lines[n].lstrip().startswith("Steps:")), len(lines))
    parts: dict[str, list[str]] = {"": [], NEGATIVE: [], **{name: [] for name in TEMPLATES}}
    part = ""
    for n, line in enumerate(lines):
        if n == at:
            # Nothing after the fields belongs to the prompts.
            part = TEMPLATES[0]
            continue
        known = (NEGATIVE, *TEMPLATES) if part or n > at else (NEGATIVE,)
        for name in known:
            if line.lstrip().startswith(name):
                part, line = name, line.lstrip().removeprefix(name)
        parts[part].append(line)
    found = {name: "\n".join(rows).strip() for name, rows in parts.items()}
    fields = parse_fields(lines[at]) if at < len(lines) else {}
    templates = {name.removesuffix(":"): found[name] for name in TEMPLATES if found[name]}
    program = fields.get("App", "AUTOMATIC1111's form")
    return Infotext(found[""], found[NEGATIVE], {**fields, **templates}, program)


def parse_fields(line: str) -> dict[str, str]:
    """`Key: value, Key: "value, with commas", Key: {"json": 1}`; the first of a name stays."""
    decoder = json.JSONDecoder()
    fields: dict[str, str] = {}
    last, at, faults = "", 0, 0
    while (colon := line.find(":", at)) >= 0:
        # What stands before the last comma belongs to the value before: it had a comma and no quotes.
        rest, comma, key = line[at:colon].rpartition(",")
        if comma and last and rest.strip():
            fields[last] = f"{fields[last]},{rest}".rstrip()
        key = key.strip()
        at = colon + 1
        while at < len(line) and line[at] == " ":
            at += 1
        value: Any = None
        if line[at : at + 1] in ('"', "{", "[") and faults < MAX_FAULTS:
            try:
                value, end = decoder.raw_decode(line, at)
                value = value if isinstance(value, str) else line[at:end]
                comma_at = line.find(",", end)
            except (ValueError, RecursionError):
                faults += 1
        if value is None:
            comma_at = line.find(",", at)
            value = line[at : comma_at if comma_at >= 0 else len(line)]
        last = key if key and key not in fields else ""
        if last:
            fields[last] = value.strip()
        at = comma_at + 1 if comma_at >= 0 else len(line)
    if last and (rest := line[at:].strip()):
        fields[last] = f"{fields[last]}, {rest}"
    return fields


def _whole(text: str) -> int:
    """An integer, also as "20.0"."""
    number = float(text)
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{text[:40]!r} is no whole number")
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]!r} is no number")
    return number


# Field, in small letters -> the request's option and how its value is read. Options that a version of Request lacks
# are named as not taken over.
NUMBERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "steps": ("steps", _whole),
    "cfg scale": ("guidance", _real),
    "clip skip": ("clip_skip", _whole),
    "variation seed strength": ("variation_strength", _real),
    "eta": ("eta", _real),
    "eta ddim": ("eta", _real),
    "eta ancestral": ("eta", _real),
    "sigma churn": ("s_churn", _real),
    "sigma noise": ("s_noise", _real),
}
SEEDS = {"seed": "seed", "variation seed": "variation_seed"}
IMAGE_FIELDS = {"denoising strength": ("strength", _real), "image cfg scale": ("image_guidance", _real)}
MASK_FIELDS = {"mask blur": ("mask_blur", _real), "masked area padding": ("mask_padding", _whole)}
# Values at which a field changes nothing.
IDLE = {
    "eta": {0.0, 1.0}, "eta ddim": {0.0}, "eta ancestral": {1.0}, "sigma churn": {0.0}, "sigma noise": {1.0},
    "variation seed strength": {0.0}, "token merging ratio": {0.0}, "cfg rescale": {0.0}, "ensd": {0.0},
    "hires steps": {0.0},
}  # fmt: skip


def take(infotext: Infotext, options: set[str]) -> Taken:
    """What of `infotext` a request with these `options` takes over. Raises ValueError for a value that is no number."""
    settings: dict[str, Any] = {"prompt": infotext.prompt, "negative": infotext.negative}
    for_image: dict[str, Any] = {}
    for_mask: dict[str, Any] = {}
    notes = list(infotext.notes)
    left: dict[str, str] = {}
    used: set[str] = set()
    for key, text in infotext.fields.items():
        name = key.lower()
        used.add(key)
        if name in NUMBERS and NUMBERS[name][0] in options and not _idle(name, text):
            option, read = NUMBERS[name]
            settings[option] = read(text)
        elif name in SEEDS:
            _take_seed(settings, SEEDS[name], text, notes)
        elif name in IMAGE_FIELDS:
            option, read = IMAGE_FIELDS[name]
            for_image[option] = read(text)
        elif name in MASK_FIELDS:
            option, read = MASK_FIELDS[name]
            for_mask[option] = read(text)
        elif name == "size":
            settings["width"], settings["height"] = map(_whole, text.lower().split("x"))
        elif name == "noise schedule" and text == "Zero Terminal SNR":
            settings["zero_snr"] = True
        elif name not in ("sampler", "schedule type", "scheduler", "sampler sigma"):
            used.discard(key)
            if name not in ABOUT and not _idle(name, text):
                left[key] = text
    _take_sampler(settings, infotext.fields, notes)
    if not settings.get("variation_strength"):
        settings.pop("variation_seed", None)
    others = {key: text for key, text in infotext.fields.items() if key not in used}
    others = {key: text for key, text in others.items() if key not in ("Model", "Model hash")}
    if left:
        notes.append("not taken over: " + ", ".join(f"{key}: {text[:60]}" for key, text in left.items()))
    return Taken(settings, for_image, for_mask, others, tuple(notes))


def _idle(name: str, text: str) -> bool:
    """Whether a field has the value at which it changes nothing, or none."""
    if not text:
        return True
    try:
        # stable-diffusion.cpp writes infinity for what was left open.
        return name in IDLE and (float(text) in IDLE[name] or not math.isfinite(float(text)))
    except ValueError:
        return False


def _take_seed(settings: dict[str, Any], option: str, text: str, notes: list[str]) -> None:
    seed = _whole(text)
    if seed < 0:
        notes.append(f"{option.replace('_', ' ')} {seed} stood for a random one, which is not known")
        return
    if seed > WORD:
        notes.append(f"{option.replace('_', ' ')} {seed} has more than 32 bits; torch's noise is that of the lowest 32")
    settings[option] = seed & WORD


def _take_sampler(settings: dict[str, Any], fields: Mapping[str, str], notes: list[str]) -> None:
    """The sampler and the spacing of its sigmas; what is not to be had becomes a note, and the model's own is used."""
    folded = {key.lower(): text for key, text in fields.items()}
    name = folded.get("sampler") or ""
    schedule = folded.get("schedule type") or folded.get("sampler sigma") or ""
    if not name and folded.get("scheduler", "").endswith("Scheduler"):
        name = folded["scheduler"]
    else:
        schedule = schedule or folded.get("scheduler", "")
    if name.lower() in AUTOMATIC:
        name = ""
    if name and not _is_sampler(name):
        # stable-diffusion.cpp writes both in one: "euler_a discrete", "euler_simple".
        stem, separator, ending = max((name.rpartition(mark) for mark in (" ", "_")), key=lambda cut: len(cut[0]))
        if separator and _is_sampler(stem):
            name, schedule = stem, schedule or ending
        else:
            notes.append(f"no sampler is called {name[:60]!r}; the model's own is used")
            name = ""
    if name:
        settings["sampler"] = name
    if schedule.lower() in AUTOMATIC:
        if folded.get("schedule type"):
            settings["sigmas"] = AUTOMATIC_SIGMAS
        return
    try:
        sigmas = find_sigmas(schedule)
        choose_sampler(name or "euler", sigmas)
        settings["sigmas"] = sigmas
    except InvalidRequest:
        notes.append(f"sigmas {schedule[:60]!r} are not to be had with {name or 'it'}; the model's own are used")


def _is_sampler(name: str) -> bool:
    try:
        find_sampler(name)
    except InvalidRequest:
        return False
    return True
