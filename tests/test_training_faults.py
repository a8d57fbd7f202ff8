"""What a run refuses, how it stops, and what it leaves behind then."""

import itertools
import json
import os
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from training_world import finished, flags, run_cases, start, write_dataset, write_model

from conversion import hf_to_mcore
from data_preprocessing.blend import Part
from toolkits.foundation.errors import CheckpointError, DataError, MachineError, UsageError
from toolkits.training.settings import DataSettings, ModelSettings
from toolkits.training.sources import find_data, find_model, same_set


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    model = write_model(folder / "model")
    hf_to_mcore.convert(model, folder / "mcore")
    data = write_dataset(folder / "data", model, rows=40)
    return {"folder": folder, "model": model, "mcore": folder / "mcore", "data": data}


def settings(inputs, output, **changes):
    return {
        "checkpoint": inputs["model"],
        "data": inputs["data"],
        "output": output,
        "seq_len": 128,
        "global_batch_size": 4,
        "train_iters": 3,
        "lr": 1e-3,
        "precision": "fp32",
    } | changes


def edited_config(folder, name, **changes):
    """A copy of the model's directory whose config.json says something else."""
    copy = folder / name
    copy.mkdir()
    for path in (folder / "model").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_missing_checkpoint_is_never_replaced_by_random_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere.*refusing to train from random weights"):
        find_model(ModelSettings(checkpoint=str(tmp_path / "nowhere")))


def test_a_model_that_would_not_train_exactly_is_refused_by_name(inputs, tmp_path):
    model = edited_config(inputs["folder"], "sliding", use_sliding_window=True)
    with pytest.raises(UsageError, match="use_sliding_window=True: sliding-window attention is not built"):
        find_model(ModelSettings(checkpoint=str(model)))


def test_a_dataset_of_another_tokenizer_is_refused_with_both_names(inputs):
    model = edited_config(inputs["folder"], "renamed")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|another|>"
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"another tokenizer \(\w{12}\) than .*renamed has \(\w{12}\)"):
        find_data(DataSettings(data=inputs["data"]), find_model(ModelSettings(checkpoint=str(model))))


def test_a_token_without_an_embedding_row_is_refused_with_both_numbers(inputs):
    model = edited_config(inputs["folder"], "small", vocab_size=200)
    with pytest.raises(DataError, match=r"token id 25\d, the embedding has 200 rows"):
        find_data(DataSettings(data=inputs["data"]), find_model(ModelSettings(checkpoint=str(model))))


def test_validation_equal_to_training_holds_one_percent_out(inputs):
    model = find_model(ModelSettings(checkpoint=str(inputs["model"])))
    for valid in (None, inputs["data"]):
        data = find_data(DataSettings(data=inputs["data"], valid_data=valid, seq_len=128), model)
        conversations = [len(rows.parts[0].documents) for rows in (data.training, data.validation)]
        assert conversations == [39, 1]
        assert "1 of 40 conversations are held out to validate" in data.remarks[0]


def test_the_same_data_by_another_spelling_is_held_out_from_too(inputs, tmp_path):
    (tmp_path / "link").symlink_to(inputs["folder"])
    data = inputs["data"]
    for valid in (tmp_path / "link" / "data", data.with_name("data_text_document"), data.parent / "x" / ".." / "data"):
        (data.parent / "x").mkdir(exist_ok=True)
        assert same_set(Part(data), Part(valid))
    assert not same_set(Part(data), Part(data.with_name("other")))


def test_only_conversations_that_fit_are_held_out(inputs):
    model = find_model(ModelSettings(checkpoint=str(inputs["model"])))
    for seed in range(8):
        data = find_data(DataSettings(data=inputs["data"], seq_len=40, seed=seed), model)
        assert len(data.validation) == 1


def test_conversations_longer_than_the_model_was_made_for_are_said(inputs):
    model = edited_config(inputs["folder"], "short-positions", max_position_embeddings=16)
    data = find_data(DataSettings(data=inputs["data"], seq_len=128), find_model(ModelSettings(checkpoint=str(model))))
    assert any("the model was made for 16" in remark for remark in data.remarks)


