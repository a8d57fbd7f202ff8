"""Show rows of a dataset: what is trained, what is context, what is a control token.

An entry is what one row of the input became: a row of the dataset, or the two rows of a preference pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from toolkits.foundation.errors import DataError, UsageError

from .dataset import Dataset, IndexedDataset
from .pieces import Piece, decoded_pieces, visible
from .tokenizer import LoadedTokenizer, load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"trained": "bold green", "context": "dim", "control": "magenta", "trained control": "bold green reverse"}
OPEN, CLOSE = "⟦", "⟧"  # around trained text where there are no colours


@dataclass(frozen=True)
class Section:
    """A part of an entry under a title, "" where the entry is in one part."""

    title: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Entry:
    """What is shown of one row of the input; `notes` are what is known beside its tokens."""

    heading: str
    sections: list[Section]
    notes: list[str]


class Entries:
    """The entries of a dataset, decoded by its tokenizer.

    `tokenizer` is the folder that the dataset was built with; None takes the one that the manifest remembers. Raises
    UsageError when none is known, DataError for another one.
    """

    def __init__(self, dataset: Dataset, tokenizer: Path | None = None) -> None:
        self.dataset = dataset
        self.tokenizer: LoadedTokenizer = load_tokenizer(tokenizer_of(dataset, tokenizer))
        self.rows_each, self.word = (2, "pair") if dataset.kind == "preferences" else (1, "row")

    def __len__(self) -> int:
        return len(self.dataset) // self.rows_each

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each entry, of both sides of a pair, int64 [entries]."""
        lengths = np.asarray(self.dataset.lengths, dtype=np.int64)
        return lengths[: len(self) * self.rows_each].reshape(-1, self.rows_each).sum(1)

    def __getitem__(self, number: int) -> Entry:
        self.require(number)
        return self._pair(number) if self.rows_each == 2 else self._single(number)

    def require(self, number: int) -> None:
        """Raise UsageError for an entry that is not there."""
        if 0 <= number < len(self):
            return
        if not len(self):
            raise UsageError(f"{self.dataset.path} has no {self.word}s")
        raise UsageError(f"{self.word} {number}: {self.dataset.path} has {self.word}s 0 to {len(self) - 1}")

    def _single(self, row: int) -> Entry:
        tokens, mask = self.dataset.tokens(row), self.dataset.mask(row)
        heading = f"row {row} of {len(self)}: {len(tokens)} tokens, {np.count_nonzero(mask)} trained"
        about = self.dataset.about(row) if isinstance(self.dataset, IndexedDataset) else {}
        notes = [visible(f"{key}: {value}") for key, value in about.items()]
        weights, counts = np.unique(self.dataset.weights(row)[mask != 0].round(2), return_counts=True)
        if len(weights) and weights.tolist() != [1]:
            said = [f"{weight:g} for {count}" for weight, count in zip(weights, counts, strict=True)]
            notes.append(f"weights of the trained tokens: {', '.join(said)}")
        if "label" in about and self.dataset.kind == "labelled":
            notes[list(about).index("label")] = f"label: {'good' if about['label'] else 'bad'} answer"
        return Entry(heading, [Section("", decoded_pieces(self.tokenizer, tokens, mask))], notes)

    def _pair(self, number: int) -> Entry:
        rows = [2 * number, 2 * number + 1]
        tokens, masks = [self.dataset.tokens(row) for row in rows], [self.dataset.mask(row) for row in rows]
        shared = _shared(tokens, masks)
        pieces = [decoded_pieces(self.tokenizer, *side, cut=shared) for side in zip(tokens, masks, strict=True)]
        better, worse = (len(side) - shared for side in tokens)
        heading = f"pair {number} of {len(self)}: prompt {shared} tokens, chosen {better}, rejected {worse}"
        sections = [Section("prompt", [piece for piece in pieces[0] if piece.first < shared])]
        for title, side in zip(("chosen", "rejected"), pieces, strict=True):
            sections.append(Section(title, [piece for piece in side if piece.first >= shared]))
        return Entry(heading, sections, [])


def show(dataset: Dataset, *numbers: int, tokenizer: Path | None = None, stream: TextIO | None = None) -> None:
    """Print entries in colours, or with trained text between ⟦ and ⟧ when `stream` (stdout) is no terminal.

    Raises UsageError for an entry that is not there, and what `Entries` raises.
    """
    show_entries(Entries(dataset, tokenizer), numbers, stream=stream)


def show_entries(entries: Entries, numbers: Sequence[int], *, stream: TextIO | None = None) -> None:
    """Print the entries `numbers`; see `show`."""
    for number in numbers:
        entries.require(number)
    from rich.text import Text

    console = console_for(stream)
    for number in numbers:
        entry = entries[number]
        console.print(entry.heading)
        for section in entry.sections:
            if section.title:
                console.print(Text(f"--- {section.title} ---", style="bold"))
            put(console, section.pieces)
        for note in entry.notes:
            console.print(f"{note}")
    if console.is_terminal:
        console.print(Text.assemble(*((f" {kind} ", style) for kind, style in STYLES.items())))
    else:
        console.print(f"{OPEN}trained{CLOSE} context")


def console_for(stream: TextIO | None) -> "Console":
    """Return a console that prints text as it is."""
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)


def put(console: "Console", pieces: Sequence[Piece]) -> None:
    """Print pieces and a newline, in colours on a terminal."""
    from rich.text import Text

    if console.is_terminal:
        console.print(Text.assemble(*((piece.text, STYLES[piece.kind]) for piece in pieces)))
    else:
        console.file.write(plain(pieces) + "\n")  # rich would turn tabs into spaces


def plain(pieces: Sequence[Piece]) -> str:
    """Return the text of pieces with every trained stretch between ⟦ and ⟧."""
    text, inside = "", False
    for piece in pieces:
        if piece.trained != inside:
            text += OPEN if piece.trained else CLOSE
            inside = piece.trained
        text += piece.text
    return text + CLOSE * inside


def tokenizer_of(dataset: Dataset, folder: Path | None) -> Path:
    """Return the tokenizer folder to decode a dataset with; UsageError when none is known, DataError for another."""
    remembered = (dataset.manifest or {}).get("tokenizer") or {}
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
    return folder


def _shared(tokens: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> int:
    """Return how many tokens both sides of a pair begin with in front of their answers."""
    length = min(map(len, tokens))
    one, other = (side[:length] for side in tokens)
    answered = (masks[0][:length] | masks[1][:length]) > 0
    parted = np.flatnonzero((one != other) | answered)
    return int(parted[0]) if len(parted) else length
