"""Which characters of a rendered conversation the assistant wrote, and whether anything of it was left out.

A template may mark what is generated. Without marks it is derived: the prompt of a turn and the conversation up to
that turn are rendered too, and each must be a beginning of the next longer text. A row where that does not hold is
an error that shows the two texts, never a guess.
"""

import json
from collections.abc import Sequence
from typing import Any

from .control_text import ControlText
from .masks import Span
from .row_error import RowError
from .template import ChatTemplate
from .turns import Message

CLIP = 60  # characters on each side of the place where two texts part
THOUGHT_ENDS = "</think>"  # templates of models that reason cut what stands in front of it, out of earlier turns

Tools = Sequence[dict[str, Any]]


class SpanFinder:
    """Finds what is trained in conversations that one template renders."""

    def __init__(self, template: ChatTemplate, control: ControlText) -> None:
        self._template, self._control = template, control
        self._dropped: dict[tuple[object, ...], str] = {}

    def render(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[Span], bool]:
        """Return the text, the spans that answers take with their end tokens, and whether there is one for each.

        Raises RowError with reasons `template`, `dropped_turn`, `undecidable` and `no_end_token`.
        """
        text, marked = self._template.render(messages, tools=tools)
        self.check_nothing_dropped(messages, tools, text)
        answers = sum(message.role == "assistant" for message in messages)
        if marked and len(marked) < answers:
            raise RowError("undecidable", f"the template marks {len(marked)} spans as generated for {answers} answers")
        spans = marked or self._derived(messages, tools, text)
        ends = [self._end_of_turn(text, start, end) for start, end in spans]
        unended = [span for span, end in zip(spans, ends, strict=True) if end is None]
        if len(spans) - len(unended) < answers:  # a template may mark an answer in several pieces
            raise RowError("no_end_token", self._no_end(text, *unended[0]))
        ended = [(start, end if found is None else found) for (start, end), found in zip(spans, ends, strict=True)]
        return text, ended, len(spans) == answers

    def _derived(self, messages: Sequence[Message], tools: Tools, text: str) -> list[Span]:
        """Return the characters each answer adds, by rendering the conversation up to before and behind it."""
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt, _ = self._template.render(messages[:index], tools=tools, add_generation_prompt=True)
            last = index == len(messages) - 1
            answered = text if last else self._template.render(messages[: index + 1], tools=tools)[0]
            for shorter, longer in ((prompt, answered), (prompt, text)):
                if not longer.startswith(shorter):
                    raise RowError("undecidable", self._parting(index + 1, shorter, longer))
            end = len(answered) if text.startswith(answered) else _end_without_thought(prompt, answered, text)
            if end is None:
                raise RowError("undecidable", self._parting(index + 1, answered, text))
            spans.append((len(prompt), end))
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

    def _end_of_turn(self, text: str, start: int, end: int) -> int | None:
        """Return where the end token ends that closes a trained span, None when there is none."""
        written = [match.end() for match in self._control.pattern.finditer(text, start, end)]
        if written and not text[written[-1] : end].strip():
            return written[-1]
        behind = self._control.pattern.match(text, end)
        return behind.end() if behind else None

    def _no_end(self, text: str, start: int, end: int) -> str:
        tail = self._control.show(text[max(start, end - CLIP) : end])
        return f"the template puts no end token behind an answer ({tail!r}): the model would never learn to stop"

    def check_nothing_dropped(self, messages: Sequence[Message], tools: Tools, text: str) -> None:
        """Raise RowError `dropped_turn` when something that the row says is not in the rendered text."""
        missing = self._dropped_by_shape(messages, len(tools))
        for number, message in enumerate(messages, start=1):
            if not _contains(text, message):
                missing = missing or f"turn {number} ({message.role})"
        if missing:
            raise RowError("dropped_turn", f"{missing} is not in the rendered text: the chat template dropped it")

    def _dropped_by_shape(self, messages: Sequence[Message], num_tools: int) -> str:
        """Return the first thing that the template drops by its place, "" for none.

        A short message may stand in the text by chance, so conversations of each shape are tried once with contents
        that cannot.
        """
        shape = (num_tools, *((m.role, bool(m.content), len(m.tool_calls), bool(m.reasoning)) for m in messages))
        if shape not in self._dropped:
            trial, wanted = _trial(messages)
            tools = [_trial_tool(number) for number in range(num_tools)]
            wanted += [(f"tool-{number}.", "a tool of `tools`") for number in range(num_tools)]
            try:
                text, _ = self._template.render(trial, tools=tools)
                self._dropped[shape] = next((what for said, what in wanted if said not in text), "")
            except RowError:
                self._dropped[shape] = ""  # the row itself will say what the template dislikes
        return self._dropped[shape]


def _end_without_thought(prompt: str, answered: str, text: str) -> int | None:
    """Return where an answer ends in `text`, which has it without the thought that `answered` has in front of it."""
    _, found, rest = answered[len(prompt) :].rpartition(THOUGHT_ENDS)
    rest = rest.lstrip()
    start = len(text) - len(text[len(prompt) :].lstrip())
    if not found or not rest or not text.startswith(rest, start):
        return None
    return start + len(rest)


def _contains(text: str, message: Message) -> bool:
    content = message.content.strip()
    if content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
        return True
    return message.role == "assistant" and content.rpartition(THOUGHT_ENDS)[2].strip() in text


def _trial(messages: Sequence[Message]) -> tuple[list[Message], list[tuple[str, str]]]:
    """Return messages of the same shape, and what of them must stand in the text with what to call it."""
    last_question = max((number for number, message in enumerate(messages, 1) if message.role == "user"), default=0)
    trial, wanted = [], []
    for number, message in enumerate(messages, start=1):
        turn = f"turn {number} ({message.role})"
        content = f"content-of-turn-{number}." if message.content else ""
        reasoning = f"reasoning-of-turn-{number}." if message.reasoning else ""
        calls = []
        for index in range(len(message.tool_calls)):
            name, key, value = (f"{what}-{number}-{index}." for what in ("call", "argument", "value"))
            calls.append({"id": "call00000", "type": "function", "function": {"name": name, "arguments": {key: value}}})
            wanted += [(said, f"the call of a tool in {turn}") for said in (name, key, value)]
        wanted.append((content, turn))
        if number > last_question:  # of earlier turns a template may cut it
            wanted.append((reasoning, f"the reasoning of {turn}"))
        trial.append(message._replace(content=content, reasoning=reasoning, tool_calls=tuple(calls)))
    return trial, wanted


def _trial_tool(number: int) -> dict[str, Any]:
    function = {"name": f"tool-{number}.", "description": "d", "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": function}
