"""The layouts that people's rows come in -> messages.

    messages     {"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}
                 assistant turns may have `tool_calls`, `reasoning_content` and `loss` (true, false or a weight);
                 `tool` turns follow calls
    sharegpt     {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}
                 from: human, gpt, system, function_call (its value is the call, or a list of calls), observation
    alpaca       {"instruction": ..., "input": ..., "output": ..., "history": [[q, a], ...], "system": ...}
                 `input`, `history` and `system` are optional. The question is `instruction`, and behind a newline
                 `input`; when one of them is empty it is the other alone.
    completion   {"prompt": ..., "completion": ...}, each a text or a list of messages

Two answers to one prompt come as "chosen" and "rejected" beside the prompt in any of these layouts; each of them is
a text, a message, a list of messages, or, with no prompt beside them, a whole conversation.
"""

from collections.abc import Sequence, Set
from itertools import accumulate, chain, pairwise, repeat
from operator import contains, itemgetter
from typing import Any

from .dataset import LEAST_WEIGHT, MOST_WEIGHT
from .row_error import RowError
from .turns import CALL_ROLES, ROLES, Message, PlainTurns, good_roles, is_encodable, json_of, json_type, text_of

LAYOUTS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction",),
    "completion": ("prompt", "completion"),
}
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
LOSS_KEYS = ("loss", "weight")
NOTHING_BESIDE = {"tools": (None, "", []), "system": (None, ""), "history": (None, [])}  # add nothing to the turns
PAIR = ("user", "assistant")


def messages_of(layout: str, row: dict[str, Any]) -> list[Message]:
    """Return the turns of a row in one of the `LAYOUTS`."""
    if layout == "messages":
        return _system_of(row) + _turns(row["messages"], "messages")
    if layout == "sharegpt":
        return _system_of(row) + _turns(row["conversations"], "conversations")
    if layout == "completion":
        return _system_of(row) + _said(row["prompt"], "prompt", "user") + _said(row["completion"], "completion")
    if "output" not in row:
        raise RowError("type", "output is missing")
    return [*_alpaca_prompt(row), Message("assistant", text_of(row["output"], "output"))]


def plain_turns(rows: Sequence[dict[str, Any]], keys: Set[str]) -> PlainTurns | None:
    """Return what conversations of plain turns say; None when one of the rows is anything else, good or not.

    `keys` are those of all rows. A thing is looked at in all rows at once: that takes a fraction of the time.
    """
    layout = next((name for name, wanted in LAYOUTS.items() if not keys.isdisjoint(wanted)), "")
    for name, empty in NOTHING_BESIDE.items():
        if name in keys and any(row.get(name) not in empty for row in rows):
            return None
    try:
        return PLAIN[layout](layout, rows, keys) if layout in PLAIN else None
    except (KeyError, TypeError, IndexError):  # something else stands where a list, an object or a text should
        return None


def _plain_lists(layout: str, rows: Sequence[dict[str, Any]], keys: Set[str]) -> PlainTurns | None:
    turns = list(map(itemgetter(*LAYOUTS[layout]), rows))
    every = list(chain.from_iterable(turns))
    if set(map(len, every)) != {2}:
        return None
    role, text = ("role", "content") if "role" in every[0] else ("from", "value")
    said, contents = list(map(itemgetter(role), every)), list(map(itemgetter(text), every))
    if not _are_plain(contents):
        return None
    borders = pairwise(accumulate(map(len, turns), initial=0))
    roles = [good_roles(tuple(said[first:past])) for first, past in borders]
    known = [one for one in roles if one]
    return PlainTurns(layout, known, contents) if len(known) == len(roles) else None


def _plain_pairs(layout: str, rows: Sequence[dict[str, Any]], keys: Set[str]) -> PlainTurns | None:
    asked, answered = ("instruction", "output") if layout == "alpaca" else ("prompt", "completion")
    questions, answers = list(map(itemgetter(asked), rows)), list(map(itemgetter(answered), rows))
    if layout == "alpaca" and "input" in keys:
        inputs = [row.get("input") for row in rows]
        if set(map(type, questions)) != {str} or not set(map(type, inputs)) <= {str, type(None)}:
            return None
        both = zip(questions, inputs, strict=True)
        questions = [f"{one}\n{other}" if one and other else one or other for one, other in both]
    contents = list(chain.from_iterable(zip(questions, answers, strict=True)))
    return PlainTurns(layout, [PAIR] * len(rows), contents) if _are_plain(contents) else None


PLAIN = {"messages": _plain_lists, "sharegpt": _plain_lists, "alpaca": _plain_pairs, "completion": _plain_pairs}


def _are_plain(contents: Sequence[Any]) -> bool:
    """Whether all are texts, none is blank and none has a NUL."""
    if set(map(type, contents)) != {str} or "" in contents or any(map(str.isspace, contents)):
        return False
    return not any(map(contains, contents, repeat("\0")))


def answers_of(row: dict[str, Any]) -> tuple[str, list[Message], tuple[list[Message], list[Message]]]:
    """Return layout, the messages of the prompt, and those of the chosen and the rejected answer."""
    found = prompt_of(row)
    layout, shared = (found[0], found[1]) if found else ("whole conversations", _system_of(row))
    chosen, rejected = _said(row["chosen"], "chosen"), _said(row["rejected"], "rejected")
    return layout, shared, (chosen, rejected)


def prompt_of(row: dict[str, Any]) -> tuple[str, list[Message], tuple[str, ...]] | None:
    """Return layout, messages and keys of a row's prompt; None when it has none."""
    if "prompt" in row and "completion" not in row:
        return "prompt", _system_of(row) + _said(row["prompt"], "prompt", "user"), ("prompt", "system")
    for layout, key in (("messages", "messages"), ("sharegpt", "conversations")):
        if key in row:
            turns = _system_of(row) + _turns(row[key], key)
            waits = bool(turns) and turns[-1].role in ("user", "tool")
            return (layout, turns, (key, "system")) if waits or "chosen" in row else None
    if "instruction" in row and "output" not in row:
        return "alpaca", _alpaca_prompt(row), ("instruction", "input", "history", "system")
    return None


