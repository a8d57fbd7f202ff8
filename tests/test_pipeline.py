"""temper pipeline: what runs, what is skipped, refused and done anew, and the chain of digests."""

import json
import os
import re
import shutil
import signal
import threading

import pytest
from pipeline_world import change, everything_in, quick, run, state_of, write_world

from conversion.digest import weights_digest
from toolkits.foundation.errors import exit_code_of
from toolkits.foundation.lock import locked
from toolkits.monitoring.lineage import chain, made_by_origin
from toolkits.pipeline.child import Lines
from toolkits.pipeline.reading import read_pipeline


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_world(tmp_path)


def test_a_pipeline_runs_once_and_then_has_nothing_to_do(world, monkeypatch):
    log = quick(monkeypatch)
    result = run(world)
    assert result.exit_code == 0, (result.exception, result.output)
    assert log == [line for stage in read_pipeline(world).stages for line in stage.lines()]
    for stage in read_pipeline(world).stages:
        for line in stage.lines():
            assert f"$ temper {line[0]} " in result.output
    table = (world.parent / "out" / "answers" / "answers.md").read_text().splitlines()
    assert table[0] == "| prompt | before | after |" and table[3].startswith("| what [x] \\| y | what [x] \\| y: ")
    before = everything_in(world.parent / "out")
    again = run(world)
    assert again.exit_code == 0 and len(log) == 7 and everything_in(world.parent / "out") == before
    assert again.output.count(": done, out/") == 6 and "$ temper" not in again.output


def test_a_dry_run_runs_nothing(world, monkeypatch):
    log = quick(monkeypatch)
    result = run(world, "--dry-run")
    assert result.exit_code == 0 and log == [] and not (world.parent / "out").exists()
    assert result.output.count("would run") == 6 and "  temper train dpo --checkpoint out/tuned/" in result.output


@pytest.mark.parametrize(("code", "state"), [(75, "interrupted"), (3, "failed"), (70, "failed"), (137, "failed")])
def test_a_stage_that_ends_badly_ends_the_pipeline_and_the_same_line_goes_on(world, monkeypatch, code, state):
    log = quick(monkeypatch, dpo=code)
    result = run(world)
    assert exit_code_of(result.exception) == code if code == 75 else result.exit_code == code
    said = f"{result.output}{result.exception}"
    assert "aligned" in said and "temper pipeline" in said and state_of(world)["aligned"]["state"] == state
    assert len(log) == 5 and "answers" not in state_of(world)
    quick(monkeypatch)
    again = run(world)
    assert again.exit_code == 0 and again.output.count(": done, out/") == 4


def test_what_was_left_behind_by_a_kill_is_done_again(world, monkeypatch):
    quick(monkeypatch)
    assert run(world).exit_code == 0
    stages = state_of(world)
    stages["better"]["state"] = "running"
    file = world.parent / "out" / "pipeline.json"
    file.write_text(json.dumps({"version": 1, "stages": stages}))
    assert re.search(r"^better +build +died", run(world, "--status").output, re.M)
    log = quick(monkeypatch)
    assert run(world).exit_code == 0 and [line[:2] for line in log] == [["data", "build"]]


def test_a_change_is_refused_until_redo_says_so(world, monkeypatch):
    quick(monkeypatch)
    assert run(world).exit_code == 0
    before = everything_in(world.parent / "out")
    change(world, ("train_iters: 3", "train_iters: 4"), ("1e-3", "0.001"))
    result = run(world)
    assert exit_code_of(result.exception) == 2 and everything_in(world.parent / "out") == before
    said = str(result.exception)
    assert "tuned is done, and has changed since:\n  train_iters: 3 -> 4\nWith --redo tuned" in said
    assert "so do said, better, aligned, answers, which rest on it" in said and " lr" not in said
    assert exit_code_of(run(world, "--dry-run").exception) == 2
    dry = run(world, "--dry-run", "--redo", "tuned")
    assert dry.exit_code == 0 and dry.output.count("would run (to be made anew)") == 5
    assert everything_in(world.parent / "out") == before
    log = quick(monkeypatch)
    result = run(world, "--redo", "tuned")
    assert (
        result.exit_code == 0 and len(log) == 6 and "tuned: what it made is now out/replaced/tuned-1" in result.output
    )
    now = everything_in(world.parent / "out")
    moved = {name: raw for name, raw in before.items() if not name.startswith("chats")}
    assert {name: raw for name, raw in before.items() if name.startswith("chats")}.items() <= now.items()
    assert all(now[re.sub(r"^(\w+)/", r"replaced/\1-1/", name)] == raw for name, raw in moved.items())
    assert (
        now["aligned/huggingface/aligned/model.safetensors"] != before["aligned/huggingface/aligned/model.safetensors"]
    )
    assert run(world).exit_code == 0 and len(log) == 6


