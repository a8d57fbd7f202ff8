"""Multi-latent attention without Transformer Engine: where megatron-core's own loses a part of a gradient."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class LatentAttention(MLASelfAttention):
    """MLASelfAttention whose positional key gets its gradient from the heads of all tensor-parallel ranks.

    That key is shared by all heads. With the columns of its projection on several ranks, megatron-core gathers
    them and hands each rank back the gradient of its own heads only. Given every column and a share of the
    tokens, as Transformer Engine's linear gives them, it gathers the tokens and sums the gradients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.tensor_model_parallel_size > 1:
            assert self.config.sequence_parallel, "layout_problems asks for it"
            self.linear_kv_down_proj.__class__ = _EveryColumn  # the constructor takes megatron-core's classes only


class _EveryColumn(ColumnParallelLinear):
    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """[s / TP, b, in] -> [s / TP, b, out]."""
        columns, _ = super().forward(input_, *args, **kwargs)
        return self.behind(columns), None

    def behind(self, columns: torch.Tensor) -> torch.Tensor:
        """[s, b, out / TP] -> [s / TP, b, out]."""
        return scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(columns))
