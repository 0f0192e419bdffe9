"""Folders of diffusers and optimum-intel: the facts in their configs, and the variants that can be run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidModel
from ..files import FileRecord, read_json, refuse_pointer
from ..sampling.names import sampler_of_config
from ..sampling.schedule import NoiseSchedule
from .facts import Defaults, Facts, LatentSpace, TextPart
from .ip_adapter import adapter_facts, adapter_file
from .library import model_name
from .parts import DENOISERS, IMAGE_ENCODER, NET, SAFETY_CHECKER, TEXT_ENCODERS, TINY, UPSCALER
from .pulled import hashes, with_record
from .transformers import READERS, vae_folder
from .variants import Artifact, Variant
from .weights import sample, weight_files

GRAPH = "openvino_model.xml"
# The class of a pipeline names a task; the configs of its parts say what the model is.
PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline", "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline",
)  # fmt: skip
EDITING = "StableDiffusionInstructPix2PixPipeline"
# Before this version of diffusers the configs of models of 512 pixels said 256; its pipelines take 512 for less.
SIZED_SINCE, OLD_SIDE = (0, 9), 64
# SDXL's own latents a side; Turbo was distilled at half of it.
XL_SIDE = 128

TINY_AUTOENCODER = "AutoencoderTiny"


# Pipelines that change their scheduler's config when they are made.
_REPAIRED = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")


def diffusers_facts(folder: Path) -> Facts:
    """The facts in the configs of a diffusers folder. InvalidModel if it is none, or of a family not supported."""
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise InvalidModel(f"{folder} is not a diffusers folder: it has no model_index.json")
    index = read_json(index_path)
    pipeline = str(index.get("_class_name", "")).removeprefix("OV")
    if pipeline not in (*PIPELINES, *READERS):
        raise InvalidModel(
            f"{folder} is a {pipeline or 'folder without _class_name'}; supported: {', '.join((*PIPELINES, *READERS))}"
        )
    with _readable(folder):
        facts = READERS[pipeline](folder, index) if pipeline in READERS else _unet_facts(folder, index, pipeline)
    return with_record(folder, facts)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Raise InvalidModel for what is missing or wrong in the configs of `folder`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, OSError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        detail = "a list is too short" if isinstance(error, IndexError) else detail
        raise InvalidModel(f"{folder}: {detail} in its configs") from error


def _unet_facts(folder: Path, index: dict[str, Any], pipeline: str) -> Facts:
    """Those of a folder whose denoiser is a UNet."""
    encoders = [name for name in ("text_encoder", "text_encoder_2") if (folder / name / "config.json").is_file()]
    texts = {name: read_json(folder / name / "config.json") for name in encoders or ["text_encoder"]}
    unet = read_json(folder / "unet/config.json")
    vae = read_json(vae_folder(folder) / "config.json")
    # As SDXS has it: both halves of the tiny autoencoder, whose latents are those of the denoiser.
    tiny = vae.get("_class_name") == TINY_AUTOENCODER
    scheduler = read_json(folder / "scheduler/scheduler_config.json")
    scheduler = _as_drawn(scheduler, pipeline)
    schedule = NoiseSchedule.from_config(scheduler)
    xl = unet.get("addition_embed_type") == "text_time"
    factor = 2 ** (len(vae["decoder_block_out_channels" if tiny else "block_out_channels"]) - 1)
    latents = LatentSpace(
        channels=int(vae.get("latent_channels", unet["out_channels"])),
        factor=factor,
        scale=float(vae.get("scaling_factor") or (1.0 if tiny else 0.18215)),
        shift=float(vae.get("shift_factor") or 0.0),
        # Only the pipelines of SDXL look at these.
        mean=tuple(map(float, vae.get("latents_mean") or ())) if xl else (),
        std=tuple(map(float, vae.get("latents_std") or ())) if xl else (),
    )
    height, width = _sides(unet, XL_SIDE if xl else OLD_SIDE)
    family, more = _family(index, unet, texts)
    editing = pipeline == EDITING
    inpainting = _takes_mask(folder, int(unet["in_channels"]), latents.channels, editing)
    text = next(iter(texts.values()))
    max_tokens = int(text.get("max_position_embeddings", 77))
    text_width = int(unet["cross_attention_dim"]) if family == "sdxl" else int(text["hidden_size"])
    guidance_width = int(unet.get("time_cond_proj_dim") or 0)
    sampler = sampler_of_config(scheduler)
    lcm = pipeline.startswith("LatentConsistencyModel") or sampler == "lcm"
    few = lcm or _is_turbo(schedule, sampler, family == "sdxl" and max(width, height) >= XL_SIDE)
    # The scale that a latent consistency model has embedded is no guidance: it costs nothing.
    guidance = 8.5 if guidance_width else 1.0 if few else 5.0 if family == "sdxl" else 7.5
    defaults = Defaults(
        width=width * factor,
        height=height * factor,
        steps=4 if few else 20,
        guidance=guidance,
        sampler="lcm" if lcm else sampler,
    )
    return Facts(
        model_name(folder), family, schedule, latents, defaults,
        tokenizer=more["texts"][0].tokenizer if "texts" in more else "tokenizer",
        max_tokens=max_tokens, text_width=text_width, guidance_width=guidance_width, inpainting=inpainting,
        instructed=editing, pooled_nets=_pooled_nets(folder, unet, latents.channels),
        vae_float32=family == "sdxl" and bool(vae.get("force_upcast", True)),
        **adapter_facts(folder, unet), **more,
    )  # fmt: skip


def _as_drawn(scheduler: dict[str, Any], pipeline: str) -> dict[str, Any]:
    """A scheduler's config as diffusers' pipeline has it: those of SD 1 and 2 set what old files got wrong."""
    if pipeline not in _REPAIRED:
        return scheduler
    repaired = {"steps_offset": 1, "clip_sample": False}
    if "Inpaint" in pipeline:
        repaired = {"steps_offset": 1, "skip_prk_steps": True}
    return {**scheduler, **repaired}


def _family(
    index: dict[str, Any], unet: dict[str, Any], texts: dict[str, dict[str, Any]]
) -> tuple[Literal["sd1", "sd2", "sdxl"], dict[str, Any]]:
    """The family of a UNet and the facts that only SDXL has, by what its config says that it takes."""
    if unet.get("addition_embed_type") != "text_time":
        return ("sd2" if int(unet["cross_attention_dim"]) == 1024 else "sd1"), {}
    # Both encoders' last layer but one.
    parts = tuple(
        TextPart(name, name.replace("text_encoder", "tokenizer"), f"hidden_states.{int(text['num_hidden_layers']) - 1}")
        for name, text in texts.items()
    )
    return "sdxl", {
        "texts": parts,
        "conditioning": "aesthetic" if index.get("requires_aesthetics_score") else "size",
        "pooled_width": int(texts["text_encoder_2"]["projection_dim"]),
        "zero_negative": bool(index.get("force_zeros_for_empty_prompt", False)),
    }


def _sides(unet: dict[str, Any], default: int) -> tuple[int, int]:
    """Latents down and across that a model draws; `default` where its config is silent or null, as in diffusers."""
    found = unet.get("sample_size") or default
    if isinstance(found, list):
        return int(found[0]), int(found[1])
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version", "")))
    if version and (int(version[1]), int(version[2])) < SIZED_SINCE and found < OLD_SIDE:
        found = OLD_SIDE
    return int(found), int(found)


def _takes_mask(folder: Path, found: int, channels: int, editing: bool) -> bool:
    """Whether a UNet of `found` input channels is for inpainting. Raises InvalidModel for other numbers.

    An `editing` one takes the latents of a picture beside its own.
    """
    plain, masked, edited = channels, 2 * channels + 1, 2 * channels
    if found not in ((edited,) if editing else (plain, masked)):
        numbers = f"{edited} in {EDITING}" if editing else f"{plain}, and {masked} for inpainting"
        raise InvalidModel(f"{folder}: its UNet takes {found} channels; supported: {numbers}")
    return not editing and found != channels


def _pooled_nets(folder: Path, unet: dict[str, Any], channels: int) -> tuple[str, ...]:
    """The ControlNets that return means over the picture. One that is no copy of this UNet's encoder is refused.

    Its residuals would have no place. Whatever the UNet takes, a ControlNet is given the latents alone.
    """
    pooled = []
    for path in sorted(folder.glob(f"{NET}*/config.json")):
        net = read_json(path)
        for key, what in (("cross_attention_dim", "text of width"), ("block_out_channels", "a UNet of widths")):
            if net.get(key) != unet.get(key):
                raise InvalidModel(
                    f"{path.parent} is for {what} {_listed(net.get(key))}; this model has {_listed(unet.get(key))}"
                )
        if (found := net.get("in_channels", channels)) != channels:
            raise InvalidModel(f"{path.parent} takes {found} channels; a ControlNet of this model takes {channels}")
        if net.get("global_pool_conditions"):
            pooled.append(path.parent.name)
    return tuple(pooled)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_turbo(schedule: NoiseSchedule, sampler: str, full_size: bool) -> bool:
    """Adversarially distilled models (Sauer et al. 2023) say it by their scheduler, and SDXL's by their size, too.

    People save SDXL itself with such a scheduler: its `full_size` is no Turbo's.
    """
    if full_size:
        return False
    trailing = schedule.timestep_spacing == "trailing" and schedule.prediction_type == "epsilon"
    return trailing and sampler in ("euler", "euler_a")


def has_checker(folder: Path) -> bool:
    """Whether a diffusers folder uses a safety checker, and has it in safetensors."""
    named = read_json(folder / "model_index.json").get(SAFETY_CHECKER)
    if (
        not isinstance(named, list)
        or not named
        or named[0] is None
        or not (folder / SAFETY_CHECKER / "config.json").is_file()
    ):
        return False
    try:
        return bool(weight_files(folder / SAFETY_CHECKER, "model")[0])
    except InvalidModel:
        return False


def exported_variants(root: Path, facts: Facts) -> dict[str, Variant]:
    """The variant of an optimum-intel export, with the hashes of its pull; none where the folder has no graphs."""
    seeing = [IMAGE_ENCODER] if facts.image_prompt else []
    needed = (*(text.part for text in facts.encoders), facts.denoiser, "vae_decoder")
    offered = (*needed, "vae_encoder", *seeing)
    present = {part: root / part / GRAPH for part in offered if (root / part / GRAPH).is_file()}
    if not present:
        return {}
    missing = [part for part in needed if part not in present]
    if missing:
        raise InvalidModel(f"{root} has no {missing[0]}/{GRAPH}")
    artifacts: dict[str, Artifact] = {}
    files: dict[str, FileRecord] = {}
    known = hashes(root)
    for part, graph in present.items():
        weights = graph.with_suffix(".bin")
        if not weights.is_file():
            raise InvalidModel(f"{root} has no {part}/{weights.name}")
        for path in (graph, weights):
            refuse_pointer(path)
        names = [f"{part}/{graph.name}", f"{part}/{weights.name}"]
        artifacts[part] = Artifact(names[0], (names[1],), (), ())
        files |= {name: known.get(name) or FileRecord((root / name).stat().st_size, "") for name in names}
    return {"openvino": Variant("openvino", "as exported", artifacts, files)}


# The entry points of networks that no library has; the runtime may not import where they are written.
NETWORKS = "edge_sd.networks"
# Classes of components that torch runs -> their library and the weight file's stem.
_DIFFUSERS, _TRANSFORMERS = ("diffusers", "diffusion_pytorch_model"), ("transformers", "model")
TORCH_CLASSES = {
    "CLIPVisionModelWithProjection": _TRANSFORMERS,
    "CLIPTextModel": _TRANSFORMERS, "CLIPTextModelWithProjection": _TRANSFORMERS, "T5EncoderModel": _TRANSFORMERS,
    "UNet2DConditionModel": _DIFFUSERS, "SD3Transformer2DModel": _DIFFUSERS,
    "Qwen3ForCausalLM": _TRANSFORMERS, "Qwen3Model": _TRANSFORMERS, "ZImageTransformer2DModel": _DIFFUSERS,
    "Flux2Transformer2DModel": _DIFFUSERS, "AutoencoderKLFlux2": _DIFFUSERS,
    "Gemma2Model": _TRANSFORMERS, "Gemma2ForCausalLM": _TRANSFORMERS, "SanaTransformer2DModel": _DIFFUSERS,
    "AutoencoderDC": _DIFFUSERS,
    "AutoencoderKL": _DIFFUSERS, TINY_AUTOENCODER: _DIFFUSERS, "ControlNetModel": _DIFFUSERS,
    "RRDBNet": (NETWORKS, "diffusion_pytorch_model"),
    "StableDiffusionSafetyChecker": ("diffusers.pipelines.stable_diffusion.safety_checker", "model"),
}  # fmt: skip
# Autoencoders whose encoder returns latents, and no distribution of them.
DETERMINISTIC = ("AutoencoderDC", TINY_AUTOENCODER)
# Components that have weights of an IP-Adapter.
ADAPTED = ("unet", "controlled_unet", IMAGE_ENCODER)
# The types that torch computes in, by the variants' names.
TORCH_VARIANTS = {"torch": "fp32", "torch-bf16": "bf16", "torch-fp16": "fp16"}


def torch_variants(root: Path, known: Mapping[str, FileRecord] | None = None) -> dict[str, Variant]:
    """The torch weights in a diffusers folder, in each type; `known` files keep their hashes.

    Raises InvalidModel where a component has no safetensors.
    """
    texts = [name for name in TEXT_ENCODERS if (root / name / "config.json").is_file()]
    denoiser = next((name for name in DENOISERS if (root / name / "config.json").is_file()), DENOISERS[0])
    # A ControlNet of a transformer is another network, which is not offered.
    nets = sorted(each.parent.name for each in root.glob(f"{NET}*/config.json")) if denoiser == "unet" else []
    folders = {**{each: each for each in (*texts, denoiser, *nets)}, "vae_decoder": "vae", "vae_encoder": "vae"}
    if nets:
        folders["controlled_unet"] = "unet"
    if has_checker(root):
        folders[SAFETY_CHECKER] = SAFETY_CHECKER
    if (root / "vae_tiny/config.json").is_file():
        folders[TINY] = "vae_tiny"
    if (root / UPSCALER / "config.json").is_file():
        folders[UPSCALER] = UPSCALER
    # A transformer takes none, as Source says.
    adapter = adapter_file(root) if denoiser == "unet" else None
    if adapter is not None:
        folders[IMAGE_ENCODER] = IMAGE_ENCODER
    known = {**(known or {}), **hashes(root)}
    artifacts: dict[str, Artifact] = {}
    files: dict[str, FileRecord] = {}
    for part, folder in folders.items():
        clip = part.startswith("text_encoder") or part in (SAFETY_CHECKER, IMAGE_ENCODER)
        paths = weight_files(root / folder, "model" if clip else "diffusion_pytorch_model")[0]
        if adapter is not None and part in ADAPTED:
            paths = [*paths, adapter]
        names = [path.relative_to(root).as_posix() for path in (root / folder / "config.json", *paths)]
        artifacts[part] = Artifact(names[0], tuple(names[1:]), (), ())
        try:
            files |= {name: known.get(name) or FileRecord((root / name).stat().st_size, "") for name in names}
        except OSError as error:
            raise InvalidModel(f"{root / folder} cannot be read ({error.strerror})") from error
    unknown = [root / name for name, record in files.items() if not record.sha256]
    sampled = sample(unknown) if unknown else ""
    return {
        name: Variant("torch", precision, artifacts, files, sample=sampled)
        for name, precision in TORCH_VARIANTS.items()
    }


def class_of(config: Mapping[str, Any], folder: str) -> tuple[str, str, str]:
    """Library, class and the weight file's stem of a component by its config. Raises InvalidModel."""
    names = [config.get("_class_name"), *(config.get("architectures") or [])]
    kind = next((name for name in names if name in TORCH_CLASSES), None)
    if kind is None:
        found = next(filter(None, names), "of no class")
        raise InvalidModel(f"{folder}/config.json is {found}; torch runs: {', '.join(sorted(TORCH_CLASSES))}")
    library, stem = TORCH_CLASSES[kind]
    return library, kind, stem
