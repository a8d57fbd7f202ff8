"""Core attention for the layer spec without Transformer Engine: causal, grouped queries, packed rows."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention(torch.nn.Module):
    """Causal attention within each conversation of a row; a token never sees another conversation.

    Takes query [t, heads, d], key and value [t, groups, d] of the packed `thd` format, or the same as
    [s, b, ..., d] without packing, with heads and groups of this tensor-parallel rank. Returns
    [t, heads * d] or [s, b, heads * d].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if packed_seq_params is None:
            return self._causal(query, key, value)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(*(tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._causal(*part) for part in parts]).squeeze(1)

    def _causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[s, b, heads, d] -> [s, b, heads * d]."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return self.attend(query, key, value, self.scale).permute(2, 0, 1, 3).flatten(2)

    @staticmethod
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        """[b, heads, s, d] and [b, groups, s, d] -> [b, heads, s, d], through the fastest kernel there is."""
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


class ReferenceAttention(PackedAttention):
    """The same by the textbook: softmax(q k^T * scale) v in fp32, no fused kernel (FL=false)."""

    @staticmethod
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        """[b, heads, s, d] and [b, groups, s, d] -> [b, heads, s, d]."""
        repeat = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(repeat, dim=1) for tensor in (k, v))
        scores = (q.float() @ k.float().transpose(-1, -2)) * (scale or q.shape[-1] ** -0.5)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v.float()).to(q.dtype)
