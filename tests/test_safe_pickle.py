"""Executable content in every place that a checkpoint can carry it: refused by name, and nothing has run."""

import argparse
import collections
import io
import os
import pathlib
import pickle
import signal

import numpy
import pytest
import torch

from conversion import hf_to_mcore, mcore_to_hf
from conversion.mapped_file import MappedFile
from conversion.safe_pickle import Archive, Record, loads, read_metadata, scan_directory
from tests.conversion_models import write_hf
from toolkits.foundation.errors import CheckpointError

KEY = "decoder.final_layernorm._extra_state/shard_0_1"


class Payload:
    """Creates a file when it is unpickled by anybody who trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(params=["0", "1"])
def environment(request, monkeypatch):
    """With and without the variable that makes torch trust what it reads."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", request.param)


@pytest.fixture
def mcore(tmp_path):
    hf_to_mcore.convert(write_hf(tmp_path / "hf"), tmp_path / "mcore", verify=False)
    return tmp_path / "mcore"


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def replace_object(step, raw, key=KEY):
    """Put `raw` in the place of an object of a step folder."""
    metadata = pickle.loads((step / ".metadata").read_bytes())
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == key)
    place.relative_path, place.offset, place.length = "evil.distcp", 0, len(raw)
    (step / "evil.distcp").write_bytes(raw)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def refused(step, match, ran):
    with pytest.raises(CheckpointError, match=match):
        scan_directory(step)
    assert not ran.exists()


def test_a_payload_in_the_metadata(mcore, tmp_path, environment):
    path, ran = mcore / "release" / ".metadata", tmp_path / "ran"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Payload(ran)
    path.write_bytes(pickle.dumps(metadata))
    message = r"refusing executable content in .*\.metadata: it asks for os.system"
    refused(mcore / "release", message, ran)
    with pytest.raises(CheckpointError, match=message):
        mcore_to_hf.convert(mcore, tmp_path / "back")
    assert not ran.exists()
    # The payload is real.
    pickle.loads(path.read_bytes())
    assert ran.exists()


@pytest.mark.parametrize("write", [saved, pickle.dumps, lambda value: pickle.dumps(value, protocol=0)])
def test_a_payload_in_common_pt(mcore, tmp_path, environment, write):
    ran = tmp_path / "ran"
    (mcore / "release" / "common.pt").write_bytes(write({"iteration": 3, "args": Payload(ran)}))
    refused(mcore / "release", r"refusing executable content in .*common.pt: it asks for os.system", ran)


def test_a_payload_in_another_pt_file(mcore, tmp_path, environment):
    folder = mcore / "release" / "rng_state"
    folder.mkdir()
    (folder / "shard_0_1.pt").write_bytes(saved([Payload(tmp_path / "ran")]))
    refused(mcore / "release", r"shard_0_1.pt: it asks for os.system", tmp_path / "ran")


@pytest.mark.parametrize("write", [saved, pickle.dumps])
def test_a_payload_in_a_byte_object(mcore, tmp_path, environment, write):
    ran = tmp_path / "ran"
    replace_object(mcore / "release", write([Payload(ran)]))
    message = r"refusing executable content in .*evil.distcp \(decoder.final_layernorm._extra_state/shard_0_1\)"
    refused(mcore / "release", message + ": it asks for os.system", ran)


def test_a_payload_inside_the_bytes_of_an_extra_state(mcore, tmp_path):
    ran = tmp_path / "ran"
    raw = torch.frombuffer(bytearray(pickle.dumps(Payload(ran))), dtype=torch.uint8)
    replace_object(mcore / "release", saved([raw]))
    refused(mcore / "release", "it asks for os.system", ran)
    replace_object(mcore / "release", saved([io.BytesIO(pickle.dumps(Payload(ran)))]))
    refused(mcore / "release", "it asks for an embedded file", ran)
    replace_object(mcore / "release", saved([torch.empty(0, dtype=torch.uint8), io.BytesIO()]))
    scan_directory(mcore / "release")


def test_a_payload_in_the_place_of_a_tensor(mcore, tmp_path):
    ran = tmp_path / "ran"
    path = mcore / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    place = next(i for index, i in metadata.storage_data.items() if index.fqn == "decoder.final_layernorm.weight")
    raw = saved(Payload(ran))
    place.relative_path, place.offset, place.length = "evil.distcp", 0, len(raw)
    (mcore / "release" / "evil.distcp").write_bytes(raw)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"it asks for os.system"):
        mcore_to_hf.convert(mcore, tmp_path / "back")
    assert not ran.exists()


@pytest.mark.parametrize("path", ["../evil.distcp", "/evil.distcp", "..", ""])
def test_a_path_that_leaves_the_folder(mcore, path):
    file = mcore / "release" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = path
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"unsafe path in checkpoint metadata"):
        read_metadata(mcore / "release")


