"""The ranks' exit codes, messages and signals, with fake ranks; torch is imported once and forked from."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

FAKE_RANK = """
import os, signal, sys, time
from pathlib import Path
from toolkits.foundation.errors import DataError, InterruptedRun
from toolkits.launch.rank import run_rank, stop_requested

def main():
    case, up = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    (up / f"{rank}.pid").write_text(str(os.getpid()))
    if case == "ok":
        line = f"threads {os.environ['OMP_NUM_THREADS']} arguments {sys.argv[3:]}"
        os.write(1, f"{line}\\n".encode())  # at once: two ranks share the pipe
        return
    if rank == 1 and case in ("data", "bug", "kill", "exit"):
        if case == "data": raise DataError("train.jsonl:4: a comma is missing")
        if case == "bug": raise KeyError("weight")
        if case == "kill": os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(9)
    started = time.monotonic()
    while time.monotonic() - started < 60:
        time.sleep(0.02)
        if stop_requested():
            if case != "wait": raise DataError("rank 0 only fell because rank 1 did")
            time.sleep(float(os.environ.get("SAVING", "0.3")))
            raise InterruptedRun(f"SIGTERM: saved step 341 on rank {rank}")

run_rank(main)
"""

JOB = """
import os, sys
from toolkits.launch.elastic import start_ranks

def run(case, up, log, grace=60.0, environment=None):
    os.environ.update(environment or {})
    os.environ["PYTHONPATH"] = os.pathsep.join([str(up), *sys.path])
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os._exit(start_ranks([case, str(up), "a b", "$HOME", "${local_rank}"], ranks=2, grace=grace, module="fake_rank"))
"""


class Job:
    """A launcher with two fake ranks."""

    def __init__(self, folder: Path, process: BaseProcess) -> None:
        self.folder, self.process = folder, process

    @property
    def output(self) -> str:
        return (self.folder / "log").read_text()

    def pids(self) -> list[int]:
        """Wait until both ranks are up and return their process ids."""
        files = [self.folder / f"{rank}.pid" for rank in range(2)]
        deadline = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)
        time.sleep(0.5)  # the ranks are quicker than the launcher, which has to note their process ids
        return [int(file.read_text()) for file in files]

    def signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def code(self) -> int | None:
        self.process.join(60)
        return self.process.exitcode


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[multiprocessing.context.ForkServerContext]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "launch_job.py").write_text(JOB)
    sys.path.insert(0, str(folder))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toolkits.launch.agent"])
    yield context
    sys.path.remove(str(folder))


@pytest.fixture
def start(forks: multiprocessing.context.ForkServerContext, tmp_path: Path) -> Iterator:
    import launch_job  # type: ignore[import-not-found]

    jobs = []

    def start(case: str, **keywords: object) -> Job:
        (tmp_path / "fake_rank.py").write_text(FAKE_RANK)
        process = forks.Process(target=launch_job.run, args=(case, tmp_path, tmp_path / "log"), kwargs=keywords)
        process.start()
        jobs.append(process)
        return Job(tmp_path, process)

    yield start
    for process in jobs:
        process.kill()
        process.join()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_success_passes_arguments_and_threads(start) -> None:
    job = start("ok", environment={"OMP_NUM_THREADS": ""})
    assert job.code() == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert job.output.count(f"threads {threads} arguments ['a b', '$HOME', '${{local_rank}}']") == 2


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("data", 3, "rank 1: error: train.jsonl:4: a comma is missing"),
        ("bug", 70, "KeyError: 'weight'"),
        ("kill", 137, "rank 1 was killed by signal 9"),
        ("exit", 9, "rank 1 ended with exit code 9"),
    ],
)
def test_the_first_rank_to_fail_speaks_and_gives_the_code(start, case: str, code: int, words: str) -> None:
    job = start(case)
    assert job.code() == code
    assert words in job.output
    assert "rank 0" not in job.output and "torch" not in job.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_ranks_save_and_ends_with_75(start, number: signal.Signals) -> None:
    job = start("wait")
    job.pids()
    job.signal(number)
    assert job.code() == 75
    assert f"{number.name}: the ranks have 60 s" in job.output and "saved step 341" in job.output
    assert job.output.count("saved step 341") == 1


def test_a_second_signal_at_once_is_the_same_request(start) -> None:
    job = start("wait", environment={"SAVING": "1"})
    job.pids()
    for _ in range(3):
        job.signal(signal.SIGTERM)
        time.sleep(0.1)
    assert job.code() == 75


def test_a_later_second_signal_does_not_wait(start) -> None:
    job = start("wait", environment={"SAVING": "50"})
    pids = job.pids()
    started = time.monotonic()
    job.signal(signal.SIGINT)
    time.sleep(1.3)
    job.signal(signal.SIGINT)
    assert job.code() == 137
    assert time.monotonic() - started < 20 and all(map(gone, pids))
    assert "before it had saved" in job.output


def test_a_rank_that_cannot_stop_is_killed_after_the_grace(start) -> None:
    job = start("wait", grace=0.5, environment={"SAVING": "50"})
    pids = job.pids()
    job.signal(signal.SIGTERM)
    assert job.code() == 137
    assert all(map(gone, pids))


def test_a_killed_launcher_leaves_no_rank(start) -> None:
    job = start("wait")
    pids = job.pids()
    job.signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_rank_without_a_launcher_prints_its_message() -> None:
    code = (
        "from toolkits.foundation.errors import NumericsError as E\nfrom toolkits.launch.rank import run_rank\n"
        "def main():\n    print('no newline', end='')\n    raise E('loss is nan')\nrun_rank(main)"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "RANK": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "no newline", "rank 3: error: loss is nan\n")


def test_the_rank_module_imports_nothing_slow() -> None:
    code = "import sys, toolkits.launch.rank; assert not {'torch', 'click', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(REPOSITORY)}, check=True)
