"""Blends: what is typed, how evenly it is mixed, and that a row's place is all that says where it comes from."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_preprocessing.blend import Mix, Part, parse_blend, whole_weights
from toolkits.foundation.errors import UsageError


def test_one_path_is_a_blend_of_one():
    for path in ("data/a", "my data/a", "0.7", "it's"):
        assert parse_blend(path) == (Part(Path(path)),)
        assert parse_blend(Path(path)) == (Part(Path(path)),)


def test_weights_are_the_decimals_they_are_written_as():
    parts = parse_blend("0.7 A 0.3 'b c/B'")
    assert [(part.weight, part.path) for part in parts] == [
        (Fraction(7, 10), Path("A")),
        (Fraction(3, 10), Path("b c/B")),
    ]
    for said, whole in (("0.7 A 0.3 B", [7, 3]), ("2 A 1e-1 B", [20, 1]), ("30 A 10 B 20 C", [3, 1, 2]), ("5 A", [1])):
        assert whole_weights(parse_blend(said)) == whole


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("0.7 A 0.3", r"'0.7 A 0.3' is no blend: it must be WEIGHT PATH WEIGHT PATH"),
        ("0.7 A B", "is no blend"),
        ("0.7 A x B", "is no blend"),
        ("0.7 A 0 B", "with weights above 0"),
        ("0.7 A -1 B", "with weights above 0"),
        ("0.7000001 A 0.3 B", "repeat after 10,000,001 rows, 100,000 at most: give them fewer digits"),
    ],
)
def test_what_is_no_blend_is_refused(said, complaint):
    with pytest.raises(UsageError, match=complaint):
        parse_blend(said)


def counts_at_random():
    rng = np.random.default_rng(0)
    yield from ([1], [1, 1], [7, 3], [90, *[1] * 10], [997, 2, 1])
    for _ in range(60):
        yield rng.integers(1, 60, rng.integers(2, 9)).tolist()


def test_every_prefix_is_within_a_row_of_the_weights():
    for counts in counts_at_random():
        mix, total, given = Mix(counts), sum(counts), [0] * len(counts)
        worst = 0
        for place in range(3 * total):
            part, index = mix.at(place)
            assert index == given[part], "each part gives its rows in their order, none twice"
            given[part] += 1
            assert mix.given(place + 1) == given
            off = [abs(Fraction(count * (place + 1), total) - got) for count, got in zip(counts, given, strict=True)]
            worst = max(worst, *off)
        assert given == [3 * count for count in counts]
        assert worst <= 1 - Fraction(1, max(1, 2 * len(counts) - 2)) * (len(counts) > 1), (counts, worst)


def test_far_places_need_nothing_before_them():
    mix = Mix([7, 3])
    assert [mix.at(10**15 + place) for place in range(2)] == [
        (part, index + (7, 3)[part] * 10**14) for part, index in (mix.at(0), mix.at(1))
    ]
