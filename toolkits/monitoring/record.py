"""What a run says of itself while it runs: run.json, replaced every few seconds.

OUT/checkpoint/NAME/run.json   the run's own      OUT/checkpoint/NAME/lineage.json   what it was made of: see `lineage`
OUT/run.json, lineage.json     copies: those of the run of OUT that started last

A process of the run keeps it true until it ends. When it is killed nobody does, and a reader finds a process
that is gone: see `runs`.
"""

import contextlib
import json
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..foundation.errors import InterruptedRun, TemperError, exit_code_of
from ..foundation.process import this_process
from ..foundation.publish import write_text

RECORD, LINEAGE = "run.json", "lineage.json"
VERSION = 1
STARTING, RUNNING, VALIDATING, SAVING, EXPORTING = "starting", "running", "validating", "saving", "exporting"
FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"
ACTIVE = (STARTING, RUNNING, VALIDATING, SAVING, EXPORTING)
INTERVAL = 2.0  # seconds between two records when nothing changes
SHORTEST = 0.2  # seconds between two records, whatever happens
LONGEST_MESSAGE = 4000  # characters
LINE, LAUNCH = "TEMPER_LINE", "TEMPER_LAUNCH"  # by which a launcher tells its ranks what was typed, and who it is

Measure = Callable[[], Mapping[str, Any]]


class RunRecord:
    """The run.json of one start; a thread writes it, so that a long step, validation or save looks alive.

    `about` is what does not change, `measure` returns what is measured for each record.
    """

    def __init__(self, folder: Path, *, about: Mapping[str, Any], measure: Measure) -> None:
        self.folder, self._measure = folder, measure
        now = _now()
        self._content: dict[str, Any] = {
            "version": VERSION,
            "name": folder.name,
            "state": STARTING,
            "ending": None,
            "started": now,
            "updated": now,
            "progressed": now,
            "process": asdict(this_process()),
            "launch": os.environ.get(LAUNCH),
            "line": os.environ.get(LINE) or shlex.join(sys.orig_argv),
            "working_directory": os.getcwd(),
            **about,
        }
        self._complaints: set[Path] = set()
        self._changed, self._closing = threading.Event(), threading.Event()
        self._put_down()
        self._thread = threading.Thread(target=self._keep, name="run record", daemon=True)
        self._thread.start()

    @property
    def started(self) -> str:
        """When this start began."""
        return self._content["started"]

    @property
    def line(self) -> str:
        """The line that was typed."""
        return self._content["line"]

    def update(self, **figures: Any) -> None:
        """Note figures of the run; they are in the next record."""
        # A new dict: the thread may be writing the old one.
        self._content = {**self._content, "progressed": _now(), **figures}

    def enter(self, state: str) -> None:
        """Note what the run does now, and write it at once."""
        self.update(state=state)
        self._changed.set()

    @contextlib.contextmanager
    def doing(self, state: str) -> Iterator[None]:
        """Be in `state` while the block runs; in the state before when it ends well."""
        before = self._content["state"]
        self.enter(state)
        yield
        self.enter(before)

    def close(self, state: str, ending: Mapping[str, Any] | None = None) -> None:
        """Write the last record."""
        self._closing.set()
        self._changed.set()
        self._thread.join()
        self.update(state=state, ending=ending, eta_seconds=None)
        self._put_down()

    def publish(self, name: str, text: str) -> None:
        """Write `name` beside the record, and beside its copy when that is this run's."""
        self.write(self.folder / name, text)
        if _is_newest(self._content, _output(self.folder)):
            self.write(_output(self.folder) / name, text)

    def write(self, path: Path, text: str) -> None:
        """Write a file of which the run does not depend: what goes wrong is said, once."""
        try:
            write_text(path, text)
        except OSError as error:
            if path not in self._complaints:
                print(f"warning: {path} cannot be written: {error}", file=sys.stderr, flush=True)
            self._complaints.add(path)

    def _keep(self) -> None:
        while not self._closing.is_set():
            self._changed.wait(INTERVAL)
            self._changed.clear()
            self._put_down()
            self._closing.wait(SHORTEST)

    def _put_down(self) -> None:
        try:
            use = dict(self._measure())
        except Exception as error:  # a driver that does not answer is no reason to end a run
            use = {"error": str(error)}
        content = {**self._content, "updated": _now(), "use": use}
        self.publish(RECORD, _text(content))


@contextlib.contextmanager
def recorded(folder: Path, *, about: Mapping[str, Any], measure: Measure) -> Iterator[RunRecord]:
    """Keep a record while the block runs, and note how it ended."""
    record = RunRecord(folder, about=about, measure=measure)
    try:
        yield record
    except BaseException as error:
        record.close(_state_of(exit_code_of(error)), _ending(error))
        raise
    record.close(FINISHED)


def conclude(folder: Path, launch: str, code: int, words: str) -> None:
    """Correct the record of a job that ended with exit `code` and `words`: the rank that wrote it may know less.

    A record of another `launch`, whoever that is, stays as it is.
    """
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        said = content["ending"]
        if code == 0 or content["launch"] != launch or (said and said["exit_code"] == code):
            return
    except (OSError, ValueError, KeyError, TypeError):
        return  # it ended before it had a record
    kinds = {kind.exit_code: kind.__name__ for kind in TemperError.__subclasses__()}
    ending = {"kind": kinds.get(code), "exit_code": code, "message": words[-LONGEST_MESSAGE:]}
    content |= {"state": _state_of(code), "ending": ending, "eta_seconds": None, "updated": _now()}
    with contextlib.suppress(OSError):  # the job has ended, and its words are on the screen
        for place in (folder, *([_output(folder)] if _is_newest(content, _output(folder)) else [])):
            write_text(place / RECORD, _text(content))


def _output(folder: Path) -> Path:
    return folder.parent.parent


def _is_newest(record: Mapping[str, Any], output: Path) -> bool:
    """Whether no run that started after that of `record` has its copy in `output`."""
    try:
        there = json.loads((output / RECORD).read_text(encoding="utf-8"))
        return there["name"] == record["name"] or there["started"] <= record["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _text(content: Mapping[str, Any]) -> str:
    """Return JSON with a line for each entry: a history is one line."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()) + "\n}\n"


def _state_of(code: int) -> str:
    return INTERRUPTED if code == InterruptedRun.exit_code else FAILED


def _ending(error: BaseException) -> dict[str, Any]:
    message = str(error) if isinstance(error, TemperError) else "".join(traceback.format_exception_only(error)).strip()
    return {
        "kind": type(error).__name__,
        "exit_code": exit_code_of(error),
        "message": message[-LONGEST_MESSAGE:],
    }


def _now() -> str:
    """Return the time in UTC; the texts sort as the times do."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
