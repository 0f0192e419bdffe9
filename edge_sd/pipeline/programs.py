"""The records of other programs as the fields of an Infotext, by where and in which form each keeps them.

InvokeAI         `invokeai_metadata`, before that `sd-metadata` and `Dream` (PNG)
NovelAI          `Comment` in JSON beside `Description` and `Software` (PNG)
Fooocus          `parameters` in JSON (PNG), UserComment in JSON (JPEG, WebP); old logs in `Comment`
Easy Diffusion   a PNG text a field, or JSON in UserComment
Draw Things      JSON in XMP's exif:UserComment
SwarmUI          JSON with `sui_image_params` in `parameters`, UserComment or EXIF Model
Mochi Diffusion  "Prompt: …; Negative: …; Generator: Mochi Diffusion" in XMP's description
ComfyUI          a graph in `prompt`, EXIF Model or UserComment (comfyui.py)
AUTOMATIC1111 and all that write its text (infotext.py)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..files import parse_json
from ..images.metadata import XMP, Texts
from .comfyui import read_comfyui
from .infotext import Infotext, is_infotext, parse_infotext

# Field -> the names that programs give it. What is under no name is kept under its own.
NAMES = {
    "Steps": ("steps", "num_inference_steps", "Steps"),
    "Sampler": ("sampler", "sampler_name", "comfyuisampler", "autowebuisampler", "Sampler", "Scheduler"),
    "Schedule type": ("scheduler", "noise_schedule", "comfyuischeduler"),
    "CFG scale": ("cfg_scale", "guidance_scale", "scale", "cfgscale", "Guidance Scale", "Guidance"),
    "Seed": ("seed", "Seed", "image_seed"),
    "Clip skip": ("clip_skip", "Clip Skip"),
    "Denoising strength": ("strength", "denoising_strength", "initimagecreativity", "prompt_strength"),
    "Variation seed": ("variationseed",),
    "Variation seed strength": ("variationseedstrength",),
    "Model": ("base_model", "use_stable_diffusion_model", "Stable Diffusion model", "model"),
    "Model hash": ("base_model_hash", "model_hash"),
}
WIDTHS, HEIGHTS = ("width", "Width", "image_width"), ("height", "Height", "image_height")
PROMPTS = ("prompt", "Prompt", "positive_prompt", "c")
NEGATIVES = ("negative_prompt", "Negative Prompt", "negativeprompt", "uc")
# diffusers' and k-diffusion's names as InvokeAI, NovelAI, Easy Diffusion and Draw Things write them.
SAMPLERS = {
    "k_euler": "euler", "k_euler_a": "euler_a", "k_euler_ancestral": "euler_a", "euler_ancestral": "euler_a",
    "k_lms": "lms", "k_heun": "heun", "k_dpmpp_2m": "dpmpp_2m", "k_dpmpp_sde": "dpmpp_sde", "plms": "pndm",
    "k_dpmpp_2m_sde": "dpmpp_2m_sde", "k_dpmpp_2s_ancestral": "dpmpp_2s_a", "ddim_v3": "ddim", "unipc_snr": "unipc",
    "dpmpp_2m_k": "dpmpp_2m karras", "euler_k": "euler karras", "dpmpp_2m_sde_k": "dpmpp_2m_sde karras",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde", "uni_pc": "unipc", "uni_pc_bh2": "unipc", "dpm++ 2m trailing": "dpmpp_2m",
    "dpmsolvermultistepscheduler": "dpmpp_2m", "dpm-solver++": "dpmpp_2m",
}  # fmt: skip


def read_program(found: Texts) -> Infotext | None:
    """The record in a picture's texts, whichever program's it is; None where there is none that is known."""
    texts = found.texts
    for read in (_invokeai, _novelai, _swarmui, _fooocus, _infotext, _easy_diffusion, _comfyui, _draw_things, _mochi):
        if (infotext := read(texts)) is not None and (infotext.prompt or infotext.fields):
            return infotext
    return None


def _infotext(texts: Mapping[str, str]) -> Infotext | None:
    for name in ("parameters", "UserComment", "postprocessing", "comment"):
        if is_infotext(text := texts.get(name, "")) and _json(text) is None:
            return parse_infotext(text)
    return None


def _invokeai(texts: Mapping[str, str]) -> Infotext | None:
    if document := _json(texts.get("invokeai_metadata")):
        model = document.get("model")
        named = dict(document)
        if isinstance(model, dict):
            named["model"] = model.get("model_name", model.get("name"))
        # Here `scheduler` is the sampler.
        named["sampler"] = named.pop("scheduler", None)
        for name in ("loras", "controlnets", "ipAdapters", "t2iAdapters"):
            if isinstance(named.get(name), list) and named[name]:
                named[name] = f"{len(named[name])} of them"
        return _named(named, "InvokeAI")
    if document := _json(texts.get("sd-metadata")):
        image = document.get("image")
        if not isinstance(image, dict):
            return None
        prompt = image.get("prompt")
        if isinstance(prompt, list):
            prompt = ", ".join(str(each.get("prompt", "")) for each in prompt if isinstance(each, dict))
        named = {**image, "prompt": prompt, "model": document.get("model_weights"),
                 "model_hash": document.get("model_hash")}  # fmt: skip
        return _bracketed(_named(named, "InvokeAI"))
    if dream := texts.get("Dream"):
        prompt, _, options = dream.removeprefix('"').rpartition('"')
        flags = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "sampler",
                 "f": "strength"}  # fmt: skip
        words = options.split()
        named = {
            flags.get(flag[1:], flag[1:]): value for flag, value in pairwise(words) if re.fullmatch(r"-[A-Za-z]+", flag)
        }
        return _bracketed(_named({"prompt": prompt, **named}, "InvokeAI"))
    return None


def _bracketed(infotext: Infotext) -> Infotext:
    """InvokeAI 2 kept the negative prompt in the prompt's square brackets."""
    negatives: list[str] = []

    def take(match: re.Match[str]) -> str:
        negatives.append(match[1].strip())
        return ""

    prompt = re.sub(r"\[([^\[\]]*)\]", take, infotext.prompt).strip()
    negative = ", ".join([*([infotext.negative] if infotext.negative else []), *negatives])
    return Infotext(prompt, negative, infotext.fields, infotext.program, infotext.notes)