def test_pipeline_stages_start_from_different_random_weights(inputs, tmp_path):
    words = settings(inputs, tmp_path / "out", checkpoint="none", hf_config=inputs["model"], pipeline_parallel=4)
    words |= {"train_iters": 1, "lr": 0.0, "min_lr": 0.0, "export_hf": True}
    run_cases(tmp_path / "world", 4, {"stages": flags(**words)})
    weights = load_file(tmp_path / "out" / "huggingface" / "sft" / "model.safetensors")
    layers = [weights[f"model.layers.{layer}.mlp.gate_proj.weight"] for layer in range(4)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(layers, 2))


def test_a_warm_up_longer_than_the_epochs_is_refused(inputs, tmp_path):
    words = flags(**settings(inputs, tmp_path / "out", train_iters=0, epochs=1, warmup_iters=100))
    code, _, err = finished(start(words))
    assert code == 2 and re.search(r"--warmup-iters 100 leaves nothing of the \d+ steps", err)


def test_an_export_never_replaces_what_the_run_did_not_write(inputs, tmp_path):
    precious = tmp_path / "out" / "huggingface" / "sft" / "notes.txt"
    precious.parent.mkdir(parents=True)
    precious.touch()
    code, out, err = finished(start(flags(**settings(inputs, tmp_path / "out", export_hf=True))))
    assert code == 2 and "not of this run" in err and "step 1/" not in out
    assert precious.exists()


def test_a_run_starts_from_either_format_and_from_its_own_checkpoint(inputs, tmp_path):
    """HuggingFace directory, converted directory, and the directory that training wrote: the same weights."""
    first = {
        "hf": flags(**settings(inputs, tmp_path / "hf", tensor_parallel=2)),
        "mcore": flags(**settings(inputs, tmp_path / "mcore", tensor_parallel=2, checkpoint=inputs["mcore"])),
    }
    histories = run_cases(tmp_path / "two", 2, first)
    assert histories["hf"] == without_time(histories["mcore"], like=histories["hf"])
    own = tmp_path / "hf" / "checkpoint" / "sft"
    second = {
        "tp1": flags(**settings(inputs, tmp_path / "tp1", checkpoint=own, train_iters=1)),
        "dp2": flags(**settings(inputs, tmp_path / "dp2", checkpoint=own, train_iters=1, pipeline_parallel=2)),
    }
    one = run_cases(tmp_path / "one", 1, {"tp1": second["tp1"]})
    two = run_cases(tmp_path / "again", 2, {"dp2": second["dp2"]})
    assert one["tp1"][0]["loss"] == pytest.approx(two["dp2"][0]["loss"], abs=1e-5)
    assert one["tp1"][0]["loss"] < histories["hf"][0]["loss"] - 0.2, "the tuned weights were not loaded"


def without_time(history, *, like):
    return [step | {"seconds": other["seconds"]} for step, other in zip(history, like, strict=True)]


def test_a_poisoned_checkpoint_never_runs(inputs, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    bad = tmp_path / "bad"
    hf_to_mcore.convert(inputs["model"], bad)
    (bad / "release" / "common.pt").write_bytes(pickle.dumps(Evil()))
    code, _, err = finished(start(flags(**settings(inputs, tmp_path / "out", checkpoint=bad))))
    assert code == 4 and "refusing executable content" in err and "common.pt" in err
    assert not (tmp_path / "ran").exists()


def test_random_weights_train_when_asked_for(inputs, tmp_path):
    words = flags(**settings(inputs, tmp_path / "out", checkpoint="none", hf_config=inputs["model"]))
    code, out, err = finished(start(words))
    assert code == 0, err
    assert len(re.findall(r"^step \d/3 ", out, re.MULTILINE)) == 3


def test_a_used_folder_is_refused_and_nothing_in_it_touched(inputs, tmp_path):
    used = tmp_path / "out" / "checkpoint" / "sft" / "iter_0000007"
    used.mkdir(parents=True)
    (used / "precious").touch()
    code, _, err = finished(start(flags(**settings(inputs, tmp_path / "out")), ranks=2))
    assert code == 2 and "it was not made by this line" in err
    assert [path.name for path in used.parent.rglob("*")] == ["iter_0000007", "precious"]
    assert err.count("error:") == 1, "one rank speaks, not both"


def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path):
    words = flags(**settings(inputs, tmp_path / "out", lr=1e30, min_lr=1e30, train_iters=30, save_interval=1))
    code, out, err = finished(start(words))
    assert code == 7, (out, err)
    assert re.search(r"step \d+: the (loss|gradient norm) is (nan|inf)", err)
    assert re.search(r"; rows \d+(, \d+)*, written to \S*not-finite-step-\d+\.json", err)
    (log,) = (tmp_path / "out" / "log").iterdir()
    assert "NumericsError" in log.read_text(), "the traceback is in the log, not on the screen"
    assert "Traceback" not in err


