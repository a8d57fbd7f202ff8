"""Families, settings and the plan: names, shapes and arithmetic, without a file."""

import subprocess
import sys

import pytest
import torch

from conversion.families import FAMILIES, family_for
from conversion.layout import fuse, split
from conversion.plan import (
    RowBlock,
    config_dtype,
    mcore_settings,
    plan_for,
    qkv_blocks,
    stacked_blocks,
    untrainable_reasons,
)
from tests.conversion_models import CONFIGS, TIED, UNTIED, tensors_of
from toolkits.foundation.errors import CheckpointError

# What megatron-core 0.16.1 with Transformer Engine saves for UNTIED, written down by hand.
TRANSFORMER_ENGINE_TENSORS = {
    "embedding.word_embeddings.weight": (251, 48),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (4, 48),
    "decoder.layers.self_attention.linear_qkv.weight": (4, 80, 48),
    "decoder.layers.self_attention.linear_qkv.bias": (4, 80),
    "decoder.layers.self_attention.linear_proj.weight": (4, 48, 48),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": (4, 48),
    "decoder.layers.mlp.linear_fc1.weight": (4, 224, 48),
    "decoder.layers.mlp.linear_fc2.weight": (4, 48, 112),
    "decoder.final_layernorm.weight": (48,),
    "output_layer.weight": (251, 48),
}
TRANSFORMER_ENGINE_OBJECTS = [
    f"decoder.layers.{module}._extra_state/shard_{layer}_4"
    for module in (
        "self_attention.core_attention",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    for layer in range(4)
] + ["decoder.final_layernorm._extra_state/shard_0_1"]


def test_names_and_shapes_are_those_of_transformer_engine():
    plan = plan_for(UNTIED)
    assert {key: info.shape for key, info in plan.tensors.items()} == TRANSFORMER_ENGINE_TENSORS
    assert sorted(plan.extra_states) == sorted(TRANSFORMER_ENGINE_OBJECTS)


def test_tied_embeddings_have_no_output_layer_and_count_once():
    plan = plan_for(TIED)
    assert "output_layer.weight" not in plan.tensors and plan.tied
    assert plan.tensors["decoder.layers.self_attention.linear_proj.weight"].shape == (4, 40, 72)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_huggingface_tensor_is_planned_in_the_order_of_the_file(name):
    tensors = tensors_of(CONFIGS[name])
    plan = plan_for(CONFIGS[name])
    planned = {part.name: part.shape for step in plan.steps for part in step.parts}
    assert planned == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert plan.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    layers = [step.layer for step in plan.steps if step.layer is not None]
    assert layers == sorted(layers)


def test_settings_of_the_newer_spelling():
    assert mcore_settings(UNTIED) == {
        "num_layers": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 112,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 8,
        "layernorm_epsilon": 1e-6,
        "vocab_size": 251,
        "max_position_embeddings": 64,
        "share_embeddings_and_output_weights": False,
        "init_method_std": 0.02,
        "rotary_base": 50000.0,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation": "silu",
        "add_bias_linear": False,
        "add_qkv_bias": True,
    }
    assert config_dtype(UNTIED) == "float32"


def test_settings_of_the_older_spelling():
    settings = mcore_settings(TIED)
    assert settings["rotary_base"] == 20000.0
    assert settings["kv_channels"] == 12
    assert settings["share_embeddings_and_output_weights"] is True
    assert config_dtype({**TIED, "torch_dtype": "torch.bfloat16"}) == "bfloat16"
    assert config_dtype({}) is None


def test_absent_tie_word_embeddings_means_what_it_means_in_transformers():
    from transformers import Qwen2Config

    without = {name: value for name, value in UNTIED.items() if name != "tie_word_embeddings"}
    assert plan_for(without).tied is Qwen2Config().tie_word_embeddings is False


def test_missing_fields_are_named_all_at_once():
    for config, rope in ((UNTIED, "rope_parameters"), (TIED, "rope_theta")):
        poor = {name: value for name, value in config.items() if name not in (rope, "rms_norm_eps")}
        with pytest.raises(CheckpointError, match=r"family qwen2 lacks rms_norm_eps, rope_theta"):
            mcore_settings(poor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 key/value heads"),
        ({"hidden_size": 50}, "hidden_size 50 is no multiple of 6 heads"),
        ({"vocab_size": "251"}, "vocab_size='251'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"head_dim": 7.5}, "head_dim=7.5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0"),
    ],
)
def test_numbers_that_cannot_be(change, message):
    with pytest.raises(CheckpointError, match=message):
        plan_for({**UNTIED, **change})


def test_what_is_converted_but_not_trained_is_said():
    assert [untrainable_reasons(config) for config in CONFIGS.values()] == [[], []]
    for change, reason in (
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn rotary positions"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4}}, "linear rotary positions"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "contradicts itself on rope_theta"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types other than full_attention"),
    ):
        (found,) = untrainable_reasons({**TIED, **change})
        assert reason in found
        assert plan_for({**TIED, **change}).steps


def test_yarn_beside_the_other_spellings_default_is_seen():
    """transformers takes it from there; reading the first place alone would train plain positions."""
    (found,) = untrainable_reasons({**UNTIED, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert "yarn rotary positions in rope_scaling" in found


def test_an_unknown_architecture_lists_the_known_ones():
    for named, shown in ((["GPT2LMHeadModel"], "GPT2LMHeadModel"), (None, "config.json names none")):
        with pytest.raises(CheckpointError, match=rf"{shown}.* is not supported; supported: .*Qwen2ForCausalLM"):
            family_for({"architectures": named, "auto_map": {"AutoModel": "evil.Model"}})


def test_auto_map_is_ignored():
    assert family_for({**UNTIED, "auto_map": {"AutoModelForCausalLM": "evil--repository.Model"}}).name == "qwen2"


def test_families_do_not_share_names():
    architectures = [name for family in FAMILIES for name in family.architectures]
    assert len(set(architectures)) == len(architectures)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_query_key_and_value_of_a_group_lie_together():
    # 4 query heads in 2 groups, heads of one row.
    assert qkv_blocks([4, 2, 2], 2) == (
        RowBlock(0, 0, 2),
        RowBlock(1, 0, 1),
        RowBlock(2, 0, 1),
        RowBlock(0, 2, 4),
        RowBlock(1, 1, 2),
        RowBlock(2, 1, 2),
    )
    q, k, v = (torch.tensor(rows) for rows in ([0, 1, 2, 3], [10, 11], [20, 21]))
    assert fuse([q, k, v], qkv_blocks([4, 2, 2], 2)).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("columns", [(), (7,), (3, 2)])
def test_split_undoes_fuse_and_a_slice_is_a_slice(groups, columns):
    random = torch.Generator().manual_seed(groups)
    for rows, blocks in (
        ([groups * 6, groups * 2, groups * 2], qkv_blocks([groups * 6, groups * 2, groups * 2], groups)),
        ([groups * 4, groups * 3], stacked_blocks([groups * 4, groups * 3])),
    ):
        parts = [torch.randn(count, *columns, generator=random) for count in rows]
        fused = fuse(parts, blocks)
        assert fused.shape == (sum(rows), *columns)
        assert all(torch.equal(split(fused, blocks, number), part) for number, part in enumerate(parts))
        for start in range(0, sum(rows), 3):
            for stop in range(start + 1, sum(rows) + 1, 2):
                assert torch.equal(fuse(parts, blocks, start=start, stop=stop), fused[start:stop])


def test_the_plan_needs_no_torch():
    script = "import sys, conversion.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
