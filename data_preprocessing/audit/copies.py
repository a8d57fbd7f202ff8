"""Rows that are there twice, exactly or nearly, and rows of the validation set that are trained on."""

from array import array

import numpy as np

from ..near_duplicates import PERMUTATIONS, clusters, signatures
from .block import Block, Setting
from .findings import FIRST, Check, Finding, share


class Copies(Check):
    """Hashes and signatures of all rows, about 270 bytes each.

    Copies have the same tokens; for rows that are nearly equal the system turn, which many share, does not count.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.hashes, self.numbers = array("Q"), array("q")  # of each good row
        self._signatures = bytearray()

    def add(self, block: Block) -> None:
        self.hashes.extend(block.hashes)
        self.numbers.extend(entry.number for entry in block.entries)
        self._signatures += signatures(block.texts).data

    @property
    def signatures(self) -> np.ndarray:
        """The signatures of all good rows, uint16 [rows, PERMUTATIONS]."""
        return np.frombuffer(self._signatures, np.uint16).reshape(-1, PERMUTATIONS)

    def finish(self) -> list[Finding]:
        rows = np.arange(len(self.numbers))
        same_as = _first_in(np.array(self.hashes, np.uint64), np.array(self.hashes, np.uint64))
        near_to = clusters(self.signatures, threshold=self.setting.near_threshold)
        copies = np.flatnonzero(same_as != rows)
        near = np.flatnonzero((same_as == rows) & (near_to != rows))
        found = []
        if len(copies):
            said = f"{share(len(copies), len(rows))} copied from earlier ones"
            found.append(_finding("exact_duplicates", said, copies, (self, self), same_as))
        if len(near):
            said = f"{share(len(near), len(rows))} nearly equal to others (similarity {self._threshold})"
            found.append(_finding("near_duplicates", said, near, (self, self), near_to))
        return found

    def overlap(self, valid: "Copies") -> list[Finding]:
        """Return what of the validation set stands in this one, which is trained on."""
        rows = len(valid.numbers)
        trained = _first_in(np.array(self.hashes, np.uint64), np.array(valid.hashes, np.uint64))
        both = np.concatenate([self.signatures, valid.signatures])
        near_to = clusters(both, threshold=self.setting.near_threshold)[len(self.numbers) :]
        exact, found = np.flatnonzero(trained >= 0), []
        near = np.flatnonzero((trained < 0) & (near_to < len(self.numbers)))
        if len(exact):
            said = f"{share(len(exact), rows)} of the validation set trained on as well: its loss says too little"
            found.append(_finding("valid_overlap", said, exact, (valid, self), trained))
        if len(near):
            said = f"{share(len(near), rows)} of the validation set nearly equal to what is trained on"
            found.append(_finding("valid_near_overlap", said, near, (valid, self), near_to))
        return found

    @property
    def _threshold(self) -> str:
        return f"{self.setting.near_threshold:g} or more"


def _first_in(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return for each of `wanted` the place of the first equal one in `hashes`, int64; -1 for none."""
    if not len(hashes):
        return np.full(len(wanted), -1)
    known, first = np.unique(hashes, return_index=True)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[places] == wanted, first[places], -1)


def _finding(code: str, said: str, rows: np.ndarray, sets: tuple[Copies, Copies], others: np.ndarray) -> Finding:
    """Return a finding about `rows` of the first set, each like the row of the second set that `others` says."""
    of, like = sets
    pairs = ((of.numbers[row], like.numbers[int(others[row])]) for row in rows[:FIRST].tolist())
    here, there = of.setting.places, like.setting.places
    places = tuple(f"{here[one]} like {there.short(other, here[one])}" for one, other in pairs)
    return Finding(code, said, len(rows), places)
