"""`temper verify`: is a converted model the same model, as its logits say? `card` asks that of a whole family."""

from pathlib import Path

import click

from ..foundation.errors import CheckpointError, UsageError
from .lazy import LazyGroup

_FOLDER = click.Path(path_type=Path)
COMMANDS = {
    "card": ("toolkits.commands.verify_card", "card", "Check a model family on tiny models and write its card."),
}


@click.group(
    cls=LazyGroup, table=COMMANDS, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--logits", "pair", nargs=2, type=_FOLDER, metavar="HF MCORE", help="The two directories to run.")
@click.option("--text", "texts", multiple=True, help="Text to run them on; can be given several times.")
@click.option("--file", "file", type=click.Path(path_type=Path), help="A text file to run them on.")
@click.option("--max-tokens", default=1024, show_default=True, help="Tokens of the text that are compared.")
@click.option(
    "--tolerance",
    default=1e-4,
    show_default=True,
    help="Largest difference, as a part of the largest logit (or of 1, when that is smaller).",
)
@click.pass_context
def verify(
    context: click.Context,
    pair: tuple[Path, Path] | None,
    texts: tuple[str, ...],
    file: Path | None,
    max_tokens: int,
    tolerance: float,
) -> None:
    """Run a HuggingFace model in transformers and its Megatron-core directory in GPTModel, both in fp32 (--logits).

    Exit code 4 when a logit differs by more than the tolerance. Without text, on 256 random tokens. Bits are
    compared by `temper convert verify`.
    """
    if context.invoked_subcommand is not None:
        if pair is not None:
            raise UsageError(f"--logits and {context.invoked_subcommand} are two commands: run one behind the other")
        return
    if pair is None:
        raise UsageError("say what to verify: temper verify --logits HF MCORE (bits: temper convert verify A B)")
    from ..training.logits import compare_logits

    tokens = _tokens(pair[0], texts, file, max_tokens)
    found = compare_logits(*pair, tokens)
    what = "logits" if found.of_words else "scores"
    said = (
        f"{found.tokens:,} tokens: max difference {found.difference:.2e} where {what} reach {found.largest:.1f}, "
        f"{found.relative:.2e} of them (tolerance {tolerance:g})"
    ) + found.of_words * f"; same most likely token at {found.agreed:,}"
    if not found.relative <= tolerance:
        raise CheckpointError(f"{pair[0]} and {pair[1]} are not the same model. {said}")
    click.echo(f"same model. {said}")


def _tokens(hf: Path, texts: tuple[str, ...], file: Path | None, most: int) -> list[int]:
    from ..training.logits import random_tokens, tokens_of

    if not texts and file is None:
        return random_tokens(hf, 256)
    contents = [*texts, *([_read(file)] if file else [])]
    tokens = tokens_of(hf, contents)
    if len(tokens) > most:
        click.echo(f"the first {most:,} of {len(tokens):,} tokens are compared (--max-tokens)", err=True)
    return tokens[:most]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8: {error}") from None
