"""The trained parts become the embedded model: float16 safetensors and an OpenVINO variant linked to them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edge_sd.bundle import Artifact, Defaults, ModelBundle, Variant, record_file
from edge_sd.foreign import GRAPH, read_json

from ..build import build
from ..link import link
from ..recipes import RECIPES
from ..sources import Source
from .card import write_card
from .diffusion import SCHEDULE

NAME = "emoji"
LICENSE = "Apache-2.0 (weights; artwork: MIT, Apache-2.0, CC BY 4.0, see NOTICE)"
DEFAULTS = Defaults(128, 128, steps=20, guidance=4.0, sampler="ddim", max_side=512)


def publish(work: Path, target: Path) -> None:
    """Write the model trained in `work` to `target`, as a diffusers folder and as a bundle."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from . import text

    sharp = work / "vae_sharp"
    scheduler = DDIMScheduler(
        **SCHEDULE, clip_sample=False, timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True
    )
    parts: dict[str, Any] = {
        "vae": AutoencoderKL.from_pretrained(sharp if sharp.is_dir() else work / "vae"),
        "unet": UNet2DConditionModel.from_pretrained(work / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(work / "text_encoder"),
    }
    pipeline = StableDiffusionPipeline(
        **{name: module.half() for name, module in parts.items()},
        tokenizer=text.load_tokenizer(work), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    shutil.rmtree(target, ignore_errors=True)
    pipeline.save_pretrained(target, safe_serialization=True)
    for config in target.glob("*/config.json"):
        # The libraries write where a module was loaded from, which is nobody's business.
        values = read_json(config)
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(work / "tokenizer" / name, target / "tokenizer" / name)
    add_variant(target)
    write_card(work, target)


def add_variant(target: Path) -> None:
    """Convert the diffusers folder `target` to openvino-fp16, linked to its safetensors, and write the manifest."""
    name = "openvino-fp16"
    source = Source.open(target)
    with TemporaryDirectory() as scratch:
        made = build(target, Path(scratch) / "bundle", "openvino", RECIPES["fp16"], lambda what, share: print(what))
        artifacts: dict[str, Artifact] = {}
        for part, artifact in made.variant(name).artifacts.items():
            folder = target / name / part
            folder.mkdir(parents=True, exist_ok=True)
            safetensors, _ = source.weights(part)
            rest = folder / "openvino_model.constants"
            link(made.path(artifact.graph), made.path(artifact.weights[0]), safetensors, folder / GRAPH, rest)
            weights = tuple(path.relative_to(target).as_posix() for path in (safetensors, rest))
            artifacts[part] = replace(artifact, graph=f"{name}/{part}/{GRAPH}", weights=weights)
    shared = {f"tokenizer/{p.name}": record_file(p) for p in sorted((target / "tokenizer").iterdir())}
    used = {file for artifact in artifacts.values() for file in (artifact.graph, *artifact.weights)}
    variant = Variant(
        "openvino", "fp16", artifacts, {file: record_file(target / file) for file in sorted(used)}, source.fingerprint()
    )
    facts = replace(source.facts, name=NAME, license=LICENSE, defaults=DEFAULTS)
    ModelBundle(target, facts, {name: variant}, shared).write_manifest()
