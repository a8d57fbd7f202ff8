"""Where the better answers of correction pairs come from: expressions, a file of answers, or another model."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_preprocessing.reading import ReadReport, find_inputs, read_rows
from data_preprocessing.row_error import RowError
from data_preprocessing.rows import parse_row
from data_preprocessing.turns import json_type, text_of

from ..foundation.errors import DataError, raise_all
from .prompts import MOST_PROBLEMS, Question, key_of, question_in, with_system

ANSWER_KEYS = ("answer", "completion", "chosen", "output", "text")
PROMPT_KEYS = ("prompt", "messages", "conversations", "instruction")

Match = Any  # what an answer and its question have in common; None: their place


@dataclass(frozen=True)
class Corrections:
    """One of: expressions with their replacements, applied in order; a file of answers, by `key`; a better model."""

    replace: tuple[tuple[str, str], ...] = ()
    answers: Path | None = None
    key: str | None = None
    better: Path | None = None

    def problems(self) -> list[str]:
        """Return what is wrong with what was said, without a look at any file."""
        said = {"--replace": bool(self.replace), "--answers": self.answers, "--better": self.better}
        given = [flag for flag, value in said.items() if value]
        found = []
        if len(given) != 1:
            words = "none was" if not given else f"{' and '.join(given)} were"
            found.append(f"the better answers come from one of {', '.join(said)}: {words} given")
        if self.key is not None and self.answers is None:
            found.append("--key says which row of --answers belongs to which prompt: give --answers too")
        for expression, replacement in self.replace:
            try:
                re.compile(expression).sub(replacement, "")  # this reads the replacement too
            except (re.error, IndexError) as error:
                found.append(f"--replace {expression!r} {replacement!r}: {error}")
        return found

    def edited(self, text: str) -> tuple[str, list[int]]:
        """Return a text with every expression replaced, and how many times each was."""
        counts = []
        for expression, replacement in self.replace:
            text, count = re.subn(expression, replacement, text)
            counts.append(count)
        return text, counts


class _Given(NamedTuple):
    """An answer of a file: where it stands, and what it says which question it answers."""

    where: str
    match: Match
    text: str


@dataclass(frozen=True)
class Given:
    """The answers of a file in the order of the questions, and how many of the file answer none of them."""

    texts: list[str]
    num_unused: int = 0


def read_answers(file: Path, questions: Sequence[Question], *, key: str | None, system: str | None) -> Given:
    """Return the answers to `questions` in a JSONL file.

    A row is a text, or has it as `answer`, `completion`, `chosen`, `output` or `text`. With `key` it belongs to the
    question whose row says the same there; a row with a prompt of its own, which gets `system` as questions do, to
    that question; otherwise its place says so. Raises DataError that lists which rows do not fit.
    """
    problems: list[str] = []
    found = _read(file, key, system, problems)
    by_place = [one for one in found if one.match is None]
    if by_place and len(by_place) < len(found):
        odd = by_place[0] if found[0].match is not None else next(one for one in found if one.match is not None)
        problems.append(f"{odd.where}: some rows have a prompt and some have none; give all of them one")
    elif not problems:
        given = _by_place(file, found, questions, problems) if by_place else _by_match(file, found, questions, problems)
    more = len(problems) - MOST_PROBLEMS
    problems[MOST_PROBLEMS:] = [f"and {more} more"] * (more > 0)
    raise_all(DataError, f"{file} does not answer the prompts", problems)
    return given


def _read(file: Path, key: str | None, system: str | None, problems: list[str]) -> list[_Given]:
    found = []
    for path in find_inputs([file]):
        for row in read_rows(path, ReadReport()):
            where = f"{path}:{row.line}"
            try:
                found.append(_Given(where, *_answer(parse_row(row), where, key, system)))
            except RowError as error:
                problems.append(f"{where}: {error}")
    if not found and not problems:
        problems.append(f"{file}: there is no answer in it")
    return found


def _answer(value: Any, where: str, key: str | None, system: str | None) -> tuple[Match, str]:
    """Return what a row says which question it answers, and its answer."""
    if isinstance(value, str):
        value = {"answer": value}
    if not isinstance(value, dict):
        raise RowError("layout", f"an answer is a text or an object, this row is a {json_type(value)}")
    asked = question_in(value, where) if any(word in value for word in PROMPT_KEYS) else None
    text = asked.expected if asked else None
    if text is None:
        name = next((name for name in ANSWER_KEYS if name in value), None)
        if name is None:
            raise RowError("layout", f"no answer: expected one of {', '.join(ANSWER_KEYS)}; found {', '.join(value)}")
        text = text_of(value[name], name)
    if not text.strip():
        raise RowError("empty_answer", "the answer is empty")
    if key is not None:
        return key_of(value, key), text
    return (_asked(with_system([asked], system)[0]) if asked else None), text


def _by_place(file: Path, found: Sequence[_Given], questions: Sequence[Question], problems: list[str]) -> Given:
    if len(found) > len(questions):
        where = found[len(questions)].where
        problems.append(f"{where}: this is answer {len(questions) + 1:,}, and there are {len(questions):,} prompts")
    elif len(found) < len(questions):
        where = questions[len(found)].where
        problems.append(f"{where}: prompt {len(found) + 1:,} has no answer, {file} has {len(found):,}")
    return Given([one.text for one in found])


def _by_match(file: Path, found: Sequence[_Given], questions: Sequence[Question], problems: list[str]) -> Given:
    answers: dict[Match, _Given] = {}
    for one in found:
        first = answers.setdefault(one.match, one)
        if first.text != one.text:
            problems.append(f"{one.where}: another answer to what {first.where} answers")
    wanted = [question.key if question.key is not None else _asked(question) for question in questions]
    problems += [
        f"{question.where}: {file} has no answer to it"
        for question, match in zip(questions, wanted, strict=True)
        if match not in answers
    ]
    if problems:
        return Given([])
    return Given([answers[match].text for match in wanted], num_unused=len(answers.keys() - set(wanted)))


def _asked(question: Question) -> Match:
    said = [turn.for_template() for turn in question.messages], question.conversation.tools
    return json.dumps(said, sort_keys=True)
