"""`temper data show`: look at a dataset's rows."""

from pathlib import Path

import click


@click.command()
@click.argument("prefix", metavar="PREFIX", type=click.Path(path_type=Path))
@click.argument("row", metavar="ROW", type=int)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Its tokenizer; without it, the manifest's.")
def show(prefix: Path, row: int, tokenizer: Path | None) -> None:
    """Print row ROW of the dataset PREFIX: trained tokens in colour, context dimmed."""
    from data_preprocessing.dataset import open_dataset
    from data_preprocessing.inspect import show as show_row

    show_row(open_dataset(prefix), row, tokenizer=tokenizer)
