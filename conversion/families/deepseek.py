"""DeepSeek-V2, V2-Lite and V3: latent attention, shared experts, the first layers without experts."""

import dataclasses

from . import dense, moe
from .family import Condition, ExpertLayers, ModelFamily, PredictionLayers, Rule, Setting

_ATTENTION, _MLP = "decoder.layers.self_attention.", "decoder.layers.mlp."
_HF_LAYER = "model.layers.{layer}."
_HF_ATTENTION, _HF_MLP = _HF_LAYER + "self_attn.", _HF_LAYER + "mlp."


def _rope(name: str) -> tuple[str, str]:
    return f"rope_parameters.{name}", f"rope_scaling.{name}"


SETTINGS = (
    *dense.SETTINGS,
    *moe.SETTINGS,
    Setting(("n_routed_experts", "num_local_experts", "num_experts"), "num_moe_experts", "count"),
    Setting("n_shared_experts", "moe_shared_expert_intermediate_size", "count", times="moe_ffn_hidden_size"),
    Setting("routed_scaling_factor", "moe_router_topk_scaling_factor", "number", default=1.0),
    Setting("q_lora_rank", "q_lora_rank", default=1536, null=None),
    Setting("kv_lora_rank", "kv_lora_rank"),
    Setting("qk_nope_head_dim", "qk_head_dim"),
    Setting("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    Setting("v_head_dim", "v_head_dim"),
    Setting(dense.ROPE_TYPE, "rope_type", default="rope", values=(("default", "rope"), ("yarn", "yarn"))),
    Setting(_rope("factor"), "rotary_scaling_factor", "number", default=1.0),
    Setting(_rope("original_max_position_embeddings"), "original_max_position_embeddings", default=4096),
    Setting(_rope("beta_fast"), "beta_fast", "number", default=32.0),
    Setting(_rope("beta_slow"), "beta_slow", "number", default=1.0),
    Setting(_rope("mscale"), "mscale", "number", default=1.0),
    Setting(_rope("mscale_all_dim"), "mscale_all_dim", "number", default=0.0),
)

CONSTANTS = {
    **dense.CONSTANTS,
    **moe.CONSTANTS,
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "moe_router_dtype": "fp32",
}

ATTENTION = (
    Rule("decoder.layers.input_layernorm.weight", {_HF_LAYER + "input_layernorm.weight": ("hidden",)}),
    Rule(
        _ATTENTION + "linear_q_proj.weight",
        {_HF_ATTENTION + "q_proj.weight": ("query_nope+query_rope", "hidden")},
        unless="q_lora_rank",
    ),
    Rule(
        _ATTENTION + "linear_q_down_proj.weight",
        {_HF_ATTENTION + "q_a_proj.weight": ("query_rank", "hidden")},
        only_if="q_lora_rank",
    ),
    Rule(
        _ATTENTION + "linear_q_up_proj.layer_norm_weight",
        {_HF_ATTENTION + "q_a_layernorm.weight": ("query_rank",)},
        only_if="q_lora_rank",
    ),
    Rule(
        _ATTENTION + "linear_q_up_proj.weight",
        {_HF_ATTENTION + "q_b_proj.weight": ("query_nope+query_rope", "query_rank")},
        only_if="q_lora_rank",
    ),
    Rule(
        _ATTENTION + "linear_kv_down_proj.weight",
        {_HF_ATTENTION + "kv_a_proj_with_mqa.weight": ("kv_rank+rope", "hidden")},
    ),
    Rule(
        _ATTENTION + "linear_kv_up_proj.layer_norm_weight",
        {_HF_ATTENTION + "kv_a_layernorm.weight": ("kv_rank",)},
    ),
    Rule(
        _ATTENTION + "linear_kv_up_proj.weight",
        {_HF_ATTENTION + "kv_b_proj.weight": ("query_nope+value", "kv_rank")},
    ),
    Rule(_ATTENTION + "linear_proj.weight", {_HF_ATTENTION + "o_proj.weight": ("hidden", "value")}),
)
SHARED_EXPERTS = (
    Rule(
        _MLP + "shared_experts.linear_fc1.weight",
        {
            _HF_MLP + "shared_experts.gate_proj.weight": ("shared_ffn", "hidden"),
            _HF_MLP + "shared_experts.up_proj.weight": ("shared_ffn", "hidden"),
        },
        layers="experts",
    ),
    Rule(
        _MLP + "shared_experts.linear_fc2.weight",
        {_HF_MLP + "shared_experts.down_proj.weight": ("hidden", "shared_ffn")},
        layers="experts",
    ),
)
ROUTER_BIAS = (
    Rule(_MLP + "router.expert_bias", {_HF_MLP + "gate.e_score_correction_bias": ("experts",)}, layers="experts"),
)
RULES = dense.EMBEDDING + ATTENTION + dense.MLP + moe.NORM + moe.ROUTER + moe.EXPERTS + SHARED_EXPERTS + dense.OUTPUT

EXACT_WHEN = (
    dense.SWIGLU_ONLY,
    Condition(dense.ROPE_TYPE, ("default", "yarn", None), "only default and yarn rotary positions are built"),
    Condition("rms_norm_eps", (1e-6,), "transformers takes 1e-6 for the norms inside attention, megatron-core this"),
    Condition("attention_bias", (False, None), "latent attention with biases is not built"),
)

DEEPSEEK_V2 = ModelFamily(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    reward_architectures=("DeepseekV2ForSequenceClassification",),
    settings=SETTINGS,
    constants=CONSTANTS,
    rules=RULES,
    expert_layers=ExpertLayers(first="first_k_dense_replace"),
    exact_when=(
        *EXACT_WHEN,
        Condition("topk_method", ("greedy", None), "megatron-core 0.16.1 scores groups by more than their best expert"),
        Condition("norm_topk_prob", (False, None), "transformers does not compute it"),
    ),
)

PREDICTION_LAYERS = PredictionLayers(
    count="num_nextn_predict_layers",
    rules=(
        Rule("enorm.weight", {_HF_LAYER + "enorm.weight": ("hidden",)}),
        Rule("hnorm.weight", {_HF_LAYER + "hnorm.weight": ("hidden",)}),
        Rule("eh_proj.weight", {_HF_LAYER + "eh_proj.weight": ("hidden", "hidden+hidden")}),
        Rule("final_layernorm.weight", {_HF_LAYER + "shared_head.norm.weight": ("hidden",)}),
    ),
    copies={
        _HF_LAYER + "embed_tokens.weight": "embedding.word_embeddings.weight",
        _HF_LAYER + "shared_head.head.weight": "output_layer.weight",
    },
)

DEEPSEEK_V3 = dataclasses.replace(
    DEEPSEEK_V2,
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    reward_architectures=("DeepseekV3ForSequenceClassification",),
    settings=(
        *SETTINGS,
        Setting("routed_scaling_factor", "moe_router_topk_scaling_factor", "number", default=2.5),
        Setting("n_group", "moe_router_num_groups", "count", default=8),
        Setting("topk_group", "moe_router_group_topk", "count", default=4),
        dataclasses.replace(moe.NORM_TOPK, default=False),
    ),
    constants={
        **CONSTANTS,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,  # tuning leaves the bias as it is
    },
    rules=RULES + ROUTER_BIAS,
    prediction_layers=PREDICTION_LAYERS,
    exact_when=(
        *EXACT_WHEN,
        Condition("norm_topk_prob", (True, None), "megatron-core's sigmoid scores always add up to 1"),
        Condition(
            "num_experts_per_tok",
            (2,),
            "divided by topk_group it is the number of experts that megatron-core scores a group by; the model takes 2",
            over="topk_group",
            unless=("n_group", 1),
        ),
        Condition("rope_interleave", (True, None), "only interleaved rotary positions are built in latent attention"),
    ),
)
