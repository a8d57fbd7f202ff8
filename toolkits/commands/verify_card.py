"""`temper verify card`: run the checks of a model family and write down what they saw."""

import time
from pathlib import Path

import click


@click.command()
@click.argument("family", metavar="FAMILY")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("docs/cards"),
    show_default=True,
    help="Folder for FAMILY.json and FAMILY.md.",
)
@click.option("--overwrite", is_flag=True, help="Replace cards that are there, each when the new one is complete.")
def card(family: str, out: Path, overwrite: bool) -> None:
    """Check FAMILY, or `all`, on tiny models with random weights and write a card for each.

    Bits of a conversion both ways, logits against transformers at TP1, TP2, PP2 (EP2 with experts), twenty training
    steps against a plain loop, or the refusal to train; on two CPU ranks, about half a minute a family. Exit code 4
    lists what differs, and that family's card is not written.
    """
    from conversion.families import FAMILIES

    from ..cards.card import SUFFIXES, write_card
    from ..cards.making import make_card
    from ..foundation.errors import CheckpointError, UsageError, raise_all

    chosen = [each for each in FAMILIES if family in (each.name, "all")]
    if not chosen:
        raise UsageError(f"no family {family}; there is {', '.join(each.name for each in FAMILIES)}, or all")
    there = [path for each in chosen for suffix in SUFFIXES if (path := out / f"{each.name}{suffix}").exists()]
    if not overwrite:
        problems = [f"{path} exists already" for path in there]
        raise_all(UsageError, "use --overwrite to replace what is there, or choose another --out", problems)
    wrong = []
    for each in chosen:
        started = time.monotonic()
        try:
            write_card(make_card(each), out, overwrite=overwrite)
        except CheckpointError as error:
            wrong.append(str(error))
        else:
            click.echo(f"{each.name}: {out / each.name}.md, {time.monotonic() - started:.0f} s")
    raise_all(CheckpointError, "not as they should be", wrong)
