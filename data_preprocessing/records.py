"""A line of JSON -> a conversation; whatever is wrong with it is said as `file:line: what`.

    read_rows(path)        the file's rows, still raw, each with the line it starts on
      -> parse_row(row)    the JSON value
      -> conversation(v)   checked messages of system, user and assistant

Three layouts of a row are known, told apart by their keys:

    alpaca     {"instruction": ..., "input": ..., "output": ..., "history": [[q, a], ...], "system": ...}
               `input`, `history` and `system` are optional. The question is `instruction`, and behind a
               newline `input`; when one of them is empty it is the other alone.
    messages   {"messages": [{"role": "user", "content": ...}, ...]}
    sharegpt   {"conversations": [{"from": "human", "value": ...}, ...], "system": ...}
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from toolkits.foundation.errors import DataError, UsageError

UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
CLIP = 120  # characters of a bad line that an error shows

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")

_BLANK = re.compile(r"[ \t\r\n]*")
_UNENCODABLE = re.compile("[\0\ud800-\udfff]")


class RowError(DataError):
    """What is wrong with one row; `reason` is the short code that reports count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Row:
    """One record as it stands in the file.

    `data` is the line's bytes (JSONL) or the value itself (an element of a JSON list), `line` the number
    of the line it starts on, `offset` that line's place in the file in bytes.
    """

    line: int
    data: Any
    offset: int = 0


@dataclass
class ReadReport:
    """What a reader found out about its file: the kind, and harmless oddities by name."""

    kind: str = "empty"
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Checked turns, and the name of the layout they came in."""

    messages: tuple[Message, ...]
    layout: str


# ------------------------------------------------------------------------------------------------ files


def read_rows(path: Path, report: ReadReport, *, encoding: str = "utf-8") -> Iterator[Row]:
    """Yield the rows of a JSON list or a JSONL file; which of them it is, the content says, not the name.

    A JSONL file is streamed, a JSON list is read whole. Raises DataError for a file that cannot be read
    any further, UsageError for an unknown encoding.
    """
    try:
        "".encode(encoding)
    except LookupError:
        raise UsageError(f"--encoding {encoding}: no such encoding; utf-8, gbk and gb18030 are common") from None
    with open(path, "rb") as file:
        start = file.peek(8192)
        if start.startswith(UTF16_MARKS):
            raise DataError(f"{path}: the file is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8")
        if start.startswith(UTF8_MARK):
            report.notes["byte order mark"] += 1
            start = start[len(UTF8_MARK) :]
            file.read(len(UTF8_MARK))
        is_list = start.lstrip()[:1] == b"["
        report.kind = "JSON list" if is_list else "JSONL"
        yield from _list_rows(path, file.read(), encoding) if is_list else _line_rows(file, report)


def _line_rows(file: BinaryIO, report: ReadReport) -> Iterator[Row]:
    behind = len(UTF8_MARK) * report.notes["byte order mark"]  # counted, because a pipe cannot tell its place
    for number, line in enumerate(file, start=1):
        offset, behind = behind, behind + len(line)
        if line.endswith(b"\r\n"):
            report.notes["CRLF lines"] += 1
        if not line.strip():
            report.notes["blank lines"] += 1
            continue
        yield Row(number, line, offset)


def _list_rows(path: Path, raw: bytes, encoding: str) -> Iterator[Row]:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {_encoding_fault(error, raw, encoding)}") from None
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    place = _skip_blanks(text, text.index("[") + 1)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}:{line + _lines_into(error, line)}: {_list_fault(error)}") from None
        yield Row(line, value)
        place = _skip_blanks(text, place)
        if text[place : place + 1] == ",":
            place = _skip_blanks(text, place + 1)
        elif text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            raise DataError(f"{path}:{line}: {_unclosed(text, place)}")
    if text[place + 1 :].strip():
        raise DataError(f"{path}: something follows behind the closing ']' of the list")


def _skip_blanks(text: str, place: int) -> int:
    match = _BLANK.match(text, place)
    assert match is not None  # the pattern accepts the empty string
    return match.end()


def _lines_into(error: Exception, line: int) -> int:
    return error.lineno - line if isinstance(error, json.JSONDecodeError) else 0


def _list_fault(error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "nested too deeply"
    at_end = not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated")
    hint = "the list is not closed: the file may be incomplete" if at_end else "a JSON list ends at its first fault"
    return f"{_syntax_fault(error)}; {hint}"


def _unclosed(text: str, place: int) -> str:
    if place == len(text):
        return "expected ',' or ']'; the list is not closed: the file may be incomplete"
    return f"expected ',' or ']' behind an element, found {_clipped(text[place:])!r}"


# ------------------------------------------------------------------------------------------------- rows


def parse_row(row: Row, *, encoding: str = "utf-8") -> Any:
    """Return the row's JSON value; RowError with reason `encoding` or `syntax` otherwise."""
    if not isinstance(row.data, bytes):
        return row.data
    if encoding.lower() in ("utf-8", "utf8"):
        try:
            return orjson.loads(row.data)
        except orjson.JSONDecodeError:
            pass  # the slower parser says what is wrong, or accepts what is merely unusual
    try:
        text = row.data.decode(encoding)
    except UnicodeDecodeError as error:
        raise RowError("encoding", _encoding_fault(error, row.data, encoding, offset=row.offset)) from None
    try:
        return json.loads(text)
    except RecursionError:
        raise RowError("syntax", "nested too deeply") from None
    except json.JSONDecodeError as error:
        hint = "" if row.data.endswith(b"\n") else "; last line has no newline: file may be incomplete"
        raise RowError("syntax", f"{_syntax_fault(error)}{hint}: {_clipped(text, error.pos)}") from None


