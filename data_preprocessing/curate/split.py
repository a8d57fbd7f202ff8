"""Rows -> parts, of which none holds what is nearly the same as a row of another one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from toolkits.foundation.errors import DataError

from ..near_duplicates import clusters
from .choosers import signature_column, threshold_problems
from .facts import Facts
from .step import Column, Resources, Step, drawn, fingerprint, option, text_to_compare

SETTINGS = ("threshold", "seed")
TAKEN = ("rejects", "report")  # names of OUT's other siblings


@dataclass(frozen=True)
class Split(Step):
    """Draw rows for files of their own; nearly equal rows, and rows with one prompt, stay together."""

    name: ClassVar[str] = "split"
    reasons: ClassVar[Mapping[str, str]] = {}
    shares: tuple[tuple[str, float], ...] = option("the name of each part and its share of the rows", ())
    threshold: float = option("estimated Jaccard similarity from which rows stay together", 0.7)
    seed: int = option("another seed draws other rows", 0)

    def problems(self) -> list[str]:
        return threshold_problems(self.threshold)

    def share_problems(self) -> list[str]:
        """Return what is wrong with the parts."""
        found = [] if self.shares else ["name at least one part, as in valid=0.02"]
        for name, share in self.shares:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in TAKEN:
                found.append(f"{name!r} cannot be a part of a file's name here")
            if not 0 < share < 1:
                found.append(f"{name}={share:g} must be above 0 and below 1")
        if not found and sum(share for _, share in self.shares) >= 1:
            found.append("the shares leave no row for OUT itself")
        return found

    def about(self) -> dict[str, Any]:
        """Return what a report says of the settings."""
        return {"shares": dict(self.shares), "threshold": self.threshold, "seed": self.seed}


class Splitter:
    """Remembers rows, and gives each its part once all are known."""

    def __init__(self, settings: Split, resources: Resources) -> None:
        self.settings = settings
        self._signatures = signature_column(resources, "row")
        self._prompts = Column(_prompts)

    def remember(self, rows: Sequence[Facts]) -> None:
        """Note what is needed of rows, which come in the order of their numbers."""
        self._signatures.remember(rows)
        self._prompts.remember(rows)

    def parts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the part of each of the rows with these numbers, int8 [rows], 0 for OUT itself, and its group.

        Raises DataError when a part would be empty.
        """
        near = clusters(self._signatures.of(rows), threshold=self.settings.threshold)
        _, first, place = np.unique(self._prompts.of(rows), return_index=True, return_inverse=True)
        return self._drawn(rows, groups := joined(near, first[place.ravel()])), groups

    def _drawn(self, rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
        leaders, sizes = np.unique(groups, return_counts=True)
        order = sorted(range(len(leaders)), key=lambda at: drawn(self.settings.seed, int(rows[leaders[at]])))
        part_of, taken = np.zeros(len(rows), np.int8), np.zeros(len(leaders), bool)
        for number, (name, share) in enumerate(self.settings.shares, start=1):
            wanted = round(share * len(rows))
            for at in order:
                if not taken[at] and sizes[at] <= wanted:
                    taken[at] = True
                    wanted -= int(sizes[at])
                    part_of[leaders[at]] = number
            if not (part_of == number).any():
                raise DataError(
                    f"--split {name}={share:g}: the part would be empty: {share:.2%} of {len(rows):,} rows are "
                    f"{share * len(rows):.1f}, and the smallest group of rows that stay together has "
                    f"{sizes[~taken].min() if not taken.all() else 0:,}; give it a larger share, or raise the threshold"
                )
        return part_of[groups]


def joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the groups of rows that are together in `one` or in `other`, each named by its first row, int64 [rows].

    Both name a row's group by the number of its first row.
    """
    groups = np.minimum(one, other)
    while True:
        before = groups
        for names in (one, other):
            least = np.full(len(groups), len(groups))
            np.minimum.at(least, names, groups)
            groups = least[names]
        if np.array_equal(groups, before):
            return groups


def _prompts(rows: Sequence[Facts]) -> np.ndarray:
    """Return what tells the rows' prompts apart, in which neither case nor white space counts."""
    texts = (" ".join(text_to_compare(row, "prompt").lower().split()) for row in rows)
    return np.array([fingerprint(text.encode()) for text in texts], "V16")
