"""Texts that are nearly the same, found without comparing each with each.

    signatures   text -> the set of its character n-grams -> PERMUTATIONS numbers; the share of places at which two
                 signatures are equal estimates the Jaccard similarity of the two sets
    clusters     rows whose signatures agree in one band of places are compared in all of them, and joined

A text is its letters in lower case with one space between words; n-grams of characters serve Chinese as well as
English. Signatures are those of Dahlgaard, Knudsen and Thorup, "Fast similarity sketching" (2017): as exact as as many
permutations (Broder, "On the resemblance and containment of documents", 1997), at the cost of one for long texts.
The numbers depend on the texts alone.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

PERMUTATIONS = 128  # numbers of a signature; the estimate's standard error is at most 0.044
GRAM = 5  # characters
THRESHOLD = 0.8  # similarity from which two texts are near duplicates, unless told otherwise
MISSED = 0.005  # of the pairs exactly at the threshold, the share that no band may bring together
NEIGHBOURS = 32  # that a row is compared with in one bucket: rows by the thousand that share half their text end here
CHARACTERS_AT_ONCE = 1 << 17  # of the texts that are hashed together

_BIN_BITS = PERMUTATIONS.bit_length() - 1
_SHARED_ROUNDS = 12  # in which an n-gram fills one bin; what is empty then is filled bin by bin
_EMPTY = np.uint32(0xFFFFFFFF)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio, as splitmix64 uses it


def signatures(texts: Iterable[str]) -> np.ndarray:
    """Return the signatures of `texts`, uint16 [rows, PERMUTATIONS]; they are read one by one.

    Of each number the low half is kept: others agree in it by a chance of 2^-16, which no estimate feels.
    """
    store = bytearray()  # grows in place: no second copy of all signatures
    for block in _blocks(texts):
        store += _signed(block).astype(np.uint16).tobytes()
    return np.frombuffer(store, np.uint16).reshape(-1, PERMUTATIONS)


def clusters(signatures: np.ndarray, *, threshold: float = THRESHOLD) -> np.ndarray:
    """Return for each row the number of the first row of its cluster, int64 [rows].

    `signatures` uint16 [rows, PERMUTATIONS]. Rows are joined when at least `threshold` of their places are equal, and
    so are rows that share a near duplicate. A pair that is just as similar as `threshold` is compared with a
    probability of 1 - MISSED or more, and more similar ones with a higher one; in a bucket of more than NEIGHBOURS
    rows each is compared with those that are most likely to be like it.
    """
    first, group_of = _distinct(signatures)
    parents = np.arange(len(first))
    bounds = list(pairwise(_band_bounds(threshold)))
    for number, (begin, end) in enumerate(bounds if len(first) > 1 else []):
        keys = _hashed(signatures[first, begin:end])
        beside = _hashed(signatures[first, slice(*bounds[number - 1])])
        _join_band(signatures, first, parents, (keys, np.lexsort((beside, keys))), threshold)
    return first[parents][group_of]


def similarity(signatures: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the estimated similarity of the rows `one` and `other` of `signatures`, float64 [pairs]."""
    found = np.empty(len(one))
    step = max(1, CHARACTERS_AT_ONCE // PERMUTATIONS)
    for at in range(0, len(one), step):
        equal = signatures[one[at : at + step]] == signatures[other[at : at + step]]
        found[at : at + step] = equal.mean(axis=1)
    return found


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    gathered: list[str] = []
    size = 0
    for text in texts:
        text = " ".join(text.lower().split())
        gathered.append(text.ljust(GRAM, "\0"))
        size += len(gathered[-1])
        if size >= CHARACTERS_AT_ONCE:
            yield gathered
            gathered, size = [], 0
    if gathered:
        yield gathered


def _signed(texts: list[str]) -> np.ndarray:
    """Return the signatures of texts of GRAM characters or more, uint32."""
    grams, owners = _grams(texts)
    signed = np.full((len(texts), PERMUTATIONS), _EMPTY)
    for turn in range(_SHARED_ROUNDS):
        # Only what no earlier round has filled is filled now, so equal places tell of equal n-grams.
        waiting = (signed == _EMPTY).any(axis=1)
        kept = waiting[owners]
        grams, owners = grams[kept], owners[kept]
        if not len(grams):
            return signed
        drawn = _shuffled(grams, turn)
        places = owners * PERMUTATIONS + (drawn >> np.uint64(64 - _BIN_BITS)).astype(np.int64)
        found = np.full(signed.size, _EMPTY)
        np.minimum.at(found, places, _value(drawn))
        signed = np.where(signed == _EMPTY, found.reshape(signed.shape), signed)
    order = np.lexsort((grams, owners))
    grams, owners = grams[order], owners[order]
    kept = np.append(True, (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1]))  # such texts may repeat a few
    grams, owners = grams[kept], owners[kept]
    for place in range(PERMUTATIONS):
        waiting = signed[:, place] == _EMPTY
        kept = waiting[owners]
        if kept.any():
            found = np.full(len(texts), _EMPTY)
            np.minimum.at(found, owners[kept], _value(_shuffled(grams[kept], _SHARED_ROUNDS + place)))
            signed[waiting, place] = found[waiting]
    return signed


