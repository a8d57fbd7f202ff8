"""Progress of long work: a bar with the time left on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TextIO

TERMINAL_INTERVAL = 0.1  # seconds between two drawings of the bar
PLAIN_INTERVAL = 10.0  # seconds between two lines when nobody watches live
BAR_WIDTH = 28


class Progress:
    """Count work done against a total and say how long the rest takes.

    Use as a context manager; `advance(n)` adds `n` units of `unit`. A total of None means that nobody
    knows it: the count and the rate are shown then.
    """

    def __init__(self, label: str, total: int | None, *, unit: str = "", stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._beside = ""
        self._start = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._say(final=True)
        elif self._terminal:
            self._stream.write("\n")

    def advance(self, amount: int = 1, *, beside: str = "") -> None:
        """Add `amount` units of finished work; `beside` is said behind the count from now on."""
        self.done += amount
        self._beside = beside or self._beside
        now = time.monotonic()
        if now - self._last >= (TERMINAL_INTERVAL if self._terminal else PLAIN_INTERVAL):
            self._last = now
            self._say(final=False)

    def _say(self, *, final: bool) -> None:
        elapsed = time.monotonic() - self._start
        rate = self.done / elapsed if elapsed > 0 else 0.0
        count = f"{_scaled(self.done, self.unit)}"
        if self.total is not None:
            count += f"/{_scaled(self.total, self.unit)}"
        if final:
            timing = f"in {clock(elapsed)}"
        elif self.total and rate:
            timing = f"{clock((self.total - self.done) / rate)} left"
        else:
            timing = f"{_scaled(rate, self.unit)}/s"
        if self._beside:
            timing += f", {self._beside}"
        if not self._terminal:
            self._stream.write(f"{self.label}: {count}, {timing}\n")
        else:
            self._stream.write(f"\r\x1b[K{self.label} {self._bar()}{count}, {timing}" + ("\n" if final else ""))
        self._stream.flush()

    def _bar(self) -> str:
        if not self.total:
            return ""
        filled = min(BAR_WIDTH, BAR_WIDTH * self.done // self.total)
        return "━" * filled + "╌" * (BAR_WIDTH - filled) + " "


def clock(seconds: float) -> str:
    """Return a duration as people read it: `0.4 s`, `12 s`, `3:07`, `1:02:09`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def human_bytes(count: float) -> str:
    """Return a size in decimal units, as disks are sold: `15.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _scaled(count: float, unit: str) -> str:
    if unit == "B":
        return human_bytes(count)
    return f"{count:,.0f} {unit}".rstrip()
