"""Rows that are dropped, each written down with its reason; a bad row stops a command unless it is to be skipped."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from toolkits.foundation.errors import DataError

from .dataset import DOCUMENT_SUFFIX
from .row_error import RowError
from .rows import Row


def rejects_path(target: Path) -> Path:
    """Return where the bad rows of the dataset `target` are written down."""
    return target.with_name(target.name.removesuffix(DOCUMENT_SUFFIX) + ".rejects.jsonl")


class BadRows:
    """The bad rows of some files, counted by reason; without `skip` the first one stops everything."""

    def __init__(self, sources: Sequence[Path], *, skip: bool) -> None:
        self.reasons: Counter[str] = Counter()
        self.first = ""
        self._sources, self._skip = sources, skip

    def add(self, row: Row, error: RowError) -> None:
        """Raise DataError, or count the row."""
        said = f"{row.source}:{row.line}: {error}"
        if not self._skip:
            raise DataError(f"{said} (mend it, or drop such rows with --on-bad-row skip)") from error
        self.first = self.first or said
        self.reasons[error.reason] += 1

    def check(self, rows: int, max_bad: float, *, written: Path | None = None) -> None:
        """Raise DataError when no row is left, or too many were bad; `written` is where they were written down."""
        bad, names = self.reasons.total(), ", ".join(map(str, self._sources))
        if not rows:
            raise DataError(f"{names}: the file has no rows")
        if bad > max_bad * rows or bad == rows:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
            where = f"; all of them are in {written}" if written else ""
            raise DataError(
                f"{names}: {bad} of {rows} rows are bad ({bad / rows:.2%}, --max-bad allows {max_bad:.2%}): "
                f"{reasons}{where}; the first: {self.first}"
            )


class Rejects:
    """The rows that a command drops; they go to `path`. `state` is what `save` of another one returned.

    Bad rows are dropped with `skip`, and raise DataError without.
    """

    def __init__(self, sources: Sequence[Path], path: Path, *, skip: bool, state: Mapping[str, Any] | None) -> None:
        self._bad, self._path = BadRows(sources, skip=skip), path
        self._file: IO[bytes] | None = None
        if state:
            self._bad.reasons.update(state["reasons"])
            self._bad.first = state["first"]
        if state and state["bytes"]:
            self._file = open(path, "r+b")  # noqa: SIM115  closed by __exit__
            self._file.truncate(state["bytes"])
            self._file.seek(state["bytes"])

    def __enter__(self) -> "Rejects":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file:
            self._file.close()
        elif kind is None:
            self._path.unlink(missing_ok=True)  # what an earlier build left there is not about this one

    @property
    def reasons(self) -> Counter[str]:
        """How many bad rows there were, by reason."""
        return self._bad.reasons

    def add(self, row: Row, error: RowError) -> None:
        """Raise DataError, or write the bad row down."""
        self._bad.add(row, error)
        self.drop(row, reason=error.reason, message=str(error))

    def drop(self, row: Row, **why: str) -> None:
        """Write a row down with its place and why it was dropped."""
        if self._file is None:
            self._file = open(self._path, "wb")  # noqa: SIM115  closed by __exit__
        data = row.data.decode("utf-8", "replace").rstrip("\r\n") if isinstance(row.data, bytes) else row.data
        entry = {"file": str(row.source), "line": row.line, **why, "row": data}
        # Escaped, because a rejected row may hold what no encoding can write.
        self._file.write(json.dumps(entry, ensure_ascii=True, default=str).encode() + b"\n")

    def check(self, rows: int, max_bad: float) -> None:
        """Raise DataError when no row is left, or too many were bad."""
        self._bad.check(rows, max_bad, written=self._path)

    def save(self) -> dict[str, Any]:
        """Make what was written durable and return what another one needs to go on."""
        size = 0
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
        return {"reasons": dict(self.reasons), "first": self._bad.first, "bytes": size}
