"""A figure over the steps of a run."""

import math
from dataclasses import dataclass, field
from typing import Any

SHOWN = 200  # points that a reader gets; metrics.jsonl has them all


@dataclass
class Series:
    """(step, value) of one figure, in the order of steps."""

    points: list[tuple[int, float]] = field(default_factory=list)
    lowest: float = math.inf

    def add(self, step: int, value: float) -> None:
        """Add the value of a step later than those before."""
        self.points.append((step, value))
        self.lowest = min(self.lowest, value)

    def summary(self) -> dict[str, Any]:
        """Return the newest and the lowest value and at most SHOWN + 1 points, evenly spread, as JSON knows them."""
        every = math.ceil(len(self.points) / SHOWN) or 1
        shown = self.points[::every]
        if self.points and shown[-1] != self.points[-1]:
            shown.append(self.points[-1])
        return {
            "newest": _finite(self.points[-1][1]) if self.points else None,
            "lowest": _finite(self.lowest),
            "history": [[step, value] for step, value in shown if math.isfinite(value)],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
