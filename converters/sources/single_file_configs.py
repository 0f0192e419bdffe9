"""The configs that a checkpoint in one file does not carry, made of its tensors' shapes, without a network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edge_sd.errors import InvalidModel

from .denoisers import UNET, count
from .single_file import (
    CLIP_H,
    DENOISER,
    EDM_MEAN,
    EDM_STD,
    EDM_V_MAX,
    EDM_V_MIN,
    KINDS,
    OURS,
    REFINER_G,
    SD3_G,
    SD3_L,
    SD3_T5,
    VAE,
    XL_G,
    ZERO_SNR_MARK,
    Checkpoint,
    Kind,
)

# What a UNet's config has of its family or its base, since its tensors do not tell.
UNTOLD = ("act_fn", "attention_head_dim", "norm_eps", "norm_num_groups", "sample_size")
# The width of the text that a UNet of each family attends to.
CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "refiner"}


def denoiser_config(checkpoint: Checkpoint, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """diffusers' config of the denoiser, read off its tensors; what they do not tell is `base`'s, or its makers'.

    Raises InvalidModel where tensors are missing, or of other shapes than its family's.
    """
    denoiser = checkpoint.denoiser
    given = {key: value for key, value in (base or {}).items() if key[0] != "_" and key != "quantization_config"}
    named = {"_class_name": denoiser.kind}
    if not checkpoint.original:
        if not given:
            raise InvalidModel(
                f"{checkpoint.name} is in diffusers' names, and only its config tells what it is: give --base FOLDER "
                f"with {denoiser.part}/config.json"
            )
        return {**given, **named}
    if denoiser is UNET:
        width = _context(checkpoint)
        kind = KINDS[CONTEXTS.get(width, "sd1")]
        return {**given, **unet_config(checkpoint, kind), **{key: given[key] for key in UNTOLD if key in given}}
    shapes = {name[len(DENOISER) :]: shape for name, shape in checkpoint.shapes.items() if name.startswith(DENOISER)}
    try:
        told = denoiser.told(shapes, given)
    except KeyError as error:
        raise InvalidModel(f"{checkpoint.name}, {denoiser.part}: lacks {error.args[0]}") from error
    except (ValueError, ZeroDivisionError, IndexError) as error:
        raise InvalidModel(
            f"{checkpoint.name}, {denoiser.part}: its shapes are not {denoiser.title}'s ({error})"
        ) from error
    if (side := checkpoint.side(0)) and "sample_size" in denoiser.published and not base:
        told["sample_size"] = side // 8
    return {**denoiser.published, **given, **told, **named}


def _context(checkpoint: Checkpoint) -> int:
    """The width of the text that a UNet attends to; 0 for none."""
    keys = (shape for name, shape in checkpoint.shapes.items() if name.endswith("attn2.to_k.weight"))
    return next(keys, (0, 0))[-1]


def unet_config(checkpoint: Checkpoint, kind: Kind) -> dict[str, Any]:
    """diffusers' config of the UNet, read off its tensors but for the number of heads, which no shape tells."""
    shapes = {name[len(DENOISER) :]: shape for name, shape in checkpoint.shapes.items() if name.startswith(DENOISER)}
    first = checkpoint.shape(f"{DENOISER}input_blocks.0.0.weight")
    # One list of (width, depth of its transformer) for each level of the way down.
    levels: list[list[tuple[int, int]]] = [[]]
    for n in range(1, 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks."))):
        if f"input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
            continue
        width = checkpoint.shape(f"{DENOISER}input_blocks.{n}.0.out_layers.3.weight")[0]
        levels[-1].append((width, _depth(shapes, f"input_blocks.{n}.1")))
    depths = [level[0][1] if level else 0 for level in levels]
    if any(
        len(level) != len(levels[0]) or {depth for _, depth in level} != {depths[n]} for n, level in enumerate(levels)
    ):
        raise InvalidModel(f"{checkpoint.name}: its UNet's levels have {[len(level) for level in levels]} layers")
    widths = [level[0][0] for level in levels]
    keys = [name for name in shapes if name.endswith("attn2.to_k.weight")]
    if not keys:
        raise InvalidModel(f"{checkpoint.name}: its UNet attends to no text")
    context = shapes[keys[0]][1]
    crossed = [depth > 0 for depth in depths]
    projection = next((shape for name, shape in shapes.items() if name.endswith("proj_in.weight")), ())
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        # diffusers calls the number of heads by this name: 8 of any width, or as many as are 64 wide.
        "attention_head_dim": 8 if kind is KINDS["sd1"] else [max(1, width // 64) for width in widths],
        "block_out_channels": widths,
        "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(crossed)],
        "in_channels": first[1],
        "out_channels": checkpoint.shape(f"{DENOISER}out.2.weight")[0],
        "layers_per_block": len(levels[0]),
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "sample_size": checkpoint.side(kind.side) // 8,
        "use_linear_projection": len(projection) == 2,
    }
    middle = _depth(shapes, "middle_block.1")
    if any(depth > 1 for depth in [*depths, middle]):
        # A level without attention has no depth; diffusers wants a number all the same.
        config["transformer_layers_per_block"] = [max(1, depth) for depth in depths]
        if middle != max(1, depths[-1]):
            config["transformer_layers_per_block"][-1] = middle
    if kind.family == "sdxl":
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": checkpoint.shape(f"{DENOISER}label_emb.0.0.weight")[1],
        }
    return config


def _depth(shapes: Mapping[str, Any], place: str) -> int:
    found = [re.match(rf"{re.escape(place)}\.transformer_blocks\.(\d+)\.", name) for name in shapes]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def vae_config(checkpoint: Checkpoint, kind: Kind) -> dict[str, Any]:
    """diffusers' config of the autoencoder, read off its tensors."""
    down = [re.match(rf"{VAE}encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", name) for name in checkpoint.shapes]
    places = [(int(match[1]), int(match[2])) for match in down if match]
    if not places:
        raise InvalidModel(f"{checkpoint.name} lacks {VAE}encoder.down.0.block.0.conv1.weight")
    levels = max(level for level, _ in places) + 1
    widths = [checkpoint.shape(f"{VAE}encoder.down.{n}.block.0.conv2.weight")[0] for n in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": checkpoint.shape(f"{VAE}decoder.conv_in.weight")[1],
        "layers_per_block": max(block for _, block in places) + 1,
        "norm_num_groups": 32,
        "sample_size": checkpoint.side(kind.side),
        "scaling_factor": kind.scale,
        "force_upcast": kind.family in ("sdxl", "sd3"),
        **_unquantized(checkpoint, kind),
        **_normalized(checkpoint),
    }


def _unquantized(checkpoint: Checkpoint, kind: Kind) -> dict[str, Any]:
    """What autoencoders since SD 3's have: a shift, and no convolutions around the latents."""
    if kind.shift is None:
        return {}
    convolutions = {f"use_{name}": checkpoint.has(f"{VAE}{name}.") for name in ("quant_conv", "post_quant_conv")}
    return {"shift_factor": kind.shift, **convolutions}


def _normalized(checkpoint: Checkpoint) -> dict[str, Any]:
    """The statistics of Playground 2.5's latents, and the scale that goes with them; nothing for other models."""
    if checkpoint.edm != "edm":
        return {}
    return {
        "scaling_factor": 0.5,
        "latents_mean": checkpoint.numbers(EDM_MEAN),
        "latents_std": checkpoint.numbers(EDM_STD),
    }


def text_config(checkpoint: Checkpoint, prefix: str) -> dict[str, Any]:
    """transformers' config of a text encoder, read off its tensors; heads are 64 wide in all that were published."""
    if prefix == SD3_T5:
        return _t5_config(checkpoint)
    ours = prefix in OURS
    if ours:
        model = f"{prefix}text_model." if checkpoint.has(f"{prefix}text_model.") else prefix
        words = checkpoint.shape(f"{model}embeddings.token_embedding.weight")
        positions = checkpoint.shape(f"{model}embeddings.position_embedding.weight")[0]
        layer = f"{model}encoder.layers."
        inner = checkpoint.shape(f"{layer}0.mlp.fc1.weight")[0]
    else:
        words = checkpoint.shape(f"{prefix}token_embedding.weight")
        positions = checkpoint.shape(f"{prefix}positional_embedding")[0]
        layer = f"{prefix}transformer.resblocks."
        inner = checkpoint.shape(f"{layer}0.mlp.c_fc.weight")[0]
    layers = 1 + max(int(name[len(layer) :].split(".")[0]) for name in checkpoint.shapes if name.startswith(layer))
    projection = checkpoint.shapes.get(f"{prefix}text_projection", (words[1], words[1]))
    if ours:
        projection = checkpoint.shapes.get(f"{prefix}text_projection.weight", projection)[:1]
    projected = prefix in (XL_G, REFINER_G, SD3_L, SD3_G)
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words[0],
        "hidden_size": words[1],
        "intermediate_size": inner,
        # SD 2 reads the last layer but one, so the last is left out.
        "num_hidden_layers": layers - (prefix == CLIP_H),
        "num_attention_heads": words[1] // 64,
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu" if ours and prefix != SD3_G else "gelu",
        "projection_dim": projection[-1],
        "layer_norm_eps": 1e-05,
    }


