"""Near duplicates held against the similarity of sets, computed pair by pair."""

import os
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from data_preprocessing.near_duplicates import GRAM, MISSED, PERMUTATIONS, clusters, signatures, similarity

ROOT = Path(__file__).resolve().parents[1]
HAN = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下"


def grams(text):
    text = " ".join(text.lower().split())
    return {text[at : at + GRAM] for at in range(max(1, len(text) - GRAM + 1))}


def jaccard(one, other):
    return len(one & other) / len(one | other)


def corpus(texts, *, seed=0, chinese=False):
    """Texts at random, each with up to four others in which some words or characters were changed."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(2, 8))) for _ in range(400)]
    units, joiner = (HAN, "") if chinese else (words, " ")
    made = []
    for _ in range(texts):
        text = draw.choices(units, k=draw.randint(15, 90))
        made.append(joiner.join(text))
        for _ in range(draw.randint(0, 4)):
            changed = list(text)
            for _ in range(draw.randint(0, max(1, len(text) // 9))):
                changed[draw.randrange(len(text))] = draw.choice(units)
            made.append(joiner.join(changed))
    return made


@pytest.mark.parametrize("chinese", [False, True])
def test_the_estimate_is_that_of_as_many_permutations(chinese):
    texts = corpus(150, seed=1, chinese=chinese)
    sets, signed = list(map(grams, texts)), signatures(texts)
    pairs = [(one, one + step) for step in (1, 2, 3) for one in range(len(texts) - step)]
    true = np.array([jaccard(sets[one], sets[other]) for one, other in pairs])
    found = similarity(signed, *np.array(pairs).T)
    error = found - true
    near = true > 0.2
    assert near.sum() > 100 and abs(error[near].mean()) < 0.01
    # The standard error of PERMUTATIONS coins of that chance.
    assert np.sqrt((error[near] ** 2).mean()) < 1.15 * np.sqrt((true[near] * (1 - true[near])).mean() / PERMUTATIONS)


@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_clusters_hold_what_brute_force_finds(threshold, chinese):
    texts = corpus(80, seed=2, chinese=chinese)
    sets, cluster_of = list(map(grams, texts)), clusters(signatures(texts), threshold=threshold)
    clear = 2.5 * np.sqrt(threshold * (1 - threshold) / PERMUTATIONS)  # of the estimate's error
    similar, together = {}, set()
    for one, other in combinations(range(len(texts)), 2):
        similar[one, other] = jaccard(sets[one], sets[other])
        if cluster_of[one] == cluster_of[other]:
            together.add((one, other))
    wanted = {pair for pair, value in similar.items() if value >= threshold + clear}
    assert len(wanted) > 30
    recall = len(wanted & together) / len(wanted)
    # A pair may be together by a third text, which both are like; so what counts is the nearest one of the cluster.
    nearest = {}
    for one, other in together:
        for row, value in ((one, similar[one, other]), (other, similar[one, other])):
            nearest[row] = max(nearest.get(row, 0), value)
    precision = np.mean([value >= threshold - clear for value in nearest.values()])
    assert recall >= 1 - 2 * MISSED and precision >= 0.98


def test_bands_bring_nearly_all_pairs_at_the_threshold_together():
    draw, pairs = np.random.default_rng(0), 3000
    signed = draw.integers(0, 1 << 16, (2 * pairs, PERMUTATIONS), np.uint16)
    equal = draw.random((pairs, PERMUTATIONS)) < 0.8
    signed[1::2][equal] = signed[::2][equal]
    found = clusters(signed, threshold=0.8).reshape(-1, 2)
    above = equal.mean(axis=1) >= 0.8
    together = found[:, 0] == found[:, 1]
    assert not together[~above].any()
    assert 1 - together[above].mean() <= 2 * MISSED


def test_unrelated_texts_are_alone():
    texts = [corpus(1, seed=seed)[0] for seed in range(200)]
    assert clusters(signatures(texts)).tolist() == list(range(200))


def test_a_cluster_is_named_after_its_first_row():
    text = corpus(1, seed=5)[0]
    other = corpus(1, seed=6)[0]
    rows = [other, text, text.upper(), other + " end", f"  {text}\n", "short", "Short", ""]
    assert clusters(signatures(rows)).tolist() == [0, 1, 1, 0, 1, 5, 5, 7]


def test_texts_of_any_length_have_a_signature():
    signed = signatures(["", "a", "ab", "中", "x" * 100_000, "\ud800 half"])
    assert signed.shape == (6, PERMUTATIONS) and signed.dtype == np.uint16
    assert len({row.tobytes() for row in signed}) == 6
    assert signatures([]).shape == (0, PERMUTATIONS) and clusters(signatures([])).shape == (0,)
    assert clusters(signatures(["one"])).tolist() == [0]


def test_rows_by_the_thousand_that_share_a_frame():
    draw = random.Random(0)
    frame = "Please translate the following sentence into French and explain each word of it in turn: {} {}"
    texts = [frame.format(draw.randint(0, 999), draw.randint(0, 999)) for _ in range(2000)]
    # Nearly all are similar to many others, so they are one cluster.
    assert np.bincount(clusters(signatures(texts), threshold=0.8)).max() > 1990


def test_signatures_depend_on_the_text_alone():
    texts = corpus(20, seed=3)
    signed = signatures(texts)
    assert np.array_equal(np.concatenate([signatures([text]) for text in texts]), signed)
    script = (
        "import sys, hashlib; from data_preprocessing.near_duplicates import signatures\n"
        "print(hashlib.sha256(signatures(sys.argv[1:]).tobytes()).hexdigest())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", script, *texts],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert clusters(signed).tolist() == clusters(signed).tolist()
