"""Miniatures of the whole family: real configs, all widths cut down, random weights, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

TOKENS = 32
# Of Playground 2.5's latents.
NORMALIZED: dict[str, Any] = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
}  # fmt: skip


def save_family(name: str, folder: Path, emoji: Path) -> Path:
    """A diffusers folder of a family by one of its names: "sd2", "sdxl", its "refiner", "playground", "turbo", …

    "shuffle" has a ControlNet that returns means, "controlled-inpaint" one beside a UNet of nine channels; "two-nets"
    has two.
    """
    import diffusers
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(emoji / "tokenizer")
    xl = name in ("sdxl", "refiner", "playground")
    # SD 2's encoder has GELU and is one layer shorter than the one that it was cut from.
    text: dict[str, Any] = {"hidden_act": "gelu"} if name == "sd2" else {}
    parts: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": _text_encoder(tokenizer, 32, **text)}
    unet: dict[str, Any] = {"cross_attention_dim": 32}
    if xl:
        second = CLIPTokenizer.from_pretrained(emoji / "tokenizer", pad_token="!")
        parts |= {"tokenizer_2": second, "text_encoder_2": _text_encoder(tokenizer, 48, projected=24)}
        # Six embedded numbers of 8 values each beside the pooled text.
        unet = {"cross_attention_dim": 80, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 24 + 6 * 8, "use_linear_projection": True}  # fmt: skip
    if name == "refiner":
        # The second encoder alone, and five numbers.
        del parts["tokenizer"], parts["text_encoder"]
        unet |= {"cross_attention_dim": 48, "projection_class_embeddings_input_dim": 24 + 5 * 8}
    if name == "lcm":
        unet["time_cond_proj_dim"] = 16
    if name == "distilled":
        unet["mid_block_type"] = None
    parts["unet"] = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64),
        in_channels={"inpaint": 9, "controlled-inpaint": 9, "instruct": 8}.get(name, 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, attention_head_dim=4, norm_num_groups=8, **unet,
    )  # fmt: skip
    parts["vae"] = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, scaling_factor=0.7, force_upcast=xl,
        **(NORMALIZED if name == "playground" else {}),
    )  # fmt: skip
    parts["scheduler"] = _scheduler(name, xl)
    if name == "refiner":
        parts |= {"tokenizer": None, "text_encoder": None, "requires_aesthetics_score": True,
                  "force_zeros_for_empty_prompt": False}  # fmt: skip
    if name in ("shuffle", "controlled-inpaint"):
        parts["controlnet"] = _controlnet(parts["unet"], pooled=name == "shuffle")
    if name == "two-nets":
        parts["controlnet"] = [_controlnet(parts["unet"], pooled=False) for _ in range(2)]
    kinds = {
        "instruct": "InstructPix2PixPipeline",
        "shuffle": "ControlNetPipeline",
        "two-nets": "ControlNetPipeline",
        "controlled-inpaint": "ControlNetInpaintPipeline",
        "sdxl": "XLPipeline",
        "playground": "XLPipeline",
        "refiner": "XLImg2ImgPipeline",
        "inpaint": "InpaintPipeline",
    }
    kind = f"StableDiffusion{kinds.get(name, 'Pipeline')}" if name != "lcm" else "LatentConsistencyModelPipeline"
    if not xl:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    getattr(diffusers, kind)(**parts).save_pretrained(folder, safe_serialization=True)
    return folder


def _controlnet(unet: Any, pooled: bool) -> Any:
    import torch
    from diffusers import ControlNetModel

    plain = {**unet.config, "in_channels": 4, "block_out_channels": unet.config.block_out_channels}
    net = ControlNetModel(
        **{name: plain[name] for name in ("in_channels", "block_out_channels", "down_block_types", "layers_per_block",
                                          "attention_head_dim", "norm_num_groups", "cross_attention_dim")},
        conditioning_embedding_out_channels=(4, 8, 8, 8), global_pool_conditions=pooled,
    )  # fmt: skip
    for parameter in net.parameters():
        # Zero convolutions as they are would hide every mistake.
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def _text_encoder(tokenizer: Any, width: int, projected: int | None = None, **more: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, projection_dim=projected or width, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **more,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def _scheduler(name: str, xl: bool) -> Any:
    from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler

    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if name == "lcm":
        return LCMScheduler(**betas, original_inference_steps=50)
    if name == "playground":
        return EDMDPMSolverMultistepScheduler()
    if xl or name == "turbo":
        spacing = {"steps_offset": 1} if xl else {"timestep_spacing": "trailing"}
        return EulerDiscreteScheduler(**betas, **spacing)
    kind = "v_prediction" if name == "sd2" else "epsilon"
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=kind)


def drawing(width: int, height: int, ink: str) -> Image.Image:
    """A disc on a slope of greys, of any proportions."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), ink)
    return image


def picture() -> Image.Image:
    """A green disc on cream, 64 x 64."""
    image = Image.new("RGB", (64, 64), (250, 240, 200))
    ImageDraw.Draw(image).ellipse((14, 16, 50, 52), (40, 160, 60))
    return image


def half() -> Image.Image:
    """A mask of its right half."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    return mask
