"""`temper verify --logits`: transformers and the real GPTModel on the same tokens, in a process of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conversion import hf_to_mcore
from tests.conversion_models import TIED, write_hf
from tests.training_world import write_model

ROOT = Path(__file__).resolve().parents[1]
# Loading torch, transformers and megatron-core takes longer than all cases together.
SCRIPT = """
import contextlib, io, json, sys
from pathlib import Path
from toolkits.cli import temper
from toolkits.foundation.errors import run_guarded

results = {}
for name, arguments in json.loads(Path("cases.json").read_text()).items():
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = run_guarded(lambda: temper(["verify", *arguments], standalone_mode=False))
    results[name] = [code, said.getvalue(), complained.getvalue()]
Path("results.json").write_text(json.dumps(results))
"""
CASES = {
    "same": "--logits hf mcore",
    "text": "--logits hf mcore --text one --text two --file text.txt",
    "long text": "--logits hf mcore --file long.txt --max-tokens 600",
    "another": "--logits another mcore",
    "tolerant": "--logits another mcore --tolerance 10",
    "nan": "--logits nan mcore",
    "another vocabulary": "--logits plain mcore",
    "without tokenizer": "--logits plain plain-mcore",
    "text without tokenizer": "--logits plain plain-mcore --text a",
    "nothing": "",
    "two commands": "--logits hf mcore card qwen2",
    "no huggingface": "--logits nowhere mcore",
    "no megatron": "--logits hf nowhere",
    "no tokens": "--logits hf mcore --file empty.txt",
    "no file": "--logits hf mcore --file nowhere.txt",
    "no text": "--logits hf mcore --file hf/model.safetensors",
}


def changed(source, target, change):
    """Copy a HuggingFace directory and change its tensors."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    work = tmp_path_factory.mktemp("logits")
    hf = write_model(work / "hf")
    hf_to_mcore.convert(hf, work / "mcore", verify=False)
    hf_to_mcore.convert(write_hf(work / "plain", TIED), work / "plain-mcore", verify=False)
    changed(hf, work / "another", lambda tensors: tensors["model.layers.2.self_attn.k_proj.bias"][3].add_(0.5))
    changed(hf, work / "nan", lambda tensors: tensors["model.norm.weight"][0].fill_(float("nan")))
    (work / "text.txt").write_text("Ein Gedanke, 一个想法.", encoding="utf-8")
    (work / "long.txt").write_text("x" * 700)
    (work / "empty.txt").touch()
    (work / "cases.json").write_text(json.dumps({name: line.split() for name, line in CASES.items()}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=work, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((work / "results.json").read_text())


def test_the_same_model(results):
    code, said, _ = results["same"]
    assert code == 0 and said.startswith("same model. 256 tokens: max difference ")
    assert "same most likely token at 256" in said
    assert float(said.split("max difference ")[1].split()[0]) < 1e-5


def test_given_text(results):
    code, said, _ = results["text"]
    assert code == 0 and said.startswith("same model. 32 tokens")  # one for each byte
    code, said, complained = results["long text"]
    assert code == 0 and said.startswith("same model. 600 tokens")  # in two rows
    assert "the first 600 of 700 tokens are compared (--max-tokens)" in complained


def test_a_folder_without_a_tokenizer_is_compared_on_random_tokens(results):
    assert results["without tokenizer"][0] == 0
    code, _, complained = results["text without tokenizer"]
    assert code == 4 and "transformers cannot load its tokenizer" in complained


def test_another_model(results):  # [41]
    code, _, complained = results["another"]
    assert code == 4 and "are not the same model. 256 tokens: max difference" in complained
    assert "(tolerance 0.0001)" in complained
    assert results["tolerant"][0] == 0
    assert results["nan"][0] == 4 and "max difference inf" in results["nan"][2]


@pytest.mark.parametrize(
    ("case", "code", "said"),
    [
        ("another vocabulary", 4, "have vocabularies of 251 and 261 tokens"),
        ("nothing", 2, "say what to verify: temper verify --logits HF MCORE"),
        ("two commands", 2, "--logits and card are two commands"),
        ("no huggingface", 4, "config.json is missing"),
        ("no megatron", 4, "no checkpoint at nowhere"),
        ("no tokens", 2, "no tokens to compare on: give some text"),
        ("no file", 6, "nowhere.txt"),
        ("no text", 2, "is not UTF-8"),
    ],
)
def test_what_cannot_be_verified(results, case, code, said):
    assert results[case][0] == code
    assert said in results[case][2]
