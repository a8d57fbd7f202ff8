"""What of an unfinished output is complete, so that a process can go on where another died.

A JSON line for the job, then one for each complete batch. It lies in the temporary directory, which becomes the
output when it is whole, and is removed then.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from toolkits.foundation.errors import UsageError
from toolkits.foundation.progress import clock, human_bytes

JOURNAL_FILE = "unfinished.jsonl"


class Journal:
    """The journal of a job: `facts` is everything that decides the bytes of the output, `sizes` are its files'.

    An unfinished output is gone on with under `resume` and thrown away under `restart`.
    """

    def __init__(self, facts: Mapping[str, object], sizes: Mapping[str, int], *, resume: bool, restart: bool) -> None:
        if resume and restart:
            raise UsageError("--resume goes on with an unfinished output, --restart throws it away: choose one")
        self._job = json.loads(json.dumps({**facts, "files": sizes}))
        self._resume, self._restart = resume, restart
        self._done: set[str] = set()
        self.hashes: dict[str, str] = {}  # of the tensors that were complete when it was opened

    def keeps(self, folder: Path) -> bool:
        """Whether an unfinished output is gone on with; what `publish_directory` asks.

        Raises UsageError that says how far it got when nobody said what to do with it, or that it is of another job.
        """
        begun, lines = _read(folder / JOURNAL_FILE)
        if begun is None or self._restart:
            return False
        age = clock(max(0.0, time.time() - (folder / JOURNAL_FILE).stat().st_mtime))
        done = human_bytes(sum(line["bytes"] for line in lines))
        total = human_bytes(sum(begun["files"].values()))
        found = f"found {folder}, left unfinished by a process that died ({done} of {total} complete, {age} old)"
        if not self._resume:
            raise UsageError(f"{found}: --resume goes on with it, --restart throws it away")
        if begun != self._job:
            names = sorted(begun.keys() | self._job.keys())
            differing = [name for name in names if name != "files" and begun.get(name) != self._job.get(name)]
            said = ", ".join(differing) or "files"  # which follow from the others, unless Temper was another
            raise UsageError(f"{found}: it was begun with other {said}; --restart throws it away")
        print(f"{found}: going on with it", flush=True)
        return True

    def open(self, folder: Path) -> None:
        """Begin the journal in `folder`, or go on with the one that is there."""
        self._path = folder / JOURNAL_FILE
        sizes: dict[str, int] = self._job["files"]
        # After a loss of power a file may be gone although its batches were complete.
        whole = all(
            (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()
        )
        kept = _read(self._path)[1] if whole else []
        self._done = {line["done"] for line in kept}
        self.hashes = {name: digest for line in kept for name, digest in line["sha256"].items()}
        # Written anew: the last line may have been cut short.
        self._path.write_text("".join(json.dumps(line) + "\n" for line in [self._job, *kept]))
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115 closed by `remove`

    def __contains__(self, batch: str) -> bool:
        return batch in self._done

    def record(self, batch: str, num_bytes: int, hashes: Mapping[str, str]) -> None:
        """Write down that a batch of so many bytes is complete and durable, and the sha256 of its tensors."""
        self._file.write(json.dumps({"done": batch, "bytes": num_bytes, "sha256": hashes}) + "\n")

    def remove(self) -> None:
        """Remove the journal: the output is whole."""
        self._file.close()
        os.unlink(self._path)


def _read(path: Path) -> tuple[dict | None, list[dict]]:
    """Return the job and the lines of a journal; None when there is no job in it."""
    try:
        lines = path.read_text().split("\n")[:-1]  # a line without its end was cut short
        job, *rest = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None, []
    return job, rest
