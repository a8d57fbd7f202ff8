"""Lengths -> rows: which samples share a row of fixed capacity. Pure arithmetic, no tokens needed.

The rows come as two arrays: the samples in the order of the rows, and where each row begins among them and the
last one ends, [rows + 1].
"""

from collections.abc import Sequence

import numpy as np

from toolkits.foundation.errors import DataError


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put samples of the given lengths into as few rows of `capacity` tokens as best-fit decreasing finds.

    Together the rows hold every sample once. The result depends on the arguments alone. Raises DataError when
    a sample is empty or longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    _check(sizes, capacity)
    order = np.argsort(-sizes, kind="stable")  # longest first; equals stay in the order they came in
    row_of = np.array(_best_fit(sizes[order].tolist(), capacity), dtype=np.int64)
    return order[np.argsort(row_of, kind="stable")], np.append(0, np.cumsum(np.bincount(row_of)))


def one_per_row(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Give every sample a row of its own, in order; the same errors as `pack`."""
    sizes = np.asarray(lengths, dtype=np.int64)
    _check(sizes, capacity)
    return np.arange(len(sizes)), np.arange(len(sizes) + 1)


def _best_fit(sizes: list[int], capacity: int) -> list[int]:
    """Return the row of each size: the one with the least space left that is enough, else a new one.

    `open_rows[space]` stacks the rows with that much space, and bit `space` of `occupied` says that there
    are any: the fullest fitting row is the lowest set bit at or above the size.
    """
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = rows = 0
    row_of = []
    for size in sizes:
        fitting = occupied >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            stack = open_rows[space]
            row = stack.pop()
            if not stack:
                occupied ^= 1 << space
        else:
            space, row = capacity, rows
            rows += 1
        row_of.append(row)
        space -= size
        if space:
            open_rows[space].append(row)
            occupied |= 1 << space
    return row_of


def _check(sizes: np.ndarray, capacity: int) -> None:
    if len(sizes) and sizes.min() < 1:
        raise DataError(f"sample {int(sizes.argmin())} is empty")
    too_long = int((sizes > capacity).sum())
    if too_long:
        raise DataError(
            f"{too_long} of {len(sizes)} samples are longer than a row of {capacity}: "
            f"the longest, sample {int(sizes.argmax())}, has {int(sizes.max())}"
        )
