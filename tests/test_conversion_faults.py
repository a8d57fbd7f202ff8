"""Bad input: what the user sees, row by row of the table of faults (numbers in brackets)."""

import json
import re
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_mcore, mcore_to_hf
from conversion.hf_as_mcore import HfAsMcore
from conversion.hf_checkpoint import HfCheckpoint, read_config
from conversion.mcore_as_hf import McoreAsHf
from conversion.mcore_checkpoint import McoreCheckpoint, find_step, hf_folder
from conversion.mcore_writer import Chunk, write_step
from conversion.plan import plan_for
from conversion.safe_pickle import read_metadata, scan_directory
from conversion.verify import verify
from tests.conversion_models import TIED, UNTIED, tensors_of, write_hf
from toolkits.foundation.errors import CheckpointError, DiskError, UsageError

NORM = "model.norm.weight"


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf")


@pytest.fixture
def sharded(tmp_path):
    return write_hf(tmp_path / "sharded", shards=3)


@pytest.fixture
def mcore(hf, tmp_path):
    hf_to_mcore.convert(hf, tmp_path / "mcore", verify=False)
    return tmp_path / "mcore"


def change_tensors(folder, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def write_mcore(folder, tensors, config):
    """Write a Megatron-core directory that holds `tensors` whole."""
    chunks = [
        Chunk(key, tuple(data.shape), (0,) * data.ndim, tuple(data.shape), data.dtype, lambda data=data: data)
        for key, data in tensors.items()
    ]
    write_step(folder / "release", chunks, ["decoder.final_layernorm._extra_state/shard_0_1"], advance=lambda _: None)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    return folder


def mcore_tensors(folder):
    """Return all Megatron-core tensors of a HuggingFace directory."""
    source = HfAsMcore(folder)
    return {key: source.read(key, (0,) * len(info.shape), info.shape).clone() for key, info in source.tensors.items()}


# Writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [hf_to_mcore.convert, mcore_to_hf.convert])
def test_too_little_space_is_said_before_anything_is_written(mcore, hf, tmp_path, monkeypatch, convert):  # [5]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(9, 9, 1000))
    with pytest.raises(DiskError, match=r"need 455.7 kB, 1.0 kB free at "):
        convert(hf if convert is hf_to_mcore.convert else mcore, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_writer_thread_is_not_lost_and_leaves_nothing(hf, tmp_path, monkeypatch):  # [6]
    honest = HfAsMcore.step

    def full(self, step):
        if step.key == "decoder.layers.mlp.linear_fc2.weight" and step.layer == 2:
            raise OSError(28, "No space left on device", "file")
        return honest(self, step)

    monkeypatch.setattr(HfAsMcore, "step", full)
    with pytest.raises(OSError, match=r"No space left"):
        hf_to_mcore.convert(hf, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("output", ["hf", "hf/inside", "."])
def test_output_is_input_or_one_lies_in_the_other(hf, tmp_path, output):  # [20]
    with pytest.raises(UsageError, match=r"the same folder|lies inside the other"):
        hf_to_mcore.convert(hf, tmp_path / output, overwrite=True)
    assert (hf / "model.safetensors").exists()


# Finding a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty; using release"),
        ("\x00\xff!", "holds .*; using release"),
        ("100", "points to iter_0000100, which is not a complete step; using release"),
    ],
)
def test_the_tracker_is_only_a_hint(mcore, capsys, content, said):  # [13] [14]
    (mcore / "latest_checkpointed_iteration.txt").write_text(content, encoding="latin-1")
    assert find_step(mcore) == mcore / "release"
    assert re.search(said, capsys.readouterr().err)


def test_the_newest_complete_step_wins(mcore, capsys):  # [3] [14]
    shutil.copytree(mcore / "release", mcore / "iter_0000100")
    shutil.copytree(mcore / "release", mcore / "iter_0000200")
    shutil.copytree(mcore / "release", mcore / "iter_0000300")
    (mcore / "iter_0000300" / "metadata.json").unlink()
    (mcore / "latest_checkpointed_iteration.txt").write_text("100\n")
    assert find_step(mcore) == mcore / "iter_0000200"
    assert "points to iter_0000100, which is not the newest step; using iter_0000200" in capsys.readouterr().err
    (mcore / "latest_checkpointed_iteration.txt").unlink()
    assert find_step(mcore) == mcore / "iter_0000200"
    assert capsys.readouterr().err == ""


def test_no_checkpoint(tmp_path, mcore):  # [15]
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere: no such folder"):
        find_step(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*hf \(no release/ or iter_NNNNNNN/ folder in it\)"):
        find_step(tmp_path / "hf")
    (mcore / "release" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*mcore \(incomplete: release\)"):
        find_step(mcore)


def test_a_directory_without_its_config_is_told_what_to_add(mcore, hf):
    shutil.rmtree(mcore / "hf")
    with pytest.raises(CheckpointError, match=r"copy config.json and the tokenizer files .* into .*mcore/hf"):
        hf_folder(mcore / "release")
    shutil.copy(hf / "config.json", mcore)
    assert hf_folder(mcore / "release") == hf_folder(mcore) == mcore


# The files of a HuggingFace directory -------------------------------------------------------------------


def test_a_truncated_shard(hf):  # [21]
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: header promises 46\d.\d kB .*download or copy it again"
    ):
        HfCheckpoint(hf)


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_shard_without_a_whole_header(sharded, size):  # [22]
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        CheckpointError, match=rf"model-00002-of-00003.safetensors: {size} bytes are too few for its header"
    ):
        HfCheckpoint(sharded)


@pytest.mark.parametrize(
    "header", [b"{]", b'{"a": 3}', b"[1]", b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0]}}']
)
def test_a_damaged_header(hf, header):
    (hf / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"its header is damaged"):
        HfCheckpoint(hf)


