"""The two texts inside a picture's file: AUTOMATIC1111's, and our JSON, the exact request."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from .._version import __version__
from ..sampling.samplers import SAMPLERS

if TYPE_CHECKING:
    from .settings import Settings


def parameters_text(settings: Settings, model: str, model_hash: str) -> str:
    """AUTOMATIC1111's text; values hold no ":" or ",", which its readers stumble over."""
    loras = ((name, [text] if text == unet else [text, unet]) for name, (text, unet, _) in settings.loras.items())
    tags = (f" <lora:{name}:{':'.join(f'{weight:g}' for weight in weights)}>" for name, weights in loras)
    lines = [settings.prompt + "".join(tags)]
    if settings.negative:
        lines.append(f"Negative prompt: {settings.negative}")
    sampler = SAMPLERS[settings.sampler].title
    if settings.sigmas is not None:
        sampler += f" {settings.sigmas.replace('_', ' ').title().replace('Sgm', 'SGM')}"
    values = {
        "Steps": settings.steps,
        "Sampler": sampler,
        "CFG scale": f"{settings.guidance:g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        **({} if settings.clip_skip == 1 else {"Clip skip": settings.clip_skip}),
        **({"Safety checker": "off"} if settings.safety is False else {}),
        **({} if settings.eta is None else {"Eta": f"{settings.eta:g}"}),
        **({"Sigma churn": f"{settings.s_churn:g}"} if settings.s_churn else {}),
        **({} if settings.s_noise == 1 else {"Sigma noise": f"{settings.s_noise:g}"}),
        **({} if settings.strength is None else {"Denoising strength": f"{settings.strength:g}"}),
        **({} if settings.image_guidance is None else {"Image CFG scale": f"{settings.image_guidance:g}"}),
        **({} if settings.mask_blur is None else {"Mask blur": f"{settings.mask_blur:g}"}),
        "Model hash": model_hash,
        "Model": re.sub(r"[:,\s]+", " ", model),
    }
    lines.append(", ".join(f"{key}: {value}" for key, value in values.items()))
    return "\n".join(lines)


def request_json(settings: Settings, about: Mapping[str, str]) -> str:
    """Everything that makes the picture again, ASCII only; `about`: model, model_hash, variant, device."""
    return json.dumps({"version": __version__, "request": asdict(settings), **about})
