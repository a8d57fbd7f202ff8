"""`temper plan` of models with experts and latent attention: published totals, shares, the search and its line."""

import json
import shlex
from itertools import chain
from pathlib import Path

import pytest
from click.testing import CliRunner
from conversion_models import EXPERTS, MODELS

from conversion.plan import plan_for
from toolkits.cli import temper
from toolkits.launch import checks
from toolkits.launch.arguments import LAUNCHERS, VARIABLES
from toolkits.launch.checks import check_call
from toolkits.planning.figures import quoted
from toolkits.planning.layouts import Question, answer
from toolkits.planning.line import launcher_line
from toolkits.planning.memory import run_memory
from toolkits.planning.states import Share, storage_of
from toolkits.planning.timing import flops_per_token, step_time
from toolkits.planning.weights import Tuning, active_parameters, adapter_parameters, stage_weights
from toolkits.training.config import TrainConfig
from toolkits.training.layout import layout_of

QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "num_nextn_predict_layers": 1,
}
PLAN, LARGE = plan_for(QWEN3), plan_for(DEEPSEEK_V3)
G = 2**30


def config(**values):
    fields = {"checkpoint": "CKPT", "data": "DATA", "output": Path("OUT"), "train_iters": 10, "seq_len": 4096}
    return TrainConfig.from_values(fields | {"global_batch_size": 64} | values)


def planned(plan, *, gpus=8, **values):
    settings = config(**values)
    return run_memory(plan, settings, layout_of(settings, plan.settings, gpus), Tuning())


def question(plan=PLAN, *, gpus=8, gpu_memory=141, fixed=(), **values):
    return Question(plan, config(**values), Tuning(), gpus, gpu_memory * G, fixed=frozenset(fixed))


@pytest.mark.parametrize(("plan", "billions", "active"), [(PLAN, 30.5, 3.3), (LARGE, 671, 37)])
def test_published_totals(plan, billions, active):
    """The active ones are published with two digits, and those who count leave out one embedding or none."""
    assert plan.num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert active_parameters(plan) / 1e9 == pytest.approx(active, rel=0.02)
    said = quoted(plan, Tuning())[0]
    assert said.name == "active parameters" and said.value == active_parameters(plan)


def test_active_parameters_are_what_one_token_meets():
    attention = 2048 * (32 * 128 * 2 + 4 * 128 * 2) + 2 * 128  # query and output, key and value, two norms
    layer = attention + 2 * 2048 + 128 * 2048 + 8 * 3 * 2048 * 768  # norms, router, eight experts
    assert active_parameters(PLAN) == 48 * layer + 2 * 151936 * 2048 + 2048


def test_flops_are_those_of_active_parameters_and_of_both_widths_of_attention():
    weights = active_parameters(LARGE) - 129280 * 7168  # the input embedding is a look-up
    attention = 3 * 61 * 128 * (128 + 64 + 128) * 4096
    assert flops_per_token(LARGE, 4096, Tuning()) == pytest.approx(6 * weights + attention)


def test_adapters_stand_beside_every_matrix_but_the_router():
    matrices = 2048 + 32 * 128 + 2 * (2048 + 4 * 128) + 32 * 128 + 2048 + 128 * 3 * (2048 + 768)
    assert adapter_parameters(PLAN, Tuning("lora", 8)) == 8 * 48 * matrices


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_planned(name):
    plan = plan_for(MODELS[name])
    held = stage_weights(plan, layout_of(config(), plan.settings, 1), 0)[0]
    biases = sum(step.shape[0] for step in plan.steps if step.key.endswith("expert_bias"))  # which nobody trains
    assert sum(each.count for each in held) == plan.num_parameters - biases
    ranks = planned(plan, gpus=4, tensor_parallel=2, pipeline_parallel=2)
    assert len(ranks) == 2 and all(rank.total > rank.states.total > 0 for rank in ranks)


def test_expert_parallel_ranks_and_stages_hold_the_model_once():
    settings = config(expert_parallel=4, pipeline_parallel=2)
    layout = layout_of(settings, PLAN.settings, 8)
    held = list(chain(*(chain(*stage_weights(PLAN, layout, stage)) for stage in range(2))))
    assert sum(each.count * (4 if each.expert else 1) for each in held) == PLAN.num_parameters


