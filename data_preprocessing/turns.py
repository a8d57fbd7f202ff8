"""Turns of a conversation: what one is, and which may follow which."""

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

from .row_error import RowError

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
ROLES |= {"tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool", "ipython": "tool"}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: an assistant's turn whose text is the call
FOLLOWERS = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}

_UNENCODABLE = re.compile("[\0\ud800-\udfff]")


class Message(NamedTuple):
    """One turn: `role` is system, user, assistant or tool.

    `tool_calls` are JSON values as chat templates take them, `reasoning` what an assistant thought before it
    answered. `loss`: the weight that the row asks for in training, 0 for none; None when it does not say. `name`
    and `tool_call_id` are kept for the templates that write them.
    """

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    reasoning: str = ""
    name: str | None = None
    tool_call_id: str | None = None
    loss: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether role and content say everything that a template is told."""
        return self[2:6] == ((), "", None, None)

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        said: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            said["tool_calls"] = list(self.tool_calls)
        if self.reasoning:
            said["reasoning_content"] = self.reasoning
        if self.name is not None:
            said["name"] = self.name
        if self.tool_call_id is not None:
            said["tool_call_id"] = self.tool_call_id
        return said


class PlainTurns(NamedTuple):
    """Good conversations of turns that are a role and a text each, and no text blank.

    `roles` are those of each conversation, `contents` the texts of all turns. Good but for this: a text may have half
    of a surrogate pair.
    """

    layout: str
    roles: list[tuple[str, ...]]
    contents: list[str]


def merged(messages: list[Message]) -> list[Message]:
    """Join neighbouring turns of one role, but not results of tools, by a newline."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        if before and before.role == message.role != "tool" and not before.tool_calls:
            texts = [text for text in (before.content, message.content) if text]
            if before.loss is not None and message.loss is not None and before.loss != message.loss:
                raise RowError("turns", f"{message.role} turns that would be joined differ in loss")
            loss = before.loss if message.loss is None else message.loss
            reasoning = "\n".join(text for text in (before.reasoning, message.reasoning) if text)
            joined[-1] = message._replace(content="\n".join(texts), reasoning=reasoning, loss=loss)
        else:
            joined.append(message)
    return joined


def check_turns(messages: list[Message]) -> None:
    """Check an optional system turn, then user and assistant in turns; results follow calls of tools."""
    fault = _order_fault(tuple([(message.role, len(message.tool_calls)) for message in messages]))
    if fault:
        raise RowError("turns", fault)


@lru_cache(4096)
def good_roles(said: tuple[Any, ...]) -> tuple[str, ...] | None:
    """Return the roles of turns without calls by our names; None where one is unknown or the order is wrong."""
    roles = tuple([ROLES.get(role, "") for role in said])
    wrong = "" in roles or _order_fault(tuple([(role, 0) for role in roles])) or roles[-1] != "assistant"
    return None if wrong else roles


@lru_cache(4096)
def _order_fault(turns: tuple[tuple[str, int], ...]) -> str:
    """Return what is wrong with the order of (role, number of calls), "" for nothing."""
    if not turns:
        return "the conversation has no turns"
    first = 1 if turns[0][0] == "system" else 0
    before, waiting = "system", 0  # calls without a result
    for number, (role, calls) in enumerate(turns[first:], start=first + 1):
        if role == "system":
            return f"turn {number} is system; only the first may be"
        if role not in FOLLOWERS[before]:
            return _follower_fault(number, first, before, role)
        if role == "tool" and not waiting:
            return f"turn {number} is the result of a tool that no call in front of it asks for"
        waiting = waiting - 1 if role == "tool" else calls
        before = role
    return ""


def _follower_fault(number: int, first: int, before: str, role: str) -> str:
    if number == first + 1:
        return f"turn {number} is {role}; the first turn behind the system one, if any, must be user"
    if before == role:
        return f"turns {number - 1} and {number} are both {role}; --merge-consecutive joins such turns"
    return f"turn {number} is {role} behind {before}; {' or '.join(FOLLOWERS[before])} must follow"


def check_answers(messages: list[Message]) -> None:
    """Check that the last turn is an answer, and that no answer is empty."""
    if messages[-1].role != "assistant":
        raise RowError("turns", f"turn {len(messages)}, the last, is {messages[-1].role}: no answer to train on")
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant" and not (message.content.strip() or message.tool_calls):
            raise RowError("empty_answer", f"turn {number} is an empty assistant turn: no trainable token")


def check_prompt(messages: list[Message]) -> None:
    """Check that the last turn waits for an answer."""
    if messages[-1].role not in ("user", "tool"):
        raise RowError("turns", f"turn {len(messages)}, the last of a prompt, is {messages[-1].role}; nothing is asked")


def text_of(value: Any, path: str) -> str:
    """Return a string that can be encoded; RowError `type` or `character` otherwise."""
    if not isinstance(value, str):
        raise RowError("type", f"{path} must be a string, it is {json_type(value)}")
    if not is_encodable(value):
        bad = _UNENCODABLE.search(value)
        assert bad is not None  # one of the two was seen
        kind = "a NUL character" if bad[0] == "\0" else f"half of a surrogate pair (U+{ord(bad[0]):04X})"
        raise RowError("character", f"{path} has {kind} at character {bad.start()}")
    return value


def is_encodable(text: str) -> bool:
    """Whether a text has neither a NUL nor half of a surrogate pair."""
    if "\0" in text:
        return False
    try:
        return text.isascii() or text.encode() is not None  # many times faster than looking for them
    except UnicodeEncodeError:
        return False


def json_of(value: Any, path: str) -> Any:
    """Return a JSON value that may be given as its text, every string in it checked."""
    if isinstance(value, str):
        text = text_of(value, path)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowError("tools", f"{path} is text that is not JSON ({error})") from None
    check_strings(value, path)
    return value


def check_strings(value: Any, path: str) -> None:
    """Check every string in a JSON value; RowError `character` otherwise."""
    if isinstance(value, str):
        text_of(value, path)
    elif isinstance(value, dict):
        for key, inner in value.items():
            text_of(key, f"a key of {path}")
            check_strings(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_strings(inner, f"{path}[{index}]")


def json_type(value: Any) -> str:
    """Return what JSON calls the type of a value."""
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return names.get(type(value), "object")
