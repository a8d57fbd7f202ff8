"""What the checks see: the rows of a set, some hundreds at a time, as texts and as tokens."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..dataset import Kind
from ..records import Conversation, Document, Labelled, Preference, Prompt, Record
from ..row_error import RowError
from ..rows import STDIN
from ..tokenizer import LoadedTokenizer
from ..turns import Message


class Entry(NamedTuple):
    """What one row of the input says.

    `number` counts the input's rows, bad ones too. `question` is everything that is not answered: of a document or a
    prompt all of it. `answers` are what an assistant said, in a preference pair the better answer, and `rejected` the
    worse one.
    """

    number: int
    layout: str
    system: str
    question: str
    answers: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    label: bool | None = None

    @property
    def text(self) -> str:
        """Everything but the system turn, which many rows share."""
        return "\n".join((self.question, *self.answers, *self.rejected))


@dataclass
class Block:
    """Neighbouring rows: the good ones as `entries` and as samples, the bad ones with what is wrong.

    `tokens` int32 [n] and `mask` uint8 [n] hold the samples end to end, `lengths` int64 [samples]; a preference pair
    has two of them, other entries one.
    """

    entries: list[Entry]
    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    bad: list[tuple[int, RowError]] = field(default_factory=list)
    control_texts: int = 0
    rows_with_control_text: int = 0

    @cached_property
    def texts(self) -> list[str]:
        """The text of each entry."""
        return [entry.text for entry in self.entries]

    @cached_property
    def hashes(self) -> list[int]:
        """A number of 64 bits for the tokens of each entry: rows that train alike have equal ones."""
        each = len(self.lengths) // max(1, len(self.entries))
        ends = np.cumsum(self.lengths)[each - 1 :: each].tolist() if each else []
        tokens = np.ascontiguousarray(self.tokens, "<i4")
        return [hash_of(tokens[begin:end].tobytes()) for begin, end in pairwise([0, *ends])]

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each sample begins in `tokens`, int64 [samples]."""
        return np.cumsum(self.lengths) - self.lengths

    def numbers(self, samples: np.ndarray) -> list[int]:
        """Return the row numbers of samples, each once."""
        each = len(self.lengths) // max(1, len(self.entries))
        return [self.entries[place].number for place in np.unique(samples // max(1, each)).tolist()]


class Places:
    """Where each row of a set stands: eight bytes a row."""

    def __init__(self, sources: Sequence[Path] = (), *, dataset: Path | None = None, word: str = "row") -> None:
        self._sources = ["stdin" if path == STDIN else str(path) for path in sources]
        self._number_of = {path: number for number, path in enumerate(sources)}
        self._dataset, self._word = dataset, word
        self._file_of, self._line_of = array("i"), array("i")

    def add(self, source: Path, line: int) -> int:
        """Note the next row and return its number."""
        self._file_of.append(self._number_of[source])
        self._line_of.append(line)
        return len(self._line_of) - 1

    def __getitem__(self, number: int) -> str:
        if self._dataset is not None:
            return f"{self._dataset} {self._word} {number}"
        return f"{self._sources[self._file_of[number]]}:{self._line_of[number]}"

    def short(self, number: int, beside: str) -> str:
        """Return where a row stands, without the file when `beside` is a place in the same one."""
        place = self[number]
        file, _, line = place.rpartition(" " if self._dataset else ":")
        return (
            f"{self._word if self._dataset else 'line'} {line}" if beside.startswith(place[: len(file) + 1]) else place
        )

    def of(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """Return the places of some rows."""
        return tuple(self[number] for number in numbers)


@dataclass(frozen=True)
class Setting:
    """What a check may need to know of the set and of the run that it is for."""

    kind: Kind
    tokenizer: LoadedTokenizer
    places: Places
    name: str
    seq_lens: tuple[int, ...] = ()
    global_batch_size: int | None = None
    near_threshold: float = 0.8


def hash_of(data: bytes) -> int:
    """Return a number of 64 bits that tells `data` from others."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def entry_of(number: int, record: Record) -> Entry:
    """Return what a record says; `number` is its row's."""
    match record:
        case Document():
            return Entry(number, record.layout, "", record.text)
        case Labelled():
            return _entry(number, record.layout, record.conversation)._replace(label=record.label)
        case Prompt():
            return _entry(number, record.layout, record.conversation)
        case Conversation():
            return _entry(number, record.layout, record)
        case Preference():
            shared = record.num_shared
            prompt = Conversation(record.chosen.messages[:shared], record.layout)
            asked = _entry(number, record.layout, prompt)
            return asked._replace(
                question="\n".join((asked.question, *asked.answers)),
                answers=_said(record.chosen.messages[shared:]),
                rejected=_said(record.rejected.messages[shared:]),
            )
    raise AssertionError(f"a record of type {type(record)}")


def _entry(number: int, layout: str, conversation: Conversation) -> Entry:
    messages = conversation.messages
    return Entry(
        number,
        layout,
        "\n".join(_said(message for message in messages if message.role == "system")),
        "\n".join(_said(message for message in messages if message.role in ("user", "tool"))),
        _said(message for message in messages if message.role == "assistant"),
    )


def _said(messages: Iterable[Message]) -> tuple[str, ...]:
    return tuple(message.content if message.is_plain else _all_of(message) for message in messages)


def _all_of(message: Message) -> str:
    calls = (json.dumps(call["function"], ensure_ascii=False, default=str) for call in message.tool_calls)
    return "\n".join(part for part in chain((message.reasoning, message.content), calls) if part)
