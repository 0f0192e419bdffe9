"""Miniatures of transformer families: real configs, all widths cut down, random weights, as diffusers saves them."""

from __future__ import annotations

from functools import cache
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


# What Qwen3's own does with one turn of a user.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def save_klein(folder: Path, *, distilled: bool = True) -> Path:
    """A diffusers folder of FLUX.2 klein; its text encoder has the layers that are read, and one more."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    with torch.no_grad():
        # Of random weights the prompt would hardly matter.
        for attention in (transformer.transformer_blocks[0].attn, transformer.single_transformer_blocks[0].attn):
            for norm in ("norm_q", "norm_k", "norm_added_k"):
                if hasattr(attention, norm):
                    getattr(attention, norm).weight.mul_(5)
        transformer.transformer_blocks[0].attn.to_out[0].weight.mul_(20)
    # As they are made, the statistics are 0 and 1.
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    tokenizer = qwen_tokenizer()
    Flux2KleinPipeline(
        transformer=transformer, vae=vae, tokenizer=tokenizer, text_encoder=_qwen(len(tokenizer), 28),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), is_distilled=distilled,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def qwen_tokenizer() -> Any:
    """Bytes without merges, the marks of a chat, and the template that Qwen3 has."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[], model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT
    return tokenizer


def _qwen(size: int, layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, head_dim=8,
                    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024)
    )  # fmt: skip


def save_z_image(folder: Path, *, turbo: bool = True) -> Path:
    """A diffusers folder of Z-Image or its Turbo."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    with torch.no_grad():
        # As they are made, these are of any number that lay in memory.
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    tokenizer = qwen_tokenizer()
    ZImagePipeline(
        transformer=transformer, vae=vae, tokenizer=tokenizer, text_encoder=_qwen(len(tokenizer), 3).model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if turbo else 6.0),
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    return folder


def save_sana(folder: Path, *, sprint: bool = False) -> Path:
    """A diffusers folder of SANA or SANA-Sprint, whose autoencoder has 32 pixels for a latent."""
    import diffusers
    import torch
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel, SCMScheduler

    torch.manual_seed(0)
    more: dict[str, Any] = {"guidance_embeds": True} if sprint else {}
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=2, qk_norm="rms_norm_across_heads" if sprint else None, **more,
    )  # fmt: skip
    with torch.no_grad():
        # Of random weights the prompt and the guidance scale would hardly matter.
        for block in transformer.transformer_blocks:
            block.attn2.to_out[0].weight.mul_(10)
            block.attn2.to_q.weight.mul_(5)
        if sprint:
            transformer.time_embed.guidance_embedder.linear_2.weight.mul_(20)
    widths, layers = (8, 8, 8, 8, 16, 16), (1, 1, 1, 1, 1, 1)
    kinds = (*["ResBlock"] * 4, *["EfficientViTBlock"] * 2)
    scales: tuple[tuple[int, ...], ...] = ((), (), (), (), (5,), (5,))
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=layers,
        decoder_layers_per_block=layers, encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        downsample_block_type="Conv", upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = SCMScheduler() if sprint else DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )  # fmt: skip
    tokenizer = gemma_tokenizer()
    getattr(diffusers, "SanaSprintPipeline" if sprint else "SanaPipeline")(
        transformer=transformer, vae=vae, tokenizer=tokenizer, text_encoder=_gemma(len(tokenizer)), scheduler=scheduler
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def gemma_tokenizer() -> Any:
    """Bytes, letters and a few words, with the marks that Gemma has."""
    from transformers import GemmaTokenizer

    marks = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    letters = sorted({*LETTERS, *LETTERS.upper(), *"▁\n>():'"})
    words = {token: n for n, token in enumerate((*marks, *(f"<0x{n:02X}>" for n in range(256)), *letters))}
    merges = []
    # Of a word's letters, as byte-pair encoding has them.
    for word in ("▁red", "▁apple", "▁glossy", "▁the"):
        for end in range(2, len(word) + 1):
            if word[:end] not in words:
                words[word[:end]] = len(words)
                merges.append((word[: end - 1], word[end - 1]))
    return GemmaTokenizer(vocab=words, merges=merges, model_max_length=1024, add_bos_token=True)


def _gemma(size: int) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    # Norms behind its layers make their outputs as large as 1, whatever its embeddings are.
    return Gemma2Model(
        Gemma2Config(vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8,
                     num_attention_heads=2, num_key_value_heads=1, query_pre_attn_scalar=8,
                     initializer_range=0.5)
    )  # fmt: skip


@cache
def diffusers_klein(source: Path) -> Any:
    """diffusers' own pipeline of a folder, which is opened once."""
    import diffusers

    pipeline = diffusers.Flux2KleinPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
