"""A conversation that goes on: its turns are kept, and the oldest leave when the model can read no more."""

from collections.abc import Callable
from dataclasses import dataclass

from data_preprocessing.records import Conversation
from data_preprocessing.turns import Message

from ..foundation.errors import DataError
from .answering import Answer, Generator
from .decoding import Step, Watching
from .prompts import Question

ANSWERS_SHARE = 4  # of the context, a part in so many is kept free for the answer, when it may be that long


@dataclass(frozen=True)
class Reply:
    """An answer, and how many of the oldest questions, with their answers, were left out of what the model read."""

    answer: Answer
    num_forgotten: int


class Session:
    """A conversation with a model; `system` is its system turn, empty for none."""

    def __init__(self, generator: Generator, system: str = "") -> None:
        self._generator, self.system = generator, system
        self._turns: list[Message] = []  # user and assistant in turns
        self._asked = 0

    @property
    def turns(self) -> tuple[Message, ...]:
        """The questions and answers that are remembered."""
        return tuple(self._turns)

    def reset(self) -> None:
        """Forget every question and answer; the system turn stays."""
        self._turns.clear()

    def ask(self, text: str, *, say: Callable[[str], object], stopped: Callable[[], bool]) -> Reply:
        """Answer `text`, saying the answer's text while it comes; `stopped` is asked at each token.

        An answer that was stopped is remembered as far as it came; a question without an answer is not. Raises
        DataError for a question that the template refuses or that alone is too long.
        """
        turns, question, tokens = self._fitting(text)
        stream = self._generator.texts.stream()

        def step(found: Step) -> None:
            (token,) = found.tokens
            if token is not None:
                say(stream.add(token))

        watching = Watching(step, stopped)
        answer = self._generator.answer(question, tokens, number=self._asked, watching=watching)
        say(stream.end())
        self._asked += 1
        forgotten = (len(self._turns) + 1 - len(turns)) // 2
        if answer.text.strip():
            self._turns = [*turns, Message("assistant", answer.text)]
        else:
            self._turns = turns[:-1]
        return Reply(answer, forgotten)

    def _fitting(self, text: str) -> tuple[list[Message], Question, list[int]]:
        """Return as many of the last turns as the model can read with the question, and what it reads."""
        turns = [*self._turns, Message("user", text)]
        while True:
            system = [Message("system", self.system)] if self.system else []
            question = Question(Conversation((*system, *turns), "chat"), where="the question")
            tokens = self._generator.texts.tokens(question)
            decoder = self._generator.decoder
            wanted = decoder.decoding.max_new_tokens
            if decoder.context is not None:
                wanted = min(wanted, max(1, decoder.context // ANSWERS_SHARE))
            if decoder.room(len(tokens)) >= wanted:
                return turns, question, tokens
            if len(turns) == 1:
                raise DataError(
                    f"the question is {len(tokens):,} tokens long, and the model reads {decoder.context:,} with its "
                    "answer; ask for less at once"
                )
            turns = turns[2:]
