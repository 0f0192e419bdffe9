"""Facts of diffusers folders whose denoiser is a transformer, a reader for each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InvalidModel
from ..files import read_json
from ..sampling.names import sampler_of_config
from ..sampling.schedule import NoiseSchedule
from .facts import Defaults, Facts, LatentSpace, TextPart
from .library import model_name
from .parts import TEXT_ENCODERS

# Rows of zeros that diffusers puts in place of a T5 that is left out, and tokens that it gives to one.
T5_TOKENS = 256
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
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "StableDiffusion3Img2ImgPipeline": _stable_diffusion_3,
    "StableDiffusion3InpaintPipeline": _stable_diffusion_3,
}
