"""Correction pairs: what a model answers is the rejected answer, the same answer corrected the chosen one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_preprocessing.turns import is_encodable

from ..foundation.errors import CheckpointError, raise_all
from .answering import Answer, Generator
from .corrections import Corrections, Given
from .decoding import Decoding
from .loading import Source, require_huggingface
from .prompts import Question

LEFT_OUT = {
    "unchanged": "the correction changes nothing",
    "cut short": "the answer ran into --max-new-tokens, and half an answer is not what to learn",
    "empty": "one of the two answers says nothing",
    "no text": "one of the two answers has a character that no dataset takes",
}


@dataclass(frozen=True)
class Pair:
    """Two answers to a question, the better one first."""

    question: Question
    chosen: str
    rejected: str

    def as_json(self) -> dict[str, Any]:
        """Return the row: `prompt`, `chosen` and `rejected` as lists of messages, and `tools` where there are any."""
        talk = self.question.conversation
        row: dict[str, Any] = {"prompt": [turn.for_template() for turn in talk.messages]}
        for name, text in (("chosen", self.chosen), ("rejected", self.rejected)):
            row[name] = [{"role": "assistant", "content": text}]
        return row | ({"tools": list(talk.tools)} if talk.tools else {})


@dataclass(frozen=True)
class Pairs:
    """Pairs in the order of their questions, those left out by reason, and how many times each expression matched."""

    pairs: list[Pair]
    left_out: Counter[str] = field(default_factory=Counter)
    replaced: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Models:
    """The model whose answers are rejected, and how it and a better one choose their answers."""

    source: Source
    decoding: Decoding
    batch_size: int


def make_pairs(questions: Sequence[Question], corrections: Corrections, given: Given | None, models: Models) -> Pairs:
    """Return the pairs that come of `corrections`; `given` are the answers of its file when it has one.

    Raises as `Generator` and its answers do; both models are looked at before the first is loaded.
    """
    _check_folders(models.source, corrections)
    said = _answers(models.source, questions, models)
    replaced = [0] * len(corrections.replace)
    if given is not None:
        chosen: Sequence[str | None] = given.texts
    elif corrections.better is not None:
        better = Source(corrections.better, dtype=models.source.dtype, device=models.source.device)
        chosen = [_whole(answer) for answer in _answers(better, questions, models)]
    else:
        edited = [corrections.edited(answer.text) for answer in said]
        chosen = [text for text, _ in edited]
        replaced = [sum(counts) for counts in zip(*(counts for _, counts in edited), strict=True)]
    pairs, left_out = [], Counter[str]()
    for question, one, other in zip(questions, chosen, map(_whole, said), strict=True):
        reason = _reason(one, other)
        if reason is None and one is not None and other is not None:
            pairs.append(Pair(question, one, other))
        else:
            left_out[str(reason)] += 1
    return Pairs(pairs, left_out, replaced)


def _check_folders(source: Source, corrections: Corrections) -> None:
    problems = []
    for folder in filter(None, (source.folder, corrections.better)):
        try:
            require_huggingface(folder)
        except CheckpointError as error:
            problems.append(str(error))
    raise_all(CheckpointError, "models that cannot answer", problems)


def _answers(source: Source, questions: Sequence[Question], models: Models) -> list[Answer]:
    """Return a model's answers; it leaves memory before another comes."""
    return Generator(source, models.decoding).answer_all(questions, batch_size=models.batch_size)


def _whole(answer: Answer) -> str | None:
    return None if answer.reason == "length" else answer.text


def _reason(chosen: str | None, rejected: str | None) -> str | None:
    """Return why two answers make no pair; None when they do. An answer that was cut short is None."""
    if chosen is None or rejected is None:
        return "cut short"
    if not (chosen.strip() and rejected.strip()):
        return "empty"
    if chosen.strip() == rejected.strip():
        return "unchanged"
    return None if is_encodable(chosen) and is_encodable(rejected) else "no text"
