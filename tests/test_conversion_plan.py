"""Families, settings and the plan: names, shapes and arithmetic, without a file."""

import subprocess
import sys

import pytest
import torch

from conversion.families import FAMILIES, family_for
from conversion.layout import fuse, split
from conversion.plan import RowBlock, plan_for, shared_blocks, stacked_blocks
from conversion.settings import config_dtype, mcore_settings, untrainable_reasons
from tests.conversion_models import CONFIGS, TIED, UNTIED, tensors_of
from toolkits.foundation.errors import CheckpointError


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
        "reward_head": False,
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


def test_null_key_value_heads_are_as_many_as_heads_and_absent_ones_are_an_error():
    assert mcore_settings({**UNTIED, "num_key_value_heads": None})["num_query_groups"] == 6
    with pytest.raises(CheckpointError, match=r"family qwen2 lacks num_key_value_heads"):
        mcore_settings({name: value for name, value in UNTIED.items() if name != "num_key_value_heads"})


def test_missing_fields_are_named_all_at_once():
    for config, rope in ((UNTIED, "rope_parameters"), (TIED, "rope_theta")):
        poor = {name: value for name, value in config.items() if name not in (rope, "rms_norm_eps")}
        with pytest.raises(CheckpointError, match=r"family qwen2 lacks rms_norm_eps, .* or rope_theta"):
            mcore_settings(poor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 key/value heads"),
        ({"hidden_size": 50}, "hidden_size 50 is no multiple of num_attention_heads 6, and kv_channels is not given"),
        ({"vocab_size": "251"}, "vocab_size='251'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"head_dim": 7.5}, "head_dim=7.5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0"),
        ({"num_key_value_heads": 10**9, "num_attention_heads": 10**9}, "num_attention_heads=1000000000"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads='2'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
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
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling.type=yarn: only the default rotary positions",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4}}, "rope_parameters.rope_type=linear: only"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "contradicts itself on rope_theta"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types=['sliding_attention', "),
    ):
        (found,) = untrainable_reasons({**TIED, **change})
        assert reason in found
        assert plan_for({**TIED, **change}).steps


def test_yarn_beside_the_other_spellings_default_is_seen():
    """transformers takes it from there; reading the first place alone would train plain positions."""
    (found,) = untrainable_reasons({**UNTIED, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert "rope_scaling.type=yarn" in found


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


# Query, key and value of 4 heads in 2 groups, heads of one row: three tensors, or one that has all.
SEPARATE, TOGETHER = ((4,), (2,), (2,)), ((4, 2, 2),)


@pytest.mark.parametrize(("sections", "parts"), [(SEPARATE, 3), (TOGETHER, 1)])
def test_query_key_and_value_of_a_group_lie_together(sections, parts):
    rows = torch.tensor([0, 1, 2, 3, 10, 11, 20, 21])
    stored = rows.split([4, 2, 2]) if parts == 3 else [rows]
    blocks = shared_blocks(sections, 2)
    assert fuse(stored, blocks).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert blocks[3:5] == (
        (RowBlock(0, 2, 4), RowBlock(1, 1, 2)) if parts == 3 else (RowBlock(0, 2, 4), RowBlock(0, 5, 6))
    )


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("columns", [(), (7,), (3, 2)])
def test_split_undoes_fuse_and_a_slice_is_a_slice(groups, columns):
    random = torch.Generator().manual_seed(groups)
    sections = ((groups * 6,), (groups * 2,), (groups * 2,))
    for rows, blocks in (
        ([groups * 6, groups * 2, groups * 2], shared_blocks(sections, groups)),
        ([groups * 10], shared_blocks(((groups * 6, groups * 2, groups * 2),), groups)),
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


SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
)


def published(architecture, *sizes, **more):
    always = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 4096, "num_experts_per_tok": 8}
    return dict(zip(SIZES, sizes, strict=True)) | always | more | {"architectures": [f"{architecture}ForCausalLM"]}


QWEN3_EXPERTS = {"head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768}
QWEN2_EXPERTS = {"num_experts": 60, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
LITE = LATENT | {"q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1408}
V3 = LATENT | {"q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048}


@pytest.mark.parametrize(
    ("millions", "config"),
    [
        (7616, published("Qwen2", 28, 3584, 18944, 152064, 28, 4)),
        (8191, published("Qwen3", 36, 4096, 12288, 151936, 32, 8)),
        (6738, published("Llama", 32, 4096, 11008, 32000, 32, 32)),
        (1236, published("Llama", 16, 2048, 8192, 128256, 32, 8, tie_word_embeddings=True)),
        (7242, published("Mistral", 32, 4096, 14336, 32000, 32, 8)),
        (46703, published("Mixtral", 32, 4096, 14336, 32000, 32, 8, num_local_experts=8)),
        (3821, published("Phi3", 32, 3072, 8192, 32064, 32, 32)),
        (9400, published("Glm4", 40, 4096, 13696, 151552, 32, 2, attention_bias=False)),
        (9242, published("Gemma2", 42, 3584, 14336, 256000, 16, 8)),
        (1000, published("Gemma3", 26, 1152, 6912, 262144, 4, 1)),
        (30532, published("Qwen3Moe", 48, 2048, 6144, 151936, 32, 4, **QWEN3_EXPERTS)),
        (14316, published("Qwen2Moe", 24, 2048, 5632, 151936, 16, 16, **QWEN2_EXPERTS)),
        (15706, published("DeepseekV2", 27, 2048, 10944, 102400, 16, 16, **LITE, first_k_dense_replace=1)),
        (671026, published("DeepseekV3", 61, 7168, 18432, 129280, 128, 128, **V3, first_k_dense_replace=3)),
    ],
)
def test_models_have_as_many_parameters_as_their_authors_say(millions, config):
    assert round(plan_for(config).num_parameters / 1e6) == millions
