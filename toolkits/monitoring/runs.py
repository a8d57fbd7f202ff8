"""The runs under a folder, as their records and the process table tell."""

import difflib
import json
import math
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..foundation.errors import CheckpointError, UsageError
from ..foundation.process import Process
from .record import ACTIVE, LINEAGE, RECORD, VERSION

DIED, SILENT, UNREADABLE = "died", "silent", "unreadable"
SILENCE = 60.0  # seconds without a new record, on a machine whose processes cannot be seen
DEPTH = 3  # folders from where the search begins to an OUT, at most
CHECKPOINT = "checkpoint"
NONE_FOUND = f"there is no run (OUT/{CHECKPOINT}/NAME/{RECORD} is looked for, with OUT up to {DEPTH} folders below)"
# What reading a file raises that is JSON, and not what we wrote.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """What run.json says, checked and judged; `content` is all of it."""

    folder: Path
    state: str
    steps: int
    step: int
    loss: float | None
    lowest_loss: float | None
    rate: float | None  # tokens a second
    eta: float | None  # seconds
    started: datetime
    updated: datetime
    progressed: datetime
    losses: Points
    validation: Points
    process: Process
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its NAME."""
        return self.folder.name

    @property
    def is_active(self) -> bool:
        """Whether it is at work, as far as one can see from here."""
        return self.state in ACTIVE

    @property
    def took(self) -> float:
        """Seconds from its last start to its last record."""
        return (self.updated - self.started).total_seconds()


@dataclass(frozen=True)
class Unreadable:
    """A run.json that says nothing, and why."""

    folder: Path
    problem: str
    state = UNREADABLE

    @property
    def name(self) -> str:
        """The NAME of its folder."""
        return self.folder.name


def find_runs(root: Path) -> list[Run | Unreadable]:
    """Return the runs under `root`, the one that started last first, then what cannot be read.

    `root` may be an OUT, a folder of them down to DEPTH levels, or a run's own folder.
    """
    found = [read_run(folder) for folder in sorted(_run_folders(root))]
    readable = [run for run in found if isinstance(run, Run)]
    return [
        *sorted(readable, key=lambda run: run.started, reverse=True),
        *(run for run in found if isinstance(run, Unreadable)),
    ]


def find_run(name: str, root: Path) -> Run:
    """Return the run under `root` whose NAME is `name`, or has `name` in it as no other has.

    Raises UsageError with the nearest names, CheckpointError when its record cannot be read.
    """
    runs = find_runs(root)
    fitting = [run for run in runs if run.name == name] or [run for run in runs if name in run.name]
    if len(fitting) > 1:
        places = "\n".join(f"  {run.folder}" for run in fitting)
        raise UsageError(f"{name} fits {len(fitting)} runs under {root}; add the folder of one of them:\n{places}")
    if not fitting:
        names = [run.name for run in runs]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
        hint = f"there is {', '.join(near)}" if near else NONE_FOUND
        raise UsageError(f"no run {name} under {root}; {hint}")
    run = fitting[0]
    if isinstance(run, Unreadable):
        raise CheckpointError(f"{run.folder / RECORD} {run.problem}; the run's figures are in metrics.jsonl beside it")
    return run


def read_run(folder: Path) -> Run | Unreadable:
    """Return what `folder`/run.json says."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if content["version"] > VERSION:
            return Unreadable(folder, f"was written by a newer Temper (format {content['version']})")
        return _run(folder, content)
    except OSError as error:
        return Unreadable(folder, f"cannot be read: {error.strerror}")
    except DAMAGE as error:
        return Unreadable(folder, f"is damaged: {error!r}")


def read_lineage(folder: Path) -> dict[str, Any]:
    """Return a run's lineage.json; raise CheckpointError when there is none to read."""
    try:
        found = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder / LINEAGE} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / LINEAGE} is damaged: {error}") from None
    return found


def _run(folder: Path, content: Mapping[str, Any]) -> Run:
    loss, process = content.get("loss", {}), Process(**content["process"])
    times = [datetime.fromisoformat(content[name]).astimezone(UTC) for name in ("started", "updated", "progressed")]
    return Run(
        folder=folder,
        state=_state(str(content["state"]), process, updated=times[1]),
        steps=int(content["steps"]),
        step=int(content.get("step", 0)),
        loss=_number(loss.get("newest")),
        lowest_loss=_number(loss.get("lowest")),
        rate=_number(content.get("tokens_per_second", {}).get("newest")),
        eta=_number(content.get("eta_seconds")),
        started=times[0],
        updated=times[1],
        progressed=times[2],
        losses=_points(loss),
        validation=_points(content.get("validation", {})),
        process=process,
        content=content,
    )


def _state(said: str, process: Process, *, updated: datetime) -> str:
    """Return the state that a record's `said` stands for, now."""
    if said not in ACTIVE:
        return said
    if process.is_here:
        return said if process.lives else DIED
    if (datetime.now(UTC) - updated).total_seconds() <= SILENCE:
        return said
    # Of the same name, and no longer the same machine: it was started again.
    return DIED if process.host == socket.gethostname() else SILENT


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _points(summary: Mapping[str, Any]) -> Points:
    points = [(int(step), float(value)) for step, value in summary.get("history", [])]
    return [(step, value) for step, value in points if math.isfinite(value)]


def _run_folders(root: Path) -> set[Path]:
    own = [root] if root.parent.name == CHECKPOINT and (root / RECORD).is_file() else []
    inside = root.glob(f"*/{RECORD}") if root.name == CHECKPOINT else []
    return {*own, *(path.parent for path in inside), *_below(root, DEPTH)}


def _below(root: Path, depth: int) -> Iterator[Path]:
    yield from (path.parent for path in root.glob(f"{CHECKPOINT}/*/{RECORD}"))
    if depth:
        for folder in _folders(root):
            yield from _below(folder, depth - 1)


def _folders(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.name != CHECKPOINT and path.name[0] != "." and path.is_dir()]
    except OSError:  # a folder that is not ours to look into
        return []
