"""Questions in, answers out: a loaded model with its texts, and a file's worth of questions in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..foundation.errors import DataError, raise_all
from ..foundation.progress import Progress
from .decoding import Decoded, Decoder, Decoding, Reason, Step, Watching
from .loading import Source, load_model, require_huggingface, require_kind
from .prompts import MOST_PROBLEMS, Question
from .texts import Texts


@dataclass(frozen=True)
class Answer:
    """What a model says to a question, why it ended there, and how many tokens it took, the end token too."""

    question: Question
    text: str
    reason: Reason
    num_tokens: int

    def as_json(self, *, raw: bool) -> dict[str, Any]:
        """Return a row that `temper data build` reads again; `raw`: the question is a plain text."""
        talk = self.question.conversation
        row: dict[str, Any] = {"prompt": self.question.text if raw else [turn.for_template() for turn in talk.messages]}
        row |= {"completion": self.text, "finish_reason": self.reason, "tokens": self.num_tokens}
        if self.question.expected is not None:
            row["expected"] = self.question.expected
        return row | ({"tools": list(talk.tools)} if talk.tools else {})


class Generator:
    """A model that answers; `template` False goes on from raw texts. Raises as `load_model` and `Texts` do."""

    def __init__(self, source: Source, decoding: Decoding, *, template: bool = True) -> None:
        require_huggingface(source.folder)
        require_kind(source, scores=False)
        self.texts = Texts(source.folder, template=template)  # what it lacks is said before minutes go into loading
        self.decoder = Decoder(load_model(source), self.texts.ends(), decoding)

    def answer(self, question: Question, tokens: Sequence[int], *, number: int, watching: Watching) -> Answer:
        """Return the answer to a question of these tokens; `number` says which random numbers it draws."""
        (decoded,) = self.decoder.decode([tokens], [number], watching=watching)
        return self._answer(question, decoded)

    def answer_all(self, questions: Sequence[Question], *, batch_size: int) -> list[Answer]:
        """Return the answers in the order of their questions, with progress on stderr.

        Raises DataError that lists the questions that the template refuses or the model cannot read whole.
        """
        tokens = self._tokens(questions)
        answers: dict[int, Answer] = {}
        with Progress("answering", len(questions), unit="answers") as progress:
            watching = Watching(step=_Counted(progress))
            for batch in batches_of([len(each) for each in tokens], batch_size):
                found = self.decoder.decode([tokens[number] for number in batch], batch, watching=watching)
                answers |= {
                    number: self._answer(questions[number], one) for number, one in zip(batch, found, strict=True)
                }
        return [answers[number] for number in range(len(questions))]

    def _answer(self, question: Question, decoded: Decoded) -> Answer:
        return Answer(question, self.texts.text(decoded.tokens), decoded.reason, decoded.num_tokens)

    def _tokens(self, questions: Sequence[Question]) -> list[list[int]]:
        tokens: list[list[int]] = []
        problems: list[str] = []
        for question in questions:
            try:
                tokens.append(self.texts.tokens(question))
            except DataError as error:
                problems.append(f"{question.where}: {error}")
                continue
            if not tokens[-1]:
                problems.append(f"{question.where}: the text is empty")
            elif self.decoder.room(len(tokens[-1])) == 0:
                problems.append(
                    f"{question.where}: {len(tokens[-1]):,} tokens, and the model reads {self.decoder.context:,} with "
                    "its answer"
                )
        more = len(problems) - MOST_PROBLEMS
        problems[MOST_PROBLEMS:] = [f"and {more} more"] * (more > 0)
        raise_all(DataError, "questions that cannot be asked", problems)
        return tokens


class _Counted:
    """Moves a progress line with the answers that end, and says how many tokens there are so far."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._tokens = progress, 0

    def __call__(self, step: Step) -> None:
        self._tokens += sum(token is not None for token in step.tokens)
        self._progress.advance(step.ended, beside=f"{self._tokens:,} tokens")


def batches_of(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield the numbers of texts, alike in length, the longest first: memory that runs out does so at once."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    for start in range(0, len(order), size):
        yield order[start : start + size]
