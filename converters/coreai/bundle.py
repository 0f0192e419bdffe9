"""What Apple's Swift package `CoreAIDiffusionPipeline` reads beside the assets: metadata.json, tokenizers, statistics.

Its loader takes a description that it can't follow for one of its own: it draws every schedule of UNets as
"scaled_linear", levels of SD 3 with a shift of 3, FLUX.2 without guidance, and squares of a fixed number of latent
channels. Where its picture would be another one without a word, the block "diffusion" is left out, without which it
refuses the folder; all other limits end in its own errors. Both are named in "user_data".
"""

from __future__ import annotations

import datetime
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edge_sd.bundle.facts import Facts
from edge_sd.bundle.transformers import statistics
from edge_sd.files import read_json
from edge_sd.text.tokenizer import read_vocabulary

from ..sources.source import Source

VERSION, KIND = "0.2", "diffusion"
TYPES = {
    "sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl", "sd3": "stable-diffusion-3",
    "flux2": "flux2",
}  # fmt: skip
# A part -> the name of its asset, as the loader maps them; it looks at no other.
ASSETS = {
    "text_encoder": ("TextEncoder",), "text_encoder_2": ("TextEncoder2",), "unet": ("Unet",),
    "transformer": ("MMDiT", "Transformer"), "vae_decoder": ("VAEDecoder",), "vae_encoder": ("VAEEncoder",),
}  # fmt: skip
PREDICTIONS = ("epsilon", "v_prediction")
# What the Swift pipelines take for granted: tokens of text, latent channels, pixels for each latent, rows of the
# denoiser.
TOKENS, CHANNELS, FACTOR, BATCH = 77, 4, 8, 2
# Those of SD 3: channels, the widths of both CLIPs, of the text and of the pooled text, the shift of its levels.
SD3_CHANNELS, SD3_CLIPS, SD3_WIDTH, SD3_POOLED, SD3_SHIFT = 16, (768, 1280), 4096, 2048, 3.0
# Those of FLUX.2: tokens, channels, pixels for each latent.
FLUX2_TOKENS, FLUX2_CHANNELS, FLUX2_FACTOR = 512, 128, 16
TRAINING_STEPS = 1000


