"""The report of a conversion, and holding directories against it and against a training step's manifest."""

import hashlib
import json
import os

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from conversion import hf_to_mcore, mcore_to_hf
from conversion.report import REPORT_FILE
from conversion.verify import verify, verify_record
from tests.conversion_models import MODELS, TIED, UNTIED, tensors_of, write_hf, write_model
from toolkits.commands.convert import convert as command
from toolkits.foundation.errors import CheckpointError, UsageError

QKV = "decoder.layers.self_attention.linear_qkv.weight"


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf")


@pytest.fixture
def mcore(hf, tmp_path):
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    return tmp_path / "mcore"


@pytest.fixture
def back(mcore, tmp_path):
    mcore_to_hf.convert(mcore, tmp_path / "back")
    return tmp_path / "back"


def report_of(folder):
    return json.loads((folder / REPORT_FILE).read_text())


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def flip(path, at):
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))


def flip_weight(folder, value):
    """Change one bit of a weight whose bytes are those of `value`."""
    needle = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".distcp", ".safetensors")):
        if (at := path.read_bytes().find(needle)) >= 0:
            flip(path, at + 5)
            return path.name
    raise AssertionError("no such weight")


# What it says -------------------------------------------------------------------------------------------


def test_every_tensor_is_in_the_report_of_an_export(back, hf):
    report, tensors = report_of(back), load_file(hf / "model.safetensors")
    assert report["made"] == "mcore2hf" and report["family"] == "qwen2" and report["parameters"] == 113_936
    assert report["verdict"] == "read again and equal bit for bit" and report["cast"] is None
    assert {entry["target"]: entry["sha256"] for entry in report["tensors"]} == {
        name: sha256(tensor) for name, tensor in tensors.items()
    }
    entry = next(entry for entry in report["tensors"] if entry["target"] == "model.layers.2.self_attn.k_proj.weight")
    assert entry["source"] == [f"{QKV}[2]"] and entry["shape"] == [16, 48] and entry["dtype"] == "float32"