def _grams(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashed n-grams of all texts, uint64, and which text each is of, int64."""
    letters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    hashed = letters[: len(letters) - GRAM + 1].copy()
    for place in range(1, GRAM):
        hashed *= _MULTIPLIER
        hashed += letters[place : len(letters) - GRAM + 1 + place]
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    inside = np.ones(len(letters), bool)
    inside[(np.cumsum(lengths)[:, None] - np.arange(1, GRAM)).ravel()] = False  # these reach into the next text
    return _mixed(hashed[inside[: len(hashed)]]), np.repeat(np.arange(len(texts)), lengths - GRAM + 1)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return `numbers` through the last steps of splitmix64, which spread every bit over all others."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _shuffled(grams: np.ndarray, turn: int) -> np.ndarray:
    """Return `grams` under the permutation number `turn`."""
    return _mixed(grams + np.uint64((turn + 1) * int(_MULTIPLIER) % (1 << 64)))


def _value(drawn: np.ndarray) -> np.ndarray:
    return np.minimum(drawn.astype(np.uint32), _EMPTY - np.uint32(1))


def _distinct(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each different signature, ascending, and for each row the place of its own there."""
    _, first, group_of = np.unique(_hashed(signatures), return_index=True, return_inverse=True)
    order = np.argsort(first)
    place_of = np.empty(len(order), np.int64)
    place_of[order] = np.arange(len(order))
    return first[order], place_of[group_of]


def _hashed(columns: np.ndarray) -> np.ndarray:
    """Return one number for each row of integers [rows, columns], uint64 [rows]."""
    total = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        total = _mixed(total * _MULTIPLIER + column)
    return total


def _band_bounds(threshold: float) -> range:
    """Return where the bands of a signature begin and the last one ends: as wide as MISSED allows."""
    for width in range(PERMUTATIONS, 1, -1):
        if (1 - threshold**width) ** (PERMUTATIONS // width) <= MISSED:
            return range(0, PERMUTATIONS + 1 - PERMUTATIONS % width, width)
    return range(PERMUTATIONS + 1)


def _join_band(
    signatures: np.ndarray,
    first: np.ndarray,
    parents: np.ndarray,
    band: tuple[np.ndarray, np.ndarray],
    threshold: float,
) -> None:
    """Join groups of equal keys that are similar; `parents` [groups] is changed.

    `band` holds the groups' keys and the groups in the order of keys, those that share the band before side by side.
    Each is compared with its next neighbour of the same key, then with the one behind that, and so on until all are
    joined or compared: thousands of similar rows are done after a few steps.
    """
    keys, order = band[0][band[1]], band[1]
    for step in range(1, NEIGHBOURS + 1):
        ends = np.flatnonzero(np.append(keys[1:] != keys[:-1], True))
        sizes = np.diff(ends, prepend=-1)
        roots = parents[order]
        joined = np.minimum.reduceat(roots, ends - sizes + 1) == np.maximum.reduceat(roots, ends - sizes + 1)
        kept = np.repeat((sizes > step) & ~joined, sizes)
        keys, order = keys[kept], order[kept]
        if not len(keys):
            return
        one, other = order[:-step], order[step:]
        to_compare = (keys[:-step] == keys[step:]) & (parents[one] != parents[other])
        one, other = one[to_compare], other[to_compare]
        similar = similarity(signatures, first[one], first[other]) >= threshold
        _join(parents, one[similar], other[similar])


def _join(parents: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Join pairs of groups; afterwards every group points at the first of its cluster."""
    for left, right in zip(one.tolist(), other.tolist(), strict=True):
        while parents[left] != left:
            left = int(parents[left])
        while parents[right] != right:
            right = int(parents[right])
        parents[max(left, right)] = min(left, right)
    while not np.array_equal(parents, parents[parents]):
        parents[:] = parents[parents]
