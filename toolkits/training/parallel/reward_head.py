"""A reward model's head: one score a token, in the place of the output layer."""

import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint

from conversion.plan import REWARD_HEAD

from .head import parts


class RewardHead(torch.nn.Module):
    """Scores of hidden states [s, b, h]; every tensor-parallel rank has the whole weight [1, h]."""

    def __init__(self, config: TransformerConfig, *, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.group, self.sequence_parallel = group, config.sequence_parallel
        weight = torch.zeros(1, config.hidden_size, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        # With sequence parallelism each rank sees a part of the tokens: the gradient is summed over TP.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 [b, s], the same on all ranks of the group; `hidden` may be a rank's part of the tokens."""
        scores = TokenScores.apply(hidden.flatten(0, 1), self.weight).view(hidden.shape[:2])
        if self.sequence_parallel:
            # All ranks make the same loss of the scores: the gradient of a rank's own is whole already.
            scores = gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False, group=self.group)
        return scores.t()

    def initialize(self, seed: int) -> None:
        """Draw the weight as Stiennon et al. do (2020, arXiv 2009.01325, appendix B): variance 1 / (h + 1)."""
        values = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.weight.copy_(values / math.sqrt(self.weight.shape[1] + 1))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the weight under the key that a checkpoint has it by."""
        groups = {} if metadata is None else {"dp_cp_group": metadata["dp_cp_group"]}
        sharded = make_sharded_tensor_for_checkpoint(
            self.weight, REWARD_HEAD, prepend_offsets=sharded_offsets, tp_group=self.group, **groups
        )
        return {f"{prefix}weight": sharded}


class TokenScores(torch.autograd.Function):
    """weight hidden of every token, in fp32: hidden [t, h], weight [1, h] -> fp32 [t].

    What is kept for the backward pass is `hidden` as it is, not a wider copy of it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden, weight)
        row = weight[0].float()
        return torch.cat([hidden[part].float() @ row for part in parts(len(hidden))])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        of_hidden, row = torch.empty_like(hidden), weight[0].float()
        of_weight = torch.zeros_like(row)
        for part in parts(len(hidden)):
            of_hidden[part] = torch.outer(grad[part], row)
            of_weight += grad[part] @ hidden[part].float()
        return of_hidden, of_weight[None].to(weight.dtype)
