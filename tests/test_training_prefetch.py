"""Micro batches built ahead: in order, each once, errors where they belong, and no thread left behind."""

import threading
import time
import traceback
import types

import pytest
import torch

from toolkits.training import prefetch
from toolkits.training.prefetch import AHEAD, ahead, prefetched


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert threads() == []


def wait_until(condition):
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_every_item_comes_once_and_in_order():
    with ahead(iter(range(100))) as items:
        assert list(items) == list(range(100))
    with ahead(iter(())) as items:
        assert list(items) == []


def test_items_are_built_in_another_thread_and_no_more_than_a_few_ahead():
    built = []

    def items():
        for number in range(50):
            built.append(threading.current_thread().name)
            yield number

    with ahead(items()) as taken:
        wait_until(lambda: len(built) == AHEAD + 1)  # those that wait, and one for which there is no room
        time.sleep(0.05)
        assert len(built) == AHEAD + 1
        assert [next(taken) for _ in range(3)] == [0, 1, 2]
        wait_until(lambda: len(built) == AHEAD + 4)
    assert set(built) == {"prefetch"} and len(built) < 50


def test_what_is_left_at_the_end_of_the_block_can_be_built_again():
    """As a run does that stops and goes on: the position counts what was taken."""
    source = range(20)
    with ahead(iter(source)) as items:
        first = [next(items) for _ in range(7)]
    with ahead(iter(source[len(first) :])) as items:
        assert first + list(items) == list(source)


def test_an_error_comes_in_its_place_with_the_traceback_of_the_thread():
    def items():
        yield 1
        yield 2
        raise ValueError("row 3 is damaged")

    with ahead(items()) as taken:
        assert [next(taken), next(taken)] == [1, 2]
        with pytest.raises(ValueError, match="row 3 is damaged") as failed:
            next(taken)
    assert 'raise ValueError("row 3 is damaged")' in "".join(traceback.format_exception(failed.value))


def test_an_error_of_the_block_ends_the_thread_and_comes_out():
    def endless():
        while True:
            yield 0

    with pytest.raises(KeyboardInterrupt), ahead(endless()) as items:
        next(items)
        raise KeyboardInterrupt
    assert threads() == []


def test_on_a_cpu_a_batch_is_what_was_built():
    batch = types.SimpleNamespace()
    with prefetched(iter([batch])) as taken:
        assert next(taken) is batch


def test_on_a_gpu_the_computation_waits_for_the_copy_and_keeps_the_memory(monkeypatch):
    """The order of calls, with a stand-in for CUDA: more cannot be shown without a GPU."""
    calls = []

    class Stream:
        def record_event(self):
            calls.append("recorded")
            return "copied"

        def wait_event(self, event):
            calls.append(f"waited for {event}")

    class Tensor:
        def record_stream(self, stream):
            calls.append("memory kept")

    class Batch:
        def each(self, change):
            if change is torch.Tensor.pin_memory:
                calls.append("pinned")
            else:
                change(Tensor())
            return self

        def cuda(self):
            calls.append("sent by " + threading.current_thread().name)
            return self

    main = Stream()
    fake = {"is_available": lambda: True, "current_device": lambda: 3, "Stream": Stream, "current_stream": lambda: main}
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"device {device}"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: threading.Lock())
    with prefetch.prefetched(iter([Batch()])) as taken:
        assert len(list(taken)) == 1
    sent = ["device 3", "pinned", "sent by prefetch", "recorded"]
    assert calls == [*sent, "waited for copied", "memory kept"]