def test_a_header_whose_sizes_cannot_be(hf):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (hf / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"is damaged: a: 8 bytes for F32 \[3\]"):
        HfCheckpoint(hf)


def test_missing_shards_are_all_named(sharded):  # [29]
    for number in (1, 3):
        (sharded / f"model-0000{number}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)is incomplete: 2 problems.*00001-of-00003.*00003-of-00003"):
        HfCheckpoint(sharded)


def test_the_index_and_the_headers_are_held_against_each_other(sharded):  # [30]
    second = load_file(sharded / "model-00002-of-00003.safetensors")
    name = next(iter(second))
    third = load_file(sharded / "model-00003-of-00003.safetensors")
    save_file({**third, name: second[name]}, sharded / "model-00003-of-00003.safetensors")
    change_index(sharded, lambda weight_map: [weight_map.pop(NORM), weight_map.update(ghost=weight_map[name])])
    with pytest.raises(CheckpointError) as caught:
        HfCheckpoint(sharded)
    message = str(caught.value)
    assert f"{name} is in model-00002-of-00003.safetensors and in model-00003-of-00003.safetensors" in message
    assert "ghost is not in model-00002-of-00003.safetensors as the index says" in message
    assert f"{NORM} is in model-0000" in message and "the index does not name it" in message


@pytest.mark.parametrize("path", ["../evil.safetensors", "/etc/passwd", "..", "a/b.safetensors", ""])
def test_unsafe_shard_paths(sharded, path):  # [31]
    change_index(sharded, lambda weight_map: weight_map.update({NORM: path}))
    with pytest.raises(CheckpointError, match=r"unsafe shard path"):
        HfCheckpoint(sharded)