def tools_of(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the tools that a row tells the model about, each as {"type": "function", "function": {...}}."""
    if row.get("tools") in (None, "", []):
        return ()
    tools = json_of(row["tools"], "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools", f"tools must be a list of objects, it is {json_type(tools)}")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _said(value: Any, path: str, role: str = "assistant") -> list[Message]:
    """Return what a text, a message or a list of messages says."""
    if isinstance(value, list):
        return _turns(value, path)
    if isinstance(value, dict):
        return [_turn(value, path)]
    return [Message(role, text_of(value, path))]


def _alpaca_prompt(row: dict[str, Any]) -> list[Message]:
    messages = _system_of(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError("type", f"history must be a list of [question, answer], it is a {json_type(history)}")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("type", f"history[{index}] must be [question, answer]")
        messages.append(Message("user", text_of(pair[0], f"history[{index}][0]")))
        messages.append(Message("assistant", text_of(pair[1], f"history[{index}][1]")))
    question = [text_of(row["instruction"], "instruction")]
    if row.get("input") is not None:
        question.append(text_of(row["input"], "input"))
    messages.append(Message("user", "\n".join(part for part in question if part)))
    return messages


def _system_of(row: dict[str, Any]) -> list[Message]:
    system = row.get("system")
    return [Message("system", text_of(system, "system"))] if system not in (None, "") else []


def _turns(turns: Any, path: str) -> list[Message]:
    if not isinstance(turns, list):
        raise RowError("type", f"{path} must be a list, it is a {json_type(turns)}")
    return [_plain_turn(turn) or _turn(turn, f"{path}[{index}]") for index, turn in enumerate(turns)]


def _plain_turn(turn: Any) -> Message | None:
    """Return the message of a turn that is a role and a good text, None for any other: nearly all are, so this is
    what reading costs."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    text, said = turn.get("content") or turn.get("value"), turn.get("role") or turn.get("from")
    if type(said) is not str or said not in ROLES or type(text) is not str or not is_encodable(text):
        return None
    return Message(ROLES[said], text)


def _turn(turn: Any, path: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError("type", f"{path} must be an object, it is a {json_type(turn)}")
    sharegpt = "from" in turn or "value" in turn or path.startswith("conversations")
    role_key, text_key = ("from", "value") if sharegpt and "role" not in turn else ("role", "content")
    role = _role(turn, role_key, path)
    if len(turn) == 2 and role in ROLES:
        return Message(ROLES[role], text_of(turn.get(text_key), f"{path}.{text_key}"))
    if role in CALL_ROLES:
        calls = _calls(json_of(turn.get(text_key), f"{path}.{text_key}"), f"{path}.{text_key}")
        return Message("assistant", "", calls, loss=_loss(turn, path))
    calls = _calls(turn.get("tool_calls") or [], f"{path}.tool_calls")
    content, reasoning = turn.get(text_key), turn.get("reasoning_content") or ""
    if content is None and calls:
        content = ""  # what OpenAI leaves out when the turn is a call
    if (calls or reasoning) and ROLES[role] != "assistant":
        raise RowError("role", f"{path} is {role}, and only an assistant calls tools and reasons")
    named = {key: text_of(turn[key], f"{path}.{key}") for key in ("name", "tool_call_id") if turn.get(key) is not None}
    return Message(
        ROLES[role],
        text_of(content, f"{path}.{text_key}"),
        calls,
        reasoning=text_of(reasoning, f"{path}.reasoning_content"),
        loss=_loss(turn, path),
        **named,
    )


def _role(turn: dict[str, Any], key: str, path: str) -> str:
    known = f"known roles: {', '.join([*ROLES, *CALL_ROLES])}"
    if key not in turn:
        raise RowError("role", f"{path}.{key} is missing; {known}")
    role = turn[key]
    if not isinstance(role, str) or (role not in ROLES and role not in CALL_ROLES):
        raise RowError("role", f"{path}.{key} is {role!r}; {known}")
    return role


def _calls(value: Any, path: str) -> tuple[dict[str, Any], ...]:
    """Return the calls of a turn, with arguments as an object: what the templates of models ask for."""
    calls = []
    for index, call in enumerate(value if isinstance(value, list) else [value]):
        place = f"{path}[{index}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("tools", f"{place} must be an object with name and arguments")
        arguments = json_of(function.get("arguments", {}), f"{place}.arguments")
        if not isinstance(arguments, dict):
            raise RowError("tools", f"{place}.arguments must be an object, it is {json_type(arguments)}")
        known = {"id": text_of(call["id"], f"{place}.id")} if call.get("id") is not None else {}
        name = text_of(function["name"], f"{place}.name")
        calls.append({**known, "type": "function", "function": {"name": name, "arguments": arguments}})
    return tuple(calls)


def _loss(turn: dict[str, Any], path: str) -> float | None:
    """Return how much a turn asks to be trained, to the hundredth; None when it does not say."""
    key = next((key for key in LOSS_KEYS if turn.get(key) is not None), None)
    if key is None:
        return None
    value = turn[key]
    if value in (True, False):  # 1 and 0 are equal to them
        return float(value)
    if type(value) in (int, float) and LEAST_WEIGHT <= value <= MOST_WEIGHT:
        return round(float(value), 2)
    raise RowError("type", f"{path}.{key} must be true, false or a weight from {LEAST_WEIGHT} to {MOST_WEIGHT}")
