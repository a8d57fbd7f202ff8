"""Cross entropy of the trained tokens, each times its weight, summed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from ..batches import MicroBatch
from ..config import TrainConfig

if TYPE_CHECKING:
    from . import Loss, LossResult


def make(_config: TrainConfig) -> "Loss":
    """Return the loss: it has no settings."""
    return CrossEntropy()


class CrossEntropy:
    """The mean over the trained tokens; a token's weight changes what it adds, not how many they are."""

    unit: str = "trained token"
    figures: Mapping[str, str] = MappingProxyType({})
    uses_reference = uses_others = False

    def __call__(self, losses: torch.Tensor, *, batch: MicroBatch) -> "LossResult":
        """Return the sum of `losses` [1, t] by the batch's loss mask, and for how many tokens that is not 0."""
        total = (losses.float() * batch.loss_mask).sum()
        trained = batch.loss_mask.count_nonzero().to(torch.int)
        # Cloned: the schedule may divide the loss in place.
        return total, trained, {"loss": total.detach().clone(), "count": trained, "trained_tokens": trained}
