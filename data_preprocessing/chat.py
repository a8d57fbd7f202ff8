"""A conversation -> tokens and loss mask, born together.

    render    the model's own chat template writes the text; spans of characters say what is trained
    encode    the tokenizer turns texts into ids; a token is trained when its characters lie in a span

What the assistant wrote is trained, with the end token behind it and without the newline behind that. The
spans come from the template's generation markers; without them they are derived: the prompt of a turn and
the conversation up to it are rendered too, and each must be a beginning of the next longer text. A row
where that does not hold is an error, never a guess.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding

from toolkits.foundation.errors import DataError

from .control_text import ControlText
from .records import Conversation, Message, RowError
from .template import CHATML_SOURCE, CHATML_TOKENS, ChatTemplate, Span, find_template
from .tokenizer import LoadedTokenizer, load_tokenizer, tokenizer_fingerprint

__all__ = ["ChatEncoder", "Rendered", "Sample", "tokenizer_fingerprint"]

CLIP = 60  # characters on each side of the place where two texts part


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it.

    `spans` are the trained characters, `num_control_texts` counts texts in messages that look like control
    tokens; when there are any, `text` holds them hidden (see control_text.py).
    """

    text: str
    spans: tuple[Span, ...]
    num_control_texts: int


@dataclass(frozen=True)
class Sample:
    """One row of a dataset: `tokens` int32 [n], `mask` uint8 [n] with 1 where a token is trained."""

    tokens: np.ndarray
    mask: np.ndarray


class ChatEncoder:
    """A tokenizer folder's chat template and encoder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: LoadedTokenizer = load_tokenizer(folder)
        source = find_template(self.tokenizer.folder, self.tokenizer.config)
        if source.origin == CHATML_SOURCE:
            _require_chatml_tokens(self.tokenizer)
        self.template = ChatTemplate(source, self.tokenizer.named)
        self._control = ControlText(self.tokenizer)
        self._shapes: dict[tuple[str, ...], str] = {}

    def render(self, conversation: Conversation) -> Rendered:
        """Return the conversation's text and trained spans.

        Raises RowError with reasons `template`, `dropped_turn`, `undecidable` and `no_end_token`.
        """
        hidden = [self._control.hide(message.content) for message in conversation.messages]
        messages = [
            Message(message.role, text) for message, (text, _) in zip(conversation.messages, hidden, strict=True)
        ]
        text, marked = self.template.render(messages)
        self._check_nothing_dropped(messages, text)
        answers = sum(message.role == "assistant" for message in messages)
        if marked and len(marked) < answers:
            raise RowError("undecidable", f"the template marks {len(marked)} spans as generated for {answers} answers")
        spans = marked or self._derived_spans(messages, text)
        ended = tuple((start, self._end_of_turn(text, start, end)) for start, end in spans)
        return Rendered(text, ended, sum(count for _, count in hidden))

    def encode(self, rendered: Sequence[Rendered]) -> list[Sample | RowError]:
        """Return a sample for each rendered text, or what is wrong with it (`control_text`, `all_masked`)."""
        plain = [row.text for row in rendered if not row.num_control_texts]
        encodings = iter(self.tokenizer.encoder.encode_batch(plain, add_special_tokens=False))
        samples: list[Sample | RowError] = []
        for row in rendered:
            try:
                if row.num_control_texts:
                    encoding, ids = self._control.encode(row.text)
                else:
                    encoding = next(encodings)
                    ids = np.array(encoding.ids, dtype=np.int32)
                samples.append(_sample(encoding, ids, row))
            except RowError as error:
                samples.append(error)
        return samples

    def _derived_spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Return the characters each answer adds, by rendering the conversation up to before and behind it."""
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt, _ = self.template.render(messages[:index], add_generation_prompt=True)
            last = index == len(messages) - 1
            answered = text if last else self.template.render(messages[: index + 1])[0]
            for shorter, longer in ((prompt, answered), (answered, text)):
                if not longer.startswith(shorter):
                    raise RowError("undecidable", self._parting(index + 1, shorter, longer))
            spans.append((len(prompt), len(answered)))
        return spans

    def _parting(self, turn: int, shorter: str, longer: str) -> str:
        pairs = enumerate(zip(shorter, longer, strict=False))
        place = next((at for at, (one, other) in pairs if one != other), min(len(shorter), len(longer)))
        near = slice(max(0, place - CLIP), place + CLIP)
        return (
            f"what the model writes in turn {turn} cannot be told from the template: "
            f"{self._control.show(shorter[near])!r} is not how {self._control.show(longer[near])!r} begins; "
            "add {% generation %} markers to the chat template"
        )

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Move the end of a trained span to right behind the turn's end token."""
        written = [match.end() for match in self._control.pattern.finditer(text, start, end)]
        if written and not text[written[-1] : end].strip():
            return written[-1]
        behind = self._control.pattern.match(text, end)
        if behind:
            return behind.end()
        tail = self._control.show(text[max(start, end - CLIP) : end])
        raise RowError(
            "no_end_token",
            f"the template puts no end token behind an answer ({tail!r}): the model would never learn to stop",
        )

    def _check_nothing_dropped(self, messages: Sequence[Message], text: str) -> None:
        missing = self._dropped_by_shape(tuple(message.role for message in messages))
        for number, message in enumerate(messages, start=1):
            if message.content.strip() not in text:
                missing = missing or f"turn {number} ({message.role})"
        if missing:
            raise RowError("dropped_turn", f"{missing} is not in the rendered text: the chat template dropped it")

    def _dropped_by_shape(self, roles: tuple[str, ...]) -> str:
        """Return the first turn that the template drops by its place, "" for none.

        A short message may stand in the text by chance, so each order of roles is tried once with contents
        that cannot.
        """
        if roles not in self._shapes:
            trial = [Message(role, f"content-of-turn-{number}.") for number, role in enumerate(roles, start=1)]
            try:
                text, _ = self.template.render(trial)
                dropped = [number for number, message in enumerate(trial, start=1) if message.content not in text]
            except RowError:
                dropped = []  # the row itself will say what the template dislikes
            self._shapes[roles] = f"turn {dropped[0]} ({roles[dropped[0] - 1]})" if dropped else ""
        return self._shapes[roles]


def _require_chatml_tokens(tokenizer: LoadedTokenizer) -> None:
    missing = [token for token in CHATML_TOKENS if token not in tokenizer.control]
    if missing:
        raise DataError(
            f"{tokenizer.folder} has no chat template, and ChatML needs the special tokens {', '.join(missing)} that "
            "this tokenizer lacks; put a chat_template.jinja into the folder"
        )


def _sample(encoding: Encoding, ids: np.ndarray, row: Rendered) -> Sample:
    mask = np.zeros(len(ids), dtype=np.uint8)
    for start, end in row.spans:
        first = _first_token(encoding, range(start, len(row.text)))
        past = _first_token(encoding, range(end, len(row.text)))
        # A token that begins inside the span is trained even when it ends outside.
        if past < len(ids) and _first_character(encoding, past) < end:
            past += 1
        mask[first:past] = 1
    if not mask.any():
        raise RowError("all_masked", "no token of this row is trained")
    return Sample(ids, mask)


def _first_token(encoding: Encoding, characters: Iterable[int]) -> int:
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
