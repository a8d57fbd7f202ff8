"""Qwen2, Qwen2.5 and QwQ (biases on query, key and value), Qwen3 (norms of query and key), and both with experts."""

import dataclasses

from . import dense, moe
from .family import ExpertLayers, ModelFamily, Setting

QWEN2 = ModelFamily(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    reward_architectures=("Qwen2ForSequenceClassification",),
    settings=dense.SETTINGS,
    constants={**dense.CONSTANTS, "add_qkv_bias": True},
    rules=dense.EMBEDDING + dense.ATTENTION + dense.MLP + dense.OUTPUT,
    exact_when=(*dense.EXACT_WHEN, dense.NO_WINDOW),
)

QWEN3 = ModelFamily(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    reward_architectures=("Qwen3ForSequenceClassification",),
    settings=(*dense.SETTINGS, dense.ATTENTION_BIAS, Setting("head_dim", "kv_channels", default=128)),
    constants={**dense.CONSTANTS, "qk_layernorm": True},
    rules=dense.EMBEDDING + dense.ATTENTION + dense.PROJ_BIAS + dense.QK_NORM + dense.MLP + dense.OUTPUT,
    exact_when=(*dense.EXACT_WHEN, dense.NO_WINDOW, dense.NO_PROJ_BIAS),
)

QWEN2_MOE = dataclasses.replace(
    QWEN2,
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    reward_architectures=("Qwen2MoeForSequenceClassification",),
    settings=(
        *QWEN2.settings,
        *moe.SETTINGS,
        Setting("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        Setting("qkv_bias", "add_qkv_bias", "flag", default=True),
    ),
    constants={**QWEN2.constants, **moe.CONSTANTS, "moe_shared_expert_gate": True},
    rules=QWEN2.rules + moe.NORM + moe.ROUTER + moe.EXPERTS + moe.SHARED_EXPERT,
    expert_layers=ExpertLayers(step="decoder_sparse_step", dense="mlp_only_layers"),
)

QWEN3_MOE = dataclasses.replace(
    QWEN3,
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    reward_architectures=("Qwen3MoeForSequenceClassification",),
    settings=(*dense.SETTINGS, dense.ATTENTION_BIAS, *moe.SETTINGS),
    constants={**QWEN3.constants, **moe.CONSTANTS},
    rules=QWEN3.rules + moe.NORM + moe.ROUTER + moe.EXPERTS,
    expert_layers=ExpertLayers(step="decoder_sparse_step", dense="mlp_only_layers"),
)
