"""What alone tells the better answer of a pair from the worse one, and so may be all that is learned."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from .block import Block, Setting
from .findings import FIRST, Check, Finding, share

FEW_PAIRS = 20  # below which nothing is said
LONGER = 0.7  # share of pairs in which one side is longer from which length is a shortcut
ALONE = 0.6  # share of pairs that a phrase alone must tell apart
RATIO = 3.0  # how much more often it stands on one side: in longer answers every word is more frequent
SIGMAS = 5.0  # by how many standard deviations it must be more frequent: a great many phrases are tried
SIZES = (1, 2, 3, 4, 6, 8)  # tokens of a phrase
BUCKETS = 1 << 20  # of hashed phrases; memory is 20 bytes for each
CANDIDATES = 4096  # phrases whose tokens are kept
COMPARED = 256  # of these, the most telling, from which sentences are put together
SAME = 0.01  # share of pairs by which parts of one sentence may differ
LONGEST = 40  # tokens of a sentence
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Pairs(Check):
    """Sides that are equal, and whether one side is the longer one."""

    def __init__(self, setting: Setting) -> None:
        self._places = setting.places
        self._same: list[int] = []
        self._pairs = self._longer = self._shorter = 0

    def add(self, block: Block) -> None:
        for entry in block.entries:
            if not entry.rejected:
                continue
            better, worse = "\n".join(entry.answers), "\n".join(entry.rejected)
            self._pairs += 1
            self._longer += len(better) > len(worse)
            self._shorter += len(better) < len(worse)
            if better == worse:
                self._same.append(entry.number)

    def facts(self) -> dict[str, object]:
        if not self._pairs:
            return {}
        return {"pairs": {"chosen_longer": self._longer, "rejected_longer": self._shorter, "pairs": self._pairs}}

    def finish(self) -> list[Finding]:
        found = []
        if self._same:
            said = (
                f"{share(len(self._same), self._pairs, 'pair')} with the same answer on both sides: nothing to prefer"
            )
            found.append(Finding("same_answers", said, len(self._same), self._places.of(self._same[:FIRST])))
        count, word = max((self._longer, "longer"), (self._shorter, "shorter"))
        if self._pairs >= FEW_PAIRS and count >= LONGER * self._pairs:
            said = f"chosen is {word} in {count / self._pairs:.0%} of pairs: length alone may be what is learned"
            found.append(Finding("length_shortcut", said, count))
        return found


class Phrases(Check):
    """In how many pairs each phrase stands on one side only.

    Phrases are runs of tokens, counted by their hash; the tokens are kept of those that look telling on the way.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._is_on = setting.kind == "preferences"
        self._pairs = 0
        size = BUCKETS if self._is_on else 0
        self._only = np.zeros((2, size), np.int32)  # pairs with the phrase on this side alone: chosen, rejected
        self._both = np.zeros(size, np.int32)
        self._seen_in = np.zeros((2, size), np.int32)  # the pair that had the phrase last, on each side
        self._named: dict[int, tuple[int, ...]] = {}

    def add(self, block: Block) -> None:
        if not self._is_on:
            return
        bounds = np.append(block.starts, len(block.tokens)).tolist()
        answers = [
            block.tokens[begin:end][block.mask[begin:end] == 1].astype(np.uint64) for begin, end in pairwise(bounds)
        ]
        for better, worse in zip(answers[::2], answers[1::2], strict=True):
            self._pair(better, worse)

    def _pair(self, *sides: np.ndarray) -> None:
        self._pairs += 1
        hashed = [_phrases(side) for side in sides]
        for seen, places in zip(self._seen_in, hashed, strict=True):
            seen[places] = self._pairs
        for side, other in ((0, 1), (1, 0)):
            alone = self._seen_in[other][hashed[side]] != self._pairs
            # An index that stands there twice is counted once.
            self._only[side][hashed[side][alone]] += 1
            if side == 0:
                self._both[hashed[0][~alone]] += 1
            if self._pairs >= FEW_PAIRS:
                self._name(sides[side], hashed[side], np.flatnonzero(alone))

    def _name(self, tokens: np.ndarray, hashed: np.ndarray, alone: np.ndarray) -> None:
        """Keep the tokens of telling phrases; `alone` are the places in `hashed` of those on one side."""
        for place in alone[self._is_telling(hashed[alone])].tolist():
            bucket = int(hashed[place])
            if bucket not in self._named and len(self._named) < CANDIDATES:
                for size in SIZES:
                    count = max(0, len(tokens) - size + 1)
                    if place < count:
                        self._named[bucket] = tuple(tokens[place : place + size].tolist())
                        break
                    place -= count

    def _is_telling(self, buckets: np.ndarray) -> np.ndarray:
        better, worse = self._only[0][buckets].astype(np.float64), self._only[1][buckets].astype(np.float64)
        both = self._both[buckets]
        high, low = np.maximum(better, worse), np.minimum(better, worse)
        significant = (high - low) >= SIGMAS * np.sqrt(high + low)
        ratio = (high + both + 0.5) >= RATIO * (low + both + 0.5)
        return significant & ratio & (self._told_apart(buckets) >= ALONE)

    def _told_apart(self, buckets: np.ndarray) -> np.ndarray:
        """Return the share of pairs told apart by the phrase alone, with a guess where it says nothing."""
        better, worse = self._only[0][buckets].astype(np.float64), self._only[1][buckets].astype(np.float64)
        return (self._pairs + np.abs(better - worse)) / (2 * self._pairs)

    def finish(self) -> list[Finding]:
        buckets = np.array(list(self._named), np.int64)
        buckets = buckets[self._is_telling(buckets)]
        apart = self._told_apart(buckets).tolist()
        order = sorted(range(len(buckets)), key=lambda at: -_weight(self._named[int(buckets[at])], apart[at]))
        found: list[Finding] = []
        shown: list[set[int]] = []
        for place, at in enumerate(order[:COMPARED]):
            tokens = self._named[int(buckets[at])]
            if len(found) == FIRST or any(len(before.intersection(tokens)) * 2 >= len(tokens) for before in shown):
                continue
            alike = [other for other in order[place:COMPARED] if abs(apart[other] - apart[at]) <= SAME]
            tokens = _stitched(tokens, [self._named[int(buckets[other])] for other in alike])
            found.append(self._finding(tokens, int(buckets[at]), apart[at]))
            shown.append(set(tokens))
        return found

    def _finding(self, tokens: tuple[int, ...], bucket: int, apart: float) -> Finding:
        phrase = self._setting.tokenizer.encoder.decode(list(tokens), skip_special_tokens=False).strip()
        counts = [int(self._only[side][bucket] + self._both[bucket]) for side in (0, 1)]
        (most, where), (least, other) = sorted(zip(counts, ("chosen", "rejected"), strict=True), reverse=True)
        said = (
            f"{phrase!r} stands in {most / self._pairs:.0%} of {where} and {least / self._pairs:.0%} of {other}: it "
            f"alone tells them apart in {apart:.0%} of pairs"
        )
        more = {"phrase": phrase, "chosen": counts[0], "rejected": counts[1], "tells_apart": apart}
        return Finding("phrase_shortcut", said, most, more=more)


