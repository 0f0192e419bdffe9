"""LoRAs of SD 3 in the names of Stability's own code, as kohya's and ComfyUI's are: joint_blocks_N_x_block_attn_qkv.

diffusers has queries, keys and values in layers of their own, which are each a third of the rows, and two layers whose
scale and shift have changed places. Both are rows of one difference, in another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

# How a module of SD 3 is told, with "_" for "."; the others are so where a file has one of these.
BLOCK = re.compile(r"joint_blocks_(\d+)_(x|context)_block_(.+)")
_OF_X = {
    "attn_proj": "attn_to_out_0", "attn2_proj": "attn2_to_out_0", "mlp_fc1": "ff_net_0_proj", "mlp_fc2": "ff_net_2",
    "adaLN_modulation_1": "norm1_linear",
}  # fmt: skip
_OF_CONTEXT = {
    "attn_proj": "attn_to_add_out", "mlp_fc1": "ff_context_net_0_proj", "mlp_fc2": "ff_context_net_2",
    "adaLN_modulation_1": "norm1_context_linear",
}  # fmt: skip
_FUSED = {
    ("x", "attn_qkv"): "attn_to_{}", ("x", "attn2_qkv"): "attn2_to_{}", ("context", "attn_qkv"): "attn_add_{}_proj",
}  # fmt: skip
_OUTSIDE = {
    "x_embedder_proj": "pos_embed_proj", "context_embedder": "context_embedder", "final_layer_linear": "proj_out",
    "t_embedder_mlp_0": "time_text_embed_timestep_embedder_linear_1",
    "t_embedder_mlp_2": "time_text_embed_timestep_embedder_linear_2",
    "y_embedder_mlp_0": "time_text_embed_text_embedder_linear_1",
    "y_embedder_mlp_2": "time_text_embed_text_embedder_linear_2", "final_layer_adaLN_modulation_1": "norm_out_linear",
}  # fmt: skip


def is_sd3(modules: Iterable[str]) -> bool:
    """Whether the modules of a file are SD 3's in its original names."""
    return any(BLOCK.fullmatch(each) for each in modules)


def placed(module: str, shape: tuple[int, int]) -> dict[str, NDArray[np.int64]]:
    """Modules of diffusers that an original one stands for -> their rows of its difference, which has `shape`.

    A module that is not known has its own name, and all rows.
    """
    rows = np.arange(shape[0])
    found = BLOCK.fullmatch(module)
    if found is None:
        swapped = module == "final_layer_adaLN_modulation_1"
        return {_OUTSIDE.get(module, module): _halves_swapped(rows) if swapped else rows}
    n, stream, rest = found.groups()
    if pattern := _FUSED.get((stream, rest)):
        parts = np.split(rows, 3) if len(rows) % 3 == 0 else [rows] * 3
        return {f"transformer_blocks_{n}_{pattern.format(each)}": part for each, part in zip("qkv", parts, strict=True)}
    if stream == "context" and rest == "adaLN_modulation_1" and shape[0] == 2 * shape[1]:
        # The last block's, which has a scale and a shift alone.
        rows = _halves_swapped(rows)
    name = (_OF_X if stream == "x" else _OF_CONTEXT).get(rest)
    return {f"transformer_blocks_{n}_{name}" if name else module: rows}


def _halves_swapped(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.roll(rows, len(rows) // 2)


def of_rows(tensors: Mapping[str, NDArray[np.float32]], rows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """The tensors of a difference of those rows alone. Raises ValueError for a form whose rows are not apart."""
    if any(name.startswith(("lokr", "hada_t")) for name in tensors):
        raise ValueError("joins layers in one product of Kronecker's or one with a core, which is not taken apart")
    return {name: value[rows] if name in ("up", "diff", "hada_w1_a", "hada_w2_a") else value
            for name, value in tensors.items()}  # fmt: skip