def test_sigterm_saves_and_says_so(inputs, tmp_path):
    words = flags(**settings(inputs, tmp_path / "out", train_iters=10_000, warmup_iters=10))
    process = start(words, ranks=2)
    try:
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        process.send_signal(signal.SIGTERM)
    finally:
        code, out, err = finished(process)
    assert code == 75, (out, err)
    (step,) = (tmp_path / "out" / "checkpoint" / "sft").glob("iter_*")
    assert int(step.name.removeprefix("iter_")) >= 3
    assert re.search(r"stopped after step \d+ of 10000, saved as .*iter_", err)


def test_sigterm_during_validation_loses_nothing(inputs, tmp_path):
    valid = write_dataset(tmp_path / "valid", inputs["model"], rows=12_000)
    words = settings(inputs, tmp_path / "out", valid_data=valid, train_iters=10, save_interval=1)
    process = start(flags(**words), ranks=2)
    try:
        for line in process.stdout:
            if line.startswith("saved "):
                break
        time.sleep(1.0)  # the validation takes half a minute
        process.send_signal(signal.SIGTERM)
    finally:
        code, out, err = finished(process)
    assert code == 75, (out, err)
    assert [path.name for path in (tmp_path / "out" / "checkpoint" / "sft").glob("iter_*")] == ["iter_0000001"]
    assert "validation after" not in out


def test_an_old_checkpoint_goes_when_a_newer_one_is_complete(inputs, tmp_path):
    words = flags(**settings(inputs, tmp_path / "out", train_iters=5, save_interval=1, keep_last=2))
    code, _, err = finished(start(words))
    assert code == 0, err
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoint" / "sft").glob("iter_*"))
    assert names == ["iter_0000004", "iter_0000005"]


def test_epochs_become_steps_and_a_failed_start_does_not_block_the_next(inputs, tmp_path):
    words = settings(inputs, tmp_path / "out", train_iters=0, epochs=2, seq_len=256)
    code, _, err = finished(start(flags(**(words | {"epochs": 10**9}), keep_last=10**9, save_interval=1)))
    assert code == 6 and "free at" in err, err
    code, out, err = finished(start(flags(**words)))
    assert code == 0, err
    rows = int(re.search(r"in (\d+) rows of 256", out)[1])
    assert out.count("| grad norm ") == -(-2 * rows // 4)


def test_too_few_rows_for_a_batch_is_said_with_numbers(inputs, tmp_path):
    code, _, err = finished(start(flags(**settings(inputs, tmp_path / "out", global_batch_size=64))))
    assert code == 3 and re.search(r"\d+ rows of 128 tokens are fewer than one global batch of 64", err)


def test_running_out_of_memory_is_compared_with_the_plan(inputs, tmp_path):
    from toolkits.training.config import TrainConfig
    from toolkits.training.layout import layout_of
    from toolkits.training.run import RunPlan, _out_of_memory_explained

    config = TrainConfig.from_values(settings(inputs, tmp_path) | {"checkpoint": str(inputs["model"])})
    source = find_model(config.model)
    plan = RunPlan(config, source, find_data(config.data, source), layout_of(config, source.settings, 1))
    message = r"out of memory \(CUDA out of memory\): \d.* were taken, \d.* were planned.*AC=full, a smaller BATCH_SIZE"
    with pytest.raises(MachineError, match=message), _out_of_memory_explained(plan):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")
