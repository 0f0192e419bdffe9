"""The attention of an IP-Adapter in a form that can be traced: the weight is an input, and no branch depends on it.

diffusers' own attention leaves out what has the weight 0, which a trace would keep or lose for good.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend


class DecoupledAttention(nn.Module):
    """softmax(Q K') V + weight * softmax(Q K_ip') V_ip (Ye et al. 2023, arXiv:2308.06721, equation 5).

    `encoder_hidden_states` are words [B, S, C], tokens of pictures [B, N, C] and their weight [1].
    """

    def __init__(self, to_k_ip: nn.Module, to_v_ip: nn.Module) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = to_k_ip, to_v_ip

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor, Tensor],
        attention_mask: None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        words, tokens, weight = encoder_hidden_states

        def heads(x: Tensor) -> Tensor:
            split: Tensor = x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return split

        queries = heads(attn.to_q(hidden_states))
        attended = attend(queries, heads(attn.to_k(words)), heads(attn.to_v(words)))
        # The values are few: the weight costs least there.
        attended = attended + attend(queries, heads(self.to_k_ip(tokens)), heads(self.to_v_ip(tokens) * weight))
        output: Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        return output


def traceable(unet: Any) -> Any:
    """`unet`, that has an adapter as `edge_sd.bundle.ip_adapter.attach` gives it, with this attention in its place."""
    processors = {
        name: DecoupledAttention(each.to_k_ip[0], each.to_v_ip[0]) if hasattr(each, "to_k_ip") else each
        for name, each in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    return unet
