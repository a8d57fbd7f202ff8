"""Micro batches one step ahead: a thread builds them and sends them to the GPU while the model computes."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from .batches import MicroBatch

AHEAD = 2  # micro batches that wait; each is small beside the activations of one
T = TypeVar("T")
U = TypeVar("U")


@contextlib.contextmanager
def prefetched(batches: Iterator[MicroBatch]) -> Iterator[Iterator[MicroBatch]]:
    """Give `batches` in their order, built ahead and, where there is a GPU, on it already.

    What goes wrong while one is built is raised where it would have been taken. The thread ends with the block,
    wherever it was; what it had built ahead is dropped, so count what was taken, not what `batches` gave.
    """
    if not torch.cuda.is_available():
        with ahead(batches) as built:
            yield built
        return
    sender = GpuSender()
    with ahead(sender.sent(batch) for batch in batches) as built:
        yield (sender.received(*sent) for sent in built)


class GpuSender:
    """Copies micro batches from pinned memory on a stream of its own, beside the computation."""

    def __init__(self) -> None:
        self.device, self.stream = torch.cuda.current_device(), torch.cuda.Stream()

    def sent(self, batch: MicroBatch) -> tuple[MicroBatch, torch.cuda.Event]:
        """Begin to copy `batch`; return it on the GPU, and an event that says when it is there."""
        torch.cuda.set_device(self.device)  # each thread has its own
        with torch.cuda.stream(self.stream):
            return batch.each(torch.Tensor.pin_memory).cuda(), self.stream.record_event()

    def received(self, batch: MicroBatch, copied: torch.cuda.Event) -> MicroBatch:
        """Let the computation wait for the copy, not the CPU."""
        computing = torch.cuda.current_stream()
        computing.wait_event(copied)

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(computing)  # until the computation is done with it, its memory is not given away
            return tensor

        return batch.each(kept)


@dataclass(frozen=True)
class Failure:
    """Instead of an item: why there is none, with the traceback of the thread."""

    error: BaseException


class End:
    """Instead of an item: there are no more."""


@contextlib.contextmanager
def ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """Run `items` in a thread, up to AHEAD items before they are taken."""
    waiting: queue.Queue[T | Failure | End] = queue.Queue(AHEAD)
    enough = threading.Event()
    thread = threading.Thread(target=_fill, args=(waiting, items, enough), name="prefetch", daemon=True)
    thread.start()
    try:
        yield _taken(waiting)
    finally:
        enough.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                waiting.get_nowait()  # it may wait for room
            thread.join(0.01)


def _fill(waiting: queue.Queue, items: Iterator[T], enough: threading.Event) -> None:
    try:
        for item in items:
            waiting.put(item)
            if enough.is_set():
                return
        waiting.put(End())
    except BaseException as error:
        waiting.put(Failure(error))


def _taken(waiting: queue.Queue) -> Iterator[T]:
    while not isinstance(item := waiting.get(), End):
        if isinstance(item, Failure):
            raise item.error
        yield item
