"""Settings, parallel layout and learning rate: plain arithmetic with plain answers."""

import itertools
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from toolkits.foundation.errors import UsageError
from toolkits.training.config import TrainConfig, all_settings
from toolkits.training.layout import Layout, layout_of, layout_problems
from toolkits.training.optimizer import learning_rate
from toolkits.training.options import settings_options

MODEL = {"num_layers": 28, "num_attention_heads": 28, "num_query_groups": 4, "ffn_hidden_size": 18944}


def config(**values):
    required = {"checkpoint": "ckpt", "data": "data", "output": Path("out"), "train_iters": 10}
    return TrainConfig.from_values(required | values)


def parsed(words):
    found = {}

    @click.command()
    @settings_options
    def command(**values):
        found.update(values)

    result = CliRunner().invoke(command, words, standalone_mode=False)
    if result.exception:
        raise result.exception
    return TrainConfig.from_values(found)


def test_flags_say_exactly_what_the_config_holds():
    changed = {"packing": False, "tensor_parallel": 2, "lr": 3e-4, "precision": "fp32", "valid_data": "a b"}
    original = config(**changed)
    assert parsed(shlex.split(shlex.join(original.flags()))) == original


def test_every_setting_has_a_sentence_and_its_own_name():
    settings = list(all_settings())
    assert all(item.help.endswith(".") for item in settings)
    assert len({item.name for item in settings}) == len(settings)


def test_a_config_names_all_its_problems_at_once():
    broken = config(micro_batch_size=0, lr=float("nan"), train_iters=10, warmup_iters=10, checkpoint="none")
    with pytest.raises(UsageError) as caught:
        broken.check()
    for part in ("--micro-batch-size is 0", "--lr is nan", "--warmup-iters 10", "needs --hf-config"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adam_beta1": 1.0}, "--adam-beta1 is 1.0, must be a number of at least 0 and below 1"),
        ({"min_lr": 2e-5}, "--min-lr 2e-05 is larger than --lr 1e-05"),
        ({"train_iters": 0}, "either --train-iters or --epochs"),
        ({"epochs": 1.0}, "either --train-iters or --epochs"),
        ({"precision": "int8"}, "--precision is int8, must be one of bf16, fp16, fp32, fp8"),
        ({"optimizer_offload": "1.5"}, "--optimizer-offload 1.5 must be a number from 0 to 1, or auto"),
        ({"optimizer_offload": "1", "distributed_optimizer": False}, "--optimizer-offload needs --distributed-opt"),
        ({"max_nonfinite": 0}, "--max-nonfinite is 0, must be a number of at least 1"),
    ],
)
def test_a_problem_is_said_with_its_numbers(values, message):
    assert any(message in problem for problem in config(**values).problems())


@pytest.mark.parametrize(
    ("values", "world", "message"),
    [
        ({"tensor_parallel": 8}, 8, "TP=8 > 4 KV groups: use TP 1, 2 or 4"),
        ({"tensor_parallel": 3}, 3, "TP=3 does not divide 28 attention heads: use TP 1, 2 or 4"),
        (
            {"pipeline_parallel": 5},
            5,
            "PP=5 does not divide 28 layers (the stages would hold 6+6+6+5+5 layers): use PP 4 or 7",
        ),
        (
            {"pipeline_parallel": 4, "first_stage_layers": 5},
            4,
            "MP_PP0_LAYERS 5 leaves 23 of 28 layers, which the other 3",
        ),
        ({"pipeline_parallel": 4, "first_stage_layers": 5}, 4, "cannot share evenly: use 4 or 7"),
        ({"first_stage_layers": 5}, 1, "MP_PP0_LAYERS 5 needs PP > 1"),
        ({"virtual_stage_layers": 5}, 1, "MP_VP 5 needs PP > 1"),
        ({"virtual_stage_layers": 5, "pipeline_parallel": 2}, 2, "MP_VP 5 does not divide the 14 layers"),
        (
            {"virtual_stage_layers": 7, "pipeline_parallel": 2, "first_stage_layers": 14},
            2,
            "cannot be combined with MP_PP0_LAYERS",
        ),
        (
            {"virtual_stage_layers": 7, "pipeline_parallel": 2, "global_batch_size": 9},
            2,
            "GLOBAL_BATCH_SIZE 9 makes 9: use a multiple of 2",
        ),
        ({"context_parallel": 2, "pipeline_parallel": 2}, 6, "TP=1 x PP=2 x CP=2 = 4 does not divide the 6 ranks"),
        ({"pipeline_parallel": 30}, 30, "2 stages would have no layer): use PP 14 or 28"),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, 6, "TP=2 x PP=2 = 4 does not divide the 6 ranks"),
        ({"global_batch_size": 10, "micro_batch_size": 4}, 1, "not a multiple of BATCH_SIZE 4 x DP 1 = 4: use 8 or 12"),
    ],
)
def test_a_layout_that_cannot_be_names_the_nearest_that_can(values, world, message):
    problems = layout_problems(config(**values), MODEL, world)
    assert any(message in problem for problem in problems), problems


