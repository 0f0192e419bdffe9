"""What Apple's Swift package `CoreAIDiffusionPipeline` reads beside the assets: metadata.json and the tokenizers.

Its loader takes a description that it can't follow for one of its own: it draws every schedule as "scaled_linear", and
squares of four latent channels. Where its picture would be another one without a word, the block "diffusion" is left
out, without which it refuses the folder; all other limits end in its own errors. Both are named in "user_data".
"""

from __future__ import annotations

import datetime
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edge_sd.bundle.facts import Facts
from edge_sd.text.tokenizer import read_vocabulary

from ..sources.source import Source

VERSION, KIND = "0.2", "diffusion"
TYPES = {"sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
# A part -> the name of its asset, as the loader maps them; it looks at no other.
ASSETS = {
    "text_encoder": "TextEncoder", "text_encoder_2": "TextEncoder2", "unet": "Unet",
    "vae_decoder": "VAEDecoder", "vae_encoder": "VAEEncoder",
}  # fmt: skip
PREDICTIONS = ("epsilon", "v_prediction")
# What the Swift pipeline takes for granted: tokens of text, latent channels, pixels for each latent, rows of the UNet.
TOKENS, CHANNELS, FACTOR, BATCH = 77, 4, 8, 2


def write_bundle(source: Source, staging: Path, size: tuple[int, int], batch: int, name: str) -> None:
    """Write metadata.json and the folders of the tokenizers for the assets in `staging`."""
    facts = source.facts
    for text in facts.encoders:
        folder = staging / text.tokenizer
        folder.mkdir(exist_ok=True)
        vocabulary, merges = read_vocabulary(source.folder / text.tokenizer)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    document = metadata(facts, {path.stem for path in staging.glob("*.aimodel")}, size, batch, name)
    (staging / "metadata.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def metadata(facts: Facts, assets: set[str], size: tuple[int, int], batch: int, name: str) -> dict[str, Any]:
    """metadata.json for assets of these names."""
    wrong = misdrawn(facts)
    told = {
        "made_by": f"edge-sd, coreai-core {version('coreai-core')}",
        "limits": "; ".join(limits(facts, size, batch)),
        "no_diffusion_block": wrong,
    }
    document: dict[str, Any] = {
        "metadata_version": VERSION,
        "kind": KIND,
        "name": f"{facts.name}-{name}",
        "assets": {part: f"{asset}.aimodel" for part, asset in ASSETS.items() if asset in assets},
    }
    if not wrong:
        document["diffusion"] = diffusion(facts, size)
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
    return {
        "type": TYPES[facts.family],
        "prediction_type": schedule.prediction_type,
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


def misdrawn(facts: Facts) -> str:
    """Why Apple's pipeline would draw another picture without an error; "" where it would not."""
    schedule = facts.schedule
    if schedule.beta_schedule != "scaled_linear" or schedule.trained_betas is not None:
        return f"its betas are {schedule.beta_schedule}, which Apple's pipeline takes for scaled_linear"
    if schedule.rescale_betas_zero_snr:
        return "its betas are rescaled to zero terminal SNR, which Apple's pipeline does not know"
    return ""


def limits(facts: Facts, size: tuple[int, int], batch: int) -> list[str]:
    """Limits of Apple's pipeline that end in an error of its own."""
    width, height = size
    found = {
        f"{facts.max_tokens} tokens of text, not {TOKENS}": facts.max_tokens != TOKENS,
        f"{facts.latents.channels} latent channels, not {CHANNELS}": facts.latents.channels != CHANNELS,
        f"{facts.latents.factor} pixels for a latent, not {FACTOR}": facts.latents.factor != FACTOR,
        f"a UNet of {batch} row, not {BATCH}": batch != BATCH,
        f"pictures of {width}x{height}, which are no squares": width != height,
        "SDXL, which has a name there and no pipeline": facts.family == "sdxl",
        "an inpainting UNet": facts.inpainting,
        "a UNet that edits a picture": facts.instructed,
        "a UNet that takes the guidance scale": bool(facts.guidance_width),
        f"prediction of {facts.schedule.prediction_type}": facts.schedule.prediction_type not in PREDICTIONS,
    }
    return [what for what, there in found.items() if there]
