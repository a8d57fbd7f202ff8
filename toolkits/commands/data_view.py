"""`temper data show` and `temper data diff`: look at a dataset's rows, and at what changed between two builds."""

import json
from pathlib import Path
from typing import Any

import click

TOKENIZER = click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Its tokenizer; without it, the manifest's."
)


@click.command()
@click.argument("prefix", metavar="PREFIX", type=click.Path(path_type=Path))
@click.argument("number", metavar="[ROW]", type=int, required=False)
@click.option("--random", is_flag=True, help="Rows drawn at random; others each time, unless --seed says which.")
@click.option("--longest", is_flag=True, help="The rows with the most tokens.")
@click.option("--search", metavar="TEXT", help="Rows whose text, the template's too, holds TEXT. Exit 3: none does.")
@click.option("--seed", type=click.IntRange(0), help="Of --random.")
@click.option("-n", "--count", type=click.IntRange(1), default=1, show_default=True, help="Rows shown, at most.")
@TOKENIZER
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that needs nothing else instead.")
@click.option("--overwrite", is_flag=True, help="Replace an existing page.")
def show(prefix: Path, tokenizer: Path | None, html: Path | None, overwrite: bool, **choosing: Any) -> None:
    """Print rows of the dataset PREFIX: trained tokens in colour, context dimmed, control tokens marked.

    ROW counts from 0 and is 0 unless another way of choosing is given. A row of a dataset of preferences is a pair:
    its prompt, the chosen and the rejected answer.
    """
    from data_preprocessing.choose import Choice, choose
    from data_preprocessing.dataset import open_dataset
    from data_preprocessing.inspect import Entries, show_entries
    from data_preprocessing.page import write_page

    choice = Choice(**choosing)
    entries = Entries(open_dataset(prefix), tokenizer)
    numbers, said = choose(entries, choice)
    if said:
        click.echo(said)
    if html is None:
        show_entries(entries, numbers)
    else:
        write_page(entries, numbers, html, overwrite=overwrite)
        click.echo(f"written {html}: {len(numbers)} {entries.word}{'s' * (len(numbers) > 1)}")


@click.command()
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
@TOKENIZER
@click.option("--limit", type=click.IntRange(0), default=3, show_default=True, help="Differences of each kind shown.")
@click.option("--json", "machine", is_flag=True, help="Print JSON: every count, and the first rows of each kind.")
@click.option("--exit-code", is_flag=True, help="End with 1 when rows differ, as git diff does.")
def diff(a: Path, b: Path, tokenizer: Path | None, limit: int, machine: bool, exit_code: bool) -> None:
    """Say what changed between two builds A and B of a dataset.

    Manifests are compared, and rows by their tokens and masks, wherever they stand. A dataset in an older layout is
    compared as what it is read as.
    """
    from data_preprocessing.compare import compare
    from data_preprocessing.compare_view import report
    from data_preprocessing.dataset import open_dataset

    one, other = open_dataset(a), open_dataset(b)
    comparison = compare(one, other)
    if machine:
        click.echo(json.dumps(comparison.as_json(limit), ensure_ascii=False))
    else:
        report(comparison, one, other, tokenizer=tokenizer, limit=limit)
    if exit_code and comparison.differ:
        raise SystemExit(1)
