"""The steps that decide when all rows are known: exact and near duplicates, a diverse choice, a stratified sample."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..languages import language_of
from ..near_duplicates import THRESHOLD, clusters, signatures
from .diverse import centres, embedded, features
from .facts import Facts, Part
from .step import Choice, Chooser, Column, Resources, Step, drawn, fingerprint, option, part_option, text_to_compare


def signature_column(resources: Resources, part: Part) -> Column:
    """Return the column of signatures of one of the rows' texts, uint16 [rows, permutations]."""
    return resources.column(("signature", part), lambda rows: signatures([text_to_compare(row, part) for row in rows]))


@dataclass(frozen=True)
class Exact(Step):
    """Keep the first of rows that say the same, in whatever layout."""

    name: ClassVar[str] = "exact"
    reasons: ClassVar[Mapping[str, str]] = {"duplicate": "says the same as an earlier row"}
    of: Part = part_option("row")

    def start(self, resources: Resources) -> Chooser:
        return _Exact(self, resources)


class _Exact(Chooser):
    def __init__(self, settings: Exact, resources: Resources) -> None:
        self._of = settings.of
        self._column = resources.column(("fingerprint", self._of), self._fingerprints)

    def remember(self, rows: Sequence[Facts]) -> None:
        self._column.remember(rows)

    def choose(self, rows: np.ndarray) -> Choice:
        _, first, group = np.unique(self._column.of(rows), return_index=True, return_inverse=True)
        original = rows[first[group.ravel()]]
        what = "row" if self._of == "row" else self._of
        return Choice(original == rows, original, "duplicate", f"the same {what} as {{other}}")

    def _fingerprints(self, rows: Sequence[Facts]) -> np.ndarray:
        texts = (row.identity if self._of == "row" else text_to_compare(row, self._of).encode() for row in rows)
        return np.array([fingerprint(text) for text in texts], "V16")


@dataclass(frozen=True)
class Near(Step):
    """Keep the first of rows that are nearly the same, found by MinHash signatures of their letters."""

    name: ClassVar[str] = "near"
    reasons: ClassVar[Mapping[str, str]] = {"near_duplicate": "nearly the same as an earlier row"}
    threshold: float = option("estimated Jaccard similarity from which rows are nearly the same", THRESHOLD)
    of: Part = part_option("row")

    def problems(self) -> list[str]:
        return threshold_problems(self.threshold)

    def start(self, resources: Resources) -> Chooser:
        return _Near(self, resources)


def threshold_problems(threshold: float) -> list[str]:
    """Return what is wrong with a similarity."""
    return [] if 0.2 <= threshold <= 1 else [f"threshold={threshold:g} must be from 0.2 to 1"]


class _Near(Chooser):
    def __init__(self, settings: Near, resources: Resources) -> None:
        self._threshold = settings.threshold
        self._column = signature_column(resources, settings.of)

    def remember(self, rows: Sequence[Facts]) -> None:
        self._column.remember(rows)

    def choose(self, rows: np.ndarray) -> Choice:
        first = rows[clusters(self._column.of(rows), threshold=self._threshold)]
        return Choice(first == rows, first, "near_duplicate", "nearly the same as {other}")


@dataclass(frozen=True)
class Diverse(Step):
    """Keep rows that are as different as can be: each next one is the farthest from those that stay (k-centre)."""

    name: ClassVar[str] = "diverse"
    reasons: ClassVar[Mapping[str, str]] = {"redundant": "near to a row that stays"}
    keep: int = option("how many rows stay")
    of: Part = part_option("row")

    def problems(self) -> list[str]:
        return [] if self.keep > 0 else [f"keep={self.keep} must be above 0"]

    def start(self, resources: Resources) -> Chooser:
        return _Diverse(self, resources)


class _Diverse(Chooser):
    def __init__(self, settings: Diverse, resources: Resources) -> None:
        self._settings, self._embed = settings, resources.embed
        self._column = resources.column(("feature", settings.of), self._features)

    def remember(self, rows: Sequence[Facts]) -> None:
        self._column.remember(rows)

    def choose(self, rows: np.ndarray) -> Choice:
        chosen, nearest = centres(self._column.of(rows), keep=self._settings.keep)
        kept = np.zeros(len(rows), bool)
        kept[chosen] = True
        said = f"not one of the {self._settings.keep:,} most different rows; the nearest of those is {{other}}"
        return Choice(kept, rows[nearest], "redundant", said)

    def _features(self, rows: Sequence[Facts]) -> np.ndarray:
        texts = [row.text(self._settings.of) for row in rows]
        return features(texts) if self._embed is None else embedded(self._embed(texts))


@dataclass(frozen=True)
class Sample(Step):
    """Draw rows at random, as many of each group."""

    name: ClassVar[str] = "sample"
    reasons: ClassVar[Mapping[str, str]] = {"not_drawn": "not among the rows drawn"}
    n: int | None = option("rows of each group that stay, all where there are fewer", None)
    share: float | None = option("or the share of each group that stays", None)
    per: str = option("groups: all, language, layout, file, or key.NAME for what rows say under the key NAME", "all")
    seed: int = option("another seed draws other rows", 0)

    def problems(self) -> list[str]:
        found = []
        if (self.n is None) == (self.share is None):
            found.append("needs either n or share")
        if self.n is not None and self.n < 1:
            found.append(f"n={self.n} must be above 0")
        if self.share is not None and not 0 < self.share <= 1:
            found.append(f"share={self.share:g} must be above 0 and at most 1")
        if self.per not in ("all", "language", "layout", "file") and not self.per.startswith("key."):
            found.append(f"per={self.per}: it must be all, language, layout, file or key.NAME")
        return found

    def start(self, resources: Resources) -> Chooser:
        return _Sample(self)


class _Sample(Chooser):
    def __init__(self, settings: Sample) -> None:
        self._settings = settings
        self._groups: dict[str, int] = {}
        self._column = Column(self._codes)

    def remember(self, rows: Sequence[Facts]) -> None:
        self._column.remember(rows)

    def choose(self, rows: np.ndarray) -> Choice:
        settings, kept = self._settings, np.zeros(len(rows), bool)
        members: dict[int, list[int]] = defaultdict(list)
        for place, group in enumerate(self._column.of(rows).tolist()):
            members[group].append(place)
        for places in members.values():
            wanted = settings.n if settings.n is not None else round((settings.share or 0) * len(places))
            places.sort(key=lambda place: drawn(settings.seed, int(rows[place])))
            kept[places[:wanted]] = True
        size = f"{settings.n:,}" if settings.n is not None else f"{settings.share:.1%}"
        of = "" if settings.per == "all" else f" of each {settings.per.removeprefix('key.')}"
        return Choice(kept, np.full(len(rows), -1), "not_drawn", f"not among the {size}{of} drawn")

    def _codes(self, rows: Sequence[Facts]) -> np.ndarray:
        return np.array([self._groups.setdefault(self._group(row), len(self._groups)) for row in rows], np.int32)

    def _group(self, row: Facts) -> str:
        per = self._settings.per
        if per == "language":
            return language_of(row.row)
        if per == "layout":
            return row.record.layout
        if per == "file":
            return str(row.source)
        return repr(row.value.get(per.removeprefix("key."))) if per != "all" else ""
