"""`temper generate`: what a HuggingFace checkpoint answers to prompts."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..foundation.errors import UsageError

if TYPE_CHECKING:
    from ..generation.answering import Answer
    from ..generation.decoding import Decoding
    from ..generation.loading import Source

_PATH = click.Path(path_type=Path)
_AT_ONCE = "Questions answered at once."
STDOUT = Path("-")


def answer_options(command: Callable) -> Callable:
    """How a model chooses its answers: what all commands that let one answer share."""
    for decorate in (
        click.option("--seed", default=0, show_default=True, help="Of what is drawn; the same seed, the same answers."),
        click.option("--top-k", default=0, type=click.IntRange(0), help="Draw from the K likeliest tokens; 0: all."),
        click.option(
            "--top-p",
            default=1.0,
            type=click.FloatRange(0, 1, min_open=True),
            help="Draw from the likeliest tokens that together have this probability.",
        ),
        click.option(
            "--temperature",
            default=0.0,
            show_default=True,
            type=click.FloatRange(0),
            help="0: always the likeliest token; above, tokens are drawn.",
        ),
        click.option("--max-new-tokens", default=512, show_default=True, type=click.IntRange(1), help="Of an answer."),
        click.option("--device", default="auto", show_default=True, help="auto (a GPU if there is one), cpu, cuda:N."),
        click.option("--dtype", metavar="TYPE", help="float32, float16 or bfloat16; default: the checkpoint's."),
        click.option("--system", metavar="TEXT", help="System turn of conversations that have none."),
        click.option(
            "--quantized-base",
            type=click.Choice(["nf4", "int8"]),
            help="Add the adapter to HF_DIR quantised and back, which a run with --quantize trains on.",
        ),
        click.option("--adapter", type=_PATH, help="LoRA adapter in PEFT's format, added to the model in memory."),
    ):
        command = decorate(command)
    return command


def model_options(command: Callable) -> Callable:
    """The model, and how it chooses its answers: what `generate` and `chat` share."""
    return click.argument("hf_dir", metavar="HF_DIR", type=_PATH)(answer_options(command))


def batch_option(command: Callable) -> Callable:
    """How many questions are answered at once."""
    option = click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help=_AT_ONCE)
    return option(command)


def settings_of(
    hf_dir: Path, adapter: Path | None, dtype: str | None, device: str, quantized_base: Any, **decoding: Any
) -> tuple["Source", "Decoding"]:
    """Return what to load and how to decode."""
    from ..generation.decoding import Decoding
    from ..generation.loading import Source

    return Source(hf_dir, adapter, dtype, device, quantized_base), Decoding(**decoding)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@model_options
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A question; can be given several times.")
@click.option("--input", "file", type=_PATH, help="Questions: rows as for `temper data build`, or lines; - is stdin.")
@click.option("--output", type=_PATH, help="Write JSONL there; - is stdout. Without it, answers are printed.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--no-template", is_flag=True, help="Go on from the raw text, without the chat template.")
@batch_option
def generate(
    prompts: tuple[str, ...],
    file: Path | None,
    output: Path | None,
    overwrite: bool,
    no_template: bool,
    batch_size: int,
    **choices: Any,
) -> None:
    """Answer prompts with the HuggingFace checkpoint HF_DIR, with or without a LoRA adapter.

    Of a row that has an answer, everything in front of the last one is asked, and what was expected is written
    beside what came. Lines of JSONL output are rows for `temper data build`.
    """
    if not prompts and file is None:
        raise UsageError("say what to answer: --prompt TEXT, or --input FILE (- for stdin)")
    if no_template and choices["system"]:
        raise UsageError("--system is a turn of a conversation, and --no-template makes none: leave one of them out")
    from ..foundation.publish import publish_files
    from ..generation.answering import Generator
    from ..generation.prompts import question_of, read_questions, with_system

    questions = [question_of(text) for text in prompts] + (read_questions(file) if file else [])
    questions = with_system(questions, choices.pop("system"))
    with ExitStack() as stack:
        written = None
        if output is not None and output != STDOUT:  # what exists is refused before the model is loaded
            written = stack.enter_context(publish_files(output, [""], overwrite=overwrite)) / output.name
        generator = Generator(*settings_of(**choices), template=not no_template)
        answers = generator.answer_all(questions, batch_size=batch_size)
        if written is not None:
            written.write_text(_lines(answers, raw=no_template), encoding="utf-8")
    if output == STDOUT:
        sys.stdout.write(_lines(answers, raw=no_template))
    elif output is None:
        _print(answers)
    _say(answers, output)


def _lines(answers: Sequence["Answer"], *, raw: bool) -> str:
    rows = (json.dumps(answer.as_json(raw=raw), ensure_ascii=False) for answer in answers)
    return "".join(f"{row}\n" for row in rows)


def _print(answers: Sequence["Answer"]) -> None:
    from ..generation.texts import for_terminal

    for number, answer in enumerate(answers):
        asked, said = f"> {answer.question.messages[-1].content}", answer.text
        if sys.stdout.isatty():
            asked, said = for_terminal(asked), for_terminal(said)
        if len(answers) > 1:
            click.echo("\n" * (number > 0) + click.style(asked, bold=True))
        click.echo(said)


def _say(answers: Sequence["Answer"], output: Path | None) -> None:
    tokens = sum(answer.num_tokens for answer in answers)
    cut = sum(answer.reason == "length" for answer in answers)
    where = f"written {output}: " if output not in (None, STDOUT) else ""
    said = f", {cut} cut short (--max-new-tokens)" if cut else ""
    click.echo(f"{where}{len(answers):,} answer{'s' * (len(answers) != 1)} of {tokens:,} tokens{said}", err=True)
