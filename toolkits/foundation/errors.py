"""What can go wrong, and the exit code that tells a shell which kind it was.

0 ok, 2 usage or configuration, 3 data, 4 checkpoint, 5 environment, 6 disk or I/O, 7 numerics,
75 interrupted and resumable, 70 our own bug.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

TRACEBACK_VARIABLE = "TEMPER_TRACEBACK"
BUG_EXIT_CODE = 70


class TemperError(ValueError):
    """Something a user can cause and mend; the message says what, where and what to do next."""

    exit_code = 2


class UsageError(TemperError):
    """A wrong argument, setting or combination of them."""


class DataError(TemperError):
    """A dataset or an input record that cannot be used."""

    exit_code = 3


class CheckpointError(TemperError):
    """A checkpoint that is incomplete, damaged, unsafe or not what it says it is."""

    exit_code = 4


class MachineError(TemperError):
    """A missing package, device or driver, or a peer that cannot be reached."""

    exit_code = 5


class DiskError(TemperError):
    """Too little space, or a device that refuses to write."""

    exit_code = 6


class NumericsError(TemperError):
    """A loss or a gradient that is not a finite number."""

    exit_code = 7


class InterruptedRun(TemperError):
    """Stopped from outside after everything worth keeping was saved."""

    exit_code = 75


def raise_all(kind: type[TemperError], heading: str, problems: Sequence[str]) -> None:
    """Raise one `kind` that lists every problem under `heading`; return when there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise kind(f"{heading}: {problems[0]}")
    raise kind("\n".join([f"{heading}: {len(problems)} problems", *(f"  - {problem}" for problem in problems)]))


def exit_code_of(error: BaseException) -> int:
    """Return the exit code that stands for `error`."""
    if isinstance(error, TemperError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRun.exit_code
    if isinstance(error, OSError):
        return DiskError.exit_code
    return BUG_EXIT_CODE


def describe(error: BaseException) -> str:
    """Return what to print for `error`: its message, and a traceback only for our own bugs or on request."""
    wants_traceback = os.environ.get(TRACEBACK_VARIABLE) == "1"
    code = exit_code_of(error)
    if code == BUG_EXIT_CODE:
        text = "".join(traceback.format_exception(error)).rstrip()
        return f"{text}\nThis is a bug in Temper, not in your input. Please report it with the lines above."
    if isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    elif isinstance(error, OSError):
        message = f"{error.strerror or error} (errno {error.errno}): {error.filename or 'no path given'}"
    else:
        message = str(error)
    if wants_traceback:
        return "".join(traceback.format_exception(error)).rstrip()
    return f"error: {message}"


def run_guarded(main: Callable[[], object], *, say: Callable[[str], object] | None = None) -> int:
    """Run `main`, `say` what goes wrong (to stderr unless told otherwise), and return the exit code."""
    say = say or (lambda message: print(message, file=sys.stderr, flush=True))
    try:
        main()
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            say(leaving.code)
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:  # every kind has an exit code of its own
        say(describe(error))
        return exit_code_of(error)
    return 0
