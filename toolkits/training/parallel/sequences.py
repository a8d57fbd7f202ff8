"""What is asked of the whole sequences of a micro batch, wherever their tokens are."""

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from ..batches import MicroBatch


def log_probs(losses: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each answer's trained tokens and how many they are, both fp32 [n].

    `losses` [1, t] is the cross entropy of this rank's share of the tokens. Each rank gets the sums of all shares,
    and the gradient of its own.
    """
    assert batch.answers is not None
    shares = parallel_state.get_context_parallel_world_size()
    # A rank holds an equal share of every sequence, sequence after sequence.
    lengths = batch.packed.cu_seqlens_q.diff().long() // shares
    mask = batch.loss_mask[0]
    values = torch.stack([-losses[0].float() * mask, mask], dim=1)
    sums = torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)[batch.answers.places]
    if shares > 1:
        sums = reduce_from_tensor_model_parallel_region(sums, group=parallel_state.get_context_parallel_group())
    return sums[:, 0], sums[:, 1].detach()


def is_first_share() -> bool:
    """Whether this rank is the first of those that share its rows' tokens."""
    return parallel_state.get_context_parallel_rank() == 0
