"""What temper generate refuses to load, and how it says so."""

import pytest
import torch
from generate_world import copied, questions, random_adapter

from conversion import hf_to_mcore
from toolkits.foundation.errors import (
    CheckpointError,
    DataError,
    MachineError,
    NumericsError,
    UsageError,
)
from toolkits.generation.answering import Generator
from toolkits.generation.decoding import Decoding
from toolkits.generation.loading import Source, load_model
from toolkits.generation.prompts import question_of
from toolkits.generation.texts import Texts


def test_megatron_directories_are_refused_with_the_command_that_exports_them(base, tmp_path):
    hf_to_mcore.convert(base, tmp_path / "mcore")
    for folder in (tmp_path / "mcore", tmp_path / "mcore" / "release"):
        with pytest.raises(CheckpointError, match=f"temper convert mcore2hf {folder} OUT"):
            load_model(Source(folder))
    random_adapter(base, tmp_path / "mcore" / "release")
    step = tmp_path / "mcore" / "release"
    with pytest.raises(
        CheckpointError, match=f"--adapter {step} .base: base., .* temper convert merge base {step} OUT"
    ):
        load_model(Source(tmp_path / "mcore"))


def test_a_checkpoint_with_holes_is_not_filled_at_random(base, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = copied(base, tmp_path / "holes", tensors=lambda content: content.pop(name))
    with pytest.raises(CheckpointError, match=f"does not fill the model: {name} is missing"):
        load_model(Source(folder))


def test_what_transformers_leaves_unused_is_said(base, tmp_path, capsys):
    folder = copied(base, tmp_path / "more", tensors=lambda content: content.update(stray=torch.zeros(2)))
    load_model(Source(folder))
    assert "note: transformers does not use stray" in capsys.readouterr().err


def test_nothing_of_a_checkpoint_is_executed(base, tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return (print, ("executed",))

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = copied(base, tmp_path / "pickle")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.zeros(2), "other": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refusing executable content"):
        load_model(Source(folder))
    remote = copied(base, tmp_path / "remote", model_type="mine", auto_map={"AutoConfig": "own.Config"})
    (remote / "own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_model(Source(remote))


def test_folders_devices_and_types_that_are_not_there(base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load_model(Source(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json is missing: .* is not a HuggingFace checkpoint"):
        load_model(Source(tmp_path / "empty"))
    with pytest.raises(MachineError, match="torch sees 0 GPUs; choose --device cpu"):
        load_model(Source(base, device="cuda:1"))
    with pytest.raises(UsageError, match="--device gpu: choose auto, cpu, cuda"):
        load_model(Source(base, device="gpu"))
    with pytest.raises(UsageError, match="--dtype int8"):
        load_model(Source(base, dtype="int8"))
    with pytest.raises(UsageError, match="give a --temperature above 0"):
        Decoding(top_p=0.9)


def test_a_missing_tokenizer_or_template_is_said_before_the_model_is_loaded(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("toolkits.generation.answering.load_model", lambda source: pytest.fail("loaded"))
    bare = copied(base, tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    with pytest.raises(DataError, match=r"no tokenizer here; looked for tokenizer.json"):
        Generator(Source(bare), Decoding())
    untemplated = copied(base, tmp_path / "untemplated")
    (untemplated / "chat_template.jinja").unlink()
    Texts(untemplated)
    assert "note: ChatML, because the tokenizer has no chat template" in capsys.readouterr().err
    for path in (untemplated / "tokenizer.json", untemplated / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("<|im_start|>", "<|begin|>"))
    with pytest.raises(DataError, match=r"has no chat template, .* or say --no-template"):
        Generator(Source(untemplated), Decoding())
    assert Texts(untemplated, template=False).tokens(question_of("a"))


def test_weights_that_are_not_numbers_are_said(base, tmp_path):
    folder = copied(base, tmp_path / "nan", tensors=lambda content: content["lm_head.weight"].fill_(torch.nan))
    broken = Generator(Source(folder), Decoding(max_new_tokens=2))
    with pytest.raises(NumericsError, match="logits are not numbers"):
        broken.answer_all(questions(), batch_size=2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_said_with_what_to_try(generator, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(generator.decoder.model, "generate", fail)
    expected = (
        r"out of memory answering 4 questions of up to \d+ tokens at once: .*\n.*--batch-size 2, --dtype bfloat16"
    )
    with pytest.raises(MachineError, match=expected):
        generator.answer_all(questions(), batch_size=4)
