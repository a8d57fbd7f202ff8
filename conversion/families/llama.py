"""Llama 2, 3, 3.1, 3.2, Mistral and Mixtral."""

import dataclasses

from . import dense, moe
from .family import Condition, ExpertLayers, ModelFamily, Ratio, Rule, Setting

_REASON = "megatron-core has this number of Llama's rotary scaling built in"
_LLAMA3 = (dense.ROPE_TYPE, "llama3")


def _rope(name: str) -> tuple[str, str]:
    return f"rope_parameters.{name}", f"rope_scaling.{name}"


LLAMA = ModelFamily(
    name="llama",
    architectures=("LlamaForCausalLM",),
    reward_architectures=("LlamaForSequenceClassification",),
    settings=(
        *dense.SETTINGS,
        dense.ATTENTION_BIAS,
        Setting("num_key_value_heads", "num_query_groups", "count", default=Ratio("num_attention_heads")),
        Setting("mlp_bias", "add_bias_linear", "flag", default=False),
        Setting(dense.ROPE_THETA, "rotary_base", "number", default=10_000.0),  # Llama 2's files do not say it
        Setting(dense.ROPE_TYPE, "rope_scaling", default=False, values=(("default", False), ("llama3", True))),
        Setting(_rope("factor"), "rope_scaling_factor", "number", default=8.0),
    ),
    constants=dense.CONSTANTS,
    rules=dense.EMBEDDING + dense.ATTENTION + dense.PROJ_BIAS + dense.MLP + dense.MLP_BIAS + dense.OUTPUT,
    exact_when=(
        dense.SWIGLU_ONLY,
        dense.FULL_ATTENTION,
        dense.NO_PROJ_BIAS,
        Condition("mlp_bias", (False, None), "megatron-core has biases on all linear layers or on none"),
        Condition(dense.ROPE_TYPE, ("default", "llama3", None), "only default and llama3 rotary positions are built"),
        Condition(_rope("low_freq_factor"), (1.0,), _REASON, when=_LLAMA3),
        Condition(_rope("high_freq_factor"), (4.0,), _REASON, when=_LLAMA3),
        Condition(_rope("original_max_position_embeddings"), (8192,), _REASON, when=_LLAMA3),
    ),
)

MISTRAL = ModelFamily(
    name="mistral",
    architectures=("MistralForCausalLM",),
    reward_architectures=("MistralForSequenceClassification",),
    settings=dense.SETTINGS,
    constants=dense.CONSTANTS,
    rules=dense.EMBEDDING + dense.ATTENTION + dense.MLP + dense.OUTPUT,
    exact_when=(
        *dense.EXACT_WHEN,
        Condition("sliding_window", (None,), dense.WINDOW_REASON, 4096, "max_position_embeddings"),
    ),
)

_MIXTRAL_MLP, _MIXTRAL = "decoder.layers.mlp.", "model.layers.{layer}.block_sparse_moe."

MIXTRAL = dataclasses.replace(
    MISTRAL,
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    reward_architectures=("MixtralForSequenceClassification",),
    settings=(
        *MISTRAL.settings,
        Setting(("num_local_experts", "num_experts"), "num_moe_experts", "count"),
        Setting("intermediate_size", "moe_ffn_hidden_size"),
        Setting("num_experts_per_tok", "moe_router_topk", "count", default=2),
    ),
    constants={**MISTRAL.constants, **moe.CONSTANTS},
    rules=(
        *MISTRAL.rules,
        *moe.NORM,
        Rule(_MIXTRAL_MLP + "router.weight", {_MIXTRAL + "gate.weight": ("experts", "hidden")}, layers="experts"),
        Rule(
            _MIXTRAL_MLP + "experts.experts.linear_fc1.weight",
            {
                _MIXTRAL + "experts.{expert}.w1.weight": ("expert_ffn", "hidden"),
                _MIXTRAL + "experts.{expert}.w3.weight": ("expert_ffn", "hidden"),
            },
            layers="experts",
        ),
        Rule(
            _MIXTRAL_MLP + "experts.experts.linear_fc2.weight",
            {_MIXTRAL + "experts.{expert}.w2.weight": ("hidden", "expert_ffn")},
            layers="experts",
        ),
    ),
    expert_layers=ExpertLayers(),
    exact_when=(*dense.EXACT_WHEN, dense.NO_SHORT_WINDOW),
)
