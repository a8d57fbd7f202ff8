"""The first pass over the rows: judges decide, choosers remember, and of each row a few numbers are kept."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolkits.foundation.progress import Progress

from ..chunks import Chunk, chunks_of
from ..reading import ReadReport, read_batches
from ..rejects import BadRows
from ..row_error import RowError
from ..rows import Row, Rows
from .facts import Facts, facts_of
from .split import Splitter
from .step import Chooser, Judge

ROWS_AT_ONCE = 512
BAD, STAYS = -1, -2  # beside the numbers of steps: what becomes of a row


@dataclass(frozen=True)
class ReadOptions:
    """How rows are read, as `temper data build` does."""

    on_bad_row: Literal["stop", "skip"] = "stop"
    max_bad: float = 0.01  # with skip: the fraction of rows that may be bad
    encoding: str = "utf-8"
    merge_consecutive: bool = False
    columns: tuple[tuple[str, str], ...] = ()

    def facts(self, number: int, row: Row) -> Facts:
        """Return what is known of a row; RowError when it is bad."""
        joining, columns = self.merge_consecutive, self.columns
        return facts_of(number, row, encoding=self.encoding, merge_consecutive=joining, columns=columns)

    def bad_rows(self, sources: Sequence[Path]) -> BadRows:
        """Return what counts the bad rows of some files."""
        return BadRows(sources, skip=self.on_bad_row == "skip")


def batches_with_progress(
    label: str, sources: Sequence[Path], options: ReadOptions, report: ReadReport | None = None
) -> Iterator[Rows]:
    """Yield the rows of files and say how far it is."""
    report, total = report or ReadReport(), sum(path.stat().st_size for path in sources)
    with Progress(label, total, unit="B") as progress:
        for batch in read_batches(sources, report, encoding=options.encoding):
            yield batch
            progress.advance(report.bytes_read - progress.done)
        progress.advance(total - progress.done)


class Survey:
    """What is known of the rows after the first pass.

    `lines` and `files` say where each stands, `judged` holds the number of the first step of judges that refuses it,
    BAD or STAYS.
    """

    def __init__(self, sources: Sequence[Path], options: ReadOptions) -> None:
        self._sources, self._options = sources, options
        self._file_of = {source: number for number, source in enumerate(sources)}
        self.lines, self.files, self.judged = array("q"), array("i"), array("h")
        self.layouts: Counter[str] = Counter()
        self.report, self.bad = ReadReport(), options.bad_rows(sources)

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Return file and line of a row."""
        return f"{self._sources[self.files[row]]}:{self.lines[row]}"

    def run(self, workers: Sequence[Judge | Chooser], splitter: Splitter | None) -> None:
        """Show all rows to those who decide about them; DataError for bad rows that are not to be skipped."""
        batches = batches_with_progress("looking at rows", self._sources, self._options, self.report)
        for chunk in chunks_of(batches, chunk_rows=ROWS_AT_ONCE):
            good = self._noted(chunk)
            for number, worker in enumerate(workers):
                if isinstance(worker, Chooser):
                    worker.remember(good)
                else:
                    good = self._passed(number, worker, good)
            if splitter:
                splitter.remember(good)
        self.bad.check(len(self), self._options.max_bad)

    def _noted(self, chunk: Chunk) -> list[Facts]:
        good = []
        for number, row in enumerate(chunk.rows, start=chunk.first):
            self.lines.append(row.line)
            self.files.append(self._file_of[row.source])
            try:
                facts = self._options.facts(number, row)
            except RowError as error:
                self.bad.add(row, error)
                self.judged.append(BAD)
            else:
                self.layouts[facts.record.layout] += 1
                self.judged.append(STAYS)
                good.append(facts)
        return good

    def _passed(self, number: int, judge: Judge, rows: Sequence[Facts]) -> list[Facts]:
        passed = []
        for row, verdict in zip(rows, judge.judge(rows), strict=True):
            if verdict is None:
                passed.append(row)
            else:
                self.judged[row.number] = number
        return passed
