"""Rendered rows on their way to the encoder: what the model reads, and which characters of it are trained."""

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from .masks import Frame, Run, Span

NOTHING = Frame(0, 0, (), (), ())


class Rendered(NamedTuple):
    """A row as the model reads it.

    `spans` are the trained characters, ascending, and `marks` what the mask holds in each, 1 where nobody says;
    `num_control_tokens` counts the control tokens that `text` holds,
    `num_control_texts` the texts in messages that only look like some: when there are any, `text` holds them hidden
    (see control_text.py).
    """

    text: str
    spans: Sequence[Span]
    num_control_tokens: int
    num_control_texts: int = 0
    marks: Sequence[int] = ()


class RenderedRows:
    """Rendered rows in columns, where what rows have in common is kept once.

    `texts` [rows] and `runs` are what the encoder and the mask need, `sizes` the UTF-8 bytes of the contents in the
    frames of `runs`. A row with hidden control text is in `hidden`, by its number, and empty here.
    """

    def __init__(self, rows: Iterable[Rendered] = ()) -> None:
        self.texts: list[str] = []
        self.runs: list[Run] = []
        self.sizes: list[int] = []
        self.hidden: dict[int, Rendered] = {}
        self.extend(rows)

    def __len__(self) -> int:
        return len(self.texts)

    def extend(self, rows: Iterable[Rendered]) -> None:
        """Add rows that have nothing in common."""
        for row in rows:
            if row.num_control_texts:
                self.hidden[len(self.texts)] = row
                self.texts.append("")
                self.runs.append((NOTHING, 1))
            else:
                self.texts.append(row.text)
                self.runs.append((Frame.around(row.text, row.spans, row.marks, row.num_control_tokens), 1))

    def extend_alike(self, frame: Frame, texts: Sequence[str], sizes: Sequence[int]) -> None:
        """Add rows of one frame whose contents have `sizes`."""
        self.texts += texts
        self.sizes += sizes
        self.runs.append((frame, len(texts)))

    def some(self, numbers: Container[int]) -> Iterator[tuple[int, Rendered]]:
        """Yield the rows of these numbers, in order."""
        row = first = 0
        for frame, count in self.runs:
            for _ in range(count):
                if row in numbers:
                    sizes = self.sizes[first : first + frame.num_contents]
                    yield row, self.hidden.get(row) or _unfilled(self.texts[row], frame, sizes)
                row, first = row + 1, first + frame.num_contents


def _unfilled(text: str, frame: Frame, sizes: Sequence[int]) -> Rendered:
    """Return the row that became of a frame with contents of `sizes` bytes."""
    data, before = text.encode(), [0, *accumulate(sizes)]
    edges = [edge + before[slot] for edge, slot in zip(frame.edges, frame.slots, strict=True)]
    places = [len(data[:edge].decode()) for edge in edges]
    spans = list(zip(places[::2], places[1::2], strict=True))
    return Rendered(text, spans, frame.num_control_tokens, 0, frame.marks)
