"""The trained parts become the embedded model: float16 safetensors, and variants of each backend linked to them.

text_encoder/ unet/ vae/ scheduler/ tokenizer/ model_index.json    a Stable Diffusion model as diffusers loads it
controlnet/ vae_tiny/ lcm/                                         what diffusers loads beside it, where trained
evaluator/                                                         the judge (evaluator.py)
openvino-fp16/, openvino-fp16-lcm, coreml-ane-fp16/, coreai-gpu-fp16/
                                                                   graphs whose weights are the files above
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edge_sd.bundle.bundle import REFERENCE, ModelBundle
from edge_sd.bundle.diffusers import GRAPH
from edge_sd.bundle.facts import Defaults
from edge_sd.bundle.variants import Artifact, Variant
from edge_sd.errors import OutputError
from edge_sd.files import FileRecord, read_json, record_file, replaced

from ..build import build
from ..coreai.form import CoreAIForm
from ..coreai.link import link as link_asset
from ..coreml.form import CoreMLForm
from ..coreml.link import link as link_package
from ..form import Form, Report
from ..openvino.link import link
from ..recipes import RECIPES
from ..sources.source import Source
from .card import write_card
from .diffusion import SCHEDULE
from .taught import save_words

NAME = "emoji"
LICENSE = "Apache-2.0 (weights; artwork: MIT, Apache-2.0, CC BY 4.0, see NOTICE)"
DEFAULTS = Defaults(128, 128, steps=20, guidance=4.0, sampler="ddim", max_side=512)
MANY_STEPS, FEW_STEPS = "openvino-fp16", "openvino-fp16-lcm"
COREML, COREAI = "coreml-ane-fp16", "coreai-gpu-fp16"
# What writes a package without its weights, and how they are put together.
PACKAGES = {COREML: link_package, COREAI: link_asset}
FEW_DEFAULTS = replace(DEFAULTS, steps=4, guidance=1.0, sampler="lcm")
LORA = "lcm/pytorch_lora_weights.safetensors"
# No file of a repository should be larger than 25 MB.
SHARD = "15MB"


def publish(work: Path, target: Path, report: Report = lambda what, share: None) -> None:
    """Write the model trained in `work` to `target`, as a diffusers folder and as a bundle. An older one stays whole.

    Raises InvalidRequest (what is not trained yet), ConversionError, OutputError (the disk).
    """
    try:
        with replaced(target) as made:
            _write(work, made, report)
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror or error}); it is as it was") from error


def _write(work: Path, target: Path, report: Report) -> None:
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
    pipeline.save_pretrained(target, safe_serialization=True)
    (target / "unet/diffusion_pytorch_model.safetensors").unlink()
    parts["unet"].save_pretrained(target / "unet", max_shard_size=SHARD)
    _save_companions(work, target)
    for config in target.glob("*/config.json"):
        # The libraries write the path a module was loaded from, which is removed.
        values = read_json(config)
        values.pop("_name_or_path", None)
        if config.parent.name == "text_encoder":
            # transformers loads what its config says, diffusers float32: together they draw only where both agree.
            values["dtype"] = "float32"
        config.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(work / "tokenizer" / name, target / "tokenizer" / name)
    save_words(work, target)
    add_variants(target, report)
    write_card(work, target)


def _save_companions(work: Path, target: Path) -> None:
    """Optional parts of the model that have been trained."""
    from diffusers import AutoencoderTiny, ControlNetModel

    for name, kind in (("controlnet", ControlNetModel), ("vae_tiny", AutoencoderTiny)):
        if (work / name / "config.json").is_file():
            kind.from_pretrained(work / name).half().save_pretrained(target / name)
    for name in ("lcm", "evaluator"):
        if (work / name).is_dir():
            shutil.copytree(work / name, target / name)


def add_variants(target: Path, report: Report = lambda what, share: None) -> None:
    """Convert the diffusers folder `target` for every backend, linked to its safetensors; write the manifest."""
    forms: tuple[Form | str, ...] = ("openvino", CoreMLForm("ane"), CoreAIForm("gpu"))
    source = Source.open(target)
    for name in (MANY_STEPS, *PACKAGES):
        # Packages bear identifiers that are new each time: nothing of an earlier one may stay.
        shutil.rmtree(target / name, ignore_errors=True)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        for n, form in enumerate(forms):

            def part(what: str, share: float, n: int = n) -> None:
                report(what, (n + share) / len(forms))

            made = build(target, folder, form, RECIPES["fp16"], part)
        openvino = {part: link_openvino(made, part, source) for part in made.variant(MANY_STEPS).artifacts}
        variants = {MANY_STEPS: linked_variant(made, MANY_STEPS, openvino, target)}
        for name in PACKAGES:
            parts = {part: link_packaged(made, name, part, source) for part in made.variant(name).artifacts}
            variants[name] = linked_variant(made, name, parts, target)
    if (target / LORA).is_file():
        # One UNet: the few-step model is the same graph and weights, with the low-rank differences added as it is read.
        unets = {part: replace(row, parity=None, lora=LORA) for part, row in openvino.items() if part.endswith("unet")}
        few = {**openvino, **unets}
        variants[FEW_STEPS] = replace(
            made.variant(MANY_STEPS), precision="fp16-lcm", artifacts=few, files=records(target, few),
            defaults=FEW_DEFAULTS,
        )  # fmt: skip
    shared = {f"tokenizer/{p.name}": record_file(p) for p in sorted((target / "tokenizer").iterdir())}
    facts = replace(source.facts, name=NAME, license=LICENSE, defaults=DEFAULTS)
    bundle = ModelBundle(target, facts, variants, shared)
    replace(bundle, others=other_files(bundle)).write_manifest()


def other_files(bundle: ModelBundle) -> dict[str, FileRecord]:
    """What a command or another program reads of a model beside its variants: configs, indices of shards, the judge."""
    named = {*bundle.files, *(name for each in bundle.variants.values() for name in each.files)}
    paths = [bundle.root / "model_index.json", *bundle.root.glob("*/*.json"), *bundle.root.glob("evaluator/*")]
    found = {path.relative_to(bundle.root).as_posix(): path for path in paths if path.is_file()}
    return {name: record_file(path) for name, path in sorted(found.items()) if name not in named}


def link_openvino(made: ModelBundle, part: str, source: Source) -> Artifact:
    """Put one component of `made` into the folder of `source`, its weights those of `source`."""
    target, artifact = source.folder, made.variant(MANY_STEPS).artifacts[part]
    folder = target / MANY_STEPS / part
    folder.mkdir(parents=True)
    safetensors, _ = source.weights(part)
    rest = folder / "openvino_model.constants"
    own = [made.path(name) for name in artifact.weights]
    link(made.path(artifact.graph), own, safetensors, folder / GRAPH, rest)
    weights = tuple(path.relative_to(target).as_posix() for path in (*safetensors, rest))
    return replace(artifact, graph=f"{MANY_STEPS}/{part}/{GRAPH}", weights=weights)


def link_packaged(made: ModelBundle, name: str, part: str, source: Source) -> Artifact:
    """The same for the package of a variant in PACKAGES."""
    target, artifact = source.folder, made.variant(name).artifacts[part]
    linked = target / artifact.graph
    linked.mkdir(parents=True)
    safetensors, _ = source.weights(part)
    rest, pieces = linked.with_suffix(".constants"), linked.with_suffix(".pieces.json")
    PACKAGES[name](made.path(artifact.graph), safetensors, linked, rest, pieces)
    weights = tuple(path.relative_to(target).as_posix() for path in (*safetensors, rest))
    return replace(artifact, weights=weights, pieces=pieces.relative_to(target).as_posix())


def linked_variant(made: ModelBundle, name: str, artifacts: dict[str, Artifact], target: Path) -> Variant:
    """A variant of `made` with these artifacts, which are in `target`, and its reference picture there."""
    picture = f"{name}/{REFERENCE}"
    shutil.copyfile(made.path(picture), target / picture)
    files = {**records(target, artifacts), picture: record_file(target / picture)}
    return replace(made.variant(name), artifacts=artifacts, files=files)


def records(target: Path, artifacts: dict[str, Artifact]) -> dict[str, FileRecord]:
    """All files of these artifacts, those inside packages too."""
    named = {target / name for artifact in artifacts.values() for name in artifact.files()}
    files = {file for path in named for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
    return {file.relative_to(target).as_posix(): record_file(file) for file in sorted(files)}
