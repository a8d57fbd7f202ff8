"""Every door through which a checkpoint comes in: what would run, lead away or take the machine's memory is refused.

Pickles inside Megatron-core directories are in test_safe_pickle.py. Each payload leaves a file when it runs.
"""

import io
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion import hf_to_mcore, mcore_to_hf, unpickler
from conversion.hf_checkpoint import HfCheckpoint
from conversion.mapped_file import MappedFile
from conversion.mcore_checkpoint import McoreCheckpoint
from conversion.plan import plan_for
from conversion.safe_files import parse_json, read_json
from conversion.safe_pickle import Archive, read_metadata, scan_directory
from conversion.unpickler import loads
from tests.conversion_models import MODELS, UNTIED, write_hf
from toolkits.foundation.errors import CheckpointError

# What is said to make torch or transformers trust what they read.
TRUSTING = {
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    "TRUST_REMOTE_CODE": "1",
    "HF_TRUST_REMOTE_CODE": "1",
    "TRANSFORMERS_TRUST_REMOTE_CODE": "1",
}
MEMORY = 256 << 20


class Payload:
    """Creates a file when it is unpickled by anybody who trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(params=["plain", "trusting"])
def environment(request, monkeypatch):
    for name, value in TRUSTING.items() if request.param == "trusting" else ():
        monkeypatch.setenv(name, value)


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf")


@pytest.fixture
def ran(tmp_path):
    return tmp_path / "ran"


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def grown_by(action):
    """Return the bytes by which the process was larger, at the most, while `action` was refused."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here; see proc(5)
    before = memory("VmRSS")
    with pytest.raises(CheckpointError):
        action()
    return memory("VmHWM") - before


def memory(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


# Code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [saved, pickle.dumps])
def test_a_payload_in_a_bin_file(hf, tmp_path, ran, environment, write):
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    (hf / "pytorch_model.bin").write_bytes(write({"evil": Payload(ran), **tensors}))
    with pytest.raises(CheckpointError, match=r"refusing executable content in .*model.bin: it asks for os.system"):
        hf_to_mcore.convert(hf, tmp_path / "mcore")
    assert not ran.exists() and not (tmp_path / "mcore").exists()


def test_a_payload_in_one_of_several_bin_files(hf, tmp_path, ran, environment):
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    (hf / names[0]).write_bytes(saved(tensors))
    (hf / names[1]).write_bytes(saved([Payload(ran)]))
    weight_map = dict.fromkeys(tensors, names[0]) | {"model.norm.weight": names[1]}
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"content in .*00002-of-00002.bin: it asks for os.system"):
        hf_to_mcore.convert(hf, tmp_path / "mcore")
    assert not ran.exists()


