"""A curve in a terminal, drawn with braille: eight dots to a character."""

from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[tuple[int, float]]

BLANK = 0x2800  # the braille character without dots
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bit of the dot at [row][column] of a character
MARK = "o"  # a point of validation
LABEL = 10  # columns of a number beside the axis


def draw(losses: Points, validation: Points, *, width: int, height: int = 12) -> list[str]:
    """Return `height` + 2 lines of at most `width` columns: the curve of `losses`, marks at `validation`.

    Points are (step, value), finite, in the order of steps. No line for no points.
    """
    points = [*losses, *validation]
    if not points:
        return []
    columns, lines = max(8, width - LABEL - 2), height * 4
    steps, values = zip(*points, strict=True)
    x = _Scale(min(steps), max(steps), 2 * columns - 1)
    y = _Scale(min(values), max(values), lines - 1)
    cells = [[BLANK] * columns for _ in range(height)]
    for column, row in _line([(x.at(step), lines - 1 - y.at(value)) for step, value in losses]):
        cells[row // 4][column // 2] |= DOTS[row % 4][column % 2]
    drawn = [[chr(cell) for cell in line] for line in cells]
    for step, value in validation:
        drawn[(lines - 1 - y.at(value)) // 4][x.at(step) // 2] = MARK
    labels = {0: y.high, height - 1: y.low}
    rows = [f"{_label(labels.get(row))} │{''.join(line)}".rstrip(chr(BLANK)) for row, line in enumerate(drawn)]
    first, last = str(x.low), str(x.high)
    steps_line = first + last.rjust(columns - len(first)) if last != first else first
    return [*rows, f"{' ' * LABEL} └{'─' * columns}", f"{' ' * LABEL}  {steps_line}"]


class _Scale:
    """Places values from `low` to `high` on 0 ... `top`."""

    def __init__(self, low: float, high: float, top: int) -> None:
        self.low, self.high, self._top = low, high, top

    def at(self, value: float) -> int:
        """Return the place of `value`; the middle when there is only one value."""
        if self.high == self.low:
            return self._top // 2
        return round((value - self.low) / (self.high - self.low) * self._top)


def _line(dots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the dots with those between them, so that neighbours touch."""
    between = list(dots[:1])
    for (x0, y0), (x1, y1) in pairwise(dots):
        count = max(abs(x1 - x0), abs(y1 - y0), 1)
        between += [(x0 + round((x1 - x0) * i / count), y0 + round((y1 - y0) * i / count)) for i in range(1, count + 1)]
    return between


def _label(value: float | None) -> str:
    return " " * LABEL if value is None else f"{value:{LABEL}.4g}"
