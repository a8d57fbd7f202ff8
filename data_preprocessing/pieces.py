"""A row of tokens -> runs of text of one kind each, whose texts together are the decoded row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from toolkits.foundation.errors import DataError

from .tokenizer import LoadedTokenizer

BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # would show text in another order than the model reads it
# What a terminal or a browser would obey instead of showing: controls but newline and tab, DEL, and those of order.
_VISIBLE: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_VISIBLE |= {127: 0x2421} | {code: f"\\u{code:04x}" for code in [*range(0x80, 0xA0), *BIDI]}
KINDS = ("trained", "context", "control", "trained control")


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one kind, decoded; `first` and `last` are their places in the row."""

    text: str
    trained: bool
    control: bool
    first: int = 0
    last: int = 0

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if self.control:
            return "trained control" if self.trained else "control"
        return "trained" if self.trained else "context"


def visible(text: str) -> str:
    """Return the text with everything shown that would steer a terminal or a browser instead."""
    return text.translate(_VISIBLE)


def decoded_pieces(
    tokenizer: LoadedTokenizer, tokens: np.ndarray, mask: np.ndarray, *, cut: int | None = None
) -> list[Piece]:
    """Cut a row where its mask changes, around control tokens and in front of token `cut`, and decode the parts.

    A character of which a part lies in two pieces is in the second. Raises DataError for a token that the tokenizer
    does not have.
    """
    if not len(tokens):
        return []
    require_known(tokenizer, tokens)
    control = np.isin(tokens, tokenizer.control_ids)
    changed = (np.diff(mask) != 0) | control[1:] | control[:-1]
    if cut and cut < len(tokens):
        changed[cut - 1] = True
    bounds = [0, *(np.flatnonzero(changed) + 1).tolist(), len(tokens)]
    texts = _texts(decoder(tokenizer), tokens.tolist(), bounds)
    return [
        Piece(visible(text), bool(mask[start]), bool(control[start]), start, end - 1)
        for text, (start, end) in zip(texts, pairwise(bounds), strict=True)
    ]


def decoder(tokenizer: LoadedTokenizer) -> Callable[[Sequence[int]], str]:
    """Return what turns ids into text, control tokens too."""
    encoder = tokenizer.encoder
    return lambda ids: encoder.decode(ids, skip_special_tokens=False)


def require_known(tokenizer: LoadedTokenizer, tokens: np.ndarray) -> None:
    """Raise DataError when a token is not one of the tokenizer's: decoding would leave it out."""
    size = tokenizer.encoder.get_vocab_size(with_added_tokens=True)
    beyond = np.unique(tokens[(tokens >= size) | (tokens < 0)])
    unknown = [int(token) for token in beyond if tokenizer.encoder.id_to_token(int(token)) is None]
    if unknown:
        raise DataError(
            f"token {unknown[0]} is not one of the {size:,} of {tokenizer.folder}: the dataset was built with another "
            "tokenizer; give the right one with --tokenizer DIR"
        )


def _texts(decode: Callable[[Sequence[int]], str], ids: list[int], bounds: Sequence[int]) -> list[str]:
    """Return the text of each stretch between two bounds.

    A stretch is decoded with what stands around it: alone, some tokenizers would drop its first space, and a
    character's bytes may lie in several tokens.
    """
    partial = {token for token in set(ids) if "\ufffd" in decode([token])}
    texts = []
    for start, end in pairwise(bounds):
        left, right = max(0, start - 1), end
        while left and (ids[left] in partial or ids[left - 1] in partial):
            left -= 1
        while right < len(ids) and ids[right] in partial:
            right += 1
        window = decode(ids[left:right])
        begin, past = (_place(decode, ids[left:border], window) for border in (start, end))
        texts.append(window[begin:past] if end < len(ids) else window[begin:])
    return texts


def _place(decode: Callable[[Sequence[int]], str], before: list[int], window: str) -> int:
    """Return how many characters of `window` the tokens `before` make whole."""
    for stop in range(len(before), 0, -1):
        text = decode(before[:stop])
        if window.startswith(text):
            return len(text)
    return 0
