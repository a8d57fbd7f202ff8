"""RMSNorm for the layer spec without Transformer Engine; megatron-core's own refuses sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from .fused import fused


@fused
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 2019), in fp32 inside."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


class RMSNorm(torch.nn.Module):
    """`rms_norm` with a weight: input and output are [..., hidden_size] in the model's number format."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # With sequence parallelism each rank sees a part of the tokens: the gradient is summed over TP.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
