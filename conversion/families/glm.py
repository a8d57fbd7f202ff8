"""GLM-4: rotary positions over half of each head, neighbours paired; the 0414 release norms its outputs too."""

import dataclasses

from . import dense
from .family import ModelFamily, Rule, Setting

_LAYER = "model.layers.{layer}."

GLM = ModelFamily(
    name="glm",
    architectures=("GlmForCausalLM",),
    reward_architectures=("GlmForSequenceClassification",),
    settings=(
        *dense.SETTINGS,
        dataclasses.replace(dense.ATTENTION_BIAS, default=True),
        Setting("head_dim", "kv_channels", default=128),
        dataclasses.replace(dense.PARTIAL_ROTARY, default=0.5),
    ),
    constants={**dense.CONSTANTS, "rotary_interleaved": True},
    rules=dense.EMBEDDING + dense.ATTENTION + (dense.MLP_NORM + dense.FUSED_GATE_UP + dense.DOWN) + dense.OUTPUT,
    exact_when=dense.EXACT_WHEN,
)

GLM4 = dataclasses.replace(
    GLM,
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    reward_architectures=("Glm4ForSequenceClassification",),
    rules=(
        *GLM.rules,
        Rule(dense.POST_ATTENTION_NORM, {_LAYER + "post_self_attn_layernorm.weight": ("hidden",)}),
        Rule(dense.POST_MLP_NORM, {_LAYER + "post_mlp_layernorm.weight": ("hidden",)}),
    ),
    never_exact=(dense.NO_POST_NORMS,),
)
