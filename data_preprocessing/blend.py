"""Several datasets in one run: `0.7 A 0.3 B`, and which of them each row of the run comes from.

The weights are taken as the decimals that they are written as, so the mix repeats: 0.7 and 0.3 make a cycle of
ten rows, seven of A and three of B, spread as evenly as it can be done. Where a row comes from is a function of
its number alone.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from toolkits.foundation.errors import UsageError

LONGEST_CYCLE = 100_000  # rows; it is worked out when a run starts


@dataclass(frozen=True)
class Part:
    """One dataset of a blend and its weight, a positive number."""

    path: Path
    weight: Fraction = Fraction(1)


def parse_blend(said: str | Path) -> tuple[Part, ...]:
    """Read a path, or `WEIGHT PATH WEIGHT PATH ...` with quotes around a path that has spaces.

    Raises UsageError for weights that are not positive, or that only repeat after more than 100,000 rows.
    """
    text = str(said)
    try:
        words = shlex.split(text)
    except ValueError:  # an open quote: then it is no blend
        return (Part(Path(text)),)
    if len(words) < 3 or read_weight(words[0]) is None:  # one weight and one path are a path with a space
        return (Part(Path(text)),)
    weights = [read_weight(word) for word in words[::2]]
    if len(words) % 2 or not all(weight is not None and weight > 0 for weight in weights):
        raise UsageError(f"{text!r} is no blend: it must be WEIGHT PATH WEIGHT PATH ..., with weights above 0")
    parts = tuple(Part(Path(path), weight) for path, weight in zip(words[1::2], weights, strict=True) if weight)
    check_cycle(parts, text)
    return parts


def check_cycle(parts: Sequence[Part], said: str) -> None:
    """Raise UsageError for weights that only repeat after more than 100,000 rows; `said` is what was typed."""
    length = sum(whole_weights(parts))
    if length > LONGEST_CYCLE:
        raise UsageError(
            f"the weights of {said!r} repeat after {length:,} rows, {LONGEST_CYCLE:,} at most: give them fewer digits"
        )


def whole_weights(parts: Sequence[Part]) -> list[int]:
    """Return the smallest whole numbers that stand to each other as the weights do: the rows of one cycle."""
    common = math.lcm(*(part.weight.denominator for part in parts))
    numbers = [int(part.weight * common) for part in parts]
    return [number // math.gcd(*numbers) for number in numbers]


class Mix:
    """Which part each row of a run comes from; `counts` are the rows of each part in one cycle."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self._cycle = _spread(self.counts)
        given = [0] * len(self.counts)
        self._before = []  # for each place, the rows of its part before it
        for part in self._cycle:
            self._before.append(given[part])
            given[part] += 1

    def at(self, place: int) -> tuple[int, int]:
        """Return the part that row `place` of the run comes from, and how many rows it gave before that."""
        cycles, place = divmod(place, len(self._cycle))
        part = self._cycle[place]
        return part, cycles * self.counts[part] + self._before[place]

    def given(self, rows: int) -> list[int]:
        """Return how many rows each part has given when the run has consumed `rows`."""
        cycles, place = divmod(rows, len(self._cycle))
        begun = self._cycle[:place]
        return [cycles * count + begun.count(part) for part, count in enumerate(self.counts)]


def _spread(counts: Sequence[int]) -> list[int]:
    """Return a cycle in which no beginning differs from the weights by a whole row.

    Of the parts that may be next without running too far ahead, the one that has to be next the soonest
    (Tijdeman, "The chairman assignment problem", 1980): no part is ever off by more than 1 - 1 / (2n - 2).
    """
    length, scale = sum(counts), max(1, 2 * len(counts) - 2)
    given, cycle = [0] * len(counts), []
    for place in range(1, length + 1):
        behind = [scale * (count * place - length * got) for count, got in zip(counts, given, strict=True)]
        ready = [part for part, amount in enumerate(behind) if amount >= length or len(counts) == 1]
        part = min(ready, key=lambda part: ((scale - 1) * length - behind[part]) / counts[part])
        given[part] += 1
        cycle.append(part)
    return cycle


def read_weight(word: str) -> Fraction | None:
    """Return the decimal that a word says, exactly; None when it says none."""
    try:
        return Fraction(word) if "/" not in word else None
    except ValueError:
        return None