def _weight(tokens: tuple[int, ...], apart: float) -> float:
    """Return how much a phrase is worth showing: of two that tell nearly as much, the longer says what it is about."""
    return (apart - 0.5) * (1 - 0.4 / len(tokens))


def _stitched(tokens: tuple[int, ...], others: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return a phrase made longer by the others that overlap it by half: all are parts of one sentence."""
    waiting = [other for other in others if not _holds(tokens, other)]
    while len(tokens) < LONGEST:
        longer = next((grown for grown in (_overlapping(tokens, other) for other in waiting) if grown), None)
        if longer is None:
            break
        tokens = longer
        waiting = [other for other in waiting if not _holds(tokens, other)]
    return tokens[:LONGEST]


def _overlapping(tokens: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    for size in range(min(len(other) - 1, len(tokens)), len(other) // 2, -1):
        if tokens[-size:] == other[:size]:
            return tokens + other[size:]
        if tokens[:size] == other[-size:]:
            return other[:-size] + tokens
    return None


def _holds(tokens: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return any(tokens[at : at + len(part)] == part for at in range(len(tokens) - len(part) + 1))


def _phrases(tokens: np.ndarray) -> np.ndarray:
    """Return the buckets of all phrases of `tokens` uint64 [n], those of each size behind those of the one before."""
    buckets = []
    for size in SIZES:
        count = max(0, len(tokens) - size + 1)
        hashed = np.zeros(count, np.uint64)
        for place in range(size):
            hashed = (hashed + tokens[place : place + count] + np.uint64(1)) * _MULTIPLIER
            hashed ^= hashed >> np.uint64(29)
        buckets.append(((hashed * _MULTIPLIER) >> np.uint64(44)).astype(np.int64))
    return np.concatenate(buckets)
