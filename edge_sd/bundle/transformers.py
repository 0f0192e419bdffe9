"""Facts of diffusers folders whose denoiser is a transformer, a reader for each family."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidModel
from ..files import read_json, refuse_pointer
from ..sampling.names import sampler_of_config
from ..sampling.schedule import NoiseSchedule
from .facts import Defaults, Facts, LatentSpace, TextPart
from .library import model_name
from .parts import TEXT_ENCODERS
from .safetensors import pick
from .weights import weight_files

# Rows of zeros that diffusers puts in place of a T5 that is left out, and tokens that it gives to one.
T5_TOKENS = 256
# Layers of Qwen3 that FLUX.2 klein attends to, and tokens that it reads.
KLEIN_LAYERS, KLEIN_TOKENS = (9, 18, 27), 512
# Qwen3's template around a prompt, where it is not to think.
TURN = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
# The same where it may think, tokens that Z-Image reads, and the shift of its levels that is not Turbo's.
THINKING, Z_TOKENS, Z_SHIFT = "<|im_end|>\n<|im_start|>assistant\n", 512, 6.0
# What SANA puts before a prompt, and not before a negative one (Xie et al. 2024, arXiv:2410.10629, section 3.2): the
# text that its weights were trained with, out of diffusers' pipeline.
INSTRUCTION = "\n".join([
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image "
    "generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
    "skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary "
    "or evaluations:",
    "User Prompt: ",
])  # fmt: skip
# States of Gemma 2 that SANA attends to: the first, and the last ones of the instruction and the prompt together.
SANA_ROWS = 300
# Largest side in pixels that is drawn at once, where a table of positions allows more.
MOST_PIXELS = 2048


def _stable_diffusion_3(folder: Path, index: dict[str, Any]) -> Facts:
    """SD 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206): two CLIPs and perhaps T5, a transformer of two streams."""
    transformer, vae = read_json(folder / "transformer/config.json"), read_json(vae_folder(folder) / "config.json")
    scheduler = read_json(folder / "scheduler/scheduler_config.json")
    texts = _text_parts(folder, index)
    factor, patch = 2 ** (len(vae["block_out_channels"]) - 1), int(transformer["patch_size"])
    channels = int(transformer["in_channels"])
    if channels != int(vae["latent_channels"]):
        raise InvalidModel(
            f"{folder}: its transformer takes {channels} channels, its autoencoder has {vae['latent_channels']}"
        )
    if sum(text.width for text in texts if text.kind == "clip") > int(transformer["joint_attention_dim"]):
        raise InvalidModel(f"{folder}: its text encoders are wider than the {transformer['joint_attention_dim']} "
                           "numbers that its transformer attends to")  # fmt: skip
    side = int(transformer["sample_size"]) * factor
    steps, guidance = _published(transformer)
    table = int(transformer["pos_embed_max_size"]) * patch * factor
    return Facts(
        model_name(folder),
        "sd3",
        NoiseSchedule.from_config(scheduler),
        LatentSpace(channels, factor, float(vae["scaling_factor"]), float(vae.get("shift_factor") or 0.0)),
        Defaults(side, side, steps, guidance, sampler_of_config(scheduler), min(MOST_PIXELS, table)),
        tokenizer=texts[0].tokenizer,
        max_tokens=int(read_json(folder / "text_encoder/config.json").get("max_position_embeddings", 77)),
        text_width=int(transformer["joint_attention_dim"]),
        texts=texts,
        conditioning="joint",
        pooled_width=int(transformer["pooled_projection_dim"]),
        denoiser="transformer",
        patch=patch,
        blank_rows=0 if any(text.kind == "t5" for text in texts) else T5_TOKENS,
    )


def _text_parts(folder: Path, index: dict[str, Any]) -> tuple[TextPart, ...]:
    """SD 3's text encoders. Raises InvalidModel where one that model_index.json names is not there."""
    parts = []
    for name in TEXT_ENCODERS:
        if not (index.get(name) or [None])[0]:
            if name != "text_encoder_3":
                raise InvalidModel(f"{folder} has no {name}, which its transformer needs; only T5 can be left out")
            continue
        if not (folder / name / "config.json").is_file():
            drop = f'; to draw without T5, set "{name}": [null, null] in model_index.json' if name[-1] == "3" else ""
            raise InvalidModel(f"{folder} has no {name}, which its model_index.json names{drop}")
        config, tokenizer = read_json(folder / name / "config.json"), name.replace("text_encoder", "tokenizer")
        if name == "text_encoder_3":
            parts.append(TextPart(name, tokenizer, "last_hidden_state", "t5", T5_TOKENS, int(config["d_model"])))
        else:
            states = f"hidden_states.{int(config['num_hidden_layers']) - 1}"
            parts.append(TextPart(name, tokenizer, states, width=int(config["hidden_size"])))
    return tuple(parts)


