"""Bad rows: the first one stops a build, or each is written down with its reason."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from toolkits.foundation.errors import DataError

from .dataset import DOCUMENT_SUFFIX
from .reading import Row
from .row_error import RowError


def rejects_path(target: Path) -> Path:
    """Return where the bad rows of the dataset `target` are written down."""
    return target.with_name(target.name.removesuffix(DOCUMENT_SUFFIX) + ".rejects.jsonl")


class Rejects:
    """The bad rows of a build; with `skip` they go to `path`. `state` is what `save` of another one returned."""

    def __init__(self, sources: Sequence[Path], path: Path, *, skip: bool, state: Mapping[str, Any] | None) -> None:
        self.reasons: Counter[str] = Counter(state["reasons"] if state else {})
        self._sources, self._path, self._skip = sources, path, skip
        self._first: str = state["first"] if state else ""
        self._file: IO[bytes] | None = None
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

    def add(self, row: Row, error: RowError) -> None:
        """Raise DataError, or write the row down."""
        said = f"{row.source}:{row.line}: {error}"
        if not self._skip:
            raise DataError(f"{said} (mend it, or drop such rows with --on-bad-row skip)") from error
        self._first = self._first or said
        self.reasons[error.reason] += 1
        if self._file is None:
            self._file = open(self._path, "wb")  # noqa: SIM115  closed by __exit__
        data = row.data.decode("utf-8", "replace").rstrip("\r\n") if isinstance(row.data, bytes) else row.data
        entry: dict[str, Any] = {"line": row.line, "reason": error.reason, "message": str(error), "row": data}
        if len(self._sources) > 1:
            entry = {"file": str(row.source), **entry}
        # Escaped, because a rejected row may hold what no encoding can write.
        self._file.write(json.dumps(entry, ensure_ascii=True, default=str).encode() + b"\n")

    def check(self, rows: int, max_bad: float) -> None:
        """Raise DataError when no row is left, or too many were bad."""
        bad, names = self.reasons.total(), ", ".join(map(str, self._sources))
        if not rows:
            raise DataError(f"{names}: the file has no rows")
        if bad > max_bad * rows or bad == rows:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
            raise DataError(
                f"{names}: {bad} of {rows} rows are bad ({bad / rows:.2%}, --max-bad allows {max_bad:.2%}): "
                f"{reasons}; all of them are in {self._path}; the first: {self._first}"
            )

    def save(self) -> dict[str, Any]:
        """Make what was written durable and return what another one needs to go on."""
        size = 0
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
        return {"reasons": dict(self.reasons), "first": self._first, "bytes": size}
