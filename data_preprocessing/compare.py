"""What changed between two datasets: their manifests, their rows, their totals.

    hashes of every row -> rows paired in stages -> how many of each kind, and where the first ones are

Rows are hashed one by one: memory is a few numbers for each row of both sets, whatever their lengths. A row's partner
is the one that is equal, wherever it stands; else the one of the same tokens with another mask. The longest run of
partners in one order says which of them moved. What is left between the same two of that run is the same row with
other tokens, and the rest stands in one set alone.
"""

import json
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from toolkits.foundation.progress import Progress

from .dataset import Dataset, IndexedDataset

# The bytes are compared row by row, the totals have lines of their own, and where a folder lies is no matter.
NOT_COMPARED = ("files", "counts.rows", "counts.tokens", "counts.trained_tokens", "tokenizer.folder")
# Spreads the second, third ... of equal rows over all numbers (Steele, Lea and Flood, 2014, SplitMix's constant).
ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Keys:
    """Hashes uint64 [rows] of rows: of their tokens, of tokens and mask, and of these and what .about says."""

    tokens: np.ndarray
    masked: np.ndarray
    whole: np.ndarray


@dataclass(frozen=True)
class Totals:
    """What a dataset counts, in tokens."""

    rows: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True)
class Comparison:
    """What two datasets have in common and what not; pairs are int64 [pairs, 2], rows of A and of B.

    `moved`: equal, in another order. `other_about`: only the label or the reference answer differs. `other_mask`: the
    same tokens. `other_tokens`: in the same place. `only_a` and `only_b` int64: rows without a partner.
    """

    manifest: dict[str, tuple[Any, Any]]
    totals: tuple[Totals, Totals]
    num_equal: int
    moved: np.ndarray
    other_about: np.ndarray
    other_mask: np.ndarray
    other_tokens: np.ndarray
    only_a: np.ndarray
    only_b: np.ndarray

    @property
    def differ(self) -> bool:
        """Whether training on the two would differ: the order of the rows counts, what manifests say does not."""
        changed = (self.moved, self.other_about, self.other_mask, self.other_tokens, self.only_a, self.only_b)
        return any(map(len, changed))

    def as_json(self, limit: int) -> dict[str, Any]:
        """Return the comparison for machines, with the first `limit` rows of each kind."""
        kinds = {
            name: {"count": len(found), "first": found[:limit].tolist()}
            for name, found in vars(self).items()
            if isinstance(found, np.ndarray)
        }
        return {
            "differ": self.differ,
            "manifest": {key: {"a": one, "b": other} for key, (one, other) in self.manifest.items()},
            "totals": {side: vars(totals) for side, totals in zip("ab", self.totals, strict=True)},
            "equal": self.num_equal,
            **kinds,
        }


def compare(a: Dataset, b: Dataset) -> Comparison:
    """Compare two datasets row by row, whatever layout they are in."""
    keys = keys_of(a), keys_of(b)
    left = np.ones(len(a), bool), np.ones(len(b), bool)
    whole, other_about, other_mask = (
        _partners(getattr(keys[0], name), getattr(keys[1], name), left) for name in ("whole", "masked", "tokens")
    )
    known = np.concatenate([whole, other_about, other_mask])
    in_order = known[np.argsort(known[:, 0])]
    in_order = in_order[_longest_rise(in_order[:, 1])]
    moved = whole[~np.isin(whole[:, 0], in_order[:, 0])]
    other_tokens = _partners(_gaps(in_order[:, 0], len(a)), _gaps(in_order[:, 1], len(b)), left)
    return Comparison(
        manifest=_manifest_differences(a.manifest, b.manifest),
        totals=(_totals(a), _totals(b)),
        num_equal=len(whole) - len(moved),
        moved=moved,
        other_about=other_about,
        other_mask=other_mask,
        other_tokens=other_tokens,
        only_a=np.flatnonzero(left[0]),
        only_b=np.flatnonzero(left[1]),
    )