def _flux2_klein(folder: Path, index: dict[str, Any]) -> Facts:
    """FLUX.2 klein: states of three layers of Qwen3, and latents whose 2 x 2 blocks are normalized by statistics."""
    transformer, vae = read_json(folder / "transformer/config.json"), read_json(vae_folder(folder) / "config.json")
    scheduler, text = read_json(folder / "scheduler/scheduler_config.json"), folder / "text_encoder/config.json"
    width = int(read_json(text)["hidden_size"]) if text.is_file() else 0
    attended, channels, fold = int(transformer["joint_attention_dim"]), int(transformer["in_channels"]), 2
    if len(KLEIN_LAYERS) * width != attended:
        raise InvalidModel(
            f"{folder}: its transformer attends to {attended} numbers, {len(KLEIN_LAYERS)} layers of its text encoder "
            f"have {len(KLEIN_LAYERS) * width}"
        )
    if transformer.get("guidance_embeds"):
        raise InvalidModel(f"{folder}: its transformer takes a guidance scale, as FLUX.2 dev's, which is not offered")
    mean, variance = statistics(folder, vae)
    factor, eps = fold * 2 ** (len(vae["block_out_channels"]) - 1), float(vae.get("batch_norm_eps", 1e-4))
    std = np.sqrt(variance.astype(np.float32) + np.float32(eps))
    few = bool(index.get("is_distilled", False))
    late = _names_are_late(folder / "text_encoder", int(read_json(text)["num_hidden_layers"]))
    states = ",".join(f"hidden_states.{layer - late}" for layer in KLEIN_LAYERS)
    return Facts(
        model_name(folder),
        "flux2",
        replace(NoiseSchedule.from_config(scheduler), flow_grid="even", flow_mu="flux2"),
        LatentSpace(channels, factor, 1.0, 0.0, tuple(mean.tolist()), tuple(std.tolist()), fold),
        Defaults(1024, 1024, 4 if few else 50, 1.0 if few else 4.0, sampler_of_config(scheduler), MOST_PIXELS),
        max_tokens=KLEIN_TOKENS,
        text_width=attended,
        texts=(TextPart(states=states, kind="qwen3", tokens=KLEIN_TOKENS, before=TURN[0], after=TURN[1]),),
        denoiser="transformer",
        text_only=True,
    )


def _z_image(folder: Path, index: dict[str, Any]) -> Facts:
    """Z-Image and its Turbo: the last layer but one of Qwen3, of which only real tokens count; one stream."""
    transformer, vae = read_json(folder / "transformer/config.json"), read_json(vae_folder(folder) / "config.json")
    scheduler, text = (
        read_json(folder / "scheduler/scheduler_config.json"),
        read_json(folder / "text_encoder/config.json"),
    )
    if int(text["hidden_size"]) != int(transformer["cap_feat_dim"]):
        raise InvalidModel(
            f"{folder}: its transformer attends to {transformer['cap_feat_dim']} numbers, its text encoder has "
            f"{text['hidden_size']}"
        )
    schedule = replace(NoiseSchedule.from_config(scheduler), flow_grid="even")
    # Turbo, whose levels are shifted less, draws in few steps and without guidance, by its card.
    few = schedule.flow_shift < Z_SHIFT
    # Exports are cut: optimum-intel's has one output, ours says of how many layers.
    exported, layers = _outputs(folder / "text_encoder"), int(text["num_hidden_layers"])
    cut = f"hidden_states.{layers if exported else layers - 1}"
    states = "last_hidden_state" if exported and cut not in exported else cut
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    space = LatentSpace(
        int(transformer["in_channels"]), factor, float(vae["scaling_factor"]), float(vae.get("shift_factor") or 0.0)
    )
    steps, guidance = (8, 1.0) if few else (50, 6.0)
    return Facts(
        model_name(folder),
        "zimage",
        schedule,
        space,
        Defaults(1024, 1024, steps, guidance, sampler_of_config(scheduler), MOST_PIXELS),
        max_tokens=Z_TOKENS,
        text_width=int(transformer["cap_feat_dim"]),
        texts=(TextPart(states=states, kind="qwen3", tokens=Z_TOKENS, before=TURN[0], after=THINKING),),
        denoiser="transformer",
        patch=int(transformer["all_patch_size"][0]),
        text_mask=True,
    )


