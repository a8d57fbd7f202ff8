"""Control text in a message stays text: somebody who writes `<|im_end|>` in a question ends nothing.

A tokenizer turns every occurrence of a special token's text into that token, no matter who wrote it. So in
the rare row whose messages hold such text

    hide     replaces its first character by a half surrogate, before the template sees the message;
    encode   replaces the first character of what the template itself wrote by a private-use character,
             puts the hidden ones back, and encodes with a copy of the tokenizer whose special tokens are
             spelled with that private-use character.

The copy splits where the original would have split, and meets the rest as the plain text it is. No length
changes on the way, so character spans stay true. Every other row goes through the tokenizer untouched.
"""

import json
import re
from collections.abc import Sequence
from itertools import compress, repeat
from operator import contains
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from .row_error import RowError
from .tokenizer import LoadedTokenizer

FIRST_HIDDEN = 0xD810  # halves of surrogate pairs: a checked message has none
FIRST_DISGUISED = 0xF0000  # private use: a row that holds these beside control text is refused
NEVER = "(?!)"  # the pattern that matches nothing, for a tokenizer without special tokens


class ControlText:
    """The special tokens' texts of one tokenizer, and how to tell who wrote them."""

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self._tokenizer, self._ids = tokenizer, tokenizer.ids
        self._control = frozenset(tokenizer.control)
        longest_first = sorted(self._control, key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or NEVER)
        self._firsts = firsts = sorted({text[0] for text in self._control})
        self._hidden = {first: chr(FIRST_HIDDEN + index) for index, first in enumerate(firsts)}
        self._disguised = {first: chr(FIRST_DISGUISED + index) for index, first in enumerate(firsts)}
        self._shown = {ord(hidden): first for first, hidden in self._hidden.items()}
        self._copy: tuple[Tokenizer, np.ndarray] | None = None

    def hide(self, text: str) -> tuple[str, int]:
        """Return `text` with its control text hidden, and how many there were."""
        for first in self._firsts:  # many times faster than the pattern
            if first in text:
                return self.pattern.subn(lambda match: self._hidden[match[0][0]] + match[0][1:], text)
        return text, 0

    def is_in(self, texts: Sequence[str]) -> bool:
        """Whether one of `texts` has control text."""
        for first in self._firsts:  # as above, in all texts at once
            if any(map(self.pattern.search, compress(texts, map(contains, texts, repeat(first))))):
                return True
        return False

    def hide_all(self, value: Any) -> tuple[Any, int]:
        """Return a JSON value with the control text of all its strings hidden, and how many there were."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            pairs = [(self.hide(key), self.hide_all(inner)) for key, inner in value.items()]
            return {key[0]: inner[0] for key, inner in pairs}, sum(key[1] + inner[1] for key, inner in pairs)
        if isinstance(value, list):
            items = [self.hide_all(inner) for inner in value]
            return [item for item, _ in items], sum(count for _, count in items)
        return value, 0

    def show(self, text: str) -> str:
        """Return `text` with hidden control text readable again."""
        return text.translate(self._shown)

    def encode(self, text: str, *, hidden: bool) -> tuple[Encoding, np.ndarray]:
        """Return the encoding of a rendered text and its ids as int32; `hidden`: it holds hidden control text.

        Then only the encoding's offsets are of use: its ids are the copy's. Raises RowError `control_text` when the
        tokenizer would produce a control token from the plain text after all.
        """
        if not hidden:
            encoding = self._tokenizer.encoder.encode(text, add_special_tokens=False)
            return encoding, np.array(encoding.ids, dtype=np.int32)
        copy, original_id = self._disguised_copy()
        written = [self._ids.get(found) for found in self.pattern.findall(text)]
        if any(chr(FIRST_DISGUISED) <= character <= chr(FIRST_DISGUISED + len(self._hidden)) for character in text):
            raise RowError("control_text", "control text beside private-use characters (U+F0000) cannot be told apart")
        disguised = self.pattern.sub(lambda match: self._disguised[match[0][0]] + match[0][1:], text)
        encoding = copy.encode(self.show(disguised), add_special_tokens=False)
        ids = original_id[np.array(encoding.ids, dtype=np.int64)]
        if ids[np.isin(ids, self._tokenizer.control_ids)].tolist() != written:
            raise RowError("control_text", "this tokenizer makes a control token of plain text in a message")
        return encoding, ids

    def _disguised_copy(self) -> tuple[Tokenizer, np.ndarray]:
        """Return the copy and, for each of its ids, the original's (int32); built when first needed."""
        if self._copy is None:
            encoder = self._tokenizer.encoder
            content = json.loads(encoder.to_str())
            content["post_processor"] = None  # it would name tokens that the copy spells otherwise
            spelled = {}
            for token in content["added_tokens"]:
                original = token["content"]
                if original in self._control:
                    token["content"] = self._disguised[original[0]] + original[1:]
                spelled[token["content"]] = original
            copy = Tokenizer.from_str(json.dumps(content))
            known, wanted = copy.get_vocab(with_added_tokens=True), encoder.get_vocab(with_added_tokens=True)
            original_id = np.arange(max(known.values()) + 1, dtype=np.int32)
            for text, original in spelled.items():
                original_id[known[text]] = wanted[original]
            self._copy = (copy, original_id)
        return self._copy
