"""Launchers of several nodes on one machine, with fake ranks: how they meet, and how they notice each other's end."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from training_world import free_ports

from toolkits.launch.nodes import Nodes

FAKE_RANK = """
import os, signal, sys, time
from pathlib import Path
from toolkits.foundation.errors import DataError, InterruptedRun
from toolkits.launch.rank import run_rank, stop_requested

def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False

def main():
    case, up = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    (up / f"{rank}.tmp").write_text(str(os.getpid()))
    (up / f"{rank}.tmp").rename(up / f"{rank}.pid")
    if case == "ok":
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        line = " ".join(["ranks", *(os.environ[name] for name in names)])
        os.write(1, f"{line}\\n".encode())  # at once: two ranks share the pipe
        return
    peers = [up / f"{peer}.pid" for peer in range(4)]
    while not all(peer.exists() for peer in peers):
        time.sleep(0.02)
    if case == "fail" and rank == 2:
        time.sleep(0.5)
        raise DataError("train.jsonl:4: a comma is missing")
    pids = [int(peer.read_text()) for peer in peers]
    started = time.monotonic()
    while time.monotonic() - started < 60:
        time.sleep(0.02)
        # As the training loop's all-reduce does: one rank's signal is all ranks'.
        if stop_requested() and case == "stop":
            (up / "stop").touch()
        if (up / "stop").exists():
            time.sleep(0.3)
            raise InterruptedRun(f"saved step 341 on rank {rank}")
        if case == "wait" and stop_requested():
            sys.exit(0)
        if case == "collective" and not all(map(alive, pids)):
            raise RuntimeError("connection closed by peer")

run_rank(main)
"""

JOB = """
import os, sys
from toolkits.foundation.errors import run_guarded
from toolkits.launch.elastic import start_ranks

def run(case, up, log, nodes, ranks):
    os.environ["PYTHONPATH"] = os.pathsep.join([str(up), *sys.path])
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    main = lambda: sys.exit(start_ranks([case, str(up)], ranks=ranks, nodes=nodes, module="fake_rank"))
    os._exit(run_guarded(main))
"""
SILENCE = 2.0


@dataclass
class Launcher:
    """A node's launcher with its fake ranks."""

    process: BaseProcess
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def code(self) -> int | None:
        self.process.join(40)
        return self.process.exitcode


Start = Callable[..., Launcher]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[multiprocessing.context.ForkServerContext]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "nodes_job.py").write_text(JOB)
    sys.path.insert(0, str(folder))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toolkits.launch.joining"])
    yield context
    sys.path.remove(str(folder))


@pytest.fixture
def start(forks: multiprocessing.context.ForkServerContext, tmp_path: Path) -> Iterator[Start]:
    import nodes_job  # type: ignore[import-not-found]

    (tmp_path / "fake_rank.py").write_text(FAKE_RANK)
    (port,) = free_ports(1)
    started: list[BaseProcess] = []

    def start(case: str, rank: int, *, join: float = 30, ranks: int = 2, count: int = 2) -> Launcher:
        nodes = Nodes(count, rank, "localhost", port, join_timeout=join, silence_timeout=SILENCE)
        log = tmp_path / f"node-{len(started)}.log"
        process = forks.Process(target=nodes_job.run, args=(case, tmp_path, log, nodes, ranks))
        process.start()
        started.append(process)
        return Launcher(process, log)

    yield start
    for process in started:
        process.kill()
        process.join()


def pids(folder: Path) -> list[int]:
    """Wait until all four ranks are up and return their process ids."""
    files = [folder / f"{rank}.pid" for rank in range(4)]
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, [log.read_text() for log in folder.glob("*.log")]
        time.sleep(0.02)
    time.sleep(0.5)  # the ranks are quicker than their launchers
    return [int(file.read_text()) for file in files]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_ranks_are_counted_over_the_nodes(start: Start) -> None:
    second, first = start("ok", 1), start("ok", 0)  # the order of arrival does not matter
    assert (first.code(), second.code()) == (0, 0), first.output + second.output
    for node, launcher in enumerate((first, second)):
        lines = sorted(line.split()[1:5] for line in launcher.output.splitlines())
        assert lines == [[str(2 * node + local), str(local), "4", "2"] for local in range(2)]
        assert not first.output.replace("ranks", "").strip("0123456789 \n")


