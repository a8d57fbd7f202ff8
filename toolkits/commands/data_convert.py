"""`temper data convert`: datasets of other layouts into ours, and ours into the doubled one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

if TYPE_CHECKING:
    from data_preprocessing.fitting import TooLong


@click.command()
@click.argument("old", metavar="OLD", type=click.Path(path_type=Path))
@click.argument("new", metavar="NEW", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    type=(click.Choice(["doubled"]), click.IntRange(1)),
    metavar="doubled SEQ_LEN",
    help="Write documents of [tokens | labels], SEQ_LEN of each, packed as training packs, for tools that want them.",
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="HuggingFace folder that OLD was built with.")
@click.option(
    "--too-long",
    type=click.Choice(["stop", "truncate", "drop"]),
    help="With --to: conversations over SEQ_LEN stop it (the default), are cut behind the last whole answer that fits, "
    "or left out.",
)
@click.option("--pad-id", type=click.IntRange(0), help="With --to: what fills rows up. Default: the tokenizer's pad.")
@click.option("--overwrite", is_flag=True, help="Replace NEW once the new one is complete.")
def convert(old: Path, new: Path, target: tuple[str, int] | None, tokenizer: Path | None, **choices: Any) -> None:
    """Write the dataset OLD as NEW: the same conversations, tokens and masks.

    OLD is in the doubled [tokens | labels] layout of older launchers, or plain tokens, and NEW gets a manifest. With
    --tokenizer that names the tokenizer, and training compares it with the model's; without, it says that nobody
    knows, as the older layout does. With --to doubled, OLD may be any dataset of conversations.
    """
    from data_preprocessing.dataset import document_prefix, open_dataset

    from ..foundation.errors import UsageError

    given = [f"--{name.replace('_', '-')}" for name in ("too_long", "pad_id") if choices[name] is not None]
    if target is None and given:
        raise UsageError(f"{' and '.join(given)}: only with --to doubled SEQ_LEN")
    dataset, prefix = open_dataset(old), document_prefix(new)
    if dataset.path.resolve() == prefix.resolve():
        raise UsageError(f"OLD and NEW are both {dataset.path}; write NEW somewhere else")
    click.echo(f"read      {dataset.path}: {dataset.taken_for or dataset.kind}, {len(dataset):,} rows")
    if target is None:
        said = _to_ours(dataset, prefix, tokenizer, choices)
    else:
        said = _to_doubled(dataset, prefix, target[1], tokenizer, choices)
    for line in said:
        click.echo(line)
    click.echo(f"written   {prefix}")


def _to_ours(dataset: Any, prefix: Path, tokenizer: Path | None, choices: dict[str, Any]) -> list[str]:
    from data_preprocessing.convert import write_ours
    from data_preprocessing.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer) if tokenizer else None
    manifest = write_ours(dataset, prefix, tokenizer=loaded, overwrite=choices["overwrite"])
    counts = manifest["counts"]
    lines = [
        f"rows      {counts['rows']:,}, the longest has {counts['longest']:,} tokens",
        f"tokens    {counts['tokens']:,}, trained {counts['trained_tokens']:,}",
    ]
    if manifest["dropped"]:
        lines.append(f"dropped   {manifest['dropped']['empty_row']:,} rows without a token")
    if loaded is None:
        lines.append(
            "note      the manifest names no tokenizer: training cannot compare it; --tokenizer DIR says which"
        )
    return lines


def _to_doubled(dataset: Any, prefix: Path, seq_len: int, tokenizer: Path | None, choices: dict[str, Any]) -> list[str]:
    from data_preprocessing.doubled_writer import padding_id, write_doubled

    pad, too_long = choices["pad_id"], cast("TooLong", choices["too_long"] or "stop")
    pad = padding_id(dataset, tokenizer) if pad is None else pad
    overwrite = choices["overwrite"]
    packed = write_doubled(dataset, prefix, seq_len=seq_len, pad=pad, too_long=too_long, overwrite=overwrite)
    used = sum(min(length, seq_len) for length in packed.fitted.lengths.tolist())
    return [
        f"rows      {len(packed.rows):,} conversations in {len(packed):,} documents of {seq_len} tokens "
        f"({used / (len(packed) * seq_len):.2%} full), padded with {pad}",
        *(f"note      {remark}" for remark in packed.fitted.remarks(dataset)),
    ]
