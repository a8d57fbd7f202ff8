"""Rendered rows -> tokens and loss masks, a chunk of rows in flat buffers."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .control_text import ControlText
from .encoders import Flat, FlatEncoder
from .masks import filled, flat_mask, offset_mask, unchanged_by_nfc
from .rendered import Rendered, RenderedRows
from .row_error import RowError
from .tokenizer import LoadedTokenizer


@dataclass(frozen=True)
class Samples:
    """Rows of a dataset, one behind the other: `tokens` int32 [n], `mask` uint8 [n] as the dataset has it.

    `lengths` int64 [rows] is 0 for a row that went wrong; `errors` says what of which row.
    """

    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    errors: dict[int, RowError]


class SampleEncoder:
    """Makes samples of rendered rows; `may_be_untrained`: rows without a trained token are welcome."""

    def __init__(
        self, tokenizer: LoadedTokenizer, encoder: FlatEncoder, control: ControlText, *, may_be_untrained: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self._lengths, self._normalizes = tokenizer.byte_lengths, tokenizer.normalizes
        self._encoder, self._control, self._may_be_untrained = encoder, control, may_be_untrained
        greatest = max([0, *tokenizer.control_ids]) if self._lengths is None else len(self._lengths) - 1
        self._is_control = np.zeros(greatest + 1, bool)
        self._is_control[tokenizer.control_ids] = True
        self._first_control = min(tokenizer.control_ids, default=greatest)

    @property
    def is_ready(self) -> bool:
        """Whether `flat` would not wait for an encoder that is still being built."""
        return self._encoder.is_ready

    def encode(self, rows: Iterable[Rendered]) -> Samples:
        """Return the rows' samples; an error is `control_text`, `all_masked` or `empty_row`."""
        gathered = RenderedRows(rows)
        return self.samples(gathered, self.flat(gathered))

    def flat(self, rows: RenderedRows) -> Flat:
        """Return the ids of the rows' texts: the part of `encode` that a thread beside Python may do."""
        if self._lengths is None:  # no row's mask would follow from them
            return np.zeros(0, np.int32), np.zeros(len(rows) + 1, np.int64)
        return self._encoder.encode(rows.texts)

    def samples(self, rows: RenderedRows, flat: Flat) -> Samples:
        """Return the samples of rows that `flat` returned `flat` of; see `encode`."""
        ids, bounds = flat
        mask, errors = np.zeros(0, np.uint8), {}
        careful = set(rows.hidden)
        if self._lengths is None:
            careful = set(range(len(rows)))
        elif len(rows):
            mask, true = flat_mask(ids, bounds, self._lengths, filled(rows.runs, rows.sizes))
            found = np.diff(np.searchsorted(self._control_places(ids), bounds))
            written = np.repeat([frame.num_control_tokens for frame, _ in rows.runs], [count for _, count in rows.runs])
            careful.update(np.flatnonzero(~true).tolist())
            if self._normalizes:
                careful.update([number for number, text in enumerate(rows.texts) if not unchanged_by_nfc(text)])
            errors = {row: _made_control_token() for row in np.flatnonzero(found > written).tolist()}
        if careful:
            ids, mask, bounds = self._with(rows, careful, ids, mask, bounds, errors)
        return self._checked(ids, mask, np.diff(bounds), errors)

    def _control_places(self, ids: np.ndarray) -> np.ndarray:
        """Return where in `ids` control tokens are."""
        places = np.flatnonzero(ids >= self._first_control)  # most ids are told apart by this
        return places[self._is_control[ids[places]]]

    def _with(
        self,
        rows: RenderedRows,
        careful: set[int],
        ids: np.ndarray,
        mask: np.ndarray,
        bounds: np.ndarray,
        errors: dict[int, RowError],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode the rows `careful` one by one and return ids, mask and bounds of all rows with theirs."""
        ids_of, mask_of = np.split(ids, bounds[1:-1]), np.split(mask, bounds[1:-1])
        for number, row in rows.some(careful):
            try:
                encoding, ids_of[number] = self._control.encode(row.text, hidden=row.num_control_texts > 0)
                mask_of[number] = offset_mask(encoding, row.text, row.spans, row.marks)
            except RowError as error:
                errors[number] = error
                ids_of[number], mask_of[number] = np.zeros(0, np.int32), np.zeros(0, np.uint8)
        bounds = np.cumsum([0, *map(len, ids_of)], dtype=np.int64)
        return np.concatenate(ids_of), np.concatenate(mask_of), bounds

    def _checked(self, ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray, errors: dict[int, RowError]) -> Samples:
        """Return the samples without the rows that went wrong."""
        filled, starts = np.flatnonzero(lengths), np.cumsum(lengths) - lengths
        trained = np.zeros(len(lengths), np.uint8)
        if len(filled):
            trained[filled] = np.maximum.reduceat(mask, starts[filled])
        for number in np.flatnonzero(lengths == 0).tolist():
            errors.setdefault(number, RowError("empty_row", "the rendered text has no token"))
        for number in [] if self._may_be_untrained else np.flatnonzero(trained == 0).tolist():
            errors.setdefault(number, RowError("all_masked", "no token of this row is trained"))
        if errors:
            kept = np.ones(len(lengths), bool)
            kept[list(errors)] = False
            of_kept = np.repeat(kept, lengths)
            ids, mask, lengths = ids[of_kept], mask[of_kept], np.where(kept, lengths, 0)
        return Samples(ids, mask, lengths, errors)


def _made_control_token() -> RowError:
    return RowError("control_text", "this tokenizer makes a control token of plain text in a message")