def test_a_rank_that_fails_ends_all_nodes_with_its_code_and_words(start: Start, tmp_path: Path) -> None:
    launchers = [start("fail", node) for node in range(2)]
    ranks = pids(tmp_path)
    began = time.monotonic()
    assert [launcher.code() for launcher in launchers] == [3, 3]
    assert time.monotonic() - began < 20 and all(map(gone, ranks))
    words = f"node 1 ({socket.gethostname()}): rank 2: error: train.jsonl:4: a comma is missing"
    assert all(launcher.output.count("rank 2") == launcher.output.count(words) == 1 for launcher in launchers)


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGKILL)])
def test_a_silent_node_is_named_and_ends_the_others(
    start: Start, tmp_path: Path, victim: int, number: signal.Signals
) -> None:
    launchers = [start("wait", node) for node in range(2)]
    ranks = pids(tmp_path)
    launchers[victim].signal(number)
    survivor = launchers[1 - victim]
    assert survivor.code() == 75
    host = "localhost" if victim == 0 else socket.gethostname()
    assert f"node {victim} ({host}) fell silent" in survivor.output
    assert "the last complete checkpoint is kept" in survivor.output
    mine = ranks[:2] if victim == 1 else ranks[2:]
    assert all(map(gone, mine)) and survivor.output.count("node") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_that_fail_because_a_node_is_gone_are_not_blamed(start: Start, tmp_path: Path, victim: int) -> None:
    launchers = [start("collective", node) for node in range(2)]
    pids(tmp_path)
    launchers[victim].signal(signal.SIGKILL)
    survivor = launchers[1 - victim]
    assert survivor.code() == 75
    assert f"node {victim} (" in survivor.output and "connection closed" not in survivor.output


def test_a_node_that_comes_back_before_it_was_missed_waits_for_the_next_attempt(start: Start, tmp_path: Path) -> None:
    first, second = start("wait", 0), start("wait", 1)
    pids(tmp_path)
    second.signal(signal.SIGKILL)
    again = start("ok", 1)
    assert first.code() == 75
    assert (start("ok", 0).code(), again.code()) == (0, 0)


def test_a_signal_at_one_node_stops_all(start: Start, tmp_path: Path) -> None:
    launchers = [start("stop", node) for node in range(2)]
    pids(tmp_path)
    launchers[1].signal(signal.SIGTERM)
    assert [launcher.code() for launcher in launchers] == [75, 75]
    assert all(launcher.output.count("saved step 341") == 1 for launcher in launchers)
    assert "SIGTERM" in launchers[1].output and "SIGTERM" not in launchers[0].output


def test_nodes_that_do_not_come_are_named(start: Start) -> None:
    launchers = [start("ok", node, join=2, count=4) for node in (0, 2)]
    for launcher in launchers:
        assert launcher.code() == 5
        assert "2 of 4 nodes came, missing: node 1, node 3; waited 2 s (JOIN_TIMEOUT)" in launcher.output


def test_without_node_0_nobody_starts(start: Start) -> None:
    alone = start("ok", 1, join=2)
    assert alone.code() == 5
    assert "node 0 at localhost:" in alone.output and "does not answer" in alone.output


@pytest.mark.parametrize(
    ("case", "ranks", "words"),
    [("ok", 1, "runs 1 ranks, node 0 runs 2"), ("wait", 2, "was started with another line than node 0: wait")],
)
def test_nodes_must_run_the_same(start: Start, case: str, ranks: int, words: str) -> None:
    launchers = [start("ok", 0), start(case, 1, ranks=ranks)]
    for launcher in launchers:
        assert launcher.code() == 2
        assert f"node 1 ({socket.gethostname()}) {words}; all nodes must run the same" in launcher.output


def test_a_taken_port_is_said(start: Start) -> None:
    first = start("wait", 0, count=3)
    time.sleep(1)
    other = start("wait", 0, count=3)
    assert other.code() == 5 and "cannot be opened on this machine" in other.output
    first.signal(signal.SIGTERM)
    assert first.code() == 75


def test_the_judge_waits_for_all_and_lets_silence_outweigh_a_failure() -> None:
    from toolkits.launch.peers import Judge, Verdict

    def beats(*said: tuple[int, int | None]) -> list[bytes]:
        return [json.dumps(beat).encode() for beat in said]

    failure = Verdict(3, "node 0 (a): rank 0: error")
    judge = Judge(["a", "b"], silence=30, now=0)
    assert judge.verdict(beats((1, None), (1, None)), None, 1) is None
    assert judge.verdict(beats((2, 3), (2, None)), failure, 31) is None
    assert judge.verdict(beats((3, 3), (2, None)), failure, 60) is None
    lost = judge.verdict(beats((4, 3), (2, None)), failure, 62)
    assert lost is not None and lost.code == 75 and "node 1 (b)" in lost.words
    assert judge.verdict(beats((5, 3), (2, 0)), failure, 99) == failure
    assert judge.verdict(beats((6, 0), (2, 75)), None, 99) == Verdict(75)
    assert judge.verdict(beats((6, 0), (2, 0)), None, 999) == Verdict(0)
