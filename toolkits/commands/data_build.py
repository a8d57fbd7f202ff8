"""`temper data build`: a dataset from rows of text."""

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


class Columns(click.ParamType):
    """What rows call the keys that we know: `instruction=question,output=reply`."""

    name = "ours=theirs,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return pairs of our name and theirs; usage error otherwise."""
        if isinstance(value, tuple):
            return value
        pairs = [tuple(name.strip() for name in pair.split("=")) for pair in value.split(",") if pair.strip()]
        wrong = next((pair for pair in pairs if len(pair) != 2 or not all(pair)), None)
        if wrong is not None:
            self.fail(f"{'='.join(wrong)!r} is not of the form ours=theirs, as in output=reply", param, ctx)
        twice = [name for name in {ours for ours, _ in pairs} if sum(ours == name for ours, _ in pairs) > 1]
        if twice:
            self.fail(f"{twice[0]} is named twice", param, ctx)
        return tuple(pairs)


@click.command()
@click.argument("sources", metavar="IN...", nargs=-1, required=True)
@click.argument("prefix", metavar="PREFIX", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="HuggingFace folder of the model.")
@click.option(
    "--train-on",
    type=click.Choice(["all", "last", "marked"]),
    default="all",
    show_default=True,
    help="Which answers: all not marked `loss` false, the last one, or those marked `loss` true or with a weight.",
)
@click.option("--columns", type=Columns(), default="", help="Other names of keys: instruction=question,output=reply.")
@click.option("--on-bad-row", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@click.option("--max-bad", type=Fraction(), default="1%", show_default=True, help="Share of rows that skip may drop.")
@click.option("--overwrite", is_flag=True, help="Replace an existing dataset once the new one is complete.")
@click.option("--encoding", default="utf-8", show_default=True, help="Encoding of the input, e.g. gb18030.")
@click.option("--end-token", help="Token behind each plain text. Default: what the vocabulary ends documents with.")
@click.option("--merge-consecutive", is_flag=True, help="Join neighbouring turns of one role instead of refusing them.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes, each with a tokenizer in memory; one uses all cores for encoding as well.",
)
@click.option("--encoder", type=click.Choice(["auto", "fastokens", "tokenizers"]), default="auto", show_default=True)
def build(sources: tuple[str, ...], prefix: Path, tokenizer: Path, overwrite: bool, **reading: Any) -> None:
    """Turn the rows in the files IN... into the dataset PREFIX.

    IN is a JSON list, JSONL, CSV or Parquet, packed by gzip or zstd or not; a pattern in quotes, or - for stdin. The
    content says what the rows are: conversations (messages, ShareGPT, alpaca, prompt and completion), preference
    pairs (chosen and rejected), labelled answers, prompts with reference answers, or a `text` for pre-training.
    """
    from data_preprocessing.build import BuildOptions
    from data_preprocessing.build import build as build_dataset

    options = BuildOptions(**reading)
    manifest = build_dataset(sources, prefix, tokenizer=tokenizer, overwrite=overwrite, options=options)
    for line in report(manifest, prefix):
        click.echo(line)


def report(manifest: dict[str, Any], prefix: Path) -> list[str]:
    """Return what a build tells its user, line by line."""
    from data_preprocessing.dataset import document_prefix
    from data_preprocessing.rejects import rejects_path

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
    if manifest["kind"] != "text":
        return f"template  {manifest['chat_template']['source']}, {manifest['kind']}"
    end = manifest["end_token"]
    return f"end       {end['text']} ({end['id']}) behind each text: {end['reason']}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
