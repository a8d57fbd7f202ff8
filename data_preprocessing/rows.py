"""A row as it stands in its file -> its JSON value, or what is wrong with it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import orjson

from .row_error import RowError

STDIN = Path("-")
DIGITS, LONG_NUMBER = bytes.maketrans(b"123456789", b"000000000"), b"0" * 19
CLIP = 120  # characters of a bad line that an error shows


class Row(NamedTuple):
    """One record as it stands in its file.

    `data` is the line's bytes (JSONL) or the value itself, `line` the number of the line it starts on (of the row,
    in Parquet), `offset` that line's place in the file in bytes.
    """

    line: int
    data: Any
    offset: int = 0
    source: Path = STDIN


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows of a file, in columns; see `Row`."""

    data: Sequence[Any]
    lines: Sequence[int]
    offsets: Sequence[int]
    source: Path = STDIN

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Rows":
        """Return rows of one file in columns."""
        lines, data, offsets, sources = zip(*rows, strict=True)
        return cls(data, lines, offsets, sources[0])

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> "Rows": ...
    def __getitem__(self, place: int | slice) -> "Row | Rows":
        data, line, offset = self.data[place], self.lines[place], self.offsets[place]
        if isinstance(place, slice):
            return Rows(data, line, offset, self.source)  # type: ignore[arg-type]  # slices, all three
        return Row(line, data, offset, self.source)  # type: ignore[arg-type]  # numbers


def parse_rows(rows: Rows, *, encoding: str = "utf-8") -> list[Any]:
    """Return the JSON value of each row, or the RowError that `parse_row` raises; only its texts are exact.

    See `is_exact` for its numbers.
    """
    if is_utf8(encoding) and set(map(type, rows.data)) == {bytes}:
        try:
            return list(map(orjson.loads, rows.data))
        except orjson.JSONDecodeError:
            pass  # of one row at least
    values: list[Any] = []
    for row in rows:
        try:
            values.append(parse_row(row, encoding=encoding))
        except RowError as error:
            values.append(error)
    return values


def is_exact(data: Any) -> bool:
    """Whether the fast parser reads each number in a row's `data`: it makes integers beyond 64 bits to floats."""
    return type(data) is not bytes or LONG_NUMBER not in data.translate(DIGITS)


def parse_row(row: Row, *, encoding: str = "utf-8") -> Any:
    """Return the row's JSON value; RowError with reason `encoding` or `syntax` otherwise."""
    if not isinstance(row.data, bytes):
        return row.data
    if is_utf8(encoding) and is_exact(row.data):
        try:
            return orjson.loads(row.data)
        except orjson.JSONDecodeError:
            pass  # the slower parser says what is wrong, or accepts what is merely unusual
    try:
        text = row.data.decode(encoding)
    except UnicodeDecodeError as error:
        raise RowError("encoding", encoding_fault(error, row.data, encoding, offset=row.offset)) from None
    try:
        return json.loads(text)
    except RecursionError:
        raise RowError("syntax", "nested too deeply") from None
    except json.JSONDecodeError as error:
        hint = "" if row.data.endswith(b"\n") else "; last line has no newline: file may be incomplete"
        raise RowError("syntax", f"{syntax_fault(error)}{hint}: {clipped(text, error.pos)}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RowError("syntax", str(error)) from None


def is_utf8(encoding: str) -> bool:
    """Whether an encoding's name is one of UTF-8's."""
    return encoding.lower() in ("utf-8", "utf8")


def encoding_fault(error: UnicodeDecodeError, raw: bytes, encoding: str, *, offset: int = 0) -> str:
    """Say which byte is not of the encoding, and which other one may be meant."""
    message = f"byte {raw[error.start]:#04x} at byte offset {offset + error.start} is not {encoding}"
    for other in ("gb18030", "utf-8"):
        try:
            raw.decode(other)
        except UnicodeDecodeError:
            continue
        return f"{message}; it reads as {other} (GBK is part of gb18030): try --encoding {other}"
    return f"{message}; give the file's encoding with --encoding, or mend the file"


def syntax_fault(error: json.JSONDecodeError) -> str:
    """Say what JSON expects where."""
    said = error.msg.replace("Expecting", "expected", 1)
    if said == "expected ',' delimiter":
        said = f"expected ',' or '{_open_bracket_end(error.doc[: error.pos])}'"
    return f"{said} at column {error.colno}"


def _open_bracket_end(text: str) -> str:
    """Return the bracket that would close the innermost open one of `text`."""
    expected = []
    for token in re.findall(r'"(?:\\.|[^"\\])*"|[\[\]{}]', text):
        if token in "[{":
            expected.append("]" if token == "[" else "}")
        elif token in "]}" and expected:
            expected.pop()
    return expected[-1] if expected else "}"


def clipped(text: str, place: int = 0) -> str:
    """Return the part of `text` around `place`, a line of it at most."""
    start = max(0, place - CLIP // 2)
    clipped = text[start : start + CLIP].strip()
    return "... " * (start > 0) + clipped + " ..." * (start + CLIP < len(text))
