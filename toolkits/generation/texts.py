"""Questions -> tokens and tokens -> text, by the same template and tokenizer that datasets are built with.

So a tuned model reads what it was trained on, and control text that somebody types stays text.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from conversion.generation_config import ends_of
from data_preprocessing.chat import ChatEncoder
from data_preprocessing.records import Conversation
from data_preprocessing.row_error import RowError
from data_preprocessing.template import CHATML_SOURCE
from data_preprocessing.tokenizer import load_tokenizer
from data_preprocessing.turns import Message

from ..foundation.errors import DataError
from .prompts import Question

_TRIAL = Conversation((Message("user", "a"), Message("assistant", "b")), "messages")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HALF = "\ufffd"  # what the first bytes of a character decode to


class Texts:
    """The tokenizer of a HuggingFace directory and, unless texts are raw, its chat template.

    Raises DataError when the folder has no tokenizer, or no chat template that could be used.
    """

    def __init__(self, folder: Path, *, template: bool = True) -> None:
        self._chat = _chat(folder) if template else None
        self._tokenizer = load_tokenizer(folder) if self._chat is None else self._chat.tokenizer
        self._control = frozenset(self._tokenizer.control_ids)
        self._folder = folder

    def tokens(self, question: Question) -> list[int]:
        """Return what the model reads before it answers; raise RowError for what the template refuses.

        A raw text gets the tokens that the tokenizer itself puts around one, and control text in it is meant.
        """
        if self._chat is None:
            return list(self._tokenizer.encoder.encode(question.text).ids)
        samples = self._chat.encode([self._chat.render_prompt(question.conversation)])
        for error in samples.errors.values():
            raise error
        return samples.tokens.tolist()

    def whole(self, conversation: Conversation) -> list[int]:
        """Return the tokens of a conversation with its answers, as a dataset has them; RowError as for `tokens`."""
        assert self._chat is not None
        samples = self._chat.encode([self._chat.render(conversation)])
        for error in samples.errors.values():
            raise error
        return samples.tokens.tolist()

    def ends(self) -> list[int]:
        """Return the tokens that end an answer: the model's, the tokenizer's and the template's."""
        ends = set(ends_of(self._folder))
        eos = self._tokenizer.named.get("eos_token")
        if eos is not None and eos in self._tokenizer.ids:
            ends.add(self._tokenizer.ids[eos])
        return sorted(ends | self._end_of_template())

    def text(self, tokens: Sequence[int]) -> str:
        """Return what tokens say, without control tokens."""
        return self._tokenizer.encoder.decode([token for token in tokens if token not in self._control])

    def stream(self) -> "TextStream":
        """Return what turns the tokens of one answer into text while they come."""
        return TextStream(self)

    def _end_of_template(self) -> set[int]:
        if self._chat is None:
            return set()
        try:
            samples = self._chat.encode([self._chat.render(_TRIAL)])
        except RowError:  # a template that takes no such conversation; the model's own ends are known
            return set()
        return set(samples.tokens[samples.mask == 1][-1:].tolist())


class TextStream:
    """Tokens go in one by one, text comes out when it is whole characters."""

    def __init__(self, texts: Texts) -> None:
        self._texts, self._tokens, self._start, self._said = texts, list[int](), 0, 0

    def add(self, token: int) -> str:
        """Return the text that this token completes; often none."""
        self._tokens.append(token)
        return self._rest(held=True)

    def end(self) -> str:
        """Return what was held back."""
        return self._rest(held=False)

    def _rest(self, *, held: bool) -> str:
        # Decoders may treat what stands first differently, so the tokens said last are decoded along each time.
        before = self._texts.text(self._tokens[self._start : self._said])
        after = self._texts.text(self._tokens[self._start :])
        if held and after.endswith(HALF):
            return ""
        self._start, self._said = self._said, len(self._tokens)
        return after[len(before) :]


def for_terminal(text: str) -> str:
    """Return a text without what would move a terminal's cursor or change its colours."""
    return _UNPRINTABLE.sub(HALF, text)


def _chat(folder: Path) -> ChatEncoder:
    try:
        chat = ChatEncoder(folder, encoder="tokenizers", may_be_untrained=True)
    except DataError as error:
        if "no chat template" not in str(error):
            raise
        raise DataError(f"{error}, or say --no-template to go on from raw text") from None
    if chat.template.source.origin == CHATML_SOURCE:
        print(f"note: {CHATML_SOURCE}; --no-template goes on from raw text", file=sys.stderr, flush=True)
    return chat
