"""Packing: every sample once, no row too full, nearly no space lost, and always the same rows."""

import itertools

import numpy as np
import pytest

from data_preprocessing.packing import one_per_row, pack
from toolkits.foundation.errors import DataError


def realistic_lengths(count, seed=0):
    """Return lengths as chat samples have them: median about 190, a long tail, at most 2048."""
    drawn = np.random.default_rng(seed).lognormal(5.3, 0.75, count)
    return np.clip(drawn, 12, 2048).astype(np.int32)


def rows_of(packed):
    """Return the samples of each row."""
    samples, bounds = packed
    return [samples[start:end].tolist() for start, end in itertools.pairwise(bounds.tolist())]


@pytest.mark.parametrize("capacity", [2048, 4096, 8192])
def test_rows_are_full_and_hold_every_sample_once(capacity):
    lengths = realistic_lengths(20_000)
    rows = rows_of(pack(lengths, capacity))
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(len(lengths)))
    assert max(lengths[row].sum() for row in rows) <= capacity
    assert lengths.sum() / (len(rows) * capacity) >= 0.998


def test_best_fit_decreasing_by_hand():
    # 6 and 5 open rows; 4 fits the row of 6 exactly; 3 and 2 fill the other.
    assert rows_of(pack([2, 6, 3, 5, 4], 10)) == [[1, 4], [3, 2, 0]]
    assert rows_of(pack([10, 10], 10)) == [[0], [1]]
    assert rows_of(pack([5, 5, 5], 10)) == [[0, 1], [2]]
    assert rows_of(pack([], 10)) == []


def test_packing_is_no_worse_than_the_simplest_search_for_the_best_row():
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths = rng.integers(1, 30, rng.integers(1, 40))
        spaces = []
        for size in sorted(lengths, reverse=True):
            fitting = [index for index, space in enumerate(spaces) if space >= size]
            if fitting:
                spaces[min(fitting, key=lambda index: spaces[index])] -= size
            else:
                spaces.append(30 - size)
        rows = rows_of(pack(lengths, 30))
        assert sorted(30 - lengths[row].sum() for row in rows) == sorted(spaces)


def test_the_same_lengths_give_the_same_rows_whatever_holds_them():
    lengths = realistic_lengths(2_000)
    rows = rows_of(pack(lengths, 2048))
    assert rows_of(pack(lengths.tolist(), 2048)) == rows
    assert rows_of(pack(lengths.astype(np.int64), 2048)) == rows


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="2 of 3 samples are longer than a row of 8: the longest, sample 2, has 10"):
        pack([9, 3, 10], 8)
    with pytest.raises(DataError, match="sample 1 is empty"):
        pack([1, 0], 8)


def test_unpacked_rows_keep_the_order():
    assert rows_of(one_per_row([3, 1, 2], 4)) == [[0], [1], [2]]
    assert rows_of(one_per_row([], 4)) == []
    with pytest.raises(DataError, match="1 of 1 samples are longer"):
        one_per_row([5], 4)