def test_all_broken_rules_of_a_layout_come_together():
    broken = config(tensor_parallel=8, pipeline_parallel=3, global_batch_size=7, micro_batch_size=2)
    with pytest.raises(UsageError, match=r"(?s)TP=8 > 4.*PP=3.*GLOBAL_BATCH_SIZE 7"):
        layout_of(broken, MODEL, 24)


def test_a_layout_that_can_be_says_the_rest():
    layout = layout_of(
        config(tensor_parallel=2, pipeline_parallel=2, global_batch_size=24, micro_batch_size=3), MODEL, 8
    )
    assert layout == Layout(world=8, tensor=2, pipeline=2, sequence=True, micro_batches=4) and layout.data == 2
    assert not layout_of(config(), MODEL, 1).sequence, "sequence parallelism is off at TP=1"


def test_context_ranks_and_virtual_stages_are_counted():
    layout = layout_of(
        config(context_parallel=2, pipeline_parallel=2, virtual_stage_layers=7, global_batch_size=16), MODEL, 8
    )
    assert (layout.data, layout.chunks, layout.segment_multiple, layout.row_multiple) == (2, 2, 4, 4)
    assert str(layout.grid) == "TP1 PP2 (2 virtual stages a rank) CP2 DP2"
    assert layout_of(config(), MODEL, 1).segment_multiple == 1


@pytest.mark.parametrize(
    ("values", "world", "message"),
    [
        ({"expert_parallel": 3}, 3, "EP=3 does not divide 8 experts: use 2 or 4"),
        ({"expert_parallel": 2, "expert_tensor_parallel": 3}, 6, "ETP=3 does not divide the 28 feed-forward units"),
        ({"tensor_parallel": 2, "expert_tensor_parallel": 1}, 2, "ETP=1 other than TP=2 needs EP > 1"),
        ({"tensor_parallel": 2, "sequence_parallel": False}, 2, "experts at TP > 1 need sequence parallelism"),
        ({"expert_parallel": 4}, 2, "ETP=1 x EP=4 does not divide the 2 ranks of TP x CP x DP"),
    ],
)
def test_a_layout_of_experts_that_cannot_be_is_named(values, world, message):
    model = MODEL | {"num_moe_experts": 8, "moe_ffn_hidden_size": 28}
    problems = layout_problems(config(**({"global_batch_size": 24} | values)), model, world)
    assert any(message in problem for problem in problems), problems


def test_the_learning_rate_warms_up_inside_and_ends_exactly_at_the_floor():
    rates = [learning_rate(step, steps=1000, warmup=100, peak=1e-5, floor=1e-6) for step in range(1, 1001)]
    assert rates[0] == 1e-5 / 100 and rates[49] == pytest.approx(0.5e-5)
    assert rates[99] == 1e-5 == max(rates)
    assert rates[99 + 450] == pytest.approx((1e-5 + 1e-6) / 2)
    assert rates[-1] == 1e-6 and all(a > b for a, b in itertools.pairwise(rates[99:]))


def test_the_last_step_is_at_the_floor_whatever_the_warm_up():
    assert learning_rate(10, steps=10, warmup=100, peak=1e-3, floor=1e-4) == 1e-4


def test_without_warm_up_the_first_step_is_near_the_peak():
    assert learning_rate(1, steps=1000, warmup=0, peak=1.0, floor=0.0) == pytest.approx(1.0, abs=1e-5)
