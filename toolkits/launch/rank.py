"""How a rank lives and dies: it notices a request to stop, dies with its launcher, and leaves with a code.

Standard library only, so that the signal handler stands before the slow imports begin.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..foundation.errors import run_guarded

ERROR_DIRECTORY = "TEMPER_ERROR_DIR"  # where a rank leaves its last words for the launcher
LAUNCHER_PID = "TEMPER_LAUNCHER_PID"
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

_stop_signals: list[int] = []


def stop_requested() -> bool:
    """Say whether SIGTERM (or Ctrl-C) came: finish the step, save, and raise InterruptedRun."""
    return bool(_stop_signals)


def run_rank(main: Callable[[], object]) -> NoReturn:
    """Run `main` as one rank of a job and end the process with its exit code.

    The interpreter is not taken down: that closes sockets early, and peers would die first and speak first.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note_stop)
    _die_with_launcher()
    _leave(run_guarded(main, say=_say))


def error_file(directory: Path, rank: int) -> Path:
    """Return the file in which `rank` leaves the message it died with."""
    return directory / f"rank-{rank}.txt"


def _note_stop(number: int, _frame: FrameType | None) -> None:
    _stop_signals.append(number)


def _die_with_launcher() -> None:
    """Ask the kernel for SIGKILL when the launcher dies, however it dies."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before we asked
        os._exit(128 + signal.SIGKILL)


def _say(message: str) -> None:
    """Leave the message for the launcher, which prints only the first rank's; without one, print it."""
    rank, directory = os.environ.get("RANK", "0"), os.environ.get(ERROR_DIRECTORY)
    with contextlib.suppress(OSError):
        if directory:
            error_file(Path(directory), int(rank)).write_text(message, encoding="utf-8")
            return
    print(f"rank {rank}: {message}", file=sys.stderr)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not change the exit code
            stream.flush()
    os._exit(code)
