"""Lengths -> rows: which samples share a row of fixed capacity. Pure arithmetic, no tokens needed.

The rows come as two arrays: the samples in the order of the rows, and where each row begins among them and the
last one ends, [rows + 1].
"""

from collections.abc import Sequence

import numpy as np

from toolkits.foundation.errors import DataError


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put samples of the given lengths into few rows of `capacity` tokens.

    Rows are filled one after the other, the longest samples first, and a row is closed by the one or two samples that
    fill it to the last token wherever there are such; best-fit decreasing, which never looks for two, needs at least
    as many rows but for a handful of samples. Together the rows hold every sample once. The result depends on the
    arguments alone. Raises DataError when a sample is empty or longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    _check(sizes, capacity)
    placed, counts = _filled(_Pool(sizes, capacity), capacity)
    order = np.empty(len(sizes), np.int64)
    # The first of equal sizes that is placed is the first sample of that size, and so on.
    order[np.argsort(placed, kind="stable")] = np.argsort(sizes, kind="stable")
    return order, np.append(0, np.cumsum(counts, dtype=np.int64))


def one_per_row(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Give every sample a row of its own, in order; the same errors as `pack`."""
    sizes = np.asarray(lengths, dtype=np.int64)
    _check(sizes, capacity)
    return np.arange(len(sizes)), np.arange(len(sizes) + 1)


class _Pool:
    """Which sizes are left: bit `size` of `there` says whether any are, bit `capacity - size` of `mirrored` too."""

    def __init__(self, sizes: np.ndarray, capacity: int) -> None:
        self._capacity = capacity
        self._counts = np.bincount(sizes, minlength=capacity + 1).tolist()
        present = np.unique(sizes).tolist()
        self.there = sum(1 << size for size in present)
        self._mirrored = sum(1 << (capacity - size) for size in present)

    def take(self, size: int) -> None:
        """Take one sample of `size` out."""
        self._counts[size] -= 1
        if not self._counts[size]:
            self.there ^= 1 << size
            self._mirrored ^= 1 << (self._capacity - size)

    def largest(self, at_most: int) -> int:
        """Return the largest size of at most so much, 0 when there is none."""
        return max(0, (self.there & ((2 << at_most) - 1)).bit_length() - 1)

    def half_of(self, total: int) -> int:
        """Return the larger of two sizes that add up to `total` and are nearest to each other, 0 when no two do.

        Nearest, because the smallest are worth most later on.
        """
        half = (total + 1) // 2
        # Bit `size - half` is set where `size` and `total - size` are both there.
        both = (self.there & (self._mirrored >> (self._capacity - total))) >> half
        if both & 1 and 2 * half == total and self._counts[half] < 2:
            both ^= 1
        return half + (both & -both).bit_length() - 1 if both else 0


def _filled(pool: _Pool, capacity: int) -> tuple[list[int], list[int]]:
    """Return all sizes in the order of the rows, and how many each row holds."""
    placed: list[int] = []
    counts: list[int] = []
    while pool.there:
        begin, space = len(placed), capacity
        while space:
            size = pool.largest(space)
            if not size:
                break
            if size < space < capacity:
                size = pool.half_of(space) or size
            pool.take(size)
            placed.append(size)
            space -= size
        counts.append(len(placed) - begin)
    return placed, counts


def _check(sizes: np.ndarray, capacity: int) -> None:
    if len(sizes) and sizes.min() < 1:
        raise DataError(f"sample {int(sizes.argmin())} is empty")
    too_long = int((sizes > capacity).sum())
    if too_long:
        raise DataError(
            f"{too_long} of {len(sizes)} samples are longer than a row of {capacity}: "
            f"the longest, sample {int(sizes.argmax())}, has {int(sizes.max())}"
        )