def _encoding_fault(error: UnicodeDecodeError, raw: bytes, encoding: str, *, offset: int = 0) -> str:
    message = f"byte {raw[error.start]:#04x} at byte offset {offset + error.start} is not {encoding}"
    for other in ("gb18030", "utf-8"):
        try:
            raw.decode(other)
        except UnicodeDecodeError:
            continue
        return f"{message}; it reads as {other} (GBK is part of gb18030): try --encoding {other}"
    return f"{message}; give the file's encoding with --encoding, or mend the file"


def _syntax_fault(error: json.JSONDecodeError) -> str:
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


def _clipped(text: str, place: int = 0) -> str:
    """Return the part of `text` around `place`, a line of it at most."""
    start = max(0, place - CLIP // 2)
    clipped = text[start : start + CLIP].strip()
    return "... " * (start > 0) + clipped + " ..." * (start + CLIP < len(text))


# ---------------------------------------------------------------------------------------- conversations


def conversation(value: Any, *, merge_consecutive: bool = False) -> Conversation:
    """Return the conversation in a row's JSON value.

    `merge_consecutive` joins neighbours of one role by a newline. Raises RowError with reasons `layout`,
    `type`, `character`, `role`, `tools`, `turns` and `empty_answer`.
    """
    if not isinstance(value, dict):
        raise RowError("layout", f"a row must be a JSON object, this one is a {_json_type(value)}")
    if value.get("tools"):
        raise RowError("tools", "tools are not built yet")
    if "chosen" in value and "rejected" in value:
        raise RowError("layout", "preference pairs (chosen, rejected) are not built yet")
    key = next((key for key in LAYOUTS if key in value), None)
    if key is None:
        if "text" in value:
            raise RowError("layout", "plain text rows (`text`) are not built yet")
        keys = ", ".join(map(str, value)) or "none"
        raise RowError("layout", f"no known layout: expected one of the keys {', '.join(LAYOUTS)}; found {keys}")
    layout, read = LAYOUTS[key]
    messages = read(value)
    if merge_consecutive:
        messages = _merged(messages)
    check_turns(messages)
    return Conversation(tuple(messages), layout)


def check_turns(messages: list[Message]) -> None:
    """Check an optional system turn, then user and assistant in turns, the assistant last and never empty."""
    if not messages:
        raise RowError("turns", "the conversation has no turns")
    first = 1 if messages[0].role == "system" else 0
    for number, message in enumerate(messages[first:], start=first + 1):
        if message.role == "system":
            raise RowError("turns", f"turn {number} is system; only the first may be")
        expected = "user" if (number - first) % 2 else "assistant"
        if message.role != expected:
            raise RowError("turns", _order_fault(number, first, message.role))
    if messages[-1].role != "assistant":
        raise RowError("turns", f"turn {len(messages)}, the last, is {messages[-1].role}: no answer to train on")
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant" and not message.content.strip():
            raise RowError("empty_answer", f"turn {number} is an empty assistant turn: no trainable token")


def _order_fault(number: int, first: int, role: str) -> str:
    if number == first + 1:
        return f"turn {number} is {role}; the first turn behind the system one, if any, must be user"
    return f"turns {number - 1} and {number} are both {role}; --merge-consecutive joins such turns"


def _merged(messages: list[Message]) -> list[Message]:
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            merged[-1] = Message(message.role, f"{merged[-1].content}\n{message.content}")
        else:
            merged.append(message)
    return merged


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    messages = _system_of(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError("type", f"history must be a list of [question, answer], it is a {_json_type(history)}")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("type", f"history[{index}] must be [question, answer]")
        messages.append(Message("user", _text(pair[0], f"history[{index}][0]")))
        messages.append(Message("assistant", _text(pair[1], f"history[{index}][1]")))
    question = [_text(row["instruction"], "instruction")]
    if row.get("input") is not None:
        question.append(_text(row["input"], "input"))
    if "output" not in row:
        raise RowError("type", "output is missing")
    messages.append(Message("user", "\n".join(part for part in question if part)))
    messages.append(Message("assistant", _text(row["output"], "output")))
    return messages


def _from_messages(row: dict[str, Any]) -> list[Message]:
    return _turns(row, "messages", role_key="role", text_key="content")


def _from_sharegpt(row: dict[str, Any]) -> list[Message]:
    return _system_of(row) + _turns(row, "conversations", role_key="from", text_key="value")


def _system_of(row: dict[str, Any]) -> list[Message]:
    system = row.get("system")
    return [Message("system", _text(system, "system"))] if system not in (None, "") else []


def _turns(row: dict[str, Any], key: str, *, role_key: str, text_key: str) -> list[Message]:
    turns = row[key]
    if not isinstance(turns, list):
        raise RowError("type", f"{key} must be a list, it is a {_json_type(turns)}")
    messages = []
    for index, turn in enumerate(turns):
        path = f"{key}[{index}]"
        if not isinstance(turn, dict):
            raise RowError("type", f"{path} must be an object, it is a {_json_type(turn)}")
        role = _role(turn, role_key, path)
        if turn.get("tool_calls"):
            raise RowError("tools", f"{path}.tool_calls: tool calls are not built yet")
        messages.append(Message(role, _text(turn.get(text_key), f"{path}.{text_key}")))
    return messages


def _role(turn: dict[str, Any], key: str, path: str) -> str:
    known = f"known roles: {', '.join(ROLES)}"
    if key not in turn:
        raise RowError("role", f"{path}.{key} is missing; {known}")
    role = turn[key]
    if role in TOOL_ROLES:
        raise RowError("tools", f"{path}.{key} is {role!r}: tool turns are not built yet")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError("role", f"{path}.{key} is {role!r}; {known}")
    return ROLES[role]


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise RowError("type", f"{path} must be a string, it is {_json_type(value)}")
    bad = _UNENCODABLE.search(value)
    if bad:
        kind = "a NUL character" if bad[0] == "\0" else f"half of a surrogate pair (U+{ord(bad[0]):04X})"
        raise RowError("character", f"{path} has {kind} at character {bad.start()}")
    return value


def _json_type(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return names.get(type(value), "object")


LAYOUTS = {
    "messages": ("messages", _from_messages),
    "conversations": ("sharegpt", _from_sharegpt),
    "instruction": ("alpaca", _from_alpaca),
}
