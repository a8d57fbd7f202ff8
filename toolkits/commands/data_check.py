"""`temper data check`: what is wrong with data, before a GPU is paid for."""

import json
from pathlib import Path
from typing import Any

import click

from .data_build import Columns


@click.command()
@click.argument("sources", metavar="IN...|PREFIX", nargs=-1, required=True)
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="HuggingFace folder of the model.")
@click.option("--valid", metavar="IN|PREFIX", multiple=True, help="Validation set: what of it is trained on?")
@click.option("--seq-len", "seq_lens", type=click.IntRange(2), multiple=True, help="Row length; may be given again.")
@click.option("--global-batch-size", type=click.IntRange(1), help="Rows of a step, for the steps of an epoch.")
@click.option(
    "--near",
    "near_threshold",
    type=click.FloatRange(0.1, 1),
    default=0.8,
    show_default=True,
    help="Similarity from which two rows are near duplicates.",
)
@click.option("--allow", metavar="FINDING", multiple=True, help="Only warn of this finding; may be given again.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw the lengths into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and nothing else, on stdout.")
@click.option("--train-on", type=click.Choice(["all", "last", "marked"]), default="all", help="As for build.")
@click.option("--columns", type=Columns(), default="", help="As for build.")
@click.option("--encoding", default="utf-8", help="As for build.")
@click.option("--end-token", help="As for build.")
@click.option("--merge-consecutive", is_flag=True, help="As for build.")
def check(
    sources: tuple[str, ...],
    tokenizer: Path,
    valid: tuple[str, ...],
    png: Path | None,
    as_json: bool,
    **said: Any,
) -> None:
    """Look for what would harm training in the rows of the files IN..., or in the dataset PREFIX.

    Bad rows, lengths and packing, masks and end tokens, duplicates, what of a validation set is trained on, answers
    that are all alike, shortcuts in preference pairs, secrets. Ends with 3 when training would be harmed, with 0
    when there are only warnings.
    """
    from data_preprocessing.audit.findings import HARMFUL
    from data_preprocessing.audit.report import draw, lines, verdict
    from data_preprocessing.audit.run import AuditOptions, audit
    from data_preprocessing.chunks import BuildOptions

    from ..foundation.errors import DataError, UsageError

    unknown = [name for name in said["allow"] if name not in HARMFUL]
    if unknown:
        raise UsageError(f"--allow {', '.join(unknown)}: no such finding; known are {', '.join(HARMFUL)}")
    names = ("seq_lens", "global_batch_size", "near_threshold", "allow")
    options = AuditOptions(
        **{name: said.pop(name) for name in names},
        build=BuildOptions(**said),
    )
    report = audit(sources, tokenizer=tokenizer, valid=valid, options=options)
    if png is not None:
        draw(report, png)
    if as_json:
        click.echo(json.dumps(report.as_json(), ensure_ascii=False, indent=2))
    else:
        _print(lines(report))
    if report.harmful:
        raise DataError(verdict(report))


def _print(lines: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for text, style in lines:
        console.print(Text(text, style=style))
