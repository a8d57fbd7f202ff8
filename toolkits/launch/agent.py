"""Torch elastic's agent with three changes: it notes who died first, grants one grace to save, and heeds its peers."""

import contextlib
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

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from ..foundation.errors import InterruptedRun
from .peers import Peers

FAILURE_GRACE = 5.0  # seconds for the peers of a dead rank: they cannot save without it
SAME_REQUEST = 1.0  # seconds in which several signals count as one: a group and its leader often get one each

Handler = Callable[[int, FrameType | None], object]
OnFailure = Callable[["Death", bool], object]


@dataclass(frozen=True)
class Death:
    """How a rank (counted over all nodes) ended: its exit code, 128 + n when signal n killed it."""

    rank: int
    code: int
    by_signal: bool = False


@dataclass(frozen=True)
class Ending:
    """How the ranks ended, in the order in which they did, and whether a signal asked them to."""

    deaths: tuple[Death, ...]
    signalled: bool


class Met(RendezvousHandler):
    """Where torch elastic meets other nodes: the launchers have met already, and every node knows its number."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        nodes, store = self._peers.nodes, self._peers.tcp_store
        return RendezvousInfo(store, nodes.rank, nodes.count, RendezvousStoreInfo(nodes.address, store.port))

    def get_backend(self) -> str:
        return "static"

    def get_run_id(self) -> str:
        return "temper"

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True


class JobOver(Exception):
    """The ranks here have nothing left to do, by the word of another node."""


class Agent(LocalElasticAgent):
    """Runs the ranks of this machine once, without restarts.

    `on_failure` hears of every rank that failed by itself, and whether a signal had asked it to stop.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        peers: Peers,
        *,
        on_failure: OnFailure,
        grace: float,
        stop_signals: Sequence[signal.Signals],
    ) -> None:
        super().__init__(spec, logs_specs=DefaultLogsSpecs(log_dir=os.devnull))
        self.deaths: list[Death] = []
        self.signalled = False
        self._peers, self._over, self._on_failure = peers, False, on_failure
        self._grace, self._stop_signals = grace, stop_signals
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._watchers: list[threading.Thread] = []

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        result = super()._start_workers(worker_group)
        assert isinstance(self._pcontext, SubprocessContext)
        handlers = self._pcontext.subprocess_handlers
        self._processes = {worker_group.workers[here].global_rank: each.proc for here, each in handlers.items()}
        self._watchers = [threading.Thread(target=self._watch, args=(rank,), daemon=True) for rank in self._processes]
        for watcher in self._watchers:
            watcher.start()
        return result

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._peers.must_end():
            self._over = True
            raise JobOver
        return super()._monitor_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Nothing: `Peers.conclude` waits for the other nodes, as long as they live."""

    def _watch(self, rank: int) -> None:
        # torch's own "first failure" has a resolution of a second and may name the wrong rank.
        code = self._processes[rank].wait()
        death = Death(rank, 128 - code, by_signal=True) if code < 0 else Death(rank, code)
        self.deaths.append(death)
        if code not in (0, InterruptedRun.exit_code):
            if not self._over:
                self._on_failure(death, self.signalled)
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
            self.signalled = True
            wait = f"the ranks have {self._grace:.0f} s to save and stop; a second signal ends them at once"
            print(f"{death_sig.name}: {wait}", file=sys.stderr, flush=True)
        if self._pcontext is not None:
            grace = FAILURE_GRACE if self._over else self._grace
            self._pcontext.close(signal.SIGTERM, grace)  # type: ignore[arg-type]
        for watcher in self._watchers:
            watcher.join(5)

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()


def run_agent(
    command: Sequence[str],
    peers: Peers,
    *,
    ranks: int,
    on_failure: OnFailure,
    grace: float,
    stop_signals: Sequence[signal.Signals],
) -> Ending:
    """Run this Python with `command` once for each of this node's `ranks` and wait for all of them."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(each.name for each in stop_signals)
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"  # a rank's number: that of its node, times ranks, plus its own
    spec = WorkerSpec(
        role="rank",
        local_world_size=ranks,
        entrypoint=sys.executable,
        args=tuple(word.replace("$", "$$") for word in command),  # torch substitutes ${local_rank} in them
        rdzv_handler=Met(peers),
        max_restarts=0,
        monitor_interval=0.1,
    )
    agent = Agent(spec, peers, on_failure=on_failure, grace=grace, stop_signals=stop_signals)
    with contextlib.suppress(SignalException, JobOver):
        agent.run()
    return Ending(tuple(agent.deaths), agent.signalled)


def handle(signals: Sequence[signal.Signals], handler: Handler) -> None:
    """Let `handler` answer each of `signals`."""
    for number in signals:
        signal.signal(number, handler)
