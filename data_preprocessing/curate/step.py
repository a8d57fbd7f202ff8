"""What a step of a filter is: settings, declared once, and what it does with rows.

A judge decides about each row alone. A chooser remembers a little of each row that comes to it, and decides when it
has seen all of them: which row is the first of its duplicates depends on the others.
"""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .facts import Facts, Part

Embed = Callable[[Sequence[str]], np.ndarray]


class Verdict(NamedTuple):
    """Why a row goes: the short code that reports count by, and a sentence."""

    reason: str
    message: str


class Choice(NamedTuple):
    """Which rows stay, bool [rows]; of the others, the row that each goes because of, -1 for none, int64 [rows].

    `message` is said of each row that goes, with `{other}` where that other row's place stands.
    """

    kept: np.ndarray
    because: np.ndarray
    reason: str
    message: str


class Judge(ABC):
    """Decides about rows one at a time; the same row always gets the same answer."""

    @abstractmethod
    def judge(self, rows: Sequence[Facts]) -> list[Verdict | None]:
        """Return for each row why it goes, None where it stays."""


class Chooser(ABC):
    """Decides when all rows have been seen."""

    @abstractmethod
    def remember(self, rows: Sequence[Facts]) -> None:
        """Note what is needed of rows, which come in the order of their numbers."""

    @abstractmethod
    def choose(self, rows: np.ndarray) -> Choice:
        """Decide about the rows with these numbers, int64, ascending; all of them were remembered."""


@dataclass
class Resources:
    """What steps share: a tokenizer folder, a model's embedding with its name, and what is known of rows already."""

    tokenizer: Path | None = None
    embed: Embed | None = None
    model: str = ""
    columns: dict[Any, "Column"] = field(default_factory=dict)

    def column(self, key: Any, values: Callable[[Sequence[Facts]], np.ndarray]) -> "Column":
        """Return the column called `key`, which one step fills and others may use."""
        return self.columns.setdefault(key, Column(values))


class Column:
    """One value, or a line of values, for each row that was remembered; `values` makes them for some rows."""

    def __init__(self, values: Callable[[Sequence[Facts]], np.ndarray]) -> None:
        self._make = values
        self._numbers: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._last = -1

    def remember(self, rows: Sequence[Facts]) -> None:
        """Note rows in the order of their numbers; those that another step has noted already are passed over."""
        rows = [row for row in rows if row.number > self._last]
        if rows:
            self._last = rows[-1].number
            self._numbers.append(np.array([row.number for row in rows], np.int64))
            self._values.append(self._make(rows))

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the values of the rows with these numbers, [rows, ...]."""
        self._numbers, self._values = [np.concatenate(self._numbers)], [np.concatenate(self._values)]
        numbers, values = self._numbers[0], self._values[0]
        return values if len(rows) == len(numbers) else values[np.searchsorted(numbers, rows)]


def option(said: str, default: Any = dataclasses.MISSING, *, choices: Sequence[str] = ()) -> Any:
    """Declare a setting of a step with its explanation."""
    return field(default=default, metadata={"said": said, "choices": tuple(choices)})


def part_option(default: Part) -> Any:
    """Declare the setting that says which text of a row is looked at."""
    return option("which text of a row is looked at", default, choices=("row", "prompt", "answers"))


@dataclass(frozen=True)
class Step:
    """A step's settings; its docstring says what it does."""

    name: ClassVar[str]
    reasons: ClassVar[Mapping[str, str]]  # code: what it means

    def problems(self) -> list[str]:
        """Return what is wrong with the settings, beyond their types."""
        return []

    def start(self, resources: Resources) -> Judge | Chooser:
        """Return what decides about rows; UsageError when something that it needs was not given."""
        raise NotImplementedError


def drawn(seed: int, *what: object) -> int:
    """Return a number of 64 bits that looks random and depends on seed and `what` alone."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest(), "big")


def text_to_compare(row: Facts, part: Part) -> str:
    """Return one of the row's texts; where it has none, one that no other row has: two of nothing are no duplicates."""
    text = row.text(part)
    return text if text.strip() else fingerprint(str(row.number).encode()).hex()


def fingerprint(text: bytes) -> bytes:
    """Return 16 bytes that tell one content from another."""
    return hashlib.blake2b(text, digest_size=16).digest()
