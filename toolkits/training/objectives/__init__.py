"""What the one loop can optimise, by the word behind `temper train`.

A module of this folder makes a `Loss` of a run's settings: from the model's output and the micro batch to sums and
what they are divided by. The step divides the sums of the whole global batch.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ..batches import MicroBatch
    from ..config import TrainConfig

    LossResult = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


class Loss(Protocol):
    """A loss: `unit` is what its mean is over, `figures` the names of the means that it gives beside."""

    unit: str
    figures: tuple[str, ...]

    def __call__(self, output: "torch.Tensor", /, *, batch: "MicroBatch") -> "LossResult":
        """Return the summed loss, the number of units (int), and detached sums by name.

        These are `loss`, `count` (the units), `trained_tokens` and the `figures`; their sum over all ranks that
        speak for their tokens is that of the global batch.
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
            ("preference",),
        ),
    )
}
