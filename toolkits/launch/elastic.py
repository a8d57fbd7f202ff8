"""Start the ranks of a node through torch elastic and speak for them: exit codes, messages, signals.

Under plain `torchrun` every failure ends with exit code 1, and a SIGTERM leaves too little time to save.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..foundation.errors import InterruptedRun
from ..foundation.process import usable_cores
from .nodes import Nodes
from .rank import ERROR_DIRECTORY, LAUNCHER_PID, error_file
from .ranks import quieten_torch

if TYPE_CHECKING:  # they import torch, which takes seconds
    from .agent import Death, Ending
    from .peers import Peers, Verdict

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
INTERRUPTED = InterruptedRun.exit_code


ALONE = Nodes()


def start_ranks(
    arguments: list[str],
    *,
    ranks: int,
    nodes: Nodes = ALONE,
    grace: float = 60,
    module: str = "toolkits.training",
    on_end: Callable[[int, str], object] = lambda _code, _words: None,
) -> int:
    """Run `python -m module arguments` `ranks` times on this node and return the exit code of the job.

    That is 0, or the code of the rank that failed first (128 + n when signal n killed it), whose message
    is printed; or 75 when a signal came and every rank saved within `grace` seconds, or when another of the
    `nodes` fell silent. `on_end` hears code and message before. Raises what `joining.join` raises.
    """
    stop_signals = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    with _signals_restored(stop_signals):
        for number in stop_signals:  # until torch is imported and the ranks are there
            signal.signal(number, lambda *_: os._exit(INTERRUPTED))
        quieten_torch()
        from .agent import handle, run_agent
        from .joining import join

        _silence_elastic()
        with tempfile.TemporaryDirectory(prefix="temper-") as errors:
            os.environ.update(_environment(ranks, errors))
            command = ["-m", module, *arguments]
            peers = join(nodes, ranks=ranks, command=command)
            ending = run_agent(
                ["-u", *command],
                peers,
                ranks=ranks,
                on_failure=lambda death, overdue: _report(peers, death, Path(errors), overdue=overdue),
                grace=grace,
                stop_signals=stop_signals,
            )
            own = _own_verdict(ending, Path(errors), ranks=ranks)
        handle(stop_signals, lambda *_: os._exit(own.code or INTERRUPTED))  # while other nodes keep us waiting
        if own.code and not ending.deaths:
            peers.report(own)
        verdict = peers.conclude(own)
        on_end(verdict.code, verdict.words)
        if verdict.words:
            print(verdict.words, file=sys.stderr, flush=True)
        return verdict.code


def _environment(ranks: int, errors: str) -> dict[str, str]:
    cores = usable_cores()
    return {
        # Read when CUDA starts: one queue, so that a collective overlaps with the matrix product behind it.
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // ranks)),
        ERROR_DIRECTORY: errors,
        LAUNCHER_PID: str(os.getpid()),
    }


def _own_verdict(ending: "Ending", errors: Path, *, ranks: int) -> "Verdict":
    """Return the exit code of this node's ranks and the words of the rank that decided it."""
    from .peers import Verdict

    if ending.signalled and len(ending.deaths) < ranks:
        return Verdict(INTERRUPTED, "stopped before all ranks were up")
    failed = [death for death in ending.deaths if death.code not in (0, INTERRUPTED)]
    saved = [death for death in ending.deaths if death.code == INTERRUPTED]
    first_to_fall = [death for death in ending.deaths if death.code]
    speaker = next(iter((failed or saved) if ending.signalled else first_to_fall), None)
    if speaker is None:
        return Verdict(0)
    return Verdict(speaker.code, _last_words(speaker, errors, overdue=ending.signalled))


def _report(peers: "Peers", death: "Death", errors: Path, *, overdue: bool) -> None:
    from .peers import Verdict

    peers.report(Verdict(death.code, _last_words(death, errors, overdue=overdue)))


def _last_words(death: "Death", errors: Path, *, overdue: bool) -> str:
    file = error_file(errors, death.rank)
    if file.exists():
        return f"rank {death.rank}: {file.read_text(encoding='utf-8')}"
    if not death.by_signal:
        return f"rank {death.rank} ended with exit code {death.code}"
    text = f"rank {death.rank} was killed by signal {death.code - 128}"
    if death.code == 128 + signal.SIGKILL:
        text += " before it had saved" if overdue else "; the system does that when memory runs out"
    return text


def _silence_elastic() -> None:
    """Each elastic logger has a level of its own: setting the parent's does nothing."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _signals_restored(signals: list[signal.Signals]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