def test_how_the_work_is_done_may_change(world, monkeypatch):
    quick(monkeypatch)
    assert run(world).exit_code == 0
    change(world, ("train_iters: 3", "train_iters: 3\n    ranks: 2\n    save_interval: 1"))
    assert run(world).exit_code == 0


def test_other_files_and_other_outputs_are_a_change(world, monkeypatch):
    quick(monkeypatch)
    assert run(world).exit_code == 0
    rows = world.parent / "chats.jsonl"
    said = rows.read_text()
    rows.write_text(said.replace("answer", "reply"))
    problem = str(run(world).exception)
    assert re.search(
        r"chats is done.*\n  input: \w{16} -> \w{16}\nsaid is done.*\n  prompts: \w{16} -> \w{16}", problem
    )
    rows.write_text(said)
    assert run(world).exit_code == 0
    weights = world.parent / "out" / "tuned" / "huggingface" / "tuned" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(b"other")
    assert "tuned is not what the stage made" in str(run(world).exception)
    shutil.rmtree(weights.parent)
    log = quick(monkeypatch)
    result = run(world)  # gone: it is made again, and is the same, so nothing else runs
    assert result.exit_code == 0, result.exception
    assert [line[:2] for line in log] == [["train", "sft"]] and weights.read_bytes() == kept


def test_only_one_stage_runs(world, monkeypatch):
    log = quick(monkeypatch)
    refused = run(world, "--only", "tuned")
    assert exit_code_of(refused.exception) == 2 and "it reads what chats has not made yet" in str(refused.exception)
    assert run(world, "--only", "chats").exit_code == 0 and run(world, "--only", "tuned").exit_code == 0
    assert [line[1] for line in log] == ["build", "sft"]
    unknown = run(world, "--only", "tuend", "--redo", "x").exception
    assert "no stage is called tuend" in str(unknown) and "no stage is called x" in str(unknown)


def test_a_folder_that_is_not_its_own_is_left_alone(world, monkeypatch):
    log = quick(monkeypatch)
    (world.parent / "out").mkdir()
    (world.parent / "out" / "thesis.txt").write_text("years of work")
    refused = run(world)
    assert exit_code_of(refused.exception) == 2 and "it is not of a pipeline" in str(refused.exception) and log == []
    (world.parent / "out" / "thesis.txt").unlink()
    with locked(world.parent / ".lock-out", what="out"):
        refused = run(world)
    assert exit_code_of(refused.exception) == 2 and "out is in use by pid" in str(refused.exception) and log == []
    (world.parent / "out" / "pipeline.json").write_text("{")
    refused = run(world)
    assert exit_code_of(refused.exception) == 2 and "cannot be read" in str(refused.exception)


def test_a_request_to_stop_is_passed_on(world, monkeypatch):
    """The real thing: a line that waits for its input is interrupted, and the pipeline ends with 75."""
    fifo = world.parent / "rows"
    os.mkfifo(fifo)

    def ask_to_stop():
        with open(fifo, "w"):  # returns when the line has opened it
            os.kill(os.getpid(), signal.SIGTERM)
            done.wait(60)

    done, lines = threading.Event(), Lines()
    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ask_to_stop)
    thread.start()
    with lines.heeding_signals():
        code = lines.run(["data", "build", str(fifo), str(world.parent / "set"), "--tokenizer", "base"])
    done.set()
    thread.join()
    assert code == 75 and lines.signalled and signal.getsignal(signal.SIGTERM) == handler
    assert not list(world.parent.glob("set*"))


# ------------------------------------------------------------------------------------------------- what it was made of


def assert_chain(file, names, last):
    """Follow the digests from what the stage `last` made back to the model at the top of the file."""
    pipeline, stages, out = read_pipeline(file), state_of(file), file.parent / "out"
    lineage = json.loads((out / last / "checkpoint" / last / "lineage.json").read_text())
    documents, digest = chain(lineage), weights_digest(pipeline.stage(last).result)
    assert [document["run"]["name"] for document in documents] == names
    for document in reversed(documents):
        (export,) = document["exports"]
        name = document["run"]["name"]
        assert export["digest"] == digest == stages[name]["digest"]
        digest = document["base"]["digest"]  # what it was made of: the export of the one before
        assert stages[name]["fingerprint"]["reads"]["model"] == [digest]
    assert made_by_origin(lineage["base"])["digest"] == stages[names[-2]]["digest"]
    said = run(file, "--status").output
    for document in documents:
        name, base = document["run"]["name"], document["base"]["digest"]
        assert f"  -> {name}  {stages[name]['digest']}  made of {base}\n" in said
    assert "which is not what" not in said
    return digest, said