def _manifest_differences(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, tuple[Any, Any]]:
    """Return what two manifests say of a thing, under its dotted name, where they say it differently.

    Where one set has none, that is all there is to say.
    """
    if a is None or b is None:
        return {} if a is b else {"manifest": (a and "present", b and "present")}
    one, other = dict(_flat(a)), dict(_flat(b))
    return {
        key: (one.get(key), other.get(key))
        for key in [*one, *(k for k in other if k not in one)]
        if one.get(key) != other.get(key) and not key.startswith(NOT_COMPARED)
    }


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner


def keys_of(dataset: Dataset) -> Keys:
    """Hash every row; ids hash alike whatever integers a layout keeps them in."""
    keys = np.zeros((3, len(dataset)), np.uint64)
    with Progress(f"reading {dataset.path.name}", len(dataset), unit="rows") as progress:
        for row in range(len(dataset)):
            digest = blake2b(np.ascontiguousarray(dataset.tokens(row), "<i4").data, digest_size=8)
            keys[0, row] = int.from_bytes(digest.digest(), "little")
            digest.update(np.ascontiguousarray(dataset.weights(row), np.float32).data)
            keys[1, row] = int.from_bytes(digest.digest(), "little")
            about = dataset.about(row) if isinstance(dataset, IndexedDataset) else {}
            if about:
                digest.update(json.dumps(about, sort_keys=True).encode())
            keys[2, row] = int.from_bytes(digest.digest(), "little")
            progress.advance()
    return Keys(*keys)


def _partners(a: np.ndarray, b: np.ndarray, left: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Pair rows of equal numbers among those that are left, int64 [pairs, 2] in the order of A, and take them out.

    The first of equal ones in A gets the first in B, the second the second, and so on.
    """
    rows_a, rows_b = map(np.flatnonzero, left)
    keys_a, keys_b = _numbered(a[rows_a]), _numbered(b[rows_b])
    _, one, other = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    order = np.argsort(one)
    pairs = np.stack([rows_a[one[order]], rows_b[other[order]]], axis=1)
    left[0][pairs[:, 0]], left[1][pairs[:, 1]] = False, False
    return pairs


def _numbered(keys: np.ndarray) -> np.ndarray:
    """Return the hashes with the second, third ... of equal ones made different, the same way for both sets."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    places = np.arange(len(keys))
    begins = np.append(True, ordered[1:] != ordered[:-1]) if len(keys) else np.zeros(0, bool)
    nth = places - np.maximum.accumulate(np.where(begins, places, 0)) if len(keys) else places
    numbered = np.empty_like(keys)
    numbered[order] = ordered + nth.astype(np.uint64) * ODD
    return numbered


def _longest_rise(numbers: np.ndarray) -> np.ndarray:
    """Return the places of a longest rising run of `numbers`, which are all different, by patience sorting."""
    if (np.diff(numbers) > 0).all():
        return np.arange(len(numbers))
    tops: list[int] = []  # the least number that ends a run of each length, and where it stands
    places: list[int] = []
    before = np.empty(len(numbers), np.int64)
    for place, number in enumerate(numbers.tolist()):
        length = bisect_left(tops, number)
        before[place] = places[length - 1] if length else -1
        tops[length : length + 1], places[length : length + 1] = [number], [place]
    found = np.empty(len(tops), np.int64)
    place = places[-1]
    for at in range(len(tops) - 1, -1, -1):
        found[at] = place
        place = int(before[place])
    return found


def _gaps(rows: np.ndarray, count: int) -> np.ndarray:
    """Return how many of the ascending `rows` stand in front of each of `count` rows, uint64 [count]."""
    return np.searchsorted(rows, np.arange(count), side="right").astype(np.uint64)


def _totals(dataset: Dataset) -> Totals:
    return Totals(len(dataset), int(np.sum(dataset.lengths, dtype=np.int64)), dataset.num_trained_tokens)
