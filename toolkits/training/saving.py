"""Steps go to disk in three parts, so that the middle one can run while training goes on.

begin    all ranks agree on who writes what; with --background-save, what is saved is copied to CPU memory
write    each rank writes and hashes its files, in a thread
finish   when all ranks have written, rank 0 completes the folder and gives it its name
"""

import contextlib
import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from conversion.mcore_directory import TRACKER_FILE, step_folders, step_name

from ..foundation.errors import DiskError
from ..foundation.publish import publish_directory, temporary_of, write_text
from .checkpointing import MANIFEST, Position, RunState, check_step, describe, manifest, sharded_run
from .parallel.world import gather, rank

MOST_FAILURES = 3  # background saves in a row that may fail
REMINDER = 10.0  # seconds between two lines about a save that is waited for


@dataclass
class Saver:
    """Writes the steps of a run into `folder`, one at a time, and lets go of those older than `keep_last`.

    All ranks call `save` and `finish` together. `say` tells the user, `saved` hears of each step that is whole. A
    save whose files cannot be written in the background is said, and the third in a row ends the run; whatever
    else fails ends it at once.
    """

    folder: Path
    keep_last: int
    say: Callable[[str], None]
    saved: Callable[[Path], None]
    _pending: "_Pending | None" = None
    _failures: int = 0

    def save(self, state: RunState, position: Position, *, background: bool) -> None:
        """Save a step; in the background, return when its copy is made. An earlier one is finished first."""
        self.finish()
        target = self.folder / step_name(position.step)
        with _disk_errors_named(target):
            self._pending = _begin(target, state, position, background=background)
        if background:
            self.say(f"saving {target} in the background")
        else:
            self.finish()

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its share of a step that is not finished yet."""
        return self._pending is not None and not self._pending.writing.is_alive()

    def finish(self, *, required: bool = False) -> None:
        """Wait until the step in the background, if there is one, stands under its name; `required`: or raise."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._wait(pending)
        errors = [error for error in gather(pending.error) if error is not None]
        if errors:
            self._failed(pending, errors[0], fatal=required or not pending.background)
            return
        with _disk_errors_named(pending.target), pending.published:
            _complete(pending)
        if rank() == 0:
            check_step(pending.target, contents=False)
            write_text(self.folder / TRACKER_FILE, str(pending.position.step))
            for old in step_folders(self.folder)[: -self.keep_last]:
                shutil.rmtree(old)
        torch.distributed.barrier()
        self._failures = 0
        self.saved(pending.target)

    def _wait(self, pending: "_Pending") -> None:
        started = time.monotonic()
        while pending.writing.is_alive():
            pending.writing.join(REMINDER)
            if pending.writing.is_alive():
                self.say(f"waiting for {pending.target} to be on disk, {time.monotonic() - started:.0f} s so far")

    def _failed(self, pending: "_Pending", error: str, *, fatal: bool) -> None:
        self._failures += 1
        said = f"writing {pending.target} failed: {error}; earlier steps are whole"
        with contextlib.suppress(DiskError), pending.published:
            raise DiskError(said)  # takes the temporary folder away
        if fatal:
            raise DiskError(said)
        if self._failures == MOST_FAILURES:
            raise DiskError(f"{said}. It was failure {MOST_FAILURES} in a row: the run ends rather than go on unsaved")
        self.say(f"{said}. Training goes on (failure {self._failures} of {MOST_FAILURES})")


@dataclass
class _Pending:
    """A step between begin and finish on this rank."""

    target: Path
    position: Position
    state: RunState
    background: bool
    request: AsyncRequest
    published: contextlib.ExitStack  # on rank 0 the folder under its temporary name
    writing: threading.Thread = field(init=False)
    files: dict[str, list[Any]] = field(default_factory=dict)  # what this rank wrote, with size and hash
    error: str | None = None


def _begin(target: Path, state: RunState, position: Position, *, background: bool) -> _Pending:
    with contextlib.ExitStack() as published:
        if rank() == 0:
            published.enter_context(publish_directory(target))
        torch.distributed.barrier()
        request = dist_checkpointing.save(sharded_run(state), str(temporary_of(target)), async_sharded_save=True)
        assert request is not None
        pending = _Pending(target, position, state, background, request, published.pop_all())
    pending.writing = threading.Thread(target=_write, args=(pending, _staged(request, copy=background)))
    pending.writing.start()
    return pending


def _staged(request: AsyncRequest, *, copy: bool) -> list[Any]:
    """Return what this rank writes, file by file, in CPU memory; with `copy`, training may change the originals."""
    if request.preload_fn is None:
        return []
    _, live, _ = request.async_fn_args
    staged = request.preload_fn()
    if copy:
        for (*_, (_, originals)), (*_, (_, tensors)) in zip(live, staged, strict=True):
            for number, ((_, original), (item, tensor)) in enumerate(zip(originals, tensors, strict=True)):
                if tensor.data_ptr() == original.data_ptr():  # it was in CPU memory all along
                    tensors[number] = (item, tensor.clone())
    return staged


def _write(pending: _Pending, files: list[Any]) -> None:
    try:
        _write_files(pending, files)
    except BaseException as error:  # nobody else hears of what goes wrong in a thread
        pending.error = f"{type(error).__name__}: {error}"


def _write_files(pending: _Pending, files: list[Any]) -> None:
    """Write and hash this rank's files; megatron-core's own way forks a process for each of them."""
    if not files:
        return
    transforms, *_ = pending.request.async_fn.args
    results, written = pending.request.async_fn_args[2], {}
    for number, bucket in enumerate(files):
        said, count = queue.Queue(), queue.Queue()
        count.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, said, count, True)
        _, written[number] = said.get()
        if isinstance(written[number], Exception):
            pending.error = str(written[number])
            return
        path = Path(bucket[0])
        pending.files[path.name] = describe(path)
    results.put(written)


def _complete(pending: _Pending) -> None:
    """Write the metadata and the manifest."""
    for finalize in pending.request.finalize_fns:
        finalize()
    files = {name: described for share in gather(pending.files) for name, described in share.items()}
    if rank() == 0:
        temporary = temporary_of(pending.target)
        if pending.state.complete is not None:
            pending.state.complete(temporary)
        files |= {path.name: describe(path) for path in sorted(temporary.iterdir()) if path.name not in files}
        said = manifest(pending.state, pending.position, files)
        (temporary / MANIFEST).write_text(json.dumps(said, indent=1))


@contextlib.contextmanager
def _disk_errors_named(target: Path) -> Iterator[None]:
    """Say which step an error of the disk hit: the writer's own errors name no path."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointingException) as error:
        code = getattr(error, "errno", None)
        if code is None and "No space left" not in str(error):
            raise
        raise DiskError(f"writing {target} failed: {error}; earlier steps are whole") from error
