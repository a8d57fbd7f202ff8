"""Rendered rows -> tokens and loss masks, a chunk of rows in flat buffers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from .control_text import ControlText
from .encoders import FlatEncoder
from .masks import Frame, Span, filled, flat_mask, offset_mask, unchanged_by_nfc
from .row_error import RowError
from .tokenizer import LoadedTokenizer


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

    @property
    def sizes(self) -> Sequence[int]:
        """No content is told from the rest."""
        return ()

    @property
    def frame(self) -> Frame:
        """Where the spans are in UTF-8."""
        return Frame.around(self.text, self.spans, self.marks)


class Filled(NamedTuple):
    """The same, of a row whose spans follow from its frame and from the `sizes` of its contents in UTF-8 bytes."""

    text: str
    frame: Frame
    sizes: Sequence[int]
    num_control_tokens: int
    num_control_texts: int = 0  # a row with some is no `Filled`

    @property
    def marks(self) -> Sequence[int]:
        """What the mask holds in each span."""
        return self.frame.marks

    @property
    def spans(self) -> Sequence[Span]:
        """The trained characters, ascending."""
        data, before = self.text.encode(), [0, *accumulate(self.sizes)]
        edges = [edge + before[slot] for edge, slot in zip(self.frame.edges, self.frame.slots, strict=True)]
        places = [len(data[:edge].decode()) for edge in edges]
        return list(zip(places[::2], places[1::2], strict=True))


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
        self._lengths, self._normalizes = tokenizer.byte_lengths, tokenizer.normalizes
        self._encoder, self._control, self._may_be_untrained = encoder, control, may_be_untrained
        greatest = max([0, *tokenizer.control_ids]) if self._lengths is None else len(self._lengths) - 1
        self._is_control = np.zeros(greatest + 1, bool)
        self._is_control[tokenizer.control_ids] = True
        self._first_control = min(tokenizer.control_ids, default=greatest)

    @property
    def is_ready(self) -> bool:
        """Whether `encode` would not wait for an encoder that is still being built."""
        return self._encoder.is_ready

    def encode(self, rows: Sequence[Rendered | Filled]) -> Samples:
        """Return the rows' samples; an error is `control_text`, `all_masked` or `empty_row`."""
        flat = self._flat(rows)
        chosen = rows if len(flat) == len(rows) else [rows[number] for number in flat]
        ids, bounds = self._encoder.encode([row.text for row in chosen])
        mask, errors = np.zeros(0, np.uint8), {}
        careful = set(range(len(rows))).difference(flat)
        if flat:
            assert self._lengths is not None  # or no row would be flat
            places = filled([row.frame for row in chosen], [row.sizes for row in chosen])
            mask, true = flat_mask(ids, bounds, self._lengths, places)
            found = np.diff(np.searchsorted(self._control_places(ids), bounds))
            written = np.array([row.num_control_tokens for row in chosen], np.int64)
            careful |= {flat[place] for place in np.flatnonzero(~true).tolist()}
            errors = {flat[place]: _made_control_token() for place in np.flatnonzero(found > written).tolist()}
        if careful:
            ids_of = dict(zip(flat, np.split(ids, bounds[1:-1]), strict=True)) if flat else {}
            mask_of = dict(zip(flat, np.split(mask, bounds[1:-1]), strict=True)) if flat else {}
            ids, mask, bounds = self._merged(rows, ids_of, mask_of, careful, errors)
        return self._checked(ids, mask, np.diff(bounds), errors)

    def _control_places(self, ids: np.ndarray) -> np.ndarray:
        """Return where in `ids` control tokens are."""
        places = np.flatnonzero(ids >= self._first_control)  # most ids are told apart by this
        return places[self._is_control[ids[places]]]

    def _flat(self, rows: Sequence[Rendered | Filled]) -> list[int]:
        """Return the rows whose tokens' lengths should add up to the text's."""
        if self._lengths is None:
            return []
        numbers = [number for number, row in enumerate(rows) if not row.num_control_texts]
        return [number for number in numbers if unchanged_by_nfc(rows[number].text)] if self._normalizes else numbers

    def _merged(
        self,
        rows: Sequence[Rendered | Filled],
        ids_of: dict[int, np.ndarray],
        mask_of: dict[int, np.ndarray],
        careful: set[int],
        errors: dict[int, RowError],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode the rows `careful` one by one and return ids, mask and bounds of all rows."""
        for number, row in enumerate(rows):
            if number not in careful:
                continue
            try:
                encoding, ids_of[number] = self._control.encode(row.text, hidden=row.num_control_texts > 0)
                mask_of[number] = offset_mask(encoding, row.text, row.spans, row.marks)
            except RowError as error:
                errors[number] = error
                ids_of[number], mask_of[number] = np.zeros(0, np.int32), np.zeros(0, np.uint8)
        order = range(len(rows))
        bounds = np.cumsum([0, *(len(ids_of[number]) for number in order)], dtype=np.int64)
        ids = np.concatenate([ids_of[number] for number in order])
        return ids, np.concatenate([mask_of[number] for number in order]), bounds

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
