"""A build that was killed can go on: what it wrote, and how far it had read, lies beside its files.

The point is saved every few seconds, after the files are on disk. Rows in front of it are read again, which is fast,
but not parsed. A build of another job, or one whose files lost something, starts from the beginning.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkits.foundation.progress import clock
from toolkits.foundation.publish import write_text

STATE_FILE = "unfinished.json"


class Unfinished:
    """The saved point of a build; `job` is everything that decides its result, None when it cannot be repeated."""

    def __init__(self, job: Mapping[str, Any] | None, rejects: Path, *, seconds: float) -> None:
        self._job = json.loads(json.dumps(job)) if job is not None else None
        self._rejects, self._seconds = rejects, seconds
        self._saved = time.monotonic()
        self.state: dict[str, Any] | None = None

    def keeps(self, folder: Path) -> bool:
        """Whether the files that lie in `folder` are gone on with; what `publish_files` asks."""
        try:
            saved = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            age = clock(max(0.0, time.time() - (folder / STATE_FILE).stat().st_mtime))
            same, sizes = saved["job"] == self._job, saved["sizes"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if self._job is None or not same:
            print(f"{folder} was left unfinished by another build: starting from the beginning", flush=True)
            return False
        files = {folder / name: size for name, size in sizes.items()} | {self._rejects: saved["rejects"]}
        if any((path.stat().st_size if path.exists() else 0) < size for path, size in files.items()):
            print(f"{folder} was left unfinished and lost something since: starting from the beginning", flush=True)
            return False
        self.state = saved["state"]
        print(f"found {folder}, left unfinished {age} ago: going on behind row {saved['rows']:,}", flush=True)
        return True

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return self._job is not None and time.monotonic() - self._saved >= self._seconds

    def save(self, folder: Path, *, rows: int, sizes: Mapping[str, int], rejects: int, state: dict[str, Any]) -> None:
        """Save the point behind `rows` rows of the input; `sizes` are those of the files in `folder`."""
        saved = {"job": self._job, "rows": rows, "sizes": sizes, "rejects": rejects, "state": state}
        write_text(folder / STATE_FILE, json.dumps(saved))
        self._saved = time.monotonic()

    def remove(self, folder: Path) -> None:
        """Remove the saved point: the build is complete."""
        (folder / STATE_FILE).unlink(missing_ok=True)
