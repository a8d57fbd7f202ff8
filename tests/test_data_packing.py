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


def chat_lengths(count, seed=0):
    """Return lengths as the benchmark's corpus has them: none under 80, so that no space under 80 can be filled."""
    rng = np.random.default_rng(seed)
    answers = np.minimum(900, rng.lognormal(5.0, 0.6, count) + 20)
    per_word = rng.choice([1.3, 1.4, 1.6], count)
    return np.minimum((40 + (rng.integers(12, 60, count) + answers) * per_word).astype(np.int64), 2048)


def best_fit(lengths, capacity):
    """Return the space left in each row of the plain search: longest first, into the fullest row with room."""
    spaces = []
    for size in sorted(lengths, reverse=True):
        fitting = [index for index, space in enumerate(spaces) if space >= size]
        if fitting:
            spaces[min(fitting, key=lambda index: spaces[index])] -= size
        else:
            spaces.append(capacity - size)
    return spaces


def least_rows(lengths, capacity):
    """Return the fewest rows that hold the samples: for each set of them, the fewest rows and least in the last."""
    best = {0: (1, 0)}
    for chosen in range(1, 1 << len(lengths)):
        options = []
        for index, size in enumerate(lengths):
            if chosen >> index & 1:
                rows, used = best[chosen ^ (1 << index)]
                options.append((rows, used + size) if used + size <= capacity else (rows + 1, size))
        best[chosen] = min(options)
    return best[(1 << len(lengths)) - 1][0]


@pytest.mark.parametrize("capacity", [2048, 4096, 8192])
@pytest.mark.parametrize("drawn", [realistic_lengths, chat_lengths])
def test_rows_are_full_and_hold_every_sample_once(capacity, drawn):
    lengths = drawn(20_000)
    rows = rows_of(pack(lengths, capacity))
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(len(lengths)))
    assert max(lengths[row].sum() for row in rows) <= capacity
    assert lengths.sum() / (len(rows) * capacity) >= 0.998


def test_rows_by_hand():
    # 6 opens a row that 4 fills; 5 opens the next, and only two fill that: 3 and 2.
    assert rows_of(pack([2, 6, 3, 5, 4], 10)) == [[1, 4], [3, 2, 0]]
    assert rows_of(pack([10, 10], 10)) == [[0], [1]]
    assert rows_of(pack([5, 5, 5], 10)) == [[0, 1], [2]]
    assert rows_of(pack([], 10)) == []
    # 7 needs 3, which one sample is; of the pairs that make 6, 3 and 3 are one sample too few, so 4 and 2 it is.
    assert rows_of(pack([7, 4, 3, 3, 2, 4], 10)) == [[0, 2], [1, 5, 4], [3]]
    # Equal sizes are taken in the order that they came in.
    assert rows_of(pack([3, 3, 3, 3, 3], 6)) == [[0, 1], [2, 3], [4]]
    # Nothing fills the space of 5 exactly: the largest that fits goes in.
    assert rows_of(pack([5, 4, 4, 4], 10)) == [[0, 1], [2, 3]]


def test_packing_needs_no_more_rows_than_best_fit():
    rng = np.random.default_rng(1)
    ours, plain = [], []
    for _ in range(400):
        lengths = rng.integers(1, 30, rng.integers(1, 60))
        ours.append(len(rows_of(pack(lengths, 30))))
        plain.append(len(best_fit(lengths, 30)))
    assert max(one - other for one, other in zip(ours, plain, strict=True)) <= 1
    assert sum(ours) <= sum(plain)
    lengths = chat_lengths(3_000)
    assert len(rows_of(pack(lengths, 2048))) < len(best_fit(lengths.tolist(), 2048))


def test_packing_is_never_far_from_the_fewest_rows_there_can_be():
    rng = np.random.default_rng(2)
    more = []
    for _ in range(60):
        lengths = rng.integers(1, 13, rng.integers(1, 10)).tolist()
        more.append(len(rows_of(pack(lengths, 12))) - least_rows(lengths, 12))
    assert min(more) == 0 and max(more) <= 1 and sum(more) <= 6


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
