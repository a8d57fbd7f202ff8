"""Files whose every byte has its place before the first is written, filled in parallel and in any order.

What a file holds does not depend on who fills it when. Batches that are filled, compared and durable are written
down in a journal, so that a later process goes on where one died.
"""

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError, raise_all

from .journal import Journal

SLICE_BYTES = 1 << 20  # what is read, checked, cast and written at a time: stays in a core's cache
BATCH_BYTES = 64 << 20  # what is compared while its pages are still in memory, and redone after a crash


def row_runs(shape: Sequence[int], itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield (first, behind the last) of runs of rows that take about SLICE_BYTES each."""
    row_bytes = math.prod(shape[1:]) * itemsize
    rows = max(1, SLICE_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


@dataclass(frozen=True)
class Span:
    """A tensor's place: `num_bytes` from `start` on, the bytes of `slices()` one behind the other.

    `check` reads it again and returns what differs from its source. `hashes` returns by their names what is to be
    hashed instead of the bytes as they are written.
    """

    name: str
    start: int
    num_bytes: int
    slices: Callable[[], Iterable[torch.Tensor]]
    check: Callable[[], list[str]] | None = None
    hashes: Callable[[], dict[str, str]] | None = None


@dataclass(frozen=True)
class File:
    """A file of `size` bytes: `fixed` bytes by their offset, and spans; what neither covers is 0."""

    name: str
    size: int
    fixed: Sequence[tuple[int, bytes]]
    spans: Sequence[Span]

    def inside(self, folder: str) -> "File":
        """Return the same file in a folder of that name."""
        return replace(self, name=f"{folder}/{self.name}")


@dataclass(frozen=True)
class _Batch:
    file: str
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        return f"{self.file}:{self.spans[0].start}"

    @property
    def num_bytes(self) -> int:
        return sum(span.num_bytes for span in self.spans)


def write_files(
    folder: Path,
    files: Sequence[File],
    *,
    journal: Journal | None = None,
    hashed: bool = False,
    workers: int = 2,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Write `files` into `folder` with `workers` threads, but for what the journal says is there.

    `advance` is told the bytes of each span. Return the sha256 of each span by its name, if they are `hashed`, or what
    its `hashes` says.
    Raises what reading raises, OSError with its path, and CheckpointError when a span's check finds a difference.
    """
    for file in files:
        _lay_out(folder / file.name, file)
    lock = threading.Lock()

    def locked_advance(num_bytes: int) -> None:
        with lock:
            advance(num_bytes)

    team = _Team(folder, journal, hashed, locked_advance)
    batches = list(_in_turns([list(_batches(file)) for file in files], workers))
    with _one_thread_each(), ThreadPoolExecutor(1) as recorder, ThreadPoolExecutor(workers) as pool:
        advance(sum(batch.num_bytes for batch in batches if team.has(batch)))
        filled = [pool.submit(team.fill, batch) for batch in batches if not team.has(batch)]
        try:
            recorded = [recorder.submit(team.record, *result) for result in _results(filled)]
            fresh = {name: digest for digests in _results(recorded) for name, digest in digests.items()}
        finally:
            team.stopped.set()
    return {**(journal.hashes if journal is not None else {}), **fresh}


class _Team:
    """What the threads share, and what each does."""

    def __init__(self, folder: Path, journal: Journal | None, hashed: bool, advance: Callable[[int], None]) -> None:
        self.stopped = threading.Event()
        self._folder, self._journal, self._hashed, self._advance = folder, journal, hashed, advance

    def has(self, batch: _Batch) -> bool:
        """Whether a batch was complete before."""
        return self._journal is not None and batch.name in self._journal

    def fill(self, batch: _Batch) -> tuple[_Batch, dict[str, str]]:
        """Write a batch and compare it with its source; return it with the sha256 of its spans."""
        digests: dict[str, str] = {}
        with _opened(self._folder / batch.file) as descriptor:
            for span in batch.spans:
                end, digest = span.start, hashlib.sha256()
                for piece in span.slices():
                    if self.stopped.is_set():
                        return batch, {}
                    content = _bytes_of(piece)
                    if self._hashed and span.hashes is None:
                        digest.update(content)
                    end = _write(descriptor, content, end)
                assert end == span.start + span.num_bytes, (batch.file, span)
                if self._hashed:
                    digests |= span.hashes() if span.hashes else {span.name: digest.hexdigest()}
                self._advance(span.num_bytes)
        problems = [problem for span in batch.spans if span.check for problem in span.check()]
        raise_all(CheckpointError, "what was written differs from its source; nothing was published", problems)
        return batch, digests

    def record(self, batch: _Batch, digests: dict[str, str]) -> dict[str, str]:
        """Make a batch durable and write it down; a thread of its own, for the disk is what it waits for."""
        if self._journal is not None and not self.stopped.is_set():
            with _opened(self._folder / batch.file) as descriptor:
                os.fdatasync(descriptor)
            self._journal.record(batch.name, batch.num_bytes, digests)
        return digests


def _lay_out(path: Path, file: File) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path) as descriptor:
        os.ftruncate(descriptor, file.size)
        for start, content in file.fixed:
            _write(descriptor, memoryview(content), start)


def _bytes_of(piece: torch.Tensor) -> memoryview:
    return piece.contiguous().view(-1).view(torch.uint8).numpy().data


def _write(descriptor: int, left: memoryview, start: int) -> int:
    """Write bytes at `start` and return where they end."""
    while left:  # a full disk may take a part before it says no, and one write takes 2 GiB at most
        count = os.pwrite(descriptor, left, start)
        start, left = start + count, left[count:]
    return start


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file for writing; what goes wrong inside and is the system's says where."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def _batches(file: File) -> Iterator[_Batch]:
    spans: list[Span] = []
    for span in file.spans:
        if spans and sum(each.num_bytes for each in spans) + span.num_bytes > BATCH_BYTES:
            yield _Batch(file.name, tuple(spans))
            spans = []
        spans.append(span)
    if spans:
        yield _Batch(file.name, tuple(spans))


def _in_turns(files: list[list[_Batch]], workers: int) -> Iterator[_Batch]:
    """Yield the batches so that as many files are written at a time as there are workers.

    The kernel lets one write into a file at a time.
    """
    for first in range(0, len(files), workers):
        group = files[first : first + workers]
        for number in range(max(map(len, group))):
            yield from (batches[number] for batches in group if number < len(batches))


def _results(futures: Sequence[Future]) -> Iterator:
    for future in as_completed(futures):
        yield future.result()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch's operations inside the thread that asks for them: the workers are the parallelism."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
