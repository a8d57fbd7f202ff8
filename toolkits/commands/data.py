"""`temper data`: build a dataset from conversations or plain text, and look at its rows."""

from pathlib import Path
from typing import Any

import click


class Fraction(click.ParamType):
    """A share of the rows: `0.001` or `0.1%`."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return a float between 0 and 1; usage error otherwise."""
        text = str(value)
        try:
            number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            number = -1.0
        if not 0 <= number <= 1:
            self.fail(f"{text!r} is not a fraction such as 0.001 or 0.1%", param, ctx)
        return number


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def data() -> None:
    """Build a dataset and look at its rows."""


@data.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("prefix", metavar="PREFIX", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="HuggingFace folder of the model.")
@click.option("--on-bad-row", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@click.option("--max-bad", type=Fraction(), default="1%", show_default=True, help="Share of rows that skip may drop.")
@click.option("--overwrite", is_flag=True, help="Replace an existing dataset once the new one is complete.")
@click.option("--encoding", default="utf-8", show_default=True, help="Encoding of the input, e.g. gb18030.")
@click.option("--end-token", help="Token behind each plain text. Default: what the vocabulary ends documents with.")
@click.option("--merge-consecutive", is_flag=True, help="Join neighbouring turns of one role instead of refusing them.")
def build(source: Path, prefix: Path, tokenizer: Path, overwrite: bool, **reading: Any) -> None:
    """Turn the conversations or the plain texts in IN into the dataset PREFIX.

    IN is a JSON list or JSONL of alpaca, messages or ShareGPT rows, or of rows with a `text` for pre-training;
    its content says which.
    """
    from data_preprocessing.build import BuildOptions
    from data_preprocessing.build import build as build_dataset

    manifest = build_dataset(source, prefix, tokenizer=tokenizer, overwrite=overwrite, options=BuildOptions(**reading))
    for line in report(manifest, prefix):
        click.echo(line)


@data.command()
@click.argument("prefix", metavar="PREFIX", type=click.Path(path_type=Path))
@click.argument("row", metavar="ROW", type=int)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Its tokenizer; without it, the manifest's.")
def show(prefix: Path, row: int, tokenizer: Path | None) -> None:
    """Print row ROW of the dataset PREFIX: trained tokens in colour, context dimmed."""
    from data_preprocessing.dataset import open_dataset
    from data_preprocessing.inspect import show as show_row

    show_row(open_dataset(prefix), row, tokenizer=tokenizer)


def report(manifest: dict[str, Any], prefix: Path) -> list[str]:
    """Return what a build tells its user, line by line."""
    from data_preprocessing.build import rejects_path
    from data_preprocessing.dataset import document_prefix

    read, counts, control = manifest["input"], manifest["counts"], manifest["control_text"]
    trained = counts["trained_tokens"]
    lines = [
        f"read      {read['name']}: {read['kind']}, {read['rows']:,} rows, {_listed(read['layouts'])}",
        _encoding(manifest),
        f"rows      {counts['rows']:,}, the longest has {counts['longest']:,} tokens",
        f"tokens    {counts['tokens']:,}, trained {trained:,} ({trained / counts['tokens']:.1%})",
    ]
    if read["notes"]:
        lines.append(f"accepted  {_listed(read['notes'])}")
    if control["texts"]:
        lines.append(
            f"note      {control['texts']:,} control-token texts in {control['rows']:,} rows: kept as plain text"
        )
    if manifest["dropped"]:
        lines.append(f"dropped   {_listed(manifest['dropped'])}; see {rejects_path(document_prefix(prefix))}")
    return [*lines, f"written   {document_prefix(prefix)}", f"next      temper data show {prefix} 0"]


def _encoding(manifest: dict[str, Any]) -> str:
    if manifest["kind"] == "conversations":
        return f"template  {manifest['chat_template']['source']}"
    end = manifest["end_token"]
    return f"end       {end['text']} ({end['id']}) behind each text: {end['reason']}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
