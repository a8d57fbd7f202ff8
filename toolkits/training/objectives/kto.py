"""Kahneman-Tversky optimisation: single answers, each good or not (Ethayarajh et al., 2024, arXiv 2402.01306)."""

from typing import TYPE_CHECKING

import torch

from ..batches import MicroBatch
from ..config import TrainConfig
from ..parallel.sequences import log_probs
from ..settings import KtoSettings
from .answers import summed

if TYPE_CHECKING:
    from . import LossResult


def make(config: TrainConfig) -> "Kto":
    """Return the loss for the settings of a run."""
    return Kto(config.kto, config.reference.beta)


def answer_losses(
    ratio: torch.Tensor, good: torch.Tensor, baseline: torch.Tensor, *, beta: float, settings: KtoSettings
) -> torch.Tensor:
    """Return the loss of each answer, fp32 [n] (equations 7 and 8).

    `ratio` [n] is log p / p_reference of the answer, `good` [n] is 1 or 0, `baseline` the same ratio's mean over
    answers to other prompts, at least 0: how far the model is from the reference anyway. With s the logistic function
    a good answer costs w (1 - s(beta (ratio - baseline))), another one w (1 - s(beta (baseline - ratio))).
    """
    gain = beta * (ratio - baseline) * (2 * good - 1)
    weight = torch.where(good.bool(), settings.desirable_weight, settings.undesirable_weight)
    return weight * torch.sigmoid(-gain)


class Kto:
    """The mean of `answer_losses`; rewards are beta times the ratio, kl is the baseline."""

    unit = "answer"
    uses_reference = uses_others = True

    def __init__(self, settings: KtoSettings, beta: float) -> None:
        self.settings, self.beta = settings, beta
        self.figures = {"accuracy": "count", "kl": "count"}
        for name in ("rewards", "log_probs"):
            self.figures |= {f"{name}/chosen": "chosen", f"{name}/rejected": "rejected"}

    def __call__(self, losses: torch.Tensor, *, batch: MicroBatch) -> "LossResult":
        """Return the summed loss of the answers in a micro batch, given the cross entropy [1, t] of its tokens."""
        answers = batch.answers
        assert answers is not None and answers.good is not None and answers.baseline is not None
        sums, _ = log_probs(losses, batch)
        ratio, good, baseline = sums - answers.reference, answers.good, answers.baseline
        of_answers = answer_losses(ratio, good, baseline, beta=self.beta, settings=self.settings)
        with torch.no_grad():
            told = {
                "accuracy": ((ratio > baseline) == good.bool()).float(),
                "kl": baseline.expand(len(good)),
                "rewards/chosen": self.beta * ratio * good,
                "rewards/rejected": self.beta * ratio * (1 - good),
                "log_probs/chosen": sums * good,
                "log_probs/rejected": sums * (1 - good),
                "chosen": good,
                "rejected": 1 - good,
            }
        return summed(of_answers, told, batch)
