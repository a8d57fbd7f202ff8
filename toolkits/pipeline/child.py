"""One line of a pipeline as a process of its own: `temper ...`, which hears of a request to stop and may save."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

REPOSITORY = Path(__file__).resolve().parents[2]
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class Lines:
    """Runs lines one behind the other; `signalled` says whether somebody asked to stop."""

    def __init__(self) -> None:
        self.signalled = False
        self._running: subprocess.Popen[bytes] | None = None
        self._request = signal.SIGTERM

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """While the block runs a signal to stop is passed on to the line that runs; those ignored (nohup) stay so."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
        for number in heeded:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number in heeded:
                signal.signal(number, before[number])

    def run(self, words: Sequence[str]) -> int:
        """Run `temper WORDS` and return its exit code, 128 + n when signal n killed it."""
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "toolkits.cli", *words]
        # Training saves on SIGTERM; the others put away what is half done on Ctrl-C.
        can_interrupt = words[0] != "train" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
        self._request = signal.SIGINT if can_interrupt else signal.SIGTERM
        # A group of its own: Ctrl-C on a terminal reaches it once, from here.
        with subprocess.Popen(command, env=environment, process_group=0, preexec_fn=_die_with_parent) as process:
            self._running = process
            if self.signalled:  # while it was started
                process.send_signal(self._request)
            code = process.wait()
        self._running = None
        return code if code >= 0 else 128 - code

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signalled = True
        if self._running is not None and self._running.poll() is None:
            self._running.send_signal(self._request)


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the pipeline is killed: training then saves, and nothing is left behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
