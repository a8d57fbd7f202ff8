"""Datasets that other builders left without manifest and loss mask: which kind it is, and plain tokens as rows.

Megatron's own preprocessing writes plain tokens, uint16 or int32: a document is one sequence, or several
(sentences), usually with an end token behind it. The other kind is the doubled layout; see doubled.py.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from toolkits.foundation.errors import DataError
from toolkits.foundation.progress import Progress

from .dataset import TOKENS_AT_ONCE, Dataset, Index, Kind
from .doubled import DoubledDataset

NUMBERS_TO_RECOGNISE = 1 << 16  # integers looked at when a dataset is opened, one document at least
DOCUMENTS_TO_RECOGNISE = 1000


def recognise(prefix: Path, index: Index) -> Dataset:
    """Open a dataset without a manifest, from a constant number of its integers.

    Only the doubled layout has negative numbers. Raises DataError when the integers could be either, or neither.
    """
    numbers = index.tokens()
    if numbers.dtype.kind not in "iu":
        raise DataError(f"{index.path}: no manifest, and numbers of type {numbers.dtype}: these are not tokens")
    length = int(index.lengths[0]) if len(index.lengths) else 0
    sample = np.array(numbers[: max(length, NUMBERS_TO_RECOGNISE)])
    if (sample < 0).any():
        return DoubledDataset(prefix, index)
    if length >= 4 and length % 2 == 0 and (np.asarray(index.lengths) == length).all():
        tokens, labels = np.split(sample[: len(sample) // length * length].reshape(-1, length), 2, axis=1)
        if (tokens[:, 1:] == labels[:, :-1]).all():
            raise DataError(
                f"{prefix}: no manifest, and each document reads as [tokens | labels] of {length // 2} tokens as well "
                "as plain tokens; build it from its source with `temper data build`, which leaves no doubt"
            )
    return PlainDataset(prefix, index)


class PlainDataset:
    """Tokens without a mask; see `dataset.Dataset`. A row is a document, and every token of it is trained."""

    kind: Kind = "text"
    manifest = None
    tokenizer_fingerprint = None
    built_seq_len = None

    def __init__(self, prefix: Path, index: Index) -> None:
        self.path = prefix
        self._numbers = index.tokens()
        self._starts, self.lengths = _documents(index)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def taken_for(self) -> str:
        ends = {int(self.tokens(row)[-1]) for row in range(min(len(self), DOCUMENTS_TO_RECOGNISE)) if self.lengths[row]}
        said = f"each ends with token {ends.pop()}" if len(ends) == 1 else "without a common end token"
        return f"plain tokens of type {self._numbers.dtype}, {len(self):,} documents, {said}"

    @property
    def num_trained_tokens(self) -> int:
        return len(self._numbers)

    @cached_property
    def max_token_id(self) -> int:
        """The greatest id, from one pass over the file; DataError when there is a negative one."""
        greatest = -1
        with Progress(f"reading the tokens of {self.path}", len(self._numbers), unit="tokens") as progress:
            for first in range(0, len(self._numbers), TOKENS_AT_ONCE):
                block = self._numbers[first : first + TOKENS_AT_ONCE]
                greatest = max(greatest, int(block.max()))
                if block.min() < 0:
                    place = first + int(block.argmin())
                    row = int(np.searchsorted(self._starts, place, side="right")) - 1
                    raise DataError(f"{self.path}: document {row} holds {int(block.min())}, which is no token")
                progress.advance(len(block))
        return greatest

    def trained_targets(self) -> np.ndarray:
        return np.maximum(self.lengths, 1).astype(np.int64) - 1

    def tokens(self, row: int) -> np.ndarray:
        start = int(self._starts[row])
        return self._numbers[start : start + int(self.lengths[row])]

    def mask(self, row: int) -> np.ndarray:
        return np.ones(int(self.lengths[row]), np.uint8)

    def weights(self, row: int) -> np.ndarray:
        return np.ones(int(self.lengths[row]), np.float32)


def _documents(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Return where each document begins in the .bin, in tokens, and its length, both [documents]."""
    ends = np.cumsum(index.lengths, dtype=np.int64)
    starts = np.append(np.int64(0), ends[:-1]) if len(ends) else ends
    if (np.asarray(index.pointers) != starts * index.dtype.itemsize).any():
        raise DataError(f"{index.path}: its sequences do not lie one behind the other in the .bin; write it again")
    bounds = np.asarray(index.bounds)
    if len(bounds) < 1 or bounds[0] != 0 or bounds[-1] != len(starts) or (np.diff(bounds) < 0).any():
        raise DataError(f"{index.path}: its documents are not stretches of its {len(starts)} sequences; write it again")
    if len(bounds) == len(starts) + 1 and (np.diff(bounds) == 1).all():
        return starts, index.lengths
    cumulative = np.append(np.int64(0), ends)
    return cumulative[bounds[:-1]], np.diff(cumulative[bounds])
