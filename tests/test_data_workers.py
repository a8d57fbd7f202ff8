"""A build in several processes, one that is killed and goes on, and one whose process dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from data_world import fuzzed_rows, talk, write_rows, write_tokenizer

from data_preprocessing import workers
from data_preprocessing.build import BuildOptions, build
from data_preprocessing.chunks import Chunk, ChunkWork
from data_preprocessing.dataset import FILE_SUFFIXES, open_dataset
from data_preprocessing.rows import Row, Rows
from data_preprocessing.workers import WAITING, _Worker, finished_chunks
from toolkits.foundation.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
BAD = [{"x": 1}, talk("<|im_end|> \U000f0000", "a")]  # one that no layout fits, one that the encoder refuses


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def result_of(folder):
    names = [*(f"out_text_document{suffix}" for suffix in FILE_SUFFIXES), "out.rejects.jsonl"]
    return {name: (folder / name).read_bytes() for name in names}


def source_of(folder):
    rows = fuzzed_rows(200)
    return write_rows(folder / "rows.jsonl", [*rows[:70], *BAD, *rows[70:150], *BAD, *rows[150:]])


def skipping(**options):
    return BuildOptions(on_bad_row="skip", max_bad=0.5, **options)


def test_processes_and_chunks_change_no_byte(tmp_path, tokenizer):
    source = source_of(tmp_path)
    results = []
    for options in (skipping(), skipping(chunk_rows=7), skipping(workers=2, chunk_rows=30)):
        build(source, tmp_path / "out", tokenizer=tokenizer, overwrite=True, options=options)
        results.append(result_of(tmp_path))
    assert results[0] == results[1] == results[2]
    rejects = [json.loads(line) for line in results[0]["out.rejects.jsonl"].splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in rejects] == [
        (71, "layout"), (72, "control_text"), (153, "layout"), (154, "control_text"),
    ]  # fmt: skip


def test_what_a_process_refuses_is_said_as_usual(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", [*fuzzed_rows(20), *BAD])
    with pytest.raises(DataError, match=r"rows\.jsonl:21: no known layout"):
        build(source, tmp_path / "out", tokenizer=tokenizer, options=BuildOptions(workers=2, chunk_rows=5))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_process_that_dies_is_named_with_its_rows(tmp_path, tokenizer, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", fuzzed_rows(100))
    sent = []

    def send(self, chunk, original=_Worker.send):
        sent.append(chunk)
        if chunk.first == 60:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.join()
        original(self, chunk)

    monkeypatch.setattr(_Worker, "send", send)
    said = r"worker \d killed by signal 9 \(out of memory\?\) at rows 60-69; .* with fewer --workers"
    with pytest.raises(DataError, match=said):
        build(source, tmp_path / "out", tokenizer=tokenizer, options=BuildOptions(workers=2, chunk_rows=10))
    assert not (tmp_path / "out_text_document.bin").exists()


KILLED = """
import os, signal, sys
from data_preprocessing.build import BuildOptions, build
from data_preprocessing.unfinished import Unfinished
times, save = [0], Unfinished.save
def save_and_die(self, *args, **facts):
    save(self, *args, **facts)
    times[0] += 1
    if times[0] == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
