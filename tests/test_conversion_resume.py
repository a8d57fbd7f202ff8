"""Conversions that are killed, gone on with, thrown away, or done by another number of workers."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from conversion import filling, hf_to_mcore, mcore_to_hf
from conversion.hf_as_mcore import HfAsMcore
from conversion.journal import JOURNAL_FILE
from conversion.verify import verify
from tests.conversion_models import UNTIED, write_hf
from toolkits.commands.convert import convert as command
from toolkits.foundation.errors import InterruptedRun, UsageError

ROOT = Path(__file__).resolve().parents[1]
CONVERT = {"hf2mcore": hf_to_mcore.convert, "mcore2hf": mcore_to_hf.convert}

# Forks children that convert and each kill themselves at their Nth call that changes the disk, and says after each
# with what it ended and which batches it filled. The last moment is beyond the end.
KILLED = """
import json, os, signal, sys
from conversion import filling, hf_to_mcore, mcore_to_hf
direction, src, dst, moments, overwrite = json.loads(sys.argv[1])
filling.BATCH_BYTES = 20_000
for moment in moments:
    log = os.memfd_create("log")
    child = os.fork()
    if not child:
        left = [moment]
        def dying(real):
            def call(*args, **more):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)
            return call
        for name in ("pwrite", "fdatasync", "fsync", "ftruncate", "replace", "unlink", "mkdir", "open"):
            setattr(os, name, dying(getattr(os, name)))
        fill = filling._Team.fill
        def logged(self, batch):
            os.write(log, (batch.name + "\\n").encode())
            return fill(self, batch)
        filling._Team.fill = logged
        convert = {"hf2mcore": hf_to_mcore.convert, "mcore2hf": mcore_to_hf.convert}[direction]
        convert(src, dst, resume=True, overwrite=overwrite)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, os.pread(log, 1 << 20, 0).decode().split()]), flush=True)