def _novelai(texts: Mapping[str, str]) -> Infotext | None:
    if texts.get("Software") != "NovelAI" or not (document := _json(texts.get("Comment"))):
        return None
    named = {"prompt": texts.get("Description", ""), **document}
    # Both are written for text to image too, where they say nothing.
    if document.get("request_type", "PromptGenerateRequest") == "PromptGenerateRequest":
        named = {key: value for key, value in named.items() if key not in ("strength", "noise")}
    if source := texts.get("Source"):
        name, _, digest = source.rpartition(" ")
        named |= {"model": name, "model_hash": digest}
    infotext = _named(named, "NovelAI")
    notes = infotext.notes
    if set("{}[]") & set(infotext.prompt + infotext.negative):
        notes = (*notes, "NovelAI's {} and [] weigh by 1.05; here {} are words and [] weigh by 1.1")
    return Infotext(infotext.prompt, infotext.negative, infotext.fields, infotext.program, notes)


def _swarmui(texts: Mapping[str, str]) -> Infotext | None:
    for name in ("parameters", "UserComment", "Model"):
        text = texts.get(name, "")
        if "sui_image_params" in text and (document := _json(text)):
            given = document.get("sui_image_params")
            return _named(given, "SwarmUI") if isinstance(given, dict) else None
    return None


def _fooocus(texts: Mapping[str, str]) -> Infotext | None:
    for name in ("parameters", "UserComment", "Comment", "comment"):
        text = texts.get(name, "")
        if not text.lstrip().startswith("{") or not (document := _json(text)):
            continue
        if "base_model" not in document and "Fooocus V2 Expansion" not in document:
            continue
        named = dict(document)
        for key, own in (("prompt", "full_prompt"), ("negative_prompt", "full_negative_prompt")):
            # The styles' words are in the second; without the styles they are needed to draw the same.
            if isinstance(rows := named.pop(own, None), list) and rows:
                named[key] = ", ".join(str(row) for row in rows)
        resolution = re.findall(r"\d+", str(named.pop("resolution", "")))
        if len(resolution) == 2:
            named |= {"width": resolution[0], "height": resolution[1]}
        return _named(named, "Fooocus")
    return None


