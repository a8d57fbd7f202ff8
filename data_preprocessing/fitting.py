"""What of conversations fits into rows of SEQ_LEN tokens: the one rule for training and for the doubled layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from toolkits.foundation.errors import DataError

TooLong = Literal["truncate", "drop", "stop"]


class Conversations(Protocol):
    """What is asked of conversations here: a `Dataset` says it, and so does an audit of rows that are not built yet."""

    @property
    def path(self) -> Path: ...
    @property
    def lengths(self) -> np.ndarray: ...
    def trained_targets(self) -> np.ndarray: ...
    def mask(self, row: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Fitted:
    """How many tokens of each conversation are used, `lengths` int64 [rows], 0 where it is left out.

    `targets` int64 [rows]: how many of these are trained, without the first.
    """

    lengths: np.ndarray
    targets: np.ndarray
    num_cut: int
    num_dropped: int
    seq_len: int

    def remarks(self, dataset: Conversations) -> list[str]:
        """Return a sentence for cut conversations and one for those left out, where there are any."""
        remarks, over = [], f"over {self.seq_len} tokens"
        if self.num_cut:
            remarks.append(f"{self.num_cut:,} conversations {over} were cut behind their last whole answer that fits")
        if self.num_dropped:
            remarks.append(f"{self.num_dropped:,} conversations were left out: {over}, and no whole answer fits")
        return [f"{dataset.path}: {remark}" for remark in remarks]


def fit(dataset: Conversations, seq_len: int, too_long: TooLong, *, label_beyond: bool = False) -> Fitted:
    """Cut conversations of more than `seq_len` tokens behind their last whole trained turn, or leave them out.

    `label_beyond`: a conversation of one token more fits when that token is trained, since it is only predicted.
    Raises DataError when `too_long` is `stop` and there are any that do not fit.
    """
    lengths, targets = np.array(dataset.lengths, dtype=np.int64), dataset.trained_targets().copy()
    long = np.flatnonzero(lengths > seq_len)
    if label_beyond:
        beyond = [lengths[row] == seq_len + 1 and bool(dataset.mask(row)[-1]) for row in long.tolist()]
        long = long[~np.array(beyond, bool)]
    if too_long == "stop" and len(long):
        worst = int(lengths.argmax())
        raise DataError(
            f"{dataset.path}: {len(long):,} of {len(lengths):,} conversations ({len(long) / len(lengths):.1%}) are "
            f"longer than SEQ_LEN {seq_len}, the longest {lengths.max():,} tokens (row {worst}); raise SEQ_LEN, "
            "or cut them with --too-long truncate, or leave them out with --too-long drop"
        )
    for row in long.tolist():
        mask = dataset.mask(row)
        lengths[row] = last_turn_end(mask, seq_len) if too_long == "truncate" else 0
        targets[row] = np.count_nonzero(mask[1 : lengths[row]])
    dropped = int((lengths[long] == 0).sum())
    return Fitted(lengths, targets, len(long) - dropped, dropped, seq_len)


def last_turn_end(mask: np.ndarray, limit: int) -> int:
    """Return where the last trained turn ends that is whole within `limit` tokens; 0 when none is."""
    ends = np.flatnonzero(np.diff(mask[: limit + 1].astype(np.int8)) == -1) + 1
    return int(ends[-1]) if len(ends) else 0