def write_remote_code(folder, ran, **config):
    """Add code of the model's authors, which `auto_map` names, to a HuggingFace directory."""
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    names = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"}
    (folder / "config.json").write_text(json.dumps({**UNTIED, "auto_map": names, **config}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_code_that_auto_map_names_is_data(hf, tmp_path, ran, environment):  # [33]
    write_remote_code(hf, ran)
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    assert not ran.exists()
    assert not list((tmp_path / "mcore").rglob("*.py")) and not list((tmp_path / "back").rglob("*.py"))
    write_remote_code(hf, ran, architectures=["EvilForCausalLM"])
    with pytest.raises(CheckpointError, match=r"architecture EvilForCausalLM is not supported; supported: "):  # [32]
        hf_to_mcore.convert(hf, tmp_path / "other")
    assert not ran.exists()


def test_code_that_auto_map_names_is_not_run_to_compare_logits(hf, tmp_path, ran, environment):  # [33]
    from toolkits.training.logits import compare_logits, tokens_of

    hf_to_mcore.convert(hf, tmp_path / "mcore")
    write_remote_code(hf, ran)
    with pytest.raises(CheckpointError, match=r"transformers cannot load its tokenizer"):
        tokens_of(hf, ["hello"])
    write_remote_code(hf, ran, model_type="evil")
    with pytest.raises(CheckpointError, match=r"transformers cannot load it"):
        compare_logits(hf, tmp_path / "mcore", [1, 2, 3])
    assert not ran.exists()


# Paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_not_handed_on(hf, tmp_path, name):  # [31]
    (tmp_path / "secret").write_text((hf / name).read_text())
    (hf / name).unlink()
    (hf / name).symlink_to("../secret")
    with pytest.raises(CheckpointError, match=rf"unsafe link .*{name}: it leads out of its folder"):
        hf_to_mcore.convert(hf, tmp_path / "mcore")
    assert not (tmp_path / "mcore").exists()


def test_a_link_out_of_a_step_folder(hf, tmp_path):  # [31]
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    file = tmp_path / "mcore" / "release" / "__0_0.distcp"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to("../../elsewhere")
    with pytest.raises(CheckpointError, match=r"unsafe link .*__0_0.distcp: it leads out of its folder"):
        McoreCheckpoint(tmp_path / "mcore")
    with pytest.raises(CheckpointError, match=r"unsafe link"):
        scan_directory(tmp_path / "mcore" / "release")


@pytest.mark.parametrize("path", ["../x.safetensors", "/etc/passwd", "x" * 300, "a\0b", "", ".", ".."])
def test_a_weight_map_that_leads_away(hf, path):  # [31]
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": path}}))
    with pytest.raises(CheckpointError, match=r"unsafe shard path"):
        HfCheckpoint(hf)


def test_an_archive_of_a_model_is_not_unpacked(tmp_path):  # [35]
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("../evil", "x")
        archive.writestr("config.json", "{}")
    with pytest.raises(CheckpointError, match=r"model.zip is not a HuggingFace checkpoint"):
        hf_to_mcore.convert(tmp_path / "model.zip", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.zip"]


# Headers ------------------------------------------------------------------------------------------------


def write_header(hf, header, data=b"", *, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(raw) if length is None else length
    (hf / "model.safetensors").write_bytes(length.to_bytes(8, "little") + raw + data)


def entry(start, stop, shape=(2,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, r"b: its bytes begin at 4, those before it end at 8"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, r"its bytes begin at 0, those before it end at 8"),
        ({"a": entry(0, 8), "b": entry(16, 24)}, 24, r"b: its bytes begin at 16, those before it end at 8"),
        ({"a": entry(-8, 0)}, 0, r"its header is damaged \(ValueError: \[-8, 0\] are not sizes"),
        ({"a": entry(0, 2**63)}, 8, r"its header is damaged .*are not sizes"),
        ({"a": entry(0, 8), "b": entry(8, 2**50, (2**48,))}, 8, r"header promises .* file has"),
        ({"a": entry(0, 8, (-1, -2))}, 8, r"its header is damaged .*\[-1, -2\] are not sizes"),
        ({"a": entry(0, 8, (2.0,))}, 8, r"its header is damaged .*\[2.0\] are not sizes"),
        (b'{"a":' + json.dumps(entry(0, 8)).encode() + b',"a":' + json.dumps(entry(0, 8)).encode() + b"}", 8, "twice"),
    ],
)
def test_offsets_and_sizes_that_cannot_be(hf, header, size, said):
    write_header(hf, header, bytes(size))
    with pytest.raises(CheckpointError, match=said):
        HfCheckpoint(hf)


def test_a_header_longer_than_its_file(hf):
    write_header(hf, b"{}", length=2**63)
    with pytest.raises(CheckpointError, match=r"are too few for its header"):
        HfCheckpoint(hf)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 1_000_000,
        b'{"a":[' + b"[]," * 5_000_000 + b"0]}",
        b'{"a":[' + b"1," * 5_000_000 + b"0]}",
        b'{"a":"' + b"x" * 101_000_000 + b'"}',
        b'{"a":' + b"9" * 1_000_000 + b"}",
    ],
    ids=["deep object", "deep list", "many lists", "many numbers", "long text", "long number"],
)
def test_json_bombs(hf, raw):
    assert grown_by(lambda: parse_json(raw, "it")) < MEMORY
    for name in ("config.json", "model.safetensors.index.json"):
        (hf / name).write_bytes(raw)
        with pytest.raises(CheckpointError, match=rf"{name} is (not JSON|larger than any)"):
            read_json(hf / name)
    write_header(hf, raw)
    (hf / "model.safetensors.index.json").unlink()
    (hf / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model.safetensors: "):
        HfCheckpoint(hf)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen3-moe", {"num_hidden_layers": 10_000, "num_experts": 10_000}),
        ("untied", {"num_hidden_layers": 10_000, "num_attention_heads": 10_000, "num_key_value_heads": 10_000}),
        ("untied", {"num_hidden_layers": 10**12}),
    ],
)
def test_a_config_of_a_model_that_nobody_has(name, change):
    assert grown_by(lambda: plan_for(MODELS[name] | change)) < MEMORY


# Pickles that run nothing and take everything --------------------------------------------------------------


def nested_key(depth=60):
    """A dict whose key is a tuple of tuples of ...: hashing it visits 2**depth leaves."""
    return b"}(K\x01" + b"2\x86" * depth + b"K\x01u."


