"""Folders that other programs wrote: facts of a diffusers folder, and OpenVINO exports of optimum-intel as bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from .bundle import Artifact, Defaults, Facts, FileRecord, LatentSpace, ModelBundle, Variant
from .errors import InvalidModel
from .samplers import SAMPLERS
from .schedule import NoiseSchedule

GRAPH = "openvino_model.xml"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk, or InvalidModel saying what is wrong with the file."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidModel(f"{path} holds a {type(document).__name__}, not a JSON object")
    return document


def diffusers_facts(folder: Path) -> Facts:
    """The facts in the configs of a diffusers folder. InvalidModel if it is none, or of a family not supported."""
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise InvalidModel(f"{folder} is not a diffusers folder: it has no model_index.json")
    index = read_json(index_path)
    pipeline = str(index.get("_class_name", "")).removeprefix("OV")
    if pipeline not in ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"):
        raise InvalidModel(
            f"{folder} is a {pipeline or 'folder without _class_name'}; "
            "supported: StableDiffusionPipeline, LatentConsistencyModelPipeline"
        )
    text = read_json(folder / "text_encoder/config.json")
    unet = read_json(folder / "unet/config.json")
    vae_folder = next((f for f in (folder / "vae", folder / "vae_decoder") if f.is_dir()), folder / "vae")
    vae = read_json(vae_folder / "config.json")
    scheduler = read_json(folder / "scheduler/scheduler_config.json")
    try:
        schedule = NoiseSchedule.from_config(scheduler)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        latents = LatentSpace(
            channels=int(unet["in_channels"]),
            factor=factor,
            scale=float(vae.get("scaling_factor") or 0.18215),
            shift=float(vae.get("shift_factor") or 0.0),
        )
        sample_size = unet["sample_size"]
        height, width = sample_size if isinstance(sample_size, list) else (sample_size, sample_size)
        family: Literal["sd1", "sd2"] = "sd2" if int(unet["cross_attention_dim"]) == 1024 else "sd1"
        max_tokens, text_width = int(text.get("max_position_embeddings", 77)), int(text["hidden_size"])
    except (KeyError, TypeError, ValueError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InvalidModel(f"{folder}: {detail} in its configs") from error
    theirs = scheduler.get("_class_name")
    sampler = next((name for name, s in SAMPLERS.items() if s.diffusers_class == theirs), "dpmpp_2m")
    lcm = pipeline == "LatentConsistencyModelPipeline" or sampler == "lcm"
    defaults = Defaults(
        width=width * factor,
        height=height * factor,
        steps=4 if lcm else 20,
        guidance=1.0 if lcm else 7.5,
        sampler="lcm" if lcm else sampler,
    )
    return Facts(folder.resolve().name, family, schedule, latents, defaults, "tokenizer", max_tokens, text_width)


def open_foreign(root: Path) -> ModelBundle:
    """An optimum-intel export as a bundle of one variant; its manifest is derived, without hashes."""
    facts = diffusers_facts(root)
    parts = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    present = {part: root / part / GRAPH for part in parts if (root / part / GRAPH).is_file()}
    missing = [part for part in parts[:3] if part not in present]
    if not present:
        raise InvalidModel(
            f"{root} holds torch weights, which this pipeline does not run; "
            f"convert them: edge-sd convert {root} BUNDLE --to openvino"
        )
    if missing:
        raise InvalidModel(f"{root} has no {missing[0]}/{GRAPH}")
    artifacts: dict[str, Artifact] = {}
    files: dict[str, FileRecord] = {}
    for part, graph in present.items():
        weights = graph.with_suffix(".bin")
        if not weights.is_file():
            raise InvalidModel(f"{root} has no {part}/{weights.name}")
        names = [f"{part}/{graph.name}", f"{part}/{weights.name}"]
        artifacts[part] = Artifact(names[0], (names[1],), (), ())
        files |= {name: FileRecord((root / name).stat().st_size, "") for name in names}
    return ModelBundle(root, facts, {"openvino": Variant("openvino", "as exported", artifacts, files)})
