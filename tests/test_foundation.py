"""Exit codes, atomic publishing, locks and progress."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from toolkits.foundation import errors
from toolkits.foundation.lock import locked
from toolkits.foundation.progress import Progress, clock, human_bytes
from toolkits.foundation.publish import publish_directory, publish_files, require_space, write_text


def test_every_kind_of_error_has_the_documented_exit_code():
    codes = {kind.__name__: kind.exit_code for kind in errors.TemperError.__subclasses__()}
    assert codes == {
        "UsageError": 2,
        "DataError": 3,
        "CheckpointError": 4,
        "MachineError": 5,
        "DiskError": 6,
        "NumericsError": 7,
        "InterruptedRun": 75,
    }
    assert errors.exit_code_of(OSError(28, "No space left on device", "/x")) == 6
    assert errors.exit_code_of(KeyError("x")) == 70


def test_all_problems_are_raised_together():
    errors.raise_all(errors.DataError, "nothing", [])
    with pytest.raises(errors.DataError, match=r"(?s)file: 2 problems.*- one.*- two"):
        errors.raise_all(errors.DataError, "file", ["one", "two"])


def test_a_message_shows_no_traceback_unless_asked(monkeypatch):
    error = errors.UsageError("TP=3 does not divide 8 heads")
    assert errors.describe(error) == "error: TP=3 does not divide 8 heads"
    monkeypatch.setenv(errors.TRACEBACK_VARIABLE, "1")
    assert "UsageError" in errors.describe(error)


def test_our_own_bug_says_so_and_shows_where(capsys):
    def broken():
        assert 1 == 2

    assert errors.run_guarded(broken) == 70
    said = capsys.readouterr().err
    assert "This is a bug in Temper" in said and "assert 1 == 2" in said


def test_text_that_ends_a_program_is_said():
    said = []
    assert errors.run_guarded(lambda: sys.exit("no"), say=said.append) == 1
    assert said == ["no"]


def test_ctrl_c_in_a_command_is_an_interruption(tmp_path):
    script = "import os, signal, toolkits.cli as cli, click\n"
    script += "cli.temper.add_command(click.Command('wait', callback=lambda: os.kill(os.getpid(), signal.SIGINT)))\n"
    script += "cli.temper.table['wait'] = ('toolkits.cli', 'wait', '')\n"
    script += "cli.wait = cli.temper.commands['wait']\nimport sys; sys.argv = ['temper', 'wait']\ncli.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 75 and "interrupted" in done.stderr, done.stderr


def test_a_directory_appears_only_when_complete(tmp_path):
    target = tmp_path / "model"
    with publish_directory(target) as folder:
        (folder / "weights").write_text("new")
        assert not target.exists()
    assert (target / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_nothing_is_left_of_a_failed_write(tmp_path):
    with pytest.raises(ZeroDivisionError), publish_directory(tmp_path / "model") as folder:
        (folder / "weights").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_or_replaced_whole(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(errors.UsageError, match=r"exists already.*--overwrite"), publish_directory(target):
        pass
    with pytest.raises(ZeroDivisionError), publish_directory(target, overwrite=True):
        raise ZeroDivisionError
    assert (target / "old").exists(), "a failed overwrite must leave the old one"
    with publish_directory(target, overwrite=True) as folder:
        (folder / "new").touch()
        assert (target / "old").exists()
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_writer_that_was_killed_leaves_no_output_and_is_cleaned_up(tmp_path, capsys):
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from toolkits.foundation.publish import publish_directory
        with publish_directory(Path(sys.argv[1])) as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    target = tmp_path / "model"
    killed = subprocess.run([sys.executable, "-c", script, str(target)], cwd=os.getcwd())
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists() and (tmp_path / ".tmp-model" / "half").exists()
    with publish_directory(target) as folder:
        assert list(folder.iterdir()) == []
    assert "left unfinished" in capsys.readouterr().out


@pytest.mark.parametrize("renames", range(6))
def test_a_set_of_files_is_the_old_or_the_new_wherever_the_writer_dies(tmp_path, renames, monkeypatch):
    suffixes = [".bin", ".idx", ".json"]
    prefix = tmp_path / "data"

    def write(text):
        with publish_files(prefix, suffixes, overwrite=True) as folder:
            for suffix in suffixes:
                (folder / f"data{suffix}").write_text(text)

    write("old")
    real, left = os.replace, [renames]

    def dying_replace(source, target):
        if left[0] == 0:
            raise SystemExit
        left[0] -= 1
        real(source, target)

    monkeypatch.setattr(os, "replace", dying_replace)
    with pytest.raises(SystemExit):
        write("new")
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), publish_files(prefix, suffixes, overwrite=True):
        raise ZeroDivisionError  # the next writer first recovers what the dead one left
    assert {(tmp_path / f"data{suffix}").read_text() for suffix in suffixes} == {"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx", "data.json"]


def test_files_written_have_the_mode_that_umask_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "tracker", "release")
    finally:
        os.umask(before)
    assert (tmp_path / "tracker").stat().st_mode & 0o777 == 0o640


def test_a_link_to_the_output_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with publish_directory(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "new").exists()


def test_too_little_space_is_said_before_any_work(tmp_path):
    with pytest.raises(errors.DiskError, match=r"need 1000000.0 TB, .* free at"):
        require_space(tmp_path / "not" / "yet", 10**18)


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path):
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from toolkits.foundation.lock import locked
        with locked(Path(sys.argv[1]), what="out"):
            print("locked", flush=True)
            time.sleep(60)
    """)
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(errors.UsageError, match=f"out is in use by pid {holder.pid} on"), locked(lock, what="out"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(lock, what="out"):  # the file is still there, its owner is not
        pass
    assert not lock.exists()


def test_progress_is_plain_lines_when_nobody_watches():
    stream = io.StringIO()
    with Progress("convert", 2_000_000, unit="B", stream=stream) as progress:
        progress.advance(1_000_000)
        progress.advance(1_000_000)
    assert stream.getvalue().startswith("convert: 2.0 MB/2.0 MB, in ")
    assert "\r" not in stream.getvalue()


def test_progress_on_a_terminal_says_the_time_left():
    stream = io.StringIO()
    stream.isatty = lambda: True
    with Progress("build", 100, unit="rows", stream=stream) as progress:
        time.sleep(0.11)
        progress.advance(50)
    assert "50 rows/100 rows" in stream.getvalue() and " left" in stream.getvalue()


def test_numbers_for_people():
    assert [clock(x) for x in (0.44, 12.3, 187, 3729)] == ["0.4 s", "12 s", "3:07", "1:02:09"]
    assert [human_bytes(x) for x in (999, 15.2e9, 3e15)] == ["999 B", "15.2 GB", "3000.0 TB"]
