"""Show a row of a dataset: what is trained, what is context, what is a control token."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import numpy as np

from toolkits.foundation.errors import DataError, UsageError

from .dataset import Dataset
from .tokenizer import LoadedTokenizer, load_tokenizer, tokenizer_fingerprint

STYLES = {"trained": "bold green", "context": "dim", "control": "magenta", "trained control": "bold green reverse"}
OPEN, CLOSE = "⟦", "⟧"  # around trained text where there are no colours

# What a terminal would obey instead of showing: everything below the space but newline and tab, and DEL.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one kind, decoded."""

    text: str
    trained: bool
    control: bool


def show(dataset: Dataset, row: int, *, tokenizer: Path | None = None, stream: TextIO | None = None) -> None:
    """Print a row in colours, or with trained text between ⟦ and ⟧ when `stream` (stdout) is no terminal.

    `tokenizer` is the folder that the dataset was built with; None takes the one that the manifest
    remembers. Raises UsageError for a row that is not there, DataError for another tokenizer.
    """
    if not 0 <= row < len(dataset):
        raise UsageError(f"row {row}: {dataset.path} has rows 0 to {len(dataset) - 1}")
    from rich.console import Console
    from rich.text import Text

    pieces = decoded_pieces(_tokenizer_of(dataset, tokenizer), dataset.tokens(row), dataset.mask(row))
    console = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)
    trained = int(np.count_nonzero(dataset.mask(row)))
    console.print(f"row {row} of {len(dataset)}: {int(dataset.lengths[row])} tokens, {trained} trained")
    if not console.is_terminal:
        console.print(plain(pieces), end="")
        console.print(f"\n{OPEN}trained{CLOSE} context")
        return
    console.print(Text.assemble(*((piece.text, STYLES[_kind(piece)]) for piece in pieces)))
    console.print(Text.assemble(*((f" {kind} ", style) for kind, style in STYLES.items())))


def decoded_pieces(tokenizer: LoadedTokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[Piece]:
    """Cut a row where its mask changes and around control tokens, and decode the parts."""
    control = np.isin(tokens, tokenizer.control_ids)
    changed = (np.diff(mask) != 0) | control[1:] | control[:-1]
    bounds = [0, *(np.flatnonzero(changed) + 1).tolist(), len(tokens)]
    return [
        Piece(
            tokenizer.encoder.decode(tokens[start:end].tolist(), skip_special_tokens=False).translate(_VISIBLE),
            bool(mask[start]),
            bool(control[start]),
        )
        for start, end in pairwise(bounds)
    ]


def plain(pieces: list[Piece]) -> str:
    """Return the text of a row with every trained stretch between ⟦ and ⟧."""
    text, inside = "", False
    for piece in pieces:
        if piece.trained != inside:
            text += OPEN if piece.trained else CLOSE
            inside = piece.trained
        text += piece.text
    return text + CLOSE * inside


def _kind(piece: Piece) -> str:
    if piece.control:
        return "trained control" if piece.trained else "control"
    return "trained" if piece.trained else "context"


def _tokenizer_of(dataset: Dataset, folder: Path | None) -> LoadedTokenizer:
    remembered = (dataset.manifest or {}).get("tokenizer", {})
    folder = folder or (Path(remembered["folder"]) if remembered else None)
    if folder is None:
        raise UsageError(f"{dataset.path} does not say which tokenizer built it; give --tokenizer DIR")
    if not folder.is_dir():
        raise UsageError(f"the tokenizer folder {folder} is gone; give --tokenizer DIR")
    expected = dataset.tokenizer_fingerprint
    actual = tokenizer_fingerprint(folder)
    if expected and actual != expected:
        raise DataError(
            f"{dataset.path} was built with the tokenizer {remembered['name']} ({expected[:12]}), "
            f"{folder} is another one ({actual[:12]})"
        )
    return load_tokenizer(folder)