"""


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf")


@pytest.fixture
def sources(hf, tmp_path):
    """What each direction converts."""
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    return {"hf2mcore": hf, "mcore2hf": tmp_path / "mcore"}


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(filling, "BATCH_BYTES", 20_000)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stop_after(monkeypatch, count, error):
    """Raise `error` when a worker has read `count` runs of rows."""
    honest, left = HfAsMcore.slices, [count]

    def slices(self, step):
        for rows in honest(self, step):
            left[0] -= 1
            if left[0] < 0:
                raise error
            yield rows

    monkeypatch.setattr(HfAsMcore, "slices", slices)


@pytest.fixture
def unfinished(hf, tmp_path, monkeypatch, small_batches):
    """A conversion to `out` that was interrupted in its middle."""
    with monkeypatch.context() as patch:
        stop_after(patch, 25, KeyboardInterrupt())
        with pytest.raises(InterruptedRun, match=r"the same line with --resume goes on"):
            hf_to_mcore.convert(hf, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    return tmp_path / ".tmp-out"


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("direction", CONVERT)
def test_the_output_is_the_same_for_any_number_of_workers(sources, tmp_path, small_batches, direction, dtype):
    for workers in (1, 2, 5):
        CONVERT[direction](sources[direction], tmp_path / f"out-{workers}", workers=workers, dtype=dtype)
    first = contents(tmp_path / "out-1")
    assert len(first) > 3 and first == contents(tmp_path / "out-2") == contents(tmp_path / "out-5")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("direction", CONVERT)
def test_killed_at_any_moment_it_goes_on_without_redoing_what_was_complete(sources, tmp_path, direction, overwrite):
    # [1] [2] [4]
    out, whole = tmp_path / "out", tmp_path / "whole"
    CONVERT[direction](sources[direction], whole)
    if overwrite:
        (out / "old").mkdir(parents=True)
    moments = random.Random(f"{direction} {overwrite}").sample(range(5, 100), 8)
    line = json.dumps([direction, str(sources[direction]), str(out), [*moments, 10**6], overwrite])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, line], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    complete: set[str] = set()
    said, errors = child.communicate(timeout=120)
    ended = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
    statuses = [status for status, _ in ended]
    # With --resume a finished output is an output that exists already: the children after it end with an error. The
    # one that finished may itself have died after its last rename, so that nothing but the output says that it did.
    assert statuses.count(-9) >= 3, errors
    for status, filled in ended:
        if status in (0, -9):
            assert len(set(filled)) == len(filled)
            complete |= set(filled)
    assert contents(out) == contents(whole)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_batch_that_is_in_the_journal_is_not_filled_again(hf, tmp_path, unfinished, monkeypatch):
    complete = {json.loads(line)["done"] for line in (unfinished / JOURNAL_FILE).read_text().splitlines()[1:]}
    assert complete
    filled, honest = [], filling._Team.fill
    monkeypatch.setattr(filling._Team, "fill", lambda self, batch: [filled.append(batch.name), honest(self, batch)][1])
    hf_to_mcore.convert(hf, tmp_path / "out", resume=True)
    assert filled and complete.isdisjoint(filled)
    assert verify(hf, tmp_path / "out") == 51
    hf_to_mcore.convert(hf, tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_without_a_choice_an_unfinished_output_is_named_with_how_far_it_got(hf, tmp_path, unfinished):  # [1]
    before = contents(unfinished)
    with pytest.raises(UsageError, match=r"\.tmp-out, left unfinished .*\(\d+.\d kB of \d+.\d kB complete, .* old\)"):
        hf_to_mcore.convert(hf, tmp_path / "out")
    assert contents(unfinished) == before
    said = CliRunner().invoke(command, ["hf2mcore", str(hf), str(tmp_path / "out"), "--resume", "--restart"])
    assert "choose one" in str(said.exception)
    done = CliRunner().invoke(command, ["hf2mcore", str(hf), str(tmp_path / "out"), "--resume", "--workers", "3"])
    assert done.exit_code == 0 and "going on with it" in done.output


def test_restart_throws_it_away(hf, tmp_path, unfinished, capsys):
    (unfinished / "release" / "stale").touch()
    hf_to_mcore.convert(hf, tmp_path / "out", restart=True)
    assert "removing" in capsys.readouterr().out and not (tmp_path / "out" / "release" / "stale").exists()


def test_it_is_gone_on_with_only_when_nothing_changed(hf, tmp_path, unfinished):
    before = contents(unfinished)
    with pytest.raises(UsageError, match=r"it was begun with other --allow-nonfinite, --dtype; --restart"):
        hf_to_mcore.convert(hf, tmp_path / "out", resume=True, dtype="bf16", allow_nonfinite=True)
    os.utime(hf / "config.json", ns=(1, 1))
    with pytest.raises(UsageError, match=r"it was begun with other files of the source; --restart"):
        hf_to_mcore.convert(hf, tmp_path / "out", resume=True)
    assert contents(unfinished) == before


def test_resume_with_nothing_unfinished_begins(hf, tmp_path):
    hf_to_mcore.convert(hf, tmp_path / "out", resume=True)
    assert verify(hf, tmp_path / "out") == 51 and not (tmp_path / "out" / JOURNAL_FILE).exists()


@pytest.mark.parametrize("damage", ["cut", "file", "journal"])
def test_what_a_loss_of_power_took_is_done_again(hf, tmp_path, unfinished, damage):
    journal = unfinished / JOURNAL_FILE
    if damage == "cut":
        journal.write_text(journal.read_text()[:-5])
    elif damage == "file":
        (unfinished / "release" / "__0_0.distcp").unlink()
    else:
        journal.write_text("")
    hf_to_mcore.convert(hf, tmp_path / "out", resume=True)
    assert verify(hf, tmp_path / "out") == 51


def test_an_error_leaves_nothing_to_go_on_with(hf, tmp_path, monkeypatch, small_batches):  # [5] [6]
    stop_after(monkeypatch, 25, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left") as caught:
        hf_to_mcore.convert(hf, tmp_path / "out")
    assert caught.value.filename.endswith(".distcp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_what_differs_is_found_before_anything_is_published(sources, tmp_path, monkeypatch):  # [41]
    honest = filling._write

    def flipped(descriptor, content, start):
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        return honest(descriptor, memoryview(changed) if len(changed) > 2000 else content, start)

    for direction, convert in CONVERT.items():
        with monkeypatch.context() as patch:
            patch.setattr(filling, "_write", flipped)
            with pytest.raises(ValueError, match=r"differs from its source; nothing was published|damaged"):
                convert(sources[direction], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_cast_is_said(hf, tmp_path):  # [28]
    done = CliRunner().invoke(command, ["hf2mcore", str(hf), str(tmp_path / "out"), "--dtype", "bf16"])
    assert done.exit_code == 0 and "cast to bf16, read again and equal" in done.output
    shutil.rmtree(tmp_path / "out")
    done = CliRunner().invoke(command, ["hf2mcore", str(hf), str(tmp_path / "out")])
    assert done.exit_code == 0 and "cast to" not in done.output


def test_torch_is_left_with_the_threads_that_it_had(hf, tmp_path):
    before = torch.get_num_threads()
    hf_to_mcore.convert(hf, tmp_path / "out", workers=3)
    assert torch.get_num_threads() == before
    with pytest.raises(UsageError, match=r"--workers 0: choose 1 to 256"):
        hf_to_mcore.convert(hf, tmp_path / "other", workers=0)
    assert UNTIED["num_hidden_layers"] == 4
