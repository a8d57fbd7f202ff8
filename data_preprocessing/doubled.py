"""The doubled layout of datasets that other builders left on people's disks, read as rows like any other.

A Megatron indexed dataset whose every document holds 2 x seq_len integers, `[tokens | labels]`:

    tokens   packed sub-sequences, then padding; the last token of each is stored as -1 - id
    labels   the token to predict at each place, so shifted by one; -100 where nothing is learned

With seq_len 16, padding 1 and end token 2:

    [3,4,107,108,109,2,5,130,131,-3, 1,1,1,1,1,1] | [-100,-100,-100,-100,-100,5,130,131,2,-100, -100 x6]

is one row of ten tokens, 3 ... 131 2, of which the last four are trained. Nothing records seq_len. A label at
a sub-sequence's last place predicts a token that was cut off; it becomes the row's last token, trained, so
that inputs and targets are those that the builder meant.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from toolkits.foundation.errors import DataError

from .dataset import Index, Kind

IGNORED = -100
NUMBERS_AT_ONCE = 1 << 22  # integers that a scan holds in memory


class _Scan(NamedTuple):
    """What one pass over documents finds.

    For each row its place in the .bin in integers, its tokens there, 1 where a label adds a token, and how many
    labels it has.
    """

    starts: np.ndarray
    stored: np.ndarray
    cut: np.ndarray
    trained: np.ndarray
    max_token_id: int


class DoubledDataset:
    """A dataset in the doubled layout; see `dataset.Dataset`. Every sub-sequence is a row."""

    kind: Kind = "conversations"
    manifest = None
    tokenizer_fingerprint = None

    def __init__(self, prefix: Path, index: Index) -> None:
        self.path = prefix
        self._numbers = index.tokens()
        self.built_seq_len = self._seq_len(index)
        self.taken_for = f"the doubled [tokens | labels] layout of {self.built_seq_len} tokens a row"

    def __len__(self) -> int:
        return len(self._scan.starts)

    @cached_property
    def lengths(self) -> np.ndarray:
        return self._scan.stored + self._scan.cut

    @property
    def max_token_id(self) -> int:
        return self._scan.max_token_id

    @property
    def num_trained_tokens(self) -> int:
        return int(self._scan.trained.sum())

    def trained_targets(self) -> np.ndarray:
        return self._scan.trained

    def tokens(self, row: int) -> np.ndarray:
        tokens, labels = self._halves(row)
        tokens[tokens < 0] = -1 - tokens[tokens < 0]
        return np.append(tokens, labels[-1:]) if self._scan.cut[row] else tokens

    def mask(self, row: int) -> np.ndarray:
        _, labels = self._halves(row)
        # labels[i] tells of token i + 1; no label tells of the first.
        mask = np.append(False, labels != IGNORED)
        return mask[: int(self.lengths[row])].astype(np.uint8)

    def weights(self, row: int) -> np.ndarray:
        return self.mask(row).astype(np.float32)

    def _halves(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        start, stored = int(self._scan.starts[row]), int(self._scan.stored[row])
        tokens = self._numbers[start : start + stored]
        labels = self._numbers[start + self.built_seq_len : start + self.built_seq_len + stored]
        return np.array(tokens, np.int32), np.array(labels, np.int32)

    def _seq_len(self, index: Index) -> int:
        """Return half the documents' common length; DataError when there is none."""
        length = int(index.lengths[0])
        if length < 2 or length % 2 or (np.asarray(index.lengths) != length).any():
            raise DataError(
                f"{self.path}: no manifest, and negative numbers as only the doubled [tokens | labels] layout has "
                "them; but its documents would all have the same even length"
            )
        return length // 2

    @cached_property
    def _scan(self) -> _Scan:
        """Return where the rows are, from one pass over the file, when the first of them is asked for."""
        blocks = [self._scan_block(first, tokens, labels) for first, tokens, labels in self._blocks()]
        *arrays, greatest = zip(*blocks, strict=True)
        starts, stored, cut, trained = map(np.concatenate, arrays)
        return _Scan(starts, stored, cut, trained, max(greatest))

    def _blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the number of the first document, and tokens and labels [documents, seq_len]."""
        documents = self._numbers.reshape(-1, 2, self.built_seq_len)
        step = max(1, NUMBERS_AT_ONCE // (2 * self.built_seq_len))
        for first in range(0, len(documents), step):
            block = np.array(documents[first : first + step])
            yield first, block[:, 0], block[:, 1]

    def _scan_block(self, first: int, tokens: np.ndarray, labels: np.ndarray) -> _Scan:
        ends = tokens < 0
        ids = np.where(ends, -1 - tokens, tokens)
        learned = labels != IGNORED
        _close_open_tails(ends, learned)
        wrong = learned[:, :-1] & ~ends[:, :-1] & (labels[:, :-1] != ids[:, 1:])
        if wrong.any():
            document, place = np.argwhere(wrong)[0]
            raise DataError(
                f"{self.path}: document {first + document}: the label at place {place} is {labels[document, place]}, "
                f"the next token {ids[document, place + 1]}: not the doubled [tokens | labels] layout"
            )
        document, last = np.nonzero(ends)
        begin = np.append(0, last[:-1] + 1)
        begin[np.append(True, document[1:] != document[:-1])] = 0
        starts = (first + document) * (2 * self.built_seq_len) + begin
        cut = learned[document, last].astype(np.int64)
        so_far = np.cumsum(learned, axis=1)
        trained = so_far[document, last] - so_far[document, begin] + learned[document, begin]
        return _Scan(starts, last + 1 - begin, cut, trained, int(np.maximum(ids, labels).max()))


def _close_open_tails(ends: np.ndarray, learned: np.ndarray) -> None:
    """End a document's last sub-sequence at its last label when the builder cut it off before its end.

    `ends` and `learned` [documents, seq_len]; `ends` is changed. What follows is padding.
    """
    seq_len = ends.shape[1]
    last_end = np.where(ends.any(1), seq_len - 1 - ends[:, ::-1].argmax(1), -1)
    last_label = np.where(learned.any(1), seq_len - 1 - learned[:, ::-1].argmax(1), -1)
    opened = np.flatnonzero(last_label > last_end)
    ends[opened, last_label[opened]] = True
