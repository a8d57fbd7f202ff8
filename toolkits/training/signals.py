"""What the figures of preference training say in plain words, and when they say that enough was learned."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

ENDED = "ended.txt"  # in the run's folder when it ended before its last step: the --stop-separated that ended it
WINDOW = 10  # steps that a sentence is about
FALLING = 0.5  # share of pairs


@dataclass
class Signals:
    """Looks at the figures of every step; `stop_separated` is the setting of that name."""

    stop_separated: int = 0
    _falling: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _margin: float = -float("inf")
    _separated: int = 0  # steps in a row with all pairs told apart by a margin that does not shrink
    _said: set[str] = field(default_factory=set)

    def look(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """Take the figures of a step; return what is to be said of them, each thing once a run."""
        if "margin" not in figures:
            return []
        told_apart = figures["accuracy"] == 1.0
        # One global batch is not the next: the margin has to keep half of what it had.
        self._separated = self._separated + 1 if told_apart and figures["margin"] > self._margin / 2 else 0
        self._margin = max(self._margin, figures["margin"]) if told_apart else -float("inf")
        said: dict[str, str] = {}
        if "falling" in figures:
            self._falling.append(figures["falling"])
            share = sum(self._falling) / len(self._falling)
            if len(self._falling) == WINDOW and share > FALLING:
                said["falling"] = (
                    f"step {step}: in {share:.0%} of the pairs of the last {WINDOW} steps the better answer has become "
                    "less probable than it was: the model moves away from both answers. A smaller --lr, a larger "
                    "--beta, or --sft-weight 1 keeps it at the better one"
                )
        if self._separated == (self.stop_separated or WINDOW):
            said["separated"] = (
                f"step {step}: all pairs of the last {self._separated} steps were told apart, by a margin of now "
                f"{figures['margin']:.3g}: nothing more is learned of which answer is better, and something simple may "
                "be all that tells them apart. `temper data check` looks for such shortcuts (length, a phrase)"
            )
        fresh = [sentence for kind, sentence in said.items() if kind not in self._said]
        self._said.update(said)
        return fresh

    @property
    def is_enough(self) -> bool:
        """Whether --stop-separated ends the run."""
        return 0 < self.stop_separated <= self._separated
