"""Token ids and spans of characters -> the loss mask, for many rows at once.

A byte-level vocabulary loses no byte of a text, so where a token lies follows from the lengths of those before it:
one sum over the ids of a chunk, one search for the borders of the spans. A row for which the lengths do not add up
to the text (Unicode that the tokenizer normalizes) is left to the tokenizer's own offsets, like all rows of other
vocabularies.
"""

import unicodedata
from collections.abc import Sequence

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


def flat_mask(
    ids: np.ndarray, bounds: np.ndarray, lengths: np.ndarray, texts: Sequence[tuple[int, Sequence[Span]]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask, uint8 [tokens], of rows of `ids`, and for which rows it is true, bool [rows].

    `lengths` are the bytes of each token of the vocabulary; `texts` holds what `in_bytes` says of each row. A token
    is trained when a byte of it lies in a span.
    """
    # In 32 bits where they hold the sum: a sum that changes the type of its terms takes three times as long.
    ends = np.zeros(len(ids) + 1, np.int32 if len(ids) * int(lengths.max()) < MAX_INT32 else np.int64)
    np.cumsum(lengths.take(ids), out=ends[1:])
    first_byte = ends[bounds]
    adds_up = np.diff(first_byte) == np.array([length for length, _ in texts], np.int64)
    counts = [len(spans) for _, spans in texts]
    flat = np.array([edge for _, spans in texts for span in spans for edge in span], np.int64)
    # No span reaches past the row that is too short for it, nor past what the type holds.
    begin, end = np.repeat(first_byte[:-1], counts), np.repeat(first_byte[1:], counts)
    starts, stops = (np.minimum(flat[at::2] + begin, end).astype(ends.dtype) for at in (0, 1))
    # A row that does not add up must not reach into the next one.
    row_ends = np.repeat(bounds[1:], counts)
    first = np.minimum(np.searchsorted(ends[1:], starts, side="right"), row_ends)
    past = np.minimum(np.searchsorted(ends[:-1], stops, side="left"), row_ends)
    # Two spans may share a token.
    edges = np.maximum.accumulate(np.concatenate([[0], np.stack([first, past], axis=1).ravel(), [len(ids)]]))
    runs = np.diff(edges)  # of tokens that are not trained, that are, that are not, ...
    return np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs), adds_up


def offset_mask(encoding: Encoding, text: str, spans: Sequence[Span]) -> np.ndarray:
    """Return the mask, uint8 [tokens], of one row by the offsets that the tokenizer itself gives."""
    mask = np.zeros(len(encoding), np.uint8)
    for start, end in spans:
        first = _first_token(encoding, range(start, len(text)))
        past = _first_token(encoding, range(end, len(text)))
        # A token that begins inside the span is trained even when it ends outside.
        if past < len(encoding) and _first_character(encoding, past) < end:
            past += 1
        mask[first:past] = 1
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
