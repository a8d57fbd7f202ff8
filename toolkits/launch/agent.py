"""Torch elastic's agent with two changes: it notes who died first, and grants one grace to save."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from ..foundation.errors import InterruptedRun

THIS_MACHINE = "127.0.0.1"
FAILURE_GRACE = 5.0  # seconds for the peers of a dead rank: they cannot save without it
SAME_REQUEST = 1.0  # seconds in which several signals count as one: a group and its leader often get one each

Handler = Callable[[int, FrameType | None], object]


@dataclass(frozen=True)
class Death:
    """How a rank ended: its exit code, 128 + n when signal n killed it."""

    rank: int
    code: int
    by_signal: bool = False


@dataclass(frozen=True)
class Ending:
    """How the ranks ended, in the order in which they did, and whether a signal asked them to."""

    deaths: tuple[Death, ...]
    signalled: bool


class Agent(LocalElasticAgent):
    """Runs the ranks of this machine once, without restarts."""

    def __init__(self, spec: WorkerSpec, *, grace: float, stop_signals: Sequence[signal.Signals]) -> None:
        super().__init__(spec, logs_specs=DefaultLogsSpecs(log_dir=os.devnull))
        self.deaths: list[Death] = []
        self._grace, self._stop_signals = grace, stop_signals
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._watchers: list[threading.Thread] = []

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        result = super()._start_workers(worker_group)
        assert isinstance(self._pcontext, SubprocessContext)
        self._processes = {rank: handler.proc for rank, handler in self._pcontext.subprocess_handlers.items()}
        self._watchers = [threading.Thread(target=self._watch, args=(rank,), daemon=True) for rank in self._processes]
        for watcher in self._watchers:
            watcher.start()
        return result

    def _watch(self, rank: int) -> None:
        # torch's own "first failure" has a resolution of a second and may name the wrong rank.
        code = self._processes[rank].wait()
        self.deaths.append(Death(rank, 128 - code, by_signal=True) if code < 0 else Death(rank, code))
        if code not in (0, InterruptedRun.exit_code):
            # torch gives the peers half a minute, and a peer may sit in a call that notices no signal.
            kill = threading.Timer(FAILURE_GRACE, self._kill)
            kill.daemon = True
            kill.start()

    def _shutdown(self, death_sig: signal.Signals | None = None, *_args: Any, **_kwargs: Any) -> None:
        """End the ranks with SIGTERM, whatever came to us; a second signal does not wait for them."""
        asked = time.monotonic()

        def quit_now(_number: int, _frame: FrameType | None) -> None:
            if time.monotonic() - asked > SAME_REQUEST:
                self._kill()

        handle(self._stop_signals, quit_now)
        if death_sig:
            wait = f"the ranks have {self._grace:.0f} s to save and stop; a second signal ends them at once"
            print(f"{death_sig.name}: {wait}", file=sys.stderr, flush=True)
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGTERM, self._grace)  # type: ignore[arg-type]
        for watcher in self._watchers:
            watcher.join(5)

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()


def run_agent(command: Sequence[str], *, ranks: int, grace: float, stop_signals: Sequence[signal.Signals]) -> Ending:
    """Run this Python with `command` once for each of `ranks` and wait for all of them."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(each.name for each in stop_signals)
    rendezvous = get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=f"{THIS_MACHINE}:0",
            run_id=f"temper-{os.getpid()}",
            min_nodes=1,
            max_nodes=1,
            local_addr=THIS_MACHINE,
        )
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=ranks,
        entrypoint=sys.executable,
        args=tuple(word.replace("$", "$$") for word in command),  # torch substitutes ${local_rank} in them
        rdzv_handler=rendezvous,
        max_restarts=0,
        monitor_interval=0.1,
        local_addr=THIS_MACHINE,
    )
    agent = Agent(spec, grace=grace, stop_signals=stop_signals)
    signalled = False
    try:
        agent.run()
    except SignalException:
        signalled = True
    finally:
        rendezvous.shutdown()
    return Ending(tuple(agent.deaths), signalled)


def handle(signals: Sequence[signal.Signals], handler: Handler) -> None:
    """Let `handler` answer each of `signals`."""
    for number in signals:
        signal.signal(number, handler)