def test_ranks_are_counted_along_etp_then_ep_for_experts():
    settings = config(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=1)
    layout = layout_of(settings, PLAN.settings, 8)
    found = [storage_of(settings, layout, rank=rank) for rank in range(8)]
    assert [each.share for each in found] == [Share(number, 4) for number in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert [each.experts for each in found] == [Share(number, 4) for number in (0, 0, 1, 1, 2, 2, 3, 3)]
    wide = storage_of(settings, layout_of(config(expert_parallel=4), PLAN.settings, 8), rank=6)
    assert (wide.share, wide.experts) == (Share(6, 8), Share(1, 2))


def test_expert_parallelism_divides_weights_and_gradients_and_costs_time():
    def at(**values):
        settings = config(**values)
        return planned(PLAN, **values)[0], step_time(PLAN, settings, layout_of(settings, PLAN.settings, 8), Tuning())

    (alone, slow), (shared, fast) = at(), at(expert_parallel=8)
    experts = 48 * 128 * 3 * 2048 * 768
    assert alone.states.parameters - shared.states.parameters == pytest.approx(2 * experts * 7 / 8, rel=1e-6)
    assert shared.states.optimizer == pytest.approx(alone.states.optimizer, rel=1e-6)  # over 8 ranks either way
    assert shared.activations == alone.activations  # as many tokens come as go
    assert slow.dispatch_seconds == 0 < fast.dispatch_seconds and fast.reduce_seconds < slow.reduce_seconds


def test_experts_in_every_other_layer_leave_the_dense_ones_as_they_are():
    """Of four layers the second and the fourth have experts; a first stage of one layer keeps what a dense one does."""
    mixed, every = (plan_for(EXPERTS[name]) for name in ("qwen2-moe-every-other", "qwen2-moe"))
    stages = {"pipeline_parallel": 2, "first_stage_layers": 1, "global_batch_size": 8, "seq_len": 64}
    dense, others = planned(mixed, gpus=2, **stages)
    assert dense.activations < planned(every, gpus=2, **stages)[0].activations
    assert dense.states.parameters < others.states.parameters


def test_the_search_divides_experts_where_they_do_not_fit_and_says_why():
    layouts = ("tensor_parallel", "pipeline_parallel", "context_parallel", "micro_batch_size")
    found = answer(question(fixed=layouts))
    assert {each.layout.expert for each in found.candidates} == {1, 2, 4, 8}
    assert found.chosen is not None and found.chosen.layout.expert > 1
    assert "because no layout with a smaller EP fits: TP 1 x PP 1 x EP" in found.reason
    assert f"x EP {found.chosen.layout.expert} x DP 8" in found.chosen.name
    fixed = answer(question(fixed=[*layouts, "expert_parallel"], expert_parallel=8))
    assert {each.layout.expert for each in fixed.candidates} == {8} and "smaller EP" not in fixed.reason


def test_the_line_has_words_for_ep_and_etp_and_passes_the_launchers_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "visible_gpus", lambda: 8)
    for entry in VARIABLES:
        monkeypatch.delenv(entry.name, raising=False)
    for ending in (".bin", ".idx"):
        (tmp_path / f"DATA_text_document{ending}").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3))
    words = ["plan", "--config", "model", "--gpu-memory", "141G", "--global-batch-size", "64", "--expert-parallel", "4"]
    result = CliRunner().invoke(temper, [*words, "--tensor-parallel", "2", "--json"], catch_exceptions=False)
    said = json.loads(result.output)
    assert said["active_parameters"] == active_parameters(PLAN) and said["recommended"]["expert"] == 4
    environment, *line = shlex.split(said["line"])
    job = check_call(LAUNCHERS["qwen3"], line[2:], dict([environment.split("=")]))
    assert (job.config.layout.expert_parallel, job.config.layout.expert_tensor_parallel) == (4, 2)
    shown = CliRunner().invoke(temper, words, catch_exceptions=False).output
    assert "3.35 B" in shown and "the mean; with EP" in shown and "tokens sent to their experts" in shown


def test_a_launcher_without_a_position_for_etp_gets_a_flag():
    plan = plan_for(EXPERTS["qwen2-moe"])
    settings = config(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=1)
    layout = layout_of(settings, plan.settings, 4)
    line = launcher_line(LAUNCHERS["qwen2"], settings, layout, Tuning(), plan=plan, checkpoint="CKPT")
    assert "EXTRA_ARGS='--expert-tensor-parallel 1' sh" in line and len(shlex.split(line)) == 4 + 26
