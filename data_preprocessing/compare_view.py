"""A comparison of two datasets, printed: what the manifests say, how many rows of each kind, and the first of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from toolkits.foundation.errors import TemperError

from .compare import Comparison, Totals
from .dataset import Dataset
from .inspect import console_for, tokenizer_of
from .pieces import decoded_pieces
from .tokenizer import LoadedTokenizer, load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console

BEFORE, BEHIND = 24, 72  # tokens shown in front of a difference and from there on
CLIP = 60  # characters of what a manifest says
# What a token is in A and in B -> its colour, and the marks around it where there are no colours.
BOTH, ONLY_A, ONLY_B, NEITHER = 3, 1, 2, 0
STYLES = {BOTH: "bold green", ONLY_A: "bold red", ONLY_B: "bold yellow", NEITHER: "dim"}
MARKS = {BOTH: "⟦⟧", ONLY_A: "⟪⟫", ONLY_B: "⦃⦄", NEITHER: ("", "")}
LEGEND = {BOTH: "trained in both", ONLY_A: "only in A", ONLY_B: "only in B"}
KINDS = {
    "moved": "equal, in another order",
    "other_about": "same text, another label or reference answer",
    "other_mask": "same text, another mask",
    "other_tokens": "other tokens in the same place",
    "only_a": "only in A",
    "only_b": "only in B",
}


@dataclass(frozen=True)
class Side:
    """A dataset, and its tokenizer where it is known."""

    dataset: Dataset
    tokenizer: LoadedTokenizer | None
    why_not: str = ""  # there is no tokenizer

    @classmethod
    def of(cls, dataset: Dataset, folder: Path | None) -> "Side":
        """Load the tokenizer of a dataset as `inspect.tokenizer_of` finds it; without one, ids are shown."""
        try:
            return cls(dataset, load_tokenizer(tokenizer_of(dataset, folder)))
        except TemperError as error:
            return cls(dataset, None, str(error))

    def spans(self, row: int, around: int, mask: np.ndarray | None = None) -> list[tuple[str, int]]:
        """Return texts around token `around` of a row and what each is by `mask` (the row's own, both of which)."""
        mask = BOTH * self.dataset.mask(row) if mask is None else mask
        begin, end = max(0, around - BEFORE), around + BEHIND
        tokens, mask = np.array(self.dataset.tokens(row)[begin:end]), mask[begin:end]
        if self.tokenizer is None:
            bounds = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
            spans = [(" ".join(map(str, tokens[one:past])) + " ", int(mask[one])) for one, past in pairwise(bounds)]
        else:
            pieces = decoded_pieces(self.tokenizer, tokens, mask)
            spans = [(piece.text, int(mask[piece.first])) for piece in pieces]
        length = int(self.dataset.lengths[row])
        return [("... ", NEITHER)] * (begin > 0) + spans + [(" ...", NEITHER)] * (end < length)


def report(
    comparison: Comparison, a: Dataset, b: Dataset, *, tokenizer: Path | None, limit: int, stream: TextIO | None = None
) -> None:
    """Print a comparison and the first `limit` rows of each kind of difference."""
    console = console_for(stream)
    for line in _summary(comparison, a, b):
        console.print(line)
    shown = {name: getattr(comparison, name)[:limit] for name in KINDS if name not in ("moved", "other_about")}
    if not any(map(len, shown.values())):
        return
    sides = Side.of(a, tokenizer), Side.of(b, tokenizer)
    for name, side in zip("AB", sides, strict=True):
        if side.why_not:
            console.print(f"ids of {name} are shown: {side.why_not}")
    marked = False
    for name, found in shown.items():
        for rows in found.tolist():
            marked |= name in ("other_mask", "other_tokens")
            _print_difference(console, name, rows, sides)
    _print_legend(console, with_sides=marked)


def _summary(comparison: Comparison, a: Dataset, b: Dataset) -> list[str]:
    one, other = comparison.totals
    lines = [f"A  {a.path}: {_counted(one, one)}", f"B  {b.path}: {_counted(other, one)}"]
    if comparison.manifest:
        lines.append("manifests")
        width = max(map(len, comparison.manifest))
        for key, pair in comparison.manifest.items():
            lines.append(f"  {key:<{width}}  {' -> '.join(map(_clipped, pair))}")
    lines.append("rows")
    width = max(map(len, KINDS.values()))
    lines.append(f"  {'equal':<{width}}  {comparison.num_equal:,}")
    for name, said in KINDS.items():
        found = getattr(comparison, name)
        if len(found):
            lines.append(f"  {said:<{width}}  {len(found):,}")
    if not comparison.differ:
        lines.append("every row is equal" + (", the manifests are not" if comparison.manifest else ""))
    return lines


def _counted(totals: Totals, base: Totals) -> str:
    said = []
    for name, word in (("rows", "rows"), ("tokens", "tokens"), ("trained_tokens", "trained")):
        value, more = getattr(totals, name), getattr(totals, name) - getattr(base, name)
        said.append(f"{value:,} {word}" + (f" ({more:+,})" if more else ""))
    return ", ".join(said)


def _clipped(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= CLIP else text[:CLIP] + "..."


def _print_difference(console: "Console", kind: str, rows: Any, sides: Sequence[Side]) -> None:
    from rich.text import Text

    if isinstance(rows, int):
        side = sides[kind == "only_b"]
        console.print(Text(f"--- row {rows}: {KINDS[kind]} ---", style="bold"))
        _put(console, side.spans(rows, 0))
        return
    a, b = (side.dataset for side in sides)
    console.print(Text(f"--- row {rows[0]} of A, row {rows[1]} of B: {KINDS[kind]} ---", style="bold"))
    if kind == "other_mask":
        mask = ONLY_A * a.mask(rows[0]) + ONLY_B * b.mask(rows[1])
        weights = np.stack([a.weights(rows[0]), b.weights(rows[1])])
        changed = np.flatnonzero(weights[0] != weights[1])
        if mask[changed[0]] == BOTH:
            one, other = weights[:, changed[0]]
            console.print(Text(f"token {changed[0]} is trained with weight {one:g} in A, {other:g} in B"))
        _put(console, sides[0].spans(rows[0], int(changed[0]), mask))
        return
    begin, behind = _parting(a.tokens(rows[0]), b.tokens(rows[1]))
    for name, side, row, what in zip("AB", sides, rows, (ONLY_A, ONLY_B), strict=True):
        mask = BOTH * side.dataset.mask(row)
        mask[begin : len(mask) - behind] = what
        _put(console, [(f"{name}: ", NEITHER), *side.spans(row, begin, mask)])


def _parting(one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Return how many tokens two different rows begin with, and how many they end with."""
    both = min(len(one), len(other))
    front = np.flatnonzero(one[:both] != other[:both])
    begin = int(front[0]) if len(front) else both
    rest = both - begin
    back = np.flatnonzero(one[len(one) - rest :][::-1] != other[len(other) - rest :][::-1])
    return begin, int(back[0]) if len(back) else rest


def _put(console: "Console", spans: Sequence[tuple[str, int]]) -> None:
    from rich.text import Text

    if console.is_terminal:
        console.print(Text.assemble(*((text, STYLES[what]) for text, what in spans)))
        return
    text, current = "", NEITHER
    for part, what in [*spans, ("", NEITHER)]:
        if what != current:
            text += MARKS[current][1] + MARKS[what][0]
            current = what
        text += part
    console.file.write(text + "\n")  # rich would turn tabs into spaces


def _print_legend(console: "Console", *, with_sides: bool) -> None:
    from rich.text import Text

    legend = LEGEND if with_sides else {BOTH: "trained"}
    if console.is_terminal:
        console.print(Text.assemble(*((f" {said} ", STYLES[what]) for what, said in legend.items())))
    else:
        console.print(" ".join(said.join(MARKS[what]) for what, said in legend.items()) + " context")
