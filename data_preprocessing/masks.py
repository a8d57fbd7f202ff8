"""Token ids and spans of characters -> the loss mask, for many rows at once.

A byte-level vocabulary loses no byte of a text, so where a token lies follows from the lengths of those before it:
one sum over the ids of a chunk, one search for the borders of the spans. A row for which the lengths do not add up
to the text (Unicode that the tokenizer normalizes) is left to the tokenizer's own offsets, like all rows of other
vocabularies.
"""

import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

MAX_INT32 = 2**31 - 1

Span = tuple[int, int]  # characters [start, end) of a text


def in_bytes(text: str, spans: Sequence[Span]) -> tuple[int, Sequence[Span]]:
    """Return the length of `text` and its ascending `spans`, in UTF-8 bytes."""
    if text.isascii():
        return len(text), spans
    found, at, place = [], 0, 0
    for start, end in spans:
        at += len(text[place:start].encode())
        first = at
        at += len(text[start:end].encode())
        found.append((first, at))
        place = end
    return at + len(text[place:].encode()), found


def unchanged_by_nfc(text: str) -> bool:
    """Whether the normal form NFC of `text` is `text`."""
    return text.isascii() or unicodedata.is_normalized("NFC", text)


class Frame(NamedTuple):
    """What rows of one look have in common: their text in UTF-8 but for the contents that go into it.

    `num_bytes` is the length without the `num_contents` contents. An edge of a trained span lies behind that many
    bytes in `edges` and that many contents in `slots`; the edges ascend, two for each span. `marks` is what the mask
    holds in each span; `num_control_tokens` counts the control tokens around the contents.
    """

    num_bytes: int
    num_contents: int
    edges: tuple[int, ...]
    slots: tuple[int, ...]
    marks: tuple[int, ...]
    num_control_tokens: int = 0

    @classmethod
    def around(
        cls, text: str, spans: Sequence[Span], marks: Sequence[int] = (), num_control_tokens: int = 0
    ) -> "Frame":
        """Return the frame of a text without contents."""
        size, found = in_bytes(text, spans)
        edges = tuple(chain.from_iterable(found))
        return cls(size, 0, edges, (0,) * len(edges), tuple(marks) or (1,) * len(spans), num_control_tokens)


Run = tuple[Frame, int]  # a frame, and how many rows one behind the other have it


class Places(NamedTuple):
    """Where the trained spans of rows lie: `num_bytes` [rows], `num_edges` [rows], and `edges` in bytes of a row.

    `marks` uint8 [spans] is what the mask holds in each.
    """

    num_bytes: np.ndarray
    num_edges: np.ndarray
    edges: np.ndarray
    marks: np.ndarray


def filled(runs: Sequence[Run], sizes: Sequence[int]) -> Places:
    """Return the places in texts that become of `runs` with contents of `sizes` bytes, [contents of all rows]."""
    frames = [frame for frame, _ in runs]
    rows_of = np.array([count for _, count in runs], np.int64)
    before = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(np.array(sizes, np.int64), out=before[1:])
    num_contents = np.repeat([frame.num_contents for frame in frames], rows_of)
    past = np.cumsum(num_contents)
    first = past - num_contents
    num_bytes = np.repeat([frame.num_bytes for frame in frames], rows_of) + before[past] - before[first]

    edges_of = np.array([len(frame.edges) for frame in frames], np.int64)
    num_edges = np.repeat(edges_of, rows_of)
    # Where the edges of each row's frame begin among those of all frames, less where its own begin.
    shift = np.repeat(np.cumsum(edges_of) - edges_of, rows_of) - (np.cumsum(num_edges) - num_edges)
    place = np.arange(int(num_edges.sum())) + np.repeat(shift, num_edges)
    inside, slots, marks = (
        np.fromiter(chain.from_iterable(parts), np.int64)[at]
        for parts, at in (
            ([frame.edges for frame in frames], place),
            ([frame.slots for frame in frames], place),
            ([frame.marks for frame in frames], place[::2] // 2),
        )
    )
    first_slot = np.repeat(first, num_edges)
    edges = inside + before[first_slot + slots] - before[first_slot]
    return Places(num_bytes, num_edges, edges, marks.astype(np.uint8))


def flat_mask(
    ids: np.ndarray, bounds: np.ndarray, lengths: np.ndarray, places: Places
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask, uint8 [tokens], of rows of `ids`, and for which rows it is true, bool [rows].

    `lengths` are the bytes of each token of the vocabulary. A token is trained when a byte of it lies in a span.
    """
    # In 32 bits where they hold the sum, and in place: memory that is new for every chunk costs more than the sums.
    ends = np.empty(len(ids) + 1, np.int32 if len(ids) * int(lengths.max()) < MAX_INT32 else np.int64)
    ends[0] = 0
    np.take(lengths.astype(ends.dtype, copy=False), ids, out=ends[1:], mode="clip")  # others copy; no id is outside
    np.cumsum(ends[1:], out=ends[1:])
    first_byte = ends[bounds]
    adds_up = np.diff(first_byte) == places.num_bytes
    # No span reaches past the row that is too short for it, nor past what the type holds.
    begin, end = np.repeat(first_byte[:-1], places.num_edges), np.repeat(first_byte[1:], places.num_edges)
    edges = np.minimum(places.edges + begin, end).astype(ends.dtype)
    # A row that does not add up must not reach into the next one.
    row_ends = np.repeat(bounds[1:], places.num_edges // 2)
    first = np.minimum(np.searchsorted(ends[1:], edges[::2], side="right"), row_ends)
    past = np.minimum(np.searchsorted(ends[:-1], edges[1::2], side="left"), row_ends)
    # Two spans may share a token.
    borders = np.maximum.accumulate(np.concatenate([[0], np.stack([first, past], axis=1).ravel(), [len(ids)]]))
    runs = np.diff(borders)  # of tokens that are not trained, that are, that are not, ...
    marks = np.zeros(len(runs), np.uint8)
    marks[1::2] = places.marks
    return np.repeat(marks, runs), adds_up


def offset_mask(encoding: Encoding, text: str, spans: Sequence[Span], marks: Sequence[int] = ()) -> np.ndarray:
    """Return the mask, uint8 [tokens], of one row by the offsets that the tokenizer itself gives."""
    mask = np.zeros(len(encoding), np.uint8)
    before = 0  # tokens that are settled: of a token that two spans share, the first one decides
    for (start, end), mark in zip(spans, marks or [1] * len(spans), strict=True):
        first = _first_token(encoding, range(start, len(text)))
        past = _first_token(encoding, range(end, len(text)))
        # A token that begins inside the span is trained even when it ends outside.
        if past < len(encoding) and _first_character(encoding, past) < end:
            past += 1
        first = max(first, before)
        mask[first:past] = mark
        before = max(first, past)
    return mask


def _first_token(encoding: Encoding, characters: range) -> int:
    """Return the token that holds the first of `characters` that any token holds, else the number of tokens."""
    for character in characters:
        token = encoding.char_to_token(character)
        if token is not None:
            return token
    return len(encoding)


def _first_character(encoding: Encoding, token: int) -> int:
    characters = encoding.token_to_chars(token)
    assert characters is not None  # only tokens outside the text, which nobody asks for, have none
    return characters[0]
