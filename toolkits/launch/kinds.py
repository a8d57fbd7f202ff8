"""What a typed word may be: each kind says its values, reads a word, and knows which values are not built yet."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

SIZE = re.compile(r"(\d+(?:\.\d+)?)([MB])")
BILLION, MILLION = 1e9, 1e6


class NotBuiltYet(ValueError):
    """A value that the table knows and nothing answers to so far."""

    def __init__(self, instead: str) -> None:
        super().__init__(f"is not built yet; {instead}")


class Kind(Protocol):
    """What the table asks of a kind."""

    @property
    def values(self) -> str:
        """The values, as the table shows them."""

    @property
    def examples(self) -> tuple[str, ...]:
        """Words that stand for every sort of value: each works or is refused as not built yet."""

    def read(self, word: str) -> Any:
        """Return the value of `word`; raise ValueError that says what is wrong with it."""


@dataclass(frozen=True)
class OneOf:
    """A word out of a few; `works` maps it to its value."""

    works: Mapping[str, Any]
    not_built: tuple[str, ...] = ()

    @property
    def values(self) -> str:
        return ", ".join(self.examples)

    @property
    def examples(self) -> tuple[str, ...]:
        return (*self.works, *self.not_built)

    def read(self, word: str) -> Any:
        if word in self.not_built:
            raise NotBuiltYet("use " + " or ".join(self.works))
        if word not in self.works:
            raise ValueError(f"must be one of {self.values}")
        return self.works[word]


def words(*works: str, not_built: tuple[str, ...] = ()) -> OneOf:
    """Return a OneOf whose words stand for themselves."""
    return OneOf({word: word for word in works}, not_built)


SWITCH = OneOf({"true": True, "false": False})


@dataclass(frozen=True)
class Integer:
    """A whole number of at least `at_least`; nothing above `built_to` is built yet."""

    at_least: int = 1
    built_to: float = math.inf

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
        if number > self.built_to:
            raise NotBuiltYet(f"use {self.built_to:g}" if self.built_to >= self.at_least else "leave it unset")
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
    """Any word but an empty one: a path, a prefix."""

    values: str
    examples: tuple[str, ...] = ("some/path",)

    def read(self, word: str) -> str:
        if not word:
            raise ValueError("must not be empty")
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
    """How much of the optimizer's state lies in CPU memory."""

    @property
    def values(self) -> str:
        return "false, static, auto, or a fraction 0..1"

    @property
    def examples(self) -> tuple[str, ...]:
        return ("false", "static", "auto", "0.5", "1", "0")

    def read(self, word: str) -> bool:
        if word == "false":
            return False
        if word in ("static", "auto") or re.fullmatch(r"0(\.\d*)?|1(\.0*)?|\.\d+", word):
            raise NotBuiltYet("use false")
        raise ValueError(f"must be one of {self.values}")


def human_size(parameters: float) -> str:
    """Return a number of parameters as MODEL_SIZE writes it: `7.6B`, `0.5B`, `3.4M`."""
    scale, letter = (BILLION, "B") if parameters >= 1e8 else (MILLION, "M")
    return f"{parameters / scale:.1f}".removesuffix(".0") + letter
