"""diffusers folders of published shapes with random weights, written a tensor at a time, so that none needs memory.

Configs are those that the models are published with, as are the types of their weights: bfloat16, in SD 3.5 float16
for text. Of Qwen3 only the 27 layers that FLUX.2 klein reads are written; its config has all 36.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A prime, so that rows of no matrix are alike.
NUMBERS = 16_777_259
KLEIN_LAYERS = 27
# As safetensors calls them.
TYPES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.int64": "I64"}
# What Qwen3's own template does with one turn of a user.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


class Numbers:
    """Normal numbers, of which each tensor begins at another one."""

    def __init__(self) -> None:
        import torch

        self._pool = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
        self._next = 0

    def tensor(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """Weights that keep the size of what they multiply; of norms ones, of biases small numbers."""
        import torch

        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            return torch.ones(shape, dtype=dtype)
        count = math.prod(shape)
        scale = 0.02 if len(shape) < 2 else 1 / math.sqrt(math.prod(shape[1:]))
        pool = (self._pool * scale).to(dtype)
        start, self._next = self._next, (self._next + count + 7919) % NUMBERS
        times = (start + count) // NUMBERS + 1
        return pool.repeat(times)[start : start + count].reshape(shape)


def save(module: Any, folder: Path, stem: str, dtype: Any, numbers: Numbers, layers: int | None = None) -> None:
    """Write config.json and weights of a module on torch's "meta" device; `layers` are the first that are written."""
    folder.mkdir(parents=True)
    config = module.config
    if hasattr(config, "save_pretrained"):
        config.architectures, config.dtype = [type(module).__name__], dtype
        config.save_pretrained(folder)
    else:
        module.save_config(folder)
    # Tied weights are written once.
    tied = getattr(module, "_tied_weights_keys", None) if getattr(config, "tie_word_embeddings", False) else None
    tensors = {
        name: each.to(dtype if each.is_floating_point() else each.dtype)
        for name, each in module.state_dict().items()
        if name not in (tied or ()) and _written(name, layers)
    }
    header, end = {}, 0
    for name, each in tensors.items():
        told = {"dtype": TYPES[str(each.dtype)], "shape": list(each.shape), "data_offsets": [end, end + each.nbytes]}
        header[name], end = told, end + each.nbytes
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    head += b" " * (-len(head) % 8)
    import torch

    with (folder / f"{stem}.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, each in tensors.items():
            values = numbers.tensor(name, tuple(each.shape), each.dtype)
            file.write(values.flatten().view(torch.uint8).numpy())


def _written(name: str, layers: int | None) -> bool:
    number = next((int(each) for each in name.split(".") if each.isdigit()), 0)
    return layers is None or ".layers." not in name or number < layers


def save_klein(folder: Path) -> None:
    """FLUX.2 klein 4B: 14 GB."""
    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    numbers, dtype = Numbers(), torch.bfloat16
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(
            in_channels=128, num_layers=5, num_single_layers=20, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=7680, axes_dims_rope=(32, 32, 32, 32), guidance_embeds=False,
        )  # fmt: skip
        text = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960,
                rope_theta=1_000_000, tie_word_embeddings=True,
            )
        )  # fmt: skip
        vae = AutoencoderKLFlux2()
    save(transformer, folder / "transformer", "diffusion_pytorch_model", dtype, numbers)
    save(text, folder / "text_encoder", "model", dtype, numbers, KLEIN_LAYERS)
    save(vae, folder / "vae", "diffusion_pytorch_model", dtype, numbers)
    _qwen_tokenizer().save_pretrained(folder / "tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.39.0", "is_distilled": True,
             "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
             "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2Tokenizer"],
             "transformer": ["diffusers", "Flux2Transformer2DModel"],
             "vae": ["diffusers", "AutoencoderKLFlux2"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")


def _qwen_tokenizer() -> Any:
    """Bytes without merges, and the marks of a chat: all prompts are filled up to 512 tokens."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[], model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT
    return tokenizer


def save_sd35_medium(folder: Path) -> None:
    """Stable Diffusion 3.5 medium without T5: 7 GB; the tokenizers are the embedded model's."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    from edge_sd.paths import embedded_models

    numbers, dtype = Numbers(), torch.bfloat16
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
            pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        )  # fmt: skip
        first = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                projection_dim=768, hidden_act="quick_gelu",
            )
        )  # fmt: skip
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                projection_dim=1280, hidden_act="gelu",
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
        )  # fmt: skip
    save(transformer, folder / "transformer", "diffusion_pytorch_model", dtype, numbers)
    save(first, folder / "text_encoder", "model", torch.float16, numbers)
    save(second, folder / "text_encoder_2", "model", torch.float16, numbers)
    save(vae, folder / "vae", "diffusion_pytorch_model", dtype, numbers)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    words = embedded_models() / "emoji/tokenizer"
    shutil.copytree(words, folder / "tokenizer")
    CLIPTokenizer.from_pretrained(words, pad_token="!").save_pretrained(folder / "tokenizer_2")
    clip = ["transformers", "CLIPTextModelWithProjection"]
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.39.0",
             "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": clip,
             "text_encoder_2": clip, "text_encoder_3": [None, None], "tokenizer": ["transformers", "CLIPTokenizer"],
             "tokenizer_2": ["transformers", "CLIPTokenizer"], "tokenizer_3": [None, None],
             "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")


# Name -> what makes its folder.
MODELS: dict[str, Callable[[Path], None]] = {"klein": save_klein, "sd35": save_sd35_medium}


def ready(home: Path, name: str) -> Path:
    """The model's folder in `home`, made where it is not there."""
    folder, making = home / name / "source", home / name / ".source"
    if not folder.is_dir():
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        MODELS[name](making)
        making.rename(folder)
    return folder
