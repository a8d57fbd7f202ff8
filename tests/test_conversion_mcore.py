"""Against the truth: real megatron-core opens what we write, we read what it saves, logits are transformers'."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversion import hf_to_mcore, mcore_to_hf
from conversion.mcore_checkpoint import McoreCheckpoint
from conversion.safe_pickle import scan_directory
from conversion.verify import verify
from tests.conversion_models import CONFIGS, write_hf

WORLD = 4
RANK_SCRIPT = Path(__file__).with_name("conversion_ranks.py")
LAYOUTS = ("TP1 PP1", "TP2 PP1", "TP1 PP2", "TP2 PP2")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which four ranks have opened and saved both models under every layout."""
    work = tmp_path_factory.mktemp("ranks")
    for name, config in CONFIGS.items():
        write_hf(work / name / "hf", config)
        hf_to_mcore.convert(work / name / "hf", work / name / "mcore")
        torch.save(truth_of(work / name / "hf"), work / name / "truth.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK_SCRIPT), str(rank), str(WORLD), str(work)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(output[-3000:] for output in outputs)
    return work


def truth_of(folder):
    """Return ids [2, 16] and the logits that transformers computes for them in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return {"ids": ids, "logits": model(ids).logits}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_megatron_core_loads_it_and_computes_the_logits_of_transformers(work, name, layout):
    results = [json.loads((work / f"result-{rank}.json").read_text())[f"{name} {layout}"] for rank in range(WORLD)]
    errors = [result["error"] for result in results if result["error"] is not None]
    assert len(errors) == (WORLD // 2 if "PP2" in layout else WORLD)
    assert max(errors) < 1e-4
    # Every rank's shards were held against slices of the HuggingFace directory.
    assert min(result["slices"] for result in results) > 10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_that_megatron_core_saved_exports(work, name, layout, capsys):
    saved = work / name / f"saved-{layout.lower().replace(' ', '-')}"
    shutil.copytree(work / name / "mcore" / "hf", saved / "hf", dirs_exist_ok=True)
    exported = saved / "../exported" / layout.replace(" ", "")
    mcore_to_hf.convert(saved, exported)
    assert verify(work / name / "hf", exported) == (51 if name == "untied" else 50)
    assert ("252 rows trimmed to the 251 of config.json vocab_size" in capsys.readouterr().err) == ("TP2" in layout)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_with_a_key_each_layer_and_plain_norm_names_exports(work, name):
    stock = work / name / "stock"
    assert "decoder.layers.3.pre_mlp_layernorm.weight" in McoreCheckpoint(stock).tensors
    # Other tools keep config.json at the root.
    shutil.copy(work / name / "hf" / "config.json", stock)
    mcore_to_hf.convert(stock / "release", work / name / "from-stock")
    assert verify(work / name / "hf", work / name / "from-stock")


def test_what_megatron_core_saves_is_not_refused_as_executable(work):
    saved = sorted(work.glob("*/saved-*/iter_0000007"))
    assert len(saved) == len(CONFIGS) * len(LAYOUTS)
    assert any(key.startswith("optimizer.") for step in saved for key in McoreCheckpoint(step).tensors)
    for step in saved:
        scan_directory(step)


def test_transformers_computes_the_same_from_an_export(work):
    mcore_to_hf.convert(work / "tied" / "mcore", work / "tied" / "again")
    assert torch.equal(truth_of(work / "tied" / "again")["logits"], torch.load(work / "tied" / "truth.pt")["logits"])
