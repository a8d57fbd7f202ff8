"""Cross entropy of the trained tokens, summed."""

import torch

from ..batches import MicroBatch

LossResult = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def loss(losses: torch.Tensor, *, batch: MicroBatch) -> LossResult:
    """Return the sum of `losses` [1, t] where the batch's loss mask is 1, and how many those are."""
    total = (losses.float() * batch.loss_mask).sum()
    trained = batch.loss_mask.sum().to(torch.int)
    # Cloned: the schedule may divide the loss in place.
    return total, trained, {"loss": total.detach().clone(), "trained_tokens": trained.clone()}
