"""The chunks of a build, worked on by this process or by others, and handed back in order."""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from toolkits.foundation.errors import DataError, TemperError, describe
from toolkits.foundation.process import usable_cores

from .chunks import BuildOptions, Chunk, ChunkWork, Finished, Prepared
from .dataset import Kind
from .encoders import FASTOKENS_THREADS, TOKENIZERS_THREADS, Flat

WAITING = 3  # chunks that are being encoded, or wait for that
LOCK_SECONDS = 0.0005  # after which one thread lets the other have Python's lock; 0.005 is a fifth of a chunk's time
AHEAD = 16_000_000  # characters of texts that wait for an encoder which is still being built


def finished_chunks(
    chunks: Iterator[Chunk], work: ChunkWork, kind: Kind, tokenizer: Path, options: BuildOptions
) -> Iterator[Finished]:
    """Yield what becomes of each chunk, in order; `options.workers` says in how many processes."""
    if options.workers == 1:
        return _in_this_process(chunks, work)
    return _in_processes(chunks, kind, tokenizer, options)


def _in_this_process(chunks: Iterator[Chunk], work: ChunkWork) -> Iterator[Finished]:
    """Prepare and finish chunks here, while a thread beside this one encodes what is prepared."""
    fault = None
    with _Encoding(work) as encoding:
        while True:
            try:
                chunk = next(chunks, None)
            except Exception as error:  # a file that cannot be read any further; what came before is finished first
                chunk, fault = None, error
            if chunk is None:
                break
            encoding.add(work.prepare(chunk))
            yield from encoding.finished()
        yield from encoding.finished(all_of_it=True)
    if fault is not None:
        raise fault


class _Encoding:
    """Prepared chunks on their way through the encoder, in order.

    Its thread builds the encoder first. Encoding needs Python's lock when it begins and when it ends, so both threads
    work at once; all else stays in one of them, or they would wait for each other.
    """

    def __init__(self, work: ChunkWork) -> None:
        self._work, self._thread = work, ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Prepared, Future[Flat]]] = deque()
        self._characters = 0  # of the texts that wait

    def __enter__(self) -> "_Encoding":
        self._seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(self._seconds, LOCK_SECONDS))
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        sys.setswitchinterval(self._seconds)

    def add(self, prepared: Prepared) -> None:
        """Have a chunk encoded."""
        self._waiting.append((prepared, self._thread.submit(self._work.encode, prepared)))
        self._characters += prepared.num_characters

    def finished(self, *, all_of_it: bool = False) -> Iterator[Finished]:
        """Yield what is encoded, and of the rest what is too much to wait, or `all_of_it`."""
        while self._waiting and (all_of_it or self._waiting[0][1].done() or self._is_too_much):
            self._help()
            prepared, encoded = self._waiting.popleft()
            self._characters -= prepared.num_characters
            yield self._work.finish(prepared, encoded.result())

    @property
    def _is_too_much(self) -> bool:
        if self._work.encoder.is_ready:
            return len(self._waiting) > WAITING
        return self._characters > AHEAD

    def _help(self) -> None:
        """Encode the last chunk that the thread has not begun to, unless the first one is there already."""
        if self._waiting[0][1].done() or not self._work.encoder.is_ready:
            return
        for place in reversed(range(len(self._waiting))):
            prepared, encoded = self._waiting[place]
            if encoded.cancel():
                here: Future[Flat] = Future()
                here.set_result(self._work.encode(prepared))
                self._waiting[place] = (prepared, here)
                return


def _in_processes(chunks: Iterator[Chunk], kind: Kind, tokenizer: Path, options: BuildOptions) -> Iterator[Finished]:
    """Give each process a chunk in turn; it gets its next one when it has handed the last one back."""
    workers = [_Worker(number, kind, tokenizer, options) for number in range(options.workers)]
    order: deque[_Worker] = deque()
    try:
        for chunk in chunks:
            if len(order) < len(workers):
                worker, done = workers[len(order)], None
            else:
                worker = order.popleft()
                done = worker.receive()
            worker.send(chunk)
            order.append(worker)
            if done is not None:
                yield done
        while order:
            yield order.popleft().receive()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process with a tokenizer of its own."""

    def __init__(self, number: int, kind: Kind, tokenizer: Path, options: BuildOptions) -> None:
        # Not forked: the encoders' threads do not survive that.
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        threads = max(1, usable_cores() // options.workers)
        words = (theirs, kind, tokenizer, options, threads)
        self._process = context.Process(target=_serve, args=words, name=f"worker {number}", daemon=True)
        self._process.start()
        theirs.close()
        self._first = self._last = 0

    def send(self, chunk: Chunk) -> None:
        """Give the process its next chunk."""
        self._first, self._last = chunk.first, chunk.first + len(chunk.rows) - 1
        self._call(lambda: self._pipe.send(chunk))

    def receive(self) -> Finished:
        """Return what became of the chunk; DataError when the process died of it."""
        done = self._call(self._pipe.recv)
        if isinstance(done, BaseException):
            raise done
        assert isinstance(done, Finished)
        return done

    def end(self) -> None:
        """End the process, whatever it does."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _call(self, talk: Callable[[], object]) -> object:
        try:
            return talk()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"killed by signal {-code}" if code < 0 else f"ended with {code}"
            memory = " (out of memory?)" if code == -signal.SIGKILL else ""
            raise DataError(
                f"{self._process.name} {how}{memory} at rows {self._first:,}-{self._last:,}; each process "
                "holds a tokenizer and a chunk of rows: start again with fewer --workers"
            ) from None


def _serve(pipe: Connection, kind: Kind, tokenizer: Path, options: BuildOptions, threads: int) -> None:
    """Work on chunks until nobody sends any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    for name in (TOKENIZERS_THREADS, FASTOKENS_THREADS):
        os.environ.setdefault(name, str(threads))
    work = None
    while True:
        try:
            chunk = pipe.recv()
        except EOFError:
            return
        try:
            work = work or ChunkWork(kind, tokenizer, options)
            done: object = work(chunk)
        except TemperError as error:
            done = error
        except BaseException as error:  # told in words: not every exception survives the way
            done = RuntimeError(describe(error))
        pipe.send(done)
