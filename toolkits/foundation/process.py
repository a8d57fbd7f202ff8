"""Which process is meant, whose number alone is given to another one later; and what this one may use."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
DEAD = "ZX"  # states in /proc/PID/stat: ended, waiting for its parent to notice


@dataclass(frozen=True)
class Process:
    """A process of some machine: `started` is in clock ticks since that machine booted, None when it is unknown."""

    host: str
    machine: str
    pid: int
    started: int | None

    @property
    def is_here(self) -> bool:
        """Whether this process can see that one, if it lives."""
        return self.machine == _machine()

    @property
    def lives(self) -> bool:
        """Whether it still runs; only to be asked when it is here."""
        found = _start_of(self.pid)
        return found is not None and found == self.started


def usable_cores() -> int:
    """Return the number of cores that this process may run on; where the system does not tell, that of all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def this_process() -> Process:
    """Return the process that asks."""
    return Process(socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()))


def _machine() -> str:
    """Return what tells these process numbers from others: the machine's boot, and the container's own counting."""
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold anything; see proc(5)
    return None if state in DEAD else int(fields[18])
