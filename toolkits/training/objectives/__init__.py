"""What the one loop can optimise, by the word behind `temper train`.

A module of this folder makes a `Loss` of a run's settings: from the model's output and the micro batch to sums and
what they are divided by. The step divides the sums of the whole global batch.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ..batches import MicroBatch
    from ..config import TrainConfig

    LossResult = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


class Loss(Protocol):
    """A loss: `unit` is what its mean is over.

    `figures` are the means that it gives beside, with the name of the sum that each is divided by. `uses_reference`:
    it asks what a reference says of the answers. `uses_others`: and what the model says of other prompts' answers.
    """

    unit: str
    figures: Mapping[str, str]
    uses_reference: bool
    uses_others: bool

    def __call__(self, output: "torch.Tensor", /, *, batch: "MicroBatch") -> "LossResult":
        """Return the summed loss, the number of units (int), and detached sums by name.

        These are `loss`, `count` (the units), `trained_tokens`, the `figures` and what they are divided by; their sum
        over all ranks that speak for their tokens is that of the global batch.
        """


@dataclass(frozen=True)
class Objective:
    """A word of `temper train`: its loss, and how the NAME of its runs begins."""

    word: str
    task: str
    help: str
    module: str
    rows: str = "conversations"  # the --rows that its command sets
    groups: tuple[str, ...] = ()  # of settings that are for it, and not for all
    scores: bool = False  # it trains a reward model

    def loss(self, config: "TrainConfig") -> Loss:
        """Return the loss for the settings of a run; imports torch."""
        made: Any = importlib.import_module(f".{self.module}", __name__).make(config)
        return made  # type: ignore[no-any-return]


OBJECTIVES = {
    each.word: each
    for each in (
        Objective("sft", "finetune", "Supervised fine-tuning of all parameters.", "cross_entropy"),
        Objective("pretrain", "pretrain", "Pre-training, or more of it, on plain text.", "cross_entropy", "documents"),
        Objective(
            "dpo",
            "dpo",
            "Learn from pairs of a better and a worse answer: DPO, IPO, SimPO, ORPO and others.",
            "preference",
            "pairs",
            ("reference", "preference"),
        ),
        Objective(
            "kto",
            "kto",
            "Learn from single answers that are good, or are not: KTO.",
            "kto",
            "answers",
            ("reference", "kto"),
        ),
        Objective(
            "reward",
            "reward",
            "Train a reward model on pairs: a score that is higher for the better answer.",
            "bradley_terry",
            "pairs",
            ("reward",),
            scores=True,
        ),
    )
}