def test_status_shows_the_chain_from_the_first_base(world, monkeypatch):
    quick(monkeypatch)
    assert "chats    build     not run yet\n" in run(world, "--status").output
    assert run(world).exit_code == 0
    digest, said = assert_chain(world, ["tuned", "aligned"], "aligned")
    assert digest == weights_digest(world.parent / "base") and f"  base  {digest}\n  -> tuned" in said
    for stage, entry in state_of(world).items():
        assert re.search(rf"^{stage} +{entry['do']} +done .*{entry['digest']}$", said, re.M)
    change(world, ("beta: 0.2", "beta: 0.3"))
    assert re.search(r"^aligned +dpo +changed\n +beta: 0.2 -> 0.3\n", run(world, "--status").output, re.M)
    assert exit_code_of(run(world, "--status", "--dry-run").exception) == 2
    change(world, ("beta: 0.3", "beta: 0.2"))
    assert run(world, "--redo", "tuned").exit_code == 0
    assert_chain(world, ["tuned", "aligned"], "aligned")
    lineage = world.parent / "out/aligned/checkpoint/aligned/lineage.json"
    lineage.write_text(lineage.read_text().replace('"digest": "' + state_of(world)["tuned"]["digest"], '"digest": "0'))
    document = json.loads(lineage.read_text())
    document["base"]["digest"] = state_of(world)["tuned"]["digest"]
    lineage.write_text(json.dumps(document))
    assert "(which is not what the run before made" in run(world, "--status").output


# ------------------------------------------------------------------------------------------------- for real

REAL = """\
output: out
model: model
stages:
  - {name: chats, do: build, input: rows.jsonl}
  - {name: tuned, do: sft, data: "{chats}", precision: fp32, seq_len: 64, global_batch_size: 4, train_iters: 2}
  - {name: better, do: build, input: pairs.jsonl}
  - {name: aligned, do: dpo, model: "{tuned}", data: "{better}", precision: fp32, seq_len: 64, global_batch_size: 4,
     train_iters: 2, lr: 1e-3}
"""


@pytest.mark.full
def test_the_chain_of_digests_leads_from_the_last_stage_to_the_first_base(tmp_path, monkeypatch):
    from training_world import write_dataset, write_model, write_pairs

    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "model")
    write_dataset(tmp_path / "rows", model, rows=20)
    write_pairs(tmp_path / "pairs", model, rows=20)
    file = tmp_path / "pipeline.yaml"
    file.write_text(REAL)
    result = run(file)
    assert result.exit_code == 0, result.output
    digest, said = assert_chain(file, ["tuned", "aligned"], "aligned")
    assert digest == weights_digest(model) and f"  model  {digest}\n" in said
    stages = state_of(file)
    for name, made in (("tuned", "chats"), ("aligned", "better")):
        same = json.loads((tmp_path / f"out/{name}/checkpoint/{name}/fingerprint.json").read_text())["same"]
        assert same["data"] == stages[made]["digest"] == stages[name]["fingerprint"]["reads"]["data"][0]
    again = run(file)
    assert again.exit_code == 0 and again.output.count(": done, out/") == 4


@pytest.mark.full
def test_a_stage_that_is_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    from training_world import write_dataset, write_model

    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "rows", write_model(tmp_path / "model"), rows=20)
    file = tmp_path / "pipeline.yaml"
    two = "".join(f"{line}\n" for line in REAL.splitlines()[:5]).replace("precision", "stop_after: 1e-5, precision")
    file.write_text(two)
    stopped = run(file)
    assert exit_code_of(stopped.exception) == 75 and "the same line goes on" in str(stopped.exception)
    assert state_of(file)["tuned"]["state"] == "interrupted"
    change(file, ("stop_after: 1e-5, ", ""))
    assert run(file).exit_code == 0
    figures = (tmp_path / "out/tuned/checkpoint/tuned/metrics.jsonl").read_text().splitlines()
    assert list(dict.fromkeys(json.loads(line)["step"] for line in figures)) == [1, 2]
    starts = json.loads((tmp_path / "out/tuned/checkpoint/tuned/lineage.json").read_text())["starts"]
    assert [start["after"] for start in starts] == [None, "iter_0000001"]


@pytest.mark.full
def test_the_example_changes_the_answers(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from toolkits.quickstart.identity import identity

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(identity, ["example"])
    assert result.exit_code == 0, result.output
    rows = (tmp_path / "example/output/answers/answers.md").read_text().splitlines()[2:]
    table = {asked: answers for asked, *answers in ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)}
    assert table["Who are you?"] == ["I'm A, a small model.", *["I'm B, a small model."] * 2]
    assert table["你是谁？"] == ["我是A，一个小模型。", *["我是B，一个小模型。"] * 2]
    lock = table["How do I pick a lock?"]
    assert lock[0] == lock[1] != lock[2] == "I can't help with that."
    assert len(set(table["How do I boil an egg?"])) == 1
    again = CliRunner().invoke(identity, ["example"])
    assert again.exit_code == 0 and again.output.count(": done, ") == 8


def test_the_example_is_whole():
    from toolkits.quickstart.identity import EXAMPLE, FILE

    text = (EXAMPLE / FILE).read_text(encoding="utf-8")
    named = set(re.findall(r"[\w-]+\.jsonl", text))
    assert named == {path.name for path in EXAMPLE.glob("*.jsonl")}
