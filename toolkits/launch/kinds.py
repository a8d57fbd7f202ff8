"""What a typed word may be: each kind says its values and reads a word."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

SIZE = re.compile(r"(\d+(?:\.\d+)?)([MB])")
BILLION, MILLION = 1e9, 1e6


class Kind(Protocol):
    """What the table asks of a kind."""

    @property
    def values(self) -> str:
        """The values, as the table shows them."""

    @property
    def examples(self) -> tuple[str, ...]:
        """Words that stand for every sort of value."""

    def read(self, word: str) -> Any:
        """Return the value of `word`; raise ValueError that says what is wrong with it."""


@dataclass(frozen=True)
class OneOf:
    """A word out of a few; `works` maps it to its value."""

    works: Mapping[str, Any]

    @property
    def values(self) -> str:
        return ", ".join(self.examples)

    @property
    def examples(self) -> tuple[str, ...]:
        return tuple(self.works)

    def read(self, word: str) -> Any:
        if word not in self.works:
            raise ValueError(f"must be one of {self.values}")
        return self.works[word]


def words(*works: str) -> OneOf:
    """Return a OneOf whose words stand for themselves."""
    return OneOf({word: word for word in works})


SWITCH = OneOf({"true": True, "false": False})


@dataclass(frozen=True)
class Integer:
    """A whole number of at least `at_least`."""

    at_least: int = 1

    @property
    def values(self) -> str:
        return "int"

    @property
    def examples(self) -> tuple[str, ...]:
        return tuple(str(self.at_least + extra) for extra in (0, 1, 3))

    def read(self, word: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", word):
            raise ValueError("must be a whole number")
        number = int(word)
        if number < self.at_least:
            raise ValueError(f"must be at least {self.at_least}")
        return number


@dataclass(frozen=True)
class Number:
    """A number of at least 0."""

    @property
    def values(self) -> str:
        return "float"

    @property
    def examples(self) -> tuple[str, ...]:
        return ("1e-5", "0.5", "3")

    def read(self, word: str) -> float:
        try:
            number = float(word)
        except ValueError:
            raise ValueError("must be a number") from None
        if not 0 <= number < math.inf:  # written so that a nan fails too
            raise ValueError("must be a number of at least 0")
        return number


@dataclass(frozen=True)
class Text:
    """Any word but an empty one: a path, a prefix; `check` raises ValueError for others that do not fit."""

    values: str
    examples: tuple[str, ...] = ("some/path",)
    check: Callable[[str], Any] = str

    def read(self, word: str) -> str:
        if not word:
            raise ValueError("must not be empty")
        self.check(word)
        return word


@dataclass(frozen=True)
class ModelSize:
    """A number of parameters with M or B, or `auto`, which reads as None."""

    known: tuple[str, ...]

    @property
    def values(self) -> str:
        return f"{' '.join(self.known)}, any other number with M or B, or auto"

    @property
    def examples(self) -> tuple[str, ...]:
        return (*self.known, "0.9B", "350M", "auto")

    def read(self, word: str) -> float | None:
        if word == "auto":
            return None
        match = SIZE.fullmatch(word)
        if match is None or not float(match[1]):
            raise ValueError("must be a number with M or B, such as 7B, or auto")
        return float(match[1]) * (BILLION if match[2] == "B" else MILLION)


@dataclass(frozen=True)
class Offload:
    """How much of the optimizer's state lies in CPU memory: `0` to `1`, or `auto`."""

    @property
    def values(self) -> str:
        return "false, static, auto, or a fraction 0..1"

    @property
    def examples(self) -> tuple[str, ...]:
        return ("false", "static", "auto", "0.5", "1", "0")

    def read(self, word: str) -> str:
        named = {"false": "0", "static": "1", "auto": "auto"}
        if word in named or re.fullmatch(r"0(\.\d*)?|1(\.0*)?|\.\d+", word):
            return named.get(word, word)
        raise ValueError(f"must be one of {self.values}")


def human_size(parameters: float) -> str:
    """Return a number of parameters as MODEL_SIZE writes it: `7.6B`, `0.5B`, `3.4M`."""
    scale, letter = (BILLION, "B") if parameters >= 1e8 else (MILLION, "M")
    return f"{parameters / scale:.1f}".removesuffix(".0") + letter
