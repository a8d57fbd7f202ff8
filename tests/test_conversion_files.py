"""Bad files of a HuggingFace directory: what the user sees, by the table of faults (numbers in brackets)."""

import json

import pytest
from safetensors.torch import load_file, save_file

from conversion.hf_checkpoint import HfCheckpoint, read_config
from tests.conversion_models import write_hf
from toolkits.foundation.errors import CheckpointError

NORM = "model.norm.weight"


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf")


@pytest.fixture
def sharded(tmp_path):
    return write_hf(tmp_path / "sharded", shards=3)


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_truncated_shard(hf):  # [21]
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: header promises 46\d.\d kB .*download or copy it again"
    ):
        HfCheckpoint(hf)


def test_a_truncated_shard_in_the_hubs_cache_is_told_its_hash(hf, tmp_path):  # [21]
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (hf / "config.json").rename(snapshot / "config.json")
    (blobs / ("ab" * 32)).write_bytes((hf / "model.safetensors").read_bytes()[:-1])
    (snapshot / "model.safetensors").symlink_to("../../blobs/" + "ab" * 32)
    with pytest.raises(CheckpointError, match=r"again \(sha256 of the original is (ab){32}\)"):
        HfCheckpoint(snapshot)


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


def test_no_weights(hf):
    (hf / "model.safetensors").rename(hf / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor .*; found consolidated.safetensors"):
        HfCheckpoint(hf)
