"""Core attention for the layer spec without Transformer Engine: causal, grouped queries, packed rows."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from .context import PackedShare


@dataclass(frozen=True)
class Pieces:
    """Queries in pieces, each with its keys: its last query attends to all of them, the one before to all but one...

    int32 [pieces + 1] bounds along the queries and along the keys, and the longest piece of either.
    """

    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    longest_query: int
    longest_key: int


class PackedAttention(torch.nn.Module):
    """Causal attention within each conversation of a row; a token never sees another conversation.

    Takes query [t, heads, d], key and value [t, groups, d] of the packed `thd` format, or the same as
    [s, b, ..., d] without packing, with heads and groups of this tensor-parallel rank and tokens of this
    context-parallel rank. Returns [t, heads * d] or [s, b, heads * d].
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
        packed = packed_seq_params
        if packed is None:
            query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            return self.attend(query, key, value, self.scale).permute(2, 0, 1, 3).flatten(2)
        if isinstance(packed, PackedShare):
            key, value = (_of_all_ranks(tensor)[packed.keys] for tensor in (key, value))
            pieces = Pieces(packed.query_bounds, packed.key_bounds, packed.longest_query, packed.longest_key)
        else:
            bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
            pieces = Pieces(bounds, bounds, longest, longest)
        return self.attend_pieces(query, key, value, pieces).flatten(1)

    def attend_pieces(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: Pieces) -> torch.Tensor:
        """[t, heads, d], twice [keys, groups, d] -> [t, heads, d]: in one kernel on a GPU, else piece by piece."""
        if not q.is_cuda or q.dtype == torch.float32:
            return self._one_by_one(q, k, v, pieces)
        from torch.nn.attention.varlen import varlen_attn

        width = v.shape[-1]  # latent attention's values are narrower than its keys, which the kernel does not take
        attended = varlen_attn(
            q,
            k,
            torch.nn.functional.pad(v, (0, q.shape[-1] - width)),
            pieces.query_bounds,
            pieces.key_bounds,
            pieces.longest_query,
            pieces.longest_key,
            scale=self.scale,
            window_size=(-1, 0),  # causal, aligned at the last query and the last key
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return attended[..., :width]  # type: ignore[no-any-return]

    def _one_by_one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: Pieces) -> torch.Tensor:
        query_lengths, key_lengths = pieces.query_bounds.diff().tolist(), pieces.key_bounds.diff().tolist()
        parts = zip(
            *(x.transpose(0, 1).unsqueeze(0).split(n, 2) for x, n in ((q, query_lengths), (k, key_lengths))),
            v.transpose(0, 1).unsqueeze(0).split(key_lengths, 2),
            strict=True,
        )
        return torch.cat([self.attend(*part, self.scale) for part in parts], 2).squeeze(0).transpose(0, 1)

    @staticmethod
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        """[b, heads, q, d] and [b, groups, k, d] -> [b, heads, q, d], through the fastest kernel there is."""
        causal: Any = {"is_causal": True}
        if q.shape[2] != k.shape[2]:
            causal = {"attn_mask": causal_lower_right(q.shape[2], k.shape[2])}
        return scaled_dot_product_attention(q, k, v, **causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


class ReferenceAttention(PackedAttention):
    """The same by the textbook: softmax(q k^T * scale) v in fp32, no fused kernel (FL=false)."""

    def attend_pieces(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: Pieces) -> torch.Tensor:
        """[t, heads, d], twice [keys, groups, d] -> [t, heads, d]."""
        return self._one_by_one(q, k, v, pieces)

    @staticmethod
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        """[b, heads, q, d] and [b, groups, k, d] -> [b, heads, q, d]."""
        repeat = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(repeat, dim=1) for tensor in (k, v))
        scores = (q.float() @ k.float().transpose(-1, -2)) * (scale or q.shape[-1] ** -0.5)
        later = scores.shape[-1] - scores.shape[-2]
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + later)
        return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v.float()).to(q.dtype)


def _of_all_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """[t, ...] of this context-parallel rank -> [CP * t, ...], rank by rank; gradients are summed on the way back."""
    return gather_from_sequence_parallel_region(
        tensor.contiguous(), tensor_parallel_output_grad=True, group=parallel_state.get_context_parallel_group()
    )
