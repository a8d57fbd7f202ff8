"""QLoRA against HuggingFace, bitsandbytes and PEFT from one initial adapter, and against itself at every layout."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from conversion_models import EXPERTS, TRAINED
from conversion_models import write_model as write_family
from qlora_memory import write_zeros
from safetensors.torch import load_file
from training_world import (
    ROOT,
    TINY,
    VOCABULARY,
    free_ports,
    mostly_full,
    run_cases,
    selected,
    write_dataset,
    write_model,
    write_tokenizer,
)
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from conversion import hf_to_mcore
from conversion.merge import merge
from toolkits.cards.lesson import LEARNT, lesson, plain_losses
from toolkits.cli import temper
from toolkits.foundation.errors import MachineError, UsageError
from toolkits.training.lora import Lora
from toolkits.training.objectives import OBJECTIVES
from toolkits.training.run import run
from toolkits.training.run_folder import _compare, fingerprint
from toolkits.training.sources import find_model

peft = pytest.importorskip("peft", reason="PEFT is compared with: pip install '.[dev]'")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is compared with: pip install '.[qlora]'")

TOLERANCE = 1e-3
# Multiples of 64, pairwise distinct. TP=2 cuts a block of the MLP's 192 columns, and of the 320 of the attention.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
}
RATES = {"lr": 2e-2, "min_lr": 2e-3}
LORA = {"r": 5, "lora_alpha": 20, "target_modules": "all-linear"}
# With a usual epsilon, Adam makes a whole step of a gradient that is zero but for rounding.
SHORT = {"train_iters": 3, "warmup_iters": 1, "lr": 1e-2, "min_lr": 1e-3, "adam_eps": 1e-4}
FORMATS = ("nf4", "int8")
LAYOUTS = {
    "nf4-tp2": {"tensor_parallel": 2, "sequence_parallel": False},
    "nf4-tp2-sp": {"tensor_parallel": 2},
    "nf4-pp2": {"pipeline_parallel": 2},
    "int8-tp2-sp": {"tensor_parallel": 2},
}


# Experts, latent attention and matrices that the checkpoint fuses, each with the rows that its layout divides.
FAMILIES = {
    "qwen2-moe": (
        "nf4",
        {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 320,
        },
        {"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1},
    ),
    "mixtral": (
        "nf4",
        {"hidden_size": 128, "num_attention_heads": 8, "head_dim": 24, "intermediate_size": 320},
        {"tensor_parallel": 2},
    ),
    "deepseek-v3": (
        "nf4",
        {
            "hidden_size": 192,
            "intermediate_size": 320,
            "moe_intermediate_size": 64,
            "q_lora_rank": 64,
            "kv_lora_rank": 128,
            "v_head_dim": 64,
        },
        {"tensor_parallel": 2},
    ),
    "phi3": ("int8", {}, {"tensor_parallel": 2}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora")
    write_model(folder / "dense", tied=False, **SIZES)
    data = write_dataset(folder / "data", folder / "dense", rows=40)
    hf_to_mcore.convert(folder / "dense", folder / "mcore")
    write_adapter(folder / "dense", folder / "adapter")
    for name, (_, sizes, _) in FAMILIES.items():
        write_family(
            folder / name, (TRAINED | EXPERTS)[name] | sizes | {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
        )
        write_tokenizer(folder / name)
    return folder, data


def family_case(inputs, out, name, **layout):
    kind = FAMILIES[name][0]
    return lesson(inputs[0] / name, inputs[1], out, lora_rank=3, quantize=kind, **SHORT, **layout)


def write_adapter(base, folder):
    """Write a PEFT adapter whose matrices are all different and whose B is not zero."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(network, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    adapted.save_pretrained(folder)


