"""Losses of pairs of answers, a better and a worse one to the same prompt: DPO and its family.

Every loss is a function of the summed log-probabilities of the two answers' trained tokens, of the same under a
reference where it has one, and of how many tokens they are. The step's loss is the mean over its pairs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid, relu

from ..batches import MicroBatch
from ..config import TrainConfig
from ..parallel.sequences import log_probs
from ..settings import PreferenceSettings
from .answers import summed

if TYPE_CHECKING:
    from . import LossResult


CERTAIN = -1e-6  # the largest log-probability of which the odds are a number


@dataclass(frozen=True)
class Side:
    """The better or the worse answers, fp32 [pairs] each.

    `log_prob` sums the log-probabilities of an answer's trained tokens, `reference` is the same under the reference,
    `tokens` is how many they are.
    """

    log_prob: torch.Tensor
    reference: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """The log-probability of a token."""
        return self.log_prob / self.tokens

    @property
    def ratio(self) -> torch.Tensor:
        """How much more probable the answer is than under the reference, as a logarithm."""
        return self.log_prob - self.reference


def make(config: TrainConfig) -> "Preference":
    """Return the loss for the settings of a run."""
    return Preference(config.preference, config.reference.beta)


def pair_losses(chosen: Side, rejected: Side, settings: PreferenceSettings, beta: float) -> torch.Tensor:
    """Return the loss of each pair, fp32 [pairs].

    With d the difference of `score` between the two answers, e the label smoothing and s the logistic function:

    sigmoid  -(1 - e) log s(beta d) - e log s(-beta d): DPO (Rafailov et al., 2023, arXiv 2305.18290, eq. 7), with e
             above 0 conservative DPO (Mitchell, 2023)
    hinge    max(0, 1 - beta d): SLiC (Zhao et al., 2023, arXiv 2305.10425) as in RSO (Liu et al., 2023, 2309.06657)
    ipo      (d - 1 / (2 beta))^2 with d a token: IPO (Azar et al., 2023, arXiv 2310.12036, eq. 17), and its authors'
             advice to divide by the length
    robust   (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e) (Chowdhury et al., 2024, arXiv 2403.00409, eq. 12)
    simpo    -log s(beta d - gamma), d a token and without reference (Meng et al., 2024, arXiv 2405.14734, eq. 6)
    orpo     the chosen answer's negative log-probability a token, minus beta log s(log odds ratio), without reference
             (Hong et al., 2024, arXiv 2403.07691, eq. 6 and 7)

    --sft-weight adds the chosen answer's negative log-probability a token (RPO; Pang et al., 2024, arXiv 2404.19733).
    """
    smoothing, name = settings.label_smoothing, settings.preference_loss
    difference = score(chosen, settings) - score(rejected, settings)
    right, wrong = -logsigmoid(beta * difference), -logsigmoid(-beta * difference)
    if name == "sigmoid":
        losses = (1 - smoothing) * right + smoothing * wrong
    elif name == "hinge":
        losses = relu(1 - beta * difference)
    elif name == "ipo":
        losses = (difference - 1 / (2 * beta)) ** 2
    elif name == "robust":
        losses = ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    elif name == "simpo":
        losses = -logsigmoid(beta * difference - settings.simpo_margin)
    else:
        assert name == "orpo"
        log_odds = difference - (_log_one_minus(chosen.mean) - _log_one_minus(rejected.mean))
        losses = -chosen.mean - beta * logsigmoid(log_odds)
    return losses - settings.sft_weight * chosen.mean if settings.sft_weight else losses


def score(side: Side, settings: PreferenceSettings) -> torch.Tensor:
    """Return what a loss compares of two answers: a log-ratio to the reference, or without one a log-probability."""
    if not settings.uses_reference:
        return side.mean
    normalized = settings.length_normalized or settings.preference_loss == "ipo"
    return side.ratio / side.tokens if normalized else side.ratio


def _log_one_minus(log_prob: torch.Tensor) -> torch.Tensor:
    """Return log(1 - p) for log p of at most 0; of an answer that is certain, that of one that nearly is."""
    return torch.log1p(-torch.exp(log_prob.clamp(max=CERTAIN)))


class Preference:
    """The mean of `pair_losses` over the pairs, and what people watch.

    Of the figures, a reward is beta times the score, the margin is the difference of the rewards of a pair, accuracy
    the share of pairs with a margin above 0; kl is the mean of log p / p_reference of a token over both answers;
    falling is the share of pairs whose better answer is less probable than under the reference.
    """

    unit = "pair"
    uses_others = False

    def __init__(self, settings: PreferenceSettings, beta: float) -> None:
        self.settings, self.beta = settings, beta
        self.uses_reference = settings.uses_reference
        names = ["accuracy", "margin", "rewards/chosen", "rewards/rejected", "log_probs/chosen", "log_probs/rejected"]
        names += ["length_difference", *(["kl", "falling"] if self.uses_reference else [])]
        self.figures = dict.fromkeys(names, "count")

    def __call__(self, losses: torch.Tensor, *, batch: MicroBatch) -> "LossResult":
        """Return the summed loss of the pairs in a micro batch, given the cross entropy [1, t] of its tokens."""
        assert batch.answers is not None
        sums, tokens = log_probs(losses, batch)
        # Better and worse in turn.
        each = (sums, batch.answers.reference, tokens)
        chosen, rejected = (Side(*(value.view(-1, 2)[:, side] for value in each)) for side in (0, 1))
        of_pairs = pair_losses(chosen, rejected, self.settings, self.beta)
        return summed(of_pairs, self._figures(chosen, rejected), batch)

    @torch.no_grad()
    def _figures(self, chosen: Side, rejected: Side) -> dict[str, torch.Tensor]:
        """Return the figures of each pair [pairs] by name."""
        rewards = [self.beta * (side.ratio if self.uses_reference else side.mean) for side in (chosen, rejected)]
        figures = {
            "accuracy": (rewards[0] > rewards[1]).float(),
            "margin": rewards[0] - rewards[1],
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "log_probs/chosen": chosen.log_prob,
            "log_probs/rejected": rejected.log_prob,
            "length_difference": chosen.tokens - rejected.tokens,
        }
        if self.uses_reference:
            figures["kl"] = (chosen.ratio + rejected.ratio) / (chosen.tokens + rejected.tokens)
            figures["falling"] = (chosen.ratio < 0).float()
        return figures
