"""Miniatures of transformer families: real configs, all widths cut down, random weights, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .families import _text_encoder

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-!'"
WORDS = ("▁a", "▁red", "▁apple", "▁glossy", "▁style", "▁green", "▁pear", "▁the")


def save_sd3(folder: Path, emoji: Path, *, t5: bool = True, dual: bool = False) -> Path:
    """A diffusers folder of SD 3; a `dual` one is 3.5 medium's, with norms of queries and a second self-attention."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(emoji / "tokenizer")
    second = CLIPTokenizer.from_pretrained(emoji / "tokenizer", pad_token="!")
    more: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if dual else {}
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=24,
        pos_embed_max_size=24, **more,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, norm_num_groups=4, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer, text_encoder=_text_encoder(tokenizer, 16, projected=8),
        tokenizer_2=second, text_encoder_2=_text_encoder(tokenizer, 12, projected=16),
        tokenizer_3=t5_tokenizer() if t5 else None, text_encoder_3=_t5(32) if t5 else None,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def t5_tokenizer() -> Any:
    """A vocabulary of letters and a few words, each with its score."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary = [*special, *((letter, -6.0) for letter in LETTERS), *((word, -2.0) for word in WORDS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                 feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
    )  # fmt: skip
