"""Against the truth: real megatron-core opens what we write, we read what it saves, logits are transformers'."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import conversion.families
from conversion import hf_to_mcore, mcore_to_hf
from conversion.families import FAMILIES
from conversion.mcore_checkpoint import McoreCheckpoint
from conversion.plan import plan_for
from conversion.safe_pickle import scan_directory
from conversion.verify import verify
from tests.conversion_models import (
    CONFIGS,
    EXPERTS,
    MODELS,
    NEW_FAMILY,
    NEW_MODEL,
    TRAINED,
    register,
    write_hf,
    write_model,
)
from tests.conversion_ranks import SAVED, STOCK

WORLD = 4
RANK_SCRIPT = Path(__file__).with_name("conversion_ranks.py")
OPENED = TRAINED | EXPERTS | {"new": NEW_MODEL}
LAYOUTS = ("TP1 PP1", "TP2 PP1", "TP1 PP2", "TP2 PP2")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which four ranks have opened every model, and saved two, under every layout."""
    work, known = tmp_path_factory.mktemp("ranks"), conversion.families.FAMILIES
    (work / "new_family.py").write_text(NEW_FAMILY)
    register(work / "new_family.py")
    for name, config in OPENED.items():
        (write_hf if name in CONFIGS else write_model)(work / name / "hf", config)
        hf_to_mcore.convert(work / name / "hf", work / name / "mcore")
        torch.save(truth_of(work / name / "hf"), work / name / "truth.pt")
    conversion.families.FAMILIES = known
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
        outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(output[-3000:] for output in outputs)
    return work


def truth_of(folder):
    """Return ids [2, 60] and the logits that transformers computes for them in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return {"ids": ids, "logits": model(ids).logits}


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in OPENED for layout in LAYOUTS] + [(name, "TP1 PP1 EP2") for name in EXPERTS],
)
def test_megatron_core_loads_it_and_computes_the_logits_of_transformers(work, name, layout):
    results = [json.loads((work / f"result-{rank}.json").read_text())[f"{name} {layout}"] for rank in range(WORLD)]
    errors = [result["error"] for result in results if result["error"] is not None]
    assert len(errors) == (WORLD // 2 if "PP2" in layout else WORLD)
    assert max(errors) < 1e-4
    # Every rank's shards were held against slices of the HuggingFace directory.
    assert min(result["slices"] for result in results) > 10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAVED)
def test_a_directory_that_megatron_core_saved_exports(work, name, layout, capsys):
    saved = work / name / f"saved-{layout.lower().replace(' ', '-')}"
    shutil.copytree(work / name / "mcore" / "hf", saved / "hf", dirs_exist_ok=True)
    exported = saved / "../exported" / layout.replace(" ", "")
    mcore_to_hf.convert(saved, exported)
    assert verify(work / name / "hf", exported) == len(plan_for(MODELS[name]).hf_tensors)
    assert ("252 rows trimmed to the 251 of config.json vocab_size" in capsys.readouterr().err) == ("TP2" in layout)


@pytest.mark.parametrize("name", STOCK)
def test_a_directory_with_a_key_each_layer_and_plain_norm_names_exports(work, name):
    stock = work / name / "stock"
    norm = "mlp.linear_fc1.layer_norm_weight" if name in EXPERTS else "pre_mlp_layernorm.weight"
    assert {"decoder.layers.3.input_layernorm.weight", f"decoder.layers.3.{norm}"} <= McoreCheckpoint(
        stock
    ).tensors.keys()
    # Other tools keep config.json at the root.
    shutil.copy(work / name / "hf" / "config.json", stock)
    mcore_to_hf.convert(stock / "release", work / name / "from-stock")
    assert verify(work / name / "hf", work / name / "from-stock")


def test_what_megatron_core_saves_is_not_refused_as_executable(work):
    saved = sorted(work.glob("*/saved-*/iter_0000007"))
    assert len(saved) == len(SAVED) * len(LAYOUTS)
    assert any(key.startswith("optimizer.") for step in saved for key in McoreCheckpoint(step).tensors)
    for step in saved:
        scan_directory(step)


def test_transformers_computes_the_same_from_an_export(work):
    mcore_to_hf.convert(work / "tied" / "mcore", work / "tied" / "again")
    assert torch.equal(truth_of(work / "tied" / "again")["logits"], torch.load(work / "tied" / "truth.pt")["logits"])


def test_layers_that_predict_are_named_and_shaped_as_megatron_core_does(work):
    shapes = json.loads((work / "result-0.json").read_text())["prediction"]
    plan = plan_for(EXPERTS["deepseek-v3"] | {"num_nextn_predict_layers": 1}, predicts=True)
    assert {key: list(info.shape) for key, info in plan.tensors.items()} == shapes


def test_a_new_dense_family_is_a_few_lines():
    """The one above went through all of this file; CONTRIBUTING says how long it is."""
    assert len(NEW_FAMILY.splitlines()) == 13
    assert NEW_MODEL["architectures"][0] not in {name for each in FAMILIES for name in each.architectures}
