"""Records of other programs in pictures: texts in the forms that they publish, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edge_sd.backends.fake import fake_bundle
from edge_sd.pipeline.infotext import parse_fields
from edge_sd.pipeline.recorded import Recorded, read_recorded
from edge_sd.pipeline.settings import Settings

from .test_canvas import picture
from .test_recorded import write


def png(path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for name, text in texts.items():
        (chunks.add_text if text.isascii() else chunks.add_itxt)(
            name.replace("_", " ") if name == "Negative_Prompt" else name, text
        )
    Image.new("RGB", (64, 64)).save(path, pnginfo=chunks)
    return path


def exif(path: Path, fields: dict[int, Any]) -> Path:
    made = Image.Exif()
    for tag, value in fields.items():
        made[tag] = value
    Image.new("RGB", (64, 64)).save(path, exif=made)
    return path


def read(tmp_path: Path, **texts: str) -> Recorded:
    return read_recorded(png(tmp_path / "x.png", **texts))


def told(recorded: Recorded, **given: Any) -> str:
    return "\n".join(recorded.notes(given))


# AUTOMATIC1111's text and what is like it: text -> settings, and words of the notes.
A1111 = [
    (
        "a cat\nNegative prompt: dogs\nSteps: 20.0, Sampler: Euler a, CFG Scale: 7.5, Seed: 5, Size: 512x768",
        {
            "steps": 20,
            "sampler": "Euler a",
            "guidance": 7.5,
            "seed": 5,
            "width": 512,
            "height": 768,
            "negative": "dogs",
        },
        "",
    ),
    (
        "a cat\nNegative prompt: \nTemplate: a {cat|dog}\nSteps: 25, Size: 512x512, CFG scale: 8, App: SD.Next",
        {"prompt": "a cat", "negative": "", "steps": 25},
        "",
    ),
    (
        "a cat\nNegative prompt: blurry\nSteps: 3, Seed: 5, Size: 64x64\nTemplate: {cat}\nNegative Template: {a|b}",
        {"prompt": "a cat", "negative": "blurry", "seed": 5, "steps": 3},
        "",
    ),
    ("\ufeffa cat\nSteps: 3, Seed: 5, Size: 64x64", {"prompt": "a cat", "steps": 3}, ""),
    (
        "a cat\nSteps: 3, Seed: 1084614416978598, Size: 64x64",
        {"seed": 1084614416978598 & 0xFFFFFFFF},
        "more than 32 bits",
    ),
    ("a cat\nSteps: 3, Seed: -1, Size: 64x64", {"steps": 3}, "random"),
    (
        "a cat\nSteps: 3, Seed: 5, Variation seed: 9, Variation seed strength: 0.25",
        {"variation_seed": 9, "variation_strength": 0.25},
        "",
    ),
    (
        "a cat\nSteps: 3, Sampler: DPM++ 2M, Schedule type: Karras, Seed: 1",
        {"sampler": "DPM++ 2M", "sigmas": "karras"},
        "",
    ),
    ("a cat\nSteps: 3, Sampler: Euler, Schedule type: Automatic, Seed: 1", {"sigmas": "automatic"}, ""),
    ("a cat\nSteps: 3, Sampler: DPM++ 2M, Sampler sigma: exponential, App: SD.Next", {"sigmas": "exponential"}, ""),
    ("a cat\nSteps: 3, Sampler: euler_a discrete, Version: stable-diffusion.cpp", {"sampler": "euler_a"}, ""),
    ("a cat\nSteps: 3, Sampler: dpm++2m karras, Version: stable-diffusion.cpp", {"sampler": "dpm++2m karras"}, ""),
    ("a cat\nSteps: 3, Sampler: Default", {"steps": 3}, ""),
    ("a cat\nSteps: 3, Sampler: Warp 9", {"steps": 3}, "no sampler is called 'Warp 9'"),
    ("a cat\nSteps: 3, Sampler: Euler, Schedule type: Align Upside Down", {"sampler": "Euler"}, "Align Upside Down"),
    (
        "a cat\nSteps: 3, Scheduler: EulerAncestralDiscreteScheduler, App: SD.Next",
        {"sampler": "EulerAncestralDiscreteScheduler"},
        "",
    ),
    ("a cat\nSteps: 3, Noise Schedule: Zero Terminal SNR", {"zero_snr": True}, ""),
    (
        "a cat\nSteps: 3, Hires upscale: 2, Hires upscaler: Latent, Denoising strength: 0.5",
        {"steps": 3},
        "Hires upscale: 2",
    ),
    ("a cat\nSteps: 3, Denoising strength: 0.6", {"steps": 3}, "Denoising strength 0.6: an image"),
    ("a cat\nSteps: 3, Face restoration: CodeFormer, RNG: NV", {"steps": 3}, "CodeFormer"),
    ("a cat\nSteps: 3, Eta: inf, Guidance: 3.5, Seed: 1", {"seed": 1}, ""),
    ("Steps: 3, Sampler: Euler\nSteps: 4, Seed: 7", {"prompt": "Steps: 3, Sampler: Euler", "steps": 4}, ""),
]


@pytest.mark.parametrize(("text", "settings", "note"), A1111)
def test_fields_are_taken_over_or_named(tmp_path: Path, text: str, settings: dict[str, Any], note: str) -> None:
    recorded = read_recorded(write(tmp_path / "x.jpg", text))
    assert {name: recorded.settings.get(name) for name in settings} == settings
    if note:
        assert note in told(recorded)
    else:
        assert not told(recorded)
    if recorded.settings["prompt"]:
        Settings.of(recorded.request(), fake_bundle().defaults, 0)


def test_values_with_commas_quotes_and_json_are_read_whole() -> None:
    line = 'Steps: 3, ADetailer prompt: "a, \\"b\\": c", SDCPP: {"a": [1, 2], "b": "x, Seed: 5"}, Styles: p, q, Seed: 7'
    assert parse_fields(line) == {
        "Steps": "3",
        "ADetailer prompt": 'a, "b": c',
        "SDCPP": '{"a": [1, 2], "b": "x, Seed: 5"}',
        "Styles": "p, q",
        "Seed": "7",
    }


def test_what_needs_a_picture_takes_part_once_one_is_given(tmp_path: Path) -> None:
    text = "a cat\nSteps: 3, Denoising strength: 0.6, Mask blur: 4, Inpaint area: Only masked, Masked area padding: 32"
    recorded = read_recorded(write(tmp_path / "x.png", text))
    request = recorded.request(image=picture())
    assert (request.strength, request.mask_blur) == (0.6, None)
    assert "Mask blur" in told(recorded, image=picture())
    assert "Denoising" not in told(recorded, image=picture())
    request = recorded.request(image=picture(), mask=picture())
    assert (request.strength, request.mask_blur, request.mask_padding) == (0.6, 4, 32)


COMFY: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 7,
            "steps": 12,
            "cfg": 6.5,
            "sampler_name": "dpmpp_2m",
            "scheduler": "karras",
            "denoise": 1.0,
            "model": ["9", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (cat:1.2) [here]", "clip": ["9", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "dogs", "clip": ["9", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {
        "class_type": "LoraLoader",
        "inputs": {
            "lora_name": "sub/style.safetensors",
            "strength_model": 0.8,
            "strength_clip": 1.0,
            "model": ["4", 0],
            "clip": ["10", 0],
        },
    },
    "10": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["4", 1]}},
    "11": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
}


def test_comfyui_is_followed_from_the_saved_picture_to_prompts_size_loras_and_clip_skip(tmp_path: Path) -> None:
    recorded = read(tmp_path, prompt=json.dumps(COMFY), workflow="{}")
    assert recorded.settings == {
        "prompt": r"a (cat:1.2) \[here\] <lora:style:1.0:0.8>",
        "negative": "dogs",
        "steps": 12,
        "seed": 7,
        "guidance": 6.5,
        "sampler": "dpmpp_2m",
        "sigmas": "karras",
        "width": 512,
        "height": 768,
        "clip_skip": 2,
    }
    assert (recorded.program, recorded.model) == ("ComfyUI", "v1-5.safetensors")
    assert not told(recorded)


def test_comfyui_custom_sampling_links_and_foreign_nodes(tmp_path: Path) -> None:
    graph: dict[str, Any] = {
        "1": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["2", 0],
                "guider": ["3", 0],
                "sampler": ["4", 0],
                "sigmas": ["5", 0],
                "latent_image": ["6", 0],
            },
        },
        "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": ["12", 0]}},
        "3": {
            "class_type": "CFGGuider",
            "inputs": {"cfg": 4, "model": ["7", 0], "positive": ["8", 0], "negative": ["9", 0]},
        },
        "4": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler_ancestral"}},
        "5": {
            "class_type": "BasicScheduler",
            "inputs": {"scheduler": "normal", "steps": 9, "denoise": 1, "model": ["7", 0]},
        },
        "6": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64}},
        "7": {"class_type": "UNETLoader", "inputs": {"unet_name": "u.safetensors"}},
        "8": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["10", 0], "image": ["13", 0]}},
        "9": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["7", 1]}},
        "10": {"class_type": "CLIPTextEncode", "inputs": {"text": ["11", 0], "clip": ["7", 1]}},
        "11": {"class_type": "PrimitiveString", "inputs": {"value": "a bee"}},
        "12": {"class_type": "PrimitiveInt", "inputs": {"value": 11}},
        "13": {"class_type": "LoadImage", "inputs": {"image": "x.png"}},
    }
    recorded = read(tmp_path, prompt=json.dumps(graph))
    assert {name: recorded.settings.get(name) for name in ("prompt", "seed", "steps", "guidance", "sampler")} == {
        "prompt": "a bee",
        "seed": 11,
        "steps": 9,
        "guidance": 4,
        "sampler": "euler_a",
    }
    assert "ControlNetApply" in told(recorded)


def invoke(**more: Any) -> str:
    return json.dumps(
        {
            "positive_prompt": "a hut",
            "negative_prompt": "snow",
            "width": 512,
            "height": 640,
            "seed": 3,
            "cfg_scale": 8.0,
            "steps": 35,
            "scheduler": "euler_a",
            "rand_device": "cpu",
            "model": {"model_name": "hut-xl"},
            **more,
        }
    )


WANTED = {"prompt": "a hut", "negative": "snow", "width": 512, "height": 640, "seed": 3, "steps": 35, "guidance": 8.0}
FLAT: dict[str, Any] = {"seed": 3, "steps": 35, "width": 512, "height": 640}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description><exif:UserComment><rdf:Alt>'
    '<rdf:li xml:lang="x-default">'
    "{}</rdf:li></rdf:Alt></exif:UserComment><dc:description><rdf:Alt><rdf:li>{}</rdf:li></rdf:Alt></dc:description>"
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
)
DRAW_THINGS = json.dumps(
    {
        "c": "a hut",
        "uc": "snow",
        "seed": 3,
        "steps": 35,
        "scale": 8,
        "size": "512x640",
        "sampler": "Euler A",
        "model": "hut.ckpt",
        "v2": {"x": 1},
    }
).replace('"', "&quot;")
MOCHI = (
    "Prompt: a hut; Negative: snow; Model: hut; Scheduler: DPM-Solver++; Seed: 3; Steps: 35; Guidance: 8.0; "
    "Size: 512x640; Generator: Mochi Diffusion 5"
)
PROGRAMS: dict[str, Callable[[Path], Path]] = {
    "InvokeAI": lambda p: png(p / "x.png", invokeai_metadata=invoke()),
    "InvokeAI 2": lambda p: png(
        p / "x.png",
        **{
            "sd-metadata": json.dumps(
                {
                    "model_weights": "hut",
                    "model_hash": "12",
                    "image": {
                        "prompt": [{"prompt": "a hut [snow]", "weight": 1}],
                        "sampler": "k_euler_a",
                        "cfg_scale": 8,
                        **FLAT,
                    },
                }
            )
        },
    ),
    "InvokeAI 1": lambda p: png(p / "x.png", Dream='"a hut [snow]" -s 35 -S 3 -W 512 -H 640 -C 8.0 -A k_euler_a'),
    "NovelAI": lambda p: png(
        p / "x.png",
        Software="NovelAI",
        Source="Stable Diffusion F1022D28",
        Description="a hut",
        Comment=json.dumps(
            {**FLAT, "uc": "snow", "scale": 8.0, "sampler": "k_euler_ancestral", "strength": 0.4, "noise": 0.0}
        ),
    ),
    "Fooocus": lambda p: png(
        p / "x.png",
        fooocus_scheme="fooocus",
        parameters=json.dumps(
            {
                "base_model": "hut",
                "base_model_hash": "12",
                "prompt": "a hut",
                "negative_prompt": "snow",
                "seed": "3",
                "steps": 35,
                "guidance_scale": 8.0,
                "sampler": "euler_ancestral",
                "scheduler": "karras",
                "resolution": "(512, 640)",
            }
        ),
    ),
    "Fooocus in JPEG": lambda p: exif(
        p / "x.jpg",
        {
            0x9286: json.dumps(
                {
                    "base_model": "hut",
                    "full_prompt": ["a hut"],
                    "full_negative_prompt": ["snow"],
                    "seed": "3",
                    "steps": 35,
                    "guidance_scale": 8.0,
                    "sampler": "euler",
                    "resolution": "(512, 640)",
                }
            ).encode()
        },
    ),
    "Easy Diffusion": lambda p: png(
        p / "x.png",
        prompt="a hut",
        negative_prompt="snow",
        seed="3",
        width="512",
        height="640",
        num_inference_steps="35",
        guidance_scale="8.0",
        sampler_name="euler_a",
        use_stable_diffusion_model="/home/someone/models/hut.ckpt",
    ),
    "Easy Diffusion in words": lambda p: write(
        p / "x.jpg",
        json.dumps(
            {
                "Prompt": "a hut",
                "Negative Prompt": "snow",
                "Seed": 3,
                "Width": 512,
                "Height": 640,
                "Steps": 35,
                "Guidance Scale": 8.0,
                "Sampler": "euler",
                "num_inference_steps": 35,
            }
        ),
    ),
    "Draw Things": lambda p: png(p / "x.png", **{"XML:com.adobe.xmp": XMP.format(DRAW_THINGS, "")}),
    "SwarmUI": lambda p: png(
        p / "x.png",
        parameters=json.dumps(
            {
                "sui_image_params": {
                    "prompt": "a hut",
                    "negativeprompt": "snow",
                    "cfgscale": 8.0,
                    "comfyuisampler": "euler",
                    "model": "hut",
                    **FLAT,
                }
            }
        ),
    ),
    "SwarmUI in EXIF": lambda p: exif(
        p / "x.jpg",
        {
            0x0110: json.dumps(
                {
                    "sui_image_params": {
                        "prompt": "a hut",
                        "negativeprompt": "snow",
                        "cfgscale": 8.0,
                        "model": "hut",
                        **FLAT,
                    }
                }
            )
        },
    ),
    "Mochi Diffusion": lambda p: png(p / "x.png", **{"XML:com.adobe.xmp": XMP.format("", MOCHI)}),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_read(tmp_path: Path, program: str) -> None:
    recorded = read_recorded(PROGRAMS[program](tmp_path))
    assert {name: recorded.settings.get(name) for name in WANTED} == WANTED
    assert program.startswith(recorded.program)
    assert "/" not in recorded.model
    Settings.of(recorded.request(), fake_bundle().defaults, 0)


def test_what_programs_record_beyond_a_request_is_named(tmp_path: Path) -> None:
    recorded = read(tmp_path, invokeai_metadata=invoke(controlnets=[{"a": 1}], cfg_rescale_multiplier=0.7))
    assert "controlnets: 1 of them" in told(recorded)
    assert "cfg_rescale_multiplier: 0.7" in told(recorded)
