"""Bad Megatron-core directories: what the user sees, by the table of faults (numbers in brackets)."""

import json
import re
import shutil

import pytest
import torch

from conversion import hf_to_mcore, mcore_to_hf
from conversion.hf_as_mcore import HfAsMcore
from conversion.hf_checkpoint import HfCheckpoint
from conversion.mcore_as_hf import McoreAsHf
from conversion.mcore_checkpoint import McoreCheckpoint, find_step, hf_folder
from conversion.mcore_writer import Chunk, write_step
from conversion.plan import plan_for
from conversion.safe_pickle import read_metadata, scan_directory
from conversion.verify import verify
from tests.conversion_models import TIED, UNTIED, write_hf
from toolkits.foundation.errors import CheckpointError


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf")


@pytest.fixture
def mcore(hf, tmp_path):
    hf_to_mcore.convert(hf, tmp_path / "mcore", verify=False)
    return tmp_path / "mcore"


def write_mcore(folder, tensors, config):
    """Write a Megatron-core directory that holds `tensors` whole."""
    chunks = [
        Chunk(key, tuple(data.shape), (0,) * data.ndim, tuple(data.shape), data.dtype, lambda data=data: [data])
        for key, data in tensors.items()
    ]
    write_step(folder / "release", chunks, ["decoder.final_layernorm._extra_state/shard_0_1"])
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    return folder


def mcore_tensors(folder):
    """Return all Megatron-core tensors of a HuggingFace directory."""
    source = HfAsMcore(folder)
    return {key: source.read(key, (0,) * len(info.shape), info.shape).clone() for key, info in source.tensors.items()}


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


# Its tensors -------------------------------------------------------------------------------------------


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
    half = Chunk("a", (4, 3), (2, 0), (2, 3), torch.float32, lambda: [torch.ones(2, 3)])
    write_step(tmp_path / "release", [half], [])
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
        Chunk("a", (5, 3), (start, 0), (stop - start, 3), torch.float32, lambda cut=whole[start:stop]: [cut])
        for start, stop in ((0, 3), (3, 5))
    ]
    write_step(tmp_path / "release", chunks, [])
    assert torch.equal(McoreCheckpoint(tmp_path).read("a", (0, 0), (5, 3)), whole)
