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


def scores_of(scores: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return the score of each answer's end, fp32 [n].

    `scores` [1, t] are those of this rank's share of the tokens. Each rank gets the scores of all answers, and the
    gradient of its own.
    """
    assert batch.answers is not None
    places, ends = batch.answers.places, batch.answers.ends
    bounds, size = batch.packed.cu_seqlens_q.long(), parallel_state.get_context_parallel_world_size()
    if size == 1:
        return scores[0, bounds[places] + ends]
    # Pieces of a sequence from its front and from its back; see context.py.
    piece = bounds.diff()[places] // (2 * size)
    number = ends // piece
    behind = number >= size
    mine = torch.where(behind, 2 * size - 1 - number, number) == parallel_state.get_context_parallel_rank()
    at = bounds[places] // size + behind * piece + ends % piece
    found = torch.where(mine, scores[0, at], 0.0)
    return reduce_from_tensor_model_parallel_region(found, group=parallel_state.get_context_parallel_group())


def is_first_share() -> bool:
    """Whether this rank is the first of those that share its rows' tokens."""
    return parallel_state.get_context_parallel_rank() == 0
