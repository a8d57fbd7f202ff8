"""What a pipeline has done: OUTPUT/pipeline.json, and whether that still stands.

stages   by name: what it did (`do`), `state`, `fingerprint` (its settings, and the digests of what it read),
         `lines` that ran, `digest` of what it made, `exit_code`, `started` and `ended`
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..foundation.errors import TemperError, UsageError
from ..foundation.publish import write_text
from .digests import differences, fingerprint, result_digest
from .stage import Pipeline, Stage, shown, typed

STATE = "pipeline.json"
VERSION = 1
DONE, RUNNING, INTERRUPTED, FAILED = "done", "running", "interrupted", "failed"
NEW, CHANGED, GONE, WAITING = "not run yet", "changed", "gone", "waiting"


@dataclass(frozen=True)
class Verdict:
    """How a stage stands: `state`, what differs when it is changed, and what is to be said of it."""

    state: str
    problems: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.state == DONE


class State:
    """The state of a pipeline, on disk whenever it changes."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.path = pipeline, pipeline.output / STATE
        self._stages: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["version"] > VERSION:
                raise UsageError(f"{self.path} was written by a newer Temper (format {content['version']})")
            return {name: dict(entry) for name, entry in content["stages"].items()}
        except FileNotFoundError:
            if self.pipeline.output.is_dir() and any(path.name[0] != "." for path in self.pipeline.output.iterdir()):
                raise UsageError(
                    f"{shown(self.pipeline.output)} is there already, and has no {STATE}: it is not of a pipeline; "
                    "choose another output"
                ) from None
            return {}
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(self._damaged(error)) from None
        except ValueError as error:
            if isinstance(error, TemperError):
                raise
            raise UsageError(self._damaged(error)) from None

    def _damaged(self, error: Exception) -> str:
        return f"{self.path} cannot be read ({error!r}); move {shown(self.pipeline.output)} away to begin anew"

    def entry(self, stage: Stage) -> dict[str, Any]:
        """Return what is known of a stage, nothing when it has not run."""
        return self._stages.get(stage.name, {})

    def judge(self, stage: Stage) -> Verdict:
        """Say how a stage stands now; what it reads is there unless its makers have to run first."""
        entry = self.entry(stage)
        if entry.get("state") != DONE:
            return Verdict(entry.get("state", NEW))
        try:
            now = result_digest(stage)
        except (OSError, TemperError, KeyError, ValueError):
            return Verdict(GONE, (f"{shown(stage.result)} is gone, or a part of it",))
        if now != entry["digest"]:
            return Verdict(CHANGED, (f"{shown(stage.result)} is not what the stage made",))
        try:
            found = differences(entry["fingerprint"], fingerprint(stage))
        except (OSError, TemperError, KeyError, ValueError):  # what it reads will be made anew
            return Verdict(WAITING)
        return Verdict(CHANGED, tuple(found)) if found else Verdict(DONE)

    def started(self, stage: Stage) -> None:
        """Note that a stage runs, and what it was given."""
        lines = [typed(line) for line in stage.lines()]
        about = {"do": stage.kind.word, "fingerprint": fingerprint(stage), "lines": lines}
        self._put(stage, {"state": RUNNING, **about, "started": _now()})

    def ended(self, stage: Stage, code: int, *, interrupted: bool) -> None:
        """Note how a stage ended; when it ended well, the digest of what it made."""
        entry = {**self.entry(stage), "exit_code": code, "ended": _now()}
        if code == 0:
            entry |= {"state": DONE, "digest": result_digest(stage)}
        else:
            entry["state"] = INTERRUPTED if interrupted else FAILED
        self._put(stage, entry)

    def forget(self, stage: Stage) -> None:
        """Forget a stage: it has not run."""
        self._stages.pop(stage.name, None)
        self._write()

    @property
    def left_over(self) -> list[str]:
        """Stages that ran once and are no longer in the file."""
        known = {stage.name for stage in self.pipeline.stages}
        return [name for name in self._stages if name not in known]

    def _put(self, stage: Stage, entry: dict[str, Any]) -> None:
        self._stages[stage.name] = entry
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"version": VERSION, "file": str(self.pipeline.file.absolute()), "stages": self._stages}
        write_text(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock file `path`."""
    import fcntl

    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
