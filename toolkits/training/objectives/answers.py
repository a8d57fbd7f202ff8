"""What every loss of answers gives, whatever it compares."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..batches import MicroBatch
from ..parallel.sequences import is_first_share

if TYPE_CHECKING:
    from . import LossResult


def summed(losses: torch.Tensor, told: Mapping[str, torch.Tensor], batch: MicroBatch) -> "LossResult":
    """Return the sum of the losses fp32 [n] of a micro batch's units, their number, and the sums of what is told [n].

    Ranks that share a row's tokens all know its answers: the first of them counts them.
    """
    counts = int(is_first_share())
    count = torch.full((), len(losses) * counts, dtype=torch.int, device=losses.device)
    figures = {name: each.detach().sum() * counts for name, each in {"loss": losses, **told}.items()}
    return losses.sum(), count, {**figures, "count": count, "trained_tokens": batch.loss_mask.sum()}