def write_bundle(source: Source, staging: Path, size: tuple[int, int], batch: int, name: str) -> None:
    """Write metadata.json, the folders of the tokenizers and FLUX.2's statistics for the assets in `staging`."""
    facts, told = source.facts, True
    for text in facts.encoders:
        folder, place = staging / text.tokenizer, source.folder / text.tokenizer
        if text.kind == "clip":
            folder.mkdir(exist_ok=True)
            vocabulary, merges = read_vocabulary(place)
            lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
            (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
            (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
        elif facts.family == "flux2":
            shutil.copytree(place, folder, dirs_exist_ok=True)
            told = _renamed(folder)
    made = {path.stem for path in staging.glob("*.aimodel")}
    document = metadata(facts, made, size, batch, name, rope(source), told)
    (staging / "metadata.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    if facts.family == "flux2":
        mean, variance = statistics(source.folder, source.config("vae_decoder"))
        np.save(staging / "vae_bn_mean.npy", mean.astype("<f4"))
        np.save(staging / "vae_bn_var.npy", variance.astype("<f4"))


def _renamed(folder: Path) -> bool:
    """Name a tokenizer's class as swift-transformers knows it, as Apple's exporter does; whether it has a template."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if str(config.get("tokenizer_class", "")).startswith("Qwen2"):
        config["tokenizer_class"] = "GPT2Tokenizer"
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")
    return "chat_template" in config or any(folder.glob("chat_template.*"))


def rope(source: Source) -> dict[str, Any]:
    """What FLUX.2's pipeline makes tables of places with, and its statistics; {} for others."""
    if source.facts.family != "flux2":
        return {}
    config = source.config("transformer")
    return {
        "batch_norm_eps": float(source.config("vae_decoder").get("batch_norm_eps", 1e-4)),
        "guidance_embeds": bool(config.get("guidance_embeds", False)),
        "rope_axes_dims": [int(each) for each in config["axes_dims_rope"]],
        "rope_theta": float(config.get("rope_theta", 2000.0)),
    }


def metadata(
    facts: Facts,
    assets: set[str],
    size: tuple[int, int],
    batch: int,
    name: str,
    more: dict[str, Any] | None = None,
    template: bool = True,
) -> dict[str, Any]:
    """metadata.json for assets of these names; `more` is what `rope` says, `template` whether a chat has one."""
    wrong = misdrawn(facts, size, batch, template)
    told = {
        "made_by": f"edge-sd, coreai-core {version('coreai-core')}",
        "limits": "; ".join(limits(facts, size, batch)),
        "no_diffusion_block": wrong,
    }
    document: dict[str, Any] = {
        "metadata_version": VERSION,
        "kind": KIND,
        "name": f"{facts.name}-{name}",
        "assets": {part: f"{asset}.aimodel" for part, names in ASSETS.items() for asset in names if asset in assets},
    }
    if not wrong:
        document["diffusion"] = diffusion(facts, size) | (more or {})
    return {
        **document,
        "source": {"model_definition": "torch", "hf_model_id": facts.name},
        "compression": None,
        "compilation": {"date": datetime.datetime.now().astimezone().isoformat(), "targets": []},
        "user_data": {key: value for key, value in told.items() if value},
    }


def diffusion(facts: Facts, size: tuple[int, int]) -> dict[str, Any]:
    """The block that becomes a PipelineDescriptor."""
    space, schedule, defaults = facts.latents, facts.schedule, facts.defaults
    flow = {"sd3": "flow", "flux2": "flow_matching"}
    return {
        "type": TYPES[facts.family],
        "prediction_type": flow.get(facts.family, schedule.prediction_type),
        "encoder_scale_factor": space.scale,
        "decoder_scale_factor": space.scale,
        "decoder_shift_factor": space.shift,
        "image_size": size[1],
        "default_guidance_scale": defaults.guidance,
        "default_steps": defaults.steps,
        "scheduler": {
            "training_steps": schedule.num_train_timesteps,
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "beta_schedule": schedule.beta_schedule,
        },
    }


def misdrawn(facts: Facts, size: tuple[int, int], batch: int, template: bool) -> str:
    """Why Apple's pipeline would draw another picture, or read beyond its arrays, without an error; "" where not."""
    schedule, steps = facts.schedule, facts.schedule.num_train_timesteps
    if facts.denoiser == "transformer" and steps != TRAINING_STEPS:
        return f"it was trained with {steps} timesteps, not {TRAINING_STEPS}"
    if facts.family == "sd3":
        if schedule.flow_mu is None and schedule.flow_shift == SD3_SHIFT:
            return ""
        shift = "the picture's size" if schedule.flow_mu is not None else f"{schedule.flow_shift:g}"
        return f"its levels are shifted by {shift}, which Apple's pipeline takes for {SD3_SHIFT:g}"
    if facts.family == "flux2":
        # It copies arrays of these sizes over inputs of whatever size, without a check.
        found = {
            f"{facts.latents.channels} latent channels, not {FLUX2_CHANNELS}": facts.latents.channels != FLUX2_CHANNELS,
            f"{facts.max_tokens} tokens of text, not {FLUX2_TOKENS}": facts.max_tokens != FLUX2_TOKENS,
            f"{facts.latents.factor} pixels for a latent": facts.latents.factor != FLUX2_FACTOR,
            f"pictures of {size[0]}x{size[1]}, which are no squares": size[0] != size[1],
            f"a transformer of {batch} rows, not 1": batch != 1,
            "a negative prompt, of which Apple's pipeline knows nothing": facts.defaults.guidance != 1,
            "a tokenizer without the template of a chat": not template,
        }
        return next((f"it has {what}" for what, there in found.items() if there), "")
    if schedule.beta_schedule != "scaled_linear" or schedule.trained_betas is not None:
        return f"its betas are {schedule.beta_schedule}, which Apple's pipeline takes for scaled_linear"
    if schedule.rescale_betas_zero_snr:
        return "its betas are rescaled to zero terminal SNR, which Apple's pipeline does not know"
    return ""


def limits(facts: Facts, size: tuple[int, int], batch: int) -> list[str]:
    """Limits of Apple's pipeline that end in an error of its own."""
    if facts.family == "flux2":
        return []
    width, height = size
    channels = SD3_CHANNELS if facts.family == "sd3" else CHANNELS
    found = {
        f"{facts.max_tokens} tokens of text, not {TOKENS}": facts.max_tokens != TOKENS,
        f"{facts.latents.channels} latent channels, not {channels}": facts.latents.channels != channels,
        f"{facts.latents.factor} pixels for a latent, not {FACTOR}": facts.latents.factor != FACTOR,
        f"a {_called(facts)} of {batch} row, not {BATCH}": batch != BATCH,
        f"pictures of {width}x{height}, which are no squares": width != height,
        "SDXL, which has a name there and no pipeline": facts.family == "sdxl",
        "an inpainting UNet": facts.inpainting,
        "a UNet that edits a picture": facts.instructed,
        "a UNet that takes the guidance scale": bool(facts.guidance_width),
    }
    if facts.family == "sd3":
        clips = tuple(text.width for text in facts.encoders if text.kind == "clip")
        found |= {
            f"text encoders of {' and '.join(map(str, clips))} numbers, not 768 and 1280": clips != SD3_CLIPS,
            f"text of {facts.text_width} numbers, not {SD3_WIDTH}": facts.text_width != SD3_WIDTH,
            f"pooled text of {facts.pooled_width} numbers, not {SD3_POOLED}": facts.pooled_width != SD3_POOLED,
        }
    else:
        kind = facts.schedule.prediction_type
        found[f"prediction of {kind}"] = kind not in PREDICTIONS
    return [what for what, there in found.items() if there]


def _called(facts: Facts) -> str:
    return "UNet" if facts.denoiser == "unet" else facts.denoiser
