"""`temper convert inspect`: what a directory is, complete, foreign or damaged."""

import json
import os
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from conversion import hf_to_mcore
from conversion.hf_as_mcore import HfAsMcore
from conversion.inspect import describe, inspect
from tests.conversion_models import MODELS, TIED, UNTIED, tensors_of, write_hf, write_model
from toolkits.commands.convert import convert as command
from toolkits.foundation.errors import CheckpointError


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf", TIED, tensors=tensors_of(TIED, dtype=torch.bfloat16))


@pytest.fixture
def mcore(hf, tmp_path):
    hf_to_mcore.convert(hf, tmp_path / "mcore", verify=False)
    return tmp_path / "mcore"


def problems_of(folder):
    return "\n".join(inspect(folder)["problems"])


def test_a_huggingface_directory(hf):
    said = inspect(hf)
    assert said["format"] == "HuggingFace directory (safetensors)" and said["problems"] == []
    assert said["architecture"] == ["Qwen2ForCausalLM"] and said["family"] == "qwen2"
    assert said["layers"] == said["layers_found"] == 4 and said["hidden_size"] == 40
    assert said["tensors"] == 50 and said["parameters"] == said["config_parameters"] == 91_520
    assert said["parameters_by_type"] == {"BF16": 91_520} and said["config_dtype"] == "float32"
    assert said["vocabulary"] == said["vocabulary_rows"] == 251 and said["tied_embeddings"] is True
    assert "chat_template.jinja" in said["tokenizer"]


def test_a_megatron_directory(mcore):
    said = inspect(mcore)
    assert said["format"] == "Megatron-core directory (torch_dist)" and said["problems"] == []
    assert said["steps"] == ["release"] and said["step"] == "release" and said["layer_keys"] == "merged"
    assert said["version"] == "torch_dist 1, common.pt" and said["verdict"] == "not verified"
    assert said["made"].startswith("by temper ") and "hf2mcore from " in said["made"]
    assert said["parameters_by_type"] == {"bfloat16": 91_520} and said["vocabulary_rows"] == 251
    assert inspect(mcore / "release")["family"] == "qwen2"


def test_layers_with_a_key_each(tmp_path):
    hf = write_model(tmp_path / "hf", MODELS["qwen3-moe-mixed"])
    hf_to_mcore.convert(hf, tmp_path / "mcore", verify=False)
    said = inspect(tmp_path / "mcore")
    assert said["layer_keys"] == "one for each layer" and said["layers_found"] == 4
    assert said["problems"] == [f"{tmp_path}/mcore/hf has no tokenizer"]  # transformers wrote none


def test_what_training_refuses_is_said(tmp_path):
    hf = write_model(tmp_path / "hf", MODELS["gemma2"])
    (reason, *_) = inspect(hf)["not_trained_here"]
    assert "gemma2" in reason


def test_a_directory_of_bin_files(hf):
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    said = inspect(hf)
    assert said["format"] == "HuggingFace directory (pytorch_model.bin)" and said["problems"] == []
    assert said["tensors"] == 50


# What is missing or wrong ------------------------------------------------------------------------------------


def test_a_missing_and_a_truncated_shard(tmp_path):
    hf = write_hf(tmp_path / "hf", shards=3)
    (hf / "model-00001-of-00003.safetensors").unlink()
    os.truncate(hf / "model-00002-of-00003.safetensors", 100_000)
    said = inspect(hf)
    assert said["tensors"] == 17  # of the one that is whole
    assert "model-00001-of-00003.safetensors is missing" in problems_of(hf)
    assert "model-00002-of-00003.safetensors: header promises" in problems_of(hf)
    assert said["family"] == "qwen2"


def test_a_missing_tensor(hf):
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, hf / "model.safetensors")
    assert "missing: model.norm.weight" in problems_of(hf)


def test_weights_without_a_config(hf):
    (hf / "config.json").unlink()
    said = inspect(hf)
    assert said["tensors"] == 50 and said["vocabulary_rows"] == 251 and said["layers_found"] == 4
    assert "config.json is missing" in problems_of(hf)


def test_a_config_without_weights(hf):
    (hf / "model.safetensors").unlink()
    said = inspect(hf)
    assert said["format"] == "HuggingFace directory without weights" and said["layers"] == 4


def test_an_architecture_that_nobody_knows(hf):
    (hf / "config.json").write_text(json.dumps({**UNTIED, "architectures": ["OtherForCausalLM"]}))
    said = inspect(hf)
    assert said["architecture"] == ["OtherForCausalLM"] and said["layers_found"] == 4 and "family" not in said
    assert "architecture OtherForCausalLM is not supported" in problems_of(hf)


def test_a_megatron_directory_without_its_parts(mcore):
    shutil.rmtree(mcore / "hf")
    said = inspect(mcore)
    assert said["parameters"] == 91_520 and "copy config.json and the tokenizer files" in problems_of(mcore)
    (mcore / "release" / "__0_0.distcp").unlink()
    assert "__0_0.distcp is missing" in problems_of(mcore)
    (mcore / "release" / ".metadata").write_bytes(b"cos\nsystem\n(Vtrue\ntR.")
    assert "asks for os.system" in problems_of(mcore)
    (mcore / "release" / "metadata.json").unlink()
    assert "incomplete: release" in problems_of(mcore)


def test_a_vocabulary_that_was_padded_or_cut(hf, mcore, tmp_path):
    config = json.loads((mcore / "hf" / "config.json").read_text())
    (mcore / "hf" / "config.json").write_text(json.dumps({**config, "vocab_size": 256}))
    said = inspect(mcore)
    assert said["vocabulary_rows"] == 251 and said["vocabulary"] == 256
    assert "251 vocabulary rows, config.json says vocab_size 256" in problems_of(mcore)


def test_other_folders(tmp_path, hf):
    (tmp_path / "old" / "iter_0000010" / "mp_rank_00").mkdir(parents=True)
    assert "older format (mp_rank folders)" in inspect(tmp_path / "old")["format"]
    assert "mp_rank" in problems_of(tmp_path / "old")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats_text_document.idx").touch()
    assert inspect(tmp_path / "data")["format"] == "folder of datasets (see temper data show)"
    (tmp_path / "empty").mkdir()
    assert problems_of(tmp_path / "empty") == "no config.json, no weights and no step folder in it"
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        inspect(tmp_path / "nowhere")


def test_it_never_opens_what_it_cannot_say(hf, monkeypatch):
    def surprise(*_):
        raise CheckpointError("this is said")

    monkeypatch.setattr(HfAsMcore, "__init__", surprise)
    assert inspect(hf)["problems"] == ["this is said"]


def test_the_command_prints_lines_or_json(hf):
    run = CliRunner().invoke
    lines = run(command, ["inspect", str(hf)], catch_exceptions=False).output.splitlines()
    assert dict(line.split(None, 1) for line in lines)["parameters"] == "91,520"
    assert lines[-1].split(None, 1) == ["problems", "none found"]
    said = json.loads(run(command, ["inspect", str(hf), "--json"], catch_exceptions=False).output)
    assert said == inspect(hf)
    (hf / "config.json").unlink()
    assert "  - " in describe(inspect(hf))
