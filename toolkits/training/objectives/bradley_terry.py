"""The loss of a reward model: of the two answers of a pair, the better one has the higher score."""

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

from ..batches import MicroBatch
from ..config import TrainConfig
from ..parallel.sequences import scores_of
from ..settings import RewardSettings
from .answers import summed

if TYPE_CHECKING:
    from . import LossResult


def make(config: TrainConfig) -> "BradleyTerry":
    """Return the loss for the settings of a run."""
    return BradleyTerry(config.reward)


def pair_losses(chosen: torch.Tensor, rejected: torch.Tensor, settings: RewardSettings) -> torch.Tensor:
    """Return the loss of each pair, fp32 [pairs], of the scores [pairs] of the better and the worse answers.

    -log s(r_c - r_r) with s the logistic function: the model of Bradley and Terry (1952), in which an answer wins with
    the probability s(r_c - r_r), as in Ouyang et al. (2022, arXiv 2203.02155, eq. 1). --center-rewards adds so many
    times (r_c + r_r)^2 (Eisenstein et al., 2023, arXiv 2312.09244, eq. 2), since a constant changes nothing else.
    """
    losses = -logsigmoid(chosen - rejected)
    return losses + settings.center_rewards * (chosen + rejected) ** 2 if settings.center_rewards else losses


class BradleyTerry:
    """The mean of `pair_losses` over the pairs; accuracy is the share of pairs whose better answer scores higher."""

    unit = "pair"
    figures = dict.fromkeys(("accuracy", "margin", "rewards/chosen", "rewards/rejected"), "count")
    uses_reference = uses_others = False

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings

    def __call__(self, scores: torch.Tensor, *, batch: MicroBatch) -> "LossResult":
        """Return the summed loss of the pairs in a micro batch, given the score fp32 [1, t] of every token."""
        assert batch.answers is not None
        # Better and worse in turn.
        chosen, rejected = scores_of(scores, batch).view(-1, 2).unbind(dim=1)
        with torch.no_grad():
            told = {
                "accuracy": (chosen > rejected).float(),
                "margin": chosen - rejected,
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
            }
        return summed(pair_losses(chosen, rejected, self.settings), told, batch)
