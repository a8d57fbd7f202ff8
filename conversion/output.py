"""A directory that a conversion writes: begun or gone on with, filled, finished, and published whole."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from toolkits.foundation.errors import InterruptedRun
from toolkits.foundation.progress import Progress
from toolkits.foundation.publish import publish_directory, require_space, temporary_of

from .filling import File, write_files
from .journal import Journal
from .options import Options
from .report import VERSION


def publish_output(
    target: Path,
    files: Sequence[File],
    options: Options,
    *,
    facts: Mapping[str, object],
    label: str,
    finish: Callable[[Path, dict[str, str]], None],
) -> None:
    """Write `files` and what `finish` adds, given the temporary directory and the hashes, and publish it as `target`.

    `facts` say beside the options what decides the bytes: an unfinished output is gone on with when they are the
    same. Raises DiskError, UsageError, InterruptedRun and what reading raises.
    """
    journal = Journal(
        {**facts, **options.facts(), "version of the report": VERSION},
        {file.name: file.size for file in files},
        resume=options.resume,
        restart=options.restart,
    )
    num_bytes = sum(span.num_bytes for file in files for span in file.spans)
    there = _bytes_on_disk(temporary_of(target), files)
    require_space(target, max(0, num_bytes - there))
    try:
        with publish_directory(target, overwrite=options.overwrite, keeps=journal.keeps) as temporary:
            journal.open(temporary)
            with Progress(label, num_bytes, unit="B") as progress:
                hashes = write_files(
                    temporary,
                    files,
                    journal=journal,
                    hashed=options.verify,
                    workers=options.num_workers,
                    advance=progress.advance,
                )
            finish(temporary, hashes)
            journal.remove()
    except KeyboardInterrupt:
        raise InterruptedRun("interrupted; the same line with --resume goes on with what is complete") from None


def state_of(files: Sequence[Path]) -> list[list[object]]:
    """Return name, size and time of change of files: what tells a source from another."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _bytes_on_disk(folder: Path, files: Sequence[File]) -> int:
    paths = [folder / file.name for file in files]
    return sum(os.stat(path).st_blocks * 512 for path in paths if path.is_file())
