"""Questions out of a data file, and a HuggingFace checkpoint's answers to them."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ..generation.prompts import Question, read_questions

AT_ONCE = 8  # questions answered in a batch


def some_questions(file: Path, count: int) -> list[Question]:
    """Return about `count` questions spread over `file`; neighbours (here: the languages) take turns."""
    known = read_questions(file)
    places = {min(number * len(known) // count + number % 2, len(known) - 1) for number in range(count)}
    return [known[place] for place in sorted(places)]


def answers(folder: Path, asked: Sequence[Question], *, max_new_tokens: int) -> list[str]:
    """Return what the checkpoint in `folder` answers, word by word the likeliest."""
    from ..generation.answering import Generator
    from ..generation.decoding import Decoding
    from ..generation.loading import Source

    generator = Generator(Source(folder), Decoding(max_new_tokens=max_new_tokens))
    return [answer.text.strip() for answer in generator.answer_all(asked, batch_size=AT_ONCE)]


def num_right(asked: Sequence[Question], said: Sequence[str]) -> int:
    """Return how many answers are exactly the expected ones."""
    return sum(_expected(question) == answer for question, answer in zip(asked, said, strict=True))


def comparison(asked: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> Table:
    """Return a table of prompts with the expected answer and the answers before and after."""
    table = Table("prompt", "expected", "before", "after", "")
    for question, early, late in zip(asked, before, after, strict=True):
        right = "[green]right[/]" if _expected(question) == late else "[red]wrong[/]"
        table.add_row(*map(_clipped, (question.messages[-1].content, _expected(question), early, late)), right)
    return table


def _expected(question: Question) -> str:
    return (question.expected or "").strip()


def _clipped(text: str, width: int = 36) -> str:
    line = " ".join("".join(sign if sign.isprintable() else "�" for sign in text.replace("\n", " ")).split())
    return (line if len(line) <= width else line[:width] + " ...").replace("[", "\\[")