def quantized_network(folder, kind, adapter=None):
    """The model as transformers and bitsandbytes quantise it, with the adapter as PEFT has it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if kind == "nf4":
        said = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    else:
        said = BitsAndBytesConfig(load_in_8bit=True)
    network = AutoModelForCausalLM.from_pretrained(
        folder / "dense", dtype=torch.float32, quantization_config=said, device_map="cpu"
    )
    return peft.PeftModel.from_pretrained(network, adapter or folder / "adapter", is_trainable=True).train()


def case(inputs, out, kind="nf4", base="dense", **changes):
    folder, data = inputs
    return lesson(folder / base, data, out, adapter=folder / "adapter", quantize=kind, **(RATES | changes))


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory, request):
    """Runs on one rank: of 20 steps in both formats, short ones, and those of other families."""
    folder = tmp_path_factory.mktemp("alone")
    cases = {kind: case(inputs, folder / kind, kind).flags() for kind in FORMATS}
    cases |= {f"{kind}-short": case(inputs, folder / f"{kind}-short", kind, **SHORT).flags() for kind in FORMATS}
    cases["nf4-short"] += ["--export-hf"]
    cases["recompute"] = case(inputs, folder / "recompute", recompute="full", **SHORT).flags()
    cases["bf16"] = case(inputs, folder / "bf16", precision="bf16", **SHORT).flags()
    cases["none"] = case(inputs, folder / "none", "none", **SHORT).flags()
    families = sorted(selected(request, "family"))
    cases |= {name: family_case(inputs, folder / name, name).flags() for name in families}
    steady = {"lr": 1e-2, "min_lr": 1e-2, "warmup_iters": 0}  # the same rate however many steps
    cases["whole"] = case(inputs, folder / "whole", train_iters=3, **steady).flags()
    cases["half"] = case(inputs, folder / "resumed", train_iters=1, **steady).flags()
    cases["resumed"] = case(inputs, folder / "resumed", train_iters=3, **steady).flags()
    return folder, run_cases(folder / "world", 1, cases)


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory, request):
    """The short runs at every layout, from a Megatron-core directory, whose rows lie fused, and of other families."""
    folder = tmp_path_factory.mktemp("two")
    layouts, families = selected(request, "layout") & set(LAYOUTS), selected(request, "family")
    cases = {
        name: case(inputs, folder / name, name.partition("-")[0], **LAYOUTS[name], **SHORT).flags()
        for name in sorted(layouts)
    }
    cases |= {name: family_case(inputs, folder / name, name, **FAMILIES[name][2]).flags() for name in sorted(families)}
    cases["nf4-mcore"] = case(inputs, folder / "nf4-mcore", base="mcore", tensor_parallel=2, **SHORT).flags()
    return folder, run_cases(folder / "world", 2, cases)


def losses(history):
    return [step["loss"] for step in history]


def saved(folder, name):
    """The newest adapter of a run, as tensors."""
    (*_, step) = sorted((folder / name / "checkpoint" / "sft").glob("iter_*"))
    return load_file(step / "adapter_model.safetensors")


def largest_relative(ours, theirs):
    assert set(ours) == set(theirs)
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


@pytest.mark.parametrize("kind", FORMATS)
def test_twenty_steps_equal_those_of_bitsandbytes_and_peft(inputs, alone, kind, tmp_path):
    expected = plain_losses(case(inputs, tmp_path, kind), quantized_network(inputs[0], kind))
    assert losses(alone[1][kind]) == pytest.approx(expected, abs=TOLERANCE)
    assert expected[-1] < expected[0] - LEARNT, "nothing was learned: the comparison would prove little"


def test_a_model_that_is_not_quantised_is_told_apart(alone):
    histories = alone[1]
    for kind, least in (("nf4", 10 * TOLERANCE), ("int8", TOLERANCE / 10)):
        pairs = zip(losses(histories["none"]), losses(histories[f"{kind}-short"]), strict=True)
        assert max(abs(a - b) for a, b in pairs) > least, kind


def test_bf16_learns_the_same(alone):
    """Rounded to 8 bits, activations differ by more than what is compared elsewhere."""
    assert losses(alone[1]["bf16"]) == pytest.approx(losses(alone[1]["nf4-short"]), abs=0.1)


@pytest.mark.parametrize("layout", mostly_full([*LAYOUTS, "nf4-mcore"], ["nf4-tp2-sp", "nf4-mcore"]))
def test_every_layout_trains_the_same_adapter(alone, two_ranks, layout):
    name = layout
    own = f"{name.partition('-')[0]}-short"
    assert losses(two_ranks[1][name]) == pytest.approx(losses(alone[1][own]), abs=1e-5)
    assert largest_relative(saved(two_ranks[0], name), saved(alone[0], own)) < 1e-4


def test_what_is_computed_again_trains_the_same_adapter(alone):
    assert losses(alone[1]["recompute"]) == pytest.approx(losses(alone[1]["nf4-short"]), abs=1e-6)


def test_a_run_goes_on_bit_for_bit(alone):
    """The base is read and quantised again."""
    folder, histories = alone
    assert losses(histories["half"]) + losses(histories["resumed"]) == losses(histories["whole"])
    first, second = saved(folder, "whole"), saved(folder, "resumed")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_format_is_another_run(inputs, alone):
    folder = alone[0]
    config = case(inputs, folder / "resumed", "int8", train_iters=3)
    with pytest.raises(UsageError, match="adapter"):
        same = fingerprint(config, find_model(config.model))
        _compare(config.output.folder, same, config)


def step_of(folder, name):
    (*_, step) = sorted((folder / name / "checkpoint" / "sft").glob("iter_*"))
    return step


@pytest.mark.parametrize("base", ["dense", "mcore"])
@pytest.mark.parametrize("kind", FORMATS)
def test_merged_into_the_quantised_base_it_is_the_model_that_was_trained(inputs, alone, tmp_path, kind, base):
    """Numbers of the matrices by bitsandbytes, and the delta; everything else is the base's."""
    step = step_of(alone[0], kind)
    words = ["convert", "merge", inputs[0] / base, step, tmp_path / "out", "--quantized-base", kind]
    result = CliRunner().invoke(temper, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", inputs[0] / "dense"))
    network = quantized_network(inputs[0], kind, adapter=step)
    layers = {name: layer for name, layer in network.named_modules() if hasattr(layer, "get_delta_weight")}
    assert len(layers) == 14
    for name, layer in layers.items():
        key = f"{name.removeprefix('base_model.model.')}.weight"
        expected = dequantize_bnb_weight(layer.base_layer.weight, getattr(layer.base_layer, "state", None))
        expected = expected + layer.get_delta_weight("default")
        torch.testing.assert_close(found[key], expected.detach(), atol=1e-6, rtol=1e-6)
        assert (found.pop(key) - original[key]).abs().max() > 1e-3
    assert all(torch.equal(tensor, original[key]) for key, tensor in found.items())
    notes = json.loads((tmp_path / "out" / "conversion_report.json").read_text())["notes"]
    assert f"the base's matrices were quantised to {kind} from float32 and back" in notes


def test_without_a_word_the_original_base_is_what_it_is_merged_into(inputs, alone, tmp_path):
    """So does EXPORT_HF; the report says that the run saw another."""
    step = step_of(alone[0], "nf4-short")
    merge(inputs[0] / "dense", [(step, 1.0)], tmp_path / "out")
    exported = alone[0] / "nf4-short" / "huggingface" / "sft"
    found, own = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", exported))
    assert all(torch.equal(found[name], own[name]) for name in found)
    for folder in (tmp_path / "out", exported):
        notes = json.loads((folder / "conversion_report.json").read_text())["notes"]
        assert any("was trained on the base quantised to nf4" in note for note in notes), notes
    (step.parent / "plain").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(step / name, step.parent / "plain" / name)
    merge(inputs[0] / "dense", [(step.parent / "plain", 1.0)], tmp_path / "plain")
    assert same_files(tmp_path / "plain", tmp_path / "out"), "what the run noted beside the adapter changes no number"


def same_files(one, other):
    name = "model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def test_formats_that_do_not_fit_are_refused(inputs, alone, tmp_path):
    step = step_of(alone[0], "int8")
    with pytest.raises(UsageError, match="--quantized-base nf4 is not what every adapter was trained on"):
        merge(inputs[0] / "dense", [(step, 1.0)], tmp_path / "out", quantized_base="nf4")
    with pytest.raises(UsageError, match="--unmerge takes an adapter out of what it was merged into"):
        merge(inputs[0] / "dense", [(step, 1.0)], tmp_path / "out", unmerge=True, quantized_base="int8")
    assert not (tmp_path / "out").exists()


def test_a_format_without_adapters_and_rows_that_blocks_do_not_divide_are_refused(inputs, tmp_path):
    write_model(tmp_path / "narrow", tied=False)
    config = lesson(tmp_path / "narrow", inputs[1], tmp_path / "out", lora_rank=3, quantize="nf4")
    with pytest.raises(UsageError) as caught:
        Lora.of(config, find_model(config.model))
    said = str(caught.value)
    assert "nf4 takes rows in blocks of 64 columns (int8 takes any)" in said and caught.value.exit_code == 2
    assert "model.layers.0.self_attn.q_proj is 48 x 48" in said and "mlp.down_proj is 48 x 112" in said
    assert Lora.of(replace_format(config, "int8"), find_model(config.model)).tuning.quantize == "int8"
    config = lesson(tmp_path / "narrow", inputs[1], tmp_path / "out", quantize="nf4")
    assert config.problems() == ["--quantize: give --lora-rank or --adapter too, or all weights are trained"]


def replace_format(config, kind):
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, quantize=kind))


