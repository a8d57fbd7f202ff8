"""Which entries of a dataset somebody wants to see: by number, at random, the longest, or those that hold a text."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from toolkits.foundation.errors import DataError, UsageError, raise_all
from toolkits.foundation.progress import Progress

from .inspect import Entries
from .pieces import require_known

TOKENS_AT_ONCE = 1 << 20  # that a search decodes in one go


@dataclass(frozen=True)
class Choice:
    """One way of choosing, and how many entries at most; without any, the first entry.

    Raises UsageError for several ways at once.
    """

    number: int | None = None
    random: bool = False
    longest: bool = False
    search: str | None = None
    seed: int | None = None  # of `random`: None is another one each time
    count: int = 1

    def __post_init__(self) -> None:
        ways = {
            "ROW": self.number is not None,
            "--random": self.random,
            "--longest": self.longest,
            "--search": self.search is not None,
        }
        given = [way for way, is_given in ways.items() if is_given]
        problems = []
        if len(given) > 1:
            problems.append(f"{' and '.join(given)} are {len(given)} ways of choosing a row; give one")
        if self.seed is not None and not self.random:
            problems.append("--seed is for --random")
        if self.search == "":
            problems.append("--search needs a text")
        raise_all(UsageError, "which row", problems)


def choose(entries: Entries, choice: Choice) -> tuple[list[int], str]:
    """Return the entries chosen, and a line that says what a search found, "" where nothing was searched.

    Raises UsageError for an entry that is not there, DataError when a search finds nothing.
    """
    first = choice.number or 0
    entries.require(first)
    count = min(choice.count, len(entries))
    if choice.random:
        return np.random.default_rng(choice.seed).choice(len(entries), count, replace=False).tolist(), ""
    if choice.longest:
        return np.argsort(-entries.lengths, kind="stable")[:count].tolist(), ""
    if choice.search is not None:
        return _found(entries, choice.search, count)
    return list(range(first, min(first + count, len(entries)))), ""


def _found(entries: Entries, text: str, count: int) -> tuple[list[int], str]:
    wanted = unicodedata.normalize("NFC", text) if entries.tokenizer.normalizes else text
    found = [number for number, texts in _texts(entries) if any(wanted in one for one in texts)]
    word = entries.word
    if not found:
        raise DataError(
            f"{entries.dataset.path}: none of its {len(entries):,} {word}s holds {text!r}; case and spaces count, and "
            "the chat template's own text is searched too"
        )
    said = f"{len(found):,} of {len(entries):,} {word}s hold {text!r}"
    shown = found[:count]
    if len(shown) < len(found):
        more = ", ".join(map(str, found[count : count + 10]))
        said += f"; {len(shown)} shown, the next {more}{' ...' if len(found) > count + 10 else ''}"
    return shown, said


def _texts(entries: Entries) -> Iterator[tuple[int, list[str]]]:
    """Yield each entry's number and the decoded texts of its rows; a text may lie across any token's border."""
    dataset, each = entries.dataset, entries.rows_each
    ends = np.cumsum(entries.lengths)
    first = 0
    with Progress("searching", len(entries), unit=f"{entries.word}s") as progress:
        while first < len(entries):
            before = int(ends[first - 1]) if first else 0
            past = max(first + 1, int(np.searchsorted(ends, before + TOKENS_AT_ONCE)))
            rows = [dataset.tokens(row) for row in range(first * each, past * each)]
            require_known(entries.tokenizer, np.concatenate(rows))
            decode = entries.tokenizer.encoder.decode_batch
            texts = decode([row.tolist() for row in rows], skip_special_tokens=False)
            for number in range(first, past):
                begin = (number - first) * each
                yield number, texts[begin : begin + each]
            progress.advance(past - first)
            first = past
