"""Where a run comes from and what it made, followed from file to file."""

import hashlib
import json
import shutil

import pytest
from click.testing import CliRunner
from safetensors.torch import save_file

from conversion.digest import weights_digest
from conversion.hf_checkpoint import copy_sidecar_files
from toolkits.cli import temper
from toolkits.foundation.errors import MachineError
from toolkits.monitoring.lineage import (
    CARRIED,
    Lineage,
    chain,
    made_by_origin,
    manifest_hash,
    origin_of,
)
from toolkits.monitoring.record import LINEAGE, recorded

MANIFEST = {"input": {"name": "talks.jsonl"}, "files": {".bin": {"bytes": 40, "sha256": "ab" * 32}}}
DATA = {"path": "/data/talks", "uses": ["training"], "rows": 3, "tokens": 10, "trained_tokens": 4, "manifest": MANIFEST}
START = {
    "started": "then",
    "line": "temper train sft",
    "steps": 2,
    "layout": {"text": "TP1 PP1 DP1"},
    "precision": "bf16",
    "settings": {"seq_len": 128, "global_batch_size": 4, "lr": 1e-3},
    "data": [DATA],
}


def write_weights(folder, value):
    import torch

    folder.mkdir(parents=True)
    save_file({"w": torch.full((3,), float(value))}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def base_of(folder, kind="huggingface"):
    return {
        "kind": kind,
        "path": str(folder),
        "digest": weights_digest(folder),
        "manifest": manifest_hash(folder),
        "config": "c0",
        "tokenizer": "70",
        "origin": origin_of(folder),
    }


def train(out, base, *, name="sft", steps=(1, 2), start=START):
    """Leave what a run leaves, without its weights; return its folder and a way to note an export."""
    folder = out / "checkpoint" / name
    (folder / "hf").mkdir(parents=True, exist_ok=True)
    with recorded(folder, about={"steps": 2}, measure=dict) as record:
        lineage = Lineage(record, base=base, start=start)
        for step in steps:
            (folder / f"iter_{step:07d}").mkdir(exist_ok=True)
            (folder / f"iter_{step:07d}" / "manifest.json").write_text(f"{out} {step}")
            lineage.saved()
    return folder, lineage


@pytest.fixture
def tuned(tmp_path):
    """A run from a foreign model, and its export."""
    folder, lineage = train(tmp_path / "one", base_of(write_weights(tmp_path / "qwen", 1)), name="first")
    export = write_weights(tmp_path / "one" / "huggingface" / "first", 2)
    lineage.exported(export, step="iter_0000002")
    return folder, export


def shown(root, name):
    result = CliRunner().invoke(temper, ["runs", "show", name, str(root)])
    assert result.exit_code == 0, result.exception
    return result.output.split("lineage, from the first base and data on\n")[1].splitlines()


def test_a_digest_tells_tunings_apart_that_begin_alike(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        raw = bytearray(1 << 20)
        raw[600_000:900_000] = bytes([name == "one"]) * 300_000
        (tmp_path / name / "model.safetensors").write_bytes(raw)
    assert weights_digest(tmp_path / "one") != weights_digest(tmp_path / "other")


def test_steps_and_exports_carry_their_hashes(tuned):
    folder, export = tuned
    document = json.loads((folder / LINEAGE).read_text())
    assert document == json.loads((folder.parent.parent / LINEAGE).read_text())
    assert document == json.loads((export / CARRIED).read_text()) == json.loads((folder / "hf" / CARRIED).read_text())
    assert [step["folder"] for step in document["steps"]] == ["iter_0000001", "iter_0000002"]
    manifest = (folder / "iter_0000002" / "manifest.json").read_bytes()
    assert document["steps"][1]["manifest"] == hashlib.sha256(manifest).hexdigest()
    weights = (export / "model.safetensors").read_bytes()
    (made,) = document["exports"]
    assert (made["folder"], made["step"]) == (str(export), "iter_0000002")
    described = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    assert made["files"] == {"model.safetensors": described}


def test_the_chain_goes_on_from_an_export(tmp_path, tuned):
    train(tmp_path / "two", base_of(tuned[1]), name="second")
    shutil.rmtree(tmp_path / "one")
    lines = shown(tmp_path, "second")
    kinds = [line.split()[0] for line in lines]
    assert kinds == ["base", "data", "run", "step", "step", "export", "base", "data", "run", "step", "step"]
    assert str(tmp_path / "qwen") in lines[0] and "made of talks.jsonl, tokens sha256 abababababababab" in lines[1]
    assert "first: seq_len 128" in lines[2] and f"{tuned[1]} of iter_0000002, model.safetensors sha256" in lines[5]
    assert f"{tuned[1]} of run first, unchanged" in lines[6] and "second" in lines[8]


def test_the_chain_goes_on_from_a_step_and_through_a_conversion(tmp_path, tuned):
    folder, export = tuned
    step = base_of(folder / "iter_0000002", "megatron-core") | {"origin": origin_of(folder / "hf")}
    assert made_by_origin(step)["folder"] == "iter_0000002"
    converted = write_weights(tmp_path / "converted", 3)
    copy_sidecar_files(export, converted)
    base = base_of(converted)
    assert made_by_origin(base) is None and [each["run"]["name"] for each in chain({"base": base})[:-1]] == ["first"]
    train(tmp_path / "three", base, name="third")
    assert any("from run first, converted or changed since" in line for line in shown(tmp_path, "third"))


def test_weights_that_were_changed_after_the_export_are_said(tmp_path, tuned):
    write_weights(tmp_path / "other", 5)
    shutil.copy(tmp_path / "other" / "model.safetensors", tuned[1])
    assert made_by_origin(base_of(tuned[1])) is None


def test_starts_are_kept_when_they_differ_and_forgotten_by_a_new_run(tmp_path):
    base = base_of(write_weights(tmp_path / "qwen", 1))
    folder, lineage = train(tmp_path, base)
    lineage.exported(write_weights(tmp_path / "export", 2), step="iter_0000002")
    train(tmp_path, base, start=START | {"started": "later"})
    train(tmp_path, base, start=START | {"precision": "fp32"})
    document = json.loads((folder / LINEAGE).read_text())
    assert [(start["precision"], start["after"]) for start in document["starts"]] == [
        ("bf16", None),
        ("fp32", "iter_0000002"),
    ]
    assert len(document["exports"]) == 1
    for step in folder.glob("iter_*"):
        shutil.rmtree(step)
    train(tmp_path, base, steps=())
    document = json.loads((folder / LINEAGE).read_text())
    assert (len(document["starts"]), document["exports"], document["steps"]) == (1, [], [])


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"base": {"origin": {}}}', '{"base": 3}'])
def test_a_damaged_lineage_is_said(tmp_path, tuned, text):
    folder, export = tuned
    (folder / LINEAGE).write_text(text)
    assert any("lineage.json is damaged" in line for line in shown(tmp_path, "first"))
    (export / CARRIED).write_text(text)
    train(tmp_path / "two", base_of(export), name="second")
    shown(tmp_path, "second")


def test_a_tracker_without_its_package_is_refused_with_what_to_install(monkeypatch):
    import sys

    from toolkits.monitoring.trackers import require_tracker

    require_tracker("none")
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MachineError, match=rf"--tracker {name}.*pip install 'temper-mcore\[{name}\]'"):
            require_tracker(name)
