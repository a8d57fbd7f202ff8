"""What a run says of itself, and what `temper runs` makes of it: states, damage, places, curve."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from toolkits.cli import temper
from toolkits.foundation.errors import CheckpointError, DataError, InterruptedRun, UsageError
from toolkits.foundation.process import this_process
from toolkits.monitoring import record as record_module
from toolkits.monitoring.plot import draw
from toolkits.monitoring.record import RECORD, RunRecord, conclude, recorded
from toolkits.monitoring.runs import DIED, SILENT, Run, Unreadable, find_run, find_runs, read_run
from toolkits.monitoring.series import SHOWN, Series

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {"steps": 100}


def run_folder(out, name="sft"):
    folder = out / "checkpoint" / name
    folder.mkdir(parents=True)
    return folder


def write_record(out, name="sft", **changes):
    """Leave the record of a run that ended well, changed."""
    folder = run_folder(out, name)
    with recorded(folder, about=ABOUT, measure=dict):
        pass
    content = json.loads((folder / RECORD).read_text()) | changes
    (folder / RECORD).write_text(json.dumps(content))
    return folder


def wait_for(what, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_of(folder):
    return json.loads((folder / RECORD).read_text())["state"]


def test_a_record_follows_the_run_from_start_to_end(tmp_path):
    folder = run_folder(tmp_path)
    with recorded(folder, about=ABOUT, measure=lambda: {"rank_bytes": 5}) as record:
        assert state_of(folder) == "starting"
        record.enter("running")
        wait_for(lambda: state_of(folder) == "running")
        with record.doing("saving"):
            wait_for(lambda: state_of(folder) == "saving")
        wait_for(lambda: state_of(folder) == "running")
        record.update(step=7, eta_seconds=3.5)
    run = read_run(folder)
    assert (run.state, run.step, run.steps, run.eta) == ("finished", 7, 100, None)
    assert run.content["use"] == {"rank_bytes": 5} and run.content["process"]["pid"] == os.getpid()
    assert json.loads((tmp_path / RECORD).read_text()) == run.content


def test_a_record_is_renewed_while_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "INTERVAL", 0.05)
    folder = run_folder(tmp_path)
    with recorded(folder, about=ABOUT, measure=dict):
        first = read_run(folder)
        wait_for(lambda: read_run(folder).updated > first.updated)
        assert read_run(folder).progressed == first.progressed


@pytest.mark.parametrize(
    ("error", "state", "ending"),
    [
        (InterruptedRun("saved"), "interrupted", ("InterruptedRun", 75, "saved")),
        (DataError("row 3"), "failed", ("DataError", 3, "row 3")),
        (RuntimeError("boom"), "failed", ("RuntimeError", 70, "RuntimeError: boom")),
    ],
)
def test_a_record_says_how_the_run_ended(tmp_path, error, state, ending):
    folder = run_folder(tmp_path)
    with pytest.raises(type(error)), recorded(folder, about=ABOUT, measure=dict) as record, record.doing("saving"):
        raise error
    run = read_run(folder)
    assert run.state == state
    assert tuple(run.content["ending"][name] for name in ("kind", "exit_code", "message")) == ending


def test_the_launcher_has_the_last_word_on_its_own_job_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPER_LAUNCH", "ours")
    folder = write_record(tmp_path, state="running")
    conclude(folder, "theirs", 5, "not ours")
    assert state_of(folder) == "running"
    conclude(folder, "ours", 5, "rank 1: error: out of memory")
    ending = {"kind": "MachineError", "exit_code": 5, "message": "rank 1: error: out of memory"}
    for place in (folder, tmp_path):
        content = json.loads((place / RECORD).read_text())
        assert (content["state"], content["ending"]) == ("failed", ending)
    conclude(folder, "ours", 75, "a node fell silent")
    assert state_of(folder) == "interrupted"
    conclude(tmp_path / "nowhere", "ours", 5, "it never had a record")


def test_out_has_the_record_of_the_run_that_started_last(tmp_path):
    first = RunRecord(run_folder(tmp_path, "first"), about=ABOUT, measure=dict)
    second = RunRecord(run_folder(tmp_path, "second"), about=ABOUT, measure=dict)
    second.close("finished")
    first.publish("lineage.json", "of the first")
    first.close("failed")
    assert json.loads((tmp_path / RECORD).read_text())["name"] == "second"
    assert not (tmp_path / "lineage.json").exists()
    assert {run.name: run.state for run in find_runs(tmp_path)} == {"first": "failed", "second": "finished"}


def test_a_record_that_cannot_be_written_is_said_and_stops_nothing(tmp_path, capfd):
    folder = run_folder(tmp_path)
    with recorded(folder, about=ABOUT, measure=dict) as record:
        (folder / RECORD).unlink()
        (folder / RECORD).mkdir()
        for _ in range(2):
            record.publish(RECORD, "{}")
    assert capfd.readouterr().err.count(f"warning: {folder / RECORD} cannot be written") == 1


KILLED = """
import sys, time
from pathlib import Path
from toolkits.monitoring.record import RunRecord
RunRecord(Path(sys.argv[1]), about={"steps": 9}, measure=dict).enter("running")
time.sleep(60)
"""


def test_a_killed_run_died_even_before_its_parent_notices(tmp_path):
    folder = run_folder(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait_for(lambda: (folder / RECORD).exists() and read_run(folder).state == "running", 30)
    finally:
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: read_run(folder).state == DIED)
    assert state_of(folder) == "running", "nobody was left to write"
    process.wait()  # until here it was a zombie
    assert read_run(folder).state == DIED


def test_a_number_given_to_another_process_is_not_the_run(tmp_path):
    us = vars(this_process())
    assert read_run(write_record(tmp_path / "a", state="running", process=us)).state == "running"
    other = us | {"started": us["started"] - 1}
    assert read_run(write_record(tmp_path / "b", state="running", process=other)).state == DIED


@pytest.mark.parametrize(
    ("host", "seconds", "state"), [("far", 5, "running"), ("far", 3600, SILENT), (this_process().host, 3600, DIED)]
)
def test_a_run_of_another_machine_is_judged_by_its_silence(tmp_path, host, seconds, state):
    process = {"host": host, "machine": "another", "pid": os.getpid(), "started": 1}
    updated = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()
    assert read_run(write_record(tmp_path, state="running", process=process, updated=updated)).state == state


DAMAGES = ["", "{", "[]", "null", "7", '{"version": 1}', '{"version": "x"}', "\x00\xff"]


def invoke(*words, **keywords):
    return CliRunner().invoke(temper, ["runs", *map(str, words)], **keywords)


@pytest.mark.parametrize("text", DAMAGES)
def test_a_damaged_record_is_listed_as_such(tmp_path, text):
    write_record(tmp_path, "good")
    bad = run_folder(tmp_path, "bad")
    (bad / RECORD).write_bytes(text.encode("latin-1"))
    result = invoke(tmp_path)
    assert result.exit_code == 0 and f"{bad}: run.json is damaged" in result.output.replace("\n", "")
    assert "unreadable" in result.output and "good" in result.output
    with pytest.raises(CheckpointError, match=r"run.json is damaged.*metrics.jsonl beside it"):
        find_run("bad", tmp_path)


@pytest.mark.parametrize("name", ["process", "started", "steps", "loss", "state", "tokens_per_second"])
@pytest.mark.parametrize("value", [None, [], {}, "x", -1])
def test_no_wrong_value_ends_in_a_traceback(tmp_path, name, value):
    folder = write_record(tmp_path, **{name: value})
    assert isinstance(read_run(folder), Run | Unreadable)
    assert invoke(tmp_path).exit_code == 0
    result = invoke("show", "sft", tmp_path)
    assert result.exception is None or isinstance(result.exception, CheckpointError)


@pytest.mark.parametrize("name", ["use", "layout", "versions", "ending", "log", "commit", "trained_tokens"])
def test_show_survives_wrong_facts(tmp_path, name):
    write_record(tmp_path, **{name: ["?"]})
    assert invoke("show", "sft", tmp_path).exit_code == 0


def test_a_newer_format_is_named(tmp_path):
    run = read_run(write_record(tmp_path, version=99))
    assert "written by a newer Temper (format 99)" in run.problem


def test_runs_are_found_from_every_folder_above_them(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    write_record(out)
    for root in (tmp_path, out.parent, out, out / "checkpoint", out / "checkpoint" / "sft"):
        assert [run.folder for run in find_runs(root)] == [out / "checkpoint" / "sft"]
    assert find_runs(ROOT / "toolkits") == []
    assert "there is no run (OUT/checkpoint/NAME/run.json" in invoke(ROOT / "toolkits").output
    assert invoke(tmp_path / "nowhere").exit_code == 2


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    for name in ("finetune-3B-lr-1e-5", "finetune-7B-lr-1e-5", "other"):
        write_record(tmp_path / "one", name)
    assert find_run("7B", tmp_path).name == "finetune-7B-lr-1e-5"
    with pytest.raises(
        UsageError, match=r"no run fintune-7B-lr-1e-5 under .*; there is finetune-7B-lr-1e-5, finetune-3B"
    ):
        find_run("fintune-7B-lr-1e-5", tmp_path)
    with pytest.raises(UsageError, match=r"(?s)finetune fits 2 runs.*one/checkpoint/finetune-3B"):
        find_run("finetune", tmp_path)
    with pytest.raises(UsageError, match="there is no run"):
        find_run("x", ROOT / "toolkits")
    write_record(tmp_path / "two", "other")
    with pytest.raises(UsageError, match="other fits 2 runs"):
        find_run("other", tmp_path)
    assert find_run("other", tmp_path / "two").folder.parent.parent == tmp_path / "two"


def test_json_has_what_the_file_says_and_the_state_as_it_is(tmp_path):
    process = vars(this_process()) | {"started": 1}
    folder = write_record(tmp_path, state="running", process=process, loss={"newest": 2.5, "history": [[1, 2.5]]})
    (bad := run_folder(tmp_path, "bad")).joinpath(RECORD).write_text("{")
    listed = json.loads(invoke("--json", tmp_path).output)
    assert [(run["name"], run["state"]) for run in listed] == [("sft", DIED), ("bad", "unreadable")]
    assert listed[0]["loss"]["newest"] == 2.5 and listed[1]["folder"] == str(bad) and "damaged" in listed[1]["problem"]
    shown = json.loads(invoke("show", "sft", tmp_path, "--json").output)
    assert (shown["state"], shown["folder"]) == (DIED, str(folder)) and "cannot be read" in shown["lineage"]


def test_the_list_and_the_curve_work_in_a_pipe_and_without_colour(tmp_path):
    long = "finetune-mcore-qwen2.5-7B-" + "x" * 120
    points = [[step, 3 - step / 100] for step in range(1, 101)]
    loss = {"newest": 2.0, "lowest": 2.0, "history": points}
    ending = {"kind": "DataError", "exit_code": 3, "message": "row 3 is [bold]bad[/]"}
    write_record(tmp_path, long, step=100, loss=loss, state="failed", ending=ending)
    for words in ([], ["show", "finetune"]):
        command = [sys.executable, "-m", "toolkits.cli", "runs", *words, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "FORCE_COLOR": "", "NO_COLOR": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout and "failed" in done.stdout and long in done.stdout
    assert "DataError, exit code 3: row 3 is [bold]bad[/]" in done.stdout
    assert "mend what the message says" in done.stdout
    assert sum(any(0x2800 < ord(sign) <= 0x28FF for sign in line) for line in done.stdout.splitlines()) >= 10


def test_a_falling_curve_falls_from_corner_to_corner():
    lines = draw([(0, 1.0), (50, 0.5), (100, 0.0)], [(100, 0.5)], width=52, height=5)
    curve = [line.split("│")[1] for line in lines[:5]]
    firsts = [next(i for i, sign in enumerate(line) if ord(sign) > 0x2800) for line in curve]
    assert firsts == sorted(firsts) and firsts[0] == 0 and all(len(line) <= 52 for line in lines)
    assert curve[2].endswith("o") and "1" in lines[0].split("│")[0] and "0" in lines[4].split("│")[0]
    assert lines[-1].split() == ["0", "100"]


def test_a_curve_of_one_point_and_of_none():
    assert draw([], [], width=80) == []
    assert len(draw([(3, 2.0)], [], width=80, height=4)) == 6


def test_a_long_series_is_thinned_with_both_ends():
    series = Series()
    for step in range(1, 100_001):
        series.add(step, 1 / step if step != 500 else float("nan"))
    summary = series.summary()
    assert len(summary["history"]) <= SHOWN + 1
    assert summary["history"][0] == [1, 1.0] and summary["history"][-1] == [100_000, 1e-5]
    assert summary["newest"] == summary["lowest"] == 1e-5
    assert Series().summary() == {"newest": None, "lowest": None, "history": []}
    json.dumps(summary, allow_nan=False)


def test_help_loads_nothing_heavy():
    script = """