def _t5_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """transformers' config of SD 3's T5, version 1.1's encoder."""
    attention = f"{SD3_T5}encoder.block.0.layer.0.SelfAttention"
    words, width = checkpoint.shape(f"{SD3_T5}shared.weight")
    buckets, heads = checkpoint.shape(f"{attention}.relative_attention_bias.weight")
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": words,
        "d_model": width,
        "d_kv": checkpoint.shape(f"{attention}.q.weight")[0] // heads,
        "d_ff": checkpoint.shape(f"{SD3_T5}encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_heads": heads,
        "num_layers": count(checkpoint.shapes, f"{SD3_T5}encoder.block"),
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def scheduler_config(checkpoint: Checkpoint, prediction: str) -> dict[str, Any]:
    if prediction == "edm":
        # The ends and sigma_data that Playground 2.5 was published with.
        return {
            "_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon", "sigma_data": 0.5,
            "sigma_min": 0.002, "sigma_max": 80.0, "sigma_schedule": "karras", "rho": 7.0, "num_train_timesteps": 1000,
        }  # fmt: skip
    if prediction == "edm_v":
        low = checkpoint.numbers(EDM_V_MIN)[0] if EDM_V_MIN in checkpoint.shapes else 0.002
        return {
            "_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_min": low,
            "sigma_max": checkpoint.numbers(EDM_V_MAX)[0], "sigma_schedule": "exponential", "num_train_timesteps": 1000,
        }  # fmt: skip
    if checkpoint.kind == "sd3":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    return {
        "_class_name": "EulerDiscreteScheduler" if checkpoint.kind in ("sdxl", "refiner") else "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": ZERO_SNR_MARK in checkpoint.shapes,
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


def model_index(kind: Kind, denoiser: dict[str, Any], scheduler: str, texts: Mapping[str, Any]) -> dict[str, Any]:
    """The index of a folder with these text encoders; one that its family has, and the file has not, is left out."""
    inpainting = "Inpaint" if denoiser["in_channels"] == 9 else ""
    index: dict[str, Any] = {
        "_class_name": f"{kind.pipeline}{inpainting}Pipeline",
        "scheduler": ["diffusers", scheduler],
        "transformer" if kind.family == "sd3" else "unet": ["diffusers", denoiser["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if kind.family == "sdxl":
        index |= {"text_encoder": [None, None], "tokenizer": [None, None], "force_zeros_for_empty_prompt": True}
    elif kind.family == "sd3":
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    if kind is KINDS["refiner"]:
        index |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    for part, config in texts.items():
        t5 = part == "text_encoder_3"
        index[part] = ["transformers", config["architectures"][0]]
        index[part.replace("text_encoder", "tokenizer")] = ["transformers", "T5Tokenizer" if t5 else "CLIPTokenizer"]
    return index