def test_without_bitsandbytes_it_says_which_extra(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(MachineError, match=re.escape("pip install 'temper-mcore[qlora]'")) as caught:
        run(case(inputs, tmp_path / "out"), OBJECTIVES["sft"])
    assert caught.value.exit_code == 5 and not (tmp_path / "out").exists()


# Deep and narrow: what one layer takes is little beside the whole.
DEEP = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.mark.full
def test_the_model_is_never_in_memory_in_bf16(tmp_path):
    """380 MB in bf16; the same without quantisation takes more than that, so that the measure is one."""
    size = write_zeros(tmp_path / "deep", TINY | DEEP)
    grown = {kind: json.loads(said) for kind, said in grown_by_loading(tmp_path / "deep", ("none", "nf4")).items()}
    assert grown["none"]["grown"] > size
    assert grown["nf4"]["held"] < 0.3 * size and grown["nf4"]["grown"] < 0.6 * size


def grown_by_loading(folder, kinds):
    """Return what a process says that loads the model in each format, all at once."""
    script, env = ROOT / "tests" / "qlora_memory.py", os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    running = {
        kind: subprocess.Popen(
            [sys.executable, "-W", "ignore", script, folder, kind],
            env=env | {"MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for kind, port in zip(kinds, free_ports(len(kinds)), strict=True)
    }
    said = {kind: process.communicate(timeout=200) for kind, process in running.items()}
    assert all(process.returncode == 0 for process in running.values()), said
    return {kind: output.strip().splitlines()[-1] for kind, (output, _) in said.items()}


@pytest.mark.parametrize("family", mostly_full(FAMILIES, ["qwen2-moe", "deepseek-v3"]))
def test_matrices_of_every_kind_of_layer_are_divided_right(alone, two_ranks, family):
    name = family
    assert losses(two_ranks[1][name]) == pytest.approx(losses(alone[1][name]), abs=1e-5)
    assert largest_relative(saved(two_ranks[0], name), saved(alone[0], name)) < 1e-4