Unfinished.save = save_and_die
options = BuildOptions(on_bad_row="skip", max_bad=0.5, chunk_rows=20, save_seconds=0)
build(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3], options=options)
"""


def killed(source, prefix, tokenizer, saves):
    words = [sys.executable, "-c", KILLED, *map(str, (source, prefix, tokenizer, saves))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout


def test_a_killed_build_goes_on_and_the_result_is_the_same(tmp_path, tokenizer, capsys):
    source = source_of(tmp_path)
    build(source, tmp_path / "out", tokenizer=tokenizer, options=skipping())
    expected = result_of(tmp_path)
    for name in expected:
        (tmp_path / name).unlink()
    killed(source, tmp_path / "out", tokenizer, 3)
    unfinished = tmp_path / ".tmp-out_text_document"
    # What was written behind the saved point is not part of it.
    with open(unfinished / "out_text_document.bin", "ab") as file:
        file.write(b"half a row")
    assert "going on behind row 60" in killed(source, tmp_path / "out", tokenizer, 4)
    capsys.readouterr()
    build(source, tmp_path / "out", tokenizer=tokenizer, options=skipping(workers=2))
    assert "going on behind row 140" in capsys.readouterr().out
    assert result_of(tmp_path) == expected
    open_dataset(tmp_path / "out").verify()
    assert not unfinished.exists()


def test_what_another_build_left_is_not_gone_on_with(tmp_path, tokenizer, capsys):
    source = source_of(tmp_path)
    killed(source, tmp_path / "out", tokenizer, 3)
    write_rows(source, [*fuzzed_rows(30), talk("one", "more")])
    build(source, tmp_path / "out", tokenizer=tokenizer)
    assert "left unfinished by another build: starting from the beginning" in capsys.readouterr().out
    assert len(open_dataset(tmp_path / "out")) == 31


def test_a_point_whose_files_lost_something_is_not_gone_on_with(tmp_path, tokenizer, capsys):
    source = source_of(tmp_path)
    killed(source, tmp_path / "out", tokenizer, 3)
    with open(tmp_path / ".tmp-out_text_document" / "out_text_document.mask", "r+b") as file:
        file.truncate(10)
    build(source, tmp_path / "out", tokenizer=tokenizer, options=skipping())
    assert "lost something since: starting from the beginning" in capsys.readouterr().out
    assert len(open_dataset(tmp_path / "out")) == 200


def test_an_interrupted_build_keeps_its_point_and_a_failed_one_goes(tmp_path, tokenizer, monkeypatch):
    source = source_of(tmp_path)
    options = skipping(chunk_rows=20, save_seconds=0)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_preprocessing.build.Rejects.add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(source, tmp_path / "out", tokenizer=tokenizer, options=options)
    assert json.loads((tmp_path / ".tmp-out_text_document" / "unfinished.json").read_text())["rows"] == 60
    with pytest.raises(DataError, match="no known layout"):
        build(source, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / ".tmp-out_text_document").exists()


def test_what_came_before_a_fault_of_the_input_is_finished_first(tmp_path):
    """Also where it waits for an encoder that is still being built."""
    folder = write_tokenizer(tmp_path / "t")
    work = ChunkWork("conversations", folder, BuildOptions(encoder="tokenizers"))

    def chunks():
        for line in range(3):
            yield Chunk(line, Rows.of([Row(line + 1, talk("q", "a"))]))
        raise DataError("the file breaks off")

    for is_ready in (False, True):
        work.encoder = Mock(wraps=work.encoder, is_ready=is_ready)
        done = []
        with pytest.raises(DataError, match="the file breaks off"):
            for finished in finished_chunks(chunks(), work, "conversations", folder, BuildOptions()):
                done.append(finished.num_rows)
        assert done == [1, 1, 1]


class Slow:
    """Prepares, encodes and finishes numbers; `is_ready` once its first one is encoded, as an encoder that is built."""

    def __init__(self, fails_at=None, is_ready=False):
        self.encoder, self.fails_at = self, fails_at
        self.is_ready = is_ready
        self.held = self.most = 0
        self.threads = set()

    def prepare(self, number):
        self.held += 1
        self.most = max(self.most, self.held)
        return Mock(number=number, num_characters=10)

    def encode(self, prepared):
        time.sleep(0.01)
        self.is_ready = True
        self.threads.add(threading.current_thread())
        if prepared.number == self.fails_at:
            raise MemoryError(prepared.number)
        return prepared.number

    def finish(self, prepared, flat):
        assert prepared.number == flat
        self.held -= 1
        return flat


def through(work, count):
    yield from finished_chunks(iter(range(count)), work, "conversations", Path(), BuildOptions())


def test_two_threads_encode_in_order_and_few_chunks_wait():
    work = Slow(is_ready=True)
    assert list(through(work, 40)) == list(range(40))
    assert len(work.threads) == 2 and work.most == WAITING + 1


def test_more_is_prepared_while_the_encoder_is_built(monkeypatch):
    monkeypatch.setattr(workers, "AHEAD", 95)
    work = Slow()
    assert list(through(work, 40)) == list(range(40))
    assert work.most == 10


def test_what_an_encoder_raises_arrives_and_the_lock_is_as_it_was():
    before, found = sys.getswitchinterval(), []
    with pytest.raises(MemoryError, match="7"):
        for number in through(Slow(fails_at=7), 40):
            found.append(number)
    assert found == list(range(7)) and sys.getswitchinterval() == before