def _sana(folder: Path, index: dict[str, Any]) -> Facts:
    """SANA (Xie et al. 2024, arXiv:2410.10629) and SANA-Sprint, which takes the guidance scale: Gemma 2 and DC-AE."""
    transformer, vae = read_json(folder / "transformer/config.json"), read_json(vae_folder(folder) / "config.json")
    scheduler, text = (
        read_json(folder / "scheduler/scheduler_config.json"),
        read_json(folder / "text_encoder/config.json"),
    )
    channels, width = int(transformer["in_channels"]), int(transformer["caption_channels"])
    _check_sana(folder, transformer, vae, int(text["hidden_size"]))
    sprint = bool(transformer.get("guidance_embeds"))
    schedule = NoiseSchedule.from_config(scheduler)
    if sprint != (schedule.flow_grid == "trig"):
        raise InvalidModel(
            f"{folder}: its transformer takes {'a' if sprint else 'no'} guidance scale, and its scheduler is a "
            f"{scheduler.get('_class_name')}; SANA-Sprint has both that and SCMScheduler, SANA neither"
        )
    factor = 2 ** (len(vae["encoder_block_out_channels"]) - 1)
    side = int(transformer["sample_size"]) * factor
    # In words of the vocabulary; the last of the instruction's may become one with the first of a prompt.
    read = _tokens(folder / "tokenizer", INSTRUCTION) + 1 + SANA_ROWS - 2
    return Facts(
        model_name(folder),
        "sana",
        schedule,
        LatentSpace(channels, factor, float(vae["scaling_factor"])),
        Defaults(side, side, 2 if sprint else 20, 4.5, sampler_of_config(scheduler), max(MOST_PIXELS, side)),
        max_tokens=SANA_ROWS,
        text_width=width,
        texts=(TextPart(kind="gemma2", tokens=read, before=INSTRUCTION, bare_negative=True, rows=SANA_ROWS),),
        denoiser="transformer",
        patch=int(transformer.get("patch_size", 1)),
        text_mask=True,
        guidance_factor=float(transformer.get("guidance_embeds_scale", 0.1)) if sprint else 0.0,
        time_factor=1 / schedule.num_train_timesteps if sprint else float(transformer.get("timestep_scale", 1.0)),
    )


def _check_sana(folder: Path, transformer: dict[str, Any], vae: dict[str, Any], width: int) -> None:
    """Raise InvalidModel for parts of SANA that do not fit together; `width` is that of its text encoder's states."""
    channels, out = int(transformer["in_channels"]), int(transformer.get("out_channels") or transformer["in_channels"])
    if channels != int(vae["latent_channels"]):
        raise InvalidModel(
            f"{folder}: its transformer takes {channels} channels, its autoencoder has {vae['latent_channels']}"
        )
    if out != channels:
        raise InvalidModel(
            f"{folder}: its transformer takes {channels} channels and returns {out}; as many are offered"
        )
    if width != int(transformer["caption_channels"]):
        raise InvalidModel(
            f"{folder}: its transformer attends to {transformer['caption_channels']} numbers, its text encoder "
            f"has {width}"
        )


def _tokens(tokenizer: Path, text: str) -> int:
    """How many tokens a text is, without those that begin and end one. Raises InvalidModel."""
    from tokenizers import Tokenizer

    path = tokenizer / "tokenizer.json"
    if not path.is_file():
        raise InvalidModel(f"{tokenizer} has no tokenizer.json")
    refuse_pointer(path)
    try:
        return len(Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids)
    except Exception as error:  # The library raises bare Exceptions.
        raise InvalidModel(f"{path} is no tokenizer: {str(error).splitlines()[0]}") from error


def _names_are_late(export: Path, layers: int) -> bool:
    """Whether the states of an exported language model have names that are one too small.

    optimum-intel 2.2 names them in order, from last_hidden_state on, which of this class are the embeddings: what it
    calls hidden_states.9 is layer 10's. Its last name is then one below the number of layers.
    """
    named = [int(each.rpartition(".")[2]) for each in _outputs(export) if each.startswith("hidden_states.")]
    return max(named, default=0) == layers - 1


def _outputs(export: Path) -> set[str]:
    """The names of an exported graph's outputs; none where there is no graph."""
    graph = export / "openvino_model.xml"
    if not graph.is_file():
        return set()
    found = re.findall(r'output_names="([^"]*)"', graph.read_text("utf-8"))
    return {name for names in found for name in names.split(",")}


def statistics(folder: Path, vae: dict[str, Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and variance of each channel: of the weights, or, in an export, of the decoder's config."""
    if "bn_running_mean_data" in vae:
        return np.array(vae["bn_running_mean_data"]), np.array(vae["bn_running_var_data"])
    files, _ = weight_files(folder / "vae", "diffusion_pytorch_model")
    found = pick(files[0], ("bn.running_mean", "bn.running_var"))
    return found["bn.running_mean"], found["bn.running_var"]


def _published(transformer: dict[str, Any]) -> tuple[int, float]:
    """Steps and guidance that the models' cards name: 3.5 medium has a second attention, 3.5 large norms alone."""
    if transformer.get("dual_attention_layers"):
        return 40, 4.5
    return (28, 3.5) if transformer.get("qk_norm") else (28, 7.0)


def vae_folder(folder: Path) -> Path:
    """The folder of the autoencoder's config: diffusers' one, or the decoder's of an export."""
    return next((each for each in (folder / "vae", folder / "vae_decoder") if each.is_dir()), folder / "vae")


# Class of a pipeline -> what reads the facts of such a folder.
READERS: dict[str, Callable[[Path, dict[str, Any]], Facts]] = {
    "Flux2KleinPipeline": _flux2_klein,
    "ZImagePipeline": _z_image,
    "ZImageImg2ImgPipeline": _z_image,
    "ZImageInpaintPipeline": _z_image,
    "SanaPipeline": _sana,
    "SanaSprintPipeline": _sana,
    "SanaSprintImg2ImgPipeline": _sana,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "StableDiffusion3Img2ImgPipeline": _stable_diffusion_3,
    "StableDiffusion3InpaintPipeline": _stable_diffusion_3,
}
