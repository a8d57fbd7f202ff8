"""What the one loop can optimise, by the word behind `temper train`.

A loss is a module of this folder with `loss`: from the model's output and the micro batch to (summed loss,
number of trained tokens, figures). The step divides the sums of the whole global batch.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Objective:
    """A word of `temper train`: its loss, and how the NAME of its runs begins."""

    word: str
    task: str
    help: str
    module: str
    rows: str = "conversations"  # the --rows that its command sets

    @property
    def loss(self) -> Callable[..., Any]:
        """The loss; imports torch."""
        return importlib.import_module(f".{self.module}", __name__).loss  # type: ignore[no-any-return]


OBJECTIVES = {
    each.word: each
    for each in (
        Objective("sft", "finetune", "Supervised fine-tuning of all parameters.", "cross_entropy"),
        Objective("pretrain", "pretrain", "Pre-training, or more of it, on plain text.", "cross_entropy", "documents"),
    )
}
