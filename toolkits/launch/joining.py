"""The launchers of a job's nodes meet: node 0 opens a store, the others come to it, and all start together."""

import json
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import Store, TCPStore

from ..foundation.errors import InterruptedRun, MachineError, UsageError
from .nodes import THIS_MACHINE, Nodes
from .peers import FAILED, LEFT, POLL, VERDICT, Peers, Verdict, beat_of, meeting_room, see_off, silence_of

START = "start"
KNOCK = 1.0  # seconds between two attempts to reach node 0


def join(nodes: Nodes, *, ranks: int, command: Sequence[str]) -> Peers:
    """Wait for the launchers of all nodes; they must run equally many `ranks` of the same `command`.

    Raises MachineError that names the nodes that did not come in time, UsageError that names those that
    run something else.
    """
    if nodes.count == 1:
        return Peers(nodes, _open(THIS_MACHINE, nodes), [])
    deadline = time.monotonic() + nodes.join_timeout
    tcp_store = _open(THIS_MACHINE, nodes) if nodes.rank == 0 else _reach(nodes, deadline)
    store = meeting_room(tcp_store)
    try:
        store.set(beat_of(nodes.rank), json.dumps([0, None]))
        store.set(_card_of(nodes.rank), json.dumps([socket.gethostname(), ranks, list(command)]))
        hosts = _receive(store, nodes, deadline) if nodes.rank == 0 else _await_start(store, nodes, deadline)
    except RuntimeError:  # what torch's stores raise
        raise InterruptedRun(silence_of([f"node 0 ({nodes.address})"]).words) from None
    return Peers(nodes, tcp_store, hosts)


def _open(address: str, nodes: Nodes) -> TCPStore:
    """Return node 0's store, or a way to it."""
    try:
        return TCPStore(
            address,
            nodes.port,
            is_master=nodes.rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=nodes.silence_timeout),
        )
    except RuntimeError as error:
        if nodes.rank != 0:
            raise
        raise MachineError(f"MASTER_PORT {nodes.port} cannot be opened on this machine: {error}") from None


def _reach(nodes: Nodes, deadline: float) -> TCPStore:
    """Return the way to node 0's store as soon as it is open and has no other launcher of this number."""
    where = f"{nodes.address}:{nodes.port}"
    obstacle = ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((nodes.address, nodes.port), timeout=KNOCK).close()  # torch's attempts are loud
            store = _open(nodes.address, nodes)
            if meeting_room(store).add(f"came/{nodes.rank}", 1) == 1:
                return store
            # It restarted sooner than the others noticed that it was gone.
            obstacle = f"has a launcher with RANK={nodes.rank} already"
        except (OSError, RuntimeError) as error:
            obstacle = f"does not answer ({error})"
        time.sleep(KNOCK)
    raise MachineError(f"node 0 at {where} {obstacle}; waited {nodes.join_timeout:g} s (JOIN_TIMEOUT)")


def _receive(store: Store, nodes: Nodes, deadline: float) -> list[str]:
    """Wait for all nodes, give the sign to start or the reason not to, and return the nodes' host names."""
    while (missing := _missing(store, nodes)) and time.monotonic() < deadline:
        time.sleep(POLL)
    cards = [] if missing else [json.loads(card) for card in store.multi_get(_cards(nodes))]
    refusal = _too_few(missing, nodes) if missing else _difference(cards)
    store.set(FAILED, "")
    store.set(VERDICT, "")
    store.set(START, refusal.written() if refusal else Verdict(0).written())
    if refusal is not None:
        see_off(store, nodes.count - 1 - len(missing))
        _refuse(refusal)
    return [host for host, _, _ in cards]


def _await_start(store: Store, nodes: Nodes, deadline: float) -> list[str]:
    """Wait for node 0's sign to start."""
    while not store.check([START]):
        if time.monotonic() > deadline:
            refusal = _too_few(_missing(store, nodes), nodes)
            store.add(LEFT, 1)  # node 0 may go now, and the store with it
            _refuse(refusal)
        time.sleep(POLL)
    said = Verdict.read(store.get(START))
    if said is not None and said.code:
        store.add(LEFT, 1)
        _refuse(said)
    return []


def _missing(store: Store, nodes: Nodes) -> list[int]:
    return [node for node, card in enumerate(_cards(nodes)) if not store.check([card])]


def _too_few(missing: Sequence[int], nodes: Nodes) -> Verdict:
    came = nodes.count - len(missing)
    names = ", ".join(f"node {node}" for node in missing)
    waited = f"waited {nodes.join_timeout:g} s (JOIN_TIMEOUT)"
    return Verdict(MachineError.exit_code, f"{came} of {nodes.count} nodes came, missing: {names}; {waited}")


def _difference(cards: Sequence[tuple[str, int, list[str]]]) -> Verdict | None:
    """Return the reason not to start nodes that do not run the same."""
    _, ranks, command = cards[0]
    for node, (host, its_ranks, its_command) in enumerate(cards):
        if its_ranks != ranks:
            what = f"runs {its_ranks} ranks, node 0 runs {ranks}"
        elif its_command != command:
            words = [word for word in its_command if word not in command] or ["fewer words"]
            what = f"was started with another line than node 0: {' '.join(words)}"
        else:
            continue
        return Verdict(UsageError.exit_code, f"node {node} ({host}) {what}; all nodes must run the same")
    return None


def _refuse(refusal: Verdict) -> None:
    raise (UsageError if refusal.code == UsageError.exit_code else MachineError)(refusal.words)


def _card_of(node: int) -> str:
    return f"card/{node}"


def _cards(nodes: Nodes) -> list[str]:
    return [_card_of(node) for node in range(nodes.count)]
