"""From datasets on disk to rows of SEQ_LEN tokens: arrays of numbers, no tokens are read.

    dataset -> the documents that are trained on, and how much of each -> rows

A dataset's documents lie end to end in an order that the seed gives, and a row is a stretch of that: whole
conversations for --rows conversations, whole pairs of two answers for --rows pairs, SEQ_LEN tokens whatever they cut
for --rows documents. Memory is a few numbers for each document.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from data_preprocessing.blend import Mix
from data_preprocessing.dataset import Dataset, IndexedDataset
from data_preprocessing.fitting import fit
from data_preprocessing.packing import one_per_row, pack

from ..foundation.errors import DataError
from .layout import Layout
from .mismatched import Mismatched
from .settings import DataSettings, RowKind

HELD_OUT = 0.01  # part of the training data that validates when there is no validation set
# Documents that are never parted.
UNITS: dict[RowKind, int] = {"conversations": 1, "documents": 1, "pairs": 2, "answers": 1}
MANY_EPOCHS = 4  # of the same documents: more teach little (Muennighoff et al., 2023, arXiv 2305.16264)


class Segment(NamedTuple):
    """`length` tokens of a document from `start` on; nothing of another document is ever seen beside them."""

    document: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        """Where the stretch ends."""
        return self.start + self.length


@dataclass(frozen=True)
class Selection:
    """Documents of a dataset, and how many tokens of each are used, both [n, unit].

    `unit` documents belong together in one row: the two answers of a pair.
    """

    dataset: Dataset
    documents: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def hold_out(self, *, seed: int) -> tuple["Selection", "Selection"]:
        """Hold out 1% of the documents, one at least; return (training, validation), each in order.

        Raises DataError when there are fewer than two.
        """
        if len(self) < 2:
            raise DataError(f"{self.dataset.path}: {len(self)} that fits is too few to hold one out for validation")
        count = max(1, round(len(self) * HELD_OUT))
        held_out = np.zeros(len(self), bool)
        held_out[np.random.default_rng([seed, len(self)]).permutation(len(self))[:count]] = True
        training, validation = (
            Selection(self.dataset, self.documents[which], self.lengths[which]) for which in (~held_out, held_out)
        )
        return training, validation


def select(dataset: Dataset, settings: DataSettings) -> tuple[Selection, list[str]]:
    """Return what can be trained on, and a sentence for each thing left out.

    Raises DataError when nothing is left, or when `too_long` is `stop` and a conversation is too long.
    """
    if settings.rows == "documents":
        kept = np.flatnonzero(np.asarray(dataset.lengths) > 1)
        if not len(kept):
            raise DataError(f"{dataset.path}: no document has two tokens: there is nothing to predict")
        short = len(dataset) - len(kept)
        remarks = [f"{dataset.path}: {short:,} documents were left out: they have one token or none"] if short else []
        return Selection(dataset, kept[:, None], np.asarray(dataset.lengths)[kept, None]), remarks
    selection, remarks = (_fitting if settings.rows == "conversations" else _fitting_whole)(dataset, settings)
    if not len(selection):
        what = settings.rows.removesuffix("s")
        raise DataError(f"{dataset.path}: no {what} with a trained token fits --seq-len {settings.seq_len}")
    return selection, remarks


@dataclass(frozen=True)
class SetRows:
    """Rows of one dataset, of `row_tokens` tokens at most.

    `documents` [n] lie end to end, `ends` int64 [n] says where each of them ends; `borders` int64 [rows + 1]
    where each row begins, and where the last one ends. `kind` is --rows. Of answers, by their number in the dataset:
    `reference` fp32, the log-probability of the trained tokens under the reference, and `good` bool; `others` are the
    same rows with answers to other prompts. `pad_token` is what transformers takes for padding when it looks for the
    last token of a row; None: nothing.
    """

    dataset: Dataset | Mismatched
    documents: np.ndarray
    ends: np.ndarray
    borders: np.ndarray
    row_tokens: int
    kind: RowKind = "conversations"
    reference: np.ndarray | None = None
    pad_token: int | None = None
    good: np.ndarray | None = None
    others: "SetRows | None" = None

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def every_token(self) -> bool:
        """Whether the dataset's loss mask is not asked."""
        return self.kind == "documents"

    @property
    def holds_answers(self) -> bool:
        """Whether documents are answers that are compared."""
        return self.kind in ("pairs", "answers")

    def told_of(self, document: int) -> tuple[float, float]:
        """Return an answer's log-probability under the reference and whether it is good, 0 where it is not known."""
        reference, good = (0.0 if of is None else float(of[document]) for of in (self.reference, self.good))
        return reference, good

    @property
    def num_tokens(self) -> int:
        """The tokens of all rows together."""
        return int(self.borders[-1])

    def segments(self, row: int) -> list[Segment]:
        """Return the stretches of documents that a row consists of."""
        begin, end = int(self.borders[row]), int(self.borders[row + 1])
        first, last = np.searchsorted(self.ends, begin, side="right"), np.searchsorted(self.ends, end, side="left")
        found = []
        for index in range(int(first), int(last) + 1):
            document_begin = int(self.ends[index - 1]) if index else 0
            start, stop = max(begin, document_begin), min(end, int(self.ends[index]))
            found.append(Segment(int(self.documents[index]), start - document_begin, stop - start))
        return found

    def longest_padded(self, multiple: int) -> int:
        """Return the length of the longest row when each of its segments is padded to a multiple of `multiple`."""
        ends = np.union1d(self.ends, self.borders[1:])
        padded = -(-np.diff(ends, prepend=0) // multiple) * multiple
        return int(np.add.reduceat(padded, np.searchsorted(ends, self.borders[:-1], side="right")).max())

    def __str__(self) -> str:
        room = len(self) * self.row_tokens
        return (
            f"{len(self.documents) // UNITS[self.kind]:,} {self.kind}, {self.num_tokens:,} tokens in {len(self):,} "
            f"rows of {self.row_tokens} ({self.num_tokens / room:.1%} full)"
        )


def make_rows(selection: Selection, settings: DataSettings) -> SetRows:
    """Return the rows of whole conversations or pairs, packed or one a row, or of documents cut every `seq_len`."""
    room = settings.row_tokens
    sizes = selection.lengths.sum(axis=1)
    if settings.rows == "documents":
        order = np.random.default_rng(settings.seed).permutation(len(selection))
        total = int(sizes.sum())
        # The last row is what remains: it alone may be short.
        borders = np.minimum(np.arange(-(-total // room) + 1) * room, total)
    else:
        order, bounds = (pack if settings.packing else one_per_row)(sizes, room)
        borders = np.append(0, np.cumsum(sizes[order], dtype=np.int64))[bounds]
    ends = np.cumsum(selection.lengths[order].ravel(), dtype=np.int64)
    rows = SetRows(selection.dataset, selection.documents[order].ravel(), ends, borders, room, settings.rows)
    return _judged(rows, settings) if settings.rows == "answers" else rows


def _judged(rows: SetRows, settings: DataSettings) -> SetRows:
    """Return rows of answers with what is said of them, and with the answers to other prompts beside them."""
    dataset, documents = rows.dataset, rows.documents
    assert isinstance(dataset, IndexedDataset)
    whole, _ = _fitting_whole(dataset, settings)  # what is held out, too
    mismatched = Mismatched.of(dataset, whole.documents.ravel(), seed=settings.seed)
    bounds = np.append(0, np.searchsorted(rows.ends, rows.borders[1:]) + 1)  # documents of each row
    ends = np.cumsum(mismatched.lengths(documents), dtype=np.int64)
    borders = np.append(0, ends)[bounds]
    longest = int(np.diff(borders).max())
    others = SetRows(mismatched, documents, ends, borders, longest, rows.kind)
    return replace(rows, good=dataset.labels(), others=others)


@dataclass(frozen=True)
class Rows:
    """The rows of all datasets of a run, numbered one set behind the other, and how training mixes the sets."""

    parts: tuple[SetRows, ...]
    mix: Mix

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def others(self) -> "Rows | None":
        """The same rows with answers to other prompts, where there are any."""
        if self.parts[0].others is None:
            return None
        return Rows(tuple(part.others for part in self.parts if part.others is not None), self.mix)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """The number of each part's first row, int64 [parts]."""
        return np.cumsum([0, *map(len, self.parts[:-1])])

    def segments(self, number: int) -> tuple[SetRows, list[Segment]]:
        """Return the part that holds row `number`, and the stretches of its documents that the row consists of."""
        part = int(np.searchsorted(self.first_rows, number, side="right")) - 1
        return self.parts[part], self.parts[part].segments(number - int(self.first_rows[part]))

    def tokens_in(self, numbers: Iterable[int]) -> int:
        """Return how many tokens the rows `numbers` have, without padding."""
        return sum(segment.length for number in numbers for segment in self.segments(number)[1])

    def dump(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Describe the rows `numbers` for somebody who looks for what is wrong with them."""
        found = []
        for number in numbers:
            part, segments = self.segments(number)
            said = []
            for segment in segments:
                tokens = part.dataset.tokens(segment.document)[segment.start : segment.stop]
                said.append({**segment._asdict(), "tokens": tokens.tolist()})
            found.append({"row": number, "dataset": str(part.dataset.path), "segments": said})
        return found

    def physical_length(self, layout: Layout) -> int:
        """Return the tokens that a row takes in memory: the same for all rows, and what `layout` can divide."""
        longest = max(part.row_tokens for part in self.parts)
        if layout.segment_multiple > 1:
            longest = max(longest, *(part.longest_padded(layout.segment_multiple) for part in self.parts))
        return layout.padded(longest)

    def report(self, *, rows_of_run: int) -> list[str]:
        """Return a line for each dataset: what it holds, and how often a run of `rows_of_run` rows reads it."""
        lines = []
        for part, given in zip(self.parts, self.mix.given(rows_of_run), strict=True):
            epochs = given / len(part)
            line = f"{part.dataset.path}: {part}: {epochs:.1f} epochs in this run"
            if epochs > MANY_EPOCHS and (part.every_token or len(self.parts) > 1):
                line += f"; beyond {MANY_EPOCHS} of the same data, an epoch teaches little"
            lines.append(line)
        return lines


def _fitting(dataset: Dataset, settings: DataSettings) -> tuple[Selection, list[str]]:
    """Return the conversations with a trained token, cut behind the last whole answer within `seq_len`."""
    fitted = fit(dataset, settings.seq_len, settings.too_long)
    remarks = fitted.remarks(dataset)
    untrained = int(((fitted.lengths > 0) & (fitted.targets == 0)).sum())
    if untrained:
        remarks.append(f"{dataset.path}: {untrained:,} conversations were left out: no token of them is trained on")
    kept = np.flatnonzero((fitted.lengths > 0) & (fitted.targets > 0))
    return Selection(dataset, kept[:, None], fitted.lengths[kept, None]), remarks


def _fitting_whole(dataset: Dataset, settings: DataSettings) -> tuple[Selection, list[str]]:
    """Return the pairs or answers that fit whole with their prompt: one that is cut is not what was judged."""
    unit, rows, seq_len = UNITS[settings.rows], settings.rows, settings.seq_len
    lengths = np.array(dataset.lengths, dtype=np.int64).reshape(-1, unit)
    targets = dataset.trained_targets().reshape(-1, unit)
    long = (lengths > seq_len).any(axis=1)
    if settings.too_long == "stop" and long.any():
        raise DataError(
            f"{dataset.path}: {long.sum():,} of {len(long):,} {rows} have an answer over SEQ_LEN {seq_len} with its "
            f"prompt, the longest {lengths.max():,} tokens (number {int(lengths.max(axis=1).argmax())}); raise "
            "SEQ_LEN, or leave them out with --too-long drop"
        )
    untrained = (targets == 0).any(axis=1) & ~long
    remarks = []
    if long.any():
        remarks.append(f"{long.sum():,} {rows} were left out: an answer and its prompt are over {seq_len} tokens")
    if untrained.any():
        remarks.append(f"{untrained.sum():,} {rows} were left out: no token of an answer is trained on")
    kept = np.flatnonzero(~long & ~untrained)
    documents = kept[:, None] * unit + np.arange(unit)
    return Selection(dataset, documents, lengths[kept]), [f"{dataset.path}: {remark}" for remark in remarks]
