"""`temper data pairs`: what a model answers beside what it should have answered, as preference rows."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..foundation.errors import DataError, UsageError, raise_all
from .generate import answer_options, batch_option, settings_of

if TYPE_CHECKING:
    from ..generation.pairs import Pairs

_PATH = click.Path(path_type=Path)
HELP = {"help_option_names": ["-h", "--help"]}
SHOWN = 60  # characters of an answer in the example


@click.command(context_settings=HELP)
@click.argument("prompts", metavar="PROMPTS", type=_PATH)
@click.argument("target", metavar="OUT.jsonl", type=_PATH)
@click.option("--model", "hf_dir", required=True, type=_PATH, help="HuggingFace checkpoint whose answers are rejected.")
@click.option(
    "--replace",
    multiple=True,
    nargs=2,
    metavar="REGEX REPLACEMENT",
    help="Correct the answers: Python's re.sub, one behind the other when given several times.",
)
@click.option("--answers", type=_PATH, help="JSONL of better answers: in order, by prompt, or by --key.")
@click.option("--key", metavar="NAME", help="Rows of --answers and PROMPTS with the same NAME belong together.")
@click.option("--better", type=_PATH, help="HuggingFace checkpoint whose answers are better.")
@answer_options
@batch_option
@click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete.")
def pairs(
    prompts: Path,
    target: Path,
    replace: tuple[tuple[str, str], ...],
    answers: Path | None,
    key: str | None,
    better: Path | None,
    batch_size: int,
    overwrite: bool,
    system: str | None,
    **choices: Any,
) -> None:
    """Make correction pairs: what a model answers to PROMPTS is rejected, the corrected answer is chosen.

    PROMPTS are rows as for `temper data build`, of which everything in front of the last answer is asked, or lines.
    Where the correction changes nothing there is no pair, and it is said how often. OUT.jsonl is for `temper data
    build`.

    \b
    temper data pairs prompts.jsonl pairs.jsonl --model tuned --replace "\\bI'm A\\b" "I'm B"
    """
    from ..foundation.publish import publish_files
    from ..generation.corrections import Corrections, read_answers
    from ..generation.prompts import read_questions, with_system

    corrections = Corrections(replace, answers, key, better)
    raise_all(UsageError, "no pairs can be made", [*corrections.problems(), *_target_problems(target)])
    with publish_files(target, [""], overwrite=overwrite) as folder:  # what exists is refused before a model is loaded
        questions = with_system(read_questions(prompts, key=key), system)
        given = read_answers(answers, questions, key=key, system=system) if answers else None
        from ..generation.pairs import Models, make_pairs

        found = make_pairs(questions, corrections, given, Models(*settings_of(**choices), batch_size))
        if not found.pairs:
            raise DataError(f"{prompts}: no pair comes of it: {_listed(found)}")
        rows = (json.dumps(pair.as_json(), ensure_ascii=False) for pair in found.pairs)
        (folder / target.name).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    for line in report(found, prompts, target, corrections.replace):
        click.echo(line)
    if given is not None and given.num_unused:
        click.echo(f"note      {answers}: {given.num_unused:,} answers to what is not asked")


def report(found: "Pairs", prompts: Path, target: Path, replace: tuple[tuple[str, str], ...]) -> list[str]:
    """Return what the command tells its user, line by line."""
    first = found.pairs[0]
    lines = [f"asked     {prompts}: {len(found.pairs) + found.left_out.total():,} prompts"]
    lines += [
        f"replaced  {expression!r} by {replacement!r}: {count:,} times"
        for (expression, replacement), count in zip(replace, found.replaced, strict=True)
    ]
    if found.left_out:
        lines.append(f"left out  {_listed(found)}")
    lines += [f"rejected  {_clipped(first.rejected)}", f"chosen    {_clipped(first.chosen)}"]
    lines.append(f"written   {target}: {len(found.pairs):,} pairs")
    return [*lines, f"next      temper data build {target} PREFIX --tokenizer DIR"]


def _target_problems(target: Path) -> list[str]:
    from data_preprocessing.curate.output import Output

    try:
        Output.of(target)
    except UsageError as error:
        return [str(error)]
    return []


def _listed(found: "Pairs") -> str:
    from ..generation.pairs import LEFT_OUT

    return "; ".join(
        f"{found.left_out[code]:,} {code} ({said})" for code, said in LEFT_OUT.items() if code in found.left_out
    )


def _clipped(text: str) -> str:
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= SHOWN else line[:SHOWN] + " ..."
