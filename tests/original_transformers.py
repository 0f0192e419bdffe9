"""Weights of transformers under the names that their makers publish: the inverse of what diffusers translates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SD3 = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
    "transformer_blocks.": "joint_blocks.", "attn.to_add_out": "context_block.attn.proj",
    "attn.add_qkv": "context_block.attn.qkv", "attn.norm_added_": "context_block.attn.ln_",
    "norm1_context.linear": "context_block.adaLN_modulation.1", "norm1.linear": "x_block.adaLN_modulation.1",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "attn.to_qkv": "x_block.attn.qkv", "attn2.to_qkv": "x_block.attn2.qkv", "attn.norm_": "x_block.attn.ln_",
    "attn2.norm_": "x_block.attn2.ln_", "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj",
}  # fmt: skip
FLUX2 = {
    "x_embedder": "img_in", "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
    "transformer_blocks.": "double_blocks.", "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale", "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale", "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj", "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2", "attn.to_qkv": "img_attn.qkv",
    "attn.add_qkv": "txt_attn.qkv",
}  # fmt: skip
FLUX2_SINGLE = {
    "single_transformer_blocks.": "single_blocks.", "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2",
    "attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale",
}  # fmt: skip
Z_IMAGE = {
    "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
    "attention.to_out.0.": "attention.out.", "attention.norm_": "attention.", "attention.to_qkv": "attention.qkv",
}  # fmt: skip
SANA = {
    "patch_embed.proj": "x_embedder.proj", "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2", "time_embed.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1", "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm", "transformer_blocks.": "blocks.", "attn1.to_qkv": "attn.qkv",
    "attn1.to_out.0": "attn.proj", "attn2.to_q": "cross_attn.q_linear", "attn2.to_kv": "cross_attn.kv_linear",
    "attn2.to_out.0": "cross_attn.proj", "ff.conv_inverted": "mlp.inverted_conv.conv",
    "ff.conv_depth": "mlp.depth_conv.conv", "ff.conv_point": "mlp.point_conv.conv", "proj_out": "final_layer.linear",
}  # fmt: skip
# Layers whose two halves, shift and scale, stand in the other order.
SWAPPED = ("norm_out.linear.weight", "norm_out.linear.bias")


def original_transformer(folder: Path, family: str) -> dict[str, Any]:
    """A miniature's transformer in original names, without a prefix; `family` is "sd3", "flux2", "zimage", "sana"."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    last = max((int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks.")), default=0)
    swapped = SWAPPED if family in ("sd3", "flux2") else ()
    if family == "sd3":
        # The last block's text has no stream to go on in.
        swapped += tuple(f"transformer_blocks.{last}.norm1_context.linear.{end}" for end in ("weight", "bias"))
    for name in swapped:
        if name in tensors:
            tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])
    made = {renamed(name, family): x for name, x in joined(tensors, family).items()}
    if family == "zimage":
        made = {name.replace("attention.q.", "attention.q_norm.").replace("attention.k.", "attention.k_norm."): x
                for name, x in made.items()}  # fmt: skip
        made["norm_final.weight"] = torch.ones(3)
    if family == "sana":
        made = {"final_layer.scale_shift_table" if name == "scale_shift_table" else name: x for name, x in made.items()}
        made |= {"pos_embed": torch.zeros(1, 4, 2), "y_embedder.y_embedding": torch.zeros(4, 2)}
    return {name: x.contiguous() for name, x in made.items()}


def joined(tensors: dict[str, Any], family: str) -> dict[str, Any]:
    """With queries, keys and values as one tensor each, as the makers have them."""
    import torch

    made = {}
    for name, x in tensors.items():
        if family == "flux2" and name.startswith("single_transformer_blocks."):
            made[name] = x
        elif family == "sana" and ".attn2.to_" in name and "to_out" not in name:
            if "to_k" in name:
                made[name.replace("to_k", "to_kv")] = torch.cat([x, tensors[name.replace("to_k", "to_v")]])
            elif "to_q" in name:
                made[name] = x
        elif ".to_q." in name or ".add_q_proj." in name:
            each = [name.replace("to_q", f"to_{letter}").replace("add_q", f"add_{letter}") for letter in "qkv"]
            made[name.replace("to_q.", "to_qkv.").replace("add_q_proj.", "add_qkv.")] = torch.cat(
                [tensors[key] for key in each]
            )
        elif not any(mark in name for mark in (".to_k.", ".to_v.", ".add_k_proj.", ".add_v_proj.")):
            made[name] = x
    return made


def renamed(name: str, family: str) -> str:
    names = {"sd3": SD3, "flux2": FLUX2, "zimage": Z_IMAGE, "sana": SANA}[family]
    if name.startswith("single_transformer_blocks."):
        names = FLUX2_SINGLE
    parts = name.split(".", 2)
    blocks, rest = f"{parts[0]}.", name
    place = ""
    if len(parts) == 3 and parts[1].isdigit():
        place, rest = f"{names.get(blocks, blocks)}{parts[1]}.", parts[2]
    for old, new in names.items():
        if rest.startswith(old):
            return place + new + rest[len(old) :]
    return place + rest
