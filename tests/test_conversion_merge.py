"""Adapters merged into a base without a model, against PEFT; and what of an adapter is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_world import write_model

from conversion import hf_to_mcore
from conversion.adapters import CONFIG, WEIGHTS, Adapter, AdapterConfig, explicit_targets, linear_parts
from conversion.merge import merge
from conversion.plan import plan_for
from toolkits.foundation.errors import CheckpointError, UsageError

peft = pytest.importorskip("peft", reason="PEFT is compared with: pip install '.[dev]'")

KINDS = {
    "all": {"target_modules": "all-linear"},
    "some": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "whole": {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    write_model(folder / "base", tied=False, head_dim=10)
    write_model(folder / "other", tied=False, head_dim=10, seed=12)
    for number, (name, changes) in enumerate(KINDS.items()):
        write_adapter(folder / "base", folder / name, seed=number, **changes)
    hf_to_mcore.convert(folder / "base", folder / "mcore")
    return folder


def write_adapter(base, folder, *, seed, **changes):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(network, peft.LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=20, **changes))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and "lora_A" not in name:
                weight.add_(torch.randn_like(weight) * 0.02)
    adapted.save_pretrained(folder)


def merged_by_peft(inputs, name):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, inputs / name).merge_and_unload().state_dict()


@pytest.mark.parametrize("base", ["base", "mcore"])
@pytest.mark.parametrize("name", KINDS)
def test_the_sum_is_that_of_peft(inputs, tmp_path, base, name):
    plan = merge(inputs / base, [(inputs / name, 1.0)], tmp_path / "out")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), merged_by_peft(inputs, name)
    assert found.keys() == expected.keys() == plan.hf_tensors.keys()
    for tensor in found:
        torch.testing.assert_close(found[tensor], expected[tensor], atol=1e-6, rtol=1e-6)
    changed = [
        key for key, old in load_file(inputs / "base" / "model.safetensors").items() if not old.equal(found[key])
    ]
    own = load_file(inputs / name / WEIGHTS)
    assert len(changed) == sum("lora_A" in key for key in own) + sum(key.endswith("lm_head.weight") for key in own)
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["made"] == "merge" and report["verdict"] == "read again and equal bit for bit"
    assert report["notes"][-1] == f"adapter {inputs / name} x 1"


def test_several_adapters_count_as_their_weights_say(inputs, tmp_path):
    merge(inputs / "base", [(inputs / "all", 0.25), (inputs / "some", -2.0)], tmp_path / "out")
    found, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", inputs / "base"))
    parts = [merged_by_peft(inputs, name) for name in ("all", "some")]
    for name in found:
        expected = base[name] + 0.25 * (parts[0][name] - base[name]) - 2.0 * (parts[1][name] - base[name])
        torch.testing.assert_close(found[name], expected, atol=2e-6, rtol=1e-5)


def test_taking_an_adapter_out_gives_the_base_back(inputs, tmp_path):
    merge(inputs / "base", [(inputs / "all", 1.0)], tmp_path / "in")
    merge(tmp_path / "in", [(inputs / "all", 1.0)], tmp_path / "out", unmerge=True)
    found, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", inputs / "base"))
    assert all((found[name] - base[name]).abs().max() < 1e-6 for name in base)
    with pytest.raises(UsageError, match="trained whole cannot be taken out"):
        merge(inputs / "base", [(inputs / "whole", 1.0)], tmp_path / "no", unmerge=True)


def test_another_type_is_rounded_once(inputs, tmp_path):
    merge(inputs / "base", [(inputs / "all", 1.0)], tmp_path / "out", dtype="bf16")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), merged_by_peft(inputs, "all")
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    apart = [int((found[name] != expected[name].bfloat16()).sum()) for name in found]
    assert sum(apart) < 20, "only where fp32 sums in another order fall on the other side of a border"


def changed_adapter(inputs, tmp_path, *, config=None, tensors=None):
    """A copy of an adapter with other fields (None: without) and tensors changed by a function."""
    copy = tmp_path / "adapter"
    shutil.copytree(inputs / "all", copy)
    said = json.loads((copy / CONFIG).read_text()) | (config or {})
    (copy / CONFIG).write_text(json.dumps({name: value for name, value in said.items() if value is not ...}))
    if tensors is not None:
        content = load_file(copy / WEIGHTS)
        tensors(content)
        save_file(content, copy / WEIGHTS)
    return copy


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"use_dora": True}, None, "asks for what is not built: use_dora is True"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, None, "peft_type is 'IA3'"),
        ({"r": ...}, None, "is damaged: KeyError: 'r'"),
        ({"r": "8"}, None, "'8' is not a number that can be meant"),
        (
            {"r": 6},
            None,
            r"lora_A.weight: the adapter has \[5, 48\], the base and adapter_config.json make it \[6, 48\]",
        ),
        (None, lambda content: content.pop(Q.format("B")), r"layers.1.self_attn.q_proj.lora_B.weight is missing"),
        (
            None,
            lambda content: content.update(stray=torch.zeros(1)),
            "stray belongs to no linear layer of the base",
        ),
        (None, lambda content: content.update({Q.format("A"): torch.zeros(5, 47)}), r"the adapter has \[5, 47\]"),
        (
            None,
            lambda content: content.update({Q.format("A"): torch.zeros(5, 48, dtype=torch.int32)}),
            "is I32, not a float type",
        ),
    ],
)
def test_a_wrong_adapter_is_refused_by_what_is_wrong(inputs, tmp_path, config, tensors, message):
    adapter = changed_adapter(inputs, tmp_path, config=config, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        merge(inputs / "base", [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_adapter_is_refused(inputs, tmp_path):
    adapter = changed_adapter(inputs, tmp_path)
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="header promises"):
        merge(inputs / "base", [(adapter, 1.0)], tmp_path / "out")


def test_a_folder_that_is_no_adapter_is_named(inputs, tmp_path):
    with pytest.raises(CheckpointError, match=f"has no {CONFIG}: it is no adapter"):
        Adapter(inputs / "base", plan_for(json.loads((inputs / "base" / "config.json").read_text())))


def test_an_adapter_of_ours_knows_its_base(inputs, tmp_path):
    from conversion.adapters import write_adapter as write

    adapter = Adapter(inputs / "all", plan_for(json.loads((inputs / "base" / "config.json").read_text())))
    tensors = [
        (f"{module}.lora_{letter}.weight", matrix)
        for module in adapter.modules
        for letter, matrix in zip("AB", adapter.matrices(module), strict=True)
    ]
    write(tmp_path / "ours", adapter.config, tensors, base="base", weights=inputs / "base")
    merge(inputs / "base", [(tmp_path / "ours", 1.0)], tmp_path / "out")
    merge(inputs / "mcore", [(tmp_path / "ours", 1.0)], tmp_path / "of another kind: not compared")
    with pytest.raises(CheckpointError, match=r"was trained on base \(weights hf:\w{16}\), .*other has other weights"):
        merge(inputs / "other", [(tmp_path / "ours", 1.0)], tmp_path / "no")
    found = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert (found.r, found.lora_alpha) == (5, 20)


def test_targets_are_names_ends_of_names_or_an_expression(inputs):
    plan = plan_for(json.loads((inputs / "base" / "config.json").read_text()))
    modules = list(linear_parts(plan))
    assert len(modules) == 4 * 7

    def targeted(said):
        return AdapterConfig(rank=4, alpha=4, targets=explicit_targets(said, plan)).targeted(modules)

    assert targeted("all") == targeted("all-linear") == modules
    assert targeted("q_proj, self_attn.o_proj") == [m for m in modules if m.endswith(("q_proj", "o_proj"))]
    assert targeted(r".*layers\.[12]\.mlp\..*") == [m for m in modules if ".1.mlp" in m or ".2.mlp" in m]
    with pytest.raises(UsageError, match="query_proj is no linear layer; nearest are"):
        targeted("query_proj")
    with pytest.raises(UsageError, match=r"the regular expression '.\*attention.\*' matches no linear layer"):
        targeted(".*attention.*")
