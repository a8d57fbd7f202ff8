"""The launchers of a job's nodes watch over each other through a store that node 0 hosts.

Each leaves a beat there every second. Node 0 reads them all and gives the verdict: how the job ended, on every
node. The others need not see each other, only node 0's answers. No two machines' clocks are compared.
"""

import itertools
import json
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed import PrefixStore, Store, TCPStore

from ..foundation.errors import InterruptedRun
from .nodes import Nodes

BEAT = 1.0  # seconds between two signs of life
POLL = 0.1  # seconds between two looks at something that is about to happen
FAREWELL = 5.0  # seconds that node 0 keeps the store up for those who have not read the verdict
FAILED, VERDICT, LEFT = "failed", "verdict", "left"


@dataclass(frozen=True)
class Verdict:
    """How ranks ended: an exit code, and the words to print."""

    code: int
    words: str = ""

    def written(self) -> str:
        """Return what the store keeps of it."""
        return json.dumps([self.code, self.words])

    @classmethod
    def read(cls, text: bytes) -> "Verdict | None":
        """Return what `written` wrote; None when nobody wrote anything yet."""
        return cls(*json.loads(text)) if text else None


class Judge:
    """Node 0's view of all nodes: who gives signs of life, and whose ranks have ended."""

    def __init__(self, hosts: Sequence[str], *, silence: float, now: float) -> None:
        self._hosts, self._silence = hosts, silence
        self._beats, self._heard = [b""] * len(hosts), [now] * len(hosts)
        self.silent: list[int] = []

    def verdict(self, beats: Sequence[bytes], failed: Verdict | None, now: float) -> Verdict | None:
        """Return how the job ended, or None while it has not; `failed` is the first failure of a rank anywhere.

        A silent node outweighs a failure: ranks fail because their peers are gone.
        """
        for node, beat in enumerate(beats):
            if beat != self._beats[node]:
                self._beats[node], self._heard[node] = beat, now
        codes = [json.loads(beat)[1] for beat in beats]
        self.silent = [n for n, code in enumerate(codes) if code is None and now - self._heard[n] > self._silence]
        if self.silent:
            return silence_of([f"node {node} ({self._hosts[node]})" for node in self.silent])
        if None in codes:
            return None
        interrupted = InterruptedRun.exit_code in codes
        return failed or Verdict(InterruptedRun.exit_code if interrupted else max(codes))


class Peers:
    """The other nodes' launchers, as one launcher deals with them; on one node there is nobody to deal with.

    `tcp_store` is the job's only store, the ranks meet in it too.
    """

    def __init__(self, nodes: Nodes, tcp_store: TCPStore, hosts: Sequence[str]) -> None:
        self.nodes, self.tcp_store = nodes, tcp_store
        self._store = meeting_room(tcp_store)
        self._judge = Judge(hosts, silence=nodes.silence_timeout, now=time.monotonic())
        self._code: int | None = None  # of this node's ranks, once they ended
        self._failure: Verdict | None = None  # of the first rank here that failed
        self._failed_somewhere = self._cut_off = False
        self._verdict: Verdict | None = None
        self._heard = time.monotonic()
        self._news = threading.Event()
        # Nobody else talks to the store: a call to a machine that is gone may take as long as it likes.
        self._thread = threading.Thread(target=self._beat, daemon=True)
        if nodes.count > 1:
            self._thread.start()

    def report(self, failure: Verdict) -> None:
        """Tell all nodes that something failed here; the first report of the job counts."""
        if self._failure is None:
            here = f"node {self.nodes.rank} ({socket.gethostname()})"
            self._failure = Verdict(failure.code, f"{here}: {failure.words}")
            self._news.set()

    def must_end(self) -> bool:
        """Say whether the ranks here have nothing left to do: one failed somewhere, or a node fell silent."""
        return self.nodes.count > 1 and (self._failed_somewhere or self._verdict is not None or self._node_0_is_gone())

    def conclude(self, own: Verdict) -> Verdict:
        """Tell how the ranks here ended, wait until those of all nodes did, and return the job's verdict."""
        if self.nodes.count == 1:
            return own
        self._code = own.code
        self._news.set()
        while self._verdict is None and not self._node_0_is_gone():
            time.sleep(POLL)
        if self._verdict is None:
            return silence_of([f"node 0 ({self.nodes.address})"])
        self._thread.join(2 * FAREWELL)
        return Verdict(self._verdict.code, self._verdict.words or own.words)

    def _node_0_is_gone(self) -> bool:
        return self._cut_off or time.monotonic() - self._heard > self.nodes.silence_timeout

    def _beat(self) -> None:
        for number in itertools.count(1):
            try:
                self._exchange(number)
            except RuntimeError:  # what torch's stores raise
                self._cut_off = True
                return
            self._heard = time.monotonic()
            if self._verdict is not None:
                return
            self._news.wait(BEAT if self._code is None else POLL)
            self._news.clear()

    def _exchange(self, number: int) -> None:
        """Give a sign of life and the news of this node, and take in those of the others."""
        store, node = self._store, self.nodes.rank
        store.set(beat_of(node), json.dumps([number, self._code]))
        if self._failure is not None:
            store.compare_set(FAILED, "", self._failure.written())
        failed = Verdict.read(store.get(FAILED))
        self._failed_somewhere = failed is not None
        if node != 0:
            self._verdict = Verdict.read(store.get(VERDICT))
            if self._verdict is not None:
                store.add(LEFT, 1)
            return
        beats = store.multi_get([beat_of(other) for other in range(self.nodes.count)])
        self._verdict = self._judge.verdict(beats, failed, time.monotonic())
        if self._verdict is not None:
            store.set(VERDICT, self._verdict.written())
            see_off(store, self.nodes.count - 1 - len(self._judge.silent))


def meeting_room(store: Store) -> Store:
    """Return the part of `store` that is the launchers' own."""
    return PrefixStore("launchers", store)


def beat_of(node: int) -> str:
    """Return the key of a node's signs of life."""
    return f"beat/{node}"


def silence_of(names: Sequence[str]) -> Verdict:
    """Return the verdict over a job that lost the nodes `names`."""
    return Verdict(
        InterruptedRun.exit_code,
        f"{' and '.join(names)} fell silent: the launcher, the machine or the network there is gone. "
        "The ranks here were ended; the last complete checkpoint is kept, so start the job again",
    )


def see_off(store: Store, others: int) -> None:
    """Keep the store up until `others` launchers have read the last word, but not for long."""
    deadline = time.monotonic() + FAREWELL
    while store.add(LEFT, 0) < others and time.monotonic() < deadline:
        time.sleep(POLL)
