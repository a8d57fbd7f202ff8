"""`temper data filter` and `temper data mix`: rows that stay, and rows of several files in one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .data_build import Columns, Fraction


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how rows are read, as `temper data build` has them."""
    options = (
        click.option("--columns", type=Columns(), default="", help="Other names of keys: instruction=question."),
        click.option("--on-bad-row", type=click.Choice(["stop", "skip"]), default="stop", show_default=True),
        click.option(
            "--max-bad", type=Fraction(), default="1%", show_default=True, help="Share of rows that skip may drop."
        ),
        click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete."),
        click.option("--encoding", default="utf-8", show_default=True, help="Encoding of the input, e.g. gb18030."),
        click.option("--merge-consecutive", is_flag=True, help="Accept neighbouring turns of one role."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def list_steps(context: click.Context, _: click.Parameter, value: bool) -> None:
    """Print the table of steps and leave."""
    if not value:
        return
    from data_preprocessing.curate.steps import explained

    for line in explained():
        click.echo(line)
    context.exit()


@click.command("filter")
@click.argument("sources", metavar="IN...", nargs=-1, required=True)
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--step", "steps", metavar="NAME[:SETTING=VALUE,...]", multiple=True, help="A step; repeat it for more, in order."
)
@click.option("--split", metavar="PART=SHARE,...", help="Rows for OUT's siblings, e.g. valid=0.02, without leaks.")
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML or JSON file with `steps` and `split` instead.")
@click.option(
    "--list-steps", is_flag=True, is_eager=True, expose_value=False, callback=list_steps, help="Explain all steps."
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="HuggingFace folder, for length:unit=tokens.")
@click.option("--embed", type=click.Path(path_type=Path), help="HuggingFace model whose hidden states diverse uses.")
@reading_options
def filter_command(
    sources: tuple[str, ...],
    target: Path,
    steps: tuple[str, ...],
    split: str | None,
    recipe: Path | None,
    **rest: Any,
) -> None:
    """Write the rows of IN... that pass all steps to OUT, as they are, one a line.

    Every row that a step drops goes to OUT.rejects.jsonl with its file, line, step and reason, and what each step
    did to OUT.report.json. The same input and steps give the same bytes.

    \b
    temper data filter raw.jsonl good.jsonl --step length:min=20,max=8000 --step language:keep=en,zh
      --step exact --step near --step quality --step diverse:keep=5000
      --step sample:per=language,n=1000,seed=1 --split valid=0.02
    """
    from data_preprocessing.curate.pipeline import filter_rows
    from data_preprocessing.curate.steps import read_recipe, read_steps
    from data_preprocessing.curate.survey import ReadOptions

    from ..foundation.errors import UsageError

    if recipe and (steps or split):
        raise UsageError("--recipe has the steps and the split in it: leave --step and --split out")
    chosen, parts = read_recipe(recipe) if recipe else read_steps(steps, split)
    resources = _resources(chosen, rest.pop("tokenizer"), rest.pop("embed"))
    overwrite, options = rest.pop("overwrite"), ReadOptions(**rest)
    report = filter_rows(
        sources, target, steps=chosen, split=parts, resources=resources, options=options, overwrite=overwrite
    )
    for line in report_lines(report, target):
        click.echo(line)


def _resources(steps: Any, tokenizer: Path | None, embed: Path | None) -> Any:
    from data_preprocessing.curate.step import Resources

    from ..foundation.errors import UsageError

    if embed is None:
        return Resources(tokenizer)
    if not any(step.name == "diverse" for step in steps):
        raise UsageError("--embed is for the step diverse, which is not among the steps")
    from ..embedding import Embedder

    return Resources(tokenizer, Embedder(embed), model=str(embed))


def report_lines(report: dict[str, Any], target: Path) -> list[str]:
    """Return what a filter tells its user, line by line."""
    from data_preprocessing.rejects import rejects_path

    read, bad = report["input"], report["bad_rows"]
    files = ", ".join(Path(name).name for name in read["files"])
    lines = [f"read      {files}: {read['kind']}, {read['rows']:,} rows, {_listed(read['layouts'])}"]
    if read["notes"]:
        lines.append(f"accepted  {_listed(read['notes'])}")
    if bad:
        lines.append(f"bad rows  {_listed(bad)}")
    width = max((len(step["step"]) for step in report["steps"]), default=0)
    for number, step in enumerate(report["steps"], start=1):
        why = _listed(step["dropped"]) or "nothing dropped"
        lines.append(f"step {number:<4} {step['step']:<{width}}  {step['in']:>9,} -> {step['out']:>9,}  {why}")
    if "split" in report:
        lines.append(f"split     the largest group that stays together has {report['split']['largest_group']:,} row(s)")
    lines += [f"written   {target.with_name(name)}: {count:,} rows" for name, count in report["output"].items()]
    if report["dropped"]:
        lines.append(f"dropped   {report['dropped']:,} rows, each with its reason in {rejects_path(target)}")
    return [*lines, f"next      temper data build {target} PREFIX --tokenizer DIR"]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


@click.command()
@click.argument("parts", metavar="IN=WEIGHT...", nargs=-1, required=True)
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--rows", type=click.IntRange(1), help="Rows of OUT. Default: as many as there are without a repetition.")
@click.option("--seed", type=int, help="Shuffle each input, anew in each pass. Default: rows in the order of the file.")
@reading_options
def mix(parts: tuple[str, ...], target: Path, rows: int | None, seed: int | None, overwrite: bool, **rest: Any) -> None:
    """Mix the rows of several inputs by weight into OUT, as they are, one a line.

    No beginning of OUT is off its weights by a whole row: the rule by which a training run blends datasets. An input
    that is used up starts again, and what was given of each is told.

    \b
    temper data mix chats.jsonl=0.7 'code/*.jsonl=0.3' mixed.jsonl --rows 10000 --seed 1
    """
    from data_preprocessing.curate.mix import mix_rows, parse_parts
    from data_preprocessing.curate.survey import ReadOptions

    options = ReadOptions(**rest)
    report = mix_rows(parse_parts(parts), target, rows=rows, seed=seed, options=options, overwrite=overwrite)
    for line in mix_lines(report, target):
        click.echo(line)


def mix_lines(report: dict[str, Any], target: Path) -> list[str]:
    """Return what a mix tells its user, line by line."""
    lines = [f"bad rows  {_listed(report['bad_rows'])}"] if report["bad_rows"] else []
    for part in report["parts"]:
        said = f"input     {part['input']}: weight {part['weight']}, {part['rows']:,} rows, gave {part['given']:,}"
        if part["used_up_after"] is not None:
            said += f" (each {part['times']:.2f} times), used up after row {part['used_up_after']:,} of OUT"
        lines.append(said)
    return [
        *lines,
        f"written   {target}: {report['rows']:,} rows",
        f"next      temper data build {target} PREFIX --tokenizer DIR",
    ]
