"""Faster ways to compute the same result on particular processors, for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def multiplies_bfloat16(device: str) -> bool:
    """Whether the hardware of `device` multiplies in bfloat16; a CPU that does not emulates it, thirty times slower."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: str) -> torch.autocast:
    """bfloat16 where the hardware multiplies in it; a CPU that does not would emulate it, thirty times slower."""
    return torch.autocast(device, torch.bfloat16, enabled=multiplies_bfloat16(device))


def plain_attention(model: Any, device: str) -> Any:
    """`model` of diffusers with its attention written out where that is faster: softmax(q k^T) v, step by step.

    A CPU's fused kernel is as fast forwards, but a UNet's backward pass takes twice as long with it. Pictures here are
    small: the scores that it saves the memory of are a few MB.
    """
    from diffusers.models.attention_processor import AttnProcessor

    if device == "cpu":
        model.set_attn_processor(AttnProcessor())
    return model


def plain_norms(model: Any, device: str) -> Any:
    """`model`, in channels_last, with its group norms computed in channels' order, where their gradient is fast.

    In channels_last and bfloat16 it took 40 % of a step on a CPU. What comes out is put back: convolutions hand on the
    order that they meet, and the gradient of a norm comes in that of what follows it.
    """

    def back(_: Any, given: Any, out: Tensor) -> Tensor:
        return out.contiguous(memory_format=torch.channels_last) if out.ndim == 4 else out

    for module in model.modules() if device == "cpu" else ():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, given: given[0].contiguous())
            module.register_forward_hook(back)
    return model
