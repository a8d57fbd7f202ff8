"""What the steps of a filter look at: the texts of a row, in whatever layout it came."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..records import Conversation, Document, Labelled, Preference, Prompt, Record, record
from ..rows import Row, parse_row
from ..turns import Message

Part = Literal["row", "prompt", "answers"]


class Facts:
    """One good row; `number` counts the rows of the input in front of it."""

    def __init__(self, number: int, source: Path, value: dict[str, Any], found: Record) -> None:
        self.number, self.source, self.value, self.record = number, source, value, found

    @cached_property
    def answers(self) -> list[tuple[int, str]]:
        """The answers that a model shall learn, each with the number of its turn.

        Not the rejected one of a pair, none that is labelled as bad or marked as not trained. A plain text is one.
        """
        found = self.record
        if isinstance(found, Document):
            return [(1, found.text)]
        if isinstance(found, Prompt) or (isinstance(found, Labelled) and not found.label):
            return []
        turns = list(enumerate(_turns(found), start=1))
        if isinstance(found, Preference):
            turns = turns[found.num_shared :]
        asked = [(number, turn) for number, turn in turns if turn.role == "assistant" and turn.loss != 0]
        return [(number, turn.content) for number, turn in asked if turn.content.strip()]

    @cached_property
    def prompt(self) -> str:
        """Everything in front of the last answer; of a plain text nothing."""
        found = self.record
        if isinstance(found, Document):
            return ""
        turns = _turns(found)
        if isinstance(found, Preference):
            turns = turns[: found.num_shared]
        elif not isinstance(found, Prompt):
            last = max(number for number, turn in enumerate(turns) if turn.role == "assistant")
            turns = turns[:last]
        return "\n".join(map(_said, turns))

    @cached_property
    def row(self) -> str:
        """Everything that is said, of a pair both answers; the descriptions of tools left out."""
        found = self.record
        if isinstance(found, Document):
            return found.text
        turns = list(_turns(found))
        if isinstance(found, Preference):
            turns += found.rejected.messages[found.num_shared :]
        return "\n".join(map(_said, turns))

    def text(self, part: Part) -> str:
        """Return one of the row's texts."""
        if part == "answers":
            return "\n".join(text for _, text in self.answers)
        return self.prompt if part == "prompt" else self.row

    @cached_property
    def identity(self) -> bytes:
        """All that the row says, tools and labels too, spelled the same in every layout."""
        found = self.record
        if isinstance(found, Document):
            said: Any = found.text
        elif isinstance(found, Preference):
            said = [found.chosen.messages, found.rejected.messages, found.chosen.tools]
        elif isinstance(found, Labelled):
            said = [found.conversation.messages, found.conversation.tools, found.label]
        elif isinstance(found, Prompt):
            said = [found.conversation.messages, found.conversation.tools, found.about]
        else:
            said = [found.messages, found.tools]
        return json.dumps([type(found).__name__, said], sort_keys=True, default=str).encode()


def facts_of(
    number: int, row: Row, *, encoding: str, merge_consecutive: bool, columns: tuple[tuple[str, str], ...]
) -> Facts:
    """Return what is known of a row; RowError when `temper data build` would refuse it."""
    value = parse_row(row, encoding=encoding)
    return Facts(number, row.source, value, record(value, merge_consecutive=merge_consecutive, columns=columns))


def _turns(found: Record) -> tuple[Message, ...]:
    if isinstance(found, Preference):
        return found.chosen.messages
    if isinstance(found, Conversation):
        return found.messages
    assert isinstance(found, Labelled | Prompt)  # a plain text has no turns
    return found.conversation.messages


def _said(turn: Message) -> str:
    calls = [json.dumps(call, ensure_ascii=False) for call in turn.tool_calls]
    return "\n".join(text for text in (turn.reasoning, turn.content, *calls) if text)