import sys
from toolkits.cli import temper
try:
    temper(["runs", "--help"])
except SystemExit:
    print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "show" in done.stdout
    assert not {"torch", "numpy", "rich", "psutil"} & set(done.stdout.splitlines()[-1].split())


def test_listing_runs_loads_no_torch(tmp_path):
    write_record(tmp_path)
    script = f"""
import sys
from toolkits.cli import temper
temper(["runs", "show", "sft", {str(tmp_path)!r}], standalone_mode=False)
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy"} & set(done.stdout.splitlines()[-1].split())


def test_a_launchers_line_is_written_as_it_can_be_typed_again():
    from toolkits.launch.__main__ import _typed
    from toolkits.launch.arguments import LAUNCHERS
    from toolkits.launch.reading import read_call

    words = "dsw 7B 1 8 1e-5 1e-6 128 128 bf16 1 1 1 true true true true false false 100 DATA VALID CKPT 1000 100"
    call = read_call(LAUNCHERS["qwen"], [*words.split(), "my out"], {"EPOCHS": "2", "EXTRA_ARGS": "--seed 3", "X": "y"})
    line = f"sh run_scripts/run_mcore_qwen.sh {words} 'my out'"
    assert _typed(call).endswith(" " + line)
    assert set(shlex.split(_typed(call).removesuffix(line))) == {"EPOCHS=2", "EXTRA_ARGS=--seed 3"}
