"""The trained parts become the embedded model: float16 safetensors and OpenVINO variants linked to them.

text_encoder/ unet/ vae/ scheduler/ tokenizer/ model_index.json    a Stable Diffusion model as diffusers loads it
controlnet/ vae_tiny/ lcm/                                         what diffusers loads beside it, where trained
evaluator/                                                         the judge (evaluator.py)
openvino-fp16/, openvino-fp16-lcm                                  graphs whose weights are the files above
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edge_sd.bundle import REFERENCE, Artifact, Defaults, ModelBundle, Variant, record_file
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
MANY_STEPS, FEW_STEPS = "openvino-fp16", "openvino-fp16-lcm"
FEW_DEFAULTS = replace(DEFAULTS, steps=4, guidance=1.0, sampler="lcm")
LORA = "lcm/pytorch_lora_weights.safetensors"
# No file of a repository should be larger than 25 MB.
SHARD = "15MB"


def publish(work: Path, target: Path) -> None:
    """Write the model trained in `work` to `target`, as a diffusers folder and as a bundle."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from . import autoencoder, text

    scheduler = DDIMScheduler(
        **SCHEDULE, clip_sample=False, timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True
    )
    parts: dict[str, Any] = {
        "vae": autoencoder.load_final(work),
        "unet": UNet2DConditionModel.from_pretrained(work / "unet"),
        "text_encoder": text.load_final(work),
    }
    pipeline = StableDiffusionPipeline(
        **{name: module.half() for name, module in parts.items()},
        tokenizer=text.load_tokenizer(work), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    shutil.rmtree(target, ignore_errors=True)
    pipeline.save_pretrained(target, safe_serialization=True)
    (target / "unet/diffusion_pytorch_model.safetensors").unlink()
    parts["unet"].save_pretrained(target / "unet", max_shard_size=SHARD)
    _save_companions(work, target)
    for config in target.glob("*/config.json"):
        # The libraries write where a module was loaded from, which is nobody's business.
        values = read_json(config)
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(work / "tokenizer" / name, target / "tokenizer" / name)
    add_variants(target)
    write_card(work, target)


def _save_companions(work: Path, target: Path) -> None:
    """What is trained beside the model, as far as it is there."""
    from diffusers import AutoencoderTiny, ControlNetModel

    for name, kind in (("controlnet", ControlNetModel), ("vae_tiny", AutoencoderTiny)):
        if (work / name / "config.json").is_file():
            kind.from_pretrained(work / name).half().save_pretrained(target / name)
    for name in ("lcm", "evaluator"):
        if (work / name).is_dir():
            shutil.copytree(work / name, target / name)


def add_variants(target: Path) -> None:
    """Convert the diffusers folder `target` to OpenVINO, linked to its safetensors, and write the manifest."""
    name = MANY_STEPS
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
            weights = tuple(path.relative_to(target).as_posix() for path in (*safetensors, rest))
            artifacts[part] = replace(artifact, graph=f"{name}/{part}/{GRAPH}", weights=weights)
        shutil.copyfile(made.path(f"{name}/{REFERENCE}"), target / name / REFERENCE)
    kept = {f"{name}/{REFERENCE}": record_file(target / name / REFERENCE)}
    variant = _variant(target, "fp16", artifacts, source)
    variants = {name: replace(variant, files={**variant.files, **kept})}
    if (target / LORA).is_file():
        # One UNet: the few-step model is the same graph and weights, with the low-rank differences added as it is read.
        few = {**artifacts, "unet": replace(artifacts["unet"], parity=None, lora=LORA)}
        variants[FEW_STEPS] = replace(_variant(target, "fp16-lcm", few, source), defaults=FEW_DEFAULTS)
    shared = {f"tokenizer/{p.name}": record_file(p) for p in sorted((target / "tokenizer").iterdir())}
    facts = replace(source.facts, name=NAME, license=LICENSE, defaults=DEFAULTS)
    ModelBundle(target, facts, variants, shared).write_manifest()


def _variant(target: Path, precision: str, artifacts: dict[str, Artifact], source: Source) -> Variant:
    used = {file for row in artifacts.values() for file in (row.graph, *row.weights, row.lora) if file is not None}
    files = {file: record_file(target / file) for file in sorted(used)}
    return Variant("openvino", precision, artifacts, files, source.fingerprint())