def test_a_shard_that_is_a_link_out_of_the_folder(hf, tmp_path):  # [31]
    (hf / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (hf / "model.safetensors").symlink_to("../elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"unsafe shard path 'model.safetensors'"):
        HfCheckpoint(hf)


def test_config_json_that_is_not_one(hf):  # [32]
    (hf / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        read_config(hf)
    (hf / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json is not a JSON object"):
        read_config(hf)
    (hf / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        read_config(hf)


def test_no_safetensors(hf):
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found pytorch_model.bin \(only safetensors are read\)"):
        HfCheckpoint(hf)


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


# Megatron-core directories ------------------------------------------------------------------------------


def test_everything_wrong_with_a_megatron_directory_comes_at_once(hf, tmp_path):  # [25] [26] [27]
    tensors = mcore_tensors(hf)
    del tensors["decoder.final_layernorm.weight"]
    tensors["decoder.layers.mlp.linear_fc2.weight"] = torch.zeros(4, 48, 110)
    tensors["decoder.layers.self_attention.q_layernorm.weight"] = torch.zeros(4, 8)
    tensors["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(3)
    write_mcore(tmp_path / "mcore", tensors, UNTIED)
    with pytest.raises(CheckpointError) as caught:
        McoreAsHf(tmp_path / "mcore")
    assert [line.strip(" -") for line in str(caught.value).splitlines()[1:]] == [
        "missing: decoder.final_layernorm.weight",
        "unexpected: decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.mlp.linear_fc2.weight: checkpoint [4, 48, 110], config says [4, 48, 112]",
    ]


def test_vocabulary_rows(hf, tmp_path, capsys):  # [38]
    tensors = mcore_tensors(hf)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[key] = torch.cat([tensors[key], torch.full((5, 48), 9.0)])
    write_mcore(tmp_path / "padded", tensors, UNTIED)
    mcore_to_hf.convert(tmp_path / "padded", tmp_path / "back")
    assert "output_layer.weight: 256 rows trimmed to the 251" in capsys.readouterr().err
    assert HfCheckpoint(tmp_path / "back").shape("lm_head.weight") == (251, 48)
    tensors["output_layer.weight"] = tensors["output_layer.weight"][:250].clone()
    write_mcore(tmp_path / "short", tensors, UNTIED)
    with pytest.raises(
        CheckpointError, match=r"output_layer.weight: 250 vocabulary rows, config.json says vocab_size 251"
    ):
        mcore_to_hf.convert(tmp_path / "short", tmp_path / "back2")


@pytest.mark.parametrize("padding", [0, 5])
def test_a_tied_megatron_directory_may_carry_its_output_layer_when_it_is_the_embedding(tmp_path, padding):  # [39]
    tensors = mcore_tensors(write_hf(tmp_path / "hf", TIED))
    embedding = tensors["embedding.word_embeddings.weight"]
    head = torch.cat([embedding, torch.ones(padding, 40)])
    write_mcore(tmp_path / "same", {**tensors, "output_layer.weight": head}, TIED)
    mcore_to_hf.convert(tmp_path / "same", tmp_path / "back")
    write_mcore(tmp_path / "other", {**tensors, "output_layer.weight": head + 1}, TIED)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings, but output_layer.weight differs from embedding"):
        mcore_to_hf.convert(tmp_path / "other", tmp_path / "back2")


def test_a_truncated_distcp_file(mcore, tmp_path):  # [21]
    path = mcore / "release" / "__0_1.distcp"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"__0_1.distcp \(.*\) is cut short: .metadata promises .* bytes or more"):
        mcore_to_hf.convert(mcore, tmp_path / "back")
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"__0_1.distcp is missing or empty"):
        mcore_to_hf.convert(mcore, tmp_path / "back")


def test_a_distcp_file_with_other_bytes(mcore, tmp_path):
    path = mcore / "release" / "__0_1.distcp"
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(CheckpointError, match=r"__0_1.distcp .*is (damaged|not a torch.save archive)"):
        mcore_to_hf.convert(mcore, tmp_path / "back")


def test_chunks_that_do_not_cover_their_tensor(tmp_path):
    half = Chunk("a", (4, 3), (2, 0), (2, 3), torch.float32, lambda: torch.ones(2, 3))
    write_step(tmp_path / "release", [half], [], advance=lambda _: None)
    checkpoint = McoreCheckpoint(tmp_path)
    assert torch.equal(checkpoint.read("a", (3, 1), (1, 2)), torch.ones(1, 2))
    with pytest.raises(CheckpointError, match=r"the chunks of a do not cover it exactly once"):
        checkpoint.read("a", (1, 0), (2, 3))


def test_a_type_of_another_tool_is_named(hf, tmp_path):
    tensors = mcore_tensors(hf)
    tensors["decoder.final_layernorm.weight"] = torch.ones(48, dtype=torch.float64)
    write_mcore(tmp_path / "mcore", tensors, UNTIED)
    with pytest.raises(CheckpointError, match=r"final_layernorm.weight is float64; only float32, float16, bfloat16"):
        McoreAsHf(tmp_path / "mcore")


def test_the_plan_is_what_is_written(mcore):
    checkpoint, plan = McoreCheckpoint(mcore), plan_for(UNTIED)
    assert {key: stored.shape for key, stored in checkpoint.tensors.items()} == {
        key: info.shape for key, info in plan.tensors.items()
    }
    assert set(read_metadata(checkpoint.step).objects) == set(plan.extra_states)


def test_the_layout_of_later_megatron_releases_is_read(mcore, hf, tmp_path):
    # megatron-core 0.19 has no common.pt, and fewer fields in metadata.json.
    (mcore / "release" / "common.pt").unlink()
    (mcore / "release" / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    scan_directory(mcore / "release")
    mcore_to_hf.convert(mcore, tmp_path / "back")
    assert verify(hf, tmp_path / "back") == 51


def test_a_vocabulary_cut_unevenly_is_put_together(tmp_path):
    whole = torch.arange(15.0).view(5, 3)
    chunks = [
        Chunk("a", (5, 3), (start, 0), (stop - start, 3), torch.float32, lambda cut=whole[start:stop]: cut)
        for start, stop in ((0, 3), (3, 5))
    ]
    write_step(tmp_path / "release", chunks, [], advance=lambda _: None)
    assert torch.equal(McoreCheckpoint(tmp_path).read("a", (0, 0), (5, 3)), whole)
