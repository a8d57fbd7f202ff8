"""Writing that fails and tensors that are wrong: what the user sees, by the table of faults (numbers in brackets)."""

import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_mcore, mcore_to_hf
from conversion.hf_as_mcore import HfAsMcore
from tests.conversion_models import TIED, tensors_of, write_hf
from toolkits.foundation.errors import CheckpointError, DiskError, UsageError

NORM = "model.norm.weight"


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf")


@pytest.fixture
def mcore(hf, tmp_path):
    hf_to_mcore.convert(hf, tmp_path / "mcore", verify=False)
    return tmp_path / "mcore"


def change_tensors(folder, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [hf_to_mcore.convert, mcore_to_hf.convert])
def test_too_little_space_is_said_before_anything_is_written(mcore, hf, tmp_path, monkeypatch, convert):  # [5]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(9, 9, 1000))
    with pytest.raises(DiskError, match=r"need 455.7 kB, 1.0 kB free at "):
        convert(hf if convert is hf_to_mcore.convert else mcore, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_writer_thread_is_not_lost_and_leaves_nothing(hf, tmp_path, monkeypatch):  # [6]
    honest = HfAsMcore.slices

    def full(self, step):
        if step.key == "decoder.layers.mlp.linear_fc2.weight" and step.layer == 2:
            raise OSError(28, "No space left on device", "file")
        return honest(self, step)

    monkeypatch.setattr(HfAsMcore, "slices", full)
    with pytest.raises(OSError, match=r"No space left"):
        hf_to_mcore.convert(hf, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("output", ["hf", "hf/inside", "."])
def test_output_is_input_or_one_lies_in_the_other(hf, tmp_path, output):  # [20]
    with pytest.raises(UsageError, match=r"the same folder|lies inside the other"):
        hf_to_mcore.convert(hf, tmp_path / output, overwrite=True)
    assert (hf / "model.safetensors").exists()


# Tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(hf, tmp_path, bad):  # [24]
    change_tensors(hf, lambda tensors: tensors[NORM][3:6].fill_(bad))
    with pytest.raises(
        CheckpointError, match=r"3 NaN or Inf \(first at \[3\]\) in model.norm.weight; --allow-nonfinite"
    ):
        hf_to_mcore.convert(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hf_to_mcore.convert(hf, tmp_path / "mcore", allow_nonfinite=True)
    with pytest.raises(CheckpointError, match=r"in model.norm.weight; --allow-nonfinite"):
        mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back", allow_nonfinite=True)


def test_a_cast_that_overflows_is_not_called_a_bad_weight(hf, tmp_path):  # [24] [28]
    change_tensors(hf, lambda tensors: tensors[NORM][3].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"model.norm.weight does not fit float16; choose another --dtype"):
        hf_to_mcore.convert(hf, tmp_path / "out", dtype="fp16")
    hf_to_mcore.convert(hf, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"model.norm.weight does not fit float16; choose another --dtype"):
        mcore_to_hf.convert(tmp_path / "whole", tmp_path / "back", dtype="float16")


def test_everything_missing_unexpected_and_misshaped_comes_at_once(hf, tmp_path):  # [25] [26] [27]
    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.1.self_attn.k_proj.bias"], tensors[NORM]
        tensors["model.layers.3.mlp.down_proj.weight"] = torch.zeros(48, 110)
        tensors["model.layers.9.mlp.down_proj.weight"] = torch.zeros(1)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    change_tensors(hf, spoil)
    with pytest.raises(CheckpointError) as caught:
        hf_to_mcore.convert(hf, tmp_path / "out")
    assert str(caught.value).splitlines()[1:] == [
        "  - missing: model.norm.weight",
        "  - missing: model.layers.1: self_attn.k_proj.bias, mlp.up_proj.weight",
        "  - unexpected: model.layers.9: mlp.down_proj.weight",
        "  - model.layers.3.mlp.down_proj.weight: checkpoint [48, 110], config says [48, 112]: "
        "config.json intermediate_size?",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_inverse_frequencies_of_older_checkpoints_are_ignored(hf, tmp_path):  # [26]
    change_tensors(hf, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    hf_to_mcore.convert(hf, tmp_path / "out")


def test_types_that_are_not_converted_are_named(hf, tmp_path):
    change_tensors(hf, lambda tensors: tensors.update({NORM: torch.ones(48, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight is I8; only F32, F16, BF16 are converted"):
        hf_to_mcore.convert(hf, tmp_path / "out")


def test_layers_of_several_types_need_a_choice(hf, tmp_path):  # [28]
    name = "model.layers.2.mlp.down_proj.weight"
    change_tensors(hf, lambda tensors: tensors.update({name: tensors[name].half()}))
    with pytest.raises(CheckpointError, match=rf"would mix types .*{name} is float16\); choose one with --dtype"):
        hf_to_mcore.convert(hf, tmp_path / "out")
    hf_to_mcore.convert(hf, tmp_path / "out", dtype="float32")


def test_a_tied_checkpoint_may_carry_its_output_layer_when_it_is_the_embedding(tmp_path):  # [39]
    tensors = tensors_of(TIED)
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    hf_to_mcore.convert(write_hf(tmp_path / "same", TIED, tensors=same), tmp_path / "out")
    other = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    with pytest.raises(
        CheckpointError, match=r"tie_word_embeddings, but lm_head.weight differs from model.embed_tokens"
    ):
        hf_to_mcore.convert(write_hf(tmp_path / "other", TIED, tensors=other), tmp_path / "out2")
