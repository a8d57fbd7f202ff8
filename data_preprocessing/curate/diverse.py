"""A choice of rows that are as different as can be, without a model.

    features    text -> its words, and pairs of letters where a script has no spaces, hashed into DIMENSIONS numbers: a
                vector of length LENGTH. The most frequent little words are left out, or all English would be alike
    centres     greedy k-centre (Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985): the next
                row is always the one that is farthest from those chosen, which is at most twice as far from the best
                possible choice

The numbers are whole and small, so every sum of their products is exact in float32 in whatever order a library takes
it: the choice does not depend on the machine or the number of its threads.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from ..languages import LITTLE_WORDS

DIMENSIONS = 256
LENGTH = 1023  # four times its square is below 2 ** 24, up to where float32 counts exactly
STEM = 6  # letters of a word that count: `teacher` and `teachers` are one

_SIGN = 1 << 16
_ROWS_AT_ONCE = 1 << 14
_WITHOUT_SPACES = "\u0e01-\u0e4e\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff"
_UNIT = re.compile(f"[{_WITHOUT_SPACES}]+|[^\\W_]+?(?=[{_WITHOUT_SPACES}\\W_]|$)")
_RUN = re.compile(f"[{_WITHOUT_SPACES}]")


def features(texts: Sequence[str]) -> np.ndarray:
    """Return the vectors of texts, int16 [rows, DIMENSIONS]; one of zeros for a text without letters."""
    found = np.zeros((len(texts), DIMENSIONS))
    for row, text in enumerate(texts):
        units = Counter(_units(text.lower()))
        if not units:
            continue
        hashed = np.fromiter((zlib.crc32(unit.encode("utf-8", "replace")) for unit in units), np.int64, len(units))
        # Whole numbers from here to the length: their sums are exact.
        weights = np.rint(16 * np.sqrt(np.fromiter(units.values(), np.int64, len(units))))
        found[row] = np.bincount(hashed % DIMENSIONS, np.where(hashed & _SIGN, weights, -weights), DIMENSIONS)
    return _scaled(found)


def _units(text: str) -> Iterator[str]:
    """Yield the words of a text that say something, cut to their first letters, and pairs of letters."""
    for unit in _UNIT.findall(text):
        if _RUN.match(unit):
            yield from map("".join, pairwise(unit)) if len(unit) > 1 else (unit,)
        elif len(unit) > 1 and unit not in LITTLE_WORDS:
            yield unit[:STEM]


def embedded(vectors: np.ndarray) -> np.ndarray:
    """Return a model's vectors [rows, any] as `features` would, int16 [rows, DIMENSIONS].

    More dimensions are folded together by signs at random, which keeps distances (Johnson and Lindenstrauss, 1984).
    """
    found = np.zeros((len(vectors), DIMENSIONS), np.float64)
    for column in range(vectors.shape[1]):
        place, sign = (column, 1) if vectors.shape[1] <= DIMENSIONS else _place_of(column)
        found[:, place] += sign * vectors[:, column]
    return _scaled(found)


def centres(vectors: np.ndarray, *, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows chosen, in the order of their choice, int64 [keep], and for each row the chosen one that is
    nearest, int64 [rows].

    `vectors` int16 [rows, DIMENSIONS]. The first row is chosen first; of rows that are as far, the earlier.
    """
    rows = len(vectors)
    if keep >= rows:
        return np.arange(rows), np.arange(rows)
    points = vectors.astype(np.float32)
    squares = np.einsum("rd,rd->r", points, points)
    far, nearest, chosen = np.full(rows, np.inf, np.float32), np.zeros(rows, np.int64), np.zeros(keep, np.int64)
    for turn in range(keep):
        centre = int(far.argmax())
        chosen[turn] = centre
        distance = squares - 2 * (points @ points[centre]) + squares[centre]
        closer = distance < far
        far[closer], nearest[closer] = distance[closer], centre
        far[centre], nearest[centre] = -1, centre
    return chosen, nearest


def _place_of(column: int) -> tuple[int, int]:
    hashed = zlib.crc32(b"%d" % column)
    return hashed % DIMENSIONS, 1 if hashed & _SIGN else -1


def _scaled(vectors: np.ndarray) -> np.ndarray:
    """Return vectors [rows, DIMENSIONS] at a length of LENGTH, in whole numbers."""
    found = np.zeros(vectors.shape, np.int16)
    for first in range(0, len(vectors), _ROWS_AT_ONCE):
        block = vectors[first : first + _ROWS_AT_ONCE]
        lengths = np.sqrt(np.square(block).sum(axis=1, keepdims=True))
        found[first : first + len(block)] = np.rint(block * (LENGTH / np.maximum(lengths, 1e-30)))
    return found
