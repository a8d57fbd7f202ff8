"""Checks of what rows are and say: bad ones, answers that are all alike, labels, languages."""

from array import array
from collections import Counter

import numpy as np

from ..languages import language_of
from ..row_error import RowError
from .block import Block, Setting, hash_of
from .findings import FIRST, Check, Finding, counted, share

OWN_CODES = ("same_answers", "all_masked")  # reasons of bad rows that are findings of their own
MANY_ANSWERS, MANY_SHARE = 10, 0.005  # rows with one answer: the least number, and the least share, worth a word
BUCKETS, CANDIDATES = 1 << 20, 4096  # that frequent answers are looked for in, and whose text is kept
SHOWN = 60  # characters of an answer that a finding shows
LOOKED_AT = 600  # characters of a row that tell its language


class BadRows(Check):
    """Rows that a build would refuse, by reason."""

    def __init__(self, setting: Setting) -> None:
        self._places = setting.places
        self._found: dict[str, list[tuple[int, RowError]]] = {}
        self._reasons: Counter[str] = Counter()
        self._good = 0

    def add(self, block: Block) -> None:
        self._good += len(block.entries)
        for number, error in block.bad:
            self._reasons[error.reason] += 1
            first = self._found.setdefault(error.reason, [])
            if len(first) < FIRST:
                first.append((number, error))

    def facts(self) -> dict[str, object]:
        return {"rows": self._good + self._reasons.total(), "bad_rows": dict(self._reasons.most_common())}

    def finish(self) -> list[Finding]:
        found = [self._finding(reason, [reason]) for reason in OWN_CODES if reason in self._reasons]
        others = [reason for reason, _ in self._reasons.most_common() if reason not in OWN_CODES]
        if others:
            found.append(self._finding("bad_rows", others))
        if not self._good:
            found.append(Finding("empty", "no good row: nothing to train on", 0))
        return found

    def _finding(self, code: str, reasons: list[str]) -> Finding:
        count = sum(self._reasons[reason] for reason in reasons)
        shown = [self._found[reason][0] for reason in reasons] if len(reasons) > 1 else self._found[reasons[0]]
        by_reason = ", ".join(f"{reason} {self._reasons[reason]:,}" for reason in reasons)
        said = f"{share(count, count + self._good)} that a build refuses: {by_reason}"
        places = tuple(f"{self._places[number]}: {error}" for number, error in shown)
        return Finding(code, said, count, places, {"reasons": {reason: self._reasons[reason] for reason in reasons}})


class ControlTexts(Check):
    """Texts in messages that look like control tokens."""

    def __init__(self, setting: Setting) -> None:
        self._texts = self._rows = 0

    def add(self, block: Block) -> None:
        self._texts += block.control_texts
        self._rows += block.rows_with_control_text

    def finish(self) -> list[Finding]:
        if not self._texts:
            return []
        said = f"{counted(self._rows)} with {counted(self._texts, 'text')} spelled like control tokens, which stay text"
        return [Finding("control_text", said, self._rows, more={"texts": self._texts})]


class EqualAnswers(Check):
    """One answer to many questions: 24 bytes a row, and the text of answers that seem frequent."""

    def __init__(self, setting: Setting) -> None:
        self._places = setting.places
        self._rows, self._answers, self._numbers = array("Q"), array("Q"), array("q")
        self._seen = np.zeros(BUCKETS, np.int32)  # answers by a few bits of their hash
        self._texts: dict[int, str] = {}

    def add(self, block: Block) -> None:
        for entry, row in zip(block.entries, block.hashes, strict=True):
            if not entry.answers:
                continue
            answer = entry.answers[-1].strip()
            key = hash_of(answer.encode())
            self._rows.append(row)
            self._answers.append(key)
            self._numbers.append(entry.number)
            self._seen[key % BUCKETS] += 1
            if self._seen[key % BUCKETS] >= MANY_ANSWERS and len(self._texts) < CANDIDATES:
                self._texts[key] = answer[: SHOWN + 1]

    def finish(self) -> list[Finding]:
        # Copies of one row are not many questions.
        rows = np.sort(np.unique(np.array(self._rows, np.uint64), return_index=True)[1])
        answers, first, counts = np.unique(
            np.array(self._answers, np.uint64)[rows], return_index=True, return_counts=True
        )
        found = []
        for at in np.lexsort((first, -counts))[:FIRST].tolist():
            count, key = int(counts[at]), int(answers[at])
            if count < max(MANY_ANSWERS, MANY_SHARE * len(rows)):
                break
            text = self._texts.get(key, "")
            shown = f": {text[:SHOWN] + '...' * (len(text) > SHOWN)!r}" * bool(text)
            said = f"{share(count, len(rows))} with different questions and the same answer{shown}"
            alike = rows[np.flatnonzero(np.array(self._answers, np.uint64)[rows] == answers[at])[:FIRST]]
            numbers = [self._numbers[row] for row in alike.tolist()]
            found.append(Finding("equal_answers", said, count, self._places.of(numbers)))
        return found


class Labels(Check):
    """Labels that are all alike."""

    def __init__(self, setting: Setting) -> None:
        self._counts: Counter[bool] = Counter()

    def add(self, block: Block) -> None:
        self._counts.update(entry.label for entry in block.entries if entry.label is not None)

    def facts(self) -> dict[str, object]:
        if not self._counts:
            return {}
        return {"labels": {"good": self._counts[True], "bad": self._counts[False]}}

    def finish(self) -> list[Finding]:
        if len(self._counts) != 1:
            return []
        (label, count), word = self._counts.popitem(), {True: "good", False: "bad"}
        said = f"all {count:,} answers are labelled {word[label]}, none {word[not label]}: there is nothing to prefer"
        return [Finding("one_class", said, count)]


class Languages(Check):
    """Which languages the rows are in."""

    def __init__(self, setting: Setting) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, block: Block) -> None:
        self._counts.update(language_of(text[:LOOKED_AT]) for text in block.texts)

    def facts(self) -> dict[str, object]:
        return {"languages": dict(sorted(self._counts.items(), key=lambda one: (-one[1], one[0])))}
