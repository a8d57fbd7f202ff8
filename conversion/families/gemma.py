"""Gemma 2 and the text models of Gemma 3. Their norms multiply by 1 + weight."""

import dataclasses

from . import dense
from .family import ModelFamily, Rule, Setting

_LAYER = "model.layers.{layer}."
_NORMS = (
    Rule(dense.POST_ATTENTION_NORM, {_LAYER + "post_attention_layernorm.weight": ("hidden",)}),
    Rule("decoder.layers.mlp.linear_fc1.layer_norm_weight", {_LAYER + "pre_feedforward_layernorm.weight": ("hidden",)}),
    Rule(dense.POST_MLP_NORM, {_LAYER + "post_feedforward_layernorm.weight": ("hidden",)}),
)
_SCALED_EMBEDDING = "its embeddings are multiplied by sqrt(hidden_size), which megatron-core 0.16.1 does not do"

GEMMA2 = ModelFamily(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    reward_architectures=("Gemma2ForSequenceClassification",),
    settings=(
        *dense.SETTINGS,
        dense.ATTENTION_BIAS,
        Setting("head_dim", "kv_channels", default=256),
        Setting("tie_word_embeddings", "share_embeddings_and_output_weights", "flag", default=True),
    ),
    constants={**dense.CONSTANTS, "layernorm_zero_centered_gamma": True, "activation": "gelu_tanh"},
    rules=dense.EMBEDDING + dense.ATTENTION + dense.PROJ_BIAS + _NORMS + dense.GATE_UP + dense.DOWN + dense.OUTPUT,
    never_exact=(
        dense.NO_POST_NORMS,
        _SCALED_EMBEDDING,
        "attention scores and logits are capped by tanh, which megatron-core 0.16.1 does not do",
    ),
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    reward_architectures=("Gemma3TextForSequenceClassification",),
    settings=(
        *GEMMA2.settings,
        Setting(
            ("rope_parameters.full_attention.rope_theta", "rope_theta"), "rotary_base", "number", default=1_000_000.0
        ),
    ),
    constants={**GEMMA2.constants, "qk_layernorm": True},
    rules=GEMMA2.rules + dense.QK_NORM,
    never_exact=(
        dense.NO_POST_NORMS,
        _SCALED_EMBEDDING,
        "five layers of six attend over a window with rotary positions of their own, which is not built",
    ),
)
