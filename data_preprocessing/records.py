"""A row's JSON value -> a checked record; whatever is wrong with it is a RowError.

What a row is, its keys say:

    text          {"text": ...} and none of the keys below: a document for pre-training
    conversation  messages, ShareGPT conversations, alpaca, prompt and completion (see layouts.py)
    preference    one of these with "chosen" and "rejected": two answers to one prompt, the better one named
    labelled      a conversation with "label" or "kto_tag", true or false: an answer that is good, or is not
    prompt        a prompt with "answer", "solution", "reference" or "ground_truth" and nothing to train on: what an
                  answer that the model will write is held against

`tools` may be a list or its JSON text; what the model is told about them is up to its chat template.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .layouts import LAYOUTS, answers_of, messages_of, plain_turns, prompt_of, tools_of
from .row_error import RowError
from .turns import Message, PlainTurns, check_answers, check_prompt, check_turns, json_type, merged, text_of

REFERENCES = ("answer", "solution", "reference", "ground_truth")
LABELS = ("label", "kto_tag")
SPECIAL = frozenset((*REFERENCES, *LABELS, "chosen", "text"))  # keys without which a row is a conversation
LABEL_WORDS = {"true": True, "false": False}  # as CSV spells them


class Conversation(NamedTuple):
    """Checked turns, the name of the layout they came in, and the tools that the model may call, as JSON values."""

    messages: tuple[Message, ...]
    layout: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Document:
    """A plain text, never empty."""

    text: str
    layout: str = "text"


@dataclass(frozen=True)
class Preference:
    """Two conversations that differ from turn `num_shared` on; the first is the better one."""

    chosen: Conversation
    rejected: Conversation
    num_shared: int
    layout: str


@dataclass(frozen=True)
class Labelled:
    """A conversation whose last answer is good, or is not."""

    conversation: Conversation
    label: bool
    layout: str


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer; `about` holds everything else that its row says."""

    conversation: Conversation
    layout: str
    about: dict[str, Any] = field(default_factory=dict)


Record = Conversation | Document | Preference | Labelled | Prompt


def record(value: Any, *, merge_consecutive: bool = False, columns: Sequence[tuple[str, str]] = ()) -> Record:
    """Return what a row's JSON value is.

    `merge_consecutive` joins neighbouring turns of one role by a newline, `columns` are pairs of a key and what the
    row calls it.
    Raises RowError with reasons `layout`, `type`, `character`, `role`, `tools`, `turns`, `empty_answer`,
    `empty_text` and `same_answers`.
    """
    if not isinstance(value, dict):
        raise RowError("layout", f"a row must be a JSON object, this one is a {json_type(value)}")
    if columns:
        value = _renamed(value, columns)
    if SPECIAL.isdisjoint(value):
        return conversation(value, merge_consecutive=merge_consecutive)
    if "chosen" in value and "rejected" in value:
        return _preference(value, merge_consecutive)
    label = next((key for key in LABELS if isinstance(value.get(key), bool) or value.get(key) in LABEL_WORDS), None)
    if label is not None and _layout_of(value) is not None:
        talk = conversation(value, merge_consecutive=merge_consecutive)
        said = value[label]
        return Labelled(talk, said if isinstance(said, bool) else LABEL_WORDS[said], f"{talk.layout}, labelled")
    if any(key in value for key in REFERENCES) and prompt_of(value) is not None:
        return _prompt(value, merge_consecutive)
    if "text" in value and _layout_of(value) is None:
        return _document(value["text"])
    return conversation(value, merge_consecutive=merge_consecutive)


def plain_conversations(values: Sequence[Any]) -> PlainTurns | None:
    """Return what `record` would of rows that are conversations of plain turns, all of them; else None.

    Nearly all rows of nearly all files are such, and this takes a tenth of the time.
    """
    if set(map(type, values)) != {dict}:
        return None
    keys = set().union(*values)
    return plain_turns(values, keys) if SPECIAL.isdisjoint(keys) else None


def conversation(value: Any, *, merge_consecutive: bool = False) -> Conversation:
    """Return the conversation in a row's JSON value; see `record`."""
    if not isinstance(value, dict):
        raise RowError("layout", f"a row must be a JSON object, this one is a {json_type(value)}")
    layout = _layout_of(value)
    if layout is None:
        keys = ", ".join(map(str, value)) or "none"
        known = "messages, conversations, instruction, prompt and completion, text"
        raise RowError("layout", f"no known layout: expected one of the keys {known}; found {keys}")
    return _conversation(messages_of(layout, value), layout, value, merge_consecutive)


def _conversation(messages: list[Message], layout: str, value: dict[str, Any], merge_consecutive: bool) -> Conversation:
    if merge_consecutive:
        messages = merged(messages)
    check_turns(messages)
    check_answers(messages)
    return Conversation(tuple(messages), layout, tools_of(value))


def _layout_of(value: dict[str, Any]) -> str | None:
    for name, keys in LAYOUTS.items():
        if keys[0] in value and keys[-1] in value:
            return name
    return None


def _renamed(value: dict[str, Any], columns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    ours_of = {theirs: ours for ours, theirs in columns}
    missing = [theirs for theirs in ours_of if theirs not in value]
    if missing:
        keys = ", ".join(map(str, value)) or "none"
        raise RowError("layout", f"--columns names {', '.join(missing)}, which this row does not have; it has {keys}")
    replaced = ours_of.values()
    kept = {key: part for key, part in value.items() if key not in ours_of and key not in replaced}
    return kept | {ours: value[theirs] for theirs, ours in ours_of.items()}


def _document(value: Any) -> Document:
    text = text_of(value, "text")
    if not text.strip():
        raise RowError("empty_text", "text is empty: nothing to train on")
    return Document(text)


def _preference(value: dict[str, Any], merge_consecutive: bool) -> Preference:
    layout, shared, answers = answers_of(value)
    chosen, rejected = (_conversation([*shared, *answer], layout, value, merge_consecutive) for answer in answers)
    said = [[message._replace(loss=None) for message in side.messages] for side in (chosen, rejected)]
    if said[0] == said[1]:
        raise RowError("same_answers", "chosen and rejected are the same answer: nothing to prefer")
    pairs = zip(*said, strict=False)
    num_shared = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
    if num_shared is None or chosen.messages[num_shared].role != "assistant":
        raise RowError("turns", "chosen and rejected part before an answer: they must answer one prompt")
    return Preference(chosen, rejected, num_shared, f"{layout}, preference")


def _prompt(value: dict[str, Any], merge_consecutive: bool) -> Prompt:
    found = prompt_of(value)
    assert found is not None  # who calls has asked
    layout, messages, used = found
    if merge_consecutive:
        messages = merged(messages)
    check_turns(messages)
    check_prompt(messages)
    about = {key: part for key, part in value.items() if key not in used and key != "tools"}
    return Prompt(Conversation(tuple(messages), layout, tools_of(value)), f"{layout}, prompt", about)
