"""LoRA against HuggingFace PEFT, from one initial adapter, and against itself at every layout."""

import json
import re
import shutil

import pytest
import torch
from conversion_models import EXPERTS, TRAINED
from conversion_models import write_model as write_family
from safetensors.torch import load_file
from training_world import (
    LAYOUTS,
    VOCABULARY,
    mostly_full,
    run_cases,
    selected,
    write_dataset,
    write_model,
    write_tokenizer,
)

from conversion.mcore_checkpoint import McoreCheckpoint
from conversion.mcore_directory import is_weight
from conversion.merge import merge
from toolkits.cards.lesson import LEARNT, LOSS_TOLERANCE, lesson, plain_losses
from toolkits.foundation.errors import CheckpointError, UsageError
from toolkits.planning.weights import trained_parameters
from toolkits.training.config import TrainConfig
from toolkits.training.layout import layout_of
from toolkits.training.lora import Lora
from toolkits.training.settings import ModelSettings
from toolkits.training.sources import find_model

peft = pytest.importorskip("peft", reason="PEFT is compared with: pip install '.[dev]'")

RATES = {"lr": 2e-2, "min_lr": 2e-3}
LORA = {"r": 5, "lora_alpha": 20, "target_modules": "all-linear"}
# Every kind of adapter once, on the dense model.
KINDS = {
    "all": {},
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": r".*\.[02]\.(self_attn\.[ko]_proj|mlp\.up_proj)",
        "rank_pattern": {"o_proj": 3},
        "alpha_pattern": {"k_proj": 9},
    },
    "whole": {"target_modules": ["gate_proj", "up_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
WHOLE = {"whole-tp2": ("tensor_parallel", 2), "whole-pp2": ("pipeline_parallel", 2)}
LONG = ["tp2", "tp2-sp", "pp2"]  # layouts at which PEFT's twenty steps are taken
QUICK_LAYOUTS = ["tp2", "tp2-sp", "pp2-virtual", "cp2", "dp2"]
SHORT = {"train_iters": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_model(folder / "dense", tied=False, head_dim=10)
    data = write_dataset(folder / "data", folder / "dense", rows=40)
    for number, (name, changes) in enumerate(KINDS.items()):
        write_adapter(folder / "dense", folder / name, seed=number, **changes)
    return folder, data


def write_adapter(base, folder, *, seed=0, **changes):
    """Write a PEFT adapter whose matrices are all different and whose B is not zero."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(network, peft.LoraConfig(task_type="CAUSAL_LM", **(LORA | changes)))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    adapted.save_pretrained(folder)
    return folder


def case(inputs, out, kind="all", **changes):
    folder, data = inputs
    return lesson(folder / "dense", data, out, adapter=folder / kind, **(RATES | changes))


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    cases = {kind: case(inputs, folder / kind, kind).flags() for kind in KINDS}
    cases["short"] = case(inputs, folder / "short", **SHORT).flags()
    cases["recompute"] = case(inputs, folder / "recompute", recompute="full", **SHORT).flags()
    return folder, run_cases(folder / "world", 1, cases)


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("two")
    names = sorted(selected(request, "name") & set(LAYOUTS) | {"tp2-sp", "pp2-virtual"})
    cases = {name: case(inputs, folder / name, **LAYOUTS[name], **SHORT).flags() for name in names}
    for name, (layout, size) in WHOLE.items():
        if name in selected(request, "whole"):
            cases[name] = case(inputs, folder / name, "whole", **{layout: size}).flags()
    for name in selected(request, "long"):
        cases[f"long-{name}"] = case(inputs, folder / f"long-{name}", **LAYOUTS[name]).flags()
    return folder, run_cases(folder / "world", 2, cases)


def saved(folder, name):
    """The newest adapter of a run, as tensors."""
    (*_, step) = sorted((folder / name / "checkpoint" / "sft").glob("iter_*"))
    return load_file(step / "adapter_model.safetensors")


def losses(history):
    return [step["loss"] for step in history]


def largest_relative(ours, theirs):
    assert set(ours) == set(theirs)
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


def of_peft(inputs, kind, folder):
    """Take the lesson's twenty steps with PEFT; return their losses and the adapter."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(inputs[0] / "dense", dtype=torch.float32)
    network = peft.PeftModel.from_pretrained(base, inputs[0] / kind, is_trainable=True)
    expected = plain_losses(case(inputs, folder, kind), network)
    assert len(expected) == 20
    assert expected[-1] < expected[0] - LEARNT, "nothing was learned: the comparison would prove little"
    network.save_pretrained(folder)
    return expected, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_equal_those_of_peft(inputs, alone, kind, tmp_path):
    (folder, histories), (expected, adapter) = alone, of_peft(inputs, kind, tmp_path)
    assert losses(histories[kind]) == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert largest_relative(saved(folder, kind), adapter) < 1e-3


@pytest.mark.parametrize("long", mostly_full(LONG, []))
def test_twenty_steps_on_two_ranks_equal_those_of_peft(inputs, two_ranks, long, tmp_path):
    (folder, histories), (expected, adapter) = two_ranks, of_peft(inputs, "all", tmp_path)
    assert losses(histories[f"long-{long}"]) == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert largest_relative(saved(folder, f"long-{long}"), adapter) < 1e-3


@pytest.mark.parametrize("name", mostly_full(LAYOUTS, QUICK_LAYOUTS))
def test_every_layout_trains_the_same_adapter(alone, two_ranks, name):
    (single_folder, single), (folder, histories) = alone, two_ranks
    assert losses(histories[name]) == pytest.approx(losses(single["short"]), abs=LOSS_TOLERANCE)
    norms = [[step["grad_norm"] for step in history] for history in (histories[name], single["short"])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert largest_relative(saved(folder, name), saved(single_folder, "short")) < 1e-3


def test_what_is_computed_again_trains_the_same_adapter(alone):
    folder, histories = alone
    assert losses(histories["recompute"]) == pytest.approx(losses(histories["short"]), abs=1e-6)
    assert largest_relative(saved(folder, "recompute"), saved(folder, "short")) < 1e-5


@pytest.mark.parametrize("whole", mostly_full(WHOLE, ["whole-tp2"]))
def test_modules_that_are_trained_whole_are_divided_too(alone, two_ranks, whole):
    (single_folder, single), (folder, histories) = alone, two_ranks
    assert losses(histories[whole]) == pytest.approx(losses(single["whole"]), abs=LOSS_TOLERANCE)
    assert largest_relative(saved(folder, whole), saved(single_folder, "whole")) < 1e-3


def test_what_a_run_saves_is_an_adapter_of_peft(inputs, alone):
    """With the logits that the run had: its next loss is that of PEFT's model on the same rows."""
    from transformers import AutoModelForCausalLM

    (*_, step) = sorted((alone[0] / "all" / "checkpoint" / "sft").glob("iter_*"))
    said = json.loads((step / "adapter_config.json").read_text())
    assert said["r"] == 5 and said["lora_alpha"] == 20 and said["base_model_name_or_path"].endswith("dense")
    base = AutoModelForCausalLM.from_pretrained(inputs[0] / "dense", dtype=torch.float32)
    network = peft.PeftModel.from_pretrained(base, step)
    assert sum(weight.numel() for name, weight in network.named_parameters() if "lora_" in name) == sum(
        tensor.numel() for tensor in load_file(step / "adapter_model.safetensors").values()
    )
    metrics = (alone[0] / "all" / "checkpoint" / "sft" / "metrics.jsonl").read_text().splitlines()
    (validated,) = [figures for figures in map(json.loads, metrics) if "validation_loss" in figures]
    assert validated["validation_loss"] == pytest.approx(validation_loss(network, case(inputs, alone[0])), abs=1e-4)


def validation_loss(network, config):
    from toolkits.training.sources import find_data, find_model

    rows = find_data(config.data, find_model(config.model)).validation
    total, trained, dataset = 0.0, 0, rows.parts[0].dataset
    for number in range(len(rows)):
        for document, *_ in rows.parts[0].segments(number):
            tokens = torch.from_numpy(dataset.tokens(document).astype("int64"))
            mask = torch.from_numpy(dataset.mask(document)[1:].astype("float32"))
            with torch.no_grad():
                logits = network(tokens[None, :-1]).logits[0]
            each = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            total, trained = total + float((each * mask).sum()), trained + int(mask.sum())
    return total / trained


def test_a_run_goes_on_bit_for_bit_and_on_another_number_of_ranks(inputs, alone, two_ranks, tmp_path):
    """The base comes from where it was; dropout is on, and follows the saved random states."""
    given = {**SHORT, "lora_dropout": 0.2, "save_interval": 2}
    cases = {
        name: lesson(inputs[0] / "dense", inputs[1], tmp_path / name, lora_rank=4, **RATES, **given, **layout)
        for name, layout in {"whole": LAYOUTS["tp2-sp"], "again": LAYOUTS["tp2-sp"]}.items()
    }
    whole = run_cases(tmp_path / "first", 2, {"whole": cases["whole"].flags()})["whole"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint" / "sft" / "iter_0000004")
    again = run_cases(tmp_path / "second", 2, {"again": cases["again"].flags()})["again"]
    assert losses(again) == losses(whole)[2:]
    first, second = saved(tmp_path, "whole"), saved(tmp_path, "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_b_may_learn_faster_than_a(inputs, tmp_path):
    """Adam's first step moves every number by the learning rate."""
    given = {"train_iters": 1, "lr": 1e-3, "min_lr": 1e-3, "warmup_iters": 0, "weight_decay": 0.0, "lora_plus": 4.0}
    run_cases(tmp_path / "world", 1, {"plus": case(inputs, tmp_path / "plus", **given).flags()})
    before, after = load_file(inputs[0] / "all" / "adapter_model.safetensors"), saved(tmp_path, "plus")
    for letter, rate in (("A", 1e-3), ("B", 4e-3)):
        moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in after if f"lora_{letter}" in name])
        assert float(moved.median()) == pytest.approx(rate, rel=1e-2)


def test_a_checkpoint_holds_the_adapter_and_not_the_base(inputs, two_ranks):
    folder = two_ranks[0]
    for name in ("tp2-sp", "pp2-virtual"):
        (step,) = (folder / name / "checkpoint" / "sft").glob("iter_*")
        tensors = McoreCheckpoint(step).tensors
        weights = [key for key in tensors if is_weight(key)]
        assert all(".lora_" in key for key in weights) and len(weights) == 28 * 2, weights[:5]


def test_what_cannot_be_adapted_is_refused(inputs, tmp_path):
    def refused(**given):
        config = TrainConfig.from_values(lesson(inputs[0] / "dense", inputs[1], tmp_path / "out").values() | given)
        source = find_model(config.model)
        with pytest.raises(UsageError) as error:
            config.check()
            lora = Lora.of(config, source)
            lora.require_layout(source.plan, layout_of(config, source.settings, config.layout.model_parallel))
        return str(error.value)

    assert re.search(r"--lora-rank 21 is more than a layer has: \S+k_proj is 20 x 48", refused(lora_rank=21))
    assert "gate is no linear layer; nearest are gate_proj" in refused(lora_rank=4, lora_targets="gate")
    assert "layers 2 to 3 have none" in refused(
        lora_rank=4, lora_targets=r".*\.[01]\..*", pipeline_parallel=2, global_batch_size=4
    )
    assert "--lora-alpha: give --lora-rank or --adapter too" in refused(lora_alpha=3.0)
    assert "--adapter says --lora-rank itself" in refused(adapter=inputs[0] / "all", lora_rank=4)
    assert "need the weights that they stand beside" in refused(
        checkpoint="none", hf_config=inputs[0] / "dense", lora_rank=4
    )
    assert "lm_heads is neither of model.embed_tokens, lm_head" in refused(lora_rank=4, lora_save_modules="lm_heads")


@pytest.mark.parametrize("kind", ["some", "whole"])
def test_the_planner_counts_what_is_trained(inputs, alone, kind, tmp_path):
    config = case(inputs, tmp_path, kind)
    source = find_model(config.model)
    tuning = Lora.of(config, source).tuning
    assert trained_parameters(source.plan, tuning) == sum(map(torch.numel, saved(alone[0], kind).values()))
    assert len(tuning.whole) == 2 * (kind == "whole")


def test_an_adapter_for_other_weights_or_damaged_is_refused(inputs, alone, tmp_path):
    (step,) = (alone[0] / "short" / "checkpoint" / "sft").glob("iter_*")
    write_model(tmp_path / "other", tied=False, head_dim=10, seed=5)
    config = lesson(tmp_path / "other", inputs[1], tmp_path / "out", adapter=step)
    with pytest.raises(
        CheckpointError, match=r"was trained on \S*dense \(weights hf:\w+\), \S*other has other weights"
    ):
        Lora.of(config, find_model(config.model))
    damaged = shutil.copytree(inputs[0] / "all", tmp_path / "damaged") / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    config = lesson(inputs[0] / "dense", inputs[1], tmp_path / "out", adapter=damaged.parent)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: .*header promises"):
        Lora.of(config, find_model(config.model))


def test_a_step_with_an_adapter_is_no_model(inputs, alone, tmp_path):
    from conversion import mcore_to_hf

    (step,) = (alone[0] / "short" / "checkpoint" / "sft").glob("iter_*")
    with pytest.raises(CheckpointError, match=r"holds a LoRA adapter, not a model; `temper convert merge BASE .*iter_"):
        mcore_to_hf.convert(step.parent, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds a LoRA adapter"):
        find_model(ModelSettings(checkpoint=str(step)))


def test_the_export_is_base_and_adapter_together(inputs, tmp_path):
    given = {**SHORT, "export_hf": True}
    run_cases(tmp_path / "world", 1, {"run": case(inputs, tmp_path / "run", **given).flags()})
    (step,) = (tmp_path / "run" / "checkpoint" / "sft").glob("iter_*")
    merge(inputs[0] / "dense", [(step, 1.0)], tmp_path / "expected")
    files = [
        folder / "model.safetensors" for folder in (tmp_path / "run" / "huggingface" / "sft", tmp_path / "expected")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_first_values_are_those_of_peft_and_do_not_depend_on_the_layout(inputs, tmp_path):
    """A is uniform within 1 / sqrt(columns), B zero."""
    given = {"lora_rank": 6, "train_iters": 1, "lr": 0.0, "min_lr": 0.0, "warmup_iters": 0}
    runs = {
        name: lesson(inputs[0] / "dense", inputs[1], tmp_path / name, **given, **layout)
        for name, layout in {"one": {}, "tp2": {"tensor_parallel": 2}, "pp2": {"pipeline_parallel": 2}}.items()
    }
    run_cases(tmp_path / "w1", 1, {"one": runs["one"].flags()})
    run_cases(tmp_path / "w2", 2, {name: runs[name].flags() for name in ("tp2", "pp2")})
    first = saved(tmp_path, "one")
    for name in ("tp2", "pp2"):
        other = saved(tmp_path, name)
        assert all(torch.equal(first[key], other[key]) for key in first)
    values = {key: tensor for key, tensor in first.items() if "lora_A" in key}
    assert len({tensor.double().sum().item() for tensor in values.values()}) == len(values) == 28
    for tensor in values.values():
        bound = tensor.shape[1] ** -0.5
        assert tensor.abs().max() <= bound and abs(float(tensor.std()) - bound / 3**0.5) < 0.15 * bound
    assert all(not tensor.any() for key, tensor in first.items() if "lora_B" in key)


FAMILIES = {
    "qwen2-moe": {"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1},
    "mixtral": {"tensor_parallel": 2},
    "qwen3-moe": {"expert_parallel": 2},
    "deepseek-v3": {"tensor_parallel": 2},
    "phi3": {"tensor_parallel": 2},
    "glm": {"tensor_parallel": 2, "sequence_parallel": False},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory, request):
    """Adapters on experts, latent attention and layers that the checkpoint fuses: (folder, histories)."""
    folder = tmp_path_factory.mktemp("families")
    cases, wanted = {}, sorted(selected(request, "family"))
    for name in wanted:
        write_family(folder / name, (TRAINED | EXPERTS)[name] | {"vocab_size": VOCABULARY})
        write_tokenizer(folder / name)
    data = write_dataset(folder / "data", folder / wanted[0], rows=40)
    for name in wanted:
        layout = FAMILIES[name]
        given = {"lora_rank": 3, **RATES, **SHORT}
        cases[name] = [
            lesson(folder / name, data, folder / f"{name}-{ranks}", **given, **more).flags()
            for ranks, more in ((1, {}), (2, layout))
        ]
    one = run_cases(folder / "one", 1, {f"{name}-1": flags for name, (flags, _) in cases.items()})
    two = run_cases(folder / "two", 2, {f"{name}-2": flags for name, (_, flags) in cases.items()})
    return folder, one | two


@pytest.mark.parametrize("family", mostly_full(FAMILIES, ["qwen2-moe", "deepseek-v3", "phi3"]))
def test_adapters_of_every_kind_of_layer_are_divided_right(families, family):
    (folder, histories), name = families, family
    assert losses(histories[f"{name}-2"]) == pytest.approx(losses(histories[f"{name}-1"]), abs=LOSS_TOLERANCE)
    norms = [[step["grad_norm"] for step in histories[f"{name}-{ranks}"]] for ranks in (2, 1)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert largest_relative(saved(folder, f"{name}-2"), saved(folder, f"{name}-1")) < 1e-3
