"""Several files of rows -> one, mixed by weight.

note     every row is read and checked; where it stands is noted, or it is put aside when its file cannot be
         read from the middle (packed, a JSON list, a table, another encoding, several files in one input)
write    row by row from the input whose turn it is, by the rule that blends datasets in training (blend.py)
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from toolkits.foundation.errors import DataError, UsageError, raise_all
from toolkits.foundation.progress import Progress
from toolkits.foundation.publish import publish_files, require_space

from ..blend import Mix, Part, check_cycle, read_weight, whole_weights
from ..chunks import KIND_OF, ONE_OF
from ..reading import ReadReport, find_inputs
from ..rejects import BadRows, Rejects
from ..row_error import RowError
from ..rows import is_utf8
from .output import Output, changing_facts, input_files, line_of
from .step import drawn
from .survey import ReadOptions, batches_with_progress

READING = "reading"


def parse_parts(words: Sequence[str]) -> tuple[Part, ...]:
    """Read `IN=WEIGHT` words; UsageError that lists everything that is wrong with them."""
    parts, problems = [], []
    for word in words:
        path, equals, said = word.rpartition("=")
        weight = read_weight(said) if equals and path else None
        if weight is None or weight <= 0:
            problems.append(f"{word!r} is not IN=WEIGHT with a weight above 0, as in chats.jsonl=0.7")
        else:
            parts.append(Part(Path(path), weight))
    raise_all(UsageError, "the inputs of a mix cannot be read", problems)
    check_cycle(parts, " ".join(words))
    return tuple(parts)


def mix_rows(
    parts: Sequence[Part],
    target: Path,
    *,
    rows: int | None = None,
    seed: int | None = None,
    options: ReadOptions | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write rows of `parts` to `target`, as they are, in the proportion of the weights, and return the report.

    `rows` None: as many as there are until an input would repeat itself. With `seed` each pass over an input takes
    its rows in an order of its own, without in that of the file. Raises DataError for bad rows and for inputs of
    different kinds, UsageError when the output exists.
    """
    options = options or ReadOptions()
    output = Output.of(target)
    sources = input_files([str(part.path) for part in parts], output)
    with publish_files(output.stem, output.suffixes, overwrite=overwrite) as folder, ExitStack() as stack:
        require_space(target.parent, sum(path.stat().st_size for path in sources))
        inside = output.within(folder)
        rejects = stack.enter_context(Rejects(sources, inside.rejects, skip=True, state=None))
        facts, bad = changing_facts(sources), options.bad_rows(sources)
        sets = [_Set(part, folder / f"input-{number}", stack) for number, part in enumerate(parts)]
        for one in sets:
            one.note(options, bad, rejects)
        bad.check(sum(len(one) for one in sets) + bad.reasons.total(), options.max_bad)
        _check_kinds(sets)
        report = _write(sets, inside.files[0], rows, seed)
        if changing_facts(sources) != facts:
            names = ", ".join(map(str, sources))
            raise DataError(f"{names}: an input changed while it was read; start again when it is complete")
        stack.close()
        for leftover in folder.glob("input-*"):
            leftover.unlink()
        inside.rejects.touch()
        report["bad_rows"] = dict(sorted(bad.reasons.items()))
        inside.write_report(report)
    return report


class _Set:
    """The rows of one input: where each of them begins, in its file or in the one that they are put aside in."""

    def __init__(self, part: Part, aside: Path, stack: ExitStack) -> None:
        self.part, self.kinds = part, Counter[str]()
        self._aside, self._stack = aside, stack
        self._offsets = array("q")
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._offsets)

    def note(self, options: ReadOptions, bad: BadRows, rejects: Rejects) -> None:
        """Read all rows; DataError for a bad one that is not to be skipped, or when none is left."""
        sources, report, aside = find_inputs([str(self.part.path)]), ReadReport(), None
        as_it_is = is_utf8(options.encoding)
        batches = batches_with_progress(f"reading {self.part.path}", sources, options, report)
        for number, row in enumerate(chain.from_iterable(batches)):
            try:
                found = options.facts(number, row)
            except RowError as error:
                bad.add(row, error)
                rejects.drop(row, step=READING, reason=error.reason, message=str(error))
                continue
            self.kinds[KIND_OF[type(found.record)]] += 1
            if len(sources) == 1 and as_it_is and report.kind == "JSONL":
                self._offsets.append(row.offset)
                continue
            aside = aside or self._opened(self._aside, "w+b")
            self._offsets.append(aside.tell())
            aside.write(line_of(row, options.encoding))
        if not len(self):
            raise DataError(f"{self.part.path}: no good row to mix")
        self._file = aside or self._opened(sources[0], "rb")

    def _opened(self, path: Path, mode: str) -> IO[bytes]:
        return self._stack.enter_context(path.open(mode))

    def line(self, number: int) -> bytes:
        """Return a row as a line of JSONL."""
        assert self._file is not None  # all rows are noted before any is taken
        self._file.seek(self._offsets[number])
        return self._file.readline().rstrip(b"\r\n") + b"\n"


def _check_kinds(sets: Sequence[_Set]) -> None:
    if len({kind for one in sets for kind in one.kinds}) > 1:
        each = [f"{one.part.path}: {', '.join(ONE_OF[kind][1] for kind in sorted(one.kinds))}" for one in sets]  # type: ignore[index]
        raise DataError(f"a dataset holds rows of one kind, and these are of several: {'; '.join(each)}")


def _write(sets: Sequence[_Set], target: Path, rows: int | None, seed: int | None) -> dict[str, Any]:
    mix, held = Mix(whole_weights([one.part for one in sets])), [len(one) for one in sets]
    # The first input to be used up decides, which may be in the middle of a cycle.
    total = rows or min(_rows_until(mix, part, count + 1) for part, count in enumerate(held)) - 1
    order: dict[int, tuple[int, np.ndarray]] = {}  # of each input: the pass it is in, and its rows in that
    with open(target, "wb") as file, Progress("writing rows", total, unit="rows") as progress:
        for place in range(total):
            part, index = mix.at(place)
            turn, at = divmod(index, held[part])
            if seed is not None:
                if order.get(part, (-1, 0))[0] != turn:
                    order[part] = (turn, _shuffled(held[part], (seed, part, turn)))
                at = int(order[part][1][at])
            file.write(sets[part].line(at))
            progress.advance()
    parts = []
    for number, (one, given) in enumerate(zip(sets, mix.given(total), strict=True)):
        used_up = _rows_until(mix, number, held[number]) if given >= held[number] else None
        about = {"input": str(one.part.path), "weight": _decimal(one.part.weight), "rows": held[number]}
        times = round(given / held[number], 4)
        parts.append({**about, "given": given, "times": times, "used_up_after": used_up})
    return {"parts": parts, "rows": total, "seed": seed}


def _rows_until(mix: Mix, part: int, count: int) -> int:
    """Return after how many rows of the mix a part has given `count`."""
    cycles = (count - 1) // mix.counts[part]
    low, high = cycles * sum(mix.counts), (cycles + 1) * sum(mix.counts)
    while low < high:
        middle = (low + high) // 2
        if mix.given(middle)[part] >= count:
            high = middle
        else:
            low = middle + 1
    return low


def _shuffled(count: int, what: tuple[int, int, int]) -> np.ndarray:
    """Return the numbers below `count` in an order that depends on `what` alone, int64 [count]."""
    seed, *rest = what
    keys = np.fromiter((drawn(seed, *rest, row) for row in range(count)), np.uint64, count)
    return np.argsort(keys, kind="stable")


def _decimal(weight: Fraction) -> str:
    return f"{float(weight):g}"
