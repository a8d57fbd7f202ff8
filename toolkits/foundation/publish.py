"""Write beside the target, make it durable, then rename: a reader never sees half a thing.

While a writer works, its output lies in the temporary sibling `.tmp-NAME` and `.lock-NAME` keeps others
out. Whatever lies in `.tmp-NAME` when the lock is free was left by a writer that died; it is thrown away,
unless the next writer can go on with it.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .errors import DiskError, InterruptedRun, UsageError
from .lock import locked
from .progress import human_bytes


@contextlib.contextmanager
def publish_directory(
    target: Path, *, overwrite: bool = False, keeps: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `target` when the block ends well.

    An existing target is refused with UsageError unless `overwrite`; then it stays in place until the
    new one is complete. When the block raises, nothing of it is left.

    A writer that can go on with what another left gives `keeps`: it is asked whether a temporary directory
    that is there already is kept as it is, and an interruption leaves its own.
    """
    target = _resolved(target)
    with locked(_sibling(target, ".lock-"), what=str(target)):
        _recover([target])
        _refuse_existing([target], overwrite)
        temporary = temporary_of(target)
        if not (temporary.exists() and keeps and keeps(temporary)):
            temporary = _fresh_temporary(target)
        with _removed_on_error(temporary, unless=(KeyboardInterrupt, InterruptedRun) if keeps else ()):
            yield temporary
            fsync_tree(temporary)
            _replace([(temporary, target)])


@contextlib.contextmanager
def publish_files(
    prefix: Path,
    suffixes: Sequence[str],
    *,
    overwrite: bool = False,
    keeps: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yield a temporary directory whose files `NAME + suffix` become `prefix + suffix` when the block ends well.

    The files are renamed in the order of `suffixes`, so the last one commits the set. Otherwise as
    `publish_directory`.
    """
    prefix = _resolved(prefix)
    targets = [prefix.with_name(prefix.name + suffix) for suffix in suffixes]
    with locked(_sibling(prefix, ".lock-"), what=str(prefix)):
        _recover(targets)
        _refuse_existing(targets, overwrite)
        temporary = temporary_of(prefix)
        if not (temporary.exists() and keeps and keeps(temporary)):
            temporary = _fresh_temporary(prefix)
        with _removed_on_error(temporary, unless=(KeyboardInterrupt, InterruptedRun) if keeps else ()):
            yield temporary
            fsync_tree(temporary)
            _replace([(temporary / target.name, target) for target in targets])
            temporary.rmdir()


def temporary_of(target: Path) -> Path:
    """Return the directory that `publish_directory(target)` yields, for other processes that write into it."""
    return _sibling(_resolved(target), ".tmp-")


def remove_unfinished(folder: Path) -> None:
    """Remove what writers that died left in `folder`; whoever calls it keeps other writers out."""
    for leftover in folder.glob(".tmp-*"):
        print(f"removing {leftover}, left unfinished by a process that died", flush=True)
        _remove(leftover)
    for lock in folder.glob(".lock-*"):
        lock.unlink()


def write_text(target: Path, text: str) -> None:
    """Replace the small file `target` by `text` in one step."""
    write_bytes(target, text.encode())


def write_bytes(target: Path, content: bytes) -> None:
    """Replace the small file `target` by `content` in one step; several processes may do so at once."""
    temporary = _sibling(target, f".tmp-{secrets.token_hex(8)}-")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(target.parent)


def require_space(where: Path, needed: int) -> None:
    """Raise DiskError when the file system of `where` (existing or not) has fewer than `needed` bytes free."""
    existing = next(path for path in (where.absolute(), *where.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskError(
            f"need {human_bytes(needed)}, {human_bytes(free)} free at {existing}; free some or choose another folder"
        )


def fsync_tree(root: Path) -> None:
    """Make every file and folder under `root` durable."""
    for folder, _, names in os.walk(root):
        for name in names:
            _fsync(Path(folder, name))
        _fsync(Path(folder))


def _resolved(target: Path) -> Path:
    # A link keeps pointing where it points: its target is what gets replaced.
    target = Path(target)
    return target.resolve() if target.is_symlink() else target.absolute()


def _sibling(target: Path, mark: str) -> Path:
    return target.with_name(mark + target.name)


def _refuse_existing(targets: Sequence[Path], overwrite: bool) -> None:
    existing = [str(target) for target in targets if target.exists()]
    if existing and not overwrite:
        raise UsageError(
            f"output exists already: {', '.join(existing)}; use --overwrite to replace it or choose another"
        )


def _fresh_temporary(target: Path) -> Path:
    temporary = temporary_of(target)
    if temporary.exists():
        print(f"removing {temporary}, left unfinished by a process that died", flush=True)
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


@contextlib.contextmanager
def _removed_on_error(temporary: Path, *, unless: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    try:
        yield
    except unless:
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Rename each (new, target), keeping what stood there until all new ones are in place.

    The last target commits the set: it goes aside first and comes back last, so its presence tells
    `_recover` which of the two sets is whole.
    """
    for _, target in reversed(pairs):
        if target.exists():
            os.replace(target, _sibling(target, ".old-"))
    for new, target in pairs:
        os.replace(new, target)
    _fsync(pairs[0][1].parent)
    for _, target in pairs:
        _remove(_sibling(target, ".old-"))


def _recover(targets: Sequence[Path]) -> None:
    """Finish or undo a `_replace` that was cut short between its renames."""
    complete = targets[-1].exists()
    for target in targets:
        old = _sibling(target, ".old-")
        if old.exists() and complete:
            _remove(old)
        elif old.exists():
            _remove(target)
            os.replace(old, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
