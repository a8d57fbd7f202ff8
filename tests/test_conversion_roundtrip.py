"""There and back: bits, files, types, modes, and what the command says."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from conversion import hf_to_mcore, mcore_to_hf
from conversion.filling import Span, write_files
from conversion.hf_as_mcore import HfAsMcore
from conversion.hf_checkpoint import HfCheckpoint, is_hf_directory, safetensors_files
from conversion.mcore_checkpoint import McoreCheckpoint, find_step, hf_folder, is_mcore_directory
from conversion.verify import verify
from tests.conversion_models import CONFIGS, TIED, UNTIED, tensors_of, write_hf
from toolkits.cli import temper
from toolkits.commands.convert import convert as command
from toolkits.foundation.errors import CheckpointError, UsageError, run_guarded


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_equal_bit_for_bit(tmp_path, name, dtype, shards):
    config = {**CONFIGS[name], "num_hidden_layers": 3}
    tensors = tensors_of(config, dtype=dtype)
    write_hf(tmp_path / "hf", config, tensors=tensors, shards=shards)
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(back[key].dtype == dtype and torch.equal(back[key], tensors[key]) for key in tensors)


def test_the_directories_hold_what_their_readers_look_for(tmp_path):
    write_hf(tmp_path / "hf", TIED)  # in the older spelling, which is exported as it is
    (tmp_path / "hf" / "README.md").write_text("not part of the model")
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    carried = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    step = [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json"]
    assert files_of(tmp_path / "mcore") == sorted(
        [f"hf/{name}" for name in carried]
        + ["conversion_report.json", "latest_checkpointed_iteration.txt"]
        + [f"release/{name}" for name in step]
    )
    assert (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (tmp_path / "mcore" / "hf" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    assert json.loads((tmp_path / "mcore" / "release" / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    mcore_to_hf.convert(tmp_path / "mcore" / "release", tmp_path / "back")
    assert files_of(tmp_path / "back") == sorted([*carried, "conversion_report.json", "model.safetensors"])
    for name in carried:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert is_hf_directory(tmp_path / "back") and not is_hf_directory(tmp_path / "mcore")
    assert is_mcore_directory(tmp_path / "mcore") and not is_mcore_directory(tmp_path / "back")


def test_files_are_written_for_whoever_the_umask_lets_read(tmp_path):
    write_hf(tmp_path / "hf")
    before = os.umask(0o027)
    try:
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
        mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    finally:
        os.umask(before)
    for folder in ("mcore", "back"):
        for name in files_of(tmp_path / folder):
            assert stat.S_IMODE((tmp_path / folder / name).stat().st_mode) == 0o640, name


@pytest.mark.parametrize("name", CONFIGS)
def test_any_slice_of_the_merged_tensors_is_read_from_huggingface_files(tmp_path, name):
    write_hf(tmp_path / "hf", CONFIGS[name], shards=2)
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    lazy, written = HfAsMcore(tmp_path / "hf"), McoreCheckpoint(tmp_path / "mcore")
    for key, info in lazy.tensors.items():
        whole = written.read(key, (0,) * len(info.shape), info.shape)
        assert torch.equal(lazy.read(key, (0,) * len(info.shape), info.shape), whole)
        start = tuple(size // 3 for size in info.shape)
        shape = tuple(max(1, size // 2) for size in info.shape)
        cut = tuple(slice(at, at + count) for at, count in zip(start, shape, strict=True))
        assert torch.equal(lazy.read(key, start, shape), whole[cut]), key
        assert torch.equal(written.read(key, start, shape), whole[cut]), key


def test_shards_are_cut_at_their_size_and_named_in_an_index(tmp_path):
    tensors = tensors_of(UNTIED)
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    spans = lambda name, place: Span(name, place.start, tensors[name].nbytes, lambda: [tensors[name]])  # noqa: E731
    shards, index = safetensors_files(kinds, spans, shard_bytes=100_000)
    write_files(tmp_path, shards)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    loaded = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert {name: index["weight_map"][name] for name in load_file(tmp_path / files[0])} == {
        name: files[0] for name in load_file(tmp_path / files[0])
    }


def test_a_file_whose_data_is_not_aligned_is_read(tmp_path):
    tensors = tensors_of(UNTIED)
    write_hf(tmp_path / "hf", tensors=tensors)
    path = tmp_path / "hf" / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    checkpoint = HfCheckpoint(tmp_path / "hf")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_dtype_casts_and_config_follows_on_export(tmp_path, capsys):
    tensors = tensors_of(TIED)
    write_hf(tmp_path / "hf", TIED, tensors=tensors)
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore", dtype="bf16")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor.bfloat16()) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "wide", dtype="float32")
    assert HfCheckpoint(tmp_path / "wide").dtype("model.norm.weight") == torch.float32
    with pytest.raises(UsageError, match=r"--dtype int8: choose one of float32"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "other", dtype="int8")


def test_a_config_that_names_another_type_is_noted_and_nothing_is_cast(tmp_path, capsys):
    write_hf(tmp_path / "hf", tensors=tensors_of(UNTIED, dtype=torch.bfloat16))
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    assert "config.json says float32, the tensors are bfloat16" in capsys.readouterr().err
    assert {tensor.dtype for tensor in McoreCheckpoint(tmp_path / "mcore").tensors.values()} == {torch.bfloat16}


def test_an_existing_output_is_refused_unless_overwritten(tmp_path):
    write_hf(tmp_path / "hf")
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    with pytest.raises(UsageError, match=r"output exists already.*--overwrite"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    (tmp_path / "mcore" / "stale").touch()
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore", overwrite=True)
    assert "stale" not in files_of(tmp_path / "mcore")


def test_links_keep_pointing_where_they_point(tmp_path):
    write_hf(tmp_path / "real")
    (tmp_path / "hf").symlink_to("real")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "release").is_dir()


def test_the_hub_cache_layout_of_links_is_read(tmp_path):
    real = write_hf(tmp_path / "real")
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in real.iterdir():
        path.rename(blobs / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    hf_to_mcore.convert(snapshot, tmp_path / "mcore")
    assert not any(path.is_symlink() for path in (tmp_path / "mcore").rglob("*"))
    assert verify(snapshot, tmp_path / "mcore") == 51


def test_verify_lists_every_difference(tmp_path):
    tensors = tensors_of(UNTIED)
    a = write_hf(tmp_path / "a", tensors=tensors)
    hf_to_mcore.convert(a, tmp_path / "mcore")
    changed = {**tensors, "model.norm.weight": tensors["model.norm.weight"].clone()}
    changed["model.norm.weight"][5] += 1
    changed["lm_head.weight"] = -0.0 * torch.ones(251, 48)
    b = write_hf(tmp_path / "b", tensors=changed)
    with pytest.raises(
        CheckpointError, match=r"(?s)2 of 51 tensors differ.*norm.weight: 1 of 48 elements differ \(first at \[5\]\)"
    ):
        verify(tmp_path / "mcore", b)
    c = write_hf(tmp_path / "c", tensors={**changed, "lm_head.weight": torch.zeros(251, 48)})
    with pytest.raises(CheckpointError, match=r"lm_head.weight: signs of zeros or NaN payloads differ"):
        verify(b, c)
    d = write_hf(tmp_path / "d", {**UNTIED, "num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"layers.3.input_layernorm.weight: only in"):
        verify(a, d)


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    write_hf(tmp_path / "hf")
    honest = HfAsMcore.slices

    def forgetful(self, step):
        for rows in honest(self, step):
            yield rows * (0 if step.key == "decoder.final_layernorm.weight" else 1)

    monkeypatch.setattr(HfAsMcore, "slices", forgetful)
    with pytest.raises(CheckpointError, match=r"differs from its source; nothing was published.*model.norm.weight"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore", verify=False)


def test_find_step_takes_a_directory_or_one_of_its_steps(tmp_path):
    write_hf(tmp_path / "hf")
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    step = tmp_path / "mcore" / "release"
    assert find_step(tmp_path / "mcore") == find_step(step) == step
    assert hf_folder(tmp_path / "mcore") == hf_folder(step) == tmp_path / "mcore" / "hf"


def test_the_command_converts_both_ways_and_verifies(tmp_path):
    write_hf(tmp_path / "hf")
    run = CliRunner().invoke
    there = run(command, ["hf2mcore", str(tmp_path / "hf"), str(tmp_path / "mcore")], catch_exceptions=False)
    assert there.exit_code == 0 and "10 tensors, 113,936 parameters, read again and equal bit for bit" in there.output
    back = run(command, ["mcore2hf", str(tmp_path / "mcore"), str(tmp_path / "back"), "--no-verify"])
    assert back.exit_code == 0 and "51 tensors, 113,936 parameters, not verified" in back.output
    same = run(command, ["verify", str(tmp_path / "hf"), str(tmp_path / "back")])
    assert same.exit_code == 0 and "equal: 51 tensors, bit for bit" in same.output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["hf2mcore", "other", "out"], 4, "error: architecture Other is not supported"),
        (["hf2mcore", "other", "other"], 2, "error: input and output are the same folder"),
        (["hf2mcore", "nowhere", "out"], 4, "config.json is missing"),
        (["mcore2hf", "nowhere", "out"], 4, "no checkpoint at nowhere"),
        (["verify", "nowhere", "other"], 4, "config.json is missing"),
        (["hf2mcore", "other"], 2, "Missing argument 'DST'"),
    ],
)
def test_the_command_leaves_with_the_kind_of_the_error(tmp_path, monkeypatch, capsys, arguments, code, said):
    write_hf(tmp_path / "other", {**UNTIED, "architectures": ["Other"]})
    monkeypatch.chdir(tmp_path)
    assert run_guarded(lambda: temper(["convert", *arguments])) == code
    assert said in capsys.readouterr().err


def test_the_exit_code_reaches_the_shell(tmp_path):
    arguments = [sys.executable, "-m", "toolkits.cli", "convert", "hf2mcore", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(arguments, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    assert done.returncode == 2 and "lies inside the other" in done.stderr and "Traceback" not in done.stderr
