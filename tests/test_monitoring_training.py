"""What real runs leave for those who watch them: states, lineage, trackers."""

import importlib.util
import json
import re
import signal
import subprocess
import time

import psutil
import pytest
from training_world import ROOT, finished, start, write_dataset, write_model

from toolkits.monitoring.lineage import made_by_origin
from toolkits.monitoring.runs import DIED, find_run, find_runs, read_run

STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    model = write_model(folder / "model")
    return {"model": model, "data": write_dataset(folder / "data", model, rows=40)}


def settings(inputs, output, **changes):
    return {
        "checkpoint": inputs["model"],
        "data": inputs["data"],
        "output": output,
        "seq_len": 128,
        "global_batch_size": 4,
        "train_iters": STEPS,
        "save_interval": 2,
        "lr": 1e-3,
        "precision": "fp32",
    } | changes


def train(words, **keywords):
    code, out, err = finished(start(words, **keywords))
    assert code == 0, err
    return out


def wait_for(what, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state_of(folder):
    return read_run(folder).state if (folder / "run.json").exists() else None


@pytest.fixture(scope="module")
def first(inputs, tmp_path_factory):
    """A whole run with its export: (OUT, its settings)."""
    out = tmp_path_factory.mktemp("first") / "out"
    tracker = "wandb" if importlib.util.find_spec("wandb") else "none"
    words = settings(inputs, out, export_hf=True, name="first", tracker=tracker)
    train(words)
    return out, words


def test_a_finished_run_says_what_it_was(first):
    out = first[0]
    run = find_run("first", out)
    assert (run.state, run.step, run.steps, run.eta) == ("finished", STEPS, STEPS, None)
    content = run.content
    assert json.loads((out / "run.json").read_text()) == content
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [figures for figures in metrics if "loss" in figures]
    assert run.losses == [(figures["step"], figures["loss"]) for figures in steps] and len(run.losses) == STEPS
    assert [step for step, _ in run.validation] == [2, 4]
    assert content["trained_tokens"] == sum(figures["trained_tokens"] for figures in steps)
    assert run.rate == steps[-1]["tokens"] / steps[-1]["seconds"]
    assert content["layout"]["text"] == "TP1 PP1 DP1" and content["precision"] == "fp32"
    assert content["line"].startswith("temper train sft --checkpoint ") and content["line"].endswith("--ranks 1")
    assert content["versions"]["megatron-core"].startswith("0.16") and content["use"]["rank_bytes"] > 1e7
    checkout = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if checkout.returncode == 0:
        assert content["commit"].removesuffix("-dirty") == checkout.stdout.strip()
    assert content["log"] == str(next((out / "log").iterdir()))


def test_the_lineage_names_base_data_steps_and_export(inputs, first):
    out = first[0]
    document = json.loads((out / "lineage.json").read_text())
    assert document["base"]["path"] == str(inputs["model"]) and document["base"]["origin"] is None
    ((data,),) = [start["data"] for start in document["starts"]]
    assert data["uses"] == ["training", "validation"] and data["rows"] == 40
    assert data["manifest"]["input"]["name"] == "data.jsonl"
    assert [step["folder"] for step in document["steps"]] == ["iter_0000002", "iter_0000004"]
    (export,) = document["exports"]
    assert export["folder"] == str(out / "huggingface" / "first") and export["step"] == "iter_0000004"
    assert json.loads((out / "huggingface" / "first" / "temper_lineage.json").read_text()) == document


def test_a_run_from_an_export_knows_where_it_comes_from(inputs, first, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # to read it here, as the run does for itself
    pytest.importorskip("mlflow")
    out = tmp_path / "out"
    train(settings(inputs, out, checkpoint=first[0] / "huggingface" / "first", name="second", tracker="mlflow"))
    document = json.loads((out / "lineage.json").read_text())
    assert document["base"]["origin"]["run"]["name"] == "first"
    assert made_by_origin(document["base"])["step"] == "iter_0000004"
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(out / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("temper").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["seq_len"] == "128" and run.data.tags["group"] == "second"
    logged = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert logged == find_run("second", out).losses
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "validation/loss")] == [2, 4]


def test_going_on_with_a_finished_run_leaves_it_finished(first):
    out, words = first
    before = find_run("first", out)
    assert "steps are done" in train(words)
    after = find_run("first", out)
    assert (after.state, after.step, after.losses) == ("finished", STEPS, before.losses)
    assert after.started > before.started
    document = json.loads((out / "lineage.json").read_text())
    assert len(document["starts"]) == 1 and len(document["exports"]) == 1


def test_a_long_validation_looks_alive_and_a_stop_is_an_interruption(inputs, tmp_path):
    valid = write_dataset(tmp_path / "valid", inputs["model"], rows=12_000)
    folder = tmp_path / "out" / "checkpoint" / "sft"
    process = start(settings(inputs, tmp_path / "out", valid_data=valid, save_interval=1), ranks=2)
    try:
        wait_for(lambda: state_of(folder) == "validating")
        seen = read_run(folder)
        wait_for(lambda: read_run(folder).updated > seen.updated, 10)
        assert state_of(folder) == "validating" and read_run(folder).progressed == seen.progressed
        process.send_signal(signal.SIGTERM)
    finally:
        code, _, err = finished(process)
    run = read_run(folder)
    assert code == 75, err
    assert run.state == "interrupted" and run.content["ending"]["exit_code"] == 75
    assert re.search(r"stopped after step 1 of 4, saved as .*; the same line goes on", run.content["ending"]["message"])
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == run.content


def test_a_failure_has_its_kind_and_its_message(inputs, tmp_path):
    words = settings(inputs, tmp_path / "out", train_iters=10**9, keep_last=10**9, save_interval=1)
    code, _, err = finished(start(words))
    (run,) = find_runs(tmp_path)
    assert code == 6 and run.state == "failed"
    ending = run.content["ending"]
    assert (ending["kind"], ending["exit_code"]) == ("DiskError", 6) and ending["message"] in err


def test_a_rank_that_is_killed_is_named_in_the_record(inputs, tmp_path):
    process = start(settings(inputs, tmp_path / "out", train_iters=10_000, save_interval=0), ranks=2)
    folder = tmp_path / "out" / "checkpoint" / "sft"
    try:
        wait_for(lambda: state_of(folder) == "running")
        children = psutil.Process(process.pid).children(recursive=True)
        (other,) = [child for child in children if child.environ().get("RANK") == "1"]
        other.kill()
    finally:
        code, _, _ = finished(process)
    run = read_run(folder)
    assert (code, run.state, run.content["ending"]["exit_code"]) == (137, "failed", 137)
    assert "rank 1 was killed by signal 9" in run.content["ending"]["message"]


def test_a_run_whose_launcher_is_killed_died(inputs, tmp_path):
    process = start(settings(inputs, tmp_path / "out", train_iters=10_000, save_interval=0))
    folder = tmp_path / "out" / "checkpoint" / "sft"
    try:
        wait_for(lambda: state_of(folder) == "running")
    finally:
        process.kill()
        process.communicate()
    wait_for(lambda: state_of(folder) == DIED, 10)


def test_wandb_writes_offline(first):
    pytest.importorskip("wandb")
    written = min((first[0] / "wandb").glob("offline-run-*/*.wandb"))  # of its first start
    assert b"train/loss" in written.read_bytes() and b"validation/loss" in written.read_bytes()


def test_a_missing_tracker_is_known_before_a_model_is(inputs, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise ImportError('no wandb here')")
    words = settings(inputs, tmp_path / "out", tracker="wandb")
    code, out, err = finished(start(words, PYTHONPATH=f"{tmp_path / 'broken'}:{ROOT}"))
    assert code == 5 and "no wandb here" in err and "pip install 'temper-mcore[wandb]'" in err
    assert out == "" and not (tmp_path / "out").exists()