@pytest.mark.parametrize("field", ["size", "offsets", "relative_path", "offset"])
def test_what_holds_itself_many_times_is_refused_at_once(mcore, field):
    """Sixty lists of which each holds the next one twice: written out, that never ends."""
    endless = [0]
    for _ in range(60):
        endless = [endless, endless]
    metadata = pickle.loads((mcore / "release" / ".metadata").read_bytes())
    described = next(each for each in metadata.state_dict_metadata.values() if hasattr(each, "chunks"))
    info = next(iter(metadata.storage_data.values()))
    holder = {"size": described, "offsets": described.chunks[0]}.get(field, info)
    object.__setattr__(holder, field, endless)
    (mcore / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"are not sizes|unsafe path"):
        read_metadata(mcore / "release")


def test_entries_that_were_transformed(mcore):
    file = mcore / "release" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"transformed .* entries are not supported"):
        read_metadata(mcore / "release")


@pytest.mark.parametrize(
    ("raw", "asked"),
    [
        (b"cbuiltins\neval\n(V1\ntR.", "builtins.eval"),
        (b"cbuiltins\ngetattr\n(V1\ntR.", "builtins.getattr"),
        (b"csubprocess\nPopen\n(V1\ntR.", "subprocess.Popen"),
        (b"\x80\x04\x8c\x05torch\x8c\x08Size.mro\x93.", "torch.Size.mro"),
        (b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93.", "torch.storage._load_from_bytes"),
        (b"\x80\x04\x8c\x05torch\x8c\x04load\x93.", "torch.load"),
        (b"ctorch\nos.system\n.", "torch.os.system"),
        (b"ctorch\n_utils._rebuild_tensor_v2\n.", "torch._utils._rebuild_tensor_v2"),
    ],
)
def test_names_that_are_not_on_the_list(raw, asked):
    with pytest.raises(CheckpointError, match=f"refusing executable content in here: it asks for {asked}$"):
        loads(raw, "here")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80\x04",
        b"not a pickle",
        # A state for a class instead of an object would change the class.
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n}V__reduce__\nV1\nsb.",
        b"ctorch\nSize\n}Va\nV1\nsb.",
        b"ctorch\nbfloat16\n(tR.",
    ],
)
def test_damaged_pickles(raw):
    with pytest.raises(CheckpointError, match=r"here is damaged"):
        loads(raw, "here")


def test_a_torchscript_archive(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, x):
            return x

    torch.jit.save(torch.jit.trace(Module(), torch.ones(1)), str(tmp_path / "common.pt"))
    content = MappedFile(tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"it is a TorchScript program"):
        Archive(content, 0, len(content), source="here").load()


def test_what_training_saves_is_let_in(tmp_path):
    """Values as Megatron-LM, too, keeps them in common.pt and byte objects."""
    value = {
        "args": argparse.Namespace(tensor_parallel=2, path=pathlib.PosixPath("/x"), dtype=torch.bfloat16),
        "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "step": torch.tensor(3.0)}]},
        "rng": [numpy.arange(4, dtype="uint32"), torch.get_rng_state(), signal.SIGTERM],
        "sizes": collections.OrderedDict(a=torch.Size([1, 2]), b={1, 2}, c=1j),
    }
    (tmp_path / "x.pt").write_bytes(saved(value))
    content = MappedFile(tmp_path / "x.pt")
    loaded = Archive(content, 0, len(content), source="here").load()
    assert isinstance(loaded["args"], Record) and loaded["args"].name == "argparse.Namespace"
    assert loaded["args"].get("dtype") is torch.bfloat16
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)
    assert loaded["sizes"]["a"] == (1, 2)
    with pytest.raises(CheckpointError, match=r"argparse.Namespace without nothing"):
        loaded["args"].get("nothing")


def test_an_honest_directory_passes(mcore, environment):
    scan_directory(mcore / "release")


def test_an_archive_holds_its_tensor_as_torch_saved_it(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    (tmp_path / "x").write_bytes(b"?" * 13 + saved(whole[1:3].t()))
    content = MappedFile(tmp_path / "x")
    archive = Archive(content, 13, len(content) - 13, source="here")
    assert torch.equal(archive.tensor(), whole[1:3].t())


@pytest.mark.parametrize("write", [saved, pickle.dumps])
def test_a_payload_in_the_place_of_a_tensor_is_scanned_for_training_too(mcore, tmp_path, environment, write):
    ran = tmp_path / "ran"
    replace_object(mcore / "release", write([Payload(ran)]), key="decoder.final_layernorm.weight")
    refused(mcore / "release", r"refusing executable content in .*evil.distcp .*: it asks for os.system", ran)
