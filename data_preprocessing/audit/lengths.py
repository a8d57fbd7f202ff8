"""How long rows are, and what becomes of them at a SEQ_LEN: cut, left out, packed."""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..fitting import fit
from ..packing import one_per_row, pack
from .block import Block, Setting
from .findings import Check, Finding, counted, share

USUAL = (1024, 2048, 4096, 8192)  # row lengths that are reported when nobody names one
BARS = 16  # of a histogram, at most
SHARES = (50, 90, 99)  # percentiles


class Lengths(Check):
    """Lengths in tokens, and where answers begin and end: a few numbers a row."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._word = setting, "answer" if setting.kind == "preferences" else "row"
        # Four long arrays, not many short ones between which memory could not be given back.
        self._kept = tuple(array("i") for _ in range(4))

    def add(self, block: Block) -> None:
        ends, starts = np.cumsum(block.lengths), block.starts
        padded = np.insert(block.mask, ends, 0)  # a stretch ends where its sample does
        edges = np.flatnonzero(np.diff(padded, prepend=np.uint8(0)))
        sample_of = np.searchsorted(ends + np.arange(len(ends)), edges, side="left")
        places = edges - starts[sample_of] - sample_of
        numbers = np.repeat([entry.number for entry in block.entries], len(starts) // max(1, len(block.entries)))
        counts = np.bincount(sample_of, minlength=len(starts))
        for kept, found in zip(self._kept, (block.lengths, numbers, places, counts), strict=True):
            kept.frombytes(found.astype(np.int32).tobytes())

    @property
    def measured(self) -> "Measured":
        """The lengths of all samples."""
        return Measured(self._setting.name, *(np.array(kept, np.int32) for kept in self._kept))

    def facts(self) -> dict[str, Any]:
        measured = self.measured
        if not len(measured.lengths):
            return {}
        return {
            "tokens": int(measured.lengths.sum(dtype=np.int64)),
            "trained_tokens": int(measured.stretches.sum(dtype=np.int64)),
            "lengths": _summary(measured.lengths),
            "seq_lens": [self._at(measured, seq_len)[0] for seq_len in self._setting.seq_lens or USUAL],
        }

    def finish(self) -> list[Finding]:
        measured = self.measured
        count, size = len(measured.lengths), self._setting.global_batch_size
        if not self._setting.seq_lens or not count:
            return self._few(count, "even one by one", size) if size and 0 < count < size else []
        # Who gives several lengths wants to choose one: what does not fit the longest fits none.
        return self._at(measured, max(self._setting.seq_lens))[1]

    def _at(self, measured: "Measured", seq_len: int) -> tuple[dict[str, Any], list[Finding]]:
        """Return what becomes of the rows at `seq_len`, and what is wrong with that."""
        lengths, kind = measured.lengths.astype(np.int64), self._setting.kind
        facts: dict[str, Any] = {"seq_len": seq_len, "too_long": 0, "cut": 0, "left_out": 0, "all_masked": 0}
        found: list[Finding] = []
        if kind == "text":
            facts |= {"rows": -(-int(lengths.sum()) // seq_len), "fill": 1.0, "rows_unpacked": len(lengths)}
        else:
            if kind != "prompts":
                fitted = fit(measured, seq_len, "truncate")
                fits = (fitted.lengths > 0) & (fitted.targets > 0)
                if kind == "preferences":  # a pair of which one side does not fit is none
                    fits = np.repeat(fits[::2] & fits[1::2], 2)
                lengths = fitted.lengths[fits]
                masked = np.flatnonzero(measured.first_trained >= seq_len)
                facts |= {"cut": fitted.num_cut, "left_out": len(measured.lengths) - len(lengths)}
                facts |= {"all_masked": len(masked)}
                found += self._masked(measured, masked, seq_len)
            else:
                lengths = lengths[lengths <= seq_len]
                facts["left_out"] = len(measured.lengths) - len(lengths)
            facts["too_long"] = int((measured.lengths > seq_len).sum())
            found += self._too_long(measured, facts)
            facts |= _packed(lengths, seq_len)
        size = self._setting.global_batch_size
        if size:
            facts["steps_an_epoch"] = facts["rows"] // size
            if facts["rows"] < size:
                found += self._few(facts["rows"], f"of {seq_len:,} tokens", size)
        return facts, found

    def _few(self, rows: int, which: str, size: int) -> list[Finding]:
        said = f"{counted(rows)} {which}, and a global batch takes {size:,}"
        return [Finding("few_rows", f"{said}: lower --global-batch-size or --seq-len, or add data", rows)]

    def _too_long(self, measured: "Measured", facts: dict[str, Any]) -> list[Finding]:
        seq_len, count = facts["seq_len"], facts["too_long"]
        if not count:
            return []
        pairs = ", whole pairs" * (self._setting.kind == "preferences")
        worst, longest = int(measured.lengths.argmax()), int(measured.lengths.max())
        said = (
            f"{share(count, len(measured.lengths), self._word)} > {seq_len:,} tokens, longest {longest:,} at "
            f"{measured.place(worst, self._setting)}; training cuts {facts['cut']:,} of them behind their last whole "
            f"answer that fits and leaves out {facts['left_out']:,}{pairs}: raise --seq-len, or --allow too_long"
        )
        over = np.flatnonzero(measured.lengths > seq_len)
        return [Finding("too_long", said, count, measured.places(over, self._setting))]

    def _masked(self, measured: "Measured", masked: np.ndarray, seq_len: int) -> list[Finding]:
        if not len(masked):
            return []
        many = share(len(masked), len(measured.lengths), self._word)
        said = f"{many} without a trained token within {seq_len:,}: the prompt is as long"
        return [Finding("all_masked", said, len(masked), measured.places(masked, self._setting))]


class Measured:
    """Samples without their tokens; what `fit` asks of a dataset.

    `lengths` int32 [samples]; of each sample `counts` borders, half of them where a trained stretch begins, lie end
    to end in `borders`.
    """

    def __init__(
        self, name: str, lengths: np.ndarray, numbers: np.ndarray, borders: np.ndarray, counts: np.ndarray
    ) -> None:
        self.path, self.lengths, self._numbers, self._borders = Path(name), lengths, numbers, borders
        self._bounds = np.append(0, np.cumsum(counts, dtype=np.int64))

    @property
    def stretches(self) -> np.ndarray:
        """The length of each trained stretch."""
        return self._borders[1::2] - self._borders[::2]

    @property
    def first_trained(self) -> np.ndarray:
        """The first trained token of each sample that training asks for, int64 [samples]; nothing predicts token 0.

        It is the sample's length where there is none.
        """
        first = self.lengths.astype(np.int64)
        some = np.flatnonzero(self._bounds[1:] > self._bounds[:-1])
        begin = self._bounds[some]
        first[some] = np.maximum(self._borders[begin], 1)
        alone = self._borders[begin + 1] == 1  # nothing but token 0
        further = begin + 2 < self._bounds[some + 1]
        first[some[alone & ~further]] = self.lengths[some[alone & ~further]]
        first[some[alone & further]] = self._borders[begin[alone & further] + 2]
        return first

    def trained_targets(self) -> np.ndarray:
        totals = np.append(0, np.cumsum(self.stretches, dtype=np.int64))[self._bounds // 2]
        counts = np.diff(totals)
        some = np.flatnonzero(self._bounds[1:] > self._bounds[:-1])
        counts[some] -= self._borders[self._bounds[some]] == 0
        return counts

    def mask(self, row: int) -> np.ndarray:
        mask = np.zeros(int(self.lengths[row]), np.uint8)
        borders = self._borders[self._bounds[row] : self._bounds[row + 1]].reshape(-1, 2)
        for begin, end in borders.tolist():
            mask[begin:end] = 1
        return mask

    def place(self, sample: int, setting: Setting) -> str:
        """Return where a sample stands."""
        return setting.places[int(self._numbers[sample])]

    def places(self, samples: np.ndarray, setting: Setting) -> tuple[str, ...]:
        """Return where the first of some samples stand."""
        return setting.places.of(dict.fromkeys(self._numbers[samples[:3]].tolist()))


def _packed(lengths: np.ndarray, seq_len: int) -> dict[str, Any]:
    if not len(lengths):
        return {"rows": 0, "fill": 0.0, "rows_unpacked": 0}
    rows = len(pack(lengths, seq_len)[1]) - 1
    alone = len(one_per_row(lengths, seq_len)[1]) - 1
    return {"rows": rows, "fill": float(lengths.sum() / (rows * seq_len)), "rows_unpacked": alone}


def _summary(lengths: np.ndarray) -> dict[str, Any]:
    """Return mean, percentiles and histogram of lengths."""
    edges, counts = histogram(lengths)
    quantiles = {f"p{share}": int(value) for share, value in zip(SHARES, np.percentile(lengths, SHARES), strict=True)}
    return {
        "shortest": int(lengths.min()),
        "mean": float(lengths.mean()),
        **quantiles,
        "longest": int(lengths.max()),
        "histogram": [{"from": begin, "below": end, "rows": rows} for begin, end, rows in _bars(edges, counts)],
    }


def _bars(edges: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int, int]]:
    return list(zip(edges[:-1], edges[1:], counts, strict=True))


def histogram(lengths: np.ndarray) -> tuple[list[int], list[int]]:
    """Return borders and counts of at most BARS bars, all of one width but the last, which holds the longest 1%."""
    usual, longest = int(np.percentile(lengths, 99)), int(lengths.max())
    width = next(
        factor * 10**power for power in range(12) for factor in (1, 2, 5) if factor * 10**power * (BARS - 1) > usual
    )
    edges = list(range(0, usual + width + 1, width))
    if edges[-1] <= longest:
        edges.append(longest + 1)
    return edges, np.histogram(lengths, edges)[0].tolist()