def _easy_diffusion(texts: Mapping[str, str]) -> Infotext | None:
    if "negative_prompt" in texts or "Negative Prompt" in texts:
        return _named(texts, "Easy Diffusion")
    document = _json(texts.get("UserComment"))
    if document and ("num_inference_steps" in document or "Negative Prompt" in document):
        return _named(document, "Easy Diffusion")
    return None


def _draw_things(texts: Mapping[str, str]) -> Infotext | None:
    for text in (texts.get("UserComment"), *_elements(texts.get(XMP, ""), "exif:UserComment")):
        document = _json(text)
        if document and "c" in document and "uc" in document:
            named = {key: value for key, value in document.items() if key not in ("v2", "profile")}
            size = re.findall(r"\d+", str(named.pop("size", "")))
            if len(size) == 2:
                named |= {"width": size[0], "height": size[1]}
            return _named(named, "Draw Things")
    return None


def _mochi(texts: Mapping[str, str]) -> Infotext | None:
    for text in (texts.get("ImageDescription", ""), *_elements(texts.get(XMP, ""), "dc:description")):
        if "Generator: Mochi Diffusion" not in text:
            continue
        pairs = (piece.partition(": ") for piece in text.split("; "))
        named = {name.strip(): value.strip() for name, colon, value in pairs if colon}
        given = {"prompt": named.pop("Prompt", named.pop("Include in Image", "")),
                 "negative_prompt": named.pop("Negative", named.pop("Exclude from Image", ""))}  # fmt: skip
        return _named({**given, **named}, "Mochi Diffusion")
    return None


def _comfyui(texts: Mapping[str, str]) -> Infotext | None:
    for name in ("prompt", "Model", "Make", "UserComment"):
        text = texts.get(name, "").strip()
        if text.removeprefix("prompt:").lstrip().startswith("{"):
            text = text.removeprefix("prompt:")
            if (found := read_comfyui(text)) is not None:
                return found
            # Nodes that write EXIF keep prompt and workflow in one.
            if isinstance(inner := (_json(text) or {}).get("prompt"), (dict, str)):
                return read_comfyui(inner if isinstance(inner, str) else json.dumps(inner))
    return None


def _elements(xml: str, name: str) -> list[str]:
    """The text inside the XMP elements called `name`, without a parser of XML, whose entities could be anything."""
    from html import unescape

    found: list[str] = []
    start = xml.find(f"<{name}")
    while start >= 0 and len(found) < 8:
        end = xml.find(f"</{name}>", start)
        if end < 0:
            break
        found.append(unescape(re.sub(r"<[^<>]*>", "", xml[start:end])).strip())
        start = xml.find(f"<{name}", end)
    return found


def _json(text: str | None) -> dict[str, Any] | None:
    if not text or not text.lstrip().startswith("{"):
        return None
    try:
        document = parse_json(text)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _named(record: Mapping[str, Any], program: str) -> Infotext:
    """A flat record as an Infotext: known names become the fields, the others keep theirs."""
    # Records hold fields that were not used, too.
    left = {str(key): value for key, value in record.items() if value or (value == 0 and value is not False)}

    def pop(names: tuple[str, ...]) -> str:
        for name in names:
            if isinstance(value := left.get(name), (str, int, float)) and value != "":
                return str(left.pop(name))
        return ""

    prompt, negative = pop(PROMPTS), pop(NEGATIVES)
    fields = {}
    for name, theirs in NAMES.items():
        if value := pop(theirs):
            fields[name] = value
    width, height = pop(WIDTHS), pop(HEIGHTS)
    if width and height:
        fields["Size"] = f"{width}x{height}"
    if sampler := fields.get("Sampler"):
        fields["Sampler"] = SAMPLERS.get(sampler.lower(), sampler)
    if "Model" in fields:
        # A path says where a stranger keeps files, its last part which.
        fields["Model"] = fields["Model"].replace("\\", "/").rpartition("/")[2]
    for key, value in left.items():
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            fields.setdefault(key, str(value))
        else:
            fields.setdefault(key, json.dumps(value)[:200])
    return Infotext(prompt.strip(), negative.strip(), fields, program)
