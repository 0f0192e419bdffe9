"""Miniatures of SD 1, SD 2 and SDXL whose text widths are the real ones, and the same in Stability's original names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip


def save_family(folder: Path, tokenizer_from: Path, family: str, channels: int = 4) -> Path:
    """A diffusers folder of one of "sd1", "sd2", "sdxl": random weights, two levels, one or two layers."""
    import diffusers
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTokenizer

    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_from / "tokenizer")
    if family == "sd2":
        # As published: its text is filled up with "!".
        tokenizer.pad_token = "!"
    widths = (32, 64) if family == "sd1" else (64, 128)
    extra: dict[str, Any] = {"attention_head_dim": 8}
    if family != "sd1":
        extra = {"attention_head_dim": [1, 2], "use_linear_projection": True}
    if family == "sdxl":
        extra |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256, "transformer_layers_per_block": [1, 2],
        }  # fmt: skip
    cross = ("DownBlock2D", "CrossAttnDownBlock2D") if family == "sdxl" else ("CrossAttnDownBlock2D", "DownBlock2D")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=channels, block_out_channels=widths, layers_per_block=1, norm_num_groups=32,
        down_block_types=cross, up_block_types=tuple(each.replace("Down", "Up") for each in reversed(cross)),
        cross_attention_dim={"sd1": 768, "sd2": 1024, "sdxl": 2048}[family], **extra,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=32, force_upcast=family == "sdxl",
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )  # fmt: skip
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "tokenizer": tokenizer}
    if family == "sdxl":
        parts |= {"text_encoder": text(tokenizer, 768, 2), "text_encoder_2": text(tokenizer, 1280, 2, projected=True),
                  "tokenizer_2": tokenizer}  # fmt: skip
    else:
        parts |= {"text_encoder": text(tokenizer, 768 if family == "sd1" else 1024, 2), "safety_checker": None,
                  "feature_extractor": None, "requires_safety_checker": False}  # fmt: skip
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    parts["scheduler"] = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, prediction_type=prediction,
        timestep_spacing="leading",
    )  # fmt: skip
    kind = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    getattr(diffusers, kind)(**parts).save_pretrained(folder, safe_serialization=True)
    return folder


def text(tokenizer: Any, width: int, layers: int, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=width // 64, projection_dim=width, max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu" if width == 768 else "gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def original(folder: Path, family: str) -> dict[str, Any]:
    """The weights of such a folder under their original names, with what trainers leave behind among them."""
    import torch
    from safetensors.torch import load_file

    def weights(part: str, stem: str = "diffusion_pytorch_model") -> dict[str, Any]:
        return load_file(folder / part / f"{stem}.safetensors")

    made = {f"model.diffusion_model.{_unet(name, family)}": x for name, x in weights("unet").items()}
    for name, x in weights("vae").items():
        attention = ".attentions." in name and name.endswith("weight") and x.ndim == 2
        made[f"first_stage_model.{_vae(name)}"] = x[:, :, None, None].contiguous() if attention else x
    first = weights("text_encoder", "model")
    if family == "sd2":
        made |= _open_clip(first, "cond_stage_model.model.")
        # The layer that SD 2 does not use, and the projection of its vectors.
        last = {
            name: x for name, x in made.items() if name.startswith("cond_stage_model.model.transformer.resblocks.1.")
        }
        made |= {name.replace("resblocks.1.", "resblocks.2."): x + 1 for name, x in last.items()}
        made["cond_stage_model.model.text_projection"] = torch.eye(1024)
        made["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    else:
        prefix = "conditioner.embedders.0" if family == "sdxl" else "cond_stage_model"
        made |= {f"{prefix}.transformer.{_of_text(name)}": x for name, x in first.items()}
        made[f"{prefix}.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if family == "sdxl":
        made |= _open_clip(weights("text_encoder_2", "model"), "conditioner.embedders.1.model.")
    made["model_ema.decay"] = torch.tensor(0.9999)
    made["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return made


def _unet(name: str, family: str) -> str:
    """diffusers' name in a UNet of two levels with one layer each -> LDM's."""
    outside = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
               "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
               "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
    module, end = name.rsplit(".", 1)
    if module in outside:
        return f"{outside[module]}.{end}"
    side, n, *rest = name.split(".")
    if side == "mid_block":
        kind, index = n, int(rest[0])
        place = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
        return f"{place}.{_inner(kind, rest[1:])}"
    level, kind, layer = int(n), rest[0], int(rest[1])
    if kind == "downsamplers":
        return f"input_blocks.{2 * level + 2}.0.op.{end}"
    if side == "up_blocks":
        # With attention before it, the upsampler is the block's third module.
        if kind == "upsamplers":
            return f"output_blocks.{2 * level + 1}.{2 if family == 'sdxl' else 1}.conv.{end}"
        return f"output_blocks.{2 * level + layer}.{0 if kind == 'resnets' else 1}.{_inner(kind, rest[2:])}"
    return f"input_blocks.{2 * level + 1}.{0 if kind == 'resnets' else 1}.{_inner(kind, rest[2:])}"


def _inner(kind: str, rest: list[str]) -> str:
    if kind == "resnets":
        return ".".join([RESNET[rest[0]], *rest[1:]])
    return ".".join(rest)


def _vae(name: str) -> str:
    parts = name.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return name
    side, block, *rest = parts
    if block in ("conv_in", "conv_out", "conv_norm_out"):
        return f"{side}.{block.replace('conv_norm_out', 'norm_out')}.{rest[-1]}"
    if block == "mid_block":
        if rest[0] == "attentions":
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
            return f"{side}.mid.attn_1.{names[rest[2]]}.{rest[-1]}"
        return f"{side}.mid.block_{int(rest[1]) + 1}.{'.'.join(rest[2:]).replace('conv_shortcut', 'nin_shortcut')}"
    way, level = ("down", int(rest[0])) if side == "encoder" else ("up", 3 - int(rest[0]))
    if rest[1] == "resnets":
        end = ".".join(rest[3:]).replace("conv_shortcut", "nin_shortcut")
        return f"{side}.{way}.{level}.block.{rest[2]}.{end}"
    return f"{side}.{way}.{level}.{way}sample.conv.{rest[-1]}"


def _of_text(name: str) -> str:
    """A text encoder's name as transformers wrote it before 5.6, which left an inner model out."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def _open_clip(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    import torch

    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    outside = {"text_model.embeddings.token_embedding.weight": "token_embedding.weight",
               "text_model.embeddings.position_embedding.weight": "positional_embedding",
               "text_model.final_layer_norm.weight": "ln_final.weight",
               "text_model.final_layer_norm.bias": "ln_final.bias"}  # fmt: skip
    state = {_of_text(name): x for name, x in state.items()}
    made = {}
    for name, x in state.items():
        if name == "text_projection.weight":
            made[f"{prefix}text_projection"] = x.T.contiguous()
        elif name in outside:
            made[prefix + outside[name]] = x
        elif "_proj" not in name or "out_proj" in name:
            layer, rest = name.removeprefix("text_model.encoder.layers.").split(".", 1)
            module, end = rest.rsplit(".", 1)
            made[f"{prefix}transformer.resblocks.{layer}.{names[module]}.{end}"] = x
        elif "q_proj" in name:
            layer, end = name.split(".")[3], name.rsplit(".", 1)[1]
            fused = torch.cat([state[name.replace("q_proj", f"{each}_proj")] for each in "qkv"])
            made[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{end}"] = fused
    return made


def save_sd3_whole(folder: Path, emoji: Path, *, t5: bool) -> Path:
    """A diffusers folder of SD 3.5 whose widths are those that a checkpoint's shapes tell: heads of 64, norms of 32."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTokenizer, T5Config, T5EncoderModel

    from .transformers import t5_tokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(emoji / "tokenizer")
    second = CLIPTokenizer.from_pretrained(emoji / "tokenizer", pad_token="!")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=832, pooled_projection_dim=832,
        pos_embed_max_size=24, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 4, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip
    encoder = T5EncoderModel(
        T5Config(vocab_size=64, d_model=832, d_kv=64, d_ff=48, num_layers=2, num_heads=2, use_cache=False,
                 feed_forward_proj="gated-gelu", is_encoder_decoder=False)
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokenizer,
        text_encoder=text(tokenizer, 768, 2, projected=True), tokenizer_2=second,
        text_encoder_2=text(tokenizer, 64, 2, projected=True), tokenizer_3=t5_tokenizer() if t5 else None,
        text_encoder_3=encoder if t5 else None,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def whole_sd3(folder: Path) -> dict[str, Any]:
    """The weights of such a folder as SD 3 was published in one file, its text encoders in it."""
    from safetensors.torch import load_file

    from .original_transformers import original_transformer

    made = {f"model.diffusion_model.{name}": x for name, x in original_transformer(folder, "sd3").items()}
    for name, x in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        attention = ".attentions." in name and name.endswith("weight") and x.ndim == 2
        made[f"first_stage_model.{_vae(name)}"] = x[:, :, None, None].contiguous() if attention else x
    for part, place in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl")):
        if (folder / part / "model.safetensors").is_file():
            for name, x in load_file(folder / part / "model.safetensors").items():
                own = name if place == "t5xxl" else _of_text(name)
                made[f"text_encoders.{place}.transformer.{own}"] = x
    return made