def test_every_tensor_is_in_the_report_of_an_import(mcore, hf):
    report, tensors = report_of(mcore), load_file(hf / "model.safetensors")
    assert report["made"] == "hf2mcore" and report["source"] == str(hf)
    sources = [name for entry in report["tensors"] for name in entry["source"]]
    assert sorted(sources) == sorted(tensors)  # each exactly once
    entries = {entry["target"]: entry for entry in report["tensors"]}
    for entry in entries.values():  # what is fused is named and hashed part by part
        assert entry["sha256"] == [sha256(tensors[name]) for name in entry["source"]]
    assert entries["decoder.final_layernorm.weight"]["source"] == ["model.norm.weight"]
    assert entries["decoder.layers.mlp.linear_fc2.weight[3]"]["shape"] == [48, 112]
    assert entries[f"{QKV}[1]"]["source"] == [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    assert entries[f"{QKV}[1]"]["shape"] == [80, 48]


def test_experts_are_called_by_layer_and_expert(tmp_path):
    hf = write_model(tmp_path / "hf", MODELS["qwen3-moe"])
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    tensors = load_file(hf / "model.safetensors")
    entries = {entry["target"]: entry for entry in report_of(tmp_path / "mcore")["tensors"]}
    down = entries["decoder.layers.mlp.experts.experts.linear_fc2.weight[3, 1]"]
    assert down["source"] == ["model.layers.3.mlp.experts.1.down_proj.weight"]
    assert down["sha256"] == [sha256(tensors["model.layers.3.mlp.experts.1.down_proj.weight"])]


def test_every_other_file_is_copied_and_hashed(mcore, hf):  # [45]
    files = report_of(mcore)["files"]
    on_disk = {path.relative_to(mcore).as_posix() for path in mcore.rglob("*") if path.is_file()}
    assert files.keys() == {name for name in on_disk if not name.endswith((".distcp", REPORT_FILE))}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        raw = (hf / name).read_bytes()
        assert files[f"hf/{name}"] == [len(raw), hashlib.sha256(raw).hexdigest()]


def test_a_cast_a_note_and_what_is_left_out_are_said(tmp_path, capsys):  # [28]
    tensors = tensors_of(TIED, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    hf = write_hf(tmp_path / "hf", TIED, tensors=tensors)
    hf_to_mcore.convert(hf, tmp_path / "mcore", verify=False)
    report = report_of(tmp_path / "mcore")
    assert report["notes"] == ["config.json says float32, the tensors are bfloat16: kept as they are"]
    assert report["left_out"] == ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert report["verdict"] == "not verified" and {entry["dtype"] for entry in report["tensors"]} == {"bfloat16"}
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "wide", dtype="fp32")
    report = report_of(tmp_path / "wide")
    assert report["cast"] and {entry["dtype"] for entry in report["tensors"]} == {"float32"}
    said = {entry["target"]: entry["sha256"] for entry in report["tensors"]}
    assert said["model.norm.weight"] == sha256(tensors["model.norm.weight"].float())


def test_there_is_no_report_where_there_is_no_output(hf, tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.hf_to_mcore.copy_sidecar_files", lambda *_: os.stat("/nowhere"))
    with pytest.raises(FileNotFoundError):
        hf_to_mcore.convert(hf, tmp_path / "mcore")
    assert not (tmp_path / "mcore").exists()


# Holding a directory against it ---------------------------------------------------------------------------


def test_an_intact_directory(mcore, back):
    assert verify_record(mcore) == verify_record(mcore / "release") == "51 tensors and 9 files, as the report says"
    assert verify_record(back).startswith("51 tensors and 5 files")
    done = CliRunner().invoke(command, ["verify", str(back)], catch_exceptions=False)
    assert done.exit_code == 0 and "intact: 51 tensors" in done.output


def test_a_flipped_bit_is_named_with_both_hashes(mcore, back, hf):  # [23]
    tensors = load_file(hf / "model.safetensors")
    norm = tensors["model.norm.weight"]
    for folder, target in ((mcore, "decoder.final_layernorm.weight"), (back, "model.norm.weight")):
        file = flip_weight(folder, norm)
        expected = rf"{file}: {target} has sha256 \w{{64}}, expected {sha256(norm)}"
        with pytest.raises(CheckpointError, match=expected):
            verify_record(folder)


# One tensor that is written as it is stored, whose hash is taken once; one of several that are fused; one that is cast.
@pytest.mark.parametrize(
    ("part", "choices"),
    [("mlp.down_proj", {}), ("mlp.up_proj", {}), ("self_attn.v_proj", {}), ("mlp.down_proj", {"dtype": "bf16"})],
)
def test_a_flipped_bit_stops_an_import(mcore, back, hf, tmp_path, part, choices):  # [23]
    value = load_file(hf / "model.safetensors")[f"model.layers.1.{part}.weight"]
    value = value[: len(value) // 2]  # of keys and values the first of two groups, which lies whole everywhere
    for folder, convert in ((mcore, mcore_to_hf.convert), (back, hf_to_mcore.convert)):
        file = flip_weight(folder, value)
        with pytest.raises(CheckpointError, match=rf"{file}: .* has sha256 \w+, expected \w+"):
            convert(folder, tmp_path / "out", **choices)
        assert not (tmp_path / "out").exists()
        (folder / REPORT_FILE).unlink()  # changed on purpose
        convert(folder, tmp_path / f"out of {folder.name}", **choices)


def test_a_changed_tokenizer_is_named_but_stops_no_import(back, tmp_path):  # [23] [45]
    (back / "tokenizer.json").write_text('{"file": "tokenizer.jsoN"}')
    with pytest.raises(CheckpointError, match=r"tokenizer.json has sha256 \w{64}, expected \w{64}"):
        verify_record(back)
    (back / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        verify_record(back)
    hf_to_mcore.convert(back, tmp_path / "again")


def test_a_directory_without_a_record_or_without_hashes(hf, tmp_path):
    hf_to_mcore.convert(hf, tmp_path / "mcore", verify=False)
    for folder in (hf, tmp_path / "mcore"):
        with pytest.raises(UsageError, match=r"has no conversion_report.json or manifest.json with hashes: name a"):
            verify_record(folder)


def test_a_step_of_training_is_held_against_its_manifest(mcore, tmp_path):  # [23]
    step = mcore / "iter_0000005"
    (mcore / "release").rename(step)
    files = {path.name: [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()] for path in step.iterdir()}
    (step / "manifest.json").write_text(json.dumps({"version": 1, "temper": "0.1.0", "files": files}))
    assert verify_record(mcore) == "5 files, as the manifest says"
    mcore_to_hf.convert(mcore, tmp_path / "good")
    flip(step / "__0_1.distcp", 4000)
    with pytest.raises(CheckpointError, match=r"__0_1.distcp has sha256 \w{64}, expected " + files["__0_1.distcp"][1]):
        mcore_to_hf.convert(mcore, tmp_path / "bad")
    os.truncate(step / "__0_1.distcp", 5000)
    with pytest.raises(CheckpointError, match=r"__0_1.distcp has 5,000 bytes, expected "):
        verify_record(mcore)


@pytest.mark.parametrize("record", [REPORT_FILE, "manifest.json"])
def test_a_record_of_a_later_version(mcore, record):  # [43]
    path = mcore / record if record == REPORT_FILE else mcore / "release" / record
    path.write_text(json.dumps({"version": 3, "temper": "9.9.0", "files": {}, "tensors": []}))
    with pytest.raises(CheckpointError, match=rf"{record} was written by a newer Temper \(9.9.0\); use that one"):
        verify_record(mcore)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "its version is None"),
        ('{"version": 1, "tensors": []}', "its version is 1; remove it to go without it"),
        ('{"version": 2}', "it has no tensors with hashes"),
        ('{"version": 2, "tensors": [3]}', "it has no tensors with hashes"),
        ('{"version": 2, "tensors": [{"source": ["x"], "sha256": ["y", "z"]}]}', "it has no tensors with hashes"),
        ('{"version": 2, "tensors": [], "files": {"a": 1}}', "it has no files with sizes and hashes"),
        ('{"version": 2, "tensors": [], "files": {"../hf/config.json": [1, "x"]}}', r"unsafe path '../hf/config.json'"),
        ('{"version": 2, "tensors": [], "files": {}}', r"model.norm.weight is not named"),
        ('{"version": 2, "tensors": [{"target": "x", "sha256": "y"}], "files": {}}', r"x is not there"),
        ('{"version": 2, "tensors": [{"source": ["x"], "sha256": ["y"]}], "files": {}}', r"x is not there"),
    ],
)
def test_a_damaged_report(mcore, content, said):
    (mcore / REPORT_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        verify_record(mcore)


# Comparing two directories ----------------------------------------------------------------------------------


def test_the_first_differences_are_described_and_all_counted(hf, mcore, tmp_path):  # [41]
    tensors = {name: tensor + 1 for name, tensor in tensors_of(UNTIED).items()}
    other = write_hf(tmp_path / "other", tensors=tensors)
    with pytest.raises(CheckpointError, match=r"differ: 51 of 51 tensors differ\n  - ") as caught:
        verify(mcore, other)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and lines[-1] == "  - and 41 more"
    assert lines[1].endswith("model.embed_tokens.weight: 12,048 of 12,048 elements differ (first at [0, 0])")


def test_models_of_other_sizes_are_told_by_what_only_one_has(hf, mcore, tmp_path):
    smaller = write_hf(tmp_path / "smaller", {**UNTIED, "num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"differ: \d+ of 39 tensors differ, 12 are only in one"):
        verify(mcore, smaller)


def test_both_kinds_in_either_order(hf, mcore, back):
    assert verify(hf, mcore) == verify(mcore, hf) == verify(mcore, mcore) == verify(back, hf) == 51
    save_file({**load_file(back / "model.safetensors")}, back / "model.safetensors")
    assert verify(mcore, back) == 51
