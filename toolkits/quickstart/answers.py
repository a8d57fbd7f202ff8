"""Questions out of a data file, and a HuggingFace checkpoint's answers to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from data_preprocessing.reading import ReadReport, parse_row, read_rows
from data_preprocessing.records import conversation


@dataclass(frozen=True)
class Question:
    """The turns before the last one of a conversation, as chat templates take them, and that last one."""

    turns: list[dict[str, str]]
    expected: str


def questions(file: Path) -> Iterator[Question]:
    """Yield a question for every record of `file`, in any layout that `temper data build` reads."""
    for row in read_rows(file, ReadReport()):
        *turns, last = conversation(parse_row(row)).messages
        yield Question([{"role": turn.role, "content": turn.content} for turn in turns], last.content)


def some_questions(file: Path, count: int) -> list[Question]:
    """Return about `count` questions spread over `file`; neighbours (here: the languages) take turns."""
    known = list(questions(file))
    places = {min(number * len(known) // count + number % 2, len(known) - 1) for number in range(count)}
    return [known[place] for place in sorted(places)]


def answers(folder: Path, asked: Sequence[Question], *, max_new_tokens: int) -> list[str]:
    """Return what the checkpoint in `folder` answers, word by word the likeliest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    if torch.cuda.is_available():
        model = model.cuda()
    said = []
    for question in asked:
        text = tokenizer.apply_chat_template(question.turns, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
        answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        said.append(str(answer).strip())
    return said


def num_right(asked: Sequence[Question], said: Sequence[str]) -> int:
    """Return how many answers are exactly the expected ones."""
    return sum(question.expected.strip() == answer for question, answer in zip(asked, said, strict=True))


def comparison(asked: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> Table:
    """Return a table of prompts with the expected answer and the answers before and after."""
    table = Table("prompt", "expected", "before", "after", "")
    for question, early, late in zip(asked, before, after, strict=True):
        right = "[green]right[/]" if question.expected.strip() == late else "[red]wrong[/]"
        table.add_row(*map(_clipped, (question.turns[-1]["content"], question.expected, early, late)), right)
    return table


def _clipped(text: str, width: int = 36) -> str:
    line = " ".join("".join(sign if sign.isprintable() else "�" for sign in text.replace("\n", " ")).split())
    return (line if len(line) <= width else line[:width] + " ...").replace("[", "\\[")
