"""Every family: names as Transformer Engine saves them, bits both ways, and what training refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_mcore, mcore_to_hf
from conversion.families import FAMILIES, family_for
from conversion.families.family import REQUIRED
from conversion.hf_as_mcore import HfAsMcore
from conversion.mcore_checkpoint import McoreCheckpoint
from conversion.plan import plan_for
from conversion.settings import places, settings_of, untrainable_reasons
from tests.conversion_models import CONVERTED, EXPERTS, MODELS, TRAINED, write_model
from toolkits.foundation.errors import CheckpointError

# What megatron-core 0.16.1 with Transformer Engine saves for the models of tests/conversion_models.py, written down by
# hand: 4 layers, hidden size 48, 6 heads in 2 groups, MLP 112, 251 words.
EMBEDDING = {"embedding.word_embeddings.weight": (251, 48), "decoder.final_layernorm.weight": (48,)}
OUTPUT = {"output_layer.weight": (251, 48)}
MLP = {
    "mlp.linear_fc1.layer_norm_weight": (48,),
    "mlp.linear_fc1.weight": (224, 48),
    "mlp.linear_fc2.weight": (48, 112),
}
POST_NORMS = {
    "self_attention.linear_proj.post_layernorm.weight": (48,),
    "mlp.linear_fc2.post_layernorm.weight": (48,),
}
ROUTED = {"pre_mlp_layernorm.weight": (48,), "mlp.router.weight": (4, 48)}
EXPERT_MLPS = {
    "mlp.experts.experts.linear_fc1.weight": (4, 56, 48),
    "mlp.experts.experts.linear_fc2.weight": (4, 48, 28),
}
SHARED = {
    "mlp.shared_experts.linear_fc1.weight": (120, 48),
    "mlp.shared_experts.linear_fc2.weight": (48, 60),
    "mlp.shared_experts.gate_weight": (1, 48),
}
# The shared expert is as wide as three of 28.
DEEPSEEK_SHARED = {
    "mlp.shared_experts.linear_fc1.weight": (168, 48),
    "mlp.shared_experts.linear_fc2.weight": (48, 84),
}


def attention(qkv, query, *, head=None, bias=False):
    found = {
        "self_attention.linear_qkv.layer_norm_weight": (48,),
        "self_attention.linear_qkv.weight": (qkv, 48),
        "self_attention.linear_proj.weight": (48, query),
    }
    if head:
        found |= {f"self_attention.{each}_layernorm.weight": (head,) for each in "qk"}
    return found | ({"self_attention.linear_qkv.bias": (qkv,)} if bias else {})


def latent_attention(*, low_rank_query):
    query = {
        "self_attention.linear_q_down_proj.weight": (36, 48),
        "self_attention.linear_q_up_proj.layer_norm_weight": (36,),
        "self_attention.linear_q_up_proj.weight": (144, 36),
    }
    return {
        **(query if low_rank_query else {"self_attention.linear_q_proj.weight": (144, 48)}),
        "input_layernorm.weight": (48,),
        "self_attention.linear_kv_down_proj.weight": (54, 48),
        "self_attention.linear_kv_up_proj.layer_norm_weight": (44,),
        "self_attention.linear_kv_up_proj.weight": (192, 44),
        "self_attention.linear_proj.weight": (48, 108),
    }


def alike(layer, outside=OUTPUT):
    """Layers that are all alike are merged."""
    return EMBEDDING | outside | {f"decoder.layers.{name}": (4, *shape) for name, shape in layer.items()}


def mixed(*layers):
    """Layers that are not have a key each."""
    return (
        EMBEDDING
        | OUTPUT
        | {f"decoder.layers.{n}.{name}": shape for n, layer in enumerate(layers) for name, shape in layer.items()}
    )


QWEN2_LAYER = attention(80, 48, bias=True)
QWEN3_LAYER = attention(200, 120, head=20)
BIASES = {
    "self_attention.linear_qkv.bias": (80,),
    "self_attention.linear_proj.bias": (48,),
    "mlp.linear_fc1.bias": (224,),
    "mlp.linear_fc2.bias": (48,),
}
V2_ATTENTION, V2_EXPERTS = latent_attention(low_rank_query=True), ROUTED | EXPERT_MLPS | DEEPSEEK_SHARED
V3_EXPERTS = {
    **V2_EXPERTS,
    "mlp.router.weight": (8, 48),
    "mlp.router.expert_bias": (8,),
    "mlp.experts.experts.linear_fc1.weight": (8, 56, 48),
    "mlp.experts.experts.linear_fc2.weight": (8, 48, 28),
}
NAMES = {
    "untied": alike(QWEN2_LAYER | MLP),
    "qwen3": alike(QWEN3_LAYER | MLP),
    "qwen3-tied": alike(attention(120, 72, head=12) | MLP, {}),
    "qwen3-biases": alike(
        QWEN3_LAYER | MLP | {"self_attention.linear_qkv.bias": (200,), "self_attention.linear_proj.bias": (48,)}
    ),
    "llama2": alike(attention(144, 48) | MLP),
    "llama3.1": alike(attention(80, 48) | MLP),
    "llama3.2": alike(attention(200, 120) | MLP, {}),
    "llama-biases": alike(attention(80, 48) | MLP | BIASES),
    "mistral": alike(attention(200, 120) | MLP),
    "phi3": alike(attention(80, 48) | MLP),
    "phi-partial-rotary": alike(attention(80, 48) | MLP, {}),
    "glm": alike(attention(200, 120, bias=True) | MLP),
    "glm4": alike(attention(200, 120, bias=True) | MLP | POST_NORMS),
    "gemma2": alike(attention(200, 120) | MLP | POST_NORMS, {}),
    "gemma3": alike(attention(200, 120, head=20) | MLP | POST_NORMS, {}),
    "qwen2-moe": alike(QWEN2_LAYER | ROUTED | EXPERT_MLPS | SHARED),
    "qwen2-moe-every-other": mixed(*[attention(80, 48) | MLP, attention(80, 48) | ROUTED | EXPERT_MLPS | SHARED] * 2),
    "qwen3-moe": alike(QWEN3_LAYER | ROUTED | EXPERT_MLPS),
    "qwen3-moe-mixed": mixed(*[QWEN3_LAYER | MLP, QWEN3_LAYER | ROUTED | EXPERT_MLPS] * 2),
    "mixtral": alike(
        attention(80, 48)
        | ROUTED
        | {
            "mlp.experts.experts.linear_fc1.weight": (4, 224, 48),
            "mlp.experts.experts.linear_fc2.weight": (4, 48, 112),
        }
    ),
    "deepseek-v2-lite": mixed(
        latent_attention(low_rank_query=False) | MLP, *[latent_attention(low_rank_query=False) | V2_EXPERTS] * 3
    ),
    "deepseek-v2": mixed(V2_ATTENTION | MLP, *[V2_ATTENTION | V2_EXPERTS] * 3),
    "deepseek-v3": mixed(V2_ATTENTION | MLP, *[V2_ATTENTION | V3_EXPERTS] * 3),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_transformer_engine(name):
    assert {key: info.shape for key, info in plan_for(MODELS[name]).tensors.items()} == NAMES[name]


def test_every_family_has_a_tiny_model():
    assert {family_for(config).name for config in MODELS.values()} == {family.name for family in FAMILIES}
    assert {family_for(MODELS[name]).name for name in NAMES} == {family.name for family in FAMILIES}


def test_the_byte_objects_are_those_of_transformer_engine():
    """One for each linear layer, norm and attention; the router and the embedding are not Transformer Engine's."""
    in_layers = {
        "qwen3": ["core_attention", "linear_qkv", "linear_proj", "q_layernorm", "k_layernorm"],
        "qwen3-moe": ["core_attention", "linear_qkv", "linear_proj", "q_layernorm", "k_layernorm"],
    }
    expected = {
        name: [
            f"decoder.layers.self_attention.{module}._extra_state/shard_{n}_4" for module in modules for n in range(4)
        ]
        + ["decoder.final_layernorm._extra_state/shard_0_1"]
        for name, modules in in_layers.items()
    }
    expected["qwen3"] += [f"decoder.layers.mlp.linear_fc{i}._extra_state/shard_{n}_4" for i in (1, 2) for n in range(4)]
    expected["qwen3-moe"] += [f"decoder.layers.pre_mlp_layernorm._extra_state/shard_{n}_4" for n in range(4)]
    expected["qwen3-moe"] += [
        f"decoder.layers.mlp.experts.experts.linear_fc{i}._extra_state/shard_{n}.{e}_4.4"
        for i in (1, 2)
        for n in range(4)
        for e in range(4)
    ]
    for name, keys in expected.items():
        assert sorted(plan_for(MODELS[name]).extra_states) == sorted(keys)
    first, *_, last = sorted(plan_for(MODELS["deepseek-v3"]).extra_states)
    assert first == "decoder.final_layernorm._extra_state/shard_0_1"
    assert last == "decoder.layers.3.self_attention.linear_q_up_proj._extra_state/shard_0_1"


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_wrote_comes_back_bit_for_bit(tmp_path, name):
    hf = write_model(tmp_path / "hf", MODELS[name])
    plan = hf_to_mcore.convert(hf, tmp_path / "mcore", verify=False)
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back", verify=False)
    tensors, back = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "back"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) and back[key].dtype == tensors[key].dtype for key in tensors)
    assert plan.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert json.loads((tmp_path / "back" / "config.json").read_text()).items() >= MODELS[name].items()
    lazy, written = HfAsMcore(hf), McoreCheckpoint(tmp_path / "mcore")
    for key, info in lazy.tensors.items():
        start, shape = tuple(size // 3 for size in info.shape), tuple(max(1, size // 2) for size in info.shape)
        assert torch.equal(lazy.read(key, start, shape), written.read(key, start, shape)), key


def test_what_is_trained_and_what_is_not():
    for config in (TRAINED | EXPERTS).values():
        assert untrainable_reasons(config) == []
    assert all(untrainable_reasons(config) for config in CONVERTED.values())


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mistral", {"sliding_window": 63}, "sliding_window=63: attention over a window shorter than"),
        ("mistral", {"sliding_window": 64}, None),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, "sliding_window=4096"),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 4096}, None),
        ("phi3", {"sliding_window": 47}, "sliding_window=47"),
        ("phi3", {"sliding_window": ...}, None),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_scaling.type=longrope: only the default rotary"),
        ("llama3.1", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None"),
        ("llama3.2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type=yarn: only default and"),
        ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type=dynamic"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True: sliding-window attention is not built"),
        ("glm", {"hidden_act": "gelu"}, "hidden_act=gelu: only the SwiGLU MLP is built"),
        ("deepseek-v2", {"topk_method": "group_limited_greedy"}, "topk_method=group_limited_greedy"),
        ("deepseek-v3", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("deepseek-v3", {"num_experts_per_tok": 6}, "num_experts_per_tok=6: divided by topk_group"),
        ("deepseek-v3", {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1}, None),
        ("deepseek-v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
    ],
)
def test_what_training_refuses_is_converted(name, change, reason):
    changed = {key: value for key, value in (MODELS[name] | change).items() if value is not ...}
    assert plan_for(changed).steps
    said = untrainable_reasons(changed)
    assert said == [] if reason is None else any(reason in line for line in said), said


