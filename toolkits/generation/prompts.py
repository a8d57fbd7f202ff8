"""What is asked: texts from a command line, lines of a text file, and rows of a dataset up to their last answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from data_preprocessing.layouts import prompt_of, tools_of
from data_preprocessing.reading import ReadReport, find_inputs, read_rows
from data_preprocessing.records import Conversation, Document, Labelled, Preference, Prompt, record
from data_preprocessing.row_error import RowError
from data_preprocessing.rows import STDIN, Row, parse_row
from data_preprocessing.turns import Message, check_prompt, check_turns

from ..foundation.errors import DataError, UsageError, raise_all

T = TypeVar("T")
MOST_PROBLEMS = 20  # listed; one wrong layout would list a whole file


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer, the answer that its row has if it has one, and where it stands."""

    conversation: Conversation
    expected: str | None = None
    where: str = "--prompt"
    key: str | None = None  # what its row says under the key that was asked for

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns."""
        return self.conversation.messages

    @property
    def text(self) -> str:
        """What a model without a chat template goes on from; UsageError when there is more than one plain turn."""
        if len(self.messages) == 1 and self.messages[0].role == "user" and not self.conversation.tools:
            return self.messages[0].content
        raise UsageError(f"{self.where} is a conversation, and --no-template goes on from plain texts only")


def question_of(text: str, *, where: str = "--prompt") -> Question:
    """Return the question that a plain text is."""
    return Question(Conversation((Message("user", text),), "text"), where=where)


def read_questions(source: Path, *, key: str | None = None) -> list[Question]:
    """Return the questions of a file, of those that a pattern names, or of stdin (`-`).

    They are rows in any layout that `temper data build` reads, whose last answer is what is expected, or plain lines;
    with `key` rows that have it. Raises DataError that lists what is wrong with which row.
    """
    plain: dict[Path, bool] = {}  # what the first row of a file is, all are

    def question(row: Row, file: Path, where: str) -> Question:
        if plain.setdefault(file, isinstance(row.data, bytes) and not row.data.lstrip().startswith(b"{")):
            value, asked = None, question_of(_line(row), where=where)
        else:
            value = parse_row(row)
            asked = question_in(value, where)
        return asked if key is None else replace(asked, key=key_of(value, key))

    return read_all(source, question, wrong="rows that ask nothing", empty="nothing is asked in it")


def read_all(source: Path, read: Callable[[Row, Path, str], T], *, wrong: str, empty: str) -> list[T]:
    """Return what `read` makes of each row, its file, and where it stands; RowErrors are listed, some at most.

    `source` is a file, a pattern or stdin (`-`). Raises DataError that begins with `wrong`, or says that it is `empty`.
    """
    found: list[T] = []
    problems: list[str] = []
    for file in find_inputs([source]):
        for row in read_rows(file, ReadReport()):
            where = f"{'stdin' if file == STDIN else file}:{row.line}"
            try:
                found.append(read(row, file, where))
            except RowError as error:
                problems.append(f"{where}: {error}")
            if len(problems) == MOST_PROBLEMS:
                break
    raise_all(DataError, wrong, problems)
    if not found:
        raise DataError(f"{source}: {empty}")
    return found


def with_system(questions: Sequence[Question], system: str | None) -> list[Question]:
    """Return the questions with `system` in front of those that have no system turn of their own."""
    if not system:
        return list(questions)
    turn = Message("system", system)
    return [
        replace(question, conversation=question.conversation._replace(messages=(turn, *question.messages)))
        if question.messages[0].role != "system"
        else question
        for question in questions
    ]


def key_of(value: Any, key: str) -> str:
    """Return what a row says under `key`, a text or a number; RowError when it does not."""
    said = value.get(key) if isinstance(value, dict) else None
    if not isinstance(said, str | int):
        raise RowError("layout", f"the row has no text or number {key!r}")
    return str(said)


def _line(row: Row) -> str:
    try:
        return row.data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RowError("encoding", f"not UTF-8: {error}") from None


def question_in(value: Any, where: str) -> Question:
    """Return what a row asks, up to its last answer; RowError when it asks nothing."""
    is_pair = not isinstance(value, dict) or {"chosen", "rejected"} <= value.keys()
    waiting = None if is_pair else prompt_of(value)
    if waiting is not None:
        layout, messages, _ = waiting
        check_turns(messages)
        check_prompt(messages)
        return Question(Conversation(tuple(messages), layout, tools_of(value)), where=where)
    found = record(value)
    if isinstance(found, Document):
        return question_of(found.text, where=where)
    if isinstance(found, Preference):
        return _before(found.chosen, found.num_shared, where)
    assert not isinstance(found, Prompt)  # it waits for an answer
    talk = found.conversation if isinstance(found, Labelled) else found
    question = _before(talk, len(talk.messages) - 1, where)
    return replace(question, expected=None) if isinstance(found, Labelled) and not found.label else question


def _before(talk: Conversation, count: int, where: str) -> Question:
    return Question(talk._replace(messages=talk.messages[:count]), talk.messages[count].content, where)