@pytest.mark.parametrize(
    "raw",
    [
        nested_key(),
        b"(K\x01" + b"2\x86" * 60 + b"\x91.",  # a frozenset
        b"cbuiltins\nset\n(cbuiltins\nrange\n(I0\nI2000000000\ntRtR.",
        b"cbuiltins\nset\n((I0\n" + b"2\x86" * 60 + b"ltR.",
        b"ctorch\nSize\n(cbuiltins\nrange\n(I0\nI2000000000\ntRtR.",
        b"cbuiltins\nbytes\n(I20000000000\ntR.",
        b"cbuiltins\nbytearray\n(I20000000000\ntR.",
        b"N" + b"r" + struct.pack("<I", 500_000_000) + b".",  # a memo of so many places
        b"\x8e" + struct.pack("<Q", 2**40) + b".",  # bytes that are not there
        b"\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    ],
)
def test_pickle_bombs(raw):
    assert grown_by(lambda: loads(b"\x80\x04" + raw, "here")) < MEMORY


def test_a_pickle_of_more_objects_than_a_checkpoint_has(monkeypatch):
    monkeypatch.setattr(unpickler, "MAX_READS", 10_000)
    with pytest.raises(CheckpointError, match=r"more objects than a checkpoint has"):
        loads(pickle.dumps([[] for _ in range(10_000)]), "here")
    framed = pickle.dumps([bytes([n % 256]) * 3 for n in range(9_000)], protocol=4)  # counted inside frames too
    with pytest.raises(CheckpointError, match=r"more objects than a checkpoint has"):
        loads(framed, "here")


def test_metadata_larger_than_any(hf, tmp_path):
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    os.truncate(tmp_path / "mcore" / "release" / ".metadata", 1 << 33)  # sparse
    with pytest.raises(CheckpointError, match=r"larger than the metadata of a checkpoint can be"):
        read_metadata(tmp_path / "mcore" / "release")


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path):  # [35]
    with zipfile.ZipFile(tmp_path / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 29))
        archive.writestr("archive/version", "3\n")
    content = MappedFile(tmp_path / "common.pt")

    def load():
        Archive(content, 0, len(content), source="here").load()

    assert grown_by(load) < MEMORY
    with pytest.raises(CheckpointError, match=r"here is damaged: data.pkl in it is larger than can be"):
        load()


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [((10**12,), (0,), 0), ((4, 6), (6, 1), 1), ((2,), (10**12,), 0), ((-1,), (1,), 0), ((4, 6), (-6, 1), 18)],
)
def test_a_tensor_that_reaches_beyond_its_data(tmp_path, monkeypatch, shape, stride, offset):
    (tmp_path / "x").write_bytes(saved(torch.arange(24.0).view(4, 6)))
    content = MappedFile(tmp_path / "x")
    archive = Archive(content, 0, len(content), source="here")
    record = archive.load()
    record.args = (record.args[0], offset, shape, stride, *record.args[4:])
    monkeypatch.setattr(archive, "load", lambda: record)
    with pytest.raises(CheckpointError, match=r"here is damaged: (storage beyond its end|sizes that cannot be)"):
        archive.tensor()


@pytest.mark.parametrize("elsewhere", ["two elements later", "behind its descriptor", "where the next one lies"])
def test_an_archive_whose_headers_lead_elsewhere(tmp_path, elsewhere):
    raw = bytearray(saved({"a": torch.arange(24.0), "b": torch.arange(24.0, 48.0)}))
    local, following = (raw.index(b"PK\x03\x04", raw.index(name) - 60) for name in (b"data/0", b"data/1"))
    assert raw[local + 30 :].startswith(b"archive/data/0")
    distance = {"two elements later": 8, "behind its descriptor": 16}.get(elsewhere, following - local)
    extra = int.from_bytes(raw[local + 28 : local + 30], "little")
    raw[local + 28 : local + 30] = (extra + distance).to_bytes(2, "little")
    (tmp_path / "x").write_bytes(raw)
    content = MappedFile(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"here is damaged: its parts do not lie one behind the other"):
        Archive(content, 0, len(content), source="here").tensors()


def test_chunks_that_overlap_where_others_are_missing(hf, tmp_path):
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    path = tmp_path / "mcore" / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    described = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    indices = [index for index in metadata.storage_data if index.fqn == "decoder.layers.mlp.linear_fc2.weight"]
    moved = next(index for index in indices if tuple(index.offset) == (3, 0, 0))
    chunk = next(chunk for chunk in described.chunks if tuple(chunk.offsets) == (3, 0, 0))
    place = metadata.storage_data.pop(moved)
    # As many elements as the tensor has; row 0 of layer 3 is nowhere, a row of layer 2 is there twice.
    object.__setattr__(chunk, "offsets", torch.Size([2, 1, 0]))
    object.__setattr__(moved, "offset", torch.Size([2, 1, 0]))
    metadata.storage_data[moved] = place
    path.write_bytes(pickle.dumps(metadata))
    checkpoint = McoreCheckpoint(tmp_path / "mcore")
    with pytest.raises(CheckpointError, match=r"the chunks of .*linear_fc2.weight do not cover it exactly once"):
        checkpoint.read("decoder.layers.mlp.linear_fc2.weight", (0, 0, 0), (4, 48, 112))


def test_honest_files_pass_all_of_this(hf, tmp_path):
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    scan_directory(tmp_path / "mcore" / "release")