@pytest.mark.parametrize("field", ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_numbers_that_megatron_core_has_built_in_are_held_against_the_config(field):
    scaling = MODELS["llama3.1"]["rope_scaling"]
    (reason,) = untrainable_reasons(MODELS["llama3.1"] | {"rope_scaling": {**scaling, field: 2 * scaling[field]}})
    assert f"rope_scaling.{field}={2 * scaling[field]}: megatron-core has this number" in reason


@pytest.mark.parametrize("name", MODELS)
def test_defaults_are_those_of_transformers(name):
    from transformers import AutoConfig

    theirs = type(AutoConfig.for_model(MODELS[name]["model_type"]))  # an object of it has filled in what it derives
    for setting in settings_of(family_for(MODELS[name])).values():
        field = places(setting.hf)[-1]
        default = getattr(theirs, field, None)
        if setting.default is not REQUIRED and default is not None:
            assert dict(setting.values).get(default, default) == setting.default, field


def test_more_experts_than_a_model_has_are_not_believed():
    with pytest.raises(CheckpointError, match=r"says what cannot be: more experts than a model has"):
        plan_for(MODELS["qwen3-moe"] | {"num_experts": 9999, "num_hidden_layers": 9999})


@pytest.mark.parametrize("layers", [{"mlp_only_layers": 3}, {"decoder_sparse_step": 0}, {"decoder_sparse_step": "2"}])
def test_a_config_that_does_not_say_which_layers_have_experts(layers):
    with pytest.raises(CheckpointError, match=r"family qwen3_moe says .*: which layers have experts\?"):
        plan_for(MODELS["qwen3-moe"] | layers)


# Layers that predict further tokens ---------------------------------------------------------------------

V3 = MODELS["deepseek-v3"] | {"num_nextn_predict_layers": 1}
PREDICTION = {
    "enorm.weight": (48,),
    "hnorm.weight": (48,),
    "eh_proj.weight": (48, 96),
    "final_layernorm.weight": (48,),
} | {f"transformer_layer.{name}": shape for name, shape in (V2_ATTENTION | V3_EXPERTS).items()}


def write_prediction_layer(folder):
    """Add layer 4 to DeepSeek-V3's four, as its authors store it: embedding and head are there once more."""
    tensors = load_file(folder / "model.safetensors")
    like = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")}
    random = torch.Generator().manual_seed(9)
    added = {name.replace("layers.3.", "layers.4."): torch.randn(t.shape, generator=random) for name, t in like.items()}
    for name, shape in {"enorm": [48], "hnorm": [48], "eh_proj": [48, 96], "shared_head.norm": [48]}.items():
        added[f"model.layers.4.{name}.weight"] = torch.randn(shape, generator=random)
    added["model.layers.4.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    added["model.layers.4.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | added, folder / "model.safetensors")
    return tensors | added


def test_prediction_layers_are_carried_through(tmp_path):
    hf = write_model(tmp_path / "hf", V3)
    tensors = write_prediction_layer(hf)
    plan = hf_to_mcore.convert(hf, tmp_path / "mcore")
    assert {key: info.shape for key, info in plan.tensors.items()} == NAMES["deepseek-v3"] | {
        f"mtp.layers.0.{name}": shape for name, shape in PREDICTION.items()
    }
    assert "mtp.layers.0.eh_proj._extra_state/shard_0_1" in plan.extra_states
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_prediction_layers_may_have_been_left_out_but_not_in_part(tmp_path):
    hf = write_model(tmp_path / "hf", V3)  # transformers writes none, whatever the config says
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    tensors = write_prediction_layer(hf)
    del tensors["model.layers.4.hnorm.weight"]
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model.layers.4: hnorm.weight"):
        hf_to_mcore.convert(hf, tmp_path / "other")


def test_a_prediction_layer_with_an_embedding_of_its_own_is_refused(tmp_path):
    hf = write_model(tmp_path / "hf", V3)
    tensors = write_prediction_layer(hf)
    tensors["model.layers.4.embed_tokens.weight"] += 1
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.4.embed_tokens.weight is not model.embed_tokens.weight"):
        hf_to_mcore.convert(hf, tmp_path / "mcore")
